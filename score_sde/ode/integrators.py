"""ODE integrators for samplers, likelihoods and flows.

`integrate` has one step size for all of a tensor: torchdiffeq's methods, or scipy's RK45 as score_sde uses it.
`integrate_each` is Dormand and Prince's pair with a step size for each example.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..sdes.linear import SDE, WrongShape, add_

Field = Callable[[Tensor, Tensor], Tensor]  # (t, y) -> dy/dt, with t () float64 on the CPU

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "RK45")  # one step size for the batch
EACH = "embedded"  # one for each example
FIXED = ("euler", "midpoint", "heun2", "rk4")
MAX_EVALUATIONS = 100_000

# (u (n,) float64 on the CPU, y (n, ...), rows (n,) on the CPU, whole) -> dy/du of the examples `rows`, here at u and y.
# Where not `whole`, the slope serves later stages alone: what the field itself does not depend on may be 0 in it.
FieldOfEach = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
MAX_STEPS = 10_000
LEAST_STEP = 1e-12  # in units of u

# Dormand and Prince's 5(4): rows of the stages and of the solution, its nodes, and the weights of its error.
_ROWS: list[list[float]] = [
    [],
    [1 / 5],
    [3 / 40, 9 / 40],
    [44 / 45, -56 / 15, 32 / 9],
    [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
    [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656],
    [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84],
]
_NODES = [0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0]
_ERROR = [-71 / 57600, 0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40]
_WHOLE = [*(bool(b or e) for b, e in zip(_ROWS[-1], _ERROR)), True]  # the last slope is the next step's first


@contextmanager
def numbered(evaluation: int, name: str) -> Iterator[None]:
    """Within it, an error about an estimate's shape says in which evaluation of which solver it was."""
    try:
        yield
    except WrongShape as error:
        raise WrongShape(f"{error}, in evaluation {evaluation} of {name}") from None


class GaveUp(RuntimeError):
    """A solver stopped short of the end: at a limit, or where a slope is not finite."""


