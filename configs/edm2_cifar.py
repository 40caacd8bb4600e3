"""EDM2 on CIFAR-10, class-conditional: a network of 22.3 million parameters.

Karras et al. 2024 (arXiv:2312.02696), configuration G: the network, Adam with decays of 0.9 and 0.99, no weight decay,
the learned uncertainty of each noise level, power-function averages, labels never left out. The paper trains on
ImageNet at 64x64 and on latents of 512x512. What is different here: widths of 64, 128 and 256 channels and images of
32x32; EDM's noise, 200 million images in batches of 512, dropout and sampling (`edm_vp_cifar`); the learning rate falls
linearly to 0 over the last half of the run, where the paper's falls with the square root; no gradient is replaced where
it is not finite.
"""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("edm_vp_cifar.py"))

    training = config.training
    training.geometric = 0.0
    training.uncertainty = True
    training.condition_dropout = 0.0

    model = config.model
    model.name = "edm2"
    model.class_conditional = True
    model.nf = 64
    model.ch_mult = (1, 2, 4)
    model.num_res_blocks = 3
    model.attn_resolutions = (16, 8)
    model.head_channels = 64
    model.ema_power = True

    optim = config.optim
    optim.lr = 1e-2
    optim.beta2 = 0.99
    optim.decay = 0.5
    return config
