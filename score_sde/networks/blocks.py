"""The blocks of the U-Net: label embedding, residual block, self-attention, the three ways of joining two branches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layers import Dropout, conv, group_norm, linear
from .resample import Repeat, Taps

BlockKind = Literal["ddpm", "biggan"]


@dataclass(frozen=True, kw_only=True)
class Style:
    """What all blocks of one network share."""

    block: BlockKind
    label_width: int | None  # None: blocks without a label
    activation: Callable[[Tensor], Tensor]
    groups: int | None
    dropout: float
    init_scale: float
    skip_rescale: bool
    fir: Taps | None
    resample_conv: bool  # DDPM's blocks only: whether a convolution resamples
    recompute: bool  # activation checkpointing
    scale_shift: bool = False  # the label scales the second norm's output as well as shifting it
    heads: int = 1  # of attention

    def norm(self, channels: int) -> nn.GroupNorm:
        """Group normalisation by the network's rule."""
        return group_norm(channels, self.groups)

    def add(self, x: Tensor, h: Tensor) -> Tensor:
        """x + h, divided by sqrt(2) if skip connections are rescaled to keep the variance."""
        return (x + h).mul_(math.sqrt(0.5)) if self.skip_rescale else x + h


class Sinusoidal(nn.Module):
    """(B,) labels to (B, width): sines and cosines of label · 10000^(-i / (width/2 - 1)) (Vaswani et al. 2017).

    Labels are expected to span about 1000, as 999 t does.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = self.outputs = width

    def forward(self, label: Tensor) -> Tensor:
        half = self.width // 2
        index = torch.arange(half, dtype=label.dtype, device=label.device)
        angles = label[:, None] * torch.exp(index * (-math.log(10_000) / max(half - 1, 1)))
        return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, self.width % 2))


class Fourier(nn.Module):
    """(B,) positive labels to (B, 2 width): sines and cosines of 2π w log(label), w ~ N(0, scale²) drawn once.

    Random Fourier features (Tancik et al. 2020, arXiv:2006.10739); the label of a VE network is sigma.
    """

    frequencies: Tensor

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", scale * torch.randn(width))
        self.outputs = 2 * width

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fourier:
        """Half precision is not for the frequencies: 2π w log(label) would be off by a radian."""
        before = self.frequencies
        super()._apply(fn, recurse)
        if self.frequencies.dtype in (torch.float16, torch.bfloat16):
            self.frequencies = before.to(self.frequencies.device)
        return self

    def forward(self, label: Tensor) -> Tensor:
        angles = label.log()[:, None] * self.frequencies * (2 * math.pi)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class Waves(nn.Module):
    """(B, C, ...) to (B, C (1 + 2 N), ...): x, then sin(2^n pi x) and cos(2^n pi x) for each of the N exponents n."""

    def __init__(self, exponents: Sequence[int]) -> None:
        super().__init__()
        self.factors = [2.0**n * math.pi for n in exponents]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, *(wave(factor * x) for factor in self.factors for wave in (torch.sin, torch.cos))], dim=1)


class LabelEmbedding(nn.Module):
    """Features of the label, then two layers; (B,) to (B, outputs).

    The activation at the end, which DDPM puts at the beginning of every block, is taken here once for all of them.
    """

    def __init__(self, features: Sinusoidal | Fourier, outputs: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.features = features
        self.hidden = linear(features.outputs, outputs)
        self.out = linear(outputs, outputs)
        self.activation = activation

    def forward(self, label: Tensor, more: Tensor | None = None) -> Tensor:
        kind = self.hidden.weight.dtype
        # A network in half precision has labels in float32: 999 t would be rounded to whole numbers, and worse.
        features = self.features(label.to(torch.promote_types(kind, torch.float32))).to(kind)
        h = self.out(self.activation(self.hidden(features)))
        return self.activation(h if more is None else h + more)


class ClassEmbedding(nn.Module):
    """Class labels to (B, outputs): a row of a table for each, zeros for -1, which means no label.

    It is added to the embedding of the time (Dhariwal & Nichol 2021, section 4.1).
    """

    def __init__(self, classes: int, outputs: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(classes, outputs))

    def forward(self, label: Any, batch: int) -> Tensor:
        """`label` is an integer, or integers (B,); None is -1. Raises ValueError for a class that does not exist."""
        label = torch.as_tensor(-1 if label is None else label)
        if label.ndim > 1 or label.is_floating_point() or (label.ndim and len(label) != batch):
            raise ValueError(
                f"label must be a class or ({batch},) of them, got {label.dtype} of shape {tuple(label.shape)}"
            )
        if label.device.type == "cpu" and label.numel() and not -1 <= label.min() <= label.max() < len(self.table):
            raise ValueError(
                f"label must lie in 0..{len(self.table) - 1}, or be -1 for none, got {label.min()} to {label.max()}"
            )
        label = label.to(self.table.device, non_blocking=True).expand(batch)
        return self.table[label.clamp_min(0)] * (label >= 0)[:, None]


def told_class(classes: ClassEmbedding | None, label: Any, batch: int) -> Tensor | None:
    """The classes' embedding, (B, outputs). Raises ValueError for a label that a network without classes is given."""
    if classes is None and label is not None:
        raise ValueError("the network knows no classes, and was given a label: train one with model.class_conditional")
    return None if classes is None else classes(label, batch)


