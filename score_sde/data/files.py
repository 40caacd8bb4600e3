"""Your own data: a folder or a zip of images, a single one, a .npy or a .npz.

Images may lie at any depth. What lies under `train/` is for training, and under `test/` held out; where there is no
`train/`, all are one set (`folders`). Where all images lie in sub-folders, and these are two or more, the sub-folders
are the classes, numbered by name. A `dataset.json` at the top, as in EDM's zips, gives labels instead: {"labels":
[["00000/img00000000.png", 6], ...]}, ints or lists of floats, or null. Captions are in text files beside the images,
`cat.txt` beside `cat.png`, or in a `metadata.jsonl` of lines {"file_name": "cat.png", "text": "a cat"}, with names from
where it lies. Nothing here unpickles anything.
"""

from __future__ import annotations

import hashlib
import math
import posixpath
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import arrays, images
from .folders import Layout, about_classes, classes_of, hidden, lay_out, listing, once_each, root_of
from .images import AS_THEY_ARE, Picture, Pixels
from .labels import caption_file, labels_of, named_labels, read_captions, read_dataset_json

IMAGES = images.ENDINGS
_SAMPLE = 64  # images that are looked at where a set stays on disk
_LARGEST = 1 << 30  # bytes of a zip's member, unpacked


@dataclass(frozen=True)
class Stream:
    """Examples on disk: `shape` is (N, *example), `read` gives those at some indices, of the type that a part has.

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


class Found(NamedTuple):
    """What lies at a path: `test` is None where nothing says what is held out, `levels` where values are floats.

    `notes` are sentences on what was not read, and on what was made of the rest.
    """

    train: Part
    test: Part | None = None
    levels: int | None = None
    notes: tuple[str, ...] = ()


def read(
    path: Path,
    image_size: int | None = None,
    num_channels: int | None = None,
    memory: int = 4 << 30,
    pixels: Pixels = AS_THEY_ARE,
) -> Found:
    """What lies at `path`.

    Images are (N, C, H, W), uint8 up to 256 levels and int32 above, other arrays float32 (N, *shape); labels int64 (N,)
    or float32 (N, K). A part of more than `memory` bytes stays on disk if it is of images or a .npy.

    Raises FileNotFoundError if nothing is there, and ValueError for what cannot be read or does not fit together.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}: say where your data are, --config.data.path=PATH")
    if path.is_dir():
        root = root_of(path)
        found = listing(root)
        source = _Images(path, lambda n: (root / n).read_bytes(), lambda n: root / n, image_size, num_channels, pixels)
        return _images(source, found.names, memory, found.skipped, lambda layout: once_each(root, layout))
    ending = path.suffix.lower()
    if path.is_file() and ending in IMAGES:
        one = _Images(path.parent, lambda n: path.read_bytes(), lambda n: path, image_size, num_channels, pixels)
        return _images(one, [path.name], memory)
    if path.is_file() and ending == ".zip":
        archive = _Archive(path)
        zipped = _Images(path, archive.read, lambda n: path, image_size, num_channels, pixels)
        return _images(zipped, archive.names, memory)
    if path.is_file() and ending == ".npy":
        return _arrays(arrays.Named(arrays.load_npy(path, memory)), num_channels, pixels, path)
    if path.is_file() and ending == ".npz":
        return _arrays(arrays.load_npz(path), num_channels, pixels, path)
    raise ValueError(f"{path} is neither a folder nor an image, nor a .zip, .npy or .npz file")


