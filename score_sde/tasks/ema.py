"""Exponential moving average of a model's parameters, in one fused operation a step."""

from __future__ import annotations

import torch
from torch import Tensor

RAMP = 0.1  # the half-life is at most this share of the images seen, so that a young average forgets its start


def ema_decay(step: int, *, rate: float, halflife: float = 0.0, batch_size: int = 1) -> float:
    """Decay of the average at its update number `step` = 1, 2, ...

    With `halflife` (in images) > 0 it is 0.5^(batch_size/h), h = min(halflife, RAMP · images seen), as in EDM
    (Karras et al. 2022, appendix F.2), so that it means the same at any batch size. Otherwise it is score_sde's
    min(rate, (1 + step)/(10 + step)).
    """
    if halflife > 0:
        return 0.5 ** (batch_size / min(halflife, RAMP * step * batch_size))
    return min(rate, (1 + step) / (10 + step))


@torch.no_grad()
def ema_update(averages: list[Tensor], values: list[Tensor], decay: float) -> None:
    """averages += (1 - decay) (values - averages), for all tensors at once."""
    torch._foreach_lerp_(averages, values, 1 - decay)
