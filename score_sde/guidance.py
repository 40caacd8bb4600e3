"""Guidance: models in, a model out, so that no sampler has a condition argument."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .model import Estimate, Given, ScoreModel, absent
from .sdes import like


class Guided(ScoreModel):
    """reference + scale (model - reference), in data and noise alike; learned variances are those of `model`.

    Where sigma/alpha does not lie in (low, high] it is `model`, and where all examples' do not, one evaluation of it.
    """

    def __init__(self, model: ScoreModel, reference: ScoreModel, scale: float, low: float, high: float) -> None:
        super().__init__(model.sde)
        self.model, self.reference, self.scale, self.low, self.high = model, reference, scale, low, high

    def forward(self, x: Tensor, t: Tensor) -> Estimate:
        ratio = self.sde.sigma(t) / self.sde.alpha(t)
        inside = (self.low < ratio) & (ratio <= self.high)
        if not bool(inside.any()):
            return self.model(x, t)
        a, b = both(self.reference, self.model, x, t)
        scale = like(torch.where(inside, self.scale, 1.0), x)
        data, noise = torch.lerp(a.data, b.data, scale), torch.lerp(a.noise, b.noise, scale)
        return Estimate(data, noise, b.sigma, b.fraction)


def guide(
    model: ScoreModel, reference: ScoreModel, scale: float, *, low: float = 0.0, high: float = math.inf
) -> ScoreModel:
    """Classifier-free guidance and autoguidance: scale 0 is `reference`, 1 is `model`, above 1 extrapolates.

    Ho & Salimans 2022 (arXiv:2207.12598), eq. 6, whose w is scale - 1, as in ``guide(model.given(label=y),
    model.given(label=None), 2.0)``: both evaluations are made in one batch. Autoguidance takes a weaker model of the
    same data for the reference (Karras et al. 2024, arXiv:2406.02507). With `low` and `high` guidance is limited to
    low < sigma/alpha <= high (Kynkäänniemi et al. 2024, arXiv:2404.07724); elsewhere it is `model` alone.

    Raises ValueError where the SDEs differ, or low is not below high.
    """
    if model.sde != reference.sde:
        raise ValueError(f"both models must share one SDE, got {model.sde} and {reference.sde}")
    if not 0 <= low < high:
        raise ValueError(f"guidance must lie between 0 <= low < high, got low={low:g} and high={high:g}")
    return Guided(model, reference, scale, low, high)


def both(first: ScoreModel, second: ScoreModel, x: Tensor, t: Tensor) -> tuple[Estimate, Estimate]:
    """The estimates of two models at one state; in one batch where they are one model given different conditions."""
    a, b = (m if isinstance(m, Given) else Given(m, {}) for m in (first, second))
    if a.model is not b.model:
        return first(x, t), second(x, t)
    names = [*a.condition, *(name for name in b.condition if name not in a.condition)]
    pairs = {name: (a.condition.get(name), b.condition.get(name)) for name in names}
    condition = {name: joined(*pair, len(x)) for name, pair in pairs.items() if pair != (None, None)}
    e = a.model(torch.cat([x, x]), torch.cat([t, t]) if t.ndim else t, **condition)
    halves = [None if v is None else v.chunk(2) if v.ndim and len(v) == 2 * len(x) else (v, v) for v in e]
    one, other = (Estimate(*(None if h is None else h[i] for h in halves)) for i in (0, 1))  # type: ignore[arg-type]
    return one, other


def joined(first: Any, second: Any, batch: int) -> Tensor:
    """Two conditions of `batch` examples as one of twice as many, where None is what `absent` says."""
    values = [None if v is None else torch.as_tensor(v) for v in (first, second)]
    known = next(v for v in values if v is not None)
    whole = [absent(known) if v is None else v for v in values]
    return torch.cat([v if v.ndim and len(v) == batch else v.expand(batch, *v.shape) for v in whole])


class Clipped(ScoreModel):
    """`model` with its estimate of the data held to [low, high], and the noise that goes with it."""

    def __init__(self, model: ScoreModel, low: float, high: float) -> None:
        super().__init__(model.sde)
        self.model, self.low, self.high = model, low, high

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Estimate:
        e = self.model(x, t, **condition)
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

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Estimate:
        e = self.model(x, t, **condition)
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
