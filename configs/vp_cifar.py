"""DDPM++ with the VP SDE in continuous time, on CIFAR-10: "DDPM++ cont. (VP)" of Song et al. 2021, tables 2 and 3.

The hyperparameters of its appendix H and of score_sde's configs/vp/cifar10_ddpmpp_continuous.py are this package's
defaults, so that there is nothing to add. Departures: none in training; the likelihood's solver is dopri5 instead of
scipy's RK45, which is the same method.
"""

from ml_collections import ConfigDict

from score_sde.config import default_config


def get_config() -> ConfigDict:
    return default_config()
