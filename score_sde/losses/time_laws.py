"""Time laws: how training draws t, and the importance weights that turn its averages into those over uniform t.

A law maps uniform numbers u in [0, 1) to times, so that the numbers may be independent or evenly spread.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..sdes.linear import SDE

Weight = Callable[[SDE, Tensor], Tensor]  # (sde, t) -> (B,)


class Times(NamedTuple):
    """Times (B,) in float64, and weights (B,) that make an average over them an average over uniform t."""

    t: Tensor
    weight: Tensor


_LEAST = -10.0  # the log SNR below which hardly any signal is left; VP's is -10.04 at t = 1

TimeLaw = Callable[[SDE, Tensor], Times]  # maps uniform numbers u in [0, 1), (B,) float64, to times


def uniform_numbers(n: int, generator: torch.Generator) -> Tensor:
    """n independent uniform numbers in [0, 1), float64."""
    return torch.rand(n, generator=generator, dtype=torch.float64)


def low_discrepancy(n: int, generator: torch.Generator) -> Tensor:
    """n numbers, each uniform in [0, 1), together evenly spread: (i + u)/n with one u, in random order.

    Kingma et al. 2021 (arXiv:2107.00630), appendix I.1: the loss has less variance over t, and the same mean.
    """
    u = torch.rand((), generator=generator, dtype=torch.float64)
    return (torch.randperm(n, generator=generator) + u) / n


def uniform(sde: SDE, u: Tensor) -> Times:
    """t uniform in [t_min, 1]."""
    return Times(sde.t_min + (1 - sde.t_min) * u, torch.ones_like(u))


def log_snr(sde: SDE, u: Tensor) -> Times:
    """t with log SNR uniform between its values at t_min and 1, where it is at least -10 (the other end may be -∞).

    Below -10, on an SDE whose state at t = 1 is pure noise, the density falls as exp(log SNR), as the loss does there.
    VP's noise loss with weight 1 at these times, without their weights, is likelihood weighting with importance
    sampling, as g² / sigma² = -(log SNR)'. The weights are those of uniform t: 1/((1 - t_min) density).
    """
    first, last = _log_snr_ends(sde)
    pure = last == -math.inf
    even = first - (_LEAST if pure else last)  # mass of the even part; that of the tail is 1
    place = (even + pure) * u
    tail = (place - even).clamp_min(0)
    snr = torch.where(tail > 0, _LEAST + torch.log1p(-tail), first - place)
    t = sde.time(snr).clamp(sde.t_min, 1.0)  # the inverse is exact to rounding only
    # -(log SNR)' = (g/sigma)² for every linear SDE: differentiate alpha²/sigma² with the moment equations.
    density = (1 - tail) / (even + pure) * (sde.g(t) / sde.sigma(t)) ** 2
    return Times(t, 1 / ((1 - sde.t_min) * density))


def log_normal(sde: SDE, u: Tensor, mean: float = -1.2, std: float = 1.2) -> Times:
    """log(sigma/alpha) normal (Karras et al. 2022, table 1: P_mean, P_std), between its values at t_min and 1."""
    from scipy.special import ndtr  # slow to import

    low, high = ((-snr / 2 - mean) / std for snr in _log_snr_ends(sde))
    below, within = ndtr(low), ndtr(high) - ndtr(low)
    place = torch.special.ndtri(below + within * u).clamp(low, high)
    t = sde.time(-2 * (mean + std * place)).clamp(sde.t_min, 1.0)
    # d log(sigma/alpha)/dt = (g/sigma)²/2, as in log_snr
    density = torch.exp(-(place**2) / 2) / (math.sqrt(2 * math.pi) * std * within) * (sde.g(t) / sde.sigma(t)) ** 2 / 2
    return Times(t, 1 / ((1 - sde.t_min) * density))


def mode(sde: SDE, u: Tensor, scale: float = 1.29) -> Times:
    """t = 1 - v - scale (cos²(pi v/2) - 1 + v) for uniform v, within [t_min, 1] (Esser et al. 2024, section 3.1).

    Scaling rectified flow (arXiv:2403.03206), "mode sampling with heavy tails": a scale above 0 draws more of the
    middle times, below 0 more of both ends; 0 is uniform. It is from -1 to 2/(pi - 2) = 1.75, where the map is
    monotone.
    """
    if not -1 <= scale <= 2 / (math.pi - 2):
        raise ValueError(f"scale must lie between -1 and {2 / (math.pi - 2):.3f}, got {scale:g}")
    first = _mode_place(sde.t_min, scale)
    v = first * (1 - u)  # falls with u, as t falls with v
    t = 1 - v - scale * (torch.cos(math.pi / 2 * v) ** 2 - 1 + v)
    rate = 1 + scale * (1 - math.pi / 2 * torch.sin(math.pi * v))  # -dt/dv
    return Times(t.clamp(sde.t_min, 1.0), first * rate / (1 - sde.t_min))


def _mode_place(t: float, scale: float) -> float:
    """The v of `mode` at t, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        v = (low + high) / 2
        later = 1 - v - scale * (math.cos(math.pi / 2 * v) ** 2 - 1 + v) > t
        low, high = (v, high) if later else (low, v)
    return (low + high) / 2


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


