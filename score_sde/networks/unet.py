"""The U-Net of images, signals or volumes: DDPM's (Ho et al. 2020), DDPM++'s and NCSN++'s (Song et al. 2021, appendix
H) and ADM's (Dhariwal & Nichol 2021, section 3), by its options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..machine.devices import sent
from .blocks import Fourier, Head, LabelEmbedding, Sinusoidal, Waves
from .conditioning import Conditional, check, refuse
from .layers import cropped, padded
from .levels import DownLevel, LevelOptions, Middle, UpLevel, step_down, step_up
from .pyramid import Combine, InputResidual, InputSkip, NoPyramid, OutputResidual, OutputSeed, OutputSkip

Embedding = Literal["sinusoidal", "transformer", "fourier", None]
Progressive = Literal["none", "output_skip", "residual"]
ProgressiveInput = Literal["none", "input_skip", "residual"]


@dataclass(frozen=True, kw_only=True)
class UNetOptions(LevelOptions):
    """The options of a `UNet`, beside those of its levels and its blocks.

    Args:
        embedding: of the label: "sinusoidal", with DDPM's frequencies, and "transformer", with those of Vaswani et al.
            2017 and ADM, suit labels as 999 t, "fourier" positive labels as sigma; None ignores the label.
        fourier_scale: standard deviation of the random frequencies of "fourier".
        time_width: width of these features, `width` if None; the embedding made of them is four times as wide.
        progressive: how the output is gathered from the levels: "output_skip" sums images, "residual" features.
        progressive_input: how the shrunk input enters the levels.
        combine: whether "input_skip" adds the input's projection or concatenates it.
        fourier_features: integers n for which sin(2^n pi x) and cos(2^n pi x) join the input's channels (Kingma et al.
            2021, arXiv:2107.00630, appendix C, with n = 7 and 8 for 256 levels in [-1, 1]): details as fine as the
            levels, which a likelihood counts.
        out_channels: of the output, in place of the input's.
        attend_each: on the way up attention follows each block instead of a level's last.
        classes: number of classes of the condition `label`; 0: none.
        image_channels: of the condition `image`; 0: none.
        pooled_width: of the condition `pooled`; 0: none. (`text_width` is that of a token of `text`.)
        movement: numbers of the condition `movement`; 0: none.
    """

    embedding: Embedding = "sinusoidal"
    fourier_scale: float = 16.0
    time_width: int | None = None
    progressive: Progressive = "none"
    progressive_input: ProgressiveInput = "none"
    combine: Combine = "sum"
    fourier_features: Sequence[int] = ()
    out_channels: int | None = None
    attend_each: bool = False
    classes: int = 0
    image_channels: int = 0
    pooled_width: int = 0
    movement: int = 0


class UNet(Conditional):
    """F(x, time, /, **condition) -> a tensor of x's shape, (B, channels, H, W), or with `out_channels` in their place.

    With `dimensions` 1 it takes signals, (B, channels, L), and with 3 volumes, (B, channels, D, H, W).

    `time` is a label of the time, (B,); the conditions are those of `Conditional`, and `movement`, (B, movement), how
    augmentation has moved the images: None is zeros, not at all (Karras et al. 2022, appendix F.2). The options are
    `UNetOptions`, `LevelOptions` and `Style`.

    Lengths may be anything: they are padded inside to multiples of 2^(levels - 1), by repeating the border, and the
    output is cropped. Raises ValueError for an unknown name or an impossible size.
    """

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__()
        o = UNetOptions(**options)
        time_width = o.time_width or o.width
        if o.embedding is not None:
            o = replace(o, label_width=4 * time_width)
        elif o.classes or o.image_channels or o.pooled_width or o.movement:
            raise ValueError(
                "classes, image_channels, pooled_width and movement need a time embedding to add to: set embedding"
            )
        self.centered, self.multiple = o.centered, o.multiple

        # Layers are made in the order in which they run, which is also the order of score_sde_pytorch's parameters.
        self.embed = None
        if o.embedding is not None:
            waves: Sinusoidal | Fourier = Sinusoidal(time_width, ends=o.embedding == "sinusoidal")
            if o.embedding == "fourier":
                waves = Fourier(time_width, o.fourier_scale)
            self.embed = LabelEmbedding(waves, 4 * time_width, o.act, o.movement)
            if self.embed.beside is not None and o.embedding == "transformer":
                nn.init.zeros_(self.embed.beside.weight)  # as in EDM's ADM
        self.learn_conditions(4 * time_width, o.act, o.classes, o.image_channels, o.text_width, o.pooled_width)
        self.waves = Waves(o.fourier_features) if len(o.fourier_features) else None
        self.first = o.conv(channels * (1 + 2 * len(o.fourier_features)) + o.image_channels, o.width, 3)
        self.down, skips = _way_down(channels, o)
        self.middle = Middle(skips[-1], o)
        out_channels = o.out_channels or channels
        self.up = _way_up(out_channels, skips, o)
        finest = o.levels[0][0]
        self.head = None if o.progressive == "output_skip" else Head(finest, out_channels, o, o.init_scale)

    def forward(self, x: Tensor, time: Tensor, /, movement: Tensor | None = None, **condition: Any) -> Tensor:
        conditions, size = self.conditions(x, **condition), x.shape[2:]
        told = self._told(movement, len(x))
        x = self._prepared(x)
        inputs = x if self.waves is None else self.waves(x)
        if conditions.image is not None:
            inputs = torch.cat([inputs, self._prepared(conditions.image)], dim=1)
        embedded = None if self.embed is None else self.embed(time, conditions.embedding, told)

        h, shrunk = self.first(inputs), x
        skips = [h]
        for level in self.down:
            h, shrunk = level(h, embedded, conditions.text, shrunk, skips)
        h = self.middle(h, embedded, conditions.text)
        gathered: Any = None  # the lowest level begins it, if the output is progressive
        for level in self.up:
            h, gathered = level(h, embedded, conditions.text, gathered, skips)
        out: Tensor = gathered if self.head is None else self.head(h)
        return cropped(out, size)

    def _told(self, movement: Tensor | None, batch: int) -> Tensor | None:
        """The condition `movement`, checked."""
        layer = None if self.embed is None else self.embed.beside
        if movement is not None and layer is None:
            refuse(movement, "movement", "training.geometric")
        if movement is not None and layer is not None:
            check(movement, "movement", (batch, layer.in_features))
            movement = sent(movement, layer.weight.device)
        return movement

    def _prepared(self, x: Tensor) -> Tensor:
        """x, padded and centred."""
        x = padded(x, self.multiple)
        return x if self.centered else 2 * x - 1


def _way_down(channels: int, o: UNetOptions) -> tuple[nn.ModuleList, list[int]]:
    """The levels on the way down, and the channels of the skips that their blocks and steps leave for the way up."""
    skips, pyramid, levels = [o.width], channels, nn.ModuleList()
    *upper, (lowest, attends) = o.levels
    for outputs, attend in upper:
        entry: nn.Module = NoPyramid()
        above = skips[-1]
        skips += [outputs] * (o.blocks + 1)
        if o.progressive_input == "input_skip":
            entry = InputSkip(channels, outputs, o.combine, o)
            skips[-1] = 2 * outputs if o.combine == "cat" else outputs
        elif o.progressive_input == "residual":
            entry, pyramid = InputResidual(pyramid, outputs, o), outputs
        levels.append(DownLevel(above, outputs, o.blocks, attend, step_down(outputs, o), o, entry=entry))
    levels.append(DownLevel(skips[-1], lowest, o.blocks, attends, None, o, entry=NoPyramid()))
    return levels, skips + [lowest] * o.blocks


def _way_up(channels: int, skips: Sequence[int], o: UNetOptions) -> nn.ModuleList:
    """The levels on the way up, which take the skips of the way down from the last on."""
    left, levels, h = list(skips), nn.ModuleList(), skips[-1]
    for outputs, attend in reversed(o.levels):
        out: nn.Module = NoPyramid()
        if o.progressive == "output_skip":
            out = OutputSkip(outputs, channels, o)
        elif o.progressive == "residual":
            out = OutputResidual(h, outputs, o) if len(levels) else OutputSeed(outputs, o)
        inputs = [h + left.pop()] + [outputs + left.pop() for _ in range(o.blocks)]
        step = step_up(outputs, o) if left else None
        levels.append(UpLevel(inputs, outputs, attend, o.attend_each, out, step, o))
        h = outputs
    return levels
