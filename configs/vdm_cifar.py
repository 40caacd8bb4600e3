"""VDM on CIFAR-10: a learned noise schedule, Fourier features of the pixels, the bound itself as objective.

Kingma et al. 2021 (arXiv:2107.00630), table 1, CIFAR-10 not augmented (at most 2.65 bits/dim); sizes and optimizer
of their appendix B.1 and of the open configs/cifar10.py: 32 residual blocks down and 33 up at full resolution, 128
channels, attention in the middle alone, dropout 0.1, AdamW, t of low discrepancy, ends of the log SNR learned from 13.3
and -5. Departures: the network's label is 50 gamma instead of 1000 (gamma + 13.3)/18.3; the label joins each block by a
projection with a bias that starts like any other layer, where theirs has none and starts from 0; convolutions start as
DDPM's; the pixel k enters as k/255 instead of (k + 1/2)/256. The schedule starts as a line whose units are spread over
it; its shape is learned by the gradient of the loss's second moment at given noise levels, theirs by that through the
network. The bound of the test set comes by --mode likelihood with 1000 steps.
"""

from ml_collections import ConfigDict

from score_sde.config import default_config


def get_config() -> ConfigDict:
    config = default_config()

    training = config.training
    training.sde = "learned"
    training.n_iters = 10_000_000
    training.likelihood_weighting = True
    training.low_discrepancy = True

    sampling = config.sampling
    sampling.predictor = "ancestral_sampling"
    sampling.t_min = 0.0

    config.eval.estimate = "bound"
    config.eval.t_min = 0.0

    config.data.random_flip = False

    model = config.model
    model.rule = "residual"
    model.label = "log_sigma"
    model.t_min = 0.0
    model.learn_ends = True
    model.fourier_features = (7, 8)
    model.ch_mult = (1,)
    model.num_res_blocks = 32
    model.attn_resolutions = ()
    model.skip_rescale = False
    model.resblock_type = "ddpm"

    optim = config.optim
    optim.optimizer = "AdamW"
    optim.beta2 = 0.99
    optim.weight_decay = 0.01
    optim.warmup = 100
    optim.grad_clip = -1.0
    return config
