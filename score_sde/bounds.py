"""The variational bound on -log p(x_0) of a Markov chain, term by term.

Seen as a hierarchical latent variable model, a chain with times t_1 < ... < t_T has (Ho et al. 2020, eq. 5)

    -log p(x_0) <= L_T + sum over i = 2..T of L_{i-1} + L_0,

    L_T     = KL(q(x_T | x_0) || N(0, prior_std² I))                  the prior
    L_{i-1} = E KL(q(x_{i-1} | x_i, x_0) || p(x_{i-1} | x_i))         the diffusion
    L_0     = -E log p(x_0 | x_1)                                     the reconstruction, or decoder

where p(x_s | x_t) = N(posterior mean with the model's estimate of the data, a variance between the posterior's and the
forward step's). Posteriors are exact between any two times of any SDE, so the same code bounds a chain, a chain of
which some steps are left out, and a continuous SDE cut at any grid of times. With an exact model and ever more steps
the bound falls to its continuous-time limit, which depends on the signal-to-noise ratio at both ends alone (Kingma et
al. 2021, arXiv:2107.00630, section 5).

Data with `levels` are not dequantised: the decoder gives a probability to each level, and the bound is one on
-log P(x_0). Floats have a Gaussian decoder, and the bound is one on minus a log density.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .devices import sent
from .levels import half_bin, value_of
from .model import Estimate, ScoreModel, Variance, check_finite, reverse_log_variance
from .samplers.base import noise_source
from .samplers.times import as_grid, check_first
from .sdes import SDE, like


class Bound(NamedTuple):
    """A bound on -log p, (B,) nats, and what it consists of.

    `diffusion` is (B, K): one column for each step of the chain, from `times` (K,) to the next; or K random ones of
    them, from `times` (B, K), where only so many were asked for. `total` then is their estimate, unbiased, with the
    standard error `std_error` (0 where all are there, NaN for a single one; else on average at least the true one).
    """

    total: Tensor
    prior: Tensor
    diffusion: Tensor
    reconstruction: Tensor
    times: Tensor
    std_error: Tensor
    dimensions: int

    @property
    def rate(self) -> Tensor:
        """prior + diffusion: what it costs to send x_1; the rest, `reconstruction`, is the distortion (Ho et al. 2020,
        section 4.3)."""
        return self.total - self.reconstruction

    def bits_per_dim(self, nats: Tensor | None = None) -> Tensor:
        """The total, or one of the parts as given in nats, in bits per dimension.

        With `levels` there is no offset: it bounds -log2 P(k)/D of the levels k themselves.
        """
        return (self.total if nats is None else nats) / (self.dimensions * math.log(2))


@torch.no_grad()
def chain_bound(
    model: ScoreModel,
    x0: Tensor,
    times: Tensor | None = None,
    *,
    variance: Variance = "small",
    levels: int | None = None,
    width: float = 2.0,
    terms: int | None = None,
    seed: int | torch.Generator = 0,
    first: int = 0,
) -> Bound:
    """The bound at each example of x0, with one draw of x_t for each term.

    Args:
        model: any score model.
        x0: data, (B, *shape); with `levels` their values (`levels.value_of`), scaled to [1 - width, 1].
        times: decreasing 1-D grid from 1 to clean data (sigma = 0) or to where the last noise is; by default all of a
            chain's. Some of a chain's times are a respaced chain, whose betas follow from the alphas that are kept.
        variance: of p(x_s | x_t): "small", "large" or "learned", see `reverse_log_variance`. A last step into clean
            data, whose posterior has none, takes that of the step before it in the place of "small" and of "large", as
            DDPM's code does; a grid that ends above clean data is decoded with (sigma/alpha)².
        levels, width: of the data, see `PixelCodec`; without levels the decoder is a Gaussian density.
        terms: how many of the diffusion terms to evaluate per example, one drawn at random from each of as many
            stretches of the chain; by default all.
        seed: of the draws; example i's depend on (seed, first + i) alone. A torch.Generator serves the whole batch.
        first: index of the batch's first example.

    Raises ValueError for an impossible grid, `terms` that the chain does not have, or data off their levels, and
    FloatingPointError, with the time, where a term is not finite.
    """
    sde = model.sde
    knots, clean = _knots(sde, times)
    _check_levels(x0, levels, width)
    steps, batch = len(knots) - 1, len(x0)
    noise = noise_source(tuple(x0.shape), seed, first, x0.dtype, x0.device)
    if terms is None:
        which, size = torch.arange(steps)[None], torch.ones(steps, dtype=torch.float64)
    else:
        which, size = _strata(steps, terms, batch, seed, first)
    columns = []
    for j in which.T:
        j = j.squeeze()  # one step for all examples is a scalar time
        t, s = knots[j], knots[j + 1]
        x = sde.perturb(x0, t, noise(x0))
        columns.append(divergence(sde, model(x, t), x0, s, t, variance))
    diffusion = torch.stack(columns, 1) if columns else x0.new_zeros(batch, 0)
    t = knots[-1]
    estimate = model(sde.perturb(x0, t, noise(x0)), t)
    if clean is None or steps == 0:
        log_variance = like(-sde.log_snr(t), x0)
    else:
        log_variance = _decoder_log_variance(sde, estimate, clean, t, knots[-2], variance)
    reconstruction = -decode(x0, estimate.data, log_variance, levels, width)
    visited = knots[:-1] if terms is None else knots[which]
    last = knots[-1:].expand(*visited.shape[:-1], 1)
    check_finite(torch.cat([diffusion, reconstruction[:, None]], 1), torch.cat([visited, last], -1), "the bound")
    prior = prior_divergence(sde, x0, knots[0])
    weighted = sent(size, diffusion.device, diffusion.dtype) * diffusion
    error = torch.zeros_like(prior) if terms is None else stratified_error(weighted)
    return Bound(
        prior + weighted.sum(1) + reconstruction,
        prior,
        diffusion,
        reconstruction,
        visited,
        error,
        math.prod(x0.shape[1:]),
    )


def chain_term(
    sde: SDE,
    estimate: Estimate,
    x0: Tensor,
    t: Tensor,
    variance: Variance = "small",
    levels: int | None = None,
    width: float = 2.0,
) -> Tensor:
    """The bound's term at the chain's times t, (B,) nats: L_0 where t is the first step's, else a divergence.

    `sde` is a chain's and `t` (B,) among its times; `estimate` is the model's at x_t. N times the mean over uniform t
    is the bound without its prior, which no model can change: the L_vlb of Nichol & Dhariwal 2021, section 3.1.
    Raises ValueError for an SDE that is not a chain's of at least two steps.
    """
    n = getattr(sde, "steps", 0)
    if n < 2:
        raise ValueError(f"a term of the bound needs the SDE of a chain of at least 2 steps, got {sde}")
    i = (t * n).round() - 1
    s, t, after = i / n, (i + 1) / n, (i + 2) / n
    first = i == 0
    # The posterior at s = 0 is a point: where the divergence is not wanted take it elsewhere, or it would be NaN.
    kl = divergence(sde, estimate, x0, torch.where(first, t / 2, s), t, variance)
    nll = -decode(x0, estimate.data, _decoder_log_variance(sde, estimate, s, t, after, variance), levels, width)
    return torch.where(sent(first, kl.device), nll, kl)


def divergence(sde: SDE, estimate: Estimate, x0: Tensor, s: Tensor, t: Tensor, variance: Variance = "small") -> Tensor:
    """KL(q(x_s | x_t, x_0) || p(x_s | x_t)), (B,) nats, for the model's estimate at x_t and s < t not clean data.

    With "small" variance it is (SNR(s) - SNR(t)) |x_0 - data|² / 2 (Kingma et al. 2021, section 4).
    """
    small, large = _variances(sde, s, t)
    weight = sde.alpha(s) * large / sde.sigma(t) ** 2  # of x_0 in the posterior's mean
    log_variance = reverse_log_variance(estimate, small, large, variance)
    excess = like(small.log(), x0) - log_variance
    error = like(weight, x0) * (x0 - estimate.data)
    kl = torch.expm1(excess) - excess + error.square() * torch.exp(-log_variance)
    return kl.flatten(1).sum(1) / 2


def prior_divergence(sde: SDE, x0: Tensor, t: Tensor) -> Tensor:
    """KL(q(x_t | x_0) || N(0, prior_std² I)), (B,) nats: L_T at the chain's first time, 1."""
    ratio = (sde.sigma(t) / sde.prior_std) ** 2
    spread = ratio - 1 - torch.log(ratio)
    return (like((sde.alpha(t) / sde.prior_std) ** 2, x0) * x0.square() + like(spread, x0)).flatten(1).sum(1) / 2


