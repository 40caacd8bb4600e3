"""Samplers and likelihoods on states of every kind: rank, batch size, precision, memory layout; and what goes wrong."""

import copy
import math
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import RK45
from torch import Tensor, nn

from score_sde import DDPM, VPSDE, Solver, from_score, log_likelihood, sample, samplers, score_flow, times
from score_sde.likelihood.chain_bound import chain_bound
from score_sde.likelihood.classification import classify
from score_sde.likelihood.heat_maps import heat_map
from score_sde.likelihood.sde_bound import variational_bound
from score_sde.machine.parallel import Processes
from score_sde.models.base import Estimate, ScoreModel
from score_sde.models.rules import Preconditioned, label_log_sigma, predict_edm, unit_variance
from score_sde.networks import EDM2, MLP, NCSN, UNet
from score_sde.noise import noise_source
from score_sde.ode import GaveUp
from score_sde.ode import integrators as ode
from score_sde.samplers import (
    DDIM,
    AdaptiveODE,
    AdaptiveSDE,
    Ancestral,
    EmbeddedODE,
    EulerMaruyama,
    FixedODE,
    Heun,
    Sampler,
    adaptive,
    langevin_dynamics,
)
from score_sde.sdes import SDE, like
from score_sde.tasks.results import in_batches
from tests.oracles import MAIN, numbers

SDE_ = VPSDE(t_min=0.01)
GRID = times.log_snr(SDE_, 4)
SAMPLERS: list[Sampler] = [*MAIN, AdaptiveODE(1e-3, 1e-3, method="RK45")]
SHAPES = {"vectors": (3,), "sequences": (2, 5), "images": (2, 4, 3), "volumes": (1, 2, 3, 2)}


class Tiny(nn.Module):
    """A smooth network of states of any rank, all of whose outputs hang on all inputs and on the label."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        d = math.prod(shape)
        self.first, self.last, self.label = nn.Linear(d, 8), nn.Linear(8, d), nn.Linear(1, 8)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        told = torch.sin(label / 100)[:, None].to(self.label.weight.dtype)
        return self.last(torch.tanh(self.first(x.flatten(1)) + self.label(told))).reshape(x.shape)


def model_of(network: nn.Module, sde: SDE = SDE_) -> Preconditioned:
    return Preconditioned(network, sde, predict_edm, label=label_log_sigma, scale=unit_variance).eval()


@pytest.fixture(scope="module")
def models() -> dict[str, Preconditioned]:
    torch.manual_seed(0)
    return {name: model_of(Tiny(shape)).double() for name, shape in SHAPES.items()}


def test_every_sampler_of_the_package_is_here() -> None:
    there = {value for value in vars(samplers).values() if isinstance(value, type) and issubclass(value, Sampler)}
    assert {type(sampler) for sampler in SAMPLERS} == there - {Sampler}


# --- samplers


def tolerance(sampler: Sampler) -> float:
    """One step size for a whole batch: there an example hangs on its neighbours to the solver's tolerance."""
    return 3e-3 if isinstance(sampler, AdaptiveODE) else 1e-7


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_samples_of_any_rank_alone_and_in_a_batch_and_of_none(
    sampler: Sampler, kind: str, models: dict[str, Preconditioned]
) -> None:
    model, shape = models[kind], SHAPES[kind]
    draw = partial(sample, model, sampler, times=GRID, seed=1, denoise=True)
    three = draw(shape=(3, *shape))
    assert three.dtype == torch.float64 and three.shape == (3, *shape) and three.std() > 0.1
    torch.testing.assert_close(draw(shape=(1, *shape), first=1), three[1:2], rtol=0, atol=tolerance(sampler))
    assert draw(shape=(0, *shape)).shape == (0, *shape)


