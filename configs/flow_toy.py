"""Eight Gaussians in the plane by flow matching on the straight path: a small network in a minute.

No paper's table; the data are the toy density "ring", whose exact velocity follows from `closed_form.Mixture`. The
loss is conditional flow matching's (Lipman et al. 2023, arXiv:2210.02747), of noise - data, with logit-normal times
(Esser et al. 2024, arXiv:2403.03206). All that differs from vp_toy is the path, what the network predicts, the loss
and the times.
"""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("vp_toy.py"))

    training = config.training
    training.sde = "linear"
    training.objective = "flow_matching"
    training.time = "log_normal"
    training.time_mean = 0.0
    training.time_std = 1.0

    sampling = config.sampling
    sampling.method = "fast"
    sampling.grid = "arcsinh"
    sampling.steps = 25
    sampling.noise_removal = False

    model = config.model
    model.rule = "velocity"
    model.label = "time"
    model.t_min = 1e-3  # sigma is t on this path: vp's smallest sigma, at its t_min of 1e-5
    config.eval.t_min = 1e-3
    return config
