"""The mathematics that tests share: every SDE and every sampler in one list each, chains, numbers, a mixture.

A new SDE is one more row of PUBLISHED: the tests of coefficients, orders and products take it from there. A new sampler
is one more row of SAMPLERS: so do those of orders, spread, gradients, shapes, dtypes, devices and overhead.
"""

import itertools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from mpmath import cos, exp, mpf, pi, sin, sqrt
from torch import Tensor

from score_sde import (
    DDIM,
    DDPM,
    EDMSDE,
    SDE,
    SMLD,
    VESDE,
    VPSDE,
    AdaptiveODE,
    AdaptiveSDE,
    Ancestral,
    AnnealedLangevin,
    Balanced,
    Churn,
    CosineSDE,
    DPMSolver,
    EmbeddedODE,
    EulerMaruyama,
    FixedODE,
    Heun,
    Langevin,
    LinearSDE,
    Multistep,
    PredictorCorrector,
    ReverseDiffusion,
    Sampler,
    ScoreModel,
    SubVPSDE,
    TrigonometricSDE,
    UniPC,
)
from score_sde.models.closed_form import Mixture
from score_sde.networks.blocks import Style
from score_sde.sdes.learned import LearnedVPSDE, MonotoneSchedule
from tests import RECORDED

Curves = Callable[[mpf], tuple[mpf, mpf]]  # t -> (alpha, sigma)


def _vp_mean(t: mpf) -> mpf:
    return exp(-(t**2) * (mpf(20) - mpf(0.1)) / 4 - t * mpf(0.1) / 2)


def _edm(t: mpf) -> mpf:
    low, high = mpf(0.002) ** (mpf(1) / 7), mpf(80) ** (mpf(1) / 7)
    return (low + t * (high - low)) ** 7


def _cosine(t: mpf) -> mpf:
    angle, start = (pi / 2 * (mpf("0.999") * u + mpf("0.008")) / mpf("1.008") for u in (t, 0))
    return cos(angle) / cos(start)


# SDE: its curves (alpha, sigma) as the papers print them, in mpmath's digits, where cancellation does not matter.
PUBLISHED: dict[SDE, Curves] = {
    VPSDE(): lambda t: (_vp_mean(t), sqrt(1 - _vp_mean(t) ** 2)),  # Song et al. 2021, eq. 29
    SubVPSDE(): lambda t: (_vp_mean(t), 1 - _vp_mean(t) ** 2),
    VESDE(): lambda t: (mpf(1), mpf(0.01) * (mpf(50) / mpf(0.01)) ** t),
    CosineSDE(): lambda t: (_cosine(t), sqrt(1 - _cosine(t) ** 2)),  # Nichol & Dhariwal 2021, eq. 17
    EDMSDE(): lambda t: (mpf(1), _edm(t)),  # Karras et al. 2022, eq. 5
    LinearSDE(): lambda t: (1 - t, t),  # Liu et al. 2023
    TrigonometricSDE(): lambda t: (cos(pi * t / 2), sin(pi * t / 2)),  # Albergo & Vanden-Eijnden 2023
}
SDES: list[SDE] = list(PUBLISHED)
PURE: list[SDE] = [LinearSDE(), TrigonometricSDE()]  # whose state at t = 1 is pure noise, where f and g are infinite
STEEP: list[SDE] = [CosineSDE(), *PURE]  # steps lose half of the signal and more, where ReverseDiffusion's flow is none


def first_time(sde: SDE) -> float:
    """1, or near it where f, g and what depends on log SNR are infinite at 1."""
    return 0.999 if sde in PURE else 1.0


CHAINS: list[DDPM | SMLD] = [
    DDPM.linear(1000),
    DDPM.cosine(50),
    DDPM([0.3, 0.1, 0.6, 0.2, 0.5]),
    SMLD.from_sde(VESDE(), 1000),
    SMLD([0.1, 0.5, 0.6, 2.0, 7.0]),
]


