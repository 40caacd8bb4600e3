"""Whose random numbers are whose: every stream of the package is named here."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

Noise = Callable[[Tensor], Tensor]  # noise(like): standard normal numbers in the shape of `like`


def natural(value: Any, name: str, remedy: str = "") -> int:
    """`value`, any kind of integer, as an int. Raises ValueError for what is none, or below 0."""
    try:
        found = operator.index(value)
    except TypeError:
        found = -1
    if found < 0:
        raise ValueError(f"{name} must be an integer of at least 0{remedy}, got {value!r}")
    return found


def example_generators(seed: int, first: int, count: int, device: torch.device) -> list[torch.Generator]:
    """One generator per example, seeded by a hash of (seed, first + i) alone.

    Raises ValueError for what is no seed.
    """
    seed, first = (
        natural(seed, "seed", " (or where a whole batch may share one, a torch.Generator)"),
        natural(first, "first"),
    )
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

    def draws() -> Iterator[Tensor]:
        while True:
            block = torch.empty(shape[0], ahead, *shape[1:], dtype=dtype, device=device)
            for row, generator in zip(block.unbind(0), generators, strict=True):
                row.normal_(generator=generator)
            yield from (block[:, i].contiguous() for i in range(ahead))

    stream = draws()
    return lambda like: next(stream)
