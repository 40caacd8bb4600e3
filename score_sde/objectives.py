"""From a config to the loss of a batch: a time law, and an estimator times a weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ml_collections import ConfigDict
from torch import Tensor, nn

from . import losses, time_laws
from .codecs import Codec, VectorCodec
from .model import ScoreModel
from .time_laws import TimeLaw

# (model, x0, t, z, v) -> (B,): the unweighted loss, a mean over dimensions, of x_t = alpha x0 + sigma z with the
# projections v, (B, M, *shape). All are the error of the noise, up to a constant that the model cannot change.
Loss = Callable[[ScoreModel, Tensor, Tensor, Tensor, Tensor], Tensor]


def _denoising(model: ScoreModel, x0: Tensor, t: Tensor, z: Tensor, v: Tensor) -> Tensor:
    return losses.denoising(model, x0, t, z, losses.simple)


def _hybrid(model: ScoreModel, x0: Tensor, t: Tensor, z: Tensor, v: Tensor, **decoder: Any) -> Tensor:
    return losses.hybrid(model, x0, t, z, **decoder)


def _vlb(model: ScoreModel, x0: Tensor, t: Tensor, z: Tensor, v: Tensor, **decoder: Any) -> Tensor:
    return losses.variational(model, x0, t, z, **decoder)


OBJECTIVES: dict[str, Callable[[ConfigDict], Loss]] = {
    "denoising": lambda t: _denoising,
    "hybrid": lambda t: _hybrid,
    "vlb": lambda t: _vlb,
}
PROJECTED: tuple[str, ...] = ()  # the objectives that draw projections
DECODED: tuple[str, ...] = ("hybrid", "vlb")  # those of a chain's bound, which ask for the reverse steps' variance too

TIME_LAWS: dict[str, Callable[[ConfigDict], TimeLaw]] = {
    "uniform": lambda t: time_laws.uniform,
    "log_snr": lambda t: time_laws.log_snr,
    "importance": lambda t: time_laws.importance(losses.likelihood if t.likelihood_weighting else losses.simple),
}


class Objective(nn.Module):
    """The config's loss of a model, one value per example, with the unweighted loss beside it."""

    def __init__(self, model: ScoreModel, config: ConfigDict, codec: Codec | None = None) -> None:
        super().__init__()
        t, codec = config.training, codec or VectorCodec()
        self.model = model
        loss: Any = OBJECTIVES[t.objective](t)
        if t.objective in DECODED:
            variance = "learned" if config.model.learned_variance else config.sampling.variance
            loss = partial(loss, variance=variance, levels=codec.levels, width=codec.width)
        self.estimate: Loss = loss
        self.weight = losses.likelihood if t.likelihood_weighting else losses.simple
        self.sum = not t.reduce_mean

    def forward(self, x0: Tensor, t: Tensor, z: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        error = self.estimate(self.model, x0, t, z, v)
        scale = x0[0].numel() / 2 if self.sum else 1.0  # score_sde's "sum" is half the sum over dimensions
        return scale * self.weight(self.model.sde, t).to(error) * error, error.detach()


def time_law(config: ConfigDict) -> TimeLaw:
    """How the config draws t."""
    t = config.training
    return TIME_LAWS[t.time](t) if t.continuous else time_laws.discrete(config.model.num_scales)


def learned_law(config: ConfigDict) -> time_laws.SecondMoments | None:
    """A fresh law that learns how to draw t, where the config asks for one; it takes the place of `time_law`."""
    return time_laws.SecondMoments(config.model.num_scales) if config.training.time == "second_moment" else None


def importance_weighted(config: ConfigDict) -> bool:
    """Whether times' importance weights enter the loss: "log_snr" is an objective of its own and leaves them out."""
    return bool(config.training.time in ("importance", "second_moment"))
