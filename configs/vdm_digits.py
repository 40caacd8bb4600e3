"""draft"""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("vp_digits.py"))

    training = config.training
    training.sde = "learned"
    training.n_iters = 1250
    training.likelihood_weighting = True
    training.time = "uniform"
    training.snapshot_freq = 250

    config.model.t_min = 0.0
    config.model.gamma_min = -13.3
    config.model.fourier_features = (3, 4)
    config.sampling.t_min = 0.0
    config.eval.t_min = 0.0

    config.optim.grad_clip = 20.0
    return config
