"""Time grids fitted to a model and a solver on a few trajectories."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.base import ScoreModel, default_state
from ..noise import noise_source
from ..sdes.linear import SDE
from .base import Sampler, Watched
from .exponential import Multistep
from .times import arcsinh, horizon, karras, log_snr, quadratic, skewed, uniform

_MOVES = (1 / 2, 1 / 4, 1 / 8)  # of the way to the next node, in log SNR


@torch.no_grad()
def fit_times(
    model: ScoreModel, sampler: Sampler, n: int, shape: tuple[int, ...], *,
    sde: SDE | None = None, fine: int = 256, seed: int = 0,
) -> Tensor:  # fmt: skip
    """n + 1 decreasing times from 1 to t_min, fitted so that this solver's trajectories end nearest to the exact ends.

    The exact ends are those of a third-order solver on a fine grid. The fit begins at the best of the grids of `times`;
    then it moves each node in turn in log SNR, by a half, a quarter and an eighth of the way to its neighbours,
    wherever that reduces the mean distance from the ends: 6 n² evaluations of the batch for a solver of one per step,
    after 256 for the ends. On the trajectories of the fit the result is at least as good as every grid of `times`.
    Sabour et al. 2024 (arXiv:2404.14507) have the same aim, and minimise a bound on the distance of laws.

    Args:
        sampler: a deterministic sampler, which is to walk the grid.
        shape: (B, *shape) of the trajectories; a few tens are enough, more in few dimensions.
        sde: the model's, with the t_min at which to stop; by default the model's own.
        fine, seed: steps of the fine grid, and the seed of the trajectories.

    Raises ValueError for a sampler that draws noise, for n or B below 1, and for an SDE with sigma(t_min) = 0;
    FloatingPointError, with the time, where the model is not finite on the way to the ends.
    """
    if shape[0] < 1:
        raise ValueError(f"fit_times needs trajectories, (B, *shape) with B of at least 1, got shape {tuple(shape)}")
    sde = sde or model.sde
    dtype, device = default_state(model, None, None)
    x = model.sde.prior(tuple(shape), noise_source(tuple(shape), seed, 0, dtype, device))
    *_, ends = Multistep(3).walk(Watched(model), x, log_snr(sde, fine), _refuse)

    def distance(grid: Tensor) -> float:
        *_, y = sampler.walk(model, x, grid, _refuse)
        return float((y - ends).flatten(1).square().mean(1).sqrt().mean().nan_to_num(torch.inf))

    grids = [rule(sde, n) for rule in (uniform, quadratic, log_snr, arcsinh, skewed)]
    grids += [karras(sde, n, rho) for rho in (3.0, 7.0, 15.0)]
    least, grid = min(((distance(grid), grid) for grid in grids), key=lambda pair: pair[0])
    for move in _MOVES:
        for i in range(1, n):
            for neighbour in (i - 1, i + 1):
                trial = grid.clone()
                towards = sde.log_snr(grid[neighbour]).clamp_min(horizon(n))  # the first may be pure noise
                trial[i] = sde.time(torch.lerp(sde.log_snr(grid[i]), towards, move))
                if (off := distance(trial)) < least:
                    least, grid = off, trial
    return grid


def _refuse(like: Tensor) -> Tensor:
    raise ValueError("fit_times needs a sampler that draws no noise, such as Heun(): with noise a start has many ends")
