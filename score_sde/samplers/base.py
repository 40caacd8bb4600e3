"""What a sampler is, and `sample`, which runs one.

A sampler walks a decreasing grid of times, yielding the state at each; one-step samplers define `step` and inherit the
walk. Most divide the step in two (`Planned`): numbers that depend on the times alone, which a walk computes for its
whole grid at once, and operations on the state. Samplers are frozen values: printable, comparable, composable. Their
only source of random numbers is ``noise(like)``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..machine.progress import Progress
from ..models.base import Estimate, ScoreModel, WrongShape, at, default_state
from ..noise import Noise, noise_source
from ..sdes.linear import SDE, add_, as_grid, check_first

_LOOK = 50  # steps between looks for values that are not finite

Update = Callable[[Tensor, Noise], Tensor]  # a step: (x, source of noise) -> the next state


@dataclass(frozen=True)
class Sampler:
    """Turns x at times[0] into x at times[-1]."""

    def step(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        """The state at s < t from the state x at t; t and s of shape () or (B,)."""
        raise TypeError(f"{type(self).__name__} has no single step; run its walk over a grid of times")

    def updates(self, model: ScoreModel, times: Tensor) -> Iterator[Update]:
        """The steps of a grid, one after the other."""
        for t, s in pairwise(times):
            yield lambda x, noise, t=t, s=s: self.step(model, x, t, s, noise)  # type: ignore[misc]

    def walk(self, model: ScoreModel, x: Tensor, times: Tensor, noise: Noise) -> Iterator[Tensor]:
        """The states at times[1], times[2], ...; `times` is a decreasing 1-D float64 tensor on the CPU."""
        for update in self.updates(model, times):
            x = update(x, noise)
            yield x


@dataclass(frozen=True)
class Planned(Sampler, ABC):
    """A one-step sampler in two parts: the `numbers` of a step, and the step itself with these numbers.

    Arithmetic on a tensor of one time takes as long as on a small batch, microseconds: a walk does it once for all.
    """

    @abstractmethod
    def numbers(self, sde: SDE, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        """The coefficients of the steps from t to s, from the SDE's curves, each of the times' shape."""

    @abstractmethod
    def take(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, numbers: Sequence[Any], noise: Noise) -> Tensor:
        """The state at s from x at t, with the step's `numbers`: floats, or tensors of the times' shape."""

    def step(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        return self.take(model, x, t, s, self.numbers(model.sde, t, s), noise)

    def updates(self, model: ScoreModel, times: Tensor) -> Iterator[Update]:
        planned = rows(self.numbers(model.sde, times[:-1], times[1:]))
        for (t, s), numbers in zip(pairwise(times), planned, strict=True):
            yield lambda x, noise, t=t, s=s, row=numbers: self.take(model, x, t, s, row, noise)  # type: ignore[misc]


def rows(columns: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Tensors or arrays of shape (n,) as n tuples of numbers, or of tensors where a learned schedule has a gradient."""
    learned = any(isinstance(column, Tensor) and column.requires_grad for column in columns)
    return list(zip(*(column.unbind() if learned else column.tolist() for column in columns), strict=True))


def refuse_learned(curve: Tensor, name: str) -> None:
    """Raise ValueError where a curve of the SDE requires a gradient, which the sampler `name` would silently lose."""
    if curve.requires_grad:
        raise ValueError(
            f"{name} gives no gradient to a learned schedule: hold the schedule constant by "
            "model.schedule.requires_grad_(False), or take a sampler that gives one, such as DDIM() or Heun()"
        )


def add_noise_(y: Tensor, std: Tensor | float, noise: Noise) -> Tensor:
    """y += std · z in place; nothing is drawn where std is 0."""
    some = bool(std.any()) if isinstance(std, Tensor) else std != 0
    return add_(y, std, noise(y)) if some else y


