"""Fine-tuning: a run that begins from the weights of a checkpoint, of this package or of another project.

The config's network must be the checkpoint's: names and shapes of tensors are compared and, where the configs differ,
outputs. Only the number of classes and of the images' channels may differ: the layers that depend on them start fresh.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

from .. import config as configs
from ..config.build import Trainable
from ..config.kinds import MODEL, kind_of
from ..foreign import diffusers, score_sde_pytorch
from ..models.autoencoder import ConvolutionalAutoencoder
from ..models.base import ScoreModel
from ..models.rules import Preconditioned
from ..networks.blocks import Head
from . import checkpoint
from .checkpoint import Trained

# Keys of the section model that do not change what a network computes from its weights: a change is a warning.
_READ_OTHERWISE = (
    *("rule", "label", "sigma_data", "sigma_min", "sigma_max", "beta_min", "beta_max", "gamma_min", "gamma_max"),
    *("learn_ends", "num_scales", "t_min", "super_resolution"),
)
# Keys that may differ without a warning.
_FREE = (
    *("num_classes", "class_conditional", "image_channels", "dropout", "ema_rate", "ema_halflife"),
    "ema_power",
    *("text_encoder", "text_length"),
)
_AS_IT_WAS = "take the config that it was trained with (only the numbers of classes and of channels may differ)"


def find_origin(where: str) -> Trained:
    """The checkpoint training.origin: a file, a workdir's newest, or diffusers' folder. Raises FileNotFoundError."""
    path = Path(where)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path} to begin from: name a checkpoint or a workdir "
                                "(--checkpoint), or leave it out to begin anew, or to go on with the workdir's own run")
    return Trained(path) if diffusers.is_folder(path) else checkpoint.find(path)


def check_origin(config: ConfigDict, workdir: Path, begun: Trained | None) -> None:
    """Put the origin's hash into the config, and refuse one that the workdir's own run did not begin from.

    `begun` is that run's newest checkpoint, or None. Without an origin in the config, the run's origin stays.
    """
    t = config.training
    theirs = begun.config.training if begun is not None else None
    if not t.origin:
        t.origin, t.origin_sha256 = (theirs.origin, theirs.origin_sha256) if theirs else ("", "")
        t.origin_weights = theirs.origin_weights if theirs else t.origin_weights
    if theirs is not None and theirs.origin and theirs.origin_weights != t.origin_weights:
        raise ValueError(f"{workdir} holds a run already, which began from other weights of {theirs.origin}: set "
                         f"training.origin_weights={theirs.origin_weights} to go on with it, or begin the new run in "
                         "another --workdir")
    if theirs is not None and (theirs.origin, theirs.origin_sha256) == (t.origin, t.origin_sha256):
        return  # the run's own config says so, and the file may be deleted by now
    if not t.origin:
        return
    path = find_origin(t.origin).path
    t.origin_sha256 = checkpoint.file_hash(diffusers.network_folder(path) if path.is_dir() else path)
    if theirs is not None and theirs.origin_sha256 != t.origin_sha256:
        was = f"began from {theirs.origin}, with other content" if theirs.origin_sha256 else "did not begin from a file"
        raise ValueError(f"{workdir} holds a run already, which {was}: leave --checkpoint {t.origin} out to go on with "
                         "it, or begin the new run in another --workdir")


def check_fits(config: ConfigDict, workdir: Path, shape: tuple[int, ...]) -> None:
    """Raise what `take_weights` would raise for a new run in a workdir, before any work is done."""
    if config.training.origin and checkpoint.newest(workdir)[0] is None:
        take_weights(config, kind_of(config).build(config, shape), shape)


@torch.no_grad()
def take_weights(config: ConfigDict, model: Trainable, shape: tuple[int, ...]) -> list[str]:
    """Copy the weights of the checkpoint training.origin into `model`, a fresh one for examples of `shape`.

    Returns sentences for the log. Raises FileNotFoundError, or ValueError for a checkpoint that does not fit; then
    `model` is unchanged.
    """
    trained, t = find_origin(config.training.origin), config.training
    path, read = trained.path, _foreign if trained.card is None else _ours
    origin, notes = read(trained, config, shape)
    weights, target = origin.state_dict(), model.state_dict()
    anew = {_layer(name) for name, v in target.items() if name not in weights or weights[name].shape != v.shape}
    for name, value in target.items():
        if _layer(name) not in anew:
            value.copy_(weights[name])
    begun = [f"a new run, from the {'averaged' if t.origin_weights == 'ema' else 'raw'} weights of {path}"]
    if anew:
        begun.append(f"made anew, as they are others there, or none: {', '.join(sorted(anew))}")
    if unused := {_layer(name) for name in weights.keys() - target.keys()}:
        begun.append(f"without its {', '.join(sorted(unused))}")
    return begun + notes


def foreign_config(config: ConfigDict, channels: int | None = None) -> dict[str, Any]:
    """The config in the form of score_sde_pytorch, whose files carry none: VE networks are divided by sigma there."""
    theirs: dict[str, Any] = config.to_dict()
    theirs["model"]["scale_by_sigma"] = config.training.sde == "vesde"
    theirs["data"]["num_channels"] = channels or config.data.num_channels
    return theirs


def _ours(trained: Trained, config: ConfigDict, shape: tuple[int, ...]) -> tuple[Trainable, list[str]]:
    """The network of a checkpoint of ours, which may differ from the config in classes and channels; and warnings."""
    path, card, theirs = trained.path, trained.card, trained.config
    assert card is not None
    pairs = [
        ("", kind_of(theirs).name, kind_of(config).name),
        ("", _coded(theirs), _coded(config)),
        ("model.text_encoder ", theirs.model.text_sha256[:12] or "none", config.model.text_sha256[:12] or "none"),
        ("examples of shape ", _size(card.shape), _size(shape)),
    ]
    for what, have, want in pairs:
        if have != want:
            raise ValueError(f"{path} cannot be trained further with this config: it has {what}{have}, the config "
                             f"{want}; take a checkpoint of the same, or begin anew")
    bridge = ConfigDict(config.to_dict())
    bridge.data.centered = theirs.data.centered
    for key in ("uncertainty", "geometric"):  # of layers that a run may begin with, or leave
        bridge.training[key] = theirs.training[key]
    for key in ("num_classes", "class_conditional"):
        bridge.model[key] = theirs.model[key]
    if config.model.super_resolution:
        bridge.model.image_channels = card.shape[0]
    network = trained.network(config.training.origin_weights == "ema")
    example = _with_channels(shape, card.shape[0])
    fitting = _filled(path, kind_of(bridge).build(bridge, example), network.state_dict())
    others = [
        f"model.{key}={value}"
        for key, value in theirs.model.items()
        if key not in _FREE and key not in _READ_OTHERWISE and value != config.model[key]
    ]
    if others and not torch.equal(_answer(fitting, example), _answer(network, example)):
        raise ValueError(f"{path} has another network than the config: set {', '.join(others)} as it was (only keys "
                         "that the network uses matter), or begin anew")
    keys = [*(f"model.{key}" for key in _READ_OTHERWISE), "training.sde", "training.continuous", "data.centered"]
    lines = [line for line in configs.differences(theirs, config) if line.partition(":")[0] in keys]
    return network, [f"warning: the weights were trained to be read otherwise: {line}" for line in lines]


def _foreign(trained: Trained, config: ConfigDict, shape: tuple[int, ...]) -> tuple[Trainable, list[str]]:
    """The weights of a file of score_sde_pytorch or a folder of diffusers', in the config's model; and warnings."""
    path = trained.path
    if kind_of(config) is not MODEL:
        raise ValueError(f"{path} holds a score model, and the config trains {kind_of(config).name}: begin anew")
    bridge = ConfigDict(config.to_dict())
    bridge.training.uncertainty, bridge.training.geometric = False, 0.0
    remedy = _AS_IT_WAS
    if path.is_dir():
        where = diffusers.network_folder(path)
        theirs: nn.Module = diffusers.load_network(where).float()
        settings = score_sde_pytorch.read_config(where / "config.json")
        channels = int(settings.get("in_channels", shape[0]))
        wanted = diffusers.settings(settings, shape[-1]).items()
        own = [f"model.{key}={value}" for key, value in wanted if config.model[key] != value]
        remedy = f"set {', '.join(own)}" if own else "nothing in the section model makes that network"
    else:
        theirs, channels = _score_sde(path, config, shape[0])
    network = theirs
    while isinstance(network, (Preconditioned, score_sde_pytorch.Divided)):
        network = network.network
    weights = {f"network.{name}": value for name, value in network.state_dict().items()}
    bridge.model.num_classes = len(weights.get("network.classes.table", ()))
    bridge.model.class_conditional = bridge.model.num_classes > 0
    example = _with_channels(shape, channels)
    model = _filled(path, kind_of(bridge).build(bridge, example), weights, remedy)
    if not _alike(model, theirs, example) and not path.is_dir():
        _negate(model, channels)  # a network whose output over sigma is the score has minus the sign of the noise
    if not _alike(model, theirs, example):
        raise ValueError(f"{path} and the config compute different outputs from its weights: set the sections model "
                         "and training as they were there, or begin anew")
    return model, _read_by_scheduler(path, model, example) if path.is_dir() else []


def _read_by_scheduler(folder: Path, model: Trainable, shape: tuple[int, ...]) -> list[str]:
    """A warning if the scheduler beside a network of diffusers' reads its output differently than the config."""
    try:
        theirs = diffusers.load_folder(folder)
    except (FileNotFoundError, ValueError):  # a network alone, or a scheduler without counterpart
        return []
    if _alike(model, theirs, shape):
        return []
    return [
        "warning: the weights were trained to be read otherwise: the scheduler of that folder gives another score than "
        "model.rule, model.label and the section's noise levels"
    ]


