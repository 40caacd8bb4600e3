"""The blocks of the U-Net: embeddings of the label, residual block, self-attention, head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import ACTIVATIONS, Activation, Convolution, Dropout, conv, group_norm, linear, recomputed, rms_norm
from .resample import Repeat, Taps

BlockKind = Literal["ddpm", "biggan"]


@dataclass(frozen=True, kw_only=True)
class Style:
    """The options that all blocks of one network share.

    Args:
        block: the resolution changes in a block ("biggan") or between ("ddpm"; by a convolution if `resample_conv`).
        fir: taps of the resampling filter, such as (1, 3, 3, 1); None: means and repetition.
        skip_rescale: divide sums of two branches by sqrt(2).
        groups: of group normalisation; None is min(channels // 4, 32).
        init_scale: of the last convolution of every branch, relative to the others.
        checkpoint_activations: recompute residual blocks in the backward pass, which saves memory.
        scale_shift: the label scales the features as well as shifting them.
        heads, head_channels: the number of heads of self-attention, or in its place the width of each; 0: `heads`.
        project: blocks that resample have a convolution in the shortcut even where the number of channels stays.
        norm_eps: added to the variances of group normalisation.
        dimensions: 1: signals (B, C, L), 2: images (B, C, H, W), 3: volumes (B, C, D, H, W).
        text_width: of the text's tokens, which attention has as keys and values beside the pixels; 0: no text.
        label_width: of the embedded label; None: blocks without a label. Networks set it.

    Raises ValueError for a name that is no value of its option.
    """

    block: BlockKind = "biggan"
    activation: Activation = "swish"
    dropout: float = 0.1
    fir: Taps | None = None
    resample_conv: bool = True
    skip_rescale: bool = True
    groups: int | None = None
    init_scale: float = 0.0
    checkpoint_activations: bool = False
    scale_shift: bool = False
    heads: int = 1
    head_channels: int = 0
    project: bool = True
    norm_eps: float = 1e-6
    dimensions: int = 2
    text_width: int = 0
    label_width: int | None = None

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value, names = getattr(self, name), get_args(kind)
            if get_origin(kind) is Literal and value not in names:
                raise ValueError(f"unknown {name} {value!r}; use one of {', '.join(map(repr, names))}")

    @property
    def act(self) -> Callable[[Tensor], Tensor]:
        """The activation as a function."""
        return ACTIVATIONS[self.activation]

    def norm(self, channels: int) -> nn.GroupNorm:
        """Group normalisation by the network's rule."""
        return group_norm(channels, self.groups, self.norm_eps)

    def conv(self, inputs: int, outputs: int, size: int, scale: float = 1.0) -> Convolution:
        """A convolution of the network's dimensions."""
        return conv(inputs, outputs, size, scale=scale, dimensions=self.dimensions)

    def heads_of(self, channels: int) -> int:
        """Number of attention heads. Raises ValueError if they do not divide the channels."""
        if self.head_channels and channels % self.head_channels:
            raise ValueError(f"{channels} channels do not divide into heads of {self.head_channels}: take a divisor")
        heads = channels // self.head_channels if self.head_channels else self.heads
        if channels % heads:
            raise ValueError(f"{heads} heads of attention cannot share {channels} channels: take a divisor")
        return heads

    def add(self, x: Tensor, h: Tensor) -> Tensor:
        """x + h, divided by sqrt(2) if skip connections are rescaled to keep the variance."""
        return (x + h).mul_(math.sqrt(0.5)) if self.skip_rescale else x + h


class Sinusoidal(nn.Module):
    """(B,) labels to (B, width): sines and cosines of label · 10000^(-i/n), n = width/2 - 1 as DDPM has it.

    With `ends=False` n = width/2, as Vaswani et al. 2017 (section 3.5) and ADM have it: no wave has the frequency
    1/10000. Labels are expected to span about 1000, as 999 t does.
    """

    def __init__(self, width: int, ends: bool = True) -> None:
        super().__init__()
        self.width = self.outputs = width
        self.ends = ends

    def forward(self, label: Tensor) -> Tensor:
        half = self.width // 2
        index = torch.arange(half, dtype=label.dtype, device=label.device)
        angles = label[:, None] * torch.exp(index * (-math.log(10_000) / max(half - self.ends, 1)))
        return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, self.width % 2))


