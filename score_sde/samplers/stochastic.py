"""Predictors and correctors of Song et al. 2021, and DDIM: one line of code per line of the algorithm."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..model import ScoreModel
from ..sdes import Noise, like
from .base import Sampler


@dataclass(frozen=True)
class EulerMaruyama(Sampler):
    """x_s = x_t + (s - t) [f x - g² score] + g sqrt(t - s) z: weak order 1 (Song et al. 2021, appendix D)."""

    def step(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        sde, (_, e, sigma) = model.sde, model(x, t)
        g2 = sde.g(t) ** 2
        x = like(1 + (s - t) * sde.f(t), x) * x + (like((s - t) * g2, x) / sigma) * e
        return x + like(torch.sqrt(g2 * (t - s)), x) * noise(x)


@dataclass(frozen=True)
class ReverseDiffusion(Sampler):
    """x_s = (2 - scale) x_t + std² score + std z with x_t | x_s ~ N(scale x_s, std²): the forward step, reversed.

    Song et al. 2021, eq. 44-46 and appendix E, with the exact transition as discretisation; on a chain it is the
    paper's sampler. `flow` halves the score's share and leaves out the noise: their probability-flow discretisation.
    """

    flow: bool = False

    def step(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        scale, std = model.sde.transition(s, t)
        e = model(x, t)
        share = std**2 / 2 if self.flow else std**2
        mean = like(2 - scale, x) * x - (like(share, x) / e.sigma) * e.noise
        return mean if self.flow else mean + like(std, x) * noise(x)


@dataclass(frozen=True)
class Ancestral(Sampler):
    """x_s from the posterior of x_s | x_t, x_0 with x_0 the model's estimate: the DDPM sampler, on any SDE.

    Ho et al. 2020, algorithm 2; Song et al. 2021, appendix F. `variance` is "small", the posterior's (beta-tilde), or
    "large", the forward step's (beta). Where s is clean data no noise is added.
    """

    variance: Literal["small", "large"] = "small"

    def step(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        sde = model.sde
        mean, variance = sde.posterior(x, model(x, t).data, s, t)
        if self.variance == "large":
            variance = torch.where(variance > 0, sde.transition(s, t)[1] ** 2, variance)
        return mean + like(variance.sqrt(), x) * noise(x) if bool((variance > 0).any()) else mean


@dataclass(frozen=True)
class DDIM(Sampler):
    """x_s = alpha_s data + sqrt(sigma_s² - fresh²) noise + fresh z, fresh = eta times the posterior's deviation.

    Song et al. 2021 (arXiv:2010.02502), eq. 12 and 16. eta = 1 is `Ancestral`; eta = 0 draws nothing and is the
    first-order exponential integrator of the probability flow.
    """

    eta: float = 0.0

    def step(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        sde, e = model.sde, model(x, t)
        sigma_s = sde.sigma(s)
        if self.eta == 0:
            return like(sde.alpha(s), x) * e.data + like(sigma_s, x) * e.noise
        fresh = self.eta * sigma_s * sde.transition(s, t)[1] / sde.sigma(t)
        x = like(sde.alpha(s), x) * e.data + like((sigma_s**2 - fresh**2).clamp_min(0).sqrt(), x) * e.noise
        return x + like(fresh, x) * noise(x)


@dataclass(frozen=True)
class Langevin(Sampler):
    """Corrector: `steps` times x += h score + sqrt(2h) z at the time t, with h set by a signal-to-noise ratio.

    h = 2 a (snr |z| / |score|)², a = transition(s, t).scale² (Song et al. 2021, algorithms 4-5). Norms are per
    example; ``norm="batch"`` averages them over the batch as the paper's code does, which makes an image depend on
    its neighbours.
    """

    snr: float = 0.16
    steps: int = 1
    norm: Literal["example", "batch"] = "example"

    def step(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        a = like(model.sde.transition(s, t)[0] ** 2, x)
        for _ in range(self.steps):
            score, z = model.score(x, t), noise(x)
            h = 2 * a * (self.snr * self._size(z) / self._size(score)) ** 2
            x = x + h * score + torch.sqrt(2 * h) * z
        return x

    def _size(self, x: Tensor) -> Tensor:
        norm = x.flatten(1).norm(dim=1)
        return like(norm.mean().expand_as(norm) if self.norm == "batch" else norm, x)


@dataclass(frozen=True)
class AnnealedLangevin(Sampler):
    """Corrector with h = 2 a (snr sigma_t)²: on a grid of levels, annealed Langevin dynamics.

    Song & Ermon 2019 (arXiv:1907.05600), algorithm 1, in the form of Song et al. 2021, appendix G.
    """

    snr: float = 0.16
    steps: int = 1

    def step(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        h = like(2 * model.sde.transition(s, t)[0] ** 2 * (self.snr * model.sde.sigma(t)) ** 2, x)
        for _ in range(self.steps):
            x = x + h * model.score(x, t) + torch.sqrt(2 * h) * noise(x)
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