class _Archive:
    """A zip's files by name. Raises ValueError, as `read` does, for what is damaged, encrypted or oversized."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.archive = zipfile.ZipFile(path)
        except Exception as error:
            raise ValueError(f"{path} is damaged or no zip file ({error})") from error
        self.members: dict[str, zipfile.ZipInfo] = {}
        for member in self.archive.infolist():
            name = posixpath.normpath(member.filename.replace("\\", "/")).lstrip("/")
            if member.is_dir() or any(hidden(part) for part in name.split("/")):
                continue
            if name in self.members:
                raise ValueError(f"{path} holds {name} twice: pack it anew")
            self.members[name] = member

    @property
    def names(self) -> list[str]:
        return sorted(self.members)

    def read(self, name: str) -> bytes:
        member = self.members[name]
        if member.file_size > _LARGEST:
            raise ValueError(
                f"{name} in {self.path} is {member.file_size / 2**30:.1f} GiB unpacked: nothing here is so large"
            )
        if member.flag_bits & 1:
            raise ValueError(f"{name} in {self.path} is encrypted: pack it anew without a password")
        try:
            return self.archive.read(member)
        except Exception as error:  # among them zlib.error, EOFError, and NotImplementedError for compressions
            raise ValueError(f"{name} in {self.path} is damaged or cannot be unpacked ({error})") from error


class _Like(NamedTuple):
    """What all images of a set have to be like: those that the first one tells."""

    name: str
    shape: tuple[int, ...]
    bits: int
    dtype: type


@dataclass(frozen=True)
class _Images:
    """Encoded images by name, and what they are to become.

    `file` is where one lies, by itself or in a zip; `transparent` and `several` are those met that are so.
    """

    path: Path
    contents: Callable[[str], bytes]
    file: Callable[[str], Path]
    size: int | None
    channels: int | None
    pixels: Pixels
    transparent: set[str] = field(default_factory=set)
    several: set[str] = field(default_factory=set)

    def is_grey(self, name: str) -> bool:
        content = self.contents(name)
        try:
            return images.is_grey(content)
        except ValueError as error:
            raise ValueError(f"{name} in {self.path} {error}") from None

    def open(self, name: str) -> Picture:
        """As the file has it, but for channels and background."""
        content = self.contents(name)
        try:
            found = images.decode(content, self.channels == 1, self.pixels.colour)
        except ValueError as error:
            raise ValueError(f"{name} in {self.path} {error}") from None
        if found.transparent:
            self.transparent.add(name)
        if found.frames > 1:
            self.several.add(name)
        return found

    def finished(self, picture: Picture, name: str) -> tuple[np.ndarray, int]:
        """(C, H, W) of the wanted size and bits, and how many levels that makes."""
        used = self.pixels.bits_used(picture.array, picture.bits, f"{name} in {self.path}")
        array = images.square(picture.array, self.size, (1 << used) - 1) if self.size else picture.array
        return self.pixels.kept(array, used).transpose(2, 0, 1), self.pixels.levels(used)

    def read(self, names: Sequence[str], like: _Like, index: Sequence[int]) -> Tensor:
        """(len(index), *shape): the images names[i], which must all be like the first."""
        out: np.ndarray = np.empty((len(index), *like.shape), dtype=like.dtype)

        def place(row: int, i: int) -> None:
            name = names[i]
            picture = self.open(name)
            if picture.bits != like.bits and not self.pixels.bits:
                remedy = "give them apart" if self.pixels.mixed else "cut all to 8 with --config.data.bits=8"
                raise ValueError(
                    f"{name} in {self.path} has {picture.bits} bits per number, but {like.name} {like.bits}: {remedy}"
                )
            image, _ = self.finished(picture, name)
            if image.shape != like.shape:
                height, width = image.shape[1:]
                raise ValueError(
                    f"{name} in {self.path} is {height} x {width} but others are {like.shape[1]} x {like.shape[2]}: "
                    f"crop and resize all with --config.data.image_size=SIZE"
                )
            out[row] = image

        with ThreadPoolExecutor() as pool:
            list(pool.map(place, range(len(index)), index))
        return torch.from_numpy(out)

    def notes(self, bits: int, of: int) -> list[str]:
        """What is to be said of so many images, which were met by now."""
        found = []
        if self.transparent:
            found.append(
                f"{len(self.transparent)} of {of} images are transparent somewhere: they lie over "
                f"data.background={self.pixels.background}"
            )
        if self.several:
            found.append(f"{len(self.several)} of {of} images have several frames, of which the first is read")
        return found + _about_bits(self.pixels, bits)


def _images(
    source: _Images,
    names: list[str],
    memory: int,
    skipped: Mapping[str, int] = MappingProxyType({}),
    narrow: Callable[[Layout], Layout] = lambda layout: layout,
) -> Found:
    if source.channels not in (None, 1, 3):
        raise ValueError(f"images have 1 channel or 3, got {source.channels}: set --config.data.num_channels to 1 or 3")
    where = str(source.path)
    images = [n for n in names if n.lower().endswith(IMAGES)]
    if not images:
        raise ValueError(f"there are no images ({', '.join(IMAGES)}) in {where}" + _instead(names))
    layout = narrow(lay_out(images, where))
    train, test = layout.train, layout.test
    if source.channels is None:
        source = replace(source, channels=1 if source.is_grey(train[0]) else 3)
    listed = _at_top("dataset.json", names, layout)
    label, unused = _listed(source, listed) if listed else {}, list[str]()
    classes: tuple[str, ...] = ()
    if not label:
        unused, (label, classes) = about_classes(layout), classes_of(layout, where)
    captions = read_captions(source.contents, names, train + test, where)
    first = source.open(train[0])
    image, levels = source.finished(first, train[0])
    like = _Like(train[0], image.shape, first.bits, np.uint8 if levels <= 256 else np.int32)

    def part(chosen: list[str]) -> Part:
        load = partial(source.read, chosen, like)
        on_disk = len(chosen) * math.prod(like.shape) * np.dtype(like.dtype).itemsize > memory
        if on_disk:
            load(range(0, len(chosen), max(1, len(chosen) // _SAMPLE)))
            files = ((name, source.file(name)) for name in chosen)
            identity = identity_of(files, source.size, source.channels, source.pixels)
        x = Stream((len(chosen), *like.shape), load, identity) if on_disk else load(range(len(chosen)))
        y = named_labels(label, chosen, f"dataset.json in {where}") if label else None
        return Part(x, y, [captions[n] for n in chosen] if captions else None, classes)

    parts = part(train), part(test) if test else None
    read_by_now = sum(len(p.x) if isinstance(p.x, Tensor) else min(_SAMPLE, len(p.x)) for p in parts if p is not None)
    beside = {*images, *(caption_file(n) for n in train + test if captions), listed}
    rest = [n for n in names if n not in beside and not n.endswith("metadata.jsonl")]
    notes = (*layout.notes, *unused, *unread(rest, skipped), *source.notes(first.bits, read_by_now))
    return Found(*parts, levels, notes)


def _listed(source: _Images, name: str) -> dict[str, Any]:
    """Labels by name of a dataset.json, whose names are from where it lies."""
    found = read_dataset_json(source.contents(name), f"{name} in {source.path}")
    return {name.removesuffix("dataset.json") + image: label for image, label in found.items()}


def _at_top(name: str, names: Sequence[str], layout: Layout) -> str:
    """The file of this name in the folder that holds all images or in the nearest one above it; "" for none."""
    above = layout.top.split("/")[:-1]
    ways = ("/".join([*above[:depth], name]) for depth in range(len(above), -1, -1))
    return next((way for way in ways if way in names), "")


def unread(names: Sequence[str], skipped: Mapping[str, int]) -> list[str]:
    """A sentence on files of these names, and on what `folders.listing` left out."""
    files = Counter(_ending(name) for name in names)
    parts = [f"{count} {ending}" for ending, count in sorted(files.items())]
    parts += [f"{count} {kind}" for kind, count in sorted(skipped.items())]
    return [f"not read: {', '.join(parts)}"] if parts else []


def _ending(name: str) -> str:
    return Path(name).suffix.lower() or "files without ending"


def _instead(names: list[str]) -> str:
    there = Counter(_ending(n) for n in names)
    return f", but {', '.join(f'{count} {kind}' for kind, count in there.most_common(3))}" if there else ""


def _about_bits(pixels: Pixels, held: int) -> list[str]:
    if held == 8 and not (pixels.bits or pixels.file_bits):
        return []
    used = pixels.file_bits or held
    cut = f", cut to {pixels.bits} (data.bits)" if pixels.bits else ""
    return [f"pixels have {used} bits on file{cut}: {pixels.levels(used)} levels"]


def _arrays(named: arrays.Named, num_channels: int | None, pixels: Pixels, path: Path) -> Found:
    held = [named.x.dtype] + ([] if named.x_test is None else [named.x_test.dtype])
    if len({_kind(dtype) for dtype in held}) > 1:
        raise ValueError(f"{path} has {held[0]} to train on but holds out {held[1]}: save both as one type")

    def held_as(
        x: np.ndarray, dtype: type, cut: Callable[[np.ndarray], np.ndarray] = lambda rows: rows
    ) -> Tensor | Stream:
        """As a tensor; what is mapped from disk stays there."""
        if not isinstance(x, np.memmap):
            return torch.from_numpy(np.ascontiguousarray(cut(x), dtype=dtype))
        identity = identity_of([(path.name, path)], num_channels, pixels)
        return Stream(x.shape, lambda rows: torch.from_numpy(np.ascontiguousarray(cut(x[list(rows)]), dtype)), identity)

    def part(x: np.ndarray, y: np.ndarray | None, key: str) -> tuple[Part, int | None, list[str]]:
        where = f"{path}, {key}" if named.x_test is not None else str(path)
        x, notes = arrays.examples(x, num_channels, where)
        if x.dtype.kind == "f":
            return Part(held_as(x, np.float32), _labels(y, len(x), where)), None, notes
        used = arrays.bits_used(x, pixels, where)
        levels = pixels.levels(used)
        kept = held_as(x, np.uint8 if levels <= 256 else np.int32, partial(pixels.kept, used=used))
        return Part(kept, _labels(y, len(x), where)), levels, notes + _about_bits(pixels, 8 * x.dtype.itemsize)

    train, levels, notes = part(named.x, named.y, "x_train")
    if named.unread:
        notes.append(f"not read: the arrays {', '.join(named.unread)}")
    if named.x_test is None:
        return Found(train, None, levels, tuple(notes))
    test, _, _ = part(named.x_test, named.y_test, "x_test")
    return Found(train, test, levels, tuple(notes))


def _kind(dtype: np.dtype) -> str:
    return "float" if dtype.kind == "f" else dtype.name


def _labels(y: np.ndarray | None, n: int, where: str) -> Tensor | None:
    return None if y is None else labels_of(y, n, where)
