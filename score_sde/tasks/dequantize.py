"""The mode dequantize, the file of the flow that it fits, and the dequantisation that the section eval names."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.codecs import AutoencoderCodec, PixelCodec
from ..data.sets import Data, Split
from ..likelihood.dequantisation import (
    Dequantiser,
    TruncatedNormal,
    Uniform,
    VariationalDequantiser,
    fit_dequantiser,
    truncation_time,
)
from ..machine.lock import held
from ..machine.log import keep_log, log
from ..machine.progress import Progress
from ..machine.whole_files import read_header, read_tensors, write_tensors
from ..models.pixel_levels import bits
from . import failures
from .checkpoint import chosen, file_hash, weights_name
from .job import Job
from .stamps import stamped

FORMAT = "score_sde dequantiser 1"


def command(options: argparse.Namespace, job: Job, images: Data) -> None:
    """--mode dequantize; of several processes the main one fits the flow."""
    if job.processes.main:
        with held(job.workdir / "dequantizers", "dequantizing"):
            path = run_dequantizing(job, images.train)
        log.info("dequantizer: %s", path)


def run_dequantizing(job: Job, split: Split) -> Path:
    """Fit the section dequantizer's flow to a checkpoint, unless its file was made from the same; return the file."""
    codec, config = job.codec, job.config
    if not isinstance(codec, PixelCodec):
        raise ValueError(f"--mode dequantize is for pixels; data.dataset={config.data.dataset} holds floats")
    target = dequantiser_path(job)
    limited = stamped(job, "dequantize", {"sde": repr(job.model.sde), "examples_sha256": split.digest()})
    made_from = json.dumps(limited.made_from)
    keep_log()
    if was_made_from(target, made_from):
        return target
    d, e = limited.config.dequantizer, limited.config.eval
    failures.writable(target.parent)
    with Progress("dequantizer", d.n_iters) as bar:

        def progress(step: int, loss: Tensor) -> None:
            if step % 50 == 0:
                bar.note(f"loss {bits(loss.item(), math.prod(split.shape)):.3f} bits/dim")
            bar.update()

        options: dict[str, Any] = {key: d[key] for key in ("batch_size", "lr", "hidden", "layers")}
        options |= {"steps": d.n_iters, "t_min": e.t_min, "seed": limited.config.seed, "progress": progress}
        dequantiser = fit_dequantiser(job.model, split.to(job.processes.device), codec, **options)
    save_dequantiser(target, dequantiser, checkpoint_sha256=job.trained.sha256, made_from=made_from)
    return target


def save_dequantiser(path: Path, dequantiser: VariationalDequantiser, **texts: str) -> None:
    """Write a dequantiser to a safetensors file, whole or absent; its header says how it was built, and `texts`."""
    d = dequantiser
    built = {"levels": d.codec.levels, "centered": d.codec.centered, "shape": d.shape, "hidden": d.hidden}
    built |= {"layers": len(d.couplings), "t_min": d.t_min}
    write_tensors(path, d.state_dict(), {"format": FORMAT, "built": json.dumps(built), **texts})


def was_made_from(path: Path, made_from: str) -> bool:
    """Whether the file holds a whole dequantiser, whose header has this `made_from`."""
    try:
        return load_dequantiser(path)[1].get("made_from") == made_from
    except (FileNotFoundError, ValueError):
        return False


def load_dequantiser(path: Path) -> tuple[VariationalDequantiser, dict[str, str]]:
    """(dequantiser, its file's header). Raises FileNotFoundError, and ValueError for a file without a dequantiser."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no dequantiser {path}; fit one with --mode dequantize")
    header, tensors = read_header(path), read_tensors(path)
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} holds no dequantiser (format {header.get('format')!r}, not {FORMAT!r})")
    try:
        built = json.loads(header["built"])
        codec, shape = PixelCodec(built.pop("levels"), built.pop("centered")), tuple(built.pop("shape"))
        dequantiser = VariationalDequantiser(codec, shape, **built)
        dequantiser.load_state_dict(tensors)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} does not describe the dequantiser that it holds ({error}); fit it again") from error
    return dequantiser.eval().requires_grad_(False), header


def dequantiser_path(job: Job) -> Path:
    """The file in which --mode dequantize keeps the flow that it fits to a checkpoint."""
    weights = weights_name(chosen(job.config, "eval"))
    return job.workdir / "dequantizers" / f"{job.trained.path.stem}-{weights}.safetensors"


def law_of(job: Job) -> tuple[Dequantiser | None, str, dict[str, Any]]:
    """How eval.dequantization dequantises pixels (None for vectors and codes), in words, and what the stamp adds.

    Raises ValueError where the section eval asks vectors or codes for what only pixels have, and for a flow that was
    fitted to another model, and FileNotFoundError where no flow was fitted.
    """
    e, codec = job.config.eval, job.codec
    if not isinstance(codec, PixelCodec):
        for key, usual in (("dequantization", "uniform"), ("importance_samples", 1), ("heat_map", 0)):
            if e[key] != usual:
                raise ValueError(f"eval.{key}={e[key]} is for pixels, and these data are floats: set it to {usual}")
        coded = isinstance(codec, AutoencoderCodec)
        return None, ", a bound with the autoencoder's reconstruction and entropy" if coded else "", {}
    sentence = f", {e.dequantization.replace('_', ' ')} dequantisation"
    if e.importance_samples > 1:
        sentence += f", {e.importance_samples} importance samples"
    if e.dequantization == "uniform":
        return Uniform(codec, e.t_min), sentence, {}
    if e.dequantization == "truncated_normal":
        t_min = truncation_time(codec, job.model.sde, least=e.t_min)
        return TruncatedNormal(codec, job.model.sde, t_min), sentence, {}
    path = dequantiser_path(job)
    law, header = load_dequantiser(path)
    if header.get("checkpoint_sha256") != job.trained.sha256 or law.t_min != e.t_min or law.codec != codec:
        raise ValueError(f"{path} was fitted to another checkpoint or t_min: run --mode dequantize again")
    return law.to(job.processes.device), sentence, {"dequantizer_sha256": file_hash(path)}
