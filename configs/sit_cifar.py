"""A small SiT on CIFAR-10, class-conditional: DiT's network on the straight path.

Ma et al. 2024 (SiT, arXiv:2401.08740): DiT with the velocity of a linear interpolant, uniform times, and DiT's
optimizer; the paper trains on latents of ImageNet at 256x256. All that differs from dit_cifar is the path.
"""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("dit_cifar.py"))

    training = config.training
    training.sde = "linear"
    training.objective = "flow_matching"
    training.time = "uniform"
    training.low_discrepancy = False

    sampling = config.sampling
    sampling.method = "fast"
    sampling.grid = "arcsinh"
    sampling.steps = 35

    model = config.model
    model.rule = "velocity"
    model.label = "time"
    model.t_min = 1e-3  # sigma is t on this path: vp's smallest sigma, at its t_min of 1e-5
    config.eval.t_min = 1e-3
    return config
