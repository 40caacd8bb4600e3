"""Models that are exact in closed form: Gaussians, Gaussian mixtures, uniform boxes and finite data sets.

If the data are N(m, C), then x_t ~ N(alpha m, V) with V = alpha² C + sigma² I, and for r = x_t - alpha m

    E[x_0 | x_t] = m + alpha C V⁻¹ r,    E[z | x_t] = sigma V⁻¹ r;

a mixture averages these with its responsibilities, and a finite data set is a mixture of points. For data uniform on a
box, z given x_t is a truncated normal number in each dimension. Losses, samplers and likelihoods are tested against
these models, which are score models like all others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..sdes.linear import SDE, like
from .base import Estimate, ScoreModel

_SQRT2 = math.sqrt(2)


class Mixture(ScoreModel):
    """Exact model of a Gaussian mixture, sum_k weights_k N(means_k, covs_k).

    Args:
        weights: (K,) positive; normalised here.
        means: (K, *shape).
        covs: one variance for all, (K,) variances, (K, *shape) variances per dimension, or (K, D, D) full matrices,
            with D the product of `shape`.

    ``model.given(label=y)``, y an int or (B,), is the model of component y alone. Buffers are float64 unless `means` is
    float32; results have the dtype of x. Raises ValueError for shapes that do not fit.
    """

    log_weights: Tensor
    means: Tensor
    variances: Tensor
    basis: Tensor | None

    def __init__(self, sde: SDE, weights: Any, means: Any, covs: Any) -> None:
        super().__init__(sde)
        means = _floating(means)
        weights, covs = _floating(weights).to(means.dtype), _floating(covs).to(means.dtype)
        self.shape = tuple(means.shape[1:])
        k, d = means.shape[0], math.prod(self.shape)
        if weights.shape != (k,) or not bool((weights > 0).all()):
            raise ValueError(f"weights must be {k} positive numbers, one per mean, got {weights.tolist()}")
        basis = None
        if covs.shape == (k, d, d) and covs.shape != means.shape:
            variances, basis = torch.linalg.eigh(covs.double())  # also for float32, whose basis would not be orthogonal
        elif covs.shape in ((), (k,), (k, *self.shape)):
            variances = covs.reshape(k, -1) if covs.ndim else covs.expand(k, 1)
            variances = variances.expand(k, d).clone()
        else:
            raise ValueError(
                f"covs must have shape (), ({k},), {(k, *self.shape)} or {(k, d, d)} for means of shape "
                f"{tuple(means.shape)}, got {tuple(covs.shape)}"
            )
        if not bool((variances >= -1e-12 * variances.abs().max()).all()):
            raise ValueError(f"covs must be positive semi-definite, got the eigenvalue {variances.min():g}")
        self.register_buffer("log_weights", torch.log(weights / weights.sum()))
        self.register_buffer("means", means.reshape(k, d))
        self.register_buffer("variances", variances.clamp_min(0))
        self.register_buffer("basis", basis)

    def _whitened(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(r, V): x - alpha mean in each component's eigenbasis, (B, K, D), and the variances there."""
        r = x.flatten(1)[:, None] - alpha * self.means.to(x)
        if self.basis is not None:
            r = _turned(r, self.basis.to(x))
        return r, alpha**2 * self.variances.to(x) + sigma**2

    def _log_joint(self, r: Tensor, v: Tensor, label: Any) -> Tensor:
        """log of weight times density for each component, (B, K); with a label, of its component alone."""
        log_density = -0.5 * (r.square() / v + torch.log(2 * math.pi * v)).sum(-1)
        if label is None:
            return log_density + self.log_weights.to(r)
        chosen, k = torch.as_tensor(label, device=r.device).expand(r.shape[0]), len(self.means)
        if bool(((chosen < -1) | (chosen >= k)).any()):
            raise ValueError(f"label must lie in 0..{k - 1}, the mixture's components, or be -1 for all, got {label}")
        others = torch.arange(k, device=r.device) != chosen[:, None]
        one = log_density.masked_fill(others, -math.inf)
        return torch.where(chosen[:, None] < 0, log_density + self.log_weights.to(r), one)

    def forward(self, x: Tensor, t: Tensor, label: Any = None) -> Estimate:
        if x.shape[1:] != self.shape:
            raise ValueError(f"x must have shape (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        sigma = self.sde.sigma(t)
        a, s = _columns(self.sde.alpha(t), x), _columns(sigma, x)
        r, v = self._whitened(x, a, s)
        u = r / v
        c_u = self.variances.to(x) * u
        if self.basis is not None:
            back = self.basis.to(x).mT
            u, c_u = _turned(u, back), _turned(c_u, back)
        data, noise = self.means.to(x) + a * c_u, s * u
        if len(self.means) > 1 or label is not None:
            weights = torch.softmax(self._log_joint(r, v, label), dim=1)[..., None]
            data, noise = (weights * data).sum(1), (weights * noise).sum(1)
        return Estimate(data.reshape(x.shape), noise.reshape(x.shape), like(sigma, x))

    def log_prob(self, x: Tensor, t: Tensor | None = None, label: Any = None) -> Tensor:
        """Log density of x_t in nats, (B,); without t that of the data."""
        zero, one = x.new_zeros(()), x.new_ones(())
        alpha, sigma = (one, zero) if t is None else (self.sde.alpha(t), self.sde.sigma(t))
        r, v = self._whitened(x, _columns(alpha, x), _columns(sigma, x))
        return torch.logsumexp(self._log_joint(r, v, label), dim=1)

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """n data points (n, *shape) and their components (n,)."""
        label = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.variances.dtype)
        z = z * self.variances[label].sqrt()
        if self.basis is not None:
            z = torch.einsum("nde,ne->nd", self.basis[label], z)
        return (self.means[label] + z).reshape(n, *self.shape), label


