"""A model of one path read on another: `on`.

Two states alpha x_0 + sigma z of equal alpha/sigma differ by a factor alone, so that what a network knows of one tells
the other (Karras et al. 2022, section 2; Kingma et al. 2021, section 5.1). A trained VP model walks the straight path
of flow matching, and the other way round.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..sdes.linear import SDE, like, some
from .base import Estimate, ScoreModel


def on(model: ScoreModel, sde: SDE) -> ScoreModel:
    """`model` as a model of the path of `sde`: at each time it is asked at its own time of equal alpha/sigma.

    The state is rescaled to that time; estimates of data and noise hold for both. So it is exact where both paths have
    the noise level. The result's SDE is `sde`, with t_min raised to the level of the model's own t_min where that is
    later. At more noise than the model has at t = 1, its estimate of the data there is kept: a path that ends in pure
    noise can then be walked from its end, where little is left to know. Other conditions and learned variances are
    passed on.

    Raises ValueError for a path that does not reach the model's noise levels, and in use at less noise than the model
    has at t = 0 (as at sigma_min of `VESDE`).
    """
    own = model.sde
    least, most = own.log_snr(torch.tensor([1.0, own.t_min], dtype=torch.float64)).tolist()
    ends = sde.log_snr(torch.tensor([1.0, sde.t_min], dtype=torch.float64)).tolist()
    if not ends[0] < most or not ends[1] > least:
        raise ValueError(
            f"{sde} has log SNRs from {ends[0]:.3g} to {ends[1]:.3g}, and the model, of {own}, was made for "
            f"{least:.3g} to {most:.3g}: take a path that shares noise levels with the model's"
        )
    if ends[1] > most:
        sde = replace(sde, t_min=sde.time(torch.tensor(most, dtype=torch.float64)).item())
    return Rescaled(model, sde)


class Rescaled(ScoreModel):
    """`model` on the path of `sde`; see `on`."""

    def __init__(self, model: ScoreModel, sde: SDE) -> None:
        super().__init__(sde)
        self.model = model
        self.least, self.most = model.sde.log_snr(torch.tensor([1.0, 0.0], dtype=torch.float64)).tolist()

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Estimate:
        sde, own = self.sde, self.model.sde
        alpha, sigma, log_snr = sde.alpha(t), sde.sigma(t), sde.log_snr(t)
        if self.most < math.inf and some(log_snr > self.most + 1e-6):
            raise ValueError(
                f"the model of {own} knows no log SNR above {self.most:.4g}, and {sde} has {log_snr.max().item():.4g} "
                f"at t = {t.min().item():.4g}: stop at its t_min, {sde.t_min:.4g}, or later"
            )
        u = own.time(log_snr.clamp_min(self.least)).clamp(0, 1)
        ratio = torch.hypot(own.alpha(u), own.sigma(u)) / torch.hypot(alpha, sigma)
        e = self.model(like(ratio, x) * x, u, **condition)
        noise, beyond = e.noise, log_snr < self.least - 1e-6
        if some(beyond):  # the data at t = 1 stay, and the noise is the rest of x
            rest = (x - like(alpha, x) * e.data) / like(sigma, x)
            noise = torch.where(like(beyond.to(t.dtype), x) > 0, rest, noise)
        return Estimate(e.data, noise, like(sigma, x), e.fraction)