class ResidualBlock(nn.Module):
    """x + conv(act(norm(conv(resample(act(norm(x)))) + label))), with x resampled and projected as needed.

    Without `resample` this is DDPM's block (Ho et al. 2020), with it BigGAN's (Brock et al. 2019). With `scale_shift`
    the label enters as norm(h) (1 + scale) + shift instead (Nichol & Dhariwal 2021, section 3).
    """

    def __init__(self, inputs: int, outputs: int, style: Style, resample: nn.Module | None = None) -> None:
        super().__init__()
        self.norm1 = style.norm(inputs)
        self.resample = resample
        self.conv1 = conv(inputs, outputs, 3)
        self.label = None
        if style.label_width is not None:
            self.label = linear(style.label_width, 2 * outputs if style.scale_shift else outputs)
        self.norm2 = style.norm(outputs)
        self.dropout = Dropout(style.dropout)
        self.conv2 = conv(outputs, outputs, 3, scale=style.init_scale)
        # the published code starts the projection of DDPM's block smaller, like those of the attention
        projection_scale = 0.1 if style.block == "ddpm" else 1.0
        same = inputs == outputs and resample is None
        self.shortcut = nn.Identity() if same else conv(inputs, outputs, 1, scale=projection_scale)
        self.style = style

    def forward(self, x: Tensor, label: Tensor | None) -> Tensor:
        if self.style.recompute and torch.is_grad_enabled():
            return checkpoint(self.block, x, label, use_reentrant=False)
        return self.block(x, label)

    def block(self, x: Tensor, label: Tensor | None) -> Tensor:
        activation = self.style.activation
        h = activation(self.norm1(x))
        if isinstance(self.resample, Repeat):  # a 1x1 convolution may as well come first, on a quarter of the pixels
            h, x = self.resample.convolve(h, self.conv1), self.resample(self.shortcut(x))
        elif self.resample is not None:
            h, x = self.conv1(self.resample(h)), self.shortcut(self.resample(x))
        else:
            h, x = self.conv1(h), self.shortcut(x)
        told = None if self.label is None else self.label(label)[:, :, None, None]
        if told is None:
            h = self.norm2(h)
        elif self.style.scale_shift:
            scale, shift = told.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h += told
            h = self.norm2(h)
        h = self.conv2(self.dropout(activation(h)))
        return self.style.add(x, h)


class Attention(nn.Module):
    """x + out(softmax(q kᵀ / sqrt(C)) v): every pixel attends to every pixel, with C channels per head.

    Raises ValueError for a number of channels that the heads do not divide.
    """

    def __init__(self, channels: int, style: Style) -> None:
        super().__init__()
        if channels % style.heads:
            raise ValueError(f"{style.heads} heads of attention cannot share {channels} channels; take a divisor")
        self.norm = style.norm(channels)
        self.qkv = conv(channels, 3 * channels, 1, scale=0.2)  # as three maps of C to C channels with scale 0.1
        self.out = conv(channels, channels, 1, scale=style.init_scale)
        self.style = style

    def forward(self, x: Tensor) -> Tensor:
        # (B, 3 heads, H W, C); the fast kernels want the channels of a pixel side by side
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).contiguous()
        qkv = qkv.unflatten(2, (3 * self.style.heads, -1)).transpose(1, 2)
        h = F.scaled_dot_product_attention(*qkv.chunk(3, dim=1))
        h = h.transpose(1, 2).flatten(2).transpose(1, 2).reshape(x.shape)
        return self.style.add(x, self.out(h))


class Head(nn.Module):
    """conv3x3(act(norm(x)))."""

    def __init__(self, inputs: int, outputs: int, style: Style, scale: float) -> None:
        super().__init__()
        self.norm = style.norm(inputs)
        self.conv = conv(inputs, outputs, 3, scale=scale)
        self.activation = style.activation

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.activation(self.norm(x)))
