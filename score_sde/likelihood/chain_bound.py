"""The variational bound (ELBO) on -log p(x_0) of a Markov chain, term by term.

Seen as a hierarchical latent variable model, a chain with times t_1 < ... < t_T has (Ho et al. 2020, eq. 5)

    -log p(x_0) <= L_T + sum over i = 2..T of L_{i-1} + L_0,

    L_T     = KL(q(x_T | x_0) || N(0, prior_std² I))                  the prior
    L_{i-1} = E KL(q(x_{i-1} | x_i, x_0) || p(x_{i-1} | x_i))         the diffusion
    L_0     = -E log p(x_0 | x_1)                                     the reconstruction, or decoder

where p(x_s | x_t) = N(posterior mean with the model's estimate of the data, a variance between the posterior's and the
forward step's). Posteriors are exact between any two times of any SDE, so the same code bounds a chain, a respaced
chain, and a continuous SDE on any grid of times. With an exact model and ever more steps the bound falls to its
continuous-time limit, which depends on the signal-to-noise ratio at both ends alone (Kingma et al. 2021,
arXiv:2107.00630, section 5).

Data with `levels` are not dequantised: the decoder gives a probability to each level, and -log P(x_0) is bounded. Data
without levels have a Gaussian decoder, and minus the log density is bounded.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..machine.devices import sent
from ..models.base import ScoreModel, check_finite
from ..models.pixel_levels import bits, half_bin
from ..models.reverse import Variance, decode, decoder_log_variance, divergence, ends, prior_divergence
from ..noise import ExampleStream, example_numbers, noise_source
from ..sdes.linear import SDE, as_grid, check_first, like


class Bound(NamedTuple):
    """A bound on -log p, (B,) nats, and its terms.

    `diffusion` is (B, K): one column for each step of the chain, from `times` (K,) to the next; or, with `terms`, K
    random ones of them, from `times` (B, K). Then `total` is an unbiased estimate with the standard error `std_error`
    (0 with all terms, NaN for a single term; else on average at least the true one).
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
        """prior + diffusion, the rate; `reconstruction` is the distortion (Ho et al. 2020, section 4.3)."""
        return self.total - self.reconstruction

    def bits_per_dim(self, nats: Tensor | None = None) -> Tensor:
        """The total, or `nats` such as one of the terms, in bits per dimension (with `levels`, of -log2 P(k)/D)."""
        return bits(self.total if nats is None else nats, self.dimensions)


@torch.no_grad()
def chain_bound(
    model: ScoreModel, x0: Tensor, times: Tensor | None = None, *,
    variance: Variance = "small", levels: int | None = None, width: float = 2.0, terms: int | None = None,
    seed: int | torch.Generator = 0, first: int = 0,
) -> Bound:  # fmt: skip
    """The chain bound (L_vlb, ELBO) at each example of x0, with one draw of x_t for each term.

    Args:
        x0: data, (B, *shape); with `levels` their values (`pixel_levels.value_of`), scaled to [1 - width, 1].
        times: decreasing 1-D grid from 1 to clean data (sigma = 0) or to the last noise; by default all of a chain's.
            Some of a chain's times are a respaced chain, whose betas follow from the alphas that are kept.
        variance: of p(x_s | x_t): "small", "large" or "learned", see `reverse_log_variance`. In a last step to clean
            data, whose posterior has no variance, "small" and "large" are that of the step before it, as in DDPM's
            code; a grid that ends above clean data is decoded with (sigma/alpha)².
        levels, width: of the data, see `PixelCodec`; without levels the decoder is a Gaussian density.
        terms: how many diffusion terms to evaluate per example, one drawn at random from each of as many stretches of
            the chain; by default all.
        seed, first: example i's draws depend on (seed, first + i) alone. A torch.Generator serves the whole batch.

    Raises ValueError for an impossible grid, more `terms` than the chain has, or data that are not on their levels, and
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
        log_variance = decoder_log_variance(sde, estimate, clean, t, knots[-2], variance)
    reconstruction = -decode(x0, estimate.data, log_variance, levels, width)
    visited = knots[:-1] if terms is None else knots[which]
    last = knots[-1:].expand(*visited.shape[:-1], 1)
    check_finite(torch.cat([diffusion, reconstruction[:, None]], 1), torch.cat([visited, last], -1), "the bound")
    prior = prior_divergence(sde, x0, knots[0])
    weighted = sent(size, diffusion.device, diffusion.dtype) * diffusion
    error = torch.zeros_like(prior) if terms is None else stratified_error(weighted)
    return Bound(
        prior + weighted.sum(1) + reconstruction, prior, diffusion, reconstruction, visited, error,
        math.prod(x0.shape[1:]),
    )  # fmt: skip


def _knots(sde: SDE, times: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The times of a grid that have noise, (T,) float64 on the CPU, and the time of clean data at its end or None."""
    if times is None:
        if sde.steps is None:
            raise ValueError(f"{sde} has no steps of its own: pass times, a grid such as times.log_snr(sde, 1000)")
        times = torch.arange(sde.steps, -1, -1, dtype=torch.float64) / sde.steps
    times = as_grid(times, least=1)
    if not bool(sde.sigma(times[0]) > 0):
        raise ValueError(f"times must hold at least one with noise, got {times}")
    check_first(times)
    if bool(sde.sigma(times[-1]) > 0):
        return times, None
    return times[:-1], times[-1]


def _check_levels(x0: Tensor, levels: int | None, width: float) -> None:
    """Raise ValueError for data between their levels, whose probability would be that of no value."""
    if levels is None:
        return
    low, high = ends(levels, width)
    k = (x0 - low) / (2 * half_bin(levels, width))
    if bool(((k - k.round()).abs() > 0.01).any()) or bool((k < -0.01).any()) or bool((k > levels - 0.99).any()):
        raise ValueError(
            f"x0 must hold {levels} evenly spaced values from {low:g} to {high:g}, as PixelCodec.encode gives them: "
            "encode it without dequantisation, or pass levels=None for the density of floats"
        )


def _strata(steps: int, terms: int, batch: int, seed: int | torch.Generator, first: int) -> tuple[Tensor, Tensor]:
    """(which, size): one step of each of `terms` stretches per example, (B, terms), and the stretches' lengths."""
    if not 1 <= terms <= steps:
        raise ValueError(f"terms must be between 1 and the chain's {steps} diffusion terms, got {terms}")
    edges = torch.linspace(0, steps, terms + 1, dtype=torch.float64).round()
    size = edges.diff()
    if isinstance(seed, torch.Generator):
        u = torch.rand(batch, terms, generator=seed, dtype=torch.float64, device=seed.device).cpu()
    else:
        rows = [numbers.random(terms) for numbers in example_numbers(seed, first, batch, ExampleStream.TERMS)]
        u = torch.from_numpy(np.stack(rows) if rows else np.zeros((0, terms)))
    return (edges[:-1] + (u * size).floor()).long(), size


def stratified_error(weighted: Tensor) -> Tensor:
    """Standard error of a sum of one draw from each stratum, (B,), from the squared differences of neighbours.

    Collapsed strata: on average it is at least the true one (Cochran 1977, Sampling techniques, chapter 5A).
    """
    k = weighted.shape[1]
    if k < 2:
        return torch.full_like(weighted[:, 0], math.nan)
    pairs = weighted[:, : k // 2 * 2].unflatten(1, (-1, 2))
    variance = (pairs[..., 0] - pairs[..., 1]).square().sum(1)
    if k % 2:
        variance = variance + (weighted[:, -1] - weighted[:, -2]).square()
    return variance.sqrt()