@dataclass(frozen=True)
class Solver:
    """How an ODE is solved, and how its solution is differentiated where gradients are wanted.

    Args:
        method: "dopri5", "dopri8" or "bosh3", whose steps adapt; "RK45", scipy's, which has no gradient; with `steps`,
            "euler", "midpoint", "heun2" or "rk4"; or, for the probability flow of a score model, "embedded":
            Dormand-Prince 5(4) on the flow's circle with steps of each example's own (`circle.carry`), no gradient.
        rtol, atol: tolerances of an adaptive method.
        steps: number of equal steps of a fixed-step method.
        gradient: "backprop" goes back through the solver's own operations: exact for what was computed, in memory that
            grows with the evaluations. "adjoint" solves the adjoint ODE from the end (Chen et al. 2018,
            arXiv:1806.07366, algorithm 1): as accurate as the solver, in memory that does not.

    Raises ValueError for an unknown method or gradient, impossible tolerances, or steps that do not suit the method.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    steps: int | None = None
    gradient: Literal["backprop", "adjoint"] = "backprop"

    def __post_init__(self) -> None:
        if self.steps is None and self.method not in (*ADAPTIVE, EACH):
            raise ValueError(
                f"unknown adaptive ODE method {self.method!r}; use one of {', '.join((*ADAPTIVE, EACH))}, "
                f"or set steps for one of {', '.join(FIXED)}"
            )
        if self.steps is not None and self.method not in FIXED:
            raise ValueError(
                f"unknown fixed-step ODE method {self.method!r}; use one of {', '.join(FIXED)}, "
                f"or leave steps out for one of {', '.join(ADAPTIVE)}"
            )
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        check_tolerances(self.rtol, self.atol)
        if self.gradient not in ("backprop", "adjoint"):
            raise ValueError(f'unknown gradient {self.gradient!r}; use "backprop" or "adjoint"')


def check_tolerances(rtol: float, atol: float) -> None:
    """Raise ValueError where no step could be accepted, or any."""
    if not (0 <= rtol < math.inf and 0 < atol < math.inf):
        raise ValueError(f"rtol must be at least 0 and atol above 0, both finite, got {rtol:g} and {atol:g}")


def integrate(
    field: Field,
    y: Tensor,
    t0: float,
    t1: float,
    *,
    solver: Solver,
    sde: SDE | None = None,
    parameters: Iterable[Tensor] = (),
) -> tuple[Tensor, int]:
    """Solve dy/dt = field(t, y) from t0 to t1; return (y(t1), number of evaluations of `field`).

    The independent variable is t, but for a chain's `sde`, whose f and g jump at every step, it is the log SNR, in
    which a probability flow is smooth: dt/d(log SNR) = -(sigma/g)².

    The error of an adaptive step is the root mean square of err/(atol + rtol |y|) over the whole tensor: all that is in
    `y` shares one step size. "RK45" is scipy's, the reference of Song et al. 2021; all others are torchdiffeq's.
    In grad mode the result is differentiable as `solver` says; the adjoint must be told the `parameters` of `field`.
    Raises GaveUp, a RuntimeError, where the solver does, and ValueError for the method "embedded", which is not of this
    kind.
    """
    if solver.method == EACH:
        raise ValueError(f'"{EACH}" steps the probability flow of a score model; use one of {", ".join(ADAPTIVE)} here')
    if y.numel() == 0:
        return y, 0
    chain = sde if sde is not None and sde.steps else None
    if chain is not None:
        u0, u1 = chain.log_snr(torch.tensor([t0, t1], dtype=torch.float64)).tolist()
    else:
        u0, u1 = t0, t1
    count, reached = 0, t0

    def counted(u: Any, y: Tensor) -> Tensor:
        nonlocal count, reached
        count += 1
        if count > MAX_EVALUATIONS:
            raise GaveUp(gave_up(f"too many; t = {reached:.3g} was reached"))
        # Steps end at u1 exactly; only the trial step that chooses the first step size may lie beyond it.
        u = torch.as_tensor(u, dtype=torch.float64, device="cpu").clamp(min(u0, u1), max(u0, u1))
        t = chain.time(u) if chain is not None else u
        reached = t.item()
        with numbered(count, solver.method):
            slope = field(t, y)
        if not bool(slope.isfinite().all()):  # no solver ends on its own then
            raise GaveUp(gave_up(f"a slope that is not finite at t = {reached:.3g}"))
        return slope if chain is None else slope * -((chain.sigma(t) / chain.g(t)) ** 2).item()

    def gave_up(reason: object) -> str:
        advice = "" if solver.steps else f", or raise rtol and atol (now {solver.rtol:g} and {solver.atol:g}) or t_min"
        return (
            f"{solver.method} gave up after {count} evaluations between t = {t0:.3g} and {t1:.3g} ({reason}); "
            f"check the model there{advice}"
        )

    if solver.method == "RK45":
        from scipy.integrate import solve_ivp  # slow to import, and needed here alone

        if torch.is_grad_enabled() and any(part.requires_grad for part in (y, *parameters)):
            raise ValueError("RK45 is scipy's and has no gradient: use dopri5, or solve under torch.no_grad()")

        @torch.no_grad()
        def flat(t: float, state: np.ndarray) -> np.ndarray:
            return counted(t, torch.from_numpy(state).to(y).reshape(y.shape)).flatten().double().cpu().numpy()

        start = y.flatten().double().cpu().numpy()
        solution = solve_ivp(flat, (u0, u1), start, rtol=solver.rtol, atol=solver.atol, method="RK45")
        if not solution.success:
            raise GaveUp(gave_up(f"{solution.message} t = {reached:.3g} was reached"))
        return torch.from_numpy(solution.y[:, -1]).reshape(y.shape).to(y), count

    from torchdiffeq import odeint, odeint_adjoint  # which import scipy's, too

    times = torch.tensor([u0, u1], dtype=y.dtype, device=y.device)
    settings: dict[str, Any] = {"rtol": solver.rtol, "atol": solver.atol, "method": solver.method}
    forward: dict[str, Any]
    backward: dict[str, Any]
    if solver.steps is None:
        forward, backward = {"step_t": times[1:]}, {"step_t": times[:1]}
    else:
        # A step size instead would round to one step more or less.
        grid = {"grid_constructor": lambda f, y, t: torch.linspace(t[0], t[-1], solver.steps + 1, dtype=t.dtype).to(t)}
        forward = backward = grid
    try:
        if solver.gradient == "adjoint" and torch.is_grad_enabled():
            settings |= {"adjoint_options": backward, "adjoint_params": tuple(parameters)}
            end = odeint_adjoint(counted, y, times, options=forward, **settings)[-1]
        else:
            end = odeint(counted, y, times, options=forward, **settings)[-1]
    except AssertionError as error:
        raise GaveUp(gave_up(f"{error}; t = {reached:.3g} was reached")) from error
    return end, count


class Arrival(NamedTuple):
    """The states at the end, the steps' sizes there (B,), and the evaluations that each example took (B,).

    `failure` says which examples did not arrive, where and why; their states are NaN. It is empty where all did.
    """

    state: Tensor
    step: Tensor
    nfe: Tensor
    failure: str


def root_mean_square(error: Tensor, old: Tensor, new: Tensor, rtol: float, atol: float) -> Tensor:
    """Of error/(atol + rtol |y|) over each example, (B,), with the larger |y| of a step's two ends."""
    return (error / (atol + rtol * torch.maximum(old.abs(), new.abs()))).flatten(1).square().mean(1).sqrt()


