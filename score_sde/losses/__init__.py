"""Losses of score models: denoising score matching, score matching without noise, and the laws of training's times."""

from .denoising import denoising, edm, hybrid, likelihood, noise_error, simple, variational

__all__ = ["denoising", "edm", "hybrid", "likelihood", "noise_error", "simple", "variational"]
