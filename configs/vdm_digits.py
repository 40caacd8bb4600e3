"""Handwritten digits by VDM: a learned noise schedule, Fourier features of the pixels, the bound as objective.

Kingma et al. 2021 (arXiv:2107.00630) in small, as vdm_cifar: pixels without dequantisation, decoded from the state at
t = 0, learned ends, t of low discrepancy, and features with the periods of two levels and of one. Network, optimizer,
preconditioning and the 2,500 steps are vp_digits', four minutes on one core. The lower end begins at -8, noise of a
seventh of the distance between two of the 17 levels, and is learned to be -6.7, a quarter: below, the decoder tells
levels apart better than the network does.

It reaches at most 1.846 bits/dim (the bound; 0.197 of it the decoder's), and 75 % of samples that look like digits by
a classifier that is more than 90 % sure. The bound is not below vp_digits' 1.793, whose loss, uniform in log SNR, is
the likelihood's already.
"""

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

    config.optim.grad_clip = 20.0  # the weighted loss is the range of log SNR, 13 to begin with, times vp_digits'
    return config