@cache
def draws() -> Tensor:
    """More noise than any sampler asks for."""
    return numbers(2_000, 2, *SHAPES["images"])


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_samples_in_float32_and_of_a_network_in_bfloat16(sampler: Sampler, models: dict[str, Preconditioned]) -> None:
    model, z = models["images"], numbers(2, *SHAPES["images"])
    results = {}
    for name, dtype in (("float64", torch.float64), ("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        own = copy.deepcopy(model).to(dtype)
        state = torch.float64 if dtype == torch.float64 else torch.float32
        assert sample(own, sampler, (1, 2, 4, 3), GRID).dtype == state, "bfloat16 is no type for a state"
        source = iter(draws().to(state))
        with torch.no_grad():
            *_, results[name] = sampler.walk(own, z.to(state), GRID, lambda like: next(source))  # noqa: B023
    accepts = isinstance(sampler, AdaptiveSDE)  # another decision to accept is another path
    torch.testing.assert_close(results["float32"].double(), results["float64"], rtol=0, atol=1 if accepts else 3e-3)
    torch.testing.assert_close(results["bfloat16"].double(), results["float64"], rtol=0, atol=1 if accepts else 0.1)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_walks_from_states_in_any_layout_and_leaves_them_alone(
    sampler: Sampler, models: dict[str, Preconditioned]
) -> None:
    x = numbers(3, *SHAPES["images"])
    layouts = [
        x.clone(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.stack([x, x], 1)[:, 1],
        x[:1].expand(3, -1, -1, -1),
    ]
    assert not any(layout.is_contiguous() for layout in layouts)
    for layout in layouts:
        before = layout.clone(memory_format=torch.contiguous_format)
        ends = []
        for start in (before, layout):
            noise = noise_source((3, *SHAPES["images"]), 0, 0, torch.float64, torch.device("cpu"))
            with torch.no_grad():
                *_, end = sampler.walk(models["images"], start, GRID, noise)
            ends.append(end)
        torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-11)
        assert torch.equal(layout, before), "the walk wrote into its start"


def test_langevin_dynamics_of_one_and_none(models: dict[str, Preconditioned]) -> None:
    model, x = models["images"], numbers(3, *SHAPES["images"])
    for metropolis in (False, True):
        walk = partial(langevin_dynamics, model, step=1e-3, n=3, t=0.5, metropolis=metropolis)
        three = walk(x=x.transpose(2, 3).contiguous().transpose(2, 3))
        torch.testing.assert_close(walk(x=x[1:2], first=1), (three.x[1:2], three.acceptance[1:2]))
        assert walk(x=x[:0]).x.shape == x[:0].shape


# --- networks in bfloat16


NETWORKS = {
    "unet, sinusoidal": (lambda: UNet(1, width=16, multipliers=(1, 2), blocks=1, attention=(4,), image_size=8), 100.0),
    "unet, fourier": (lambda: UNet(1, width=16, multipliers=(1, 2), blocks=1, attention=(), embedding="fourier"), 0.1),
    "ncsn": (lambda: NCSN(1, levels=999, width=8, multipliers=(1, 1, 1)), 700.6),
    "edm2": (lambda: EDM2(1, width=16, multipliers=(1, 2), blocks=1, attention=(4,), head_channels=8), 1.0),
    "mlp": (lambda: MLP(4, width=32), 1.0),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_in_bfloat16_keep_their_labels(name: str) -> None:
    """Output and label's influence are those of float32 to bfloat16's 2^-8, in units of their size."""
    make, scale = NETWORKS[name]
    torch.manual_seed(0)
    network = make().eval()  # type: ignore[operator]
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(
                torch.randn(p.shape) / math.sqrt(max(p[0].numel(), 1)) if p.ndim > 1 else 0.1 * torch.randn(p.shape)
            )
        x = numbers(4, 4, dtype=torch.float32) if name == "mlp" else numbers(4, 1, 8, 8, dtype=torch.float32)
        label = scale * torch.tensor([0.9993, 0.7012, 0.3341, 0.0117])
        exact = network(x, label)
        half = copy.deepcopy(network).bfloat16()(x.bfloat16(), label)
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).square().mean().sqrt() < 0.03 * exact.std()


def test_a_network_may_compute_under_autocast() -> None:
    torch.manual_seed(0)
    model = model_of(UNet(1, width=8, multipliers=(1, 2), blocks=1, attention=(4,), image_size=8))
    shape, grid = (2, 1, 8, 8), times.log_snr(SDE_, 5)
    exact = sample(model, Heun(), shape, grid)
    with torch.autocast("cpu", torch.bfloat16):
        found = sample(model, Heun(), shape, grid)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0, atol=0.05)


# --- likelihoods

CHAIN = DDPM.linear(50).as_sde()
TIGHT = Solver("dopri5", 3e-5, 3e-5)


def densities(model: ScoreModel, x: Tensor, first: int = 0) -> dict[str, Tensor]:
    """(B,) each, of every road to a likelihood."""
    chain = model_of(model.network, CHAIN) if isinstance(model, Preconditioned) else model
    options: dict[str, Any] = {"t_min": 0.01, "first": first}
    tight = {"rtol": TIGHT.rtol, "atol": TIGHT.atol, **options}
    return {
        "exact": log_likelihood(model, x, probe="exact", **tight).log_prob,
        "probes": log_likelihood(model, x, probes=2, **tight).log_prob,
        "RK45": log_likelihood(model, x, method="RK45", **tight).log_prob,
        "heat map": heat_map(model, x, probes=None, solver=TIGHT, **options).log_prob.flatten(1).sum(1),
        "sde bound": variational_bound(model, x, draws=4, **options).total,
        "chain bound": chain_bound(chain, x, terms=3, first=first).total,
        "classifier": classify([model, model], x, **tight).log_posterior[:, 0],
    }


@pytest.mark.parametrize("kind", SHAPES)
def test_likelihoods_of_any_rank_alone_and_in_a_batch_and_of_none(kind: str, models: dict[str, Preconditioned]) -> None:
    x = numbers(3, *SHAPES[kind])
    three, one, none = (
        densities(models[kind], x),
        densities(models[kind], x[1:2], first=1),
        densities(models[kind], x[:0]),
    )
    for name, value in three.items():
        torch.testing.assert_close(one[name], value[1:2], rtol=1e-4, atol=1e-4)  # to the solver's tolerance
        assert none[name].shape == (0,), name
    torch.testing.assert_close(three["heat map"], three["exact"], rtol=1e-4, atol=1e-4)


def test_likelihoods_in_any_layout_and_precision(models: dict[str, Preconditioned]) -> None:
    model, x = models["images"], numbers(3, *SHAPES["images"])
    expected = densities(model, x)
    for layout in (x.clone(memory_format=torch.channels_last), torch.stack([x, x], 1)[:, 1]):
        for name, value in densities(model, layout).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9, msg=name)
    exact = densities(model, x.float())  # the state in float32, whose random numbers are others, the network in float64
    for name, value in densities(copy.deepcopy(model).float(), x.float()).items():
        torch.testing.assert_close(value.double(), exact[name].double(), rtol=2e-4, atol=2e-3, msg=name)
        if "bound" not in name:
            torch.testing.assert_close(value.double(), expected[name], rtol=2e-4, atol=2e-3, msg=name)


