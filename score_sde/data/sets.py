"""Data sets: a training and a held-out split of uint8 images or float vectors, and the order of batches.

A set that fits in memory is one tensor, which is moved to the device and indexed there; a larger one stays on disk and
is read by index. Which examples form batch `step` depends only on (seed, step): they are places step * batch_size + j
in an endless sequence of permutations, one per epoch, each drawn from (seed, epoch). A resumed run therefore continues
exactly, and every process of a distributed run knows the whole batch and takes its share.

Values are as stored: `codecs.py` scales them. A data set is a function path -> Data and one row in `_BUILT_IN`.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..machine import own_code
from ..machine.devices import sent
from ..noise import DataStream
from . import cifar10, files, recordings
from .files import Stream
from .images import AS_THEY_ARE, Pixels
from .toys import TOYS


@dataclass(frozen=True)
class Split:
    """One split: examples x, uint8 (N, C, H, W), int32 above 256 levels, or float32 (N, *shape), and their labels.

    Labels y are int64 (N,), float32 (N, K) or None.
    `caption` (N,) int64 are indices into the data's `captions`, or None. With `std`, of x's shape, examples are the
    normal laws N(x, std²) of an autoencoder's codes.
    """

    x: Tensor | Stream
    y: Tensor | None = None
    device: torch.device | str = "cpu"
    caption: Tensor | None = None
    std: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.x.shape[1:])

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Examples and labels at `index`, (B,) int64 on the CPU, on this split's device."""
        there = sent(index, self.device)
        x = self.x[there] if isinstance(self.x, Tensor) else self.x[index].to(self.device)
        return x, None if self.y is None else self.y[there]

    def to(self, device: torch.device | str) -> Split:
        """The split with its tensors on a device, where a Stream then puts what it reads."""
        x = self.x.to(device) if isinstance(self.x, Tensor) else self.x
        y, caption, std = (None if v is None else v.to(device) for v in (self.y, self.caption, self.std))
        return Split(x, y, device, caption, std)

    def digest(self, captions: Sequence[str] = ()) -> str:
        """sha256 hex of the examples, labels, caption indices and deviations, the same on any device.

        A Stream counts by its `identity`: names, sizes and times of its files, not their content. Pass the data's
        `captions` to include their words.
        """
        x = self.x
        if isinstance(x, Stream) and not x.identity:
            digests = [digest(x[index]) for index in torch.arange(len(x)).split(1_000)]
            x = replace(x, identity=" ".join(digests))
        fields = [digest(x) if isinstance(x, Tensor) else f"{x.shape} {x.identity}"]
        fields += ["" if v is None else digest(v) for v in (self.y, self.caption, self.std)]
        return hashlib.sha256(repr([*fields, *captions]).encode()).hexdigest()


