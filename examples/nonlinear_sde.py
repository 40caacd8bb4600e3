"""A nonlinear SDE, whose kernel has no closed form, learned from its paths: ``python -m examples.nonlinear_sde``

A particle in a double well, with a speed b(t) that grows from `SLOWEST` to `FASTEST`,

    dx = b(t) (x - x³) dt + sqrt(b(t)) dw,        stationary density ~ exp(x² - x⁴/2),

starts from three narrow Gaussians. Denoising has no target here: E[z | x_t] needs the kernel. Implicit and sliced
score matching take simulated states x_t alone. The truth is that of a fine grid, on which `fokker_planck` solves the
equation of the density.

The command prints its numbers, draws the picture and fills a copy of docs/score_matching.md in runs/, or with --page
another page, such as docs/score_matching.md itself.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.linalg import solve_banded
from scipy.stats import wasserstein_distance
from torch import Tensor

from benchmarks import pages
from benchmarks.timing import machine
from score_sde import SDE, Diffusion, backward, closed_form, implicit, paths, projections, sliced
from score_sde.machine.progress import with_progress
from score_sde.networks import MLP
from score_sde.sdes import VPSDE, like

SLOWEST, FASTEST = 0.1, 15.9  # b(0) and b(1): the clock of the wells runs to 8
START = ([0.25, 0.45, 0.3], [[-1.6], [-0.2], [1.2]], [0.2**2, 0.25**2, 0.15**2])  # weights, means, variances
BORDERS = (-0.95, 0.65)  # between the start's components
STEPS = 500  # of time, on the grid
FINER = 4  # steps of the paths to one of the grid's: theirs is of order 1 only
GRID = np.linspace(-4, 4, 801)
SHOWN = (0.0, 0.05, 0.15, 0.4, 1.0)  # times of the picture and the table

Score = Callable[[Tensor, Tensor], Tensor]


def speed(t: Tensor) -> Tensor:
    """b(t)."""
    return SLOWEST + (FASTEST - SLOWEST) * t


WELLS = Diffusion(drift=lambda x, t: like(speed(t), x) * (x - x**3), diffusion=lambda t: speed(t).sqrt())


# -- the truth


def fokker_planck(sde: Diffusion | SDE, density: np.ndarray, x: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Densities of a one-dimensional SDE, (len(times), N), from `density` at times[0] on the uniform grid x, (N,).

    dp/dt = -dJ/dx with J = f p - g²/2 dp/dx, zero at both ends: finite volumes with the flux of Chang & Cooper (1970)
    and Scharfetter & Gummel (1969), exact where p is stationary with a drift that is constant between two points, and
    Crank and Nicolson's step from one of the times to the next. Order 2 in both; mass is kept to rounding. Where both
    steps are fine densities stay positive, up to rounding. g must be positive.
    """
    h = x[1] - x[0]
    faces = torch.from_numpy((x[1:] + x[:-1]) / 2)[:, None]

    def rates(t: float) -> np.ndarray:
        """dp/dt as a matrix in `solve_banded`'s form, (3, N): rows above, on and below the diagonal."""
        now = torch.tensor(t, dtype=torch.float64)
        spread = float(sde.diffusion(now)) ** 2 / 2
        w = sde.drift(faces, now)[:, 0].numpy() * h / spread
        up, down = (_bernoulli(sign * w) * spread / h**2 for sign in (-1, 1))  # J/h = up p[i] - down p[i+1]
        matrix = np.zeros((3, len(x)))
        matrix[0, 1:], matrix[2, :-1] = down, up
        matrix[1, :-1] -= up
        matrix[1, 1:] -= down
        return matrix

    states, old = [density], rates(times[0])
    for k, t in zip(np.diff(times), times[1:]):
        p, new = states[-1], rates(t)
        right = p + k / 2 * (old[1] * p + np.append(old[0, 1:] * p[1:], 0) + np.append(0, old[2, :-1] * p[:-1]))
        left = -k / 2 * new
        left[1] += 1
        states.append(solve_banded((1, 1), left, right))
        old = new
    return np.stack(states)


def _bernoulli(w: np.ndarray) -> np.ndarray:
    """w / (exp(w) - 1), 1 at w = 0."""
    w = np.clip(w, -500, 500)
    small = np.abs(w) < 1e-6
    return np.where(small, 1 - w / 2, w / np.expm1(np.where(small, 1, w)))


def score_on_grid(density: np.ndarray, x: np.ndarray) -> np.ndarray:
    """d/dx log p by central differences, in the density's shape; of order 2."""
    return np.gradient(np.log(np.maximum(density, 1e-300)), x, axis=-1)


