"""Augmentation that does not leak: images are moved at random, and the network is told how.

Karras et al. 2022 (arXiv:2206.00364), appendix F.2, after Karras et al. 2020 (arXiv:2006.06676). A network that is told
how an image was moved learns the images of every movement apart. Told of none, it draws none of them. So movements much
stronger than mirroring help against overfitting and do not show in samples.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..machine.devices import sent

TOLD = 9  # numbers that the network is told of each image
SIZE, STRETCH, SHIFT = 0.2, 0.2, 1 / 8  # standard deviations: log2 of both scalings, and shift as a share of the image
TURNED = 0.5  # how often the axes of a stretch are turned
_DRAWN = 14  # uniform numbers for an image
# The low-pass filter of the wavelet sym6: it doubles the resolution before images are moved, and halves it afterwards.
_SYM6 = (
    *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466),
    *(0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578),
    *(0.0017677118642428036, -0.007800708325034148),
)
_CENTRE = 5  # the tap that counts as the filter's centre


class Movement(NamedTuple):
    """How each image of a batch is moved: numbers (B,), 0 where it is not.

    Args:
        flip_x, flip_y: 1: mirrored left to right, and top to bottom, before all else.
        size: it is 2^(SIZE size) times as large.
        turn: angle of its rotation, in radians.
        stretch, axis: it is stretched by 2^(STRETCH stretch) along an axis at this angle, and shrunk as much across it.
        shift_x, shift_y: how far it moves to the right and down, in units of SHIFT of its width and height.
    """

    flip_x: Tensor
    flip_y: Tensor
    size: Tensor
    turn: Tensor
    stretch: Tensor
    axis: Tensor
    shift_x: Tensor
    shift_y: Tensor

    @property
    def told(self) -> Tensor:
        """What the network is told, (B, TOLD) float32: zeros for an image as it is."""
        turned = (self.turn.cos() - 1, self.turn.sin())
        stretched = (self.stretch * self.axis.cos(), self.stretch * self.axis.sin())
        numbers = (self.flip_x, self.flip_y, self.size, *turned, *stretched, self.shift_x, self.shift_y)
        return torch.stack(numbers, 1).float()

    def part(self, rows: slice, device: torch.device | str) -> Movement:
        """That of some of the images, on a device."""
        return Movement(*(sent(value[rows], device) for value in self))

    def of(self, x: Tensor) -> Tensor:
        """The images x (B, C, H, W) moved; those that only flips change keep their values bit for bit.

        Raises ValueError for examples that are not images.
        """
        if x.ndim != 4:
            raise ValueError(f"examples of shape {tuple(x.shape[1:])} cannot be moved: set training.geometric=0")
        for flipped, axis in ((self.flip_x, -1), (self.flip_y, -2)):
            x = torch.where(_spread(flipped == 1), x.flip(axis), x)
        still = torch.stack([self.size, self.turn, self.stretch, self.shift_x, self.shift_y]).eq(0).all(0)
        height, width = x.shape[2:]
        shift = SHIFT * torch.stack([width * self.shift_x, height * self.shift_y], 1)
        return torch.where(_spread(still), x, moved(x, self._back(), shift))

    def _back(self) -> Tensor:
        """The matrices (B, 2, 2) that lead from a place (x, y) in the result to the one in the image, without shift."""
        size, stretch = torch.exp2(-SIZE * self.size), torch.exp2(-STRETCH * self.stretch)
        stretched = _rotation(-self.axis) @ torch.diag_embed(torch.stack([stretch, 1 / stretch], 1))
        return size[:, None, None] * _rotation(self.turn) @ stretched @ _rotation(self.axis)


def movements(count: int, probability: float, generator: torch.Generator) -> Movement:
    """Random movements of `count` images, float32 on the CPU: those of the first images do not depend on the count.

    Images are mirrored left to right half of the time. Each of the other changes (flip top to bottom, size, turn,
    stretch, shift) is drawn with this probability, 0.12 in EDM's training on CIFAR-10.
    """
    u = torch.rand(count, _DRAWN, generator=generator, dtype=torch.float64).unbind(1)
    flip_y, size, turn, stretch, shift = (each < probability for each in u[8:13])
    drawn = Movement(
        flip_x=u[0] < 0.5,
        flip_y=flip_y & (u[1] < 0.5),
        size=size * _normal(u[2]),
        turn=turn * _angle(u[3]),
        stretch=stretch * _normal(u[4]),
        axis=(u[13] < TURNED) * _angle(u[5]),
        shift_x=shift * _normal(u[6]),
        shift_y=shift * _normal(u[7]),
    )
    return Movement(*(value.float() for value in drawn))


def moved(x: Tensor, back: Tensor, shift: Tensor) -> Tensor:
    """Images x (B, C, H, W) whose value at a place p is that of x at back (p - shift); reflected beyond x's borders.

    Places (x, y) are in pixels from the image's centre, `back` is (B, 2, 2) and `shift` (B, 2). Values between pixels
    are linear at twice the resolution. Without a movement x comes back to rounding: the filter's shifts by whole pixels
    are orthonormal. What lies farther beyond a border than the image's size is 0.
    """
    height, width, groups = *x.shape[2:], x.shape[1]
    taps = sent(torch.tensor(_SYM6), x.device, x.dtype)
    across, down = (taps.reshape(1, 1, *shape).repeat(groups, 1, 1, 1) for shape in ((1, -1), (-1, 1)))
    padded = F.pad(x, (width - 1, width - 1, height - 1, height - 1), mode="reflect")
    fine = F.conv_transpose2d(padded, across, stride=(1, 2), groups=groups).narrow(3, _CENTRE, 2 * padded.shape[3])
    fine = F.conv_transpose2d(fine, down, stride=(2, 1), groups=groups).narrow(2, _CENTRE, 2 * padded.shape[2])
    fine = F.grid_sample(fine, _sources(x, back, shift), align_corners=False)
    return F.conv2d(F.conv2d(fine, across, stride=(1, 2), groups=groups), down, stride=(2, 1), groups=groups)


def _sources(x: Tensor, back: Tensor, shift: Tensor) -> Tensor:
    """Where each place of the result, at twice the resolution, lies in the padded image, as `grid_sample` counts.

    (B, 2H + 10, 2W + 10, 2): the filter's reach beyond the image included, with edges at -1 and 1.
    """
    height, width = x.shape[2:]
    half = sent(torch.tensor([width - 1, height - 1]) / 2, x.device, x.dtype)
    axes = (torch.arange(2 * n + len(_SYM6) - 2, device=x.device, dtype=x.dtype) for n in (width, height))
    places = (torch.stack(torch.meshgrid(*axes, indexing="xy"), -1) - _CENTRE) / 2 - half
    places = (places - shift.to(x)[:, None, None]) @ back.to(x).transpose(1, 2)[:, None]
    index = 2 * (places + 3 * half)  # from the padded image's corner
    return (2 * index + 1) / (12 * half + 2) - 1


def _rotation(angle: Tensor) -> Tensor:
    """Matrices (B, 2, 2) that turn x towards y."""
    return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).unflatten(1, (2, 2))


def _normal(u: Tensor) -> Tensor:
    return torch.special.ndtri(u.clamp_min(2.0**-54))


def _angle(u: Tensor) -> Tensor:
    return math.pi * (2 * u - 1)


def _spread(chosen: Tensor) -> Tensor:
    return chosen[:, None, None, None]
