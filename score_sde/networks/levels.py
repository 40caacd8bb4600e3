"""The levels of a U-Net: what happens at one resolution on the way down, at the bottom, and on the way up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Attention, ResidualBlock, Style, Text
from .resample import ConvDown, ConvUp, down, up


@dataclass(frozen=True, kw_only=True)
class LevelOptions(Style):
    """The options of a network of levels, each at half the resolution of the one before, and those of its blocks.

    Args:
        width: channels of the first convolution; level i has width * multipliers[i] and 1/2^i of the resolution.
        blocks: residual blocks of a level on the way down; one more on the way up.
        attention, image_size: there is self-attention in the levels i where image_size // 2^i is in `attention`.
        centered: the data is in [-1, 1]; if False, in [0, 1], and the network begins with 2 x - 1.
    """

    width: int = 128
    multipliers: Sequence[float] = (1, 2, 2, 2)
    blocks: int = 4
    attention: Sequence[int] = (16,)
    image_size: int = 32
    centered: bool = True

    @property
    def levels(self) -> list[tuple[int, bool]]:
        """Channels of each level, and whether it has attention."""
        widths = enumerate(round(self.width * m) for m in self.multipliers)
        return [(width, self.image_size // 2**i in self.attention) for i, width in widths]

    @property
    def multiple(self) -> int:
        """What lengths are padded to multiples of."""
        return 2 ** (len(self.multipliers) - 1)


class Level(nn.Module):
    """Residual blocks, each followed by attention if `attend`, then the step to the next resolution."""

    def __init__(
        self, inputs: int, outputs: int, blocks: int, attend: bool, step: nn.Module | None, style: Style
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Stage(inputs if i == 0 else outputs, outputs, attend, style) for i in range(blocks))
        self.step = step

    def forward(self, h: Tensor, label: Tensor | None = None) -> Tensor:
        for stage in self.stages:
            h = stage(h, label, None)
        return h if self.step is None else take(self.step, h, label)


class DownLevel(Level):
    """A level whose features go to the way up as skips too; the pyramid enters it behind the step."""

    def __init__(self, *level: Any, entry: nn.Module) -> None:
        super().__init__(*level)
        self.entry = entry

    def forward(  # type: ignore[override]
        self, h: Tensor, label: Tensor | None, text: Text | None, pyramid: Tensor, skips: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        for stage in self.stages:
            h = stage(h, label, text)
            skips.append(h)
        if self.step is not None:
            h, pyramid = self.entry(take(self.step, h, label), pyramid)
            skips.append(h)
        return h, pyramid


class Stage(nn.Module):
    """A residual block and, if `attend`, attention."""

    def __init__(self, inputs: int, outputs: int, attend: bool, style: Style) -> None:
        super().__init__()
        self.residual = ResidualBlock(inputs, outputs, style)
        self.attention = Attention(outputs, style) if attend else nn.Identity()

    def forward(self, h: Tensor, label: Tensor | None, text: Text | None) -> Tensor:
        return look(self.attention, self.residual(h, label), text)


class Middle(nn.Module):
    """The bottom of the U: two residual blocks around attention."""

    def __init__(self, channels: int, style: Style) -> None:
        super().__init__()
        self.before = ResidualBlock(channels, channels, style)
        self.attention = Attention(channels, style)
        self.after = ResidualBlock(channels, channels, style)

    def forward(self, h: Tensor, label: Tensor | None, text: Text | None) -> Tensor:
        return self.after(self.attention(self.before(h, label), text), label)


class UpLevel(nn.Module):
    """Residual blocks that take in the skips of the way down, attention, a part of the output, the step to double size.

    Attention follows the last block, or with `attend_each` every block.
    """

    def __init__(
        self, inputs: Sequence[int], outputs: int, attend: bool, attend_each: bool, out: nn.Module,
        step: nn.Module | None, style: Style,
    ) -> None:  # fmt: skip
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(width, outputs, style) for width in inputs)
        earlier = len(inputs) - 1 if attend and attend_each else 0
        self.attentions = nn.ModuleList(Attention(outputs, style) for _ in range(earlier))
        self.attention = Attention(outputs, style) if attend else nn.Identity()
        self.out, self.step = out, step

    def forward(
        self, h: Tensor, label: Tensor | None, text: Text | None, pyramid: Tensor | None, skips: list[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        for i, block in enumerate(self.blocks):
            h = block(torch.cat([h, skips.pop()], dim=1), label)
            if i < len(self.attentions):
                h = look(self.attentions[i], h, text)
        h, pyramid = self.out(look(self.attention, h, text), pyramid)
        return (h if self.step is None else take(self.step, h, label)), pyramid


def without_skips(inputs: int, o: LevelOptions) -> nn.ModuleList:
    """The levels of a way down without a way up."""
    levels = nn.ModuleList()
    for i, (outputs, attend) in enumerate(o.levels, start=1):
        step = step_down(outputs, o) if i < len(o.levels) else None
        levels.append(Level(inputs, outputs, o.blocks, attend, step, o))
        inputs = outputs
    return levels


def _step(channels: int, style: Style, convolution: Callable[..., Any], plain: Callable[..., nn.Module]) -> nn.Module:
    """What changes the resolution between two levels."""
    if style.block == "ddpm" and style.resample_conv:
        return convolution(channels, channels, style.fir, style.dimensions)
    resample = plain(style.fir, style.dimensions)
    return ResidualBlock(channels, channels, style, resample) if style.block == "biggan" else resample


step_down = partial(_step, convolution=ConvDown, plain=down)
step_up = partial(_step, convolution=ConvUp, plain=up)


def take(step: nn.Module, h: Tensor, label: Tensor | None) -> Tensor:
    """A step between levels; only residual blocks take the label."""
    return step(h, label) if isinstance(step, ResidualBlock) else step(h)


def look(attention: nn.Module, h: Tensor, text: Text | None) -> Tensor:
    """Attention to the text too, or the identity, which takes none."""
    return attention(h, text) if isinstance(attention, Attention) else attention(h)
