"""DDPM++ with the sub-VP SDE, on CIFAR-10.

"DDPM++ cont. (sub-VP)" of Song et al. 2021, tables 2 and 3. As vp_cifar in all but the SDE, as there and in
score_sde's configs/subvp/cifar10_ddpmpp_continuous.py.
"""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("vp_cifar.py"))
    config.training.sde = "subvpsde"
    return config
