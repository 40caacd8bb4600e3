"""Error against network evaluations: our samplers, diffusers' and score_sde_pytorch's, on the same models and noise.

``python -m benchmarks.solvers [--model WORKDIR ...] [--peer PATH] [--laws] [--keep FILE] [--plot FILE] [--page FILE]``

A deterministic sampler is judged by how far it ends from where the probability flow goes from the same noise, any by
how far its law is from the data's. Evaluations are counted on the model. diffusers' schedulers walk the grids that ours
do; score_sde_pytorch's make their own.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from . import peer as peers
from .errors import JUDGED, LONG, Kept, Measure, Run, adaptive, anew, compare, fitted, measure
from .judges import judge
from .laws import of_images, of_mixtures
from .pages import fill
from .peer import Peer
from .problems import IMAGES, Problem, fields, held_out, mixture_problem, mixtures, trained, trained_problem
from .reports import best_grids, draw, losses, of_fits, summary, verdict
from .subjects import LISTED, adaptive_flows, deterministic, few, stochastic
from .timing import Table, machine

REST = (5, 50, 100)
FEW_BUDGETS, FEW_IMAGES = (5, 10, 20), 200  # of laws of large images


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m benchmarks.solvers", description="Error against network evaluations.")
    p.add_argument("--model", type=Path, nargs="+", default=[], help="workdirs of trained models, to be measured too")
    p.add_argument("--peer", type=Path, help="a clone of score_sde_pytorch, whose samplers are measured too")
    p.add_argument("--keep", type=Path, help="a file for finished rows, from which a stopped command goes on")
    p.add_argument("--laws", action="store_true", help="measure distances of laws instead, of stochastic samplers too")
    p.add_argument("--plot", type=Path, help="draw the errors into this PNG")
    p.add_argument("--page", type=Path, help="fill the tables into the blocks of this Markdown page")
    return p


def measured(problems: Sequence[Problem], peer: Peer | None, measure: Measure) -> tuple[list[Run], dict[str, str]]:
    """Everyone on every problem, and the grid on which each is best.

    On every grid at 7 to 35 evaluations, and on the best one at the others; 1000 of the default and a few alone. On
    large models on that grid and the default's only, and of the default and these few alone at 5, 50 and 100.
    """
    subjects, small = deterministic(peer), [p for p in problems if not p.large]
    runs = [r for p in small for r in compare(p, [(s, s.grids()) for s in subjects], JUDGED, measure)]
    best = best_grids(runs)
    on_best = [(s, [best[str(s)]]) for s in subjects if str(s) in best]
    listed = [(s, grids) for s, grids in on_best if str(s) in map(str, LISTED)]
    for problem in problems:
        if problem.large:
            two = [(s, grids if s.grid else sorted({*grids, "arcsinh"})) for s, grids in on_best]
            runs += compare(problem, two, JUDGED, measure) + compare(problem, listed, REST, measure)
        else:
            runs += compare(problem, on_best, REST, measure) + compare(problem, listed, (LONG,), measure)
        runs += [r for s in adaptive_flows(peer) for r in adaptive(problem, s, (*JUDGED, *REST), measure)]
    return runs, best


def listing(problems: Sequence[Problem]) -> Table:
    """What is solved, and how well its ends are known."""
    rows = [(p.name, str(p.sde), str(len(p.start)), f"{p.doubt:.1g}", "" if p.chosen else "held out") for p in problems]
    note = "median distance of the ends by two methods"
    return Table("Problems", ("", "SDE", "paths", "ends known to", "of the default's choice"), rows, [note])


def groups(problems: Sequence[Problem]) -> dict[str, set[str]]:
    """Sets of problems on which the default is judged; those without a problem are left out."""
    named: dict[str, Callable[[Problem], bool]] = {
        "all": lambda p: True,
        "chosen on": lambda p: p.chosen,
        "held out": lambda p: not p.chosen,
        "exact scores": lambda p: not p.network,
        "3072 dimensions": lambda p: p.name.startswith("3072-D"),
        "networks": lambda p: p.network,
    }
    found = {name: {p.name for p in problems if belongs(p)} for name, belongs in named.items()}
    found |= {p.name: {p.name} for p in problems if p.network}
    return {name: names for name, names in found.items() if names}


def fits(problems: Sequence[Problem], measure: Measure) -> dict[str, list[tuple[Run, Run]]]:
    """The default's grid beside one fitted to each problem; to a large model, few paths and few steps only."""
    return {p.name: fitted(p, JUDGED[:2] if p.large else JUDGED, 4 if p.large else 16, measure) for p in problems}


def run(arguments: Sequence[str]) -> list[Table]:
    """Measure and print what the command line asks for."""
    options = parser().parse_args(arguments)
    peer = peers.load(options.peer) if options.peer else None
    where = machine(torch.device("cpu")) + (f"; score_sde_pytorch, {peer.version}" if peer is not None else "")
    print(where)
    shown, blocks = list[Table](), dict[str, str]()

    def show(table: Table, block: str = "") -> None:
        print(f"\n{table}", flush=True)
        shown.append(table)
        if block:
            blocks[block] = str(table)

    kept = Kept(options.keep) if options.keep else None
    if options.laws:
        blocks["laws_machine"] = where
        recall = kept.recall if kept else anew
        show(of_mixtures(stochastic(peer)), "law_of_mixtures")
        for model in map(trained, options.model):
            if model.data == "digits":
                show(of_images(model, judge("digits"), stochastic(peer), recall=recall), "law_of_digits")
            elif model.data == "cifar10":
                known = judge("cifar10", model.path)
                show(of_images(model, known, few(peer), FEW_BUDGETS, FEW_IMAGES, 1, recall), "law_of_cifar10")
    else:
        problems = [mixture_problem(*named, chosen=True) for named in mixtures()]
        problems += [mixture_problem(*named, count=IMAGES, chosen=True) for named in fields()]
        problems += [mixture_problem(*named) for named in held_out()]
        problems += [trained_problem(workdir) for workdir in options.model]
        show(listing(problems), "problems")
        blocks["machine"] = where
        keep: Measure = kept or measure
        runs, best = measured(problems, peer, keep)
        for problem in problems:
            show(summary([run for run in runs if run.problem == problem.name], problem.name, best))
        show(
            summary([r for p in problems if not p.network for r in runs if r.problem == p.name], "Exact scores", best),
            "exact",
        )
        show(summary(runs, f"All {len(problems)} problems", best), "all")
        show(verdict(runs, groups(problems)), "verdict")
        show(losses(runs), "losses")
        show(of_fits(fits(problems, keep)), "fits")
        if options.plot:
            draw(runs, problems, best, options.plot)
    if options.page:
        fill(options.page, blocks)
    return shown


if __name__ == "__main__":
    torch.set_num_threads(1)
    with threadpool_limits(1):
        try:
            run(sys.argv[1:])
        except (ValueError, FileNotFoundError) as error:
            sys.exit(f"error: {error}")
    print(f"\n{time.process_time():.0f} s of CPU time")
