"""The values of pixel levels in [0, 1], and bits per dimension: rules that codecs, bounds and likelihoods share."""

from __future__ import annotations

import math
from typing import TypeVar

from torch import Tensor

Number = TypeVar("Number", float, Tensor)

COARSE = 256  # up to this many levels they are held as uint8; larger numbers of levels are powers of two


def value_of(k: Number, levels: int) -> Number:
    """The value of level k: k / (levels - 1) up to 256 levels, as score_sde trains; (k + 1/2) / levels above.

    The first puts black at 0 and white at 1. For more levels such values would lie so near the edges of their bins
    [k, k + 1) / levels that float32 could not separate them; the second rule takes the middles of the bins.
    """
    return k / (levels - 1) if levels <= COARSE else (k + 0.5) / levels


def half_bin(levels: int, width: float) -> float:
    """Half the distance of two neighbouring levels' values in an interval of this width."""
    return width * (value_of(1.0, levels) - value_of(0.0, levels)) / 2


def bits(nats: Number, dimensions: int, levels: int | None = None, width: float = 2.0) -> Number:
    """Bits per dimension (bits/dim, BPD) of `nats`, such as minus a log probability, for an example of D `dimensions`.

    For minus the log density of data whose `levels` values were dequantised into an interval of `width` pass both: a
    level is a cell of volume (width/levels)^D, and -log P(cell) <= E[-log p] - D log(width/levels) (Theis et al. 2016,
    arXiv:1511.01844, eq. 7). The offset is log2(levels/width), 7 for 8-bit images in [-1, 1] and 8 in [0, 1].
    """
    return nats / (dimensions * math.log(2)) + (math.log2(levels / width) if levels else 0.0)
