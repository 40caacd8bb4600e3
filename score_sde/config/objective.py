"""Objectives: from a config to the loss of a batch, an estimator times a weight, and to the law of t."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

from .. import losses
from ..data.codecs import Codec, PixelCodec, VectorCodec
from ..likelihood.sde_bound import reconstruction
from ..losses import couplings, score_matching, time_laws
from ..losses.couplings import Coupling
from ..losses.time_laws import TimeLaw, Weight
from ..metrics import psnr
from ..models.autoencoder import ConvolutionalAutoencoder
from ..models.base import ScoreModel
from ..models.classifier import NoisyClassifier
from ..models.pixel_levels import COARSE, bits
from ..models.reverse import prior_divergence
from ..models.traces import Law, projections
from ..sdes.learned import MonotoneSchedule
from ..sdes.linear import like
from .build import AUTOENCODE, CLASSIFY

# (model, x0, t, z, v) -> (B,): the unweighted loss, a mean over dimensions, of x_t = alpha x0 + sigma z with the
# projections v, (B, M, *shape). All except those of chains have the expectation of the noise's error.
Loss = Callable[[ScoreModel, Tensor, Tensor, Tensor, Tensor], Tensor]


def _without_noise(estimate: Callable[[ScoreModel, Tensor, Tensor, Tensor], Tensor], law: Law) -> Loss:
    """The score-matching loss of an estimate (model, x_t, t, v) -> (B,) of |s|²/2 + tr(ds/dx), blind to the noise.

    By Stein's identity E |noise + sigma s|²/D = 1 + 2 sigma²/D E [|s|²/2 + tr(ds/dx)].
    """

    def loss(model: ScoreModel, x0: Tensor, t: Tensor, z: Tensor, v: Tensor) -> Tensor:
        directions = projections(v.transpose(0, 1), law)
        value = estimate(model, model.sde.perturb(x0, t, z), t, directions)
        return 1 + like(2 * model.sde.sigma(t) ** 2 / math.prod(x0.shape[1:]), value) * value

    return loss


_implicit: Callable[..., Tensor] = lambda model, x, t, v: score_matching.implicit(model, x, t)


def _finite_difference(config: ConfigDict) -> Loss:
    def estimate(model: ScoreModel, x: Tensor, t: Tensor, v: Tensor) -> Tensor:
        return score_matching.finite_difference(model, x, t, v, config.training.difference_step * model.sde.sigma(t))

    return _without_noise(estimate, config.training.projection)


def _of_chain(value: Callable[..., Tensor], config: ConfigDict, codec: Codec) -> Loss:
    """A loss of a chain's reverse steps, with their variance and the decoder of the data."""
    variance = "learned" if config.model.learned_variance else config.sampling.variance

    def loss(model: ScoreModel, x0: Tensor, t: Tensor, z: Tensor, v: Tensor) -> Tensor:
        return value(model, x0, t, z, variance=variance, levels=codec.levels, width=codec.width)

    return loss


class Estimator(NamedTuple):
    """What makes the loss of a training.objective, and what rules and training steps must know of it."""

    make: Callable[[ConfigDict, Codec], Loss]
    projected: bool = False  # it draws projections
    twice: bool = False  # its gradient is a second derivative of the network
    decoded: bool = False  # it is the bound of a chain, which depends on the reverse steps' variance too
    weight: Weight | None = None  # by which it already multiplies the noise's error


def _sliced(variance_reduced: bool) -> Estimator:
    estimate = partial(score_matching.sliced, variance_reduced=variance_reduced)
    return Estimator(lambda c, codec: _without_noise(estimate, c.training.projection), projected=True, twice=True)


OBJECTIVES = {
    "denoising": Estimator(lambda c, codec: lambda model, x0, t, z, v: losses.noise_error(model, x0, t, z)),
    "flow_matching": Estimator(
        lambda c, codec: lambda model, x0, t, z, v: losses.flow_matching(model, x0, t, z), weight=losses.velocity
    ),
    "implicit": Estimator(lambda c, codec: _without_noise(_implicit, "gaussian"), twice=True),
    "sliced": _sliced(variance_reduced=False),
    "sliced_vr": _sliced(variance_reduced=True),
    "finite_difference": Estimator(lambda c, codec: _finite_difference(c), projected=True),
    "hybrid": Estimator(lambda c, codec: _of_chain(losses.hybrid, c, codec), decoded=True),
    "vlb": Estimator(lambda c, codec: _of_chain(losses.variational, c, codec), decoded=True),
}
NAMES = (*OBJECTIVES, CLASSIFY, AUTOENCODE)
PROJECTED = tuple(name for name, estimator in OBJECTIVES.items() if estimator.projected)
TWICE = tuple(name for name, estimator in OBJECTIVES.items() if estimator.twice)
DECODED = tuple(name for name, estimator in OBJECTIVES.items() if estimator.decoded)
WEIGHTED = tuple(name for name, estimator in OBJECTIVES.items() if estimator.weight)
PARTS = ("reconstruction_bits", "kl_bits", "psnr")  # what logs say of an autoencoder

TIME_LAWS: dict[str, Callable[[ConfigDict], TimeLaw]] = {
    "uniform": lambda t: time_laws.uniform,
    "log_snr": lambda t: time_laws.log_snr,
    "edm": lambda t: partial(time_laws.log_normal, mean=t.time_mean, std=t.time_std),
    "log_normal": lambda t: partial(time_laws.log_normal, mean=t.time_mean, std=t.time_std),
    "mode": lambda t: partial(time_laws.mode, scale=t.time_scale),
    "importance": lambda t: time_laws.importance(losses.likelihood if t.likelihood_weighting else losses.simple),
}


