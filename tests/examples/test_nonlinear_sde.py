"""An SDE learned from its paths: the grid that is its truth, and what score matching makes of the paths."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from examples import nonlinear_sde as example
from score_sde import VPSDE, closed_form

OU = VPSDE(beta_max=5.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def truth() -> example.Truth:
    return example.solve(np.linspace(-4, 4, 401), 250)


def interpolated(truth: example.Truth) -> example.Score:
    """The true score between the grid's points, at its times."""

    def score(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        row = truth.score[round(float(t) * (len(truth.times) - 1))]
        return torch.from_numpy(np.interp(x[:, 0].double().numpy(), truth.x, row))[:, None].to(x)

    return score


# -- the grid


def test_the_density_of_a_linear_sde_is_the_closed_form_with_order_two() -> None:
    exact = closed_form.Mixture(OU, [0.4, 0.6], [[-1.0], [0.8]], [0.1, 0.3])
    errors, of_scores, sizes = [], [], np.array([100, 200, 400])
    for n in sizes:
        x, times = np.linspace(-8, 8, 2 * n + 1), np.linspace(0, 1, n + 1)
        points = torch.from_numpy(x)[:, None]
        p = np.stack([exact.log_prob(points, torch.tensor(t)).exp().numpy() for t in times])
        found = example.fokker_planck(OU, p[0], x, times)
        np.testing.assert_allclose(found.sum(1), found[0].sum(), rtol=1e-12)  # mass
        assert found.min() > -1e-15
        errors.append(np.abs(found - p).sum(1).max() * (x[1] - x[0]))
        scores = exact.score(points, torch.tensor(1.0, dtype=torch.float64))[:, 0].numpy()
        of_scores.append(np.sqrt((p[-1] * (example.score_on_grid(found[-1], x) - scores) ** 2).sum() * (x[1] - x[0])))
    assert errors[-1] < 1e-3
    for e in (errors, of_scores):
        assert np.polyfit(np.log(sizes), np.log(e), 1)[0] == pytest.approx(-2, abs=0.15)


def test_the_wells_keep_their_stationary_density_and_all_else_goes_to_it(truth: example.Truth) -> None:
    kept = []
    for n in (101, 201):
        x = np.linspace(-4, 4, n)
        p = np.exp(x**2 - x**4 / 2)
        p /= p.sum() * (x[1] - x[0])
        moved = example.fokker_planck(example.WELLS, p, x, np.linspace(0, 1, 101))[-1]
        kept.append(np.abs(moved - p).sum() * (x[1] - x[0]))
    assert kept[1] < 2e-3 and kept[0] / kept[1] == pytest.approx(4, rel=0.1)
    gaps = [example.divergence(p, truth.stationary, truth.x) for p in truth.density[::50]]
    assert gaps == sorted(gaps, reverse=True)  # it falls along any path of a diffusion
    assert gaps[0] > 0.5 and gaps[-1] < 1e-4


def test_the_paths_have_the_density_of_the_grid(truth: example.Truth) -> None:
    n = 20_000
    states = example.simulate(n, 250, seeded())[..., 0].double().numpy()
    h = truth.x[1] - truth.x[0]
    for k in (0, 40, 100, 250):
        for power in (1, 2, 3):
            moment, second = ((truth.density[k] * truth.x ** (power * i)).sum() * h for i in (1, 2))
            error = math.sqrt((second - moment**2) / n)
            assert abs((states[k] ** power).mean() - moment) < 4 * error + 0.01 * math.sqrt(second)  # a step's error


def test_the_true_score_leads_back_to_the_start(truth: example.Truth) -> None:
    """By the grid, with no bound violated; and so do samples, within those of exact draws."""
    score = interpolated(truth)
    back = example.density_of_the_way_back(score, truth)
    gap = example.divergence(truth.density[0], back, truth.x)
    assert 0 <= gap < 2e-5
    result = example.measure(score, 0.0, truth, 10_000, steps=125)
    assert result.error.max() < 1e-9 and result.bound < 1e-4
    exact = example.start(10_000, seeded(7))[:, 0].double().numpy()
    floor = wasserstein_distance(exact, truth.x, v_weights=np.maximum(truth.density[0], 0))
    for samples in (result.sde, result.ode):
        assert wasserstein_distance(samples, truth.x, v_weights=np.maximum(truth.density[0], 0)) < 2 * floor + 0.02
        np.testing.assert_allclose(example.shares(samples), example.shares(truth.x, truth.density[0]), atol=0.02)


def test_errors_are_relative_and_the_bound_holds_for_wrong_scores(truth: example.Truth) -> None:
    np.testing.assert_allclose(example.relative_error(1.1 * truth.score, truth), 0.01)
    exact = interpolated(truth)
    for factor in (0.8, 1.2):
        wrong: example.Score = lambda x, t, factor=factor: factor * exact(x, t)
        gap = example.divergence(truth.density[0], example.density_of_the_way_back(wrong, truth), truth.x)
        limit = example.bound(factor * truth.score, truth)
        h = truth.x[1] - truth.x[0]
        information = (np.maximum(truth.density, 0) * truth.score**2).sum(1) * h
        b = example.SLOWEST + (example.FASTEST - example.SLOWEST) * truth.times
        assert limit == pytest.approx(0.04 / 2 * np.trapezoid(b * information, truth.times), rel=1e-3)
        assert 0.001 < gap < limit


# -- learning


@pytest.fixture(scope="module")
def states() -> torch.Tensor:
    return example.simulate(5000, 250, seeded(1))


@pytest.mark.parametrize(
    "objective",
    ["implicit", *(pytest.param(name, marks=pytest.mark.slow) for name in example.OBJECTIVES if name != "implicit")],
)
def test_scores_learned_from_paths_are_near_the_true_ones(
    objective: str, truth: example.Truth, states: torch.Tensor
) -> None:
    """A fifteenth of the example's iterations: 3 % of E |s*|² on average over t; the untrained scores miss more."""
    score = example.learn(example.OBJECTIVES[objective], states, iterations=200)
    simple = (example.gaussian_score(states), example.stationary_score)
    linear, untrained, learned = (
        example.relative_error(example.on_grid(s, truth.x, truth.times), truth) for s in (*simple, score)
    )
    assert learned.mean() < 0.03 < 0.1 < untrained.mean() < linear.mean()
    assert learned.max() < 0.25 < 1 < untrained.max()
