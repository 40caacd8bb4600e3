"""Resampling of images by 2, smooth (FIR) or plain, alone or fused with a 3x3 convolution.

FIR resampling (Zhang 2019, arXiv:1904.11486; Karras et al. 2020, arXiv:1912.04958) puts a low-pass filter before the
decimation or after the zero-stuffing. With w = taps ⊗ taps / sum of length L in each direction, p = L/2 - 1, and
zeros around the image,

    down(x)[n] = sum_m w[m] x[2n + L - 1 - p - m],        up(x)[n] = 4 sum_i w[n + p - 2i] x[i]:

a depthwise convolution of stride 2 and a depthwise transposed convolution of stride 2. Taps of odd length get a zero in
front, after which the same padding on both sides is right for every filter. Without taps, down is the mean of 2x2
pixels and up their repetition. All maps here take (B, C, H, W), H and W even, to half or twice the size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import conv

Taps = Sequence[float]


def _filter(taps: Taps) -> Tensor:
    """The filter w, (1, 1, L, L) with L even and sum 1."""
    line = torch.tensor([0.0] * (len(taps) % 2) + list(taps), dtype=torch.float64)
    return (torch.outer(line, line) / line.sum() ** 2).to(torch.get_default_dtype())[None, None]


class Blur(nn.Module):
    """Filters every channel and keeps each `stride`-th pixel; `margin` more zeros than centring needs on all sides."""

    kernel: Tensor

    def __init__(self, taps: Taps, *, stride: int = 1, margin: int = 0, gain: float = 1.0) -> None:
        super().__init__()
        kernel = gain * _filter(taps).flip(2, 3)  # conv2d correlates, a filter convolves
        self.register_buffer("kernel", kernel, persistent=False)
        self.stride, self.padding = stride, kernel.shape[-1] // 2 - 1 + margin

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        kernel = self.kernel.expand(channels, 1, -1, -1)
        return F.conv2d(x, kernel, stride=self.stride, padding=self.padding, groups=channels)


class Stuff(nn.Module):
    """Zero-stuffing by 2 in height and width followed by the filter with gain 4, every channel for itself."""

    kernel: Tensor

    def __init__(self, taps: Taps) -> None:
        super().__init__()
        self.register_buffer("kernel", 4 * _filter(taps), persistent=False)
        self.padding = self.kernel.shape[-1] // 2 - 1

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        kernel = self.kernel.expand(channels, 1, -1, -1)
        return F.conv_transpose2d(x, kernel, stride=2, padding=self.padding, groups=channels)


class Repeat(nn.Module):
    """Every pixel becomes 2x2 pixels."""

    spread: Tensor

    def __init__(self) -> None:
        super().__init__()
        # a flipped line of 3 weights to its convolution with (1, 1), for both directions at once: 3x3 to 4x4 weights
        line = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
        self.register_buffer("spread", torch.kron(line, line), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")

    def convolve(self, x: Tensor, layer: nn.Conv2d) -> Tensor:
        """layer(self(x)) for a 3x3 convolution, on a CPU in 4/9 of the multiplications.

        A pixel of the result sees only 2x2 different pixels of x: together they are one transposed convolution of
        stride 2, with a 4x4 kernel.
        """
        if x.device.type != "cpu":
            return layer(self(x))
        kernel = (layer.weight.flatten(2) @ self.spread).unflatten(2, (4, 4)).transpose(0, 1)
        return F.conv_transpose2d(x, kernel, layer.bias, stride=2, padding=1)


def down(taps: Taps | None) -> nn.Module:
    """Halves height and width, without parameters."""
    return nn.AvgPool2d(2) if taps is None else Blur(taps, stride=2)


def up(taps: Taps | None) -> nn.Module:
    """Doubles height and width, without parameters."""
    return Repeat() if taps is None else Stuff(taps)


class ConvDown(nn.Module):
    """A 3x3 convolution that halves height and width; with taps, behind the filter (StyleGAN2's conv_downsample_2d)."""

    def __init__(self, inputs: int, outputs: int, taps: Taps | None) -> None:
        super().__init__()
        self.blur = None if taps is None else Blur(taps, margin=1)
        self.conv = conv(inputs, outputs, 3, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        # the plain form pads below and to the right only, as TensorFlow's "SAME" does for even sizes
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.blur is None else self.blur(x))


class ConvUp(nn.Module):
    """A 3x3 convolution that doubles height and width.

    Plain: repetition, then the convolution. With taps: zero-stuffing, the convolution, then the filter with gain 4
    (StyleGAN2's upsample_conv_2d), which away from the border is FIR upsampling followed by the convolution.
    """

    def __init__(self, inputs: int, outputs: int, taps: Taps | None) -> None:
        super().__init__()
        self.enlarge = Repeat() if taps is None else Blur(taps, gain=4.0)
        self.conv = conv(inputs, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.enlarge, Repeat):
            return self.enlarge.convolve(x, self.conv)
        # correlating a zero-stuffed image with a kernel is the transposed convolution with the flipped kernel
        kernel = self.conv.weight.flip(2, 3).transpose(0, 1)
        h = self.enlarge(F.conv_transpose2d(x, kernel, stride=2))
        return h + self.conv.bias[:, None, None]  # type: ignore[index]
