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
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .devices import sent
from .sdes import SDE, WrongShape, add_, like


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


Variance = Literal["small", "large", "learned"]


def reverse_log_variance(estimate: Estimate, small: Tensor, large: Tensor, variance: Variance) -> Tensor:
    """Log variance of the model's Gaussian x_s | x_t, to broadcast against x_t.

    "small" is the posterior's beta-tilde (`small`) and "large" the forward step's beta (`large`), both of shape () or
    (B,): the least and the most that data of standard deviation 0 and 1 ask for (Ho et al. 2020, section 3.2).
    "learned" lies between them, on a log scale: fraction log beta + (1 - fraction) log beta-tilde (Nichol & Dhariwal
    2021, arXiv:2102.09672, eq. 15), of any two times. Raises ValueError where the estimate holds no fraction.
    """
    low, high = like(small.log(), estimate.data), like(large.log(), estimate.data)
    if variance != "learned":
        return low if variance == "small" else high
    if estimate.fraction is None:
        raise ValueError(
            'the model has no learned variances: use variance="small" or "large", or train one with '
            "Preconditioned(..., learned_variance=True)"
        )
    return low + estimate.fraction * (high - low)


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


# A rule says what the network's output F means: data = skip x + out F and noise = lift x + gain F, as the matrix
# ((skip, out), (lift, gain)). Each obeys alpha data + sigma noise = x for every F.
Row = tuple[Tensor, Tensor]
Rule = Callable[[Tensor, Tensor], tuple[Row, Row]]
TimeMap = Callable[[Tensor, Tensor, Tensor], Tensor]  # (alpha, sigma, t) -> (B,)


def predict_noise(alpha: Tensor, sigma: Tensor) -> tuple[Row, Row]:
    """F = noise (Ho et al. 2020, eq. 12)."""
    return (1 / alpha, -sigma / alpha), (torch.zeros_like(alpha), torch.ones_like(alpha))


def predict_data(alpha: Tensor, sigma: Tensor) -> tuple[Row, Row]:
    """F = data."""
    return (torch.zeros_like(alpha), torch.ones_like(alpha)), (1 / sigma, -alpha / sigma)


def predict_score(alpha: Tensor, sigma: Tensor) -> tuple[Row, Row]:
    """F = score."""
    return (1 / alpha, sigma**2 / alpha), (torch.zeros_like(alpha), -sigma)


def predict_v(alpha: Tensor, sigma: Tensor) -> tuple[Row, Row]:
    """F = alpha noise - sigma data (Salimans & Ho 2022, arXiv:2202.00512, section 4), here for any alpha and sigma."""
    norm = alpha**2 + sigma**2
    return (alpha / norm, -sigma / norm), (sigma / norm, alpha / norm)


def predict_residual(alpha: Tensor, sigma: Tensor) -> tuple[Row, Row]:
    """F = noise - x, as the open code of Kingma et al. 2021 has it: at much noise it is small."""
    one = torch.ones_like(alpha)
    return ((1 - sigma) / alpha, -sigma / alpha), (one, one)


def predict_edm(alpha: Tensor, sigma: Tensor, sigma_data: float = 0.5) -> tuple[Row, Row]:
    """F has unit variance and starts at its optimum for Gaussian data of standard deviation `sigma_data`.

    Karras et al. 2022, table 1 and eq. 7, carried over from sigma/alpha to any alpha and sigma.
    """
    var = (alpha * sigma_data) ** 2 + sigma**2
    std = var.sqrt()
    return (alpha * sigma_data**2 / var, sigma * sigma_data / std), (sigma / var, -alpha * sigma_data / std)


def predict_mean(alpha: Tensor, sigma: Tensor, sde: SDE) -> tuple[Row, Row]:
    """F = mean of x_{i-1} | x_i, x_0, the first parametrisation of Ho et al. 2020 (eq. 7-8); for a chain's SDE.

    Raises ValueError where `sde` is not a chain's: a continuous SDE has no previous step.
    """
    steps = getattr(sde, "steps", None)
    if steps is None:
        raise ValueError(f'rule "mean" needs the SDE of a chain (DDPM(...).as_sde()), got {sde}; use rule="data"')
    t = sde.time(2 * torch.log(alpha / sigma))
    s = ((t * steps).round() - 1).clamp_min(0) / steps
    scale, std = sde.transition(s, t)
    keep, fresh = scale * (sde.sigma(s) / sigma) ** 2, sde.alpha(s) * (std / sigma) ** 2
    skip, out = -keep / fresh, 1 / fresh
    return (skip, out), ((1 - alpha * skip) / sigma, -alpha * out / sigma)


