"""NCSN on CIFAR-10: ten noise levels, a RefineNet conditioned on the level, annealed Langevin dynamics.

Song & Ermon 2019 (arXiv:1907.05600), table 1 and appendices A and B. Follows ermongroup/ncsn's configs/anneal.yml with
its entries for CIFAR-10: sigma from 1 to 0.01, 200,000 steps of 128 images, Adam with rate 1e-3, pixels (k + u)/256,
mirroring, no moving average; 100 Langevin steps per level with eps 2e-5, no denoising at the end. The loss, sigma²
times half the squared error of the score, is half the summed error of the noise here.

Departures: sampling starts from N(0, sigma_max²) instead of uniform pixels, and from the last weights instead of the
checkpoint with the best FID. Bits/dim, which the paper has not, take the image as the state at the smallest sigma.
"""

from ml_collections import ConfigDict

from score_sde.config import default_config


def get_config() -> ConfigDict:
    config = default_config()

    training = config.training
    training.sde = "vesde"
    training.continuous = False
    training.n_iters = 200_000
    training.reduce_mean = False

    sampling = config.sampling
    sampling.method = "ald"
    sampling.step_lr = 2e-5
    sampling.n_steps_each = 100
    sampling.noise_removal = False
    sampling.steps = 10

    config.eval.estimate = "ode"
    config.eval.t_min = 1 / 10

    config.data.centered = False
    config.data.uniform_dequantization = True

    model = config.model
    model.name = "ncsn"
    model.rule = "score"
    model.label = "index"
    model.sigma_max = 1.0
    model.num_scales = 10
    model.dropout = 0.0
    model.nonlinearity = "elu"
    model.ema_rate = 0.0

    optim = config.optim
    optim.lr = 1e-3
    optim.warmup = 0
    optim.grad_clip = -1.0
    return config
