"""What goes with examples: labels in arrays and in `dataset.json`, captions in text files and in `metadata.jsonl`.

Everything that was written by somebody else is checked here, and an error names the file, and the line or the entry.
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
_CLASSES = 10_000  # more than so many, and than there are examples, are none
_ROW = '{"file_name": "cat.png", "text": "a cat"}'
_ENTRIES = '{"labels": [["cat.png", 3], ...]}'

Contents = Callable[[str], bytes]


def labels_of(y: np.ndarray, n: int, where: str) -> Tensor:
    """int64 (N,) of classes or float32 (N, K) of conditions, for n examples.

    Whole numbers are classes, of whatever type, in (N,) or (N, 1); any other floats conditions.
    Raises ValueError, with the first row that is wrong.
    """
    integers, floats = np.issubdtype(y.dtype, np.integer) or y.dtype == bool, np.issubdtype(y.dtype, np.floating)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.shape[:1] != (n,) or not (integers or floats) or y.ndim > (1 if integers else 2) or y.size == 0:
        raise ValueError(f"{where} should hold {n} labels, ints or rows of floats, got {y.dtype} of shape {y.shape}")
    if floats:
        as_float32(y, f"{where}, labels,")
    if integers or (y.ndim == 1 and bool((y == np.round(y)).all())):
        return _classes(y, where)
    return torch.from_numpy(y.reshape(n, -1).astype(np.float32))


def as_float32(x: np.ndarray, where: str, first: int = 0) -> np.ndarray:
    """Floats (N, ...) as float32. Raises ValueError, with the first row, for what is not finite or too large for it.

    `first` is the number of the first row.
    """
    with np.errstate(over="ignore"):
        found = np.ascontiguousarray(x, dtype=np.float32)
    wrong = ~np.isfinite(found)
    if wrong.any():
        row = int(wrong.reshape(len(wrong), -1).any(1).argmax())
        value = x[row][wrong[row]].flat[0] if x.ndim > 1 else x[row]
        why = "which float32 cannot hold" if np.isfinite(value) else "which is not finite"
        raise ValueError(
            f"{where} row {first + row} (from 0), holds {value}, {why}: leave such examples out or mend them"
        )
    return found


def read_dataset_json(content: bytes, where: str) -> dict[str, Any]:
    """{name: label} of EDM's dataset.json, an int or a list of floats each; nothing where it has none.

    Raises ValueError, with the entry, for anything else.
    """
    found = _json(content, where)
    if not isinstance(found, dict):
        raise ValueError(f"{where} should be like {_ENTRIES}, got a {type(found).__name__} at its top")
    listed = found.get("labels")
    if listed is None:
        return {}
    if not isinstance(listed, list):
        raise ValueError(f"{where}: labels should be a list [[name, label], ...], got {_short(listed)}")
    labels: dict[str, Any] = {}
    for i, entry in enumerate(listed):
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise ValueError(f"{where}, entry {i} of labels (from 0), should be [name, label], got {_short(entry)}")
        name, label = _normal(entry[0]), entry[1]
        if not (_is_number(label, int) or (isinstance(label, list) and label and all(_is_number(v) for v in label))):
            raise ValueError(
                f"{where}, entry {i} of labels (from 0), should have an integer or a list of floats for {name}, "
                f"got {_short(label)}"
            )
        if name in labels:
            raise ValueError(f"{where}, entry {i} of labels (from 0), names {name} a second time")
        first = next(iter(labels.values()), label)
        if _length(first) != _length(label):
            raise ValueError(
                f"{where}, entry {i} of labels (from 0), is {_short(label)}, and the first {_short(first)}"
            )
        labels[name] = label
    return labels


def named_labels(label: Mapping[str, Any], names: Sequence[str], where: str) -> Tensor:
    """Labels of the examples of these names, as `labels_of`. Raises ValueError for one that has none."""
    missing = next((n for n in names if n not in label), None)
    if missing is not None:
        raise ValueError(f"{where} has no label for {missing}")
    chosen = [label[n] for n in names]
    floats = isinstance(chosen[0], list)  # also those that are written without a point
    return labels_of(np.array(chosen, dtype=np.float64 if floats else None), len(names), where)


def read_captions(contents: Contents, names: Sequence[str], images: Sequence[str], where: str) -> dict[str, str]:
    """The caption of every image; nothing where none has one.

    Raises ValueError for an image without one, where others have one, and for what cannot be read.
    """
    found: dict[str, str] = {}
    for name in names:
        if name.rsplit("/", 1)[-1] == "metadata.jsonl":
            found |= _metadata(contents(name), name.removesuffix("metadata.jsonl"), f"{name} in {where}")
    beside, there = {n: beside_image(n) for n in images}, set(names)
    found |= {n: _text(contents(t), f"{t} in {where}").strip() for n, t in beside.items() if t in there}
    missing = next((n for n in images if n not in found), None)
    if found and missing is not None:
        raise ValueError(f"{missing} in {where} has no caption, and others have: give it one in {beside[missing]}")
    return found


def beside_image(name: str) -> str:
    """Name of the text file with an image's caption."""
    return name.rsplit(".", 1)[0] + ".txt"


def _classes(y: np.ndarray, where: str) -> Tensor:
    """int64 of whole numbers, which have to be few enough to be classes."""
    limit, low, high = max(_CLASSES, len(y)), int(y.min()), int(y.max())
    if low < 0:
        raise ValueError(f"{where} should number its classes from 0, got label {low} in row {int(y.argmin())} (from 0)")
    if high >= limit:
        raise ValueError(
            f"{where} has the label {high} in row {int(y.argmax())} (from 0), and {len(y)} examples are not of so many "
            f"classes: number them from 0 without gaps"
        )
    return torch.from_numpy(y.astype(np.int64))


def _metadata(content: bytes, folder: str, where: str) -> dict[str, str]:
    """{image: caption} of a metadata.jsonl; rows without a caption are none."""
    found: dict[str, str] = {}
    for number, line in enumerate(_text(content, where).split("\n"), 1):
        if not line.strip():
            continue
        row = _json(line.encode(), f"{where}, line {number}, should be like {_ROW}:")
        if not isinstance(row, dict):
            raise ValueError(f"{where}, line {number}, should be like {_ROW}, got {_short(row)}")
        key = next((key for key in _CAPTIONS if row.get(key) is not None), None)
        if key is None:
            continue
        name, caption = row.get("file_name"), row[key]
        if not isinstance(name, str) or not isinstance(caption, str):
            raise ValueError(f"{where}, line {number}, should be like {_ROW}, got {_short(row)}")
        name = _normal(folder + name)
        if name in found:
            raise ValueError(f"{where}, line {number}, names {name} a second time")
        found[name] = caption
    return found


def _normal(name: str) -> str:
    """A name as somebody else wrote it, with slashes and without ./ in it."""
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
        raise ValueError(f"{where} is not JSON that can be read: it is nested too deeply") from None


def _is_number(value: object, kind: type | tuple[type, ...] = (int, float)) -> bool:
    """Whether it is one that numpy can hold; `bool` and JSON's NaN are none."""
    return isinstance(value, kind) and not isinstance(value, bool) and abs(value) < 2**62  # type: ignore[arg-type]


def _length(label: object) -> int | None:
    return len(label) if isinstance(label, list) else None


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
