"""What a model is conditioned on, labels, captions and smaller images, from data or a command; and its guides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from ml_collections import ConfigDict
from torch import Tensor

from ..config.build import takes_labels
from ..data.captions import Text
from ..data.codecs import Codec
from ..data.sets import Split, digest, shrink
from ..machine.devices import sent
from ..models.base import ScoreModel, absent
from ..models.classifier import NoisyClassifier
from ..models.guidance import classifier, guide
from ..noise import ExampleStream, noise_source
from ..sdes.linear import SDE
from . import checkpoint
from .checkpoint import Trained

Conditions = dict[str, Tensor]
RESTORING = ("inpaint", "colorize", "superresolve", "deblur")  # modes
CPU = torch.device("cpu")
# What a model may be conditioned on: the key of the section model, in words, and the conditions' names.
_KINDS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("class_conditional", "labels", ("label",)),
    ("text_sha256", "text", ("text", "mask", "pooled")),
    ("super_resolution", "smaller images", ("image", "augmentation")),
)


class Guides(NamedTuple):
    """What guides a model besides itself, and the digests of it for stamps."""

    classifier: NoisyClassifier | None = None
    reference: ScoreModel | None = None  # the weaker model of autoguidance
    shared: tuple[str, ...] = ()  # the model's conditions that the weaker model is given too
    digests: dict[str, str] | None = None


def load_guides(config: ConfigDict, model: ScoreModel, shape: tuple[int, ...], device: torch.device) -> Guides:
    """The classifier or the weaker model that the section sampling names, for a model of examples of `shape`.

    Raises FileNotFoundError where it is missing, and ValueError for one of other data, another shape or another SDE.
    """
    s = config.sampling
    ema = s.weights == "ema"
    if s.classifier:
        trained = trained_at(s.classifier, "sampling.classifier", "a classifier (such as the config classifier_digits)")
        judge = trained.only(NoisyClassifier, ema, device)
        _check_kin(trained, "sampling.classifier", config, shape, judge.sde == model.sde)
        return Guides(classifier=judge, digests={"classifier_sha256": trained.sha256})
    if not s.guidance_checkpoint:
        return Guides()
    trained = trained_at(s.guidance_checkpoint, "sampling.guidance_checkpoint", "a weaker model")
    weak = trained.model(ema, device)
    _check_kin(trained, "sampling.guidance_checkpoint", config, shape, weak.sde == model.sde)
    theirs = trained.config.model
    for key, kind, _ in _KINDS:
        if theirs[key] and theirs[key] != config.model[key]:
            raise ValueError(f"sampling.guidance_checkpoint={trained.path} is conditioned on {kind}, and the model "
                             "that it guides is not, or on others: take a weaker model with the same "
                             f"model.{key.replace('sha256', 'encoder')}, or without")
    shared = tuple(name for key, _, names in _KINDS if theirs[key] for name in names)
    return Guides(reference=weak, shared=shared, digests={"reference_sha256": trained.sha256})


def trained_at(where: str, key: str, what: str) -> Trained:
    """The checkpoint of this package at `where`, which the config's `key` names.

    Raises FileNotFoundError, which says to train `what`, and ValueError for a file of another project.
    """
    try:
        trained = checkpoint.find(where)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{key}={where}: {error}; train {what} there first") from None
    if trained.card is None:
        raise ValueError(f"{key}={where} is no checkpoint of this package: train {what}, and name its workdir")
    return trained


def _check_kin(trained: Trained, key: str, config: ConfigDict, shape: tuple[int, ...], same_sde: bool) -> None:
    """Raise ValueError where a checkpoint is for other states than the model's."""
    assert trained.card is not None
    theirs, ours = trained.config, config
    pairs = [
        ("examples of shape", trained.card.shape, shape),
        ("data.dataset", theirs.data.dataset, ours.data.dataset),
        ("data.centered", theirs.data.centered, ours.data.centered),
        ("codes of data.autoencoder", theirs.data.autoencoder_sha256[:12], ours.data.autoencoder_sha256[:12]),
    ]
    if ours.model.class_conditional and theirs.model.num_classes:
        pairs.append(("model.num_classes", theirs.model.num_classes, ours.model.num_classes))
    for what, have, want in pairs:
        if have != want:
            raise ValueError(f"{key}={trained.path} has {what} {have}, and the model has {want}: train one on the "
                             "model's data")
    if not same_sde:
        raise ValueError(f"{key}={trained.path} has another SDE than the model: train one with its training.sde")


