"""Where the levels of pixels lie in [0, 1]: the one rule that codecs, decoders of levels and dequantisation share."""

from __future__ import annotations

from typing import overload

from torch import Tensor

COARSE = 256  # up to so many levels are held as uint8; from there on they are powers of two


@overload
def value_of(k: Tensor, levels: int) -> Tensor: ...
@overload
def value_of(k: float, levels: int) -> float: ...
def value_of(k: Tensor | float, levels: int) -> Tensor | float:
    """Of level k, a float: k / (levels - 1) up to 256 levels, as score_sde trains; (k + 1/2) / levels above.

    The first puts black at 0 and white at 1, and nearly at the edges of their bins [k, k + 1) / levels: float32 could
    not tell on which side. The second is the bins' middles.
    """
    return k / (levels - 1) if levels <= COARSE else (k + 0.5) / levels


def half_bin(levels: int, width: float) -> float:
    """Half the distance of two neighbouring levels' values in an interval of this width."""
    return width * (value_of(1.0, levels) - value_of(0.0, levels)) / 2
