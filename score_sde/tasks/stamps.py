"""What a result is made from: the stamp in its folder, whose hash names that folder.

The same stamp means the same numbers. So it holds all that changes them: the checkpoint, the weights, what was built
from the config (the SDE, the sampler, the grid, the codec), digests of what was read (examples, masks, texts, models
that guide), and the keys of the config that the computation itself reads. No key can be forgotten: the computation gets
a config with the stamp's keys alone (see `asked`), and the `HARMLESS` ones, which change no number.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor

from ..config.build import grid_name, steps_together
from ..data.captions import Text
from ..data.codecs import AutoencoderCodec, Codec
from ..data.sets import Split, digest
from ..machine.log import keep_log
from ..machine.version import __version__
from ..models.base import Counted
from ..ode.integrators import ADAPTIVE
from . import results
from .checkpoint import SUFFIX, chosen, weights_name
from .job import Job
from .results import Arrays

VERSIONS = {"score_sde": __version__, "torch": torch.__version__, "python": platform.python_version()}

# The sizes of batches, where the text encoder lies (the stamp has its hash), and what training minimised.
HARMLESS = ("sampling.batch_size", "eval.batch_size", "model.text_encoder", "training.objective")

_DRAWN = """sampling.seed sampling.noise_removal sampling.temperature sampling.clip_denoised sampling.threshold
    sampling.negative_label sampling.guidance_low sampling.guidance_high sampling.guidance_rescale
    model.class_conditional"""
_CONDITIONS = "eval.conditional model.class_conditional"
_FLOW = f"eval.ode_method eval.rtol eval.atol eval.t_min {_CONDITIONS}"
_AS_TRAINED = "eval.seed data.uniform_dequantization"

# The keys that a result's computation reads, beside what is built before it.
KEYS: dict[str, tuple[str, ...]] = {
    name: tuple(keys.split())
    for name, keys in {
        "sample": f"sampling.num_samples sampling.augmentation {_DRAWN}",
        "sample from examples": f"sampling.num_samples data.uniform_dequantization {_DRAWN}",
        "ode": f"eval.seed eval.probe eval.probes eval.check_images eval.importance_samples {_FLOW} "
        "model.super_resolution",
        "sde_bound": f"eval.seed eval.draws eval.t_min model.super_resolution {_CONDITIONS}",
        "bound": f"eval.seed eval.terms eval.clip_denoised sampling.variance model.super_resolution {_CONDITIONS}",
        "encode": f"{_AS_TRAINED} {_FLOW}",
        "decode": f"sampling.temperature {_FLOW}",
        "interpolate": f"interpolation.steps sampling.temperature {_AS_TRAINED} {_FLOW}",
        "interpolate seeds": f"interpolation.steps sampling.temperature sampling.seed {_FLOW}",
        "restore": f"inverse.method inverse.noise {_AS_TRAINED} {_DRAWN}",
        "dequantize": "seed eval.t_min dequantizer.n_iters dequantizer.batch_size dequantizer.lr dequantizer.layers "
        "dequantizer.hidden",
    }.items()
}
# What a checkpoint of another project is built from, which carries no config.
FOREIGN = ("model", "training.sde", "training.continuous", "data.centered", "data.image_size", "data.num_channels")


@dataclass(frozen=True)
class StampedJob(Job):
    """A job whose config has the keys of its stamp alone, and whose model counts its evaluations."""

    model: Counted
    made_from: dict[str, Any]

    def once(self, below: str, words: Sequence[str], file: str, work: results.Work) -> tuple[Path, dict[str, Any]]:
        """A result's folder in the workdir's `below`, named by checkpoint, weights, `words` and stamp; and its stamp.

        `results.kept` explains `work` and the errors.
        """
        keep_log()
        label = "-".join((self.trained.path.stem, self.made_from["weights"], *words))
        folder = results.folder_for(self.workdir / below, label, self.made_from)
        return folder, results.kept(folder, self.made_from, file, self.processes, work)

    def in_batches(
        self, folder: Path, total: int, size: int, compute: Callable[[int, int], Arrays], *shown: Any
    ) -> Arrays:
        """`results.in_batches`, where `nfe` (batches,) counts a batch's evaluations if `compute` does not say it."""

        def counted(first: int, count: int) -> Arrays:
            self.model.nfe = 0
            arrays = compute(first, count)
            return {"nfe": np.array([self.model.nfe]), **arrays}

        return results.in_batches(folder, total, size, self.processes, counted, *shown)


