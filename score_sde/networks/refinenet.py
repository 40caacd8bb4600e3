"""The networks of NCSN and NCSNv2: RefineNets (Lin et al. 2017, arXiv:1611.06612) of dilated residual blocks.

NCSN (Song & Ermon 2019, arXiv:1907.05600, appendix A) conditions its norms on the noise level; NCSNv2 (2020,
arXiv:2006.09011, table 3) is not conditioned on it. The encoder has stages of two residual blocks: the first has the
image's resolution, the next ones halve it, and the last two are dilated by 2 and 4 instead. The decoder refines, pools
and joins the features of the stages, from the deepest back to the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import ACTIVATIONS, Activation, cropped, layer_norm, padded, recomputed

Norm = Callable[[int], nn.Module]  # channels -> a module (x, level) -> a tensor of x's shape
Pool = Callable[[Tensor], Tensor]


class RefineStyle(NamedTuple):
    """The options that all blocks of one network share."""

    activation: Callable[[Tensor], Tensor]
    norm: Norm  # of the encoder and the head
    refine_norm: Norm  # of the decoder
    pool: Pool  # of the decoder; keeps height and width


class RefineNet(nn.Module):
    """F(x, label) -> a tensor of x's shape, (B, channels, H, W): what NCSN and NCSNv2 have in common.

    Height and width may be anything: they are padded inside to multiples of 2^(len(multipliers) - 3), by repeating the
    border, and the output is cropped.

    Args:
        norms, pool: see `RefineStyle`.
        width: stage i has width * multipliers[i] channels; at least 2, because the norms compare channels.
        multipliers: one per stage, at least 3; all stages but the first and the last two halve the resolution.
        centered: the data is in [-1, 1]; if False, in [0, 1], and the network begins with 2 x - 1.
        checkpoint_activations: recompute stages and refinements in the backward pass, which saves memory.

    Raises ValueError for an unknown activation or an impossible size.
    """

    def __init__(
        self, channels: int, norms: tuple[Norm, Norm], pool: Pool, *,
        width: int = 128, multipliers: Sequence[int] = (1, 2, 2, 2), activation: Activation = "elu",
        centered: bool = True, checkpoint_activations: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; use one of {', '.join(map(repr, ACTIVATIONS))}")
        if len(multipliers) < 3:
            raise ValueError(f"a RefineNet has at least 3 stages, the last two dilated, got multipliers {multipliers}")
        if width < 2:
            raise ValueError(f"width must be at least 2, because InstanceNorm++ compares channels, got {width}")
        self.style = style = RefineStyle(ACTIVATIONS[activation], *norms, pool)
        self.centered, self.recompute = centered, checkpoint_activations
        widths = [width * m for m in multipliers]
        halvings = len(widths) - 3
        self.multiple = 2**halvings

        self.first = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.stages = nn.ModuleList([Stage(widths[0], widths[0], style)])
        for i, (above, outputs) in enumerate(pairwise(widths)):
            dilation = 1 if i < halvings else 2 if i == halvings else 4
            self.stages.append(Stage(above, outputs, style, dilation))
        self.refinements = nn.ModuleList()  # from the deepest on
        for i in reversed(range(len(widths))):
            outputs, deepest, last = widths[max(i - 1, 0)], i == len(widths) - 1, i == 0
            self.refinements.append(Refinement(widths[i], outputs, style, joins=not deepest, units=3 if last else 1))
        self.norm = style.norm(widths[0])
        self.last = nn.Conv2d(widths[0], channels, 3, padding=1)

    def forward(self, x: Tensor, label: Tensor, /) -> Tensor:
        size = x.shape[2:]
        x = padded(x, self.multiple)
        if not self.centered:
            x = 2 * x - 1
        level = self.level(label, x)

        h = self.first(x)
        features = []
        for stage in self.stages:
            h = self._run(stage, h, level)
            features.append(h)
        below = None
        for refinement in self.refinements:
            below = self._run(refinement, features.pop(), below, level)
        return cropped(self.last(self.style.activation(self.norm(below, level))), size)

    def level(self, label: Tensor, x: Tensor) -> Tensor | None:
        """How much the norms take of each noise level's parameters; None for norms without noise levels."""
        return None

    def _run(self, block: nn.Module, *arguments: Tensor | None) -> Tensor:
        return recomputed(block, *arguments) if self.recompute else block(*arguments)


