"""Error against network evaluations: our samplers, diffusers' and score_sde_pytorch's, on the same models and noise.

``python -m benchmarks.solvers [--model WORKDIR] [--peer PATH] [--laws] [--plot FILE]``

A deterministic sampler is judged by how far it ends from where the probability flow goes from the same noise, any by
how far its law is from the data's. Evaluations are counted on the model. diffusers' schedulers walk the grids that ours
do; score_sde_pytorch's make their own.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits
from torch import Tensor

from examples.pages import save
from score_sde import (
    DDIM,
    SDE,
    VESDE,
    VPSDE,
    Ancestral,
    Churn,
    CosineSDE,
    DPMSolver,
    EmbeddedODE,
    EulerMaruyama,
    FixedODE,
    Heun,
    Langevin,
    Multistep,
    PredictorCorrector,
    ReverseDiffusion,
    Sampler,
    ScoreModel,
    Solver,
    UniPC,
    load,
    recommended,
    sliced_wasserstein,
    times,
)
from score_sde.closed_form import Gaussian, Mixture
from score_sde.data import load_data
from score_sde.evaluate import Counted
from score_sde.ode import integrate
from score_sde.samplers.base import noise_source
from score_sde.samplers.deterministic import velocity

from . import peer as peers
from .peer import Peer
from .peer_samplers import PeerODE, PeerPC, known
from .schedulers import DETERMINISTIC, STOCHASTIC
from .timing import Table, machine

BUDGETS = (5, 7, 10, 15, 20, 35, 50, 100)
JUDGED = (7, 10, 15, 20, 35)
LONG = 1000  # evaluations, of the stochastic ones besides
REST = tuple(b for b in BUDGETS if b not in JUDGED)
OF_LAWS = (10, 20, 35, 100, LONG)
PATHS, TRAINED_PATHS, SAMPLES, IMAGES = 128, 32, 1024, 256
GRIDS: dict[str, Callable[[SDE, int], Tensor]] = {
    "quadratic": times.quadratic,
    "log_snr": times.log_snr,
    "karras": times.karras,
    "arcsinh": times.arcsinh,
}


class Subject(NamedTuple):
    """A sampler, who made it, and its name there; a `grid` of its own is the only one that it walks."""

    maker: str
    name: str
    sampler: Sampler
    grid: str | None = None

    def __str__(self) -> str:
        return f"{self.maker}: {self.name}"


class Problem(NamedTuple):
    """A model, states at t = 1, where the flow takes them at t_min, and two references' median distance."""

    name: str
    model: ScoreModel
    sde: SDE
    start: Tensor
    end: Tensor
    doubt: float


class Run(NamedTuple):
    """Root mean square distances from the flow's ends: their median, and the 90 % quantile, over the examples."""

    subject: str
    grid: str
    problem: str
    budget: int
    nfe: int = 0
    median: float = math.nan
    tail: float = math.nan


DEFAULT, PEER = "ours: the default", "score_sde_pytorch"


def deterministic(peer: Peer | None) -> list[Subject]:
    """Who is judged by the distance from the flow."""
    mine: dict[str, Sampler] = {
        "DDIM": DDIM(),
        "Heun": Heun(),
        "DPM-Solver 2": DPMSolver(2),
        "DPM-Solver 3": DPMSolver(3),
        "DPM-Solver++ 2S": DPMSolver(2, "data"),
        "DPM-Solver++ 3S": DPMSolver(3, "data"),
        "Multistep 2": Multistep(2),
        "Multistep 3": Multistep(3),
        "Multistep 3, lower": Multistep(3, start="lower"),
        "Multistep 2, noise": Multistep(2, "noise"),
        "Multistep 3, noise": Multistep(3, "noise"),
        "Multistep 3, noise, lower": Multistep(3, "noise", start="lower"),
        "UniPC 2": UniPC(2),
        "UniPC 3": UniPC(3),
        "UniPC 3, lower": UniPC(3, start="lower"),
        "UniPC 2, noise": UniPC(2, predict="noise"),
        "UniPC 3, noise": UniPC(3, predict="noise"),
        "UniPC 3, noise, lower": UniPC(3, predict="noise", start="lower"),
        "RK4 in t": FixedODE("rk4"),
    }
    theirs = [Subject("diffusers", name, sampler) for name, sampler in DETERMINISTIC.items()]
    ours = [Subject("ours", name, sampler) for name, sampler in mine.items()]
    if peer is None:
        return [*ours, *theirs]
    flow = PeerPC("reverse_diffusion", "none", peer, flow=True)
    return [*ours, *theirs, Subject(PEER, "reverse diffusion, flow", flow, "its own")]


