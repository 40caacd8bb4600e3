"""NCSNv2 on CIFAR-10: 232 noise levels, an unconditional RefineNet over sigma, five Langevin steps per level.

Song & Ermon 2020 (arXiv:2006.09011), table 1 and appendix B. Follows ermongroup/ncsnv2's configs/cifar10.yml, which
score_sde's configs/ve/ncsnv2/cifar10.py repeats: sigma from 50 to 0.01 (techniques 1 and 2), the score is the network's
output over sigma (technique 3: the rule "noise", whose output has the other sign), eps 6.2e-6 (technique 4), a moving
average of rate 0.999 (technique 5), 300,000 steps of 128 images, Adam with rate 1e-4, pixels k/255, a denoising step
at the end. Up to 64x64 pixels model.ch_mult is the default; the published networks for 128x128 and 256x256 are
(1, 2, 2, 4, 4) and (1, 2, 2, 2, 4, 4).

Departures: sampling starts from N(0, sigma_max²) instead of uniform pixels; the moving average begins faster, as
score_sde's does. Bits/dim, which the paper has not, take the image as the state at the smallest sigma.
"""

from ml_collections import ConfigDict

from score_sde.config import default_config


def get_config() -> ConfigDict:
    config = default_config()

    training = config.training
    training.sde = "vesde"
    training.continuous = False
    training.n_iters = 300_000
    training.reduce_mean = False

    sampling = config.sampling
    sampling.method = "ald"
    sampling.step_lr = 6.2e-6
    sampling.n_steps_each = 5
    sampling.steps = 232

    config.eval.estimate = "ode"
    config.eval.t_min = 1 / 232

    config.data.centered = False

    model = config.model
    model.name = "ncsnv2"
    model.num_scales = 232
    model.dropout = 0.0
    model.nonlinearity = "elu"
    model.ema_rate = 0.999

    optim = config.optim
    optim.lr = 1e-4
    optim.warmup = 0
    optim.grad_clip = -1.0
    return config
