"""Dequantisation: log probabilities of discrete data from a density, and the importance-weighted bound (IWAE).

A model gives a density p of real numbers, and an image consists of levels k. With a law q(x | k) on the bin of k alone,

    log P(k) = log integral of p over the bin >= E_q [log p(x) - log q(x | k)]

(Theis et al. 2016, eq. 7, for a uniform q; Ho et al. 2019, arXiv:1902.00275, for any), and with K draws

    log P(k) >= E log 1/K sum over i of p(x_i)/q(x_i | k),

which never falls with K and tends to log P(k) (Burda et al. 2016, arXiv:1509.00519, theorem 1; for dequantisation
Hoogeboom et al. 2020, arXiv:2001.11235).

A dequantiser is a callable ``(k, u) -> Dequantised``, a map from uniform numbers u in [0, 1) of k's shape into the bin
of k, with an attribute `t_min`, the time at which its result is the state.

- `Uniform`: uniform on the bin, the codec's (k + u)/levels, without its top 2^-14 (`PixelCodec.filled`).
- `TruncatedNormal`: the noise of t_min truncated to the bin, around the level's value in training. A model that was
  trained without dequantisation has seen such states (Zheng et al. 2023, arXiv:2305.03935).
- `VariationalDequantiser`: a small flow, fitted to the model by `fit_dequantiser`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from ..data.codecs import PixelCodec
from ..losses.denoising import noise_error
from ..losses.time_laws import log_snr, low_discrepancy
from ..machine.devices import widest
from ..models.base import ScoreModel
from ..models.pixel_levels import bits, half_bin
from ..models.reverse import prior_divergence
from ..noise import example_numbers
from ..sdes.linear import SDE
from .exact import log_likelihood
from .sde_bound import reconstruction


class Examples(Protocol):
    """A data set such as `data.Split`: indices (B,) int64 on the CPU -> (levels (B, *shape), labels or None)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor, /) -> tuple[Tensor, Tensor | None]: ...


class Dequantised(NamedTuple):
    """States x of k's shape, and log q(x | k) in nats, of the same shape: its sum over dimensions is that of x."""

    x: Tensor
    log_q: Tensor


class Dequantiser(Protocol):
    """A law on the bin of each level, as a map of uniform numbers; differentiable in its parameters, if it has any."""

    @property
    def t_min(self) -> float:
        """The time at which its result is the state."""

    def __call__(self, k: Tensor, u: Tensor) -> Dequantised: ...


@dataclass(frozen=True)
class Uniform:
    """Uniform dequantisation by `PixelCodec.encode`: x = (k + u)/levels, scaled; q is levels/(width filled) per dim."""

    codec: PixelCodec
    t_min: float = 1e-5

    def __call__(self, k: Tensor, u: Tensor) -> Dequantised:
        x = self.codec.encode(k, u)
        return Dequantised(x, torch.full_like(x, _log_density(self.codec)))


@dataclass(frozen=True)
class TruncatedNormal:
    """x = alpha value_of(k) + sigma z, scaled, with z normal but truncated half way to the neighbouring levels.

    alpha and sigma are the SDE's at t_min; z lies in [-reach, reach]. With a reach of about 3 little is truncated, and
    x has nearly the law of the noised data; see `truncation_time`. Raises ValueError without noise at t_min.
    """

    codec: PixelCodec
    sde: SDE
    t_min: float = 1e-5

    def __post_init__(self) -> None:
        if not self.reach < math.inf:
            raise ValueError(f"{self.sde} has no noise at t_min = {self.t_min:g} to truncate; 1e-5 is usual")

    @property
    def _curves(self) -> tuple[float, float]:
        t = torch.tensor(self.t_min, dtype=torch.float64)
        return self.sde.alpha(t).item(), self.sde.sigma(t).item()

    @property
    def reach(self) -> float:
        """Half a bin, in standard deviations of the noise."""
        alpha, sigma = self._curves
        return alpha * half_bin(self.codec.levels, self.codec.width) / sigma if sigma > 0 else math.inf

    def __call__(self, k: Tensor, u: Tensor) -> Dequantised:
        (alpha, sigma), reach = self._curves, self.reach
        wide = widest(u)
        inside = math.erf(reach / math.sqrt(2))
        z = torch.special.ndtri((1 - inside) / 2 + inside * u.to(wide)).clamp(-reach, reach)
        log_q = -z.square() / 2 - math.log(math.sqrt(2 * math.pi) * sigma * inside)
        return Dequantised((alpha * self.codec.encode(k).to(wide) + sigma * z).to(u.dtype), log_q.to(u.dtype))


