"""Score matching without noise, implicit, sliced and by finite differences: losses that need only samples x of p.

For one example the functional of Hyvärinen (2005, eq. 4), summed over dimensions, and its mean by integration by parts
(p s must vanish at infinity) are

    J(x) = |s(x)|²/2 + tr(ds/dx),        E_p J = E_p |s - grad log p|²/2 - E_p |grad log p|²/2:

the Fisher divergence of the score s to the truth, up to a constant of the data. `implicit` is J itself, `sliced` and
`finite_difference` estimate it at a cost that does not grow with the dimension, from random directions v with
E v v^T = I. `explicit` is the first term for a known truth, and `denoising_at` a form of it for smoothed p.

A model here is a `ScoreModel`, any callable ``score(x, t)`` of x's shape, or an `Energy`, a scalar network whose
negative gradient is the score. x is (B, *shape) of any rank, from any time-dependent density; t, () or (B,), is only
passed to the model. All results are (B,), and differentiable in the model's parameters and in x where gradients are
enabled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..models.base import ScoreModel, with_graph
from ..models.traces import BLOCK, differentiable, quadratic_forms
from ..sdes.linear import like

Score = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> score, of x's shape


class Energy(nn.Module):
    """Energy-based model: a network ``E(x, t) -> (B,)``; calling it gives -dE/dx, the score of exp(-E) up to a factor.

    It works where gradients are disabled too, so ``from_score(sde, Energy(network))`` is a model like any other.
    """

    def __init__(self, network: nn.Module | Score) -> None:
        super().__init__()
        self.network = network

    def energy(self, x: Tensor, t: Tensor) -> Tensor:
        """E(x, t), (B,). Raises ValueError where the network returns another shape."""
        e = self.network(x, t)
        if e.shape != x.shape[:1]:
            raise ValueError(f"an energy must have shape ({x.shape[0]},), one value per example, got {tuple(e.shape)}")
        return e

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        energy, y, graph = with_graph(lambda y: self.energy(y, t), x)
        return torch.autograd.grad(energy, y, -torch.ones_like(energy), create_graph=graph)[0]


def implicit(model: ScoreModel | Score, x: Tensor, t: Tensor, *, limit: int = 1024, products: int = BLOCK) -> Tensor:
    """|s|²/2 + tr(ds/dx) with the exact trace, (B,) (Hyvärinen 2005, eq. 4; its sample average is eq. 8).

    It takes D vector-Jacobian products per example, for dimension D. `products`, over all examples, are computed at a
    time and held for the backward pass; if there are more, the backward pass of an nn.Module computes each block again,
    which bounds the memory. Raises ValueError for D beyond the limit, or where the score has no gradient in x.
    """
    d, batch = math.prod(x.shape[1:]), len(x)
    if d > limit:
        raise ValueError(
            f"the exact trace takes a backward pass for each of {d} dimensions, more than limit={limit}: use sliced, "
            "whose cost does not grow with the dimension, or raise the limit"
        )
    units = torch.eye(d, dtype=x.dtype, device=x.device).reshape(d, 1, *x.shape[1:])
    blocks = units.split(max(products // max(batch, 1), 1))
    trainable = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
    if len(blocks) > 1 and trainable and torch.is_grad_enabled():
        value = _squares(_score_of(model)(x, t)) / 2
        for e in blocks:
            value = value + _Recomputed.apply(partial(_block_of_trace, model, t=t, e=e), x, *trainable)
        return value
    s, y, graph = _score_and_input(model, x, t)
    value = _squares(s) / 2
    for e in blocks:
        value = value + quadratic_forms(s, y, e.expand(-1, *x.shape), graph).sum(0)
    return value


def sliced(model: ScoreModel | Score, x: Tensor, t: Tensor, v: Tensor, variance_reduced: bool = True) -> Tensor:
    """Sliced score matching: mean over `projections` v (M, B, *shape) of v^T (ds/dx) v + |s|²/2, or + (v^T s)²/2; (B,).

    Song et al. 2019 (arXiv:1905.07088), eq. 8, `variance_reduced`, and 7: unbiased for `implicit` where E v v^T = I.
    For Gaussian v the variance-reduced form need not have the lower variance; for Rademacher v it usually has, and is
    exact for a diagonal ds/dx. Raises ValueError for another shape of v, or where the score has no gradient in x.
    """
    _check_projections(x, v)
    s, y, graph = _score_and_input(model, x, t)
    traces = quadratic_forms(s, y, v, graph)
    squares = _squares(s) if variance_reduced else (s * v).flatten(2).sum(2).square()
    return (squares / 2 + traces).mean(0)


def finite_difference(
    model: ScoreModel | Score, x: Tensor, t: Tensor, v: Tensor, step: float | Tensor = 1e-2
) -> Tensor:
    """Sliced score matching from differences over x ± step v, without a derivative in x; (B,), off by O(step²).

    Pang et al. 2020 (arXiv:2007.03317), with their eps v, |v| = 1, written as step v, E v v^T = I. An `Energy` takes
    three values of E per projection and gives the plain form of `sliced`; a score two, and the variance-reduced form:

        (E₊ - E₋)²/(8 step²) - (E₊ + E₋ - 2 E)/step²,      |(s₊ + s₋)/2|²/2 + v^T (s₊ - s₋)/(2 step).

    v is (M, B, *shape), as `projections` makes them; `step` is in units of x, () or (B,): in float32 rounding leaves
    about 1e-7/step² of an energy, 1e-7/step of a score. Raises ValueError for another shape of v or a step that is not
    positive.
    """
    _check_projections(x, v)
    if not isinstance(step, Tensor) and step <= 0:
        raise ValueError(f"step must be positive, got {step}")
    wide = like(torch.as_tensor(step, dtype=torch.float64), x)
    h = wide.reshape(-1) if wide.ndim else wide
    total = x.new_zeros(len(x))
    if isinstance(model, Energy):
        middle = model.energy(x, t)
        for e in v:
            up, down = (model.energy(x + sign * wide * e, t) for sign in (1, -1))
            total = total + ((up - down) / h).square() / 8 - ((up - middle) + (down - middle)) / h**2
    else:
        score = _score_of(model)
        for e in v:
            up, down = (score(x + sign * wide * e, t) for sign in (1, -1))
            slope = (e * (up - down)).flatten(1).sum(1) / (2 * h)
            total = total + _squares(up + down) / 8 + slope
    return total / len(v)


def denoising_at(model: ScoreModel | Score, x0: Tensor, t: Tensor, z: Tensor, sigma: float | Tensor) -> Tensor:
    """Denoising score matching at one noise level: |s(x0 + sigma z, t) + z/sigma|²/2, (B,) (Vincent 2011, eq. 10-11).

    In expectation over standard normal z it is `explicit` for p smoothed with N(0, sigma² I), up to a constant: it
    trains the score of the smoothed density, without a derivative in x. sigma is () or (B,), positive.
    """
    if z.shape != x0.shape:
        raise ValueError(f"z must have the shape of x0, {tuple(x0.shape)}, got {tuple(z.shape)}")
    std = like(torch.as_tensor(sigma, dtype=torch.float64), x0)
    return _squares(_score_of(model)(x0 + std * z, t) + z / std) / 2


def explicit(model: ScoreModel | Score, truth: ScoreModel | Score, x: Tensor, t: Tensor) -> Tensor:
    """|s(x, t) - truth(x, t)|²/2, (B,): score matching to a known score (Hyvärinen 2005, eq. 2).

    No gradient goes through the truth.
    """
    with torch.no_grad():
        target = _score_of(truth)(x, t)
    return _squares(_score_of(model)(x, t) - target) / 2


class Divergence(NamedTuple):
    """An average over examples and its standard error, () each; the error is NaN for a single example."""

    mean: Tensor
    std_error: Tensor


@torch.no_grad()
def fisher_divergence(p: ScoreModel | Score, q: ScoreModel | Score, x: Tensor, t: Tensor) -> Divergence:
    """E |s_p - s_q|²/2, summed over dimensions and averaged over the samples x, and its standard error.

    Hyvärinen's and Song's convention, with the 1/2: it is `explicit`, and E `implicit` + E |s_p|²/2 for x drawn from p.
    The divergence from p to q takes samples of p; for a marginal of an SDE, samples of x_t and t.
    """
    values = explicit(p, q, x, t).double()
    error = values.std() / math.sqrt(len(values)) if len(values) > 1 else torch.full_like(values.sum(), math.nan)
    return Divergence(values.mean(), error)


def _score_of(model: ScoreModel | Score) -> Score:
    return model.score if isinstance(model, ScoreModel) else model


def _squares(x: Tensor) -> Tensor:
    """|x|² of each example, (B,)."""
    return x.flatten(1).square().sum(1)


def _check_projections(x: Tensor, v: Tensor) -> None:
    if v.shape[1:] != x.shape or not len(v):
        raise ValueError(f"v must have shape (M, {', '.join(map(str, x.shape))}) with M >= 1, got {tuple(v.shape)}")


def _score_and_input(model: ScoreModel | Score, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, bool]:
    """`differentiable` of the score at t."""
    needed = "the score has no gradient in x, and score matching needs its Jacobian"
    return differentiable(lambda y: _score_of(model)(y, t), x, needed)


def _block_of_trace(model: ScoreModel | Score, x: Tensor, t: Tensor, e: Tensor) -> Tensor:
    """The terms of tr(ds/dx) along the unit vectors e, (K, 1, *shape), with a new evaluation of the score; (B,)."""
    s, y, graph = _score_and_input(model, x, t)
    return quadratic_forms(s, y, e.expand(-1, *x.shape), graph).sum(0)


class _Recomputed(torch.autograd.Function):
    """h(x) without a graph: the backward pass computes it again, with the same random numbers and precision.

    torch.utils.checkpoint would recompute within the derivative that h itself takes. Parameters are inputs here, so
    that autograd passes on their gradients.
    """

    @staticmethod
    def forward(ctx: Any, h: Callable[[Tensor], Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
        kind = x.device.type
        ctx.h, ctx.kind, ctx.devices = h, kind, [x.device] if kind == "cuda" else []
        ctx.precision = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        ctx.random = torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in ctx.devices]
        ctx.save_for_backward(x, *parameters)
        return h(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        enabled, dtype = ctx.precision
        with torch.random.fork_rng(ctx.devices), torch.enable_grad(), torch.autocast(ctx.kind, dtype, enabled=enabled):
            torch.set_rng_state(ctx.random[0])
            for device, state in zip(ctx.devices, ctx.random[1], strict=True):
                torch.cuda.set_rng_state(state, device)
            y = x.detach().requires_grad_(x.requires_grad)
            inputs = [y, *parameters] if x.requires_grad else parameters
            gradients = torch.autograd.grad(ctx.h(y), inputs, gradient, allow_unused=True)
        return (None, *gradients) if x.requires_grad else (None, None, *gradients)