def decode(x0: Tensor, mean: Tensor, log_variance: Tensor, levels: int | None = None, width: float = 2.0) -> Tensor:
    """log p(x_0 | x_1) for N(mean, exp(log_variance)), (B,) nats: a log density, or with levels a log probability."""
    if levels is not None:
        log_prob = discretised(x0, mean, log_variance, levels, width)
    else:
        error = (x0 - mean).square() * torch.exp(-log_variance)
        log_prob = -(error + log_variance + math.log(2 * math.pi)) / 2
    return log_prob.flatten(1).sum(1)


def discretised(x: Tensor, mean: Tensor, log_variance: Tensor, levels: int, width: float = 2.0) -> Tensor:
    """Log of the mass that N(mean, exp(log_variance)) has in the bin of each x, of x's shape.

    The bin of a level, `levels.value_of` scaled to [1 - width, 1], reaches half way to its neighbours, and without end
    at the first and the last: the masses of all levels sum to 1 (Ho et al. 2020, eq. 13). Computed in float64 from
    log Phi(a) - log Phi(b) in the left tail, on which every bin is laid by symmetry, so that no tail underflows; the
    published code replaces Phi by a tanh, up to 2e-4 off, and bounds the mass below by 1e-12.
    """
    half, (low, high) = half_bin(levels, width), _ends(levels, width)
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    off, std = (x - mean).to(wide), torch.exp(log_variance.to(wide) / 2)
    middle, reach = off / std, half / std  # one width for all may be a number on the CPU, and stays there
    left = -middle.abs()
    upper, lower = torch.special.log_ndtr(left + reach), torch.special.log_ndtr(left - reach)
    gap = (lower - upper).clamp_max(-torch.finfo(wide).tiny)  # the logarithm and its gradient stay finite
    inner = upper + torch.log(-torch.expm1(gap))
    bottom, top = torch.special.log_ndtr(middle + reach), torch.special.log_ndtr(reach - middle)
    return torch.where(x < low + half, bottom, torch.where(x > high - half, top, inner)).to(mean.dtype)


