"""Makes the two figures of flow_matching.md and prints the numbers it states: python docs/flow_matching.py --out docs

The figures go to runs/flow_matching, or to the folder of --out. It takes less than a minute.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from score_sde import SDE, VPSDE, LinearSDE, Solver, TrigonometricSDE, on, sample, score_flow, times
from score_sde.likelihood.flows import straightness
from score_sde.losses.couplings import independent, optimal_transport, sinkhorn
from score_sde.models.closed_form import Mixture
from score_sde.samplers import FixedODE

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PATHS: dict[str, SDE] = {
    "VP": VPSDE(), "trigonometric": TrigonometricSDE(), "straight": LinearSDE(),
}  # fmt: skip
COUPLINGS = {"independent": independent, "optimal_transport": optimal_transport, "sinkhorn": sinkhorn}


def data(sde: SDE) -> Mixture:
    """The exact model of one-dimensional data with two modes."""
    return Mixture(sde, [0.4, 0.6], [[-1.0], [1.0]], [0.02, 0.02])


def flows(out: Path) -> None:
    """The same noise carried to the same data on three paths, their straightness, and Euler's error on each."""
    vp = data(VPSDE())
    quantiles = torch.linspace(0.03, 0.97, 21, dtype=torch.float64)
    z = torch.special.ndtri(quantiles)[:, None]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3), sharey=True)
    print("path           straightness  ends apart from VP's  error of Euler's method in 8 steps")
    ends: dict[str, Tensor] = {}
    for axis, (name, sde) in zip(axes, PATHS.items(), strict=True):
        model = vp if name == "VP" else on(vp, sde)
        flow = score_flow(model, t_min=model.sde.t_min, solver=Solver("dopri5", 1e-8, 1e-8))
        grid = torch.linspace(1, flow.t0, 101, dtype=torch.float64)
        states = flow.path(z, grid)
        ends[name] = states[-1] / sde.alpha(grid[-1])
        axis.plot(grid, states[:, :, 0], color="tab:blue", linewidth=0.8)
        axis.set(title=name, xlabel="t")
        euler = sample(model, FixedODE("euler"), tuple(z.shape), times.uniform(model.sde, 8), start=z)
        error = (euler / sde.alpha(grid[-1]) - ends[name]).square().mean().sqrt()
        gap = (ends[name] - ends["VP"]).abs().max()
        print(f"{name:13}  {straightness(flow, states[-1]).mean():12.3f}  {gap:20.1e}  {error:.3f}")
    axes[0].set_ylabel("x")
    figure.tight_layout()
    figure.savefig(out / "flow_matching_paths.png", dpi=110)


def couplings(out: Path) -> None:
    """128 points of two moons and as much noise, paired in three ways."""
    source = torch.Generator().manual_seed(0)
    angle = torch.pi * torch.rand(128, generator=source, dtype=torch.float64)
    upper = torch.arange(128) % 2 == 0
    moons = torch.stack([angle.cos() + torch.where(upper, -0.5, 0.5), angle.sin() * torch.where(upper, 1, -1)], 1)
    moons += torch.where(upper, -0.2, 0.2)[:, None] * torch.tensor([0.0, 1.0])
    z = torch.randn(128, 2, generator=source, dtype=torch.float64)
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), sharex=True, sharey=True)
    print("\ncoupling           mean |x_0 - z|²")
    for axis, (name, couple) in zip(axes, COUPLINGS.items(), strict=True):
        paired = couple(moons, z, source)
        axis.plot(*torch.stack([moons, paired]).permute(2, 0, 1), color="grey", linewidth=0.5)
        axis.scatter(*moons.T, s=6, color="tab:blue", label="data")
        axis.scatter(*paired.T, s=6, color="tab:orange", label="noise")
        axis.set(title=name, aspect="equal")
        print(f"{name:17}  {(moons - paired).square().sum(1).mean():.3f}")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "flow_matching_couplings.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/flow_matching"), help="folder of the figures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    flows(out)
    couplings(out)


if __name__ == "__main__":
    main()
