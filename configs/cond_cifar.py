"""DDPM++ with the VP SDE, on CIFAR-10, conditioned on the class; otherwise vp_cifar."""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("vp_cifar.py"))
    config.model.class_conditional = True
    return config
