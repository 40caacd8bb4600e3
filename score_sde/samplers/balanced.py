"""`Balanced`: a predictor-corrector that interpolates a value between the data and the noise.

Divide the state by alpha. With s = sigma/alpha and lambda = -log s the probability flow of y = x/alpha is dy = E ds on
every path, where y = D + s E are the model's estimates of data and noise. DPM-Solver++ integrates a polynomial through
values of D, DEIS one through values of E. Take data of deviation c instead, and divide once more:

    rho² = c² + s²,    q = s²/rho²,    y = rho u    =>    du/dlambda = (q D - (1 - q) s E)/rho.

The bracket is what EDM's network predicts (Karras et al. 2022, section 5), up to sign and scale: it is D while noise
outweighs data, -s E afterwards, and 0 all the way for Gaussian data of deviation c, of which the flow keeps u. In a
direction of variance v it is proportional to (v - c²) s/(rho sqrt(v + s²)), which vanishes at both ends. So part of
this bell is taken out before a polynomial is laid through the rest:

    du/dlambda = (q (1 - q))^w G,    G = (q D - (1 - q) s E)/(rho (q (1 - q))^w).

With w = 1 G is constant for v near c², with w = 1/2 it is for sqrt(v) << s << c; w = 0.62 is a compromise. In
lambda, D and E of a direction have their singularities at -log(v)/2 ± i pi/2, equally far for every v; so lambda is the
variable of the polynomial, whatever the spectrum is. A step from lambda to lambda + h is

    y' = rho'/rho y + rho' sum_j W_j G_j,    W_j = ∫ (q (1 - q))^w L_j dlambda,

with L_j Lagrange's polynomials of the last points, and the integrals by Gauss' rule of 12 nodes. As in UniPC (Zhao et
al. 2023, arXiv:2302.04867) the value at the new point, which the next step needs anyway, then corrects the step that
led there. A long step is to be corrected less, as this value is one at a wrong point: kappa = (n - 6)/14, between 0 and
1, of the correction is made in a walk of n steps.

In x itself (no division by alpha) rho² = c² alpha² + sigma², and s is sigma.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..models.base import ScoreModel
from ..noise import Noise
from .base import Sampler, rows
from .exponential import Array, Point, Row, advance, point, through

WEIGHT = 0.62  # w
_NODES, _GAUSS = np.polynomial.legendre.leggauss(12)
_NODES, _GAUSS = (_NODES + 1) / 2, _GAUSS / 2  # on [0, 1]


@dataclass(frozen=True)
class Balanced(Sampler):
    """A multistep predictor-corrector of one evaluation per step, between data and noise prediction.

    The package's own; it is exact in every step for Gaussian data of deviation `scale`. The predictor has the order
    given, the corrector one more, a walk's first step order 1 and its last at most 2, neither of which costs more than
    third order.

    Args:
        order: 1 to 4. Order 4 gains with exact scores on fine grids, and loses with networks.
        scale: the deviation c of the data. Wrong by a factor of 2, it costs less than a tenth.

    A step from pure noise (alpha = 0) or to clean data (sigma = 0) is DDIM's. Raises ValueError for other settings.
    """

    order: int = 3
    scale: float = 0.8

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3, 4):
            raise ValueError(f"order must be 1, 2, 3 or 4, got {self.order!r}")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be the data's deviation, above 0 and finite, got {self.scale!r}")

    def walk(self, model: ScoreModel, x: Tensor, times: Tensor, noise: Noise) -> Iterator[Tensor]:
        past: list[Tensor] = []  # values of G, newest first
        for t, step in zip(times[:-1], plan(point(model.sde, times), self.order, self.scale), strict=True):
            e = model(x, t)
            new = advance(e.data, [e.noise], step.mix)
            x = advance(x, [new, *past], step.move)
            past = [new, *past[: self.order - 1]]
            x = advance(x, past, step.go)
            yield x


class Step(NamedTuple):
    """The numbers of a step: of data and noise in G, of what corrects its start, and of what leads to its end."""

    mix: Row = (1.0, 0.0, 0.0)  # the data, alone
    move: Row = (1.0, 0.0)  # no correction
    go: Row = (1.0, 0.0)


def plan(grid: Point, order: int, scale: float) -> list[Step]:
    """The steps of a grid, which may begin with pure noise and end at clean data: those two steps take data alone."""
    n, pure, clean = len(grid.alpha) - 1, int(grid.alpha[0] == 0), int(grid.sigma[-1] == 0)
    to_data = rows((grid.sigma[1:] / grid.sigma[:-1], 0 * grid.sigma[1:], grid.alpha[1:]))
    steps = [Step(go=row) for row in to_data]
    if n > pure + clean:
        orders = [min(order, i + 1, n - pure - i + 1) for i in range(n - pure - clean)]
        steps[pure : n - clean] = between(grid.section(pure, n + 1 - pure - clean), orders, scale, faded(n))
        if pure:
            steps[1] = steps[1]._replace(move=trapezoid(grid.alpha[1], grid.sigma[1], steps[1].mix, faded(n)))
    return steps


def trapezoid(alpha: float, sigma: float, mix: Row, kappa: float) -> Row:
    """The correction of a step from pure noise to x: x += kappa alpha (D_new - D)/2, where the integral is ∫ D d(1/s).

    D_new follows from x = alpha D_new + sigma E_new and G = mix[0] D_new + mix[2] E_new.
    """
    part = kappa / 2 * alpha / (mix[0] * sigma - mix[2] * alpha)
    return (1 - part * mix[2], 0.0, part * sigma, -kappa / 2 * alpha)


def between(grid: Point, orders: Sequence[int], scale: float, kappa: float) -> list[Step]:
    """The steps of a grid that has data and noise at all of its times."""
    y = grid.half_log_snr + math.log(scale)  # so that q = 1/(1 + exp(2 y))
    rho, size = np.hypot(scale * grid.alpha, grid.sigma), bell(y)
    q, rest = (grid.sigma / rho) ** 2, (scale * grid.alpha / rho) ** 2
    mixes = rows((q * grid.alpha / (rho * size), 0 * q, -rest * grid.sigma / (rho * size)))
    last, new = weights(y, orders)
    moves = [(1.0, 0.0, *row) for row in (kappa * rho[1:, None] * new).tolist()]
    keep, predicted = (rho[1:] / rho[:-1]).tolist(), (rho[1:, None] * last).tolist()
    goes = [(kept, 0.0, *row) for kept, row in zip(keep, predicted, strict=True)]
    return [Step(*three) for three in zip(mixes, [(1.0, 0.0), *moves], goes, strict=False)]


def bell(y: Array) -> Array:
    """(q (1 - q))^w = (2 cosh y)^(-2 w)."""
    return np.exp(-2 * WEIGHT * np.logaddexp(y, -y))


def weights(y: Array, orders: Sequence[int]) -> tuple[Array, Array]:
    """The integrals W of n steps, (n, p) for the values at the last points, and what the value at the new one changes.

    The changes are (n, p + 1), of the new value first. Where a step is of a lower order than p, the rest are zeros.
    """
    h, degrees = np.diff(y), np.arange(max(orders) + 1)
    moments = (bell(y[:-1, None] + h[:, None] * _NODES) * h[:, None] * _GAUSS) @ _NODES[:, None] ** degrees
    last, new = np.zeros((len(h), len(degrees) - 1)), np.zeros((len(h), len(degrees)))
    for order in set(orders):
        steps = np.flatnonzero(np.equal(orders, order))
        places = [(y[steps - j] - y[steps]) / h[steps] for j in range(order)]
        values = list(moments[steps].T)
        last[steps, :order] = np.transpose(through(places, values[:order]))
        *old, own = through([*places, np.ones(len(steps))], values[: order + 1])
        new[steps, : order + 1] = np.transpose([own, *old])
    new[:, 1:] -= last
    return last, new


def faded(n: int) -> float:
    """kappa, the part of a correction that is made in a walk of n steps."""
    return min(max((n - 6) / 14, 0.0), 1.0)
