"""Runs of samplers on problems: how far they end from where the flow goes, and after how many evaluations."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from score_sde import Estimate, Sampler, ScoreModel, recommended, times
from score_sde.noise import noise_source
from score_sde.samplers import fit_times

from .peer_samplers import known
from .problems import Problem, distances
from .subjects import DEFAULT, PEER, Adaptive, Subject

JUDGED = (7, 10, 15, 20, 35)
LONG = 1000
BUDGETS = (5, *JUDGED, 50, 100, LONG)
PARTS = 3


class Run(NamedTuple):
    """Root mean square distances from the flow's ends: their median and 90 % quantile over the paths.

    `parts` are the medians over each third of the paths. `nfe` is evaluations per path.
    """

    subject: str
    grid: str
    problem: str
    budget: int
    nfe: float = 0
    median: float = math.nan
    tail: float = math.nan
    parts: tuple[float, ...] = ()


class Tally(ScoreModel):
    """A model that counts the examples that it evaluates; adaptive samplers evaluate fewer and fewer."""

    def __init__(self, model: ScoreModel) -> None:
        super().__init__(model.sde)
        self.model, self.examples = model, 0

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Estimate:
        self.examples += len(x)
        return self.model(x, t, **condition)


@torch.no_grad()
def walk(problem: Problem, sampler: Sampler, grid: Tensor, seed: int = 0) -> tuple[Tensor, float]:
    """The last states, and the evaluations per path that they took."""
    model, x = Tally(problem.model), problem.start
    noise = noise_source(tuple(x.shape), torch.Generator().manual_seed(seed), 0, x.dtype, x.device)
    *_, x = sampler.walk(model, x, grid, noise)
    return x, model.examples / len(x)


Grid = Tensor | Callable[[], Tensor]  # times, or what finds them where that is work
Measure = Callable[[Problem, Sampler, Grid, Run], Run]


def measure(problem: Problem, sampler: Sampler, grid: Grid, row: Run) -> Run:
    """The row with the measured distances."""
    x, nfe = walk(problem, sampler, grid if isinstance(grid, Tensor) else grid())
    d = distances(x, problem.end).double()
    median, tail = d.quantile(torch.tensor([0.5, 0.9]).double()).tolist()
    parts = tuple(float(part.quantile(0.5)) for part in d.tensor_split(PARTS))
    return row._replace(problem=problem.name, nfe=nfe, median=median, tail=tail, parts=parts)


Recall = Callable[[Tensor, Run, Callable[[Run], Run]], Run]


def anew(states: Tensor, row: Run, find: Callable[[Run], Run]) -> Run:
    """Measure a row when no file keeps rows."""
    return find(row)


class Kept:
    """`measure`, with each row kept in a file of JSON lines, so that a stopped command goes on where it was.

    A row belongs to the exact ends of its problem: for another model of the same name it is measured anew.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = file.read_text().splitlines() if file.exists() else []
        self.found: dict[tuple[Any, ...], Run] = {}
        for line in lines:
            with suppress(ValueError):  # of a line that was cut short
                ends, *fields, parts = json.loads(line)
                run = Run(*fields)._replace(parts=tuple(parts))
                self.found[ends, run[:4]] = run

    def __call__(self, problem: Problem, sampler: Sampler, grid: Grid, row: Run) -> Run:
        row = row._replace(problem=problem.name)
        return self.recall(problem.end, row, lambda row: measure(problem, sampler, grid, row))

    def recall(self, states: Tensor, row: Run, find: Callable[[Run], Run]) -> Run:
        """The row, found anew unless it was for the same states, subject, grid, problem and budget."""
        size = float(states.double().square().sum())
        key = (size, row[:4])
        if key not in self.found:
            self.found[key] = find(row)
            with self.file.open("a") as file:
                file.write("\n" + json.dumps([size, *self.found[key]]))
        return self.found[key]


def compare(
    problem: Problem,
    subjects: Sequence[tuple[Subject, Sequence[str]]],
    budgets: Sequence[int],
    measure: Measure = measure,
) -> list[Run]:
    """Measure the default, and every subject on its grids."""
    found = []
    for budget in budgets:
        found.append(measure(problem, *recommended(problem.sde, budget), Run(DEFAULT, "", "", budget)))
        for subject, grids in subjects:
            for grid in grids:
                made = subject.times(problem.sde, budget, grid)
                if made is not None:
                    found.append(measure(problem, subject.sampler, made, Run(str(subject), grid, "", budget)))
    return found


def adaptive(problem: Problem, subject: Adaptive, budgets: Sequence[int], measure: Measure = measure) -> list[Run]:
    """Measure an adaptive sampler at the tolerance that takes most of each budget."""
    if subject.maker == PEER and not known(problem.sde):
        return []
    tried, end = [], times.uniform(problem.sde, 1)
    for i, sampler in enumerate(subject.samplers):
        tried.append(measure(problem, sampler, end, Run(str(subject), f"tolerance {i}", "", 0)))
        if tried[-1].nfe > max(budgets):
            break
    return [run._replace(grid="adaptive", budget=b) for b, run in within(budgets, tried, lambda run: run.nfe)]


def within(budgets: Sequence[int], tried: Sequence[Any], nfe: Callable[[Any], float]) -> Iterator[tuple[int, Any]]:
    """For each budget, the run within it that took most of it."""
    for budget in budgets:
        kept = [run for run in tried if nfe(run) <= budget]
        if kept:
            yield budget, max(kept, key=nfe)


def fitted(problem: Problem, budgets: Sequence[int], paths: int, measure: Measure = measure) -> list[tuple[Run, Run]]:
    """The default sampler on its grid, and on one fitted to as many paths, which are not those of the problem."""
    found = []
    for budget in budgets:
        sampler, grid = recommended(problem.sde, budget)
        plain = measure(problem, sampler, grid, Run(DEFAULT, "", "", budget))
        shape = (paths, *problem.start.shape[1:])
        fit = partial(fit_times, problem.model, sampler, budget, shape, sde=problem.sde, seed=1)
        found.append((plain, measure(problem, sampler, fit, Run("the default, fitted", f"{paths} paths", "", budget))))
    return found
