"""Time grids: n + 1 decreasing float64 values from 1 to the SDE's t_min, apart from the solvers that walk them."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from ..sdes import SDE


def _unit(n: int) -> Tensor:
    if n < 1:
        raise ValueError(f"a grid needs at least 1 step, got {n}")
    return torch.linspace(0, 1, n + 1, dtype=torch.float64)


def uniform(sde: SDE, n: int) -> Tensor:
    """Evenly spaced in t: the grid of Song et al. 2021."""
    return _with_ends(sde, 1 - (1 - sde.t_min) * _unit(n))


def quadratic(sde: SDE, n: int) -> Tensor:
    """Evenly spaced in sqrt(t): DDIM's, denser near the data (Song et al. 2021, arXiv:2010.02502, appendix D.2)."""
    return _with_ends(sde, (1 - (1 - sde.t_min**0.5) * _unit(n)) ** 2)


def log_snr(sde: SDE, n: int) -> Tensor:
    """Evenly spaced in log SNR (Lu et al. 2022, arXiv:2206.00927, section 3.3)."""
    first, last = sde.log_snr(_ends(sde))
    return _with_ends(sde, sde.time(first + (last - first) * _unit(n)))


def karras(sde: SDE, n: int, rho: float = 7.0) -> Tensor:
    """Evenly spaced in (sigma/alpha)^(1/rho) (Karras et al. 2022, eq. 5)."""
    first, last = torch.exp(-sde.log_snr(_ends(sde)) / (2 * rho))
    return _with_ends(sde, sde.time(-2 * rho * torch.log(first + (last - first) * _unit(n))))


def arcsinh(sde: SDE, n: int, scale: float = 2.0) -> Tensor:
    """Evenly spaced in arcsinh(log(alpha/sigma)/scale): `log_snr` where data and noise are alike, longer steps outside.

    For data of about unit size, whose structure comes and goes around sigma = alpha. Grids fitted to models
    (`fit_times`) look like it; docs/performance.md has what it gains.
    """
    first, last = torch.asinh(sde.log_snr(_ends(sde)) / (2 * scale))
    return _with_ends(sde, sde.time(2 * scale * torch.sinh(first + (last - first) * _unit(n))))


def spaced(n: int, count: int) -> Tensor:
    """`count` of a chain's n steps, evenly spaced, from 1 to 1/n: the first, the last, and what lies between.

    The chain of these times alone is Improved DDPM's respaced one (Nichol & Dhariwal 2021, section 4), rounding
    included. Raises ValueError for more steps than the chain has.
    """
    if not 1 <= count <= n:
        raise ValueError(f"a chain of {n} steps can be walked in 1 to {n} of them, got {count}")
    stride = (n - 1) / max(count - 1, 1)
    places = accumulate([0.0] + [stride] * (count - 1))  # as in their code: where a half is rounded to hangs on it
    return torch.tensor([round(place) + 1 for place in places], dtype=torch.float64).flip(0) / n


def _ends(sde: SDE) -> Tensor:
    ends = torch.tensor([1.0, sde.t_min], dtype=torch.float64)
    if not bool(torch.isfinite(sde.log_snr(ends)).all()):
        raise ValueError(f"{sde} has no finite log SNR at t_min = {sde.t_min:g}; give it a t_min > 0 with replace()")
    return ends


def _with_ends(sde: SDE, times: Tensor) -> Tensor:
    """The grid with its ends exact, not to rounding."""
    times[0], times[-1] = 1.0, sde.t_min
    return times
