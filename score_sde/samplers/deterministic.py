"""Solvers of the probability flow ``dx/dt = f x - g² score / 2`` (Song et al. 2021, eq. 13)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torchdiffeq import odeint

from ..model import ScoreModel
from ..ode import FIXED, integrate
from ..sdes import Noise, like
from .base import Sampler
from .stochastic import DDIM


def velocity(model: ScoreModel, x: Tensor, t: Tensor) -> Tensor:
    """The probability flow's velocity at (x, t)."""
    return model.sde.velocity(x, t, model.score(x, t))


def _check_noisy(model: ScoreModel, s: Tensor) -> None:
    if not bool((model.sde.sigma(s) > 0).all()):
        raise ValueError(
            f"the probability flow has no slope at t = {s.min().item():g}, where sigma = 0: end the grid above it "
            "(for a chain, times[:-1] and denoise=True), or sample with DDIM() or Heun(), which step to clean data"
        )


@dataclass(frozen=True)
class Heun(Sampler):
    """Heun's method for the probability flow: order 2, two evaluations a step (Karras et al. 2022, algorithm 1).

    A last step to clean data, where the slope does not exist, is DDIM's.
    """

    def step(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        if bool((model.sde.sigma(s) == 0).all()):
            return DDIM().step(model, x, t, s, noise)
        h = like(s - t, x)
        d = velocity(model, x, t)
        return x + h / 2 * (d + velocity(model, x + h * d, s))


@dataclass(frozen=True)
class FixedODE(Sampler):
    """torchdiffeq's fixed-step methods over the grid: "euler", "midpoint", "heun2" or "rk4".

    Raises ValueError for another method, and where the grid ends at clean data (sigma = 0).
    """

    method: str = "rk4"

    def __post_init__(self) -> None:
        if self.method not in FIXED:
            raise ValueError(f"unknown fixed-step ODE method {self.method!r}; use one of {', '.join(FIXED)}")

    def step(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        _check_noisy(model, s)

        def field(u: Tensor, y: Tensor) -> Tensor:
            return velocity(model, y, u.to("cpu", torch.float64))

        return odeint(field, x, torch.stack([t, s]).to(x.device, x.dtype), method=self.method)[-1]


@dataclass(frozen=True)
class AdaptiveODE(Sampler):
    """An adaptive method between the grid's points, which are only where the state is reported.

    `method` is one of torchdiffeq's, or "RK45" for scipy's as the paper uses it. One step size serves the batch, so an
    example's result depends on its neighbours to within the tolerance. Raises ValueError for another method, and where
    the grid ends at clean data (sigma = 0).
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    method: str = "dopri5"

    def walk(self, model: ScoreModel, x: Tensor, times: Tensor, noise: Noise) -> Iterator[Tensor]:
        _check_noisy(model, times)

        def field(t: Tensor, y: Tensor) -> Tensor:
            return velocity(model, y, t)

        for t, s in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
            x, _ = integrate(field, x, t, s, rtol=self.rtol, atol=self.atol, method=self.method)
            yield x
