"""``python -m benchmarks.coordinates [--model DIR]``: in which coordinate a likelihood takes the fewest evaluations.

Error in bits/dim against evaluations an example, by tolerance, of the same Runge-Kutta pair (Dormand-Prince 5(4)): in t
with one step size for the batch (torchdiffeq's and scipy's), and with steps of each example's own in the log SNR, as
i-DODE has it (Zheng et al. 2023, arXiv:2305.03935), in the angle of the flow's circle, and in `circle.Circle`'s u.
Gaussians have a closed form, and one Rademacher probe is exact where the covariance is diagonal; other models are
measured against their own result at a tolerance of 1e-8, with the same probe.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from score_sde import SDE, VESDE, VPSDE, CosineSDE, ScoreModel, SubVPSDE, load, log_likelihood
from score_sde.data import load_data
from score_sde.models.closed_form import Gaussian, Mixture
from score_sde.ode import Solver
from score_sde.ode.circle import Circle, carry
from score_sde.sdes import like

from .timing import Table, machine

TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6)
TARGETS = (1e-3, 1e-4, 1e-5)  # errors, bits/dim, at which evaluations are compared
IMAGES = 8
T_MIN = 1e-5


class Problem(NamedTuple):
    """A model, data x (B, *shape), a probe of x's shape, and the log density that is true with that probe, (B,)."""

    name: str
    model: ScoreModel
    x: Tensor
    probe: Tensor
    truth: Tensor


@dataclass(frozen=True)
class LogSNR(Circle):
    """x/alpha in log(sigma/alpha), where its slope is sigma/alpha noise: the linear part in x is solved exactly."""

    def place(self, t: Tensor) -> Tensor:
        return torch.log(self.model.sde.sigma(t) / self.model.sde.alpha(t))

    def time(self, u: Tensor) -> Tensor:
        return self.model.sde.time(-2 * u)

    def radius(self, t: Tensor) -> Tensor:
        return self.model.sde.alpha(t)

    def velocity(self, u: Tensor, y: Tensor) -> Tensor:
        t = self.time(u)
        return like(torch.exp(u), y) * self.model(like(self.radius(t), y) * y, t).noise.to(y.dtype)


@dataclass(frozen=True)
class Angle(Circle):
    """The same circle in its angle a."""

    def place(self, t: Tensor) -> Tensor:
        return torch.atan2(self.model.sde.sigma(t), self.scale * self.model.sde.alpha(t))

    def time(self, u: Tensor) -> Tensor:
        return self.model.sde.time(-2 * torch.log(self.scale * torch.tan(u)))

    def velocity(self, u: Tensor, y: Tensor) -> Tensor:
        t = self.time(u)
        e = self.model(like(self.radius(t), y) * y, t)
        return like(torch.cos(u), y) * e.noise.to(y.dtype) - like(torch.sin(u) / self.scale, y) * e.data.to(y.dtype)


Evaluate = Callable[[Problem, float], tuple[Tensor, float]]  # (problem, tolerance) -> log density (B,), evaluations


def in_t(method: str) -> Evaluate:
    """The likelihood by one of `integrate`'s methods, in t."""

    def evaluate(p: Problem, tolerance: float) -> tuple[Tensor, float]:
        settings = {"rtol": tolerance, "atol": tolerance, "t_min": T_MIN, "method": method}
        found = log_likelihood(p.model, p.x, probe=p.probe[None], **settings)  # type: ignore[arg-type]
        return found.log_prob, found.nfe

    return evaluate


