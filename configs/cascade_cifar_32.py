"""The last stage of a cascade for CIFAR-10: from 16x16 and the class to 32x32; `--mode sample` runs all three."""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("cond_cifar_small.py"))
    config.training.n_iters = 1200
    config.training.augmentation = 0.3
    config.sampling.base = "runs/cascade_cifar_16"
    config.sampling.augmentation = 0.1
    config.model.super_resolution = 2
    return config
