"""The second stage of a cascade for CIFAR-10: from 8x8 and the class to 16x16, trained on noised small images."""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("cond_cifar_small.py"))
    config.training.n_iters = 2500
    config.training.augmentation = 0.3
    config.sampling.base = "runs/cascade_cifar_8"
    config.sampling.augmentation = 0.1
    config.data.image_size = 16
    config.model.super_resolution = 2
    config.model.attn_resolutions = (4,)
    return config
