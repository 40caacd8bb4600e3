"""SDEs known by their paths: simulation, and the way back, against linear SDEs whose answers are known."""

import math

import numpy as np
import pytest
import torch

from score_sde import VPSDE, Diffusion, backward, paths
from score_sde.models.closed_form import Gaussian
from tests.oracles import numbers

VP = VPSDE(beta_max=5.0)
SAME = Diffusion(drift=VP.drift, diffusion=VP.diffusion)
GRID = torch.linspace(0, 1, 101, dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_paths_have_the_moments_of_their_recursion() -> None:
    """Euler-Maruyama on a linear SDE: mean (1 + f h) m and variance (1 + f h)² v + g² h, exactly."""
    n, mean, variance = 40_000, 0.8, 0.25
    states = paths(SAME, mean + math.sqrt(variance) * numbers(n, 1), GRID, seeded(1))
    for k, (s, h) in enumerate(zip(GRID[:-1], GRID.diff())):
        factor = 1 + float(VP.f(s)) * float(h)
        mean, variance = factor * mean, factor**2 * variance + float(VP.g(s)) ** 2 * float(h)
        if k % 20 == 19:
            x = states[k + 1]
            assert abs(float(x.mean()) - mean) < 4 * math.sqrt(variance / n)
            assert abs(float(x.var()) - variance) < 4 * variance * math.sqrt(2 / n)
    exact = float(VP.alpha(GRID[-1])) ** 2 * 0.25 + float(VP.sigma(GRID[-1])) ** 2
    assert variance == pytest.approx(exact, rel=0.02)  # the step's weak error, of order 1


def test_paths_of_a_linear_sde_and_of_its_drift_are_one_and_depend_on_the_seed() -> None:
    x0 = numbers(3, 2, 2)
    a, b, c = paths(VP, x0, GRID, seeded()), paths(SAME, x0, GRID, seeded()), paths(SAME, x0, GRID, seeded(1))
    assert torch.equal(a, b) and torch.equal(a[0], x0) and a.shape == (101, 3, 2, 2)
    assert not torch.equal(b, c)
    score = numbers(3, 2, 2, seed=1)
    for t in (GRID[30], GRID[[30, 60, 90]]):
        torch.testing.assert_close(SAME.velocity(x0, t, score), VP.velocity(x0, t, score))
        torch.testing.assert_close(SAME.reverse_drift(x0, t, score), VP.reverse_drift(x0, t, score))


def test_the_flow_goes_back_with_order_two() -> None:
    exact = Gaussian(VP, torch.tensor([0.4, -0.2]), torch.tensor([0.3, 0.6]))
    x, one, end = numbers(5, 2), GRID[-1], GRID[5]
    errors, steps = [], [10, 20, 40, 80]
    for n in steps:
        *_, last = backward(SAME, exact.score, x, torch.linspace(1, end, n + 1, dtype=torch.float64))
        errors.append(float((last - exact.flow(x, one, end)).norm()))
    assert np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(-2, abs=0.1)


def test_the_reverse_sde_goes_back_to_the_data() -> None:
    n, variance = 40_000, 0.3
    exact = Gaussian(VP, torch.zeros(1), variance)
    start = float(VP.alpha(GRID[-1])) ** 2 * variance + float(VP.sigma(GRID[-1])) ** 2
    x = math.sqrt(start) * numbers(n, 1)
    ends = []
    for steps in (50, 200):
        *_, last = backward(SAME, exact.score, x, torch.linspace(1, 0, steps + 1, dtype=torch.float64), seeded(1))
        ends.append(float(last.var()))
    error = 4 * variance * math.sqrt(2 / n)
    assert abs(ends[1] - variance) < error + 0.01  # an order-1 step error besides
    assert abs(ends[1] - variance) < abs(ends[0] - variance) + error


def test_grids_of_the_wrong_direction_are_refused() -> None:
    x = numbers(2, 1)
    for wrong in (GRID.flip(0), GRID[:1], GRID[None]):
        with pytest.raises(ValueError, match="times must be a 1-D increasing grid of at least 2 times, got"):
            paths(SAME, x, wrong, seeded())
    with pytest.raises(ValueError, match="times must be a 1-D decreasing grid"):
        next(backward(SAME, lambda x, t: x, x, GRID))