def integrate_each(
    field: FieldOfEach,
    y: Tensor,
    start: Tensor,
    end: Tensor,
    *,
    rtol: float,
    atol: float,
    step: Tensor | None = None,
    norm: Callable[[Tensor, Tensor, Tensor, float, float], Tensor] = root_mean_square,
    time: Callable[[Tensor, Tensor], Tensor] = lambda u, rows: u,
    name: str = EACH,
) -> Arrival:
    """Solve dy/du = field from u = start to end by Dormand-Prince 5(4), each example with steps of its own.

    None depends on its neighbours or waits for them: only the examples that have not arrived are evaluated, once and
    then six times a step. A step is accepted where the norm of its error is at most 1. What is left is cut into equal
    steps no longer than the error allows, so that the last is no stub.

    Args:
        field: the slope of some of the examples, see `FieldOfEach`.
        y: (B, ...), the states at start.
        start, end: () or (B,) in float64 on the CPU, end after start or before it.
        rtol, atol: tolerances.
        step: (B,), the first steps' sizes; by default a tenth of the way.
        norm: (error, old state, new state, rtol, atol) -> (B,).
        time: (u, rows) -> t, what a failure calls the place.
        name: what a failure calls the solver.

    A trial step that leaves the finite numbers is rejected, as one with too large an error is. An example fails, and
    the others go on, where its slope at the start is not finite, where steps too short to move u are rejected, and
    after 10 000 steps.
    """
    batch = len(y)
    u, goal = start.expand(batch).clone(), end.expand(batch)
    sign = torch.sign(goal - u)
    h = (goal - u).abs() / 10 if step is None else step.expand(batch).clone()
    least = LEAST_STEP * torch.maximum(u.abs(), goal.abs())
    nfe, going, why = torch.zeros(batch, dtype=torch.long), u != goal, dict[int, str]()
    if not bool(going.any()):
        return Arrival(y, h, nfe, "")
    asked = 0

    def counted(u: Tensor, y: Tensor, rows: Tensor, whole: bool) -> Tensor:
        nonlocal asked
        asked += 1
        with numbered(asked, name):
            return field(u, y, rows, whole)

    def give_up(which: Tensor, reason: str) -> None:
        going[which] = False
        why.update(dict.fromkeys(which.tolist(), reason))

    y, slope = y.clone(), counted(u, y, torch.arange(batch), True)
    nfe += 1
    give_up((going & ~_finite(slope).cpu()).nonzero()[:, 0], "a slope that is not finite")
    for _ in range(MAX_STEPS):
        left = going.nonzero()[:, 0]
        if len(left) == 0:
            break
        here, distance = left.to(y.device), (goal[left] - u[left]).abs()
        size = distance / torch.ceil(distance / h[left] * (1 - 1e-9)).clamp_min(1)
        arriving = size == distance
        new, error, last = trial(counted, y[here], u[left], sign[left] * size, slope[here], left)
        nfe[left] += len(_NODES) - 1
        # in the state's dtype an error may vanish; a step grows to four times its size at most
        e = norm(error, y[here], new, rtol, atol).detach()  # a gradient holds the steps constant
        sound = e.isfinite() & _finite(new) & _finite(last)
        e, sound = e.masked_fill(~sound, math.inf).cpu().double(), sound.cpu()
        good = e <= 1
        kept = good.to(y.device)
        y[here[kept]], slope[here[kept]] = new[kept], last[kept]
        u[left[good]] = torch.where(arriving, goal[left], u[left] + sign[left] * size)[good]
        grown = size * (0.9 * e.clamp_min(1e-12) ** -0.2).clamp(0.2, 4)
        h[left] = torch.where(good & arriving, torch.maximum(h[left], grown), grown)
        going[left[good & arriving]] = False
        short = ~good & (grown < least[left])
        give_up(left[short & ~sound], "a slope that is not finite, after steps however short")
        give_up(left[short & sound], "steps too short to advance")
    give_up(going.nonzero()[:, 0], f"{MAX_STEPS} steps")
    if not why:
        return Arrival(y, h, nfe, "")
    failed = torch.tensor(sorted(why))
    y[failed.to(y.device)] = math.nan
    place, reason = time(u[failed], failed)[0].item(), why[int(failed[0])]
    failure = (
        f"{name} gave up on {which_of(failed, batch)}, at t = {place:.3g} ({reason}) after {nfe[failed[0]]} evaluations"
        f"; check the model there, or raise rtol and atol (now {rtol:g} and {atol:g}) or t_min"
    )
    return Arrival(y, h, nfe, failure)


def which_of(which: Tensor, batch: int) -> str:
    """Examples in words: "2 of 4 examples (1, 3)"."""
    names = [str(i) for i in which[:9].tolist()] + ["..."] * (len(which) > 9)
    return f"{len(which)} of {batch} examples" + (f" ({', '.join(names)})" if len(which) < batch else "")


def _finite(y: Tensor) -> Tensor:
    """Which examples are finite, (B,)."""
    return y.isfinite().flatten(1).all(1)


def trial(
    field: FieldOfEach, y: Tensor, u: Tensor, h: Tensor, slope: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(state at u + h, its error, slope there) from y and its slope at u; u and h of shape (n,)."""
    slopes = [slope]
    for row, node, whole in zip(_ROWS[1:], _NODES[1:], _WHOLE[1:], strict=True):
        new = y.clone()
        for weight, k in zip(row, slopes, strict=True):
            if weight:
                add_(new, weight * h, k)
        slopes.append(field(u + node * h, new, rows, whole))
    error = torch.zeros_like(y)
    for weight, k in zip(_ERROR, slopes, strict=True):
        if weight:
            add_(error, weight * h, k)
    return new, error, slopes[-1]
