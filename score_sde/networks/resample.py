"""Resampling of images, signals and volumes by 2, smooth (FIR) or plain, alone or fused with a convolution of size 3.

FIR resampling (Zhang 2019, arXiv:1904.11486; Karras et al. 2020, arXiv:1912.04958) puts a low-pass filter before the
decimation or behind the zero-stuffing. With w = taps ⊗ taps / sum of length L in each of d directions, p = L/2 - 1, and
zeros around the image,

    down(x)[n] = sum_m w[m] x[2n + L - 1 - p - m],        up(x)[n] = 2^d sum_i w[n + p - 2i] x[i]:

a depthwise convolution of stride 2 and a depthwise transposed convolution of stride 2. Taps of odd length get a zero in
front, after which the same padding on both sides is right for every filter. Without taps, down is the mean of 2^d
pixels and up their repetition. All maps here take (B, C, ...), of even lengths, to half or twice the size; `dimensions`
says of how many directions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import CONVOLVE, TRANSPOSED, Convolution, conv

Taps = Sequence[float]


def _filter(taps: Taps, dimensions: int) -> Tensor:
    """The filter w, (1, 1, L, ...) with L even and sum 1."""
    line = torch.tensor([0.0] * (len(taps) % 2) + list(taps), dtype=torch.float64)
    kernel = line
    for _ in range(dimensions - 1):
        kernel = kernel[..., None] * line
    return (kernel / line.sum() ** dimensions).to(torch.get_default_dtype())[None, None]


class Blur(nn.Module):
    """Filters every channel and keeps each `stride`-th pixel; `margin` more zeros than centring needs on all sides."""

    kernel: Tensor

    def __init__(self, taps: Taps, *, stride: int = 1, margin: int = 0, gain: float = 1.0, dimensions: int = 2) -> None:
        super().__init__()
        kernel = gain * _filter(taps, dimensions).flip(*range(2, 2 + dimensions))  # a filter convolves, F correlates
        self.register_buffer("kernel", kernel, persistent=False)
        self.stride, self.padding = stride, kernel.shape[-1] // 2 - 1 + margin

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        kernel = self.kernel.expand(channels, *self.kernel.shape[1:])
        return CONVOLVE[x.ndim - 3](x, kernel, stride=self.stride, padding=self.padding, groups=channels)


class Stuff(nn.Module):
    """Zero-stuffing by 2 in each direction followed by the filter with gain 2^d, every channel for itself."""

    kernel: Tensor

    def __init__(self, taps: Taps, dimensions: int = 2) -> None:
        super().__init__()
        self.register_buffer("kernel", 2**dimensions * _filter(taps, dimensions), persistent=False)
        self.padding = self.kernel.shape[-1] // 2 - 1

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        kernel = self.kernel.expand(channels, *self.kernel.shape[1:])
        return TRANSPOSED[x.ndim - 3](x, kernel, stride=2, padding=self.padding, groups=channels)


class Repeat(nn.Module):
    """Every pixel becomes 2^d pixels."""

    spread: Tensor

    def __init__(self, dimensions: int = 2) -> None:
        super().__init__()
        # a flipped line of 3 weights to its convolution with (1, 1), for all directions at once: 3x3 to 4x4 weights
        line = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
        spread = line
        for _ in range(dimensions - 1):
            spread = torch.kron(spread, line)
        self.register_buffer("spread", spread, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")

    def convolve(self, x: Tensor, layer: Convolution) -> Tensor:
        """layer(self(x)) for a convolution of size 3, on a CPU in (2/3)^d of the multiplications.

        A pixel of the result sees only 2^d different pixels of x: together they are one transposed convolution of
        stride 2, with a kernel of size 4.
        """
        if x.device.type != "cpu":
            return layer(self(x))
        dimensions = x.ndim - 2
        kernel = (layer.weight.flatten(2) @ self.spread).unflatten(2, (4,) * dimensions).transpose(0, 1)
        return TRANSPOSED[dimensions - 1](x, kernel, layer.bias, stride=2, padding=1)


def down(taps: Taps | None, dimensions: int = 2) -> nn.Module:
    """Halves the lengths, without parameters."""
    if taps is None:
        return (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[dimensions - 1](2)
    return Blur(taps, stride=2, dimensions=dimensions)


def up(taps: Taps | None, dimensions: int = 2) -> nn.Module:
    """Doubles the lengths, without parameters."""
    return Repeat(dimensions) if taps is None else Stuff(taps, dimensions)


class ConvDown(nn.Module):
    """A convolution of size 3 that halves lengths; with taps, behind the filter (StyleGAN2's conv_downsample_2d)."""

    def __init__(self, inputs: int, outputs: int, taps: Taps | None, dimensions: int = 2) -> None:
        super().__init__()
        self.before = 0  # zeros above and to the left, without taps; diffusers' weights may need 1
        self.blur = None if taps is None else Blur(taps, margin=1, dimensions=dimensions)
        self.conv = conv(inputs, outputs, 3, stride=2, padding=0, dimensions=dimensions)

    def forward(self, x: Tensor) -> Tensor:
        # the plain form pads below and to the right only, as TensorFlow's "SAME" does for even sizes
        return self.conv(F.pad(x, (self.before, 1) * (x.ndim - 2)) if self.blur is None else self.blur(x))


class ConvUp(nn.Module):
    """A convolution of size 3 that doubles the lengths.

    Plain: repetition, then the convolution. With taps: zero-stuffing, the convolution, then the filter with gain 2^d
    (StyleGAN2's upsample_conv_2d), which away from the border is FIR upsampling followed by the convolution.
    """

    def __init__(self, inputs: int, outputs: int, taps: Taps | None, dimensions: int = 2) -> None:
        super().__init__()
        gain = 2.0**dimensions
        self.enlarge = Repeat(dimensions) if taps is None else Blur(taps, gain=gain, dimensions=dimensions)
        self.conv = conv(inputs, outputs, 3, dimensions=dimensions)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.enlarge, Repeat):
            return self.enlarge.convolve(x, self.conv)
        # correlating a zero-stuffed image with a kernel is the transposed convolution with the flipped kernel
        kernel = self.conv.weight.flip(*range(2, x.ndim)).transpose(0, 1)
        h = self.enlarge(TRANSPOSED[x.ndim - 3](x, kernel, stride=2))
        return h + self.conv.bias.unflatten(0, (-1, *(1,) * (x.ndim - 2)))  # type: ignore[union-attr]
