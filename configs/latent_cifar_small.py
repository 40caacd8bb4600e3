"""Latent diffusion on CIFAR-10 in twelve minutes on a CPU: a small U-Net for the codes of autoencoder_cifar_small.

The recipe is that of vp_cifar_small, the state a sixth of its size.
"""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("vp_cifar_small.py"))

    training = config.training
    training.batch_size = 64
    training.n_iters = 4000
    training.snapshot_freq = 4000

    config.data.autoencoder = "runs/autoencoder_cifar_small"
    config.data.uniform_dequantization = False

    model = config.model
    model.sigma_data = 1.0
    model.nf = 32
    model.ch_mult = (1, 2)
    model.attn_resolutions = (4,)
    return config
