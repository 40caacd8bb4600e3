"""Checkpoints: one safetensors file each, written atomically, read without executing anything.

A file holds the parameters (`model/NAME`), their average (`ema/NAME`), the optimizer's moments (`optimizer/KEY/NAME`),
and what a law of t has learned (`law/NAME`), as plain tensors; its header holds, as JSON, the step, the config and what
the data were. So a file stands for itself: `load(path)` builds the model it describes. What is read is what was saved:
`tensor_file.py` tells any change by its hashes, and types, shapes and names are compared with what the config asks for.

In a workdir, checkpoints are the files that training names, by their step. What else is beside them, such as a copy
`best.safetensors`, is read where it is named, and otherwise left alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import config as configs
from ..config.build import Trainable
from ..config.kinds import kind_of
from ..data.codecs import Codec, Statistics
from ..data.sets import Data
from ..foreign import diffusers
from ..foreign.score_sde_pytorch import load_score_sde_file
from ..machine.log import log
from ..machine.whole_files import is_finite, read_header, read_tensors, write_tensors
from ..models.autoencoder import ConvolutionalAutoencoder
from ..models.base import ScoreModel
from ..models.classifier import NoisyClassifier

FORMAT = "score_sde 1"
SUFFIX = ".safetensors"
_NAMED = re.compile(r"\d{9,}" + re.escape(SUFFIX), re.ASCII)
_MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam and AdamW, beside their step

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Card:
    """What a checkpoint says of itself: the config (as JSON text), the shape of an example, and the step.

    `codes`, of a model of an autoencoder's codes, are their statistics, and `data` is a `DataCard`, both as JSON text;
    "" where there is none, as in files of version 0.1.0.
    """

    config: str
    shape: tuple[int, ...]
    step: int
    codes: str = ""
    data: str = ""

    def header(self) -> dict[str, str]:
        known = {"format": FORMAT, "config": self.config, "shape": json.dumps(self.shape), "step": str(self.step)}
        return known | {name: text for name, text in (("codes", self.codes), ("data", self.data)) if text}

    @classmethod
    def from_header(cls, header: Mapping[str, str]) -> Card:
        """What `header` wrote. Raises ValueError, one sentence, for what it cannot have written."""
        for key in ("config", "shape", "step"):
            if key not in header:
                raise ValueError(f"its header has no {key}")
        found = {key: _json(key, header[key]) for key in ("config", "shape", "step")}
        if not isinstance(found["config"], dict):
            raise ValueError(f"its config is no JSON object but {header['config'][:60]!r}")
        shape = found["shape"]
        if not (isinstance(shape, list) and shape and all(_is_count(size) and size > 0 for size in shape)):
            raise ValueError(f"its shape is no list of sizes but {header['shape'][:60]!r}")
        if not _is_count(found["step"]):
            raise ValueError(f"its step is no count but {header['step'][:60]!r}")
        codes, data = header.get("codes", ""), header.get("data", "")
        if codes:
            Statistics.from_json(codes)
        if data:
            DataCard.from_json(data)
        return cls(header["config"], tuple(shape), found["step"], codes, data)


@dataclass(frozen=True)
class DataCard:
    """What a model's data were, so that sampling needs them not, and training on others can be told.

    Args:
        levels: values of a pixel, None for floats; of a model of codes, of the images' pixels.
        rate: samples per second of recordings, else None.
        num_classes: 0 unless the labels are classes.
        class_names: one for each class, or () where nothing names them.
        digest: `Split.digest` of the training split, captions included.
        empty_classes: those without an example to train on.
        examples: how many it has; 0 where that is not known.
    """

    levels: int | None
    rate: int | None
    num_classes: int
    class_names: tuple[str, ...]
    digest: str
    empty_classes: tuple[int, ...] = ()
    examples: int = 0

    @classmethod
    def of(cls, data: Data, codec: Codec) -> DataCard:
        """Of data that `codec` encodes."""
        levels = None if codec.pixels is None else codec.pixels.levels
        digest = data.train.digest(data.captions)
        return cls(levels, data.rate, data.num_classes, data.class_names, digest, data.empty_classes, len(data.train))

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> DataCard:
        """What `to_json` wrote. Raises ValueError for a text that it cannot have written."""
        try:
            found = json.loads(text)
            lists = {key: tuple(found[key]) for key in ("class_names", "empty_classes") if key in found}
            card = cls(**{**found, **lists})
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{text[:60]!r} does not describe a model's data ({error!r})") from error
        counts = (card.levels, card.rate, card.num_classes, card.examples)
        if not all(_is_count(value) for value in counts if value is not None) or None in counts[2:]:
            raise ValueError(f"levels, rate, num_classes and examples of a model's data are counts, got {counts}")
        if not all(_is_count(label) for label in card.empty_classes):
            raise ValueError(f"empty classes of a model's data are counts, got {card.empty_classes}")
        if not all(isinstance(name, str) for name in (*card.class_names, card.digest)):
            raise ValueError(f"class names and digest of a model's data are text, got {text[:60]!r}")
        return card


@dataclass(frozen=True)
class Trained:
    """A checkpoint, opened once: its file, what that says of itself, and the config that it was trained with.

    `card` and `config` are None for a file of score_sde_pytorch, which says nothing of itself.
    """

    path: Path
    card: Card | None = None
    config: Any = None  # a ConfigDict

    @classmethod
    def open(cls, path: Path) -> Trained:
        """The checkpoint in a file; errors as `read_card`, and ValueError for a config that cannot be read."""
        if path.is_file() and path.suffix != SUFFIX:
            return cls(path)
        card = read_card(path)
        return cls(path, card, configs.from_text(card.config, str(path)))

    @cached_property
    def sha256(self) -> str:
        """The file's, for the stamps of what is made with it."""
        return file_hash(self.path)

    @cached_property
    def data(self) -> DataCard | None:
        """What its data were, if it says so."""
        return DataCard.from_json(self.card.data) if self.card is not None and self.card.data else None

    def network(self, ema: bool = True, device: str | torch.device = "cpu") -> Trainable:
        """What a checkpoint of ours holds, a model, a classifier or an autoencoder, in eval mode.

        Raises ValueError for a file that is broken.
        """
        assert self.card is not None
        try:
            model = kind_of(self.config).build(self.config, self.card.shape)
        except (ValueError, TypeError, KeyError, RuntimeError, ArithmeticError) as error:
            why = next(iter(str(error).splitlines()), "")
            raise ValueError(f"{self.path}: its config and shape {self.card.shape} build no model: {why}") from error
        prefix = "ema/" if ema else "model/"
        stored = read_tensors(self.path, prefix)
        expected = {prefix + name: value for name, value in model.state_dict().items()}
        _compare(self.path, expected, stored)
        for name, value in expected.items():
            value.copy_(stored[name])
        return model.to(device).eval().requires_grad_(False)

    def model(self, ema: bool = True, device: str | torch.device = "cpu", config: Any = None) -> ScoreModel:
        """The score model, in eval mode; `config` and errors are those of `load`."""
        if self.card is None:
            return load_score_sde_file(self.path, config, ema, device)
        model, kind = self.network(ema, device), kind_of(self.config)
        if not isinstance(model, ScoreModel):
            raise ValueError(f"{self.path} is {kind.name}: {kind.use}={self.path}")
        return model

    def classifier(self, ema: bool = True, device: str | torch.device = "cpu") -> NoisyClassifier:
        """The classifier of noisy examples. Raises ValueError for a file that is broken or holds something else."""
        return self._only(NoisyClassifier, ("no classifier", "cross_entropy", "classifier_digits"), ema, device)

    def autoencoder(self, ema: bool = True, device: str | torch.device = "cpu") -> ConvolutionalAutoencoder:
        """The autoencoder. Raises ValueError for a file that is broken or holds something else."""
        other = ("no autoencoder", "autoencoder", "autoencoder_digits32")
        return self._only(ConvolutionalAutoencoder, other, ema, device)

    def _only(self, kind: type[M], other: tuple[str, str, str], ema: bool, device: str | torch.device) -> M:
        held = self.network(ema, device) if self.card is not None else None
        if not isinstance(held, kind):
            name, objective, config = other
            raise ValueError(
                f"{self.path} is {name}: train one with training.objective={objective}, such as configs/{config}.py"
            )
        return held


