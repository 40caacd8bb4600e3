"""Langevin dynamics at one density p, with and without the Metropolis test (ULA and MALA).

    x <- x + h score(x) + sqrt(2h) z,    score = grad log p, z standard normal

is a step of size h of the diffusion ``dx = score dt + sqrt(2) dw``, whose law tends to p (Roberts & Tweedie 1996).
Papers that write eps/2 and sqrt(eps) (Welling & Teh 2011; Song & Ermon 2019, eq. 4) have h = eps/2; Song & Ermon 2020
have h = eps.

The discrete steps have another stationary law: on N(0, s²) its variance is s²/(1 - h/(2 s²)), and from h = 2 s² on they
diverge. The Metropolis test removes this bias at any h: a step from x to y is taken with probability

    min(1, p(y) q(x|y) / (p(x) q(y|x))),    q(y|x) = N(y; x + h score(x), 2h I),

and otherwise x stays. With and without it, walks hardly ever go from one mode to another far away: see
`AnnealedLangevin`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..models.base import ScoreModel, at
from ..noise import Noise, noise_source
from ..sdes.linear import like

Function = Callable[[Tensor], Tensor]  # x (B, *shape) -> a log density (B,), or a score (B, *shape)
StepSize = Callable[[int], float]  # the step's number, from 0 -> h

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(4)  # on [-1, 1]; order 8


class Draws(NamedTuple):
    """The states x (B, *shape) after the last step, and the fraction of its steps that each example took, (B,)."""

    x: Tensor
    acceptance: Tensor


def langevin_dynamics(
    target: ScoreModel | Function, x: Tensor, step: float | StepSize, n: int, *,
    t: Tensor | float | None = None, metropolis: bool = False, seed: int | torch.Generator = 0, first: int = 0,
) -> Draws:  # fmt: skip
    """n steps of Langevin dynamics from x, without a gradient.

    Args:
        target: a score model, at its time t; or a function of x, which is a log density up to a constant if it
            returns (B,) (its gradient is taken by autograd), and a score if it returns x's shape. A score of another
            mini-batch at each call makes this SGLD (Welling & Teh 2011).
        x: where to start, (B, *shape), one independent walk per example; not changed.
        step: h; or a function of the step's number, such as SGLD's ``lambda i: a * (b + i) ** -0.55``.
        t: the model's time, () or (B,).
        metropolis: accept steps by the Metropolis test (MALA). With a log density it is exact. With a score the log
            density's difference is the score's integral along the straight line from x to y, by a quadrature of order 8
            (four more evaluations a step): as good as exact for the gradient of a smooth function, useless for SGLD.
        seed, first: example i's draws depend on (seed, first + i) alone. A torch.Generator gives one stream.

    Raises ValueError for a state that is no batch, for a model without t or a function with it, and for a function
    whose result is neither (B,) nor of x's shape; FloatingPointError where the score is not finite at the start of a
    walk with the Metropolis test, which would never move, or the state after a step without it.
    """
    noise = noise_source(tuple(x.shape), seed, first, x.dtype, x.device)
    taken = torch.zeros(x.shape[:1], dtype=x.dtype, device=x.device)
    finite = torch.zeros((), dtype=torch.long, device=x.device)  # steps; a state does not become finite again
    for y, moved in islice(langevin_walk(target, x, step, noise, t=t, metropolis=metropolis), n):
        x, taken, finite = y, taken + moved, finite + y.isfinite().all()
    if finite < n:
        raise FloatingPointError(
            f"the state is not finite after step {int(finite) + 1} of {n}{_at(t)}: check the score there, or take "
            "smaller steps"
        )
    return Draws(x, taken / max(n, 1))


def langevin_walk(
    target: ScoreModel | Function, x: Tensor, step: float | StepSize, noise: Noise, *,
    t: Tensor | float | None = None, metropolis: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Endless `langevin_dynamics`: the state after each step and which examples moved, (B,), with the same errors."""
    if x.ndim < 2:
        raise ValueError(f"x must be (B, *shape), a batch of states, got shape {tuple(x.shape)}")
    x, read = x.detach(), _reader(target, t)
    size: StepSize = step if callable(step) else lambda i: step
    if not metropolis:
        return _unadjusted(read, x, size, noise)
    log_p, score = read(x)
    bad = ~score.isfinite().flatten(1).all(1)
    if bool(bad.any()):
        raise FloatingPointError(
            f"the score is not finite at the start of {int(bad.sum())} of {len(x)} walks{_at(t)}: check it there"
        )
    return _adjusted(read, x, log_p, score, size, noise)


