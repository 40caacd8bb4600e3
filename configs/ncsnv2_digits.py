"""NCSNv2 on handwritten digits, 8x8: 22 noise levels and the Langevin step by the paper's rules; six minutes.

Song & Ermon 2020 (arXiv:2006.09011) as in ncsnv2_cifar, its RefineNet with 32 channels instead of 128. Levels and step
are what --mode scan suggests: from 4.81, the largest distance of two digits, to 0.01, neighbours overlap by half;
the step is technique 4's for five Langevin steps on a level. Departures: 30 of them, 1,500 training steps of 64 images,
learning rate 2e-3 that rises over 100 steps and falls to 0 over the last four fifths, gradients clipped at 10 (with
6e-3 and no clipping training diverged).

It reaches 2.259 bits/dim by the ODE, and 31 % of samples that look like digits by a classifier that is more than 90 %
sure (a Gaussian's: 10 %); five Langevin steps on a level give 11 %, and 30 of the size that technique 4 has for 30,
7.27e-6, give 16 %. The network is not conditioned on the level, and in these minutes it learns less than ncsn_digits'.
"""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("ncsnv2_cifar.py"))

    training = config.training
    training.n_iters = 1500
    training.batch_size = 64
    training.snapshot_freq = 500
    training.snapshot_sampling = False

    sampling = config.sampling
    sampling.step_lr = 2.35e-5
    sampling.n_steps_each = 30
    sampling.steps = 22
    sampling.num_samples = 100
    sampling.batch_size = 100

    config.eval.t_min = 1 / 22
    config.eval.batch_size = 100
    config.eval.rtol = 1e-3
    config.eval.atol = 1e-3

    data = config.data
    data.dataset = "digits"
    data.image_size = 8
    data.num_channels = 1
    data.random_flip = False
    data.uniform_dequantization = True

    model = config.model
    model.sigma_max = 4.81
    model.num_scales = 22
    model.nf = 32
    model.ema_halflife = 10_000

    optim = config.optim
    optim.lr = 2e-3
    optim.warmup = 100
    optim.grad_clip = 10.0
    optim.decay = 0.8
    return config
