"""Latent diffusion on CIFAR-10: the codes of autoencoder_cifar, 8 x 8 x 8, by the VP SDE and a small U-Net.

Rombach et al. 2022 (arXiv:2112.10752): first `--mode train --config configs/autoencoder_cifar.py`. Codes have unit
variance in each channel, which EDM's preconditioning (Karras et al. 2022) uses.
"""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("vp_cifar.py"))

    training = config.training
    training.n_iters = 200_000
    training.time = "log_snr"
    training.low_discrepancy = True

    sampling = config.sampling
    sampling.method = "heun"
    sampling.grid = "karras"
    sampling.steps = 18

    config.data.autoencoder = "runs/autoencoder_cifar"

    model = config.model
    model.rule = "edm"
    model.label = "log_sigma"
    model.sigma_data = 1.0
    model.ch_mult = (1, 2)
    model.num_res_blocks = 2
    model.attn_resolutions = (8, 4)
    return config
