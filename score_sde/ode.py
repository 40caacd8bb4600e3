"""One ODE integrator for samplers and likelihoods: torchdiffeq's solvers, or scipy's RK45 as score_sde uses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor
from torchdiffeq import odeint

from .sdes import SDE

Field = Callable[[Tensor, Tensor], Tensor]  # (t, y) -> dy/dt, with t () float64 on the CPU

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "RK45")
FIXED = ("euler", "midpoint", "heun2", "rk4")
MAX_EVALUATIONS = 100_000


def integrate(
    field: Field, y: Tensor, t0: float, t1: float, *, sde: SDE, rtol: float, atol: float, method: str
) -> tuple[Tensor, int]:
    """Solve dy/dt = field(t, y) from t0 to t1 adaptively; return (y(t1), number of evaluations of `field`).

    The independent variable is t, but for a chain's `sde`, whose f and g jump at every step, it is the log SNR, in
    which a probability flow is smooth: dt/d(log SNR) = -(sigma/g)².

    The error of a step is the root mean square of err/(atol + rtol |y|) over the whole tensor: all that is in `y`
    shares one step size. "RK45" is scipy's, the reference of Song et al. 2021; all others are torchdiffeq's.
    Raises ValueError for an unknown method, RuntimeError where the solver gives up.
    """
    if method not in ADAPTIVE:
        raise ValueError(f"unknown adaptive ODE method {method!r}; use one of {', '.join(ADAPTIVE)}")
    if y.numel() == 0:
        return y, 0
    jumps = getattr(sde, "steps", None) is not None
    if jumps:
        u0, u1 = sde.log_snr(torch.tensor([t0, t1], dtype=torch.float64)).tolist()
    else:
        u0, u1 = t0, t1
    count = 0

    def counted(u: Any, y: Tensor) -> Tensor:
        nonlocal count
        count += 1
        if count > MAX_EVALUATIONS:
            raise RuntimeError(gave_up("too many evaluations"))
        # Steps end at u1 exactly; only the trial step that chooses the first step size may lie beyond it.
        u = torch.as_tensor(u, dtype=torch.float64, device="cpu").clamp(min(u0, u1), max(u0, u1))
        t = sde.time(u) if jumps else u
        slope = field(t, y)
        if not bool(slope.isfinite().all()):  # no solver ends on its own then
            raise RuntimeError(gave_up(f"a slope that is not finite at t = {t.item():.3g}"))
        return slope * -((sde.sigma(t) / sde.g(t)) ** 2).item() if jumps else slope

    def gave_up(reason: object) -> str:
        return (
            f"{method} gave up after {count} evaluations between t = {t0:.3g} and {t1:.3g} ({reason}); "
            f"check the model there, or raise rtol and atol (now {rtol:g} and {atol:g}) or t_min"
        )

    if method == "RK45":

        def flat(t: float, state: np.ndarray) -> np.ndarray:
            return counted(t, torch.from_numpy(state).to(y).reshape(y.shape)).flatten().double().cpu().numpy()

        solution = solve_ivp(flat, (u0, u1), y.flatten().double().cpu().numpy(), rtol=rtol, atol=atol, method="RK45")
        if not solution.success:
            raise RuntimeError(gave_up(solution.message))
        return torch.from_numpy(solution.y[:, -1]).reshape(y.shape).to(y), count

    times = torch.tensor([u0, u1], dtype=y.dtype, device=y.device)
    try:
        end = odeint(counted, y, times, rtol=rtol, atol=atol, method=method, options={"step_t": times[1:]})[-1]
    except AssertionError as error:
        raise RuntimeError(gave_up(error)) from error
    return end, count
