"""Errors by noise level, for logs of training: bins in log SNR, and the irreducible error in each."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .. import losses
from ..losses import time_laws
from ..models.base import ScoreModel
from ..noise import StepStream, generator
from ..sdes.linear import SDE


def noise_bins(sde: SDE, count: int = 5) -> tuple[Tensor, list[str]]:
    """Edges in log SNR, even from t_min (1e-5 at least) to 1, and the range of sigma/alpha of each bin as its name."""
    ends = sde.log_snr(torch.tensor([max(sde.t_min, 1e-5), 1.0], dtype=torch.float64))
    if not bool(torch.isfinite(ends).all()):  # pragma: no cover
        raise ValueError(f"{sde} has no finite log SNR between {sde.t_min} and 1")
    edges = torch.linspace(ends[0].item(), ends[1].item(), count + 1, dtype=torch.float64)
    levels = torch.exp(-edges / 2).tolist()
    return edges, [f"sigma {a:.2g} to {b:.2g}" for a, b in pairwise(levels)]


def by_noise_level(sde: SDE, t: Tensor, error: Tensor) -> dict[str, float]:
    """Mean of an error (or another measure) in each bin of `noise_bins` that has examples."""
    edges, names = noise_bins(sde)
    bins = torch.bucketize(-sde.log_snr(t), -edges[1:-1])
    return {name: float(error[bins == i].mean()) for i, name in enumerate(names) if bool((bins == i).any())}


def noise_floor(exact: ScoreModel, sample: Callable[[int], Tensor], sde: SDE, n: int = 20_000) -> dict[str, float]:
    """The irreducible error E|z - E[z|x_t]|² per dimension in each bin, for data whose exact model is known."""
    t = time_laws.log_snr(sde, time_laws.low_discrepancy(n, generator(0, 0, StepStream.FLOOR))).t
    x0 = sample(n).double()
    z = torch.randn(x0.shape, generator=generator(0, 0, StepStream.FLOOR_NOISE), dtype=x0.dtype)
    parts = zip(*(v.split(2_000) for v in (x0, t, z)))  # a mixture of many components takes memory
    with torch.no_grad():
        error = [losses.noise_error(exact, x0_, t_, z_) for x0_, t_, z_ in parts]
    return by_noise_level(sde, t, torch.cat(error))
