"""Statistics of a data set, and the noise levels that it suggests.

The Gaussian baseline is the bits/dim of held-out examples under the full-covariance Gaussian fitted to the training
examples: a model of images with more bits/dim has learnt less than second moments. The suggestions, in the units that
the model sees:

    sigma_data   the root mean square                                             (Karras et al. 2022, table 1)
    sigma_max    the largest distance between examples: noise then joins all modes (Song and Ermon 2020, technique 1)
    sigma_min    1 % of the range, which is 0.01 for pixels in [0, 1]              (Song and Ermon 2019)
    num_scales   the fewest levels that overlap, and step_lr for five Langevin steps on each, for chains that annealed
                 Langevin dynamics samples from                                    (Song and Ermon 2020, 2 and 4)
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor

from ..data.codecs import Codec, VectorCodec
from ..data.sets import Data, Split
from ..likelihood.exact import Likelihood
from ..machine.log import keep_log
from ..machine.parallel import Processes
from ..models.pixel_levels import COARSE
from ..sdes.linear import normal_log_prob
from ..sdes.noise_levels import NoiseLevels
from .class_names import class_name, some
from .inputs import read_for_training

_CHUNK = 1 << 24  # numbers held in float64 at a time
_STREAM = 1 << 31  # bytes read of a split that stays on disk
_DIMENSIONS = 4096  # of the largest covariance that is fitted
_SHOWN = 30  # classes that are named
_FARTHEST = 4096  # examples whose distances are all computed


def command(options: argparse.Namespace, config: ConfigDict, workdir: Path, processes: Processes) -> int:
    """--mode scan; returns the exit code."""
    keep_log()
    data, codec = read_for_training(config, processes)
    if processes.main:
        print(scan(data, codec))
    return 0


@dataclass(frozen=True)
class Report:
    """The statistics of `scan`, in the units that the model sees; `str` makes a table for people."""

    data: Data
    levels: int | None
    seed: int
    scanned: tuple[int, int]  # training and held-out examples looked at
    stored: tuple[float, float]  # smallest and largest value on file
    range: tuple[float, float]
    mean: float
    std: float
    rms: float
    largest_distance: float
    distance_is_exact: bool
    gaussian: tuple[float, float] | None  # bits/dim, without levels nats/dim, and its standard error over examples

    @property
    def sigma_min(self) -> float:
        return 0.01 * (self.range[1] - self.range[0])

    @property
    def noise_levels(self) -> NoiseLevels | None:
        """NCSNv2's levels from sigma_min to sigma_max; None below 5 dimensions, which have no rule."""
        d = math.prod(self.data.shape)
        if d < 5 or self.sigma_min >= self.largest_distance:
            return None
        return NoiseLevels.by_rule(d, self.largest_distance, sigma_min=self.sigma_min)

    def __str__(self) -> str:
        data, unit = self.data, "bits/dim" if self.levels else "nats/dim"
        sizes = len(data.train), len(data.test)
        classes = f", {data.num_classes} classes" if data.num_classes else ""
        looked_at = f"; looked at {self.scanned[0]} and {self.scanned[1]}, chosen with seed {self.seed}"
        stored = f", on file {self.stored[0]:g} to {self.stored[1]:g} of {self.levels} levels" if self.levels else ""
        bound = "" if self.distance_is_exact else ", at least: only the farthest from the mean were compared"
        baseline = f"none: it needs at most {_DIMENSIONS} dimensions, and examples that span them"
        if self.gaussian:
            noise = f", dequantised with seed {self.seed + 1}" if self.levels else ""
            baseline = f"{self.gaussian[0]:.3f} ± {self.gaussian[1]:.3f} {unit} on the held-out examples{noise}"
        rows = [
            ("examples", f"{sizes[0]} to train on, {sizes[1]} held out" + (looked_at if self.scanned != sizes else "")),
            ("shape", " x ".join(map(str, data.shape)) + classes),
            *_classes(data),
            *(("note", sentence) for sentence in data.notes),
            ("range", f"{self.range[0]:.4g} to {self.range[1]:.4g}{stored}"),
            ("mean", f"{self.mean:.4f}"),
            ("standard deviation", f"{self.std:.4f}"),
            ("root mean square", f"{self.rms:.4f}"),
            ("largest distance", f"{self.largest_distance:.4g} between two training examples{bound}"),
            ("Gaussian baseline", baseline),
            ("uniform baseline", f"{math.log2(self.levels):.3f} bits/dim" if self.levels else "none"),
            ("suggested", f"--config.model.sigma_data={self.rms:.3g}  the root mean square"),
            ("", f"--config.model.sigma_max={self.largest_distance:.3g}  the largest distance"),
            ("", f"--config.model.sigma_min={self.sigma_min:.3g}  1 % of the range"),
        ]
        if levels := self.noise_levels:
            step = f"--config.sampling.step_lr={levels.eps:.3g} --config.sampling.n_steps_each={levels.steps}"
            rows += [
                ("", f"--config.model.num_scales={levels.num_scales}  of a chain: the fewest that overlap by half"),
                ("", f"{step}  for sampling.method=ald on them"),
            ]
        return "\n".join(f"{name:<20}{value}" for name, value in rows)


