"""Atomic writing of files, and files of named tensors that detect any change since they were saved.

A file of tensors is a safetensors file. Its header holds text by name, with two hashes: `tensors_sha256`, of each
tensor's type, shape and numbers (a JSON object by name), and `header_sha256`, of all other text. They detect a byte
that changed on disk, a renamed or lost tensor and an edited header, and the error names it. Equal content gives equal
bytes: tensors are sorted by the size of their type and by name, text by name. Files without hashes, which version 0.1.0
wrote, are read too.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_TENSORS, _HEADER = "tensors_sha256", "header_sha256"
_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_REMEDY = "use another file or create it again"
_DAY = 24 * 60 * 60  # seconds


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """Write a file atomically: it replaces `path` if the block ends without an error, and else leaves no trace."""
    partial = temporary(path)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def temporary(path: Path) -> Path:
    """Name of the unfinished file beside `path`, with the process that writes it: `.NAME.HOST.PID.partial`."""
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.partial")


def remove_leftovers(folder: Path) -> None:
    """Delete `temporary` files in a folder that killed processes left.

    We cannot see whether a process of another host lives: its file is deleted after a day without writing.
    """
    for path in folder.glob(".*.partial"):
        try:
            if _is_leftover(path):
                path.unlink()
        except OSError:  # it was just finished, or another process deleted it, or it belongs to another user
            continue


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write tensors and a header of texts to a file, atomically; equal content gives equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    values = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    text = {**header, _TENSORS: json.dumps({name: _hash(value) for name, value in sorted(values.items())})}
    text[_HEADER] = _header_hash(text)
    # The largest types come first, so that each tensor begins at a multiple of its type's size.
    order = sorted(values, key=lambda name: (-values[name].element_size(), name))
    entries: dict[str, object] = {"__metadata__": dict(sorted(text.items()))}
    end = 0
    for name in order:
        value, begin, end = values[name], end, end + values[name].nbytes
        entries[name] = {"dtype": _TYPES[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(entries, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with whole(path) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in order:
            file.write(_bytes(values[name]))


def read_header(path: Path) -> dict[str, str]:
    """Read the texts in a tensor file's header, without its hashes.

    Raises FileNotFoundError, and ValueError for a file without tensors or with a changed header.
    """
    with _opened(path) as file:
        return {name: text for name, text in _checked_header(path, file).items() if name not in (_TENSORS, _HEADER)}


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Read the tensors whose names begin with `prefix`, on the CPU, by name.

    Raises as `read_header` does, and ValueError for a tensor that was changed, renamed or lost, or is not finite.
    """
    with _opened(path) as file:
        names = sorted(file.keys())
        saved = _saved(path, _checked_header(path, file), names)
        tensors = {name: file.get_tensor(name) for name in names if name.startswith(prefix)}
        for name, value in tensors.items():
            if value.dtype not in _TYPES:
                raise ValueError(f"{path} holds {name} as {value.dtype}, which score_sde never writes; {_REMEDY}")
            if saved is not None and _hash(value) != saved[name]:
                raise ValueError(f"{path} was changed: its tensor {name} is not what was saved; {_REMEDY}")
            if not is_finite(value):
                raise ValueError(f"{path} holds numbers that are not finite in {name}; {_REMEDY}")
        return tensors


def is_finite(value: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor an infinity."""
    # A finite sum has finite terms, and is cheaper than a test of each term; but a sum of finite terms may overflow.
    return not value.is_floating_point() or math.isfinite(value.sum()) or bool(value.isfinite().all())


def is_alive(process: int) -> bool:
    """Whether this host runs a process with this number."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it is another user's
    return True


def _is_leftover(path: Path) -> bool:
    *_, host, number = path.name.removesuffix(".partial").split(".")
    if host != _host() or not number.isdecimal():
        return time.time() - path.stat().st_mtime > _DAY
    return int(number) == os.getpid() or not is_alive(int(number))


def _host() -> str:
    """This host and its namespace of process numbers, because containers have their own."""
    namespace = Path("/proc/self/ns/pid")
    number = f"-{namespace.stat().st_ino}" if namespace.exists() else ""
    return re.sub(r"[^\w-]", "-", socket.gethostname()) + number


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}); {_REMEDY}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}); {_REMEDY}") from error


def _checked_header(path: Path, file: Any) -> dict[str, str]:
    text: dict[str, str] = file.metadata() or {}
    if (_HEADER in text or _TENSORS in text) and text.get(_HEADER) != _header_hash(text):
        raise ValueError(f"{path} was changed: its header is not what was saved; {_REMEDY}")
    return text


def _saved(path: Path, text: Mapping[str, str], names: Sequence[str]) -> dict[str, str] | None:
    """Hashes of the tensors by name; None in an old file without hashes."""
    if _TENSORS not in text:
        return None
    saved: dict[str, str] = json.loads(text[_TENSORS])
    for name in sorted(saved.keys() ^ set(names)):
        raise ValueError(f"{path} was changed: {name} was {'lost' if name in saved else 'not saved'}; {_REMEDY}")
    return saved


def _header_hash(text: Mapping[str, str]) -> str:
    others = sorted((name, value) for name, value in text.items() if name != _HEADER)
    return hashlib.sha256(json.dumps(others).encode()).hexdigest()


def _hash(value: Tensor) -> str:
    digest = hashlib.sha256(f"{_TYPES.get(value.dtype)} {tuple(value.shape)} ".encode())
    digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(value: Tensor) -> memoryview:
    return value.reshape(-1).view(torch.uint8).numpy().data
