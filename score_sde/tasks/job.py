"""The context of a task on a checkpoint: one `Job`, which is made here, once for a command.

A checkpoint carries the config that it was trained with and a description of its data. So it is enough to sample from:
no config file is asked for, and no data are read or downloaded.
"""

from __future__ import annotations

import argparse
import socket
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

# Of the section model: without a say in what its network and its noise are, or found by themselves.
_SILENT = ("dropout", "ema_rate", "ema_halflife", "text_encoder")
_FOUND = ("name_sha256", "num_classes", "image_channels", "text_width", "pooled_width", "text_sha256")


@dataclass(frozen=True)
class Job:
    """What a task on a checkpoint works with, and hands on.

    Args:
        model: the checkpoint's, on this process's device, without a condition.
        config: the command's, with what the checkpoint says of the model.
        codec: between examples as they are stored and as the model sees them.
        trained: the checkpoint.
        shape: of an example as the model sees it.
        workdir: below which results lie.
        processes: that share the work.
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

    `carried` is the checkpoint that the config is from, if it is from one. Raises FileNotFoundError and ValueError for
    what is not there or does not fit.
    """
    trained = _checkpoint(options.checkpoint or workdir, carried, processes)
    made = opened(config.data.autoencoder, processes.device) if config.data.autoencoder else None
    known = _described(trained, config, made)
    reads = _reads_data(options.mode, config, options.input is not None)
    data = read_data(config, processes) if known is None or reads else known
    resolve_labels(config, data, options.mode in RESTORING)
    _adopt(config, trained, options.mode, scales_of(options))
    resolve_classes(config, data.num_classes, f"data.dataset={config.data.dataset}")
    source = source_of(config, made, data)
    shape = data.shape if source is None else source.shape
    model = _model(trained, options.mode, config, shape, processes)
    plain = codec_of(data.levels, config.data.centered, data.rate)
    codec = plain if source is None else codec_from(trained, source)
    return Job(model, config, codec, trained, shape, workdir, processes), data


def carried_config(where: str | Path) -> tuple[ConfigDict, Path, Trained | None]:
    """The config in a checkpoint, or in a workdir's newest one, or in the config.json of one without; that file; and
    the checkpoint, if it is one.

    Raises FileNotFoundError where there is none, and ValueError for a file that carries no config.
    """
    where = Path(where)
    kept = where / "config.json"
    trained = checkpoint.newest(where)[0] if kept.is_file() else None
    if kept.is_file() and trained is None:
        return configs.from_json(kept), kept, None
    trained = trained or checkpoint.find(where)
    if trained.config is None:
        raise ValueError(f"{trained.path} carries no config: give the one that it was trained with, --config FILE")
    return trained.config, trained.path, trained


def source_of(config: ConfigDict, made: Opened | None, data: Data) -> Source | None:
    """The autoencoder of a model of codes, for these images; its hash goes into the config."""
    config.data.autoencoder_sha256 = "" if made is None else made.sha256
    if made is None:
        return None
    source = made.source(data.levels, data.shape)
    log.info("autoencoder: %s, codes of shape %s", source.where, source.shape)
    return source


def _checkpoint(where: str | Path, carried: Trained | None, processes: Processes) -> Trained:
    """The checkpoint that the main process finds at `where`, and that must be there for the others too."""
    own = [] if carried is None else [carried]

    def found() -> str:
        if not own:
            own.append(checkpoint.find(where))
        return str(own[0].path)

    path = Path(processes.agreed(found))
    if processes.world > 1:
        here = checkpoint.file_hash(path) if path.is_file() else "nothing"
        seen = [text.split(" ") for text in processes.texts(f"{here} {socket.gethostname()}")]
        other = next((rank for rank, (sha256, _) in enumerate(seen) if sha256 != seen[0][0]), None)
        if other is not None:
            raise ValueError(
                f"{path} is not the same file for process 0 on {seen[0][1]} and process {other} on {seen[other][1]}: "
                "work in one shared folder"
            )
    return own[0] if own and own[0].path == path else Trained.open(path)


def _reads_data(mode: str, config: ConfigDict, own: bool) -> bool:
    """Whether a mode that works on a checkpoint reads its data set; the examples may be the user's `own`."""
    if mode == "interpolate" and config.interpolation.between == "seeds":
        return False
    return not own and mode in ("likelihood", "dequantize", "encode", "interpolate", *RESTORING)


def _described(trained: Trained, config: ConfigDict, made: Opened | None) -> Data | None:
    """The data of a checkpoint's model as far as the checkpoint knows them: shape, levels, classes, and no examples.

    None where it does not: in files of version 0.1.0. Those of score_sde_pytorch are of images of 256 levels, of the
    size and channels that the config gives.
    """
    if trained.card is None:
        d = config.data
        size = (d.num_channels, d.image_size, d.image_size)
        return Data(_none(size, 256), _none(size, 256)) if all(size) else None
    known, shape = trained.data, trained.card.shape
    if known is None:
        return None
    if trained.card.codes:
        if made is None:
            check_codes(trained, "", "")
        assert made is not None
        shape = made.decoded_shape(shape)
    split = _none(shape, known.levels)
    return Data(
        split,
        split,
        known.levels,
        known.num_classes,
        rate=known.rate,
        class_names=known.class_names,
        empty_classes=known.empty_classes,
    )


def _none(shape: tuple[int, ...], levels: int | None) -> Split:
    """No examples, of this shape."""
    return Split(torch.empty(0, *shape, dtype=torch.float32 if levels is None else torch.uint8))


def _adopt(config: ConfigDict, trained: Trained, mode: str, scales: Sequence[float]) -> None:
    """Put into the config what the checkpoint's own says of the model, its noise and its data's scale.

    So whatever is asked for is done as it was trained; what the config says otherwise is logged. Raises ValueError for
    the config of another model, and for what its model cannot do.
    """
    if trained.card is None:
        return
    theirs = trained.config
    if theirs.model.name != config.model.name:
        raise ValueError(
            f"{trained.path} holds a {theirs.model.name}, and the config is of a {config.model.name}: take the config "
            "that it was trained with, or leave --config out, as the checkpoint carries it"
        )
    resolve_conditions(config, trained.card.shape[0])
    check_conditions(trained, config, mode, scales)
    resolve_classes(config, theirs.model.num_classes, str(trained.path))
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


def _model(
    trained: Trained, mode: str, config: ConfigDict, example: tuple[int, ...], processes: Processes
) -> ScoreModel:
    """The model to sample from or to evaluate, on this process' device."""
    weights = (config.sampling if mode == "sample" else config.eval).weights
    check_codes(trained, config.data.autoencoder_sha256, config.data.autoencoder)
    shape = example if trained.card is None else trained.card.shape
    if shape != example:
        raise ValueError(
            f"{trained.path} was trained on examples of shape {shape}, but {config.data.dataset} has {example}"
        )
    log.info("checkpoint: %s (%s weights)", trained.path, weights)
    return trained.model(weights == "ema", processes.device, foreign_config(config) if trained.card is None else None)