class NCSN(RefineNet):
    """The noise-conditional network of Song & Ermon 2019: `levels` rows of parameters in every norm, mean pooling.

    The label (B,) is the index of the noise level, 0..levels-1 in the caller's order; between two indices the norms'
    parameters are interpolated, and outside they stay constant. The published width for CIFAR-10 is 128, with 10
    levels. The options are those of `RefineNet`.
    """

    def __init__(self, channels: int, *, levels: int, **options: Any) -> None:
        norm = partial(ConditionalInstanceNormPlus, levels=levels)
        super().__init__(channels, (norm, norm), partial(F.avg_pool2d, kernel_size=5, stride=1, padding=2), **options)
        self.levels = levels

    def level(self, label: Tensor, x: Tensor) -> Tensor:
        """(B, levels): 1 at an index, and between two of them weights that fall linearly from one to the other."""
        wide = torch.promote_types(x.dtype, torch.float32)  # bfloat16 counts to 256
        index = torch.arange(self.levels, dtype=wide, device=x.device)
        return (1 - (label.to(wide).clamp(0, self.levels - 1)[:, None] - index).abs()).clamp_min(0).to(x.dtype)


class NCSNv2(RefineNet):
    """The unconditional network of Song & Ermon 2020, which ignores the label: norms in the encoder only, max pooling.

    Its output is sigma times the score (their technique 3): the division is no part of the network. Published
    multipliers are (1, 2, 2, 2) up to 64x64 pixels, (1, 2, 2, 4, 4) for 128x128 and (1, 2, 2, 2, 4, 4) for 256x256,
    with width 128. The options are those of `RefineNet`.
    """

    def __init__(self, channels: int, **options: Any) -> None:
        pool = partial(F.max_pool2d, kernel_size=5, stride=1, padding=2)
        super().__init__(channels, (InstanceNormPlus, Unnormalised), pool, **options)


class Stage(nn.Module):
    """Two residual blocks; the first halves the resolution (dilation 1) or is dilated, or neither (None)."""

    def __init__(self, inputs: int, outputs: int, style: RefineStyle, dilation: int | None = None) -> None:
        super().__init__()
        self.enter = EncoderBlock(inputs, outputs, style, dilation or 1, steps=dilation is not None)
        self.stay = EncoderBlock(outputs, outputs, style, dilation or 1)

    def forward(self, x: Tensor, level: Tensor | None) -> Tensor:
        return self.stay(self.enter(x, level), level)


class EncoderBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), its convolutions dilated.

    A block that `steps` has a convolution as its shortcut: with dilation 1 a 1x1 convolution, and means of 2x2 pixels
    then halve both branches; else a dilated one like the others.
    """

    def __init__(self, inputs: int, outputs: int, style: RefineStyle, dilation: int, steps: bool = False) -> None:
        super().__init__()
        self.norm1 = style.norm(inputs)
        self.conv1 = dilated(inputs, inputs, dilation)
        self.norm2 = style.norm(inputs)
        self.conv2 = dilated(inputs, outputs, dilation)
        self.halves = steps and dilation == 1
        self.shortcut: nn.Module = nn.Identity()
        if steps:
            self.shortcut = nn.Conv2d(inputs, outputs, 1) if self.halves else dilated(inputs, outputs, dilation)
        self.activation = style.activation

    def forward(self, x: Tensor, level: Tensor | None) -> Tensor:
        h = self.conv1(self.activation(self.norm1(x, level)))
        h = self.conv2(self.activation(self.norm2(h, level)))
        if self.halves:  # the mean may come before the 1x1 shortcut, which then has a quarter of the pixels
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        return self.shortcut(x) + h


class Refinement(nn.Module):
    """A step of the decoder: refines a stage's features, joins those from below if it `joins`, pools, refines again."""

    def __init__(self, inputs: int, outputs: int, style: RefineStyle, *, joins: bool, units: int) -> None:
        super().__init__()
        self.own = Refine(inputs, 2, style)
        self.below = Refine(inputs, 2, style) if joins else None
        self.join = Join(inputs, outputs, style) if joins else None
        self.pooling = ChainedPooling(outputs, style)
        self.out = Refine(outputs, units, style)

    def forward(self, x: Tensor, below: Tensor | None, level: Tensor | None) -> Tensor:
        h = self.own(x, level)
        if self.below is not None and self.join is not None:
            h = self.join(h, self.below(below, level), level)
        return self.out(self.pooling(h, level), level)


