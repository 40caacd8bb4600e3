"""``python -m examples.flows``: continuous normalizing flows by maximum likelihood, on densities that are known.

Trains a network's velocity on each density in the plane and compares held-out log-likelihoods with the true density's
and a fitted Gaussian's; then trains a score model by denoising and goes on with its probability flow, by likelihood.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import pages
from benchmarks.timing import machine
from score_sde import (
    VPSDE,
    Flow,
    NetworkVelocity,
    Preconditioned,
    ScoreModel,
    Solver,
    denoising,
    losses,
    score_flow,
    time_laws,
)
from score_sde.data.toys import EXACT, TOYS, checkerboard_log_prob
from score_sde.machine.progress import Progress
from score_sde.networks import MLP

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PAGE = pages.DOCS / "flows.md"
QUICK = 25  # a quick run takes the steps of a full one divided by this
STEPS, DENOISING_STEPS, FINE_STEPS = 700, 3000, 150
BATCH, HELD_OUT = 256, 2000
TRAINING = Solver("rk4", steps=4)
FINE_TUNING = Solver("dopri5", 1e-3, 1e-3)
EVALUATION = Solver("dopri5", 1e-4, 1e-4)
REGULARISERS = (0.01, 0.01)  # weights of the kinetic energy and of the Jacobian
SDE = VPSDE(t_min=1e-3)  # a score model's data lie at t_min, where the noise is 0.01

LogProb = Callable[[Tensor], Tensor]  # (B, 2) -> (B,)


# --- training


def batches(name: str, steps: int, seed: int) -> Iterator[Tensor]:
    """Fresh points (BATCH, 2) for every step: nothing is seen twice."""
    return iter(TOYS[name](steps * BATCH, 100 + seed).split(BATCH))


def descend(module: nn.Module, loss: LogProb, data: Iterator[Tensor], steps: int, rate: float, name: str) -> float:
    """Adam on the mean loss, with clipped gradients; the rate rises over 20 steps and falls to 0 as a cosine.

    Returns the CPU seconds that it took.
    """
    start = time.process_time()
    optimizer = torch.optim.Adam(module.parameters(), lr=rate, betas=(0.9, 0.99))
    with Progress(name, steps) as bar:
        for i, x in zip(range(steps), data):
            optimizer.param_groups[0]["lr"] = rate * min((i + 1) / 20, 1) * (1 + math.cos(math.pi * i / steps)) / 2
            optimizer.zero_grad()
            value = loss(x).mean()
            value.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 5.0)
            optimizer.step()
            bar.note(f"loss {value.item():.3f}")
            bar.update()
    return time.process_time() - start


def train_flow(
    name: str, steps: int, seed: int = 0, regularisers: tuple[float, float] = REGULARISERS, scale: float = 10.0
) -> tuple[Flow, float]:
    """A flow fitted by maximum likelihood, backwards through four Runge-Kutta steps, and the CPU seconds.

    The time label of its network is `scale` t.
    """
    torch.manual_seed(seed)
    kinetic, jacobian = regularisers
    flow = Flow(NetworkVelocity(MLP(2, width=64, depth=2), scale), solver=TRAINING)

    def loss(x: Tensor) -> Tensor:
        found = flow.evaluate(x, kinetic=kinetic > 0, jacobian=jacobian > 0)
        value = -found.log_prob
        if found.kinetic is not None:
            value = value + kinetic * found.kinetic
        if found.jacobian is not None:
            value = value + jacobian * found.jacobian
        return value

    return flow, descend(flow, loss, batches(name, steps, seed), steps, 5e-3, f"{name}, likelihood")


def new_score_model(seed: int = 0) -> ScoreModel:
    """An untrained score model. Its label, 2 log(sigma/alpha), runs from about -9 to 10; its flow is smooth in it."""
    torch.manual_seed(seed)
    return Preconditioned(MLP(2, width=64, depth=2), SDE, label=lambda alpha, sigma, t: 2 * torch.log(sigma / alpha))


def train_score(model: ScoreModel, name: str, steps: int, seed: int = 0) -> float:
    """Denoise at uniform log SNR: likelihood weighting with importance-sampled t. Returns the CPU seconds."""
    random = torch.Generator().manual_seed(seed)

    def loss(x: Tensor) -> Tensor:
        t = time_laws.log_snr(SDE, torch.rand(len(x), generator=random, dtype=torch.float64)).t
        return denoising(model, x, t, torch.randn(x.shape, generator=random), losses.simple)

    return descend(model, loss, batches(name, steps, seed), steps, 2e-3, f"{name}, denoising")


def fine_tune(model: ScoreModel, name: str, steps: int, seed: int = 1) -> float:
    """Go on with a score model by the likelihood of its probability flow. Returns the CPU seconds."""
    flow = score_flow(model, t_min=SDE.t_min, solver=FINE_TUNING)
    loss: LogProb = lambda x: -flow.log_prob(x)
    return descend(flow, loss, batches(name, steps, seed), steps, 1e-3, f"{name}, likelihood of the score model")


# --- measures


class HeldOut(NamedTuple):
    """A flow on held-out points: mean log density in nats, how far below the truth's with standard error, its costs."""

    log_prob: float
    gap: float
    error: float
    nfe: float
    kinetic: float


