"""Guidance: models in, a model out, so that no sampler has a condition argument.

A conditional score is the unconditional score plus the score of the condition,

    grad log p_t(x | y) = grad log p_t(x) + grad log p_t(y | x).

`classifier` adds the last term as it stands, `guide` takes it for the difference of two models' scores, and both may
multiply it. By a scale s other than 0 and 1 this is the score of p(x) p(y | x)^s at t = 0, and at no other time that of
this law with noise: what samplers make of it is near it and no more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..machine.devices import sent
from ..sdes.linear import SDE, like, some
from .base import Estimate, Given, ScoreModel, absent, bound, in_precision_of, twice_differentiable

Scale = float | Tensor  # one for all examples, or (B,)


class Guided(ScoreModel):
    """reference + scale (model - reference), in data and noise alike; learned variances are those of `model`.

    Where sigma/alpha does not lie in (low, high] it is `model`, and where all examples' do not, one evaluation of it.
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
        # sizes of single dimensions: of one alone there is none, and nothing to bring back
        size, wanted = (v.flatten(1).std(1, correction=0) for v in (data, b.data))
        ratio = torch.where(size > 0, wanted / size, 1.0)
        return with_data(self.sde, guided, like(1 + self.rescale * (ratio - 1), x) * data, t)


def guide(
    model: ScoreModel,
    reference: ScoreModel,
    scale: Scale,
    *,
    low: float = 0.0,
    high: float = math.inf,
    rescale: float = 0.0,
) -> ScoreModel:
    """Classifier-free guidance and autoguidance: scale 0 is `reference`, 1 is `model`, above 1 extrapolates.

    Ho & Salimans 2022 (arXiv:2207.12598), eq. 6, whose w is scale - 1, as in ``guide(model.given(label=y),
    model.given(label=None), 2.0)``: both evaluations are made in one batch. A label in the place of None is one to lead
    away from. Autoguidance takes a weaker model of the same data for the reference (Karras et al. 2024,
    arXiv:2406.02507).

    Args:
        scale: of all examples, or (B,).
        low, high: guidance is limited to low < sigma/alpha <= high (Kynkäänniemi et al. 2024, arXiv:2404.07724);
            elsewhere it is `model` alone.
        rescale: how far, from 0 to 1, the deviation of each example's estimate of the data is brought back to that of
            `model`'s (Lin et al. 2023, arXiv:2305.08891, section 3.4, phi), where large scales saturate images.

    Raises ValueError where the SDEs differ, low is not below high, or rescale is not in [0, 1].
    """
    if model.sde != reference.sde:
        raise ValueError(f"both models must share one SDE, got {_apart(model.sde, reference.sde)}")
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale must lie between 0 and 1, got {rescale:g}")
    return Guided(model, reference, checked(scale, low, high), low, high, rescale)


def _apart(a: SDE, b: SDE) -> str:
    """Two SDEs that differ, in words, also where they print alike, as learned schedules and chains may."""
    if repr(a) != repr(b):
        return f"{a} and {b}"
    t = torch.linspace(max(a.t_min, b.t_min, 1e-3), 1, 101, dtype=torch.float64)
    with torch.no_grad():
        gap = (a.log_snr(t) - b.log_snr(t)).abs()
    i = int(gap.argmax())
    return f"two of the kind {a}, whose log SNRs are up to {gap[i]:.3g} apart, at t = {t[i]:.2g}"


class Classified(ScoreModel):
    """`model` with scale grad log_prob(x, t) added to its score, where sigma/alpha lies in (low, high]."""

    def __init__(
        self,
        model: ScoreModel,
        log_prob: Callable[..., Tensor],
        scale: Scale,
        low: float,
        high: float,
        condition: dict[str, Any],
    ) -> None:
        super().__init__(model.sde)
        self.model, self.log_prob, self.low, self.high = model, log_prob, low, high
        self.condition = {"scale": scale, **condition}

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Estimate:
        e = self.model(x, t, **condition)
        told = dict(self.condition)
        scale = within(self.sde, t, self.low, self.high, told.pop("scale"), 0.0)
        if scale is None:
            return e
        score = like(scale, x) * gradient(self.log_prob, x, t, **told)
        sigma = self.sde.sigma(t)
        noise = e.noise - like(sigma, x) * score
        return e._replace(data=e.data + like(sigma**2 / self.sde.alpha(t), x) * score, noise=noise)


