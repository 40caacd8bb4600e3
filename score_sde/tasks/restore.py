"""The modes inpaint, colorize, superresolve and deblur: the section inverse, on held-out images or on the user's."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor

from ..config.build import build_sampler, build_times, grid_name
from ..config.keys import KEYS
from ..data.codecs import PixelCodec
from ..data.images import Pixels
from ..data.sets import Data, Split, digest
from ..inverse.models import ddnm, dps, moment_matching, pigdm
from ..inverse.operators import Average, Blur, Grey, Mask, Observation, Spectral
from ..inverse.samplers import Projected, twisted
from ..machine.log import log
from ..metrics import psnr
from ..models.base import ScoreModel
from ..noise import ExampleStream, example_generators, noise_source
from ..samplers import Sampler, sample
from .conditions import Guides, Wanted, check_number, load_guides, sampled_labels
from .inputs import number_of, read_examples, read_mask, split_of
from .job import Job
from .latents import as_in_training
from .pictures import grid, write_png
from .results import Arrays, channels_last, mean_and_error, write_arrays, write_single_pictures
from .sample import Draws, drawing
from .stamps import about_examples, about_grid, stamped
from .texts import with_prompts

_SHOWN = 32  # images in the grid

Guidance = Callable[[ScoreModel, Observation, ConfigDict], ScoreModel]
GUIDED: dict[str, Guidance] = {
    "dps": lambda model, o, i: dps(model, o, i.rate),
    "pigdm": lambda model, o, i: pigdm(model, o, i.variance),
    "ddnm": lambda model, o, i: ddnm(model, o, i.variance),
    "moment_matching": lambda model, o, i: moment_matching(model, o, i.iterations),
}
METHODS = KEYS["inverse.method"].choices
# The keys of the section inverse that a method or a task has to itself.
OWN = {
    "dps": ("rate",), "pigdm": ("variance",), "ddnm": ("variance",), "moment_matching": ("iterations",),
    "repaint": ("resamplings",), "twisted": ("variance", "particles"), "superresolve": ("factor",), "deblur": ("blur",),
}


def operator_for(task: str, config: ConfigDict, shape: tuple[int, ...], mask: Path | None) -> Spectral:
    """The operator A of a task, y = A x + noise. Raises ValueError for images that it does not fit."""
    if task == "inpaint":
        return Mask(read_mask(mask, shape))
    if task == "colorize":
        if shape[0] != 3:
            raise ValueError(f"--mode colorize needs a model of colour images, and this one's have {shape[0]} channel")
        return Grey(torch.full((3,), 1 / 3, dtype=torch.float64))
    if task == "deblur":
        return Blur.gaussian(config.inverse.blur)
    factor = config.inverse.factor
    if shape[1] % factor or shape[2] % factor:
        raise ValueError(f"inverse.factor={factor} does not divide the model's images of {shape[1]} x {shape[2]}: take "
                         "one that does")
    return Average(factor)


def restore(
    model: ScoreModel, config: ConfigDict, observation: Observation, shape: tuple[int, ...], times: Tensor, first: int,
    sampler: Sampler | None = None,
) -> Tensor:
    """One draw of x given y for each of the observations, (B, *shape), by the method of the section inverse.

    It walks along `times` by `sampler`, or that of the section sampling; the method twisted has steps of its own.
    """
    i, seed = config.inverse, config.sampling.seed
    whole, device = (len(observation.y), *shape), observation.y.device
    if i.method == "twisted":
        options = {"particles": i.particles, "variance": i.variance}
        x, log_weights, *_ = twisted(model, observation, whole, times, **options, seed=seed, first=first, device=device)
        generators = example_generators(seed, first, len(x), stream=ExampleStream.PARTICLE)
        weights = log_weights.exp().cpu()
        chosen = [torch.multinomial(w, 1, generator=g) for w, g in zip(weights, generators, strict=True)]
        return x[torch.arange(len(x)), torch.cat(chosen)]
    sampler = sampler or build_sampler(config)
    if i.method in GUIDED:
        model = GUIDED[i.method](model, observation, i)
    else:
        sampler = Projected(sampler, observation, i.resamplings if i.method == "repaint" else 1)
    x = sample(model, sampler, whole, times, device=device, **drawing(config, first))
    exact = observation.noise == 0 and not isinstance(observation.operator, Blur)
    return observation.project(x) if exact else x


def shown(observation: Observation, x: Tensor) -> Tensor:
    """An observation as a picture of x's shape: hidden pixels have the mean of the known ones, small images are
    enlarged by repeating pixels, and grey and blurred images stay as they are."""
    operator, y = observation.operator, observation.y
    if isinstance(operator, Blur):
        return y
    assert isinstance(operator, Spectral)
    picture = operator.pseudo_inverse(y)
    if isinstance(operator, Mask):
        known = operator.known.to(x.device).expand_as(x)
        mean = picture.flatten(2).sum(2) / known.flatten(2).sum(2)
        picture = torch.where(known, picture, mean[..., None, None])
    return picture


def command(options: argparse.Namespace, job: Job, images: Data) -> None:
    """The modes inpaint, colorize, superresolve and deblur."""
    guides = load_guides(job.config, job.model, job.shape, job.processes.device)
    labels = sampled_labels(job.config, guides) if job.config.sampling.labels else []
    wanted = with_prompts(Wanted(labels), options, job)
    folder, result = run_restoring(job, options.mode, images, options.input, options.mask, guides, wanted)
    log.info("%s: %s", restoring_line(result), folder)


def run_restoring(
    job: Job, task: str, data: Data, own: Path | None = None, mask: Path | None = None, guides: Guides | None = None,
    wanted: Wanted | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Degrade the first eval.num_images examples of eval.split and restore them, or restore the user's, which are in
    the file or folder `own`; into a folder below restored/.

    The model is conditioned on the classes and prompts of `wanted`, in turn, and guided as the section sampling says.

    `restored.npz` has `restored` and `observed` (N, H, W, C), `labels` (N,) if there are some, and for a split's
    examples, whose truth is known, `truth` and `psnr` and `psnr_observed` (N,), whose means the stamp has. `grid.png`
    shows truth, observation and result side by side; each result of the user's images is also a PNG.
    """
    config, e, i, s = job.config, job.config.eval, job.config.inverse, job.config.sampling
    guides, wanted = guides or Guides(), wanted or Wanted([])
    noise = _noise(job, task)
    operator = operator_for(task, config, job.shape, mask)
    split = split_of(data, config) if own is None else _read_observed(own, task, operator, job)
    n = number_of(split, config)
    check_number(s.labels, wanted.prompts, n, "the number of images")
    times, sampler = build_times(config, job.model.sde, job.model, job.shape), build_sampler(config)
    words, scale = (task, i.method), s.guidance
    walk = "ancestral steps" if i.method == "twisted" else repr(sampler)
    known = digest(operator.known) if isinstance(operator, Mask) else None
    facts = {"mode": task, "sde": repr(job.model.sde), **about_examples(split, e.split if own is None else "input", n)}
    facts |= {"number": n, "mask_sha256": known, "method": i.method, "noise": noise, "sampler": walk}
    facts |= {"grid": about_grid(config, times), **wanted.described([scale], guides)}
    limited = stamped(job, "restore", facts, [f"inverse.{key}" for name in words for key in OWN.get(name, ())])
    draws = Draws(limited, sampler, times, guides, wanted)
    split = split.to(job.processes.device)
    restoration = _Restoration(draws, scale, task, operator, noise, split, own is not None)
    return limited.once("restored", words, "restored.npz", partial(restoration.all, n))