class RandomWaves(nn.Module):
    """Waves whose frequencies and phases, buffers of this module, were drawn once."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RandomWaves:
        """Keep the buffers out of half precision, where angles would be off by a radian."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in self._buffers.items():
            old = before[name]
            if old is not None and value is not None and value.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = old.to(value.device)
        return self


class Fourier(RandomWaves):
    """(B,) positive labels to (B, 2 width): sines and cosines of 2π w log(label), w ~ N(0, scale²) drawn once.

    Random Fourier features (Tancik et al. 2020, arXiv:2006.10739); the label of a VE network is sigma.
    """

    frequencies: Tensor

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", scale * torch.randn(width))
        self.outputs = 2 * width

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
    """(B,) labels to (B, outputs): features, then two layers.

    The activation at the end, which DDPM computes at the beginning of every block, is computed here once for all. A
    linear map of `beside`, so many further numbers (B, beside), is added to the features.
    """

    def __init__(
        self, features: Sinusoidal | Fourier, outputs: int, activation: Callable[[Tensor], Tensor], beside: int = 0
    ) -> None:
        super().__init__()
        self.features = features
        self.beside = linear(beside, features.outputs) if beside else None
        if self.beside is not None:
            self.beside.register_parameter("bias", None)  # zeros add nothing
        self.hidden = linear(features.outputs, outputs)
        self.out = linear(outputs, outputs)
        self.activation = activation

    def forward(self, label: Tensor, more: Tensor | None = None, beside: Tensor | None = None) -> Tensor:
        h = self.before(label, beside)
        return self.activation(h if more is None else h + more)

    def before(self, label: Tensor, beside: Tensor | None = None) -> Tensor:
        """The embedding before its last activation."""
        kind = self.hidden.weight.dtype
        # float32 for networks in half precision, which would round 999 t to whole numbers or worse
        features = self.features(label.to(torch.promote_types(kind, torch.float32))).to(kind)
        if self.beside is not None and beside is not None:
            features = features + self.beside(beside.to(kind))
        return self.out(self.activation(self.hidden(features)))


class ResidualBlock(nn.Module):
    """x + conv(act(norm(conv(resample(act(norm(x)))) + label))), with x resampled and projected as needed.

    Without `resample` this is DDPM's block (Ho et al. 2020), with it BigGAN's (Brock et al. 2019). With `scale_shift`
    the label enters as norm(h) (1 + scale) + shift instead: adaptive group normalisation (Nichol & Dhariwal 2021,
    section 3; Dhariwal & Nichol 2021, section 3.1).
    """

    def __init__(self, inputs: int, outputs: int, style: Style, resample: nn.Module | None = None) -> None:
        super().__init__()
        self.norm1 = style.norm(inputs)
        self.resample = resample
        self.conv1 = style.conv(inputs, outputs, 3)
        self.label = None
        if style.label_width is not None:
            self.label = linear(style.label_width, 2 * outputs if style.scale_shift else outputs)
        self.norm2 = style.norm(outputs)
        self.dropout = Dropout(style.dropout)
        self.conv2 = style.conv(outputs, outputs, 3, scale=style.init_scale)
        # the published code starts the projection of DDPM's block smaller, like those of the attention
        projection_scale = 0.1 if style.block == "ddpm" else 1.0
        same = inputs == outputs and not (resample and style.project)
        self.shortcut = nn.Identity() if same else style.conv(inputs, outputs, 1, scale=projection_scale)
        self.style = style

    def forward(self, x: Tensor, label: Tensor | None) -> Tensor:
        return recomputed(self.block, x, label) if self.style.checkpoint_activations else self.block(x, label)

    def block(self, x: Tensor, label: Tensor | None) -> Tensor:
        activation = self.style.act
        h = activation(self.norm1(x))
        if isinstance(self.resample, Repeat):  # a 1x1 convolution may as well come first, on a quarter of the pixels
            h, x = self.resample.convolve(h, self.conv1), self.resample(self.shortcut(x))
        elif self.resample is not None:
            h, x = self.conv1(self.resample(h)), self.shortcut(self.resample(x))
        else:
            h, x = self.conv1(h), self.shortcut(x)
        if self.label is None:
            h = self.norm2(h)
        elif self.style.scale_shift:
            scale, shift = spread(self.label(label), x.ndim).chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h += spread(self.label(label), x.ndim)
            h = self.norm2(h)
        h = self.conv2(self.dropout(activation(h)))
        return self.style.add(x, h)


