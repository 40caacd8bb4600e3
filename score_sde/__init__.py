"""Score-based generative modelling with stochastic differential equations, in PyTorch.

The mathematics is importable from here and knows nothing of configs, files or devices; `score_sde.cli` is the command
line.
"""

from . import closed_form, losses, time_laws
from .chains import DDPM, SMLD
from .checkpoint import load
from .continuous_bound import ContinuousBound, variational_bound
from .guidance import guide
from .learned import LearnedVPSDE, MonotoneSchedule
from .likelihood import Likelihood, log_likelihood
from .losses import denoising
from .model import Estimate, Preconditioned, ScoreModel, from_score
from .samplers import (
    DDIM,
    AdaptiveODE,
    Ancestral,
    AnnealedLangevin,
    EulerMaruyama,
    FixedODE,
    Heun,
    Langevin,
    PredictorCorrector,
    ReverseDiffusion,
    Sampler,
    sample,
    times,
)
from .sdes import EDMSDE, SDE, VESDE, VPSDE, CosineSDE, SubVPSDE

__version__ = "0.1.0"

__all__ = [
    "DDIM",
    "DDPM",
    "EDMSDE",
    "SDE",
    "SMLD",
    "VESDE",
    "VPSDE",
    "AdaptiveODE",
    "Ancestral",
    "AnnealedLangevin",
    "ContinuousBound",
    "CosineSDE",
    "Estimate",
    "EulerMaruyama",
    "FixedODE",
    "Heun",
    "Langevin",
    "LearnedVPSDE",
    "Likelihood",
    "MonotoneSchedule",
    "Preconditioned",
    "PredictorCorrector",
    "ReverseDiffusion",
    "Sampler",
    "ScoreModel",
    "SubVPSDE",
    "closed_form",
    "denoising",
    "from_score",
    "guide",
    "load",
    "log_likelihood",
    "losses",
    "sample",
    "time_laws",
    "times",
    "variational_bound",
]
