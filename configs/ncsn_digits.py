"""NCSN on handwritten digits, 8x8."""

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
    sampling.n_steps_each = 30
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