def check_conditions(trained: Trained, config: ConfigDict, mode: str, scales: Sequence[float] = ()) -> None:
    """Raise ValueError where the checkpoint's model has other conditions than the config, or than `mode` needs.

    `scales` of guidance take the place of sampling.guidance.
    """
    path, theirs, s = trained.path, trained.config, config.sampling
    m = theirs.model
    for key in ("class_conditional", "super_resolution"):
        if m[key] != config.model[key]:
            raise ValueError(f"{path} was trained with model.{key}={m[key]}, and the config has {config.model[key]}: "
                             f"set model.{key}={m[key]}")
    if m.text_sha256 != config.model.text_sha256:
        what = "no text encoder" if not m.text_sha256 else f"another text encoder, sha256 {m.text_sha256[:12]}..."
        was = f", that of {m.text_encoder}" if m.text_encoder else ""
        raise ValueError(f"{path} was trained with {what}{was}: set model.text_encoder as it was")
    if not (m.class_conditional or m.text_encoder) or theirs.training.condition_dropout > 0:
        return
    guided = any(scale != 1 for scale in scales or [s.guidance])
    free = guided and not s.classifier and not s.guidance_checkpoint and (s.negative_label < 0 or m.text_encoder)
    unlabelled = "sampling.guidance" if free else "sampling.labels=-1" if -1 in s.labels else ""
    if mode in RESTORING:
        unlabelled = unlabelled or ("" if s.labels else f"--mode {mode} without sampling.labels")
    elif mode != "sample":
        unlabelled = "" if config.eval.conditional else "eval.conditional=False"
    if unlabelled:
        raise ValueError(f"{unlabelled} needs a model that knows examples without label, and {path} was trained with "
                         "training.condition_dropout=0: train one with 0.1")


def sampled_labels(config: ConfigDict, guides: Guides | None = None) -> list[int]:
    """The classes to sample in turn; none without classes or a classifier. Raises ValueError for an unknown class."""
    judge = None if guides is None else guides.classifier
    classes = config.model.num_classes if config.model.class_conditional else 0
    classes = classes or (0 if judge is None else judge.classes)
    if not classes:
        return []
    s = config.sampling
    for key, label in (*(("labels", label) for label in s.labels), ("negative_label", s.negative_label)):
        if not -1 <= label < classes:
            raise ValueError(f"sampling.{key}: there is no class {label}; there are 0 to {classes - 1}, -1 for none")
    return list(s.labels) or list(range(classes))


def check_number(labels: Sequence[int], prompts: Sequence[str], number: int, key: str) -> None:
    """Raise ValueError for more classes or prompts than examples, whose `number` the config's `key` says."""
    for what, wanted in (("sampling.labels", len(labels)), ("--prompt", len(prompts))):
        if wanted > number:
            raise ValueError(f"{what} asks for {wanted}, and {key}={number} is fewer: set it to {wanted} or more, or "
                             "ask for fewer")


def in_turn(labels: list[int], first: int, count: int) -> Tensor:
    """The labels of the examples first to first + count - 1, (count,)."""
    return torch.tensor([labels[i % len(labels)] for i in range(first, first + count)] if labels else [])


