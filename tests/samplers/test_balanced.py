"""`Balanced`: the numbers of its steps, what it solves exactly, its orders step by step, and its ends."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from score_sde import DDIM, DDPM, SDE, VPSDE, Balanced, sample, times
from score_sde.models.closed_form import Empirical, Gaussian, Mixture
from score_sde.samplers.balanced import between, faded, plan, weights
from score_sde.samplers.exponential import Row, advance, orders, point, predictions
from score_sde.samplers.exponential import plan as unipc_plan
from tests.oracles import SDES, name, numbers

CHAIN = DDPM.linear(24, 0.003, 0.8)
LAMBDA = [-5.024978, -2.933091, -1.637647, -0.770982, -0.087133]
LAMBDA += [0.574705, 1.255588, 1.973998, 2.749436, 3.602952, 4.557715]


@dataclass(frozen=True, kw_only=True)
class Straight(VPSDE):
    """x_t = (1 - t) x_0 + t z, from clean data to pure noise."""

    t_min: float = 0.0

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.special.expit(-log_snr / 2)


def refuse(like: Tensor) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def end(model: Gaussian | Mixture, x: Tensor, grid: Tensor, sampler: Balanced) -> Tensor:
    *_, y = sampler.walk(model, x, grid, refuse)
    return y


def test_the_numbers_of_a_step_are_those_of_another_implementation() -> None:
    """Written for x/alpha, data and noise apart, 20 Gauss nodes; a walk of 10 steps makes 2/7 of its corrections."""
    grid = point(VPSDE(), VPSDE().time(2 * torch.tensor(LAMBDA, dtype=torch.float64)))
    steps, alpha = plan(grid, 3, 0.8), grid.alpha
    values = [steps[i].mix for i in (5, 4, 3, 2)]

    def close(row: Row, mixes: list[Row], data: list[float], noise: list[float]) -> None:
        for which, wanted in ((0, data), (2, noise)):
            found = [weight * mix[which] / alpha[5] for weight, mix in zip(row[2:], mixes, strict=True)]
            assert found == pytest.approx(wanted, abs=3e-6)  # of lambda to six digits

    go, move = steps[4].go, steps[5].move
    assert go[0] * alpha[4] / alpha[5] == pytest.approx(0.7230131063, abs=3e-6) and move[0] == 1
    close(go, values[1:], [0.5911998168, -0.4556055828, 0.1434552562], [-0.3467950101, 0.1348763777, -0.0178515333])
    close(
        move, values,
        [0.0249502778, -0.0978685288, 0.109760176, -0.0372515041],
        [-0.0283691757, 0.0574092151, -0.0324931377, 0.0046355671],
    )  # fmt: skip


def test_weights_are_integrals_of_lagranges_polynomials() -> None:
    y = np.array([-4.0, -2.2, -1.0, 0.1, 1.3, 3.0])
    last, new = weights(y, [1, 2, 3, 4, 2])
    for i, order in enumerate([1, 2, 3, 4, 2]):
        for found, nodes in ((last[i], [i - j for j in range(order)]), (None, [i + 1, *(i - j for j in range(order))])):
            for k, node in enumerate(nodes):
                others = [y[other] for other in nodes if other != node]
                lagrange = lambda u, node=node, others=others: math.prod((u - o) / (y[node] - o) for o in others)
                rest = lambda u, f=lagrange: (2 * math.cosh(u)) ** -1.24 * f(u)
                wanted = quad(rest, y[i], y[i + 1], epsabs=1e-13)[0]
                # 12 nodes of Gauss leave 1e-8 of the longest of these steps
                value = found[k] if found is not None else new[i, k] + (last[i, k - 1] if 0 < k <= order else 0)
                assert value == pytest.approx(wanted, abs=3e-8)
        assert not last[i, order:].any() and not new[i, order + 1 :].any()


@pytest.mark.parametrize("sde", [*SDES, Straight()], ids=name)
@pytest.mark.parametrize("steps", [1, 5, 20])
def test_gaussian_data_of_the_scale_are_solved_exactly_in_every_step(sde: SDE, steps: int) -> None:
    """If their mean vanishes, so does G."""
    model = Gaussian(sde, torch.zeros(3, dtype=torch.float64), 0.25)
    grid = torch.linspace(0.95, 0.02, steps + 1, dtype=torch.float64)
    x = numbers(4, 3) * torch.hypot(sde.alpha(grid[0]), sde.sigma(grid[0]))
    truth = model.flow(x, grid[0], grid[-1])
    torch.testing.assert_close(end(model, x, grid, Balanced(scale=0.5)), truth, rtol=1e-12, atol=1e-12)
    assert (end(model, x, grid, Balanced(scale=0.6)) - truth).abs().max() > 1e-9


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_a_step_has_the_order_of_its_polynomial_and_its_correction_one_more(order: int) -> None:
    """From values on the exact path, when the distances of the times are halved; kappa is 1."""
    sde, start = VPSDE(), torch.ones(1, 1, dtype=torch.float64)
    model = Gaussian(sde, torch.tensor([0.4], dtype=torch.float64), 0.09)
    errors = []
    for h in (0.02, 0.01):
        grid = sde.time(2 * (0.2 + h * torch.arange(1 - order, 3, dtype=torch.float64)))
        path = [model.flow(start, grid[0], t) for t in grid]
        steps = between(point(sde, grid), [min(order, i + 1) for i in range(order + 1)], 0.8, 1.0)
        values = [
            advance(e.data, [e.noise], step.mix)
            for e, step in zip(map(model, path, grid), steps, strict=False)  # of all but the last time
        ]
        predicted = advance(path[order - 1], values[-2::-1], steps[order - 1].go)
        corrected = advance(predicted, values[::-1], steps[order].move)
        errors.append([float((x - path[order]).abs()) for x in (predicted, corrected)])
    found = [math.log2(coarse / fine) for coarse, fine in zip(*errors, strict=True)]
    assert found == pytest.approx([order + 1, order + 2], abs=0.2)


def test_a_walk_of_six_steps_is_not_corrected_and_one_of_twenty_is_in_full() -> None:
    assert [faded(n) for n in (1, 6, 13, 20, 21)] == [0, 0, 0.5, 1, 1]
    moves = {n: plan(point(VPSDE(), times.skewed(VPSDE(), n)), 3, 0.8)[3].move for n in (6, 13)}
    assert not any(moves[6][2:]) and all(moves[13][2:])


def test_the_orders_of_a_walk() -> None:
    """1, 2, 3 and so on from its first step, and at most 2 at its last."""
    sde = VPSDE()
    used = lambda grid, order: [sum(map(bool, step.go[2:])) for step in plan(point(sde, grid), order, 0.8)]
    assert used(times.uniform(sde, 7), 3) == [1, 2, 3, 3, 3, 3, 2] and used(times.uniform(sde, 1), 3) == [1]
    assert used(times.uniform(sde, 8), 4) == [1, 2, 3, 4, 4, 4, 3, 2]


def test_from_pure_noise_and_to_clean_data_steps_are_ddims() -> None:
    model, x = Gaussian(Straight(), numbers(3), torch.tensor([0.3, 0.5, 1.5])), numbers(4, 3, seed=1)
    for ends in ([1.0, 0.0], [1.0, 0.4], [0.4, 0.0]):
        grid = torch.tensor(ends, dtype=torch.float64)
        (wanted,) = DDIM().walk(model, x, grid, refuse)
        torch.testing.assert_close(end(model, x, grid, Balanced()), wanted, rtol=1e-12, atol=1e-12)
    grid = times.uniform(Straight(), 20)
    *_, before, last = Balanced().walk(model, x, grid, refuse)
    assert torch.equal(last, model(before, grid[-2]).data)


def test_the_step_from_pure_noise_is_corrected_by_the_mean_of_the_data_at_its_ends() -> None:
    model, x = Gaussian(Straight(), numbers(3), torch.tensor([0.3, 0.5, 1.5])), numbers(4, 3, seed=1)
    grid = torch.tensor([1.0, *(0.8 - 0.01 * i for i in range(20))], dtype=torch.float64)
    first, _, move = plan(point(Straight(), grid), 3, 0.8)[:3]
    step = plan(point(Straight(), grid), 3, 0.8)[1]
    e = model(x, grid[0])
    y = advance(x, [e.data], first.go)
    new = model(y, grid[1])
    found = advance(y, [advance(new.data, [new.noise], step.mix), e.data], step.move)
    torch.testing.assert_close(found, 0.8 * x + 0.2 * (e.data + new.data) / 2, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_walks_from_pure_noise_are_of_third_order_where_the_first_step_shrinks() -> None:
    """With alpha/sigma at its end as n^(-3/2)."""
    sde = Straight()
    model, x = Mixture(sde, [0.4, 0.6], [[-1.0, 0.5], [1.5, 0.0]], [0.3, 0.6]), numbers(6, 2)

    def walk(n: int) -> Tensor:
        lam = torch.linspace(-3 - 1.5 * math.log(n / 20), 1, n, dtype=torch.float64)
        return end(model, x, torch.cat([torch.ones(1, dtype=torch.float64), sde.time(2 * lam)]), Balanced())

    truth = walk(800)
    errors = [float((walk(n) - truth).abs().mean()) for n in (40, 80)]
    assert math.log2(errors[0] / errors[1]) > 2.5


def test_a_single_point_is_reached_from_pure_noise_and_by_chains() -> None:
    point = numbers(1, 2, 3)
    for sde in (Straight(), CHAIN.as_sde()):
        for n in (1, 2, 3, 12):
            grid = torch.linspace(1, 0, n + 1, dtype=torch.float64)
            found = sample(Empirical(sde, point), Balanced(), (4, 2, 3), grid, dtype=torch.float64)
            torch.testing.assert_close(found, point.expand(4, 2, 3))


def test_grids_of_ones_own_do_not_change_what_is_reached() -> None:
    """A grid that nobody would take, uneven and with a step of a millionth."""
    model, x = Mixture(VPSDE(), [0.4, 0.6], [[-1.0, 0.5], [1.5, 0.0]], [0.3, 0.6]), numbers(6, 2)
    even = times.skewed(VPSDE(), 80)
    uneven = torch.cat([even[::2], even[1::4], even[10:11] - 1e-6]).sort(descending=True).values
    torch.testing.assert_close(end(model, x, uneven, Balanced()), end(model, x, even, Balanced()), rtol=0, atol=1e-3)


def test_the_plan_takes_no_longer_than_unipcs() -> None:
    grid = point(VPSDE(), times.skewed(VPSDE(), 20))

    def unipcs() -> None:
        allowed, kinds = orders(grid, 3, 25), predictions(grid, "both")
        unipc_plan(grid, allowed, kinds, "b2")
        unipc_plan(grid.section(0, 20), allowed[:-1], kinds, "b2", corrector=True)

    def best(work: Callable[[], object]) -> float:
        taken = []
        for _ in range(10):
            begun = time.perf_counter()
            work()
            taken.append(time.perf_counter() - begun)
        return min(taken)

    best(unipcs)  # it imports scipy
    assert best(lambda: plan(grid, 3, 0.8)) < 1.5 * best(unipcs)


def test_settings_that_mean_nothing_are_refused() -> None:
    for order in (0, 5, 2.5):
        with pytest.raises(ValueError, match=f"order must be 1, 2, 3 or 4, got {order}"):
            Balanced(order)  # type: ignore[arg-type]
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"scale must be the data's deviation, above 0 and finite, got {scale}"):
            Balanced(scale=scale)
