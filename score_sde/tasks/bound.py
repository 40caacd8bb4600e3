"""The variational bound of a chain for pixels or vectors, part by part and step by step; see `likelihood`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.build import build_bound_times
from ..data.captions import Text
from ..data.codecs import PixelCodec
from ..data.sets import Split
from ..likelihood.chain_bound import Bound, chain_bound
from ..models.base import Counted
from ..models.guidance import clip
from ..models.pixel_levels import bits
from .conditions import given, told
from .inputs import number_of
from .job import Job
from .results import Arrays, error_of_mean, in_batches, mean_and_error, once, running_mean, write_arrays
from .stamps import about_examples, about_times, keys_of, stamped

_PARTS = ("prior", "diffusion", "reconstruction")


def run_bound(job: Job, split: Split, text: Text | None = None) -> tuple[Path, dict[str, Any]]:
    """The variational bound of a split, bits/dim of its levels (nats for vectors), into a folder below likelihood/.

    `likelihood.npz` has `bits_per_dim` (images, 1), its parts `prior`, `diffusion` and `reconstruction` (images,), and
    by steps of the chain `times` and the mean over images of the `terms` (NaN for a step that no image drew), whose sum
    is the diffusion's mean: `plt.plot(times, terms)` shows where the bits go. Where eval.terms of the steps were drawn,
    it has `std_error` (images,), in nats over them, too. The stamp has the means of all.
    """
    config, codec, device = job.config, job.codec, job.processes.device
    e, n, times = config.eval, number_of(split, config), build_bound_times(config, job.model.sde)
    decoded = "pixels without dequantisation" if codec.levels else "Gaussian decoder"
    about = {
        "sde": repr(job.model.sde),
        "estimate": f"variational bound of {len(times) - 1} steps, {decoded}",
        **about_examples(split, e.split, n, text if told(config) else None),
        "given_labels": told(config),
        "grid": about_times(times),
        "levels": codec.levels,
        "unit": "bits/dim" if codec.levels else "nats",
    }
    label = f"{job.trained.path.stem}-{e.weights}-{e.split}-bound"
    limited, made_from = stamped(job, e.weights, keys_of("bound", config), about)
    clipped, model = limited.config.eval.clip_denoised, job.model
    counted = Counted(clip(model, *codec.range) if clipped and isinstance(codec, PixelCodec) else model)
    on_device = split.to(device), None if text is None else text.to(device)
    evaluation = _Evaluation(replace(limited, model=counted), *on_device, times, n)
    return once(job.workdir / "likelihood", label, made_from, "likelihood.npz", job.processes, evaluation.all)


@dataclass(frozen=True)
class _Evaluation:
    """A split's first n examples on the device, and the chain's times; the job's model counts its evaluations."""

    job: Job
    split: Split
    text: Text | None
    times: Tensor
    n: int

    @property
    def steps(self) -> int:
        """Those that have a term: a last one into clean data decodes."""
        return len(self.times) - (1 if bool(self.job.model.sde.sigma(self.times[-1]) > 0) else 2)

    def all(self, folder: Path) -> dict[str, Any]:
        """The bounds of all examples, their means and the errors of these."""
        job, e, levels = self.job, self.job.config.eval, self.job.codec.levels
        unit = "bits/dim" if levels else "nats"
        progress = running_mean(f"{unit} at most")
        joined = in_batches(folder, self.n, e.batch_size, job.processes, self.batch, unit, progress)
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
        job, config, codec = self.job, self.job.config, self.job.codec
        assert isinstance(job.model, Counted)
        job.model.nfe = 0
        index = torch.arange(first, first + count)
        bound = chain_bound(
            given(config, job.model, self.split, index, self.text, codec),
            codec.encode(self.split[index][0]).to(torch.float32),
            self.times,
            variance=config.sampling.variance,
            levels=codec.levels,
            width=codec.width,
            terms=config.eval.terms or None,
            seed=config.eval.seed,
            first=first,
        )
        return {**self.arrays(bound), "nfe": np.array([job.model.nfe])}

    def arrays(self, bound: Bound) -> Arrays:
        parts = {
            "value": bound.total,
            "prior": bound.prior,
            "diffusion": bound.rate - bound.prior,
            "reconstruction": bound.reconstruction,
            "terms": bound.diffusion,
        }
        if self.job.codec.levels:
            parts = {name: bound.bits_per_dim(part) for name, part in parts.items()}
        arrays = {name: part.double().cpu().numpy() for name, part in parts.items()}
        # Which term is whose: its step's place in the grid, to sum by step over the images of the batch.
        place = np.searchsorted(-self.times.numpy(), -bound.times.expand_as(bound.diffusion).numpy()).ravel()
        for name, weights in (("sum", arrays.pop("terms").ravel()), ("drawn", None)):
            arrays[name] = np.bincount(place, weights, minlength=self.steps)[None]
        return {**arrays, "std_error": bound.std_error.double().cpu().numpy()}

    def write(self, joined: Arrays, folder: Path) -> None:
        drawn = joined["drawn"].sum(0)
        terms = np.divide(joined["sum"].sum(0), drawn, out=np.full(self.steps, np.nan), where=drawn > 0)
        arrays = {
            "bits_per_dim" if self.job.codec.levels else "nats": joined["value"][:, None],
            **{name: joined[name] for name in _PARTS},
            **({"std_error": joined["std_error"]} if self.job.config.eval.terms else {}),
            "times": self.times.numpy()[: self.steps],
            "terms": terms,
        }
        write_arrays(folder / "likelihood.npz", arrays)
