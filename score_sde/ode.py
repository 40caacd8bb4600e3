"""One ODE integrator for samplers, likelihoods and flows: torchdiffeq's, or scipy's RK45 as score_sde uses it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor
from torchdiffeq import odeint, odeint_adjoint

from .sdes import SDE

Field = Callable[[Tensor, Tensor], Tensor]  # (t, y) -> dy/dt, with t () float64 on the CPU

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "RK45")
FIXED = ("euler", "midpoint", "heun2", "rk4")
MAX_EVALUATIONS = 100_000


class GaveUp(RuntimeError):
    """A solver stopped short of the end: at a limit, or where a slope is not finite."""


@dataclass(frozen=True)
class Solver:
    """How an ODE is solved, and how its solution is differentiated where gradients are wanted.

    Args:
        method: "dopri5", "dopri8" or "bosh3", whose steps adapt; "RK45", scipy's, which has no gradient; or, with
            `steps`, "euler", "midpoint", "heun2" or "rk4".
        rtol, atol: tolerances of an adaptive method.
        steps: number of equal steps of a fixed-step method.
        gradient: "backprop" goes back through the solver's own operations: exact for what was computed, in memory that
            grows with the evaluations. "adjoint" solves the adjoint ODE from the end (Chen et al. 2018,
            arXiv:1806.07366, algorithm 1): as accurate as the solver, in memory that does not.

    Raises ValueError for an unknown method or gradient, or for steps that do not suit the method.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    steps: int | None = None
    gradient: Literal["backprop", "adjoint"] = "backprop"

    def __post_init__(self) -> None:
        if self.steps is None and self.method not in ADAPTIVE:
            raise ValueError(
                f"unknown adaptive ODE method {self.method!r}; use one of {', '.join(ADAPTIVE)}, "
                f"or set steps for one of {', '.join(FIXED)}"
            )
        if self.steps is not None and self.method not in FIXED:
            raise ValueError(
                f"unknown fixed-step ODE method {self.method!r}; use one of {', '.join(FIXED)}, "
                f"or leave steps out for one of {', '.join(ADAPTIVE)}"
            )
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.gradient not in ("backprop", "adjoint"):
            raise ValueError(f'unknown gradient {self.gradient!r}; use "backprop" or "adjoint"')


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
    Raises GaveUp, a RuntimeError, where the solver does.
    """
    if y.numel() == 0:
        return y, 0
    jumps = getattr(sde, "steps", None) is not None
    if sde is not None and jumps:
        u0, u1 = sde.log_snr(torch.tensor([t0, t1], dtype=torch.float64)).tolist()
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
        t = sde.time(u) if sde is not None and jumps else u
        reached = t.item()
        slope = field(t, y)
        if not bool(slope.isfinite().all()):  # no solver ends on its own then
            raise GaveUp(gave_up(f"a slope that is not finite at t = {reached:.3g}"))
        return slope * -((sde.sigma(t) / sde.g(t)) ** 2).item() if sde is not None and jumps else slope

    def gave_up(reason: object) -> str:
        advice = "" if solver.steps else f", or raise rtol and atol (now {solver.rtol:g} and {solver.atol:g}) or t_min"
        return (
            f"{solver.method} gave up after {count} evaluations between t = {t0:.3g} and {t1:.3g} ({reason}); "
            f"check the model there{advice}"
        )

    if solver.method == "RK45":

        def flat(t: float, state: np.ndarray) -> np.ndarray:
            return counted(t, torch.from_numpy(state).to(y).reshape(y.shape)).flatten().double().cpu().numpy()

        start = y.flatten().double().cpu().numpy()
        solution = solve_ivp(flat, (u0, u1), start, rtol=solver.rtol, atol=solver.atol, method="RK45")
        if not solution.success:
            raise GaveUp(gave_up(f"{solution.message} t = {reached:.3g} was reached"))
        return torch.from_numpy(solution.y[:, -1]).reshape(y.shape).to(y), count

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