def true_log_prob(name: str, x: Tensor) -> Tensor:
    """Exact log density (B,) of a density of `toys` at x (B, 2), in float64."""
    if name == "checkerboard":  # its model has noise at every t
        return checkerboard_log_prob(x.double())
    return EXACT[name](SDE).log_prob(x.double(), torch.zeros((), dtype=torch.float64))


def held_out(flow: Flow, name: str) -> HeldOut:
    """Measured by the adaptive solver and the exact trace, whatever the flow was trained with."""
    x = TOYS[name](HELD_OUT, 1)
    with torch.no_grad():
        found = flow.replace(solver=EVALUATION).evaluate(x, kinetic=True)
    gap = true_log_prob(name, x) - found.log_prob
    assert found.kinetic is not None
    error = gap.std().item() / math.sqrt(HELD_OUT)
    return HeldOut(found.log_prob.mean().item(), gap.mean().item(), error, found.nfe, found.kinetic.mean().item())


def gaussian_log_prob(name: str) -> float:
    """Mean log density of the held-out points under a Gaussian fitted to others."""
    x = TOYS[name](20_000, 0).double()
    fitted = torch.distributions.MultivariateNormal(x.mean(0), torch.cov(x.T))
    return fitted.log_prob(TOYS[name](HELD_OUT, 1).double()).mean().item()


def title(name: str) -> str:
    return name.replace("_", " ")


def flow_row(name: str, flow: Flow, seconds: float, said: str = "") -> tuple[str, ...]:
    """A line of the table of flows."""
    x, found = TOYS[name](HELD_OUT, 1), held_out(flow, name)
    with torch.no_grad():
        claimed = flow.log_prob(x).mean().item()
    return (
        title(name) + said,
        f"{true_log_prob(name, x).mean():.3f}",
        f"{gaussian_log_prob(name):.3f}",
        f"{claimed:.3f}",
        f"{found.log_prob:.3f}",
        f"{found.gap:.3f} ± {found.error:.3f}",
        str(found.nfe),
        f"{found.kinetic:.2f}",
        f"{seconds:.0f}",
    )


FLOW_HEAD = (
    "density", "truth", "Gaussian", "flow, by four steps", "flow", "below the truth", "evaluations", "kinetic energy",
    "CPU s",
)  # fmt: skip
TUNING_HEAD = ("training", "steps", "CPU s", "log p", "below the truth", "evaluations")


def compare_tuning(name: str, quick: int, seed: int) -> tuple[list[tuple[str, ...]], list[Flow]]:
    """A score model by denoising; a copy that goes on by likelihood, one that goes on denoising for as long.

    Returns the table's lines and the three flows.
    """
    model, steps, fine_steps = new_score_model(seed), DENOISING_STEPS // quick, FINE_STEPS // quick
    seconds = train_score(model, name, steps, seed)
    tuned, control = copy.deepcopy(model), copy.deepcopy(model)
    fine_seconds = fine_tune(tuned, name, fine_steps, seed + 1)
    more_steps = round(steps * fine_seconds / seconds)
    more_seconds = train_score(control, name, more_steps, seed + 1)
    rows: list[tuple[str, ...]] = []
    flows = [score_flow(m, t_min=SDE.t_min, solver=EVALUATION) for m in (model, tuned, control)]
    runs = (("denoising", steps, seconds), ("then likelihood", fine_steps, fine_seconds))
    for flow, (label, n, s) in zip(flows, (*runs, ("or as long denoising", more_steps, more_seconds))):
        found = held_out(flow, name)
        gap = f"{found.gap:.3f} ± {found.error:.3f}"
        rows.append((label, str(n), f"{s:.0f}", f"{found.log_prob:.3f}", gap, str(found.nfe)))
    return rows, flows


# --- pictures


