"""Convolution and linear layer with DDPM's initialisation, activations, norms, dropout, recomputed activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

Activation = Literal["elu", "relu", "lrelu", "swish"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu, "relu": F.relu, "lrelu": partial(F.leaky_relu, negative_slope=0.2), "swish": F.silu,
}  # fmt: skip


@torch.no_grad()
def variance_scaling_(weight: Tensor, scale: float = 1.0) -> None:
    """Fill with U(-b, b) of variance b²/3 = 2 scale / (fan_in + fan_out), as DDPM does (Ho et al. 2020).

    A `scale` of 0, meant for the last layer of a branch, becomes 1e-10: the branch begins at almost 0, with weights
    that are not exactly 0.
    """
    fans = (weight.shape[0] + weight.shape[1]) * weight[0, 0].numel()
    bound = math.sqrt(6 * max(scale, 1e-10) / fans)
    weight.uniform_(-bound, bound)


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)  # of signals, images and volumes
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLVE = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def conv(
    inputs: int, outputs: int, size: int, *,
    stride: int = 1, padding: int | None = None, scale: float = 1.0, dimensions: int = 2,
) -> Convolution:  # fmt: skip
    """A convolution of `size` in each direction, which keeps the lengths unless `padding` says otherwise; bias 0."""
    kind = CONVOLUTIONS[dimensions - 1]
    layer = kind(inputs, outputs, size, stride=stride, padding=size // 2 if padding is None else padding)
    variance_scaling_(layer.weight, scale)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def linear(inputs: int, outputs: int, scale: float = 1.0) -> nn.Linear:
    """A fully connected layer; bias 0."""
    layer = nn.Linear(inputs, outputs)
    variance_scaling_(layer.weight, scale)
    nn.init.zeros_(layer.bias)
    return layer


def group_norm(channels: int, groups: int | None, eps: float = 1e-6) -> nn.GroupNorm:
    """Group normalisation with `groups` groups; None is NCSN++'s rule, min(channels // 4, 32).

    Where the rule's number does not divide the channels (144 = 24 * 6), the largest smaller one that does is taken.
    """
    if groups is None:
        groups = next(g for g in range(min(max(channels // 4, 1), 32), 0, -1) if channels % g == 0)
    elif channels % groups:
        raise ValueError(
            f"{channels} channels do not divide into groups={groups}: take a width (model.nf in a config) that does, "
            "or groups=None"
        )
    return nn.GroupNorm(groups, channels, eps=eps)


def plain() -> bool:
    """Whether the caller asks for plain operations, which may be differentiated twice and more.

    The caller asks by torch's own switch of attention, ``sdpa_kernel(SDPBackend.MATH)``. A compiled network has only
    a first derivative, and may not read the switch.
    """
    if torch.compiler.is_compiling():
        return False
    cuda = torch.backends.cuda
    return not (cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled())


def layer_norm(x: Tensor, sizes: Sequence[int], eps: float = 1e-5) -> Tensor:
    """Layer normalisation without parameters: x with mean 0 and variance 1 over its last axes, of these `sizes`.

    It uses plain operations where the caller asks for them (`plain`): training a guided model by maximum likelihood
    takes the third derivative, which is wrong in torch 2.13's kernel.
    """
    if not plain():
        return F.layer_norm(x, sizes, eps=eps)
    axes = tuple(range(-len(sizes), 0))
    return (x - x.mean(axes, keepdim=True)) * torch.rsqrt(x.var(axes, correction=0, keepdim=True) + eps)


def rms_norm(x: Tensor, sizes: Sequence[int], eps: float = 1e-6) -> Tensor:
    """x over its root mean square over its last axes, of these `sizes` (Zhang & Sennrich 2019, arXiv:1910.07467).

    As in `layer_norm`, by plain operations where the caller asks for them.
    """
    if not plain():
        return F.rms_norm(x, sizes, eps=eps)
    return x * torch.rsqrt(x.square().mean(tuple(range(-len(sizes), 0)), keepdim=True) + eps)


def recomputed(layer: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Activation checkpointing: layer(*arguments), whose activations the backward pass computes again.

    Where the caller asks for plain operations (`plain`), the second computation uses them too, though by then the
    caller's request has ended.
    """
    if not torch.is_grad_enabled():
        return layer(*arguments)
    if not plain():
        return checkpoint(layer, *arguments, use_reentrant=False)
    return checkpoint(layer, *arguments, use_reentrant=False, context_fn=lambda: (nullcontext(), _Plain()))


class _Plain(AbstractContextManager[None]):
    """``sdpa_kernel(SDPBackend.MATH)`` that can be entered again, as each backward pass computes the layer again."""

    def __enter__(self) -> None:
        self.stack = ExitStack()
        self.stack.enter_context(sdpa_kernel(SDPBackend.MATH))

    def __exit__(self, *error: object) -> None:
        self.stack.close()


def padded(x: Tensor, multiple: int) -> Tensor:
    """(B, C, ...) with the border repeated behind it until every size is a multiple."""
    excess = [-size % multiple for size in x.shape[2:]]
    return F.pad(x, [n for e in reversed(excess) for n in (0, e)], mode="replicate") if any(excess) else x


def cropped(x: Tensor, size: Sequence[int]) -> Tensor:
    """The first (B, C, *size) of x."""
    for axis, n in enumerate(size, start=2):
        x = x.narrow(axis, 0, n)
    return x


class Dropout(nn.Module):
    """In training, zeroes each number with probability p, to 16 bits, and divides the others by 1 - p.

    On a CPU 16 random bits decide for a number. That takes a quarter of the time of torch's dropout, which there costs
    more than all norms and activations together.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        dropped = round(self.p * 2**16)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        mask = torch.empty_like(x)
        torch.ge(bits[: x.numel()].as_strided(mask.shape, mask.stride()), dropped - 2**15, out=mask)
        return x * mask.mul_(2**16 / (2**16 - dropped))
