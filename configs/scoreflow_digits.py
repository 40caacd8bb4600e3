"""Handwritten digits by maximum likelihood training, in about three minutes on one core.

Song et al. 2021b (arXiv:2101.09258) in small: sub-VP SDE, likelihood weighting with importance-sampled t, smallest time
1e-2, as scoreflow_cifar; network, data and optimizer of vp_digits, with half of its steps.
"""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("vp_digits.py"))

    training = config.training
    training.sde = "subvpsde"
    training.likelihood_weighting = True
    training.time = "importance"

    config.model.t_min = 1e-2
    config.sampling.t_min = 1e-2
    config.eval.t_min = 1e-2

    config.optim.grad_clip = 20.0  # the weighted loss is the range of log SNR, 22, times vp_digits'
    return config
