"""Checkpoints: one safetensors file each, written atomically, read without executing anything.

A file holds the parameters (`model/NAME`), their average (`ema/NAME`), power averages if the run keeps them
(`ema_WIDTH/NAME`), the optimizer's moments (`optimizer/KEY/NAME`), and what a law of t has learned (`law/NAME`), as
plain tensors; its header holds, as JSON, the step, the config and what the data were. So a file is enough: `load(path)`
builds the model it describes. What is read is what was saved: `whole_files.py` detects any change by hashes, and types,
shapes and names are compared with what the config asks for.

In a workdir, checkpoints are the files that training named by their step. Other files beside them, such as a copy
`best.safetensors`, are read only by name, and never deleted.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
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
from ..losses.time_laws import SecondMoments
from ..machine.log import log
from ..machine.whole_files import is_finite, read_header, read_tensors, write_tensors
from ..models.autoencoder import ConvolutionalAutoencoder
from ..models.base import ScoreModel
from ..models.classifier import NoisyClassifier
from .averages import WIDTHS, combination

FORMAT = "score_sde 1"
SUFFIX = ".safetensors"
_NAMED = re.compile(r"\d{9,}" + re.escape(SUFFIX), re.ASCII)
_NO_POWERS = ("{} has no power averages to make others of: set sampling.ema=0, or train with "
              "--config.model.ema_power=true (from the first step on)")  # fmt: skip
_MORE = ": to come nearer, keep more checkpoints (training.keep_every=1 and a smaller training.snapshot_freq)"
_MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam and AdamW, beside their step

_TRAINED_BY: dict[type, tuple[str, str, str]] = {  # its name, the objective that trains it, a config that does
    NoisyClassifier: ("classifier", "cross_entropy", "classifier_digits"),
    ConvolutionalAutoencoder: ("autoencoder", "autoencoder", "autoencoder_digits32"),
}

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Card:
    """A checkpoint's description of itself: the config (as JSON text), the shape of an example, and the step.

    `codes` are the `Statistics` of a model of codes, and `data` is a `DataCard`, as JSON text; "" where there is none.
    """

    config: str
    shape: tuple[int, ...]
    step: int
    codes: str = ""
    data: str = ""

    def header(self) -> dict[str, str]:
        header = {"format": FORMAT, "config": self.config, "shape": json.dumps(self.shape), "step": str(self.step)}
        return header | {name: text for name, text in (("codes", self.codes), ("data", self.data)) if text}

    @classmethod
    def from_header(cls, header: Mapping[str, str]) -> Card:
        """The card in a header that `header` wrote. Raises ValueError, one sentence, for any other header."""
        values = {}
        for key, kind, fits in (
            ("config", "JSON object", lambda value: isinstance(value, dict)),
            ("shape", "list of sizes", lambda v: isinstance(v, list) and v and all(_is_count(n) and n for n in v)),
            ("step", "count", _is_count),
        ):
            if key not in header:
                raise ValueError(f"its header has no {key}")
            try:
                values[key] = json.loads(header[key])
            except (ValueError, RecursionError):
                raise ValueError(f"its {key} is no JSON but {header[key][:60]!r}") from None
            if not fits(values[key]):
                raise ValueError(f"its {key} is no {kind} but {header[key][:60]!r}")
        codes, data = header.get("codes", ""), header.get("data", "")
        if codes:
            Statistics.from_json(codes)
        if data:
            DataCard.from_json(data)
        return cls(header["config"], tuple(values["shape"]), values["step"], codes, data)


@dataclass(frozen=True)
class DataCard:
    """A description of the data that a model was trained on: sampling needs no data, and other data are noticed.

    Args:
        levels: number of values of a pixel (of the images, also for a model of codes); None for floats.
        rate: samples per second of recordings, else None.
        num_classes: 0 unless the labels are classes.
        class_names: one for each class, or () for classes without names.
        digest: `Split.digest` of the training split, with its captions.
        empty_classes: classes without training examples.
        examples: number of training examples; 0 if it is not known.
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
        """The description of data that `codec` encodes."""
        levels = None if codec.pixels is None else codec.pixels.levels
        digest = data.train.digest(data.captions)
        return cls(levels, data.rate, data.num_classes, data.class_names, digest, data.empty_classes, len(data.train))

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> DataCard:
        """The description in a text that `to_json` wrote. Raises ValueError for any other text."""
        try:
            values = json.loads(text)
            lists = {key: tuple(values[key]) for key in ("class_names", "empty_classes") if key in values}
            card = cls(**{**values, **lists})
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{text[:60]!r} does not describe a model's data ({error!r})") from error
        optional = (value for value in (card.levels, card.rate) if value is not None)
        counts = (*optional, card.num_classes, card.examples, *card.empty_classes)
        names = (*card.class_names, card.digest)
        if not all(map(_is_count, counts)) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"numbers of a model's data are counts, and its names text, got {text[:60]!r}")
        return card


