"""Between stored values and the numbers a model sees: scaling, dequantisation and rounding have their one owner here.

A pixel k of {0, ..., levels - 1} enters a model as v in [0, 1], or as 2 v - 1 in [-1, 1] if centred, with

    v = k / (levels - 1)        in training, as score_sde trains (of more than 256 levels (k + 1/2) / levels), and
    v = (k + u) / levels        dequantised with u uniform in [0, 1): for likelihoods, or for training if asked.

Dequantised, P(k) is the integral of p over the bin of k, and Jensen's inequality gives log P(k) >= E_u log p(k + u) in
units of a level: minus the log2 of a density of v, or of 2 v - 1, becomes bits of k by adding log2(levels), or
log2(levels) - 1, per dimension. (u fills only `PixelCodec.filled` of the bin, 1 - 2^-14 for up to 256 levels, so that
rounding leaves each value in its bin: log2 of that is added too where 1e-4 bits/dim matter.)
`dequantisation` has other noise than uniform, and several draws of it.
`width` (1 or 2, the length of the model's interval) and `levels` are what `Likelihood.bits_per_dim` needs for that.

Back, both encodings are undone by one rule: k = floor(levels v), clamped. See `PixelCodec.decode`.

A model of an autoencoder's codes sees none of this: its state is a normalised code, and `AutoencoderCodec` is between
that and the pixels. Every codec says by `pixels` what images it decodes to, if it does.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..models.autoencoder import Autoencoder, log_prob
from ..models.pixel_levels import COARSE, value_of

# Float32 holds 2 v - 1 to 2^-17 of a level of 256, and decoding adds as much again: within this margin, in levels, of
# a bin's lower edge decoding still finds the bin, and u stays twice as far from its upper edge. Two things must hold:
# the margin is above the rounding of `encode` and `decode`; and who states a density of `encode(k, u)` states
# levels/(width filled), or the bound on log P(k) is none. Of 65,536 levels float32 holds v to 2^-9 of one, and what is
# computed beside it is exact for powers of two: half of `_FINE` times their number.
_MARGIN, _FINE = 2.0**-15, 2.0**-24
_TOGETHER = 256  # images that an autoencoder decodes together


@dataclass(frozen=True)
class PixelCodec:
    """Integers {0, ..., levels - 1} of any shape, as floats in [-1, 1] (centered) or [0, 1].

    Up to 256 levels are held as uint8, more, which must be a power of two up to 65,536, as int32. Raises ValueError for
    another number of levels.
    """

    levels: int = 256
    centered: bool = True

    def __post_init__(self) -> None:
        fine = self.levels in [2**bits for bits in range(9, 17)]
        if not 2 <= self.levels <= COARSE and not fine:
            raise ValueError(f"levels must be between 2 and 256, or 512, 1024, ... or 65536, got {self.levels}")

    @property
    def pixels(self) -> PixelCodec:
        """Itself: what it decodes to are images."""
        return self

    @property
    def width(self) -> float:
        """Length of the interval that the model sees: 2 for [-1, 1], 1 for [0, 1]."""
        return 2.0 if self.centered else 1.0

    @property
    def range(self) -> tuple[float, float]:
        """The interval itself."""
        return 1.0 - self.width, 1.0

    @property
    def filled(self) -> float:
        """The part of its bin, from below, over which `encode` spreads u; float32's rounding then stays in the bin."""
        return 1 - 2 * self._margin

    @property
    def dtype(self) -> torch.dtype:
        """Of the integers."""
        return torch.uint8 if self.levels <= COARSE else torch.int32

    @property
    def _margin(self) -> float:
        return max(_MARGIN, _FINE * self.levels)

    def encode(self, k: Tensor, u: Tensor | None = None) -> Tensor:
        """Levels to floats: `value_of`, scaled, or (k + filled u) / levels, scaled, for u in [0, 1] of k's shape.

        float32, or u's dtype. For uniform u the law on the bin is uniform too, of density levels/(width filled): no
        mass piles up at its upper end, as it would if u were clamped.
        """
        if u is not None and u.shape != k.shape:
            raise ValueError(f"u must have the shape of k, {tuple(k.shape)}, got {tuple(u.shape)}")
        dtype = torch.float32 if u is None else u.dtype
        if self.levels > COARSE and self.centered:  # the middle is taken off while k is an integer, which is exact
            inside = 0.5 if u is None else self.filled * u
            return ((2 * k.to(torch.int32) - self.levels).to(dtype) + 2 * inside) / self.levels
        v = value_of(k.to(dtype), self.levels) if u is None else (k.to(dtype) + self.filled * u) / self.levels
        return 2 * v - 1 if self.centered else v

    def decode(self, x: Tensor) -> Tensor:
        """Floats to levels: floor(levels v), clamped to the levels; NaN gives 0.

        It inverts `encode` with any u by definition, and without u because k <= levels value_of(k) < k + 1 for
        k < levels - 1, while the top level is clamped. Against rounding to the nearest k / (levels - 1), a value moves
        by at most half a level, at black and white, and not at all at mid-grey.
        """
        if self.levels > COARSE and self.centered:
            k = (x * (self.levels // 2) + self._margin).floor() + self.levels // 2
        else:
            k = ((x + 1) / 2 if self.centered else x) * self.levels + self._margin
        return k.nan_to_num(nan=0.0).clamp(0, self.levels - 1).to(self.dtype)

    def display(self, k: Tensor) -> Tensor:
        """Levels spread over 0..255, uint8, for a PNG; 256 levels are left as they are."""
        return (k.to(torch.float32) * (255 / (self.levels - 1))).round().to(torch.uint8)


@dataclass(frozen=True)
class VectorCodec:
    """Float data as they are: densities are in nats, and there are no levels to count bits by.

    `rate`, of recordings, is how many samples a second has.
    """

    levels: None = None
    width: float = 1.0
    rate: int | None = None
    pixels: None = None

    def encode(self, k: Tensor, u: Tensor | None = None) -> Tensor:
        """k itself; continuous data need no dequantisation, so u is not used."""
        return k

    def decode(self, x: Tensor) -> Tensor:
        """x itself."""
        return x


@dataclass(frozen=True)
class Statistics:
    """Of an autoencoder's codes, over the training images: mean and standard deviation of each channel, and that of a
    pixel around what its image's code decodes to, in the units that the autoencoder sees."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    deviation: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Statistics:
        """What `to_json` wrote, to the last bit. Raises ValueError for a text that it cannot have written."""
        try:
            found = json.loads(text)
            mean, std = (tuple(float(value) for value in found[name]) for name in ("mean", "std"))
            return cls(mean, std, float(found["deviation"]))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"statistics of codes are mean, std and deviation, got {text[:60]!r}") from error


class AutoencoderCodec:
    """Images by way of an autoencoder: the model's state is y = (z - mean)/std, the code z with unit variance.

    A split of codes holds y, floats, so `encode` leaves them as they are, and `levels` is None; `posterior` makes them
    of images and `decode` images of them.

    Args:
        autoencoder: see `Autoencoder`; its parameters' device is where images and codes are taken to.
        statistics: of its codes. Raises ValueError unless all deviations are above 0.
        pixels: what the autoencoder sees of images.
    """

    levels: None = None
    width: float = 1.0

    def __init__(self, autoencoder: Autoencoder, statistics: Statistics, pixels: PixelCodec) -> None:
        if not all(0 < value < math.inf for value in (*statistics.std, statistics.deviation)):
            raise ValueError(f"statistics of codes must have deviations above 0, got {statistics}")
        self.autoencoder, self.statistics, self.pixels = autoencoder, statistics, pixels

    def encode(self, k: Tensor, u: Tensor | None = None) -> Tensor:
        """k itself, a normalised code; u is not used."""
        return k

    @torch.no_grad()
    def posterior(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(y | k), (B, c, h, w), for images k (B, C, H, W)."""
        mean, std = self.autoencoder.encode(self.pixels.encode(k))
        return (mean - self._of_channels(self.statistics.mean, mean)) / self._of_channels(
            self.statistics.std, mean
        ), std / self._of_channels(self.statistics.std, std)

    @torch.no_grad()
    def decode(self, y: Tensor) -> Tensor:
        """Images of normalised codes, a few at a time."""
        return torch.cat([self.pixels.decode(self.decoded(part)) for part in y.split(_TOGETHER)])

    def decoded(self, y: Tensor) -> Tensor:
        """The mean of p(x | y), images as the autoencoder sees them."""
        scale, shift = (self._of_channels(v, y) for v in (self.statistics.std, self.statistics.mean))
        return self.autoencoder.decode(scale * y + shift)

    @torch.no_grad()
    def log_prob(self, k: Tensor, y: Tensor) -> Tensor:
        """log P(k | y), (B,) nats, of the levels k, by the normal law around the decoded image."""
        x, decoded = self.pixels.encode(k).to(y.dtype), self.decoded(y)
        deviation = torch.tensor(self.statistics.deviation, dtype=torch.float64)
        return log_prob(x, decoded, deviation.to(y), self.pixels.levels, self.pixels.width)

    @staticmethod
    def _of_channels(values: tuple[float, ...], like: Tensor) -> Tensor:
        if len(values) != like.shape[1]:
            raise ValueError(
                f"the codes have {like.shape[1]} channels and their statistics {len(values)}: this is another "
                "autoencoder than the one that they were measured of"
            )
        return torch.tensor(values, dtype=torch.float64).to(like).reshape(1, -1, *[1] * (like.ndim - 2))


Codec = PixelCodec | VectorCodec | AutoencoderCodec


def requantised(k: Tensor, levels: int, codec: PixelCodec) -> Tensor:
    """k of `levels` levels as the codec's: bins joined where that is possible, else the nearest k/(levels - 1)."""
    if levels % codec.levels == 0:
        return (k // (levels // codec.levels)).to(codec.dtype)
    return (k.to(torch.float64) * ((codec.levels - 1) / (levels - 1))).round().to(codec.dtype)


def codec_of(levels: int | None, centered: bool = True, rate: int | None = None) -> Codec:
    """The codec of a data set: pixels where it has levels, else floats, which at a `rate` are recordings."""
    return VectorCodec(rate=rate) if levels is None else PixelCodec(levels, centered)
