"""Time grids fitted to a model: nodes where its own trajectories bend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..model import ScoreModel
from ..sdes import SDE
from .base import default_state, noise_source
from .exponential import Multistep, coefficients
from .times import log_snr


@torch.no_grad()
def fit_times(
    model: ScoreModel,
    n: int,
    shape: tuple[int, ...],
    *,
    order: int = 2,
    fine: int = 128,
    seed: int = 0,
    sde: SDE | None = None,
) -> Tensor:
    """n + 1 decreasing times from 1 to t_min, on which the errors of single steps of a multistep solver sum to least.

    A few trajectories are solved on a fine grid even in log SNR. As the estimates along them are kept, the local error
    of a step of the solver from any fine time to any other, with steps as long before it, costs no evaluation; it is
    measured against the standard deviation of the states there. Dynamic programming finds the n steps with the least
    sum, as Chen et al. 2024 (arXiv:2405.11326) do for Euler's method; the aim is that of Sabour et al. 2024
    (arXiv:2404.14507), align your steps, whose bound is optimised over many evaluations.

    Args:
        model: any score model.
        n: number of steps.
        shape: (B, *shape) of the trajectories; a few are enough, such as 16 images.
        order: of the solver that will walk the grid: 1, 2 or 3.
        fine: steps of the fine grid, and evaluations of the fit.
        seed: of the trajectories.
        sde: the model's, with the t_min at which to stop; by default the model's own.

    Raises ValueError for n below 1 or above `fine`, another order, and an SDE with sigma(t_min) = 0.
    """
    if not 1 <= n <= fine:
        raise ValueError(f"a grid fitted on {fine} fine steps has 1 to {fine} of them, got {n}")
    times = log_snr(sde or model.sde, fine)
    x, data = _trajectories(model, tuple(shape), times, seed, order)
    cost = _local_errors(model.sde, times, x, data, order)
    # best[j]: least sum of errors of k steps from 0 to j; came[k][j]: from where the last of them starts
    best, came = cost[0], []
    for _ in range(n - 1):
        best, before = (best[:, None] + cost).min(0)
        came.append(before)
    nodes = [fine]
    for before in reversed(came):
        nodes.append(int(before[nodes[-1]]))
    return times[[0, *reversed(nodes)]]


def _trajectories(
    model: ScoreModel, shape: tuple[int, ...], times: Tensor, seed: int, order: int
) -> tuple[Tensor, Tensor]:
    """(states, estimates of the data) at the times, each (len(times), B * D)."""
    dtype, device = default_state(model, None, None)
    noise = noise_source(shape, seed, 0, dtype, device)
    x = model.sde.prior(shape, noise)
    states = [x, *Multistep(max(order, 2)).walk(model, x, times, noise)]
    data = [model(y, t).data for y, t in zip(states, times, strict=True)]
    return torch.stack(states).flatten(1), torch.stack(data).flatten(1)


def _local_errors(sde: SDE, times: Tensor, x: Tensor, data: Tensor, order: int) -> Tensor:
    """(M + 1, M + 1) root mean square errors of one step from i to j > i; infinite elsewhere."""
    m = len(times) - 1
    spread = x.std(1).double().cpu()
    cost = torch.full((m + 1, m + 1), math.inf, dtype=torch.float64)
    for length in range(1, m + 1):
        for q in range(1, order + 1):  # values at i, i - length, ..., as far as there are
            first = (q - 1) * length
            last = m - length if q == order else min(m - length, q * length - 1)
            if first > last:
                continue
            i = torch.arange(first, last + 1)
            step = coefficients(sde, times[i + length], [times[i - j * length] for j in range(q)], "data")
            y = step.keep.to(x)[:, None] * x[i]
            for j, weight in enumerate(step.weights):
                y += weight.to(x)[:, None] * data[i - j * length]
            error = (y - x[i + length]).square().mean(1).sqrt().double().cpu()
            cost[i, i + length] = error / spread[i + length]
    return cost
