"""Score-based generative modelling with stochastic differential equations, in PyTorch.

The mathematics is importable from here and knows nothing of configs, files or devices; `score_sde.cli` is the command
line.
"""

from . import inverse, losses, samplers, sdes
from .data.codecs import AutoencoderCodec
from .inverse import Observation, Projected, ddnm, dps, moment_matching, observe, pigdm, twisted
from .likelihood import dequantisation, outliers
from .likelihood.chain_bound import Bound, chain_bound
from .likelihood.classification import Classification, classify
from .likelihood.code_bound import LatentBound, latent_bound
from .likelihood.dequantisation import fit_dequantiser, log_probability
from .likelihood.exact import Likelihood, log_likelihood
from .likelihood.flows import Flow, NetworkVelocity, score_flow
from .likelihood.heat_maps import HeatMap, heat_map
from .likelihood.sde_bound import ContinuousBound, variational_bound
from .losses import score_matching, time_laws
from .losses.denoising import denoising
from .losses.score_matching import (
    Energy,
    denoising_at,
    explicit,
    finite_difference,
    fisher_divergence,
    implicit,
    sliced,
)
from .machine.version import __version__
from .metrics import sliced_wasserstein
from .models import closed_form
from .models.base import Estimate, ScoreModel, from_score
from .models.classifier import NoisyClassifier
from .models.guidance import classifier, clip, guide, threshold
from .models.rescaled import on
from .models.rules import Preconditioned
from .models.traces import projections
from .moved import install
from .ode.integrators import Solver
from .samplers import *  # noqa: F403 (its names are public: a sampler's stands in samplers/__init__.py alone)
from .sdes import *  # noqa: F403
from .tasks.checkpoint import load, load_autoencoder, load_classifier

install()

__all__ = [
    "AutoencoderCodec", "Bound", "Classification", "ContinuousBound", "Energy", "Estimate", "Flow", "HeatMap",
    "LatentBound", "Likelihood", "NetworkVelocity", "NoisyClassifier", "Observation", "Preconditioned", "Projected",
    "ScoreModel", "Solver", "__version__", "chain_bound", "classifier", "classify", "clip", "closed_form", "ddnm",
    "denoising", "denoising_at", "dequantisation", "dps", "explicit", "finite_difference", "fisher_divergence",
    "fit_dequantiser", "from_score", "guide", "heat_map", "implicit", "inverse", "latent_bound", "load",
    "load_autoencoder", "load_classifier", "log_likelihood", "log_probability", "losses", "moment_matching", "observe",
    "on", "outliers", "pigdm", "projections", "score_flow", "score_matching", "sliced", "sliced_wasserstein",
    "threshold", "time_laws", "twisted", "variational_bound",
]  # fmt: skip
__all__ += samplers.__all__
__all__ += sdes.__all__