def scan(data: Data, codec: Codec, seed: int = 0) -> Report:
    """Statistics of the training split, and the Gaussian's bits/dim on the held-out one, in float64.

    `seed` draws the training pixels' dequantisation (seed + 1 the held-out ones'), and the examples looked at, at most
    2 GiB, of a split that stays on disk.
    """
    train, test = _in_memory(data.train, _STREAM, seed), _in_memory(data.test, _STREAM, seed)
    total, squares, low, high = 0.0, 0.0, math.inf, -math.inf
    for x in _encoded(train, codec):
        total, squares = total + x.sum().item(), squares + x.square().sum().item()
        low, high = min(low, x.min().item()), max(high, x.max().item())
    mean, square = total / train.numel(), squares / train.numel()
    distance, exact = largest_distance(train, codec)
    return Report(
        *(data, codec.levels, seed, (len(train), len(test)), (float(train.min()), float(train.max())), (low, high)),
        *(mean, math.sqrt(max(0.0, square - mean**2)), math.sqrt(square), distance, exact),
        _baseline(train, test, codec, seed),
    )


def about_empty_classes(data: Data) -> str:
    """A sentence on the classes that cannot be learnt."""
    names = some([class_name(i, data.class_names) for i in data.empty_classes], _SHOWN)
    count = f"{len(data.empty_classes)} of {data.num_classes} classes"
    return f"{count} have no examples to train on and are not sampled: {names}"


def levels_for(k: Tensor, codec: Codec | None = None, *, sigma_min: float = 0.01, steps: int = 5) -> NoiseLevels:
    """NCSNv2's noise levels and Langevin step for examples k (N, *shape), with `steps` Langevin steps on a level.

    Without a codec k are floats as the model sees them. Raises ValueError for fewer than 5 dimensions, and if no two
    examples are farther apart than sigma_min.
    """
    distance, _ = largest_distance(k, codec or VectorCodec())
    return NoiseLevels.by_rule(math.prod(k.shape[1:]), distance, sigma_min=sigma_min, steps=steps)


