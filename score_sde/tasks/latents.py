"""The modes encode, decode and interpolate: the probability flow both ways, with the solver of the section eval."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor

from ..data.codecs import AutoencoderCodec, Codec, PixelCodec
from ..data.sets import Data, Split
from ..likelihood.dequantisation import uniform_numbers
from ..likelihood.latents import decode, encode, slerp
from ..machine.log import log
from ..models.base import ScoreModel
from ..models.guidance import guide
from ..noise import noise_source
from ..ode.integrators import Solver
from .checkpoint import file_hash
from .codes import as_asked
from .conditions import check_number, conditioned, in_turn, labelled, sampled_labels
from .inputs import number_of, own_examples, read_latents, split_of
from .job import Job
from .results import Arrays, channels_last, write_arrays, write_pictures
from .stamps import StampedJob, about_examples, stamped

_SHOWN = 32  # images in the grid of encode, each beside what its latent decodes to


def command(options: argparse.Namespace, job: Job, images: Data) -> None:
    """The modes encode, decode and interpolate."""
    config, m = job.config, job.config.model
    if m.super_resolution or (m.text_encoder and config.eval.conditional):
        what = "smaller images" if m.super_resolution else "captions, unless --config.eval.conditional=false"
        raise ValueError(f"--mode {options.mode} keeps no {what}, which this model is given")
    if options.mode == "decode":
        folder, result = run_decoding(job, options.input)
        log.info("%d latents decoded, NFE %.0f: %s", result["number"], result["nfe"], folder)
        return
    own = options.input is not None
    split = _examples(options, job, images)
    if options.mode == "encode":
        folder, result = run_encoding(job, split, own)
        log.info("%s: %s", round_trip(result), folder)
        return
    between = None if config.interpolation.between == "seeds" else split
    folder, result = run_interpolation(job, between, own)
    unit = " levels of a pixel" if job.codec.levels else ""
    off = f"; the ends are off by {result['ends_rms_error']:.3g}{unit} (RMS)" if between is not None else ""
    log.info("%d rows of %d, NFE %.0f%s: %s", result["pairs"], result["steps"], result["nfe"], off, folder)


def _examples(options: argparse.Namespace, job: Job, images: Data) -> Split:
    """The user's examples, or those of eval.split; for a model of codes their codes."""
    device = job.processes.device
    if options.input is not None:
        return own_examples(options, job.config, images, job.codec, device)
    data = as_asked(images, job.codec, device) if isinstance(job.codec, AutoencoderCodec) else images
    return split_of(data, job.config)


def run_encoding(job: Job, split: Split, own: bool = False) -> tuple[Path, dict[str, Any]]:
    """Latents of a split's first eval.num_images examples, into a folder below latents/.

    `latents.npz` has `latents` (N, *shape), each example's `largest_error` and `rms_error` of decode(encode(x)), in
    levels of pixels, and the `labels` that a class-conditional model was given; the stamp has the errors of all. A grid
    shows the first images, each beside what its latent decodes to. `own` says that the split is that of --input.
    """
    n, source = number_of(split, job.config), "input" if own else job.config.eval.split
    limited = stamped(job, "encode", {"mode": "encode", **about_examples(split, source, n), "number": n, **_flow(job)})
    split = split.to(job.processes.device)

    def work(folder: Path) -> dict[str, Any]:
        batch = partial(_encoded, limited, split)
        joined = limited.in_batches(folder, n, limited.config.eval.batch_size, batch, "encoding")
        if job.processes.main:
            stored = ("latents", "largest_error", "rms_error", "labels")
            write_arrays(folder / "latents.npz", {name: joined[name] for name in stored if name in joined})
            if "pairs" in joined:
                write_pictures(joined["pairs"], job.codec, folder, columns=min(8, len(joined["pairs"])))
        deviation, squares = math.sqrt((joined["latents"].astype(np.float64) ** 2).mean()), joined["rms_error"] ** 2
        result: dict[str, Any] = {"unit": "levels" if job.codec.levels else "data"}
        result |= {"largest_error": float(joined["largest_error"].max()), "rms_error": math.sqrt(squares.mean())}
        result["same_level"] = float(joined["same"].mean()) if "same" in joined else None
        result["latent_deviation"] = deviation / job.model.sde.prior_std
        return {**result, "nfe": joined["nfe"].mean(0).tolist()}

    return limited.once("latents", (source,), "latents.npz", work)


