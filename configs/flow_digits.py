"""Handwritten digits, 8x8, by flow matching on the straight path: vp_digits with another path.

No paper's table. The network is vp_digits's; it predicts the velocity noise - data (Lipman et al. 2023,
arXiv:2210.02747), at logit-normal times (Esser et al. 2024, arXiv:2403.03206). 1.889 bits/dim; 83 % of
samples look like digits by the demo's classifier, in 35 evaluations each.
"""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("vp_digits.py"))

    training = config.training
    training.sde = "linear"
    training.objective = "flow_matching"
    training.time = "log_normal"
    training.time_mean = 0.0
    training.time_std = 1.0

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