@torch.no_grad()
def sample(
    model: ScoreModel, sampler: Sampler, shape: tuple[int, ...], times: Tensor | np.ndarray | Sequence[float], *,
    start: Tensor | None = None, seed: int | torch.Generator = 0, first: int = 0, dtype: torch.dtype | None = None,
    device: torch.device | str | None = None, denoise: bool = False, temperature: float = 1.0, progress: bool = False,
) -> Tensor:  # fmt: skip
    """Draw samples: a draw from the prior, then the sampler's walk over `times`.

    Args:
        sampler: e.g. ``Heun()`` or ``PredictorCorrector(ReverseDiffusion(), Langevin())``; `recommended` gives one with
            its grid for a number of evaluations.
        shape: (B, *shape) of the result.
        times: decreasing 1-D grid from 1 to where sampling stops, e.g. ``times.uniform(model.sde, 1000)``.
        start: the state at times[0], which may then be below 1, instead of a draw from the prior. It is not changed.
            ``model.sde.perturb(x0, grid[0], z)`` gives variants of x0 (SDEdit; Meng et al. 2022, arXiv:2108.01073).
        seed, first: example i's draws depend on (seed, first + i) alone, so results do not depend on the batch's size.
            A torch.Generator as seed gives one stream for the whole batch.
        dtype, device: of the state; by default those of `start`, else of the model's first parameter or buffer, else
            float32 on the CPU; float32 for half precision.
        denoise: return E[x_0 | x] at the last time instead of x; where that is clean data (sigma = 0), x itself.
        temperature: factor of the draw from the prior, for samplers that draw no noise. Below 1 samples are less
            diverse, and not from the model's law.
        progress: show a bar, or a line every half minute where standard error is no terminal.

    Returns x of shape `shape`, without a gradient. Raises ValueError for a grid that is not 1-D and decreasing within
    [0, 1] or begins below 1 without a `start`, for a shape that is not a batch of states, for a start of another shape
    or not finite, for an estimate of another shape than its state, and for a sampler that draws noise at another
    temperature than 1; FloatingPointError, with step and time, where the model or the state is not finite.
    """
    shape = tuple(shape)
    if len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"shape must be (B, *shape), a batch of states, got {shape}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a number of at least 0, got {temperature}")
    times = as_grid(times)
    if start is None:
        check_first(times, ", or give sample() the state at that time, start=x")
    else:
        _check_start(start, shape, temperature)
    dtype, device = default_state(model if start is None else start, dtype, device)
    state = seed.get_state() if isinstance(seed, torch.Generator) else None

    def begin() -> tuple[Tensor, Noise]:
        noise = noise_source(shape, seed, first, dtype, device)
        if start is not None:
            return start.to(device, dtype), noise
        x = model.sde.prior(shape, noise)
        return (x, noise) if temperature == 1 else (temperature * x, _refuse(sampler, temperature))

    (x, noise), n, done = begin(), len(times) - 1, 0
    try:
        with Progress("sampling", n, leave=False, shown=progress) as bar:
            walk = sampler.walk(model, x, times, noise)
            for done, x in enumerate(walk, 1):
                bar.update()
                if done % _LOOK == 0 and not _finite(x):
                    break
            else:
                if denoise and bool(model.sde.sigma(times[-1]) > 0):
                    x = model(x, times[-1]).data
    except WrongShape as error:
        raise WrongShape(f"{error}, in step {min(done + 1, n)} of {n}") from None
    if not _finite(x):
        if isinstance(seed, torch.Generator) and state is not None:
            seed.set_state(state)
        raise FloatingPointError(_why(model, sampler, times, *begin()))
    return x


def _check_start(start: Tensor, shape: tuple[int, ...], temperature: float) -> None:
    if not isinstance(start, Tensor) or start.shape != shape or not start.is_floating_point():
        kind = f"{start.dtype} of shape {tuple(start.shape)}" if isinstance(start, Tensor) else type(start).__name__
        raise ValueError(f"start must be a floating-point tensor of the samples' shape {shape}, got {kind}")
    if temperature != 1:
        raise ValueError(f"temperature={temperature:g} scales the draw from the prior, which start replaces: take 1")
    if not _finite(start):
        raise ValueError("start holds values that are not finite")


class Watched(ScoreModel):
    """`model`, raising FloatingPointError for a state or an estimate that is not finite."""

    def __init__(self, model: ScoreModel) -> None:
        super().__init__(model.sde)
        self.model = model

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Estimate:
        if not _finite(x):
            raise FloatingPointError(f"the sampler's state is not finite at {at(t)}: {_DIVERGED}")
        e = self.model(x, t, **condition)
        bad = ~(e.data.isfinite() & e.noise.isfinite()).flatten(1).all(1)
        if bool(bad.any()):
            pure = bool((self.sde.alpha(t) == 0).any())
            remedy = "alpha = 0 there, and noise or score do not tell the data: use rule velocity, v, data or edm"
            raise FloatingPointError(
                f"the model returned values that are not finite for {int(bad.sum())} of {len(x)} finite states at "
                f"{at(t)}: {remedy if pure else 'check the model there'}"
            )
        return e


_DIVERGED = "it has diverged, as the model's estimates were finite; take more steps, or another sampler"


def _finite(x: Tensor) -> bool:
    return bool(x.isfinite().all())


def _why(model: ScoreModel, sampler: Sampler, times: Tensor, x: Tensor, noise: Noise) -> str:
    """Where a walk whose result is not finite first went wrong, as text.

    It walks again and checks every evaluation, so that a walk with a good result is not slowed down by checks.
    """
    watched, n = Watched(model), len(times) - 1
    states = sampler.walk(watched, x, times, noise)
    step = 0
    try:
        for step, x in enumerate(states, 1):
            if not _finite(x):
                return f"the sampler's state is not finite after step {step} of {n}, at {at(times[step])}: {_DIVERGED}"
        watched(x, times[-1])
    except FloatingPointError as error:
        where = f"step {step + 1} of {n}" if step < n else "the last estimate of the data"
        return f"{error} (in {where} of {type(sampler).__name__})"
    return "samples are not finite, but were finite when drawn again: does the model draw numbers, as dropout does?"


def _refuse(sampler: Sampler, temperature: float) -> Noise:
    def noise(like: Tensor) -> Tensor:
        raise ValueError(
            f"temperature={temperature:g} is for samplers that draw no noise, and {sampler} draws noise: take another, "
            "such as Heun() (sampling.method=heun), or temperature 1"
        )

    return noise