def stochastic(peer: Peer | None) -> list[Subject]:
    """Who else is judged by the distance of laws, on one grid each: that of the papers and of their code."""
    corrected = PredictorCorrector(ReverseDiffusion(), Langevin(norm="batch"))
    mine: dict[str, tuple[Sampler, str]] = {
        "Euler-Maruyama": (EulerMaruyama(), "uniform"),
        "reverse diffusion": (ReverseDiffusion(), "uniform"),
        "PC, Langevin": (corrected, "uniform"),
        "ancestral": (Ancestral(), "log_snr"),
        "Multistep 2, eta 1": (Multistep(2, eta=1.0), "log_snr"),
        "Churn 40": (Churn(), "karras"),
    }
    found = [Subject("ours", name, sampler, grid) for name, (sampler, grid) in mine.items()]
    found += [Subject("diffusers", name, sampler, "log_snr") for name, sampler in STOCHASTIC.items()]
    if peer is not None:
        for predictor, corrector in (
            ("euler_maruyama", "none"),
            ("reverse_diffusion", "none"),
            ("reverse_diffusion", "langevin"),
        ):
            name = predictor.replace("_", " ") + (", Langevin" if corrector == "langevin" else "")
            found.append(Subject(PEER, name, PeerPC(predictor, corrector, peer), "its own"))
    return found


# --- problems


def mixtures() -> Iterator[tuple[str, Mixture]]:
    """Eight unequal Gaussians, of deviations from 0.05 to 0.3 in each dimension, under three SDEs."""
    g = torch.Generator().manual_seed(0)
    for d in (2, 10):
        means = 0.7 * torch.randn(8, d, generator=g, dtype=torch.float64)
        log_std = torch.empty(8, d, dtype=torch.float64).uniform_(math.log(0.05), math.log(0.3), generator=g)
        for name, sde in {"VP": VPSDE(), "VE": VESDE(), "cosine": CosineSDE()}.items():
            yield f"{d}-D, {name}", Mixture(sde, range(1, 9), means, torch.exp(2 * log_std))


@torch.no_grad()
def mixture_problem(name: str, model: Mixture, count: int = PATHS) -> Problem:
    """Its ends by torchdiffeq's dopri8 in t, at 1e-12; and by our embedded pair in log SNR."""
    sde, shape = model.sde, (count, *model.shape)
    start = sde.prior(shape, noise_source(shape, 0, 0, torch.float64, torch.device("cpu")))
    solver = Solver("dopri8", 1e-12, 1e-12)
    end, _ = integrate(lambda t, x: velocity(model, x, t), start, 1.0, sde.t_min, solver=solver, sde=sde)
    *_, again = EmbeddedODE(1e-11, 1e-11).walk(model, start, times.log_snr(sde, 1), _refuse)
    return Problem(name, model, sde, start, end, float(distances(end, again).median()))


@torch.no_grad()
def trained_problem(workdir: Path, count: int = TRAINED_PATHS) -> Problem:
    """A trained model of digits; converged in 300 steps of order 4; again in 300 of order 3, on another grid."""
    model = load(workdir)
    sde, shape = replace(model.sde, t_min=1e-3), (count, *load_data("digits").shape)  # t_min as in the demo's sampling
    start = sde.prior(shape, noise_source(shape, 0, 0, torch.float32, torch.device("cpu")))
    *_, end = UniPC(3, predict="noise").walk(model, start, times.arcsinh(sde, 300), _refuse)
    *_, again = Multistep(3).walk(model, start, times.log_snr(sde, 300), _refuse)
    return Problem("digits", model, sde, start, end, float(distances(end, again).median()))


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Root mean square over an example's values, (B,)."""
    return (x - y).flatten(1).square().mean(1).sqrt()


# --- runs


@cache
def steps_within(sampler: Sampler, budget: int) -> int:
    """The most steps of at most `budget` evaluations, counted; 0 where one step takes more."""
    model = Counted(Gaussian(VPSDE(), [0.0], 1.0))
    x = torch.zeros(1, 1, dtype=torch.float64)

    def cost(n: int) -> int:
        model.nfe = 0
        list(sampler.walk(model, x, times.log_snr(model.sde, n), torch.randn_like))
        return model.nfe

    low, high = 0, budget
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
    return low


