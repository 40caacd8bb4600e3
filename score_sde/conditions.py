"""From a config to a model given its conditions: which labels, and what guides by them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ml_collections import ConfigDict
from torch import Tensor

from . import checkpoint
from . import config as configs
from .guidance import classifier, guide
from .model import ScoreModel
from .noisy_classifier import NoisyClassifier


class Guides(NamedTuple):
    """What guides a model besides itself, and what a stamp says of it."""

    classifier: NoisyClassifier | None = None
    reference: ScoreModel | None = None  # the weaker model of autoguidance
    reference_told: bool = False  # whether that is given the labels too
    about: dict[str, str] | None = None


def load_guides(config: ConfigDict, model: ScoreModel, shape: tuple[int, ...], device: torch.device) -> Guides:
    """The classifier or the weaker model that the section sampling names, for a model of examples of `shape`.

    Raises FileNotFoundError where none is, and ValueError for one of other data, another shape or another SDE.
    """
    s = config.sampling
    ema = s.weights == "ema"
    if s.classifier:
        path = _found(s.classifier, "sampling.classifier", "a classifier, such as configs/classifier_digits.py")
        judge = checkpoint.load_classifier(path, ema, device)
        _check_kin(path, "sampling.classifier", config, shape, judge.sde == model.sde)
        return Guides(classifier=judge, about={"classifier_sha256": checkpoint.file_hash(path)})
    if s.guidance_checkpoint and s.guidance != 1:
        path = _found(s.guidance_checkpoint, "sampling.guidance_checkpoint", "a weaker model")
        weak = checkpoint.load(path, ema=ema, map_location=device)
        theirs = _check_kin(path, "sampling.guidance_checkpoint", config, shape, weak.sde == model.sde)
        if theirs.model.class_conditional and not config.model.class_conditional:
            raise ValueError(
                f"sampling.guidance_checkpoint={path} is class-conditional, and the model that it is to guide is not: "
                "take a weaker model without classes"
            )
        about = {"reference_sha256": checkpoint.file_hash(path)}
        return Guides(reference=weak, reference_told=theirs.model.class_conditional, about=about)
    return Guides()


def _found(where: str, key: str, what: str) -> Path:
    try:
        path = checkpoint.find(where)
        checkpoint.read_card(path)
        return path
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{key}={where}: {error}; train {what} there first") from None


def _check_kin(path: Path, key: str, config: ConfigDict, shape: tuple[int, ...], same_sde: bool) -> ConfigDict:
    """The config of a checkpoint. Raises ValueError where it is not of the model's states."""
    card = checkpoint.read_card(path)
    theirs = configs.from_text(card.config, str(path))
    pairs = [
        ("examples of shape", card.shape, shape),
        ("data.dataset", theirs.data.dataset, config.data.dataset),
        ("data.centered", theirs.data.centered, config.data.centered),
    ]
    if config.model.class_conditional and theirs.model.num_classes:
        pairs.append(("classes, as many as", theirs.model.num_classes, config.model.num_classes))
    for what, have, want in pairs:
        if have != want:
            raise ValueError(
                f"{key}={path} is of {what} {have}, and the model of {want}: train one on the model's data"
            )
    if not same_sde:
        raise ValueError(f"{key}={path} has another SDE than the model: train one with the model's training.sde")
    return theirs


def check_conditions(path: Path, config: ConfigDict, mode: str) -> None:
    """Raise ValueError where the checkpoint's model knows other conditions than the config, or than `mode` asks for."""
    if path.suffix != checkpoint.SUFFIX:
        return
    theirs = configs.from_text(checkpoint.read_card(path).config, str(path))
    m, s = theirs.model, config.sampling
    if m.class_conditional != config.model.class_conditional:
        raise ValueError(
            f"{path} was trained {'with' if m.class_conditional else 'without'} classes, and the config says "
            f"otherwise: set model.class_conditional={m.class_conditional}"
        )
    if not m.class_conditional or theirs.training.condition_dropout > 0:
        return
    free = s.guidance != 1 and not s.classifier and not s.guidance_checkpoint
    asked = "sampling.guidance" if free else "sampling.labels=-1" if -1 in s.labels else ""
    if mode != "sample":
        asked = "" if config.eval.conditional else "eval.conditional=False"
    if asked:
        raise ValueError(
            f"{asked} needs a model that knows examples without label, and {path} was trained with "
            "training.condition_dropout=0: train one with 0.1"
        )


def sampled_labels(config: ConfigDict, guides: Guides | None = None) -> list[int]:
    """The classes to sample in turn; none of a model without them and without a classifier.

    Raises ValueError for a class that does not exist.
    """
    judge = None if guides is None else guides.classifier
    classes = config.model.num_classes if config.model.class_conditional else 0
    if judge is not None:
        classes = classes or judge.classes
    if not classes:
        return []
    for label in config.sampling.labels:
        if not -1 <= label < classes:
            raise ValueError(f"sampling.labels: there is no class {label}; there are 0 to {classes - 1}, -1 for none")
    return list(config.sampling.labels) or list(range(classes))


def in_turn(labels: list[int], first: int, count: int) -> Tensor:
    """The labels of the examples first to first + count - 1, (count,)."""
    return torch.tensor([labels[i % len(labels)] for i in range(first, first + count)] if labels else [])


def conditional(model: ScoreModel, labels: Tensor, config: ConfigDict, guides: Guides) -> ScoreModel:
    """The model given its examples' labels, (B,), if it knows them, and guided as the section sampling says."""
    s = config.sampling
    told = model.given(label=labels) if config.model.class_conditional else model
    interval = {"low": s.guidance_low, "high": s.guidance_high or math.inf}
    if guides.classifier is not None:
        return classifier(told, guides.classifier, s.guidance, **interval, label=labels)
    if s.guidance == 1:
        return told
    reference = guides.reference or model.given(label=None)
    reference = reference.given(label=labels) if guides.reference_told else reference
    return guide(told, reference, s.guidance, **interval, rescale=s.guidance_rescale)


def about(config: ConfigDict, labels: list[int], guides: Guides) -> dict[str, Any]:
    """What a stamp says of all this."""
    s = config.sampling
    settings = [s.guidance, s.guidance_low, s.guidance_high, s.guidance_rescale]
    return {"labels": labels, "guidance": settings if labels or guides.reference else None, **(guides.about or {})}


def told(config: ConfigDict) -> bool:
    """Whether the model is evaluated given each example's label."""
    return bool(config.model.class_conditional and config.eval.conditional)


def labelled(config: ConfigDict, model: ScoreModel, label: Tensor | None) -> ScoreModel:
    """The model, if it is conditional given the examples' labels. Raises ValueError where there are none."""
    if not told(config):
        return model
    if label is None:
        raise ValueError(
            "the model is class-conditional, and these examples have no labels: set eval.conditional=False"
        )
    return model.given(label=label)
