"""Codecs between stored data and model inputs: scaling, dequantisation and rounding of pixels, vectors and latents.

A pixel k of {0, ..., levels - 1} enters a model as v in [0, 1], or as 2 v - 1 in [-1, 1] if centred, with

    v = k / (levels - 1)        in training, as score_sde trains (above 256 levels (k + 1/2) / levels), and
    v = (k + u) / levels        dequantised with u uniform in [0, 1): for likelihoods, and optionally for training.

With dequantisation, P(k) is the integral of p over the bin of k, and Jensen's inequality gives
log P(k) >= E_u log p(k + u) in units of a level: add log2(levels) per dimension to minus the log2 of a density of v,
or log2(levels) - 1 to that of a density of 2 v - 1, to get bits of k. (u fills only `PixelCodec.filled` of the bin,
1 - 2^-14 for up to 256 levels, so that rounding leaves each value in its bin: add log2 of that too where 1e-4 bits/dim
matter.) `Likelihood.bits_per_dim` does so from `levels` and `width` (1 or 2, the length of the model's interval).
`dequantisation` has noise other than uniform, and several draws of it.

One rule undoes both encodings: k = floor(levels v), clamped. See `PixelCodec.decode`.

The state of a model in an autoencoder's latent space is a normalised code; `AutoencoderCodec` converts between codes
and pixels. `pixels` of a codec is the codec of the images that it decodes to, or None.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..models.autoencoder import Autoencoder, log_prob
from ..models.pixel_levels import COARSE, value_of

# Float32 rounds 2 v - 1 by up to 2^-17 of one of 256 levels, and decoding adds as much again. Values up to this margin
# (in levels) below a bin's lower edge therefore decode to the bin, and u stays twice the margin from its upper edge.
# Two things must hold: the margin exceeds the rounding of `encode` and `decode`, and the density of `encode(k, u)` is
# stated as levels/(width filled), or the bound on log P(k) is wrong. At 65,536 levels float32 rounds v by up to 2^-9
# of a level (half of `_FINE` times their number), and all other arithmetic is exact for powers of two.
_MARGIN, _FINE = 2.0**-15, 2.0**-24
_BATCH = 256  # images that an autoencoder decodes together


@dataclass(frozen=True)
class PixelCodec:
    """Pixels: integers {0, ..., levels - 1} of any shape, as floats in [-1, 1] (centered) or [0, 1].

    Up to 256 levels are stored as uint8; more, a power of two up to 65,536, as int32. Raises ValueError for any other
    number of levels.
    """

    levels: int = 256
    centered: bool = True

    def __post_init__(self) -> None:
        fine = self.levels in [2**bits for bits in range(9, 17)]
        if not 2 <= self.levels <= COARSE and not fine:
            raise ValueError(f"levels must be between 2 and 256, or 512, 1024, ... or 65536, got {self.levels}")

    @property
    def pixels(self) -> PixelCodec:
        """The codec itself, because it decodes to images."""
        return self

    @property
    def width(self) -> float:
        """Length of the interval that the model sees: 2 for [-1, 1], 1 for [0, 1]."""
        return 2.0 if self.centered else 1.0

    @property
    def range(self) -> tuple[float, float]:
        """The interval that the model sees: (-1, 1) or (0, 1)."""
        return 1.0 - self.width, 1.0

    @property
    def filled(self) -> float:
        """The fraction of a bin, from below, that `encode` spreads u over; float32 rounding then stays in the bin."""
        return 1 - 2 * self._margin

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the integers."""
        return torch.uint8 if self.levels <= COARSE else torch.int32

    @property
    def _margin(self) -> float:
        return max(_MARGIN, _FINE * self.levels)

    def encode(self, k: Tensor, u: Tensor | None = None) -> Tensor:
        """Levels to floats: `value_of`, scaled, or (k + filled u) / levels, scaled, for u in [0, 1] of k's shape.

        The result is float32, or has u's dtype. For uniform u it is uniform on the bin too, with density
        levels/(width filled); clamping u instead would put mass on the bin's upper end.
        """
        if u is not None and u.shape != k.shape:
            raise ValueError(f"u must have the shape of k, {tuple(k.shape)}, got {tuple(u.shape)}")
        dtype = torch.float32 if u is None else u.dtype
        if self.levels > COARSE and self.centered:  # subtract the middle while k is an integer: exact
            inside = 0.5 if u is None else self.filled * u
            return ((2 * k.to(torch.int32) - self.levels).to(dtype) + 2 * inside) / self.levels
        v = value_of(k.to(dtype), self.levels) if u is None else (k.to(dtype) + self.filled * u) / self.levels
        return 2 * v - 1 if self.centered else v

    def decode(self, x: Tensor) -> Tensor:
        """Floats to levels: floor(levels v), clamped to the levels; NaN gives 0.

        This inverts `encode` with any u by definition, and without u because k <= levels value_of(k) < k + 1 for
        k < levels - 1 and the top level is clamped. Compared with rounding to the nearest k / (levels - 1), values move
        by at most half a level: most at black and white, not at all at mid-grey.
        """
        if self.levels > COARSE and self.centered:
            k = (x * (self.levels // 2) + self._margin).floor() + self.levels // 2
        else:
            k = ((x + 1) / 2 if self.centered else x) * self.levels + self._margin
        return k.nan_to_num(nan=0.0).clamp(0, self.levels - 1).to(self.dtype)

    def display(self, k: Tensor) -> Tensor:
        """Levels scaled to 0..255, uint8, for a PNG; 256 levels stay as they are."""
        return (k.to(torch.float32) * (255 / (self.levels - 1))).round().to(torch.uint8)


@dataclass(frozen=True)
class VectorCodec:
    """Float data, unchanged: densities are in nats, and without levels there are no bits.

    `rate` is the sample rate of recordings, in samples per second.
    """

    levels: None = None
    width: float = 1.0
    rate: int | None = None
    pixels: None = None

    def encode(self, k: Tensor, u: Tensor | None = None) -> Tensor:
        """k itself; continuous data need no dequantisation, so u is ignored."""
        return k

    def decode(self, x: Tensor) -> Tensor:
        """x itself."""
        return x


@dataclass(frozen=True)
class Statistics:
    """Statistics of an autoencoder's codes over the training images: mean and standard deviation of each channel.

    `deviation` is the standard deviation of a pixel around its reconstruction, in the autoencoder's input units.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    deviation: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Statistics:
        """Read what `to_json` wrote, exactly. Raises ValueError for any other text."""
        try:
            fields = json.loads(text)
            mean, std = (tuple(float(value) for value in fields[name]) for name in ("mean", "std"))
            return cls(mean, std, float(fields["deviation"]))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"statistics of codes must have mean, std and deviation, got {text[:60]!r}") from error


class AutoencoderCodec:
    """Latent diffusion's codec: the model's state is y = (z - mean)/std, an autoencoder's code z with unit variance.

    A split of codes holds y as floats, so `encode` returns them unchanged and `levels` is None. `posterior` turns
    images into codes, `decode` codes into images.

    Args:
        autoencoder: see `Autoencoder`; images and codes are moved to the device of its parameters.
        statistics: of its codes. Raises ValueError unless all deviations are above 0.
        pixels: codec between images and the autoencoder's input.
    """

    levels: None = None
    width: float = 1.0

    def __init__(self, autoencoder: Autoencoder, statistics: Statistics, pixels: PixelCodec) -> None:
        if not all(0 < value < math.inf for value in (*statistics.std, statistics.deviation)):
            raise ValueError(f"statistics of codes must have deviations above 0, got {statistics}")
        self.autoencoder, self.statistics, self.pixels = autoencoder, statistics, pixels

    def encode(self, k: Tensor, u: Tensor | None = None) -> Tensor:
        """k itself, a normalised code; u is ignored."""
        return k

    @torch.no_grad()
    def posterior(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(y | k), (B, c, h, w), for images k (B, C, H, W)."""
        mean, std = self.autoencoder.encode(self.pixels.encode(k))
        scale, shift = (self._of_channels(v, mean) for v in (self.statistics.std, self.statistics.mean))
        return (mean - shift) / scale, std / scale

    @torch.no_grad()
    def decode(self, y: Tensor) -> Tensor:
        """Decode normalised codes to images, in batches."""
        return torch.cat([self.pixels.decode(self.decoded(codes)) for codes in y.split(_BATCH)])

    def decoded(self, y: Tensor) -> Tensor:
        """The mean of p(x | y), images in the autoencoder's input units."""
        scale, shift = (self._of_channels(v, y) for v in (self.statistics.std, self.statistics.mean))
        return self.autoencoder.decode(scale * y + shift)

    @torch.no_grad()
    def log_prob(self, k: Tensor, y: Tensor) -> Tensor:
        """log P(k | y), (B,) nats, of the levels k under the normal law around the decoded image."""
        x, decoded = self.pixels.encode(k).to(y.dtype), self.decoded(y)
        deviation = torch.tensor(self.statistics.deviation, dtype=torch.float64)
        return log_prob(x, decoded, deviation.to(y), self.pixels.levels, self.pixels.width)

    @staticmethod
    def _of_channels(values: tuple[float, ...], like: Tensor) -> Tensor:
        if len(values) != like.shape[1]:
            raise ValueError(
                f"the codes have {like.shape[1]} channels, but their statistics have {len(values)}: give the "
                "autoencoder that these were measured with"
            )
        return torch.tensor(values, dtype=torch.float64).to(like).reshape(1, -1, *[1] * (like.ndim - 2))


Codec = PixelCodec | VectorCodec | AutoencoderCodec


def requantised(k: Tensor, levels: int, codec: PixelCodec) -> Tensor:
    """Convert k from `levels` levels to the codec's: join bins if possible, else take the nearest k/(levels - 1)."""
    if levels % codec.levels == 0:
        return (k // (levels // codec.levels)).to(codec.dtype)
    return (k.to(torch.float64) * ((codec.levels - 1) / (levels - 1))).round().to(codec.dtype)


def codec_of(levels: int | None, centered: bool = True, rate: int | None = None) -> Codec:
    """The codec of a data set: pixels if it has levels, else floats; those with a `rate` are recordings."""
    return VectorCodec(rate=rate) if levels is None else PixelCodec(levels, centered)