def save(
    path: Path,
    card: Card,
    model: nn.Module,
    ema: nn.Module,
    optimizer: Optimizer | None,
    law: nn.Module | None = None,
) -> None:
    """Write a checkpoint under a temporary name, flush and rename it: `path` is whole or absent.

    Raises FloatingPointError, and writes nothing, where a number is not finite.
    """
    tensors = tensors_of(model, ema, optimizer, law)
    for name, value in tensors.items():
        if not is_finite(value):
            raise FloatingPointError(
                f"{name} is not finite at step {card.step}, so {path.name} is not written; the last checkpoint is "
                "intact: lower optim.lr, raise optim.warmup or lower optim.grad_clip, and run again"
            )
    write_tensors(path, tensors, card.header())


def read_card(path: Path) -> Card:
    """The card of a checkpoint. Raises FileNotFoundError, or ValueError for a file that is broken or not ours."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    header = read_header(path)
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by this package (format {header.get('format')!r}, not {FORMAT!r})")
    try:
        return Card.from_header(header)
    except ValueError as error:
        raise ValueError(f"{path} is no checkpoint that can be read: {error}; take another checkpoint") from error


def restore(
    path: Path,
    model: nn.Module,
    ema: nn.Module | None = None,
    optimizer: Optimizer | None = None,
    law: nn.Module | None = None,
) -> Card:
    """Copy a checkpoint into `model`, and its average, its moments and its law's memory into the others, each if given.

    A moment lies in memory as its parameter does. Everything is read and compared first: names, shapes and types must
    be exactly those expected, else ValueError is raised and nothing was changed.
    """
    card = read_card(path)
    expected = _tensors(model, ema, law)
    found = read_tensors(path)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad] if optimizer is not None else []
    moments = {f"optimizer/{key}/{name}": p for name, p in trained for key in _MOMENTS}
    counts = {f"optimizer/step/{name}": torch.zeros((), dtype=torch.float32) for name, _ in trained}
    begun = any(name.startswith("optimizer/") for name in found)
    if trained and card.step > 0 and not begun:
        raise ValueError(f"{path} holds no optimizer state for this model; it cannot be resumed")
    _compare(path, expected | (moments | counts if begun else {}), found)
    put(found, model, ema, optimizer, law)
    return card


def tensors_of(
    model: nn.Module, ema: nn.Module | None, optimizer: Optimizer | None, law: nn.Module | None
) -> dict[str, Tensor]:
    """All that a checkpoint of these holds, by its name there."""
    tensors = _tensors(model, ema, law)
    if optimizer is not None:
        for name, parameter in model.named_parameters():
            known = optimizer.state.get(parameter, {})
            tensors |= {f"optimizer/{key}/{name}": value for key, value in known.items()}
    return tensors


def put(
    found: Mapping[str, Tensor],
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: Optimizer | None,
    law: nn.Module | None,
) -> None:
    """Copy what `tensors_of` gave into these; a moment lies in memory as its parameter does."""
    for name, value in _tensors(model, ema, law).items():
        value.copy_(found[name])
    if optimizer is None:
        return
    optimizer.state.clear()
    for name, p in model.named_parameters():
        if f"optimizer/step/{name}" not in found:
            continue
        # Fused steps go through memory side by side, and Adam counts on the CPU unless it is fused on a GPU.
        known = {key: torch.empty_like(p).copy_(found[f"optimizer/{key}/{name}"]) for key in _MOMENTS}
        where = p.device if optimizer.param_groups[0].get("fused") else torch.device("cpu")
        optimizer.state[p] = {"step": found[f"optimizer/step/{name}"].to(where, copy=True), **known}


def _tensors(model: nn.Module, ema: nn.Module | None, law: nn.Module | None) -> dict[str, Tensor]:
    parts = {"model": model, "ema": ema, "law": law}
    return {
        f"{part}/{name}": value
        for part, module in parts.items()
        if module is not None
        for name, value in module.state_dict().items()
    }


def _compare(path: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    parts = {name.split("/")[0] for name in expected}
    ours = {name for name in found if name.split("/")[0] in parts}
    for name in sorted(expected.keys() ^ ours):
        where = "is missing from" if name in expected else "is in"
        raise ValueError(f"{name} {where} {path}, against the model's config; {_AS_TRAINED}")
    for name, value in expected.items():
        for what, a, b in (
            ("has shape", tuple(found[name].shape), tuple(value.shape)),
            ("is", found[name].dtype, value.dtype),
        ):
            if a != b:
                raise ValueError(f"{name} {what} {a} in {path}, but the config asks for {b}; {_AS_TRAINED}")


_AS_TRAINED = "use the config that it was trained with"


def _json(key: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"its {key} is no JSON but {text[:60]!r}") from None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def checkpoints(workdir: Path) -> list[Path]:
    """The checkpoints of a workdir that training named, oldest first by their names."""
    named = (p for p in (workdir / "checkpoints").glob(f"*{SUFFIX}") if _NAMED.fullmatch(p.name))
    return sorted(named, key=lambda path: int(path.stem))


def checkpoint_path(workdir: Path, step: int) -> Path:
    return workdir / "checkpoints" / f"{step:09d}{SUFFIX}"


def prune(written: Path, keep_last: int, keep_every: int) -> None:
    """Delete what a workdir needs no more, now that `written` is there.

    The last `keep_last` stay, and those whose step is a multiple of `keep_every` (0: none), and `written` whatever its
    step. What cannot be read does not count and stays, and so does a file under another step's name.
    """
    steps: dict[Path, int] = {}
    for path in checkpoints(written.parent.parent):
        try:
            step = read_card(path).step
        except (ValueError, FileNotFoundError):
            continue
        if path == checkpoint_path(written.parent.parent, step):
            steps[path] = step
    for path in sorted(steps, key=steps.__getitem__)[:-keep_last]:
        if path != written and not (keep_every and steps[path] % keep_every == 0):
            path.unlink(missing_ok=True)


def newest(workdir: Path) -> tuple[Trained | None, list[str]]:
    """The checkpoint of the highest step, by its card, that is whole, and a sentence for each later one that is broken.

    Whole means that every byte of it is as it was saved.
    """
    broken: list[tuple[int, str]] = []
    cards: list[tuple[int, Path, Card]] = []
    for path in checkpoints(workdir):
        try:
            card = read_card(path)
            cards.append((card.step, path, card))
        except FileNotFoundError:  # pruned by a run in this moment
            continue
        except ValueError as error:
            broken.append((int(path.stem), f"skipped: {error}"))
    for step, path, card in sorted(cards, key=lambda each: each[:2], reverse=True):
        try:
            trained = Trained(path, card, configs.from_text(card.config, str(path)))
            _check_whole(path)
        except ValueError as error:
            broken.append((step, f"skipped: {error}"))
        else:
            return trained, [sentence for at, sentence in sorted(broken, reverse=True) if at >= step]
    return None, [sentence for _, sentence in sorted(broken, reverse=True)]


_APART = 100_000_000  # ns; two changes of a file nearer in time may bear one stamp
_whole: dict[Path, tuple[int, ...]] = {}  # what was read and found whole, as it was then


def _check_whole(path: Path) -> None:
    """Raises ValueError for a broken file; one that nobody touched since it was read here is not read again."""
    about = path.stat()
    stamp = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
    if _whole.get(path) == stamp:
        return
    read_tensors(path)
    if time.time_ns() - max(about.st_mtime_ns, about.st_ctime_ns) > _APART:
        _whole[path] = stamp


def find(where: str | Path) -> Trained:
    """The checkpoint that `where` means, opened: a file, or the newest whole one of a workdir.

    Warns of later ones that are broken. Raises FileNotFoundError where there is none, and ValueError for a broken file.
    """
    path = Path(where)
    if not path.exists() and not path.suffix:  # no name of a file
        raise FileNotFoundError(f"there is no checkpoint or workdir {path}: train it first with --mode train")
    if not path.is_dir():
        return Trained.open(path)
    if diffusers.is_folder(path):
        raise ValueError(
            f"{path} is a folder of diffusers': --mode train --checkpoint {path} trains it further, and the workdir of "
            "that run is one of ours; score_sde.load reads it in Python"
        )
    trained, skipped = newest(path)
    if trained is None:
        others = sorted(p.name for p in (path / "checkpoints").glob(f"*{SUFFIX}") if not p.name.startswith("."))
        named = [name for name in others if not _NAMED.fullmatch(name)]
        raise FileNotFoundError(
            f"{path} has no checkpoint in {path / 'checkpoints'}; train it first with --mode train"
            + (f", or name the file that you mean, such as {path / 'checkpoints' / named[0]}" if named else "")
            + "".join(f" ({sentence})" for sentence in skipped)
        )
    for sentence in skipped:
        _tell(sentence)
    return trained


@cache
def _tell(sentence: str) -> None:
    """A warning, once however many parts of a command look for the same checkpoint."""
    log.warning(sentence)


def load(
    path: str | Path, config: Any = None, ema: bool = True, map_location: str | torch.device = "cpu"
) -> ScoreModel:
    """The model in a workdir, in a checkpoint of ours, or in one of score_sde_pytorch or diffusers, in eval mode.

    Args:
        path: a workdir (its newest checkpoint), a `.safetensors` of ours, a `.pth` of score_sde_pytorch, or the folder
            of a pipeline of diffusers', see `diffusers.load_folder`.
        config: only for score_sde_pytorch, whose files carry none: a dict, a ConfigDict or the path of a JSON file.
        ema: take the averaged weights (default) or the raw ones.
        map_location: device of the result.

    Raises FileNotFoundError where nothing is, ValueError for a file that is broken, does not fit its config or holds a
    classifier or an autoencoder.
    """
    if diffusers.is_folder(path):
        return diffusers.load_folder(path, map_location)
    return find(path).model(ema, map_location, config)


def load_classifier(path: str | Path, ema: bool = True, map_location: str | torch.device = "cpu") -> NoisyClassifier:
    """The classifier of noisy examples in a workdir or checkpoint, in eval mode: ``classifier(model, it, label=y)``.

    Raises FileNotFoundError where nothing is, ValueError for a file that is broken or holds a model.
    """
    return find(path).classifier(ema, map_location)


def load_autoencoder(
    path: str | Path, ema: bool = True, map_location: str | torch.device = "cpu"
) -> ConvolutionalAutoencoder:
    """The autoencoder in a workdir or checkpoint, in eval mode.

    Raises FileNotFoundError where nothing is, ValueError for a file that is broken or holds none.
    """
    return find(path).autoencoder(ema, map_location)


def file_hash(path: Path) -> str:
    """sha256 of a file, for the stamps of what was made with it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
