"""Errors that end a command, in one sentence with the remedy; mistakes of the program keep their traceback.

A sentence is given for what the package or the operating system refuses, such as a full disk, for too little memory,
a numerical breakdown, and another process of the run that has ended.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..ode.integrators import GaveUp
from .conditions import RESTORING

_MEMORY = re.compile(
    r"can't allocate memory|DefaultCPUAllocator|out of memory|not enough memory|bad_alloc|cannot allocate memory"
    r"|_ALLOC_FAILED|Storage size calculation overflowed",
    re.IGNORECASE,
)
_PEERS = re.compile(
    r"(gloo|nccl|tcpstore).*(closed|reset|refused|time[sd]? ?out|broken pipe|remote)", re.IGNORECASE | re.DOTALL
)
_SHOWN = 200  # characters of a path, of which an absurd one has thousands


def sentence(error: BaseException, mode: str = "", workdir: str = "") -> str | None:
    """The sentence for `error`, which ended --mode `mode` in `workdir`; None for a mistake of the program."""
    for cause in _causes(error):
        code = _of_system(cause)
        if code is not None:
            return _system(cause, code, mode, workdir)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _says(error, RuntimeError, _MEMORY):
        return f"out of memory ({_first_line(error)}): {_less_memory(mode)}"
    lost = (torch.distributed.DistNetworkError, torch.distributed.DistStoreError)
    if isinstance(error, lost) or _says(error, RuntimeError, _PEERS):
        return (f"another process of this run has ended or cannot be reached ({_first_line(error).split('. ')[0]}): "
                "its own message says why, and the same command goes on from what was finished")
    missing = isinstance(error, ImportError) and "pip install" in str(error)  # an extra of the package is not installed
    if missing or isinstance(error, ValueError | OSError | FloatingPointError | GaveUp):
        return str(error)
    return None


def writable(folder: Path) -> Path:
    """The folder, created if missing. Raises OSError now, and not after the work whose result belongs there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    return folder


def thread_failed(failed: threading.ExceptHookArgs) -> None:
    """A `threading.excepthook` without a traceback for errors with a sentence, which the main thread reports."""
    if failed.exc_value is None or sentence(failed.exc_value) is None:
        threading.__excepthook__(failed)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and its cause if it only says that a zip could not be closed after another error."""
    yield error
    if isinstance(error, ValueError) and "close the ZIP file" in str(error) and error.__context__ is not None:
        yield from _causes(error.__context__)


def _of_system(error: BaseException) -> int | None:
    """The operating system's number of an error; safetensors, written in Rust, puts it into its message."""
    if isinstance(error, OSError):
        return error.errno
    number = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    return int(number[1]) if number else None


def _system(error: BaseException, code: int, mode: str, workdir: str) -> str:
    path = getattr(error, "filename2", None) or getattr(error, "filename", None)  # of a file that is put in its place
    path = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
    where = _short(path) or (f"a file in {_short(workdir)}" if workdir else "a file")
    words = {"where": where, "blocked": _short(_blocking(path)) if path else where, "reason": os.strerror(code)}
    words |= {"less": _less_memory(mode), "kept": "what was finished is kept, and the same command goes on from there"}
    name = errno.errorcode.get(code, "")
    known = (text for names, text in _SENTENCES.items() if name in names.split())
    return next(known, "{where}: {reason}; {kept}").format(**words)


# Sentences for the operating system's errors; `blocked` is the file in a folder's place, `less` what saves memory.
_SENTENCES = {
    "ENOSPC EDQUOT EFBIG": "{where} could not be written ({reason}): free some space or give another --workdir; {kept}",
    "EACCES EPERM EROFS": "{where} cannot be used ({reason}): change its permissions, or give another --workdir",
    "EEXIST ENOTDIR": "{blocked} is a file where a folder is needed: move it away, or give another --workdir",
    "EISDIR": "{where} is a folder where a file is needed: move it away, or give another --workdir",
    "ENAMETOOLONG": "the name {where} is too long for the file system: give a shorter one",
    "ENOENT": "{where} is not there: if it was deleted during the run, give the same command again",
    "ENOMEM": "out of memory ({reason}): {less}",
    "EPIPE": "the output was closed before its end, as `| head` does: write to a file instead; {kept}",
    "EMFILE ENFILE": "{where} cannot be opened ({reason}): allow more open files by ulimit -n",
}


def _less_memory(mode: str) -> str:
    """What takes less memory in a mode."""
    fewer = "evaluate fewer at a time, by a smaller --config.eval.batch_size"
    training = (
        "compute the batch in parts (--config.training.accumulate=2), recompute activations "
        "(--config.training.checkpoint_activations=true), halve the precision (--config.training.precision=bfloat16), "
        "or take a smaller --config.training.batch_size"
    )
    restoring = "restore fewer at a time, by a smaller --config.eval.batch_size, with fewer --config.inverse.particles"
    by_mode = {
        "train": training,
        "sample": "draw fewer samples at a time, by a smaller --config.sampling.batch_size",
        "likelihood": f"{fewer}, and take fewer --config.eval.probes, --config.eval.draws or "
        "--config.eval.importance_samples",
        "dequantize": "take a smaller --config.dequantizer.batch_size or --config.dequantizer.hidden",
        "scan": "take smaller examples, by --config.data.image_size or --config.data.length",
        **dict.fromkeys(("encode", "decode", "interpolate"), fewer),
        **dict.fromkeys(RESTORING, restoring),
    }
    other = f"{training}; or draw and evaluate fewer at a time (--config.sampling.batch_size, --config.eval.batch_size)"
    return by_mode.get(mode, other)


def _blocking(path: str) -> Path:
    """The file that stands where `path` needs a folder; os.path is False for too long names."""
    places = reversed([Path(path), *Path(path).parents])
    return next((p for p in places if os.path.exists(p) and not os.path.isdir(p)), Path(path))


def _says(error: BaseException, kind: type[BaseException], words: re.Pattern[str]) -> bool:
    return isinstance(error, kind) and words.search(str(error)) is not None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:_SHOWN] if lines else type(error).__name__


def _short(path: str | Path) -> str:
    text = str(path)
    return text if len(text) <= _SHOWN else f"{text[:60]}...{text[-60:]}"
