"""Data sets: a training and a held-out split of uint8 images or float vectors, and the order in which batches come.

A set that fits in memory is one tensor, moved whole to the device and indexed there; a larger one stays on disk and is
read by index. Which examples form batch `step` depends on (seed, step) alone: they are places step * batch_size + j of
an endless row of permutations, one per epoch, each drawn from (seed, epoch). So a resumed run goes on exactly, and
every process of a distributed one knows the whole batch and takes its part.

Values are as stored: `codecs.py` scales them. A data set is a function path -> Data and one row in `_BUILT_IN`.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

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
    """Examples x, uint8 (N, C, H, W), int32 where they have more than 256 levels, or float32 (N, *shape).

    Labels y are int64 (N,), float32 (N, K) or none.
    `caption` (N,) int64 are places in the data's `captions`, or none. With `std`, of x's shape, examples are the normal
    laws N(x, std²) of an autoencoder's codes.
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
        where = sent(index, self.device)
        x = self.x[where] if isinstance(self.x, Tensor) else self.x[index].to(self.device)
        return x, None if self.y is None else self.y[where]

    def to(self, device: torch.device | str) -> Split:
        """The same split with its tensors there; what a Stream reads will follow."""
        x = self.x.to(device) if isinstance(self.x, Tensor) else self.x
        y, caption, std = (None if v is None else v.to(device) for v in (self.y, self.caption, self.std))
        return Split(x, y, device, caption, std)

    def digest(self, captions: Sequence[str] = ()) -> str:
        """sha256 hex that changes with the examples, labels, places of captions and deviations, whatever the device.

        Of a Stream it is its `identity`: names, sizes and times of files, not what is in them. `captions` are the
        data's, for whom their words matter, too.
        """
        x = self.x
        if isinstance(x, Stream) and not x.identity:
            each = [digest(x[index]) for index in torch.arange(len(x)).split(1_000)]
            x = replace(x, identity=" ".join(each))
        of = [digest(x) if isinstance(x, Tensor) else f"{x.shape} {x.identity}"]
        of += ["" if v is None else digest(v) for v in (self.y, self.caption, self.std)]
        return hashlib.sha256(repr([*of, *captions]).encode()).hexdigest()


@dataclass(frozen=True)
class Data:
    """A data set: `levels` values per pixel, None for floats; `num_classes` is 0 unless its labels are classes.

    `class_names`, one for each class, are () where nothing names them; `empty_classes` have no example to train on.
    `captions`, each once, are what the splits' `caption` names; () where examples have none.
    `rate` is the sample rate of recordings. `notes` are sentences on files that were not read, and on what was made of
    the others.
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
        """The same set with both splits there."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))


