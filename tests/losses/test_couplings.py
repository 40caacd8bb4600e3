"""Couplings: the cheapest pairs, laws that stay as they were, and straighter paths."""

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

from score_sde.losses.couplings import Coupling, costs, independent, optimal_transport, sinkhorn
from tests.oracles import numbers

EVERY = pytest.mark.parametrize("coupling", [optimal_transport, sinkhorn])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_cheapest_of_all_orders_is_taken() -> None:
    x0, z = numbers(6, 2, 3), numbers(6, 2, 3, seed=1)
    found = optimal_transport(x0, z, generator())
    least = min(float((x0 - z[list(order)]).square().sum()) for order in permutations(range(6)))
    assert float((x0 - found).square().sum()) == pytest.approx(least, rel=1e-12)
    assert torch.equal(found.flatten(1).sort(0).values, z.flatten(1).sort(0).values)
    torch.testing.assert_close(costs(x0, z), (x0[:, None] - z[None]).square().sum((2, 3)))
    assert independent(x0, z, generator()) is z


def test_numbers_on_a_line_are_paired_in_their_order() -> None:
    x0, z = numbers(50, 1), numbers(50, 1, seed=1)
    found = optimal_transport(x0, z, generator())
    assert torch.equal(found[x0[:, 0].argsort()], z.sort(0).values)


def test_the_entropic_plan_is_near_the_exact_one_and_draws_every_z_as_often() -> None:
    x0, z = numbers(64, 2), numbers(64, 2, seed=1)
    exact = (x0 - optimal_transport(x0, z, generator())).square().sum(1).mean()
    source, counts, cost = generator(), torch.zeros(64), 0.0
    for _ in range(50):
        found = sinkhorn(x0, z, source)
        cost += float((x0 - found).square().sum(1).mean()) / 50
        counts += (found[:, None] == z).all(2).float().sum(0)
    assert exact < cost < 0.5 * float((x0 - z).square().sum(1).mean()) and cost < 1.6 * exact
    assert float((counts / 50 - 1).abs().max()) < 0.6  # of the standard error 0.14 at most
    assert torch.equal(sinkhorn(x0, z, generator()), sinkhorn(x0, z, generator()))


@EVERY
def test_noise_keeps_its_law(coupling: Coupling) -> None:
    """Over many batches, whatever the data: each z is taken as often as before."""
    source, drawn = generator(), []
    for i in range(40):
        x0, z = 1 + 0.3 * numbers(32, 1, seed=i), torch.randn(32, 1, generator=source, dtype=torch.float64)
        drawn.append(coupling(x0, z, source))
    assert kstest(torch.cat(drawn)[:, 0].numpy(), "norm").pvalue > 1e-3


def crossing(coupling: Coupling) -> float:
    """Mean variance of z - x0 among neighbours x_t half way in the plane: how much straight lines cross there."""
    x0, z = torch.where(numbers(400, 2) > 0, 1.0, -1.0) + 0.1 * numbers(400, 2, seed=3), numbers(400, 2, seed=1)
    z = coupling(x0, z, generator())
    x: Tensor = (x0 + z) / 2
    near = torch.cdist(x, x).topk(10, largest=False).indices
    return float((z - x0)[near].var(1).mean())


def test_coupled_paths_hardly_cross() -> None:
    apart = crossing(independent)
    assert crossing(optimal_transport) < 0.15 * apart and crossing(sinkhorn) < 0.3 * apart
    assert np.isfinite(apart)
