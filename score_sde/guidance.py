"""Guidance: models in, a model out, so that no sampler has a condition argument."""

from __future__ import annotations

import math

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


class Thresholded(ScoreModel):
    """`model` with its estimate of the data drawn into [low, high] where much of it lies beyond, and its noise."""

    def __init__(self, model: ScoreModel, quantile: float, low: float, high: float) -> None:
        super().__init__(model.sde)
        self.model, self.quantile, self.low, self.high = model, quantile, low, high

    def forward(self, x: Tensor, t: Tensor) -> Estimate:
        e = self.model(x, t)
        middle, reach = (self.low + self.high) / 2, (self.high - self.low) / 2
        off = (e.data - middle) / reach
        # by sorting: torch.quantile takes 2^24 numbers at most
        size = off.abs().flatten(1).sort(1).values
        place = self.quantile * (size.shape[1] - 1)
        below, above = size[:, math.floor(place)], size[:, math.ceil(place)]
        most = like(torch.lerp(below, above, place - math.floor(place)).clamp_min(1), x)
        data = middle + reach * torch.maximum(torch.minimum(off, most), -most) / most
        ratio = like(self.sde.alpha(t) / self.sde.sigma(t), x)
        return e._replace(data=data, noise=e.noise + ratio * (e.data - data))


def threshold(model: ScoreModel, quantile: float = 0.995, low: float = -1.0, high: float = 1.0) -> ScoreModel:
    """Dynamic thresholding (Saharia et al. 2022, arXiv:2205.11487, section 2.3): `clip` that keeps contrasts.

    With m the given quantile of an example's distances from the middle of [low, high], in units of half its length, and
    at least 1, data are held within m and divided by it. Strong guidance saturates images; this brings them back.
    Raises ValueError for a quantile outside (0, 1], or low not below high.
    """
    if not 0 < quantile <= 1 or not low < high:
        raise ValueError(f"quantile must lie in (0, 1] and low below high, got {quantile}, {low} and {high}")
    return Thresholded(model, quantile, low, high)
