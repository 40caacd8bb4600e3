"""Denoising score matching (DSM): an objective is a time law × a weight × an estimator, three small functions.

Over many noise levels the objective is (Vincent 2011; Song et al. 2021, eq. 7)

    E_t weight(t) E_{x_0, z} || noise(x_t, t) - z ||²,    x_t = alpha x_0 + sigma z,

written here for the noise: (score error)² = (noise error)² / sigma², so a weight lambda(t) of the score's error is
lambda/sigma² here. The simple objective of DDPM is weight 1, and so is the paper's lambda = sigma².

Every loss returns one value per example, (B,): callers reduce it, weigh it for importance sampling, and log it by t.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models.base import Estimate, ScoreModel
from ..models.pixel_levels import bits
from ..models.reverse import Variance, chain_term
from ..sdes.linear import SDE, like
from .time_laws import Weight


def denoising(model: ScoreModel, x0: Tensor, t: Tensor, z: Tensor, weight: Weight, **condition: Any) -> Tensor:
    """Mean over dimensions of weight · (noise error)² at x_t = alpha x_0 + sigma z, one value per example (B,).

    x0 (B, *shape) are data, t (B,) times, and z standard normal numbers of x0's shape; the weight is a function (sde,
    t) -> (B,), such as `simple` or `likelihood`. Raises ValueError where t or z does not fit x0.
    """
    error = noise_error(model, x0, t, z, **condition)
    return like(weight(model.sde, t), error) * error


def noise_error(model: ScoreModel, x0: Tensor, t: Tensor, z: Tensor, **condition: Any) -> Tensor:
    """`denoising` with weight 1: the mean over dimensions of (noise error)², (B,)."""
    return _error(_estimate(model, x0, t, z, **condition), z)


def flow_matching(model: ScoreModel, x0: Tensor, t: Tensor, z: Tensor, **condition: Any) -> Tensor:
    """Conditional flow matching: mean over dimensions of (velocity error)² from alpha' x0 + sigma' z, (B,).

    Lipman et al. 2023 (arXiv:2210.02747), eq. 9; on `LinearSDE` it is rectified flow's loss, of z - x0 (Liu et al.
    2023, arXiv:2209.03003, eq. 1). It is `denoising` with the weight `velocity`, without the rounding of a small error
    times a large weight where alpha is small. The arguments are those of `denoising`.
    """
    estimate = _estimate(model, x0, t, z, **condition)
    return (model.sde.flow(estimate.data - x0, estimate.noise - z, t)).square().flatten(1).mean(1)


def variational(
    model: ScoreModel, x0: Tensor, t: Tensor, z: Tensor, variance: Variance = "learned", **options: Any
) -> Tensor:
    """L_vlb of a chain, (B,) bits per dimension: N times the bound's term at t = (i + 1)/N; its mean over i is L_vlb.

    It is the bound without its prior term, which does not depend on the model (Nichol & Dhariwal 2021,
    arXiv:2102.09672, section 3.1; with t from `time_laws.SecondMoments`, section 3.3). `variance` and the options
    `levels` and `width` are those of `chain_bound`; other options are passed to the model.
    """
    return _chain_terms(model, x0, t, z, variance, False, **options)[1]


def hybrid(
    model: ScoreModel, x0: Tensor, t: Tensor, z: Tensor, variance: Variance = "learned", **options: Any
) -> Tensor:
    """L_hybrid = L_simple + 0.001 L_vlb, (B,): the first trains the reverse steps' means, the second their variances.

    Nichol & Dhariwal 2021, eq. 16, with L_vlb in bits per dimension and no gradient to the mean, as in their code. The
    options are those of `variational`.
    """
    error, bound = _chain_terms(model, x0, t, z, variance, True, **options)
    return error + 0.001 * bound


def simple(sde: SDE, t: Tensor) -> Tensor:
    """1: DDPM's L_simple (Ho et al. 2020, eq. 14), and lambda = sigma² of Song et al. 2021."""
    return torch.ones_like(t)


def likelihood(sde: SDE, t: Tensor) -> Tensor:
    """(g/sigma)²: the objective, times D/2, bounds -log p up to constants (Song et al. 2021, arXiv:2101.09258)."""
    return (sde.g(t) / sde.sigma(t)) ** 2


def velocity(sde: SDE, t: Tensor) -> Tensor:
    """(g²/(2 sigma))²: the weight of the noise's error that makes it the error of the flow's velocity.

    The velocity alpha' data + sigma' noise changes with the noise by sigma' - alpha' sigma/alpha = g²/(2 sigma), as
    data = (x - sigma noise)/alpha. On `LinearSDE` it is 1/(1 - t)².
    """
    return (sde.g(t) ** 2 / (2 * sde.sigma(t))) ** 2


def edm(sde: SDE, t: Tensor, sigma_data: float = 0.5) -> Tensor:
    """1 + (sigma/alpha)²/sigma_data²: EDM's weight of the data's error, for the noise's; of rule "edm"'s F it is 1.

    Karras et al. 2022 (arXiv:2206.00364), table 1: lambda = (sigma² + sigma_data²)/(sigma sigma_data)².
    """
    return 1 + (sde.sigma(t) / (sde.alpha(t) * sigma_data)) ** 2


def min_snr(sde: SDE, t: Tensor, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma)/SNR with SNR = alpha²/sigma²: minimal SNR weighting (Hang et al. 2023, arXiv:2303.09556).

    As a weight of the data's error it is min(SNR, gamma), of v's min(SNR, gamma)/(SNR + 1) where alpha² + sigma² = 1
    (their sections 3.4 and 4.2). So levels of little noise, where weight 1 of the noise's error is SNR of the data's,
    do not outweigh the others.
    """
    return (gamma * (sde.sigma(t) / sde.alpha(t)) ** 2).clamp_max(1.0)


def _estimate(model: ScoreModel, x0: Tensor, t: Tensor, z: Tensor, **condition: Any) -> Estimate:
    """The model's estimate at x_t."""
    if t.shape != x0.shape[:1] or z.shape != x0.shape:
        raise ValueError(
            f"t must have shape ({x0.shape[0]},) and z {tuple(x0.shape)}, got {tuple(t.shape)} and {tuple(z.shape)}"
        )
    return model(model.sde.perturb(x0, t, z), t, **condition)


def _error(estimate: Estimate, z: Tensor) -> Tensor:
    return (estimate.noise - z).square().flatten(1).mean(1)


def _chain_terms(
    model: ScoreModel, x0: Tensor, t: Tensor, z: Tensor, variance: Variance, frozen: bool,
    levels: int | None = None, width: float = 2.0, **condition: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The noise error, and N times the chain's term in bits/dim, without a gradient to its mean if `frozen`."""
    sde = model.sde
    estimate = model(sde.perturb(x0, t, z), t, **condition)
    error = _error(estimate, z)
    if frozen:
        estimate = estimate._replace(data=estimate.data.detach())
    term = chain_term(sde, estimate, x0, t, variance, levels, width)
    return error, (sde.steps or 0) * bits(term, x0[0].numel())
