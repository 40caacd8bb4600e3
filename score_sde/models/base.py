"""Score models: what they return, how conditions are bound to them, and how any score function becomes one.

A model is a callable ``model(x, t) -> Estimate``: given x_t = alpha(t) x_0 + sigma(t) z it returns its estimates of
E[x_0 | x_t] and E[z | x_t]. By Tweedie's formula the score is -E[z | x_t]/sigma (Efron 2011; Vincent 2011). Networks,
closed forms, guided models and checkpoints of other projects are all models, so samplers, losses and likelihoods take
each of them without knowing which it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..machine.devices import sent
from ..sdes.linear import SDE, WrongShape, add_, like


class Estimate(NamedTuple):
    """E[x_0 | x_t] and E[z | x_t], of x_t's shape, with x_t = alpha data + sigma noise; sigma broadcasts against both.

    Both are kept because to compute one from the other one divides by alpha or sigma, which may vanish. A model with
    learned variances of its reverse steps also returns `fraction`, of x_t's shape, for `reverse_log_variance`.
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

    What a model holds for each example of a batch, such as labels, is in its `condition`, for `of_examples`. Raises
    WrongShape, a ValueError, for an estimate that does not have x's shape: it would be broadcast silently.
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
    """Times as text: "t = 0.5", or the smallest and the largest of several."""
    low, high = (f"{edge.item():.4g}" for edge in (t.min(), t.max())) if t.numel() else ("none", "none")
    return f"t = {low}" if low == high else f"t = {low} to {high}"


def check_finite(terms: Tensor, t: Tensor, name: str) -> None:
    """Raise FloatingPointError where terms (B, K), computed from estimates at t, (K,) or (B, K), are not finite."""
    bad = ~terms.isfinite().cpu()
    if bool(bad.any()):
        k = int(bad.any(0).nonzero()[0])
        raise FloatingPointError(
            f"term {k + 1} of {terms.shape[1]} of {name} is not finite for {int(bad[:, k].sum())} of {len(terms)} "
            f"examples, at {at(t.expand(terms.shape)[bad[:, k], k])}: check the model there"
        )


def in_precision_of(network: Any, x: Tensor) -> Tensor:
    """x in the dtype of a module's first parameter; x itself for other callables and modules without parameters.

    States are kept in float32 or float64; a network may compute in bfloat16.
    """
    p = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    return x if p is None or not p.is_floating_point() else x.to(p.dtype)


def with_graph(h: Callable[[Tensor], Any], x: Tensor) -> tuple[Any, Tensor, bool]:
    """(h(y), y, whether gradients are enabled), with a graph from h(y) to y also where they are disabled.

    y has x's value; it is x itself where gradients are enabled and x requires one. Attention is then computed in plain
    operations: fused kernels have no second derivative.
    """
    graph = torch.is_grad_enabled()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH) if graph else nullcontext():
        y = x if graph and x.requires_grad else x.detach().requires_grad_()
        return h(y), y, graph


def absent(value: Tensor) -> Tensor:
    """The value for "no condition", shaped as `value`: -1 for labels (integers), False for masks, 0 for numbers.

    A model that was trained with some conditions replaced by it is unconditional there.
    """
    return torch.full_like(value, False if value.dtype == torch.bool else 0 if value.is_floating_point() else -1)


class Given(ScoreModel):
    """`model` with `condition` bound; later conditions are added to it."""

    def __init__(self, model: ScoreModel, condition: dict[str, Any]) -> None:
        super().__init__(model.sde)
        self.model, self.condition = model, condition

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Estimate:
        return self.model(x, t, **{**self.condition, **condition})

    def given(self, **condition: Any) -> ScoreModel:
        return Given(self.model, {**self.condition, **condition})


class Counted(ScoreModel):
    """`model` with its evaluations counted in `nfe`."""

    def __init__(self, model: ScoreModel) -> None:
        super().__init__(model.sde)
        self.model, self.nfe = model, 0

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Estimate:
        self.nfe += 1
        return self.model(x, t, **condition)


@contextmanager
def of_examples(model: ScoreModel, rows: Tensor, batch: int) -> Iterator[None]:
    """Within it, the conditions that `model` has for `batch` examples are reduced to those of the examples `rows`.

    These are the tensors (B, ...) in the `condition` of each of its `conditioned` modules. As many rows as examples
    are taken as all of them in order; more rows repeat examples.
    """
    modules = conditioned(model) if len(rows) != batch else []
    whole = [m.condition for m in modules]

    def chosen(value: object) -> object:
        each = isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch
        return value[sent(rows, value.device)] if each else value  # type: ignore[index,attr-defined]

    try:
        for m, condition in zip(modules, whole, strict=True):
            m.condition = {name: chosen(value) for name, value in condition.items()}
        yield
    finally:
        for m, condition in zip(modules, whole, strict=True):
            m.condition = condition


def conditioned(model: nn.Module) -> list[ScoreModel]:
    """The score models within a model that have a condition bound."""
    return [m for m in model.modules() if isinstance(m, ScoreModel) and m.condition]


class FromScore(ScoreModel):
    """A score function (x, t) -> score as a model: noise = -sigma score, data = (x + sigma² score)/alpha."""

    def __init__(self, sde: SDE, fn: Callable[..., Tensor]) -> None:
        super().__init__(sde)
        self.fn = fn

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Estimate:
        score = self.score(x, t, **condition)
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        data = add_(x / like(alpha, x), sigma**2 / alpha, score)
        return Estimate(data, score * -like(sigma, x), like(sigma, x))

    def score(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        score = self.fn(in_precision_of(self.fn, x), t, **condition)
        if score.shape != x.shape:
            raise WrongShape(f"a score has shape {tuple(score.shape)} for a state of shape {tuple(x.shape)} at {at(t)}")
        return score.to(x.dtype)


def from_score(sde: SDE, fn: Callable[..., Tensor]) -> ScoreModel:
    """A model from any callable ``score(x, t) -> Tensor`` of x's shape; it has the parameters of an nn.Module."""
    return FromScore(sde, fn)


def default_state(
    model: nn.Module | Tensor, dtype: torch.dtype | None, device: torch.device | str | None
) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of a state: those passed; else those of the model's first parameter or buffer, or of a state.

    Without any they are float32 and the CPU. For a model in half precision a state is float32: its rounding would lose
    the increments of many steps.
    """
    tensors = (model,) if isinstance(model, Tensor) else (*model.parameters(), *model.buffers())
    like = next((p for p in tensors if p.is_floating_point()), None)
    dtype = dtype or (torch.float32 if like is None else torch.promote_types(like.dtype, torch.float32))
    return dtype, torch.device(device if device is not None else "cpu" if like is None else like.device)
