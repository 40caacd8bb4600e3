"""The reverse step's Gaussian p(x_s | x_t) of a model: its variance, its divergence from the posterior, its decoder."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..machine.devices import sent, widest
from ..sdes.linear import SDE, like
from .base import Estimate
from .pixel_levels import half_bin, value_of

Variance = Literal["small", "large", "learned"]


def reverse_log_variance(estimate: Estimate, small: Tensor, large: Tensor, variance: Variance) -> Tensor:
    """Log variance of the model's Gaussian x_s | x_t, to broadcast against x_t.

    "small" is the posterior's beta-tilde (`small`) and "large" the forward step's beta (`large`), both of shape () or
    (B,): the best variances for data of standard deviation 0 and 1 (Ho et al. 2020, section 3.2). "learned" lies
    between them on a log scale: fraction log beta + (1 - fraction) log beta-tilde (Nichol & Dhariwal 2021,
    arXiv:2102.09672, eq. 15), for any two times. Raises ValueError for an estimate without a fraction.
    """
    low, high = like(small.log(), estimate.data), like(large.log(), estimate.data)
    if variance != "learned":
        return low if variance == "small" else high
    if estimate.fraction is None:
        raise ValueError(
            'the model has no learned variances: use variance="small" or "large", or train one with '
            "Preconditioned(..., learned_variance=True)"
        )
    return low + estimate.fraction * (high - low)


def chain_term(
    sde: SDE, estimate: Estimate, x0: Tensor, t: Tensor, variance: Variance = "small", levels: int | None = None,
    width: float = 2.0,
) -> Tensor:  # fmt: skip
    """The chain bound's term at times t, (B,) nats: L_0 where t is the first step's, else a divergence.

    `sde` is a chain's and `t` (B,) among its times; `estimate` is the model's at x_t. N times the mean over uniform t
    is the bound without its prior term, which does not depend on the model: the L_vlb of Nichol & Dhariwal 2021,
    section 3.1. Raises ValueError unless the SDE is that of a chain of at least two steps.
    """
    n = sde.steps or 0
    if n < 2:
        raise ValueError(f"a term of the bound needs the SDE of a chain of at least 2 steps, got {sde}")
    i = (t * n).round() - 1
    s, t, after = i / n, (i + 1) / n, (i + 2) / n
    first = i == 0
    # The posterior at s = 0 is a point, and its divergence NaN: for the first step compute it at t/2, and drop it.
    kl = divergence(sde, estimate, x0, torch.where(first, t / 2, s), t, variance)
    nll = -decode(x0, estimate.data, decoder_log_variance(sde, estimate, s, t, after, variance), levels, width)
    return torch.where(sent(first, kl.device), nll, kl)


def divergence(sde: SDE, estimate: Estimate, x0: Tensor, s: Tensor, t: Tensor, variance: Variance = "small") -> Tensor:
    """KL(q(x_s | x_t, x_0) || p(x_s | x_t)), (B,) nats, for the model's estimate at x_t and s < t with sigma(s) > 0.

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
    """log p(x_0 | x_1) under N(mean, exp(log_variance)), (B,) nats: a log density, or with levels a log probability."""
    if levels is not None:
        log_prob = discretised(x0, mean, log_variance, levels, width)
    else:
        error = (x0 - mean).square() * torch.exp(-log_variance)
        log_prob = -(error + log_variance + math.log(2 * math.pi)) / 2
    return log_prob.flatten(1).sum(1)


def discretised(x: Tensor, mean: Tensor, log_variance: Tensor, levels: int, width: float = 2.0) -> Tensor:
    """Log probability of the bin of each x under N(mean, exp(log_variance)), of x's shape (a discretised Gaussian).

    The bin of a level, `pixel_levels.value_of` scaled to [1 - width, 1], reaches half way to its neighbours, those of
    the first and the last level to infinity: all probabilities sum to 1 (Ho et al. 2020, eq. 13). It is computed in
    float64 as log Phi(a) - log Phi(b), by symmetry in the left tail for every bin, so that no tail underflows; the
    published code replaces Phi by a tanh, up to 2e-4 off, and bounds the probability below by 1e-12.
    """
    half, (low, high) = half_bin(levels, width), ends(levels, width)
    wide = widest(x)
    off, std = (x - mean).to(wide), torch.exp(log_variance.to(wide) / 2)
    middle, reach = off / std, half / std
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


def decoder_log_variance(
    sde: SDE, estimate: Estimate, s: Tensor, t: Tensor, after: Tensor, variance: Variance
) -> Tensor:
    """Log variance of the last step, from t to clean data at s; `after` is the time of the step before."""
    small, beta = _variances(sde, t, after)[0], sde.transition(s, t)[1] ** 2
    return reverse_log_variance(estimate, small, beta if variance == "learned" else small, variance)


def ends(levels: int, width: float) -> tuple[float, float]:
    """The values of the first and the last level."""
    return 1 - width + width * value_of(0.0, levels), 1 - width + width * value_of(levels - 1.0, levels)
