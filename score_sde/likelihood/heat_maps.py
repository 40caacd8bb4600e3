"""Heat maps of bits: the log density of an image split over its dimensions.

Along the probability flow dx/dt = v(x, t),

    log p(x) = sum over i of [log prior(x_i(1)) + integral from t_min to 1 of J_ii dt],    J = dv/dx,

as an SDE's prior is a product, and div v the trace of J. A term has the cost of the latent of dimension i and the
expansion of space along it; the sum is exactly log p(x), but as x_i(1) depends on all of x, a term is no conditional
density. J_ii is exact, or estimated by e_i (e^T J)_i with random signs e, the terms of Hutchinson's estimate: each is
unbiased, and their sum is that estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.base import ScoreModel
from ..models.pixel_levels import bits
from ..models.traces import differentiable, draw_probes, of_rows, products
from ..ode.circle import NO_JACOBIAN
from ..ode.integrators import EACH, Solver
from .flows import as_state, score_flow


class HeatMap(NamedTuple):
    """Each dimension's share of log p(x) in nats, of x's shape, and evaluations per example."""

    log_prob: Tensor
    nfe: float

    def bits(self, levels: int = 256, width: float = 2.0) -> Tensor:
        """Bits of each dimension of a uniformly dequantised x, of x's shape; their mean is the bits/dim."""
        return bits(-self.log_prob, 1, levels, width)


@torch.no_grad()
def heat_map(
    model: ScoreModel, x: Tensor, *,
    probes: int | None = 16, t_min: float = 1e-5, solver: Solver | None = None, seed: int = 0, first: int = 0,
) -> HeatMap:  # fmt: skip
    """Split log p(x) over the dimensions of x (B, *shape), the state at t_min.

    Args:
        probes: number of random probes averaged; None: the exact J_ii, by one product per dimension.
        solver: of the ODE, whose error norm includes all D terms of an example; by default "embedded".
        seed, first: example i's probes depend on (seed, first + i) alone.

    Raises ValueError for probes < 1, RuntimeError where the solver gives up.
    """
    x = as_state(x)
    flow = score_flow(model, t_min=t_min, solver=solver or Solver(EACH))
    if probes is not None and probes < 1:
        raise ValueError(f"probes must be at least 1, or None for the exact terms, got {probes}")
    e = draw_probes("exact" if probes is None else "rademacher", probes or 1, x, seed, first)
    share = 1 / (probes or 1)

    def slopes(velocity: Callable[[Tensor], Tensor], y: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        value, y, graph = differentiable(velocity, y, NO_JACOBIAN)
        terms = torch.zeros_like(y)
        for block, product in products(value, y, of_rows(e, rows, probes is None), graph):
            terms = terms + share * (block * product).sum(0)
        return value, terms.flatten(1)

    latent, terms, nfe = flow.solve(x, slopes, math.prod(x.shape[1:]))
    base = model.sde.prior_log_prob(latent.reshape(-1, 1)).reshape(x.shape)  # the prior is a product
    return HeatMap(base + terms.reshape(x.shape), nfe)
