"""NCSNv2 on handwritten digits, 8x8."""

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
