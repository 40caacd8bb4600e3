"""Moving averages of the weights: the one of `model.ema_rate` or `ema_halflife`, and power averages of any width.

A power average (Karras et al. 2024, arXiv:2312.02696, section 3.1) after T steps counts the weights that the network
had at time t by

    p(t) = (gamma + 1) t^gamma / T^(gamma + 1)    on [0, T],

where step n's weights hold on (n - 1, n]. So it has seen a share of the run, and forgets its start, however long the
run becomes. Its *width* sigma_rel is the standard deviation of p over T: 0.1 averages about the last 10 % of a run.

Averages of two widths, kept while the run trains and stored in its checkpoints, are enough to make that of any other
width afterwards: `combination` mixes the stored ones so that their mixed p is nearest to the wanted one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

RAMP = 0.1  # the half-life of the average is at most this share of the images seen, so that it forgets its start
WIDTHS = (0.05, 0.1)  # of the power averages that training keeps: the paper's
WIDEST = math.sqrt(1 / 12)  # the width of gamma = 0, the plain mean of all weights


def ema_decay(step: int, *, rate: float, halflife: float = 0.0, batch_size: int = 1) -> float:
    """Decay of the average at its update number `step` = 1, 2, ...

    With `halflife` (in images) > 0 it is 0.5^(batch_size/h), h = min(halflife, RAMP · images seen), as in EDM
    (Karras et al. 2022, appendix F.2), so that it means the same at any batch size. Otherwise it is score_sde's
    min(rate, (1 + step)/(10 + step)).
    """
    if halflife > 0:
        return 0.5 ** (batch_size / min(halflife, RAMP * step * batch_size))
    return min(rate, (1 + step) / (10 + step))


def power_decay(step: int, width: float) -> float:
    """Decay of the power average of a width at its update number `step` = 1, 2, ...: (1 - 1/step)^(gamma + 1).

    Karras et al. 2024, eq. 127. It is 0 at the first step, so what was there before does not count.
    """
    return (1 - 1 / step) ** (exponent(width) + 1)


@torch.no_grad()
def ema_update(averages: list[Tensor], values: list[Tensor], decay: float) -> None:
    """averages += (1 - decay) (values - averages), for all tensors in one fused operation."""
    torch._foreach_lerp_(averages, values, 1 - decay)


@cache
def exponent(width: float) -> float:
    """Gamma of a width in (0, WIDEST]: the largest root of width² (gamma + 2)² (gamma + 3) = gamma + 1.

    Karras et al. 2024, eq. 126 and algorithm 2. Raises ValueError for another width.
    """
    if not 0 < width <= WIDEST:
        raise ValueError(f"the relative width of a power average must be above 0 and at most {WIDEST:.3f}, got {width}")
    inverse = width**-2
    return max(float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()), 0.0)


class Combination(NamedTuple):
    """Factors of stored averages, (steps, WIDTHS), whose sum is 1, and the error of the profile that they make.

    The `error` is the L2 distance of the profile from the wanted one, over the norm of that. It limits what is made: it
    is off, in each weight, by at most error · |p| · |weight history - c| for any constant c, with |.| the root of the
    sum of squares over steps and |p| = `norm`.
    """

    factors: np.ndarray
    error: float
    norm: float


def combination(steps: Sequence[int], width: float) -> Combination:
    """How to mix the averages that were stored at these steps into that of a width at the last of them.

    Least squares in L2 over all mixtures whose factors sum to 1 (Karras et al. 2024, appendix C.3 and algorithm 3; the
    published code divides by the sum of the best factors instead). A width of WIDTHS is exact. Raises ValueError for
    an impossible width.
    """
    end, wanted = float(steps[-1]), exponent(width)
    norm = math.sqrt((wanted + 1) ** 2 / (2 * wanted + 1) / end)
    if width in WIDTHS:
        factors = np.zeros((len(steps), len(WIDTHS)))
        factors[-1, WIDTHS.index(width)] = 1
        return Combination(factors, 0.0, norm)
    at = np.repeat(np.array(steps, float), len(WIDTHS))
    gamma = np.tile([exponent(w) for w in WIDTHS], len(steps))
    sizes = np.sqrt(_inner(at, gamma, at, gamma))  # unit profiles keep the equations well scaled
    gram = _inner(at[:, None], gamma[:, None], at, gamma) / np.outer(sizes, sizes)
    target = _inner(at, gamma, np.array(end), np.array(wanted)) / sizes / norm
    bordered = np.block([[gram, 1 / sizes[:, None]], [1 / sizes, np.zeros(1)]])  # Lagrange's equations: the sum is 1
    x = np.linalg.solve(bordered, np.append(target, 1 / norm))[:-1]
    square = 1 - 2 * float(x @ target) + float(x @ gram @ x)
    return Combination(norm * (x / sizes).reshape(-1, len(WIDTHS)), math.sqrt(max(square, 0.0)), norm)


def _inner(a: np.ndarray, gamma_a: np.ndarray, b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """The integral of the product of two profiles, which end at the steps a and b (Karras et al. 2024, eq. 151)."""
    first, last = np.minimum(a, b), np.maximum(a, b)
    later = np.where(a < b, gamma_b, gamma_a)  # the exponent of the one that ends last
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * (first / last) ** later / last
