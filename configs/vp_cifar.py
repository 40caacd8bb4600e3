"""DDPM++ with the VP SDE, on CIFAR-10: the paper's hyperparameters.

"DDPM++ cont. (VP)" of Song et al. 2021, tables 2 and 3. The hyperparameters of its appendix H and of score_sde's
configs/vp/cifar10_ddpmpp_continuous.py are this package's defaults, so that there is nothing to add. Departures: none
in training; sampling ends with the estimate of the clean data instead of a step's mean; the likelihood's solver is
Dormand and Prince's pair with steps of each image's own ("embedded") instead of scipy's RK45, the same pair with one
step size for the batch.
"""

from ml_collections import ConfigDict

from score_sde.config import default_config


def get_config() -> ConfigDict:
    return default_config()
