"""A small DiT on CIFAR-10, class-conditional: EDM's preconditioning in place of DiT's chain.

The network is that of Peebles & Xie 2023 (arXiv:2212.09748), their S with patches of 2x2 pixels, 33 million parameters;
the paper trains on latents of ImageNet at 256x256, by Improved DDPM's chain with the linear schedule, and its optimizer
is kept: AdamW, a constant learning rate of 1e-4, no weight decay, a moving average of rate 0.9999, batches of 256.
For the larger ones set model.hidden, depth and head_channels: B is 768, 12, 64; L 1024, 24, 64; XL 1152, 28, 72. What
is different: pixels instead of latents, EDM's preconditioning with t uniform in log SNR, no learned variance.
"""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("vp_cifar.py"))

    training = config.training
    training.time = "log_snr"
    training.low_discrepancy = True
    training.n_iters = 400_000
    training.batch_size = 256

    sampling = config.sampling
    sampling.method = "dpm_solver++"
    sampling.grid = "log_snr"
    sampling.steps = 50

    model = config.model
    model.name = "dit"
    model.rule = "edm"
    model.label = "log_sigma"
    model.class_conditional = True
    model.hidden = 384
    model.depth = 12
    model.head_channels = 64
    model.dropout = 0.0

    optim = config.optim
    optim.optimizer = "AdamW"
    optim.lr = 1e-4
    optim.warmup = 0
    optim.grad_clip = -1.0
    return config
