"""An embedded Runge-Kutta pair on the probability flow, with a step size for each example."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn

import torch
from scipy.integrate import RK45
from torch import Tensor

from ..model import ScoreModel
from ..ode import GaveUp
from ..sdes import Noise, add_, like
from .base import Sampler
from .deterministic import check_noisy

MAX_STEPS = 10_000

# Dormand and Prince's 5(4): rows of the stages and of the solution, its nodes, and the weights of its error.
_ROWS = [*(row[:i] for i, row in enumerate(RK45.A.tolist())), RK45.B.tolist()]
_NODES = [*RK45.C.tolist(), 1.0]
_ERROR = RK45.E.tolist()


@dataclass(frozen=True)
class EmbeddedODE(Sampler):
    """Dormand-Prince 5(4), each example with steps of its own: none depends on its neighbours, or waits for them.

    The flow is solved on a circle: with tan(a) = sigma/alpha, for y = x/sqrt(alpha² + sigma²),

        dy/da = cos(a) noise - sin(a) data,

    which is bounded at both ends of every SDE and smooth where a chain's f and g jump. A step is accepted where the
    root mean square of error/(atol + rtol |y|) over an example is at most 1. Only the examples that have not arrived
    are evaluated. The grid's points are where the state is reported.

    Raises ValueError where the grid ends at clean data (sigma = 0), and RuntimeError where the solver gives up: at a
    slope that is not finite, or after 10 000 steps between two times of the grid.
    """

    rtol: float = 1e-4
    atol: float = 1e-4

    def walk(self, model: ScoreModel, x: Tensor, times: Tensor, noise: Noise) -> Iterator[Tensor]:
        check_noisy(model, times)
        angles = torch.atan2(model.sde.sigma(times), model.sde.alpha(times))
        h = (angles[0] - angles[-1]).expand(len(x)) / 10
        for a, b in pairwise(angles):
            x, h = self._solve(model, x, a, b, h)
            yield x

    def _solve(self, model: ScoreModel, x: Tensor, start: Tensor, end: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The state at angle `end` from x at `start`, and each example's step size there, (B,), as `h` is."""
        a, h = start.expand(len(x)).clone(), h.clone()
        y = x / radius(model, start)
        slope = field(model, y, a) if len(x) else y
        for _ in range(MAX_STEPS):
            left = (a > end).nonzero()[:, 0]
            if len(left) == 0:
                return y * radius(model, end), h
            here = left.to(y.device)
            step = torch.minimum(h[left], a[left] - end)
            new, error, last = trial(model, y[here], a[left], step, slope[here])
            size = self.atol + self.rtol * torch.maximum(y[here].abs(), new.abs())
            # in the state's dtype an error may vanish; a step grows tenfold at most
            e = (error / size).flatten(1).square().mean(1).sqrt().double().cpu()
            if not bool(e.isfinite().all()):
                self._give_up(model, a, left[~e.isfinite()], "a slope that is not finite")
            good = e <= 1
            taken = here[good.to(y.device)]
            y[taken], slope[taken] = new[good.to(y.device)], last[good.to(y.device)]
            arrived = step == a[left] - end
            a[left[good]] = torch.where(arrived, end, a[left] - step)[good]
            grown = step * (0.9 * e.clamp_min(1e-12) ** -0.2).clamp(0.2, 10)
            h[left] = torch.where(good & arrived, torch.maximum(h[left], grown), grown)
        self._give_up(model, a, left, f"{MAX_STEPS} steps")

    def _give_up(self, model: ScoreModel, a: Tensor, which: Tensor, reason: str) -> NoReturn:
        t = angle_time(model, a[which]).max().item()
        raise GaveUp(
            f"EmbeddedODE gave up on {len(which)} of {len(a)} examples, at t = {t:.3g} ({reason}); check the model "
            f"there, or raise rtol and atol (now {self.rtol:g} and {self.atol:g})"
        )


def angle_time(model: ScoreModel, a: Tensor) -> Tensor:
    """The time at which sigma/alpha = tan(a)."""
    return model.sde.time(-2 * torch.log(torch.tan(a)))


def radius(model: ScoreModel, a: Tensor) -> float:
    """sqrt(alpha² + sigma²) at one angle."""
    t = angle_time(model, a)
    return torch.hypot(model.sde.alpha(t), model.sde.sigma(t)).item()


def field(model: ScoreModel, y: Tensor, a: Tensor) -> Tensor:
    """dy/da at the angles a, (B,)."""
    t = angle_time(model, a)
    e = model(like(torch.hypot(model.sde.alpha(t), model.sde.sigma(t)), y) * y, t)
    return add_(like(torch.cos(a), y) * e.noise, -torch.sin(a), e.data)


def trial(model: ScoreModel, y: Tensor, a: Tensor, h: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(state at a - h, its error, slope there) from y and its slope at a; a and h of shape (B,)."""
    slopes = [slope]
    for row, node in zip(_ROWS[1:], _NODES[1:], strict=True):
        new = y.clone()
        for weight, k in zip(row, slopes, strict=True):
            add_(new, -weight * h, k)
        slopes.append(field(model, new, a - node * h))
    error = torch.zeros_like(y)
    for weight, k in zip(_ERROR, slopes, strict=True):
        add_(error, -weight * h, k)
    return new, error, slopes[-1]
