"""The sampler's own share of a step: what it costs when the model costs nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import Tensor

from score_sde import times
from score_sde.build import build_sde
from score_sde.model import Estimate, ScoreModel
from score_sde.samplers import (
    DDIM,
    Ancestral,
    DPMSolver,
    EulerMaruyama,
    Heun,
    Langevin,
    Multistep,
    PredictorCorrector,
    ReverseDiffusion,
    Sampler,
    UniPC,
)
from score_sde.samplers.base import noise_source
from score_sde.sdes import SDE

from .peer import Peer, config_for
from .schedulers import DETERMINISTIC, STOCHASTIC, Scheduled
from .timing import Clock, Table, milliseconds, ratio

SHAPE = (64, 3, 32, 32)
STEPS = 20  # of the 1000 of a grid


@dataclass(frozen=True)
class Subject:
    """A sampler, its names in the peer and its like in diffusers, and the operations that a step cannot do without.

    That is `sums`, how many tensors are added to a multiple of x for each new state of a step; or where it is empty,
    the score and a multiply-add of it and noise, for each of `updates`.
    """

    sampler: Sampler
    predictor: str | None = None
    corrector: str | None = None
    scheduler: Scheduled | None = None
    updates: int = 1
    sums: tuple[int, ...] = ()


SUBJECTS = {
    "Euler-Maruyama": Subject(EulerMaruyama(), "euler_maruyama"),
    "reverse diffusion": Subject(ReverseDiffusion(), "reverse_diffusion"),
    "ancestral": Subject(Ancestral(), "ancestral_sampling", scheduler=STOCHASTIC["DDPM"]),
    "DDIM, eta 1": Subject(DDIM(eta=1.0)),
    "DDIM, eta 0": Subject(DDIM(), scheduler=DETERMINISTIC["DDIM"], sums=(1,)),
    "PC, Langevin": Subject(
        PredictorCorrector(ReverseDiffusion(), Langevin()), "reverse_diffusion", "langevin", updates=2
    ),
    "Heun": Subject(Heun(), scheduler=DETERMINISTIC["Heun"], sums=(1, 2)),
    "DPM-Solver 2": Subject(DPMSolver(2), sums=(1, 2)),
    "DPM-Solver 3": Subject(DPMSolver(3), sums=(1, 2, 2)),
    "Multistep 2": Subject(Multistep(2), scheduler=DETERMINISTIC["DPM-Solver++ 2M"], sums=(2,)),
    "Multistep 3": Subject(Multistep(3), scheduler=DETERMINISTIC["DPM-Solver++ 3M"], sums=(3,)),
    "Multistep 3, noise": Subject(Multistep(3, "noise"), scheduler=DETERMINISTIC["DEIS 3"], sums=(3,)),
    "UniPC 3": Subject(UniPC(3), scheduler=DETERMINISTIC["UniPC 3"], sums=(3, 4)),
    "UniPC 3, noise": Subject(UniPC(3, predict="noise"), scheduler=DETERMINISTIC["UniPC 3, noise"], sums=(3, 4)),
}


class Free(ScoreModel):
    """A model whose answer lies ready: only the score, noise / -sigma, is one pass over memory."""

    def __init__(self, sde: SDE, noise: Tensor) -> None:
        super().__init__(sde)
        self.answer = Estimate(noise, noise, noise.new_tensor(1.0, device="cpu"))

    def forward(self, x: Tensor, t: Tensor, *args: Any, **condition: Any) -> Estimate:
        return self.answer


def sampling(config: ConfigDict, clock: Clock, peer: Peer | None) -> Table:
    """Milliseconds of a step of each sampler, beside the tensor operations that any sampler needs."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(clock.device)
    model = Free(build_sde(config), x)
    torch.empty(16 * 2**20, dtype=torch.uint8)  # malloc keeps memory for reuse once it has seen a network's activations
    rows = []
    for name, subject in SUBJECTS.items():
        works = {seed: _ours(subject, model, x, seed) for seed in ("example", "batch")}
        works["bare"] = _bare(subject, model, x)
        if peer is not None and _known(subject, config):
            works["peer"] = _theirs(subject, peer, config, model, x)
        if subject.scheduler is not None:
            works["diffusers"] = _scheduled(subject.scheduler, x)
        with torch.no_grad():
            taken = clock.compare(works)
        theirs, scheduled = taken.get("peer"), taken.get("diffusers")
        rows.append(
            (
                name,
                milliseconds(taken["example"], STEPS),
                milliseconds(theirs, STEPS) if theirs else "",
                str(ratio(theirs, taken["example"])) if theirs else "",
                milliseconds(scheduled, STEPS) if scheduled else "",
                str(ratio(scheduled, taken["example"])) if scheduled else "",
                milliseconds(taken["bare"], STEPS),
                str(ratio(taken["example"], taken["bare"])),
                str(ratio(taken["batch"], taken["bare"])),
                str(ratio(theirs, taken["bare"])) if theirs else "",
            )
        )
    notes = [
        f"batch {SHAPE[0]} of {'x'.join(map(str, SHAPE[1:]))}, {model.sde}; the score costs one pass over memory",
        "bare: the score, randn and one multiply-add of the two, for each update of x (PC makes two); without noise, "
        "each new state as a multiple of x with the estimates added that the method puts into it",
        "ours: noise by a seed, each example's from its own generator; stream: by one torch.Generator",
    ]
    if peer is not None:
        notes.append("the peer has no DDIM, and for sub-VP no ancestral sampler or Langevin corrector that works")
    notes.append("diffusers: set_timesteps for these steps and then step, given the answer; not its scale_model_input")
    head = (
        "", "ours", "peer", "peer/ours", "diffusers", "diffusers/ours", "bare", "ours/bare", "stream/bare", "peer/bare",
    )  # fmt: skip
    return Table("Sampler step with a free score", head, rows, notes)


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
    t = torch.ones(())

    def noisy() -> Tensor:
        state = x
        for _ in range(STEPS * subject.updates):
            score = model.score(state, t)
            state = torch.add(score, torch.randn_like(state), alpha=0.1)
        return state

    def still() -> Tensor:
        state = x
        for _ in range(STEPS):
            for count in subject.sums:
                new = state * 0.9
                for _ in range(count):
                    new.add_(x, alpha=0.1)
            state = new
        return state

    return still if subject.sums else noisy


def _scheduled(like: Scheduled, x: Tensor) -> Callable[[], object]:
    """diffusers' own loop, without the network."""
    scheduler = like.made()
    random = {"generator": torch.Generator(x.device)} if "generator" in signature(scheduler.step).parameters else {}

    def walk() -> Tensor:
        state = x
        scheduler.set_timesteps(STEPS, device=x.device)
        for t in scheduler.timesteps:
            state = scheduler.step(x, t, state, **random).prev_sample
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