@dataclass(frozen=True)
class Trained:
    """A checkpoint, opened once; `card` and the `config` that it was trained with are None for score_sde_pytorch's."""

    path: Path
    card: Card | None = None
    config: Any = None  # a ConfigDict

    @classmethod
    def open(cls, path: Path) -> Trained:
        """The checkpoint in a file. Raises what `read_card` raises, and ValueError for an unreadable config."""
        if path.is_file() and path.suffix != SUFFIX:
            return cls(path)
        card = read_card(path)
        return cls(path, card, configs.from_text(card.config, str(path)))

    @property
    def step(self) -> int:
        """The step of a checkpoint of ours."""
        assert self.card is not None
        return self.card.step

    @cached_property
    def sha256(self) -> str:
        """The file's hash, for the stamps of results."""
        return file_hash(self.path)

    @cached_property
    def data(self) -> DataCard | None:
        """The description of its training data, if it has one."""
        return DataCard.from_json(self.card.data) if self.card is not None and self.card.data else None

    def network(self, ema: bool | float = True, device: str | torch.device = "cpu") -> Trainable:
        """The network of a checkpoint of ours, in eval mode, with the weights `ema` of `load`.

        Raises ValueError for a broken file, and for a run without power averages.
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
        if not isinstance(ema, bool):
            self._take_power_average(model, ema)
        return model.to(device).eval().requires_grad_(False)

    def model(self, ema: bool | float = True, device: str | torch.device = "cpu", config: Any = None) -> ScoreModel:
        """The score model, in eval mode; `config` and errors as in `load`."""
        if self.card is None:
            if not isinstance(ema, bool):
                raise ValueError(_NO_POWERS.format(self.path))
            return load_score_sde_file(self.path, config, ema, device)
        model, kind = self.network(ema, device), kind_of(self.config)
        if not isinstance(model, ScoreModel):
            raise ValueError(f"{self.path} is {kind.name}: {kind.use}={self.path}")
        return model

    def only(self, kind: type[M], ema: bool | float = True, device: str | torch.device = "cpu") -> M:
        """The classifier or autoencoder that the file holds. Raises ValueError for a broken file, or one of others."""
        network = self.network(ema, device) if self.card is not None else None
        if not isinstance(network, kind):
            name, objective, example = _TRAINED_BY[kind]
            remedy = f"train one with training.objective={objective}, such as configs/{example}.py"
            raise ValueError(f"{self.path} is no {name}: {remedy}")
        return network

    def _take_power_average(self, network: nn.Module, width: float) -> None:
        """Give the network the power average of a width at this step, mixed of those in the run's checkpoints."""
        sources = self._sources()
        mixture = combination([trained.step for trained in sources], width)
        parameters = dict(network.named_parameters())
        total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
        for trained, factors in zip(sources, mixture.factors.tolist(), strict=True):
            for kept, factor in zip(WIDTHS, factors, strict=True):
                if factor != 0:
                    _add(trained.path, _power_key(kept), factor, total, parameters)
        for name, p in parameters.items():
            p.detach().copy_(total[name])
        log.info("power average of width %g: of %d checkpoints; its profile is off by %.2g %%%s", width, len(sources),
                 100 * mixture.error, _MORE if mixture.error > 0.05 else "")

    def _sources(self) -> list[Trained]:
        """The run's earlier checkpoints with power averages that stand beside this one, in order, and this one.

        Raises ValueError if this one has none.
        """
        if self.step == 0 or not self.config.model.ema_power:
            raise ValueError(_NO_POWERS.format(self.path))
        earlier = list[Trained]()
        for path in _named(self.path.parent):
            if not 0 < int(path.stem) < self.step:
                continue
            try:
                other = Trained.open(path)
            except (ValueError, FileNotFoundError) as error:
                log.warning("left out of the power average: %s", error)
                continue
            if other.step == int(path.stem) and other.config.model.ema_power:
                earlier.append(other)
        return [*earlier, self]


