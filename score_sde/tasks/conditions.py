"""What a model is conditioned on: labels, captions and smaller images, of the data or as asked for, and what guides it.

In training conditions come with the data, and `left_out` makes the model unconditional for some examples; a model that
was trained so can be guided.
"""

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


# What a model may be told: by which key of the section model, in words, and under which names.
_TOLD: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("class_conditional", "class-conditional", ("label",)),
    ("text_sha256", "of text", ("text", "mask", "pooled")),
    ("super_resolution", "of smaller images", ("image", "augmentation")),
)


class Guides(NamedTuple):
    """What guides a model besides itself, and what a stamp says of it."""

    classifier: NoisyClassifier | None = None
    reference: ScoreModel | None = None  # the weaker model of autoguidance
    reference_told: tuple[str, ...] = ()  # which of the model's conditions that is given too
    about: dict[str, str] | None = None


def load_guides(config: ConfigDict, model: ScoreModel, shape: tuple[int, ...], device: torch.device) -> Guides:
    """The classifier or the weaker model that the section sampling names, for a model of examples of `shape`.

    Raises FileNotFoundError where none is, and ValueError for one of other data, another shape or another SDE.
    """
    s = config.sampling
    ema = s.weights == "ema"
    if s.classifier:
        trained = trained_at(s.classifier, "sampling.classifier", "a classifier (such as the config classifier_digits)")
        judge = trained.classifier(ema, device)
        _check_kin(trained, "sampling.classifier", config, shape, judge.sde == model.sde)
        return Guides(classifier=judge, about={"classifier_sha256": trained.sha256})
    if s.guidance_checkpoint:
        trained = trained_at(s.guidance_checkpoint, "sampling.guidance_checkpoint", "a weaker model")
        weak = trained.model(ema, device)
        _check_kin(trained, "sampling.guidance_checkpoint", config, shape, weak.sde == model.sde)
        shared: tuple[str, ...] = ()
        for key, kind, names in _TOLD:
            have, want = trained.config.model[key], config.model[key]
            if have and have != want:
                raise ValueError(
                    f"sampling.guidance_checkpoint={trained.path} is {kind}, and the model that it is to guide is not "
                    f"so: take a weaker model with the same model.{key.replace('sha256', 'encoder')}, or without"
                )
            shared += names if have else ()
        return Guides(reference=weak, reference_told=shared, about={"reference_sha256": trained.sha256})
    return Guides()


def trained_at(where: str, key: str, what: str) -> Trained:
    """The checkpoint of ours at `where`, which the config's `key` names.

    Raises FileNotFoundError, which says to train it, and ValueError for a file of another project.
    """
    try:
        trained = checkpoint.find(where)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{key}={where}: {error}; train {what} there first") from None
    if trained.card is None:
        raise ValueError(f"{key}={where} is no checkpoint of this package: train {what}, and name its workdir")
    return trained


def _check_kin(trained: Trained, key: str, config: ConfigDict, shape: tuple[int, ...], same_sde: bool) -> None:
    """Raise ValueError where a checkpoint is not of the model's states."""
    assert trained.card is not None
    theirs = trained.config
    pairs = [
        ("examples of shape", trained.card.shape, shape),
        ("data.dataset", theirs.data.dataset, config.data.dataset),
        ("data.centered", theirs.data.centered, config.data.centered),
        ("codes of data.autoencoder", theirs.data.autoencoder_sha256[:12], config.data.autoencoder_sha256[:12]),
    ]
    if config.model.class_conditional and theirs.model.num_classes:
        pairs.append(("classes, as many as", theirs.model.num_classes, config.model.num_classes))
    for what, have, want in pairs:
        if have != want:
            raise ValueError(
                f"{key}={trained.path} is of {what} {have}, and the model of {want}: train one on the model's data"
            )
    if not same_sde:
        raise ValueError(
            f"{key}={trained.path} has another SDE than the model: train one with the model's training.sde"
        )


