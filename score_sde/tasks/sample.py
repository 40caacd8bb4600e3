"""The mode sample: draws from a model, or from a cascade of models."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor

from ..config.build import build_sampler, build_times, resolve_conditions
from ..data.codecs import Codec, PixelCodec, codec_of
from ..data.images import Pixels
from ..data.sets import Data
from ..machine.log import log
from ..models.base import ScoreModel
from ..models.guidance import clip, threshold
from ..samplers import Sampler, sample
from . import checkpoint
from .class_names import class_name
from .conditions import Guides, Wanted, check_number, conditional, in_turn, load_guides, sampled_labels, trained_at
from .inputs import own_examples, read_examples
from .job import Job
from .options import scales_of
from .results import Arrays, Stored, channels_last, read_arrays, write_arrays, write_pictures, write_single_pictures
from .stamps import StampedJob, about_grid, stamped
from .texts import with_prompts


def command(options: argparse.Namespace, job: Job, images: Data) -> None:
    """--mode sample."""
    changed = None
    if job.config.sampling.start < 1:
        changed = own_examples(options, job.config, images, job.codec, job.processes.device)
    folder = _cascade(options, job, Wanted([], changed=changed))
    log.info("%d samples: %s", job.config.sampling.num_samples * max(1, len(scales_of(options))), folder)


def run_sampling(
    job: Job, guides: Guides | None = None, wanted: Wanted | None = None, scales: Sequence[float] = ()
) -> tuple[Path, dict[str, Any]]:
    """Samples as the section sampling says, into a folder below samples/: `samples.npz` (`arr_0`), a grid, a stamp.

    Images are uint8 (N, H, W, C), rounded as `PixelCodec.decode` says; vectors are float32 (N, D). Where classes are
    sampled `arr_1` has the labels, (N,). With `scales` of guidance, in place of sampling.guidance, there are as many
    times N, the same noise with each scale in turn. A guided evaluation counts as one.

    Where samples begin with examples (`Wanted.changed`) `given` has each sample's, and the grid shows it before it.
    """
    config, s, guides = job.config, job.config.sampling, guides or Guides()
    wanted = wanted or Wanted(sampled_labels(config, guides))
    strengths = list(scales) or [s.guidance]
    sampler, times = build_sampler(config), build_times(config, job.model.sde, job.model, job.shape)
    check_number(s.labels, wanted.prompts, s.num_samples, "sampling.num_samples")
    built = {"sampler": repr(sampler), "grid": about_grid(config, times), "shape": list(job.shape)}
    facts = {"sde": repr(job.model.sde), **built, **wanted.described(strengths, guides)}
    words, singly = (s.method,), s.single_png
    limited = stamped(job, "sample" if wanted.changed is None else "sample from examples", facts)
    draws = Draws(limited, sampler, times, guides, wanted)
    folder, result = limited.once("samples", words, "samples.npz", partial(draws.all, strengths))
    if singly and job.codec.pixels is not None and job.processes.main:
        write_single_pictures((read_arrays(folder / "samples.npz") or {})["arr_0"], job.codec.pixels, folder)
    return folder, result


@dataclass(frozen=True)
class Draws:
    """How samples are drawn."""

    job: StampedJob
    sampler: Sampler
    times: Tensor
    guides: Guides
    wanted: Wanted

    def all(self, scales: Sequence[float], folder: Path) -> dict[str, Any]:
        """The samples at each scale of guidance, and their pictures."""
        s, parts = self.job.config.sampling, []
        for i, scale in enumerate(scales):
            where, batch = folder / f"scale-{i}" if len(scales) > 1 else folder, partial(self.batch, scale=scale)
            parts.append(self.job.in_batches(where, s.num_samples, s.batch_size, batch, "batches"))
        joined = Stored({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, folder)
        if self.job.processes.main:
            stored = ("arr_0", "arr_1", "given")
            write_arrays(folder / "samples.npz", {name: joined[name] for name in stored if name in joined})
            self.show(joined, scales, folder)
        return {"nfe": float(joined["nfe"].mean())}

    def batch(self, first: int, count: int, scale: float) -> Arrays:
        """The samples first to first + count - 1."""
        job, wanted, config, codec = self.job, self.wanted, self.job.config, self.job.codec
        model, labels = self.guided(first, count, scale)
        start = wanted.start(first, count, config, codec, model.sde, self.times[0])
        options = {**drawing(config, first), "device": job.processes.device, "progress": job.processes.main}
        x = sample(model, self.sampler, (count, *job.shape), self.times, start=start, **options)
        arrays = {"arr_0": channels_last(codec.decode(x))}
        if wanted.changed is not None:
            k = wanted.changed[torch.arange(first, first + count) % len(wanted.changed)][0]
            arrays["given"] = channels_last(k if codec.levels or codec.pixels is None else codec.decode(k))
        return {**arrays, "arr_1": labels.numpy()} if wanted.labels else arrays

    def guided(self, first: int, count: int, scale: float) -> tuple[ScoreModel, Tensor]:
        """The model given what is wanted of these samples, guided at a scale and held in range, and their labels."""
        config, codec, model = self.job.config, self.job.codec, self.job.model
        labels = in_turn(self.wanted.labels, first, count)
        conditions = self.wanted.of(first, count, config, codec, model.sde)
        return _in_range(conditional(model, conditions, labels, config, self.guides, scale), config, codec), labels

    def show(self, joined: Arrays, scales: Sequence[float], folder: Path) -> None:
        """Write pictures of the samples, each behind the example with which it began, if there is one."""
        number, codec = self.job.config.sampling.num_samples, self.job.codec
        groups, names = self.groups(scales)
        shown, columns = joined["arr_0"], None
        if "given" in joined and codec.pixels is not None:
            shown = np.stack([joined["given"], shown], 1).reshape(-1, *shown.shape[1:])
            groups = None if groups is None else [group for group in groups for _ in range(2)]
            columns = None if groups else 2 * max(1, min(4, number // 2))
        write_pictures(shown, codec, folder, columns, groups, names)

    def groups(self, scales: Sequence[float]) -> tuple[list[int] | None, list[str]]:
        """(group of each sample, groups' names): a row of a grid shows a scale, or else a prompt or a class."""
        number, data = self.job.config.sampling.num_samples, self.job.trained.data
        if len(scales) > 1:
            return [i for i in range(len(scales)) for _ in range(number)], [f"guidance {scale:g}" for scale in scales]
        classes = () if data is None else data.class_names
        names = list(self.wanted.prompts) or [class_name(label, classes) for label in self.wanted.labels]
        if not 1 < len(names) <= number:
            return None, []
        return [i % len(names) for i in range(number)], names


def drawing(config: ConfigDict, first: int) -> dict[str, Any]:
    """Options of `samplers.sample`, from the section sampling, for samples from the index `first` on."""
    s = config.sampling
    return {"seed": s.seed, "first": first, "denoise": s.noise_removal, "temperature": s.temperature}


def _in_range(model: ScoreModel, config: ConfigDict, codec: Codec) -> ScoreModel:
    """The model with its estimates of pixels clipped or thresholded to their range, as the section sampling says."""
    s = config.sampling
    if not isinstance(codec, PixelCodec):
        return model
    model = clip(model, *codec.range) if s.clip_denoised else model
    return threshold(model, s.threshold, *codec.range) if s.threshold > 0 else model


def _cascade(options: argparse.Namespace, job: Job, wanted: Wanted) -> Path:
    """The folder of a job's samples. For a model that enlarges the stage before it is sampled first."""
    guides = load_guides(job.config, job.model, job.shape, job.processes.device)
    wanted = with_prompts(wanted._replace(labels=sampled_labels(job.config, guides)), options, job)
    if job.config.model.super_resolution:
        wanted = wanted._replace(images=_smaller(options, job))
    return run_sampling(job, guides, wanted, scales_of(options))[0]


def _smaller(options: argparse.Namespace, job: Job) -> Tensor:
    """The images that a model of super-resolution enlarges: those of --input, or the samples of sampling.base."""
    config, s = job.config, job.config.sampling
    factor = config.model.super_resolution
    small = (job.shape[0], *(size // factor for size in job.shape[1:]))
    if options.input is not None:
        images = read_examples(options.input, small, job.codec, Pixels.of(config.data)).x
        assert isinstance(images, Tensor)
        s.num_samples = min(s.num_samples, len(images))
        return images
    before = _stage_before(job, small)
    prompts = options.prompt if before.config.model.text_encoder else []
    plain = argparse.Namespace(prompt=prompts, negative=options.negative, input=None, scales="")
    folder = _cascade(plain, before, Wanted([]))
    log.info("%d samples: %s", s.num_samples, folder)
    with np.load(folder / "samples.npz") as samples:
        return torch.from_numpy(samples["arr_0"]).permute(0, 3, 1, 2).contiguous()


def _stage_before(job: Job, small: tuple[int, ...]) -> Job:
    """The job of the model at sampling.base, which makes images of the shape `small`.

    It has its own config, and the number, classes, prompts and seed of the job whose images it makes.
    """
    s = job.config.sampling
    if not s.base:
        raise ValueError("the model enlarges images: give it some, --input FILE_OR_FOLDER, or the stage before, "
                         "--config.sampling.base=WORKDIR")
    what = f"the stage before (a model of images of {small[1]} x {small[2]})"
    trained = trained_at(s.base, "sampling.base", what)
    card, config, path = trained.card, deepcopy(trained.config), trained.path
    assert card is not None
    if card.codes:
        raise ValueError(f"sampling.base={s.base} is a model of codes: take a model of pixels for the stage before")
    if card.shape != small:
        raise ValueError(f"sampling.base={s.base} makes examples of shape {card.shape}, and {small} are to be "
                         "enlarged: name the workdir of a model that makes these")
    for key in ("num_samples", "batch_size", "seed", "labels", "negative_label"):
        config.sampling[key] = s[key]
    config.sampling.start = 1.0
    resolve_conditions(config, card.shape[0])
    log.info("the stage before: %s", path)
    model = trained.model(checkpoint.chosen(config, "sampling"), job.processes.device)
    workdir = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    codec = codec_of(job.codec.levels, config.data.centered)
    return Job(model, config, codec, trained, card.shape, workdir, job.processes)
