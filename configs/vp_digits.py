"""Handwritten digits, 8x8: what `make demo` trains in a few minutes on a CPU.

scikit-learn's 1,797 digits of 17 grey levels. No paper's table: VP SDE, a small U-Net with EDM's preconditioning
(Karras et al. 2022, table 1; sigma_data is the root mean square of the digits in [-1, 1]), t uniform in log-SNR,
dequantised pixels, no mirroring.
"""

from ml_collections import ConfigDict

from score_sde.config import default_config


def get_config() -> ConfigDict:
    config = default_config()

    training = config.training
    training.n_iters = 2500
    training.time = "log_snr"
    training.low_discrepancy = True
    training.channels_last = True
    training.eval_freq = 100
    training.snapshot_freq = 500

    sampling = config.sampling
    sampling.predictor = "ancestral_sampling"
    sampling.grid = "karras"
    sampling.steps = 60
    sampling.num_samples = 100
    sampling.batch_size = 100

    config.eval.batch_size = 100
    config.eval.rtol = 1e-4  # its error, 0.001 bits/dim, is a fifteenth of the standard error over images
    config.eval.atol = 1e-4

    data = config.data
    data.dataset = "digits"
    data.image_size = 8
    data.num_channels = 1
    data.random_flip = False
    data.uniform_dequantization = True

    model = config.model
    model.rule = "edm"
    model.label = "log_sigma"
    model.sigma_data = 0.8
    model.nf = 16
    model.ch_mult = (1, 2)
    model.num_res_blocks = 1
    model.attn_resolutions = (4,)
    model.dropout = 0.0
    model.ema_halflife = 30_000

    optim = config.optim
    optim.optimizer = "AdamW"
    optim.lr = 4e-3
    optim.beta2 = 0.99
    optim.weight_decay = 0.01
    optim.warmup = 50
    optim.decay = 0.3
    return config
