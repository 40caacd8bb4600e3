"""From a config to the loss of a batch: a time law, and an estimator times a weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

from . import losses, time_laws
from .continuous_bound import prior_kl, reconstruction
from .learned import MonotoneSchedule
from .model import ScoreModel
from .time_laws import TimeLaw

# (model, x0, t, z, v) -> (B,): the unweighted loss, a mean over dimensions, of x_t = alpha x0 + sigma z with the
# projections v, (B, M, *shape). All are the error of the noise, up to a constant that the model cannot change.
Loss = Callable[[ScoreModel, Tensor, Tensor, Tensor, Tensor], Tensor]


def _denoising(model: ScoreModel, x0: Tensor, t: Tensor, z: Tensor, v: Tensor) -> Tensor:
    return losses.denoising(model, x0, t, z, losses.simple)


OBJECTIVES: dict[str, Callable[[ConfigDict], Loss]] = {
    "denoising": lambda t: _denoising,
}
PROJECTED: tuple[str, ...] = ()  # the objectives that draw projections

TIME_LAWS: dict[str, Callable[[ConfigDict], TimeLaw]] = {
    "uniform": lambda t: time_laws.uniform,
    "log_snr": lambda t: time_laws.log_snr,
    "importance": lambda t: time_laws.importance(losses.likelihood if t.likelihood_weighting else losses.simple),
}


class Objective(nn.Module):
    """The config's loss of a model, one value per example, with the unweighted loss beside it.

    For a learned SDE the loss has the gradients of its schedule too: the variance's for the shape and, for ends that
    are learned, the bound's, whose end terms are then part of the value. `levels` are the values of discrete data that
    are not dequantised, for the last of these terms.
    """

    def __init__(self, model: ScoreModel, config: ConfigDict, levels: Tensor | None = None) -> None:
        super().__init__()
        t = config.training
        self.model = model
        self.estimate = OBJECTIVES[t.objective](t)
        self.weight = losses.likelihood if t.likelihood_weighting else losses.simple
        self.sum = not t.reduce_mean
        self.levels = levels

    def forward(self, x0: Tensor, t: Tensor, z: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        error = self.estimate(self.model, x0, t, z, v)
        scale = x0[0].numel() / 2 if self.sum else 1.0  # score_sde's "sum" is half the sum over dimensions
        loss = scale * self.weight(self.model.sde, t).to(error) * error
        schedule = self.model.sde.module
        if isinstance(schedule, MonotoneSchedule):
            loss = loss + scale * (schedule.variance_loss(t, error) + self.ends(schedule, x0, z).to(error))
        return loss, error.detach()

    def ends(self, schedule: MonotoneSchedule, x0: Tensor, z: Tensor) -> Tensor:
        """The bound's end terms, on the scale of the weighted error, where the schedule's ends are learned."""
        if not isinstance(schedule.ends, nn.Parameter):
            return x0.new_zeros(len(x0))
        sde, start = self.model.sde, torch.tensor(self.model.sde.t_min, dtype=torch.float64)
        last = reconstruction(sde, x0, start, z, "gaussian" if self.levels is None else self.levels)
        return 2 / x0[0].numel() * (prior_kl(sde, x0) + last)


def time_law(config: ConfigDict) -> TimeLaw:
    """How the config draws t."""
    t = config.training
    return TIME_LAWS[t.time](t) if t.continuous else time_laws.discrete(config.model.num_scales)


def importance_weighted(config: ConfigDict) -> bool:
    """Whether times' importance weights enter the loss: "log_snr" is an objective of its own and leaves them out."""
    return bool(config.training.time == "importance" or config.training.soft_truncation > 0)