def truncation_time(codec: PixelCodec, sde: SDE, reach: float = 3.0, least: float = 1e-5) -> float:
    """The t_min at which half a bin is `reach` standard deviations of the noise, or `least` where that is later.

    For 8 bits that is at a log SNR of 13.3, where the schedule of Kingma et al. 2021 begins. With a longer reach the
    model must find noise of an amplitude that it can hardly see, with a shorter one much of the trained law is missing.
    """
    target = torch.tensor(2 * math.log(reach / half_bin(codec.levels, codec.width)), dtype=torch.float64)
    first = sde.log_snr(torch.tensor(least, dtype=torch.float64))
    return least if bool(target >= first) else sde.time(target).item()


def _log_density(codec: PixelCodec) -> float:
    """Log of the density, per dimension, of `codec.encode(k, u)` for uniform u."""
    return math.log(codec.levels / (codec.width * codec.filled))


class VariationalDequantiser(nn.Module):
    """Variational dequantisation by a flow on the bin: x = (k + u')/levels, scaled, with u' = sigmoid(T(logit(u); k)).

    T is a sequence of affine couplings (Dinh et al. 2017, arXiv:1605.08803): each scales and shifts every second
    dimension, in a checkerboard, by a small network's output for the others and the whole image k. The networks' last
    layers are initialised with 0, where u' = u: until it is fitted the dequantisation is uniform.

    Args:
        codec: of the levels.
        shape: of an example; (C, H, W) gets convolutions, (D,) dense layers.
        hidden, layers: width of the couplings' networks, and number of couplings.
        t_min: the time at which x is the state.
    """

    mask: Tensor

    def __init__(
        self, codec: PixelCodec, shape: tuple[int, ...], *, hidden: int = 32, layers: int = 4, t_min: float = 1e-5
    ) -> None:
        super().__init__()
        self.codec, self.shape, self.hidden, self.t_min = codec, tuple(shape), hidden, t_min
        place = torch.stack(torch.meshgrid(*[torch.arange(n) for n in shape], indexing="ij")).sum(0)
        self.register_buffer("mask", place % 2 == 0, persistent=False)
        self.couplings = nn.ModuleList(_coupling(self.shape, hidden) for _ in range(layers))

    def forward(self, k: Tensor, u: Tensor) -> Dequantised:
        # Logistic numbers y; float32 knows u to 2^-24
        y = torch.logit(u.clamp(2.0**-25, 1 - 2.0**-24))
        log_q = logsigmoid(y) + logsigmoid(-y)
        image = self.codec.encode(k).to(y)
        for i, network in enumerate(self.couplings):
            moved = self.mask if i % 2 == 0 else ~self.mask
            seen = torch.tanh(y / 2).masked_fill(moved, 0.0)
            shift, log_scale = network(torch.cat([seen, image], dim=1)).chunk(2, dim=1)
            log_scale = 2 * torch.tanh(log_scale / 2) * moved
            y, log_q = y * torch.exp(log_scale) + shift * moved, log_q - log_scale
        log_q = log_q - logsigmoid(y) - logsigmoid(-y) + _log_density(self.codec)
        return Dequantised(self.codec.encode(k, torch.sigmoid(y)), log_q)


def _coupling(shape: tuple[int, ...], hidden: int) -> nn.Module:
    """A network (B, 2C, ...) -> (B, 2C, ...) whose initial output is 0."""

    def layer(inputs: int, outputs: int) -> nn.Module:
        return nn.Conv2d(inputs, outputs, 3, padding=1) if len(shape) == 3 else nn.Linear(inputs, outputs)

    if len(shape) not in (1, 3):
        raise ValueError(f"a variational dequantiser is for images (C, H, W) or vectors (D,), got {shape}")
    last = layer(hidden, 2 * shape[0])
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
    return nn.Sequential(layer(2 * shape[0], hidden), nn.SiLU(), layer(hidden, hidden), nn.SiLU(), last)


class LogProbability(NamedTuple):
    """A bound on log P(k) in nats (B,), its standard error over probes (B,), its K draws, and NFE.

    `draws` (K, B) are log p(x_i) - log q(x_i | k); the bound is the logarithm of the mean of their exponentials.
    `std_error` assumes that a probe's error is the same in all draws of an image, which share their probes.
    """

    log_prob: Tensor
    std_error: Tensor
    draws: Tensor
    nfe: float
    dimensions: int

    def bits_per_dim(self) -> Tensor:
        """-log2 P(k) per dimension, (B,), without an offset, as q contains the size of a level."""
        return bits(-self.log_prob, self.dimensions)


def log_mean_exp(draws: Tensor) -> Tensor:
    """log of the mean of exp over the first dimension: the importance-weighted bound (B,) from log weights (K, B)."""
    return torch.logsumexp(draws, 0) - math.log(len(draws))


def uniform_numbers(shape: tuple[int, ...], samples: int, seed: int, first: int = 0) -> Tensor:
    """(samples, *shape) float32 numbers in [0, 1) for a batch of `shape`; example i's depend on (seed, first + i)."""
    rows = [each.random((samples, *shape[1:]), np.float32) for each in example_numbers(seed, first, shape[0])]
    return torch.from_numpy(np.stack(rows, axis=1) if rows else np.zeros((samples, *shape), np.float32))