def test_the_likelihood_of_a_network_in_bfloat16(models: dict[str, Preconditioned]) -> None:
    """At the default tolerance, for more evaluations: states stay in float32, also where they come in bfloat16."""
    model, x = models["images"], numbers(3, *SHAPES["images"], dtype=torch.bfloat16)
    half = copy.deepcopy(model).bfloat16()
    for method in ("dopri5", "embedded"):
        run = partial(log_likelihood, t_min=0.01, probe="exact", method=method)
        expected, found = run(model, x.double()), run(half, x)
        torch.testing.assert_close(found.log_prob.double(), expected.log_prob, rtol=0, atol=0.1)
        assert found.nfe < (3.5 if method == "embedded" else 2.5) * expected.nfe and found.latent.dtype == torch.float32
        torch.testing.assert_close(run(half, x.float()), found, rtol=0, atol=0)
    flow = score_flow(half, t_min=0.01)
    z = flow.encode(x)
    assert z.dtype == torch.float32
    torch.testing.assert_close(flow.decode(z), x.float(), rtol=0, atol=0.02)
    split = heat_map(half, x, probes=None, t_min=0.01)
    torch.testing.assert_close(split.log_prob.flatten(1).sum(1).double(), expected.log_prob, rtol=0, atol=0.1)


# --- models that go wrong


