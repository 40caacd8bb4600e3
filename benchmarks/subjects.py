"""Who is compared: our samplers, diffusers' and score_sde_pytorch's, and the grids that they walk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from score_sde import (
    DDIM,
    SDE,
    VPSDE,
    AdaptiveSDE,
    Ancestral,
    Churn,
    DPMSolver,
    EmbeddedODE,
    EulerMaruyama,
    FixedODE,
    Heun,
    Langevin,
    Multistep,
    PredictorCorrector,
    ReverseDiffusion,
    Sampler,
    UniPC,
    times,
)
from score_sde.models.base import Counted
from score_sde.models.closed_form import Gaussian

from .peer import Peer
from .peer_samplers import PeerODE, PeerPC, known
from .schedulers import DETERMINISTIC, STOCHASTIC

DEFAULT, OURS, PEER = "ours: the default", "ours", "score_sde_pytorch"
GRIDS: dict[str, Callable[[SDE, int], Tensor]] = {
    "quadratic": times.quadratic,
    "log_snr": times.log_snr,
    "karras": times.karras,
    "arcsinh": times.arcsinh,
}
ODE_TOLERANCES = (1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
SDE_TOLERANCES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)  # the paper takes 0.01 to 0.05


class Subject(NamedTuple):
    """A sampler, who made it, and its name there; a `grid` of its own is the only one that it walks."""

    maker: str
    name: str
    sampler: Sampler
    grid: str | None = None

    def __str__(self) -> str:
        return f"{self.maker}: {self.name}"

    def grids(self) -> Sequence[str]:
        """Those that it is measured on."""
        return [self.grid] if self.grid else list(GRIDS)

    def times(self, sde: SDE, budget: int, grid: str) -> Tensor | None:
        """Its times on a grid for at most `budget` evaluations; None where one step takes more, or it lacks the SDE."""
        n = 0 if self.maker == PEER and not known(sde) else steps_within(self.sampler, budget)
        return GRIDS.get(grid, times.uniform)(sde, n) if n else None


class Adaptive(NamedTuple):
    """A sampler that chooses its steps by a tolerance, at several of them, the loosest first."""

    maker: str
    name: str
    samplers: Sequence[Sampler]

    def __str__(self) -> str:
        return f"{self.maker}: {self.name}"


@cache
def steps_within(sampler: Sampler, budget: int) -> int:
    """The most steps of at most `budget` evaluations, counted; 0 where one step takes more."""
    model = Counted(Gaussian(VPSDE(), [0.0], 1.0))
    x = torch.zeros(1, 1, dtype=torch.float64)

    def cost(n: int) -> int:
        model.nfe = 0
        list(sampler.walk(model, x, times.log_snr(model.sde, n), torch.randn_like))
        return model.nfe

    low, high, middle = 0, budget, budget  # most take one evaluation a step
    while low < high:
        low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
        middle = (low + high + 1) // 2
    return low


def deterministic(peer: Peer | None) -> list[Subject]:
    """Who is judged by the distance from the flow, on every grid."""
    mine: dict[str, Sampler] = {
        "DDIM": DDIM(),
        "Heun": Heun(),
        "DPM-Solver 2": DPMSolver(2),
        "DPM-Solver 3": DPMSolver(3),
        "DPM-Solver++ 2S": DPMSolver(2, "data"),
        "DPM-Solver++ 3S": DPMSolver(3, "data"),
        "Multistep 2": Multistep(2),
        "Multistep 3": Multistep(3),
        "Multistep 3, lower": Multistep(3, start="lower"),
        "Multistep 2, noise": Multistep(2, "noise"),
        "Multistep 3, noise": Multistep(3, "noise"),
        "Multistep 3, noise, lower": Multistep(3, "noise", start="lower"),
        "UniPC 2": UniPC(2),
        "UniPC 3": UniPC(3),
        "UniPC 3, lower": UniPC(3, start="lower"),
        "UniPC 2, noise": UniPC(2, predict="noise"),
        "UniPC 3, noise": UniPC(3, predict="noise"),
        "UniPC 3, noise, lower": UniPC(3, predict="noise", start="lower"),
        "RK4 in t": FixedODE("rk4"),
    }
    theirs = [Subject("diffusers", name, sampler) for name, sampler in DETERMINISTIC.items()]
    ours = [Subject(OURS, name, sampler) for name, sampler in mine.items()]
    if peer is None:
        return [*ours, *theirs]
    flow = PeerPC("reverse_diffusion", "none", peer, flow=True)
    return [*ours, *theirs, Subject(PEER, "reverse diffusion, flow", flow, "its own")]


def adaptive_flows(peer: Peer | None) -> list[Adaptive]:
    """The same with steps by tolerance."""
    found = [Adaptive(OURS, "EmbeddedODE", [EmbeddedODE(e, e) for e in ODE_TOLERANCES])]
    if peer is not None:
        found.append(Adaptive(PEER, "RK45", [PeerODE(e, peer) for e in ODE_TOLERANCES]))
    return found


def stochastic(peer: Peer | None) -> list[Subject | Adaptive]:
    """Who is judged by the distance of laws, on one grid each: that of the papers and of their code."""
    corrected = PredictorCorrector(ReverseDiffusion(), Langevin(norm="batch"))
    mine: dict[str, tuple[Sampler, str]] = {
        "Euler-Maruyama": (EulerMaruyama(), "uniform"),
        "reverse diffusion": (ReverseDiffusion(), "uniform"),
        "PC, Langevin": (corrected, "uniform"),
        "ancestral": (Ancestral(), "log_snr"),
        "SDE-DPM-Solver++ 2M": (Multistep(2, eta=1.0), "log_snr"),
        "SDE-DPM-Solver++ 3M": (Multistep(3, eta=1.0), "log_snr"),
        "Churn 40": (Churn(), "karras"),
    }
    found: list[Subject | Adaptive] = [Subject(OURS, name, sampler, grid) for name, (sampler, grid) in mine.items()]
    found.append(Adaptive(OURS, "AdaptiveSDE", [AdaptiveSDE(e, 0.4 * e) for e in SDE_TOLERANCES]))
    found += [Subject("diffusers", name, sampler, "log_snr") for name, sampler in STOCHASTIC.items()]
    if peer is not None:
        for predictor, corrector in (
            ("euler_maruyama", "none"),
            ("reverse_diffusion", "none"),
            ("reverse_diffusion", "langevin"),
        ):
            name = predictor.replace("_", " ") + (", Langevin" if corrector == "langevin" else "")
            found.append(Subject(PEER, name, PeerPC(predictor, corrector, peer), "its own"))
    return found


def few(peer: Peer | None) -> list[Subject | Adaptive]:
    """Of those the ancestral sampler, and the peer's reverse diffusion, which from 20 steps is its best."""
    chosen = (f"{OURS}: ancestral", f"{PEER}: reverse diffusion")
    return [subject for subject in stochastic(peer) if str(subject) in chosen]


_THEIRS = {name: Subject("diffusers", name, sampler, "log_snr") for name, sampler in DETERMINISTIC.items()}
LISTED = [  # a few known ones on the grids of their papers
    Subject(OURS, "DDIM", DDIM(), "quadratic"),
    Subject(OURS, "Heun", Heun(), "karras"),
    *(_THEIRS[name] for name in ("DPM-Solver++ 2M", "UniPC 2")),
]