class Objective(nn.Module):
    """The config's loss of a score model, one value per example, and the unweighted loss, each (B,).

    For a learned SDE the loss has gradients of the schedule too: of the variance for its shape, and of the bound for
    its ends where they are learned; the value then has the bound's end terms.
    """

    def __init__(self, model: ScoreModel, config: ConfigDict, codec: Codec | None = None) -> None:
        super().__init__()
        t = config.training
        self.model = model
        estimator = OBJECTIVES[t.objective]
        self.estimate, self.weighted = estimator.make(config, codec or VectorCodec()), estimator.weight is not None
        self.weight = estimator.weight or (losses.likelihood if t.likelihood_weighting else losses.simple)
        if t.time == "edm":
            self.weight = partial(losses.edm, sigma_data=config.model.sigma_data)
        if t.min_snr > 0:
            self.weight = partial(losses.min_snr, gamma=t.min_snr)
        self.sum = not t.reduce_mean
        self.levels: Tensor | None = None
        if isinstance(codec, PixelCodec) and not config.data.uniform_dequantization:
            if config.model.learn_ends and codec.levels > COARSE:
                raise ValueError(f"model.learn_ends compares each pixel with {codec.levels} levels, too many: set "
                                 "data.bits=8, or data.uniform_dequantization=True")
            self.levels = codec.encode(torch.arange(codec.levels))

    def forward(
        self, x0: Tensor, t: Tensor, z: Tensor, v: Tensor, condition: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        value = self.estimate(self.model.given(**condition) if condition else self.model, x0, t, z, v)
        weight = like(self.weight(self.model.sde, t), value)
        error, weighted = (value / weight, value) if self.weighted else (value, weight * value)
        scale = x0[0].numel() / 2 if self.sum else 1.0  # score_sde's "sum" is half the sum over dimensions
        loss = scale * weighted
        uncertainty = getattr(self.model, "uncertainty", None)
        if uncertainty is not None:
            loss = uncertainty.weighted(loss, self.model.sde, t)
        schedule = self.model.sde.module
        if isinstance(schedule, MonotoneSchedule):
            loss = loss + scale * (schedule.variance_loss(t, error) + self.ends(schedule, x0, z).to(error))
        return loss, error.detach()

    def ends(self, schedule: MonotoneSchedule, x0: Tensor, z: Tensor) -> Tensor:
        """The bound's end terms on the scale of the weighted error, (B,); 0 if the schedule's ends are not learned."""
        if not isinstance(schedule.ends, nn.Parameter):
            return x0.new_zeros(len(x0))
        sde, start = self.model.sde, torch.tensor(self.model.sde.t_min, dtype=torch.float64)
        last = reconstruction(sde, x0, start, z, "gaussian" if self.levels is None else self.levels)
        return 2 / x0[0].numel() * (prior_divergence(sde, x0, torch.ones_like(start)) + last)


class CrossEntropy(nn.Module):
    """-log P(y | x_t) of a classifier, (B,), and its accuracy, (B,): 1 where y is the likeliest class, else 0.

    It has the arguments of `Objective`, and ignores the projections.
    """

    def __init__(self, model: NoisyClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, x0: Tensor, t: Tensor, z: Tensor, v: Tensor, condition: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        label = (condition or {})["label"]
        log_probs = self.model.log_probs(self.model.sde.perturb(x0, t, z), t)
        return -log_probs.gather(1, label[:, None])[:, 0], (log_probs.argmax(1) == label).to(log_probs)


class EvidenceBound(nn.Module):
    """An autoencoder's bound in bits/dim with its divergence weighted, (B,), and PARTS, (B, 3).

    PARTS are unweighted: the two terms of the bound, in bits/dim, and the PSNR of the decoded images. The arguments are
    those of `Objective`: z is the codes' noise, and times and projections are ignored.
    """

    def __init__(self, model: ConvolutionalAutoencoder, weight: float, codec: Codec | None) -> None:
        super().__init__()
        if not isinstance(codec, PixelCodec):
            raise ValueError("an autoencoder is trained on pixels: give data of uint8 images")
        self.model, self.weight, self.codec = model, weight, codec

    def forward(
        self, x0: Tensor, t: Tensor, z: Tensor, v: Tensor, condition: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        width, dimensions, low = self.codec.width, x0[0].numel(), self.codec.range[0]
        bound = self.model(x0, z, self.codec.levels, width)
        reconstruction, divergence = bits(bound.reconstruction, dimensions), bits(bound.divergence, dimensions)
        near = psnr((x0 - low) / width, (bound.decoded - low) / width).to(x0)
        parts = torch.stack([reconstruction, divergence, near], 1)
        return reconstruction + self.weight * divergence, parts.detach()


COUPLINGS: dict[str, Coupling] = {
    each.__name__: each for each in (couplings.independent, couplings.optimal_transport, couplings.sinkhorn)
}


def time_law(config: ConfigDict) -> TimeLaw:
    """How the config draws t."""
    t = config.training
    return TIME_LAWS[t.time](t) if t.continuous else time_laws.discrete(config.model.num_scales)


def learned_law(config: ConfigDict) -> time_laws.SecondMoments | None:
    """A fresh law that learns how to draw t if the config says so, in place of `time_law`; else None."""
    return time_laws.SecondMoments(config.model.num_scales) if config.training.time == "second_moment" else None


def importance_weighted(config: ConfigDict) -> bool:
    """Whether the loss has the importance weights of times; other laws but "uniform" are objectives without them."""
    return bool(config.training.time in ("importance", "second_moment") or config.training.soft_truncation > 0)
