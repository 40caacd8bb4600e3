"""Predictors and correctors of Song et al. 2021, and DDIM: one line of code per line of the algorithm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ..model import ScoreModel, Variance, reverse_log_variance
from ..sdes import Noise, add_, like
from .base import Sampler


@dataclass(frozen=True)
class EulerMaruyama(Sampler):
    """x_s = x_t + (s - t) [f x - g² score] + g sqrt(t - s) z: weak order 1 (Song et al. 2021, appendix D)."""

    def step(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        h, f, g = t - s, model.sde.f(t), model.sde.g(t)
        mean = add_(like(1 - h * f, x) * x, h * g**2, model.score(x, t))
        return add_(mean, g * h.sqrt(), noise(x))


@dataclass(frozen=True)
class ReverseDiffusion(Sampler):
    """x_s = (2 - scale) x_t + std² score + std z with x_t | x_s ~ N(scale x_s, std²): the forward step, reversed.

    Song et al. 2021, eq. 44-46 and appendix E, with the exact transition as discretisation; on a chain it is the
    paper's sampler. `flow` halves the score's share and leaves out the noise: their probability-flow discretisation.
    """

    flow: bool = False

    def step(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        scale, std = model.sde.transition(s, t)
        mean = add_(like(2 - scale, x) * x, std**2 / 2 if self.flow else std**2, model.score(x, t))
        return mean if self.flow else add_(mean, std, noise(x))


@dataclass(frozen=True)
class Ancestral(Sampler):
    """x_s from the posterior of x_s | x_t, x_0 with x_0 the model's estimate: the DDPM sampler, on any SDE.

    Ho et al. 2020, algorithm 2; Song et al. 2021, appendix F. `variance` is "small", the posterior's (beta-tilde),
    "large", the forward step's (beta), or "learned" between them (Nichol & Dhariwal 2021, section 3.1), for the step
    from t to s whatever the chain's own steps are. Where s is clean data no noise is added.
    """

    variance: Variance = "small"

    def step(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        estimate = model(x, t)
        mean, small = model.sde.posterior(x, estimate.data, s, t)
        if not bool((small > 0).any()):
            return mean
        if self.variance == "small":
            return add_(mean, small.sqrt(), noise(x))
        large, noisy = model.sde.transition(s, t)[1] ** 2, small > 0
        if self.variance == "large":
            return add_(mean, torch.where(noisy, large, small).sqrt(), noise(x))
        log_variance = reverse_log_variance(estimate, small.where(noisy, large), large, self.variance)
        return torch.addcmul(mean, torch.exp(log_variance / 2) * like(noisy.double(), x), noise(x))


@dataclass(frozen=True)
class DDIM(Sampler):
    """x_s = alpha_s data + sqrt(sigma_s² - fresh²) noise + fresh z, fresh = eta times the posterior's deviation.

    Song et al. 2021 (arXiv:2010.02502), eq. 12 and 16. eta = 1 is `Ancestral`; eta = 0 draws nothing and is the
    first-order exponential integrator of the probability flow.
    """

    eta: float = 0.0

    def step(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        sde, e = model.sde, model(x, t)
        clean, sigma_s = like(sde.alpha(s), x) * e.data, sde.sigma(s)
        if self.eta == 0:
            return add_(clean, sigma_s, e.noise)
        fresh = self.eta * sigma_s * sde.transition(s, t)[1] / sde.sigma(t)
        mean = add_(clean, (sigma_s**2 - fresh**2).clamp_min(0).sqrt(), e.noise)
        return add_(mean, fresh, noise(x))

    def walk(self, model: ScoreModel, x: Tensor, times: Tensor, noise: Noise) -> Iterator[Tensor]:
        """These steps; without noise, with the curves computed at once, which else cost as much as the arithmetic."""
        if self.eta > 0:
            yield from super().walk(model, x, times, noise)
            return
        alphas, sigmas = model.sde.alpha(times[1:]).tolist(), model.sde.sigma(times[1:]).tolist()
        for t, alpha, sigma in zip(times[:-1], alphas, sigmas, strict=True):
            e = model(x, t)
            x = (alpha * e.data).add_(e.noise, alpha=sigma)
            yield x


@dataclass(frozen=True)
class Corrector(Sampler):
    """A sampler whose step stays at its time t. Alone it visits every time of the grid, also the last one.

    Not beside a predictor, which ends there; nor where that time is clean data (sigma = 0).
    """

    def walk(self, model: ScoreModel, x: Tensor, times: Tensor, noise: Noise) -> Iterator[Tensor]:
        for t, s in pairwise(times):
            x = self.step(model, x, t, s, noise)
            if s == times[-1] and bool(model.sde.sigma(s) > 0):
                x = self.step(model, x, s, s, noise)
            yield x


@dataclass(frozen=True)
class Langevin(Corrector):
    """Corrector: `steps` times x += h score + sqrt(2h) z at the time t, with h set by a signal-to-noise ratio.

    h = 2 a (snr |z| / |score|)², a = transition(s, t).scale² (Song et al. 2021, algorithms 4-5). Norms are per
    example; ``norm="batch"`` averages them over the batch as the paper's code does, which makes an image depend on
    its neighbours. In few dimensions the score of a single example is often near 0 and its step then far too long (2-D
    Gaussians come out almost 3 times too wide): take ``norm="batch"`` or `AnnealedLangevin` there.
    """

    snr: float = 0.16
    steps: int = 1
    norm: Literal["example", "batch"] = "example"

    def step(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        a = like((model.sde.alpha(t) / model.sde.alpha(s)) ** 2, x)
        for _ in range(self.steps):
            score, z = model.score(x, t), noise(x)
            h = 2 * a * (self.snr * self._size(z) / self._size(score)) ** 2
            x = torch.addcmul(x, h, score).addcmul_(torch.sqrt(2 * h), z)
        return x

    def _size(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x.flatten(1), dim=1)
        return like(norm.mean().expand_as(norm) if self.norm == "batch" else norm, x)


@dataclass(frozen=True)
class AnnealedLangevin(Corrector):
    """Corrector with h = 2 a (snr sigma_t)²: alone on a grid of levels, annealed Langevin dynamics.

    Song & Ermon 2019 (arXiv:1907.05600), algorithm 1, in the form of Song et al. 2021, appendix G. With a = 1 (VE), the
    h = eps (sigma_t/sigma_L)² of Song & Ermon 2020 and of both papers' code is snr = sqrt(eps/2)/sigma_L; the algorithm
    as printed in 2019 halves h: snr = sqrt(eps)/(2 sigma_L). `steps` is their T. They start from uniform noise where
    `sample` starts from the SDE's prior, and its `denoise` is their last step, x + sigma_L² score.
    """

    snr: float = 0.16
    steps: int = 1

    def step(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        sde = model.sde
        h = 2 * (sde.alpha(t) / sde.alpha(s) * self.snr * sde.sigma(t)) ** 2
        for _ in range(self.steps):
            x = add_(add_(x.clone(), h, model.score(x, t)), torch.sqrt(2 * h), noise(x))
        return x


@dataclass(frozen=True)
class PredictorCorrector(Sampler):
    """The corrector at (t, s), then the predictor from t to s, in the order of the paper's code.

    Song et al. 2021, algorithm 1 (which corrects after predicting: over a whole walk the two differ at its ends only).
    """

    predictor: Sampler = field(default_factory=ReverseDiffusion)
    corrector: Sampler = field(default_factory=Langevin)

    def step(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        x = self.corrector.step(model, x, t, s, noise)
        return self.predictor.step(model, x, t, s, noise)