def reversed_in_time(sde: Diffusion, score: Score) -> Diffusion:
    """The SDE that runs back, as one forward in u = 1 - t: its drift is g² score - f."""
    return Diffusion(
        drift=lambda x, u: -sde.reverse_drift(x, 1 - u, score(x, 1 - u)), diffusion=lambda u: sde.diffusion(1 - u)
    )


class Truth(NamedTuple):
    """Densities and scores at `times`, (T, N) on the grid x, and the density towards which they go, (N,)."""

    x: np.ndarray
    times: np.ndarray
    density: np.ndarray
    score: np.ndarray
    stationary: np.ndarray


def solve(x: np.ndarray = GRID, steps: int = STEPS) -> Truth:
    """The truth of the wells."""
    times = np.linspace(0, 1, steps + 1)
    start = torch.from_numpy(x)[:, None]
    density = closed_form.Mixture(VPSDE(), *START).log_prob(start, torch.zeros((), dtype=torch.float64)).exp().numpy()
    densities = fokker_planck(WELLS, density, x, times)
    stationary = np.exp(x**2 - x**4 / 2)
    return Truth(x, times, densities, score_on_grid(densities, x), stationary / (stationary.sum() * (x[1] - x[0])))


# -- learning


def start(n: int, generator: torch.Generator) -> Tensor:
    """n points of the start, (n, 1)."""
    weights, means, variances = (torch.tensor(a) for a in START)
    k = torch.multinomial(weights, n, replacement=True, generator=generator)
    return means[k] + variances[k, None].sqrt() * torch.randn(n, 1, generator=generator)


def simulate(walkers: int, steps: int, generator: torch.Generator) -> Tensor:
    """States of paths at steps + 1 even times from 0 to 1, (steps + 1, walkers, 1)."""
    times = torch.linspace(0, 1, FINER * steps + 1, dtype=torch.float64)
    return paths(WELLS, start(walkers, generator), times, generator)[::FINER].clone()


class TimeScore(torch.nn.Module):
    """A score s(x, t) of points on the line: the stationary density's, 2 (x - x³), and what a network adds to it.

    Beyond the data a network goes on linearly. Alone it would leave the way back to the drift, which in reversed time
    is outward there and cubic: far points escape to infinity. With the stationary score it points inward.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.network = MLP(1, width=width, depth=2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return stationary_score(x, t) + self.network(x, 100 * t.to(x).expand(len(x)))


Estimate = Callable[[TimeScore, Tensor, Tensor, Tensor], Tensor]  # (score, x, t, projections) -> (B,)
OBJECTIVES: dict[str, Estimate] = {
    "implicit": lambda s, x, t, v: implicit(s, x, t),
    "sliced": lambda s, x, t, v: sliced(s, x, t, v, variance_reduced=False),
    "sliced, variance-reduced": lambda s, x, t, v: sliced(s, x, t, v),
}


def learn(estimate: Estimate, states: Tensor, iterations: int = 3000, batch: int = 512, seed: int = 0) -> TimeScore:
    """A score trained on simulated states, (T, P, 1), at T even times from 0 to 1; every t has the same weight.

    Projections are Gaussian: in one dimension signs would make both sliced objectives equal to the implicit one.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        score = TimeScore()
    optimizer = torch.optim.Adam(score.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=iterations, pct_start=0.1)
    for _ in range(iterations):
        k = torch.randint(len(states), (batch,), generator=generator)
        x = states[k, torch.randint(states.shape[1], (batch,), generator=generator)]
        v = projections(torch.randn(1, *x.shape, generator=generator), "gaussian")
        loss = estimate(score, x, k / (len(states) - 1), v).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return score.requires_grad_(False)


def stationary_score(x: Tensor, t: Tensor) -> Tensor:
    """2 (x - x³), the score of the density towards which all others go."""
    return 2 * (x - x**3)


def gaussian_score(states: Tensor) -> Score:
    """The best score that is linear in x at every t, of a Gaussian with the states' mean and variance."""
    mean, variance = states.mean(1)[:, 0], states.var(1)[:, 0]

    def score(x: Tensor, t: Tensor) -> Tensor:
        k = (t * (len(states) - 1)).round().long()
        return (like(mean[k], x) - x) / like(variance[k], x)

    return score


# -- measuring


def on_grid(score: Score, x: np.ndarray, times: Sequence[float] | np.ndarray) -> np.ndarray:
    """A score at the times and on the grid x, (T, N)."""
    points = torch.from_numpy(x).float()[:, None]
    with torch.no_grad():
        rows = [score(points, torch.tensor(t, dtype=torch.float64))[:, 0] for t in times]
    return torch.stack(rows).double().numpy()


def relative_error(found: np.ndarray, truth: Truth) -> np.ndarray:
    """E |s - s*|² / E |s*|² under the true density at each of the truth's times, (T,), for s `on_grid`, (T, N)."""
    mass = np.maximum(truth.density, 0)
    return (mass * (found - truth.score) ** 2).sum(1) / (mass * truth.score**2).sum(1)


