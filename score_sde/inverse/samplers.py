"""Samplers conditioned on an observation: projection, RePaint, and twisted sequential Monte Carlo (particles)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.base import ScoreModel, default_state, of_examples
from ..noise import Noise, noise_source
from ..samplers.base import Sampler, Update
from ..samplers.stochastic import Corrector, PredictorCorrector
from ..sdes.linear import SDE, add_, as_grid, check_first, like
from .models import spread
from .operators import Observation, Spectral, spectral


@dataclass(frozen=True)
class Projected(Sampler):
    """Projection: a one-step sampler that after each step replaces the observed part of the state by y with noise.

    x_s <- (I - A⁺A) x_s + A⁺ (alpha_s y + sigma_s A z): Song et al. 2021, appendix I.2 (inpainting) and I.3
    (colours), for any Spectral operator and any sampler with a step. `PredictorCorrector` is projected after both of
    its steps. With noise s in y the added z has the variance sigma_s² - alpha_s² s²/lambda² in the direction of the
    singular value lambda. Where that is negative, late in the walk, y is noisier than the state, which is not replaced
    or resampled there.

    With `resamplings` > 1 it is RePaint (Lugmayr et al. 2022, arXiv:2201.09865, algorithm 1): after every `jump` steps
    the forward SDE takes the state back, and they are walked that many times in all, so that the rest fits the known
    part better.

    At the last time all of the state has that time's noise. If that is clean data, the known part is y; after
    ``sample(..., denoise=True)`` use ``observation.project(x)``. The batch must be the observation's. Raises ValueError
    for a sampler without a single step, an operator that is not Spectral, and numbers below 1.
    """

    sampler: Sampler
    observation: Observation
    resamplings: int = 1
    jump: int = 1

    def __post_init__(self) -> None:
        if type(self.sampler).step is Sampler.step:
            raise ValueError(
                f"projection follows single steps, and {type(self.sampler).__name__} has none: take Ancestral(), "
                "ReverseDiffusion(), DDIM(), PredictorCorrector() or another that has"
            )
        spectral(self.observation.operator, "projection")
        if self.resamplings < 1 or self.jump < 1:
            raise ValueError(f"resamplings and jump must be at least 1, got {self.resamplings} and {self.jump}")

    def replace(self, sde: SDE, x: Tensor, t: Tensor, noise: Noise) -> Tensor:
        """The state at time t with its known part drawn again."""
        o = self.observation
        operator = spectral(o.operator, "projection")
        alpha, sigma = like(sde.alpha(t), x), like(sde.sigma(t), x)

        def fresh(v: Tensor) -> Tensor:  # variance to be added, below 0 where nothing is replaced
            added = sigma**2 - (alpha * o.noise) ** 2 / v.where(v > 0, 1.0)
            return torch.where(v > 0, added, -1.0)

        kept = operator.filtered(x, lambda v: (fresh(v) < 0).to(x))
        seen = alpha * operator.pseudo_inverse(o.y.to(x))
        if o.noise == 0:  # in one pass, so that at sigma = 0 an exact y is reached to the bit
            return kept + operator.filtered(seen + sigma * noise(x), lambda v: (v > 0).to(x))
        z = operator.filtered(noise(x), lambda v: fresh(v).clamp_min(0).sqrt())
        return kept + operator.filtered(seen, lambda v: (fresh(v) >= 0).to(x)) + z

    def step(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        if isinstance(self.sampler, PredictorCorrector):
            x = self.replace(model.sde, self.sampler.corrector.step(model, x, t, s, noise), t, noise)
            return self.replace(model.sde, self.sampler.predictor.step(model, x, t, s, noise), s, noise)
        after = t if isinstance(self.sampler, Corrector) else s
        return self.replace(model.sde, self.sampler.step(model, x, t, s, noise), after, noise)

    def walk(self, model: ScoreModel, x: Tensor, times: Tensor, noise: Noise) -> Iterator[Tensor]:
        if len(self.observation.y) != len(x):
            raise ValueError(f"{len(self.observation.y)} examples were observed, and {len(x)} are sampled")
        x, n = self.replace(model.sde, x, times[0], noise), len(times) - 1
        updates: list[Update] = list(self.updates(model, times))
        largest = spectral(self.observation.operator, "projection").largest(x)
        for first in range(0, n, self.jump):
            block = updates[first : first + self.jump]
            end = times[first + len(block)]
            scale, std = model.sde.transition(end, times[first])
            # Where y is noisier than the state nothing is replaced, and in repeated walks the state would forget y.
            replaced = model.sde.sigma(end) ** 2 >= (model.sde.alpha(end) * self.observation.noise) ** 2 / largest
            for again in range(self.resamplings if replaced else 1, 0, -1):
                for update in block:
                    x = update(x, noise)
                    if again == 1:
                        yield x
                if again > 1:
                    x = add_(scale * x, std, noise(x))


class Particles(NamedTuple):
    """A weighted sample of x given y for each of B problems, of K particles.

    Args:
        x: (B, K, *shape).
        log_weights: (B, K), normalised: their exp sums to 1 over K.
        log_evidence: (B,): log p(y) in nats; exp of it is unbiased for the model of the walk.
        least: (B,): the smallest effective number of particles, 1/sum w², during the walk, before resampling.
    """

    x: Tensor
    log_weights: Tensor
    log_evidence: Tensor
    least: Tensor

    @property
    def mean(self) -> Tensor:
        """E[x | y], (B, *shape)."""
        weights = self.log_weights.exp()
        return (weights.reshape(*weights.shape, *(1,) * (self.x.ndim - 2)) * self.x).sum(1)

    def draw(self, generator: torch.Generator) -> Tensor:
        """One particle of each problem, (B, *shape), drawn with its weight as probability."""
        chosen = torch.multinomial(self.log_weights.exp().to(generator.device), 1, generator=generator)
        return self.x[torch.arange(len(self.x), device=self.x.device), chosen[:, 0].to(self.x.device)]


@torch.no_grad()
def twisted(
    model: ScoreModel, observation: Observation, shape: tuple[int, ...], times: Tensor, *,
    particles: int = 16, variance: float = 1.0, threshold: float = 0.5, seed: int | torch.Generator = 0, first: int = 0,
    dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    progress: Callable[[int], None] = lambda step: None,
) -> Particles:  # fmt: skip
    """Twisted sequential Monte Carlo (TDS; Wu et al. 2023, arXiv:2306.17775, algorithm 1): exact as particles grow.

    K particles walk from the prior by ancestral steps, moved towards y by the gradient of a twisting function, which is
    pigdm's likelihood p~(y | x_t) = N(y; A m(x_t), r² AA' + s² I), and are weighted to correct for that:

        w = p(x_s | x_t) p~(y | x_s) / (p~(y | x_t) q(x_s | x_t, y)),    q = N(mean + std² grad log p~(y | x_t), std² I)

    At the end x = E[x_0 | x at times[-1]] is weighted by its true likelihood N(y; A x, s² I). So for every p~ the
    weighted particles tend to the posterior under the ancestral sampler's law on this grid; a good p~ needs few
    particles.

    Args:
        model: of x; conditions that it has for each of B examples hold for their particles.
        observation: of B examples, with noise above 0, by a Spectral operator.
        shape: (B, *shape) of the examples.
        times: decreasing grid from 1 to t_min, as for `sample`.
        particles: K, of each problem; the model sees B K states at once.
        variance: c in the twisting function's r², see `pigdm`.
        threshold: problems whose effective number of particles is below this share of K are resampled (systematically).
        seed, first: of the draws; problem i's depend on (seed, first + i) alone.
        dtype, device: of the state, as for `sample`; `progress` is called with the number of steps done.

    Raises ValueError for an exact observation, an operator that is not Spectral, batches that differ, a grid that does
    not fall from 1, and K below 1.
    """
    operator, s = spectral(observation.operator, "twisted"), observation.noise
    if s == 0:
        raise ValueError("twisted weighs by y's likelihood, and with noise 0 there is none: give it a little noise")
    if particles < 1 or not 0 <= threshold <= 1 or len(observation.y) != shape[0]:
        raise ValueError(
            f"particles must be at least 1, threshold between 0 and 1, and the observation of the batch of {shape[0]}, "
            f"got {particles}, {threshold:g} and one of {len(observation.y)}"
        )
    times = as_grid(times)
    check_first(times)
    b, k, sde = shape[0], particles, model.sde
    dtype, device = default_state(model, dtype, device)
    noise = noise_source((b, k, *shape[1:]), seed, first, dtype, device)
    y, problems = observation.y.to(device, dtype).repeat_interleave(k, 0), torch.arange(b).repeat_interleave(k)

    def look(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(data, log p~ up to a function of t, its gradient) for all B K states."""
        r2 = spread(sde, t, variance).item()
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            with of_examples(model, problems, b):
                data = model(z, t).data
            residual = y - operator.apply(data)
            weighted = operator.gain(residual.detach(), r2, s)
            (gradient,) = torch.autograd.grad(data, z, weighted)
        return data.detach(), _log_normal(residual.detach(), operator, r2, s), gradient

    x = sde.prior((b, k, *shape[1:]), noise).to(device, dtype).flatten(0, 1)
    data, log_twist, gradient = look(x, times[0])
    log_w = log_twist.reshape(b, k)
    evidence, least = log_w.new_zeros(b), log_w.new_full((b,), float(k))
    for done, (t, to) in enumerate(pairwise(times), 1):
        effective = torch.exp(2 * log_w.logsumexp(1) - (2 * log_w).logsumexp(1))
        least = torch.minimum(least, effective)
        rows, log_w, gain = _resampled(log_w, effective < threshold * k, noise(x)[:, 0].flatten(1)[:, 0])
        evidence = evidence + gain
        x, data, log_twist, gradient = x[rows], data[rows], log_twist[rows], gradient[rows]
        # Step: q is the model's own kernel with its mean moved, and z the noise from the moved mean to x_s.
        keep, weight, std = (a.item() for a in sde.posterior_weights(to, t))
        z, push = noise(x).flatten(0, 1), std * gradient
        x = keep * x + weight * data + std * (push + z)
        ratio = (z.square() - (z + push).square()).flatten(1).sum(1) / 2
        before = log_twist
        data, log_twist, gradient = look(x, to)
        log_w = log_w + (ratio + log_twist - before).reshape(b, k)
        progress(done)
    log_w = log_w + (_log_normal(y - operator.apply(data), operator, 0.0, s) - log_twist).reshape(b, k)
    count = operator.count(observation.y)
    evidence = evidence + log_w.logsumexp(1) - math.log(k) - count * math.log(math.sqrt(2 * math.pi) * s)
    return Particles(data.reshape(b, k, *shape[1:]), log_w.log_softmax(1), evidence, least)