def gaussian_fit(k: Tensor, codec: Codec, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Mean (*shape) and covariance (D, D), float64, of examples k (N, *shape): maximum likelihood.

    Pixels are dequantised with `seed`, which keeps the covariance of pixels that never change from being singular.
    """
    d = math.prod(k.shape[1:])
    total, outer = torch.zeros(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
    origin = codec.encode(k[0]).to(torch.float64).flatten()  # near the data, so that the difference below is exact
    for x in _encoded(k, codec, seed):
        total += (x - origin).sum(0)
        outer.addmm_((x - origin).T, x - origin)
    mean = total / len(k)
    return (origin + mean).reshape(k.shape[1:]), outer / len(k) - torch.outer(mean, mean)


def gaussian_log_prob(x: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """Log density, (B,) in nats, of x (B, *shape) under N(mean, covariance). Raises ValueError for a singular one."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed:
        raise ValueError(f"the covariance of {len(covariance)} dimensions is singular: fit it to more examples")
    z = torch.linalg.solve_triangular(factor, (x - mean).flatten(1).T, upper=False)
    return normal_log_prob(z.T) - factor.diagonal().log().sum()


def largest_distance(k: Tensor, codec: Codec) -> tuple[float, bool]:
    """The largest Euclidean distance between two encoded examples of k (N, *shape), and whether it is exact.

    Two examples are at most as far apart as the sum of their distances from the mean. So once a distant pair is known,
    a farther one can only be among the examples whose distance from the mean, plus the largest such, exceeds it. Where
    those are more than 4,096 (of large images, fewer), the farthest from the mean give a lower bound.
    """
    d = math.prod(k.shape[1:])
    limit = min(_FARTHEST, max(2, 16 * _CHUNK // d))
    mean = (torch.stack([x.sum(0) for x in _encoded(k, codec)]).sum(0) / len(k)).float()
    radius = _distances(k, codec, mean)
    best, start = 0.0, int(radius.argmax())
    for _ in range(4):  # to the example farthest from this one, and on from there
        distance = _distances(k, codec, codec.encode(k[start]).flatten())
        best, start = max(best, distance.max().item()), int(distance.argmax())
    candidates = int((radius >= (best - radius.max()) * (1 - 1e-5)).sum())  # rounding must not lose the pair itself
    far = torch.cat(list(_encoded(k[radius.argsort(descending=True)[: min(candidates, limit)]], codec)))
    return max(best, torch.cdist(far, far).max().item()), candidates <= limit


def disagreements(data: Data, codec: Codec, config: ConfigDict) -> list[str]:
    """Warnings where the data, of which 2,000 training examples are looked at, and a config disagree."""
    d, m = config.data, config.model
    sigma_data = m.sigma_data if m.rule == "edm" else None
    sigma_max = m.sigma_max if config.training.sde in ("vesde", "edm") else None  # the others scale their data down
    k = _in_memory(data.train, 2000 * math.prod(data.shape) * 4, seed=0)[:2000]
    rms = math.sqrt(torch.cat([x.square().mean(1) for x in _encoded(k, codec)]).mean())
    warnings = []
    if codec.levels and len(data.shape) == 3:
        channels, *size = data.shape
        if d.num_channels and d.num_channels != channels:
            warnings.append(f"the images have {channels} channels, but data.num_channels={d.num_channels}")
        if d.image_size and size != [d.image_size, d.image_size]:
            warnings.append(f"the images are {size[0]} x {size[1]}, but data.image_size={d.image_size}")
    if codec.levels and k.max() < codec.levels // 4:
        remedy = f"multiply them by {(codec.levels - 1) // max(1, int(k.max()))}"
        if codec.levels > COARSE:
            remedy = f"say how many bits they have, data.file_bits={int(k.max()).bit_length()}"
        warnings.append(f"pixels reach {int(k.max())} of {codec.levels - 1}: if that is their white, {remedy}")
    if not codec.levels and not sigma_max and not 0.1 <= rms <= 10:
        warnings.append(
            f"the data's root mean square is {rms:.3g}, and noise levels are made for about 1: divide the data by it, "
            f"or save pixels as uint8"
        )
    if sigma_data and not 2 / 3 <= sigma_data / rms <= 1.5:
        warnings.append(f"the data's root mean square is {rms:.3g}, but model.sigma_data={sigma_data:g}")
    if sigma_max and sigma_max < (distance := largest_distance(k, codec)[0]) / 2:
        warnings.append(
            f"examples lie up to {distance:.3g} apart, so model.sigma_max={sigma_max:g} leaves modes apart at t = 1: "
            f"--mode scan suggests a value"
        )
    return warnings


def _classes(data: Data) -> list[tuple[str, str]]:
    """Rows of the classes by name, with how many examples are for training and held out, five to a line."""
    if not data.num_classes:
        return []
    splits = (split.y for split in (data.train, data.test))
    counts = [[0] * data.num_classes if y is None else torch.bincount(y, minlength=data.num_classes) for y in splits]
    names = [class_name(i, data.class_names) for i in range(data.num_classes)]
    each = [f"{name} {int(train)} + {int(test)}" for name, train, test in zip(names, *counts)]
    shown = [", ".join(each[i : i + 5]) for i in range(0, min(len(each), _SHOWN), 5)]
    if len(each) > _SHOWN:
        shown.append(f"and {len(each) - _SHOWN} more")
    rows = [("classes" if i == 0 else "", line) for i, line in enumerate(shown)]
    return rows + ([("", about_empty_classes(data))] if data.empty_classes else [])


def _baseline(train: Tensor, test: Tensor, codec: Codec, seed: int) -> tuple[float, float] | None:
    """Mean and standard error of the Gaussian's bits/dim (without levels, nats/dim) on test, if it can be fitted."""
    d = math.prod(train.shape[1:])
    if d > _DIMENSIONS or len(train) <= d:
        return None
    mean, covariance = gaussian_fit(train, codec, seed)
    values = []
    for x in _encoded(test, codec, seed + 1):  # other noise than in the fit
        try:
            log_prob = gaussian_log_prob(x, mean.flatten(), covariance)
        except ValueError:
            return None
        exact = Likelihood(log_prob, torch.zeros_like(log_prob), x, 0)
        values.append(exact.bits_per_dim(codec.levels, codec.width * codec.filled) if codec.levels else -log_prob / d)
    each = torch.cat(values)
    return each.mean().item(), (each.std() / math.sqrt(len(each))).item()


def _in_memory(split: Split, limit: int, seed: int) -> Tensor:
    """The split's examples on the CPU; of one that stays on disk at most `limit` bytes, chosen by `seed`."""
    if isinstance(split.x, Tensor):
        return split.x.cpu()
    rows = max(2, limit // (4 * math.prod(split.shape)))
    chosen = np.random.default_rng(seed).permutation(len(split))[:rows]
    return split.x[torch.from_numpy(np.sort(chosen))]


def _encoded(k: Tensor, codec: Codec, seed: int | None = None) -> Iterator[Tensor]:
    """Examples as the model sees them, (B, D) in float64, a chunk at a time; with a seed, pixels are dequantised."""
    generator = torch.Generator().manual_seed(seed or 0)
    for chunk in _chunks(k):
        pixels = seed is not None and codec.levels
        u = torch.rand(chunk.shape, generator=generator, dtype=torch.float64) if pixels else None
        yield codec.encode(chunk, u).to(torch.float64).flatten(1)


def _distances(k: Tensor, codec: Codec, origin: Tensor) -> Tensor:
    """Distances of all examples from origin (D,), in float32, which is precise enough to choose examples."""
    return torch.cat([(codec.encode(chunk).flatten(1) - origin).norm(dim=1) for chunk in _chunks(k)])


def _chunks(k: Tensor) -> tuple[Tensor, ...]:
    return k.split(max(1, _CHUNK // math.prod(k.shape[1:])))
