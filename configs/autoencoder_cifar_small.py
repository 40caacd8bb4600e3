"""An autoencoder of CIFAR-10 in twelve minutes on a CPU, for latent_cifar_small: a narrow autoencoder_cifar."""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("autoencoder_cifar.py"))

    training = config.training
    training.batch_size = 64
    training.n_iters = 600
    training.snapshot_freq = 600
    training.eval_freq = 200

    model = config.model
    model.nf = 24
    model.num_res_blocks = 1
    model.ema_halflife = 5_000

    optim = config.optim
    optim.lr = 2e-3
    optim.warmup = 100
    return config
