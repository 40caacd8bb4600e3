"""Checkpoints: one safetensors file each, written atomically, read without executing anything.

A file holds the parameters (`model/NAME`), their average (`ema/NAME`), the optimizer's moments (`optimizer/KEY/NAME`),
and what a law of t has learned (`law/NAME`), as plain tensors; its header holds, as JSON, the step, the config and the
data's shape. So a file stands for itself: `load(path)` builds the model it describes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from . import config as configs
from .autoencoder import ConvolutionalAutoencoder
from .build import Trained, build_trained
from .codecs import Codec
from .data import Data
from .interop import load_score_sde_file
from .model import ScoreModel
from .noisy_classifier import NoisyClassifier

FORMAT = "score_sde 1"
SUFFIX = ".safetensors"


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


@dataclass(frozen=True)
class DataCard:
    """What a model's data were, so that sampling needs them not, and training on others can be told.

    Args:
        levels: values of a pixel, None for floats; of a model of codes, of the images' pixels.
        rate: samples per second of recordings, else None.
        num_classes: 0 unless the labels are classes.
        class_names: one for each class, or () where nothing names them.
        digest: `Split.digest` of the training split, captions included.
    """

    levels: int | None
    rate: int | None
    num_classes: int
    class_names: tuple[str, ...]
    digest: str

    @classmethod
    def of(cls, data: Data, codec: Codec) -> DataCard:
        """Of data that `codec` encodes."""
        levels = None if codec.pixels is None else codec.pixels.levels
        return cls(levels, data.rate, data.num_classes, data.class_names, data.train.digest(data.captions))

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> DataCard:
        """What `to_json` wrote. Raises ValueError for a text that it cannot have written."""
        try:
            found = json.loads(text)
            card = cls(**{**found, "class_names": tuple(found["class_names"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{text[:60]!r} does not describe a model's data ({error!r})") from error
        counts = (card.levels, card.rate, card.num_classes)
        if not all(_is_count(value) for value in counts if value is not None) or card.num_classes is None:
            raise ValueError(f"levels, rate and num_classes of a model's data are counts, got {counts}")
        if not all(isinstance(name, str) for name in (*card.class_names, card.digest)):
            raise ValueError(f"class names and digest of a model's data are text, got {text[:60]!r}")
        return card


def save(
    path: Path,
    card: Card,
    model: nn.Module,
    ema: nn.Module,
    optimizer: Optimizer | None,
    law: nn.Module | None = None,
) -> None:
    """Write a checkpoint under a temporary name, flush and rename it: `path` is whole or absent."""
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"ema/{name}": value for name, value in ema.state_dict().items()}
    if law is not None:
        tensors |= {f"law/{name}": value for name, value in law.state_dict().items()}
    if optimizer is not None:
        for name, parameter in model.named_parameters():
            tensors |= {f"optimizer/{key}/{name}": value for key, value in optimizer.state[parameter].items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, partial, card.header())
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def read_card(path: Path) -> Card:
    """The card of a checkpoint. Raises FileNotFoundError, or ValueError for a file that is broken or not ours."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}); take another checkpoint") from error
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by this package (format {header.get('format')!r}, not {FORMAT!r})")
    shape, step = tuple(json.loads(header["shape"])), int(header["step"])
    return Card(header["config"], shape, step, header.get("codes", ""), header.get("data", ""))