def _encoded(job: StampedJob, split: Split, first: int, count: int) -> Arrays:
    """Latents of the examples first to first + count - 1, and how far they come back."""
    config, codec = job.config, job.codec
    k, y = split[torch.arange(first, first + count)]
    x = as_in_training(k, codec, config, first)
    model = labelled(config, job.model, y)
    z = encode(model, x, **_options(config))
    there = job.model.nfe
    back = decode(model, z, **_options(config))
    error = _in_levels(back - x, codec).flatten(1).double()
    arrays = {
        "latents": z.to(torch.float32).cpu().numpy(),
        "largest_error": error.abs().amax(1).cpu().numpy(),
        "rms_error": error.square().mean(1).sqrt().cpu().numpy(),
        "nfe": np.array([[there, job.model.nfe - there]]),
    }
    if conditioned(config) and y is not None:
        arrays["labels"] = y.cpu().numpy()
    if isinstance(codec, PixelCodec):
        arrays["same"] = (codec.decode(back) == k).double().flatten(1).mean(1).cpu().numpy()
    if codec.pixels is not None:  # a code is shown as what it decodes to
        image = k if isinstance(codec, PixelCodec) else codec.decode(k)
        pairs = torch.stack([image, codec.decode(back)], 1)[: max(0, min(count, _SHOWN - first))]
        arrays["pairs"] = channels_last(pairs.flatten(0, 1))
    return arrays


def round_trip(result: dict[str, Any]) -> str:
    """What an encoding's stamp says of the way there and back, in a line."""
    same = result["same_level"]
    unit = " levels of a pixel" if result["unit"] == "levels" else ""
    return (
        f"{result['number']} latents, of {result['latent_deviation']:.3f} times the prior's deviation; decoded again "
        f"they are off by {result['rms_error']:.3g}{unit} (RMS) and {result['largest_error']:.3g} at most"
        + (f", {100 * same:.4g} % of the pixels have their level" if same is not None else "")
        + f"; NFE {result['nfe'][0]:.0f} there and {result['nfe'][1]:.0f} back"
    )


def run_decoding(job: Job, path: Path) -> tuple[Path, dict[str, Any]]:
    """What the latents of a file decode to, times sampling.temperature, into a folder below decoded/: `samples.npz` as
    --mode sample writes it, and a grid.

    A class-conditional model is given the labels in the file. Raises ValueError where there are none.
    """
    latents, labels = read_latents(path, job.shape)
    if conditioned(job.config) and labels is None:
        raise ValueError(f"{path} holds no labels, and the model is class-conditional: encode with this model, or set "
                         "eval.conditional=False")
    facts = {"mode": "decode", "latents_sha256": file_hash(path), "number": len(latents), **_flow(job)}
    limited = stamped(job, "decode", facts)
    config = limited.config

    def batch(first: int, count: int) -> Arrays:
        z = config.sampling.temperature * latents[first : first + count].to(job.processes.device)
        y = None if labels is None else labels[first : first + count]
        x = decode(labelled(config, limited.model, y), z, **_options(config))
        return {"arr_0": channels_last(job.codec.decode(x))}

    def work(folder: Path) -> dict[str, Any]:
        joined = limited.in_batches(folder, len(latents), config.eval.batch_size, batch, "decoding")
        if job.processes.main:
            write_arrays(folder / "samples.npz", {"arr_0": joined["arr_0"]})
            write_pictures(joined["arr_0"], job.codec, folder)
        return {"nfe": float(joined["nfe"].mean())}

    return limited.once("decoded", (), "samples.npz", work)


