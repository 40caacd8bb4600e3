"""Layers that preserve magnitudes (Karras et al. 2024, arXiv:2312.02696, section 2.3 and appendix B).

The magnitude of a tensor is its root mean square, in expectation. Each layer takes independent inputs of magnitude 1 to
outputs of magnitude 1, so that neither activations nor weights grow as training goes on. No layer has a bias.

A weight counts only by its direction: a row is divided by its magnitude before it is used. Its gradient is therefore
orthogonal to it, each step makes it longer, and longer rows turn more slowly. Forced weight normalisation undoes that:
before each training step `normalise_` sets the rows themselves to magnitude 1 (section 2.3, "configuration E").
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import RandomWaves
from .conditioning import ClassEmbedding
from .layers import CONVOLVE

SILU = 0.596  # magnitude of silu(z) for standard normal z, as published; 0.59645 to more digits


def unit(x: Tensor, axes: Sequence[int], eps: float = 1e-4) -> Tensor:
    """x over eps + its magnitude over these axes (eq. 47); of pixels over their channels: pixel norm (eq. 30).

    In half precision the magnitude is computed in float32.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=tuple(axes), keepdim=True, dtype=wide)
    return x / (eps + norm * math.sqrt(norm.numel() / x.numel())).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """silu(x) of magnitude 1 for standard normal x (eq. 81)."""
    return F.silu(x) / SILU


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(1 - t) a + t b of magnitude 1 (eq. 88)."""
    norm = math.hypot(1 - t, t)
    return torch.add(a * ((1 - t) / norm), b, alpha=t / norm)


def mp_cat(a: Tensor, b: Tensor) -> Tensor:
    """a and b side by side in axis 1, of magnitude 1 together, and scaled to count equally (eq. 103 with t = 1/2)."""
    scale = math.sqrt((a.shape[1] + b.shape[1]) / 2)
    return torch.cat([a * (scale / math.sqrt(a.shape[1])), b * (scale / math.sqrt(b.shape[1]))], dim=1)


class MPFourier(RandomWaves):
    """(B,) labels of order 1 to (B, width): sqrt(2) cos(2 pi (w label + p)), w ~ N(0, 1) and p ~ U(0, 1) (eq. 75)."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(width))
        self.register_buffer("phases", torch.rand(width))

    def forward(self, label: Tensor) -> Tensor:
        return math.sqrt(2) * torch.cos(2 * math.pi * (label[:, None] * self.frequencies + self.phases))


class MPConv(nn.Module):
    """A convolution with `dimensions` of `size` each, or for 0 dimensions a fully connected layer (eq. 47 and 66)."""

    def __init__(self, inputs: int, outputs: int, size: int = 1, dimensions: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, *[size] * dimensions))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """The output times `gain`."""
        rows = unit(kept(self.weight, self.training), range(1, self.weight.ndim))
        weight = rows * (gain / math.sqrt(rows[0].numel()))
        if weight.ndim == 2:
            return F.linear(x, weight)
        return CONVOLVE[weight.ndim - 3](x, weight, padding=weight.shape[-1] // 2)

    def normalise_(self) -> None:
        """Forced weight normalisation."""
        self.weight.copy_(unit(self.weight, range(1, self.weight.ndim)))


def kept(weight: Tensor, training: bool) -> Tensor:
    """A weight as it is now: in training the next evaluation sets it anew, maybe before this one's backward pass."""
    return weight.clone() if training else weight


class MPClasses(ClassEmbedding):
    """Class labels to (B, outputs): what a fully connected layer makes of sqrt(classes) times the one-hot label."""

    def rows(self) -> Tensor:
        return unit(kept(self.table, self.training), [0])

    def normalise_(self) -> None:
        """Forced weight normalisation."""
        self.table.copy_(unit(self.table, [0]))


@torch.no_grad()
def normalise_(network: nn.Module) -> None:
    """Forced weight normalisation of all layers of a network."""
    for layer in network.modules():
        if isinstance(layer, (MPConv, MPClasses)):
            layer.normalise_()
