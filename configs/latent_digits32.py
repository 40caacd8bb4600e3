"""Latent diffusion on digits of 32x32: vp_digits' recipe for the codes of autoencoder_digits32, 8 x 8.

Rombach et al. 2022 (arXiv:2112.10752): first `--mode train --config configs/autoencoder_digits32.py`. Codes have unit
variance in each channel; everything else is as for pixels, and bits/dim are a bound with the autoencoder's terms.
"""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("vp_digits.py"))

    training = config.training
    training.n_iters = 500

    data = config.data
    data.dataset = "digits32"
    data.image_size = 32
    data.autoencoder = "runs/autoencoder_digits32"
    data.uniform_dequantization = False

    config.model.sigma_data = 1.0
    return config