def _score_sde(path: Path, config: ConfigDict, channels: int) -> tuple[ScoreModel, int]:
    """The model in a file of score_sde_pytorch, and its number of channels, which the file does not say."""
    ema = config.training.origin_weights == "ema"
    *first, last = dict.fromkeys((channels, 3, 1))
    for number in first:
        with suppress(ValueError):
            return score_sde_pytorch.load_score_sde_file(path, foreign_config(config, number), ema), number
    return score_sde_pytorch.load_score_sde_file(path, foreign_config(config, last), ema), last


def _filled(path: Path, model: Trainable, weights: Mapping[str, Tensor], remedy: str = _AS_IT_WAS) -> Trainable:
    """The model with these weights. Raises ValueError, with the remedy, unless names and shapes agree."""
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        here, there = (str(tuple(v[name].shape)) if name in v else "none" for v in (own, weights))
        if here != there:
            raise ValueError(f"{path} has another network than the config: {name} is {there} there and {here} here; "
                             f"{remedy}")
    model.load_state_dict(weights)
    return model.eval()


def _negate(model: Trainable, channels: int) -> None:
    """Turn the sign of a network's output, at each convolution that outputs an image."""
    for module in model.modules():
        last = module.conv if isinstance(module, Head) else getattr(module, "last", None)
        if isinstance(last, nn.Conv2d) and last.out_channels == channels:
            for value in last.parameters():
                value.neg_()


