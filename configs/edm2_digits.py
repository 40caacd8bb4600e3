"""Handwritten digits with EDM2's network, conditioned on the class: minutes on a CPU.

The network is configuration G of Karras et al. 2024 (arXiv:2312.02696), small: 181 thousand parameters. As there, a
learned uncertainty weights the noise levels, Adam has decays of 0.9 and 0.99 and a large learning rate, and nothing
else holds weights or gradients back. What is different: the SDE, t uniform in log SNR and dequantised pixels are those
of `vp_digits`, and the learning rate falls to 0 over the last part of the run, where theirs falls with the square root.
It reaches 1.826 bits/dim (ODE, dequantised pixels) given each digit's class, and 95 % of samples that look like digits
by a classifier that is more than 90 % sure.
"""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("vp_digits.py"))

    config.training.uncertainty = True

    model = config.model
    model.name = "edm2"
    model.label = "edm"
    model.class_conditional = True

    optim = config.optim
    optim.optimizer = "Adam"
    optim.lr = 2e-2
    optim.weight_decay = 0.0
    optim.grad_clip = -1.0
    return config
