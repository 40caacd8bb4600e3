"""Guidance: models in, a model out, so that no sampler has a condition argument."""

from __future__ import annotations

import torch
from torch import Tensor

from .model import Estimate, ScoreModel
from .sdes import like


class Guided(ScoreModel):
    """reference + scale (model - reference), in data and noise alike; learned variances are those of `model`."""

    def __init__(self, model: ScoreModel, reference: ScoreModel, scale: float) -> None:
        super().__init__(model.sde)
        self.model, self.reference, self.scale = model, reference, scale

    def forward(self, x: Tensor, t: Tensor) -> Estimate:
        a, b = self.reference(x, t), self.model(x, t)
        data, noise = torch.lerp(a.data, b.data, self.scale), torch.lerp(a.noise, b.noise, self.scale)
        return Estimate(data, noise, b.sigma, b.fraction)


def guide(model: ScoreModel, reference: ScoreModel, scale: float) -> ScoreModel:
    """Classifier-free guidance and autoguidance: scale 0 is `reference`, 1 is `model`, above 1 extrapolates.

    Ho & Salimans 2022 (arXiv:2207.12598), eq. 6, whose w is scale - 1. Raises ValueError where the SDEs differ.
    """
    if model.sde != reference.sde:
        raise ValueError(f"both models must share one SDE, got {model.sde} and {reference.sde}")
    return Guided(model, reference, scale)


class Clipped(ScoreModel):
    """`model` with its estimate of the data held to [low, high], and the noise that goes with it."""

    def __init__(self, model: ScoreModel, low: float, high: float) -> None:
        super().__init__(model.sde)
        self.model, self.low, self.high = model, low, high

    def forward(self, x: Tensor, t: Tensor) -> Estimate:
        e = self.model(x, t)
        data = e.data.clamp(self.low, self.high)
        ratio = like(self.sde.alpha(t) / self.sde.sigma(t), x)
        return e._replace(data=data, noise=e.noise + ratio * (e.data - data))


def clip(model: ScoreModel, low: float = -1.0, high: float = 1.0) -> ScoreModel:
    """The model whose estimate of the data never leaves their range: the `clip_denoised` of DDPM's code.

    Where alpha is small, data = (x - sigma noise)/alpha multiplies a network's error without limit; Improved DDPM's
    cosine chain begins at alpha = 1e-5.
    """
    return Clipped(model, low, high)