def divergence(p: np.ndarray, q: np.ndarray, x: np.ndarray) -> float:
    """Kullback-Leibler divergence of q from p on the grid x, in nats."""
    p, q = np.maximum(p, 1e-300), np.maximum(q, 1e-300)
    return float((p * np.log(p / q)).sum() * (x[1] - x[0]))


def density_of_the_way_back(score: Score, truth: Truth) -> np.ndarray:
    """The density at t = 0 of the reverse SDE from the stationary density, (N,): what its samples would have."""
    back = reversed_in_time(WELLS, lambda x, t: score(x.float(), t).double())
    return fokker_planck(back, truth.stationary, truth.x, truth.times)[-1]


def bound(found: np.ndarray, truth: Truth) -> float:
    """What the divergence of the way back can be at most: that of the ends, and 1/2 ∫ g² E |s - s*|² dt.

    Song, Durkan, Murray & Ermon 2021, arXiv:2101.09258, theorem 1, which holds for any drift.
    """
    h = truth.x[1] - truth.x[0]
    error = (np.maximum(truth.density, 0) * (found - truth.score) ** 2).sum(1) * h
    b = speed(torch.from_numpy(truth.times)).numpy()
    return divergence(truth.density[-1], truth.stationary, truth.x) + float(np.trapezoid(b * error, truth.times)) / 2


def stationary_samples(n: int, truth: Truth, generator: torch.Generator) -> Tensor:
    """n points of the stationary density, (n, 1), by its inverse distribution function."""
    cdf = np.cumsum(truth.stationary) * (truth.x[1] - truth.x[0])
    u = torch.rand(n, generator=generator, dtype=torch.float64).numpy()
    return torch.from_numpy(np.interp(u, cdf, truth.x)).float()[:, None]


def shares(x: np.ndarray, weights: np.ndarray | None = None) -> list[float]:
    """The mass between the borders, where each of the start's components lies: three shares."""
    weights = np.ones(len(x)) if weights is None else weights
    k = np.searchsorted(BORDERS, x)
    return [float(weights[k == i].sum() / weights.sum()) for i in range(3)]


class Result(NamedTuple):
    """What was measured of a score, and samples of both ways back, (n,)."""

    score: Score
    seconds: float
    error: np.ndarray
    divergence: float
    bound: float
    sde: np.ndarray
    ode: np.ndarray


def measure(score: Score, seconds: float, truth: Truth, draws: int, steps: int = 500) -> Result:
    """The score's errors, and what the reverse SDE and the probability flow make of it."""
    generator = torch.Generator().manual_seed(5)
    ends = stationary_samples(draws, truth, generator)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    *_, by_sde = backward(WELLS, score, ends, times, generator)
    *_, by_ode = backward(WELLS, score, ends, times[::5])
    found = on_grid(score, truth.x, truth.times)
    return Result(
        score,
        seconds,
        relative_error(found, truth),
        divergence(truth.density[0], density_of_the_way_back(score, truth), truth.x),
        bound(found, truth),
        by_sde[:, 0].double().numpy(),
        by_ode[:, 0].double().numpy(),
    )


class Found(NamedTuple):
    """The truth, the simulated states, relative errors (T,) to compare with, and the result of every objective."""

    truth: Truth
    states: Tensor
    untrained: dict[str, np.ndarray]
    results: dict[str, Result]


def run(iterations: int = 3000, walkers: int = 20_000, draws: int = 5000) -> Found:
    """Simulate, learn and measure."""
    truth = solve()
    generator = torch.Generator().manual_seed(0)
    states = simulate(walkers, STEPS, generator)
    simple = {"a Gaussian at every t": gaussian_score(states), "the stationary score": stationary_score}
    untrained = {n: relative_error(on_grid(s, truth.x, truth.times), truth) for n, s in simple.items()}
    results = {}
    for name, estimate in with_progress(OBJECTIVES.items(), "estimates", len(OBJECTIVES), "estimate"):
        began = time.process_time()
        score = learn(estimate, states, iterations)
        results[name] = measure(score, time.process_time() - began, truth, draws)
        print(f"{name}: relative error {np.mean(results[name].error):.4f}, {results[name].seconds:.0f} s", flush=True)
    return Found(truth, states, untrained, results)


# -- showing


def score_table(found: Found) -> str:
    """Relative errors at the shown times and on average."""
    errors = {**found.untrained, **{name: r.error for name, r in found.results.items()}}
    at = [round(t * (len(found.truth.times) - 1)) for t in SHOWN]
    rows = []
    for name, error in errors.items():
        seconds = f"{found.results[name].seconds:.0f}" if name in found.results else ""
        rows.append((name, *(f"{error[k]:.4f}" for k in at), f"{error.mean():.4f}", seconds))
    return pages.table(("score", *(f"t = {t:g}" for t in SHOWN), "mean over t", "seconds"), rows)