class Gaussian(Mixture):
    """Exact model of data from N(mean, cov): mean of the data's shape; cov a variance, variances, or (D, D)."""

    def __init__(self, sde: SDE, mean: Any, cov: Any) -> None:
        mean, cov = _floating(mean), _floating(cov)
        super().__init__(sde, torch.ones(1), mean[None], cov[None] if cov.ndim else cov)

    def flow(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The probability flow's exact map from x at time t to time s: each eigendirection is scaled by its std."""
        a_t, a_s = _columns(self.sde.alpha(t), x), _columns(self.sde.alpha(s), x)
        r, v_t = self._whitened(x, a_t, _columns(self.sde.sigma(t), x))
        v_s = a_s**2 * self.variances.to(x) + _columns(self.sde.sigma(s), x) ** 2
        y = (v_s / v_t).sqrt() * r
        if self.basis is not None:
            y = _turned(y, self.basis.to(x).mT)
        return (a_s * self.means.to(x) + y).sum(1).reshape(x.shape)


class Boxes(ScoreModel):
    """Exact model of data that are uniform on boxes, sum_k weights_k U(low_k <= x <= high_k), such as a checkerboard.

    Given x_t and the box, z is in each dimension a standard normal number truncated to the interval from
    u = (x_t - alpha high)/sigma to v = (x_t - alpha low)/sigma; the box's density at x_t is
    (Phi(v) - Phi(u))/(alpha (high - low)). It is computed in float64 for every dtype of x: the difference vanishes far
    from a box and where there is much noise.

    The weights (K,) are positive, and normalised here; low and high (K, *shape) are the boxes' corners. Raises
    ValueError for shapes that do not fit, or a box without volume.
    """

    log_weights: Tensor
    center: Tensor
    reach: Tensor

    def __init__(self, sde: SDE, weights: Any, low: Any, high: Any) -> None:
        super().__init__(sde)
        weights, low, high = (_floating(a).double() for a in (weights, low, high))
        if low.shape != high.shape or low.ndim < 2 or weights.shape != low.shape[:1] or not bool((weights > 0).all()):
            raise ValueError(
                f"weights must be positive, one per box, and low and high (K, *shape) alike, got "
                f"{weights.tolist()}, {tuple(low.shape)} and {tuple(high.shape)}"
            )
        if not bool((low < high).all()):
            raise ValueError(f"low must be below high in every dimension of every box, got {low[low >= high][0]:g}")
        self.shape = tuple(low.shape[1:])
        self.register_buffer("log_weights", torch.log(weights / weights.sum()))
        self.register_buffer("center", ((low + high) / 2).flatten(1))
        self.register_buffer("reach", ((high - low) / 2).flatten(1))

    def _cut(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(log of weight times density (B, K), middle of z's interval, E[z] less that; (B, K, D)), in float64."""
        if x.shape[1:] != self.shape:
            raise ValueError(f"x must have shape (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        x = x.double()
        alpha, sigma = _columns(self.sde.alpha(t), x), _columns(self.sde.sigma(t), x)
        middle, half = (x.flatten(1)[:, None] - alpha * self.center) / sigma, alpha * self.reach / sigma
        log_mass, shift = _cut_normal(middle, half)
        return self.log_weights + (log_mass - torch.log(2 * sigma * half)).sum(-1), middle, shift

    def forward(self, x: Tensor, t: Tensor) -> Estimate:
        log_joint, middle, shift = self._cut(x, t)
        weights = torch.softmax(log_joint, dim=1)[..., None]
        ratio = _columns(self.sde.sigma(t) / self.sde.alpha(t), x.double())
        data, noise = (weights * (self.center - ratio * shift)).sum(1), (weights * (middle + shift)).sum(1)
        return Estimate(data.reshape(x.shape).to(x), noise.reshape(x.shape).to(x), like(self.sde.sigma(t), x))

    def log_prob(self, x: Tensor, t: Tensor) -> Tensor:
        """Log density of x_t in nats, (B,)."""
        return torch.logsumexp(self._cut(x, t)[0], dim=1).to(x)


class Empirical(ScoreModel):
    """Exact model of a finite data set (N, *shape) of equally likely points: a network that has memorised it.

    E[x_0 | x_t] is the softmax-weighted mean of the points (Karras et al. 2022, eq. 57). Memory is B × N.
    """

    data: Tensor

    def __init__(self, sde: SDE, data: Tensor) -> None:
        super().__init__(sde)
        if data.ndim < 2 or len(data) == 0:
            raise ValueError(f"data must have shape (N, *shape) with N >= 1, got {tuple(data.shape)}")
        self.register_buffer("data", data)

    def forward(self, x: Tensor, t: Tensor) -> Estimate:
        alpha, sigma = like(self.sde.alpha(t), x), like(self.sde.sigma(t), x)
        a, s = _columns(self.sde.alpha(t), x)[..., 0], _columns(self.sde.sigma(t), x)[..., 0]
        points = self.data.to(x).flatten(1)
        logits = (a * (x.flatten(1) @ points.T) - a**2 * points.square().sum(1) / 2) / s**2
        mean = (torch.softmax(logits, dim=1) @ points).reshape(x.shape)
        return Estimate(mean, (x - alpha * mean) / sigma, sigma)


def _cut_normal(middle: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """(log P(z in the interval), E[z | z in it] - middle) for a standard normal z and the interval middle ± half.

    Both tails are divided by the density at the end nearer to 0, so that nothing underflows far from 0.
    """
    near, far = middle.abs() - half, middle.abs() + half  # by symmetry the interval is that of |middle|
    outside = near > 0
    drop = torch.expm1(-2 * middle.abs() * half)  # density at the far end over that at the near end, less 1
    # P/density(near), with Q(y)/density(y) = sqrt(pi/2) erfcx(y/sqrt(2)): the difference of two erf would be 0 there
    tail = torch.special.erfcx(near.clamp_min(0) / _SQRT2) - (1 + drop) * torch.special.erfcx(far / _SQRT2)
    tail = torch.where(outside, math.sqrt(math.pi / 2) * tail, 1.0)
    log_density = -near.square() / 2 - math.log(2 * math.pi) / 2
    inside = torch.where(outside, 1.0, (torch.erf(far / _SQRT2) - torch.erf(near / _SQRT2)) / 2)
    log_mass = torch.where(outside, log_density + tail.log(), inside.log())
    mean = -drop * torch.where(outside, 1 / tail, log_density.exp() / inside)  # (density(near) - density(far))/P
    return log_mass, middle.sign() * mean - middle


def _floating(values: Sequence[float] | Tensor | float) -> Tensor:
    """The values as a tensor: float32 if they are already, else float64."""
    if not isinstance(values, Tensor):
        return torch.tensor(values, dtype=torch.float64)
    return values if values.dtype == torch.float32 else values.double()


def _turned(r: Tensor, basis: Tensor) -> Tensor:
    """r (B, K, D), each component's row times its matrix of basis (K, D, D)."""
    return (r.transpose(0, 1) @ basis).transpose(0, 1)


def _columns(a: Tensor, x: Tensor) -> Tensor:
    """`a` of shape () or (B,) as (1, 1, 1) or (B, 1, 1), to broadcast against (B, K, D)."""
    return like(a, x.flatten(1)[..., None]).reshape(-1, 1, 1)
