"""Data in .npy and .npz files: which array holds examples or labels, its layout, and a check of its values."""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .images import Pixels
from .labels import as_float32

_EXAMPLES, _LABELS = ("arr_0", "x", "images", "data"), ("arr_1", "y", "labels")
_SPLITS = ("x_train", "y_train", "x_test", "y_test")
_CHUNK = 1 << 26  # bytes that are checked together


@dataclass(frozen=True)
class Named:
    """Examples and labels of both splits, and the names of all other arrays."""

    x: np.ndarray
    y: np.ndarray | None = None
    x_test: np.ndarray | None = None
    y_test: np.ndarray | None = None
    unread: tuple[str, ...] = ()


def load_npy(path: Path, memory: int) -> np.ndarray:
    """Load a .npy file; one of more than `memory` bytes is mapped from disk. Raises ValueError for any other file."""
    with _reading(path):
        array = np.load(path, mmap_mode="r" if path.stat().st_size > memory else None, allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} holds several arrays: rename it to .npz")
    return array


def load_npz(path: Path) -> Named:
    """Load a .npz file: x_train, y_train, x_test, y_test, or one of _EXAMPLES and one of _LABELS, or a single array.

    Raises ValueError for any other file, and for one without examples.
    """
    with path.open("rb") as file:
        if file.read(6) == b"\x93NUMPY":
            raise ValueError(f"{path} holds one array: rename it to .npy")
    with _reading(path), np.load(path, allow_pickle=False) as arrays:
        keys = list(arrays.keys())
        chosen = _SPLITS if "x_train" in keys else _examples_and_labels(keys, path)
        loaded = [arrays[key] if key in keys else None for key in chosen]
    return Named(*loaded, unread=tuple(key for key in keys if key not in chosen))  # type: ignore[arg-type, misc]


def examples(array: np.ndarray, num_channels: int | None, where: str) -> tuple[np.ndarray, list[str]]:
    """Examples as pixels (N, C, H, W), uint8 or uint16, or floats (N, *shape), with notes for the user.

    Raises ValueError for any other array, and names the first row that float32 cannot hold.
    """
    if array.ndim < 2 or array.size == 0:
        raise ValueError(f"{where} must hold examples of shape (N, ...), got shape {array.shape}")
    if array.dtype.kind == "u" and array.dtype.itemsize <= 2:
        return _channels_second(array, num_channels, where), []
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{where} holds {array.dtype}: save pixels as uint8 or uint16, vectors as float32")
    _check_floats(array, where)
    known = (1, 3, 4, num_channels)
    if array.ndim == 4 and array.shape[-1] in known and array.shape[1] not in known:
        return np.moveaxis(array, -1, 1), [f"floats of shape {array.shape} are read as images with channels last"]
    if array.ndim == 3 and (array.shape[1] == array.shape[2] or array.shape[1] > 4):
        height, width = array.shape[1:]
        return array, [
            f"floats of shape {array.shape} are read as signals with {height} channels: save grey images as "
            f"(N, 1, {height}, {width})"
        ]
    return array, []


def bits_used(array: np.ndarray, pixels: Pixels, where: str) -> int:
    """The number of bits that the pixels use. Raises ValueError as `Pixels.bits_used` does."""
    return max(pixels.bits_used(rows, 8 * array.dtype.itemsize, where) for rows in _chunks(array))


def _examples_and_labels(keys: Sequence[str], path: Path) -> tuple[str, ...]:
    alone = keys[0] if len(keys) == 1 and keys[0] not in (*_LABELS, *_SPLITS) else None
    x = alone or next((key for key in _EXAMPLES if key in keys), None)
    if x is None:
        raise ValueError(f"{path} holds {', '.join(keys) or 'no arrays'}: name the examples {' or '.join(_EXAMPLES)}")
    return (x, *[key for key in _LABELS if key in keys][:1])


def _check_floats(array: np.ndarray, where: str) -> None:
    row, low, high, error = 0, np.inf, -np.inf, 0.0
    for rows in _chunks(array):
        rounded = as_float32(rows, where, row)
        row += len(rows)
        if array.dtype.itemsize > 4:
            low, high = min(low, rows.min()), max(high, rows.max())
            error = max(error, float(np.abs(rows - rounded).max()))
    if 1e3 * error > high - low > 0:
        raise ValueError(
            f"{where} has values from {low:.9g} to {high:.9g}, which float32 cannot tell apart: subtract their mean"
        )


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    rows = max(1, _CHUNK // max(1, array[0].size * 8))
    for start in range(0, len(array), rows):
        yield array[start : start + rows]


def _channels_second(array: np.ndarray, num_channels: int | None, where: str) -> np.ndarray:
    """Pixels (N, H, W), (N, H, W, C) or (N, C, H, W) as (N, C, H, W); where both fit, the last axis is the channels."""
    if array.ndim == 3:
        return array[:, None]
    if array.ndim != 4:
        raise ValueError(f"{where} holds {array.dtype} of shape {array.shape}, not images: save vectors as float32")
    channels = (num_channels,) if num_channels else (1, 3, 4)
    if array.shape[-1] in channels:
        return np.moveaxis(array, -1, 1)
    if array.shape[1] in channels:
        return array
    raise ValueError(
        f"{where} has shape {array.shape}, and neither its last nor its second axis has "
        f"{' or '.join(map(str, channels))} channels: set --config.data.num_channels=C"
    )


_lzma = getattr(zipfile, "lzma", None)  # None where Python was built without it
# What zipfile, its decompressors and numpy's header raise for damaged, encrypted or unknown files, found by damaging
# thousands of them
DAMAGED: tuple[type[Exception], ...] = (
    zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError, EOFError, OSError, RuntimeError, ValueError,
    SyntaxError, LookupError, TypeError, *(() if _lzma is None else (_lzma.LZMAError,)),
)  # fmt: skip


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever numpy and zipfile raise for a damaged file into one sentence with its name."""
    try:
        yield
    except (MemoryError, OverflowError) as error:
        raise ValueError(f"{path} needs more memory than there is, or is damaged ({error})") from error
    except DAMAGED as error:
        raise ValueError(f"{path} cannot be read as arrays of numbers ({error})") from error