@torch.no_grad()
def walk(problem: Problem, sampler: Sampler, grid: Tensor, seed: int = 0) -> tuple[Tensor, int]:
    """The last states, and the evaluations that they took."""
    model, x = Counted(problem.model), problem.start
    noise = noise_source(tuple(x.shape), torch.Generator().manual_seed(seed), 0, x.dtype, x.device)
    *_, x = sampler.walk(model, x, grid, noise)
    return x, model.nfe


def measure(problem: Problem, sampler: Sampler, grid: Tensor, row: Run) -> Run:
    """The row with what was found."""
    x, nfe = walk(problem, sampler, grid)
    median, tail = distances(x, problem.end).double().quantile(torch.tensor([0.5, 0.9]).double()).tolist()
    return row._replace(problem=problem.name, nfe=nfe, median=median, tail=tail)


class Kept:
    """`measure`, with each row kept in a file of JSON lines, so that a stopped command goes on where it was."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        lines = file.read_text().splitlines() if file is not None and file.exists() else []
        self.found = {run[:4]: run for run in (Run(*json.loads(line)) for line in lines)}

    def __call__(self, problem: Problem, sampler: Sampler, grid: Tensor, row: Run) -> Run:
        key = row._replace(problem=problem.name)[:4]
        if key not in self.found:
            self.found[key] = measure(problem, sampler, grid, row)
            if self.file is not None:
                with self.file.open("a") as file:
                    file.write(json.dumps(self.found[key]) + "\n")
        return self.found[key]


def grids_of(subject: Subject) -> Sequence[str]:
    """Those that it is measured on."""
    return [subject.grid] if subject.grid else list(GRIDS)


def compare(
    problem: Problem,
    subjects: Sequence[tuple[Subject, Sequence[str]]],
    budgets: Sequence[int] = BUDGETS,
    measure: Callable[[Problem, Sampler, Tensor, Run], Run] = measure,
) -> list[Run]:
    """The default, and every subject on the grids beside it."""
    sde, found = problem.sde, []
    for budget in budgets:
        found.append(measure(problem, *recommended(sde, budget), Run(DEFAULT, "", "", budget)))
        for subject, grids in subjects:
            n = 0 if subject.maker == PEER and not known(sde) else steps_within(subject.sampler, budget)
            for grid in grids if n else []:
                made = GRIDS.get(grid, times.uniform)(sde, n)
                found.append(measure(problem, subject.sampler, made, Run(str(subject), grid, "", budget)))
    return found


def adaptive(problem: Problem, peer: Peer, budgets: Sequence[int] = BUDGETS) -> list[Run]:
    """Its RK45 at the tolerances that it takes for its largest number of evaluations within each budget."""
    if not known(problem.sde):
        return []
    tried, end = [], times.uniform(problem.sde, 1)
    for tolerance in (1.0, 0.1, 0.03, 0.01, 3e-3, 1e-3, 1e-4, 1e-5):
        tried.append(measure(problem, PeerODE(tolerance, peer), end, Run(f"{PEER}: RK45", "adaptive", "", 0)))
    within = [(b, [run for run in tried if run.nfe <= b]) for b in budgets]
    return [min(runs, key=lambda run: run.median)._replace(budget=b) for b, runs in within if runs]


def _refuse(like: Tensor) -> Tensor:
    raise ValueError("a deterministic sampler asked for noise")


# --- what they say


def mean(values: Sequence[float]) -> float:
    """Their geometric mean."""
    return math.exp(statistics.fmean(math.log(v) for v in values))


Score = dict[tuple[str, str], dict[int, float]]  # (subject, grid): its geometric mean over problems at each budget


def scores(runs: Sequence[Run], tail: bool = False) -> Score:
    """Of those that ran on every problem; a budget at which one did not run, or came to no number, is left out."""
    cells: dict[tuple[str, str, int], list[float]] = {}
    for run in runs:
        value = run.tail if tail else run.median
        cells.setdefault((run.subject, run.grid, run.budget), []).append(value)
    count, found = len({run.problem for run in runs}), Score()
    for (subject, grid, budget), values in cells.items():
        if len(values) == count and all(map(math.isfinite, values)):
            found.setdefault((subject, grid), {})[budget] = mean(values)
    return found


def judged(score: dict[int, float]) -> float:
    """Geometric mean over 7 to 35 evaluations; infinite for one that could not run at all of them."""
    return mean([score[b] for b in JUDGED]) if all(b in score for b in JUDGED) else math.inf


def best_grids(runs: Sequence[Run]) -> dict[str, str]:
    """For each subject the grid of its least geometric mean over its problems and 7 to 35 evaluations."""
    whole = [run for run in runs if run.budget in JUDGED]
    cells: dict[tuple[str, str], list[float]] = {}
    for run in whole:
        cells.setdefault((run.subject, run.grid), []).append(run.median if math.isfinite(run.median) else math.inf)
    best: dict[str, str] = {}
    for subject, grid in sorted(cells, key=lambda key: mean(cells[key])):
        best.setdefault(subject, grid)
    return best


def summary(runs: Sequence[Run], title: str, best: dict[str, str] | None) -> Table:
    """Everyone on the best of its grids, or on all; sorted by the geometric mean over problems, the least first."""
    found, tails = scores(runs), scores(runs, tail=True)
    unit, unit_tail = judged(found[DEFAULT, ""]), judged(tails[DEFAULT, ""])
    rows = []
    for key in sorted(found, key=lambda key: judged(found[key])):
        if best is not None and best.get(key[0], key[1]) != key[1]:
            continue
        cells = [f"{found[key][b]:.2g}" if b in found[key] else "" for b in BUDGETS]
        whole = judged(found[key])
        ratios = [f"{whole / unit:.2f}", f"{judged(tails[key]) / unit_tail:.2f}"] if whole < math.inf else ["", ""]
        rows.append((*key, *cells, *ratios))
    head = ("", "grid", *map(str, BUDGETS), "median/default", "90 %/default")
    return Table(title, head, rows, [])


def losses(runs: Sequence[Run]) -> Table:
    """Every problem and budget at which someone ends nearer than the default, in the median."""
    rows = []
    for problem in dict.fromkeys(run.problem for run in runs):
        for budget in sorted({run.budget for run in runs}):
            here = [run for run in runs if run.problem == problem and run.budget == budget]
            (mine,) = [run for run in here if run.subject == DEFAULT]
            better = sorted((run for run in here if run.median < mine.median), key=lambda run: run.median)
            for run in better[:1]:
                row = (problem, str(budget), run.subject, run.grid, f"{run.median:.2g}", f"{mine.median:.2g}")
                rows.append((*row, f"{mine.median / run.median:.2f}", str(len({run.subject for run in better}))))
    head = ("problem", "NFE", "nearest", "grid", "its median", "the default's", "ratio", "how many were nearer")
    return Table("Where another is nearer than the default", head, rows, [])


# --- distances of laws


def laws(subjects: Sequence[Subject], budgets: Sequence[int], count: int = SAMPLES) -> Table:
    """Sliced Wasserstein distance to the mixtures' own samples, its geometric mean over the mixtures."""
    found: dict[str, dict[int, list[float]]] = {}
    floors = []
    for name, model in mixtures():
        if isinstance(model.sde, CosineSDE):
            continue  # as good as VP, and the peer has none
        sde, shape, end = model.sde, (count, *model.shape), torch.tensor(model.sde.t_min, dtype=torch.float64)
        g = torch.Generator().manual_seed(0)

        def truth(g: torch.Generator = g, model: Mixture = model, end: Tensor = end) -> Tensor:
            z = torch.randn(count, *model.shape, generator=g, dtype=torch.float64)
            return model.sde.perturb(model.sample(count, g)[0], end, z)

        aim, start = truth(), sde.prior(shape, noise_source(shape, g, 0, torch.float64, torch.device("cpu")))
        floors.append(sliced_wasserstein(aim, truth()))
        problem = Problem(name, model, sde, start, start, 0.0)
        for budget in budgets:
            short = budget < LONG
            runs = [(DEFAULT, *recommended(sde, budget))] if short else []
            for subject in subjects:
                n = steps_within(subject.sampler, budget)
                if n and (subject.maker != PEER or known(sde)):
                    grid = GRIDS.get(subject.grid or "log_snr", times.uniform)(sde, n)
                    runs.append((str(subject), subject.sampler, grid))
            for who, sampler, grid in runs:
                x, _ = walk(problem, sampler, grid, seed=1)
                found.setdefault(who, {}).setdefault(budget, []).append(sliced_wasserstein(x, aim))
    rows = [(who, *(f"{mean(cells[b]):.2g}" if b in cells else "" for b in budgets)) for who, cells in found.items()]
    note = f"{count} samples; two samples of the truth are {mean(floors):.2g} apart"
    return Table(
        "Sliced Wasserstein distance, geometric mean over the VP and VE mixtures",
        ("", *map(str, budgets)),
        rows,
        [note],
    )