def draw_flows(flows: dict[str, Flow]) -> Figure:
    """Each flow from base to data: its density at five times under paths, its samples, and the data."""
    times = (1.0, 0.75, 0.5, 0.25, 0.0)
    titles = ("t = 1, the base", *(f"t = {t:g}" for t in times[1:]), "samples", "data")
    figure, axes = panels(len(flows), titles)
    for row, (name, trained) in zip(axes, flows.items()):
        flow = trained.replace(solver=EVALUATION)
        with torch.no_grad():
            walked = flow.path(torch.randn(40, 2, generator=torch.Generator().manual_seed(3)), torch.linspace(1, 0, 41))
        for axis, t in zip(row, times):
            draw_density(axis, flow.replace(t0=t).log_prob if t < 1 else flow.base)
            until = walked[: 1 + round(40 * (1 - t))]
            axis.plot(until[..., 0], until[..., 1], color="tab:orange", linewidth=0.5)
            axis.plot(*until[-1].T, ".", color="tab:red", markersize=3)
        for axis, x in zip(row[len(times) :], (flow.sample((HELD_OUT, 2), seed=4), TOYS[name](HELD_OUT, 1))):
            axis.plot(*x.T, ".", markersize=1)
            axis.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6))
        row[0].set_ylabel(title(name))
    return figure


def draw_tuning(name: str, flows: Sequence[Flow]) -> Figure:
    """The densities of the flows of `compare_tuning`, and the true one."""
    figure, axes = panels(1, ("denoising", "then likelihood", "or as long denoising", "the truth"))
    true: LogProb = lambda x: true_log_prob(name, x)
    for axis, log_prob in zip(axes[0], (*(flow.log_prob for flow in flows), true)):
        draw_density(axis, log_prob, reach=1.6)
    return figure


def draw_density(axis: Axes, log_prob: LogProb, reach: float = 2.2) -> None:
    """exp(log_prob) on [-reach, reach]², each picture on a scale of its own."""
    at = torch.linspace(-reach, reach, 80)
    with torch.no_grad():
        density = log_prob(torch.cartesian_prod(at, at)).exp().reshape(80, 80).T
    axis.imshow(density, origin="lower", extent=(-reach, reach, -reach, reach), cmap="Blues")
    axis.set(xlim=(-reach, reach), ylim=(-reach, reach))


def panels(rows: int, titles: Sequence[str]) -> tuple[Figure, np.ndarray]:
    size = (1.7 * len(titles), 1.7 * rows + 0.3)
    figure, axes = plt.subplots(rows, len(titles), figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], aspect="equal")
    for axis, said in zip(axes[0], titles):
        axis.set_title(said, fontsize=9)
    return figure, axes


# --- the command


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m examples.flows", description=__doc__.split("\n\n", 1)[1].replace("\n", " "))
    p.add_argument("--densities", nargs="+", choices=list(TOYS), default=["ring", "moons", "checkerboard"])
    p.add_argument("--tuned", choices=list(TOYS), default="moons", help="the density of the score model (moons)")
    p.add_argument("--quick", action="store_true", help=f"1/{QUICK} of the steps: what it looks like, not what is true")
    p.add_argument("--seed", type=int, default=0, help="of initial weights and training points (0)")
    p.add_argument(
        "--page", type=Path, help="the page to fill, such as docs/flows.md; default a copy of it in runs/flows"
    )
    return p


def main(arguments: list[str]) -> Path:
    """Train, measure, draw and write the page; return it."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)  # its tensors are too small to share
    start, quick = time.perf_counter(), QUICK if options.quick else 1
    page = pages.page_for(options.page, PAGE, Path("runs/flows"))
    rows, flows = [], {}
    for name in options.densities:
        flows[name], seconds = train_flow(name, STEPS // quick, options.seed)
        rows.append(flow_row(name, flows[name], seconds))
    free, seconds = train_flow(name, STEPS // quick, options.seed, (0.0, 0.0))
    rows.append(flow_row(name, free, seconds, ", not regularised"))
    tuning, tuned = compare_tuning(options.tuned, quick, options.seed)

    images = page.parent / "images"
    paths = pages.picture(draw_flows(flows), images / "flow_in_time.png", "Flows from base to data")
    densities = pages.picture(draw_tuning(options.tuned, tuned), images / "flow_tuned.png", "Densities of the flows")
    tables = pages.table(FLOW_HEAD, rows), pages.table(TUNING_HEAD, tuning)
    command = " ".join(["python -m examples.flows", *arguments])
    blocks = {
        "command": f"    {command}\n\n{machine(torch.device('cpu'))}.",
        "flows": f"{tables[0]}\n{paths}",
        "tuning": f"{title(options.tuned).capitalize()}:\n\n{tables[1]}\n{densities}",
    }
    pages.fill(page, blocks)
    print("\n".join(["", *tables, f"{(time.perf_counter() - start) / 60:.1f} minutes: {page}"]))
    return page


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was written")
