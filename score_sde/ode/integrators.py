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

# (u (n,) float64 on the CPU, y (n, ...), rows (n,) on the CPU, whole) -> dy/du at u and y, of the examples `rows`.
# Where not `whole`, only later stages use the slope: in columns on which the field does not depend it may be 0.
FieldOfEach = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
MAX_STEPS = 10_000
LEAST_STEP = 1e-12  # in units of u

# Dormand-Prince 5(4): rows of the stages and of the solution, its nodes, and the weights of its error.
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
    """Within it, an error about an estimate's shape names the solver and the evaluation."""
    try:
        yield
    except WrongShape as error:
        raise WrongShape(f"{error}, in evaluation {evaluation} of {name}") from None


class GaveUp(RuntimeError):
    """A solver did not reach the end: it met a limit, or a slope that is not finite."""


@dataclass(frozen=True)
class Solver:
    """How an ODE is solved, and how its solution is differentiated: method, tolerances or steps, and gradient.

    Args:
        method: "dopri5", "dopri8" or "bosh3", whose steps adapt; "RK45", scipy's, which has no gradient; with `steps`,
            "euler", "midpoint", "heun2" or "rk4"; or, for the probability flow of a score model, "embedded":
            Dormand-Prince 5(4) on the flow's circle with a step size for each example (`circle.carry`), no gradient.
        rtol, atol: tolerances of an adaptive method.
        steps: number of equal steps of a fixed-step method.
        gradient: "backprop" differentiates the solver's own operations: exact for the computed result, in memory that
            grows with the evaluations. "adjoint" solves the adjoint ODE from the end (Chen et al. 2018,
            arXiv:1806.07366, algorithm 1): as accurate as the solver, in constant memory.

    Raises ValueError for an unknown method or gradient, impossible tolerances, or steps that do not suit the method.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    steps: int | None = None
    gradient: Literal["backprop", "adjoint"] = "backprop"

    def __post_init__(self) -> None:
        known: tuple[str, ...] = (*ADAPTIVE, EACH) if self.steps is None else FIXED
        if self.method not in known:
            kind, other = "adaptive", f"set steps for one of {', '.join(FIXED)}"
            if self.steps is not None:
                kind, other = "fixed-step", f"leave steps out for one of {', '.join(ADAPTIVE)}"
            raise ValueError(f"unknown {kind} ODE method {self.method!r}; use one of {', '.join(known)}, or {other}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        check_tolerances(self.rtol, self.atol)
        if self.gradient not in ("backprop", "adjoint"):
            raise ValueError(f'unknown gradient {self.gradient!r}; use "backprop" or "adjoint"')


def check_tolerances(rtol: float, atol: float) -> None:
    """Raise ValueError for tolerances that would reject every step, or accept every step."""
    if not (0 <= rtol < math.inf and 0 < atol < math.inf):
        raise ValueError(f"rtol must be at least 0 and atol above 0, both finite, got {rtol:g} and {atol:g}")


def integrate(
    field: Field, y: Tensor, t0: float, t1: float, *,
    solver: Solver, sde: SDE | None = None, parameters: Iterable[Tensor] = (),
) -> tuple[Tensor, int]:  # fmt: skip
    """Solve dy/dt = field(t, y) from t0 to t1; return (y(t1), number of evaluations of `field`).

    The independent variable is t. For a chain's `sde`, whose f and g jump at every step, it is the log SNR, in which a
    probability flow is smooth: dt/d(log SNR) = -(sigma/g)².

    The error of an adaptive step is the root mean square of err/(atol + rtol |y|) over the whole tensor `y`, which
    shares one step size. "RK45" is scipy's, the reference of Song et al. 2021; all others are torchdiffeq's.
    In grad mode the result is differentiable as `solver` says; the adjoint needs the `parameters` of `field`.
    Raises GaveUp, a RuntimeError, where the solver gives up, and ValueError for the method "embedded", which needs a
    score model.
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
        if not bool(slope.isfinite().all()):  # the solvers would go on without end
            raise GaveUp(gave_up(f"a slope that is not finite at t = {reached:.3g}"))
        return slope if chain is None else slope * -((chain.sigma(t) / chain.g(t)) ** 2).item()

    def gave_up(reason: object) -> str:
        advice = "" if solver.steps else f", or raise rtol and atol (now {solver.rtol:g} and {solver.atol:g}) or t_min"
        return (
            f"{solver.method} gave up after {count} evaluations between t = {t0:.3g} and {t1:.3g} ({reason}); "
            f"check the model there{advice}"
        )

    if solver.method == "RK45":
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (y, *parameters)):
            raise ValueError("RK45 is scipy's and has no gradient: use dopri5, or solve under torch.no_grad()")
        end, failure = _by_scipy(counted, y, u0, u1, solver)
        if failure:
            raise GaveUp(gave_up(f"{failure} t = {reached:.3g} was reached"))
        return end, count

    from torchdiffeq import odeint, odeint_adjoint  # slow to import: it imports scipy's, too

    times = torch.tensor([u0, u1], dtype=y.dtype, device=y.device)
    settings: dict[str, Any] = {"rtol": solver.rtol, "atol": solver.atol, "method": solver.method}
    forward: dict[str, Any] = {"step_t": times[1:]}
    backward: dict[str, Any] = {"step_t": times[:1]}
    if solver.steps is not None:  # a step size instead would round to one step more or less
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


