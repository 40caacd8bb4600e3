"""Langevin dynamics gets the weights of separated modes wrong, annealed Langevin dynamics does not.

``python -m examples.mode_weights`` repeats figure 3 of Song & Ermon 2019 (arXiv:1907.05600, section 3.2.2) with exact
scores: the mixture 1/5 N((-5, -5), I) + 4/5 N((5, 5), I), 1,000 Langevin steps from uniform states in [-8, 8]², and 100
on each of ten noise levels from 20 to 1, both with the step eps = 0.1 of the published code (ermongroup/ncsn,
runners/toy_runner.py). It prints the share of states at the lighter mode and draws runs/mode_weights.png, or what
--picture says.

What remains of an error with annealing is that of finite annealing: below some level walks no longer change modes, and
at the jump to it the weights have not settled. Four times the levels leave a quarter of it.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from score_sde import SMLD, AnnealedLangevin, langevin_dynamics, sample
from score_sde.machine.progress import with_progress
from score_sde.models.closed_form import Mixture

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PICTURE = Path("runs/mode_weights.png")
WEIGHTS, MEANS = (0.2, 0.8), ((-5.0, -5.0), (5.0, 5.0))
EPS = 0.1  # x += eps/2 score + sqrt(eps) z, times (sigma/sigma_L)² on a level
STEPS = 100  # on a level; ten times as many without levels


def model(levels: int = 10) -> tuple[Mixture, Tensor]:
    """The exact model of two points under noise of geometric levels from 20 to 1, and the levels' times from 1 on.

    At the last time, the smallest level, it is the mixture of N(mean, I).
    """
    chain = SMLD(torch.logspace(0, math.log10(20), levels, dtype=torch.float64))
    return Mixture(chain.as_sde(), WEIGHTS, MEANS, 0.0), chain.times[:-1]


def exact(n: int, seed: int) -> Tensor:
    """n draws (n, 2) from the mixture."""
    generator = torch.Generator().manual_seed(seed)
    points, _ = model()[0].sample(n, generator)
    return points + torch.randn(n, 2, generator=generator, dtype=points.dtype)


def plain(n: int, seed: int, metropolis: bool = False) -> Tensor:
    """n states (n, 2) after 1,000 Langevin steps at the mixture from uniform ones in [-8, 8]²."""
    generator = torch.Generator().manual_seed(seed)
    x = 16 * torch.rand(n, 2, generator=generator, dtype=torch.float64) - 8
    target, times = model()
    if metropolis:
        return langevin_dynamics(
            lambda y: target.log_prob(y, times[-1]), x, EPS / 2, 10 * STEPS, metropolis=True, seed=generator
        ).x
    return langevin_dynamics(target, x, EPS / 2, 10 * STEPS, t=times[-1], seed=generator).x


def annealed(n: int, seed: int, levels: int = 10) -> Tensor:
    """n states (n, 2) after 100 steps on each level, from N(0, 20² I)."""
    target, times = model(levels)
    sampler = AnnealedLangevin(math.sqrt(EPS) / 2, steps=STEPS)
    return sample(target, sampler, (n, 2), times, seed=torch.Generator().manual_seed(seed))


def lighter(x: Tensor) -> tuple[float, float]:
    """The share of states nearer to the lighter mode, and its standard error."""
    share = (x.sum(1) < 0).double().mean().item()
    return share, math.sqrt(share * (1 - share) / len(x))


def draw(panels: dict[str, Tensor], path: Path) -> None:
    """The first 1,280 states of each, the published figure's number."""
    figure, axes = plt.subplots(1, len(panels), figsize=(3 * len(panels), 3.2), layout="constrained")
    for axis, (title, x) in zip(axes, panels.items()):
        axis.scatter(*x[:1280].T, s=1, linewidths=0, color="tab:blue")
        share, _ = lighter(x)
        axis.set_title(f"{title}\n{100 * share:.1f} % at the lighter mode", fontsize=9)
        axis.set(xlim=(-9, 9), ylim=(-9, 9), aspect="equal", xticks=(-5, 5), yticks=(-5, 5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m examples.mode_weights", description="Modes' weights by Langevin walks.")
    parser.add_argument("--walks", type=int, default=10_000, help="of each kind (10,000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=PICTURE, help=f"where to draw ({PICTURE})")
    options = parser.parse_args(arguments)
    if options.walks < 1:
        parser.error(f"--walks must be at least 1, got {options.walks}")

    n, seed = options.walks, options.seed
    ways = {
        "exact draws": lambda: exact(n, seed),
        "Langevin dynamics": lambda: plain(n, seed),
        "with Metropolis' test": lambda: plain(n, seed, metropolis=True),
        "annealed Langevin dynamics": lambda: annealed(n, seed),
        "on 40 levels instead of 10": lambda: annealed(n, seed, levels=40),
    }
    states = {name: draws() for name, draws in with_progress(ways.items(), "walks", len(ways), "kind")}
    print(f"share of {n:,} states at the lighter mode, whose weight is {WEIGHTS[0]}")
    for name, x in states.items():
        share, error = lighter(x)
        off = (share - WEIGHTS[0]) / math.sqrt(WEIGHTS[0] * WEIGHTS[1] / n)
        print(f"{name:<28}{share:.4f} ± {error:.4f}   {off:+.1f} standard errors off")
    draw({name: x for name, x in states.items() if "dynamics" in name or "exact" in name}, options.picture)
    print(f"picture: {options.picture}")


if __name__ == "__main__":
    main()
