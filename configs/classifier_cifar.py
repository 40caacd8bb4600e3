"""A classifier of noisy CIFAR-10 images, for classifier guidance of vp_cifar_small and its like.

The way down of a U-Net (Dhariwal & Nichol 2021, section 4.3), conditioned on the noise level; SDE and law of t
are those of the model.
"""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("vp_cifar_small.py"))
    training = config.training
    training.objective = "cross_entropy"
    training.n_iters = 500
    training.batch_size = 64
    model = config.model
    model.attn_resolutions = ()
    model.scale_shift = True
    config.optim.weight_decay = 0.05
    return config
