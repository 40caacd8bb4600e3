"""Exact log-likelihoods of score models: their probability flow as a normalizing flow (Song et al. 2021, eq. 39).

The velocity is v = f x - g² score / 2, and log p(x at t_min) = log p_1(x at 1) + integral of div v dt, as
`flows` solves it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.base import ScoreModel
from ..models.pixel_levels import bits
from ..models.traces import Probe
from ..ode.integrators import Solver
from .flows import refuse_gradient, score_flow


class Likelihood(NamedTuple):
    """Log density in nats (B,), its standard error over probes (B,), the state at t = 1, and evaluations an example.

    `std_error` is 0 for the exact trace and NaN for a single probe, which cannot tell its own error. Of one example in
    few dimensions 2 to 4 probes hardly tell it either: in two, as many signs may agree, and t-intervals of 95 % made of
    it then hold the truth in 50 to 87 % of the cases (docs/likelihood.md); in 64 they hold it in 95 %.
    """

    log_prob: Tensor
    std_error: Tensor
    latent: Tensor
    nfe: float

    def bits_per_dim(self, levels: int = 256, width: float = 2.0) -> Tensor:
        """Bits per dimension (B,) of discrete data whose `levels` values were dequantised into an interval of `width`.

        See `pixel_levels.bits`: the offset is log2(levels/width), 7 for 8-bit images in [-1, 1] and 8 in [0, 1].
        """
        return bits(-self.log_prob, math.prod(self.latent.shape[1:]), levels, width)


def log_likelihood(
    model: ScoreModel,
    x: Tensor,
    *,
    probe: Probe | Tensor = "rademacher",
    probes: int = 1,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    t_min: float = 1e-5,
    method: str = "embedded",
    prior_log_prob: Callable[[Tensor], Tensor] | None = None,
    seed: int | torch.Generator = 0,
    first: int = 0,
) -> Likelihood:
    """Log density of x under the probability flow of `model`, as FFJORD computes it; x is the state at t_min.

    With the default method an example's result and cost do not depend on its batch. The result has no gradient, neither
    in x nor in the model's parameters: ``score_flow(model).log_prob(x)`` has both, for training by maximum likelihood.

    Args:
        model: any score model.
        x: (B, *shape).
        probe: "rademacher", "gaussian", "sphere", "exact" (D probes, the unit vectors), or a tensor (K, B, *shape).
        probes: number K of random probes per example, at the cost of a product each.
        rtol, atol: tolerances of the solver. "embedded" holds each example's root mean square of the state's error and
            the error of its log density per dimension to them; the others that of the batch's states and log densities.
        t_min: where the integral begins.
        method: "embedded", by steps of each example's own on the flow's circle; "dopri5" or another adaptive method of
            torchdiffeq in t, or "RK45" for scipy's.
        prior_log_prob: x -> (B,), the log density at t = 1; by default the SDE's prior, which is not quite the true
            p_1: pass that to compare with a closed form.
        seed: of the probes; example i's depend on (seed, first + i) alone. A torch.Generator serves the whole batch.
        first: index of the batch's first example.

    Raises ValueError for an unknown probe or method, a wrong shape, or where x asks for a gradient, RuntimeError where
    the solver gives up.
    """
    refuse_gradient(x, "log_likelihood", "log_prob(x)")
    flow = score_flow(model, base=prior_log_prob, t_min=t_min, solver=Solver(method, rtol, atol))
    with torch.no_grad():
        found = flow.evaluate(x, probe=probe, probes=probes, seed=seed, first=first)
    return Likelihood(found.log_prob, found.std_error, found.latent, found.nfe)
