"""A classifier of noisy digits, for classifier guidance (Song et al. 2021, section 5; Dhariwal & Nichol 2021).

The way down of vp_digits' U-Net, conditioned on the noise level; SDE and law of t are those of the model. It trains
in a minute. To sample with it:
`--mode sample --config configs/vp_digits.py --config.sampling.classifier=runs/classifier_digits`.
"""

from pathlib import Path

from ml_collections import ConfigDict

from score_sde.config import load


def get_config() -> ConfigDict:
    config = load(Path(__file__).with_name("vp_digits.py"))
    training = config.training
    training.objective = "cross_entropy"
    training.n_iters = 1500
    config.model.scale_shift = True
    config.optim.weight_decay = 0.05
    return config
