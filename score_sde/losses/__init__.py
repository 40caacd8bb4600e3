"""Losses of score models: denoising score matching, score matching without noise, and the laws of training's times."""

from .denoising import (
    denoising,
    edm,
    flow_matching,
    hybrid,
    likelihood,
    min_snr,
    noise_error,
    simple,
    variational,
    velocity,
)
from .uncertainty import Uncertainty

__all__ = [
    "Uncertainty", "denoising", "edm", "flow_matching", "hybrid", "likelihood", "min_snr", "noise_error", "simple",
    "variational", "velocity",
]  # fmt: skip
