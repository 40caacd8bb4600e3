"""Predictors and correctors of Song et al. 2021, ancestral sampling (DDPM) and DDIM."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..models.base import ScoreModel
from ..models.reverse import Variance, reverse_log_variance
from ..noise import Noise
from ..sdes.linear import SDE, add, add_, like, scaled
from .base import Planned, Sampler, Update, add_noise_


@dataclass(frozen=True)
class ReverseStep(Planned):
    """x_s = keep x_t + slope noise + fresh z: as score = -noise/sigma, `slope` is the score's factor over -sigma.

    Where x_t is pure noise (alpha = 0) the reverse SDE's rates are infinite, and the step from there is the exact
    N(alpha_s data, sigma_s²).
    """

    @abstractmethod
    def factors(self, sde: SDE, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(keep, slope, fresh) of the steps from t to s."""

    def numbers(self, sde: SDE, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        factors, some = self.factors(sde, t, s), sde.alpha(t) > 0
        keep, slope, fresh = (torch.where(some, factor, 0.0) for factor in factors)
        return keep, torch.where(some, 0.0, sde.alpha(s)), slope, torch.where(some, fresh, sde.sigma(s))

    def take(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, numbers: Sequence[Any], noise: Noise) -> Tensor:
        keep, weight, slope, fresh = numbers
        e = model(x, t)
        y = add_(scaled(x, keep), slope, e.noise)
        begins = weight.any() if isinstance(weight, Tensor) else weight
        return add_noise_(add_(y, weight, e.data) if begins else y, fresh, noise)


@dataclass(frozen=True)
class EulerMaruyama(ReverseStep):
    """Euler-Maruyama on the reverse SDE, of weak order 1 (Song et al. 2021, appendix D).

    x_s = x_t + (s - t) [f x - g² score] + g sqrt(t - s) z.
    """

    def factors(self, sde: SDE, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, f, g = t - s, sde.f(t), sde.g(t)
        return 1 - h * f, -h * g**2 / sde.sigma(t), g * h.sqrt()


@dataclass(frozen=True)
class ReverseDiffusion(ReverseStep):
    """The reversed forward step, also known as the reverse diffusion predictor.

    x_s = (2 - scale) x_t + std² score + std z with x_t | x_s ~ N(scale x_s, std²). Song et al. 2021, eq. 44-46 and
    appendix E, with the exact transition as discretisation; on a chain it is the paper's sampler. `flow` halves the
    score's factor and leaves out the noise: their probability-flow discretisation.

    Where the state is nearly pure noise, a step of the flow multiplies its standard deviation by 1 + (1 - scale)²/2,
    which no later step corrects. The factor is nearly 1 in each step of the paper's SDEs and chains. A cosine schedule
    loses half of the signal and more in its noisiest steps, which would make samples twice too wide: `check_flow`
    raises a ValueError.
    """

    flow: bool = False

    def factors(self, sde: SDE, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.flow:
            check_flow(sde, t.max().item())
        scale, std = sde.transition(s, t)
        slope = -(std**2) / sde.sigma(t)
        return (2 - scale, slope / 2, torch.zeros_like(std)) if self.flow else (2 - scale, slope, std)


def check_flow(sde: SDE, start: float = 1.0) -> None:
    """Raise ValueError for an SDE that ``ReverseDiffusion(flow=True)`` cannot sample from time `start` on.

    There a step of the chain, or one of a thousand even steps, loses more than two fifths of the signal: each such step
    would add 8 % to the samples' standard deviation, however many steps there are.
    """
    n = sde.steps or 1000
    alpha = sde.alpha(torch.arange(math.floor(start * n + 1e-6) + 1, dtype=torch.float64) / n)
    lost = (1 - alpha[1:] / alpha[:-1]).max().item() if len(alpha) > 1 else 0.0
    if lost > 0.4:
        raise ValueError(
            f"ReverseDiffusion(flow=True) is for steps that lose little of the signal, and one of {n} of {sde} loses "
            f"{100 * lost:.0f} % of it: samples would be too wide; take DDIM(), which steps the flow on any schedule "
            "(sampling.method=ddim)"
        )


@dataclass(frozen=True)
class Ancestral(Planned):
    """Ancestral sampling, also known as DDPM sampling, on any SDE.

    x_s is drawn from the posterior of x_s | x_t, x_0 with the model's estimate as x_0. Ho et al. 2020, algorithm 2;
    Song et al. 2021, appendix F. `variance` is "small", the posterior's (beta-tilde), "large", the forward step's
    (beta), or "learned" between them (Nichol & Dhariwal 2021, section 3.1), of the step from t to s, which need not be
    a step of the chain. Where s is clean data no noise is added.
    """

    variance: Variance = "small"

    def __post_init__(self) -> None:
        if self.variance not in get_args(Variance):
            raise ValueError(f"variance must be one of {', '.join(get_args(Variance))}, got {self.variance!r}")

    def numbers(self, sde: SDE, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        keep, weight, small = sde.posterior_weights(s, t)
        return keep, weight, small, torch.where(small > 0, sde.transition(s, t)[1], 0.0)

    def take(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, numbers: Sequence[Any], noise: Noise) -> Tensor:
        keep, weight, small, large = numbers
        e = model(x, t)
        mean = add_(scaled(x, keep), weight, e.data)
        if self.variance != "learned":
            return add_noise_(mean, small if self.variance == "small" else large, noise)
        small, large = (torch.as_tensor(std, dtype=torch.float64) for std in (small, large))
        noisy = large > 0
        if not bool(noisy.any()):
            return mean
        log_variance = reverse_log_variance(e, small.where(noisy, 1.0) ** 2, large.where(noisy, 1.0) ** 2, "learned")
        return torch.addcmul(mean, torch.exp(log_variance / 2) * like(noisy.double(), x), noise(x))


@dataclass(frozen=True)
class DDIM(Planned):
    """DDIM: with eta = 0 the implicit, deterministic sampler; with eta = 1 `Ancestral`, also known as DDPM.

    x_s = alpha_s data + sqrt(sigma_s² - fresh²) noise + fresh z, fresh = eta times the posterior's standard deviation.
    Song et al. 2021 (arXiv:2010.02502), eq. 12 and 16. eta = 1 is `Ancestral`; eta = 0 draws nothing and is the
    first-order exponential integrator of the probability flow.

    With eta above 1 the fresh noise of a long step may exceed sigma_s. Raises ValueError for a negative eta.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta < math.inf:
            raise ValueError(f"eta must be finite and at least 0 (0: no noise, 1: ancestral sampling), got {self.eta}")

    def numbers(self, sde: SDE, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        alpha, sigma = sde.alpha(s), sde.sigma(s)
        if self.eta == 0:
            return alpha, sigma, torch.zeros_like(sigma)
        fresh = self.eta * sigma * sde.transition(s, t)[1] / sde.sigma(t)
        return alpha, (sigma**2 - fresh**2).clamp_min(0).sqrt(), fresh

    def take(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, numbers: Sequence[Any], noise: Noise) -> Tensor:
        alpha, weight, fresh = numbers
        e = model(x, t)
        return add_noise_(add_(scaled(e.data, alpha), weight, e.noise), fresh, noise)


@dataclass(frozen=True)
class Corrector(Planned):
    """A sampler whose step, `steps` moves along the score as long as `snr` says, stays at its time t.

    Alone it visits every time of the grid, also the last one unless that is clean data (sigma = 0); with a predictor it
    does not visit the last.
    """

    snr: float = 0.16
    steps: int = 1

    def __post_init__(self) -> None:
        if not self.snr > 0 or self.steps < 1:
            got = f"snr {self.snr} and steps {self.steps}"
            raise ValueError(f"a corrector needs an snr above 0 and at least 1 step, got {got}")

    def walk(self, model: ScoreModel, x: Tensor, times: Tensor, noise: Noise) -> Iterator[Tensor]:
        last = len(times) - 2
        for i, update in enumerate(self.updates(model, times)):
            x = update(x, noise)
            if i == last and bool(model.sde.sigma(times[-1]) > 0):
                x = self.step(model, x, times[-1], times[-1], noise)
            yield x


@dataclass(frozen=True)
class Langevin(Corrector):
    """Langevin corrector: `steps` times x += h score + sqrt(2h) z at the time t, with h set by a signal-to-noise ratio.

    h = 2 a (snr |z| / |score|)², a = transition(s, t).scale² (Song et al. 2021, algorithms 4-5). Norms are per
    example; ``norm="batch"`` averages them over the batch as the paper's code does, which makes an image depend on
    its neighbours. In few dimensions the score of a single example is often near 0 and its step then far too long (2-D
    Gaussians come out almost 3 times too wide): use ``norm="batch"`` or `AnnealedLangevin` there.
    """

    norm: Literal["example", "batch"] = "example"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm not in ("example", "batch"):
            raise ValueError(f'norm must be "example" or "batch", got {self.norm!r}')

    def numbers(self, sde: SDE, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        return 2 * (self.snr * sde.alpha(t) / sde.alpha(s)) ** 2, sde.sigma(t)

    def take(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, numbers: Sequence[Any], noise: Noise) -> Tensor:
        a, sigma = (n.to(x) if isinstance(n, Tensor) else n for n in numbers)
        for _ in range(self.steps):
            e, z = model(x, t), noise(x)
            h = a * (self._mean(size(z)) / self._mean(size(e.noise) / sigma)) ** 2
            x = torch.addcmul(x, like(-h / sigma, x), e.noise).addcmul_(like(torch.sqrt(2 * h), x), z)
        return x

    def _mean(self, sizes: Tensor) -> Tensor:
        return sizes.mean().expand_as(sizes) if self.norm == "batch" else sizes


def size(x: Tensor) -> Tensor:
    """The norm of each example, (B,)."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


@dataclass(frozen=True)
class AnnealedLangevin(Corrector):
    """Annealed Langevin dynamics, NCSN's sampler, if alone on a grid of levels: corrector with h = 2 a (snr sigma_t)².

    Song & Ermon 2019 (arXiv:1907.05600), algorithm 1, in the form of Song et al. 2021, appendix G. With a = 1 (VE), the
    h = eps (sigma_t/sigma_L)² of Song & Ermon 2020 and of both papers' code is snr = sqrt(eps/2)/sigma_L; the algorithm
    as printed in 2019 halves h: snr = sqrt(eps)/(2 sigma_L). `steps` is their T. They start from uniform noise where
    `sample` starts from the SDE's prior, and its `denoise` is their last step, x + sigma_L² score.
    """

    def numbers(self, sde: SDE, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        h = 2 * (sde.alpha(t) / sde.alpha(s) * self.snr * sde.sigma(t)) ** 2
        return -h / sde.sigma(t), torch.sqrt(2 * h)

    def take(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, numbers: Sequence[Any], noise: Noise) -> Tensor:
        slope, fresh = numbers
        for _ in range(self.steps):
            e = model(x, t)
            x = add_noise_(add(x, slope, e.noise), fresh, noise)
        return x


@dataclass(frozen=True)
class PredictorCorrector(Sampler):
    """Predictor-corrector (PC) sampling: the corrector at (t, s), then the predictor from t to s.

    This is the order of the paper's code. Song et al. 2021, algorithm 1, corrects after predicting: over a whole walk
    the two differ at its ends only.
    """

    predictor: Sampler = field(default_factory=ReverseDiffusion)
    corrector: Sampler = field(default_factory=Langevin)

    def step(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        x = self.corrector.step(model, x, t, s, noise)
        return self.predictor.step(model, x, t, s, noise)

    def updates(self, model: ScoreModel, times: Tensor) -> Iterator[Update]:
        pairs = zip(self.corrector.updates(model, times), self.predictor.updates(model, times), strict=True)
        for correct, predict in pairs:
            yield lambda x, noise, c=correct, p=predict: p(c(x, noise), noise)  # type: ignore[misc]
