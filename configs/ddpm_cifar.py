"""DDPM on CIFAR-10: a chain of 1000 steps with its ancestral sampler.

Ho et al. 2020, section 4: betas 1e-4 .. 0.02. Follows its appendix B in training, for 800,000 steps, and score_sde's
configs/vp/ddpm/cifar10.py in the rest. The chain is the VP SDE discretised, so its betas are beta_min/1000 ..
beta_max/1000. Departure: sampling takes the posterior's variance, which the paper found as good as the larger one.
"""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("vp_cifar.py"))
    config.training.continuous = False
    config.training.n_iters = 800_000
    config.sampling.predictor = "ancestral_sampling"
    config.model.name = "ddpm"
    config.model.label = "index"
    config.model.num_res_blocks = 2
    return config