def log_probability(
    model: ScoreModel, k: Tensor, dequantiser: Dequantiser, *,
    samples: int = 1, seed: int = 0, first: int = 0, dtype: torch.dtype = torch.float32, **options: Any,
) -> LogProbability:  # fmt: skip
    """A lower bound on log P(k), k (B, *shape), by `samples` draws of the dequantiser, with p by the probability flow.

    On average it rises with `samples`, to log P(k). The draws of an image share their probes: independent errors of the
    trace would raise the bound above the truth by way of the exponential, while a common error only adds to it, with
    mean 0. The differences of the error within a bin remain; with probe="exact" there is none.

    Args:
        dequantiser: the law of the draws; its t_min is that of the likelihood.
        samples: number K of draws; each costs a likelihood of the batch.
        seed, first: example i's draws and probes depend on (seed, first + i) alone.
        dtype, options: of the states, and of `log_likelihood`: probe, probes, rtol, atol, method, prior_log_prob.

    Raises ValueError for samples < 1 and as `log_likelihood` does.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    numbers = uniform_numbers(tuple(k.shape), samples, seed, first).to(k.device, dtype)
    draws, errors, nfe = [], [], 0.0
    with torch.no_grad():
        for u in numbers:
            x, log_q = dequantiser(k, u)
            density = log_likelihood(model, x, t_min=dequantiser.t_min, seed=seed, first=first, **options)
            draws.append(density.log_prob - log_q.to(density.log_prob).flatten(1).sum(1))
            errors.append(density.std_error)
            nfe += density.nfe
    log_weights, error = torch.stack(draws), torch.stack(errors)
    shares = torch.softmax(log_weights, 0)
    return LogProbability(log_mean_exp(log_weights), (shares * error).sum(0), log_weights, nfe, math.prod(k.shape[1:]))


def dequantisation_loss(
    model: ScoreModel, dequantiser: VariationalDequantiser, k: Tensor, u: Tensor, v: Tensor, z: Tensor
) -> Tensor:
    """One draw of a bound on -log P(k), (B,) nats.

    The variational bound of the SDE replaces -log p(x), as in Song et al. 2021b: it is differentiable in the
    dequantiser and in the model.

    Of k's shape (B, *shape) are u, uniform numbers for the dequantiser, and z, standard normal ones; v (B,) are uniform
    numbers in float64, which become times, uniform in log SNR from the dequantiser's t_min.
    """
    x, log_q = dequantiser(k, u)
    sde = model.sde
    t, weight = log_snr(replace(sde, t_min=dequantiser.t_min), v)
    rate = (1 - dequantiser.t_min) * weight * (sde.g(t) / sde.sigma(t)) ** 2
    diffusion = x[0].numel() / 2 * rate.to(x) * noise_error(model, x, t, z)
    start, end = torch.tensor([dequantiser.t_min, 1.0], dtype=torch.float64)
    ends = prior_divergence(sde, x, end) + reconstruction(sde, x, start, z, "gaussian")
    return ends + diffusion + log_q.flatten(1).sum(1)


def fit_dequantiser(
    model: ScoreModel, split: Examples, codec: PixelCodec, *,
    steps: int = 1000, batch_size: int = 128, lr: float = 1e-3, hidden: int = 32, layers: int = 4, t_min: float = 1e-5,
    seed: int = 0, progress: Callable[[int, Tensor], None] | None = None,
) -> VariationalDequantiser:  # fmt: skip
    """Fit a variational dequantiser to a fixed model, by Adam on `dequantisation_loss`.

    Args:
        model: any score model, in eval mode.
        split, codec: examples to fit on, on the model's device, and the codec of their levels.
        steps, batch_size, lr: of Adam; the learning rate falls to 0 along a cosine.
        hidden, layers, t_min: of the `VariationalDequantiser`.
        seed: of weights, batches, times and noise.
        progress: called with (step, loss in nats per example, a tensor ()) after each step.
    """
    frozen = {p: p.requires_grad for p in model.parameters()}
    for p in frozen:
        p.requires_grad_(False)
    device, generator = split[torch.tensor([0])][0].device, torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dequantiser = VariationalDequantiser(codec, split.shape, hidden=hidden, layers=layers, t_min=t_min).to(device)
    optimizer = torch.optim.Adam(dequantiser.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    try:
        for step in range(steps):
            k, _ = split[torch.randint(len(split), (batch_size,), generator=generator)]
            u, z = (draw(k.shape, generator=generator).to(device) for draw in (torch.rand, torch.randn))
            loss = dequantisation_loss(model, dequantiser, k, u, low_discrepancy(batch_size, generator), z).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(dequantiser.parameters(), 1.0, error_if_nonfinite=True)
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress(step + 1, loss.detach())
    finally:
        for p, requires in frozen.items():
            p.requires_grad_(requires)
    return dequantiser.eval().requires_grad_(False)
