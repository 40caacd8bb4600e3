"""The way down of the U-Net, to numbers instead of an image: what classifies noisy images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import BlockKind, Fourier, LabelEmbedding, Sinusoidal, Style
from .layers import ACTIVATIONS, Activation, conv, linear
from .levels import DownLevel, Middle, step_down
from .pyramid import NoPyramid
from .resample import Taps


class Encoder(nn.Module):
    """F(x, time) -> (B, outputs) of images (B, channels, H, W) and times (B,), 0 for every output at first.

    The U-Net's levels on the way down and its bottom; then norm, activation, the mean over all places and a linear
    layer (Dhariwal & Nichol 2021, section 4.3, whose attention over places is a mean here). Arguments are `UNet`'s.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        width: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (16,),
        image_size: int = 32,
        dropout: float = 0.0,
        block: BlockKind = "biggan",
        embedding: Literal["sinusoidal", "fourier"] = "sinusoidal",
        fourier_scale: float = 16.0,
        fir: Taps | None = None,
        resample_conv: bool = True,
        skip_rescale: bool = True,
        activation: Activation = "swish",
        init_scale: float = 0.0,
        centered: bool = True,
        scale_shift: bool = True,
        heads: int = 1,
    ) -> None:
        super().__init__()
        style = Style(
            block=block,
            label_width=4 * width,
            activation=ACTIVATIONS[activation],
            groups=None,
            dropout=dropout,
            init_scale=init_scale,
            skip_rescale=skip_rescale,
            fir=fir,
            resample_conv=resample_conv,
            recompute=False,
            scale_shift=scale_shift,
            heads=heads,
        )
        self.centered, self.activation = centered, ACTIVATIONS[activation]
        self.multiple = 2 ** (len(multipliers) - 1)
        waves = Sinusoidal(width) if embedding == "sinusoidal" else Fourier(width, fourier_scale)
        self.embed = LabelEmbedding(waves, 4 * width, self.activation)
        self.first = conv(channels, width, 3)
        self.down = nn.ModuleList()
        inputs = width
        for i, outer in enumerate(width * m for m in multipliers):
            attend, last = image_size // 2**i in attention, i == len(multipliers) - 1
            step = None if last else step_down(outer, style)
            self.down.append(DownLevel(inputs, outer, blocks, attend, step, NoPyramid(), style))
            inputs = outer
        self.middle = Middle(inputs, style)
        self.norm = style.norm(inputs)
        self.out = linear(inputs, outputs, scale=0.0)

    def forward(self, x: Tensor, time: Tensor, /) -> Tensor:
        excess = (-x.shape[-1] % self.multiple, -x.shape[-2] % self.multiple)
        if any(excess):
            x = F.pad(x, (0, excess[0], 0, excess[1]), mode="replicate")
        if not self.centered:
            x = 2 * x - 1
        embedded = self.embed(time)
        h, skips = self.first(x), list[Any]()
        for level in self.down:
            h, _ = level(h, embedded, None, x, skips)
        h = self.activation(self.norm(self.middle(h, embedded, None)))
        return self.out(h.mean((2, 3)))
