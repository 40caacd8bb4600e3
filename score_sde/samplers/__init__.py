"""Samplers: values that walk a model from noise to data. The names below are names of `score_sde` too."""

from . import times
from .adaptive import AdaptiveSDE
from .balanced import Balanced
from .base import Sampler, sample
from .churn import Churn
from .deterministic import AdaptiveODE, FixedODE, Heun
from .embedded import EmbeddedODE
from .exponential import DPMSolver, Multistep, UniPC, recommended
from .fitted import fit_times
from .langevin import langevin_dynamics
from .stochastic import DDIM, Ancestral, AnnealedLangevin, EulerMaruyama, Langevin, PredictorCorrector, ReverseDiffusion

__all__ = [
    "DDIM", "AdaptiveODE", "AdaptiveSDE", "Ancestral", "AnnealedLangevin", "Balanced", "Churn", "DPMSolver",
    "EmbeddedODE", "EulerMaruyama", "FixedODE", "Heun", "Langevin", "Multistep", "PredictorCorrector",
    "ReverseDiffusion", "Sampler", "UniPC", "fit_times", "langevin_dynamics", "recommended", "sample", "times",
]  # fmt: skip
