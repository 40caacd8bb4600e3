"""Samplers: values that walk a model from noise to data."""

from . import times
from .base import Sampler, sample
from .deterministic import AdaptiveODE, FixedODE, Heun
from .langevin import Draws, langevin_dynamics, langevin_walk
from .stochastic import (
    DDIM,
    Ancestral,
    AnnealedLangevin,
    EulerMaruyama,
    Langevin,
    PredictorCorrector,
    ReverseDiffusion,
)

__all__ = [
    "DDIM",
    "AdaptiveODE",
    "Ancestral",
    "AnnealedLangevin",
    "Draws",
    "EulerMaruyama",
    "FixedODE",
    "Heun",
    "Langevin",
    "PredictorCorrector",
    "ReverseDiffusion",
    "Sampler",
    "langevin_dynamics",
    "langevin_walk",
    "sample",
    "times",
]