@dataclass(frozen=True)
class Data:
    """A data set: two splits; `levels` values per pixel, None for floats; `num_classes`, 0 unless labels are classes.

    `class_names` has one name per class, or is (); `empty_classes` are those without a training example. `captions`
    are the distinct captions that the splits' `caption` indexes, or (). `rate` is the sample rate of recordings.
    `notes` are sentences for the user: files that were not read, and how the others were read.
    """

    train: Split
    test: Split
    levels: int | None = 256
    num_classes: int = 0
    captions: tuple[str, ...] = ()
    rate: int | None = None
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    empty_classes: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return self.train.shape

    def to(self, device: torch.device | str) -> Data:
        """The data with both splits on a device."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))


def load_data(
    name: str, path: str | Path | None = None, *, image_size: int | None = None, num_channels: int | None = None,
    length: int | None = None, memory: int = 4 << 30, pixels: Pixels = AS_THEY_ARE,
) -> Data:  # fmt: skip
    """The data set `name`: a row of `_BUILT_IN`, "files" for what you have at `path`, or a function FILE.py:NAME.

    That function returns `Data`, and is called with those of path, image_size, num_channels and length that it has
    arguments for.

    Args:
        path: folder of CIFAR-10's files, downloaded if missing (default `data`); for "files" a folder or zip of images,
            a folder of .wav recordings, a .npy or a .npz. The other sets need none.
        image_size: "files" crops images to their central square and resizes it to this size; other sets shrink theirs
            by an integer factor; None or 0 keeps the size.
        num_channels: "files" converts images to grey (1) or RGB (3); None or 0 follows the first image.
        length: "files" takes this many samples of each recording; None or 0: all must have the same length.
        memory: "files" with a split of more bytes than this stays on disk and is read batch by batch.
        pixels: how "files" reads pixels: their bits, and the background of transparent ones.

    Raises ValueError for an unknown name, with the nearest one, or for wrong files; FileNotFoundError for missing ones.
    """
    path = Path(path).expanduser() if path else None
    if own_code.is_own(name):
        values = {"path": path, "image_size": image_size, "num_channels": num_channels, "length": length}
        return _checked(own_code.make(name, "data.dataset", Data, values), f"data.dataset={name}")
    if name.lower() in _BUILT_IN:
        data = _BUILT_IN[name.lower()](path)
        return _shrunk(data, image_size or None) if len(data.shape) == 3 else data
    if name.lower() == "files":
        if path is None:
            raise ValueError("data.dataset=files needs the path of your data: --config.data.path=PATH")
        return _files(path, image_size or None, num_channels or None, length or None, memory, pixels)
    near = difflib.get_close_matches(name.lower(), DATASETS, n=1, cutoff=0.0)[0]
    raise ValueError(f"there is no data set {name!r}: the nearest name is {near!r}, of {', '.join(DATASETS)}")


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> Tensor:
    """The indices, of n examples, that form batch `step`: (batch_size,) int64.

    Place p = step * batch_size + j is entry p % n of the permutation of epoch p // n: every epoch holds each example
    once, batches run over its end, and none is dropped.
    """
    place = np.arange(step * batch_size, (step + 1) * batch_size)
    epoch = place // n
    entries = [_permutation(n, seed, e)[place[epoch == e] % n] for e in range(epoch[0], epoch[-1] + 1)]
    return torch.from_numpy(np.concatenate(entries))


def batch(
    split: Split, step: int, batch_size: int, seed: int, flip: bool = False, rows: slice = slice(None)
) -> tuple[Tensor, Tensor | None]:
    """Examples, as stored, and labels of batch `step`, on the split's device; `flip` mirrors each with probability 1/2.

    `rows` is the share of this process in the batch of `batch_size`; all shares joined are the whole batch.
    """
    x, y = split[batch_indices(len(split), batch_size, step, seed)[rows]]
    return mirrored(x, step, batch_size, seed, rows) if flip else x, y


def mirrored(x: Tensor, step: int, batch_size: int, seed: int, rows: slice = slice(None)) -> Tensor:
    """Mirror each of the images (B, C, H, W), which are these rows of batch `step`, with probability 1/2.

    Raises ValueError for examples that are not images.
    """
    if x.ndim != 4:
        raise ValueError(f"examples of shape {tuple(x.shape[1:])} cannot be mirrored: set data.random_flip=False")
    chosen = torch.from_numpy(np.random.default_rng([DataStream.FLIPS, seed, step]).random(batch_size) < 0.5)[rows]
    return torch.where(sent(chosen, x.device)[:, None, None, None], x.flip(-1), x)


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([DataStream.ORDER, seed, epoch]).permutation(n)


def digest(*tensors: Tensor) -> str:
    """sha256 hex of tensors: their types, shapes and values."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(f"{tensor.dtype} {tuple(tensor.shape)}\0".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def leave_out(data: Data, captions: Sequence[str]) -> Data:
    """The data without the training examples of these captions; held-out examples stay.

    Raises ValueError for a caption that no example has.
    """
    for caption in captions:
        if caption not in data.captions:
            near = difflib.get_close_matches(caption, data.captions, n=1, cutoff=0.0)
            hint = f"the nearest is {near[0]!r}" if near else "these data have no captions"
            raise ValueError(f"data.leave_out: no example has the caption {caption!r}: {hint}")
    if not captions:
        return data
    assert data.train.caption is not None
    places = torch.tensor([data.captions.index(caption) for caption in captions])
    kept = (~torch.isin(data.train.caption, places)).nonzero()[:, 0]
    return _with_empty_classes(replace(data, train=_subset(data.train, kept)))


