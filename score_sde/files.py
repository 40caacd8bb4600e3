"""Your own data: a folder or a zip of images, a single one, a .npy or a .npz.

Images may lie at any depth. What lies under `train/` is for training, and under `test/` held out; where there is no
`train/`, all are one set. Where all images lie in sub-folders, and these are two or more, the sub-folders are the
classes, numbered by name. A `dataset.json` at the top, as in EDM's zips, gives labels instead: {"labels":
[["00000/img00000000.png", 6], ...]}, ints or lists of floats, or null. Captions are in text files beside the images,
`cat.txt` beside `cat.png`, or in a `metadata.jsonl` of lines {"file_name": "cat.png", "text": "a cat"}, with names from
where it lies. Nothing here unpickles anything.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_EXAMPLES, _LABELS = ("arr_0", "x", "images", "data"), ("arr_1", "y", "labels")
_PARTS = ("x_train", "y_train", "x_test", "y_test")
_CAPTIONS = ("text", "caption", "prompt")  # keys of metadata.jsonl


@dataclass(frozen=True)
class Stream:
    """Examples on disk: `shape` is (N, *example), `read` gives those at some indices as a uint8 or float32 tensor.

    `identity` changes with the files that they are read from and with what is made of them: see `identity_of`. Where it
    is empty, whoever wants to know has to read them all.
    """

    shape: tuple[int, ...]
    read: Callable[[Sequence[int]], Tensor]
    identity: str = ""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.read(index.tolist())


def identity_of(files: Iterable[tuple[str, Path]], *about: object) -> str:
    """sha256 hex of the names, sizes and modification times (ns) of files, in their order, and of what else is told."""
    whole = hashlib.sha256(repr(about).encode())
    for name, path in files:
        status = path.stat()
        whole.update(f"{name}\0{status.st_size} {status.st_mtime_ns}\0".encode())
    return whole.hexdigest()


class Part(NamedTuple):
    """Examples, the labels and captions that they have, and the classes' names where folders are the classes."""

    x: Tensor | Stream
    y: Tensor | None = None
    captions: list[str] | None = None
    class_names: tuple[str, ...] = ()


