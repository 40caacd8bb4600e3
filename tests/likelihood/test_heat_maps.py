"""The heat map: sums to the log density exactly, and each term is right where dimensions do not meet."""

import math

import pytest
import torch

from score_sde import DDPM, SDE, VESDE, VPSDE, log_likelihood
from score_sde.likelihood.flows import score_flow
from score_sde.likelihood.heat_maps import heat_map
from score_sde.models.closed_form import Gaussian, Mixture
from score_sde.ode import Solver
from score_sde.sdes import like
from tests.oracles import name, numbers

START, END = torch.tensor(1e-5, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
MEAN = 0.3 * numbers(1, 2, 2)
COV = torch.tensor(
    [[0.5, 0.3, 0.1, 0.0], [0.3, 1.2, 0.0, 0.1], [0.1, 0.0, 0.2, 0.0], [0.0, 0.1, 0.0, 0.4]], dtype=torch.float64
)
TIGHT = Solver(rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sde", [VESDE(), DDPM.linear(50).as_sde()], ids=name)
def test_it_sums_to_the_log_density(sde: SDE) -> None:
    model = Mixture(sde, [0.3, 0.7], torch.stack([MEAN, -2 * MEAN]), torch.stack([COV, 0.2 * COV]))
    x, _ = model.sample(3, torch.Generator().manual_seed(0))
    found = heat_map(model, x, probes=None, solver=TIGHT)
    assert found.log_prob.shape == x.shape and found.nfe > 20
    truth = log_likelihood(model, x, probe="exact", rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.log_prob.flatten(1).sum(1), truth.log_prob, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.bits(17).flatten(1).mean(1), truth.bits_per_dim(17), rtol=0, atol=1e-5)


def test_with_the_same_steps_the_sum_is_the_same_to_rounding() -> None:
    model = Mixture(VPSDE(), [0.3, 0.7], torch.stack([MEAN, -2 * MEAN]), torch.stack([COV, 0.2 * COV]))
    x, _ = model.sample(3, torch.Generator().manual_seed(0))
    steps = Solver("rk4", steps=8)
    flow = score_flow(model, t_min=0.01, solver=steps)
    for probes, same in ((None, {"probe": "exact"}), (3, {"probe": "rademacher", "probes": 3, "seed": 5, "first": 2})):
        found = heat_map(model, x, probes=probes, t_min=0.01, solver=steps, seed=5, first=2)
        truth = flow.log_prob(x, **same).detach()
        torch.testing.assert_close(found.log_prob.flatten(1).sum(1), truth, rtol=1e-12, atol=1e-12)


def test_independent_dimensions_have_their_own_densities() -> None:
    variances = torch.tensor([0.04, 1.0, 0.3, 2.0], dtype=torch.float64).reshape(1, 2, 2)
    model = Gaussian(VPSDE(), MEAN, variances)
    x, _ = model.sample(3, torch.Generator().manual_seed(0))
    alpha, sigma = like(VPSDE().alpha(START), x), like(VPSDE().sigma(START), x)
    v = alpha**2 * variances + sigma**2
    truth = -((x - alpha * MEAN) ** 2) / (2 * v) - torch.log(2 * math.pi * v) / 2
    # N(0, 1) in the place of the law at t = 1 is off by 3e-3 at most
    for probes in (None, 1):  # random signs are exact for a diagonal Jacobian
        found = heat_map(model, x, probes=probes, solver=TIGHT)
        torch.testing.assert_close(found.log_prob, truth, rtol=0, atol=5e-3)
    assert (truth[0] - truth[0].mean()).abs().max() > 0.5


def test_random_signs_are_unbiased_in_every_term() -> None:
    model, n = Gaussian(VPSDE(), MEAN, COV), 1500
    x = model.sample(1, torch.Generator().manual_seed(0))[0]
    exact = heat_map(model, x, probes=None, solver=TIGHT).log_prob
    found = heat_map(model, x.expand(n, 1, 2, 2), probes=2, seed=1).log_prob
    error = found.std(0) / math.sqrt(n)
    assert bool(((found.mean(0) - exact[0]).abs() < 4 * error + 1e-4).all()) and float(found.std(0).max()) > 0.1


def test_examples_depend_on_seed_and_index_alone_and_empty_batches_are_empty() -> None:
    model = Gaussian(VPSDE(), MEAN, COV)
    x, _ = model.sample(4, torch.Generator().manual_seed(0))
    settings = {"probes": 2, "t_min": 0.01, "solver": Solver("rk4", steps=8)}  # which do not depend on the batch
    whole, part = (heat_map(model, y, first=i, **settings) for y, i in ((x, 3), (x[1:3], 4)))  # type: ignore[arg-type]
    torch.testing.assert_close(part.log_prob, whole.log_prob[1:3], rtol=1e-12, atol=1e-12)
    assert heat_map(model, x[:0]).log_prob.shape == (0, 1, 2, 2)
    assert heat_map(model, x.float()).log_prob.shape == x.shape
    with pytest.raises(ValueError, match="probes must be at least 1, or None for the exact terms, got 0"):
        heat_map(model, x, probes=0)