def shrink(images: Tensor, factor: int) -> Tensor:
    """Images (N, C, H, W) at 1/factor of their size: means of factor x factor pixels, rounded.

    Raises ValueError unless the factor divides height and width.
    """
    if any(size % factor for size in images.shape[2:]):
        raise ValueError(f"images of {images.shape[2]} x {images.shape[3]} cannot be shrunk by a factor of {factor}")
    return torch.cat([F.avg_pool2d(k.float(), factor).round().to(images.dtype) for k in images.split(5_000)])


def _checked(data: Data, name: str) -> Data:
    """The data, if its splits have examples of one shape and of the type for its levels; else raises ValueError."""
    for split in (data.train, data.test):
        if len(split) == 0 or split.shape != data.shape:
            raise ValueError(f"{name} has {len(split)} examples of shape {split.shape} beside others of {data.shape}")
    kinds = (torch.float32,) if data.levels is None else (torch.uint8, torch.int32)
    kind = data.train[torch.tensor([0])][0].dtype
    if kind not in kinds:
        raise ValueError(f"{name} has {kind} examples and levels={data.levels}: floats are float32, with levels=None")
    return _with_empty_classes(data)


def _shrunk(data: Data, size: int | None) -> Data:
    """The data with square images shrunk to this size, if they are larger."""
    own = data.shape[-1]
    if size is None or size >= own:
        return data
    if own % size:
        raise ValueError(f"data.image_size={size} must divide the images' size, {own}")
    return _changed(data, lambda x: shrink(x, own // size))


def _changed(data: Data, change: Callable[[Any], Tensor]) -> Data:
    """The data with the images of both splits, which are in memory, changed."""
    train, test = (replace(split, x=change(split.x)) for split in (data.train, data.test))
    return replace(data, train=train, test=test)


def _cifar10(path: Path | None) -> Data:
    train, test = cifar10.read(path or Path("data"))
    captions = [[cifar10.caption(name) for name in split.names] or None for split in (train, test)]
    data = Data(Split(train.x, train.y), Split(test.x, test.y), 256, 10, class_names=cifar10.CLASSES)
    return _captioned(data, *captions)


def _captioned(data: Data, train: Sequence[str] | None, test: Sequence[str] | None) -> Data:
    """The data with a caption for every example of a split, or None for a split without captions."""
    number = {caption: i for i, caption in enumerate(sorted({*(train or ()), *(test or ())}))}

    def captioned(split: Split, captions: Sequence[str] | None) -> Split:
        index = None if captions is None else torch.tensor([number[c] for c in captions], dtype=torch.int64)
        return replace(split, caption=index)

    return replace(data, train=captioned(data.train, train), test=captioned(data.test, test), captions=tuple(number))


def _digits(path: Path | None) -> Data:
    """Scikit-learn's 1,797 handwritten digits (Alpaydin and Kaynak 1998), 1 x 8 x 8 of 17 levels; 300 are held out."""
    train, test = _hold_out(Split(*_scikit_learn_digits()), 300)
    return Data(train, test, levels=17, num_classes=10, class_names=tuple("0123456789"))


@lru_cache(1)
def _scikit_learn_digits() -> tuple[Tensor, Tensor]:
    """The digits and their labels, from the file that load_digits reads: the package takes a second to import."""
    package = find_spec("sklearn")
    assert package is not None and package.origin is not None
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    rows = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8))
    return rows[:, :-1].reshape(-1, 1, 8, 8), rows[:, -1].long()