def _alike(made: Trainable, theirs: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether two models (or the network of one, and another network) have like outputs.

    Discrete models of score_sde_pytorch label times between a chain's steps in another way, so outputs may differ by a
    few per cent; another sign, rule or order of the steps makes far larger differences.
    """
    if not isinstance(theirs, ScoreModel):
        return torch.equal(_answer(made, shape), _answer(theirs, shape))
    assert isinstance(made, Preconditioned)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    for t in (0.3, 1.0):
        a, b = (model.score(x, torch.tensor(t, dtype=torch.float64)) for model in (made, theirs))
        if not (a - b).norm() <= 0.05 * b.norm():
            return False
    return True


def _answer(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """A network's output for one example of random numbers, with as few conditions as it allows."""
    source = torch.Generator().manual_seed(0)
    x = torch.randn(1, *shape, generator=source)
    if isinstance(model, ConvolutionalAutoencoder):
        return model.decode(model.encode(x)[0])
    network = getattr(model, "network", model)
    image = {"image": x} if getattr(network, "image_channels", 0) else {}
    output: Tensor = network(x, torch.full((1,), 3.0), **image)
    return output


def _coded(config: ConfigDict) -> str:
    sha256 = config.data.autoencoder_sha256
    return f"the codes of an autoencoder, sha256 {sha256[:12]}..." if sha256 else "no codes"


def _size(shape: tuple[int, ...]) -> str:
    """What two runs' examples must have in common: the size of vectors, the rank of the others."""
    return str(shape) if len(shape) == 1 else f"(channels and {len(shape) - 1} dimensions)"


def _with_channels(shape: tuple[int, ...], channels: int) -> tuple[int, ...]:
    return shape if len(shape) == 1 else (channels, *shape[1:])


def _layer(name: str) -> str:
    return name.rpartition(".")[0]
