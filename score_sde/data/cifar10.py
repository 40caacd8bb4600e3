"""CIFAR-10 (Krizhevsky 2009) from its official files: 50,000 training and 10,000 test images, 3 x 32 x 32, ten classes.

It reads both official layouts, from folders or directly from their archives. Files of the `python` version are pickled
dicts with arrays written by Python 2. A pickle can call any function, so our unpickler only calls those that rebuild
arrays. Files of the `binary` version are rows of 3073 bytes: a label, then the red, green and blue planes.
"""

from __future__ import annotations

import _codecs
import hashlib
import io
import pickle
import tarfile
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..machine.progress import Progress
from ..machine.whole_files import remove_leftovers, whole

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
MD5 = "c58f30108f718f92721af3b95e74349a"

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")
_ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")
_TRAIN, _TEST = tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",)


class Images(NamedTuple):
    """Images uint8 (N, 3, 32, 32), labels int64 (N,), and the file names; the binary version has no names."""

    x: Tensor
    y: Tensor
    names: list[str]


def caption(name: str) -> str:
    """A caption from a file name: "a tabby cat" from `tabby_cat_s_000001.png`, "an airbus" from `airbus_s_...`."""
    noun = name.rsplit("_s_", 1)[0].replace("_", " ").lower()
    vowel = noun[:1] in "aeiou" and not noun.startswith(("eu", "uni"))  # by sound: a european elk
    return f"{'an' if vowel else 'a'} {noun}"


def read(path: Path, url: str = URL, md5: str = MD5) -> tuple[Images, Images]:
    """Read CIFAR-10, (train, test), from `path`: an official folder or archive, or a folder that holds one.

    If the folder is missing or holds neither, the archive is downloaded into it. Raises FileNotFoundError if files are
    missing and cannot be downloaded, ValueError if they are damaged or wrong.
    """
    source = _find(path)
    if source is None:
        if path.name.endswith((".gz", ".tgz", ".tar")):
            raise FileNotFoundError(f"there is no file {path}: download it from {url}")
        source = path / _ARCHIVES[0]
        download(url, source, md5)
    contents = _folder(source) if source.is_dir() else _archive(source)
    return _images(contents, source, _TRAIN), _images(contents, source, _TEST)


def download(url: str, target: Path, md5: str) -> None:
    """Download `url` to `target` with a progress bar; the file appears there only when complete and its md5 is right.

    Raises FileNotFoundError, with what to put where, if the address cannot be reached, ValueError for a wrong md5.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent)
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with urllib.request.urlopen(url, timeout=30) as source, whole(target) as sink:
            total = int(source.headers.get("Content-Length", 0)) or None
            with Progress(f"downloading {target.name}", total, "B") as bar:
                while block := source.read(1 << 20):
                    sink.write(block)
                    digest.update(block)
                    bar.update(len(block))
            if digest.hexdigest() != md5:
                raise ValueError(
                    f"{url} sent an incomplete or altered file, md5 {digest.hexdigest()} instead of {md5}: try again, "
                    f"or put the right {target.name} into {target.parent}/"
                )
    except OSError as error:  # errors of urllib and of a broken connection
        reason = getattr(error, "reason", error)
        reason = getattr(reason, "strerror", None) or reason
        raise FileNotFoundError(
            f"CIFAR-10 is not in {target.parent}/ and cannot be downloaded ({reason}): put {target.name} from {url} "
            f"there, or its folder {_FOLDERS[0]}, or set --config.data.path=DIR"
        ) from error


def _find(path: Path) -> Path | None:
    """The folder or archive to read at `path`, or None."""
    if path.is_file() or any((path / f"data_batch_1{end}").exists() for end in ("", ".bin")):
        return path
    return next((path / name for name in (*_FOLDERS, *_ARCHIVES) if (path / name).exists()), None)


Contents = Callable[[str], bytes | None]


def _folder(path: Path) -> Contents:
    return lambda name: (path / name).read_bytes() if (path / name).exists() else None


def _archive(path: Path) -> Contents:
    """Files of an archive by the last part of their names, read in one pass and never unpacked to disk."""
    try:
        with tarfile.open(path) as archive:
            files = {Path(m.name).name: archive.extractfile(m).read() for m in archive if m.isfile()}  # type: ignore[union-attr]
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{path} is damaged or no archive ({error}): delete it and download {URL}") from error
    return files.get


def _images(contents: Contents, source: Path, names: tuple[str, ...]) -> Images:
    batches = []
    for name in names:
        if (python := contents(name)) is not None:
            batches.append(_python_batch(python, f"{source}/{name}"))
        elif (binary := contents(f"{name}.bin")) is not None:
            batches.append(_binary_batch(binary, f"{source}/{name}.bin"))
        else:
            raise FileNotFoundError(f"{source} holds no {name} or {name}.bin: unpack the archive from {URL} again")
    images, labels = (np.concatenate(arrays) for arrays in zip(*(batch[:2] for batch in batches), strict=True))
    file_names = [name for batch in batches for name in batch[2]]
    return Images(torch.from_numpy(images).reshape(-1, 3, 32, 32), torch.from_numpy(labels), file_names)


def _python_batch(pickled: bytes, name: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    try:
        batch = _ArrayUnpickler(io.BytesIO(pickled), encoding="bytes").load()
        fields = {k.decode() if isinstance(k, bytes) else k: v for k, v in batch.items()}
        images, labels = fields["data"], np.asarray(fields["labels"], dtype=np.int64)
        names = [n.decode() if isinstance(n, bytes) else str(n) for n in fields.get("filenames", [])]
    except Refused as error:
        raise ValueError(f"{name} asks to load {error}, which no file of CIFAR-10 does: download {URL}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{name} is no batch of CIFAR-10 ({type(error).__name__}: {error})") from error
    if len(names) not in (0, len(labels)):
        raise ValueError(f"{name} must hold as many file names as labels, got {len(names)} and {len(labels)}")
    return (*_checked(images, labels, name), names)


def _binary_batch(rows: bytes, name: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    if len(rows) % 3073:
        raise ValueError(f"{name} is no batch of CIFAR-10: its {len(rows)} bytes are not a multiple of 3073")
    table = np.frombuffer(rows, dtype=np.uint8).reshape(-1, 3073)
    return (*_checked(table[:, 1:], table[:, 0].astype(np.int64), name), [])


def _checked(images: Any, labels: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    shape, dtype = getattr(images, "shape", None), getattr(images, "dtype", None)
    if dtype != np.uint8 or shape != (*labels.shape, 3072):
        raise ValueError(f"{name} needs uint8 images (N, 3072) and N labels, got {dtype} {shape} and {labels.shape}")
    if len(labels) and not 0 <= labels.min() <= labels.max() <= 9:
        raise ValueError(f"{name} must hold labels 0 to 9, got {labels.min()} to {labels.max()}")
    return images, labels


class Refused(Exception):
    """A pickle names something that is not in `_ADMITTED`."""


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles only numpy arrays and what needs no name: numbers, strings, lists and dicts."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise Refused(f"{module}.{name}")
        return _ADMITTED[module, name]


# numpy 1 names these functions numpy.core, numpy 2 numpy._core; the codec turns Python 3's protocol 2 text into bytes.
_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _codecs.encode,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0] for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): np.empty(0).__reduce_ex__(5)[0] for core in ("core", "_core")},
}
