"""What a score model answers with, and how a network becomes one.

A model is a callable ``model(x, t) -> Estimate``: given x_t = alpha(t) x_0 + sigma(t) z it returns its estimates of
E[x_0 | x_t] and E[z | x_t]. By Tweedie's formula the score is -E[z | x_t]/sigma (Efron 2011; Vincent 2011). Networks,
closed forms, guided models and checkpoints of other projects are all models, so samplers, losses and likelihoods never
ask what they hold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..machine.devices import sent
from ..sdes.linear import SDE, WrongShape, add_, like


class Estimate(NamedTuple):
    """E[x_0 | x_t] and E[z | x_t], of x_t's shape, with x_t = alpha data + sigma noise; sigma broadcasts against both.

    Both halves are kept because neither can be had from the other without dividing by something that vanishes.
    `fraction`, where a model learned the variances of its reverse steps, is what `reverse_log_variance` makes them of;
    it has x_t's shape too.
    """

    data: Tensor
    noise: Tensor
    sigma: Tensor
    fraction: Tensor | None = None

    @property
    def score(self) -> Tensor:
        """Gradient of log p_t(x): -noise / sigma."""
        return self.noise / -self.sigma


class ScoreModel(nn.Module, ABC):
    """A map ``(x, t, **condition) -> Estimate`` for the marginals of `sde`; x is (B, *shape), t is () or (B,).

    What a model holds of the examples at hand, such as their labels, is kept in its `condition`, for `of_examples`.

    Raises WrongShape, a ValueError, for an estimate that is not of x's shape: it would be broadcast without a word.
    """

    def __init__(self, sde: SDE) -> None:
        super().__init__()
        self.sde = sde
        self.condition: dict[str, Any] = {}
        if sde.module is not None:
            self.schedule = sde.module

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, *args: Any, **condition: Any) -> Estimate:
        """The estimate at state x and time t."""

    def given(self, **condition: Any) -> ScoreModel:
        """The model with a condition bound, e.g. ``model.given(label=y)``: again a model of (x, t)."""
        return Given(self, condition)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """Gradient of log p_t at x, of x's shape."""
        return self(x, t).score

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Estimate:
        if not isinstance(t, Tensor):
            raise ValueError(
                f"t must be a tensor of shape () or ({len(x)},), got {type(t).__name__}: pass torch.as_tensor(t)"
            )
        estimate: Estimate = super().__call__(x, t, **condition)
        for name, value in (("data", estimate.data), ("noise", estimate.noise)):
            if value.shape != x.shape:
                raise WrongShape(
                    f"{type(self).__name__} returned {name} of shape {tuple(value.shape)} for a state of shape "
                    f"{tuple(x.shape)} at {at(t)}"
                )
        return estimate


def at(t: Tensor) -> str:
    """Times in words: "t = 0.5", or the first and last of several."""
    low, high = (f"{edge.item():.4g}" for edge in (t.min(), t.max())) if t.numel() else ("none", "none")
    return f"t = {low}" if low == high else f"t = {low} to {high}"


def check_finite(terms: Tensor, t: Tensor, name: str) -> None:
    """Raise FloatingPointError where terms (B, K), made of estimates at t, (K,) or (B, K), are not finite."""
    bad = ~terms.isfinite().cpu()
    if bool(bad.any()):
        k = int(bad.any(0).nonzero()[0])
        raise FloatingPointError(
            f"term {k + 1} of {terms.shape[1]} of {name} is not finite for {int(bad[:, k].sum())} of {len(terms)} "
            f"examples, at {at(t.expand(terms.shape)[bad[:, k], k])}: check the model there"
        )


def in_precision_of(part: Any, x: Tensor) -> Tensor:
    """x in the floating-point type of a module's first parameter; x itself for other callables and without parameters.

    States are kept in float32 or float64; a network may compute in bfloat16.
    """
    p = next(part.parameters(), None) if isinstance(part, nn.Module) else None
    return x if p is None or not p.is_floating_point() else x.to(p.dtype)


