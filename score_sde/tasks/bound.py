"""The variational bound of a chain for pixels or vectors, part by part and step by step; see `likelihood`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.captions import Text
from ..data.codecs import PixelCodec
from ..data.sets import Split
from ..likelihood.chain_bound import Bound, chain_bound
from ..models.guidance import clip
from ..models.pixel_levels import bits
from .conditions import given
from .results import Arrays, error_of_mean, mean_and_error, running_mean, write_arrays
from .stamps import StampedJob

_PARTS = ("prior", "diffusion", "reconstruction")


@dataclass(frozen=True)
class ChainEvaluation:
    """The bound of a split's first n examples on the device, along the chain's times.

    `likelihood.npz` has `bits_per_dim` (images, 1), or `nats` of vectors, its parts `prior`, `diffusion` and
    `reconstruction` (images,), and by steps of the chain `times` and the mean over images of the `terms` (NaN for a
    step that no image drew), whose sum is the diffusion's mean: `plt.plot(times, terms)` shows where the bits go. Where
    eval.terms of the steps were drawn, it has `std_error` (images,), in nats over them, too.
    """

    job: StampedJob
    split: Split
    text: Text | None
    times: Tensor
    n: int

    @property
    def steps(self) -> int:
        """How many steps have a term: a last one into clean data decodes."""
        return len(self.times) - (1 if bool(self.job.model.sde.sigma(self.times[-1]) > 0) else 2)

    def all(self, folder: Path) -> dict[str, Any]:
        """The bounds of all examples, their means and the errors of these."""
        job, e, levels = self.job, self.job.config.eval, self.job.codec.levels
        unit = "bits/dim" if levels else "nats"
        joined = job.in_batches(folder, self.n, e.batch_size, self.batch, unit, running_mean(f"{unit} at most"))
        if job.processes.main:
            self.write(joined, folder)
        mean, error = mean_and_error(joined["value"])
        means = {name: float(joined[name].mean()) for name in (*_PARTS, "nfe")}
        errors: dict[str, float | None] = {"images": error}
        if e.terms:
            per_nat = bits(1.0, math.prod(self.split.shape)) if levels else 1.0
            draws = per_nat * error_of_mean(joined["std_error"])
            errors["draws"] = None if math.isnan(draws) else draws
        return {"mean": mean, "standard_error": error, "errors": errors, **means}

    def batch(self, first: int, count: int) -> Arrays:
        """The bounds of the examples first to first + count - 1, and their terms summed by step."""
        config, codec, e = self.job.config, self.job.codec, self.job.config.eval
        index, model = torch.arange(first, first + count), self.job.model
        clipped = clip(model, *codec.range) if e.clip_denoised and isinstance(codec, PixelCodec) else model
        conditioned = given(config, clipped, self.split, index, self.text, codec)
        x0 = codec.encode(self.split[index][0]).to(torch.float32)
        options = {"variance": config.sampling.variance, "levels": codec.levels, "width": codec.width, "seed": e.seed}
        return self.arrays(chain_bound(conditioned, x0, self.times, terms=e.terms or None, first=first, **options))

    def arrays(self, bound: Bound) -> Arrays:
        parts = {"value": bound.total, "prior": bound.prior, "diffusion": bound.rate - bound.prior}
        parts |= {"reconstruction": bound.reconstruction, "terms": bound.diffusion}
        if self.job.codec.levels:
            parts = {name: bound.bits_per_dim(part) for name, part in parts.items()}
        arrays = {name: part.double().cpu().numpy() for name, part in parts.items()}
        # Each term's step is its place in the grid: terms are summed by step over the images of the batch.
        place = np.searchsorted(-self.times.numpy(), -bound.times.expand_as(bound.diffusion).numpy()).ravel()
        for name, weights in (("sum", arrays.pop("terms").ravel()), ("drawn", None)):
            arrays[name] = np.bincount(place, weights, minlength=self.steps)[None]
        return {**arrays, "std_error": bound.std_error.double().cpu().numpy()}

    def write(self, joined: Arrays, folder: Path) -> None:
        drawn = joined["drawn"].sum(0)
        terms = np.divide(joined["sum"].sum(0), drawn, out=np.full(self.steps, np.nan), where=drawn > 0)
        drawn_terms = ("std_error",) if self.job.config.eval.terms else ()
        arrays = {"bits_per_dim" if self.job.codec.levels else "nats": joined["value"][:, None]}
        arrays |= {name: joined[name] for name in (*_PARTS, *drawn_terms)}
        arrays |= {"times": self.times.numpy()[: self.steps], "terms": terms}
        write_arrays(folder / "likelihood.npz", arrays)
