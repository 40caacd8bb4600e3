"""Learned weights of noise levels: each level's loss is divided by what it is expected to be there."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..machine.devices import sent
from ..sdes.linear import SDE

WAVES, FAR = 128, 40.0  # features of the level; the log SNR beyond which all levels count as one


class Uncertainty(nn.Module):
    """A learned u(t), the logarithm of the loss that is expected at the noise level of t; it starts at 0.

    Training minimises `weighted`, exp(-u) L + u in place of a level's loss L: the likelihood of an error that is normal
    with the variance exp(u). For a fixed network it is smallest at exp(u) = E[L | t], so that a network's gradients
    have the weight 1/E[L | t], and every level the same say (Karras et al. 2024, arXiv:2312.02696, eq. 14-16 and 21;
    Kendall et al. 2018, arXiv:1705.07115).

    As theirs it is one linear layer of 128 random Fourier features of log(sigma/alpha)/4. Theirs has weights of norm 1.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(0)
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(WAVES, generator=source))
        self.register_buffer("phases", 2 * math.pi * torch.rand(WAVES, generator=source))
        self.weight = nn.Parameter(torch.zeros(WAVES))

    def forward(self, sde: SDE, t: Tensor) -> Tensor:
        """u at times t (B,), of shape (B,), on the device of the parameters."""
        level = sent(-sde.log_snr(t).clamp(-FAR, FAR)[:, None] / 8, self.weight.device, self.weight.dtype)
        waves = torch.cos(level * self.frequencies + self.phases)
        return math.sqrt(2) * (waves * self.weight).sum(1)  # no matrix product, which autocast would round

    def weighted(self, loss: Tensor, sde: SDE, t: Tensor) -> Tensor:
        """exp(-u) loss + u for losses (B,) at times t (B,)."""
        u = self(sde, t)
        return torch.exp(-u) * loss + u
