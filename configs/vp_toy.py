"""Eight Gaussians in the plane with the VP SDE: a small network in a minute.

No paper's table; the data are the toy density "ring", whose exact score is that of `closed_form.Mixture`.
"""

from ml_collections import ConfigDict

from score_sde.config import default_config


def get_config() -> ConfigDict:
    config = default_config()

    training = config.training
    training.n_iters = 3000
    training.batch_size = 512
    training.time = "log_snr"
    training.low_discrepancy = True
    training.eval_freq = 500
    training.snapshot_freq = 1000

    sampling = config.sampling
    sampling.steps = 200
    sampling.grid = "log_snr"
    sampling.num_samples = 2000
    sampling.batch_size = 2000

    config.eval.probe = "exact"
    config.eval.num_images = 1000
    config.eval.batch_size = 1000

    config.data.dataset = "ring"
    config.data.random_flip = False

    model = config.model
    model.name = "mlp"
    model.rule = "edm"
    model.label = "log_sigma"
    model.sigma_data = 0.71
    model.dropout = 0.0
    model.ema_halflife = 50_000

    optim = config.optim
    optim.lr = 2e-3
    optim.warmup = 100
    optim.decay = 0.5
    return config
