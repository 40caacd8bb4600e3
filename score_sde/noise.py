"""Random streams: every stream of random numbers of the package is named here, and determined by its key alone.

A stream's key is (seed, index, stream): an `ExampleStream` belongs to example `index` of a result, a `StepStream` to a
step of training. So a result depends neither on the batch nor on the number of processes, and a resumed run continues
with the numbers of its next steps. The values below must not change: checkpoints and finished results rely on them.
(A network's weights are torch's own stream of the config's seed, and a function that takes a `torch.Generator` as seed
draws from that.)
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

Noise = Callable[[Tensor], Tensor]  # noise(like): standard normal numbers in the shape of `like`


class ExampleStream(IntEnum):
    """What the numbers of one example are for: the last part of the key (seed, index of the example, stream)."""

    STATE = 0  # the prior's draw and a sampler's steps; the probes, draws and dequantisation of a likelihood
    TERMS = 1  # which terms of a chain's bound are evaluated
    START = 2  # the noise of an image from which sampling starts
    AUGMENTATION = 3  # the noise of a smaller image on which the sample is conditioned
    CODE = 4  # a draw of an autoencoder's posterior
    OBSERVATION = 5  # the noise of an image's observation
    PARTICLE = 6  # which of an example's particles is the result


class StepStream(IntEnum):
    """What the numbers of one batch are for: the last part of the key (seed, step, stream).

    A batch of held-out data adds HELD_OUT to its streams, which are TIMES, NOISE, both of AUGMENTATION, CODES and
    COUPLING.
    """

    TIMES = 0
    NOISE = 1  # and projections, and dequantisation
    DROPOUT = 2  # torch's own, of (seed, step, DROPOUT, rank)
    HELD_OUT = 3
    FLOOR = 5  # times of the irreducible error
    FLOOR_NOISE = 6
    CONDITION = 7  # which examples lose their condition
    AUGMENTATION = 8  # how much noise a smaller image gets
    AUGMENTATION_NOISE = 9
    CODES = 13  # draws of an autoencoder's posterior
    MOVEMENT = 14  # how training images are moved
    COUPLING = 18  # draws of an entropic plan between data and noise


class DataStream(IntEnum):
    """What the numbers that choose a batch's examples are for: first in the key (stream, seed, epoch or step)."""

    ORDER = 0  # of an epoch
    FLIPS = 1  # of a step: which images are mirrored


def generator(seed: int, index: int, stream: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The stream of one key, as torch's."""
    state = np.random.SeedSequence([seed, index, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> 1))


def natural(value: Any, name: str, remedy: str = "") -> int:
    """`value`, an integer of any type, as an int. Raises ValueError for other types, and below 0."""
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(f"{name} must be an integer of at least 0{remedy}, got {value!r}")
    return number


def example_generators(
    seed: int, first: int, count: int, device: torch.device | str = "cpu", stream: ExampleStream = ExampleStream.STATE
) -> list[torch.Generator]:
    """One generator per example: that of (seed, first + i, stream). Raises ValueError for an invalid seed."""
    seed = natural(seed, "seed", " (or where a whole batch may share one, a torch.Generator)")
    first = natural(first, "first")
    return [generator(seed, i, stream, device) for i in range(first, first + count)]


def example_numbers(
    seed: int, first: int, count: int, stream: ExampleStream = ExampleStream.STATE
) -> list[np.random.Generator]:
    """The same streams as NumPy's."""
    seed, first = natural(seed, "seed"), natural(first, "first")
    return [np.random.default_rng([seed, i, stream]) for i in range(first, first + count)]


def noise_source(
    shape: tuple[int, ...], seed: int | torch.Generator, first: int, dtype: torch.dtype, device: torch.device,
    stream: ExampleStream = ExampleStream.STATE,
) -> Noise:  # fmt: skip
    """The source of standard normal states of shape `shape`: example i's depend on (seed, first + i, stream) alone.

    A draw of an example costs a call, so several small states are drawn at once, as many as fit in 16 kB.
    A torch.Generator as seed gives one stream for the whole batch.
    """
    if isinstance(seed, torch.Generator):
        return lambda like: torch.randn(shape, generator=seed, dtype=dtype, device=seed.device).to(device)
    generators = example_generators(seed, first, shape[0], device, stream)
    ahead = min(max(2**12 // max(math.prod(shape[1:]), 1), 1), 16)

    def draws() -> Iterator[Tensor]:
        while True:
            block = torch.empty(shape[0], ahead, *shape[1:], dtype=dtype, device=device)
            for row, generator in zip(block.unbind(0), generators, strict=True):
                row.normal_(generator=generator)
            yield from (block[:, i].contiguous() for i in range(ahead))

    source = draws()
    return lambda like: next(source)
