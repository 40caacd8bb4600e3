"""Labels from arrays and `dataset.json`, captions from text files and `metadata.jsonl`.

Users write these files, so everything is checked here; an error names the file and the line or entry.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CAPTIONS = ("text", "caption", "prompt")  # keys of metadata.jsonl
_CLASSES = 10_000  # labels may be this large, or as large as the number of examples
_ROW = '{"file_name": "cat.png", "text": "a cat"}'
_ENTRIES = '{"labels": [["cat.png", 3], ...]}'

Contents = Callable[[str], bytes]


def labels_of(y: np.ndarray, n: int, where: str) -> Tensor:
    """Labels of n examples: classes, int64 (N,), or conditions, float32 (N, K).

    Whole numbers of any type in (N,) or (N, 1) are classes; all other floats are conditions.
    Raises ValueError and names the first wrong row.
    """
    integers, floats = np.issubdtype(y.dtype, np.integer) or y.dtype == bool, np.issubdtype(y.dtype, np.floating)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.shape[:1] != (n,) or not (integers or floats) or y.ndim > (1 if integers else 2) or y.size == 0:
        raise ValueError(f"{where} must hold {n} labels, ints or rows of floats, got {y.dtype} of shape {y.shape}")
    if floats:
        as_float32(y, f"{where}, labels,")
    if integers or (y.ndim == 1 and bool((y == np.round(y)).all())):
        return _classes(y, where)
    return torch.from_numpy(y.reshape(n, -1).astype(np.float32))


def as_float32(x: np.ndarray, where: str, first: int = 0) -> np.ndarray:
    """Floats (N, ...) as float32; `first` is the number of row 0.

    Raises ValueError and names the first row whose values are not finite or are too large for float32.
    """
    with np.errstate(over="ignore"):
        rounded = np.ascontiguousarray(x, dtype=np.float32)
    wrong = ~np.isfinite(rounded)
    if wrong.any():
        row = int(wrong.reshape(len(wrong), -1).any(1).argmax())
        value = x[row][wrong[row]].flat[0] if x.ndim > 1 else x[row]
        reason = "which float32 cannot hold" if np.isfinite(value) else "which is not finite"
        raise ValueError(f"{where} row {first + row} (from 0), holds {value}, {reason}: remove or repair such examples")
    return rounded


def read_dataset_json(content: bytes, where: str) -> dict[str, Any]:
    """Labels in a dataset.json as EDM writes it: {name: label}, each an int or a list of floats; {} for `null`.

    Raises ValueError and names the wrong entry.
    """
    top = _json(content, where)
    if not isinstance(top, dict):
        raise ValueError(f"{where} must look like {_ENTRIES}, got a {type(top).__name__} at the top")
    entries = top.get("labels")
    if entries is None:
        return {}
    if not isinstance(entries, list):
        raise ValueError(f"{where}: labels must be a list [[name, label], ...], got {_short(entries)}")
    labels: dict[str, Any] = {}
    for i, entry in enumerate(entries):
        place = f"{where}, entry {i} of labels (from 0),"
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise ValueError(f"{place} must be [name, label], got {_short(entry)}")
        name, label = _normal(entry[0]), entry[1]
        if not (_is_number(label, int) or (isinstance(label, list) and label and all(_is_number(v) for v in label))):
            raise ValueError(f"{place} must give {name} an integer or a list of floats, got {_short(label)}")
        if name in labels:
            raise ValueError(f"{place} names {name} a second time")
        first = next(iter(labels.values()), label)
        if np.shape(first) != np.shape(label):
            raise ValueError(f"{place} is {_short(label)}, but the first is {_short(first)}: give all the same length")
        labels[name] = label
    return labels


def named_labels(label: Mapping[str, Any], names: Sequence[str], where: str) -> Tensor:
    """Labels of the named examples, as from `labels_of`. Raises ValueError for an example without a label."""
    missing = next((n for n in names if n not in label), None)
    if missing is not None:
        raise ValueError(f"{where} has no label for {missing}: add one")
    chosen = [label[n] for n in names]
    floats = isinstance(chosen[0], list)  # a list means floats, even when they are written without a point
    return labels_of(np.array(chosen, dtype=np.float64 if floats else None), len(names), where)


def read_captions(contents: Contents, names: Sequence[str], images: Sequence[str], where: str) -> dict[str, str]:
    """Captions of images, {name: caption}; {} if no image has one.

    Raises ValueError for an image without a caption where others have one, and for files that cannot be read.
    """
    caption: dict[str, str] = {}
    for name in names:
        if name.rsplit("/", 1)[-1] == "metadata.jsonl":
            caption |= _metadata(contents(name), name.removesuffix("metadata.jsonl"), f"{name} in {where}")
    text_file, existing = {n: caption_file(n) for n in images}, set(names)
    caption |= {n: _text(contents(t), f"{t} in {where}").strip() for n, t in text_file.items() if t in existing}
    missing = next((n for n in images if n not in caption), None)
    if caption and missing is not None:
        raise ValueError(f"{missing} in {where} has no caption, but other images do: write one in {text_file[missing]}")
    return caption


def caption_file(name: str) -> str:
    """Name of the text file with the caption of an image."""
    return name.rsplit(".", 1)[0] + ".txt"


def _classes(y: np.ndarray, where: str) -> Tensor:
    """Whole numbers as classes, int64; raises ValueError for a number too large to be a class."""
    limit, low, high = max(_CLASSES, len(y)), int(y.min()), int(y.max())
    if low < 0:
        raise ValueError(f"{where} must number its classes from 0, got label {low} in row {int(y.argmin())} (from 0)")
    if high >= limit:
        raise ValueError(
            f"{where} has the label {high} in row {int(y.argmax())} (from 0), too large for a class of {len(y)} "
            f"examples: number the classes from 0 without gaps"
        )
    return torch.from_numpy(y.astype(np.int64))


def _metadata(content: bytes, folder: str, where: str) -> dict[str, str]:
    """Captions in a metadata.jsonl, {image: caption}; rows without a caption are ignored."""
    captions: dict[str, str] = {}
    for number, line in enumerate(_text(content, where).split("\n"), 1):
        if not line.strip():
            continue
        row = _json(line.encode(), f"{where}, line {number}, must look like {_ROW}:")
        if not isinstance(row, dict):
            raise ValueError(f"{where}, line {number}, must look like {_ROW}, got {_short(row)}")
        key = next((key for key in _CAPTIONS if row.get(key) is not None), None)
        if key is None:
            continue
        name, caption = row.get("file_name"), row[key]
        if not isinstance(name, str) or not isinstance(caption, str):
            raise ValueError(f"{where}, line {number}, must look like {_ROW}, got {_short(row)}")
        name = _normal(folder + name)
        if name in captions:
            raise ValueError(f"{where}, line {number}, names {name} a second time")
        captions[name] = caption
    return captions


def _normal(name: str) -> str:
    """A file name from a user's file, with slashes and without ./ in it."""
    return posixpath.normpath(name.replace("\\", "/"))


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{where}, line {line}, is not UTF-8 (byte 0x{content[error.start]:02x}): save it as UTF-8"
        ) from None


def _json(content: bytes, where: str) -> Any:
    try:
        return json.loads(_text(content, where))
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON (line {error.lineno}, column {error.colno}: {error.msg})") from None
    except RecursionError:
        raise ValueError(f"{where} cannot be read: its JSON is nested too deeply") from None


def _is_number(value: object, kind: type | tuple[type, ...] = (int, float)) -> bool:
    """Whether a value is a number that numpy can hold; `bool` and JSON's NaN are not."""
    return isinstance(value, kind) and not isinstance(value, bool) and abs(value) < 2**62  # type: ignore[arg-type]


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
