"""What a checkpoint carries: the config that it was trained with, and a description of its data.

So it is enough to sample from: no config file is asked for, and no data are read or downloaded.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from ml_collections import ConfigDict

from .. import config as configs
from ..config.build import resolve_classes, resolve_conditions
from ..data.sets import Data, Split
from . import checkpoint
from .codes import check_codes, decoded_shape
from .conditions import RESTORING, check_conditions

# Of the section model: without a say in what its network and its noise are, or found by themselves.
_SILENT = ("dropout", "ema_rate", "ema_halflife", "text_encoder")
_FOUND = ("name_sha256", "num_classes", "image_channels", "text_width", "pooled_width", "text_sha256")

log = logging.getLogger("score_sde")


def carried_config(where: str | Path) -> tuple[ConfigDict, Path]:
    """The config in a checkpoint, or in a workdir's newest one, or in the config.json of one without; and that file.

    Raises FileNotFoundError where there is none, and ValueError for a file that carries no config.
    """
    where = Path(where)
    kept = where / "config.json"
    if kept.is_file() and checkpoint.newest(where)[0] is None:
        return configs.from_json(kept), kept
    path = checkpoint.find(where)
    if path.is_file() and path.suffix != checkpoint.SUFFIX:
        raise ValueError(f"{path} carries no config: give the one that it was trained with, --config FILE")
    return configs.from_text(checkpoint.read_card(path).config, str(path)), path


def reads_data(mode: str, config: ConfigDict, given: bool) -> bool:
    """Whether a mode that works on a checkpoint reads its data set; the user's own examples may be `given`."""
    if mode == "interpolate" and config.interpolation.between == "seeds":
        return False
    return not given and mode in ("likelihood", "dequantize", "encode", "interpolate", *RESTORING)


def described(path: Path, config: ConfigDict, device: torch.device) -> Data | None:
    """The data of a checkpoint's model as far as the checkpoint knows them: shape, levels, classes, and no examples.

    None where it does not: in files of version 0.1.0. Those of score_sde_pytorch are of images of 256 levels, of the
    size and channels that the config gives.
    """
    if path.suffix != checkpoint.SUFFIX:
        d = config.data
        size = (d.num_channels, d.image_size, d.image_size)
        return Data(_none(size, 256), _none(size, 256)) if all(size) else None
    card = checkpoint.read_card(path)
    if not card.data:
        return None
    about, shape = checkpoint.DataCard.from_json(card.data), card.shape
    if card.codes:
        if not config.data.autoencoder:
            check_codes(path, "", "")
        shape = decoded_shape(config.data.autoencoder, shape, device)
    split = _none(shape, about.levels)
    return Data(
        split,
        split,
        about.levels,
        about.num_classes,
        rate=about.rate,
        class_names=about.class_names,
        empty_classes=about.empty_classes,
    )


def as_trained(config: ConfigDict, path: Path, mode: str, scales: Sequence[float]) -> None:
    """Put into the config what the checkpoint's own says of the model, its noise and its data's scale.

    So whatever is asked for is done as it was trained; what the config says otherwise is told. Raises ValueError for
    the config of another model, and for what its model cannot do.
    """
    if path.suffix != checkpoint.SUFFIX:
        return
    card = checkpoint.read_card(path)
    theirs = configs.from_text(card.config, str(path))
    if theirs.model.name != config.model.name:
        raise ValueError(
            f"{path} holds a {theirs.model.name}, and the config is of a {config.model.name}: take the config that it "
            "was trained with, or leave --config out, as the checkpoint carries it"
        )
    resolve_conditions(config, card.shape[0])
    check_conditions(path, config, mode, scales)
    resolve_classes(config, theirs.model.num_classes, str(path))
    keys = [f"model.{key}" for key in theirs.model if key not in (*_SILENT, *_FOUND)]
    keys += ["training.sde", "training.continuous", "data.centered", "data.uniform_dequantization"]
    for line in configs.differences(config, theirs):
        if line.partition(":")[0] in keys:
            log.warning("warning: the checkpoint's model is not as the config says, and is used as it is: %s", line)
    encoder = config.model.text_encoder
    config.model.update(theirs.model)
    config.training.update(theirs.training)
    config.model.text_encoder = encoder
    config.data.centered, config.data.uniform_dequantization = theirs.data.centered, theirs.data.uniform_dequantization
    configs.validate(config)


def _none(shape: tuple[int, ...], levels: int | None) -> Split:
    """No examples, of this shape."""
    return Split(torch.empty(0, *shape, dtype=torch.float32 if levels is None else torch.uint8))