def _resampled(log_w: Tensor, uneven: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rows of the B K states that go on, their log weights (B, K), what the log evidence gains (B,)).

    The problems that are `uneven`, (B,), are resampled with the numbers z (B,), and the evidence takes the mean of
    their weights; the others keep their particles and weights.
    """
    b, k = log_w.shape
    own = torch.arange(k, device=log_w.device)
    chosen = torch.where(uneven[:, None], _systematic(log_w, z), own)
    rows = (chosen + k * torch.arange(b, device=log_w.device)[:, None]).flatten()
    gain = torch.where(uneven, log_w.logsumexp(1) - math.log(k), 0.0)
    return rows, torch.where(uneven[:, None], 0.0, log_w), gain


def _log_normal(residual: Tensor, operator: Spectral, r2: float, s: float) -> Tensor:
    """-residual' (r² AA' + s² I)⁻¹ residual/2, (B K,)."""
    # (r² AA' + s²)⁻¹ = (I - A r²/(r² A'A + s²) A')/s², which includes what lies outside of A's range
    inside = operator.adjoint(residual)
    inner = (inside * operator.filtered(inside, lambda v: r2 / (r2 * v + s**2))).flatten(1).sum(1)
    return (inner - residual.flatten(1).square().sum(1)) / (2 * s**2)


def _systematic(log_w: Tensor, z: Tensor) -> Tensor:
    """Systematic resampling: indices (B, K) of particles, at the points (u + k)/K of the cumulative weights.

    u is uniform, from the standard normal numbers z (B,).
    """
    k = log_w.shape[1]
    u = torch.special.ndtr(z.double())
    points = (u[:, None] + torch.arange(k, dtype=torch.float64, device=z.device)) / k
    ends = log_w.double().softmax(1).cumsum(1)
    return torch.searchsorted(ends, points).clamp_max(k - 1)
