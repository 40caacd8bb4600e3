"""CIFAR-10 by flow matching on the straight path: the recipe of TorchCFM's example.

Independent coupling, uniform times, DDPM's U-Net of 128 channels with attention at 16x16 and dropout 0.1; Adam with a
learning rate of 2e-4 after 5,000 steps of warm-up, clipped gradients, a moving average of rate 0.9999, 400,000 steps
of 128 images (Tong et al. 2024, arXiv:2302.00482; examples/images/cifar10 of its code). Departures: DDPM's blocks and
attention in place of ADM's; a t_min of 1e-3, where theirs is 0; the ODE is solved by a fast solver in 35 evaluations,
theirs by dopri5.
"""

from ml_collections import ConfigDict

from score_sde.config import default_config


def get_config() -> ConfigDict:
    config = default_config()

    training = config.training
    training.sde = "linear"
    training.objective = "flow_matching"
    training.n_iters = 400_000

    sampling = config.sampling
    sampling.method = "fast"
    sampling.grid = "arcsinh"
    sampling.steps = 35

    model = config.model
    model.name = "ddpm"
    model.rule = "velocity"
    model.nf = 128
    model.ch_mult = (1, 2, 2, 2)
    model.num_res_blocks = 2
    model.attn_resolutions = (16,)
    model.dropout = 0.1
    model.t_min = 1e-3  # sigma is t on this path: vp's smallest sigma, at its t_min of 1e-5
    config.eval.t_min = 1e-3

    optim = config.optim
    optim.lr = 2e-4
    optim.warmup = 5000
    optim.grad_clip = 1.0
    return config