def spread(features: Tensor, axes: int) -> Tensor:
    """(B, C) as (B, C, 1, ...), with so many axes."""
    return features.unflatten(1, (-1, *(1,) * (axes - 2)))


class Text(NamedTuple):
    """Tokens (B, L, D), and a mask (B, L), False where there is no token."""

    tokens: Tensor
    mask: Tensor


class HeadNorm(nn.Module):
    """Queries and keys by their root mean square over a head's channels, times a learned factor for each channel.

    The logits of attention cannot grow without bound (Henry et al. 2020, arXiv:2010.04245; Dehghani et al. 2023,
    arXiv:2302.05442, section 2, there by layer normalisation).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query, self.key = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.ones(channels))

    def queries(self, q: Tensor) -> Tensor:
        """Of shape (..., C), as the keys."""
        return rms_norm(q, q.shape[-1:]) * self.query

    def keys(self, k: Tensor) -> Tensor:
        return rms_norm(k, k.shape[-1:]) * self.key


def attend(
    qkv: Tensor, heads: int, project: nn.Linear | None = None, text: Text | None = None, norm: HeadNorm | None = None,
    angles: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(q kᵀ / sqrt(C)) v with C channels per head; (B, N, 3 heads C) to (B, N, heads C).

    `project`, to 2 heads C channels, makes more keys and values of the tokens of `text`. `norm` normalises queries and
    keys; `angles` (N, C/2), see `turned`, rotate them. The keys of a text are not rotated: all lie at position 0.
    """
    q, k, v = qkv.unflatten(2, (3 * heads, -1)).transpose(1, 2).chunk(3, dim=1)
    if norm is not None:
        q, k = norm.queries(q), norm.keys(k)
    if angles is not None:
        q, k = turned(q, angles), turned(k, angles)
    allowed = None
    if project is not None and text is not None:
        keys, values = project(text.tokens).unflatten(2, (2 * heads, -1)).transpose(1, 2).chunk(2, dim=1)
        keys = keys if norm is None else norm.keys(keys)
        k, v = torch.cat([k, keys], dim=2), torch.cat([v, values], dim=2)
        allowed = F.pad(text.mask, (q.shape[2], 0), value=True)[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, allowed).transpose(1, 2).flatten(2)


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """(..., N, C) with channels i and i + C/2 as a point of the plane, turned by angle (N, C/2): rotary positions.

    The product of two that are turned depends on the difference of their angles (Su et al. 2021, arXiv:2104.09864).
    """
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    """x + out(softmax(q kᵀ / sqrt(C)) v): every pixel attends to every pixel, with C channels per head.

    A style with `text_width` adds the tokens of a text as keys and values (Nichol et al. 2021, arXiv:2112.10741,
    section 3.1; Saharia et al. 2022, arXiv:2205.11487). Raises ValueError if the heads do not divide the channels.
    """

    def __init__(self, channels: int, style: Style) -> None:
        super().__init__()
        self.heads = style.heads_of(channels)
        self.norm = style.norm(channels)
        self.qkv = style.conv(channels, 3 * channels, 1, scale=0.2)  # as three maps of C to C channels with scale 0.1
        self.out = style.conv(channels, channels, 1, scale=style.init_scale)
        self.text = linear(style.text_width, 2 * channels) if style.text_width else None
        self.style = style

    def forward(self, x: Tensor, text: Text | None = None) -> Tensor:
        # (B, pixels, 3 heads C); the fast kernels want the channels of a pixel side by side
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).contiguous()
        h = attend(qkv, self.heads, self.text, text)
        return self.style.add(x, self.out(h.transpose(1, 2).reshape(x.shape)))


class Head(nn.Module):
    """conv3x3(act(norm(x)))."""

    def __init__(self, inputs: int, outputs: int, style: Style, scale: float) -> None:
        super().__init__()
        self.norm = style.norm(inputs)
        self.conv = style.conv(inputs, outputs, 3, scale=scale)
        self.activation = style.act

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.activation(self.norm(x)))
