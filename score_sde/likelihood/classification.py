"""A generative classifier: Bayes' rule with a model's conditional likelihoods.

    P(y | x) = P(y) p(x | y) / sum over y' of P(y') p(x | y'),

where log p(x | y) is ``log_likelihood(model.given(label=y), x)``, or a variational bound instead, as in Li et al. 2023
(arXiv:2303.16203) and Clark & Jaini 2023 (arXiv:2303.15233). All classes share probes, or times and noise: their errors
in log p(x | y) are much the same for all y, and cancel in the quotient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..models.base import ScoreModel
from .exact import log_likelihood
from .sde_bound import variational_bound


class Classification(NamedTuple):
    """log P(y | x) and log p(x | y) in nats, both (B, classes), and the number of evaluations for all classes."""

    log_posterior: Tensor
    log_likelihood: Tensor
    nfe: float

    @property
    def label(self) -> Tensor:
        """The most probable class, (B,)."""
        return self.log_posterior.argmax(1)


def classify(
    models: Sequence[ScoreModel], x: Tensor, *, log_prior: Tensor | None = None,
    estimate: Literal["ode", "bound"] = "ode", seed: int = 0, first: int = 0, **options: Any,
) -> Classification:  # fmt: skip
    """Log posterior at x (B, *shape) of classes, a model for each: ``[model.given(label=y) for y in range(10)]``.

    Args:
        models: of x given each class; they may be different networks.
        log_prior: (classes,), log P(y) up to a constant; by default all classes are equally likely.
        estimate: "ode" takes the probability flow's likelihood; "bound" minus the SDE's variational bound, which needs
            one evaluation per draw and no Jacobian, but whose gap may differ between classes.
        seed, first: example i's probes or draws depend on (seed, first + i), and are the same for every class.
        options: of `log_likelihood` or of `variational_bound`.

    Raises ValueError for fewer than two models, a log_prior of another length, or an unknown estimate.
    """
    if len(models) < 2:
        raise ValueError(f"a classifier needs a model for each of at least 2 classes, got {len(models)}")
    if log_prior is not None and log_prior.shape != (len(models),):
        raise ValueError(f"log_prior must have shape ({len(models)},), got {tuple(log_prior.shape)}")
    if estimate not in ("ode", "bound"):
        raise ValueError(f'unknown estimate {estimate!r}; use "ode" or "bound"')
    columns, nfe = [], 0.0
    for model in models:
        if estimate == "ode":
            likelihood = log_likelihood(model, x, seed=seed, first=first, **options)
            columns.append(likelihood.log_prob)
            nfe += likelihood.nfe
        else:
            columns.append(-variational_bound(model, x, seed=seed, first=first, **options).total)
            nfe += options.get("draws", 64)
    likelihoods = torch.stack(columns, 1)
    prior = likelihoods.new_full((len(models),), -math.log(len(models))) if log_prior is None else log_prior
    return Classification(torch.log_softmax(likelihoods + prior.to(likelihoods), 1), likelihoods, nfe)
