"""The second stage of a cascade for digits: from 4x4 and the class to 8x8 (SR3: Saharia et al. 2021, arXiv:2104.07636).

It is trained on noised small images, for those that it will be given have errors (Ho et al. 2022, arXiv:2106.15282,
section 4.2). Train cascade_digits_4 first; `--mode sample` runs both.
"""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("cond_digits.py"))
    config.training.n_iters = 1700
    config.training.augmentation = 0.3
    config.sampling.base = "runs/cascade_digits_4"
    config.sampling.augmentation = 0.1
    config.model.super_resolution = 2
    return config
