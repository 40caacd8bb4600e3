"""Makes the two figures of ddpm_is_vp.md and prints the numbers it states: python docs/ddpm_is_vp.py --out docs

The figures go to runs/ddpm_is_vp, or to the folder of --out. It takes up to a minute.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from score_sde import DDPM, SDE, VPSDE, Ancestral, EulerMaruyama, ReverseDiffusion, Sampler, ScoreModel
from score_sde.models.closed_form import Mixture

matplotlib.use("Agg")
import matplotlib.pyplot as plt

VP = VPSDE(beta_min=0.1, beta_max=20.0)
STEPS = [100, 200, 500, 1000, 2000, 5000, 10_000]
TIMES = [0.25, 0.5, 1.0]


def exact(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def slope(x: ArrayLike, y: ArrayLike) -> float:
    """Least-squares slope of log y against log x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def data(sde: SDE) -> Mixture:
    """The exact model of one-dimensional data with two modes."""
    return Mixture(sde, [0.4, 0.6], [[-1.0], [1.0]], [0.02, 0.02])


def schedule_error(n: int, t: float) -> float:
    """alpha_bar at time t minus alpha(t)²."""
    return DDPM.from_sde(VP, n).alpha_bar[round(t * n) - 1].item() - VP.alpha(exact(t)).item() ** 2


def schedule_constant(t: float) -> float:
    """The limit of N times `schedule_error`."""
    rise = VP.beta_max - VP.beta_min
    squares = ((VP.beta_min + rise * t) ** 3 - VP.beta_min**3) / (3 * rise)  # integral of beta² from 0 to t
    return VP.alpha(exact(t)).item() ** 2 * (rise * (t - t**2) - squares) / 2


def step_errors(n: int, t: float) -> tuple[float, float, float, float]:
    """(beta, and three largest differences between single steps at t over nine points x).

    The means of DDPM's and the reverse-diffusion step on the chain; of DDPM's and the VP SDE's; and what DDPM's two
    variances, beta and beta-tilde, make of the same noise.
    """
    chain = DDPM.from_sde(VP, n)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    times = exact(t), exact(t - 1 / n)
    on_chain, on_sde = data(chain.as_sde()), data(VP)
    mean = Ancestral("large").step(on_chain, x, *times, torch.zeros_like)
    same = ReverseDiffusion().step(on_chain, x, *times, torch.zeros_like)
    other = ReverseDiffusion().step(on_sde, x, *times, torch.zeros_like)
    large, small = (Ancestral(v).step(on_chain, x, *times, torch.ones_like) for v in ("large", "small"))
    apart = [(mean - same), (mean - other), (large - small)]
    return chain.betas[round(t * n) - 1].item(), *(difference.abs().max().item() for difference in apart)


def path(sampler: Sampler, model: ScoreModel, x: Tensor, n: int, brownian: Tensor) -> Tensor:
    """States (n + 1, B, 1) of a sampler whose noise is the Brownian path's: n blocks of its increments."""
    z = iter(brownian.reshape(n, -1, *x.shape).sum(1) / (len(brownian) / n) ** 0.5)
    noise: Callable[[Tensor], Tensor] = lambda like: next(z)
    times = torch.arange(n, -1, -1, dtype=torch.float64) / n
    with torch.no_grad():
        return torch.stack([x, *sampler.walk(model, x, times, noise)])


def schedules(folder: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    t = torch.linspace(0, 1, 400, dtype=torch.float64)
    left.semilogy(t, VP.alpha(t) ** 2, color="black", linewidth=1, label="VP SDE, α(t)²")
    for n, mark in ((25, "o"), (100, "."), (1000, "--")):
        bar = DDPM.from_sde(VP, n).alpha_bar
        left.semilogy((np.arange(n) + 1) / n, bar, mark, markersize=4, linewidth=3, alpha=0.6, label=f"DDPM, N = {n}")
    left.set(xlabel="t = (i + 1)/N", ylabel="share of the data's variance", title="ᾱ and α²")
    left.legend()

    print("alpha_bar at t minus alpha(t)²: slope in N, and N times the error at N = 10,000 beside its limit")
    for t_ in TIMES:
        error = [schedule_error(n, t_) for n in STEPS]
        rate, limit = slope(STEPS, np.abs(error)), schedule_constant(t_)
        print(f"  t = {t_:<4}  slope {rate:.3f} (N >= 1000: {slope(STEPS[3:], np.abs(error[3:])):.3f})", end="")
        print(f"   N error {STEPS[-1] * error[-1]:+.5f}   limit {limit:+.5f}")
        (line,) = right.loglog(STEPS, np.abs(error), "o", label=f"t = {t_}, slope {rate:.2f}")
        right.loglog(STEPS, np.abs(limit) / np.array(STEPS), color=line.get_color(), linewidth=1)
    right.set(xlabel="N", ylabel="|ᾱ − α²|", title="The error is C(t)/N (lines: C computed, not fitted)")
    right.legend()
    figure.savefig(folder / "ddpm_vs_vp_schedule.png", dpi=100)


def convergence(folder: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    rows = np.array([step_errors(n, 0.5) for n in STEPS]).T
    print("one step at t = 0.5: what separates the samplers, slope in beta")
    labels = ["means, on the chain", "means, DDPM and the VP SDE", "noise, β and β̃"]
    for error, label, mark in zip(rows[1:], labels, "os^", strict=True):
        rate = slope(rows[0], error)
        print(f"  {label:<28} slope {rate:.3f}   at N = 1000 (beta = {rows[0][3]:.4f}): {error[3]:.2e}")
        left.loglog(rows[0], error, mark + "-", linewidth=1, markersize=4, label=f"{label}: slope {rate:.2f}")
    left.set(xlabel="β", ylabel="difference after one step", title="DDPM's step and reverse diffusion's")
    left.legend()

    fine, count = 12_800, 4
    generator = torch.Generator().manual_seed(1)
    brownian = torch.randn(fine, count, 1, dtype=torch.float64, generator=generator)
    start = torch.randn(count, 1, dtype=torch.float64, generator=generator)
    truth = path(EulerMaruyama(), data(VP), start, fine, brownian)
    print(f"paths: DDPM against the VP SDE in {fine} steps, same Brownian motion, {count} paths")
    steps, error = [100, 200, 400, 800], []
    for n in steps:
        walked = path(Ancestral("large"), data(DDPM.from_sde(VP, n).as_sde()), start, n, brownian)
        error.append((walked - truth[:: fine // n])[: n - n // 10 + 1].abs().amax(0).mean().item())
        print(f"  N = {n:<5} largest distance from t = 1 to 0.1, mean of the paths: {error[-1]:.4f}")
        if n == 100:
            right.plot(np.linspace(1, 0, n + 1), walked[..., 0], ".", markersize=4, color="tab:orange")
    print(f"  slope in N {slope(steps, error):.2f}")
    right.plot(np.linspace(1, 0, fine // 64 + 1), truth[::64, :, 0], color="tab:blue", linewidth=0.8)
    right.plot([], [], color="tab:blue", label=f"VP SDE, {fine} steps")
    right.plot([], [], ".", color="tab:orange", label="DDPM, 100 steps")
    right.set(xlabel="t", title="The same Brownian motion through both", xlim=(1, 0))
    right.legend()
    figure.savefig(folder / "ddpm_vs_vp_convergence.png", dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ddpm_is_vp"), help="folder of the figures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    schedules(out)
    convergence(out)