def _variances(sde: SDE, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Variances of x_s | x_t, x_0 and of x_t | x_s: beta-tilde and beta."""
    std = sde.transition(s, t)[1]
    return (sde.sigma(s) * std / sde.sigma(t)) ** 2, std**2


def _decoder_log_variance(
    sde: SDE, estimate: Estimate, s: Tensor, t: Tensor, after: Tensor, variance: Variance
) -> Tensor:
    """Log variance of the last step, from t to clean data at s; `after` is the time of the step before."""
    small, beta = _variances(sde, t, after)[0], sde.transition(s, t)[1] ** 2
    return reverse_log_variance(estimate, small, beta if variance == "learned" else small, variance)


def _knots(sde: SDE, times: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The times of a grid that hold noise, (T,) float64 on the CPU, and that of clean data at its end if there is."""
    if times is None:
        n = getattr(sde, "steps", None)
        if n is None:
            raise ValueError(f"{sde} has no steps of its own: pass times, a grid such as times.log_snr(sde, 1000)")
        times = torch.arange(n, -1, -1, dtype=torch.float64) / n
    times = as_grid(times, least=1)
    if not bool(sde.sigma(times[0]) > 0):
        raise ValueError(f"times must hold at least one with noise, got {times}")
    check_first(times)
    if bool(sde.sigma(times[-1]) > 0):
        return times, None
    return times[:-1], times[-1]


def _check_levels(x0: Tensor, levels: int | None, width: float) -> None:
    """Data between their levels would get a probability that belongs to no value."""
    if levels is None:
        return
    low, high = _ends(levels, width)
    k = (x0 - low) / (2 * half_bin(levels, width))
    if bool(((k - k.round()).abs() > 0.01).any()) or bool((k < -0.01).any()) or bool((k > levels - 0.99).any()):
        raise ValueError(
            f"x0 must hold {levels} evenly spaced values from {low:g} to {high:g}, as PixelCodec.encode gives them: "
            "encode it without dequantisation, or pass levels=None for the density of floats"
        )


def _ends(levels: int, width: float) -> tuple[float, float]:
    """The values of the first and the last level."""
    return 1 - width + width * value_of(0.0, levels), 1 - width + width * value_of(levels - 1.0, levels)


def _strata(steps: int, terms: int, batch: int, seed: int | torch.Generator, first: int) -> tuple[Tensor, Tensor]:
    """(which, size): one step of each of `terms` stretches per example, (B, terms), and the stretches' lengths."""
    if not 1 <= terms <= steps:
        raise ValueError(f"terms must be between 1 and the chain's {steps} diffusion terms, got {terms}")
    edges = torch.linspace(0, steps, terms + 1, dtype=torch.float64).round()
    size = edges.diff()
    if isinstance(seed, torch.Generator):
        u = torch.rand(batch, terms, generator=seed, dtype=torch.float64, device=seed.device).cpu()
    else:
        rows = [np.random.default_rng([seed, first + i, 1]).random(terms) for i in range(batch)]
        u = torch.from_numpy(np.stack(rows) if rows else np.zeros((0, terms)))
    return (edges[:-1] + (u * size).floor()).long(), size


def stratified_error(weighted: Tensor) -> Tensor:
    """Of a sum of one draw from each stretch, (B,): the squared difference of neighbours is never too small on average.

    Collapsed strata (Cochran 1977, Sampling techniques, chapter 5A).
    """
    k = weighted.shape[1]
    if k < 2:
        return torch.full_like(weighted[:, 0], math.nan)
    pairs = weighted[:, : k // 2 * 2].unflatten(1, (-1, 2))
    variance = (pairs[..., 0] - pairs[..., 1]).square().sum(1)
    if k % 2:
        variance = variance + (weighted[:, -1] - weighted[:, -2]).square()
    return variance.sqrt()
