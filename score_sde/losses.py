"""Denoising score matching: an objective is a time law × a weight × an estimator, three small functions.

Over many noise levels the objective is (Vincent 2011; Song et al. 2021, eq. 7)

    E_t weight(t) E_{x_0, z} || noise(x_t, t) - z ||²,    x_t = alpha x_0 + sigma z,

written here for the noise: (score error)² = (noise error)² / sigma², so a weight lambda(t) of the score's error is
lambda/sigma² here. The simple objective of DDPM is weight 1, and so is the paper's lambda = sigma².

Every loss returns one value per example, (B,); reduction, importance weights and logging by t are the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .model import ScoreModel
from .sdes import SDE

Weight = Callable[[SDE, Tensor], Tensor]


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


class Times(NamedTuple):
    """Times (B,) in float64, and weights (B,) that make an average over them an average over uniform t."""

    t: Tensor
    weight: Tensor


TimeLaw = Callable[[SDE, Tensor], Times]  # maps uniform numbers u in [0, 1), (B,) float64, to times


def uniform_numbers(n: int, generator: torch.Generator) -> Tensor:
    """n independent uniform numbers in [0, 1), float64."""
    return torch.rand(n, generator=generator, dtype=torch.float64)


def low_discrepancy(n: int, generator: torch.Generator) -> Tensor:
    """n numbers, each uniform in [0, 1) but evenly spread together: (i + u)/n mod 1 with one u, in random order.

    Kingma et al. 2021 (arXiv:2107.00630), appendix I.1: the loss's variance over t falls, its mean stays.
    """
    u = torch.rand((), generator=generator, dtype=torch.float64)
    return (torch.randperm(n, generator=generator) + u) / n


def uniform(sde: SDE, u: Tensor) -> Times:
    """t uniform in [t_min, 1]."""
    return Times(sde.t_min + (1 - sde.t_min) * u, torch.ones_like(u))


def log_snr(sde: SDE, u: Tensor) -> Times:
    """t with log SNR uniform between its values at t_min and 1.

    With weight 1 and these times left unweighted, the noise loss of VP is likelihood weighting with importance
    sampling, for g² / sigma² = -(log SNR)' there. The weights are those of uniform t: 1/((1 - t_min) density).
    """
    first, last = sde.log_snr(u.new_tensor([max(sde.t_min, 1e-5), 1.0]))
    t = sde.time(first + (last - first) * u).clamp(sde.t_min, 1.0)  # the inverse is exact to rounding only
    # -(log SNR)' = (g/sigma)² for every linear SDE: differentiate alpha²/sigma² with the moment equations.
    density = (sde.g(t) / sde.sigma(t)) ** 2 / (first - last)
    return Times(t, 1 / ((1 - sde.t_min) * density))


def importance(weight: Weight) -> TimeLaw:
    """The law with density proportional to weight(sde, t): importance-sampled t (Song et al. 2021b, section 5.1).

    Times are drawn from the piecewise constant density of a fine table, whose own density gives the weights: the
    estimate stays unbiased whatever the table's accuracy.
    """

    def law(sde: SDE, u: Tensor) -> Times:
        edges, cdf = _table(weight, sde)
        j = (torch.searchsorted(cdf, u, right=True) - 1).clamp(0, len(edges) - 2)
        width, mass = edges[j + 1] - edges[j], cdf[j + 1] - cdf[j]
        t = edges[j] + (u - cdf[j]) / mass * width
        return Times(t.clamp(sde.t_min, 1.0), width / (mass * (1 - sde.t_min)))

    return law


@lru_cache(maxsize=8)
def _table(weight: Weight, sde: SDE, cells: int = 4096) -> tuple[Tensor, Tensor]:
    """Edges, evenly spaced in log SNR from t_min to 1, and the distribution function of the weight there."""
    ends = sde.log_snr(torch.tensor([max(sde.t_min, 1e-5), 1.0], dtype=torch.float64))
    edges = sde.time(torch.linspace(ends[0].item(), ends[1].item(), cells + 1, dtype=torch.float64))
    edges[0], edges[-1] = sde.t_min, 1.0
    mass = weight(sde, (edges[1:] + edges[:-1]) / 2) * edges.diff()
    return edges, torch.cat([mass.new_zeros(1), (mass / mass.sum()).cumsum(0)])


def discrete(n: int) -> TimeLaw:
    """t = (i + 1)/n with i uniform in 0..n-1: a chain's steps (Ho et al. 2020, algorithm 1)."""

    def law(sde: SDE, u: Tensor) -> Times:
        return Times(((u * n).floor() + 1) / n, torch.ones_like(u))

    return law
