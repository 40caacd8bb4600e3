"""NCSN++ with the VE SDE and predictor-corrector sampling, on CIFAR-10.

"NCSN++ cont. (VE)" of Song et al. 2021, tables 2 and 3. Follows its appendix H and score_sde's
configs/ve/cifar10_ncsnpp_continuous.py: Fourier embedding of log sigma, FIR resampling, residual input pyramid, pixels
in [0, 1], summed loss. That project's scale_by_sigma, the network's output over sigma being the score, is the rule
"noise" here, whose output has the other sign.
"""

from ml_collections import ConfigDict

from score_sde.config import default_config


def get_config() -> ConfigDict:
    config = default_config()

    training = config.training
    training.sde = "vesde"
    training.reduce_mean = False

    sampling = config.sampling
    sampling.predictor = "reverse_diffusion"
    sampling.corrector = "langevin"
    sampling.t_min = 1e-5

    config.data.centered = False

    model = config.model
    model.label = "sigma"
    model.embedding_type = "fourier"
    model.fir = True
    model.progressive_input = "residual"
    model.ema_rate = 0.999
    return config
