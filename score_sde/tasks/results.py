"""Results on disk: folders that a stamp names, and batches that are stored as soon as they are computed.

Example i depends on (seed, i) alone, so batches may have any size, and processes share them. Every finished batch is a
file in the result's folder; a stopped run goes on where it was, and the last step joins them. A joined result is whole,
and a finished one is what its stamp says.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from ..data import recordings
from ..data.codecs import Codec, PixelCodec
from ..machine.lock import held
from ..machine.log import log
from ..machine.parallel import Processes
from ..machine.progress import Progress
from ..machine.whole_files import remove_leftovers, temporary, whole
from .checkpoint import file_hash
from .pictures import first_of_each, grid, histogram, write_png

Arrays = dict[str, np.ndarray]
Work = Callable[[Path], dict[str, Any]]
_SHOWN = 256  # images of a grid


def kept(
    folder: Path, made_from: dict[str, Any], file: str, processes: Processes, work: Work, stamp: str = "stamp.json"
) -> dict[str, Any]:
    """The content of a folder's `stamp`: `made_from`, what `work` returns, and the sha256 of `file`.

    The result is made unless it is there: a finished one, whose file is the one that was stamped. work(folder) keeps
    batches by `in_batches`, and its main process writes `file`; then the stamp is written, and the batches are deleted.

    Raises Busy where another process makes this result, and ValueError where the processes of this run were asked for
    different results, or do not share one folder.
    """
    different = "the processes of this run would make different results"
    processes.check_same(folder.name, different, "give them the same data, files, checkpoint and versions")
    result = processes.agreed(lambda: finished(folder, made_from, file, stamp)[0])
    if result is not None:
        return result
    with ExitStack() as stack:
        processes.agreed(lambda: stack.enter_context(held(folder, f"making {file}")))
        result, wrong = processes.agreed(lambda: finished(folder, made_from, file, stamp))  # another may have made it
        if result is not None:
            return result
        if wrong and processes.main:
            log.warning("warning: %s; it is computed again", wrong)
        _check_shared(folder, processes)
        result = {**made_from, **work(folder)}
        if processes.main:
            content = {**result, "sha256": {file: file_hash(folder / file)}}
            with whole(folder / stamp) as out:
                out.write((json.dumps(content, indent=1) + "\n").encode())
            for parts in [*folder.rglob("parts")]:
                remove_parts(parts.parent)
            remove_leftovers(folder)
        processes.barrier()
    return result


def finished(
    folder: Path, made_from: dict[str, Any], file: str, stamp: str = "stamp.json"
) -> tuple[dict[str, Any] | None, str]:
    """The stamp of a finished result; or None, and what is wrong with the result if there is one."""
    path = folder / stamp
    if not path.is_file():
        return None, ""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        plain = json.loads(json.dumps(made_from))  # as it comes back from a file
        wrong = "" if plain.items() <= content.items() else f"{path} belongs to another result"
    except (ValueError, TypeError, AttributeError):
        content, wrong = {}, f"{path} cannot be read"
    if not wrong and not (folder / file).is_file():
        wrong = f"{folder / file} is gone"
    if not wrong and file_hash(folder / file) != content.get("sha256", {}).get(file):
        wrong = f"{folder / file} is not the file that {path} describes: it was cut short, or replaced"
    return (None if wrong else content), wrong


def folder_for(base: Path, label: str, made_from: dict[str, Any]) -> Path:
    """A folder of its own for each stamp, so that a stopped run finds its batches and another's are never mixed in."""
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]
    return base / f"{label}-{digest}"


def in_batches(
    folder: Path, total: int, batch_size: int, processes: Processes, compute: Callable[[int, int], Arrays],
    description: str, progress: Callable[[Progress, list[Arrays]], None] = lambda bar, done: None,
) -> Arrays:
    """compute(first, count) for all of 0..total-1, each batch kept in a file; return them joined, on every process.

    Raises ValueError, on every process, where one of them misses a batch in the end.
    """
    parts = folder / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    counts = {first: min(batch_size, total - first) for first in range(0, total, batch_size)}
    paths = {first: parts / f"{first:08d}-{count:06d}.npz" for first, count in counts.items()}
    mine = list(counts)[processes.rank :: processes.world]
    done: list[Arrays] = []
    with Progress(description, len(mine), "batch", shown=processes.main) as bar:
        for first in mine:
            arrays = read_arrays(paths[first])
            if arrays is None:
                arrays = compute(first, counts[first])
                write_arrays(paths[first], arrays)
            done.append(Stored(arrays, paths[first]))
            progress(bar, done)
            bar.update()
    processes.barrier()
    batches = [read_arrays(path) for path in paths.values()]
    _check_whole(parts, batches, processes)
    stored = [Stored(batch or {}, path) for batch, path in zip(batches, paths.values())]
    names = stored[0] if stored else ()
    return Stored({name: np.concatenate([batch[name] for batch in stored]) for name in names}, parts)


