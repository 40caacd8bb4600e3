"""Guidance: functions from models to a model, so that no sampler needs a condition argument.

A conditional score is the unconditional score plus the score of the condition,

    grad log p_t(x | y) = grad log p_t(x) + grad log p_t(y | x).

`classifier` adds the last term, `guide` computes it as the difference of two models' scores, and both can multiply it
by a scale s. For s other than 0 and 1 the result is the score of p(x) p(y | x)^s at t = 0 only, and not the score of
that law with noise at later times: samples have the law only approximately.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..machine.devices import sent
from ..sdes.linear import SDE, like, some
from .base import Estimate, Given, ScoreModel, absent, conditioned, in_precision_of, with_graph

Scale = float | Tensor  # one for all examples, or (B,)


class Guided(ScoreModel):
    """reference + scale (model - reference), in data and noise alike; learned variances are those of `model`.

    Where sigma/alpha is not in (low, high] it is `model`; if that holds for all examples, `reference` is not evaluated.
    """

    def __init__(
        self, model: ScoreModel, reference: ScoreModel, scale: Scale, low: float, high: float, rescale: float
    ) -> None:
        super().__init__(model.sde)
        self.model, self.reference, self.low, self.high, self.rescale = model, reference, low, high, rescale
        self.condition = {"scale": scale}

    def forward(self, x: Tensor, t: Tensor) -> Estimate:
        scale = within(self.sde, t, self.low, self.high, self.condition["scale"], 1.0)
        if scale is None:
            return self.model(x, t)
        a, b = both(self.reference, self.model, x, t)
        factor = like(scale, x)
        data, noise = torch.lerp(a.data, b.data, factor), torch.lerp(a.noise, b.noise, factor)
        guided = Estimate(data, noise, b.sigma, b.fraction)
        if not self.rescale:
            return guided
        # of a single dimension the standard deviation is 0, and nothing is rescaled
        size, wanted = (v.flatten(1).std(1, correction=0) for v in (data, b.data))
        ratio = torch.where(size > 0, wanted / size, 1.0)
        return with_data(self.sde, guided, like(1 + self.rescale * (ratio - 1), x) * data, t)


def guide(
    model: ScoreModel, reference: ScoreModel, scale: Scale, *,
    low: float = 0.0, high: float = math.inf, rescale: float = 0.0,
) -> ScoreModel:  # fmt: skip
    """Classifier-free guidance and autoguidance: scale 0 is `reference`, 1 is `model`, above 1 extrapolates.

    Ho & Salimans 2022 (arXiv:2207.12598), eq. 6, whose w is scale - 1, as in ``guide(model.given(label=y),
    model.given(label=None), 2.0)``: both evaluations are made in one batch. A label instead of None is a negative
    condition, which samples avoid. Autoguidance takes a weaker model of the same data as reference (Karras et al. 2024,
    arXiv:2406.02507).

    Args:
        scale: one for all examples, or (B,).
        low, high: guidance is limited to low < sigma/alpha <= high (Kynkäänniemi et al. 2024, arXiv:2404.07724);
            elsewhere the result is `model` alone.
        rescale: how far, from 0 to 1, the standard deviation of each example's estimate of the data is brought back to
            that of `model`'s (Lin et al. 2023, arXiv:2305.08891, section 3.4, phi); large scales saturate images.

    Raises ValueError where the SDEs differ, low is not below high, or rescale is not in [0, 1].
    """
    if model.sde != reference.sde:
        raise ValueError(f"both models must share one SDE, got {_apart(model.sde, reference.sde)}")
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale must lie between 0 and 1, got {rescale:g}")
    return Guided(model, reference, checked(scale, low, high), low, high, rescale)


def _apart(a: SDE, b: SDE) -> str:
    """How two SDEs differ, as text, also if they print alike, as learned schedules and chains may."""
    if repr(a) != repr(b):
        return f"{a} and {b}"
    t = torch.linspace(max(a.t_min, b.t_min, 1e-3), 1, 101, dtype=torch.float64)
    with torch.no_grad():
        gap = (a.log_snr(t) - b.log_snr(t)).abs().nan_to_num(0)  # both may be -∞ at t = 1
    i = int(gap.argmax())
    return f"two of the kind {a}, whose log SNRs are up to {gap[i]:.3g} apart, at t = {t[i]:.2g}"


class Classified(ScoreModel):
    """`model` with scale grad log_prob(x, t) added to its score, where sigma/alpha lies in (low, high]."""

    def __init__(
        self, model: ScoreModel, log_prob: Callable[..., Tensor], scale: Scale, low: float, high: float,
        condition: dict[str, Any],
    ) -> None:  # fmt: skip
        super().__init__(model.sde)
        self.model, self.log_prob, self.low, self.high = model, log_prob, low, high
        self.condition = {"scale": scale, **condition}

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Estimate:
        e = self.model(x, t, **condition)
        own = dict(self.condition)
        scale = within(self.sde, t, self.low, self.high, own.pop("scale"), 0.0)
        if scale is None:
            return e
        return with_score(self.sde, e, like(scale, x) * gradient(self.log_prob, x, t, **own), t)


def classifier(
    model: ScoreModel, log_prob: Callable[..., Tensor], scale: Scale = 1.0, *,
    low: float = 0.0, high: float = math.inf, **condition: Any,
) -> ScoreModel:  # fmt: skip
    """Classifier guidance: the score of `model` plus scale grad_x log p(y | x_t), for any differentiable log p.

    Song et al. 2021, section 5 (scale 1); Dhariwal & Nichol 2021 (arXiv:2105.05233), section 4.

    Args:
        model: of the data, or of the data conditioned on y (Dhariwal & Nichol, table 4).
        log_prob: (x, t, **condition) -> (B,), the log probability, up to a constant, of the wanted property given x_t:
            a `NoisyClassifier`, or any function, such as ``lambda x, t: -(x - y).square().flatten(1).sum(1)``. It must
            be right for noisy states.
        scale, low, high: as for `guide`.
        condition: keyword arguments of log_prob; a tensor (B, ...) has one value for each example, as in
            ``classifier(model, load_classifier("runs/classifier_digits"), 2.0, label=y)``.

    Raises ValueError where log_prob belongs to another SDE or low is not below high.
    """
    sde = getattr(log_prob, "sde", model.sde)
    if sde != model.sde:
        raise ValueError(f"classifier and model must share one SDE, got {sde} and {model.sde}")
    return Classified(model, log_prob, checked(scale, low, high), low, high, condition)


def gradient(log_prob: Callable[..., Tensor], x: Tensor, t: Tensor, **condition: Any) -> Tensor:
    """Gradient in x of log_prob(x, t, **condition), of x's shape, also where gradients are disabled.

    Where they are enabled, as for a likelihood's divergence, the gradient has a gradient too. Raises ValueError for a
    log_prob that is not (B,), or has no gradient in x.
    """
    value, y, graph = with_graph(lambda y: log_prob(in_precision_of(log_prob, y), t, **condition), x)
    if value.shape != x.shape[:1]:
        raise ValueError(f"log_prob must return one value per example, ({len(x)},), got {tuple(value.shape)}")
    if not value.requires_grad:
        raise ValueError("log_prob has no gradient in x: compute it by torch, without detach or torch.no_grad")
    return torch.autograd.grad(value, y, torch.ones_like(value), create_graph=graph)[0]


def within(sde: SDE, t: Tensor, low: float, high: float, scale: Scale, outside: float) -> Tensor | None:
    """The scale where low < sigma/alpha <= high, (B,) or (), else `outside`; None if no example is in the interval."""
    ratio = sde.sigma(t) / sde.alpha(t)
    inside = (low < ratio) & (ratio <= high)
    if not some(inside):
        return None
    value = torch.as_tensor(scale, dtype=ratio.dtype)
    return torch.where(sent(inside, value.device), value, outside)


def checked(scale: Scale, low: float, high: float) -> Scale:
    """`scale`. Raises ValueError unless it is a number or (B,), and unless 0 <= low < high."""
    if not 0 <= low < high:
        raise ValueError(f"guidance must lie between 0 <= low < high, got low={low:g} and high={high:g}")
    if isinstance(scale, Tensor) and scale.ndim > 1:
        raise ValueError(f"scale must be a number, or (B,), one for each example; got shape {tuple(scale.shape)}")
    return scale


def both(first: ScoreModel, second: ScoreModel, x: Tensor, t: Tensor) -> tuple[Estimate, Estimate]:
    """The estimates of two models at one state, by one batch if they are one model with different conditions."""
    a, b = (m if isinstance(m, Given) else Given(m, {}) for m in (first, second))
    if a.model is not b.model or conditioned(a.model):  # a condition further inside would not fit the doubled batch
        return first(x, t), second(x, t)
    names = [*a.condition, *(name for name in b.condition if name not in a.condition)]
    pairs = {name: (a.condition.get(name), b.condition.get(name)) for name in names}
    condition = {name: joined(*pair, len(x)) for name, pair in pairs.items() if pair != (None, None)}
    e = a.model(torch.cat([x, x]), torch.cat([t, t]) if t.ndim else t, **condition)
    halves = [None if v is None else v.chunk(2) if v.ndim and len(v) == 2 * len(x) else (v, v) for v in e]
    one, other = (Estimate(*(None if h is None else h[i] for h in halves)) for i in (0, 1))  # type: ignore[arg-type]
    return one, other


def joined(first: Any, second: Any, batch: int) -> Tensor:
    """Two conditions of `batch` examples as one of twice as many, with None replaced by its `absent` value."""
    values = [None if v is None else torch.as_tensor(v) for v in (first, second)]
    present = next(v for v in values if v is not None)
    whole = [absent(present) if v is None else v for v in values]
    return torch.cat([v if v.ndim and len(v) == batch else v.expand(batch, *v.shape) for v in whole])


def with_score(sde: SDE, e: Estimate, score: Tensor, t: Tensor) -> Estimate:
    """The estimate whose score is larger by `score`, the gradient of log p(y | x_t) of some property y.

    In pure noise (alpha = 0) it stays: there x_t tells nothing of y, and a gradient in it is rounding alone.
    """
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    weight = torch.where(alpha > 0, sigma**2 / alpha, 0.0)
    noise = e.noise - like(torch.where(alpha > 0, sigma, 0.0), score) * score
    return e._replace(data=e.data + like(weight, score) * score, noise=noise)


def with_data(sde: SDE, e: Estimate, data: Tensor, t: Tensor) -> Estimate:
    """The estimate with other data and the noise that fits them: alpha data + sigma noise does not change."""
    return e._replace(data=data, noise=e.noise + like(sde.alpha(t) / sde.sigma(t), data) * (e.data - data))


class Limited(ScoreModel):
    """`model` with its estimate of the data mapped by `limit`, and the noise that fits it."""

    def __init__(self, model: ScoreModel, limit: Callable[[Tensor], Tensor]) -> None:
        super().__init__(model.sde)
        self.model, self.limit = model, limit

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Estimate:
        e = self.model(x, t, **condition)
        return with_data(self.sde, e, self.limit(e.data), t)


def clip(model: ScoreModel, low: float = -1.0, high: float = 1.0) -> ScoreModel:
    """The model with its estimate of the data clipped to [low, high]: the `clip_denoised` of DDPM's code.

    Where alpha is small, data = (x - sigma noise)/alpha multiplies a network's error without limit; Improved DDPM's
    cosine chain begins at alpha = 1e-5.
    """
    return Limited(model, partial(torch.clamp, min=low, max=high))


def threshold(model: ScoreModel, quantile: float = 0.995, low: float = -1.0, high: float = 1.0) -> ScoreModel:
    """Dynamic thresholding (Saharia et al. 2022, arXiv:2205.11487, section 2.3): `clip` that keeps contrasts.

    Let m be the `quantile` of an example's distances from the middle of [low, high], in units of half its length, and
    at least 1: data are clipped to m and divided by it. It corrects the saturated images of strong guidance. Raises
    ValueError for a quantile outside (0, 1], or low not below high.
    """
    if not 0 < quantile <= 1 or not low < high:
        raise ValueError(f"quantile must lie in (0, 1] and low below high, got {quantile}, {low} and {high}")
    return Limited(model, partial(_thresholded, quantile=quantile, low=low, high=high))


def _thresholded(data: Tensor, quantile: float, low: float, high: float) -> Tensor:
    middle, reach = (low + high) / 2, (high - low) / 2
    off = (data - middle) / reach
    # by sorting: torch.quantile takes 2^24 numbers at most
    size = off.abs().flatten(1).sort(1).values
    place = quantile * (size.shape[1] - 1)
    below, above = size[:, math.floor(place)], size[:, math.ceil(place)]
    most = like(torch.lerp(below, above, place - math.floor(place)).clamp_min(1), data)
    return middle + reach * torch.maximum(torch.minimum(off, most), -most) / most