class Row(NamedTuple):
    """A sampler and what the tests measure of it.

    `order` is that of its error on ever finer grids: without `noise` of the flow's solution, with it of the samples'
    deviations; 0 where there is none, as for correctors and steps that adapt. `passes` are its operations on whole
    states in a step, without the draws of noise: as many as there are tensors in its formula; 0 where steps differ. A
    `main` row also goes through the tests of what all samplers do alike; others are variants of a main one.
    """

    sampler: Sampler
    order: int = 0
    noise: bool = False
    passes: int = 0
    main: bool = True


SAMPLERS: list[Row] = [
    Row(EulerMaruyama(), 1, noise=True, passes=3),
    Row(ReverseDiffusion(), 1, noise=True, passes=3),
    Row(ReverseDiffusion(flow=True), 1, passes=2),
    Row(Ancestral(), 1, noise=True, passes=3),
    Row(Ancestral("large"), 1, noise=True, passes=3),
    Row(DDIM(), 1, passes=2),
    Row(DDIM(eta=0.5), 1, noise=True, passes=3),
    Row(DDIM(eta=1.0), 1, noise=True, main=False),
    Row(Langevin(), noise=True, passes=4),  # two norms
    Row(AnnealedLangevin(), noise=True, passes=2),
    Row(PredictorCorrector(), noise=True, passes=7),
    Row(PredictorCorrector(ReverseDiffusion(), AnnealedLangevin(0.1)), 1, noise=True, passes=5),
    Row(PredictorCorrector(Ancestral(), AnnealedLangevin(0.1)), 1, noise=True),
    Row(FixedODE("euler"), 1),
    Row(FixedODE("midpoint"), 2, main=False),
    Row(FixedODE("heun2"), 2, main=False),
    Row(FixedODE("rk4"), 4, main=False),
    Row(Heun(), 2, passes=4),
    Row(Churn(0.0), 2, main=False),
    Row(Churn(1.0), 2, noise=True),
    Row(Churn(1e9), noise=True, passes=6, main=False),
    Row(DPMSolver(1), 1, passes=2, main=False),
    Row(DPMSolver(2), 2, passes=4),
    Row(DPMSolver(3), 3, passes=8),
    Row(DPMSolver(2, "data"), 2, passes=4, main=False),
    Row(DPMSolver(3, "data"), 3, main=False),
    Row(Multistep(1), 1, passes=2, main=False),
    Row(Multistep(2), 2, passes=3),
    Row(Multistep(3), 3, passes=4, main=False),
    Row(Multistep(2, "noise"), 2, main=False),
    Row(Multistep(3, "noise"), 3, passes=4),
    Row(Multistep(2, "both"), 2, main=False),
    Row(Multistep(3, "both"), 3, main=False),
    Row(Multistep(2, rule="published"), 2, main=False),
    Row(Multistep(2, eta=1.0), 2, noise=True, passes=4),
    Row(UniPC(1), 2, passes=4, main=False),
    Row(UniPC(2), 3, passes=6),
    Row(UniPC(3), 4, passes=8, main=False),
    *(Row(UniPC(order, "b1"), order + 1, main=False) for order in (1, 2, 3)),
    *(Row(UniPC(order, predict="noise"), order + 1, main=False) for order in (1, 2, 3)),
    *(Row(UniPC(order, "b1", "noise"), order + 1, main=False) for order in (2, 3)),
    Row(UniPC(2, predict="both"), 3),
    Row(UniPC(3, predict="both"), 4, main=False),
    Row(Balanced(1), 2, main=False),
    Row(Balanced(2), 3, passes=8, main=False),
    Row(Balanced(), 3, passes=10),
    Row(Balanced(4), 3, passes=12, main=False),
    Row(AdaptiveODE(1e-4, 1e-4)),
    Row(EmbeddedODE(1e-4, 1e-4)),
    Row(AdaptiveSDE(0.1, 0.1), noise=True),
]
# sampler without noise: its order as a solver of the probability flow
FLOW_ORDERS: dict[Sampler, int] = {row.sampler: row.order for row in SAMPLERS if row.order and not row.noise}
MAIN: list[Sampler] = [row.sampler for row in SAMPLERS if row.main]
EXPONENTIAL = (Balanced, Churn, DPMSolver, Multistep, UniPC)  # whose orders test_fast_solvers.py measures
DETERMINISTIC = {s: order for s, order in FLOW_ORDERS.items() if not isinstance(s, EXPONENTIAL)}
# those of weak order 1 that have a step
STOCHASTIC: list[Sampler] = [
    row.sampler
    for row in SAMPLERS
    if row.noise and row.order == 1 and not isinstance(row.sampler, (*EXPONENTIAL, PredictorCorrector))
]