def sample_table(truth: Truth, results: dict[str, Result], seed: int = 6) -> str:
    """How the ways back recover the start: shares of its components, distance to it, divergence and its bound."""
    p, x = truth.density[0], truth.x
    n = len(next(iter(results.values())).sde)
    exact = start(n, torch.Generator().manual_seed(seed))[:, 0].double().numpy()
    distance = partial(_distance, truth=truth)
    rows = [
        ("the start itself", _percent(shares(x, p)), "", "0", ""),
        (f"{n:,} exact draws", _percent(shares(exact)), distance(exact), "", ""),
    ]
    for name, r in results.items():
        rows.append((f"{name}, SDE", _percent(shares(r.sde)), distance(r.sde), f"{r.divergence:.4f}", f"{r.bound:.4f}"))
        rows.append((f"{name}, ODE", _percent(shares(r.ode)), distance(r.ode), "", ""))
    return pages.table(("way back with the score", "left / middle / right", "W₁", "KL, nats", "its bound"), rows)


def _distance(samples: np.ndarray, truth: Truth) -> str:
    return f"{wasserstein_distance(samples, truth.x, v_weights=np.maximum(truth.density[0], 0)):.4f}"


def _percent(values: Sequence[float]) -> str:
    return " / ".join(f"{100 * v:.1f}" for v in values) + " %"


def draw(found: Found) -> Figure:
    """Densities and scores at the shown times, the way back, and the errors over t."""
    truth, states, untrained, results = found
    figure = Figure(figsize=(13, 5), layout="constrained")
    axes = figure.subplots(2, len(SHOWN) + 1, width_ratios=(*(1 for _ in SHOWN), 1.6))
    for (top, low), t in zip(axes.T, SHOWN):
        k = round(t * (len(truth.times) - 1))
        p = truth.density[k]
        top.hist(states[k, :, 0].numpy(), 80, density=True, color="0.8")
        top.plot(truth.x, p, "k", lw=1)
        top.set(title=f"t = {t:g}", xlim=(-2.7, 2.7), yticks=[])
        where = p > 2e-3 * p.max()
        low.plot(truth.x[where], truth.score[k][where], "k", lw=2.5, alpha=0.4)
        for name, r in results.items():
            low.plot(truth.x, np.where(where, on_grid(r.score, truth.x, [t])[0], math.nan), lw=1, label=name)
        low.set(xlim=(-2.7, 2.7))
    axes[0, 0].set_ylabel("density: grid, and paths")
    axes[1, 0].set_ylabel("score: grid, and learned")
    axes[1, 3].legend(fontsize=7, loc="lower left")
    top, low = axes.T[-1]
    r = results["sliced"]
    top.hist(r.sde, 100, density=True, color="tab:blue", alpha=0.4, label="SDE")
    top.hist(r.ode, 100, density=True, histtype="step", color="tab:red", label="ODE")
    top.plot(truth.x, truth.density[0], "k", lw=1)
    top.set(title="the way back, sliced", xlim=(-2.7, 2.7), yticks=[])
    top.legend(fontsize=7)
    for r in results.values():
        low.semilogy(truth.times, r.error)
    for (name, error), style in zip(untrained.items(), (":", "--")):
        low.semilogy(truth.times, error, style, color="0.5", label=name)
    low.set(title="relative error of the score", xlabel="t", ylim=(1e-6, 3))
    low.legend(fontsize=7, loc="lower left")
    return figure


PAGE, FOLDER = "docs/score_matching.md", Path("runs/nonlinear_sde")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "python -m examples.nonlinear_sde", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--page", type=Path, help=f"the page to fill, such as {PAGE}; default a copy of it in {FOLDER}")
    return p


def main(arguments: list[str] | None = None) -> None:
    """Learn, measure, draw, fill the page."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    page = pages.page_for(options.page, pages.DOCS / "score_matching.md", FOLDER)
    began = time.perf_counter()
    found = run()
    truth = found.truth
    scores, samples = score_table(found), sample_table(truth, found.results)
    ends = divergence(truth.density[-1], truth.stationary, truth.x)
    caption = "A double well: densities, true and learned scores, and the way back"
    image = pages.picture(draw(found), page.parent / "images" / "nonlinear_sde.png", caption)
    where = f"{time.perf_counter() - began:.0f} seconds on one thread of {machine(torch.device('cpu'))}"
    note = f"{where}. At t = 1 the density is {ends:.1e} nats from the stationary one, where the way back begins."
    print(f"\n{scores}\n{samples}\n{note}")
    pages.fill(page, {"wells_scores": scores, "wells_samples": samples, "wells_picture": image, "wells_note": note})


if __name__ == "__main__":
    main()