def read(
    path: Path, image_size: int | None = None, num_channels: int | None = None, memory: int = 4 << 30
) -> tuple[Part, Part | None]:
    """(train, test) of what lies at `path`; test is None where nothing says what is held out.

    Images are uint8 (N, C, H, W), other arrays float32 (N, *shape); labels int64 (N,) or float32 (N, K). A part of more
    than `memory` bytes stays on disk if it is of images or a .npy.

    Raises FileNotFoundError if nothing is there, and ValueError for what cannot be read or does not fit together.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}: say where your data are, --config.data.path=PATH")
    if path.is_dir():
        root = path.parent if path.name == "train" and (path.parent / "test").is_dir() else path
        found = (Path(where, name) for where, _, inside in os.walk(root, followlinks=True) for name in inside)
        names = [file.relative_to(root).as_posix() for file in found]
        folder = _Images(path, lambda name: (root / name).read_bytes(), image_size, num_channels, lambda n: root / n)
        return _images(folder, names, memory)
    if path.suffix.lower() in IMAGES:
        one = _Images(path.parent, lambda name: path.read_bytes(), image_size, num_channels, lambda name: path)
        return _images(one, [path.name], memory)
    if path.suffix == ".zip":
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is damaged or no zip file ({error})") from error
        zipped = _Images(path, archive.read, image_size, num_channels, lambda name: path)
        return _images(zipped, archive.namelist(), memory)
    if path.suffix == ".npy":
        on_disk = path.stat().st_size > memory
        with _reading(path):
            array = np.load(path, mmap_mode="r" if on_disk else None, allow_pickle=False)
        return Part(_examples(array, num_channels, path)), None
    if path.suffix == ".npz":
        return _npz(path, num_channels)
    raise ValueError(f"{path} is neither a folder nor an image, nor a .zip, .npy or .npz file")


@dataclass(frozen=True)
class _Images:
    """Encoded images by name, and what they are to become; `file` is where one lies, by itself or in a zip."""

    path: Path
    contents: Callable[[str], bytes]
    size: int | None
    channels: int | None
    file: Callable[[str], Path]

    def open(self, name: str) -> Image.Image:
        try:
            image = Image.open(io.BytesIO(self.contents(name)))
            image.load()
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            why = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"  # of that it names our buffer
            raise ValueError(f"{name} in {self.path} cannot be read as an image{why}") from error
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"{name} in {self.path} has more than 8 bits per pixel: save it with 8")
        return ImageOps.exif_transpose(image)

    def decode(self, name: str) -> np.ndarray:
        """uint8 (C, H, W)."""
        image = self.open(name).convert("L" if self.channels == 1 else "RGB")
        if self.size and image.size != (self.size, self.size):
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.crop((left, top, left + side, top + side))
            image = square.resize((self.size, self.size), Image.Resampling.LANCZOS)
        return np.array(image).reshape(image.height, image.width, -1).transpose(2, 0, 1)

    def read(self, names: Sequence[str], shape: tuple[int, ...], index: Sequence[int]) -> Tensor:
        """uint8 (len(index), *shape): the images names[i], which must all have this shape."""
        out = np.empty((len(index), *shape), dtype=np.uint8)

        def place(row: int, i: int) -> None:
            image = self.decode(names[i])
            if image.shape != shape:
                height, width = image.shape[1:]
                raise ValueError(
                    f"{names[i]} in {self.path} is {height} x {width} but others are {shape[1]} x {shape[2]}: crop and "
                    f"resize all with --config.data.image_size=SIZE"
                )
            out[row] = image

        with ThreadPoolExecutor() as pool:
            list(pool.map(place, range(len(index)), index))
        return torch.from_numpy(out)


def _images(source: _Images, names: list[str], memory: int) -> tuple[Part, Part | None]:
    if source.channels not in (None, 1, 3):
        raise ValueError(f"images have 1 channel or 3, got {source.channels}: set --config.data.num_channels to 1 or 3")
    names = sorted(n for n in names if not any(p.startswith((".", "__MACOSX")) for p in n.split("/")))
    images = [n for n in names if n.lower().endswith(IMAGES)]
    train, test = parts_of(images)
    if not train:
        raise ValueError(f"there are no images ({', '.join(IMAGES)}) in {source.path}")
    if source.channels is None:
        grey = source.open(train[0]).mode in ("1", "L", "LA")
        source = replace(source, channels=1 if grey else 3)

    listed = json.loads(source.contents("dataset.json")).get("labels") if "dataset.json" in names else None
    label, classes = (dict(listed), ()) if listed else class_folders(train, test, source.path)
    shape, captions = source.decode(train[0]).shape, _captions(source, names, images)

    def part(chosen: list[str]) -> Part:
        load = partial(source.read, chosen, shape)
        on_disk = len(chosen) * math.prod(shape) > memory
        if on_disk:
            identity = identity_of(((name, source.file(name)) for name in chosen), source.size, source.channels)
        x = Stream((len(chosen), *shape), load, identity) if on_disk else load(range(len(chosen)))
        y = named_labels(label, chosen, source.path) if label else None
        return Part(x, y, [captions[n] for n in chosen] if captions else None, classes)

    return part(train), part(test) if test else None


def parts_of(names: list[str]) -> tuple[list[str], list[str]]:
    """The names under train/ and under test/; all and none where there is no train/."""
    train, test = ([n for n in names if n.startswith(part)] for part in ("train/", "test/"))
    return (train, test) if train else (names, [])


def class_folders(train: list[str], test: list[str], path: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """The class of every image, from the sub-folder it lies in, and their names; nothing where these are no classes."""
    depth = 1 if all(n.startswith("train/") for n in train) else 0
    folder = {n: n.split("/")[depth] for n in train + test if n.count("/") > depth}
    classes = sorted({folder[n] for n in train if n in folder})
    if len(classes) < 2 or any(n not in folder for n in train):
        return {}, ()
    for n in test:
        if folder.get(n) not in classes:
            raise ValueError(f"{n} in {path} lies in none of train/'s class folders, which are {', '.join(classes)}")
    return {n: classes.index(folder[n]) for n in folder}, tuple(classes)


def named_labels(label: Mapping[str, int | list[float]], names: list[str], path: Path) -> Tensor:
    missing = next((n for n in names if n not in label), None)
    if missing is not None:
        raise ValueError(f"dataset.json in {path} has no label for {missing}")
    return _labels(np.array([label[n] for n in names]), len(names), path)


def _captions(source: _Images, names: list[str], images: list[str]) -> dict[str, str]:
    """The caption of every image; nothing where none has one."""
    found: dict[str, str] = {}
    for name in names:
        if name.rsplit("/", 1)[-1] == "metadata.jsonl":
            folder = name.removesuffix("metadata.jsonl")
            for number, line in enumerate(source.contents(name).decode().splitlines(), 1):
                found |= _metadata(line, folder, f"{name} in {source.path}, line {number}")
    beside, there = {n: n.rsplit(".", 1)[0] + ".txt" for n in images}, set(names)
    found |= {n: source.contents(txt).decode().strip() for n, txt in beside.items() if txt in there}
    missing = next((n for n in images if n not in found), None)
    if found and missing is not None:
        raise ValueError(
            f"{missing} in {source.path} has no caption, and others have: give it one in {beside[missing]}"
        )
    return found


def _metadata(line: str, folder: str, where: str) -> dict[str, str]:
    """{image: caption} of a line of metadata.jsonl; nothing of one without a caption."""
    try:
        row = json.loads(line) if line.strip() else {}
        caption = next((row[key] for key in _CAPTIONS if key in row), None)
        return {} if caption is None else {folder + row["file_name"]: str(caption)}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f'{where} should be like {{"file_name": "cat.png", "text": "a cat"}} ({error!r})') from None


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as arrays of numbers ({error})") from error


def _npz(path: Path, num_channels: int | None) -> tuple[Part, Part | None]:
    """Arrays by name: x_train, y_train, x_test, y_test, or one of _EXAMPLES and of _LABELS, or a single array."""
    with _reading(path), np.load(path, allow_pickle=False) as found:
        keys = list(found.keys())
        arrays = {key: found[key] for key in keys if key in (*_EXAMPLES, *_LABELS, *_PARTS) or len(keys) == 1}

    def part(x_key: str, y_key: str | None) -> Part:
        x = _examples(arrays[x_key], num_channels, path)
        return Part(x, _labels(arrays[y_key], len(x), path) if y_key in arrays else None)

    if "x_train" in arrays:
        return part("x_train", "y_train"), part("x_test", "y_test") if "x_test" in arrays else None
    x_key = keys[0] if len(keys) == 1 else next((key for key in _EXAMPLES if key in arrays), None)
    if x_key is None:
        raise ValueError(f"{path} holds {', '.join(keys) or 'nothing'}: name the examples {' or '.join(_EXAMPLES)}")
    return part(x_key, next((key for key in _LABELS if key in arrays and key != x_key), None)), None


def _examples(array: np.ndarray, num_channels: int | None, path: Path) -> Tensor | Stream:
    """uint8 images as (N, C, H, W), floats as float32 (N, *shape); what is mapped from disk stays there."""
    if array.ndim < 2 or len(array) == 0:
        raise ValueError(f"{path} should hold examples (N, ...), got an array of shape {array.shape}")
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{path} holds {array.dtype}: save pixels as uint8 and vectors as float32")
    if array.dtype == np.uint8:
        array = _channels_second(array, num_channels, path)
    dtype = np.uint8 if array.dtype == np.uint8 else np.float32
    if isinstance(array, np.memmap):
        identity = identity_of([(path.name, path)], num_channels)
        return Stream(array.shape, lambda index: _tensor(array[list(index)], dtype), identity)
    return _tensor(array, dtype)


def _channels_second(array: np.ndarray, num_channels: int | None, path: Path) -> np.ndarray:
    """uint8 images (N, H, W), (N, H, W, C) or (N, C, H, W) as the last of these; where both fit, channels are last."""
    if array.ndim == 3:
        return array[:, None]
    if array.ndim != 4:
        raise ValueError(f"{path} holds uint8 of shape {array.shape}, no images: save vectors as float32")
    channels = (num_channels,) if num_channels else (1, 3, 4)
    if array.shape[-1] in channels:
        return np.moveaxis(array, -1, 1)
    if array.shape[1] in channels:
        return array
    raise ValueError(
        f"{path} has shape {array.shape}, with {' or '.join(map(str, channels))} channels neither last nor second: say "
        f"how many there are, --config.data.num_channels=C"
    )


def _labels(y: np.ndarray, n: int, path: Path) -> Tensor:
    """int64 (N,) of classes or float32 (N, K) of conditions."""
    integers = np.issubdtype(y.dtype, np.integer)
    if y.ndim == 2 and y.shape[1] == 1 and integers:
        y = y[:, 0]
    if not integers and y.ndim == 1 and np.issubdtype(y.dtype, np.floating):
        y = y[:, None]
    if len(y) != n or y.ndim != (1 if integers else 2) or not (integers or np.issubdtype(y.dtype, np.floating)):
        raise ValueError(f"{path} should hold {n} labels, ints or rows of floats, got {y.dtype} of shape {y.shape}")
    if integers and y.min() < 0:
        raise ValueError(f"{path} should number its classes from 0, got label {y.min()}")
    return torch.from_numpy(y.astype(np.int64 if integers else np.float32))


def _tensor(array: np.ndarray, dtype: type) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype))
