"""Your own data: a folder or zip of images, a single image, a .npy or a .npz file.

Images may lie at any depth. Those under `train/` are for training, those under `test/` are held out; without `train/`
all are one set (`folders`). If all images lie in two or more sub-folders, these are the classes, numbered by name. A
`dataset.json` at the top, as in EDM's zips, gives labels instead: {"labels": [["00000/img00000000.png", 6], ...]},
ints or lists of floats, or null. Captions are in text files beside the images, `cat.txt` beside `cat.png`, or in a
`metadata.jsonl` of lines {"file_name": "cat.png", "text": "a cat"}, with names relative to its folder. Nothing here
unpickles a file.
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
from .folders import Layout, classes_of, hidden, lay_out, listing, once_each, root_of
from .images import AS_THEY_ARE, Picture, Pixels, is_grey
from .labels import caption_file, labels_of, named_labels, read_captions, read_dataset_json

IMAGES = images.ENDINGS
_SAMPLE = 64  # images that are checked at once of a set that stays on disk
_LARGEST = 1 << 30  # bytes of one unpacked file in a zip


@dataclass(frozen=True)
class Stream:
    """Examples that stay on disk: `shape` is (N, *example), `read` returns those at the given indices.

    `identity` changes with the files and with how they are read: see `identity_of`. If it is empty, only reading all
    examples shows whether they changed.
    """

    shape: tuple[int, ...]
    read: Callable[[Sequence[int]], Tensor]
    identity: str = ""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.read(index.tolist())


def identity_of(files: Iterable[tuple[str, Path]], *options: object) -> str:
    """sha256 hex of the names, sizes and modification times (ns) of files, in order, and of the reading options."""
    digest = hashlib.sha256(repr(options).encode())
    for name, path in files:
        status = path.stat()
        digest.update(f"{name}\0{status.st_size} {status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


class FileSplit(NamedTuple):
    """Examples of one split, their labels and captions if any, and the names of the classes if these are folders."""

    x: Tensor | Stream
    y: Tensor | None = None
    captions: list[str] | None = None
    class_names: tuple[str, ...] = ()


class FileData(NamedTuple):
    """Data read from a path: `test` is None if the files name no held-out split, `levels` is None for floats.

    `notes` are sentences for the user: files that were not read, and how the others were read.
    """

    train: FileSplit
    test: FileSplit | None = None
    levels: int | None = None
    notes: tuple[str, ...] = ()


def read(
    path: Path, image_size: int | None = None, num_channels: int | None = None, memory: int = 4 << 30,
    pixels: Pixels = AS_THEY_ARE,
) -> FileData:  # fmt: skip
    """Read the data at `path`.

    Images are (N, C, H, W), uint8 up to 256 levels and int32 above, other arrays float32 (N, *shape); labels int64 (N,)
    or float32 (N, K). A split of images or of a .npy stays on disk if it has more than `memory` bytes. Raises
    FileNotFoundError if `path` does not exist, and ValueError for files that cannot be read or do not match.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}: set --config.data.path=PATH")
    if path.is_dir():
        root = root_of(path)
        files = listing(root)
        source = _Images(path, lambda n: (root / n).read_bytes(), lambda n: root / n, image_size, num_channels, pixels)
        return _images(source, files.names, memory, files.skipped, lambda layout: once_each(root, layout))
    ending = path.suffix.lower() if path.is_file() else ""
    if ending in IMAGES:
        single = _Images(path.parent, lambda n: path.read_bytes(), lambda n: path, image_size, num_channels, pixels)
        return _images(single, [path.name], memory)
    if ending == ".zip":
        archive = _Archive(path)
        zipped = _Images(path, archive.read, lambda n: path, image_size, num_channels, pixels)
        return _images(zipped, archive.names, memory)
    if ending == ".npy":
        return _arrays(arrays.Named(arrays.load_npy(path, memory)), num_channels, pixels, path)
    if ending == ".npz":
        return _arrays(arrays.load_npz(path), num_channels, pixels, path)
    raise ValueError(f"{path} is no folder, image, .zip, .npy or .npz file: set --config.data.path to one")


