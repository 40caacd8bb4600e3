"""Results on disk: folders that a stamp names, and batches that are there as soon as they are computed.

Every finished batch is a file in the result's folder; a run that was stopped goes on where it was, processes share the
batches, and the last step joins them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import score_sde

from . import signals
from .checkpoint import file_hash
from .codecs import Codec
from .images import first_of_each, histogram, write_grid, write_png
from .parallel import Processes
from .progress import Progress

Arrays = dict[str, np.ndarray]
_SHOWN = 256  # images of a grid
_VERSIONS = {"score_sde": score_sde.__version__, "torch": torch.__version__, "python": platform.python_version()}


def stamp(checkpoint: Path, weights: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What a result was made from: checkpoint, weights, settings and versions; the same stamp means the same result."""
    return {
        "checkpoint": checkpoint.name,
        "checkpoint_sha256": file_hash(checkpoint),
        "weights": weights,
        **settings,
        "versions": {name: str(version) for name, version in _VERSIONS.items()},
    }


def once(
    base: Path,
    label: str,
    made_from: dict[str, Any],
    file: str,
    processes: Processes,
    work: Callable[[Path], dict[str, Any]],
) -> tuple[Path, dict[str, Any]]:
    """A result's folder below `base`, and its stamp: `made_from` and what `work` found.

    work(folder) keeps batches by `in_batches`, and its main process writes `file`. Where file and stamp are there
    nothing is computed again; the stamp comes last, and then the batches go.
    """
    folder = folder_for(base, label, made_from)
    if (folder / "stamp.json").is_file() and (folder / file).is_file():
        return folder, json.loads((folder / "stamp.json").read_text())
    result = {**made_from, **work(folder)}
    if processes.main:
        write_stamp(folder, result)
        for parts in [*folder.rglob("parts")]:
            remove_parts(parts.parent)
        for left in folder.glob(".*.partial"):  # of a process that was killed as it wrote
            left.unlink()
    processes.barrier()
    return folder, result


def folder_for(base: Path, label: str, made_from: dict[str, Any]) -> Path:
    """A folder of its own for each stamp, so that a stopped run finds its batches and another's are never mixed in."""
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:8]
    return base / f"{label}-{digest}"


def in_batches(
    folder: Path,
    total: int,
    batch_size: int,
    processes: Processes,
    compute: Callable[[int, int], Arrays],
    description: str,
    progress: Callable[[Progress, list[Arrays]], None] = lambda bar, done: None,
) -> Arrays:
    """compute(first, count) for all of 0..total-1, each batch kept in a file; return them joined, on every process."""
    parts = folder / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    starts = list(range(0, total, batch_size))
    mine = starts[processes.rank :: processes.world]
    done: list[Arrays] = []
    with Progress(description, len(mine), "batch", shown=processes.main) as bar:
        for first in mine:
            path = parts / f"{first:08d}-{min(batch_size, total - first):06d}.npz"
            arrays = read_arrays(path)
            if arrays is None:
                arrays = compute(first, min(batch_size, total - first))
                write_arrays(path, arrays)
            done.append(arrays)
            progress(bar, done)
            bar.update()
    processes.barrier()
    whole = [read_arrays(parts / f"{first:08d}-{min(batch_size, total - first):06d}.npz") for first in starts]
    processes.barrier()
    return {key: np.concatenate([part[key] for part in whole if part is not None]) for key in (whole[0] or {})}


def read_arrays(path: Path) -> Arrays | None:
    """The arrays of a finished batch, or None where there is none that can be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, KeyError):
        return None
    except Exception as error:  # zipfile.BadZipFile, which numpy lets through for a file that was cut short
        if type(error).__name__ == "BadZipFile":
            return None
        raise


def write_arrays(path: Path, arrays: Arrays) -> None:
    """An .npz that is whole or absent."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    partial.replace(path)


def write_stamp(folder: Path, content: dict[str, Any]) -> None:
    """The last file of a result, whole or absent."""
    partial = folder / f".stamp.json.{os.getpid()}.partial"
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(folder / "stamp.json")


def write_pictures(
    values: np.ndarray,
    codec: Codec,
    folder: Path,
    columns: int | None = None,
    groups: Sequence[int] | None = None,
    names: Sequence[str] = (),
) -> None:
    """`grid.png` of the first 256 images (N, H, W, C), `histogram.png` of points of the plane (N, 2), or recordings.

    Of recordings (N, 1, length) the first 256 are .wav files, 000000.wav and so on, at the sample rate of the data.
    `columns`, `groups` and `names` are `images.grid`'s; of groups the first 256 are as many of each.
    """
    if codec.pixels is not None:
        shown = list(range(min(len(values), _SHOWN))) if groups is None else first_of_each(groups, _SHOWN)
        groups = None if groups is None else [groups[i] for i in shown]
        images = codec.pixels.display(torch.from_numpy(values[shown]).permute(0, 3, 1, 2))
        zoom = max(1, 32 // images.shape[-1])
        write_grid(images, folder / "grid.png", columns, zoom, groups, names)
    elif values.shape[1:] == (2,):
        write_png(histogram(torch.from_numpy(values)), folder / "histogram.png")
    elif codec.rate:
        for i, signal in enumerate(torch.from_numpy(values[:_SHOWN])):
            signals.write(signal, folder / f"{i:06d}.wav", codec.rate)


def channels_last(y: Tensor) -> np.ndarray:
    """Images (N, C, H, W) as (N, H, W, C), those of more than 256 levels as uint16, as files have them; or vectors."""
    array = y.cpu().numpy()
    array = array.astype(np.uint16) if array.dtype == np.int32 else array
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def remove_parts(folder: Path) -> None:
    """Delete the batches of a folder that has been joined, and the folder itself where it held nothing else."""
    for path in (folder / "parts").glob("*"):
        path.unlink()
    (folder / "parts").rmdir()
    if not any(folder.iterdir()):
        folder.rmdir()


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean of independent values and its standard error, NaN for a single one."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)