def restore(
    path: Path,
    model: nn.Module,
    ema: nn.Module | None = None,
    optimizer: Optimizer | None = None,
    law: nn.Module | None = None,
) -> Card:
    """Copy a checkpoint into `model`, and its average, its moments and its law's memory into the others, each if given.

    Everything is read and compared first: names and shapes must be exactly those expected, else ValueError is raised
    and nothing was changed.
    """
    card = read_card(path)
    expected = {f"model/{name}": value for name, value in model.state_dict().items()}
    if ema is not None:
        expected |= {f"ema/{name}": value for name, value in ema.state_dict().items()}
    if law is not None:
        expected |= {f"law/{name}": value for name, value in law.state_dict().items()}
    moments: dict[str, tuple[str, nn.Parameter]] = {}
    with safe_open(path, "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a dict)
    _compare(path, expected, found)
    if optimizer is not None:
        parameters = dict(model.named_parameters())
        for full in found:
            if full.startswith("optimizer/"):
                _, key, name = full.split("/", 2)
                if name in parameters:
                    moments[full] = (key, parameters[name])
        if card.step > 0 and {id(p) for _, p in moments.values()} != {
            id(p) for p in parameters.values() if p.requires_grad
        }:
            raise ValueError(f"{path} holds no optimizer state for this model; it cannot be resumed")
    for name, value in expected.items():
        value.copy_(found[name])
    if optimizer is not None:
        optimizer.state.clear()
        for full, (key, parameter) in moments.items():
            value = found[full]
            # Adam counts its steps in a float tensor that lives on the CPU unless it is fused on a GPU.
            where = parameter.device if key != "step" or _fused(optimizer) else torch.device("cpu")
            optimizer.state[parameter][key] = value.to(where)
    return card


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _fused(optimizer: Optimizer) -> bool:
    return bool(optimizer.param_groups[0].get("fused"))


def _compare(path: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    ours = {name for name in found if name.split("/")[0] in {name.split("/")[0] for name in expected}}
    for name in sorted(expected.keys() ^ ours):
        where = "is missing from" if name in expected else "is in"
        raise ValueError(f"{name} {where} {path}, against the model's config; use the config that it was trained with")
    for name, value in expected.items():
        if found[name].shape != value.shape:
            raise ValueError(
                f"{name} has shape {tuple(found[name].shape)} in {path}, but the config asks for {tuple(value.shape)}; "
                "use the config that it was trained with"
            )


def checkpoints(workdir: Path) -> list[Path]:
    """The checkpoints of a workdir, oldest first."""
    return sorted(p for p in (workdir / "checkpoints").glob(f"*{SUFFIX}") if not p.name.startswith("."))


def checkpoint_path(workdir: Path, step: int) -> Path:
    return workdir / "checkpoints" / f"{step:09d}{SUFFIX}"


def prune(workdir: Path, keep_last: int, keep_every: int) -> None:
    """Delete all checkpoints but the last `keep_last` and those whose step is a multiple of `keep_every` (0: none)."""
    for path in checkpoints(workdir)[:-keep_last]:
        if not (keep_every and int(path.stem) % keep_every == 0):
            path.unlink()


def newest(workdir: Path) -> tuple[Path | None, list[str]]:
    """The newest readable checkpoint of a workdir, and a sentence for each newer one that was skipped as broken."""
    skipped = []
    for path in reversed(checkpoints(workdir)):
        try:
            read_card(path)
        except ValueError as error:
            skipped.append(f"skipped: {error}")
        else:
            return path, skipped
    return None, skipped


def find(path: str | Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest readable one of a workdir."""
    path = Path(path)
    if not path.is_dir():
        return path
    found, skipped = newest(path)
    if found is None:
        raise FileNotFoundError(
            f"{path} has no checkpoint in {path / 'checkpoints'}; train it first with --mode train"
            + "".join(f" ({sentence})" for sentence in skipped)
        )
    return found


def load(
    path: str | Path, config: Any = None, ema: bool = True, map_location: str | torch.device = "cpu"
) -> ScoreModel:
    """The model in a workdir, in a checkpoint of ours, or in one of score_sde_pytorch, in eval mode.

    Args:
        path: a workdir (its newest checkpoint), a `.safetensors` of ours, or a `.pth` of score_sde_pytorch.
        config: only for the last, whose files carry none: a dict, a ConfigDict or the path of a JSON file.
        ema: take the averaged weights (default) or the raw ones.
        map_location: device of the result.

    Raises FileNotFoundError where nothing is, ValueError for a file that is broken, does not fit its config or holds a
    classifier or an autoencoder.
    """
    path = find(path)
    if path.suffix != SUFFIX:
        return load_score_sde_file(path, config, ema, map_location)
    model = _load(path, ema, map_location)
    if isinstance(model, NoisyClassifier):
        raise ValueError(f"{path} is a classifier: sample from a model, with --config.sampling.classifier={path}")
    if isinstance(model, ConvolutionalAutoencoder):
        raise ValueError(f"{path} is an autoencoder: train a model of its codes, with --config.data.autoencoder={path}")
    return model


def load_classifier(path: str | Path, ema: bool = True, map_location: str | torch.device = "cpu") -> NoisyClassifier:
    """The classifier of noisy examples in a workdir or checkpoint, in eval mode: ``classifier(model, it, label=y)``.

    Raises FileNotFoundError where nothing is, ValueError for a file that is broken or holds a model.
    """
    path = find(path)
    found = _load(path, ema, map_location)
    if not isinstance(found, NoisyClassifier):
        raise ValueError(
            f"{path} is no classifier: train one with training.objective=cross_entropy, such as "
            "configs/classifier_digits.py"
        )
    return found


def load_autoencoder(
    path: str | Path, ema: bool = True, map_location: str | torch.device = "cpu"
) -> ConvolutionalAutoencoder:
    """The autoencoder in a workdir or checkpoint, in eval mode.

    Raises FileNotFoundError where nothing is, ValueError for a file that is broken or holds none.
    """
    path = find(path)
    found = _load(path, ema, map_location)
    if not isinstance(found, ConvolutionalAutoencoder):
        raise ValueError(
            f"{path} is no autoencoder: train one with training.objective=autoencoder, such as "
            "configs/autoencoder_digits32.py"
        )
    return found


def _load(path: Path, ema: bool, map_location: str | torch.device) -> Trained:
    """What a checkpoint of ours holds, in eval mode."""
    card = read_card(path)
    model = build_trained(configs.from_text(card.config, str(path)), card.shape)
    prefix = "ema/" if ema else "model/"
    with safe_open(path, "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    expected = {prefix + name: value for name, value in model.state_dict().items()}
    _compare(path, expected, found)
    for name, value in expected.items():
        value.copy_(found[name])
    return model.to(map_location).eval().requires_grad_(False)


def file_hash(path: Path) -> str:
    """sha256 of a file, for the stamps of what was made with it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