def each(coordinate: Callable[[ScoreModel], Circle]) -> Evaluate:
    """The likelihood with a step size for each example, in a coordinate."""

    def evaluate(p: Problem, tolerance: float) -> tuple[Tensor, float]:
        def slopes(velocity: Callable[[Tensor], Tensor], y: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                y = y.detach().requires_grad_(True)
                found = velocity(y)
                (product,) = torch.autograd.grad(found, y, p.probe[rows])
            return found, (product * p.probe[rows]).flatten(1).sum(1, keepdim=True)

        solver, d = Solver("embedded", tolerance, tolerance), math.prod(p.x.shape[1:])
        z, integral, nfe = carry(coordinate(p.model), p.x, T_MIN, 1.0, solver, slopes, 1, d)
        return p.model.sde.prior_log_prob(z) + integral[:, 0], nfe.double().mean().item()

    return evaluate


CANDIDATES: dict[str, Evaluate] = {
    "t, steps for the batch, torchdiffeq": in_t("dopri5"),
    "t, steps for the batch, scipy": in_t("RK45"),
    "log SNR (i-DODE)": each(LogSNR),
    "angle of the circle": each(Angle),
    "the default": each(Circle),
}


def gaussian(name: str, sde: SDE, variances: Tensor, seed: int = 0) -> Problem:
    """A Gaussian with independent dimensions of these variances."""
    model = Gaussian(sde, torch.zeros_like(variances), variances)
    generator = torch.Generator().manual_seed(seed)
    x, _ = model.sample(IMAGES, generator)
    t, one = torch.tensor(T_MIN, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    start, end = (sde.alpha(u) ** 2 * variances + sde.sigma(u) ** 2 for u in (t, one))
    truth = sde.prior_log_prob(model.flow(x, t, one)) + torch.log(end / start).sum() / 2
    return Problem(f"{name}, {sde_name(sde)}", model, x, signs(x, generator), truth)


def against_itself(name: str, model: ScoreModel, x: Tensor, seed: int = 0) -> Problem:
    """A model without a closed form, measured against its own result at a tolerance of 1e-8."""
    problem = Problem(name, model, x, signs(x, torch.Generator().manual_seed(seed)), torch.empty(0))
    return problem._replace(truth=each(Circle)(problem, 1e-8)[0])


def signs(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.where(torch.rand(x.shape, generator=generator) < 0.5, -1.0, 1.0).to(x)


def sde_name(sde: SDE) -> str:
    return type(sde).__name__.removesuffix("SDE").replace("Sub", "sub-")


def problems(workdir: Path | None) -> list[Problem]:
    even = torch.linspace(0.02, 0.5, 192, dtype=torch.float64)
    # as steep as natural images' spectra, with CIFAR-10's largest variance
    steep = 220 / torch.arange(1, 3073, dtype=torch.float64) ** 2
    sdes = (VPSDE(), SubVPSDE(), VESDE(), CosineSDE())
    found = [gaussian("variances 0.02 to 0.5", sde, even) for sde in sdes]
    found += [gaussian("variances 220/i²", sde, steep) for sde in sdes]
    mixture = Mixture(VPSDE(), [0.5, 0.5], [[-1.0, 0.5], [1.5, 0.0]], [1e-4, 0.6])
    x, _ = mixture.sample(IMAGES, torch.Generator().manual_seed(0))
    found.append(against_itself("two Gaussians in the plane, VP", mixture, x))
    if workdir:
        k, _ = load_data("digits").test[torch.arange(IMAGES)]
        u = torch.rand(k.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found.append(against_itself("digits, a trained network, VP", load(workdir).double(), (k + u) / 17 * 2 - 1))
    return found


def measure(problem: Problem) -> dict[str, list[tuple[float, float]]]:
    """(evaluations, mean absolute error in bits/dim) of every candidate at every tolerance."""
    bits = math.prod(problem.x.shape[1:]) * math.log(2)

    def at(evaluate: Evaluate, tolerance: float) -> tuple[float, float]:
        log_prob, nfe = evaluate(problem, tolerance)
        return nfe, (log_prob - problem.truth).abs().mean().item() / bits

    return {name: [at(evaluate, tolerance) for tolerance in TOLERANCES] for name, evaluate in CANDIDATES.items()}


def needed(runs: list[tuple[float, float]], error: float) -> float:
    """Evaluations that an error needs, by a line through all runs in log error and log evaluations."""
    nfe, errors = ([math.log(value) for value in column] for column in zip(*runs))
    slope, intercept = statistics.linear_regression(errors, nfe)
    return math.exp(intercept + slope * math.log(error))


def run(arguments: list[str] | None = None) -> list[Table]:
    p = argparse.ArgumentParser("python -m benchmarks.coordinates", description=__doc__)
    p.add_argument("--model", type=Path, help="workdir of a trained configs/vp_digits.py, to be measured too")
    options = p.parse_args(arguments)
    torch.set_num_threads(1)
    print(machine(torch.device("cpu")), flush=True)
    ratios: dict[str, list[list[float]]] = {name: [[] for _ in TARGETS] for name in CANDIDATES}
    rows = []
    for problem in problems(options.model):
        found = measure(problem)
        for name, runs in found.items():
            rows.append((problem.name, name, *(f"{nfe:.0f}: {error:.0e}" for nfe, error in runs)))
            for i, error in enumerate(TARGETS):
                ratios[name][i].append(needed(runs, error) / needed(found["the default"], error))
    head = ("problem", "coordinate", *(f"tolerance {tolerance:g}" for tolerance in TOLERANCES))
    tables = [Table("Evaluations: error in bits/dim", head, rows, [f"{IMAGES} examples, t from {T_MIN:g} to 1"])]
    means = [(name, *(f"{statistics.geometric_mean(r):.2f}" for r in each_)) for name, each_ in ratios.items()]
    note = "geometric mean over the problems; a line through the four runs says how many an error needs"
    head = ("coordinate", *(f"at an error of {error:g}" for error in TARGETS))
    tables.append(Table("Evaluations over the default's", head, means, [note]))
    for table in tables:
        print(f"\n{table}", flush=True)
    return tables


if __name__ == "__main__":
    run()
