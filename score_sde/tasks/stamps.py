"""What a result is made from: the stamp in its folder, whose hash names that folder.

The same stamp means the same numbers. So it holds all that changes them: the checkpoint, the weights, what was built of
the config (the SDE, the sampler, the grid, the codec), digests of what was read (examples, masks, texts, models that
guide), and the keys of the config that the computation itself reads. No key can be forgotten: `asked` gives the
computation those that are in the stamp, and `HARMLESS` ones, which change no number (a batch's size, which sometimes
does, is in the stamp then: `keys_of`); others are not there to be read.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import Tensor

from ..config.build import grid_name, steps_together
from ..data.captions import Text
from ..data.codecs import AutoencoderCodec, Codec
from ..data.sets import Split, digest
from ..machine.version import __version__
from ..ode.integrators import ADAPTIVE
from .checkpoint import SUFFIX
from .job import Job

VERSIONS = {"score_sde": __version__, "torch": torch.__version__, "python": platform.python_version()}

# How many at once, what is written besides, and where those lie whose content the stamp names.
HARMLESS = ("sampling.batch_size", "eval.batch_size", "model.text_encoder", "training.objective")

_DRAWN = """sampling.seed sampling.noise_removal sampling.temperature sampling.clip_denoised sampling.threshold
    sampling.negative_label sampling.guidance_low sampling.guidance_high sampling.guidance_rescale
    model.class_conditional"""
_TOLD = "eval.conditional model.class_conditional"
_FLOW = f"eval.ode_method eval.rtol eval.atol eval.t_min {_TOLD}"
_AS_TRAINED = "eval.seed data.uniform_dequantization"

# The keys that a result's computation reads, beside what is built before it.
KEYS: dict[str, tuple[str, ...]] = {
    name: tuple(keys.split())
    for name, keys in {
        "sample": f"sampling.num_samples sampling.augmentation {_DRAWN}",
        "sample from examples": f"sampling.num_samples data.uniform_dequantization {_DRAWN}",
        "ode": f"eval.seed eval.probe eval.probes eval.check_images eval.importance_samples {_FLOW} "
        "model.super_resolution",
        "sde_bound": f"eval.seed eval.draws eval.t_min model.super_resolution {_TOLD}",
        "bound": f"eval.seed eval.terms eval.clip_denoised sampling.variance model.super_resolution {_TOLD}",
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


def keys_of(kind: str, config: ConfigDict) -> tuple[str, ...]:
    """The keys of a kind of result: its own, and the batch's size where one step size serves the examples of a batch.

    Those depend on their neighbours then, to within the solver's tolerance.
    """
    keys = KEYS[kind]
    if kind.startswith("sample"):
        return (*keys, "sampling.batch_size") if steps_together(config) else keys
    together = steps_together(config) if kind == "restore" else config.eval.ode_method in ADAPTIVE
    by_steps = kind == "restore" or "eval.ode_method" in keys
    return (*keys, "eval.batch_size") if by_steps and together else keys


def stamped(job: Job, weights: str, keys: Sequence[str], about: dict[str, Any]) -> tuple[Job, dict[str, Any]]:
    """The job with the config's `keys` alone, and the stamp of what it makes: checkpoint, weights, codec, these keys,
    versions, and `about`."""
    config, path = job.config, job.trained.path
    made_from = {
        "checkpoint": path.name,
        "checkpoint_sha256": job.trained.sha256,
        "weights": weights,
        "codec": _named(job.codec, config),
        **about,
        "config": values(config, keys),
        **({"read_as": values(config, FOREIGN)} if path.suffix != SUFFIX else {}),
        "versions": {name: str(version) for name, version in VERSIONS.items()},
    }
    return replace(job, config=asked(config, keys)), made_from


def about_times(times: Tensor) -> dict[str, Any]:
    """What a stamp says of times."""
    return {"steps": len(times) - 1, "first": times[0].item(), "last": times[-1].item()}


def about_grid(config: ConfigDict, times: Tensor) -> dict[str, Any]:
    """What a stamp says of the times that were sampled on."""
    return {"name": grid_name(config), **about_times(times)}


def about_examples(split: Split, name: str, number: int, text: Text | None = None) -> dict[str, Any]:
    """What a stamp says of the examples, the first `number` of a split, and of their captions' embeddings."""
    about = {"split": name, "images": number, "examples_sha256": split.digest()}
    return about if text is None else {**about, "text_sha256": digest(*text)}


def asked(config: ConfigDict, keys: Sequence[str]) -> ConfigDict:
    """The config with these keys and the harmless ones alone; whoever reads another gets an AttributeError."""
    limited: dict[str, Any] = {}
    for key, value in values(config, (*keys, *HARMLESS)).items():
        section, _, name = key.rpartition(".")
        (limited.setdefault(section, {}) if section else limited)[name] = value
    return ConfigDict(limited).lock()


def values(config: ConfigDict, keys: Sequence[str]) -> dict[str, Any]:
    """{"section.key": value} of some keys, or of all keys of a section, in order."""
    found: dict[str, Any] = {}
    for key in keys:
        section, _, name = key.rpartition(".")
        value = (config[section] if section else config)[name]
        inside = value.to_dict() if isinstance(value, ConfigDict) else None
        found |= {key: value} if inside is None else {f"{key}.{name}": v for name, v in inside.items()}
    return found


def _named(codec: Codec, config: ConfigDict) -> str:
    if isinstance(codec, AutoencoderCodec):
        return f"codes of autoencoder {config.data.autoencoder_sha256}, {codec.statistics}, of {codec.pixels}"
    return repr(codec)
