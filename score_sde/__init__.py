"""Score-based generative modelling with stochastic differential equations, in PyTorch.

The mathematics is importable from here and knows nothing of configs, files or devices; `score_sde.cli` is the command
line.
"""

from . import closed_form, losses, score_matching, time_laws
from .bounds import Bound, chain_bound
from .chains import DDPM, SMLD
from .checkpoint import load
from .diffusions import Diffusion, backward, paths
from .guidance import clip, guide
from .likelihood import Likelihood, log_likelihood
from .losses import denoising
from .metrics import sliced_wasserstein
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
from .score_matching import (
    Energy,
    denoising_at,
    explicit,
    finite_difference,
    fisher_divergence,
    implicit,
    projections,
    sliced,
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
    "Bound",
    "CosineSDE",
    "Diffusion",
    "Energy",
    "Estimate",
    "EulerMaruyama",
    "FixedODE",
    "Heun",
    "Langevin",
    "Likelihood",
    "Preconditioned",
    "PredictorCorrector",
    "ReverseDiffusion",
    "Sampler",
    "ScoreModel",
    "SubVPSDE",
    "backward",
    "chain_bound",
    "clip",
    "closed_form",
    "denoising",
    "denoising_at",
    "explicit",
    "finite_difference",
    "fisher_divergence",
    "from_score",
    "guide",
    "implicit",
    "load",
    "log_likelihood",
    "losses",
    "paths",
    "projections",
    "sample",
    "score_matching",
    "sliced",
    "sliced_wasserstein",
    "time_laws",
    "times",
]