class Wanted(NamedTuple):
    """The conditions of samples: classes and prompts, each in turn, and the examples that they are made from."""

    labels: list[int]
    prompts: tuple[str, ...] = ()
    text: Text | None = None  # embeddings of the prompts, and behind them that of the negative prompt
    images: Tensor | None = None  # uint8 (N, C, H, W), of lower resolution, one for each sample
    changed: Split | None = None  # examples from which, noised, the samples begin, in turn

    def start(self, first: int, count: int, config: ConfigDict, codec: Codec, sde: SDE, t: Tensor) -> Tensor | None:
        """The states at time t from which the samples first to first + count - 1 begin; None for the prior.

        Their noise depends on (sampling.seed, first + i), and is independent of the sampler's.
        """
        if self.changed is None:
            return None
        k = self.changed[torch.arange(first, first + count) % len(self.changed)][0].cpu()
        middle = torch.full(k.shape, 0.5) if config.data.uniform_dequantization else None
        x0 = codec.encode(k, middle).to(torch.float32)
        seed, stream = config.sampling.seed, ExampleStream.START
        noise = noise_source(tuple(x0.shape), seed, first, torch.float32, CPU, stream)
        return sde.perturb(x0, t, noise(x0))

    def of(
        self, first: int, count: int, config: ConfigDict, codec: Codec, sde: SDE
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Conditions of the samples first to first + count - 1, and those of the model that guides beside it.

        The second has what is not wanted (or nothing) in place of labels and prompts, and the same images.
        """
        wanted, beside = dict[str, Any](), dict[str, Any]()
        if self.labels and config.model.class_conditional:
            negative = config.sampling.negative_label
            wanted["label"] = in_turn(self.labels, first, count)
            beside["label"] = None if negative < 0 else torch.full((count,), negative)
        if self.text is not None:
            number = len(self.prompts)
            wanted |= self.text.condition(torch.arange(first, first + count) % number)
            unwanted = self.text.condition(torch.full((count,), number)) if len(self.text.mask) > number else None
            beside |= unwanted or dict.fromkeys(("text", "mask", "pooled"))
        if self.images is not None:
            seed, stream = config.sampling.seed, ExampleStream.AUGMENTATION
            noise = noise_source((count, *self.images.shape[1:]), seed, first, torch.float32, CPU, stream)
            level = torch.full((count,), config.sampling.augmentation, dtype=torch.float64)
            small = codec.encode(self.images[first : first + count])
            image = augmented(small, sde, level, lambda like: noise(level[0]))
            wanted, beside = wanted | image, beside | image
        return wanted, beside

    def described(self, scales: list[float], guides: Guides) -> dict[str, Any]:
        """What a stamp says of all this and of its guidance, beside the keys of the section sampling."""
        guided = bool(self.labels or self.prompts or guides.reference)
        facts: dict[str, Any] = {"labels": self.labels, "guidance": scales if guided else None}
        facts |= guides.digests or {}
        if self.text is not None:
            facts |= {"prompts": list(self.prompts), "text_sha256": digest(*self.text)}
        if self.images is not None:
            facts["images_sha256"] = digest(self.images)
        if self.changed is not None:
            facts["input_sha256"] = self.changed.digest()
        return facts


def conditional(
    model: ScoreModel, conditions: tuple[dict[str, Any], dict[str, Any]], labels: Tensor, config: ConfigDict,
    guides: Guides, scale: float,
) -> ScoreModel:
    """The model given the conditions of `Wanted.of`, and guided as the section sampling says, at this scale."""
    s, (wanted, beside) = config.sampling, conditions
    aware = model.given(**wanted) if wanted else model
    interval = {"low": s.guidance_low, "high": s.guidance_high or math.inf}
    if guides.classifier is not None:
        return classifier(aware, guides.classifier, scale, **interval, label=labels)
    if scale == 1:
        return aware
    reference = guides.reference or model.given(**beside)
    shared = {name: value for name, value in wanted.items() if name in guides.shared}
    reference = reference.given(**shared) if shared else reference
    return guide(aware, reference, scale, **interval, rescale=s.guidance_rescale)


def conditioned(config: ConfigDict) -> bool:
    """Whether the model is evaluated given each example's label or caption."""
    m = config.model
    return bool((m.class_conditional or m.text_encoder) and config.eval.conditional)


def labelled(config: ConfigDict, model: ScoreModel, label: Tensor | None) -> ScoreModel:
    """The model given the examples' labels, if it is conditioned on them. Raises ValueError where there are none."""
    if not conditioned(config):
        return model
    if label is None:
        raise ValueError("the model takes labels, and these examples have none: set eval.conditional=False")
    return model.given(label=label)


def given(
    config: ConfigDict, model: ScoreModel, split: Split, index: Tensor, text: Text | None, codec: Codec
) -> ScoreModel:
    """The model conditioned on a split's examples at `index`, (B,): labels and captions, if it is evaluated so, and
    smaller images, without noise, if it enlarges. Raises ValueError where the examples have no labels or captions.
    """
    conditions = of_data(config, split, index, text) if conditioned(config) else {}
    if config.model.super_resolution:
        none = torch.zeros(len(index), dtype=torch.float64)
        k = split[index][0]
        conditions |= low_resolution(k, config.model.super_resolution, codec, model.sde, none, torch.zeros_like)
    return model.given(**conditions) if conditions else model


def of_data(config: ConfigDict, split: Split, index: Tensor, text: Text | None) -> Conditions:
    """Labels and captions of a split's examples at `index`, (B,) on the CPU, as the model takes them.

    `text` has the embeddings of the data's captions. Raises ValueError where the split has no labels or captions.
    """
    conditions: Conditions = {}
    where = sent(index, split.device)
    if takes_labels(config):
        if split.y is None:
            raise ValueError("the model takes labels, and these examples have none: set eval.conditional=False")
        conditions["label"] = split.y[where]
    if config.model.text_encoder:
        if split.caption is None or text is None:
            raise ValueError("the model takes captions, and these examples have none: set eval.conditional=False")
        conditions |= text.condition(split.caption[where])
    return conditions


def left_out(conditions: Conditions, dropped: Tensor) -> Conditions:
    """The conditions, all left out together for the examples where `dropped`, (B,), is true (Ho & Salimans 2022)."""
    dropped = sent(dropped, next(iter(conditions.values())).device)
    return {
        name: torch.where(dropped.reshape(-1, *[1] * (value.ndim - 1)), absent(value), value)
        for name, value in conditions.items()
    }


def low_resolution(
    k: Tensor, factor: int, codec: Codec, sde: SDE, augmentation: Tensor, noise: Callable[[Tensor], Tensor]
) -> Conditions:
    """Images k (B, C, H, W) at 1/factor of their size, noised to the times `augmentation`, (B,) in [0, 1].

    A stage of a cascade that was trained on noisy images forgives the errors of the stage before (Ho et al. 2022,
    arXiv:2106.15282, section 4.2); it is conditioned on their noise's level, too.
    """
    return augmented(codec.encode(shrink(k, factor)), sde, augmentation, noise)


def augmented(image: Tensor, sde: SDE, augmentation: Tensor, noise: Callable[[Tensor], Tensor]) -> Conditions:
    """The conditions `image` and `augmentation`: images noised to these times; for time 0 they stay as they are."""
    noised = sde.perturb(image, augmentation, noise(image))
    augmentation = sent(augmentation, image.device, image.dtype)
    clean = augmentation.reshape(-1, *[1] * (image.ndim - 1)) == 0
    return {"image": torch.where(clean, image, noised), "augmentation": augmentation}