def twice_differentiable(wanted: bool = True) -> AbstractContextManager[None]:
    """Attention in plain operations, if `wanted`: the fused kernels have no second derivative."""
    return sdpa_kernel(SDPBackend.MATH) if wanted else nullcontext()


def absent(value: Tensor) -> Tensor:
    """What stands for no condition where `value` does for one: -1 for labels (integers), False in masks, 0 in numbers.

    A model that was trained with such examples among the others is unconditional where it is given them.
    """
    return torch.full_like(value, False if value.dtype == torch.bool else 0 if value.is_floating_point() else -1)


class Given(ScoreModel):
    """`model` with `condition` bound; conditions given later are added to it."""

    def __init__(self, model: ScoreModel, condition: dict[str, Any]) -> None:
        super().__init__(model.sde)
        self.model, self.condition = model, condition

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Estimate:
        return self.model(x, t, **{**self.condition, **condition})

    def given(self, **condition: Any) -> ScoreModel:
        return Given(self.model, {**self.condition, **condition})


class Counted(ScoreModel):
    """`model`, whose evaluations are counted in `nfe`."""

    def __init__(self, model: ScoreModel) -> None:
        super().__init__(model.sde)
        self.model, self.nfe = model, 0

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Estimate:
        self.nfe += 1
        return self.model(x, t, **condition)


@contextmanager
def of_examples(model: ScoreModel, rows: Tensor, batch: int) -> Iterator[None]:
    """Within it, what `model` is given for each of `batch` examples is that of the examples `rows`.

    That is each tensor (B, ...) in a part's `condition`, as `bound` finds them. As many rows as examples are all, in
    order; more repeat them.
    """
    parts = bound(model) if len(rows) != batch else []
    whole = [m.condition for m in parts]

    def chosen(value: object) -> object:
        each = isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch
        return value[sent(rows, value.device)] if each else value  # type: ignore[index,attr-defined]

    try:
        for m, condition in zip(parts, whole, strict=True):
            m.condition = {name: chosen(value) for name, value in condition.items()}
        yield
    finally:
        for m, condition in zip(parts, whole, strict=True):
            m.condition = condition


def bound(model: nn.Module) -> list[ScoreModel]:
    """The parts of a model that something is bound to: score models with a `condition`, a dict."""
    return [m for m in model.modules() if isinstance(m, ScoreModel) and m.condition]


class FromScore(ScoreModel):
    """A score function (x, t) -> score, lifted to a model: noise = -sigma score, data = (x + sigma² score)/alpha."""

    def __init__(self, sde: SDE, fn: Callable[..., Tensor]) -> None:
        super().__init__(sde)
        self.fn = fn

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Estimate:
        score = self._score(x, t, **condition)
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        data = add_(x / like(alpha, x), sigma**2 / alpha, score)
        return Estimate(data, score * -like(sigma, x), like(sigma, x))

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        return self._score(x, t)

    def _score(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        score = self.fn(in_precision_of(self.fn, x), t, **condition)
        if score.shape != x.shape:
            raise WrongShape(
                f"the score has shape {tuple(score.shape)} for a state of shape {tuple(x.shape)} at {at(t)}"
            )
        return score.to(x.dtype)


def from_score(sde: SDE, fn: Callable[..., Tensor]) -> ScoreModel:
    """Lift any callable ``score(x, t) -> Tensor`` of x's shape to a model; an nn.Module's parameters come along."""
    return FromScore(sde, fn)


def default_state(
    model: nn.Module | Tensor, dtype: torch.dtype | None, device: torch.device | str | None
) -> tuple[torch.dtype, torch.device]:
    """Those given; else those of the state, or of the model's first parameter or buffer; else float32 on the CPU.

    A state is float32 for a model in half precision: the increments of many steps would be lost in its rounding.
    """
    known = (model,) if isinstance(model, Tensor) else (*model.parameters(), *model.buffers())
    like = next((p for p in known if p.is_floating_point()), None)
    dtype = dtype or (torch.float32 if like is None else torch.promote_types(like.dtype, torch.float32))
    return dtype, torch.device(device if device is not None else "cpu" if like is None else like.device)
