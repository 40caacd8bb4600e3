"""What a sampler is, and the one door through which samples leave.

A sampler walks a decreasing grid of times, yielding the state at each; one-step samplers define `step` and inherit the
walk. Samplers are frozen values: printable, comparable, composable. They see randomness only as ``noise(like)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..model import ScoreModel
from ..sdes import Noise


@dataclass(frozen=True)
class Sampler:
    """Turns x at times[0] into x at times[-1]."""

    def step(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        """The state at s < t from the state x at t; t and s of shape () or (B,)."""
        raise TypeError(f"{type(self).__name__} has no single step; run its walk over a grid of times")

    def walk(self, model: ScoreModel, x: Tensor, times: Tensor, noise: Noise) -> Iterator[Tensor]:
        """The states at times[1], times[2], ...; `times` is a decreasing 1-D float64 tensor on the CPU."""
        for t, s in pairwise(times):
            x = self.step(model, x, t, s, noise)
            yield x


def example_generators(seed: int, first: int, count: int, device: torch.device) -> list[torch.Generator]:
    """One generator per example, seeded by a hash of (seed, first + i) alone."""
    generators = []
    for i in range(first, first + count):
        state = np.random.SeedSequence([seed, i]).generate_state(1, np.uint64)[0]
        generators.append(torch.Generator(device).manual_seed(int(state >> 1)))
    return generators


def noise_source(
    shape: tuple[int, ...], seed: int | torch.Generator, first: int, dtype: torch.dtype, device: torch.device
) -> Noise:
    """The source of standard normal states of shape `shape`: example i's depend on (seed, first + i) alone.

    A draw of an example costs a call, so small states are drawn several ahead, as many as fit in 16 kB.
    A torch.Generator in place of the seed gives one stream for the whole batch.
    """
    if isinstance(seed, torch.Generator):
        return lambda like: torch.randn(shape, generator=seed, dtype=dtype, device=seed.device).to(device)
    generators = example_generators(seed, first, shape[0], device)
    ahead = min(max(2**12 // max(math.prod(shape[1:]), 1), 1), 16)
    block = torch.empty(shape[0], ahead, *shape[1:], dtype=dtype, device=device)
    rows = block.unbind(0)

    def draws() -> Iterator[Tensor]:
        while True:
            for row, generator in zip(rows, generators, strict=True):
                row.normal_(generator=generator)
            yield from (block[:, i].clone() for i in range(ahead))

    stream = draws()
    return lambda like: next(stream)


def default_state(
    model: nn.Module, dtype: torch.dtype | None, device: torch.device | str | None
) -> tuple[torch.dtype, torch.device]:
    """Those given; else those of the model's first parameter or buffer; else float32 on the CPU."""
    like = next((p for p in (*model.parameters(), *model.buffers()) if p.is_floating_point()), None)
    dtype = dtype or (torch.float32 if like is None else like.dtype)
    return dtype, torch.device(device if device is not None else "cpu" if like is None else like.device)


@torch.no_grad()
def sample(
    model: ScoreModel,
    sampler: Sampler,
    shape: tuple[int, ...],
    times: Tensor,
    *,
    seed: int | torch.Generator = 0,
    first: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    denoise: bool = False,
    progress: bool = False,
) -> Tensor:
    """Draw from the prior and walk the sampler over `times`.

    Args:
        model: any score model.
        sampler: e.g. ``Heun()`` or ``PredictorCorrector(ReverseDiffusion(), Langevin())``; `recommended` gives one with
            its grid for a number of evaluations.
        shape: (B, *shape) of the result.
        times: decreasing 1-D grid from 1 to where sampling stops, e.g. ``times.uniform(model.sde, 1000)``.
        seed: of the draws; example i's depend on (seed, first + i) alone, so results do not depend on the batch's size.
            A torch.Generator gives one stream for the batch instead.
        first: index of the batch's first example.
        dtype, device: of the state; by default those of the model's first parameter or buffer, else float32 on the CPU.
        denoise: return E[x_0 | x] at the last time instead of x; where that is clean data (sigma = 0), x itself.
        progress: show a bar.

    Returns x of shape `shape`. Raises ValueError for a grid that is not 1-D and decreasing within [0, 1], or for a
    shape that is not a batch of states.
    """
    shape = tuple(shape)
    if len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"shape must be (B, *shape), a batch of states, got {shape}")
    times = times.to("cpu", torch.float64)
    falling = times.ndim == 1 and len(times) >= 2 and bool((times.diff() < 0).all())
    if not falling or times[0] > 1 or times[-1] < 0:
        raise ValueError(f"times must be a 1-D grid that falls from 1 to 0 or above, got {times}; see score_sde.times")
    dtype, device = default_state(model, dtype, device)
    noise = noise_source(shape, seed, first, dtype, device)
    x = model.sde.prior(shape, noise)
    states = sampler.walk(model, x, times, noise)
    for state in tqdm(states, total=len(times) - 1, desc="sampling", leave=False, disable=not progress):
        x = state
    return model(x, times[-1]).data if denoise and bool(model.sde.sigma(times[-1]) > 0) else x