def name(value: object) -> str:
    """A test's id: the SDE's or sampler's class."""
    return type(value).__name__


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Standard normal numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def moments_after(sampler: Sampler, model: ScoreModel, grid: Tensor, mean: float, var: float) -> tuple[float, float]:
    """Mean and variance after a walk over 1-D Gaussian data, exactly: the walk is x -> a + b x + sum_i c_i z_i.

    One walk finds a, b and all c_i, for as many examples: zero, a unit x, and a unit z_i for each draw.
    """
    n = len(grid) - 1
    x = torch.zeros(n + 2, 1, dtype=torch.float64)
    x[1] = 1
    draw = itertools.count(2)

    def noise(like: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        z[next(draw)] = 1
        return z

    end = list(sampler.walk(model, x, grid, noise))[-1][:, 0]
    a, b, c = float(end[0]), float(end[1] - end[0]), end[2:] - end[0]
    return a + b * mean, b**2 * var + float(c.square().sum())


def bent(units: int = 8, learn_ends: bool = False) -> MonotoneSchedule:
    """A schedule far from linear: its rate varies fivefold."""
    schedule = MonotoneSchedule(units=units, learn_ends=learn_ends)
    with torch.no_grad():
        schedule.units[0] += 2 * numbers(units, dtype=torch.float32)
        schedule.units[1] *= 0.5 + numbers(units, seed=1, dtype=torch.float32).sigmoid()
        schedule.slope -= 2.0
    rate = schedule.shape(torch.linspace(0, 1, 401, dtype=torch.float64))[1]
    assert rate.max() > 5 * rate.min()
    return schedule


LEARNED = LearnedVPSDE(schedule=bent(), t_min=1e-3)

MIXTURE = Mixture(VPSDE(), [0.2, 0.5, 0.3], torch.tensor([[-1.0, 0.0], [0.5, 1.0], [1.0, -1.0]]), [0.02, 0.05, 0.1])
T = torch.tensor(0.4, dtype=torch.float64)  # a time at which the mixture has all three modes


def awake(network: torch.nn.Module) -> torch.nn.Module:
    """A network whose branches do not start at nothing."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p += 0.2 * torch.randn(p.shape, generator=g)
    return network


def posterior(x: Tensor, t: Tensor | None, label: Any, of: Mixture = MIXTURE) -> Tensor:
    """log P(y | x_t) by Bayes' rule; log_prob of a label leaves out the weight."""
    weight = of.log_weights[torch.as_tensor(label)]
    return weight + of.log_prob(x, t, label=label) - of.log_prob(x, t)


def points(n: int = 4) -> Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


STYLE = Style(dropout=0.0, init_scale=1.0)


TABLES = json.loads((RECORDED / "sde_tables.json").read_text())


def recorded(case: str) -> tuple[SDE, dict[str, torch.Tensor]]:
    """An SDE of score_sde_pytorch, and what that project computes of it."""
    known = TABLES[case]
    kinds = {"vpsde": VPSDE, "vesde": VESDE}
    sde = kinds[known["sde"]](**{k: v for k, v in known.items() if k.split("_")[0] in ("beta", "sigma")})
    with np.load(RECORDED / "sde_tables.npz") as file:
        arrays = {k.removeprefix(case + "/"): torch.from_numpy(file[k]) for k in file if k.startswith(case + "/")}
    return sde, arrays
