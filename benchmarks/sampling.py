"""The sampler's own share of a step: what it costs when the model costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import Tensor

from score_sde import times
from score_sde.config.build import build_sde
from score_sde.models.base import Estimate, ScoreModel
from score_sde.noise import noise_source
from score_sde.samplers import (
    DDIM,
    Ancestral,
    AnnealedLangevin,
    Churn,
    DPMSolver,
    EulerMaruyama,
    Heun,
    Multistep,
    PredictorCorrector,
    ReverseDiffusion,
    Sampler,
    UniPC,
)
from score_sde.samplers.exponential import SHORT, fast, orders, point
from score_sde.sdes import SDE

from .peer import Peer, config_for
from .schedulers import DETERMINISTIC, STOCHASTIC, Scheduled
from .timing import Clock, Table, milliseconds, ratio

SHAPES = ((64, 3, 32, 32), (1, 3, 32, 32), (1, 2))
STEPS = 20  # of the 1000 of a grid

OneStep = Callable[[ScoreModel, Tensor, Tensor], Tensor]
Walk = Callable[[ScoreModel, Tensor, Tensor, Sequence[int]], Tensor]  # with the order of each step


def combined(x: Tensor, *terms: Tensor) -> Tensor:
    """A multiple of x, with multiples of the terms added: a pass for each, the fewest there are."""
    y = x * 0.9
    for term in terms:
        y.add_(term, alpha=0.1)
    return y


def moved(x: Tensor, first: Tensor, *terms: Tensor) -> Tensor:
    """x, with multiples of the terms added: the first goes with the copy."""
    y = torch.add(x, first, alpha=0.1)
    for term in terms:
        y.add_(term, alpha=0.1)
    return y


# Steps by hand, with their numbers known: the model's answers, and the operations that make the next state of them. A
# multistep method's earlier answers are the model's again, which is always the same.


def noisy(model: ScoreModel, x: Tensor, t: Tensor) -> Tensor:
    return combined(x, model(x, t).noise, torch.randn_like(x))


def corrected(model: ScoreModel, x: Tensor, t: Tensor) -> Tensor:
    e, z = model(x, t).noise, torch.randn_like(x)
    norms = (torch.linalg.vector_norm(v.flatten(1), dim=1) for v in (z, e))
    size = torch.div(*norms).reshape(-1, *(1,) * (x.ndim - 1))
    return noisy(model, torch.addcmul(x, size, e).addcmul_(size, z), t)


def annealed(model: ScoreModel, x: Tensor, t: Tensor) -> Tensor:
    return noisy(model, moved(x, model(x, t).noise, torch.randn_like(x)), t)


def ddim(model: ScoreModel, x: Tensor, t: Tensor) -> Tensor:
    e = model(x, t)
    return combined(e.data, e.noise)


def heun(model: ScoreModel, x: Tensor, t: Tensor) -> Tensor:
    e = model(x, t)
    y = combined(e.data, e.noise)
    return y.add_(model(y, t).noise, alpha=0.1).add_(e.noise, alpha=-0.1)


def churned(model: ScoreModel, x: Tensor, t: Tensor) -> Tensor:
    return heun(model, combined(x, torch.randn_like(x)), t)


def singlestep(model: ScoreModel, x: Tensor, t: Tensor) -> Tensor:
    return combined(x, model(combined(x, model(x, t).noise), t).noise)


def singlestep_3(model: ScoreModel, x: Tensor, t: Tensor) -> Tensor:
    a = model(x, t).noise
    b = model(combined(x, a), t).noise
    return combined(x, a, model(combined(x, a, b), t).noise)


def noisy_multistep(model: ScoreModel, x: Tensor, t: Tensor) -> Tensor:
    return combined(x, *[model(x, t).data] * 2, torch.randn_like(x))


def each(step: OneStep) -> Walk:
    def walk(model: ScoreModel, x: Tensor, t: Tensor, orders: Sequence[int]) -> Tensor:
        for _ in orders:
            x = step(model, x, t)
        return x

    return walk


def multistep(first: OneStep | None = None) -> Walk:
    """A multistep method by hand; its first step is by another method."""

    def walk(model: ScoreModel, x: Tensor, t: Tensor, orders: Sequence[int]) -> Tensor:
        for i, order in enumerate(orders):
            x = first(model, x, t) if first and i == 0 else combined(x, *[model(x, t).noise] * order)
        return x

    return walk


def unipc(first: OneStep | None = None) -> Walk:
    """UniPC by hand; if its first step is by another method, its end is not corrected."""

    def walk(model: ScoreModel, x: Tensor, t: Tensor, orders: Sequence[int]) -> Tensor:
        before = 0
        for i, order in enumerate(orders):
            if first and i == 0:
                x = first(model, x, t)
                continue
            e = model(x, t).noise
            x = moved(x, *[e] * (before + 1)) if before else x
            x, before = combined(x, *[e] * order), order
        return x

    return walk


@dataclass(frozen=True)
class Subject:
    """A sampler, its walk by hand, and its equivalent in the peers."""

    sampler: Sampler
    bare: Walk
    predictor: str | None = None
    corrector: str | None = None
    scheduler: Scheduled | None = None
    calls: int = 1  # of the scheduler's, for a step: it may count them, as "timesteps"


SUBJECTS = {
    "Euler-Maruyama": Subject(EulerMaruyama(), each(noisy), "euler_maruyama"),
    "reverse diffusion": Subject(ReverseDiffusion(), each(noisy), "reverse_diffusion"),
    "ancestral": Subject(Ancestral(), each(noisy), "ancestral_sampling", scheduler=STOCHASTIC["DDPM"]),
    "DDIM, eta 1": Subject(DDIM(eta=1.0), each(noisy)),
    "PC, Langevin": Subject(PredictorCorrector(), each(corrected), "reverse_diffusion", "langevin"),
    "PC, annealed": Subject(
        PredictorCorrector(corrector=AnnealedLangevin()), each(annealed), "reverse_diffusion", "ald"
    ),
    "Churn": Subject(Churn(1e9), each(churned)),
    "Multistep 2, eta 1": Subject(
        Multistep(2, eta=1), each(noisy_multistep), scheduler=STOCHASTIC["SDE-DPM-Solver++ 2M"]
    ),
    "DDIM": Subject(DDIM(), each(ddim), scheduler=DETERMINISTIC["DDIM"]),
    "Heun": Subject(Heun(), each(heun), scheduler=DETERMINISTIC["Heun"]),
    "DPM-Solver 2": Subject(DPMSolver(2), each(singlestep), scheduler=DETERMINISTIC["DPM-Solver++ 2S"], calls=2),
    "DPM-Solver 3": Subject(DPMSolver(3), each(singlestep_3), scheduler=DETERMINISTIC["DPM-Solver++ 3S"], calls=3),
    "Multistep 2": Subject(Multistep(2), multistep(), scheduler=DETERMINISTIC["DPM-Solver++ 2M"]),
    "Multistep 3": Subject(Multistep(3), multistep(singlestep), scheduler=DETERMINISTIC["DPM-Solver++ 3M"]),
    "Multistep 3, noise": Subject(Multistep(3, "noise"), multistep(singlestep), scheduler=DETERMINISTIC["DEIS 3"]),
    "UniPC 2": Subject(UniPC(2), unipc(), scheduler=DETERMINISTIC["UniPC 2"]),
    "UniPC 3": Subject(UniPC(3), unipc(singlestep_3), scheduler=DETERMINISTIC["UniPC 3"]),
    "default below 7": Subject(fast(6), multistep(), scheduler=DETERMINISTIC["DEIS 3"]),
    "default from 15": Subject(fast(STEPS), unipc(), scheduler=DETERMINISTIC["UniPC 3, noise"]),
}


class Free(ScoreModel):
    """A model that returns a stored answer."""

    def __init__(self, sde: SDE, noise: Tensor) -> None:
        super().__init__(sde)
        self.answer = Estimate(noise, noise, noise.new_tensor(1.0, device="cpu"))

    def forward(self, x: Tensor, t: Tensor, *args: Any, **condition: Any) -> Estimate:
        return self.answer


def sampling(config: ConfigDict, clock: Clock, peer: Peer | None, shape: tuple[int, ...] = SHAPES[0]) -> Table:
    """Milliseconds of a step of each sampler on states of `shape`, beside those of the step by hand and the peers'."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(clock.device)
    model = Free(build_sde(config), x)
    torch.empty(16 * 2**20, dtype=torch.uint8)  # malloc keeps memory for reuse once it has seen a network's activations
    peer = peer if len(shape) == 4 else None  # it broadcasts times against four axes only
    rows = []
    for name, subject in SUBJECTS.items():
        works = {seed: _ours(subject, model, x, seed) for seed in ("example", "batch")}
        works["bare"] = _bare(subject, model, x)
        if peer is not None and _known(subject, config):
            works["peer"] = _theirs(subject, peer, config, model, x)
        if subject.scheduler is not None:
            works["diffusers"] = _scheduled(subject, model, x)
        with torch.no_grad():
            taken = clock.compare(works)
        theirs, scheduled = taken.get("peer"), taken.get("diffusers")
        rows.append(
            (
                name,
                milliseconds(taken["example"], STEPS),
                milliseconds(taken["bare"], STEPS),
                str(ratio(taken["example"], taken["bare"])),
                str(ratio(taken["batch"], taken["bare"])),
                milliseconds(theirs, STEPS) if theirs else "",
                str(ratio(theirs, taken["example"])) if theirs else "",
                milliseconds(scheduled, STEPS) if scheduled else "",
                str(ratio(scheduled, taken["example"])) if scheduled else "",
            )
        )
    notes = [
        f"batch {shape[0]} of {'x'.join(map(str, shape[1:]))}, {model.sde}; a walk of {STEPS} steps, its plan included",
        "bare: the steps by hand, with their numbers known (the functions of benchmarks/sampling.py)",
        "ours: noise by a seed, each example's from its own generator; stream: by one torch.Generator",
    ]
    if peer is not None:
        notes.append("the peer has no DDIM, and for sub-VP no ancestral sampler or Langevin corrector that works")
    notes.append("diffusers: set_timesteps for these steps, and the model and step in each; not its scale_model_input")
    head = (
        "", "ours", "bare", "ours/bare", "stream/bare", "peer", "peer/ours", "diffusers", "diffusers/ours",
    )  # fmt: skip
    return Table(f"Sampler step with a free model, {' x '.join(map(str, shape))}", head, rows, notes)


