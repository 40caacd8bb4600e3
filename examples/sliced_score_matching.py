"""Sliced score matching's own experiment in small (Song et al. 2019): ``python -m examples.sliced_score_matching``

An energy network is trained by every objective of `score_matching` on the tables that come with scikit-learn, and
judged by the exact score-matching loss of rows that were held out. Then time against dimension: seconds per step
of one network whose input grows.

The command prints its numbers, draws the picture and fills a copy of docs/score_matching.md in runs/, or with --page
another page, such as docs/score_matching.md itself.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn import datasets
from torch import Tensor, nn

from benchmarks import pages
from benchmarks.timing import Clock, Spread, machine, ratio, spread
from score_sde import Energy, denoising_at, finite_difference, implicit, projections, sliced
from score_sde.machine.progress import with_progress
from score_sde.networks import MLP

Score = Callable[[Tensor, Tensor], Tensor]
Objective = Callable[[Score, Tensor, Tensor, Tensor], Tensor]  # (score, x, t, z) -> (B,), z standard normal
NOW = torch.zeros(())  # there is no time here


def _along(z: Tensor) -> Tensor:
    """One projection of signs for each example."""
    return projections(z[None])


OBJECTIVES: dict[str, Objective] = {
    "implicit": lambda s, x, t, z: implicit(s, x, t),
    "sliced": lambda s, x, t, z: sliced(s, x, t, _along(z), variance_reduced=False),
    "sliced, variance-reduced": lambda s, x, t, z: sliced(s, x, t, _along(z)),
    "finite differences": lambda s, x, t, z: finite_difference(s, x, t, _along(z), 0.05),
    "denoising, σ = 0.1": lambda s, x, t, z: denoising_at(s, x, t, z, 0.1),
    "denoising, σ = 0.3": lambda s, x, t, z: denoising_at(s, x, t, z, 0.3),
}


# -- data


class Rows(NamedTuple):
    """Three parts of a table, (N, D) each, in coordinates in which the training part has mean 0 and covariance I."""

    train: Tensor
    validation: Tensor
    test: Tensor


class Table(NamedTuple):
    """How a table is loaded; its principal axes that are kept; whether its features have units to be taken out first.

    Kept are axes of a twentieth of a feature's variance or more, at most 20: beyond them lie near-copies of features.
    """

    load: Callable[[], np.ndarray]
    axes: int
    units: bool = True


TABLES = {
    "wine": Table(lambda: datasets.load_wine().data, 13),
    "breast cancer": Table(lambda: datasets.load_breast_cancer().data, 18),
    # Without sex, of two values, and s2 and s4, computed from the others: on a surface there is no density.
    "diabetes": Table(lambda: np.delete(datasets.load_diabetes().data, (1, 5, 7), axis=1), 7),
    "digits": Table(lambda: datasets.load_digits().data, 20, units=False),  # pixels that are hardly ever inked stay so
}


def rows(name: str, seed: int) -> Rows:
    """The table's rows split by seed into 70 %, 15 % and 15 %, standardised and whitened by the training part alone."""
    load, axes, units = TABLES[name]
    table = load()
    table = table[np.random.default_rng(seed).permutation(len(table))]
    n, m = round(0.7 * len(table)), round(0.15 * len(table))
    train = table[:n]
    table = (table - train.mean(0)) / (train.std(0) if units else 1)
    variances, directions = np.linalg.eigh(table[:n].T @ table[:n] / n)
    white = torch.from_numpy(table @ directions[:, -axes:] / np.sqrt(variances[-axes:])).float()
    return Rows(white[:n], white[n : n + m], white[n + m :])


# -- learning


class Factor(nn.Module):
    """E(x) = |x|²/2 + f(x): the Gaussian fitted to the training rows times a factor exp(-f), which begins as 1.

    As in Wenliang et al. 2019 (arXiv:1811.08357), whose family has a Gaussian for its base density.
    """

    def __init__(self, features: int, width: int = 64) -> None:
        super().__init__()
        last = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(last.weight)
        self.f = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), last)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x.square().sum(1) / 2 + self.f(x)[:, 0]


class Fit(NamedTuple):
    """Mean exact score-matching losses of a model on its table: of the test rows, and beside them the Gaussian's."""

    loss: float
    gaussian: float
    steps: int  # those of the best model


