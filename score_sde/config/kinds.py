"""What a config trains: a score model, a classifier of noisy examples or an autoencoder, and how each is handled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict
from torch import Tensor, nn

from ..data.codecs import Codec
from ..sdes.linear import SDE
from . import build as make
from .objective import PARTS, CrossEntropy, EvidenceBound, Objective


@dataclass(frozen=True)
class Kind:
    """What a config trains.

    Args:
        name: in sentences.
        use: what to do with one where a score model is asked for, up to the place that names it.
        build: (config, shape) -> the module, with a fresh network for examples of `shape`.
        objective: (model, config, codec) -> the loss, a module (x0, t, z, v, condition) -> (loss, measure), (B,) or
            (B, len(measures)).
        measures: names of what the loss measures beside itself.
        noisy: whether it sees noisy examples, so that its measure is logged by noise level.
        left_out: whether training leaves conditions out, for guidance.
        pictures: what is drawn of a checkpoint, "samples" or "reconstructions"; "" for nothing.
    """

    name: str
    use: str
    build: Callable[[ConfigDict, tuple[int, ...]], make.Trainable]
    objective: Callable[[Any, ConfigDict, Codec | None], nn.Module]
    measures: tuple[str, ...]
    noisy: bool = True
    left_out: bool = True
    pictures: str = "samples"

    def sde(self, model: Any, config: ConfigDict) -> SDE:
        """Whose times the loop draws: the model's own, which may be learned; an autoencoder does not look at them."""
        sde: SDE = model.sde if self.noisy else make.build_sde(config)
        return sde

    def noise_shape(self, config: ConfigDict, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the noise for an example of `shape`: an autoencoder's is that of codes."""
        return shape if self.noisy else make.code_shape(config, shape)

    def means(self, measured: Tensor, prefix: str = "") -> dict[str, float]:
        """{name: mean} of what was measured, (B,) or (B, len(measures))."""
        columns = measured.double().reshape(len(measured), -1).mean(0)
        return {prefix + name: float(value) for name, value in zip(self.measures, columns, strict=True)}


MODEL = Kind("a score model", "", make.build_model, Objective, ("noise_error",))
_CLASSIFIER = Kind("a classifier", "sample from a model, with --config.sampling.classifier", make.build_classifier,
    lambda model, config, codec: CrossEntropy(model), ("accuracy",), left_out=False, pictures="")  # fmt: skip
_AUTOENCODER = Kind("an autoencoder", "train a model of its codes, with --config.data.autoencoder",
    make.build_autoencoder, lambda model, config, codec: EvidenceBound(model, config.training.kl_weight, codec), PARTS,
    noisy=False, pictures="reconstructions")  # fmt: skip


def kind_of(config: ConfigDict) -> Kind:
    """What the config trains."""
    return {make.CLASSIFY: _CLASSIFIER, make.AUTOENCODE: _AUTOENCODER}.get(config.training.objective, MODEL)