def check_conditions(trained: Trained, config: ConfigDict, mode: str, scales: Sequence[float] = ()) -> None:
    """Raise ValueError where the checkpoint's model knows other conditions than the config, or than `mode` asks for.

    `scales` are of guidance, in place of sampling.guidance.
    """
    path, theirs = trained.path, trained.config
    m, s = theirs.model, config.sampling
    if m.class_conditional != config.model.class_conditional:
        raise ValueError(
            f"{path} was trained {'with' if m.class_conditional else 'without'} classes, and the config says "
            f"otherwise: set model.class_conditional={m.class_conditional}"
        )
    if m.super_resolution != config.model.super_resolution:
        raise ValueError(
            f"{path} was trained with model.super_resolution={m.super_resolution}, and the config says "
            f"{config.model.super_resolution}: set it so"
        )
    if m.text_sha256 != config.model.text_sha256:
        what = "no text encoder" if not m.text_sha256 else f"another text encoder, sha256 {m.text_sha256[:12]}..."
        was = f", that of {m.text_encoder}" if m.text_encoder else ""
        raise ValueError(f"{path} was trained with {what}{was}: set model.text_encoder as it was")
    if not (m.class_conditional or m.text_encoder) or theirs.training.condition_dropout > 0:
        return
    guided = any(scale != 1 for scale in scales or [s.guidance])
    free = guided and not s.classifier and not s.guidance_checkpoint and (s.negative_label < 0 or m.text_encoder)
    asked = "sampling.guidance" if free else "sampling.labels=-1" if -1 in s.labels else ""
    if mode in RESTORING:
        asked = asked or ("" if s.labels else f"--mode {mode} without sampling.labels")
    elif mode != "sample":
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
    s = config.sampling
    for key, label in (*(("labels", label) for label in s.labels), ("negative_label", s.negative_label)):
        if not -1 <= label < classes:
            raise ValueError(f"sampling.{key}: there is no class {label}; there are 0 to {classes - 1}, -1 for none")
    return list(config.sampling.labels) or list(range(classes))


def check_number(labels: Sequence[int], prompts: Sequence[str], number: int, key: str) -> None:
    """Raise ValueError where more classes or prompts are asked for than examples, of which `key` says the `number`."""
    for what, asked in (("sampling.labels", labels), ("--prompt", prompts)):
        if len(asked) > number:
            raise ValueError(
                f"{what} asks for {len(asked)}, and {key}={number} is fewer: set it to {len(asked)} or more, or ask "
                "for fewer"
            )


def in_turn(labels: list[int], first: int, count: int) -> Tensor:
    """The labels of the examples first to first + count - 1, (count,)."""
    return torch.tensor([labels[i % len(labels)] for i in range(first, first + count)] if labels else [])


class Wanted(NamedTuple):
    """What is asked for of the samples: classes and prompts, each in turn, and the examples that they are made of."""

    labels: list[int]
    prompts: tuple[str, ...] = ()
    text: Text | None = None  # of the prompts, and behind them of what is not wanted
    images: Tensor | None = None  # uint8 (N, C, H, W), of lower resolution, one for each sample
    changed: Split | None = None  # from which, noised, the samples begin, in turn

    def start(self, first: int, count: int, config: ConfigDict, codec: Codec, sde: SDE, t: Tensor) -> Tensor | None:
        """The states at time t from which the samples first to first + count - 1 begin; None where from the prior.

        Their noise is of (sampling.seed, first + i), and another than the sampler's.
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
        told, beside = dict[str, Any](), dict[str, Any]()
        if self.labels and config.model.class_conditional:
            negative = config.sampling.negative_label
            told["label"] = in_turn(self.labels, first, count)
            beside["label"] = None if negative < 0 else torch.full((count,), negative)
        if self.text is not None:
            index = torch.arange(first, first + count) % len(self.prompts)
            told |= self.text.condition(index)
            unwanted = len(self.text.mask) > len(self.prompts)
            beside |= (
                self.text.condition(torch.full((count,), len(self.prompts)))
                if unwanted
                else dict.fromkeys(("text", "mask", "pooled"))
            )
        if self.images is not None:
            seed, stream = config.sampling.seed, ExampleStream.AUGMENTATION
            noise = noise_source((count, *self.images.shape[1:]), seed, first, torch.float32, CPU, stream)
            level = torch.full((count,), config.sampling.augmentation, dtype=torch.float64)
            small = codec.encode(self.images[first : first + count])
            image = augmented(small, sde, level, lambda like: noise(level[0]))
            told, beside = told | image, beside | image
        return told, beside

    def described(self, scales: list[float], guides: Guides) -> dict[str, Any]:
        """What a stamp says of all this and of its guidance, beside the keys of the section sampling."""
        guided = bool(self.labels or self.prompts or guides.reference)
        facts: dict[str, Any] = {"labels": self.labels, "guidance": scales if guided else None, **(guides.about or {})}
        if self.text is not None:
            facts |= {"prompts": list(self.prompts), "text_sha256": digest(*self.text)}
        if self.images is not None:
            facts["images_sha256"] = digest(self.images)
        if self.changed is not None:
            facts["input_sha256"] = self.changed.digest()
        return facts


def conditional(
    model: ScoreModel,
    conditions: tuple[dict[str, Any], dict[str, Any]],
    labels: Tensor,
    config: ConfigDict,
    guides: Guides,
    scale: float,
) -> ScoreModel:
    """The model given the conditions of `Wanted.of`, and guided as the section sampling says but for the scale."""
    s, (wanted, beside) = config.sampling, conditions
    told = model.given(**wanted) if wanted else model
    interval = {"low": s.guidance_low, "high": s.guidance_high or math.inf}
    if guides.classifier is not None:
        return classifier(told, guides.classifier, scale, **interval, label=labels)
    if scale == 1:
        return told
    reference = guides.reference or model.given(**beside)
    shared = {name: value for name, value in wanted.items() if name in guides.reference_told}
    reference = reference.given(**shared) if shared else reference
    return guide(told, reference, scale, **interval, rescale=s.guidance_rescale)


def told(config: ConfigDict) -> bool:
    """Whether the model is evaluated given each example's label or caption."""
    m = config.model
    return bool((m.class_conditional or m.text_encoder) and config.eval.conditional)


