"""The context of a task on a checkpoint: one `Job` for each command.

A checkpoint carries the config that it was trained with and a description of its data. So sampling needs nothing else:
no config file, and no data that would be read or downloaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from ml_collections import ConfigDict

from .. import config as configs
from ..config.build import resolve_classes, resolve_conditions
from ..data.codecs import Codec, codec_of
from ..data.sets import Data, Split
from ..machine.log import log
from ..machine.parallel import Processes
from ..models.base import ScoreModel
from . import checkpoint
from .checkpoint import Trained
from .class_names import resolve_labels
from .codes import Opened, Source, check_codes, codec_from, opened
from .conditions import RESTORING, check_conditions
from .inputs import read_data
from .options import scales_of
from .origin import foreign_config

# Keys of the section model that do not change its network or its noise, and those that are filled in from the data.
_SILENT = ("dropout", "ema_rate", "ema_halflife", "ema_power", "text_encoder")
_FILLED = ("name_sha256", "num_classes", "image_channels", "text_width", "pooled_width", "text_sha256")


@dataclass(frozen=True)
class Job:
    """What a task on a checkpoint works with.

    Args:
        model: the checkpoint's model, on this process' device, without a condition.
        config: the command's, with what the checkpoint says of the model.
        codec: between examples as they are stored and as the model sees them.
        trained: the checkpoint.
        shape: that of an example as the model sees it.
        workdir: the folder of results.
        processes: those that share the work.
    """

    model: ScoreModel
    config: ConfigDict
    codec: Codec
    trained: Trained
    shape: tuple[int, ...]
    workdir: Path
    processes: Processes


def open_job(
    options: argparse.Namespace, config: ConfigDict, carried: Trained | None, workdir: Path, processes: Processes
) -> tuple[Job, Data]:
    """The job of a command, and its data as they are stored, without examples where the mode reads none.

    `carried` is the checkpoint that the config comes from, if any. Raises FileNotFoundError for a missing checkpoint or
    missing data, and ValueError for those that do not fit.
    """
    trained = _checkpoint(options.checkpoint or workdir, carried, processes)
    autoencoder = opened(config.data.autoencoder, processes.device) if config.data.autoencoder else None
    described = _described(trained, config, autoencoder)
    drawn = options.mode == "interpolate" and config.interpolation.between == "seeds"
    on_data = options.mode in ("likelihood", "dequantize", "encode", "interpolate", *RESTORING) and not drawn
    reads = on_data and options.input is None
    data = read_data(config, processes) if described is None or reads else described
    resolve_labels(config, data, options.mode in RESTORING)
    _adopt(config, trained, options.mode, scales_of(options))
    resolve_classes(config, data.num_classes, f"data.dataset={config.data.dataset}")
    source = source_of(config, autoencoder, data)
    shape = data.shape if source is None else source.shape
    model = _model(trained, options.mode, config, shape, processes)
    plain = codec_of(data.levels, config.data.centered, data.rate)
    codec = plain if source is None else codec_from(trained, source)
    return Job(model, config, codec, trained, shape, workdir, processes), data


def carried_config(where: str | Path) -> tuple[ConfigDict, Path, Trained | None]:
    """The config of a checkpoint, a workdir's newest one, or else the workdir's config.json; that file; the checkpoint.

    Raises FileNotFoundError where there is neither, and ValueError for a checkpoint that carries no config.
    """
    where = Path(where)
    written = where / "config.json"
    trained = checkpoint.newest(where)[0] if written.is_file() else None
    if written.is_file() and trained is None:
        return configs.from_json(written), written, None
    trained = trained or checkpoint.find(where)
    if trained.config is None:
        raise ValueError(f"{trained.path} carries no config: give the one that it was trained with, --config FILE")
    return trained.config, trained.path, trained


def source_of(config: ConfigDict, autoencoder: Opened | None, data: Data) -> Source | None:
    """The autoencoder of a model of codes, for these images; its hash goes into the config."""
    config.data.autoencoder_sha256 = "" if autoencoder is None else autoencoder.sha256
    if autoencoder is None:
        return None
    source = autoencoder.source(data.levels, data.shape)
    log.info("autoencoder: %s, codes of shape %s", source.where, source.shape)
    return source


def _checkpoint(where: str | Path, carried: Trained | None, processes: Processes) -> Trained:
    """The checkpoint that the main process finds at `where`, which must be the same file for all processes."""
    own = [] if carried is None else [carried]

    def main() -> str:
        if not own:
            own.append(checkpoint.find(where))
        return str(own[0].path)

    path = Path(processes.agreed(main))
    if processes.world > 1:
        sha256 = checkpoint.file_hash(path) if path.is_file() else "nothing"
        processes.check_same(sha256, f"{path} is not the same file everywhere", "work in one shared folder")
    return own[0] if own and own[0].path == path else Trained.open(path)


def _described(trained: Trained, config: ConfigDict, autoencoder: Opened | None) -> Data | None:
    """The data of a checkpoint's model, as it describes them, without examples; None for files of version 0.1.0.

    Files of score_sde_pytorch are for images of 256 levels, with the size and channels of the config.
    """
    if trained.card is None:
        d = config.data
        size = (d.num_channels, d.image_size, d.image_size)
        return Data(_empty(size, 256), _empty(size, 256)) if all(size) else None
    card, shape = trained.data, trained.card.shape
    if card is None:
        return None
    if trained.card.codes:
        if autoencoder is None:
            check_codes(trained, "", "")
        assert autoencoder is not None
        shape = autoencoder.decoded_shape(shape)
    split, names, empty = _empty(shape, card.levels), card.class_names, card.empty_classes
    return Data(split, split, card.levels, card.num_classes, rate=card.rate, class_names=names, empty_classes=empty)


def _empty(shape: tuple[int, ...], levels: int | None) -> Split:
    """A split without examples, of this shape."""
    return Split(torch.empty(0, *shape, dtype=torch.float32 if levels is None else torch.uint8))


def _adopt(config: ConfigDict, trained: Trained, mode: str, scales: Sequence[float]) -> None:
    """Put into the config what the checkpoint's own says of model, noise and scale of the data; log what differs.

    Raises ValueError for the config of another model, and for what its model cannot do.
    """
    if trained.card is None:
        return
    theirs = trained.config
    _follow_own(theirs, config)
    if theirs.model.name != config.model.name:
        raise ValueError(f"{trained.path} has model.name={theirs.model.name}, and the config {config.model.name}: take "
                         "the config that it was trained with, or leave --config out, as the checkpoint carries it")
    resolve_conditions(config, trained.card.shape[0])
    check_conditions(trained, config, mode, scales)
    resolve_classes(config, theirs.model.num_classes, str(trained.path))
    keys = [f"model.{key}" for key in theirs.model if key not in (*_SILENT, *_FILLED)]
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


def _follow_own(theirs: ConfigDict, config: ConfigDict) -> None:
    """Let the checkpoint's config name the user's own network and SDE where the config does, if they are the same."""
    for section, key in (("model", "name"), ("training", "sde")):
        then, now = theirs[section], config[section]
        trained_with, named = ((c[f"{key}_sha256"], c[key].rpartition(":")[2]) for c in (then, now))
        if named[0] and named == trained_with:
            then[key] = now[key]


def _model(
    trained: Trained, mode: str, config: ConfigDict, example: tuple[int, ...], processes: Processes
) -> ScoreModel:
    """The model to sample from or to evaluate, on this process' device."""
    ema = checkpoint.chosen(config, "sampling" if mode == "sample" else "eval")
    check_codes(trained, config.data.autoencoder_sha256, config.data.autoencoder)
    shape = example if trained.card is None else trained.card.shape
    if shape != example:
        raise ValueError(f"{trained.path} was trained on examples of shape {shape}, but {config.data.dataset} has "
                         f"{example}")
    log.info("checkpoint: %s (%s weights)", trained.path, checkpoint.weights_name(ema))
    return trained.model(ema, processes.device, foreign_config(config) if trained.card is None else None)
