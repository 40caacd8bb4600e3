"""Samplers: values that walk a model from noise to data."""

from . import times
from .base import Sampler, sample
from .deterministic import AdaptiveODE, FixedODE, Heun
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
    "EulerMaruyama",
    "FixedODE",
    "Heun",
    "Langevin",
    "PredictorCorrector",
    "ReverseDiffusion",
    "Sampler",
    "sample",
    "times",
]
