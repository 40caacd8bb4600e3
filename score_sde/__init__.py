"""Score-based generative modelling with stochastic differential equations, in PyTorch.

The mathematics is importable from here and knows nothing of configs, files or devices; `score_sde.cli` is the command
line.
"""

from . import closed_form, dequantisation, inverse, losses, outliers, score_matching, time_laws
from .bounds import Bound, chain_bound
from .chains import DDPM, SMLD
from .checkpoint import load, load_autoencoder, load_classifier
from .classification import Classification, classify
from .codecs import AutoencoderCodec
from .continuous_bound import ContinuousBound, variational_bound
from .dequantisation import fit_dequantiser, log_probability
from .diffusions import Diffusion, backward, paths
from .flows import Flow, NetworkVelocity, score_flow
from .guidance import classifier, clip, guide, threshold
from .heat_maps import HeatMap, heat_map
from .inverse import Observation, Projected, ddnm, dps, moment_matching, observe, pigdm, twisted
from .latent_bounds import LatentBound, latent_bound
from .learned import LearnedVPSDE, MonotoneSchedule
from .likelihood import Likelihood, log_likelihood
from .losses import denoising
from .metrics import sliced_wasserstein
from .model import Estimate, Preconditioned, ScoreModel, from_score
from .noise_levels import NoiseLevels
from .noisy_classifier import NoisyClassifier
from .ode import Solver
from .samplers import (
    DDIM,
    AdaptiveODE,
    AdaptiveSDE,
    Ancestral,
    AnnealedLangevin,
    Churn,
    DPMSolver,
    EmbeddedODE,
    EulerMaruyama,
    FixedODE,
    Heun,
    Langevin,
    Multistep,
    PredictorCorrector,
    ReverseDiffusion,
    Sampler,
    UniPC,
    fit_times,
    langevin_dynamics,
    recommended,
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
    "AdaptiveSDE",
    "Ancestral",
    "AnnealedLangevin",
    "AutoencoderCodec",
    "Bound",
    "Churn",
    "Classification",
    "ContinuousBound",
    "CosineSDE",
    "DPMSolver",
    "Diffusion",
    "EmbeddedODE",
    "Energy",
    "Estimate",
    "EulerMaruyama",
    "FixedODE",
    "Flow",
    "HeatMap",
    "Heun",
    "Langevin",
    "LatentBound",
    "LearnedVPSDE",
    "Likelihood",
    "MonotoneSchedule",
    "Multistep",
    "NetworkVelocity",
    "NoiseLevels",
    "NoisyClassifier",
    "Observation",
    "Preconditioned",
    "PredictorCorrector",
    "Projected",
    "ReverseDiffusion",
    "Sampler",
    "ScoreModel",
    "Solver",
    "SubVPSDE",
    "UniPC",
    "backward",
    "chain_bound",
    "classifier",
    "classify",
    "clip",
    "closed_form",
    "ddnm",
    "denoising",
    "denoising_at",
    "dequantisation",
    "dps",
    "explicit",
    "finite_difference",
    "fisher_divergence",
    "fit_dequantiser",
    "fit_times",
    "from_score",
    "guide",
    "heat_map",
    "implicit",
    "inverse",
    "langevin_dynamics",
    "latent_bound",
    "load",
    "load_autoencoder",
    "load_classifier",
    "log_likelihood",
    "log_probability",
    "losses",
    "moment_matching",
    "observe",
    "outliers",
    "paths",
    "pigdm",
    "projections",
    "recommended",
    "sample",
    "score_flow",
    "score_matching",
    "sliced",
    "sliced_wasserstein",
    "threshold",
    "time_laws",
    "times",
    "twisted",
    "variational_bound",
]