def stamped(job: Job, kind: str, facts: dict[str, Any], own: Sequence[str] = ()) -> StampedJob:
    """The job that makes a result of a kind of `KEYS`, which also reads the keys `own`.

    Its stamp has the checkpoint, the weights, the codec, these keys, versions, and `facts`.
    """
    config, path, keys = job.config, job.trained.path, (*_keys_of(kind, job.config), *own)
    ema = chosen(config, "sampling" if kind.startswith("sample") else "eval")
    made_from: dict[str, Any] = {"checkpoint": path.name, "checkpoint_sha256": job.trained.sha256}
    made_from["weights"] = weights_name(ema)
    if not isinstance(ema, bool):  # they were made of several checkpoints
        made_from["weights_sha256"] = digest(*job.model.parameters())
    made_from |= {"codec": _named(job.codec, config), **facts, "config": values(config, keys)}
    if path.suffix != SUFFIX:
        made_from["read_as"] = values(config, FOREIGN)
    made_from["versions"] = {name: str(version) for name, version in VERSIONS.items()}
    common = {**vars(job), "model": Counted(job.model), "config": asked(config, keys)}
    return StampedJob(**common, made_from=made_from)


def _keys_of(kind: str, config: ConfigDict) -> tuple[str, ...]:
    """The keys of a kind of result: its own, and the batch's size where the examples of a batch share their steps.

    An example depends on its neighbours then, to within the solver's tolerance.
    """
    keys = KEYS[kind]
    if kind.startswith("sample"):
        return (*keys, "sampling.batch_size") if steps_together(config) else keys
    adaptive = "eval.ode_method" in keys and config.eval.ode_method in ADAPTIVE
    return (*keys, "eval.batch_size") if (steps_together(config) if kind == "restore" else adaptive) else keys


def about_times(times: Tensor) -> dict[str, Any]:
    """What a stamp says of times."""
    return {"steps": len(times) - 1, "first": times[0].item(), "last": times[-1].item()}


def about_grid(config: ConfigDict, times: Tensor) -> dict[str, Any]:
    """What a stamp says of the times that were sampled on."""
    return {"name": grid_name(config), **about_times(times)}


def about_examples(split: Split, name: str, number: int, text: Text | None = None) -> dict[str, Any]:
    """What a stamp says of the examples, the first `number` of a split, and of their captions' embeddings."""
    facts = {"split": name, "images": number, "examples_sha256": split.digest()}
    return facts if text is None else {**facts, "text_sha256": digest(*text)}


def asked(config: ConfigDict, keys: Sequence[str]) -> ConfigDict:
    """The config with these keys and the harmless ones alone; reading another raises AttributeError."""
    limited: dict[str, Any] = {}
    for key, value in values(config, (*keys, *HARMLESS)).items():
        section, _, name = key.rpartition(".")
        (limited.setdefault(section, {}) if section else limited)[name] = value
    return ConfigDict(limited).lock()


def values(config: ConfigDict, keys: Sequence[str]) -> dict[str, Any]:
    """{"section.key": value} of some keys, or of all keys of a section, in order."""
    by_key: dict[str, Any] = {}
    for key in keys:
        section, _, name = key.rpartition(".")
        value = (config[section] if section else config)[name]
        by_key |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, ConfigDict) else {key: value}
    return by_key


def _named(codec: Codec, config: ConfigDict) -> str:
    if isinstance(codec, AutoencoderCodec):
        return f"codes of autoencoder {config.data.autoencoder_sha256}, {codec.statistics}, of {codec.pixels}"
    return repr(codec)
