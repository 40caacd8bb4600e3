"""Encoder and decoder of an autoencoder of images: the U-Net's way down and its way up, without skips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .blocks import Head
from .levels import Level, LevelOptions, Middle, step_up, without_skips


@dataclass(frozen=True, kw_only=True)
class CodeOptions(LevelOptions):
    """The options of encoder and decoder: those of the levels and the blocks. `image_size` is that of the images."""

    multipliers: Sequence[float] = (1, 2, 4)
    blocks: int = 2
    attention: Sequence[int] = ()
    dropout: float = 0.0


class CodeEncoder(nn.Module):
    """F(x): images (B, channels, H, W) to (B, outputs, H/f, W/f), where f is 2^(levels - 1) and divides H and W.

    Its parts are levels of residual blocks, each at half the resolution of the one before, the U-Net's bottom, and
    norm, activation and convolution (Rombach et al. 2022, arXiv:2112.10752, appendix G; Esser et al. 2021,
    arXiv:2012.09841, table 7). The options are `CodeOptions`, `LevelOptions` and `Style`.
    """

    def __init__(self, channels: int, outputs: int, **options: Any) -> None:
        super().__init__()
        o = CodeOptions(**options)
        self.centered = o.centered
        (finest, _), (deepest, _) = o.levels[0], o.levels[-1]
        self.first = o.conv(channels, finest, 3)
        self.levels = without_skips(finest, o)
        self.middle = Middle(deepest, o)
        self.head = Head(deepest, outputs, o, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x if self.centered else 2 * x - 1)
        for level in self.levels:
            h = level(h)
        return self.head(self.middle(h, None, None))


class CodeDecoder(nn.Module):
    """F(z): codes (B, inputs, h, w) to images (B, channels, f h, f w), through `CodeEncoder`'s levels in reverse.

    Centred images lie around 0, others around 1/2. The options are `CodeEncoder`'s.
    """

    def __init__(self, channels: int, inputs: int, **options: Any) -> None:
        super().__init__()
        o = CodeOptions(**options)
        self.centered = o.centered
        h = o.levels[-1][0]
        self.first = o.conv(inputs, h, 3)
        self.middle = Middle(h, o)
        self.levels = nn.ModuleList()
        for i, (outer, attend) in reversed(list(enumerate(o.levels))):
            step = step_up(outer, o) if i else None
            self.levels.append(Level(h, outer, o.blocks + 1, attend, step, o))
            h = outer
        self.head = Head(h, channels, o, 1.0)

    def forward(self, z: Tensor) -> Tensor:
        h = self.middle(self.first(z), None, None)
        for level in self.levels:
            h = level(h)
        x = self.head(h)
        return x if self.centered else (x + 1) / 2
