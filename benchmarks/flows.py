"""``python -m benchmarks.flows``: memory of a flow's gradient against its evaluations, by backprop and by the adjoint.

Two measures of one forward and backward pass of the log-likelihood: the bytes that autograd keeps alive at the worst
moment, counted exactly, and by how much the process's resident memory grew, each case in a process of its own. The
table and the picture go into a copy of docs/flows.md in runs/flow_memory, or with --page into another page, such as
docs/flows.md itself.
"""

from __future__ import annotations

import argparse
import gc
import io
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from torch import Tensor, nn

from score_sde import Flow, NetworkVelocity, Solver
from score_sde.networks import MLP

from . import pages
from .timing import Table, machine

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
FOLDER = Path("runs/flow_memory")
STEPS = (4, 16, 64)
TOLERANCES = (1e-3, 1e-5)
BATCH = 128


class Case(NamedTuple):
    """One pass: evaluations forwards, bytes kept alive, growth of resident memory in bytes, seconds, the gradient."""

    nfe: float
    saved: int
    resident: int
    seconds: float
    gradient: Tensor


def peak_saved_bytes(work: Callable[[], object]) -> int:
    """Most bytes that tensors saved for backward passes hold at one time while `work` runs, each storage once."""
    live: Counter[int] = Counter()
    held = peak = 0

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal held, peak
            storage = tensor.untyped_storage()
            # Without its history: an output saved by the node that made it would hold that node, in a cycle.
            self.tensor, self.key, self.size = tensor.detach(), storage.data_ptr(), storage.nbytes()
            live[self.key] += 1
            if live[self.key] == 1:
                held += self.size
                peak = max(peak, held)

        def __del__(self) -> None:
            nonlocal held
            live[self.key] -= 1
            if live[self.key] == 0:
                held -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        work()
    return peak


def flow_of(solver: Solver) -> tuple[Flow, Tensor]:
    """A flow of a network of 38,000 parameters moved off its start at zero velocity, and a batch."""
    torch.manual_seed(0)
    network = MLP(2, width=64, depth=3)
    nn.init.normal_(network.last.weight, std=0.2)
    return Flow(NetworkVelocity(network), solver=solver), torch.randn(BATCH, 2)


def measure(solver: Solver) -> Case:
    """Measure a pass: saved bytes counted exactly, seconds, and growth of resident memory."""
    flow, x = flow_of(solver)
    with torch.no_grad():
        nfe = flow.evaluate(x).nfe
    flow.log_prob(x[:1]).mean().backward()  # what autograd sets up once
    flow.zero_grad()
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    flow.log_prob(x).mean().backward()
    seconds = time.process_time() - start
    resident = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    gradient = torch.cat([p.grad.flatten() for p in flow.parameters() if p.grad is not None])
    saved = peak_saved_bytes(lambda: flow.log_prob(x).mean().backward())
    return Case(nfe, saved, resident, seconds, gradient)


def apart(solver: Solver) -> Case:
    """`measure` in a process of its own, whose peak memory is this case's."""
    code = (
        "import sys, torch; torch.set_num_threads(1); from benchmarks.flows import Solver, measure; "
        f"torch.save(tuple(measure({solver!r})), sys.stdout.buffer)"
    )
    out = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, cwd=ROOT)
    return Case(*torch.load(io.BytesIO(out.stdout)))


def memory(solvers: Sequence[Solver]) -> tuple[Table, dict[str, list[Case]]]:
    """Both gradients of each solver, as a table and as they are."""
    cases: dict[str, list[Case]] = {"backprop": [], "adjoint": []}
    rows = []
    for solver in solvers:
        back, adjoint = apart(replace(solver, gradient="backprop")), apart(replace(solver, gradient="adjoint"))
        cases["backprop"].append(back)
        cases["adjoint"].append(adjoint)
        difference = float((back.gradient - adjoint.gradient).norm() / back.gradient.norm())
        name = f"{solver.method}, " + (f"{solver.steps} steps" if solver.steps else f"tolerance {solver.rtol:g}")
        megabytes = [f"{n / 2**20:.3g}" for n in (back.saved, adjoint.saved, back.resident, adjoint.resident)]
        seconds = [f"{c.seconds:.2f}" for c in (back, adjoint)]
        rows.append((name, str(back.nfe), *megabytes, *seconds, f"{difference:.0e}"))
        print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    head = (
        "solver", "evaluations", "saved MB, backprop", "saved MB, adjoint", "RSS MB, backprop", "RSS MB, adjoint",
        "s, backprop", "s, adjoint", "gradients differ",
    )  # fmt: skip
    notes = [
        f"log-likelihood of {BATCH} points in the plane, exact trace; MLP of width 64 and depth 3; evaluations forward",
        "saved: peak of the tensors that autograd keeps for backward passes; RSS: growth of the process's peak; "
        "differ: |backprop - adjoint|/|backprop|; seconds of one thread, forward and backward",
    ]
    return Table("Memory of a flow's gradient", head, rows, notes), cases


def draw(cases: dict[str, list[Case]]) -> Figure:
    """Peak memory against evaluations, both measures."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, key, title in zip(axes, ("saved", "resident"), ("Saved for backward", "Growth of resident memory")):
        for (gradient, found), mark in zip(cases.items(), "os"):
            axis.loglog([c.nfe for c in found], [getattr(c, key) / 2**20 for c in found], mark + "-", label=gradient)
        axis.set(xlabel="evaluations of the velocity", ylabel="MB", title=title)
        axis.set_xticks([c.nfe for c in found], [str(c.nfe) for c in found])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    return figure


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m benchmarks.flows", description=__doc__.partition("\n")[2])
    p.add_argument("--page", type=Path, help=f"the page to fill, as docs/flows.md; default a copy of it in {FOLDER}")
    return p


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    page = pages.page_for(options.page, pages.DOCS / "flows.md", FOLDER)
    print(machine(torch.device("cpu")))
    fixed = [Solver("rk4", steps=n) for n in STEPS]
    table, found = memory([*fixed, *(Solver("dopri5", tolerance, tolerance) for tolerance in TOLERANCES)])
    figure = draw({gradient: cases[: len(fixed)] for gradient, cases in found.items()})
    picture = pages.picture(figure, page.parent / "images" / "flow_memory.png", "Memory against evaluations")
    pages.fill(page, {"memory": f"{table}\n\n{picture}"})
    print(f"\n{table}\n\n{page}")


if __name__ == "__main__":
    main()