RuleName = Literal["noise", "residual", "v", "data", "mean", "score", "edm"]
RULES: dict[str, Rule] = {
    "noise": predict_noise,
    "residual": predict_residual,
    "v": predict_v,
    "data": predict_data,
    "score": predict_score,
    "edm": predict_edm,
}


def label_time(alpha: Tensor, sigma: Tensor, t: Tensor) -> Tensor:
    """999 t: score_sde's label of the VP SDEs, whatever the number of steps."""
    return 999 * t


def label_sigma(alpha: Tensor, sigma: Tensor, t: Tensor) -> Tensor:
    """sigma/alpha: score_sde's label of the VE SDE, whose Fourier embedding takes its logarithm."""
    return sigma / alpha


def label_log_sigma(alpha: Tensor, sigma: Tensor, t: Tensor) -> Tensor:
    """4 log(sigma/alpha): even in log-SNR, and slow enough for solvers.

    The fastest wave of a sinusoidal embedding, sin(label), has a period of 1.6 in log(sigma/alpha). With much faster
    ones a network's answer swings between an adaptive solver's steps.
    """
    return 4 * torch.log(sigma / alpha)


def label_edm(alpha: Tensor, sigma: Tensor, t: Tensor) -> Tensor:
    """log(sigma/alpha)/4: EDM's c_noise (Karras et al. 2022, table 1)."""
    return torch.log(sigma / alpha) / 4


def unscaled(alpha: Tensor, sigma: Tensor, t: Tensor) -> Tensor:
    """1: the network sees x itself."""
    return torch.ones_like(alpha)


def unit_variance(alpha: Tensor, sigma: Tensor, t: Tensor, sigma_data: float = 0.5) -> Tensor:
    """1/sqrt(alpha² sigma_data² + sigma²): EDM's c_in, the network sees unit variance (Karras et al. 2022, eq. 7)."""
    return torch.rsqrt((alpha * sigma_data) ** 2 + sigma**2)


class Preconditioned(ScoreModel):
    """A network F(scale · x, label) made a model by a rule, a label and an input scale.

    Args:
        network: module ``F(x, label, **condition)`` with an output of x's shape and a label of shape (B,), both given
            by position. With `learned_variance` the output has twice x's channels.
        sde: whose marginals the model describes.
        rule: what F means: "noise", "residual", "v", "data", "mean", "score", "edm", or a function (alpha, sigma) ->
            2×2 matrix.
        label: (alpha, sigma, t) -> (B,), what the network is told about the time; the default is 999 t.
        scale: (alpha, sigma, t) -> (B,), a factor of the network's input; the default is 1.
        learned_variance: the second half w of the output's channels is the estimate's `fraction`, (w + 1)/2, which
            is not held to [0, 1] (Nichol & Dhariwal 2021, section 3.1).

    Raises ValueError for an unknown rule.
    """

    def __init__(
        self,
        network: nn.Module,
        sde: SDE,
        rule: RuleName | Rule = "noise",
        label: TimeMap = label_time,
        scale: TimeMap = unscaled,
        learned_variance: bool = False,
    ) -> None:
        super().__init__(sde)
        named: dict[str, Rule] = {**RULES, "mean": partial(predict_mean, sde=sde)}
        if isinstance(rule, str) and rule not in named:
            raise ValueError(f"unknown rule {rule!r}; use one of {', '.join(named)} or a function (alpha, sigma)")
        self.network, self.label, self.scale = network, label, scale
        self.rule = named[rule] if isinstance(rule, str) else rule
        self.learned_variance = learned_variance

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Estimate:
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        (skip, out), (lift, gain) = self.rule(alpha, sigma)
        from_x, std = like(skip, x), like(sigma, x)
        label = self.label(alpha, sigma, t)
        label = sent(label, x.device, x.dtype if label.is_floating_point() else None).expand(x.shape[0])
        scaled = x if self.scale is unscaled else like(self.scale(alpha, sigma, t), x) * x
        y = self.network(in_precision_of(self.network, scaled), label, **condition)
        channels = (1 + self.learned_variance) * x.shape[1]
        if y.shape != (x.shape[0], channels, *x.shape[2:]):
            wanted = ", which needs twice its channels for learned variances" if self.learned_variance else ""
            raise WrongShape(
                f"the network returned shape {tuple(y.shape)} for an input of shape {tuple(x.shape)} at {at(t)}{wanted}"
            )
        y, fraction = y.to(x.dtype), None
        if self.learned_variance:
            y, w = y.chunk(2, dim=1)
            fraction = (w + 1) / 2
        return Estimate(add_(from_x * x, out, y), add_(like(lift, x) * x, gain, y), std, fraction)
