"""What a config trains: a score model, a classifier of noisy examples or an autoencoder, and how each is handled."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict
from torch import Tensor, nn

from ..data.codecs import Codec
from ..sdes.linear import SDE
from .build import (
    AUTOENCODE,
    CLASSIFY,
    Trainable,
    build_autoencoder,
    build_classifier,
    build_model,
    build_sde,
    code_shape,
)
from .objective import PARTS, CrossEntropy, EvidenceBound, Objective


class Kind:
    """A score model; the other kinds say in what they differ.

    Attributes:
        name: in sentences.
        use: what to do with one where a score model is asked for, up to the place that names it.
        measures: names of what the objective measures beside the loss.
        noisy: whether it sees noisy examples, so that its measure is logged by noise level.
        left_out: whether training leaves conditions out, for guidance.
        pictures: what is drawn of a checkpoint, "samples" or "reconstructions"; "" for nothing.
    """

    name, use = "a score model", ""
    measures: tuple[str, ...] = ("noise_error",)
    noisy, left_out, pictures = True, True, "samples"

    def build(self, config: ConfigDict, shape: tuple[int, ...]) -> Trainable:
        """The module, with a fresh network for examples of `shape`."""
        return build_model(config, shape)

    def objective(self, model: Any, config: ConfigDict, codec: Codec | None = None) -> nn.Module:
        """The config's loss, a module (x0, t, z, v, condition) -> (loss, measure), (B,) or (B, len(measures))."""
        return Objective(model, config, codec)

    def sde(self, model: Any, config: ConfigDict) -> SDE:
        """Whose times the loop draws: the model's own, which may be learned."""
        sde: SDE = model.sde
        return sde

    def noise_shape(self, config: ConfigDict, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the noise for an example of `shape`."""
        return shape

    def means(self, measured: Tensor, prefix: str = "") -> dict[str, float]:
        """{name: mean} of what was measured, (B,) or (B, len(measures))."""
        columns = measured.double().reshape(len(measured), -1).mean(0)
        return {prefix + name: float(value) for name, value in zip(self.measures, columns, strict=True)}


class Classifier(Kind):
    """A classifier of noisy examples, which guides a model."""

    name, use = "a classifier", "sample from a model, with --config.sampling.classifier"
    measures = ("accuracy",)
    left_out, pictures = False, ""

    def build(self, config: ConfigDict, shape: tuple[int, ...]) -> Trainable:
        return build_classifier(config, shape)

    def objective(self, model: Any, config: ConfigDict, codec: Codec | None = None) -> nn.Module:
        return CrossEntropy(model)


class Encoder(Kind):
    """An autoencoder, of whose codes a model is trained; it does not look at times."""

    name, use = "an autoencoder", "train a model of its codes, with --config.data.autoencoder"
    measures = PARTS
    noisy, pictures = False, "reconstructions"

    def build(self, config: ConfigDict, shape: tuple[int, ...]) -> Trainable:
        return build_autoencoder(config, shape)

    def objective(self, model: Any, config: ConfigDict, codec: Codec | None = None) -> nn.Module:
        return EvidenceBound(model, config.training.kl_weight, codec)

    def sde(self, model: Any, config: ConfigDict) -> SDE:
        return build_sde(config)

    def noise_shape(self, config: ConfigDict, shape: tuple[int, ...]) -> tuple[int, ...]:
        return code_shape(config, shape)


MODEL, _OTHERS = Kind(), {CLASSIFY: Classifier(), AUTOENCODE: Encoder()}


def kind_of(config: ConfigDict) -> Kind:
    """What the config trains."""
    return _OTHERS.get(config.training.objective, MODEL)
