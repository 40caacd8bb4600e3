"""What the runs say: tables of geometric means, where the default loses, and the plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from .errors import BUDGETS, JUDGED, PARTS, Run
from .pages import save
from .peer_samplers import known
from .problems import Problem
from .subjects import DEFAULT, PEER
from .timing import Table

Score = dict[tuple[str, str], dict[int, float]]  # (subject, grid): its geometric mean over problems at each budget
TIE = 1.005  # nearer by less is by rounding, as of one method in two packages


def mean(values: Sequence[float]) -> float:
    """The geometric mean of the values."""
    return math.exp(statistics.fmean(math.log(v) for v in values))


def scores(runs: Sequence[Run], of: Callable[[Run], float] = lambda run: run.median) -> Score:
    """Scores of those that ran on every problem; a budget at which one did not run, or gave no number, is left out."""
    cells: dict[tuple[str, str, int], list[float]] = {}
    for run in runs:
        cells.setdefault((run.subject, run.grid, run.budget), []).append(of(run))
    count, found = len({run.problem for run in runs}), Score()
    for (subject, grid, budget), values in cells.items():
        if len(values) == count and all(map(math.isfinite, values)):
            found.setdefault((subject, grid), {})[budget] = mean(values)
    return found


def judged(score: dict[int, float]) -> float:
    """Geometric mean over 7 to 35 evaluations; infinite for one that could not run at all of them."""
    return mean([score[b] for b in JUDGED]) if all(b in score for b in JUDGED) else math.inf


def ratios(runs: Sequence[Run]) -> dict[tuple[str, str], tuple[float, float, float]]:
    """`judged` of each over the default's, of the median over all paths; the least and the most over thirds of them."""
    found = [scores(runs), *(scores(runs, lambda run, i=i: run.parts[i]) for i in range(PARTS))]  # type: ignore[misc]
    result = {}
    for key in found[0]:
        whole, *parts = [judged(score.get(key, {})) / judged(score[DEFAULT, ""]) for score in found]
        if whole < math.inf:
            result[key] = whole, min(parts), max(parts)
    return result


def best_grids(runs: Sequence[Run]) -> dict[str, str]:
    """For each subject the grid of its least geometric mean over its problems and 7 to 35 evaluations."""
    cells: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        if run.budget in JUDGED:
            cells.setdefault((run.subject, run.grid), []).append(run.median if math.isfinite(run.median) else math.inf)
    best: dict[str, str] = {}
    for subject, grid in sorted(cells, key=lambda key: mean(cells[key])):
        best.setdefault(subject, grid)
    return best


def _range(low: float, high: float) -> str:
    return f"{low:.2f} to {high:.2f}"


def summary(runs: Sequence[Run], title: str, best: dict[str, str] | None) -> Table:
    """Everyone on the best of its grids, or on all; sorted by the geometric mean over problems, the least first."""
    found, tails, against = scores(runs), scores(runs, lambda run: run.tail), ratios(runs)
    budgets = [b for b in BUDGETS if b in found[DEFAULT, ""]]
    rows = []
    for key in sorted(found, key=lambda key: judged(found[key])):
        if best is not None and best.get(key[0], key[1]) != key[1]:
            continue
        cells = [f"{found[key][b]:.2g}" if b in found[key] else "" for b in budgets]
        compared = ["", "", ""]
        if key in against:
            ratio, low, high = against[key]
            tail = judged(tails.get(key, {})) / judged(tails[DEFAULT, ""])
            compared = [f"{ratio:.2f}", _range(low, high), f"{tail:.2f}"]
        rows.append((*key, *cells, *compared))
    head = ("", "grid", *map(str, budgets), "median/default", "of thirds", "90 %/default")
    return Table(title, head, rows, [])


def verdict(runs: Sequence[Run], groups: dict[str, set[str]]) -> Table:
    """For each group of problems, the nearest others, each on the grid that is best for it there."""
    rows = []
    for group, names in groups.items():
        here = ratios([run for run in runs if run.problem in names])
        others = sorted((ratio, key) for key, ratio in here.items() if key[0] != DEFAULT)
        foreign = [(ratio, key) for ratio, key in others if not key[0].startswith("ours")]
        apart = [(ratio, key) for ratio, key in foreign if key[1] != "arcsinh"]  # the default's, and not theirs
        row = [group, str(len(names))]
        for (ratio, low, high), (subject, grid) in (others[0], foreign[0], apart[0]):
            row += [f"{subject}, {grid}", f"{ratio:.2f} ({_range(low, high)})"]
        rows.append((*row, "yes" if others[0][0][0] > 1 / 1.05 else "no"))
    head = (
        *("problems", "", "nearest other", "its ratio", "nearest of theirs", "its ratio"),
        *("nearest of theirs on a grid of theirs", "its ratio", "within 5 % of the best"),
    )
    note = "ratios of the geometric means over 7 to 35 evaluations, other/default; in brackets over thirds of the paths"
    return Table("The default and the nearest others", head, rows, [note])


