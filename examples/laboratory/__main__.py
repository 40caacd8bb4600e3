"""``python -m examples.laboratory [--quick] [--data ring ...] [--objectives sliced ...] [--steps N] [--seeds N]``"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch

from .experiment import Job, read
from .page import write_page
from .subjects import DATA, OBJECTIVES, affordable
from .workers import run_all, weight

QUICK = 40  # a quick run takes the steps of a full one divided by this


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "python -m examples.laboratory",
        description="Train with every objective on every data set, measure against the truth, draw, write the page. "
        "Finished experiments are kept: the same command goes on where it was stopped.",
    )
    p.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    p.add_argument("--objectives", nargs="+", choices=list(OBJECTIVES), default=list(OBJECTIVES))
    p.add_argument("--quick", action="store_true", help=f"1/{QUICK} of the steps: what it looks like, not what is true")
    p.add_argument("--steps", type=_at_least_1, help="of every experiment, instead of the data set's own number")
    p.add_argument("--seeds", type=_at_least_1, default=1, help="repetitions of every experiment (1)")
    p.add_argument(
        "--workers", type=_at_least_1, default=min(2, os.cpu_count() or 1), help="processes of one thread each (2)"
    )
    p.add_argument("--workdir", type=Path, default=Path("runs/laboratory"), help="where experiments are kept")
    p.add_argument("--page", type=Path, help="where to write, as docs/laboratory.md; default WORKDIR/laboratory.md")
    return p


def _at_least_1(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def plan(options: argparse.Namespace) -> list[Job]:
    """The experiments: first seeds first, and of one seed those that take longest."""
    jobs = []
    for name in options.data:
        data = DATA[name]
        steps = options.steps or max(data.steps // (QUICK if options.quick else 1), 2)
        mine = [o for o in options.objectives if affordable(name, o)]
        jobs += [Job(name, o, seed, steps) for seed in range(options.seeds) for o in mine]
    if not jobs:
        raise ValueError(
            "implicit on digits takes 64 products in every step and is left out, so nothing is to be run: take sliced, "
            "or data in the plane"
        )
    return sorted(jobs, key=lambda job: (job.seed, -weight(job)))


def main(arguments: list[str]) -> Path:
    """Run what the command line asks for; return the page."""
    options = parser().parse_args(arguments)
    jobs = plan(options)
    began = time.perf_counter()
    waiting = [job for job in jobs if read(job, options.workdir) is None]
    spent = run_all(waiting, options.workdir, options.workers, sum(map(weight, jobs)))
    page = options.page or options.workdir / "laboratory.md"
    results = [result for job in jobs if (result := read(job, options.workdir)) is not None]
    write_page(page, results, options.workdir, " ".join(["python -m examples.laboratory", *arguments]))
    minutes = (time.perf_counter() - began) / 60
    print(f"{len(waiting)} of {len(jobs)} experiments run, {minutes:.1f} minutes, {spent:.0f} CPU seconds: {page}")
    return page


if __name__ == "__main__":
    torch.set_num_threads(1)  # the pictures' tensors are small
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; finished experiments are on disk, and the same command goes on")
