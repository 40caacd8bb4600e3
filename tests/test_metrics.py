"""Sliced Wasserstein distance against its closed forms and couplings of single points; PSNR of known errors."""

import math

import pytest
import torch
from scipy.stats import wasserstein_distance

from score_sde.metrics import psnr, sliced_wasserstein
from tests.oracles import numbers


def test_on_a_line_it_is_the_exact_distance_of_any_two_sizes() -> None:
    x, y = numbers(300, 1), 0.5 + 2 * numbers(77, 1, seed=1)
    assert sliced_wasserstein(x, y, p=1) == pytest.approx(wasserstein_distance(x[:, 0], y[:, 0]), rel=1e-12)
    # order 2 with sizes 4 and 6: repeat both to 12 points and join them in order
    x, y = x[:4], y[:6]
    joined = x.sort(0).values.repeat_interleave(3) - y.sort(0).values.repeat_interleave(2)
    assert sliced_wasserstein(x, y) == pytest.approx(joined.square().mean().sqrt().item(), rel=1e-12)


def test_a_shift_costs_its_length_over_the_root_of_the_dimension() -> None:
    """Every projection is shifted by theta·c, and E (theta·c)² = |c|²/D."""
    x, c = numbers(50, 2, 3), torch.full((2, 3), 0.7, dtype=torch.float64)
    distance = sliced_wasserstein(x, x + c, projections=20_000)
    assert distance == pytest.approx(0.7, rel=0.02)  # the standard error of 20,000 projections is 0.4 %
    assert sliced_wasserstein(x, x + c, projections=200, seed=1) != sliced_wasserstein(x, x + c, projections=200)
    assert sliced_wasserstein(x, x + c, p=1, projections=5_000) < distance


def test_between_gaussians_it_has_its_closed_form() -> None:
    """W_2² of N(0, I) and N(m, s² I) along theta is (theta·m)² + (1 - s)²."""

    def standard(n: int, seed: int) -> torch.Tensor:
        """Normal numbers of mean 0 and covariance I exactly, which most of the distance depends on."""
        x = numbers(n, 2, seed=seed)
        x = x - x.mean(0)
        return x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / n)).T

    m, s = torch.tensor([0.6, -0.8], dtype=torch.float64), 1.5
    x, y = standard(1_000, 0), m + s * standard(1_500, 1)
    truth = math.sqrt(1 / 2 + (1 - s) ** 2)
    assert sliced_wasserstein(x, y, projections=400) == pytest.approx(truth, rel=0.04)  # three standard errors of 400
    floor = sliced_wasserstein(numbers(2_000, 2), numbers(3_000, 2, seed=2))
    assert 0 < floor < 0.12  # two samples of one distribution lie apart, by about 1/sqrt(N)


def test_order_and_repetition_of_the_points_do_not_matter() -> None:
    x, y = numbers(40, 5), numbers(30, 5, seed=1)
    distance = sliced_wasserstein(x, y)
    assert distance == pytest.approx(sliced_wasserstein(y.flip(0), x.repeat(3, 1)), rel=1e-12)
    assert sliced_wasserstein(x, x.flip(0)) == 0


def test_examples_must_be_alike() -> None:
    with pytest.raises(ValueError, match=r"examples of one shape, got \(4, 2\) and \(4, 3\)"):
        sliced_wasserstein(numbers(4, 2), numbers(4, 3))
    with pytest.raises(ValueError, match=r"got \(0, 2\) and \(4, 2\)"):
        sliced_wasserstein(numbers(0, 2), numbers(4, 2))


def test_psnr_of_an_even_error_is_twenty_decibels_for_each_tenth() -> None:
    x = torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    errors = torch.tensor([0.1, 0.01, 0.0]).reshape(3, 1, 1, 1)
    assert psnr(x, x - errors).tolist() == pytest.approx([20, 40, 60], abs=1e-3)