def labelled(config: ConfigDict, model: ScoreModel, label: Tensor | None) -> ScoreModel:
    """The model, if it is conditional given the examples' labels. Raises ValueError where there are none."""
    if not told(config):
        return model
    if label is None:
        raise ValueError(
            "the model is class-conditional, and these examples have no labels: set eval.conditional=False"
        )
    return model.given(label=label)


def given(
    config: ConfigDict, model: ScoreModel, split: Split, index: Tensor, text: Text | None, codec: Codec
) -> ScoreModel:
    """The model given what goes with a split's examples at `index`, (B,): labels and captions, if it is evaluated so,
    and their images at a lower resolution, without noise, if it enlarges.

    Raises ValueError where the examples have none.
    """
    conditions = of_data(config, split, index, text) if told(config) else {}
    if config.model.super_resolution:
        none = torch.zeros(len(index), dtype=torch.float64)
        k = split[index][0]
        conditions |= low_resolution(k, config.model.super_resolution, codec, model.sde, none, torch.zeros_like)
    return model.given(**conditions) if conditions else model


def of_data(config: ConfigDict, split: Split, index: Tensor, text: Text | None) -> Conditions:
    """Labels and captions of a split's examples at `index`, (B,) on the CPU, as the model takes them; `text` is of the
    data's captions.

    Raises ValueError where the split has none.
    """
    found: Conditions = {}
    where = sent(index, split.device)
    if takes_labels(config):
        if split.y is None:
            raise ValueError("the model takes labels, and these examples have none: set eval.conditional=False")
        found["label"] = split.y[where]
    if config.model.text_encoder:
        if split.caption is None or text is None:
            raise ValueError("the model takes captions, and these examples have none: set eval.conditional=False")
        found |= text.condition(split.caption[where])
    return found


def left_out(conditions: Conditions, dropped: Tensor) -> Conditions:
    """All of them left out, together, for the examples where `dropped`, (B,), is true (Ho & Salimans 2022)."""
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
    arXiv:2106.15282, section 4.2); it is told how noisy they are.
    """
    return augmented(codec.encode(shrink(k, factor)), sde, augmentation, noise)


def augmented(image: Tensor, sde: SDE, augmentation: Tensor, noise: Callable[[Tensor], Tensor]) -> Conditions:
    """The conditions `image` and `augmentation`: images noised to these times, and left as they are for time 0."""
    noised = sde.perturb(image, augmentation, noise(image))
    augmentation = sent(augmentation, image.device, image.dtype)
    clean = augmentation.reshape(-1, *[1] * (image.ndim - 1)) == 0
    return {"image": torch.where(clean, image, noised), "augmentation": augmentation}
