"""Markov chains of DDPM and NCSN (SMLD), and their SDEs: the continuous curves through them.

A chain adds noise in N steps, index i = 0..N-1 as in the papers. It is a discretised SDE, which `as_sde` returns: the
same curves in continuous time, so that every loss, sampler and likelihood of the package runs on a chain's model, on
the grid `times`. Index i lies at t = (i + 1)/N; t = 0 is clean data.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .linear import SDE, VESDE, VPSDE, VarianceExploding, VariancePreserving, like


@dataclass(frozen=True, kw_only=True, repr=False)
class Piecewise(SDE):
    """A chain's SDE: curves through the knots (j/N, knots[j]), j = 0..N, linear between them and increasing from 0.

    `f` and `g` are constant inside a step; at a knot they are those of the step that ends there.
    """

    knots: tuple[float, ...]
    t_min: float = 0.0

    def __repr__(self) -> str:
        return f"{type(self).__name__}(steps={self.steps}, t_min={self.t_min})"

    @property
    def steps(self) -> int:
        """Number N of the chain's steps."""
        return len(self.knots) - 1

    @cached_property
    def _tables(self) -> dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]]:
        return {}

    def __getstate__(self) -> dict[str, object]:
        """The fields alone: copies and pickles build their own tables."""
        return {"knots": self.knots, "t_min": self.t_min}

    def _table(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(N + 1,) knots and (N,) differences, in t's dtype and on its device; the differences lose no digits."""
        key = t.dtype, t.device
        if key not in self._tables:
            knots = torch.tensor(self.knots, dtype=torch.float64)
            self._tables[key] = knots.to(t), knots.diff().to(t)
        return self._tables[key]

    def _cell(self, u: Tensor) -> Tensor:
        """Index j of the step from j to j + 1 that contains u = t N."""
        rounding = 4 * torch.finfo(u.dtype).eps * self.steps  # so that t = (i + 1)/N, times N, is in step i
        return (u - rounding).floor().clamp(0, self.steps - 1).long()

    def _value(self, t: Tensor) -> Tensor:
        knots, differences = self._table(t)
        u = t * self.steps
        j = self._cell(u)
        return knots.take(j) + differences.take(j) * (u - j)

    def _slope(self, t: Tensor) -> Tensor:
        return self._table(t)[1].take(self._cell(t * self.steps)) * self.steps

    def _inverse(self, value: Tensor) -> Tensor:
        """The t at which the curve has `value`."""
        knots, differences = self._table(value)
        j = (torch.searchsorted(knots, value) - 1).clamp(0, self.steps - 1)
        return (j + (value - knots.take(j)) / differences.take(j)) / self.steps


@dataclass(frozen=True, kw_only=True, repr=False)
class DDPMCurves(Piecewise, VariancePreserving):
    """DDPM in continuous time: a VP SDE with log alpha_bar linear in each step, so beta(t) is constant there.

    The knots are -log alpha_bar, which is the integral of beta.
    """

    beta, _integral, _time = Piecewise._slope, Piecewise._value, Piecewise._inverse


@dataclass(frozen=True, kw_only=True, repr=False)
class SMLDCurves(Piecewise, VarianceExploding):
    """NCSN in continuous time: a VE SDE with sigma² linear in each step, from 0 at t = 0. The knots are sigma²."""

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(self._value(t))

    def g(self, t: Tensor) -> Tensor:
        return torch.sqrt(self._slope(t))

    def time(self, log_snr: Tensor) -> Tensor:
        return self._inverse(torch.exp(-log_snr))


@dataclass(frozen=True)
class Chain(ABC):
    """N steps, each given by one of the `values`: DDPM's betas or NCSN's noise levels."""

    values: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.values)

    @property
    def times(self) -> Tensor:
        """(N + 1,) float64: 1 .. 0, the grid on which samplers run the chain backwards."""
        return torch.arange(len(self), -1, -1, dtype=torch.float64) / len(self)

    @abstractmethod
    def perturb(self, x0: Tensor, i: Tensor | int, z: Tensor) -> Tensor:
        """x_i given x_0, for standard normal z of x0's shape and integer i of shape () or (B,)."""

    def posterior(self, x_i: Tensor, x0: Tensor, i: Tensor | int) -> tuple[Tensor, Tensor]:
        """(mean, variance) of x_{i-1} | x_i, x_0, where x_{-1} is x_0 itself.

        Ho et al. 2020, eq. 6-7; for NCSN's levels Song et al. 2021, appendix F.
        """
        i = _index(i, len(self)).double()
        return self.as_sde().posterior(x_i, x0, i / len(self), (i + 1) / len(self))

    @abstractmethod
    def as_sde(self) -> SDE:
        """The chain's curves in continuous time, equal to the chain's at t = (i + 1)/N."""