def losses(runs: Sequence[Run]) -> Table:
    """Every problem and budget at which someone ends nearer than the default, in the median."""
    rows = []
    for problem in dict.fromkeys(run.problem for run in runs):
        for budget in sorted({run.budget for run in runs}):
            here = [run for run in runs if run.problem == problem and run.budget == budget]
            mine = [run.median for run in here if run.subject == DEFAULT]
            better = sorted((run for run in here if mine and run.median * TIE < mine[0]), key=lambda run: run.median)
            for run in better[:1]:
                row = (problem, str(budget), run.subject, run.grid, f"{run.median:.2g}", f"{mine[0]:.2g}")
                rows.append((*row, f"{mine[0] / run.median:.2f}", str(len({run.subject for run in better}))))
    head = ("problem", "NFE", "nearest", "grid", "its median", "the default's", "ratio", "how many were nearer")
    return Table("Where another is nearer than the default", head, rows, [])


def of_fits(found: dict[str, list[tuple[Run, Run]]]) -> Table:
    """On each problem the median on the grid fitted to it over that on the default's grid."""
    rows, gains = [], dict[int, list[float]]()
    for problem, pairs in found.items():
        cells = {plain.budget: fit.median / plain.median for plain, fit in pairs}
        for budget, ratio in cells.items():
            gains.setdefault(budget, []).append(ratio)
        rows.append((problem, pairs[0][1].grid, *(f"{cells[b]:.2f}" if b in cells else "" for b in JUDGED)))
    rows.append(("geometric mean", "", *(f"{mean(gains[b]):.2f}" if b in gains else "" for b in JUDGED)))
    title = "Grids fitted to the model: median distance over that on arcsinh, on other noise than the fit's"
    return Table(title, ("problem", "fitted to", *map(str, JUDGED)), rows, [])


_DRAWN = {  # the samplers of the plot, each on the grid that is best for it, their colours and lines
    DEFAULT: ("the default of this package", "#1f4e9c", "-"),
    "diffusers: UniPC 2": ("UniPC 2 (diffusers)", "#d55e00", "-"),
    "diffusers: DPM-Solver++ 2M": ("DPM-Solver++ 2M (diffusers)", "#009e73", "-"),
    "diffusers: Heun": ("Heun (diffusers)", "#cc79a7", "-"),
    "diffusers: DDIM": ("DDIM (diffusers)", "#777777", "-"),
    f"{PEER}: RK45": ("RK45 (score_sde_pytorch)", "#000000", "--"),
}


def draw(runs: Sequence[Run], problems: Sequence[Problem], best: dict[str, str], file: Path) -> None:
    """Median error against evaluations: the mean over the exact scores that the peer can do, and each trained model."""
    panels = {"exact scores": {p.name for p in problems if not p.network and known(p.sde)}}
    panels |= {p.name: {p.name} for p in problems if p.network}
    figure = Figure(figsize=(3.6 * len(panels), 3.9), layout="constrained")
    for place, (title, names) in enumerate(panels.items()):
        axes, found = figure.add_subplot(1, len(panels), place + 1), scores([r for r in runs if r.problem in names])
        for who, (label, color, line) in _DRAWN.items():
            curve = found.get((who, best.get(who, "adaptive")), {})
            nfe, error = [b for b in JUDGED if b in curve], [curve[b] for b in JUDGED if b in curve]
            width = 2.5 if who == DEFAULT else 1.4
            axes.loglog(nfe, error, line, marker="o", ms=4, lw=width, color=color, label=label)
        axes.set(title=title, xlabel="evaluations of the network")
        axes.set_xticks(JUDGED, map(str, JUDGED), minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("median distance from the exact path's end")
    figure.axes[0].legend(fontsize=7)
    save(figure, file)