def gaussian_loss(x: Tensor) -> float:
    """The mean of |s|²/2 + tr(ds/dx) for the Gaussian fitted to the training rows, s = -x: |x|²/2 - D."""
    return float(x.double().square().sum(1).mean()) / 2 - x.shape[1]


def fit(
    objective: Objective, data: Rows, seed: int, *, iterations: int = 1000, every: int = 25, patience: int = 10
) -> Fit:
    """Train on batches of 128 until `patience` looks at the validation rows, one `every` steps, show nothing better.

    All objectives are stopped by the same measure, the exact loss. The best model of the looks is kept: at first it is
    the Gaussian.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        score = Energy(Factor(data.train.shape[1]))
    optimizer = torch.optim.Adam(score.parameters(), lr=2e-3)
    best, kept, steps = loss_of(score, data.validation), copy.deepcopy(score), 0
    for step in range(1, iterations + 1):
        x = data.train[torch.randint(len(data.train), (128,), generator=generator)]
        loss = objective(score, x, NOW, torch.randn(x.shape, generator=generator)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % every == 0:
            found = loss_of(score, data.validation)
            if found < best:
                best, kept, steps = found, copy.deepcopy(score), step
            elif step - steps >= patience * every:
                break
    return Fit(loss_of(kept, data.test), gaussian_loss(data.test), steps)


@torch.no_grad()
def loss_of(score: Score, x: Tensor) -> float:
    """The mean exact score-matching loss of a score on rows."""
    return float(implicit(score, x, NOW).double().mean())


class Job(NamedTuple):
    """One fit."""

    table: str
    objective: str
    seed: int


def work(job: Job) -> Fit:
    """The fit of a job, on one thread."""
    torch.set_num_threads(1)
    return fit(OBJECTIVES[job.objective], _rows(job.table, job.seed), job.seed)


_rows = lru_cache(rows)


def experiment(seeds: int = 3, workers: int = 2) -> dict[Job, Fit]:
    """Every objective on every table for every seed, of the split, the weights and the batches, side by side."""
    jobs = [Job(*names, seed) for names in product(TABLES, OBJECTIVES) for seed in range(seeds)]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        found = {}
        for job, result in with_progress(zip(jobs, pool.map(work, jobs)), "fits", len(jobs), "fit"):
            found[job] = result
            if job.seed == seeds - 1:
                gain = np.mean([f.loss - f.gaussian for j, f in found.items() if j[:2] == job[:2]])
                print(f"{job.table}, {job.objective}: {gain:+.2f} beside the Gaussian", flush=True)
    return found


# -- time against dimension

DIMENSIONS = (2, 4, 8, 16, 32, 64, 128, 256, 512)
TIMED = ("implicit", "sliced, variance-reduced", "finite differences", "denoising, σ = 0.1")


def seconds_per_step(d: int, clock: Clock, batch: int = 64) -> dict[str, list[float]]:
    """Seconds of loss and gradient of one score network, of 128 channels, with d inputs and outputs; by turns."""
    score = MLP(d, width=128, depth=2)
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(batch, d, generator=generator) for _ in range(2))
    model = _Timeless(score)

    def step(objective: Objective) -> None:
        score.zero_grad()
        objective(model, x, NOW, z).mean().backward()

    return clock.compare({name: partial(step, OBJECTIVES[name]) for name in TIMED})


class _Timeless(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x, t.to(x).expand(len(x)))


def growth(medians: dict[int, Spread], beyond: int = 64) -> float:
    """The exponent a of seconds ~ D^a, fitted to dimensions from `beyond` on."""
    d = [k for k in medians if k >= beyond]
    return float(np.polyfit(np.log(d), np.log([medians[k].median for k in d]), 1)[0])


# -- showing


def loss_table(found: dict[Job, Fit]) -> str:
    """Held-out losses: the Gaussian's, and what each objective's model has less, paired by split."""
    head = ["held-out loss"]
    lines = [["Gaussian, closed form"], *([f"{name}, beside it"] for name in OBJECTIVES)]
    for table in TABLES:
        data = rows(table, 0)
        head.append(f"{table}, D = {data.train.shape[1]}, N = {len(data.train)}")
        of_table = {job: f for job, f in found.items() if job.table == table}
        lines[0].append(pages.cell([f.gaussian for job, f in of_table.items() if job.objective == "implicit"], 2))
        for line, name in zip(lines[1:], OBJECTIVES):
            line.append(pages.cell([f.loss - f.gaussian for job, f in of_table.items() if job.objective == name], 2))
    return pages.table(head, lines)


def time_table(taken: dict[int, dict[str, list[float]]]) -> str:
    """Milliseconds per step by dimension, and ratios within turns."""
    lines = []
    for d, times in taken.items():
        cells = [f"{1e3 * spread(times[name]).median:.2f}" for name in TIMED]
        by_sliced = ratio(times["implicit"], times["sliced, variance-reduced"])
        by_denoising = ratio(times["sliced, variance-reduced"], times["denoising, σ = 0.1"])
        lines.append([str(d), *cells, str(by_sliced), str(by_denoising)])
    return pages.table(["D", *(name.split(", σ")[0] for name in TIMED), "implicit/sliced", "sliced/denoising"], lines)


def draw(found: dict[Job, Fit], taken: dict[int, dict[str, list[float]]]) -> Figure:
    """Held-out losses beside the Gaussian's, and seconds against dimension."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for k, name in enumerate(OBJECTIVES):
        for i, table in enumerate(TABLES):
            gains = [f.loss - f.gaussian for job, f in found.items() if job[:2] == (table, name)]
            place = i + 0.12 * (k - (len(OBJECTIVES) - 1) / 2)
            label = name if i == 0 else None
            left.errorbar(place, np.mean(gains), np.std(gains, ddof=1), fmt="o", color=f"C{k}", ms=5, label=label)
    left.axhline(0, color="k", lw=0.8)
    left.set_yscale("symlog", linthresh=1)
    left.set(xticks=range(len(TABLES)), title="held-out loss beside the fitted Gaussian's: lower is better")
    left.set_xticklabels(TABLES)
    left.legend(fontsize=8, ncols=2)
    for name in TIMED:
        color = f"C{list(OBJECTIVES).index(name)}"
        right.loglog(
            list(taken), [spread(times[name]).median for times in taken.values()], "o-", color=color, label=name
        )
    right.set(title="seconds per step", xlabel="dimension D", xticks=list(taken), xticklabels=list(map(str, taken)))
    right.minorticks_off()
    right.legend(fontsize=8)
    return figure