def _at(t: Tensor | float | None) -> str:
    return "" if t is None else f", at {at(torch.as_tensor(t))}"


# x -> (log density (B,), or None where only the score is known; score), without gradients
_Reader = Callable[[Tensor], tuple[Tensor | None, Tensor]]


def _unadjusted(read: _Reader, x: Tensor, size: StepSize, noise: Noise) -> Iterator[tuple[Tensor, Tensor]]:
    everyone = torch.ones(x.shape[:1], dtype=torch.bool, device=x.device)
    for i in count():
        h = size(i)
        x = x + h * read(x)[1] + math.sqrt(2 * h) * noise(x)
        yield x, everyone


def _adjusted(
    read: _Reader, x: Tensor, log_p: Tensor | None, score: Tensor, size: StepSize, noise: Noise
) -> Iterator[tuple[Tensor, Tensor]]:
    for i in count():
        h = size(i)
        y = x + h * score + math.sqrt(2 * h) * noise(x)
        log_p_y, score_y = read(y)
        rise = _line_integral(read, x, y) if log_p is None or log_p_y is None else log_p_y - log_p
        # a uniform number from the source of normal numbers; NaN, as outside of p's support, rejects the step
        log_u = torch.special.log_ndtr(noise(x).flatten(1)[:, 0])
        moved = log_u < log_acceptance(rise, x, score, y, score_y, h)
        mask = like(moved, x).bool()
        x, score = torch.where(mask, y, x), torch.where(mask, score_y, score)
        log_p = None if log_p is None or log_p_y is None else torch.where(moved, log_p_y, log_p)
        yield x, moved


def log_acceptance(rise: Tensor, x: Tensor, score_x: Tensor, y: Tensor, score_y: Tensor, h: float) -> Tensor:
    """log of p(y) q(x|y) / (p(x) q(y|x)), (B,), for rise = log p(y) - log p(x).

    The q's squares, multiplied out: log q(x|y)/q(y|x) = -(y - x)·(score_x + score_y)/2 + h (|score_x|² - |score_y|²)/4.
    """
    proposal = h * (score_x.square() - score_y.square()) / 4 - (y - x) * (score_x + score_y) / 2
    return rise + proposal.flatten(1).sum(1)


def _line_integral(read: _Reader, x: Tensor, y: Tensor) -> Tensor:
    """Integral of the score along the straight line from x to y, (B,): log p(y) - log p(x) if it is a gradient."""
    nodes = zip((1 + _NODES) / 2, _WEIGHTS / 2, strict=True)
    return sum((w * (read(torch.lerp(x, y, u))[1] * (y - x)).flatten(1).sum(1) for u, w in nodes), x.new_zeros(len(x)))


def _reader(target: ScoreModel | Function, t: Tensor | float | None) -> _Reader:
    if isinstance(target, ScoreModel):
        if t is None:
            raise ValueError("a score model has a density at every time: pass t, such as t=model.sde.t_min")
        model, time = target, torch.as_tensor(t, dtype=torch.float64)
        return _reader(lambda x: model.score(x, time), None)
    if t is not None:
        raise ValueError(f"t={t} is the time of a score model; a function of x has none: leave t out")
    differentiate = True  # until the function turns out to be a score

    def read(x: Tensor) -> tuple[Tensor | None, Tensor]:
        nonlocal differentiate
        y = x.detach().requires_grad_(differentiate)
        with torch.set_grad_enabled(differentiate):
            value = target(y)
        if value.shape == x.shape:
            differentiate = False
            return None, value.detach()
        if value.shape != x.shape[:1]:
            raise ValueError(
                f"the target must return a log density ({len(x)},) or a score {tuple(x.shape)} for states of shape "
                f"{tuple(x.shape)}, got {tuple(value.shape)}"
            )
        if not value.requires_grad:
            raise ValueError("the log density has no gradient: compute it from x in torch, and not under no_grad")
        return value.detach(), torch.autograd.grad(value.sum(), y)[0]

    return read
