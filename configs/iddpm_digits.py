"""Handwritten digits, 8x8, as a chain with learned variances: Improved DDPM in small.

Nichol & Dhariwal 2021 (arXiv:2102.09672): cosine schedule, L_hybrid, bits/dim by the variational bound.
"""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("vp_digits.py"))

    training = config.training
    training.sde = "cosine"
    training.continuous = False
    training.objective = "hybrid"
    training.time = "uniform"

    sampling = config.sampling
    sampling.variance = "learned"
    sampling.grid = "uniform"
    sampling.steps = 60

    config.data.uniform_dequantization = False

    model = config.model
    model.num_scales = 250
    model.learned_variance = True
    return config
