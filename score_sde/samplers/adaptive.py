"""The reverse SDE with adaptive step sizes (Jolicoeur-Martineau et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from ..models.base import ScoreModel, of_examples
from ..noise import Noise
from ..ode.integrators import LEAST_STEP, GaveUp, check_tolerances, which_of
from ..sdes.linear import SDE, add_, like
from .base import Sampler
from .deterministic import check_noisy

MAX_STEPS = 100_000


@dataclass(frozen=True)
class AdaptiveSDE(Sampler):
    """The reverse SDE by stochastic improved Euler, with an adaptive step size for each example.

    Jolicoeur-Martineau et al. 2021 (arXiv:2105.14080), algorithm 1. x' is Euler-Maruyama's step, x'' takes the mean of
    its increment and the one at x' with the same noise. A step is accepted, and ends at x'', where the root mean square
    of (x'' - x')/max(atol, rtol |x'|, rtol |last x'|) over an example is E <= 1; the next step is `safety` E^-exponent
    times as long. After a rejection the longer step's noise is kept, and the shorter step's is drawn conditioned on it
    (a Brownian bridge). The paper's code draws anew, which prefers paths without short steps (2-D Gaussians come out
    with almost twice their variance).

    Args:
        rtol, atol: the paper takes rtol from 0.01 to 0.05, and for atol one pixel level, 2/256 for data in [-1, 1].
        first: size of the first step, in t.
        safety, exponent: the paper's theta and r.

    States are reported at the grid's points. A gradient holds the steps, and so the Brownian path, constant. Raises
    ValueError for impossible settings, and where the grid ends at clean data (sigma = 0); RuntimeError, which names the
    examples, after 100 000 steps, or where even steps too short to move t have too large an error.
    """

    rtol: float = 0.02
    atol: float = 2 / 256
    first: float = 0.01
    safety: float = 0.9
    exponent: float = 0.9

    def __post_init__(self) -> None:
        check_tolerances(self.rtol, self.atol)
        if not (self.first > 0 and 0 < self.safety < 1 and 0 < self.exponent <= 1):
            raise ValueError(f"first must be above 0, safety below 1 and exponent at most 1, got {self}")

    def walk(self, model: ScoreModel, x: Tensor, times: Tensor, noise: Noise) -> Iterator[Tensor]:
        check_noisy(model, times)
        # No example waits at a time of the grid, so that its numbers do not depend on when others arrive there.
        reached = [x.clone() for _ in times[1:]]
        x, past, path, goal = x.clone(), x.clone(), Path(len(x)), torch.ones(len(x), dtype=torch.long)
        t, h, reported = times[0].expand(len(x)).clone(), torch.full((len(x),), self.first, dtype=torch.float64), 0
        for tries in range(1, MAX_STEPS + 1):
            while reported < len(reached) and bool((goal > reported + 1).all()):
                yield reached[reported]
                reported += 1
            left = (goal < len(times)).nonzero()[:, 0]
            if len(left) == 0:
                return
            own, end = left.to(x.device), times[goal[left]]  # `own` on the state's device
            step = torch.minimum(torch.minimum(h[left], farthest(model.sde, t[left])), t[left] - end)
            arrived = step == t[left] - end
            s = torch.where(arrived, end, t[left] - step)
            dw = path.increments(left, step, noise(x)[own])  # drawn for all, for the same reason
            with of_examples(model, left, len(x)):
                euler, improved = improved_euler(model, x[own], t[left], s, dw)
            size = (self.rtol * torch.maximum(euler.abs(), past[own].abs())).clamp_min(self.atol)
            e = ((improved - euler) / size).detach().flatten(1).square().mean(1).sqrt().cpu().double()
            finite = e.isfinite()
            e = e.masked_fill(~finite, 10)  # rejected; a tenth of the step is tried
            good = e <= 1
            path.settle(left, step, dw, good)
            kept = good.to(x.device)
            x[own[kept]], past[own[kept]] = improved[kept], euler[kept]
            t[left[good]] = s[good]
            for i in left[good & arrived].tolist():
                reached[goal[i] - 1][i] = x[i]
            goal[left[good & arrived]] += 1
            grown = self.safety * step * e.clamp_min(1e-12) ** -self.exponent
            h[left] = torch.where(good & arrived, torch.maximum(h[left], grown), grown)
            short = ~good & (grown < LEAST_STEP * t[left])
            if bool(short.any()):
                reason = "steps too short to advance" if bool(finite[short].all()) else "an error that is not finite"
                self._give_up(t, left[short], reason, 2 * tries)
        self._give_up(t, left, f"{MAX_STEPS} steps", 2 * MAX_STEPS)

    def _give_up(self, t: Tensor, which: Tensor, reason: str, nfe: int) -> NoReturn:
        raise GaveUp(
            f"AdaptiveSDE gave up on {which_of(which, len(t))}, at t = {t[which].max().item():.3g} ({reason}) "
            f"after {nfe} evaluations; check the model there, or raise rtol and atol (now {self.rtol:g} and "
            f"{self.atol:g})"
        )


@torch.no_grad()
def farthest(sde: SDE, t: Tensor) -> Tensor:
    """The longest step that is tried at t, (B,): after pure noise one that doubles alpha/sigma, elsewhere any.

    Near pure noise |f| has no bound. A step much longer than 1/|f| is so wrong that its two estimates may agree by
    accident, in few dimensions often.
    """
    log_snr, end = sde.log_snr(t), sde.log_snr(torch.ones_like(t))
    limited = (end == -math.inf) & (log_snr > end)
    return torch.where(limited, t - sde.time(log_snr + 2 * math.log(2)), math.inf)


class Path:
    """A Brownian path for each example, as far as it has been drawn: pieces (duration, increment) from now on."""

    def __init__(self, count: int) -> None:
        self.pieces: list[list[tuple[float, Tensor]]] = [[] for _ in range(count)]

    def increments(self, rows: Tensor, steps: Tensor, z: Tensor) -> Tensor:
        """The increments over the next `steps` of the examples `rows`, from one standard normal z for each."""
        dw = like(steps.sqrt(), z) * z
        for k, (row, step) in enumerate(zip(rows.tolist(), steps.tolist(), strict=True)):
            if self.pieces[row]:
                dw[k] = self._drawn(self.pieces[row], step, z[k])
        return dw

    def _drawn(self, pieces: list[tuple[float, Tensor]], left: float, z: Tensor) -> Tensor:
        """The increment over a duration `left` of the pieces, of which one is divided or added to end there."""
        total = torch.zeros_like(z)
        for j, (duration, dw) in enumerate(pieces):
            if duration > left:  # a Brownian bridge: the first part is normal around its share of the whole
                first = left / duration * dw + math.sqrt(left * (duration - left) / duration) * z
                pieces[j : j + 1] = [(left, first), (duration - left, dw - first)]
                return total + first
            total, left = total + dw, left - duration
            if left <= 0:
                return total
        pieces.append((left, math.sqrt(left) * z))
        return total + pieces[-1][1]

    def settle(self, rows: Tensor, steps: Tensor, dw: Tensor, taken: Tensor) -> None:
        """Remove the pieces of the steps that were taken, and keep those of rejected steps."""
        for k, (row, step, accepted) in enumerate(zip(rows.tolist(), steps.tolist(), taken.tolist(), strict=True)):
            pieces = self.pieces[row]
            if not accepted and not pieces:
                pieces.append((step, dw[k].clone()))
            while accepted and pieces and step > 0:
                step -= pieces.pop(0)[0]


def improved_euler(model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, dw: Tensor) -> tuple[Tensor, Tensor]:
    """(x', x'') at s < t from x at t and the Brownian increment dw, with one and two evaluations.

    Their weak orders are 1 and 2, as the noise of these SDEs does not depend on x. From pure noise (alpha = 0) on,
    where the rates are infinite, x_s is N(alpha_s data, sigma_s²); x'' takes the mean of the data there and at x'.
    """
    sde, h = model.sde, t - s
    pure, finite = like(sde.alpha(t), x) == 0, torch.where(sde.alpha(t) == 0, s, t)  # a time with rates
    increment = lambda x, u, e: add_(like(-h, x) * sde.reverse_drift(x, u, e.score), sde.g(u), dw)
    e, alpha = model(x, t), like(sde.alpha(s), x)
    first = increment(x, finite, e)
    euler = torch.where(pure, alpha * e.data + like(sde.sigma(s) / h.sqrt(), x) * dw, x + first)
    other = model(euler, s)
    improved = x + (first + increment(euler, s, other)) / 2
    return euler, torch.where(pure, euler + alpha / 2 * (other.data - e.data), improved)