def _known(subject: Subject, config: ConfigDict) -> bool:
    plain = subject.predictor != "ancestral_sampling" and subject.corrector is None
    return subject.predictor is not None and (plain or config.training.sde != "subvpsde")


def _ours(subject: Subject, model: ScoreModel, x: Tensor, seed: str) -> Callable[[], object]:
    grid = times.uniform(model.sde, 1000)[: STEPS + 1]
    source = 0 if seed == "example" else torch.Generator(x.device).manual_seed(0)
    noise = noise_source(tuple(x.shape), source, 0, x.dtype, x.device)

    def walk() -> Tensor:
        state = x
        for state in subject.sampler.walk(model, x, grid, noise):  # noqa: B007
            pass
        return state

    return walk


def _bare(subject: Subject, model: ScoreModel, x: Tensor) -> Callable[[], object]:
    sampler, grid = subject.sampler, times.uniform(model.sde, 1000)[: STEPS + 1]
    short = sampler.short if isinstance(sampler, UniPC) else SHORT
    lowered = orders(point(model.sde, grid), getattr(sampler, "order", 1), short)
    return lambda: subject.bare(model, x, grid[0], lowered)


def _scheduled(subject: Subject, model: ScoreModel, x: Tensor) -> Callable[[], object]:
    """diffusers' own loop."""
    assert subject.scheduler is not None
    scheduler = subject.scheduler.made()
    random = {"generator": torch.Generator(x.device)} if "generator" in signature(scheduler.step).parameters else {}

    def walk() -> Tensor:
        state = x
        scheduler.set_timesteps(STEPS * subject.calls, device=x.device)
        for t in scheduler.timesteps:
            state = scheduler.step(model(state, t).noise, t, state, **random).prev_sample
        return state

    return walk


def _theirs(subject: Subject, peer: Peer, config: ConfigDict, model: ScoreModel, x: Tensor) -> Callable[[], object]:
    """The body of its get_pc_sampler, which makes the predictor and corrector anew in every step."""
    theirs = config_for(config, tuple(x.shape[1:]), x.device)
    sde = peer.sde(theirs)
    predictor = peer.sampling.get_predictor(subject.predictor)
    corrector = peer.sampling.get_corrector(subject.corrector) if subject.corrector else None
    grid = torch.linspace(1, 1e-3, 1000, device=x.device)[: STEPS + 1]

    def walk() -> Tensor:
        state = x
        for t, _ in pairwise(grid):
            at = torch.ones(len(x), device=x.device) * t
            if corrector is not None:
                state, _ = corrector(sde, model.score, config.sampling.snr, 1).update_fn(state, at)
            state, _ = predictor(sde, model.score).update_fn(state, at)
        return state

    return walk