class Breaks(ScoreModel):
    """A Gaussian's model whose answer for example `which` is `value` from time t on."""

    def __init__(self, value: float, below: float, which: int = 1) -> None:
        super().__init__(SDE_)
        self.value, self.below, self.which = value, below, which

    def forward(self, x: Tensor, t: Tensor, **condition: object) -> Estimate:
        broken = torch.zeros_like(x)
        if bool((t < self.below).any()):
            broken[self.which % max(len(x), 1) :][:1] = self.value
        return Estimate(0 * x + broken, x + broken, torch.ones(()))


@pytest.mark.parametrize("seed", [0, "generator"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_is_not_finite_is_reported_with_step_and_time(value: float, seed: object) -> None:
    grid = torch.linspace(1, 0.01, 100, dtype=torch.float64)
    source = torch.Generator().manual_seed(3) if seed == "generator" else 3
    with pytest.raises(FloatingPointError) as caught:
        sample(Breaks(value, 0.5), Ancestral(), (3, 2), grid, seed=source)
    at = next(i for i, t in enumerate(grid) if t < 0.5)
    assert f"not finite for 1 of 3 finite states at t = {grid[at]:.4g}" in str(caught.value)
    assert f"step {at + 1} of 99 of Ancestral" in str(caught.value)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_every_sampler_reports_a_model_that_is_not_finite_and_the_time(sampler: Sampler) -> None:
    answer = r"not finite for 1 of 3 finite states at t = 0\.4494: .* \(in step [23] of 4 of "
    if isinstance(sampler, (AdaptiveODE, AdaptiveSDE, EmbeddedODE)):
        answer = r"gave up (?=.*not finite).*at t = 0\.[1-6]"
    with pytest.raises((FloatingPointError, GaveUp), match=answer):
        sample(Breaks(math.nan, 0.5), sampler, (3, 2), GRID)


def test_a_walk_that_breaks_early_is_not_walked_to_its_end() -> None:
    calls = []

    class Counts(Breaks):
        def forward(self, x: Tensor, t: Tensor, **condition: object) -> Estimate:
            calls.append(t)
            return super().forward(x, t)

    with pytest.raises(FloatingPointError, match="step 12 of 10000 "):
        sample(Counts(math.nan, 0.9991), DDIM(), (2, 2), torch.linspace(1, 0.1, 10_001, dtype=torch.float64))
    assert len(calls) < 100


def test_the_last_estimate_of_the_data_is_looked_at_too() -> None:
    grid = times.uniform(SDE_, 5)
    with pytest.raises(FloatingPointError, match=r"t = 0.01: check .* \(in the last estimate of the data"):
        sample(Breaks(math.nan, 0.011), DDIM(), (2, 2), grid, denoise=True)
    assert sample(Breaks(math.nan, 0.011), DDIM(), (2, 2), grid).isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_langevin_dynamics_reports_the_step_and_time_at_which_it_breaks(value: float) -> None:
    x, run = numbers(3, 2), partial(langevin_dynamics, step=1e-3, n=5)
    with pytest.raises(FloatingPointError, match=r"not finite after step 1 of 5, at t = 0\.4: check the score there"):
        run(Breaks(value, 0.5), x, t=0.4)
    with pytest.raises(FloatingPointError, match=r"not finite at the start of 1 of 3 walks, at t = 0\.4: check it"):
        run(Breaks(value, 0.5), x, t=0.4, metropolis=True)
    calls = iter(range(5))
    with pytest.raises(FloatingPointError, match=r"the state is not finite after step 3 of 5: check the score there"):
        run(lambda y: y if next(calls) < 2 else value * y, x)
    for metropolis in (False, True):
        assert run(Breaks(value, 0.5), x, t=0.6, metropolis=metropolis).x.isfinite().all()


def test_a_grid_is_not_fitted_to_a_model_that_breaks() -> None:
    with pytest.raises(FloatingPointError, match=r"values that are not finite for 1 of 4 finite states at t = 0\.\d+"):
        samplers.fit_times(Breaks(math.nan, 0.5), DDIM(), 3, (4, 2))


def test_a_sampler_that_diverges_is_told_from_a_model_that_breaks() -> None:
    class Huge(Breaks):
        """Its noise is finite in float32, but no longer times g²."""

        def forward(self, x: Tensor, t: Tensor, **condition: object) -> Estimate:
            return Estimate(0 * x, torch.full_like(x, 3e38), torch.ones(()))

    words = "has diverged, as the model's estimates were finite"
    with pytest.raises(FloatingPointError, match=rf"is not finite after step 1 of 4, at t = 0.75.*{words}"):
        sample(Huge(0.0, 0.0), EulerMaruyama(), (2, 2), times.uniform(SDE_, 4))
    with pytest.raises(FloatingPointError, match=rf"is not finite at t = .*{words}.* \(in step 3 of 4 of FixedODE"):
        sample(Huge(0.0, 0.0), FixedODE(), (2, 2), times.uniform(SDE_, 4))


class Misshapen(Breaks):
    """Its answer lacks channels below a time, and would be broadcast."""

    def forward(self, x: Tensor, t: Tensor, **condition: object) -> Estimate:
        e = super().forward(x, t)
        return e._replace(data=e.data[:, :1], noise=e.noise[:, :1]) if bool((t < self.below).any()) else e


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_an_estimate_of_another_shape_is_reported_with_step_and_time(sampler: Sampler) -> None:
    answer = (
        r"Misshapen returned data of shape \(2, 1\) for a state of shape \(2, 3\) at t = 0\.\d+.* in step [1-4] of 4"
    )
    with pytest.raises(ValueError, match=answer):
        sample(Misshapen(0.0, float(GRID[1]) + 1e-6), sampler, (2, 3), GRID)


def test_a_score_of_another_shape_is_reported() -> None:
    model = from_score(SDE_, lambda x, t: -x[:, :1])
    for attempt in (
        lambda: sample(model, EulerMaruyama(), (2, 3), GRID),
        lambda: log_likelihood(model, numbers(2, 3)),
    ):
        with pytest.raises(ValueError, match=r"score has shape \(2, 1\) for a state of shape \(2, 3\) at t = "):
            attempt()


@pytest.mark.parametrize("method", [*ode.ADAPTIVE, ode.EACH])
def test_a_likelihood_reports_the_evaluation_and_time_at_which_the_model_breaks(method: str) -> None:
    x = numbers(2, 3)
    run = partial(log_likelihood, x=x, t_min=0.01, method=method)
    with pytest.raises(
        GaveUp, match=r"a slope that is not finite.*t = 0\.[0-9]+|t = 0\.[0-9]+ \(a slope that"
    ) as caught:
        run(ThenBreaks(0.4))
    assert re.search(r"after \d+ evaluations", str(caught.value))
    answer = rf"shape \(2, 1\) for a state of shape \(2, 3\) at t = (0\.[4-9]|1).*, in evaluation \d+ of {method}$"
    with pytest.raises(ValueError, match=answer):
        run(Narrows(0.4))


def test_fixed_steps_report_the_evaluation_and_time_at_which_the_model_breaks() -> None:
    for method in ode.FIXED:
        flow = score_flow(ThenBreaks(0.4), t_min=0.01, solver=Solver(method, steps=20))
        with pytest.raises(GaveUp, match=r"after \d+ evaluations .*a slope that is not finite at t = 0\.4"):
            flow.log_prob(numbers(2, 3))
        with pytest.raises(ValueError, match=rf"at t = 0\.4\d*, in evaluation \d+ of {method}"):
            score_flow(Narrows(0.4), t_min=0.01, solver=Solver(method, steps=20)).log_prob(numbers(2, 3))


def test_bounds_report_the_term_and_time_at_which_the_model_breaks() -> None:
    x, grid = numbers(2, 3), times.log_snr(SDE_, 10)
    for terms in (None, 4):
        with pytest.raises(
            FloatingPointError, match=r"term \d+ of \d+ of the bound is not finite for . of 2 .*at t = "
        ):
            chain_bound(ThenBreaks(0.4, data=math.nan), x, grid, terms=terms)
    last = torch.tensor([1.0, 0.3], dtype=torch.float64)
    with pytest.raises(FloatingPointError, match="term 2 of 2 of the bound is not finite for 1 of 1 .*at t = 0.3"):
        chain_bound(Breaks(math.nan, 0.31, which=0), x[:1], last)
    assert chain_bound(ThenBreaks(1.0), x, grid).total.isfinite().all()
    with pytest.raises(FloatingPointError, match=r"of 64 of the bound is not finite for . of 2 .*at t = (0\.[4-9]|1)"):
        variational_bound(ThenBreaks(0.4), x, t_min=0.01)


class Narrows(ScoreModel):
    """Its answer lacks dimensions above a time, and would be broadcast."""

    def __init__(self, above: float) -> None:
        super().__init__(SDE_)
        self.above = above

    def forward(self, x: Tensor, t: Tensor, **condition: object) -> Estimate:
        width = 1 if bool((t > self.above).any()) else 3
        return Estimate(0 * x[:, :width], x[:, :width], torch.ones(()))


class ThenBreaks(ScoreModel):
    """A Gaussian's model that is NaN above a time."""

    def __init__(self, above: float, data: float = 0) -> None:
        super().__init__(SDE_)
        self.above, self.data = above, data

    def forward(self, x: Tensor, t: Tensor, **condition: object) -> Estimate:
        broken = like(t > self.above, x).bool()
        return Estimate(torch.where(broken, self.data * x, 0 * x), torch.where(broken, math.nan, x), torch.ones(()))


@pytest.mark.parametrize(
    ("attempt", "answer"),
    [
        (lambda: EmbeddedODE(-1e-3), "rtol must be at least 0 and atol above 0, both finite, got -0.001 and 0.0001"),
        (lambda: EmbeddedODE(0, 0), "got 0 and 0"),
        (lambda: AdaptiveODE(math.nan), "got nan and 1e-05"),
        (lambda: AdaptiveODE(method="nosuch"), "unknown adaptive ODE method 'nosuch'; use one of dopri5"),
        (lambda: AdaptiveSDE(0.02, -1), "got 0.02 and -1"),
        (lambda: AdaptiveSDE(first=0), "first must be above 0"),
        (lambda: Solver(atol=math.inf), "got 1e-05 and inf"),
        (lambda: log_likelihood(ThenBreaks(2), numbers(2, 3), t_min=0), "t_min must lie between 0 and 1, where VPSDE"),
        (lambda: log_likelihood(ThenBreaks(2), numbers(2, 3), t_min=-0.1), "has noise, got -0.1; 1e-5 is usual"),
        (lambda: heat_map(ThenBreaks(2), numbers(2, 3), t_min=1), "has noise, got 1; 1e-5 is usual"),
        (lambda: log_likelihood(ThenBreaks(2), numbers(3)), r"must be \(B, \*shape\) in floating point, got .*\(3,\)"),
        (lambda: log_likelihood(ThenBreaks(2), numbers(2, 3).to(torch.uint8)), "in floating point, got torch.uint8"),
        (lambda: score_flow(ThenBreaks(2)).encode(numbers(2, 3).long()), "in floating point, got torch.int64"),
    ],
)
def test_impossible_settings_are_refused_in_a_sentence(attempt: Callable[[], object], answer: str) -> None:
    with pytest.raises(ValueError, match=answer):
        attempt()


# --- stiff problems


def test_the_embedded_pair_is_scipy_s() -> None:
    assert [*map(list, ode._ROWS)] == [*(row[:i] for i, row in enumerate(RK45.A.tolist())), RK45.B.tolist()]
    assert [*RK45.C.tolist(), 1] == ode._NODES and RK45.E.tolist() == ode._ERROR


@pytest.mark.parametrize("method", ["dopri5", "RK45"])
def test_a_stiff_problem_stops_at_a_limit_with_what_was_reached_and_advice(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A score of slope 1e7, for which an explicit solver needs steps of 1e-7: none ends in 500 evaluations."""
    monkeypatch.setattr(ode, "MAX_EVALUATIONS", 500)
    stiff = from_score(SDE_, lambda x, t: -1e7 * x)
    with pytest.raises(GaveUp) as caught:
        log_likelihood(stiff, numbers(2, 3), t_min=0.01, method=method)
    answer = r"gave up after 501 evaluations between t = 0\.01 and 1 \(too many; t = (0\.\d+) was reached\); check the"
    found = re.search(answer, str(caught.value))
    assert found is not None and 0.01 <= float(found[1]) < 0.02
    assert "raise rtol and atol (now 1e-05 and 1e-05) or t_min" in str(caught.value)


@pytest.mark.parametrize("sampler", [EmbeddedODE(), AdaptiveSDE()], ids=str)
def test_a_stiff_walk_stops_at_a_limit_too(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ode, adaptive):
        monkeypatch.setattr(module, "MAX_STEPS", 60)
    stiff = from_score(SDE_, lambda x, t: -1e4 * x)
    answer = r"gave up on 2 of 2 examples, at t = \S+ \(60 steps\).*raise rtol and atol"
    with pytest.raises(RuntimeError, match=answer):
        sample(stiff, sampler, (2, 3), GRID)


# --- several processes


def test_processes_do_not_wait_for_one_another_until_all_is_done(tmp_path: Path) -> None:
    """The first batch of process 0 ends when process 1 has ended all of its own: a meeting on the way would never."""
    meeting, others_done = threading.Barrier(2), threading.Event()
    order: list[tuple[int, int]] = []

    @dataclass(frozen=True)
    class Threads(Processes):
        def barrier(self) -> None:
            if self.rank == 1:
                others_done.set()
            meeting.wait(timeout=60)

        def texts(self, own: str) -> list[str]:
            return [own]

    def work(rank: int) -> dict[str, np.ndarray]:
        def compute(first: int, count: int) -> dict[str, np.ndarray]:
            if rank == 0:
                assert others_done.wait(timeout=60), "process 1 waits for process 0"
            order.append((rank, first))
            return {"x": np.arange(first, first + count)}

        return in_batches(tmp_path, 10, 2, Threads(rank, 2, torch.device("cpu")), compute, "")

    with ThreadPoolExecutor(2) as pool:
        joined = list(pool.map(work, range(2)))
    assert order == [(1, 2), (1, 6), (0, 0), (0, 4), (0, 8)]
    assert all(np.array_equal(whole["x"], np.arange(10)) for whole in joined)
