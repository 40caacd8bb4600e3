"""Handwritten digits enlarged to 32x32, in pixels: what latent_digits32 is compared with at equal training time.

vp_digits' recipe with three levels in place of two, as autoencoder_digits32 has, and batches of 32.
"""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("vp_digits.py"))

    training = config.training
    training.n_iters = 1000
    training.batch_size = 32

    data = config.data
    data.dataset = "digits32"
    data.image_size = 32

    model = config.model
    model.nf = 8
    model.ch_mult = (1, 2, 4)
    model.attn_resolutions = (8,)
    model.ema_halflife = 10_000
    return config