def run_interpolation(job: Job, split: Split | None, own: bool = False) -> tuple[Path, dict[str, Any]]:
    """Decoded interpolations on the sphere between pairs of latents, into a folder below interpolations/.

    `interpolations.npz` has `arr_0`, a row for each pair. The latents are those of a split's examples, the first and
    second, and so on, or draws from the prior, latent i from (sampling.seed, i) as in --mode sample; all are times
    sampling.temperature. For examples the stamp has how far the decoded ends are from them.

    A class-conditional model is given the labels of a split's examples, or for draws sampling.labels in turn; between
    two labels its score is interpolated linearly.
    """
    config, e, i = job.config, job.config.eval, job.config.interpolation
    pairs = i.pairs if split is None else min(i.pairs, len(split) // 2)
    if pairs < 1:
        remedy = "add another to --input" if own else f"eval.split={e.split} has no more, so give two, --input FOLDER"
        raise ValueError(f"an interpolation is between two images, and there is one: {remedy}")
    labels = sampled_labels(config) if split is None and conditioned(config) else []
    if split is None:
        number = "the number of ends, twice interpolation.pairs"
        check_number(config.sampling.labels if labels else (), (), 2 * pairs, number)
        between = {"shape": list(job.shape), "labels": labels}
    else:
        between = about_examples(split, "input" if own else e.split, 2 * pairs)
    facts = {"mode": "interpolate", **between, "pairs": pairs, "steps": i.steps, **_flow(job)}
    words = (i.between,)
    limited = stamped(job, "interpolate seeds" if split is None else "interpolate", facts)
    ends = _Ends(limited, None if split is None else split.to(job.processes.device), labels)

    def work(folder: Path) -> dict[str, Any]:
        steps = limited.config.interpolation.steps
        size = max(1, limited.config.eval.batch_size // steps)
        joined = limited.in_batches(folder, pairs, size, ends.rows, "interpolating")
        if job.processes.main:
            rows = joined["arr_0"]
            write_arrays(folder / "interpolations.npz", {"arr_0": rows})
            write_pictures(rows.reshape(-1, *rows.shape[2:]), job.codec, folder, columns=steps)
        result: dict[str, Any] = {"nfe": float(joined["nfe"].mean())}
        if split is not None:
            unit = "levels" if job.codec.levels else "data"
            result |= {"unit": unit, "ends_rms_error": math.sqrt(joined["error"].mean())}
        return result

    return limited.once("interpolations", words, "interpolations.npz", work)


@dataclass(frozen=True)
class _Ends:
    """The ends of interpolations: a split's examples, or draws with these labels in turn."""

    job: StampedJob
    split: Split | None
    labels: list[int]

    def rows(self, first: int, count: int) -> Arrays:
        """The rows first to first + count - 1, decoded."""
        config, codec = self.job.config, self.job.codec
        steps = config.interpolation.steps
        x, y, z = self.latents(2 * first, 2 * count)
        weights = torch.linspace(0, 1, steps, dtype=torch.float64, device=self.job.processes.device)
        between = config.sampling.temperature * slerp(z[0::2], z[1::2], weights).transpose(0, 1)
        model: ScoreModel = self.job.model
        if conditioned(config) and y is not None:
            begin, end = (model.given(label=half.repeat_interleave(steps)) for half in (y[0::2], y[1::2]))
            model = guide(end, begin, weights.repeat(count))
        decoded = decode(model, between.reshape(-1, *self.job.shape), **_options(config)).reshape(between.shape)
        rows = channels_last(codec.decode(decoded.flatten(0, 1)))
        arrays = {"arr_0": rows.reshape(count, steps, *rows.shape[1:])}
        if x is not None:
            error = _in_levels(torch.stack([decoded[:, 0] - x[0::2], decoded[:, -1] - x[1::2]], 1), codec).flatten(1)
            arrays["error"] = error.double().square().mean(1).cpu().numpy()
        return arrays

    def latents(self, first: int, count: int) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """(examples, labels, latents) of the ends first to first + count - 1; draws have no examples."""
        job, config = self.job, self.job.config
        if self.split is None:
            noise = noise_source((count, *job.shape), config.sampling.seed, first, torch.float32, job.processes.device)
            z = job.model.sde.prior((count, *job.shape), noise)
            return None, in_turn(self.labels, first, count) if self.labels else None, z
        k, y = self.split[torch.arange(first, first + count)]
        x = as_in_training(k, job.codec, config, first)
        return x, y, encode(labelled(config, job.model, y), x, **_options(config))


def _flow(job: Job) -> dict[str, Any]:
    """What the stamp says of the ODE, beside its keys of the section eval."""
    return {"sde": repr(job.model.sde), "given_labels": conditioned(job.config)}


def _options(config: ConfigDict) -> dict[str, Any]:
    e = config.eval
    return {"t_min": e.t_min, "solver": Solver(e.ode_method, e.rtol, e.atol)}


def as_in_training(k: Tensor, codec: Codec, config: ConfigDict, first: int) -> Tensor:
    """Stored values as the model saw them in training: with uniform noise within a level, if it was trained so.

    The noise is the likelihood's, from (eval.seed, first + i): without it even surfaces are encoded far from the prior.
    """
    u = None
    if isinstance(codec, PixelCodec) and config.data.uniform_dequantization:
        u = uniform_numbers(tuple(k.shape), 1, config.eval.seed, first)[0].to(k.device)
    return codec.encode(k, u).to(torch.float32)


def _in_levels(difference: Tensor, codec: Codec) -> Tensor:
    """A difference of the model's values in levels of pixels; of vectors as it is."""
    return difference * (codec.levels / codec.width) if codec.levels else difference
