"""CIFAR-10 in about 25 minutes on one GPU, meant for bits/dim.

vp_cifar_small's recipe with a wider network, and a GPU's switches: bf16 autocast, torch.compile and channels-last.
"""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("vp_cifar_small.py"))

    training = config.training
    training.n_iters = 20_000
    training.batch_size = 256
    training.precision = "bfloat16"
    training.compile = True
    training.channels_last = True
    training.eval_freq = 1000
    training.snapshot_freq = 5000

    model = config.model
    model.nf = 96
    model.ch_mult = (1, 2, 2)
    model.num_res_blocks = 2
    model.attn_resolutions = (16,)
    model.ema_halflife = 500_000

    optim = config.optim
    optim.lr = 1e-3
    optim.warmup = 500
    return config