class _Archive:
    """Files of a zip by name. `__init__` and `read` raise ValueError for a damaged, encrypted or oversized one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.archive = zipfile.ZipFile(path)
        except Exception as error:
            raise ValueError(f"{path} is damaged or no zip file ({error})") from error
        self.members: dict[str, zipfile.ZipInfo] = {}
        for member in self.archive.infolist():
            name = posixpath.normpath(member.filename.replace("\\", "/")).lstrip("/")
            if member.is_dir() or any(hidden(folder) for folder in name.split("/")):
                continue
            if name in self.members:
                raise ValueError(f"{path} holds {name} twice: create the zip again")
            self.members[name] = member

    @property
    def names(self) -> list[str]:
        return sorted(self.members)

    def read(self, name: str) -> bytes:
        member = self.members[name]
        if member.file_size > _LARGEST:
            raise ValueError(
                f"{name} in {self.path} has {member.file_size / 2**30:.1f} GiB unpacked, more than 1 GiB: remove it"
            )
        if member.flag_bits & 1:
            raise ValueError(f"{name} in {self.path} is encrypted: create the zip again without a password")
        try:
            return self.archive.read(member)
        except arrays.DAMAGED as error:
            raise ValueError(f"{name} in {self.path} is damaged or cannot be unpacked ({error})") from error


class _First(NamedTuple):
    """The first image of a set, whose shape and bits all others must have."""

    name: str
    shape: tuple[int, ...]
    bits: int
    dtype: type


@dataclass(frozen=True)
class _Images:
    """Encoded images by name, and the size, channels and pixels to decode them to.

    `file` is the path of an image or of its zip; `transparent` and `multi_frame` collect the names of such images.
    """

    path: Path
    contents: Callable[[str], bytes]
    file: Callable[[str], Path]
    size: int | None
    channels: int | None
    pixels: Pixels
    transparent: set[str] = field(default_factory=set)
    multi_frame: set[str] = field(default_factory=set)

    def look(self, name: str, decode: Callable[[bytes], Any]) -> Any:
        """What `decode` makes of an image; its errors get the image's name."""
        content = self.contents(name)
        try:
            return decode(content)
        except ValueError as error:
            raise ValueError(f"{name} in {self.path} {error}") from None

    def open(self, name: str) -> Picture:
        """Decode an image to the wanted channels and background, at its own size and bits."""
        wanted = partial(images.decode, grey=self.channels == 1, background=self.pixels.colour)
        picture: Picture = self.look(name, wanted)
        if picture.transparent:
            self.transparent.add(name)
        if picture.frames > 1:
            self.multi_frame.add(name)
        return picture

    def convert(self, picture: Picture, name: str) -> tuple[np.ndarray, int]:
        """A picture as (C, H, W) of the wanted size and bits, and its number of levels."""
        used = self.pixels.bits_used(picture.array, picture.bits, f"{name} in {self.path}")
        array = images.square(picture.array, self.size, (1 << used) - 1) if self.size else picture.array
        return self.pixels.kept(array, used).transpose(2, 0, 1), self.pixels.levels(used)

    def load(self, names: Sequence[str], first: _First, memory: int) -> Tensor | Stream:
        """The images as a tensor, or as a stream of more than `memory` bytes, of which it checks a sample now."""
        read = partial(self.read, names, first)
        if len(names) * math.prod(first.shape) * np.dtype(first.dtype).itemsize <= memory:
            return read(range(len(names)))
        read(range(0, len(names), max(1, len(names) // _SAMPLE)))
        files = ((name, self.file(name)) for name in names)
        return Stream((len(names), *first.shape), read, identity_of(files, self.size, self.channels, self.pixels))

    def read(self, names: Sequence[str], first: _First, index: Sequence[int]) -> Tensor:
        """The images names[i] for i in `index`, (len(index), *shape); all must match the first."""
        out: np.ndarray = np.empty((len(index), *first.shape), dtype=first.dtype)

        def place(row: int, i: int) -> None:
            out[row] = self._matching(names[i], first)

        with ThreadPoolExecutor() as pool:
            list(pool.map(place, range(len(index)), index))
        return torch.from_numpy(out)

    def _matching(self, name: str, first: _First) -> np.ndarray:
        picture = self.open(name)
        if picture.bits != first.bits and not self.pixels.bits:
            remedy = "read them separately" if self.pixels.mixed else "reduce all to 8 with --config.data.bits=8"
            raise ValueError(
                f"{name} in {self.path} has {picture.bits} bits per number, but {first.name} has {first.bits}: {remedy}"
            )
        image, _ = self.convert(picture, name)
        if image.shape != first.shape:
            (height, width), (first_height, first_width) = image.shape[1:], first.shape[1:]
            raise ValueError(
                f"{name} in {self.path} is {height} x {width}, but {first.name} is {first_height} x {first_width}: "
                f"crop and resize all with --config.data.image_size=SIZE"
            )
        return image

    def notes(self, bits: int, count: int) -> list[str]:
        """Notes for the user on the `count` images that were read so far."""
        notes = []
        if self.transparent:
            notes.append(
                f"{len(self.transparent)} of {count} images have transparent pixels: "
                f"data.background={self.pixels.background} shows through them"
            )
        if self.multi_frame:
            notes.append(f"{len(self.multi_frame)} of {count} images have several frames: only the first is read")
        return notes + _bit_notes(self.pixels, bits)


def _images(
    source: _Images, names: list[str], memory: int, skipped: Mapping[str, int] = MappingProxyType({}),
    narrow: Callable[[Layout], Layout] = lambda layout: layout,
) -> FileData:  # fmt: skip
    if source.channels not in (None, 1, 3):
        raise ValueError(f"images have 1 or 3 channels, got {source.channels}: set --config.data.num_channels=1 or 3")
    where = str(source.path)
    images = [n for n in names if n.lower().endswith(IMAGES)]
    if not images:
        raise ValueError(f"there are no images ({', '.join(IMAGES)}) in {where}{_instead(names)}")
    layout = narrow(lay_out(images, where))
    train, test = layout.train, layout.test
    if source.channels is None:
        source = replace(source, channels=1 if source.look(train[0], is_grey) else 3)
    label_file, label = _dataset_json(source, names, layout)
    class_names: tuple[str, ...] = ()
    folder_notes: list[str] = []
    if not label:
        label, class_names, folder_notes = classes_of(layout, where)
    captions = read_captions(source.contents, names, train + test, where)
    picture = source.open(train[0])
    image, levels = source.convert(picture, train[0])
    first = _First(train[0], image.shape, picture.bits, np.uint8 if levels <= 256 else np.int32)

    def split(chosen: list[str]) -> FileSplit:
        y = named_labels(label, chosen, f"dataset.json in {where}") if label else None
        captions_of = [captions[n] for n in chosen] if captions else None
        return FileSplit(source.load(chosen, first, memory), y, captions_of, class_names)

    splits = split(train), split(test) if test else None
    count = sum(len(s.x) if isinstance(s.x, Tensor) else min(_SAMPLE, len(s.x)) for s in splits if s is not None)
    used = {*images, *(caption_file(n) for n in train + test if captions), label_file}
    rest = [n for n in names if n not in used and not n.endswith("metadata.jsonl")]
    notes = (*layout.notes, *folder_notes, *unread_notes(rest, skipped), *source.notes(picture.bits, count))
    return FileData(*splits, levels, notes)


def _dataset_json(source: _Images, names: Sequence[str], layout: Layout) -> tuple[str, dict[str, Any]]:
    """The dataset.json in the top folder of all images or the nearest above, or "", and its labels by image names."""
    folders = layout.top.split("/")[:-1]
    paths = ("/".join([*folders[:depth], "dataset.json"]) for depth in range(len(folders), -1, -1))
    name = next((path for path in paths if path in names), "")
    labels = read_dataset_json(source.contents(name), f"{name} in {source.path}") if name else {}
    return name, {name.removesuffix("dataset.json") + image: label for image, label in labels.items()}


def unread_notes(names: Sequence[str], skipped: Mapping[str, int]) -> list[str]:
    """A note for the user: how many files of each ending were not read, and what `folders.listing` skipped."""
    endings = Counter(_ending(name) for name in names)
    counts = [f"{count} {kind}" for kinds in (endings, skipped) for kind, count in sorted(kinds.items())]
    return [f"not read: {', '.join(counts)}"] if counts else []


def _ending(name: str) -> str:
    return Path(name).suffix.lower() or "files without ending"


def _instead(names: list[str]) -> str:
    endings = Counter(_ending(n) for n in names)
    return f", only {', '.join(f'{count} {kind}' for kind, count in endings.most_common(3))}" if endings else ""


def _bit_notes(pixels: Pixels, file_bits: int) -> list[str]:
    if file_bits == 8 and not (pixels.bits or pixels.file_bits):
        return []
    used = pixels.file_bits or file_bits
    reduced = f", reduced to {pixels.bits} (data.bits)" if pixels.bits else ""
    return [f"pixels have {used} bits in the files{reduced}: {pixels.levels(used)} levels"]


def _arrays(named: arrays.Named, num_channels: int | None, pixels: Pixels, path: Path) -> FileData:
    kinds = {"float" if x.dtype.kind == "f" else x.dtype.name for x in (named.x, named.x_test) if x is not None}
    if named.x_test is not None and len(kinds) > 1:
        raise ValueError(
            f"{path} has {named.x.dtype} for training but {named.x_test.dtype} held out: save both as one type"
        )

    def load(x: np.ndarray, dtype: type, convert: Callable[[np.ndarray], np.ndarray]) -> Tensor | Stream:
        """An array as a tensor; one that is mapped from disk stays there."""
        if not isinstance(x, np.memmap):
            return torch.from_numpy(np.ascontiguousarray(convert(x), dtype=dtype))
        read = lambda rows: torch.from_numpy(np.ascontiguousarray(convert(x[list(rows)]), dtype))
        return Stream(x.shape, read, identity_of([(path.name, path)], num_channels, pixels))

    def split(x: np.ndarray, y: np.ndarray | None, key: str) -> tuple[FileSplit, int | None, list[str]]:
        where = f"{path}, {key}" if named.x_test is not None else str(path)
        x, notes = arrays.examples(x, num_channels, where)
        labels = None if y is None else labels_of(y, len(x), where)
        if x.dtype.kind == "f":
            return FileSplit(load(x, np.float32, lambda rows: rows), labels), None, notes
        used = arrays.bits_used(x, pixels, where)
        levels = pixels.levels(used)
        values = load(x, np.uint8 if levels <= 256 else np.int32, partial(pixels.kept, used=used))
        return FileSplit(values, labels), levels, notes + _bit_notes(pixels, 8 * x.dtype.itemsize)

    train, levels, notes = split(named.x, named.y, "x_train")
    if named.unread:
        notes.append(f"not read: the arrays {', '.join(named.unread)}")
    test = None if named.x_test is None else split(named.x_test, named.y_test, "x_test")[0]
    return FileData(train, test, levels, tuple(notes))
