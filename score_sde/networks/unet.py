"""One U-Net, whose options are DDPM's (Ho et al. 2020), DDPM++'s and NCSN++'s (Song et al. 2021, appendix H) and ADM's
(Dhariwal & Nichol 2021, section 3); of images, signals or volumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .blocks import BlockKind, Fourier, Head, LabelEmbedding, Sinusoidal, Style, Waves
from .conditioning import Conditional
from .layers import ACTIVATIONS, Activation, cropped, padded
from .levels import DownLevel, Middle, UpLevel, step_down, step_up
from .pyramid import Combine, InputResidual, InputSkip, NoPyramid, OutputResidual, OutputSeed, OutputSkip
from .resample import Taps

Embedding = Literal["sinusoidal", "transformer", "fourier", None]
Progressive = Literal["none", "output_skip", "residual"]
ProgressiveInput = Literal["none", "input_skip", "residual"]


class UNet(Conditional):
    """F(x, time, /, **condition) -> a tensor of x's shape, (B, channels, H, W), or with `out_channels` in their place.

    With `dimensions` 1 it is of signals, (B, channels, L), and with 3 of volumes, (B, channels, D, H, W).

    `time` is a label of the time, (B,); the conditions are those of `Conditional`.

    The network knows neither an SDE nor what its output means. Lengths may be anything: they are padded inside to
    multiples of 2^(levels - 1), by repeating the border, and the output is cropped.

    Args:
        width: channels of the first convolution; level i has width * multipliers[i] and 1/2^i of the resolution.
        blocks: residual blocks of a level on the way down; one more on the way up.
        attention, image_size: there is self-attention in the levels i where image_size // 2^i is in `attention`.
        block: the resolution changes in a block ("biggan") or between ("ddpm"; by a convolution if `resample_conv`).
        embedding: "sinusoidal" suits labels as 999 t, with DDPM's frequencies, and so does "transformer", with those of
            Vaswani et al. 2017 and ADM; "fourier" positive labels as sigma; None ignores the label.
        time_width: of these features, `width` if None; the embedding that is made of them has four times as many.
        fir: taps of the resampling filter, such as (1, 3, 3, 1); None: means and repetition.
        skip_rescale: divide sums of two branches by sqrt(2).
        progressive: how the output is gathered from the levels: "output_skip" sums images, "residual" features.
        progressive_input: how the shrunk input enters the levels.
        combine: whether "input_skip" adds the input's projection or concatenates it.
        groups: of group normalisation; None is min(channels // 4, 32).
        init_scale: of the last convolution of every branch, relative to the others.
        centered: the data is in [-1, 1]; if False, in [0, 1], and the network begins with 2 x - 1.
        fourier_features: integers n for which sin(2^n pi x) and cos(2^n pi x) join the input's channels (Kingma et al.
            2021, arXiv:2107.00630, appendix C, with n = 7 and 8 for 256 levels in [-1, 1]): details as fine as the
            levels, which a likelihood counts.
        checkpoint_activations: recompute residual blocks in the backward pass, which saves memory.
        scale_shift: the label scales the features as well as shifting them.
        heads, head_channels: of self-attention, how many, or how wide each is; 0: as `heads` says.
        attend_each: on the way up attention follows each block instead of a level's last.
        project: blocks that resample have a convolution in the shortcut even where the number of channels stays.
        norm_eps: added to the variances of group normalisation.
        classes: how many there are to be told of, condition `label`; 0: none.
        image_channels: of the condition `image`; 0: none.
        text_width, pooled_width: of a token of `text`, seen wherever there is self-attention, and of `pooled`.

    Raises ValueError for an unknown name or an impossible size.
    """

    def __init__(
        self,
        channels: int,
        *,
        dimensions: int = 2,
        width: int = 128,
        multipliers: Sequence[float] = (1, 2, 2, 2),
        blocks: int = 4,
        attention: Sequence[int] = (16,),
        image_size: int = 32,
        dropout: float = 0.1,
        block: BlockKind = "biggan",
        embedding: Embedding = "sinusoidal",
        fourier_scale: float = 16.0,
        fir: Taps | None = None,
        resample_conv: bool = True,
        skip_rescale: bool = True,
        progressive: Progressive = "none",
        progressive_input: ProgressiveInput = "none",
        combine: Combine = "sum",
        activation: Activation = "swish",
        groups: int | None = None,
        init_scale: float = 0.0,
        centered: bool = True,
        fourier_features: Sequence[int] = (),
        checkpoint_activations: bool = False,
        out_channels: int | None = None,
        scale_shift: bool = False,
        heads: int = 1,
        head_channels: int = 0,
        attend_each: bool = False,
        project: bool = True,
        norm_eps: float = 1e-6,
        time_width: int | None = None,
        classes: int = 0,
        image_channels: int = 0,
        text_width: int = 0,
        pooled_width: int = 0,
    ) -> None:
        super().__init__()
        for name, value, kind in [
            ("block", block, BlockKind),
            ("embedding", embedding, Embedding),
            ("progressive", progressive, Progressive),
            ("progressive_input", progressive_input, ProgressiveInput),
            ("combine", combine, Combine),
            ("activation", activation, Activation),
        ]:
            if value not in get_args(kind):
                raise ValueError(f"unknown {name} {value!r}; use one of {', '.join(map(repr, get_args(kind)))}")
        act = ACTIVATIONS[activation]
        time_width = time_width or width
        style = Style(
            block=block,
            label_width=None if embedding is None else 4 * time_width,
            activation=act,
            groups=groups,
            dropout=dropout,
            init_scale=init_scale,
            skip_rescale=skip_rescale,
            fir=fir,
            resample_conv=resample_conv,
            recompute=checkpoint_activations,
            scale_shift=scale_shift,
            heads=heads,
            head_channels=head_channels,
            norm_eps=norm_eps,
            project=project,
            dimensions=dimensions,
            text_width=text_width,
        )
        self.centered = centered
        self.multiple = 2 ** (len(multipliers) - 1)
        widths = [round(width * m) for m in multipliers]
        attends = [image_size // 2**i in attention for i in range(len(widths))]

        # Parts are made in the order in which they run, which is also the order of score_sde_pytorch's parameters.
        self.embed = None
        if embedding is not None:
            waves: Sinusoidal | Fourier = Sinusoidal(time_width, ends=embedding == "sinusoidal")
            if embedding == "fourier":
                waves = Fourier(time_width, fourier_scale)
            self.embed = LabelEmbedding(waves, 4 * time_width, act)
        elif classes or image_channels or pooled_width:
            raise ValueError("classes, images and pooled texts need an embedding to be added to: set embedding")
        self.learn_conditions(4 * time_width, act, classes, image_channels, text_width, pooled_width)
        self.waves = Waves(fourier_features) if len(fourier_features) else None
        self.first = style.conv(channels * (1 + 2 * len(fourier_features)) + image_channels, width, 3)

        skips = [width]  # channels of what the way down leaves for the way up
        pyramid = channels
        self.down = nn.ModuleList()
        for outputs, attend in zip(widths[:-1], attends[:-1]):
            entry: nn.Module = NoPyramid()
            above = skips[-1]
            skips += [outputs] * (blocks + 1)
            if progressive_input == "input_skip":
                entry = InputSkip(channels, outputs, combine, style)
                skips[-1] = 2 * outputs if combine == "cat" else outputs
            elif progressive_input == "residual":
                entry, pyramid = InputResidual(pyramid, outputs, style), outputs
            self.down.append(DownLevel(above, outputs, blocks, attend, step_down(outputs, style), entry, style))
        self.down.append(DownLevel(skips[-1], widths[-1], blocks, attends[-1], None, NoPyramid(), style))
        skips += [widths[-1]] * blocks

        h = widths[-1]
        self.middle = Middle(h, style)

        self.up = nn.ModuleList()
        for outputs, attend in zip(reversed(widths), reversed(attends)):
            out: nn.Module = NoPyramid()
            if progressive == "output_skip":
                out = OutputSkip(outputs, out_channels or channels, style)
            elif progressive == "residual":
                out = OutputResidual(h, outputs, style) if len(self.up) else OutputSeed(outputs, style)
            inputs = [h + skips.pop()] + [outputs + skips.pop() for _ in range(blocks)]
            step = step_up(outputs, style) if skips else None
            self.up.append(UpLevel(inputs, outputs, attend, attend_each, out, step, style))
            h = outputs

        self.head = None if progressive == "output_skip" else Head(h, out_channels or channels, style, init_scale)

    def forward(self, x: Tensor, time: Tensor, /, **condition: Any) -> Tensor:
        told = self.told(x, **condition)
        size = x.shape[2:]
        x = self._prepared(x)
        shown = x if self.waves is None else self.waves(x)
        if told.image is not None:
            shown = torch.cat([shown, self._prepared(told.image)], dim=1)
        embedded = None if self.embed is None else self.embed(time, told.embedding)

        h, shrunk = self.first(shown), x
        skips = [h]
        for level in self.down:
            h, shrunk = level(h, embedded, told.text, shrunk, skips)
        h = self.middle(h, embedded, told.text)
        gathered: Any = None  # begun by the lowest level, if the output is progressive
        for level in self.up:
            h, gathered = level(h, embedded, told.text, gathered, skips)
        out: Tensor = gathered if self.head is None else self.head(h)
        return cropped(out, size)

    def _prepared(self, x: Tensor) -> Tensor:
        """x, padded and centred."""
        x = padded(x, self.multiple)
        return x if self.centered else 2 * x - 1
