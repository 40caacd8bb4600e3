"""draft"""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("vp_digits.py"))

    training = config.training
    training.sde = "learned"
    training.likelihood_weighting = True
    training.time = "uniform"

    config.sampling.t_min = 0.0
    config.eval.estimate = "bound"
    config.eval.terms = 100
    config.eval.t_min = 0.0
    config.data.uniform_dequantization = False

    model = config.model
    model.t_min = 0.0
    model.gamma_min = -8.0
    model.learn_ends = True
    model.fourier_features = (3, 4)

    config.optim.grad_clip = 20.0
    return config