def load_data(
    name: str,
    path: str | Path | None = None,
    *,
    image_size: int | None = None,
    num_channels: int | None = None,
    length: int | None = None,
    memory: int = 4 << 30,
    pixels: Pixels = AS_THEY_ARE,
) -> Data:
    """The data set `name`: a row of `_BUILT_IN`, "files" for what you have at `path`, or a function FILE.py:NAME.

    That function returns `Data`, and is called with those of path, image_size, num_channels and length that it has
    arguments for.

    Args:
        path: where CIFAR-10's files lie, or are put (default `data`); for "files" a folder or a zip of images, a
            folder of .wav recordings, a .npy or a .npz. The others need none.
        image_size: "files" crops images to their central square and resizes it to this, the others shrink theirs by
            an integer factor; None or 0 keeps their size.
        num_channels: "files" makes images grey (1) or RGB (3); None or 0 follows the first image.
        length: "files" takes the first samples of recordings, this many; None or 0: all must have the same length.
        memory: "files" of more bytes than this stay on disk and are read batch by batch.
        pixels: how those of "files" are read: their bits, and what transparent ones lie over.

    Raises ValueError for an unknown name, with the nearest one, and for files that are not what they should be;
    FileNotFoundError for those that are missing.
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
    raise ValueError(f"there is no data set {name!r}: the nearest name is {near!r}, and all are {', '.join(DATASETS)}")


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> Tensor:
    """The examples, of n, in batch `step`: (batch_size,) int64.

    Place p = step * batch_size + j is entry p % n of the permutation of epoch p // n: every epoch holds each example
    once, batches run over its end, and none is dropped.
    """
    place = np.arange(step * batch_size, (step + 1) * batch_size)
    epoch = place // n
    entries = [_permutation(n, seed, e)[place[epoch == e] % n] for e in range(epoch[0], epoch[-1] + 1)]
    return torch.from_numpy(np.concatenate(entries))


def batch(
    split: Split, step: int, batch_size: int, seed: int, flip: bool = False, part: slice = slice(None)
) -> tuple[Tensor, Tensor | None]:
    """Examples, as stored, and labels of batch `step`, on the split's device; `flip` mirrors each with probability 1/2.

    `part` is what this process takes of the batch of `batch_size`: joined, the parts are the whole, mirrored alike.
    """
    x, y = split[batch_indices(len(split), batch_size, step, seed)[part]]
    return mirrored(x, step, batch_size, seed, part) if flip else x, y


def mirrored(x: Tensor, step: int, batch_size: int, seed: int, part: slice = slice(None)) -> Tensor:
    """The images of `part` of batch `step`, (B, C, H, W), each mirrored with probability 1/2.

    Raises ValueError for examples that are no images.
    """
    if x.ndim != 4:
        raise ValueError(f"examples of shape {tuple(x.shape[1:])} are no images to mirror: set data.random_flip=False")
    chosen = torch.from_numpy(np.random.default_rng([DataStream.FLIPS, seed, step]).random(batch_size) < 0.5)[part]
    return torch.where(sent(chosen, x.device)[:, None, None, None], x.flip(-1), x)


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([DataStream.ORDER, seed, epoch]).permutation(n)


def digest(*tensors: Tensor) -> str:
    """sha256 of tensors, their types, shapes and numbers."""
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(f"{tensor.dtype} {tuple(tensor.shape)}\0".encode())
        whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def leave_out(data: Data, captions: Sequence[str]) -> Data:
    """The data without the training examples that have one of these captions; the held-out ones stay.

    Raises ValueError for a caption that no example has.
    """
    for caption in captions:
        if caption not in data.captions:
            near = difflib.get_close_matches(caption, data.captions, n=1, cutoff=0.0)
            hint = f"the nearest is {near[0]!r}" if near else "none has a caption"
            raise ValueError(f"data.leave_out: no example has the caption {caption!r}: {hint}")
    if not captions:
        return data
    assert data.train.caption is not None
    places = torch.tensor([data.captions.index(caption) for caption in captions])
    kept = (~torch.isin(data.train.caption, places)).nonzero()[:, 0]
    return _with_empty_classes(replace(data, train=_subset(data.train, kept)))


def shrink(images: Tensor, factor: int) -> Tensor:
    """Images (N, C, H, W) at 1/factor of their size: means of factor x factor pixels, rounded.

    Raises ValueError where the factor divides height or width not.
    """
    if any(size % factor for size in images.shape[2:]):
        raise ValueError(f"images of {images.shape[2]} x {images.shape[3]} cannot be shrunk by a factor of {factor}")
    parts = [F.avg_pool2d(part.float(), factor).round().to(images.dtype) for part in images.split(5_000)]
    return torch.cat(parts)


def _checked(data: Data, name: str) -> Data:
    """The data, if its splits have examples of one shape, and of the type that its levels ask for."""
    for split in (data.train, data.test):
        if len(split) == 0 or split.shape != data.shape:
            raise ValueError(f"{name} has {len(split)} examples of shape {split.shape} beside others of {data.shape}")
    kinds = (torch.float32,) if data.levels is None else (torch.uint8, torch.int32)
    kind = data.train[torch.tensor([0])][0].dtype
    if kind not in kinds:
        raise ValueError(f"{name} has {kind} examples and levels={data.levels}: floats are float32, with levels=None")
    return _with_empty_classes(data)


def _shrunk(data: Data, size: int | None) -> Data:
    """The data with square images of this size, where it is smaller than theirs."""
    own = data.shape[-1]
    if size is None or size >= own:
        return data
    if own % size:
        raise ValueError(f"data.image_size={size} must divide the images' size, {own}")

    def part(split: Split) -> Split:
        assert isinstance(split.x, Tensor)
        return replace(split, x=shrink(split.x, own // size))

    return replace(data, train=part(data.train), test=part(data.test))


def _cifar10(path: Path | None) -> Data:
    train, test = cifar10.read(path or Path("data"))
    captions = [[cifar10.caption(name) for name in split.names] or None for split in (train, test)]
    data = Data(Split(train.x, train.y), Split(test.x, test.y), 256, 10, class_names=cifar10.CLASSES)
    return _captioned(data, *captions)


def _captioned(data: Data, train: Sequence[str] | None, test: Sequence[str] | None) -> Data:
    """The data with a caption for every example of a split, or none for None."""
    known = {caption: i for i, caption in enumerate(sorted({*(train or ()), *(test or ())}))}

    def part(split: Split, each: Sequence[str] | None) -> Split:
        places = None if each is None else torch.tensor([known[caption] for caption in each], dtype=torch.int64)
        return replace(split, caption=places)

    return replace(data, train=part(data.train, train), test=part(data.test, test), captions=tuple(known))


def _digits(path: Path | None) -> Data:
    """Scikit-learn's 1,797 handwritten digits (Alpaydin and Kaynak 1998), 1 x 8 x 8 of 17 levels; 300 are held out."""
    from sklearn.datasets import load_digits  # slow to import, and needed here alone

    digits = load_digits()
    x = torch.from_numpy(digits.images.astype(np.uint8))[:, None]
    train, test = _hold_out(Split(x, torch.from_numpy(digits.target.astype(np.int64))), 300)
    return Data(train, test, levels=17, num_classes=10, class_names=tuple("0123456789"))


