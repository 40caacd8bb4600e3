"""EDM's stochastic sampler: Heun's method, with some noise added before each step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.base import ScoreModel
from ..noise import Noise
from ..sdes.linear import add_
from .base import Sampler, refuse_learned, rows
from .deterministic import Heun


@dataclass(frozen=True)
class Churn(Sampler):
    """EDM's stochastic sampler, also known as Heun with S_churn: noise is added before each step of `Heun`.

    Karras et al. 2022 (arXiv:2206.00364), algorithm 2, on any SDE: its sigma is sigma/alpha here, its x is x/alpha.
    At noise levels r = sigma/alpha in [low, high] noise of standard deviation `inflate` sqrt(r'² - r²) raises x to
    r' = r (1 + gamma), gamma = min(churn/n, sqrt(2) - 1) for n steps; from there `Heun` steps to the next time. The
    level is never raised above that at t = 1, where no model was trained. With churn = 0 the sampler is `Heun`.

    Args:
        churn: S_churn, the amount of noise added over a whole walk.
        low, high: S_tmin and S_tmax, the noise levels between which it is added.
        inflate: S_noise, slightly above 1 against the loss of detail that networks cause.

    Raises ValueError for values below 0, or low above high.
    """

    churn: float = 40.0
    low: float = 0.0
    high: float = math.inf
    inflate: float = 1.0

    def __post_init__(self) -> None:
        if not (self.churn >= 0 and 0 <= self.low <= self.high and self.inflate >= 0):
            raise ValueError(f"churn and inflate must be at least 0, and 0 <= low <= high, got {self}")

    def walk(self, model: ScoreModel, x: Tensor, times: Tensor, noise: Noise) -> Iterator[Tensor]:
        sde, t, s = model.sde, times[:-1], times[1:]
        gamma = min(self.churn / len(t), math.sqrt(2) - 1)
        most = sde.log_snr(torch.ones((), dtype=torch.float64))
        r = sde.sigma(t) / sde.alpha(t)
        if gamma > 0:  # the times of the raised noise are the schedule's too
            refuse_learned(r, "Churn")
        raised = sde.time(torch.maximum(sde.log_snr(t) - 2 * math.log1p(gamma), most))
        u = torch.where((gamma > 0) & (self.low <= r) & (r <= self.high) & (raised > t), raised, t)
        scale, std = sde.transition(t, u)
        heun, churned = Heun(), rows((u > t, scale, self.inflate * std))
        for a, b, (churn, keep, fresh), numbers in zip(u, s, churned, rows(heun.numbers(sde, u, s)), strict=True):
            if churn:
                x = add_(x * keep, fresh, noise(x))
            x = heun.take(model, x, a, b, numbers, noise)
            yield x