def _digits32(path: Path | None) -> Data:
    """The digits four times as large, 1 x 32 x 32: bilinear (align_corners=False), rounded to the 17 levels."""
    enlarged = partial(F.interpolate, scale_factor=4, mode="bilinear", align_corners=False)
    return _changed(_digits(path), lambda x: enlarged(x.float()).round().to(torch.uint8))


def _toy(name: str) -> Callable[[Path | None], Data]:
    """20,000 training and 4,000 held-out points of a toy; `TOYS` draws more."""
    return lambda path: Data(Split(TOYS[name](20_000, 0)), Split(TOYS[name](4_000, 1)), levels=None)


def _files(
    path: Path, image_size: int | None, num_channels: int | None, length: int | None, memory: int, pixels: Pixels
) -> Data:
    """The data at `path`; `_hold_out` chooses a tenth if the files have no held-out split."""
    rate, sounds = None, recordings.recordings(path) if path.is_dir() else None
    if sounds is not None:
        loaded, rate = recordings.read(path, sounds, length)
    else:
        loaded = files.read(path, image_size, num_channels, memory, pixels)
    train, test = Split(*loaded.train[:2]), Split(*(loaded.test or loaded.train)[:2])
    if loaded.test is None and len(train) < 2:
        raise ValueError(f"{path} holds one example, but training needs at least two, of which one is held out")
    _check_alike(train, test, path)
    classes = [int(y.max()) + 1 for y in (train.y, test.y) if y is not None and not y.is_floating_point()]
    names, notes = loaded.train.class_names, loaded.notes
    if train.y is not None and train.y.is_floating_point():
        notes += (f"labels are {_kind_of_labels(train.y)}: they are not used, because no network here takes them",)
    data = Data(train, test, loaded.levels, max(classes, default=0), (), rate, names, notes)
    data = _captioned(data, loaded.train.captions, (loaded.test or loaded.train).captions)
    if loaded.test is None:
        train, test = _hold_out(data.train, max(1, len(train) // 10))
        data = replace(data, train=train, test=test)
    return _with_empty_classes(data)


def _check_alike(train: Split, test: Split, path: Path) -> None:
    if test.shape != train.shape:
        raise ValueError(
            f"{path} has training examples of shape {train.shape} but held-out ones of shape {test.shape}: save all "
            f"in one shape"
        )
    if _kind_of_labels(train.y) != _kind_of_labels(test.y):
        raise ValueError(
            f"{path} has {_kind_of_labels(train.y)} for training but {_kind_of_labels(test.y)} for the held-out "
            f"examples: label both alike"
        )


def _with_empty_classes(data: Data) -> Data:
    y = data.train.y
    if not data.num_classes or y is None:
        return data
    empty = (torch.bincount(y.cpu(), minlength=data.num_classes) == 0).nonzero()[:, 0].tolist()
    return replace(data, empty_classes=tuple(empty))


def _kind_of_labels(y: Tensor | None) -> str:
    if y is None:
        return "no labels"
    return f"rows of {y.shape[1]} floats" if y.is_floating_point() else "classes"


def _hold_out(split: Split, size: int) -> tuple[Split, Split]:
    """(train, test): test is always the same, the first `size` entries of numpy's permutation with seed 0."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(split)))
    return _subset(split, order[size:]), _subset(split, order[:size])


def _subset(split: Split, index: Tensor) -> Split:
    y, caption = (None if v is None else v[index] for v in (split.y, split.caption))
    if isinstance(split.x, Tensor):
        return Split(split.x[index], y, caption=caption)
    stream, places = split.x, index.tolist()
    identity = f"{digest(index)} of {stream.identity}" if stream.identity else ""
    x = Stream((len(places), *split.shape), lambda rows: stream.read([places[r] for r in rows]), identity)
    return Split(x, y, caption=caption)


_BUILT_IN: dict[str, Callable[[Path | None], Data]] = {
    "cifar10": _cifar10,
    "digits": _digits,
    "digits32": _digits32,
    **{name: _toy(name) for name in TOYS},
}
DATASETS = (*_BUILT_IN, "files")
