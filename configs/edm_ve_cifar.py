"""EDM on CIFAR-10 with its "VE" network, NCSN++ of three levels: 56.4 million parameters.

As edm_vp_cifar, after Karras et al. 2022 (arXiv:2206.00364), but for the network: Fourier features of the noise level,
FIR resampling and a residual input pyramid. Their features are of log(sigma)/4 with frequencies of deviation 16; here,
the same in law, of log(sigma) with deviation 4.
"""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("edm_vp_cifar.py"))
    model = config.model
    model.label = "sigma"
    model.embedding_type = "fourier"
    model.fourier_scale = 4.0
    model.fir = True
    model.progressive_input = "residual"
    return config
