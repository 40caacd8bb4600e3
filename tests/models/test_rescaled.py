"""A model read on another path: the same samples and the same likelihood, for every two paths and every rule."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from score_sde import (
    DDIM,
    SDE,
    VESDE,
    VPSDE,
    Balanced,
    Flow,
    Heun,
    LinearSDE,
    Multistep,
    Preconditioned,
    Solver,
    SubVPSDE,
    TrigonometricSDE,
    from_score,
    on,
    sample,
    times,
)
from score_sde.likelihood.flows import ProbabilityFlow
from score_sde.models.closed_form import Gaussian
from score_sde.models.rules import RULES
from score_sde.sdes.linear import normal_log_prob
from tests.oracles import PURE, SDES, name, numbers

EVERY_RULE = [*RULES, "velocity"]
LEVELS = torch.linspace(-5, 3, 7, dtype=torch.float64)  # log SNRs that all SDEs have
D = 3


class Net(nn.Module):
    """Smooth in the state and the label, and of any label's size."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(numbers(D, D))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight + torch.cos(label / 100)[:, None])


def size(sde: SDE, t: Tensor) -> Tensor:
    return torch.hypot(sde.alpha(t), sde.sigma(t))


def pairs() -> list[Any]:
    """Every rule on every two paths; quickly a ring of paths by rule "v", and each rule from VP to the linear path."""
    ring = [(SDES[i - 1], sde, "v") for i, sde in enumerate(SDES)]
    quick = [*ring, *((VPSDE(), LinearSDE(), rule) for rule in EVERY_RULE)]
    rows = [(a, b, rule) for a, b in product(SDES, SDES) for rule in EVERY_RULE if a != b]
    return [
        pytest.param(*row, id=f"{name(row[0])}-{name(row[1])}-{row[2]}", marks=[] if row in quick else pytest.mark.slow)
        for row in rows
    ]


@pytest.mark.parametrize(("own", "other", "rule"), pairs())
def test_a_model_read_on_another_path_has_the_same_samples_and_likelihood(own: SDE, other: SDE, rule: Any) -> None:
    """At equal levels the states differ by a factor, and their log densities by its logarithm in each dimension."""
    model = Preconditioned(Net(), own, rule)
    read = on(model, other)
    t, u = own.time(LEVELS), other.time(LEVELS)
    factor = size(other, u) / size(own, t)
    x = size(own, t[0]) * numbers(5, D, seed=2)
    for sampler in (DDIM(), Heun(), Multistep(3), Balanced()):
        wanted = sample(model, sampler, (5, D), t, start=x)
        found = sample(read, sampler, (5, D), u, start=factor[0] * x)
        torch.testing.assert_close(found, factor[-1] * wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))
    # by dopri8 in the time of each path, where "embedded" goes the same steps in log SNR on both
    in_time = rule == "velocity" or (own, other) == (SDES[0], SDES[1])
    solver = Solver("dopri8", 1e-9, 1e-9) if in_time else Solver("embedded", 1e-4, 1e-4)
    ends = [(grid[-1].item(), grid[0].item()) for grid in (t, u)]
    a = Flow(ProbabilityFlow(model), t0=ends[0][0], t1=ends[0][1], solver=solver, sde=own)
    k = 1 / factor[0].item()
    base = lambda y: normal_log_prob(k * y) + D * math.log(k)
    b = Flow(ProbabilityFlow(read), base, t0=ends[1][0], t1=ends[1][1], solver=solver, sde=other)
    y = size(own, t[-1]) * numbers(4, D, seed=3)
    last = factor[-1].item()
    with torch.no_grad():
        wanted, found = a.log_prob(y), b.log_prob(last * y) + D * math.log(last)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-6)  # up to 1e11 for "residual" where sigma is 50


@pytest.mark.parametrize("own", [VPSDE(), SubVPSDE(), VESDE(sigma_max=200.0)], ids=name)
@pytest.mark.parametrize("other", PURE, ids=name)
def test_a_model_walks_from_pure_noise_where_its_own_path_has_not_come_to(own: SDE, other: SDE) -> None:
    """Its estimate of the data at its own t = 1 is kept there, and data and noise make up the state."""
    exact, x = Gaussian(own, torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64), 0.5), numbers(6, 3)
    read, truth = on(exact, other), Gaussian(other, exact.means[0], 0.5)
    for t in (1.0, 1 - 1e-6, 0.99):
        time = torch.tensor(t, dtype=torch.float64)
        e, wanted = read(x, time), truth(x, time)
        torch.testing.assert_close(e.data, wanted.data, rtol=0, atol=2.5 * float(own.alpha(time) / own.sigma(time)))
        close = torch.testing.assert_close
        close(other.alpha(time) * e.data + other.sigma(time) * e.noise, x, rtol=1e-12, atol=1e-12)
    grid = times.arcsinh(read.sde, 60)
    walked, exactly = (sample(m, Multistep(3), (6, 3), grid, start=x) for m in (read, truth))
    torch.testing.assert_close(walked, exactly, rtol=0, atol=2e-3)


def test_a_path_takes_the_model_s_last_level_as_its_own_and_none_beyond_is_asked() -> None:
    vp = Preconditioned(Net(), VPSDE(t_min=1e-3))
    read = on(vp, LinearSDE(t_min=1e-9))
    torch.testing.assert_close(
        read.sde.log_snr(torch.tensor(read.sde.t_min, dtype=torch.float64)),
        VPSDE().log_snr(torch.tensor(1e-3, dtype=torch.float64)),
    )
    assert on(vp, LinearSDE(t_min=0.1)).sde.t_min == 0.1
    ve = on(Preconditioned(Net(), VESDE()), TrigonometricSDE())
    with pytest.raises(ValueError, match=r"knows no log SNR above 9\.21, and TrigonometricSDE.* has 1[0-9.]+ at t = "):
        ve(numbers(2, D), torch.tensor(1e-3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"take a path that shares noise levels with the model's"):
        on(Preconditioned(Net(), VESDE(sigma_min=20.0, sigma_max=50.0)), VESDE(sigma_min=0.01, sigma_max=1.0))


def test_conditions_and_scalar_and_batched_times_are_passed_on() -> None:
    model = from_score(VPSDE(), lambda x, t, shift=0.0: -x + shift)
    read, x = on(model, LinearSDE()), numbers(4, D)
    one, each = read(x, torch.tensor(0.4, dtype=torch.float64)), read(x, torch.full((4,), 0.4, dtype=torch.float64))
    torch.testing.assert_close(one.data, each.data)
    assert not torch.equal(read.given(shift=1.0)(x, torch.tensor(0.4)).data, one.data)
