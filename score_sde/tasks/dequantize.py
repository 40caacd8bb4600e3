"""The mode dequantize, and the file of the flow that it fits."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from torch import Tensor

from ..data.codecs import PixelCodec
from ..data.sets import Data, Split
from ..likelihood.dequantisation import VariationalDequantiser, fit_dequantiser
from ..machine.lock import held
from ..machine.log import keep_log, log
from ..machine.progress import Progress
from ..machine.whole_files import read_header, read_tensors, write_tensors
from ..models.pixel_levels import bits
from . import failures
from .job import Job
from .stamps import KEYS, stamped

FORMAT = "score_sde dequantiser 1"


def command(options: argparse.Namespace, job: Job, images: Data) -> None:
    """--mode dequantize; several processes fit one, in the main process."""
    if job.processes.main:
        with held(job.workdir / "dequantizers", "dequantizing"):
            path = run_dequantizing(job, images.train)
        log.info("dequantizer: %s", path)


def run_dequantizing(job: Job, split: Split) -> Path:
    """Fit the flow that the section dequantizer describes to a checkpoint; return its file.

    Where that file is there, and says that it was made from the same, nothing is fitted again.
    """
    codec, config = job.codec, job.config
    if not isinstance(codec, PixelCodec):
        raise ValueError(f"--mode dequantize is for pixels; data.dataset={config.data.dataset} holds floats")
    about = {"sde": repr(job.model.sde), "examples_sha256": split.digest()}
    target = dequantiser_path(job)
    limited, stamp = stamped(job, config.eval.weights, KEYS["dequantize"], about)
    made_from = json.dumps(stamp)
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

        dequantiser = fit_dequantiser(
            job.model,
            split.to(job.processes.device),
            codec,
            steps=d.n_iters,
            batch_size=d.batch_size,
            lr=d.lr,
            hidden=d.hidden,
            layers=d.layers,
            t_min=e.t_min,
            seed=limited.config.seed,
            progress=progress,
        )
    save_dequantiser(target, dequantiser, checkpoint_sha256=job.trained.sha256, made_from=made_from)
    return target


def save_dequantiser(path: Path, dequantiser: VariationalDequantiser, **about: str) -> None:
    """Write a safetensors file, whole or absent, which says in its header how it was built, and what is in `about`."""
    d = dequantiser
    built = {"levels": d.codec.levels, "centered": d.codec.centered, "shape": d.shape, "hidden": d.hidden}
    built |= {"layers": len(d.couplings), "t_min": d.t_min}
    write_tensors(path, d.state_dict(), {"format": FORMAT, "built": json.dumps(built), **about})


def was_made_from(path: Path, made_from: str) -> bool:
    """Whether there is a dequantiser's file, whole, whose header says this of what it was made from."""
    try:
        return load_dequantiser(path)[1].get("made_from") == made_from
    except (FileNotFoundError, ValueError):
        return False


def load_dequantiser(path: Path) -> tuple[VariationalDequantiser, dict[str, str]]:
    """(dequantiser, its file's header). Raises FileNotFoundError, or ValueError for a file that is none."""
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
    """Where --mode dequantize leaves the flow that it fitted to a checkpoint."""
    return job.workdir / "dequantizers" / f"{job.trained.path.stem}-{job.config.eval.weights}.safetensors"