class Features:
    """The hidden layer of a classifier of real digits, 64 numbers, and the Fréchet distance between laws there."""

    def __init__(self) -> None:
        data = load_data("digits")
        assert isinstance(data.train.x, Tensor) and data.train.y is not None and data.levels is not None
        self.levels = data.levels
        real = data.train.x.flatten(1).numpy() / (data.levels - 1)
        self.judge = MLPClassifier((64,), max_iter=200, random_state=0).fit(real, data.train.y.numpy())
        assert isinstance(data.test.x, Tensor) and data.test.y is not None
        held_out = data.test.x.flatten(1).double() / (data.levels - 1)
        self.accuracy = float(self.judge.score(held_out.numpy(), data.test.y.numpy()))
        self.real = self(torch.from_numpy(real))
        self.floor = self.distance(held_out)

    def __call__(self, pixels: Tensor) -> Tensor:
        w, b = torch.from_numpy(self.judge.coefs_[0]), torch.from_numpy(self.judge.intercepts_[0])
        return torch.relu(pixels.double() @ w.double() + b.double())

    def distance(self, pixels: Tensor) -> float:
        """From the training images; pixels (N, 64) in [0, 1]."""
        return frechet(self(pixels), self.real)

    def of_states(self, x: Tensor) -> float:
        """The same of states in [-1, 1], rounded to the levels as `--mode sample` does."""
        levels = ((x.double() + 1) / 2 * self.levels).floor().clamp(0, self.levels - 1)
        return self.distance(levels.flatten(1) / (self.levels - 1))


