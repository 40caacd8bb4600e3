"""Time grids for all samplers: n + 1 decreasing float64 values from `start`, by default 1, to the SDE's t_min."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from ..sdes.linear import SDE

Map = Callable[[Tensor], Tensor]


def uniform(sde: SDE, n: int, *, start: float = 1.0) -> Tensor:
    """Evenly spaced in t: the grid of Song et al. 2021."""
    return _evenly(sde, n, start, lambda t: t, lambda u: u)


def quadratic(sde: SDE, n: int, *, start: float = 1.0) -> Tensor:
    """Evenly spaced in sqrt(t): DDIM's, denser near the data (Song et al. 2021, arXiv:2010.02502, appendix D.2)."""
    return _evenly(sde, n, start, torch.sqrt, torch.square)


def log_snr(sde: SDE, n: int, *, start: float = 1.0) -> Tensor:
    """Evenly spaced in log SNR (Lu et al. 2022, arXiv:2206.00927, section 3.3)."""
    return _evenly(sde, n, start, lambda t: _log_snr(sde, t, n), sde.time)


def karras(sde: SDE, n: int, rho: float = 7.0, *, start: float = 1.0) -> Tensor:
    """Evenly spaced in (sigma/alpha)^(1/rho) (Karras et al. 2022, eq. 5)."""
    root = lambda t: torch.exp(-_log_snr(sde, t, n) / (2 * rho))
    return _evenly(sde, n, start, root, lambda u: sde.time(-2 * rho * torch.log(u)))


def arcsinh(sde: SDE, n: int, scale: float = 2.0, *, start: float = 1.0) -> Tensor:
    """Evenly spaced in arcsinh(log(alpha/sigma)/scale): `log_snr` around sigma = alpha, and longer steps elsewhere.

    It is for data of about unit size, whose structure appears around sigma = alpha. Grids fitted to models
    (`fit_times`) look like it; docs/performance.md measures what it gains.
    """
    bent = lambda t: torch.asinh(_log_snr(sde, t, n) / (2 * scale))
    return _evenly(sde, n, start, bent, lambda u: sde.time(2 * scale * torch.sinh(u)))


def skewed(sde: SDE, n: int, scale: float = 0.8, *, start: float = 1.0) -> Tensor:
    """`Balanced`'s grid for data of deviation `scale`: like `arcsinh`, but with more of its steps at the data's side.

    With y = log(scale alpha/sigma) + 0.35 it is even in r arcsinh(y/r), r = 1.25 where y < 0, towards noise, and r = 2
    where y > 0. On the noise side only the largest scale of the data is seen, and its error dies out; on the data's
    side the smaller ones follow.
    """
    middle = math.log(scale) + 0.35
    width = lambda y: torch.where(y < 0, 1.25, 2.0)

    def bent(t: Tensor) -> Tensor:
        y = _log_snr(sde, t, n) / 2 + middle
        return width(y) * torch.asinh(y / width(y))

    return _evenly(sde, n, start, bent, lambda v: sde.time(2 * (width(v) * torch.sinh(v / width(v)) - middle)))


def shifted(sde: SDE, grid: Tensor, shift: float) -> Tensor:
    """The grid with its inner times moved towards noise (shift > 1) or data (shift < 1), its ends kept.

    With u = sigma/(alpha + sigma), the time of the straight path, scaled to 0 and 1 at the ends, u becomes
    shift u/(1 + (shift - 1) u): sigma/alpha is multiplied by the shift (Esser et al. 2024, arXiv:2403.03206, eq. 23).
    Images of m times as many pixels, whose neighbours are alike, keep as much signal at sqrt(m) times as much noise:
    shift = sqrt(m). Raises ValueError for a shift of 0 or below.
    """
    if not 0 < shift < math.inf:
        raise ValueError(f"shift must be above 0 and finite, got {shift}")
    u = sde.sigma(grid) / (sde.alpha(grid) + sde.sigma(grid))
    v = (u - u[-1]) / (u[0] - u[-1])
    moved = u[-1] + (u[0] - u[-1]) * shift * v / (1 + (shift - 1) * v)
    times = sde.time(2 * torch.log((1 - moved) / moved))
    times[0], times[-1] = grid[0], grid[-1]
    return times


def spaced(n: int, count: int, *, start: float = 1.0) -> Tensor:
    """`count` of a chain's n steps, evenly spaced from the one nearest to `start` to 1/n, both included (respacing).

    The chain of these times alone is Improved DDPM's respaced one (Nichol & Dhariwal 2021, section 4), rounding
    included. Raises ValueError for more steps than there are up to `start`.
    """
    within = max(round(start * n), 1) if 0 < start <= 1 else 0
    if not 1 <= count <= within:
        raise ValueError(f"a chain of {n} steps can be walked in 1 to {n} of them, got {count} from t = {start:g}")
    stride = (within - 1) / max(count - 1, 1)
    places = accumulate([0.0] + [stride] * (count - 1))  # as in their code, so that halves are rounded as there
    return torch.tensor([round(place) + 1 for place in places], dtype=torch.float64).flip(0) / n


def _evenly(sde: SDE, n: int, start: float, curve: Map, inverse: Map) -> Tensor:
    """n + 1 times between which the curve changes by equal steps; its ends are exact, not to rounding."""
    if not sde.t_min < start <= 1:
        raise ValueError(f"a grid begins above the SDE's t_min = {sde.t_min:g} and at most at 1, got start={start:g}")
    if not isinstance(n, (int, np.integer)) or n < 1:
        raise ValueError(f"a grid needs a whole number of steps, at least 1, got {n}")
    ends = torch.tensor([start, sde.t_min], dtype=torch.float64)
    first, last = curve(ends)
    times = inverse(first + (last - first) * torch.linspace(0, 1, n + 1, dtype=torch.float64))
    times[0], times[-1] = ends
    return times


def _log_snr(sde: SDE, ends: Tensor, n: int) -> Tensor:
    """Log SNR at the ends of a grid. Raises ValueError where it is infinite at the last.

    Where it is infinite at the first, as at t = 1 of `LinearSDE`, n steps are spaced as from log SNR -10 on, where VP
    ends, and more than 20 from a lower `horizon`: what the first step then passes over falls with n³ (alpha² at its
    end).
    """
    values = sde.log_snr(ends)
    if not bool(torch.isfinite(values[1])):
        raise ValueError(f"{sde} has no finite log SNR at t_min = {sde.t_min:g}; give it a t_min > 0 with replace()")
    return values.clamp_min(horizon(n)) if values[0] == -math.inf else values


def horizon(n: int) -> float:
    """The log SNR from which a grid of n steps is spaced, where pure noise begins it."""
    return -10 - 3 * math.log(max(n, 20) / 20)