PAGE, FOLDER = "docs/score_matching.md", Path("runs/sliced_score_matching")


def parser() -> argparse.ArgumentParser:
    shown = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser("python -m examples.sliced_score_matching", description=__doc__, formatter_class=shown)
    p.add_argument("--page", type=Path, help=f"the page to fill, such as {PAGE}; default a copy of it in {FOLDER}")
    return p


def main(arguments: list[str] | None = None) -> None:
    """Fit, time, draw, fill the page."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    page = pages.page_for(options.page, pages.DOCS / "score_matching.md", FOLDER)
    began = time.perf_counter()
    found = experiment()
    middle = time.perf_counter()
    clock = Clock(torch.device("cpu"), threads=1, seconds=1.0)
    sizes = with_progress(DIMENSIONS, "times", len(DIMENSIONS), "dimension")
    taken = {d: seconds_per_step(d, clock) for d in sizes}
    losses, times = loss_table(found), time_table(taken)
    grown = {name: growth({d: spread(t[name]) for d, t in taken.items()}) for name in TIMED}
    exponents = ", ".join(f"{name.split(', σ')[0]} {a:.2f}" for name, a in grown.items())
    image = page.parent / "images" / "sliced_score_matching.png"
    shown = pages.picture(draw(found, taken), image, "Held-out losses on four tables, and seconds against dimension")
    note = (
        f"{middle - began:.0f} seconds for {len(found)} fits in two processes, {time.perf_counter() - middle:.0f} for "
        f"the times, on one thread each of {machine(clock.device)}."
    )
    grows = f"Seconds grow as D to the power of, from D = 64 on: {exponents}."
    print(f"\n{losses}\n{times}\n{grows}\n{note}")
    pages.fill(page, {"tables": losses, "times": f"{times}\n{grows}", "sliced_picture": shown, "sliced_note": note})


if __name__ == "__main__":
    main()
