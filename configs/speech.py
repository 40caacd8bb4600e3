"""Spoken words: a folder of .wav files, one word each, by a U-Net of signals.

No paper's table. The first 8,192 samples of each recording, a second at 8,000 a second, the words' classes being the
sub-folders; such a folder is made by `python -m examples.speech --out FOLDER`, with espeak-ng. EDM's noise and
preconditioning (Karras et al. 2022), t uniform in log SNR; sigma_data and sigma_max are what --mode scan suggests for
these recordings, and should be set to what it suggests for others. The U-Net halves the length eight times, and its
attention sees 32 places.
"""

from ml_collections import ConfigDict

from score_sde.config import default_config


def get_config() -> ConfigDict:
    config = default_config()

    training = config.training
    training.sde = "edm"
    training.n_iters = 20_000
    training.batch_size = 32
    training.time = "log_snr"
    training.low_discrepancy = True
    training.eval_freq = 500
    training.snapshot_freq = 1000

    sampling = config.sampling
    sampling.method = "fast"
    sampling.steps = 60
    sampling.t_min = 0.0
    sampling.num_samples = 20

    config.eval.batch_size = 16

    data = config.data
    data.dataset = "files"
    data.length = 8192
    data.random_flip = False

    model = config.model
    model.rule = "edm"
    model.label = "log_sigma"
    model.sigma_data = 0.06
    model.sigma_min = 0.0005
    model.sigma_max = 12.0
    model.t_min = 0.0
    model.class_conditional = True
    model.nf = 16
    model.ch_mult = (1, 2, 2, 4, 4, 8, 8, 8, 8)
    model.num_res_blocks = 1
    model.attn_resolutions = (32,)
    model.scale_shift = True
    model.dropout = 0.0
    model.ema_halflife = 20_000

    optim = config.optim
    optim.optimizer = "AdamW"
    optim.lr = 1e-3
    optim.beta2 = 0.99
    optim.warmup = 200
    optim.decay = 0.3
    return config
