"""Exponential integrators of the probability flow and the reverse SDE: DPM-Solver, DPM-Solver++, DEIS and UniPC.

With lambda = log(alpha/sigma), half the log SNR, the flow has a linear part that is solved exactly, and an integral
over the model's estimates along the path, of the data D or of the noise E (Lu et al. 2022, arXiv:2206.00927, eq. 3.4;
2211.01095, eq. 9):

    x_s/sigma_s = x_t/sigma_t + ∫ exp(lambda) D dlambda,    x_s/alpha_s = x_t/alpha_t - ∫ exp(-lambda) E dlambda,

from lambda_t up to lambda_s = lambda_t + h. A polynomial through some values F_j of D or E gives

    x_s = keep x_t + sum_j weight_j F_j,    with weights exact for F = 1, u, u², ..., where u = (lambda - lambda_t)/h.

The methods differ in these values: those at intermediate points (`DPMSolver`), of previous steps (`Multistep`), or of
previous steps and the new point (`UniPC`). Which estimate is smoother changes on the way. In a direction in which the
data have variance v, D grows as exp(lambda) while v alpha² < sigma², and E departs from its limit as exp(2 lambda)/2,
so the error of a polynomial of degree p - 1 is 2^(p-1) times as large for E; later it is the other way round. `TURN`
is an estimate of where that happens. For the reverse SDE with eta times its noise,
``dx = [f x - (1 + eta²)/2 g² score] dt + eta g dw``, the same holds with exp((1 + eta²) lambda) for exp(lambda).

Where a step begins without data (alpha = 0) lambda is -∞. There D is smooth in q = alpha/sigma, in which the first
integral is ∫ D dq: this step's polynomial is one in q, from 0 on, and u = q/q_s (prediction "ratio").
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..models.base import Estimate, ScoreModel
from ..noise import Noise
from ..sdes.linear import SDE, add, add_, scaled
from .base import Sampler, add_noise_, refuse_learned, rows
from .times import arcsinh

# Coefficients are NumPy's: on a few numbers its arithmetic takes a third of torch's time, which counts in a walk.
Array = NDArray[np.float64]

Prediction = Literal["data", "noise"]  # what a step interpolates
Kind = Literal["data", "noise", "ratio"]  # the same, and the step from pure noise, which interpolates data in q
Rule = Literal["exact", "b1", "b2", "published"]
Start = Literal["singlestep", "lower"]

SHORT = 15  # steps: shorter grids are finished at lower order, as in the papers' code
TURN = -2.0  # log SNR: with predict="both" steps that begin below it interpolate data, the others noise


class Point(NamedTuple):
    """The curves at some times, and lambda = log(alpha/sigma) there."""

    alpha: Array
    sigma: Array
    half_log_snr: Array

    @property
    def pure(self) -> bool:
        """Whether the first time is pure noise (alpha = 0)."""
        return bool(self.alpha.flat[0] == 0)

    @property
    def clean(self) -> bool:
        """Whether the last time is clean data (sigma = 0)."""
        return bool(self.sigma.flat[-1] == 0)

    def section(self, first: int, count: int) -> Point:
        """The curves at `count` of the times, from the one with index `first`."""
        return Point(*(curve[first : first + count] for curve in self))


# A step x_s = keep x_t + fresh z + sum_j weight_j F_j as (keep, fresh, *weights): numbers, or of the times' shape
Row = Sequence[Any]


def point(sde: SDE, t: Tensor) -> Point:
    curves = sde.alpha(t), sde.sigma(t)
    refuse_learned(curves[0], "a solver in log SNR")
    alpha, sigma = (curve.double().cpu().numpy() for curve in curves)
    with np.errstate(divide="ignore"):  # infinite at clean data
        return Point(alpha, sigma, np.log(alpha / sigma))


def moments(z: Any, n: int, predict: Kind) -> list[Array]:
    """z ∫ w(u) u^k du over [0, 1], k = 0..n-1, with w = exp(-z (1 - u)) for data and exp(-z u) for noise.

    For noise it is z exp(-z) k! phi_{k+1}(z), and with the incomplete gamma function k! P(k + 1, z)/z^k, which keeps
    its digits as z -> 0 and is finite at z = ∞; for data expand u^k = (1 - (1 - u))^k. For "ratio" they are ∫ u^k du.
    """
    from scipy.special import gammainc  # slow to import

    z = np.asarray(z)
    if predict == "ratio":
        return [np.full_like(z, 1 / (k + 1)) for k in range(n)]
    falling = [math.factorial(k) * gammainc(k + 1, z) / (z**k if k else 1) for k in range(n)]
    if predict == "noise":
        return falling
    return [sum(((-1) ** j * math.comb(k, j) * falling[j] for j in range(1, k + 1)), falling[0]) for k in range(n)]


def weights(z: Any, nodes: Sequence[Any], predict: Kind, rule: Rule) -> tuple[Array, ...]:
    """Weights of the values at `nodes`, nodes[0] = 0, of the polynomial's z ∫ w(u) F(u) du (see `moments`).

    "exact" integrates the polynomial. The other rules replace the moment of u or u², as papers and their code do. "b1"
    and "b2", for two nodes, take B(h)/2 with B = h and exp(h) - 1: another number, the same order (Zhao et al. 2023,
    arXiv:2302.04867, section 3.1: with more nodes B cancels). "published" is DPM-Solver++'s: "b2" for two nodes; for
    three half of the moment of u², so that the third order is lost.
    """
    z, places, n = np.asarray(z), [np.asarray(c) for c in nodes], len(nodes)
    m = moments(z, n, predict)
    if n == 2 and rule != "exact" and predict != "ratio":
        b1 = z if predict == "data" else z * np.exp(-z)
        m[1] = (b1 if rule == "b1" else m[0]) / 2
    if n == 3 and rule == "published":
        m[2] = m[2] / 2
    return through(places, m)


def through(places: Sequence[Array], moments: Sequence[Array]) -> tuple[Array, ...]:
    """The weights w with sum_j w_j places_j^k = moments_k for k = 0, 1, ...: those of an integral of the polynomial
    through values at the places, from its moments (Björck & Pereyra 1970)."""
    m, n = list(moments), len(places)
    for k in range(n - 1):
        for i in range(n - 1, k, -1):
            m[i] = m[i] - places[k] * m[i - 1]
    for k in range(n - 2, -1, -1):
        for i in range(k + 1, n):
            m[i] = m[i] / (places[i] - places[i - k - 1])
        for i in range(k, n - 1):
            m[i] = m[i] - m[i + 1]
    return tuple(m)


def coefficients(
    t: Point, s: Point, places: Sequence[Any], predict: Kind, rule: Rule = "exact", eta: float = 0.0
) -> tuple[Array, ...]:
    """The `Row` of the step from t to s, with the weights of F at t and at the `places` u; all of one shape.

    Where s is clean data (sigma = 0) `places` must be empty, and the step ends at the estimate of the data at t.
    """
    h = s.half_log_snr - t.half_log_snr
    zero = np.zeros_like(h)
    if predict == "noise":
        keep = s.alpha / t.alpha
        scale = -keep * t.sigma
        return keep, zero, *(scale * w for w in weights(h, [0.0, *places], predict, rule))
    keep, fresh = s.sigma / t.sigma, zero
    if eta > 0:
        keep = keep * np.exp(-(eta**2) * h)
        fresh = s.sigma * np.sqrt(-np.expm1(-2 * eta**2 * h))
    return keep, fresh, *(s.alpha * w for w in weights((1 + eta**2) * h, [0.0, *places], predict, rule))


def advance(x: Tensor, values: Sequence[Tensor], row: Row) -> Tensor:
    """keep x + sum_j weights_j values_j, a new tensor; values beyond the weights are ignored."""
    keep, _, *weights = row
    # With keep = 1 (VE) the first sum is the copy of x; DPM-Solver-2's first weight is 0.
    y = x if isinstance(keep, float) and keep == 1 else scaled(x, keep)
    for weight, value in zip(weights, values, strict=False):
        if isinstance(weight, Tensor) or weight != 0:
            y = add(y, weight, value) if y is x else add_(y, weight, value)
    return y


def predicted(e: Estimate, predict: Kind) -> Tensor:
    return e.noise if predict == "noise" else e.data


# Intermediate points in units of h. The last step interpolates the values at 0 and at the last of them: with that at
# 2/3 this suffices for order 3, as Radau's quadrature of two nodes has order 3.
_STAGES: dict[int, tuple[float, ...]] = {1: (), 2: (1 / 2,), 3: (1 / 3, 2 / 3)}


# A step of DPM-Solver: the times of its intermediate points, each with the `coefficients` of the step to it from the
# start; then None, as nothing is evaluated at the end, with those of the step to the end.
Stages = Sequence[tuple[Tensor | None, Row]]


def stages(sde: SDE, start: Point, end: Point, order: int, predict: Kind) -> Stages:
    """The stages of the steps from `start` to `end`, of order 1 where they end at clean data."""
    if (end.sigma == 0).any():
        order = 1
    inner: list[tuple[Tensor | None, Row]] = []
    places: list[float] = []
    for c in _STAGES[order]:
        if predict == "ratio":
            half_log_snr = end.half_log_snr + math.log(c)
        else:
            half_log_snr = start.half_log_snr + c * (end.half_log_snr - start.half_log_snr)
        u = sde.time(torch.as_tensor(2 * half_log_snr))
        inner.append((u, coefficients(start, point(sde, u), [p / c for p in places], predict)))
        places = [c]
    return [*inner, (None, coefficients(start, end, places, predict, "b2" if order == 2 else "exact"))]


def stages_of(sde: SDE, grid: Point, order: int, predict: Kind) -> list[Stages]:
    """The stages of every step of a grid, as numbers; the grid may begin with pure noise and end at clean data."""

    def numbers(first: int, count: int) -> list[Stages]:
        kind = predictions(grid.section(first, 2), predict)[0]
        steps = stages(sde, grid.section(first, count), grid.section(first + 1, count), order, kind)
        planned = [(count * [None] if u is None else u.unbind(), rows(columns)) for u, columns in steps]
        return [[(times[i], row[i]) for times, row in planned] for i in range(count)]

    n = len(grid.sigma) - 1
    cuts = sorted({0, *(1 for _ in range(grid.pure)), *(n - 1 for _ in range(grid.clean)), n})
    return [step for first, end in pairwise(cuts) for step in numbers(first, end - first)]


def climb(model: ScoreModel, x: Tensor, stages: Stages, predict: Kind, first: Tensor) -> Tensor:
    """The state after the `stages`, each of which takes the first estimate and that of the stage before."""
    values, y = [first], x
    for u, row in stages:
        y = advance(x, values, row)
        values = values if u is None else [first, predicted(model(y, u), predict)]
    return y


def orders(grid: Point, order: int, short: int = SHORT) -> list[int]:
    """The order of each step: at most the number of values so far, and lower at the end of a short or clean grid.

    The papers' code lowers it on grids of fewer than `short` = 15 steps. At sigma = 0 lambda is infinite, and the order
    is 1.
    """
    n = len(grid.sigma) - 1
    points = [max(i + 1 - grid.pure, 1) for i in range(n)]  # that a polynomial can take: none takes pure noise later
    return [1 if grid.clean and i == n - 1 else min(order, points[i], n - i if n < short else order) for i in range(n)]


def predictions(grid: Point, predict: Kind | Literal["both"]) -> list[Kind]:
    """What each step of a grid interpolates: "data" or "noise", and from pure noise on "ratio"."""
    kinds = [predict if predict != "both" else "data" if 2 * lam < TURN else "noise" for lam in grid.half_log_snr[:-1]]
    return ["ratio", *kinds[1:]] if grid.pure else kinds


def plan(
    grid: Point, orders: Sequence[int], predict: Sequence[Kind], rule: Rule, eta: float = 0.0,
    corrector: bool = False,
) -> list[Row]:  # fmt: skip
    """The steps of a grid, as numbers: step i takes the values at the orders[i] points up to the grid's point i.

    A corrector's step also takes the value at point i + 1, as its last. For each order and prediction the steps from
    the first to the last are computed at once.
    """
    lam = grid.half_log_snr
    kinds = list(zip(orders, predict, strict=False))
    planned: dict[int, Row] = {}
    for kind in set(kinds):
        own = [i for i, other in enumerate(kinds) if other == kind]
        first, count, (q, prediction) = own[0], own[-1] - own[0] + 1, kind
        t, s = grid.section(first, count), grid.section(first + 1, count)
        h = s.half_log_snr - t.half_log_snr
        places = [(lam[first - j :][:count] - t.half_log_snr) / h for j in range(1, q)]
        steps = rows(coefficients(t, s, places + [1.0] * corrector, prediction, rule, eta))
        planned |= {i: steps[i - first] for i in own}
    return [planned[i] for i in range(len(kinds))]


def _check(order: int, predict: str, start: str = "lower", allowed: Sequence[str] = ("data", "noise", "both")) -> None:
    if order not in _STAGES:
        raise ValueError(f"order must be 1, 2 or 3, got {order!r}")
    if predict not in allowed:
        raise ValueError(f"predict must be one of {', '.join(allowed)}, got {predict!r}")
    if start not in ("singlestep", "lower"):
        raise ValueError(f'start must be "singlestep" or "lower", got {start!r}')


@dataclass(frozen=True)
class DPMSolver(Sampler):
    """DPM-Solver-1, 2 and 3, also known as singlestep DPM-Solver: `order` evaluations per step.

    Lu et al. 2022 (arXiv:2206.00927), algorithms 1-2 and section 3.1, with r1 = 1/2, or r1 = 1/3 and r2 = 2/3; with
    ``predict="data"`` DPM-Solver++'s (arXiv:2211.01095, appendix A). A step to clean data is of order 1 (DDIM's).
    Raises ValueError for another order or prediction.
    """

    order: int = 2
    predict: Prediction = "noise"

    def __post_init__(self) -> None:
        _check(self.order, self.predict, allowed=("data", "noise"))

    def step(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        start, end = point(model.sde, t), point(model.sde, s)
        if not (start.alpha == 0).all() == (start.alpha == 0).any():
            raise ValueError(f"a step of {self} is from pure noise (alpha = 0) for all examples or none, got t = {t}")
        kind: Kind = "ratio" if start.pure else self.predict
        tensors = [(u, [torch.as_tensor(c) for c in row]) for u, row in stages(model.sde, start, end, self.order, kind)]
        return climb(model, x, tensors, kind, predicted(model(x, t), kind))

    def walk(self, model: ScoreModel, x: Tensor, times: Tensor, noise: Noise) -> Iterator[Tensor]:
        """The same steps, with all their coefficients computed at once."""
        grid = point(model.sde, times)
        planned = stages_of(model.sde, grid, self.order, self.predict)
        for t, stages, kind in zip(times[:-1], planned, predictions(grid, self.predict), strict=True):
            x = climb(model, x, stages, kind, predicted(model(x, t), kind))
            yield x


@dataclass(frozen=True)
class Multistep(Sampler):
    """DPM-Solver++(2M) and (3M), their SDE forms, and DEIS: multistep solvers of one evaluation per step.

    Also known as dpmpp_2m, dpmpp_3m and dpmpp_2m_sde, and as tAB-DEIS. Lu et al. 2022b (arXiv:2211.01095), algorithm 2
    and appendix B; ``eta=1`` is SDE-DPM-Solver++ (section 4), other values have eta times the reverse SDE's noise, all
    with the same marginals; ``predict="noise"`` is DEIS with polynomials in log(sigma/alpha) (Zhang & Chen 2022,
    arXiv:2204.13902, tAB in that variable). Order 1 is `DDIM`, with eta = 1 `Ancestral`. With noise the weak order is
    at most 2: one normal number per step does not determine more of a path.

    Args:
        order: 1, 2 or 3.
        predict: what is interpolated: "data", "noise", or "both", data below a log SNR of -2 and noise above.
        eta: factor of the reverse SDE's noise; 0 draws none.
        rule: "exact" weights, or DPM-Solver++'s "published" ones (see `weights`), which reduce order 3 to 2.
        start: for order 3 without noise: "singlestep" takes the first step with one more, intermediate evaluation;
            "lower" takes it at order 1, as the published code does, which reduces order 3 to 2 on ever finer grids.

    On grids shorter than 15 steps the last steps are of lower order; a step to clean data is always of order 1.
    Raises ValueError for other settings, or noise with other than data prediction.
    """

    order: int = 2
    predict: Prediction | Literal["both"] = "data"
    eta: float = 0.0
    rule: Literal["exact", "published"] = "exact"
    start: Start = "singlestep"

    def __post_init__(self) -> None:
        _check(self.order, self.predict, self.start)
        if self.rule not in ("exact", "published"):
            raise ValueError(f'rule must be "exact" or "published", got {self.rule!r}')
        if self.eta < 0 or (self.eta > 0 and self.predict != "data"):
            raise ValueError(f'eta must be 0, or above with predict="data", got {self.eta} with {self.predict!r}')

    def walk(self, model: ScoreModel, x: Tensor, times: Tensor, noise: Noise) -> Iterator[Tensor]:
        grid = point(model.sde, times)
        allowed = orders(grid, self.order)
        kinds = predictions(grid, self.predict)
        steps = plan(grid, allowed, kinds, self.rule, self.eta)
        # A first step of local error h² suffices for order 2; order 3 needs h³.
        single = self.start == "singlestep" and self.eta == 0 and max(allowed) == 3
        past: list[Estimate] = []  # newest first
        for i, (t, kind) in enumerate(zip(times[:-1], kinds, strict=True)):
            past = [model(x, t), *past[: self.order - 1]]
            values = [predicted(e, kind) for e in past]
            if i == 0 and single:
                x = climb(model, x, stages_of(model.sde, grid.section(0, 2), 2, kind)[0], kind, values[0])
            else:
                x = advance(x, values, steps[i])
            x = add_noise_(x, steps[i][1], noise)
            yield x


@dataclass(frozen=True)
class UniPC(Sampler):
    """UniPC-p (unified predictor-corrector): a multistep predictor of order p, corrected to order p + 1.

    Zhao et al. 2023 (arXiv:2302.04867), algorithms 5-8. It takes one evaluation per step: that at the predicted point
    serves both the correction of the point and the next step. The last point is not corrected.

    Args:
        order: p, 1, 2 or 3.
        variant: "b1" or "b2", the paper's B1(h) = h or B2(h) = exp(h) - 1.
        predict: as for `Multistep`.
        start: for p = 3: "singlestep" takes the first step with two more evaluations; "lower" takes it at order 1, as
            the published code does, which reduces the order to 3 on ever finer grids.
        short: on grids of fewer steps the last steps are of lower order.

    A step to clean data is always of order 1. Raises ValueError for other settings.
    """

    order: int = 3
    variant: Literal["b1", "b2"] = "b2"
    predict: Prediction | Literal["both"] = "data"
    start: Start = "singlestep"
    short: int = SHORT

    def __post_init__(self) -> None:
        _check(self.order, self.predict, self.start)
        if self.variant not in ("b1", "b2"):
            raise ValueError(f'variant must be "b1" or "b2", got {self.variant!r}')

    def walk(self, model: ScoreModel, x: Tensor, times: Tensor, noise: Noise) -> Iterator[Tensor]:
        grid = point(model.sde, times)
        allowed = orders(grid, self.order, self.short)
        kinds = predictions(grid, self.predict)
        steps = plan(grid, allowed, kinds, self.variant)
        # The corrected point is the predicted one plus the differences of the weights times their values. The last
        # point, which may be clean data, is not corrected.
        corrected = plan(grid.section(0, len(allowed)), allowed[:-1], kinds, self.variant, corrector=True)
        moves = [
            (1.0, 0.0, new[-1], *(a - b for a, b in zip(new[2:], old[2:], strict=False)))
            for new, old in zip(corrected, steps, strict=False)
        ]
        single = self.start == "singlestep" and max(allowed) == 3
        past: list[Estimate] = []  # newest first
        for i, (t, kind) in enumerate(zip(times[:-1], kinds, strict=True)):
            new = model(x, t)
            if i > 0 and not (i == 1 and single):
                x = advance(x, [predicted(e, kinds[i - 1]) for e in (new, *past)], moves[i - 1])
            past = [new, *past[: self.order - 1]]
            values = [predicted(e, kind) for e in past]
            if i == 0 and single:
                x = climb(model, x, stages_of(model.sde, grid.section(0, 2), 3, kind)[0], kind, values[0])
            else:
                x = advance(x, values, steps[i])
            yield x


def recommended(sde: SDE, nfe: int) -> tuple[Sampler, Tensor]:
    """(sampler, times) with the smallest error in benchmarks for `nfe` evaluations, one per step; it draws no noise.

    It is `Multistep` of order 3 below 7 steps, `UniPC` of order 2 below 15 and of order 3 from there on, with
    ``predict="both"`` on the grid `times.arcsinh`. The choice is measured: ``python -m benchmarks.solvers`` compares it
    with the package's other samplers and those of diffusers and score_sde_pytorch (docs/performance.md, also where it
    loses).

        sampler, grid = recommended(model.sde, 20)
        x = sample(model, sampler, (16, 1, 8, 8), grid)

    The grid ends at the SDE's t_min; where that is far below what sampling needs, pass `replace(model.sde, t_min=...)`.
    Raises ValueError for fewer than one evaluation, and for an SDE with sigma(t_min) = 0.
    """
    return fast(nfe), arcsinh(sde, nfe)


def fast(nfe: int) -> Sampler:
    """The sampler of `recommended`."""
    if nfe < 7:  # with steps as long as these a corrector increases a network's errors
        return Multistep(3, "both", start="lower")
    return UniPC(2 if nfe < SHORT else 3, predict="both", start="lower", short=25)