def _by_scipy(
    field: Callable[[Any, Tensor], Tensor], y: Tensor, u0: float, u1: float, solver: Solver
) -> tuple[Tensor, str]:
    """(y at u1, why it was not reached, or "") by scipy's RK45, in float64 on the CPU."""
    from scipy.integrate import solve_ivp  # slow to import

    @torch.no_grad()
    def flat(u: float, state: np.ndarray) -> np.ndarray:
        return field(u, torch.from_numpy(state).to(y).reshape(y.shape)).flatten().double().cpu().numpy()

    start = y.flatten().double().cpu().numpy()
    solution = solve_ivp(flat, (u0, u1), start, rtol=solver.rtol, atol=solver.atol, method="RK45")
    return torch.from_numpy(solution.y[:, -1]).reshape(y.shape).to(y), "" if solution.success else solution.message


class Arrival(NamedTuple):
    """The states at the end, the last step sizes (B,), and the evaluations that each example took (B,).

    `failure` says which examples did not arrive, where and why; their states are NaN. It is empty if all arrived.
    """

    state: Tensor
    step: Tensor
    nfe: Tensor
    failure: str


def root_mean_square(error: Tensor, old: Tensor, new: Tensor, rtol: float, atol: float) -> Tensor:
    """Root mean square of error/(atol + rtol |y|) over each example, (B,), with the larger |y| of a step's two ends."""
    return (error / (atol + rtol * torch.maximum(old.abs(), new.abs()))).flatten(1).square().mean(1).sqrt()


def integrate_each(
    field: FieldOfEach, y: Tensor, start: Tensor, end: Tensor, *, rtol: float, atol: float, step: Tensor | None = None,
    norm: Callable[[Tensor, Tensor, Tensor, float, float], Tensor] = root_mean_square,
    time: Callable[[Tensor], Tensor] = lambda u: u, name: str = EACH,
) -> Arrival:  # fmt: skip
    """Solve dy/du = field from u = start to end by Dormand-Prince 5(4), with a step size for each example.

    No example depends on its neighbours or waits for them: only those that have not arrived are evaluated, once and
    then six times a step. A step is accepted where the norm of its error is at most 1. The rest of the way is divided
    into equal steps no longer than the error allows, so that the last step is not much shorter than the others.

    Args:
        field: the slope of some of the examples, see `FieldOfEach`.
        y: (B, ...), the states at start.
        start, end: () or (B,) in float64 on the CPU, end after start or before it.
        step: (B,), the first step sizes; by default a tenth of the way.
        norm: (error, old state, new state, rtol, atol) -> (B,).
        time, name: u -> t, and the solver's name, for the text of a failure.

    A trial step whose result is not finite is rejected, like one with too large an error. An example fails, and the
    others go on, where its slope at the start is not finite, where steps too short to move u are rejected, and after
    10 000 steps.
    """
    batch = len(y)
    u, goal = start.expand(batch).clone(), end.expand(batch)
    sign = torch.sign(goal - u)
    h = (goal - u).abs() / 10 if step is None else step.expand(batch).clone()
    least = LEAST_STEP * torch.maximum(u.abs(), goal.abs())
    nfe, going, why = torch.zeros(batch, dtype=torch.long), u != goal, dict[int, str]()
    if not bool(going.any()):
        return Arrival(y, h, nfe, "")
    evaluation = 0

    def counted(u: Tensor, y: Tensor, rows: Tensor, whole: bool) -> Tensor:
        nonlocal evaluation
        evaluation += 1
        with numbered(evaluation, name):
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
        own, distance = left.to(y.device), (goal[left] - u[left]).abs()  # `own` on the state's device
        size = distance / torch.ceil(distance / h[left] * (1 - 1e-9)).clamp_min(1)
        arriving = size == distance
        new, error, last = trial(counted, y[own], u[left], sign[left] * size, slope[own], left)
        nfe[left] += len(_NODES) - 1
        e = norm(error, y[own], new, rtol, atol).detach()  # a gradient holds the steps constant
        finite = e.isfinite() & _finite(new) & _finite(last)
        e, finite = e.masked_fill(~finite, math.inf).cpu().double(), finite.cpu()
        good = e <= 1
        kept = good.to(y.device)
        y[own[kept]], slope[own[kept]] = new[kept], last[kept]
        u[left[good]] = torch.where(arriving, goal[left], u[left] + sign[left] * size)[good]
        grown = size * (0.9 * e.clamp_min(1e-12) ** -0.2).clamp(0.2, 4)  # an error may round to 0
        h[left] = torch.where(good & arriving, torch.maximum(h[left], grown), grown)
        going[left[good & arriving]] = False
        short = ~good & (grown < least[left])
        give_up(left[short & ~finite], "a slope that is not finite, after steps however short")
        give_up(left[short & finite], "steps too short to advance")
    give_up(going.nonzero()[:, 0], f"{MAX_STEPS} steps")
    if not why:
        return Arrival(y, h, nfe, "")
    failed = torch.tensor(sorted(why))
    y[failed.to(y.device)] = math.nan
    failure = (
        f"{name} gave up on {which_of(failed, batch)}, at t = {time(u[failed])[0].item():.3g} ({why[int(failed[0])]}) "
        f"after {nfe[failed[0]]} evaluations; check the model there, or raise rtol and atol (now {rtol:g} and "
        f"{atol:g}) or t_min"
    )
    return Arrival(y, h, nfe, failure)


def which_of(which: Tensor, batch: int) -> str:
    """Examples as text: "2 of 4 examples (1, 3)"."""
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
