"""Pyramids: how the shrunk input enters the levels of a U-Net, and how its output is gathered from them.

Karras et al. 2020 (arXiv:1912.04958, figure 7) compare skip and residual pyramids; Song et al. 2021, appendix H, use
them for NCSN++. Every class maps (features h of a level, pyramid of the level before) to the two of this level.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from .blocks import Head, Style
from .resample import ConvDown, ConvUp, down, up

Combine = Literal["sum", "cat"]


class NoPyramid(nn.Module):
    """No progressive input or output."""

    def forward(self, h: Tensor, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        return h, pyramid


class InputSkip(nn.Module):
    """The pyramid is the shrunk image; its 1x1 projection is added to h, or put before its channels."""

    def __init__(self, image: int, features: int, combine: Combine, style: Style) -> None:
        super().__init__()
        self.shrink = down(style.fir, style.dimensions)
        self.conv = style.conv(image, features, 1)
        self.combine = combine

    def forward(self, h: Tensor, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        pyramid = self.shrink(pyramid)
        projected = self.conv(pyramid)
        return torch.cat([projected, h], dim=1) if self.combine == "cat" else projected + h, pyramid


class InputResidual(nn.Module):
    """The pyramid, shrunk by a convolution and added to h, becomes h."""

    def __init__(self, above: int, features: int, style: Style) -> None:
        super().__init__()
        self.shrink = ConvDown(above, features, style.fir, style.dimensions)
        self.style = style

    def forward(self, h: Tensor, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        h = self.style.add(self.shrink(pyramid), h)
        return h, h


class OutputSkip(nn.Module):
    """Every level makes an image; the output is the sum of all of them, enlarged."""

    def __init__(self, features: int, image: int, style: Style) -> None:
        super().__init__()
        self.head = Head(features, image, style, style.init_scale)
        self.enlarge = up(style.fir, style.dimensions)

    def forward(self, h: Tensor, pyramid: Tensor | None) -> tuple[Tensor, Tensor]:
        image = self.head(h)
        return h, image if pyramid is None else self.enlarge(pyramid) + image


class OutputSeed(nn.Module):
    """The lowest level begins a pyramid of features."""

    def __init__(self, features: int, style: Style) -> None:
        super().__init__()
        self.head = Head(features, features, style, scale=1.0)

    def forward(self, h: Tensor, pyramid: None) -> tuple[Tensor, Tensor]:
        return h, self.head(h)


class OutputResidual(nn.Module):
    """The pyramid, enlarged by a convolution and added to h, becomes h."""

    def __init__(self, below: int, features: int, style: Style) -> None:
        super().__init__()
        self.enlarge = ConvUp(below, features, style.fir, style.dimensions)
        self.style = style

    def forward(self, h: Tensor, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        h = self.style.add(self.enlarge(pyramid), h)
        return h, h