def classifier(
    model: ScoreModel,
    log_prob: Callable[..., Tensor],
    scale: Scale = 1.0,
    *,
    low: float = 0.0,
    high: float = math.inf,
    **condition: Any,
) -> ScoreModel:
    """Classifier guidance: the score of `model` plus scale grad_x log p(y | x_t), of any log p that has a gradient.

    Song et al. 2021, section 5 (scale 1); Dhariwal & Nichol 2021 (arXiv:2105.05233), section 4.

    Args:
        model: of the data; of the data given y, too (Dhariwal & Nichol, table 4).
        log_prob: (x, t, **condition) -> (B,), the log probability, up to a constant, of what the samples are to be
            given x_t: a trained `Classifier`, or any function, such as ``lambda x, t: -(x - y).square().flatten(1)
            .sum(1)``. It must know noisy states.
        scale: of all examples, or (B,).
        low, high: guidance is limited to low < sigma/alpha <= high; elsewhere it is `model` alone.
        condition: given to log_prob as well; what is (B, ...) goes with its example, as in ``classifier(model,
            load_classifier("runs/classifier_digits"), 2.0, label=y)``.

    Raises ValueError where log_prob belongs to another SDE or low is not below high.
    """
    known = getattr(log_prob, "sde", model.sde)
    if known != model.sde:
        raise ValueError(f"classifier and model must share one SDE, got {known} and {model.sde}")
    return Classified(model, log_prob, checked(scale, low, high), low, high, condition)


def gradient(log_prob: Callable[..., Tensor], x: Tensor, t: Tensor, **condition: Any) -> Tensor:
    """Gradient in x of log_prob(x, t, **condition), (B,), also where none is wanted of x itself.

    Where one is, of samples or for a likelihood's divergence, the gradient has a gradient too. Raises ValueError for a
    log_prob that is not (B,), or has no gradient in x.
    """
    create = torch.is_grad_enabled()
    with torch.enable_grad():
        y = x if create and x.requires_grad else x.detach().requires_grad_()
        with twice_differentiable(create):
            value = log_prob(in_precision_of(log_prob, y), t, **condition)
        if value.shape != x.shape[:1]:
            raise ValueError(f"log_prob must return one value per example, ({len(x)},), got {tuple(value.shape)}")
        if not value.requires_grad:
            raise ValueError("log_prob has no gradient in x: compute it by torch, without detach or torch.no_grad")
        return torch.autograd.grad(value.sum(), y, create_graph=create)[0]


def within(sde: SDE, t: Tensor, low: float, high: float, scale: Scale, outside: float) -> Tensor | None:
    """The scale where low < sigma/alpha <= high, (B,) or (), else `outside`; None if all are."""
    ratio = sde.sigma(t) / sde.alpha(t)
    inside = (low < ratio) & (ratio <= high)
    if not some(inside):
        return None
    value = torch.as_tensor(scale, dtype=ratio.dtype)
    return torch.where(sent(inside, value.device), value, outside)


def checked(scale: Scale, low: float, high: float) -> Scale:
    """`scale`. Raises ValueError for one that is no number or (B,), and for an interval that is none."""
    if not 0 <= low < high:
        raise ValueError(f"guidance must lie between 0 <= low < high, got low={low:g} and high={high:g}")
    if isinstance(scale, Tensor) and scale.ndim > 1:
        raise ValueError(f"scale must be a number, or (B,), one for each example; got shape {tuple(scale.shape)}")
    return scale


def both(first: ScoreModel, second: ScoreModel, x: Tensor, t: Tensor) -> tuple[Estimate, Estimate]:
    """The estimates of two models at one state; in one batch where they are one model given different conditions."""
    a, b = (m if isinstance(m, Given) else Given(m, {}) for m in (first, second))
    if a.model is not b.model or bound(a.model):  # what is bound further inside is of as many examples as there are
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


def with_data(sde: SDE, e: Estimate, data: Tensor, t: Tensor) -> Estimate:
    """The estimate with other data, and the noise that goes with them: alpha data + sigma noise stays."""
    return e._replace(data=data, noise=e.noise + like(sde.alpha(t) / sde.sigma(t), data) * (e.data - data))


class Clipped(ScoreModel):
    """`model` with its estimate of the data held to [low, high], and the noise that goes with it."""

    def __init__(self, model: ScoreModel, low: float, high: float) -> None:
        super().__init__(model.sde)
        self.model, self.low, self.high = model, low, high

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Estimate:
        e = self.model(x, t, **condition)
        return with_data(self.sde, e, e.data.clamp(self.low, self.high), t)


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
        return with_data(self.sde, e, middle + reach * torch.maximum(torch.minimum(off, most), -most) / most, t)


def threshold(model: ScoreModel, quantile: float = 0.995, low: float = -1.0, high: float = 1.0) -> ScoreModel:
    """Dynamic thresholding (Saharia et al. 2022, arXiv:2205.11487, section 2.3): `clip` that keeps contrasts.

    With m the given quantile of an example's distances from the middle of [low, high], in units of half its length, and
    at least 1, data are held within m and divided by it. Strong guidance saturates images; this brings them back.
    Raises ValueError for a quantile outside (0, 1], or low not below high.
    """
    if not 0 < quantile <= 1 or not low < high:
        raise ValueError(f"quantile must lie in (0, 1] and low below high, got {quantile}, {low} and {high}")
    return Thresholded(model, quantile, low, high)
