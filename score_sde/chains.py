"""Markov chains of DDPM and NCSN, and the continuous curves through them.

A chain adds noise in N steps, index i = 0..N-1 as in the papers. It is a discretised SDE, and `as_sde` says which: the
same curves in continuous time, so that every loss, sampler and likelihood of the package runs on a chain's model, on
the grid `times`. Index i lies at t = (i + 1)/N; t = 0 is clean data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .sdes import SDE, VESDE, VPSDE, like


def _table(values: Sequence[float] | Tensor, name: str) -> tuple[float, ...]:
    table = torch.as_tensor(values, dtype=torch.float64).flatten()
    if len(table) == 0 or not bool(torch.isfinite(table).all()):
        raise ValueError(f"{name} must be a non-empty sequence of finite numbers, got {values!r}")
    return tuple(table.tolist())


@dataclass(frozen=True)
class Piecewise(SDE):
    """Curves through the knots (j/N, knots[j]), j = 0..N, linear between: what a chain is in continuous time."""

    knots: tuple[float, ...] = field(default=(), repr=False)
    t_min: float = 0.0

    @property
    def steps(self) -> int:
        """Number N of the chain's steps."""
        return len(self.knots) - 1

    def _cell(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(left knot, slope, distance from the left knot) at t; a knot belongs to the cell on its left."""
        knots = torch.tensor(self.knots, dtype=t.dtype, device=t.device)
        u = t * self.steps
        on_knot = (u - u.round()).abs() <= 4 * torch.finfo(t.dtype).eps * self.steps
        u = torch.where(on_knot, u.round(), u)
        j = (u.ceil() - 1).clamp(0, self.steps - 1).long()
        return knots[j], (knots[j + 1] - knots[j]) * self.steps, (u - j) / self.steps

    def _value(self, t: Tensor) -> Tensor:
        left, slope, distance = self._cell(t)
        return left + slope * distance

    def _slope(self, t: Tensor) -> Tensor:
        return self._cell(t)[1]

    def _inverse(self, value: Tensor) -> Tensor:
        """The t at which the curve, monotone in t, has `value`."""
        knots = torch.tensor(self.knots, dtype=value.dtype, device=value.device)
        sign = torch.sign(knots[-1] - knots[0])
        j = (torch.searchsorted(sign * knots, sign * value) - 1).clamp(0, self.steps - 1)
        return (j + (value - knots[j]) / (knots[j + 1] - knots[j])) / self.steps


@dataclass(frozen=True)
class DDPMCurves(Piecewise):
    """DDPM in continuous time: a VP SDE with log alpha_bar linear between the steps, beta(t) constant in each."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self._value(t) / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(self._value(t)))

    def f(self, t: Tensor) -> Tensor:
        return self._slope(t) / 2

    def g(self, t: Tensor) -> Tensor:
        return torch.sqrt(-self._slope(t))

    def time(self, log_snr: Tensor) -> Tensor:
        return self._inverse(-torch.nn.functional.softplus(-log_snr))

    @property
    def prior_std(self) -> float:
        return 1.0


@dataclass(frozen=True)
class SMLDCurves(Piecewise):
    """NCSN in continuous time: a VE SDE with sigma² linear between the steps, from 0 at t = 0."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(self._value(t))

    def f(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def g(self, t: Tensor) -> Tensor:
        return torch.sqrt(self._slope(t))

    def time(self, log_snr: Tensor) -> Tensor:
        return self._inverse(torch.exp(-log_snr))


@dataclass(frozen=True)
class DDPM:
    """x_i = sqrt(1 - beta_i) x_{i-1} + sqrt(beta_i) z_i (Ho et al. 2020, eq. 2), for N values beta_i in (0, 1).

    Raises ValueError for a beta outside (0, 1): the step would lose or invert the signal.
    """

    values: tuple[float, ...]

    def __init__(self, betas: Sequence[float] | Tensor) -> None:
        values = _table(betas, "betas")
        for i, beta in enumerate(values):
            if not 0 < beta < 1:
                raise ValueError(f"beta_{i} = {beta:g} of {len(values)} lies outside (0, 1); take more steps")
        object.__setattr__(self, "values", values)

    @classmethod
    def linear(cls, n: int = 1000, first: float = 1e-4, last: float = 0.02) -> DDPM:
        """Ho et al. 2020's schedule: n values evenly spaced from `first` to `last` (published for n = 1000)."""
        return cls(torch.linspace(first, last, n, dtype=torch.float64))

    @classmethod
    def cosine(cls, n: int = 1000) -> DDPM:
        """Nichol & Dhariwal 2021's schedule, eq. 17: alpha_bar = c(i/n)/c(0), with beta at most 0.999."""
        angle = math.pi / 2 * (torch.arange(n + 1, dtype=torch.float64) / n + 0.008) / 1.008
        c = torch.cos(angle).square()
        return cls((1 - c[1:] / c[:-1]).clamp_max(0.999))

    @classmethod
    def from_sde(cls, sde: VPSDE, n: int = 1000) -> DDPM:
        """The VP SDE discretised as in Song et al. 2021, appendix B: beta_i = beta(i/(n-1))/n.

        With the default SDE and n = 1000 these are the published 1e-4 .. 0.02.
        Raises ValueError where n is so small that a beta reaches 1 (20 steps for the default SDE).
        """
        return cls(sde.beta(torch.linspace(0, 1, n, dtype=torch.float64)) / n)

    def __repr__(self) -> str:
        return f"DDPM(N={len(self)}, betas={self.values[0]:g}..{self.values[-1]:g})"

    def __len__(self) -> int:
        return len(self.values)

    @property
    def betas(self) -> Tensor:
        """(N,) float64."""
        return torch.tensor(self.values, dtype=torch.float64)

    @property
    def alpha_bar(self) -> Tensor:
        """(N,) float64, products of 1 - beta up to index i: x_i | x_0 ~ N(sqrt(alpha_bar) x_0, 1 - alpha_bar)."""
        return torch.exp(self._log_alpha_bar)

    @property
    def _log_alpha_bar(self) -> Tensor:
        return torch.log1p(-self.betas).cumsum(0)

    @property
    def times(self) -> Tensor:
        """(N + 1,) float64: 1 .. 0, the grid on which samplers run the chain backwards."""
        return torch.arange(len(self), -1, -1, dtype=torch.float64) / len(self)

    def perturb(self, x0: Tensor, i: Tensor, z: Tensor) -> Tensor:
        """x_i = sqrt(alpha_bar_i) x_0 + sqrt(1 - alpha_bar_i) z, i of shape () or (B,) (Ho et al., eq. 4)."""
        log = self._log_alpha_bar.to(i.device)[i]
        return like(torch.exp(log / 2), x0) * x0 + like(torch.sqrt(-torch.expm1(log)), x0) * z

    def posterior(self, x_i: Tensor, x0: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, variance) of x_{i-1} | x_i, x_0, where x_{-1} is x_0 itself (Ho et al. 2020, eq. 6-7)."""
        return self.as_sde().posterior(x_i, x0, *_interval(i, len(self)))

    def as_sde(self) -> DDPMCurves:
        """The chain's curves in continuous time, equal to the chain's at t = (i + 1)/N."""
        return DDPMCurves(knots=(0.0, *self._log_alpha_bar.tolist()))


@dataclass(frozen=True)
class SMLD:
    """x_i = x_{i-1} + sqrt(sigma_i² - sigma_{i-1}²) z_i: NCSN's noise levels as a chain (Song et al. 2021, eq. 8).

    `sigmas` are N increasing positive values; sigma_{-1} = 0. (NCSN's papers list them from large to small.)
    """

    values: tuple[float, ...]

    def __init__(self, sigmas: Sequence[float] | Tensor) -> None:
        values = _table(sigmas, "sigmas")
        for i, (low, high) in enumerate(zip((0.0, *values), values, strict=False)):
            if not low < high:
                raise ValueError(f"sigmas must increase from above 0, got {high:g} after {low:g} at index {i}")
        object.__setattr__(self, "values", values)

    @classmethod
    def from_sde(cls, sde: VESDE, n: int = 1000) -> SMLD:
        """n levels in geometric progression from sigma_min to sigma_max (Song et al. 2021, appendix C)."""
        return cls(sde.sigma(torch.linspace(0, 1, n, dtype=torch.float64)))

    def __repr__(self) -> str:
        return f"SMLD(N={len(self)}, sigmas={self.values[0]:g}..{self.values[-1]:g})"

    def __len__(self) -> int:
        return len(self.values)

    @property
    def sigmas(self) -> Tensor:
        """(N,) float64, increasing."""
        return torch.tensor(self.values, dtype=torch.float64)

    @property
    def times(self) -> Tensor:
        """(N + 1,) float64: 1 .. 0."""
        return torch.arange(len(self), -1, -1, dtype=torch.float64) / len(self)

    def perturb(self, x0: Tensor, i: Tensor, z: Tensor) -> Tensor:
        """x_i = x_0 + sigma_i z, for integer i of shape () or (B,)."""
        return x0 + like(self.sigmas.to(i.device)[i], x0) * z

    def posterior(self, x_i: Tensor, x0: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, variance) of x_{i-1} | x_i, x_0, where x_{-1} is x_0 itself (Song et al. 2021, appendix F)."""
        return self.as_sde().posterior(x_i, x0, *_interval(i, len(self)))

    def as_sde(self) -> SMLDCurves:
        """The chain's curves in continuous time, equal to the chain's at t = (i + 1)/N."""
        return SMLDCurves(knots=(0.0, *self.sigmas.square().tolist()))


def _interval(i: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(s, t) of step i: from t = (i + 1)/N to s = i/N."""
    i = torch.as_tensor(i).to(torch.float64)
    return i / n, (i + 1) / n
