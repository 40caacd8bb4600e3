"""The two halves of an autoencoder of images: the U-Net's way down to a code and its way up from one, without skips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .blocks import Head, Style
from .levels import LevelOptions, Middle, Stage, step_down, step_up, take


@dataclass(frozen=True, kw_only=True)
class CodeOptions(LevelOptions):
    """The options of both halves: those of the levels and the blocks; the decoder's `image_size` is the images' too."""

    multipliers: Sequence[float] = (1, 2, 4)
    blocks: int = 2
    attention: Sequence[int] = ()
    dropout: float = 0.0


class CodeEncoder(nn.Module):
    """F(x): images (B, channels, H, W) to (B, outputs, H/f, W/f), where f is 2^(levels - 1) and divides H and W.

    Levels of residual blocks, each at half the resolution of the one before, the U-Net's bottom, norm, activation and
    a convolution (Rombach et al. 2022, arXiv:2112.10752, appendix G; Esser et al. 2021, arXiv:2012.09841, table 7).
    The options are `CodeOptions`, `LevelOptions` and `Style`.
    """

    def __init__(self, channels: int, outputs: int, **options: Any) -> None:
        super().__init__()
        o = CodeOptions(**options)
        self.centered = o.centered
        h = o.levels[0][0]
        self.first = o.conv(channels, h, 3)
        self.levels = nn.ModuleList()
        for i, (outer, attend) in enumerate(o.levels, start=1):
            step = step_down(outer, o) if i < len(o.levels) else None
            self.levels.append(_Level(h, outer, o.blocks, attend, step, o))
            h = outer
        self.middle = Middle(h, o)
        self.head = Head(h, outputs, o, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x if self.centered else 2 * x - 1)
        for level in self.levels:
            h = level(h)
        return self.head(self.middle(h, None, None))


class CodeDecoder(nn.Module):
    """F(z): codes (B, inputs, h, w) to images (B, channels, f h, f w), `CodeEncoder`'s levels in the other order.

    Centred images are around 0, others around 1/2. The options are `CodeEncoder`'s.
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
            self.levels.append(_Level(h, outer, o.blocks + 1, attend, step, o))
            h = outer
        self.head = Head(h, channels, o, 1.0)

    def forward(self, z: Tensor) -> Tensor:
        h = self.middle(self.first(z), None, None)
        for level in self.levels:
            h = level(h)
        x = self.head(h)
        return x if self.centered else (x + 1) / 2


class _Level(nn.Module):
    """Residual blocks, each followed by attention if `attend`, then the step to the next resolution."""

    def __init__(
        self, inputs: int, outputs: int, blocks: int, attend: bool, step: nn.Module | None, style: Style
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Stage(inputs if i == 0 else outputs, outputs, attend, style) for i in range(blocks))
        self.step = step

    def forward(self, h: Tensor) -> Tensor:
        for stage in self.stages:
            h = stage(h, None, None)
        return h if self.step is None else take(self.step, h, None)