@dataclass(frozen=True, init=False, repr=False)
class DDPM(Chain):
    """x_i = sqrt(1 - beta_i) x_{i-1} + sqrt(beta_i) z_i (Ho et al. 2020, eq. 2), for N values beta_i in (0, 1).

    Raises ValueError for a beta outside (0, 1), which would lose or invert the signal.
    """

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

        ``DDPM.from_sde(VPSDE(), 1000) == DDPM.linear(1000)``, the published schedule.
        Raises ValueError for another SDE, and where n is so small that a beta reaches 1 (n <= 20 for the default SDE).
        """
        if type(sde) is not VPSDE:
            raise ValueError(f"DDPM discretises VPSDE, got {sde}; pass betas to DDPM(...)")
        return cls.linear(n, sde.beta_min / n, sde.beta_max / n)

    def __repr__(self) -> str:
        return f"DDPM(N={len(self)}, betas={self.values[0]:g}..{self.values[-1]:g})"

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

    def perturb(self, x0: Tensor, i: Tensor | int, z: Tensor) -> Tensor:
        """x_i = sqrt(alpha_bar_i) x_0 + sqrt(1 - alpha_bar_i) z, i of shape () or (B,) (Ho et al., eq. 4)."""
        log = self._log_alpha_bar[_index(i, len(self))]
        return like(torch.exp(log / 2), x0) * x0 + like(torch.sqrt(-torch.expm1(log)), x0) * z

    def as_sde(self) -> DDPMCurves:
        return DDPMCurves(knots=(0.0, *(-self._log_alpha_bar).tolist()))


@dataclass(frozen=True, init=False, repr=False)
class SMLD(Chain):
    """x_i = x_{i-1} + sqrt(sigma_i² - sigma_{i-1}²) z_i: NCSN's noise levels as a chain (Song et al. 2021, eq. 8).

    `sigmas` are N values that increase from above 0; sigma_{-1} = 0. (NCSN's papers list them from large to small.)
    Raises ValueError for a value that is not above the one before it.
    """

    def __init__(self, sigmas: Sequence[float] | Tensor) -> None:
        values = _table(sigmas, "sigmas")
        for i, (low, high) in enumerate(zip((0.0, *values), values, strict=False)):
            if not low < high:
                raise ValueError(f"sigmas must increase from above 0, got {high:g} after {low:g} at index {i}")
        object.__setattr__(self, "values", values)

    @classmethod
    def from_sde(cls, sde: VESDE, n: int = 1000) -> SMLD:
        """n levels in geometric progression from sigma_min to sigma_max (Song et al. 2021, appendix C).

        Raises ValueError for another SDE.
        """
        if type(sde) is not VESDE:
            raise ValueError(f"SMLD discretises VESDE, got {sde}; pass sigmas to SMLD(...)")
        return cls(sde.sigma(torch.linspace(0, 1, n, dtype=torch.float64)))

    def __repr__(self) -> str:
        return f"SMLD(N={len(self)}, sigmas={self.values[0]:g}..{self.values[-1]:g})"

    @property
    def sigmas(self) -> Tensor:
        """(N,) float64, increasing."""
        return torch.tensor(self.values, dtype=torch.float64)

    def perturb(self, x0: Tensor, i: Tensor | int, z: Tensor) -> Tensor:
        """x_i = x_0 + sigma_i z, for integer i of shape () or (B,)."""
        return x0 + like(self.sigmas[_index(i, len(self))], x0) * z

    def as_sde(self) -> SMLDCurves:
        return SMLDCurves(knots=(0.0, *self.sigmas.square().tolist()))


def _table(values: Sequence[float] | Tensor, name: str) -> tuple[float, ...]:
    table = torch.as_tensor(values, dtype=torch.float64).flatten()
    if len(table) == 0 or not bool(torch.isfinite(table).all()):
        raise ValueError(f"{name} must be a non-empty sequence of finite numbers, got {values!r}")
    return tuple(table.tolist())


def _index(i: Tensor | int, n: int) -> Tensor:
    """i as integers on the CPU, where the chain's tables are. Index -1, x_0, is no step and refused."""
    i = torch.as_tensor(i).cpu()
    if i.is_floating_point() or not bool(((i >= 0) & (i < n)).all()):
        raise ValueError(f"i must be integers in 0..{n - 1}, the chain's steps, got {i}")
    return i
