"""``python -m benchmarks.probes``: estimates of a trace at equal products with the Jacobian, where it is known.

For a Gaussian fitted to the digits the Jacobian of the flow, integrated along the path, is half log V(1) V(0)⁻¹ with
V(t) = alpha² C + sigma² I; on the flow's circle (`circle.Circle`) less by a multiple of I, which is solved exactly.
Standard deviations over draws are those that the estimates leave in bits/dim, which is all of their error: no network
and no solver has a part in it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from scipy.linalg import hadamard
from scipy.stats import t as student_t
from torch import Tensor

from score_sde import SDE, VPSDE
from score_sde.data import load_data
from score_sde.ode.circle import SCALE

from .timing import Table

PRODUCTS = 12
DRAWS = 4000
COVERED = (2, 3, 4, 8, 16)  # numbers of probes
Draw = Callable[[int, int, torch.Generator], Tensor]  # (probes, dimensions, generator) -> (probes, dimensions)


def gaussian(k: int, d: int, g: torch.Generator) -> Tensor:
    return torch.randn(k, d, generator=g, dtype=torch.float64)


def rademacher(k: int, d: int, g: torch.Generator) -> Tensor:
    return torch.where(torch.rand(k, d, generator=g) < 0.5, -1.0, 1.0).double()


def sphere(k: int, d: int, g: torch.Generator) -> Tensor:
    z = gaussian(k, d, g)
    return math.sqrt(d) * z / z.norm(dim=1, keepdim=True)


def rows_of_hadamard(k: int, d: int, g: torch.Generator) -> Tensor:
    """Orthogonal rows with random signs of the columns; d must be a power of 2."""
    rows = torch.from_numpy(hadamard(d)).double()[torch.randperm(d, generator=g)[:k]]
    return rows * rademacher(1, d, g)


def hutchinson(draw: Draw) -> Callable[[Tensor, torch.Generator], float]:
    """The mean of e^T J e."""

    def estimate(j: Tensor, g: torch.Generator) -> float:
        e = draw(PRODUCTS, len(j), g)
        return ((e @ j) * e).sum(1).mean().item()

    return estimate


def hutch_plus_plus(j: Tensor, g: torch.Generator) -> float:
    """The trace on the range of a sketch, and Hutchinson on the rest (Meyer et al. 2021, algorithm 1): 3 thirds."""
    third = PRODUCTS // 3
    q, _ = torch.linalg.qr(j @ rademacher(third, len(j), g).T)
    rest = rademacher(third, len(j), g)
    rest = rest - (rest @ q) @ q.T
    return (torch.trace(q.T @ j @ q) + ((rest @ j) * rest).sum(1).mean()).item()


ESTIMATES: dict[str, Callable[[Tensor, torch.Generator], float]] = {
    "rademacher": hutchinson(rademacher),
    "sphere": hutchinson(sphere),
    "gaussian": hutchinson(gaussian),
    "Hutch++": hutch_plus_plus,
    "rows of a Hadamard matrix": hutchinson(rows_of_hadamard),
}


def fitted_covariance() -> Tensor:
    """Of the digits in [-1, 1], dequantised, (64, 64)."""
    k, _ = load_data("digits").train[torch.arange(len(load_data("digits").train))]
    u = torch.rand(k.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.cov((((k + u) / 17 * 2 - 1).flatten(1)).T)


def integrated_jacobian(sde: SDE, covariance: Tensor, t_min: float = 1e-5) -> tuple[Tensor, Tensor]:
    """The integral over t of dv/dx from t_min to 1, and what of it the circle leaves to probes, (D, D) each."""
    start, end = (torch.tensor(t, dtype=torch.float64) for t in (t_min, 1.0))
    eigenvalues, basis = torch.linalg.eigh(covariance)
    v0, v1 = (sde.alpha(t) ** 2 * eigenvalues + sde.sigma(t) ** 2 for t in (start, end))
    r0, r1 = (sde.alpha(t) ** 2 * SCALE**2 + sde.sigma(t) ** 2 for t in (start, end))
    whole = basis @ torch.diag((v1 / v0).log() / 2) @ basis.T
    return whole, whole - (r1 / r0).log() / 2 * torch.eye(len(eigenvalues), dtype=torch.float64)


def measure(j: Tensor, draws: int = DRAWS, seed: int = 0) -> dict[str, float]:
    """Standard deviation of each estimate in bits/dim."""
    found = {}
    for name, estimate in ESTIMATES.items():
        g = torch.Generator().manual_seed(seed)
        values = torch.tensor([estimate(j, g) for _ in range(draws)], dtype=torch.float64)
        found[name] = values.std().item() / (len(j) * math.log(2))
    return found


def coverage(j: Tensor, draw: Draw, probes: int, draws: int, level: float = 0.95, seed: int = 0) -> float:
    """How often the t-interval of this level, from the mean and the spread of so many probes, holds the trace."""
    g = torch.Generator().manual_seed(seed)
    e = draw(draws * probes, len(j), g)
    each = ((e @ j) * e).sum(1).reshape(draws, probes)
    reach = student_t.ppf((1 + level) / 2, probes - 1) * each.std(1) / math.sqrt(probes)
    return ((each.mean(1) - torch.trace(j)).abs() <= reach).double().mean().item()


def run_coverage(draws: int = 10 * DRAWS) -> Table:
    """Of the intervals from `Likelihood.std_error`, for the Gaussian and for two dimensions, correlation 0.7."""
    plane = torch.tensor([[1.0, 0.7], [0.7, 1.0]], dtype=torch.float64)
    cases = {"digits, 64 dimensions": integrated_jacobian(VPSDE(), fitted_covariance())[1], "two dimensions": plane}
    rows = [
        (f"{name}, {law.__name__}", *(f"{100 * coverage(j, law, k, draws):.1f} %" for k in COVERED))
        for name, j in cases.items()
        for law in (rademacher, gaussian)
    ]
    head = ("probes", *map(str, COVERED))
    return Table("Coverage of t-intervals of 95 %", head, rows, [f"{draws} draws, of one example's log p"])


def run(arguments: list[str] | None = None) -> Table:
    p = argparse.ArgumentParser("python -m benchmarks.probes", description=__doc__)
    p.add_argument("--draws", type=int, default=DRAWS, help=f"of every estimate ({DRAWS})")
    options = p.parse_args(arguments)
    whole, rest = (measure(j, options.draws) for j in integrated_jacobian(VPSDE(), fitted_covariance()))
    rows = [(name, f"{whole[name]:.3f}", f"{rest[name]:.3f}") for name in ESTIMATES]
    notes = [f"{PRODUCTS} products an estimate, {options.draws} draws; Gaussian fitted to the digits, VP from t = 1e-5"]
    table = Table("Standard deviation of log p in bits/dim", ("probe", "in t", "on the circle"), rows, notes)
    print(table)
    print(run_coverage(10 * options.draws))
    return table


if __name__ == "__main__":
    run()
