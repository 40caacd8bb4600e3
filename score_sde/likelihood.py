"""Exact log-likelihoods by the instantaneous change of variables.

Along the probability flow dx/dt = v(x, t), d log p/dt = -div v, so (Chen et al. 2018; Song et al. 2021, eq. 39)

    log p(x at t_min) = log p_1(x at 1) + integral from t_min to 1 of div v dt,

with div v = f D + g²/(2 sigma) div noise(x, t). The divergence is exact, or Hutchinson's estimate e^T J e with
random e of unit covariance, drawn once per example and held through the solve (Grathwohl et al. 2019).
Each evaluation is one forward pass and one batched vector-Jacobian product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .model import ScoreModel
from .ode import integrate
from .samplers.base import example_generators

Probe = Literal["rademacher", "gaussian", "exact"]
EXACT_BATCH = 1024  # products at a time for the exact trace: bounds its memory in many dimensions


class Likelihood(NamedTuple):
    """Log density in nats (B,), its standard error over probes (B,), the state at t = 1, and the evaluations used.

    `std_error` is 0 for the exact trace and NaN for a single probe, which cannot tell its own error.
    """

    log_prob: Tensor
    std_error: Tensor
    latent: Tensor
    nfe: int

    def bits_per_dim(self, levels: int = 256, width: float = 2.0) -> Tensor:
        """Bits per dimension (B,) of discrete data whose `levels` values were dequantised into an interval of `width`.

        A level is a cell of volume (width/levels)^D, and log P(cell) >= E log p + D log(width/levels) (Theis et al.
        2016, eq. 7): the offset is log2(levels/width), 7 for 8-bit images in [-1, 1] and 8 in [0, 1].
        """
        d = math.prod(self.latent.shape[1:])
        return -self.log_prob / (d * math.log(2)) + math.log2(levels / width)


def log_likelihood(
    model: ScoreModel,
    x: Tensor,
    *,
    probe: Probe | Tensor = "rademacher",
    probes: int = 1,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    t_min: float = 1e-5,
    method: str = "dopri5",
    prior_log_prob: Callable[[Tensor], Tensor] | None = None,
    seed: int | torch.Generator = 0,
    first: int = 0,
) -> Likelihood:
    """Log density of x under the probability flow of `model`, with x taken as the state at t_min.

    Args:
        model: any score model.
        x: (B, *shape).
        probe: "rademacher", "gaussian", "exact" (D probes, the unit vectors), or a tensor (K, B, *shape).
        probes: number K of random probes per example; all go through one batched product.
        rtol, atol: tolerances of the solver, whose error norm is the root mean square over states and log densities.
        t_min: where the integral begins.
        method: "dopri5" or another adaptive method of torchdiffeq, or "RK45" for scipy's.
        prior_log_prob: x -> (B,), the log density at t = 1; by default the SDE's prior, which is not quite the true
            p_1: pass that to compare with a closed form.
        seed: of the probes; example i's depend on (seed, first + i) alone. A torch.Generator serves the whole batch.
        first: index of the batch's first example.

    Raises ValueError for an unknown probe or method or a wrong shape, RuntimeError where the solver gives up.
    """
    batch, d = x.shape[0], math.prod(x.shape[1:])
    sde, wide = model.sde, torch.float32 if x.device.type == "mps" else torch.float64
    exact = isinstance(probe, str) and probe == "exact"
    e = _probes(probe, probes, x, seed, first)
    # The probe meets all of v, f x too: a Gaussian one would else miss that f and the noise's Jacobian nearly cancel.
    squares = x.new_tensor(d) if exact else e.square().flatten(2).sum(2).T
    chunks = e.split(max(EXACT_BATCH // max(batch, 1), 1)) if exact else (e,)

    def field(t: Tensor, state: Tensor) -> Tensor:
        y = state[:, :d].to(x.dtype).reshape(x.shape)
        noise, traces = _noise_and_traces(model, y, t, chunks)
        trace = traces.sum(1, keepdim=True) if exact else traces
        f, rate = sde.f(t).item(), (sde.g(t) ** 2 / (2 * sde.sigma(t))).item()
        velocity = f * y + rate * noise
        return torch.cat([velocity.flatten(1).to(wide), (f * squares + rate * trace).to(wide)], dim=1)

    start = torch.cat([x.flatten(1).to(wide), x.new_zeros(batch, 1 if exact else len(e), dtype=wide)], dim=1)
    end, nfe = integrate(field, start, t_min, 1.0, sde=sde, rtol=rtol, atol=atol, method=method)
    latent, integrals = end[:, :d].reshape(x.shape), end[:, d:]
    log_prob = (prior_log_prob or sde.prior_log_prob)(latent) + integrals.mean(1)
    # Over K probes sqrt(variance / K), which is 0/0 = NaN for K = 1.
    spread = (integrals - integrals.mean(1, keepdim=True)).square().sum(1)
    std_error = spread if exact else torch.sqrt(spread / (len(e) * (len(e) - 1)))
    return Likelihood(log_prob, std_error, latent.to(x.dtype), nfe)


def _probes(probe: Probe | Tensor, count: int, x: Tensor, seed: int | torch.Generator, first: int) -> Tensor:
    """(K, B, *shape); for "exact" (D, B, *shape), the unit vectors."""
    if isinstance(probe, Tensor):
        if probe.shape[1:] != x.shape or not len(probe):
            raise ValueError(f"a probe for x of shape {tuple(x.shape)} must be (K, *x.shape), got {tuple(probe.shape)}")
        return probe.to(x)
    if probe == "exact":
        d = math.prod(x.shape[1:])
        return torch.eye(d, dtype=x.dtype, device=x.device).reshape(d, 1, *x.shape[1:]).expand(d, *x.shape)
    if probe not in ("rademacher", "gaussian"):
        raise ValueError(f'unknown probe {probe!r}; use "rademacher", "gaussian", "exact" or a tensor (K, B, *shape)')
    if count < 1:
        raise ValueError(f"probes must be at least 1, got {count}")
    if isinstance(seed, torch.Generator):
        z = torch.randn(count, *x.shape, generator=seed, device=seed.device).to(x)
    else:
        generators = example_generators(seed, first, len(x), torch.device("cpu"))
        rows = [torch.randn(count, *x.shape[1:], generator=g) for g in generators]
        z = torch.stack(rows, dim=1).to(x) if rows else x.new_zeros(count, *x.shape)
    return z if probe == "gaussian" else torch.where(z < 0, -1.0, 1.0).to(x)


def _noise_and_traces(model: ScoreModel, y: Tensor, t: Tensor, probes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The estimate's noise at y, and e^T J e of its Jacobian for each probe e, (B, K); one product for each chunk."""
    with torch.enable_grad():
        y = y.detach().requires_grad_(True)
        noise = model(y, t).noise
        if not noise.requires_grad:
            raise ValueError("the model's estimate has no gradient in x, and a likelihood needs its Jacobian")
        traces = [(_products(noise, y, e) * e).flatten(2).sum(2) for e in probes]
    return noise.detach(), torch.cat(traces).T


def _products(noise: Tensor, y: Tensor, e: Tensor) -> Tensor:
    """e^T J for each of the K probes e, (K, B, *shape)."""
    if len(e) == 1:
        return torch.autograd.grad(noise, y, e[0], retain_graph=True)[0][None]
    return torch.autograd.grad(noise, y, e, is_grads_batched=True, retain_graph=True)[0]
