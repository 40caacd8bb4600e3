"""Likelihoods: exact by the probability flow, bounds of chains, of SDEs and of codes, and what follows from them."""

from .exact import Likelihood, log_likelihood

__all__ = ["Likelihood", "log_likelihood"]