class Refine(nn.Module):
    """`units` times x + conv(act(norm(conv(act(norm(x)))))), without biases: residual convolution units."""

    def __init__(self, channels: int, units: int, style: RefineStyle) -> None:
        super().__init__()
        self.norms = nn.ModuleList(style.refine_norm(channels) for _ in range(2 * units))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2 * units))
        self.activation = style.activation

    def forward(self, x: Tensor, level: Tensor | None) -> Tensor:
        layers = zip(self.norms, self.convs, strict=True)
        for (norm1, conv1), (norm2, conv2) in zip(layers, layers, strict=True):
            h = conv1(self.activation(norm1(x, level)))
            x = x + conv2(self.activation(norm2(h, level)))
        return x


class Join(nn.Module):
    """The sum of a stage's features and those from below, each convolved, the second then enlarged bilinearly."""

    def __init__(self, inputs: int, outputs: int, style: RefineStyle) -> None:
        super().__init__()
        self.norm_own, self.norm_below = style.refine_norm(inputs), style.refine_norm(inputs)
        self.own = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.below = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, own: Tensor, below: Tensor, level: Tensor | None) -> Tensor:
        h, below = self.own(self.norm_own(own, level)), self.below(self.norm_below(below, level))
        if below.shape != h.shape:  # the corner pixels stay where they are
            below = F.interpolate(below, size=h.shape[2:], mode="bilinear", align_corners=True)
        return h + below


class ChainedPooling(nn.Module):
    """h_0 + h_1 + h_2 with h_0 = act(x) and h_{i+1} = conv(pool(norm(h_i))), without biases: each sees more pixels."""

    def __init__(self, channels: int, style: RefineStyle) -> None:
        super().__init__()
        self.norms = nn.ModuleList(style.refine_norm(channels) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.style = style

    def forward(self, x: Tensor, level: Tensor | None) -> Tensor:
        x = path = self.style.activation(x)
        for norm, layer in zip(self.norms, self.convs, strict=True):
            path = layer(self.style.pool(norm(path, level)))
            x = x + path
        return x


class InstanceNormPlus(nn.Module):
    """InstanceNorm++ (Song & Ermon 2020) with the same parameters at all noise levels; see `normalised`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(1 + 0.02 * torch.randn(channels))
        self.gamma = nn.Parameter(1 + 0.02 * torch.randn(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, level: Tensor | None) -> Tensor:
        return normalised(x, self.gamma, self.alpha, self.beta)


class ConditionalInstanceNormPlus(nn.Module):
    """CondInstanceNorm++ (Song & Ermon 2019, appendix A): a row of gamma, alpha and beta for each level.

    `level` (B, levels) says how much of each row an example takes.
    """

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        scales = 1 + 0.02 * torch.randn(levels, 2 * channels)
        self.table = nn.Parameter(torch.cat([scales, torch.zeros(levels, channels)], dim=1))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return normalised(x, *(level @ self.table).chunk(3, dim=1))


class Unnormalised(nn.Module):
    """x itself: NCSNv2's decoder."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, level: Tensor | None) -> Tensor:
        return x


def normalised(x: Tensor, gamma: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """gamma (normalised x + alpha m) + beta, with m the channels' means, normalised over the channels of an image.

    Instance normalisation forgets the means of the channels, which an image's colours depend on; m keeps them relative
    to each other. As in the published code gamma multiplies both; in the NCSN paper's appendix it multiplies the first.
    The parameters are (C,) or (B, C), both eps are 1e-5, and the variance over channels is the unbiased one.
    """
    means = x.mean((2, 3))
    m = (means - means.mean(1, keepdim=True)) * torch.rsqrt(means.var(1, keepdim=True) + 1e-5)
    shift = gamma * alpha * m + beta
    return torch.addcmul(shift[:, :, None, None], layer_norm(x, x.shape[2:]), gamma[..., None, None])


def dilated(inputs: int, outputs: int, dilation: int) -> nn.Conv2d:
    """A 3x3 convolution that sees every `dilation`-th pixel and keeps height and width."""
    return nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation)