def _digits32(path: Path | None) -> Data:
    """The same four times as large, 1 x 32 x 32: bilinear, with pixels as squares, rounded to the 17 levels."""
    data = _digits(path)

    def enlarged(split: Split) -> Split:
        assert isinstance(split.x, Tensor)
        large = F.interpolate(split.x.float(), scale_factor=4, mode="bilinear", align_corners=False)
        return replace(split, x=large.round().to(torch.uint8))

    return replace(data, train=enlarged(data.train), test=enlarged(data.test))


def _toy(name: str) -> Callable[[Path | None], Data]:
    """20,000 points to train on and 4,000 held out; new ones may be drawn from `TOYS` at will."""
    return lambda path: Data(Split(TOYS[name](20_000, 0)), Split(TOYS[name](4_000, 1)), levels=None)


def _files(
    path: Path, image_size: int | None, num_channels: int | None, length: int | None, memory: int, pixels: Pixels
) -> Data:
    """What is at `path`; where nothing says what is held out, a tenth is, chosen by `_hold_out`."""
    rate, sounds = None, recordings.recordings(path) if path.is_dir() else None
    if sounds is not None:
        found, rate = recordings.read(path, sounds, length)
    else:
        found = files.read(path, image_size, num_channels, memory, pixels)
    train, test = Split(*found.train[:2]), Split(*(found.test or found.train)[:2])
    if found.test is None and len(train) < 2:
        raise ValueError(f"{path} holds one example: at least two are needed, one to train on and one to hold out")
    if test.shape != train.shape:
        raise ValueError(f"{path} has examples of shape {train.shape} to train on but holds out {test.shape}")
    if _kind_of_labels(train.y) != _kind_of_labels(test.y):
        raise ValueError(
            f"{path} has {_kind_of_labels(train.y)} to train on, but {_kind_of_labels(test.y)} for the held-out "
            f"examples: label both alike"
        )
    classes = [int(y.max()) + 1 for y in (train.y, test.y) if y is not None and not y.is_floating_point()]
    names, notes = found.train.class_names, found.notes
    if train.y is not None and train.y.is_floating_point():
        notes += (f"labels are {_kind_of_labels(train.y)}, conditions that no network here takes: they are not used",)
    data = Data(train, test, found.levels, max(classes, default=0), (), rate, names, notes)
    data = _captioned(data, found.train.captions, (found.test or found.train).captions)
    if found.test is None:
        train, test = _hold_out(data.train, max(1, len(train) // 10))
        data = replace(data, train=train, test=test)
    return _with_empty_classes(data)


def _with_empty_classes(data: Data) -> Data:
    y = data.train.y
    if not data.num_classes or y is None:
        return data
    empty = (torch.bincount(y.cpu(), minlength=data.num_classes) == 0).nonzero()[:, 0].tolist()
    return replace(data, empty_classes=tuple(empty))


def _kind_of_labels(y: Tensor | None) -> str:
    if y is None:
        return "no labels"
    return f"{y.shape[1]} floats each" if y.is_floating_point() else "classes"


def _hold_out(split: Split, size: int) -> tuple[Split, Split]:
    """(train, test): test is what the first `size` entries of numpy's permutation with seed 0 name, always the same."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(split)))
    return _subset(split, order[size:]), _subset(split, order[:size])


def _subset(split: Split, index: Tensor) -> Split:
    y, caption = (None if v is None else v[index] for v in (split.y, split.caption))
    if isinstance(split.x, Tensor):
        return Split(split.x[index], y, caption=caption)
    stream, names = split.x, index.tolist()
    identity = f"{digest(index)} of {stream.identity}" if stream.identity else ""
    x = Stream((len(names), *split.shape), lambda rows: stream.read([names[r] for r in rows]), identity)
    return Split(x, y, caption=caption)


_BUILT_IN: dict[str, Callable[[Path | None], Data]] = {
    "cifar10": _cifar10,
    "digits": _digits,
    "digits32": _digits32,
    **{name: _toy(name) for name in TOYS},
}
DATASETS = (*_BUILT_IN, "files")
