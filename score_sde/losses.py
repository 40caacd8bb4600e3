"""Denoising score matching: an objective is a time law × a weight × an estimator, three small functions.

Over many noise levels the objective is (Vincent 2011; Song et al. 2021, eq. 7)

    E_t weight(t) E_{x_0, z} || noise(x_t, t) - z ||²,    x_t = alpha x_0 + sigma z,

written here for the noise: (score error)² = (noise error)² / sigma², so a weight lambda(t) of the score's error is
lambda/sigma² here. The simple objective of DDPM is weight 1, and so is the paper's lambda = sigma².

Every loss returns one value per example, (B,); reduction, importance weights and logging by t are the caller's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .model import ScoreModel
from .sdes import SDE
from .time_laws import Weight


def denoising(model: ScoreModel, x0: Tensor, t: Tensor, z: Tensor, weight: Weight, **condition: Any) -> Tensor:
    """Mean over dimensions of weight · (noise error)² at x_t = alpha x_0 + sigma z, one value per example (B,).

    Args:
        model: what is trained.
        x0: data, (B, *shape).
        t: times, (B,); z: standard normal numbers of x0's shape.
        weight: (sde, t) -> (B,), e.g. `simple` or `likelihood`.
        condition: passed on to the model.

    Raises ValueError where t or z does not fit x0.
    """
    if t.shape != x0.shape[:1] or z.shape != x0.shape:
        raise ValueError(
            f"t must have shape ({x0.shape[0]},) and z {tuple(x0.shape)}, got {tuple(t.shape)} and {tuple(z.shape)}"
        )
    estimate = model(model.sde.perturb(x0, t, z), t, **condition)
    error = (estimate.noise - z).square().flatten(1).mean(1)
    return weight(model.sde, t).to(error) * error


def simple(sde: SDE, t: Tensor) -> Tensor:
    """1: DDPM's L_simple (Ho et al. 2020, eq. 14), and lambda = sigma² of Song et al. 2021."""
    return torch.ones_like(t)


def likelihood(sde: SDE, t: Tensor) -> Tensor:
    """(g/sigma)²: the objective, times D/2, bounds -log p up to constants (Song et al. 2021, arXiv:2101.09258)."""
    return (sde.g(t) / sde.sigma(t)) ** 2
