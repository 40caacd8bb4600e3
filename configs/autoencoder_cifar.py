"""An autoencoder of CIFAR-10, for models of its codes (latent_cifar): 8 x 8 x 8 numbers an image, a sixth of its own.

KL-regularised (Kingma & Welling 2014; Rombach et al. 2022, section 3.1 and appendix G), of this package's U-Net blocks,
a fourth of the size in each direction. It is trained by its evidence bound alone, without the papers' adversary and
perceptual loss, with a tenth of the divergence's weight: N(0, I) is not the prior that the codes will have.
"""

from ml_collections import ConfigDict

from score_sde.config import default_config


def get_config() -> ConfigDict:
    config = default_config()

    training = config.training
    training.objective = "autoencoder"
    training.kl_weight = 0.1
    training.n_iters = 100_000
    training.channels_last = True
    training.eval_freq = 1000

    model = config.model
    model.code_channels = 8
    model.nf = 64
    model.ch_mult = (1, 2, 4)
    model.num_res_blocks = 2
    model.attn_resolutions = ()
    model.dropout = 0.0

    optim = config.optim
    optim.optimizer = "AdamW"
    optim.lr = 5e-4
    optim.beta2 = 0.99
    optim.weight_decay = 0.01
    optim.warmup = 1000
    optim.decay = 0.5
    return config
