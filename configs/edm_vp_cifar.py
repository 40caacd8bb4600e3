"""EDM on CIFAR-10 with its "VP" network, DDPM++ of three levels: 55.7 million parameters.

Karras et al. 2022 (arXiv:2206.00364): table 1, column "ours"; table 2, configuration F. Log-normal noise, their
preconditioning and weight, Adam, 200 million images in batches of 512, and their augmentation (appendix F.2), which
mirrors too and tells the network. Sampling is theirs for CIFAR-10: Heun's method in 17 steps without churn, and the
estimate of the clean data, which is their 18th; 35 evaluations. Departure: no gradient is replaced where it is not
finite.
"""

from ml_collections import ConfigDict

from score_sde.config import default_config


def get_config() -> ConfigDict:
    config = default_config()

    training = config.training
    training.sde = "edm"
    training.time = "edm"
    training.n_iters = 390_625
    training.batch_size = 512
    training.geometric = 0.12
    config.data.random_flip = False

    sampling = config.sampling
    sampling.method = "heun"
    sampling.steps = 17
    sampling.t_min = 0.0

    model = config.model
    model.rule = "edm"
    model.label = "edm"
    model.sigma_min = 0.002
    model.sigma_max = 80.0
    model.t_min = 0.0
    model.ch_mult = (2, 2, 2)
    model.dropout = 0.13
    model.ema_halflife = 500_000

    optim = config.optim
    optim.lr = 1e-3
    optim.warmup = 19_531
    optim.grad_clip = -1.0
    return config
