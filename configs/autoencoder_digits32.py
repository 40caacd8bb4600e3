"""An autoencoder of digits enlarged to 32x32, for models of its codes (latent_digits32): 8 x 8 numbers an image.

KL-regularised (Kingma & Welling 2014; Rombach et al. 2022, section 3.1), of this package's U-Net blocks, trained by its
evidence bound: pixels of 17 levels under a normal law whose width is learned. Of four channels this weight of the
divergence left three unused, so a code has one. No adversary and no perceptual loss, of which a bound in bits knows
nothing.
"""

from ml_collections import ConfigDict

from score_sde.config import default_config


def get_config() -> ConfigDict:
    config = default_config()

    training = config.training
    training.objective = "autoencoder"
    training.n_iters = 600
    training.batch_size = 64
    training.channels_last = True
    training.eval_freq = 100
    training.snapshot_freq = 100

    data = config.data
    data.dataset = "digits32"
    data.image_size = 32
    data.num_channels = 1
    data.random_flip = False

    model = config.model
    model.code_channels = 1
    model.nf = 8
    model.ch_mult = (1, 2, 4)
    model.num_res_blocks = 1
    model.attn_resolutions = ()
    model.dropout = 0.0
    model.ema_halflife = 10_000

    optim = config.optim
    optim.optimizer = "AdamW"
    optim.lr = 4e-3
    optim.beta2 = 0.99
    optim.weight_decay = 0.01
    optim.warmup = 50
    optim.decay = 0.5
    return config
