"""Solvers of the probability flow ``dx/dt = f x - g² score / 2`` (Song et al. 2021, eq. 13)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..models.base import ScoreModel
from ..noise import Noise
from ..ode.integrators import FIXED, Solver, integrate
from ..sdes.linear import SDE, add, add_, like, scaled
from .base import Planned, Sampler


def velocity(model: ScoreModel, x: Tensor, t: Tensor) -> Tensor:
    """The probability flow's velocity at (x, t)."""
    e = model(x, t)
    return model.sde.flow(e.data, e.noise, t)


def check_noisy(model: ScoreModel, s: Tensor) -> None:
    if not bool((model.sde.sigma(s) > 0).all()):
        raise ValueError(
            f"the probability flow has no slope at t = {s.min().item():g}, where sigma = 0: end the grid above it "
            "(for a chain, times[:-1] and denoise=True), or sample with DDIM() or Heun(), which step to clean data"
        )


@dataclass(frozen=True)
class Heun(Planned):
    """Heun's method in r = sigma/alpha, also known as EDM's deterministic sampler: order 2, two evaluations per step.

    The flow of y = x/alpha is dy/dr = noise. Karras et al. 2022, algorithm 1: DDIM's step, then the mean of the slopes
    at its two ends. It does not use the rates f and g, which jump at the steps of a chain. A last step to clean data is
    DDIM's. Where a step begins without data (alpha = 0) r is infinite, and the same is done in 1/r, in which the flow
    of x/sigma is d(x/sigma)/d(1/r) = data.
    """

    def numbers(self, sde: SDE, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        alpha_t, alpha_s, sigma_s = sde.alpha(t), sde.alpha(s), sde.sigma(s)
        half = torch.where(alpha_t > 0, (sigma_s - alpha_s / alpha_t * sde.sigma(t)) / 2, 0.0)
        return alpha_s, sigma_s, half, torch.where(alpha_t > 0, 0.0, alpha_s / 2)

    def take(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, numbers: Sequence[Any], noise: Noise) -> Tensor:
        alpha_s, sigma_s, half, half_data = numbers
        e = model(x, t)
        y = add_(scaled(e.data, alpha_s), sigma_s, e.noise)
        if not (sigma_s.any() if isinstance(sigma_s, Tensor) else sigma_s):
            return y
        other = model(y, s)
        y = add_(add(y, half, other.noise), -half, e.noise)  # not in place: the model's gradient may need y
        begins = half_data.any() if isinstance(half_data, Tensor) else half_data
        return add_(add_(y, half_data, other.data), -half_data, e.data) if begins else y


@dataclass(frozen=True)
class FixedODE(Sampler):
    """torchdiffeq's fixed-step methods over the grid: "euler", "midpoint", "heun2" or "rk4".

    On a chain's SDE, whose f and g jump at every step, they lose their order: there take `Heun` or `AdaptiveODE`.
    Raises ValueError for another method, and where the grid ends at clean data (sigma = 0).
    """

    method: str = "rk4"

    def __post_init__(self) -> None:
        if self.method not in FIXED:
            raise ValueError(f"unknown fixed-step ODE method {self.method!r}; use one of {', '.join(FIXED)}")

    def step(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        from torchdiffeq import odeint  # slow to import: it imports scipy's, too

        check_noisy(model, s)

        def field(u: Tensor, y: Tensor) -> Tensor:
            # torchdiffeq rounds its times to the state's dtype: it gets the fraction u of the step, and t stays exact
            return velocity(model, y, t + u.to("cpu", torch.float64) * (s - t)) * like(s - t, y)

        return odeint(field, x, torch.arange(2, dtype=x.dtype, device=x.device), method=self.method)[-1]


@dataclass(frozen=True)
class AdaptiveODE(Sampler):
    """The probability flow by an adaptive ODE solver, also known as the ODE sampler: dopri5, RK45 and others.

    `method` is one of torchdiffeq's, or "RK45" for scipy's as the paper uses it. The batch shares one step size, so an
    example's result depends on its neighbours to within the tolerance. States are reported at the grid's points. Raises
    ValueError for another method, and where the grid ends at clean data (sigma = 0).
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    method: str = "dopri5"

    def __post_init__(self) -> None:
        Solver(self.method, self.rtol, self.atol)  # checks them

    def walk(self, model: ScoreModel, x: Tensor, times: Tensor, noise: Noise) -> Iterator[Tensor]:
        check_noisy(model, times)
        solver, parameters = Solver(self.method, self.rtol, self.atol), tuple(model.parameters())
        field = lambda t, y: velocity(model, y, t)
        for start, end in pairwise(times.tolist()):
            x, _ = integrate(field, x, start, end, solver=solver, sde=model.sde, parameters=parameters)
            yield x
