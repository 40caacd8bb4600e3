"""How a network becomes a model: what its output means, what label it gets of the time, and the scale of its input."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..machine.devices import sent
from ..sdes.linear import SDE, WrongShape, add_, like
from .base import Estimate, ScoreModel, at, in_precision_of

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
    """F = noise - x, as in the published code of Kingma et al. 2021: where there is much noise it is small."""
    one = torch.ones_like(alpha)
    return ((1 - sigma) / alpha, -sigma / alpha), (one, one)


def predict_edm(alpha: Tensor, sigma: Tensor, sigma_data: float = 0.5) -> tuple[Row, Row]:
    """F has unit variance and starts at its optimum for Gaussian data of standard deviation `sigma_data`.

    Karras et al. 2022, table 1 and eq. 7, carried over from sigma/alpha to any alpha and sigma.
    """
    var = (alpha * sigma_data) ** 2 + sigma**2
    std = var.sqrt()
    return (alpha * sigma_data**2 / var, sigma * sigma_data / std), (sigma / var, -alpha * sigma_data / std)


def predict_velocity(alpha: Tensor, sigma: Tensor, t: Tensor, sde: SDE) -> tuple[Row, Row]:
    """F = alpha' data + sigma' noise, the probability flow's velocity: what flow matching trains.

    On the straight path of `LinearSDE` it is noise - data (Liu et al. 2023, arXiv:2209.03003; Lipman et al. 2023,
    arXiv:2210.02747), with time from data to noise as everywhere here: theirs runs the other way, with the other sign.
    """
    alpha_rate, sigma_rate = sde.rates(t)
    norm = alpha * sigma_rate - alpha_rate * sigma  # alpha g²/(2 sigma), finite also where alpha is 0
    return (sigma_rate / norm, -sigma / norm), (-alpha_rate / norm, alpha / norm)


def predict_mean(alpha: Tensor, sigma: Tensor, t: Tensor, sde: SDE) -> tuple[Row, Row]:
    """F = mean of x_{i-1} | x_i, x_0, the first parametrisation of Ho et al. 2020 (eq. 7-8), for a chain's SDE.

    Raises ValueError for the SDE of no chain: it has no previous step.
    """
    steps = sde.steps
    if steps is None:
        raise ValueError(f'rule "mean" needs the SDE of a chain (DDPM(...).as_sde()), got {sde}; use rule="data"')
    s = ((t * steps).round() - 1).clamp_min(0) / steps
    scale, std = sde.transition(s, t)
    keep, fresh = scale * (sde.sigma(s) / sigma) ** 2, sde.alpha(s) * (std / sigma) ** 2
    skip, out = -keep / fresh, 1 / fresh
    return (skip, out), ((1 - alpha * skip) / sigma, -alpha * out / sigma)


RuleName = Literal["noise", "residual", "v", "data", "mean", "score", "edm", "velocity"]
RULES: dict[str, Rule] = {
    "noise": predict_noise, "residual": predict_residual, "v": predict_v, "data": predict_data, "score": predict_score,
    "edm": predict_edm,
}  # fmt: skip
TIMED_RULES: dict[str, Callable[..., tuple[Row, Row]]] = {  # of (alpha, sigma, t, sde)
    "mean": predict_mean, "velocity": predict_velocity,
}  # fmt: skip


def label_time(alpha: Tensor, sigma: Tensor, t: Tensor) -> Tensor:
    """999 t: score_sde's label of the VP SDEs, whatever the number of steps."""
    return 999 * t


def label_sigma(alpha: Tensor, sigma: Tensor, t: Tensor) -> Tensor:
    """sigma/alpha: score_sde's label of the VE SDE, whose Fourier embedding takes its logarithm."""
    return sigma / alpha


def label_log_sigma(alpha: Tensor, sigma: Tensor, t: Tensor) -> Tensor:
    """4 log(sigma/alpha): linear in log SNR, and slow enough for solvers.

    The fastest wave of a sinusoidal embedding, sin(label), has a period of 1.6 in log(sigma/alpha). With a much faster
    one the network's output oscillates between an adaptive solver's steps.
    """
    return 4 * torch.log(sigma / alpha)


