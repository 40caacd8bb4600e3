"""Examples in .npy and .npz files: which array is what, of which kind, and that all its values can be meant."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .images import Pixels
from .labels import as_float32

_EXAMPLES, _LABELS = ("arr_0", "x", "images", "data"), ("arr_1", "y", "labels")
_PARTS = ("x_train", "y_train", "x_test", "y_test")
_CHUNK = 1 << 26  # bytes that are looked at together


@dataclass(frozen=True)
class Named:
    """Examples and labels, to train on and held out, and the names of arrays that are neither."""

    x: np.ndarray
    y: np.ndarray | None = None
    x_test: np.ndarray | None = None
    y_test: np.ndarray | None = None
    unread: tuple[str, ...] = ()


def load_npy(path: Path, memory: int) -> np.ndarray:
    """The array of a .npy; of more than `memory` bytes it is mapped from disk. Raises ValueError for no such file."""
    with _reading(path):
        found = np.load(path, mmap_mode="r" if path.stat().st_size > memory else None, allow_pickle=False)
    if not isinstance(found, np.ndarray):
        raise ValueError(f"{path} holds several arrays: name it .npz")
    return found


def load_npz(path: Path) -> Named:
    """Arrays by name: x_train, y_train, x_test, y_test, or one of _EXAMPLES and of _LABELS, or a single array.

    Raises ValueError for no such file, and for one without examples.
    """
    with path.open("rb") as file:
        if file.read(6) == b"\x93NUMPY":
            raise ValueError(f"{path} holds one array: name it .npy")
    with _reading(path), np.load(path, allow_pickle=False) as found:
        keys = list(found.keys())
        chosen = _PARTS if "x_train" in keys else _examples_and_labels(keys, path)
        arrays = [found[key] if key in keys else None for key in chosen]
    return Named(*arrays, unread=tuple(key for key in keys if key not in chosen))  # type: ignore[arg-type, misc]


def examples(array: np.ndarray, num_channels: int | None, where: str) -> tuple[np.ndarray, list[str]]:
    """Pixels as (N, C, H, W), uint8 or uint16, and floats (N, *shape); and what is to be said of them.

    Raises ValueError for anything else, with the first row of floats that float32 cannot hold.
    """
    if array.ndim < 2 or array.size == 0:
        raise ValueError(f"{where} should hold examples (N, ...), got an array of shape {array.shape}")
    if array.dtype.kind == "u" and array.dtype.itemsize <= 2:
        return _channels_second(array, num_channels, where), []
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{where} holds {array.dtype}: save pixels as uint8 or uint16 and vectors as float32")
    _check_floats(array, where)
    if array.ndim == 4 and _channels_are_last(array.shape, num_channels):
        return np.moveaxis(array, -1, 1), [f"floats of shape {array.shape} are read as images with their channels last"]
    if array.ndim == 3 and (array.shape[1] == array.shape[2] or array.shape[1] > 4):
        height, width = array.shape[1:]
        return array, [
            f"floats of shape {array.shape} are read as signals of {height} channels: save grey images as "
            f"(N, 1, {height}, {width})"
        ]
    return array, []


def bits_used(array: np.ndarray, pixels: Pixels, where: str) -> int:
    """How many bits the numbers of pixels use. Raises ValueError as `Pixels.bits_used` does."""
    return max(pixels.bits_used(part, 8 * array.dtype.itemsize, where) for part in _parts(array))


def _examples_and_labels(keys: Sequence[str], path: Path) -> tuple[str, ...]:
    alone = keys[0] if len(keys) == 1 and keys[0] not in (*_LABELS, *_PARTS) else None
    x = alone or next((key for key in _EXAMPLES if key in keys), None)
    if x is None:
        raise ValueError(f"{path} holds {', '.join(keys) or 'nothing'}: name the examples {' or '.join(_EXAMPLES)}")
    return (x, *[key for key in _LABELS if key in keys][:1])


def _check_floats(array: np.ndarray, where: str) -> None:
    row, low, high, off = 0, np.inf, -np.inf, 0.0
    for part in _parts(array):
        single = as_float32(part, where, row)
        row += len(part)
        if array.dtype.itemsize > 4:
            low, high = min(low, part.min()), max(high, part.max())
            off = max(off, float(np.abs(part - single).max()))
    if 1e3 * off > high - low > 0:
        raise ValueError(
            f"{where} has values from {low:.9g} to {high:.9g}, which float32 cannot tell apart: subtract their mean"
        )


def _parts(array: np.ndarray) -> Iterator[np.ndarray]:
    rows = max(1, _CHUNK // max(1, array[0].size * 8))
    for start in range(0, len(array), rows):
        yield array[start : start + rows]


def _channels_are_last(shape: tuple[int, ...], num_channels: int | None) -> bool:
    """Whether floats (N, a, b, c) are images (N, H, W, C) rather than (N, C, H, W), which stay as they are."""
    known = (1, 3, 4, num_channels)
    return shape[-1] in known and shape[1] not in known


def _channels_second(array: np.ndarray, num_channels: int | None, where: str) -> np.ndarray:
    """Pixels (N, H, W), (N, H, W, C) or (N, C, H, W) as the last of these; where both fit, channels are last."""
    if array.ndim == 3:
        return array[:, None]
    if array.ndim != 4:
        raise ValueError(f"{where} holds {array.dtype} of shape {array.shape}, no images: save vectors as float32")
    channels = (num_channels,) if num_channels else (1, 3, 4)
    if array.shape[-1] in channels:
        return np.moveaxis(array, -1, 1)
    if array.shape[1] in channels:
        return array
    raise ValueError(
        f"{where} has shape {array.shape}, with {' or '.join(map(str, channels))} channels neither last nor second: "
        f"say how many there are, --config.data.num_channels=C"
    )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever numpy and zipfile raise for a damaged file, in one sentence with its name."""
    try:
        yield
    except (MemoryError, OverflowError) as error:
        raise ValueError(f"{path} says that it holds more than memory can ({error})") from error
    except Exception as error:  # among them zlib.error, RuntimeError (encrypted) and NotImplementedError (compression)
        raise ValueError(f"{path} cannot be read as arrays of numbers ({error})") from error