def frechet(x: Tensor, y: Tensor) -> float:
    """Squared Fréchet distance of the Gaussians fitted to x (N, D) and y (M, D): Wasserstein's of order 2 (Dowson &
    Landau 1982), |m - n|² + tr(C + D - 2 (C D)^(1/2))."""
    if not bool(x.isfinite().all() and y.isfinite().all()):
        return math.nan
    a, b = x.T.cov(), y.T.cov()
    root = torch.linalg.eigvals(a @ b).real.clamp_min(0).sqrt().sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * root)


def drawn(problem: Problem, subjects: Sequence[Subject], budgets: Sequence[int]) -> Table:
    """Fréchet distance of a trained model's digits, from the same noise as its distances."""
    features, sde, rows = Features(), problem.sde, []
    cells = [f"{features.of_states(walk(problem, *recommended(sde, b))[0]):.3g}" for b in budgets]
    rows.append((DEFAULT, "", *cells))
    for subject in subjects:
        grid, cells = subject.grid or "log_snr", []
        for budget in budgets:
            made = GRIDS.get(grid, times.uniform)(sde, steps_within(subject.sampler, budget))
            cells.append(f"{features.of_states(walk(problem, subject.sampler, made)[0]):.3g}")
        rows.append((str(subject), grid, *cells))
    notes = [
        f"{len(problem.start)} digits against the 1,497 of training, in the 64 features of a classifier that is right "
        f"of {100 * features.accuracy:.1f} % of the 300 held-out ones; small samples, and no FID",
        f"the converged flow: {features.of_states(problem.end):.3g}; the held-out digits: {features.floor:.3g}",
    ]
    return Table(f"Fréchet distance, {problem.name}", ("", "grid", *map(str, budgets)), rows, notes)


_THEIRS = {name: Subject("diffusers", name, sampler) for name, sampler in DETERMINISTIC.items()}
LISTED = [
    Subject("ours", "DDIM", DDIM()),
    Subject("ours", "Heun", Heun(), "karras"),
    *(_THEIRS[name] for name in ("DPM-Solver++ 2M", "UniPC 2", "DEIS 3")),
]