def chosen(config: Any, section: str) -> bool | float:
    """The weights that a config asks for, by its keys sampling.ema and `section`.weights, as `load` takes them."""
    return float(config.sampling.ema) or bool(config[section].weights == "ema")


def weights_name(ema: bool | float) -> str:
    """A word for weights as `load` takes them: "ema", "raw" or "ema0.05"."""
    return ("ema" if ema else "raw") if isinstance(ema, bool) else f"ema{ema:g}"


@dataclass
class State:
    """What training changes: the model, averages of its weights, the optimizer's moments, the step, and a law of t.

    `law` is None unless the config's time law learns; then it replaces `time_law(config)`. `powers` are the power
    averages of each width, in the order of the model's parameters; {} unless the config asks for them.
    """

    model: Trainable
    ema: Trainable
    optimizer: Optimizer
    step: int = 0
    law: SecondMoments | None = None
    powers: dict[float, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Listed once: a walk over the modules in every step would cost more than the fused update of a small network.
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.values = [p.detach() for p in self.model.parameters()]
        self.averages = [p.detach() for p in self.ema.parameters()]


def save(path: Path, card: Card, state: State) -> None:
    """Write a checkpoint, whole or not at all. Raises FloatingPointError if a number is not finite."""
    tensors = tensors_of(state)
    for name, value in tensors.items():
        if not is_finite(value):
            raise FloatingPointError(f"{name} is not finite at step {card.step}, so {path.name} is not written; the "
                                     "last checkpoint is intact: lower optim.lr, raise optim.warmup or lower "
                                     "optim.grad_clip, and run again")
    write_tensors(path, tensors, card.header())


def read_card(path: Path) -> Card:
    """The card of a checkpoint. Raises FileNotFoundError, or ValueError for a broken file or one that is not ours."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    header = read_header(path)
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by this package (format {header.get('format')!r}, not {FORMAT!r})")
    try:
        return Card.from_header(header)
    except ValueError as error:
        raise ValueError(f"{path} is no checkpoint that can be read: {error}; take another checkpoint") from error


def restore(path: Path, state: State) -> Card:
    """Copy a checkpoint into a fresh state.

    Everything is read and compared first: if names, shapes and types are not exactly those expected, ValueError is
    raised and nothing is changed.
    """
    card, saved = read_card(path), read_tensors(path)
    expected = _values(state)
    if state.powers and not any(name.startswith(_power_key(WIDTHS[0])) for name in saved):
        raise ValueError(f"{path} has no power averages, which would count every step from the first: go on with "
                         "model.ema_power=False, or begin a new run in another --workdir")
    trained = [(name, p) for name, p in state.model.named_parameters() if p.requires_grad]
    if any(name.startswith("optimizer/") for name in saved):
        expected |= {f"optimizer/{key}/{name}": p for name, p in trained for key in _MOMENTS}
        expected |= {f"optimizer/step/{name}": torch.zeros((), dtype=torch.float32) for name, _ in trained}
    elif trained and card.step > 0:
        raise ValueError(f"{path} holds no optimizer state for this model; it cannot be resumed")
    _compare(path, expected, saved)
    put(saved, state)
    state.step = card.step
    return card


def tensors_of(state: State) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by name."""
    tensors = _values(state)
    for name, parameter in state.model.named_parameters():
        moments = state.optimizer.state.get(parameter, {})
        tensors |= {f"optimizer/{key}/{name}": value for key, value in moments.items()}
    return tensors


def put(saved: Mapping[str, Tensor], state: State) -> None:
    """Copy the tensors of `tensors_of` into a state; a moment has its parameter's memory layout."""
    for name, value in _values(state).items():
        value.copy_(saved[name])
    optimizer = state.optimizer
    optimizer.state.clear()
    for name, p in state.model.named_parameters():
        if f"optimizer/step/{name}" in saved:
            # Fused steps read parameters and moments in the order of memory; Adam counts on the CPU unless it is fused.
            moments = {key: torch.empty_like(p).copy_(saved[f"optimizer/{key}/{name}"]) for key in _MOMENTS}
            device = p.device if optimizer.param_groups[0].get("fused") else torch.device("cpu")
            optimizer.state[p] = {"step": saved[f"optimizer/step/{name}"].to(device, copy=True), **moments}


def _values(state: State) -> dict[str, Tensor]:
    """The tensors of a state without the optimizer's, by their names in a checkpoint."""
    modules = {"model": state.model, "ema": state.ema} | ({} if state.law is None else {"law": state.law})
    values = {f"{key}/{name}": value for key, module in modules.items() for name, value in module.state_dict().items()}
    names = [name for name, _ in state.model.named_parameters()]
    for width, averages in state.powers.items():
        values |= {_power_key(width) + name: value for name, value in zip(names, averages, strict=True)}
    return values


def _power_key(width: float) -> str:
    """What the names of a power average's tensors begin with."""
    return f"ema_{width:g}/"


def _add(path: Path, key: str, factor: float, total: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Add factor times the average whose tensors in a file begin with `key` to `total`, both by parameters' names."""
    stored = read_tensors(path, key)
    _compare(path, {key + name: p for name, p in parameters.items()}, stored)
    for name, value in total.items():
        value.add_(stored[key + name], alpha=factor)


def _compare(path: Path, expected: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    remedy = "use the config that it was trained with"
    keys = {name.split("/")[0] for name in expected}
    for name in sorted(expected.keys() ^ {name for name in saved if name.split("/")[0] in keys}):
        where = "is missing from" if name in expected else "is in"
        raise ValueError(f"{name} {where} {path}, against the model's config; {remedy}")
    for name, value in expected.items():
        here, there = (f"{each.dtype} of shape {tuple(each.shape)}" for each in (value, saved[name]))
        if here != there:
            raise ValueError(f"{name} is {there} in {path}, but the config asks for {here}; {remedy}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def checkpoints(workdir: Path) -> list[Path]:
    """The checkpoints of a workdir that training named, in order of the steps in their names."""
    return _named(workdir / "checkpoints")


def _named(folder: Path) -> list[Path]:
    named = (p for p in folder.glob(f"*{SUFFIX}") if _NAMED.fullmatch(p.name))
    return sorted(named, key=lambda path: int(path.stem))


def checkpoint_path(workdir: Path, step: int) -> Path:
    return workdir / "checkpoints" / f"{step:09d}{SUFFIX}"


def prune(written: Path, keep_last: int, keep_every: int) -> None:
    """Delete the checkpoints that a workdir no longer needs, now that `written` is there.

    The last `keep_last` stay, those whose step is a multiple of `keep_every` (0: none), and `written` whatever its
    step. Files that cannot be read, or whose name has another step, do not count and stay.
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
    """The whole checkpoint, as it was saved, of the highest step, and a sentence for each later one that is broken."""
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


_APART = 100_000_000  # ns; two changes of a file nearer in time may have the same time stamp
_whole: dict[Path, tuple[int, ...]] = {}  # the state of each file when it was read and was whole


def _check_whole(path: Path) -> None:
    """Raise ValueError for a broken file; a file that is unchanged since it was read here is not read again."""
    s = path.stat()
    state = (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
    if _whole.get(path) != state:
        read_tensors(path)
        if time.time_ns() - max(s.st_mtime_ns, s.st_ctime_ns) > _APART:
            _whole[path] = state


def find(where: str | Path) -> Trained:
    """Open the checkpoint at `where`: a file, or the newest whole one of a workdir.

    Warns of later ones that are broken. Raises FileNotFoundError if there is none, and ValueError for a broken file.
    """
    path = Path(where)
    if not path.exists() and not path.suffix:  # no name of a file
        raise FileNotFoundError(f"there is no checkpoint or workdir {path}: train it first with --mode train")
    if not path.is_dir():
        return Trained.open(path)
    if diffusers.is_folder(path):
        raise ValueError(f"{path} is a folder of diffusers': --mode train --checkpoint {path} trains it further, into "
                         "a workdir of ours; score_sde.load reads it in Python")
    trained, skipped = newest(path)
    if trained is None:
        others = sorted(p.name for p in (path / "checkpoints").glob(f"*{SUFFIX}") if not p.name.startswith("."))
        other = next((name for name in others if not _NAMED.fullmatch(name)), None)
        raise FileNotFoundError(
            f"{path} has no checkpoint in {path / 'checkpoints'}; train it first with --mode train"
            + (f", or name the file that you mean, such as {path / 'checkpoints' / other}" if other else "")
            + "".join(f" ({sentence})" for sentence in skipped)
        )
    for sentence in skipped:
        _warn_once(sentence)
    return trained


_warn_once = cache(log.warning)  # several steps of a command look for the same checkpoint


def load(
    path: str | Path, config: Any = None, ema: bool | float = True, map_location: str | torch.device = "cpu"
) -> ScoreModel:
    """Load the model of a workdir, of a checkpoint of ours, or of one of score_sde_pytorch or diffusers, in eval mode.

    Args:
        path: a workdir (its newest checkpoint), a `.safetensors` of ours, a `.pth` of score_sde_pytorch, or the folder
            of a pipeline of diffusers', see `diffusers.load_folder`.
        config: only for score_sde_pytorch, whose files carry none: a dict, a ConfigDict or the path of a JSON file.
        ema: take the averaged weights (default) or the raw ones; a number, such as 0.05, is the relative width of a
            power average, which is made of those in this and earlier checkpoints of the run (see `tasks.averages`).
        map_location: device of the result.

    Raises FileNotFoundError if there is none, ValueError for a file that is broken, does not fit its config or holds a
    classifier or an autoencoder.
    """
    if diffusers.is_folder(path):
        if not isinstance(ema, bool):
            raise ValueError(_NO_POWERS.format(path))
        return diffusers.load_folder(path, map_location)
    return find(path).model(ema, map_location, config)


def load_classifier(
    path: str | Path, ema: bool | float = True, map_location: str | torch.device = "cpu"
) -> NoisyClassifier:
    """The noisy classifier of a workdir or checkpoint, in eval mode, for ``classifier(model, it, label=y)``.

    Raises FileNotFoundError if there is none, ValueError for a file that is broken or holds something else.
    """
    return find(path).only(NoisyClassifier, ema, map_location)


def load_autoencoder(
    path: str | Path, ema: bool | float = True, map_location: str | torch.device = "cpu"
) -> ConvolutionalAutoencoder:
    """Load the autoencoder of a workdir or checkpoint, in eval mode; errors as `load_classifier`."""
    return find(path).only(ConvolutionalAutoencoder, ema, map_location)


def file_hash(path: Path) -> str:
    """sha256 of a file, or of the safetensors and JSON files in a folder, for the stamps of results."""
    digest = hashlib.sha256()
    if path.is_dir():
        for file_path in sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".json")):
            digest.update(f"{file_path.name} {file_hash(file_path)} ".encode())
        return digest.hexdigest()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
