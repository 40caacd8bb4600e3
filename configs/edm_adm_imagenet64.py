"""EDM on ImageNet 64x64 with ADM's network: class-conditional, 296 million parameters.

Karras et al. 2022 (arXiv:2206.00364), tables 1 and 7: 2,500 million images in batches of 4096, unaugmented. It reads a
folder of images with a sub-folder per class, as in --config.data.path=imagenet/train. Sampling is theirs for this data
set: churn, 255 steps and the estimate of the clean data, 511 evaluations. Departures: bfloat16 in place of float16;
DDPM's initialisation; a tenth of the examples is without label, for guidance, where theirs is none
(training.condition_dropout).
"""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("edm_vp_cifar.py"))

    training = config.training
    training.n_iters = 610_352
    training.batch_size = 4096
    training.geometric = 0.0
    training.precision = "bfloat16"
    training.channels_last = True

    sampling = config.sampling
    sampling.method = "edm"
    sampling.steps = 255
    sampling.churn = 40.0
    sampling.churn_low = 0.05
    sampling.churn_high = 50.0
    sampling.churn_inflate = 1.003

    data = config.data
    data.dataset = "files"
    data.image_size = 64
    data.random_flip = False

    model = config.model
    model.name = "adm"
    model.class_conditional = True
    model.nf = 192
    model.ch_mult = (1, 2, 3, 4)
    model.num_res_blocks = 3
    model.attn_resolutions = (32, 16, 8)
    model.head_channels = 64
    model.dropout = 0.1
    model.ema_halflife = 50_000_000

    optim = config.optim
    optim.lr = 1e-4
    optim.warmup = 2_441
    return config