def label_edm(alpha: Tensor, sigma: Tensor, t: Tensor) -> Tensor:
    """log(sigma/alpha)/4: EDM's c_noise (Karras et al. 2022, table 1)."""
    return torch.log(sigma / alpha) / 4


def label_index(alpha: Tensor, sigma: Tensor, t: Tensor, steps: int) -> Tensor:
    """N t - 1, the index of a step of a chain of N = `steps`; times before the first step have 0."""
    return (steps * t - 1).clamp_min(0)


def unscaled(alpha: Tensor, sigma: Tensor, t: Tensor) -> Tensor:
    """1: the network gets x itself."""
    return torch.ones_like(alpha)


def unit_variance(alpha: Tensor, sigma: Tensor, t: Tensor, sigma_data: float = 0.5) -> Tensor:
    """1/sqrt(alpha² sigma_data² + sigma²): EDM's c_in, an input of unit variance (Karras et al. 2022, eq. 7)."""
    return torch.rsqrt((alpha * sigma_data) ** 2 + sigma**2)


def network_input(model: Any, x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(scale · x, label (B,)) for model.network: a floating-point label in the dtype of x, an integer one as it is."""
    label = model.label(alpha, sigma, t)
    label = sent(label, x.device, x.dtype if label.is_floating_point() else None).expand(x.shape[0])
    scaled = x if model.scale is unscaled else like(model.scale(alpha, sigma, t), x) * x
    return in_precision_of(model.network, scaled), label


class Preconditioned(ScoreModel):
    """A score model from a network F(scale · x, label), by a rule, a time label and an input scale (preconditioning).

    Args:
        network: module ``F(x, label, **condition)`` with an output of x's shape and a label of shape (B,), both
            positional. With `learned_variance` the output has twice x's channels.
        rule: what F means: "noise", "residual", "v", "data", "mean", "score", "edm", "velocity", or a function (alpha,
            sigma) -> 2×2 matrix. "noise", "residual", "score" do not give the data where alpha = 0, as at t = 1 of
            `LinearSDE`.
        label: (alpha, sigma, t) -> (B,), the network's time label; the default is 999 t.
        scale: (alpha, sigma, t) -> (B,), a factor of the network's input; the default is 1.
        learned_variance: the second half w of the output's channels is the estimate's `fraction`, (w + 1)/2, which
            is not clamped to [0, 1] (Nichol & Dhariwal 2021, section 3.1).

    Raises ValueError for an unknown rule.
    """

    def __init__(
        self, network: nn.Module, sde: SDE, rule: RuleName | Rule = "noise", label: TimeMap = label_time,
        scale: TimeMap = unscaled, learned_variance: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(sde)
        if isinstance(rule, str) and rule not in (names := (*RULES, *TIMED_RULES)):
            raise ValueError(f"unknown rule {rule!r}; use one of {', '.join(names)} or a function (alpha, sigma)")
        self.network, self.label, self.scale = network, label, scale
        self.timed = isinstance(rule, str) and rule in TIMED_RULES
        self.rule: Callable[..., tuple[Row, Row]] = rule  # type: ignore[assignment]
        if isinstance(rule, str):
            self.rule = partial(TIMED_RULES[rule], sde=sde) if self.timed else RULES[rule]
        self.learned_variance = learned_variance

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Estimate:
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        (skip, out), (lift, gain) = self.rule(alpha, sigma, *((t,) if self.timed else ()))
        from_x, std = like(skip, x), like(sigma, x)
        y = self.network(*network_input(self, x, t, alpha, sigma), **condition)
        channels = (1 + self.learned_variance) * x.shape[1]
        if y.shape != (x.shape[0], channels, *x.shape[2:]):
            needed = ", which needs twice its channels for learned variances" if self.learned_variance else ""
            raise WrongShape(
                f"the network returned shape {tuple(y.shape)} for an input of shape {tuple(x.shape)} at {at(t)}{needed}"
            )
        y, fraction = y.to(x.dtype), None
        if self.learned_variance:
            y, w = y.chunk(2, dim=1)
            fraction = (w + 1) / 2
        return Estimate(add_(from_x * x, out, y), add_(like(lift, x) * x, gain, y), std, fraction)
