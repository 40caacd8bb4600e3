"""The network of classifiers of noisy images: the way down of the U-Net, to one number per class."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from .blocks import Fourier, LabelEmbedding, Sinusoidal
from .layers import linear, padded
from .levels import LevelOptions, Middle, without_skips


@dataclass(frozen=True, kw_only=True)
class EncoderOptions(LevelOptions):
    """The options of an `Encoder`: those of the levels and the blocks, and the embedding of the time as in `UNet`."""

    blocks: int = 2
    dropout: float = 0.0
    scale_shift: bool = True
    embedding: Literal["sinusoidal", "fourier"] = "sinusoidal"
    fourier_scale: float = 16.0


class Encoder(nn.Module):
    """F(x, time) -> (B, outputs) of images (B, channels, H, W) and times (B,), 0 for every output at first.

    Its parts are the U-Net's levels on the way down and its bottom, then norm, activation, the mean over all places and
    a linear layer (Dhariwal & Nichol 2021, section 4.3, who attend over places in place of the mean). The options are
    `EncoderOptions`, `LevelOptions` and `Style`.
    """

    def __init__(self, channels: int, outputs: int, **options: Any) -> None:
        super().__init__()
        o = EncoderOptions(**options)
        o = replace(o, label_width=4 * o.width)
        self.centered, self.activation, self.multiple = o.centered, o.act, o.multiple
        waves = Sinusoidal(o.width) if o.embedding == "sinusoidal" else Fourier(o.width, o.fourier_scale)
        self.embed = LabelEmbedding(waves, 4 * o.width, o.act)
        self.first = o.conv(channels, o.width, 3)
        self.down = without_skips(o.width, o)
        deepest, _ = o.levels[-1]
        self.middle = Middle(deepest, o)
        self.norm = o.norm(deepest)
        self.out = linear(deepest, outputs, scale=0.0)

    def forward(self, x: Tensor, time: Tensor, /) -> Tensor:
        x = padded(x, self.multiple)
        if not self.centered:
            x = 2 * x - 1
        embedded = self.embed(time)
        h = self.first(x)
        for level in self.down:
            h = level(h, embedded)
        h = self.activation(self.norm(self.middle(h, embedded, None)))
        return self.out(h.mean(tuple(range(2, h.ndim))))