@dataclass(frozen=True)
class _Restoration:
    """How examples are restored: the draws, the scale of guidance, the operator, and its noise's deviation."""

    draws: Draws
    scale: float
    task: str
    operator: Spectral
    noise: float
    split: Split
    own: bool  # the user's images, whose truth nobody knows

    def all(self, number: int, folder: Path) -> dict[str, Any]:
        """The first `number` of the split, restored."""
        job = self.draws.job
        joined = job.in_batches(folder, number, job.config.eval.batch_size, self.batch, self.task)
        result: dict[str, Any] = {"nfe": float(joined["nfe"].mean())}
        if job.processes.main:
            write_arrays(folder / "restored.npz", {name: joined[name] for name in joined if name != "nfe"})
            self.show(joined, folder)
        for name in ("psnr", "psnr_observed"):
            if name in joined:
                mean, error = mean_and_error(joined[name])
                result |= {name: mean, f"{name}_error": None if math.isnan(error) else error}
        return result

    def batch(self, first: int, count: int) -> Arrays:
        """The examples first to first + count - 1, as observed and restored."""
        job, codec = self.draws.job, self.draws.job.codec
        assert codec.levels is not None
        k, _ = self.split[torch.arange(first, first + count)]
        observation = self.observed(k, first)
        model, labels = self.draws.guided(first, count, self.scale)
        x = restore(model, job.config, observation, job.shape, self.draws.times, first, self.draws.sampler)
        restored, before = codec.decode(x), codec.decode(shown(observation, x))
        arrays = {"restored": channels_last(restored), "observed": channels_last(before)}
        if self.draws.wanted.labels:
            arrays["labels"] = labels.numpy()
        if not self.own:
            to_truth = partial(psnr, k.double() / (codec.levels - 1))
            arrays["truth"] = channels_last(k)
            for name, y in (("psnr", restored), ("psnr_observed", before)):
                arrays[name] = to_truth(y.double() / (codec.levels - 1)).cpu().numpy()
        return arrays

    def observed(self, k: Tensor, first: int) -> Observation:
        """The observations of stored images; the user's images for superresolve and deblur are observations already."""
        config, codec = self.draws.job.config, self.draws.job.codec
        if self.own and self.task in ("superresolve", "deblur"):
            u = torch.full_like(k, 0.5, dtype=torch.float32) if config.data.uniform_dequantization else None
            return Observation(self.operator, codec.encode(k, u), self.noise)
        y = self.operator.apply(as_in_training(k, codec, config, first))
        if config.inverse.noise > 0 and not self.own:
            seed, stream = config.eval.seed, ExampleStream.OBSERVATION
            noise = noise_source(tuple(y.shape), seed, first, y.dtype, y.device, stream)
            y = y + codec.width * config.inverse.noise * noise(y)
        return Observation(self.operator, y, self.noise)

    def show(self, joined: Arrays, folder: Path) -> None:
        """Write the grid, and a picture of each of the user's images."""
        codec = self.draws.job.codec
        assert isinstance(codec, PixelCodec)
        kinds = [name for name in ("truth", "observed", "restored") if name in joined]
        rows = np.stack([joined[name][:_SHOWN] for name in kinds], 1)
        images = codec.display(torch.from_numpy(rows.reshape(-1, *rows.shape[2:])).permute(0, 3, 1, 2))
        abreast = max(1, min(4, len(rows) // 2))
        write_png(grid(images, len(kinds) * abreast), folder / "grid.png")
        if self.own:
            write_single_pictures(joined["restored"], codec, folder)


def _noise(job: Job, task: str) -> float:
    """The deviation of an observation's noise, as the model sees it. Raises ValueError for what cannot be restored."""
    i, s, codec = job.config.inverse, job.config.sampling, job.codec
    if not isinstance(codec, PixelCodec) or len(job.shape) != 3:
        raise ValueError(f"--mode {task} is for images, and data.dataset={job.config.data.dataset} has {job.shape}")
    if i.method == "twisted" and grid_name(job.config) == "ends":
        raise ValueError(f"inverse.method=twisted walks on sampling's grid, and sampling.method={s.method} chooses its "
                         "own steps: set sampling.method=pc")
    # The task deblur and the method twisted need noise: at least that of rounding to levels.
    rounding = 1 / (codec.levels * math.sqrt(12)) if task == "deblur" or i.method == "twisted" else 0.0
    return codec.width * max(i.noise, rounding)


def _read_observed(path: Path, task: str, operator: Spectral, job: Job) -> Split:
    """The user's images, of the model's shape; for superresolve they are the small ones."""
    shape = tuple(operator.apply(torch.zeros(1, *job.shape)).shape[1:]) if task == "superresolve" else job.shape
    return read_examples(path, shape, job.codec, Pixels.of(job.config.data))


def restoring_line(result: dict[str, Any]) -> str:
    """What a result's stamp says, in a line."""
    line = f"{result['number']} images, {result['mode']} by {result['method']}, NFE {result['nfe']:.0f}"
    if "psnr" in result:
        error = result["psnr_error"]
        spread = f" ± {error:.2f}" if error is not None else ""
        line += f"; PSNR {result['psnr']:.2f}{spread} dB, of what was seen {result['psnr_observed']:.2f} dB"
    return line
