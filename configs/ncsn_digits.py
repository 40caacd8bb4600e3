"""NCSN on handwritten digits, 8x8: ten noise levels, annealed Langevin dynamics; four minutes on one core.

Song & Ermon 2019 (arXiv:1907.05600) as in ncsn_cifar: its ten levels, loss and Langevin steps, and its RefineNet with
16 channels instead of 128. Departures: 1,500 steps of 64 images, learning rate 6e-3 that falls to 0 over the second
half, a moving average of the weights, no mirroring.

It reaches, by a classifier that is more than 90 % sure, 49 % of samples that look like digits (real ones 89 %, a
Gaussian's 10 %), and 2.174 bits/dim by the ODE. In 64 dimensions the ten levels hardly overlap, and at the largest, 1,
digits that are up to 4.8 apart have not run into one.
"""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("ncsn_cifar.py"))

    training = config.training
    training.n_iters = 1500
    training.batch_size = 64
    training.snapshot_freq = 500
    training.snapshot_sampling = False

    sampling = config.sampling
    sampling.num_samples = 100
    sampling.batch_size = 100

    config.eval.batch_size = 100
    config.eval.rtol = 1e-3
    config.eval.atol = 1e-3

    data = config.data
    data.dataset = "digits"
    data.image_size = 8
    data.num_channels = 1
    data.random_flip = False

    model = config.model
    model.nf = 16
    model.ema_halflife = 10_000

    optim = config.optim
    optim.lr = 6e-3
    optim.warmup = 50
    optim.decay = 0.5
    return config