class Stored(Arrays):
    """The arrays of a file. Raises ValueError, one sentence, for an array that it lacks."""

    def __init__(self, arrays: Arrays, where: Path) -> None:
        super().__init__(arrays)
        self.where = where

    def __missing__(self, name: str) -> np.ndarray:
        raise ValueError(f"{self.where} holds no array {name}, so it is not this command's: delete it, and give the "
                         "command again")


def read_arrays(path: Path) -> Arrays | None:
    """The arrays of a finished batch, or None where there is none that can be read."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, KeyError, BadZipFile):
        return None


def write_arrays(path: Path, arrays: Arrays) -> None:
    """An .npz that is whole or absent."""
    with whole(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def write_pictures(
    values: np.ndarray, codec: Codec, folder: Path, columns: int | None = None, groups: Sequence[int] | None = None,
    names: Sequence[str] = (),
) -> None:
    """Write `grid.png` of images (N, H, W, C), `histogram.png` of points (N, 2), or recordings (N, 1, length) as .wav.

    Only the first 256 are shown, from groups equally many of each. `columns`, `groups` and `names` are `grid`'s.
    """
    if codec.pixels is not None:
        shown = first_of_each([0] * len(values) if groups is None else groups, _SHOWN)
        groups = None if groups is None else [groups[i] for i in shown]
        images = codec.pixels.display(torch.from_numpy(values[shown]).permute(0, 3, 1, 2))
        write_png(grid(images, columns, groups=groups, names=names), folder / "grid.png")
    elif values.shape[1:] == (2,):
        write_png(histogram(torch.from_numpy(values)), folder / "histogram.png")
    elif codec.rate:
        for i, signal in enumerate(torch.from_numpy(values[:_SHOWN])):
            recordings.write(signal, folder / f"{i:06d}.wav", codec.rate)


def write_single_pictures(values: np.ndarray, pixels: PixelCodec, folder: Path) -> None:
    """Write images (N, H, W, C) as 000000.png and so on, where these are missing."""
    for i, image in enumerate(values):
        path = folder / f"{i:06d}.png"
        if not path.is_file():
            write_png(pixels.display(torch.from_numpy(image).permute(2, 0, 1)), path)


def channels_last(y: Tensor) -> np.ndarray:
    """Images (N, C, H, W) as (N, H, W, C), as in files, with uint16 for more than 256 levels; vectors as they are."""
    array = y.cpu().numpy()
    array = array.astype(np.uint16) if array.dtype == np.int32 else array
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def remove_parts(folder: Path) -> None:
    """Delete the batches of a folder that has been joined, and the folder itself if it is empty then."""
    for path in (folder / "parts").glob("*"):
        path.unlink()
    (folder / "parts").rmdir()
    if not any(folder.iterdir()):
        folder.rmdir()


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean of independent values and its standard error, NaN for a single one."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def error_of_mean(each: np.ndarray) -> float:
    """Standard error of the mean of values with independent standard errors."""
    return math.sqrt((each**2).sum()) / each.size


def running_mean(unit: str) -> Callable[[Progress, list[Arrays]], None]:
    """For `in_batches`: it shows the mean of `value`, with its error, over the batches that are done."""

    def progress(bar: Progress, done: list[Arrays]) -> None:
        mean, error = mean_and_error(np.concatenate([arrays["value"] for arrays in done]))
        bar.note(f"{unit} {mean:.3f} ± {error:.3f}")

    return progress


def _check_shared(folder: Path, processes: Processes) -> None:
    """Raise ValueError where a process does not see the main process' folder."""
    if processes.world == 1:
        return
    mark = folder / processes.agreed(lambda: _marked(folder))
    seen = processes.texts(f"{mark.exists()} {socket.gethostname()}")
    if processes.main:
        mark.unlink()
    for text in seen:
        if text.startswith("False"):
            raise ValueError(f"{folder} on {seen[0].split()[1]} is not the folder of that name on {text.split()[1]}: "
                             "all processes write their batches into one, so give --workdir a folder that all hosts "
                             "share")


def _marked(folder: Path) -> str:
    """The name of a new file in the folder."""
    mark = temporary(folder / os.urandom(8).hex())
    mark.touch()
    return mark.name


def _check_whole(parts: Path, batches: Sequence[Arrays | None], processes: Processes) -> None:
    """Raise ValueError, on every process, where one of them misses a batch that was computed."""
    missing = next((i for i, batch in enumerate(batches) if batch is None), None)
    mine = "" if missing is None else f"batch {missing + 1} of {len(batches)} of process {missing % processes.world}"
    for text in processes.texts(mine and f"{mine} (looked for on {socket.gethostname()})"):
        if text:
            raise ValueError(f"{parts} lacks {text}, so the result is not whole: see that all processes work in one "
                             "folder and that nobody deletes from it, and run the same command again; it computes what "
                             "is missing")