_DRAWN = {  # the samplers of the plot on the grids that are usual for them, their colours and lines
    (DEFAULT, ""): ("the default of this package", "#1f4e9c", "-"),
    ("diffusers: UniPC 2", "log_snr"): ("UniPC 2 (diffusers), log SNR", "#d55e00", "-"),
    ("diffusers: DPM-Solver++ 2M", "log_snr"): ("DPM-Solver++ 2M (diffusers), log SNR", "#009e73", "-"),
    ("diffusers: Heun", "karras"): ("Heun (diffusers), EDM's grid", "#cc79a7", "-"),
    ("diffusers: DDIM", "quadratic"): ("DDIM (diffusers), quadratic", "#777777", "-"),
    (f"{PEER}: RK45", "adaptive"): ("RK45 (score_sde_pytorch)", "#000000", "--"),
}


def draw(runs: Sequence[Run], file: Path) -> None:
    """Median error against evaluations: the mean over mixtures, and the trained model where there is one."""
    mixed = [run for run in runs if run.problem != "digits" and "cosine" not in run.problem]
    panels = {"exact scores of mixtures (VP, VE; 2-D, 10-D)": mixed}
    panels["a network trained on digits"] = [run for run in runs if run.problem == "digits"]
    panels = {title: panel for title, panel in panels.items() if panel}
    figure = Figure(figsize=(4.5 * len(panels), 3.9), layout="constrained")
    for place, (title, panel) in enumerate(panels.items()):
        axes, found = figure.add_subplot(1, len(panels), place + 1), scores(panel)
        for key, (label, color, line) in _DRAWN.items():
            curve = found.get(key, {})
            nfe, error = [b for b in JUDGED if b in curve], [curve[b] for b in JUDGED if b in curve]
            axes.loglog(
                nfe, error, line, marker="o", ms=4, lw=2.5 if key[0] == DEFAULT else 1.4, color=color, label=label
            )
        axes.set(title=title, xlabel="evaluations of the network")
        axes.set_xticks(JUDGED, map(str, JUDGED), minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("median distance from the exact path's end")
    figure.axes[0].legend(fontsize=7)
    save(figure, file)


# --- the command


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m benchmarks.solvers", description="Error against network evaluations.")
    p.add_argument("--model", type=Path, help="workdir of a trained configs/vp_digits.py, to be measured too")
    p.add_argument("--peer", type=Path, help="a clone of score_sde_pytorch, whose samplers are measured too")
    p.add_argument("--keep", type=Path, help="a file to keep distances in, from which a stopped command goes on")
    p.add_argument("--laws", action="store_true", help="measure distances of laws too, also of the stochastic samplers")
    p.add_argument("--plot", type=Path, help="draw the errors into this PNG")
    return p


def run(arguments: Sequence[str]) -> list[Table]:
    """Measure and print what the command line asks for."""
    options = parser().parse_args(arguments)
    peer = peers.load(options.peer) if options.peer else None
    print(machine(torch.device("cpu")))
    print(f"1 thread; median root mean square distance over {PATHS} paths, or {TRAINED_PATHS} images")
    tables: list[Table] = []

    def show(table: Table) -> None:
        print(f"\n{table}", flush=True)
        tables.append(table)

    problems = [mixture_problem(*named) for named in mixtures()]
    if options.model:
        problems.append(trained_problem(options.model))
    for problem in problems:
        print(f"{problem.name}: {problem.sde}; references {problem.doubt:.1g} apart", flush=True)
    subjects, kept = deterministic(peer), Kept(options.keep)
    everywhere = [(subject, grids_of(subject)) for subject in subjects]
    runs = [run for problem in problems for run in compare(problem, everywhere, JUDGED, kept)]
    best = best_grids(runs)
    on_best = [(subject, [best[str(subject)]]) for subject in subjects if str(subject) in best]
    runs += [run for problem in problems for run in compare(problem, on_best, REST, kept)]
    if peer is not None:
        runs += [run for problem in problems for run in adaptive(problem, peer)]
    for problem in problems:
        show(summary([run for run in runs if run.problem == problem.name], problem.name, best))
    show(summary(runs, f"All {len(problems)} problems: geometric means", best))
    show(summary(runs, "On every grid", None))
    show(losses(runs))
    if options.laws:
        show(laws(stochastic(peer), OF_LAWS))
    if options.laws and options.model:
        show(drawn(trained_problem(options.model, IMAGES), [*LISTED, *stochastic(peer)], JUDGED))
    if options.plot:
        draw(runs, options.plot)
    return tables


if __name__ == "__main__":
    torch.set_num_threads(1)
    with threadpool_limits(1):
        try:
            run(sys.argv[1:])
        except (ValueError, FileNotFoundError) as error:
            sys.exit(f"error: {error}")
