"""The two halves of an autoencoder of images: the U-Net's way down to a code and its way up from one, without skips."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .blocks import BlockKind, Head, Style
from .layers import ACTIVATIONS, Activation, conv
from .levels import Middle, Stage, step_down, step_up, take
from .resample import Taps


class CodeEncoder(nn.Module):
    """F(x): images (B, channels, H, W) to (B, outputs, H/f, W/f), where f is 2^(levels - 1) and divides H and W.

    Levels of residual blocks, each at half the resolution of the one before, the U-Net's bottom, norm, activation and
    a convolution (Rombach et al. 2022, arXiv:2112.10752, appendix G; Esser et al. 2021, arXiv:2012.09841, table 7).
    Arguments are `UNet`'s.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        width: int = 128,
        multipliers: Sequence[int] = (1, 2, 4),
        blocks: int = 2,
        attention: Sequence[int] = (),
        image_size: int = 32,
        dropout: float = 0.0,
        block: BlockKind = "biggan",
        fir: Taps | None = None,
        resample_conv: bool = True,
        skip_rescale: bool = True,
        activation: Activation = "swish",
        heads: int = 1,
        centered: bool = True,
    ) -> None:
        super().__init__()
        style = _style(block, activation, dropout, skip_rescale, fir, resample_conv, heads)
        widths = [width * m for m in multipliers]
        self.centered = centered
        self.first = conv(channels, widths[0], 3)
        self.levels = nn.ModuleList()
        inputs = widths[0]
        for i, outer in enumerate(widths):
            last = i == len(widths) - 1
            step = None if last else step_down(outer, style)
            self.levels.append(_Level(inputs, outer, blocks, image_size // 2**i in attention, step, style))
            inputs = outer
        self.middle = Middle(inputs, style)
        self.head = Head(inputs, outputs, style, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x if self.centered else 2 * x - 1)
        for level in self.levels:
            h = level(h)
        return self.head(self.middle(h, None, None))


class CodeDecoder(nn.Module):
    """F(z): codes (B, inputs, h, w) to images (B, channels, f h, f w), `CodeEncoder`'s levels in the other order.

    Centred images are around 0, others around 1/2. Arguments are `CodeEncoder`'s, `image_size` the images' too.
    """

    def __init__(
        self,
        channels: int,
        inputs: int,
        *,
        width: int = 128,
        multipliers: Sequence[int] = (1, 2, 4),
        blocks: int = 2,
        attention: Sequence[int] = (),
        image_size: int = 32,
        dropout: float = 0.0,
        block: BlockKind = "biggan",
        fir: Taps | None = None,
        resample_conv: bool = True,
        skip_rescale: bool = True,
        activation: Activation = "swish",
        heads: int = 1,
        centered: bool = True,
    ) -> None:
        super().__init__()
        style = _style(block, activation, dropout, skip_rescale, fir, resample_conv, heads)
        widths = [width * m for m in multipliers]
        self.centered = centered
        self.first = conv(inputs, widths[-1], 3)
        self.middle = Middle(widths[-1], style)
        self.levels = nn.ModuleList()
        h = widths[-1]
        for i, outer in reversed(list(enumerate(widths))):
            step = step_up(outer, style) if i else None
            self.levels.append(_Level(h, outer, blocks + 1, image_size // 2**i in attention, step, style))
            h = outer
        self.head = Head(h, channels, style, 1.0)

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


def _style(
    block: BlockKind,
    activation: Activation,
    dropout: float,
    skip_rescale: bool,
    fir: Taps | None,
    resample_conv: bool,
    heads: int,
) -> Style:
    return Style(
        block=block,
        label_width=None,
        activation=ACTIVATIONS[activation],
        groups=None,
        dropout=dropout,
        init_scale=0.0,
        skip_rescale=skip_rescale,
        fir=fir,
        resample_conv=resample_conv,
        recompute=False,
        heads=heads,
    )
