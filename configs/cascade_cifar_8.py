"""The first stage of a cascade for CIFAR-10, 8 to 16 to 32 (Ho et al. 2022, arXiv:2106.15282): classes at 8x8.

cond_cifar_small at a quarter of the size. The three stages together take the operations of cond_cifar_small in
training: 4000 steps of 59 MFLOP an image, 2500 of 355 and 1200 of 1406, against 2000 of 1404. For images of 1024 the
same three stages are data.image_size=64, then 256 and 1024 with model.super_resolution=4, of a folder of images.
"""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("cond_cifar_small.py"))
    config.training.n_iters = 4000
    config.data.image_size = 8
    config.model.ch_mult = (1, 2)
    config.model.attn_resolutions = (4,)
    return config