def _log_snr_ends(sde: SDE) -> tuple[float, float]:
    """Log SNR at t_min and 1; at 1e-5 where it is infinite at t_min. At 1 it may be -∞."""
    start, usual, end = sde.log_snr(torch.tensor([sde.t_min, 1e-5, 1.0], dtype=torch.float64)).tolist()
    return start if math.isfinite(start) else usual, end


@lru_cache(maxsize=8)
def _table(weight: Weight, sde: SDE, cells: int = 4096) -> tuple[Tensor, Tensor]:
    """Edges from t_min to 1, spaced as `log_snr`, and the distribution function of the weight there."""
    edges = log_snr(sde, torch.linspace(0, 1, cells + 1, dtype=torch.float64)).t
    edges[0], edges[-1] = sde.t_min, 1.0
    mass = weight(sde, (edges[1:] + edges[:-1]) / 2) * edges.diff()
    return edges, torch.cat([mass.new_zeros(1), (mass / mass.sum()).cumsum(0)])


def soft_truncation(law: TimeLaw, k: float, v: Tensor) -> TimeLaw:
    """`law` above a smallest time tau, drawn for the whole batch with density proportional to tau^-k on [t_min, 1].

    Soft truncation (Kim et al. 2022, arXiv:2106.05527, section 4). With its weights a loss h(t) has over batches the
    mean of a general weight (their theorem 1),

        1/(1 - t_min) integral from t_min to 1 of P(tau <= t) h(t) dt,
        P(tau <= t) = log(t/t_min) / -log t_min for k = 1, else (1 - (t_min/t)^(k-1)) / (1 - t_min^(k-1)),

    while in a batch with a large tau all times are large, which the weight alone would make rare.

    Args:
        law: any continuous law that is a monotone map of u; it gets only those u that it maps above tau.
        k: 0 is uniform tau; larger k truncate less; the paper takes 1 to 2.
        v: the batch's uniform number in [0, 1), ().

    The law returned raises ValueError for an SDE with t_min = 0, where tau^-k has no distribution.
    """

    def truncated(sde: SDE, u: Tensor) -> Times:
        tau = truncation(sde.t_min, k, v)
        low, high = torch.zeros_like(tau), torch.ones_like(tau)
        for _ in range(6):  # 512 places at once: 54 bits of u
            u_of_each = low + (high - low) * torch.linspace(0, 1, 513, dtype=tau.dtype)
            below = int((law(sde, u_of_each[1:-1]).t < tau).sum())
            low, high = u_of_each[below], u_of_each[below + 1]
        t, weight = law(sde, low + (1 - low) * u)
        return Times(t.clamp_min(tau), weight * (1 - low))

    return truncated


def truncation(t_min: float, k: float, v: Tensor) -> Tensor:
    """tau in [t_min, 1] with density proportional to tau^-k, for uniform v in [0, 1) of any shape."""
    if t_min <= 0:
        raise ValueError(f"soft truncation needs t_min above 0, got {t_min}; 1e-5 is usual")
    ratio = t_min ** (1 - v) if k == 1 else t_min * (1 - v * (1 - t_min ** (k - 1))) ** (1 / (1 - k))
    return ratio.clamp(t_min, 1.0)


class SecondMoments(nn.Module):
    """Importance sampling of a chain's steps in proportion to sqrt(E[loss²]), learned from the losses in training.

    Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 18: the mean is over the last `history` losses of each step. Steps
    are drawn evenly until all have had that many, and in one draw of a thousand later. The weights make an average over
    its times one over evenly drawn steps. The losses are buffers, to be saved in checkpoints.
    """

    losses: Tensor
    counts: Tensor
    rare = 0.001  # share of even draws, so that no step is forgotten

    def __init__(self, n: int, history: int = 10) -> None:
        super().__init__()
        self.register_buffer("losses", torch.zeros(n, history, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(n, dtype=torch.int64))

    @property
    def chances(self) -> Tensor:
        """Probabilities (N,) of the steps i = 0..N-1."""
        n, history = self.losses.shape
        if bool((self.counts < history).any()):
            return torch.full((n,), 1 / n, dtype=torch.float64)
        size = self.losses.square().mean(1).sqrt()
        return (1 - self.rare) * size / size.sum() + self.rare / n

    def forward(self, sde: SDE, u: Tensor) -> Times:
        """Times t = (i + 1)/N and their weights."""
        p, n = self.chances, len(self.counts)
        i = torch.searchsorted(p.cumsum(0), u, right=True).clamp_max(n - 1)
        return Times((i + 1) / n, 1 / (n * p[i]))

    def update(self, t: Tensor, loss: Tensor) -> None:
        """Remember the unweighted losses of a batch, (B,), at its times, in their order."""
        n, history = self.losses.shape
        losses, counts = self.losses.numpy(), self.counts.numpy()
        for i, value in zip(((t * n).round().long() - 1).tolist(), loss.double().tolist(), strict=True):
            losses[i, counts[i] % history] = value  # the newest replaces the oldest
            counts[i] += 1


def discrete(n: int) -> TimeLaw:
    """t = (i + 1)/n with i uniform in 0..n-1: a chain's steps (Ho et al. 2020, algorithm 1)."""
    return lambda sde, u: Times(((u * n).floor() + 1) / n, torch.ones_like(u))
