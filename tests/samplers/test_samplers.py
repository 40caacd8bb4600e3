"""Samplers: their orders, their algebra, and every SDE × sampler × wrapper × rank against the truth."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

from score_sde import (
    DDIM,
    DDPM,
    EDMSDE,
    SDE,
    SMLD,
    VESDE,
    VPSDE,
    AdaptiveODE,
    Ancestral,
    AnnealedLangevin,
    EulerMaruyama,
    FixedODE,
    Heun,
    Langevin,
    LinearSDE,
    PredictorCorrector,
    ReverseDiffusion,
    Sampler,
    ScoreModel,
    SubVPSDE,
    chain_bound,
    from_score,
    guide,
    langevin_dynamics,
    log_likelihood,
    recommended,
    sample,
    times,
    variational_bound,
)
from score_sde.machine import progress
from score_sde.models.closed_form import Empirical, Gaussian, Mixture
from score_sde.noise import noise_source
from score_sde.ode import ADAPTIVE
from score_sde.sdes import like
from score_sde.sdes.chains import Piecewise
from tests.oracles import DETERMINISTIC, SDES, STEEP, STOCHASTIC, first_time, name, numbers

close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)  # float64, a few operations

MEAN = torch.tensor([0.3, -0.7], dtype=torch.float64)
COV = torch.tensor([[0.5, 0.3], [0.3, 1.2]], dtype=torch.float64)
CHAINS: list[DDPM | SMLD] = [DDPM.linear(24, 0.003, 0.6), SMLD.from_sde(VESDE(), 24)]
EVERY = pytest.mark.parametrize("sde", [*SDES, *(c.as_sde() for c in CHAINS)], ids=name)


def refuse(like: Tensor) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def seconds(t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float64)


def last(states: Iterator[Tensor]) -> Tensor:
    return list(states)[-1]


def bent(sde: SDE) -> ScoreModel:
    """A model that is not linear, so that no error cancels."""
    return from_score(sde, lambda x, t: -torch.sin(2 * x) / like(sde.sigma(t), x))


# --- orders


@pytest.mark.parametrize("sampler", DETERMINISTIC, ids=str)
@pytest.mark.parametrize("sde", SDES, ids=name)
def test_deterministic_samplers_converge_to_the_exact_flow_at_their_order(sde: SDE, sampler: Sampler) -> None:
    model = Gaussian(sde, MEAN, COV)
    x = sde.prior_std * numbers(8, 2)
    order, errors = DETERMINISTIC[sampler], []
    if sampler == FixedODE("midpoint") and isinstance(sde, LinearSDE):
        order = 3  # its term of order 2 is V'''/(48 V) of a Gaussian's variance V, which here is quadratic in t
    for n in {1: (60, 120), 2: (30, 60), 3: (30, 60)}.get(order, (40, 80)):
        grid = torch.linspace(0.95, 0.05, n + 1, dtype=torch.float64)  # at t = 1 CosineSDE is nearly singular
        errors.append((last(sampler.walk(model, x, grid, refuse)) - model.flow(x, grid[0], grid[-1])).abs().mean())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def moments_at_the_end(sampler: Sampler, model: Gaussian, grid: Tensor, mean: float, var: float) -> tuple[float, float]:
    """Mean and variance after a walk over 1-D Gaussian data, exactly: a step is x -> a + b x + c z.

    One call takes every step of the grid at once, for (x, z) = (0, 0), (1, 0) and (0, 1).
    """
    n = len(grid) - 1
    x, z = (torch.tensor(v, dtype=torch.float64).repeat_interleave(n)[:, None] for v in ([0.0, 1, 0], [0.0, 0, 1]))
    y = sampler.step(model, x, grid[:-1].repeat(3), grid[1:].repeat(3), lambda like: z)[:, 0].reshape(3, n)
    for a, b, c in zip(y[0].tolist(), (y[1] - y[0]).tolist(), (y[2] - y[0]).tolist(), strict=True):
        mean, var = a + b * mean, b**2 * var + c**2
    return mean, var


@pytest.mark.parametrize("sampler", STOCHASTIC, ids=str)
@pytest.mark.parametrize("sde", SDES, ids=name)
def test_stochastic_samplers_have_weak_order_one(sde: SDE, sampler: Sampler) -> None:
    model = Gaussian(sde, MEAN[:1], 0.25)

    def truth(t: Tensor) -> tuple[float, float]:
        return float(sde.alpha(t) * MEAN[0]), float(sde.alpha(t) ** 2 * 0.25 + sde.sigma(t) ** 2)

    errors = []
    for n in (20_000, 40_000):  # for VE, Euler-Maruyama's first-order term is small: it takes many steps to lead
        grid = torch.linspace(0.7, 0.05, n + 1, dtype=torch.float64)
        end = moments_at_the_end(sampler, model, grid, *truth(grid[0]))
        errors.append([abs(a - b) for a, b in zip(end, truth(grid[-1]), strict=True)])
    for coarse, fine in zip(*errors, strict=True):
        if coarse > 1e-9:  # the mean is exact for some: then its error is rounding
            assert math.log2(coarse / fine) == pytest.approx(1, abs=0.15)
    assert errors[0][1] > 1e-9


@pytest.mark.parametrize(
    ("sde", "method"), [*((SDES[0], method) for method in ADAPTIVE), *((sde, "dopri5") for sde in SDES[1:])], ids=str
)
def test_adaptive_ode_reaches_the_exact_flow_to_its_tolerance(sde: SDE, method: str) -> None:
    model = Gaussian(sde, MEAN, COV)
    x, grid = sde.prior_std * numbers(8, 2), times.uniform(replace(sde, t_min=0.05), 1)
    truth = model.flow(x, grid[0], grid[-1])
    for tolerance in (1e-5,) if method == "bosh3" else (1e-4, 1e-7):
        sampler = AdaptiveODE(rtol=tolerance, atol=tolerance, method=method)
        end = last(sampler.walk(model, x, grid, refuse))
        assert (end - truth).abs().max() < 100 * tolerance  # the tolerance bounds a step's error, not their sum


def test_adaptive_ode_reports_the_state_at_every_time_of_the_grid() -> None:
    model, x, grid = Gaussian(VPSDE(), MEAN, COV), numbers(8, 2), times.uniform(VPSDE(), 3)
    for t, y in zip(grid[1:], AdaptiveODE(1e-6, 1e-6).walk(model, x, grid, refuse), strict=True):
        torch.testing.assert_close(y, model.flow(x, grid[0], t), rtol=1e-5, atol=1e-5)


# --- algebra of single steps


@EVERY
def test_ddim_with_eta_one_is_ancestral_sampling(sde: SDE) -> None:
    model, x, z = bent(sde), numbers(6, 3, 2, 2), numbers(6, 3, 2, 2, seed=1)
    for t, s in [(first_time(sde), 0.97), (0.6, 0.5), (0.3, 0.02), (0.02, 0.01)]:
        pair = seconds(t), seconds(s)
        a, b = (sampler.step(model, x, *pair, lambda like: z) for sampler in (DDIM(eta=1.0), Ancestral()))
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * a.abs().max().item())


@EVERY
def test_ddim_with_eta_zero_is_eulers_method_in_sigma_over_alpha(sde: SDE) -> None:
    model, x = bent(sde), numbers(6, 3, 2, 2)
    for t, s in [(first_time(sde), 0.97), (0.6, 0.5), (0.3, 0.02), (0.02, 0.01)]:
        t, s = seconds(t), seconds(s)
        ratio_t, ratio_s = sde.sigma(t) / sde.alpha(t), sde.sigma(s) / sde.alpha(s)
        # with y = x/alpha and r = sigma/alpha the probability flow is dy/dr = noise (Song et al. 2021b, eq. 14)
        euler = sde.alpha(s) * (x / sde.alpha(t) + (ratio_s - ratio_t) * model(x, t).noise)
        y = DDIM().step(model, x, t, s, refuse)
        torch.testing.assert_close(y, euler, rtol=1e-12, atol=1e-12 * (1 + (x / sde.alpha(t)).abs().max().item()))


@pytest.mark.parametrize("eta", [0.4, 1.0, 1.3, 4.0])
@EVERY
def test_ddim_s_step_is_the_paper_s_and_above_1_its_noise_may_be_all(sde: SDE, eta: float) -> None:
    """Song et al. 2021 (2010.02502), eq. 12 and 16, in numbers of their own; the root is held at 0."""
    model, x, z = Gaussian(sde, torch.zeros(2), 0.5), numbers(4, 2), numbers(4, 2, seed=1)
    for t, s in ((0.9, 0.8), (0.9, 0.3)):
        t, s = (torch.tensor(u, dtype=torch.float64) for u in (t, s))
        a, b, p, q = (c(u).item() for c in (sde.alpha, sde.sigma) for u in (t, s))
        fresh = eta * math.sqrt(q**2 / p**2 * (p**2 - (a / b) ** 2 * q**2))
        e = model(x, t)
        wanted = b * e.data + math.sqrt(max(q**2 - fresh**2, 0.0)) * e.noise + fresh * z
        torch.testing.assert_close(DDIM(eta).step(model, x, t, s, lambda like: z), wanted, rtol=1e-9, atol=1e-9)


@EVERY
def test_heuns_method_takes_the_mean_of_the_slopes_in_sigma_over_alpha(sde: SDE) -> None:
    model, x, t, s = bent(sde), numbers(6, 3), seconds(0.6), seconds(0.55)
    ratio_t, ratio_s = sde.sigma(t) / sde.alpha(t), sde.sigma(s) / sde.alpha(s)
    y, slope = x / sde.alpha(t), model(x, t).noise
    other = model(sde.alpha(s) * (y + (ratio_s - ratio_t) * slope), s).noise
    expected = sde.alpha(s) * (y + (ratio_s - ratio_t) * (slope + other) / 2)
    torch.testing.assert_close(Heun().step(model, x, t, s, refuse), expected, rtol=1e-10, atol=1e-10)


@EVERY
def test_steps_are_their_papers_formulas(sde: SDE) -> None:
    model, x, z = bent(sde), numbers(6, 3), numbers(6, 3, seed=1)
    t, s = seconds(0.7), seconds(0.66)
    score, data, noise = model.score(x, t), model(x, t).data, lambda like: z

    drift = sde.f(t) * x - sde.g(t) ** 2 * score
    close(EulerMaruyama().step(model, x, t, s, noise), x + (s - t) * drift + sde.g(t) * (t - s).sqrt() * z)
    scale, std = sde.transition(s, t)
    close(ReverseDiffusion().step(model, x, t, s, noise), (2 - scale) * x + std**2 * score + std * z)
    close(ReverseDiffusion(flow=True).step(model, x, t, s, refuse), (2 - scale) * x + std**2 / 2 * score)
    mean, var = sde.posterior(x, data, s, t)
    close(Ancestral().step(model, x, t, s, noise), mean + var.sqrt() * z)
    close(Ancestral("large").step(model, x, t, s, noise), mean + std * z)
    h = 2 * scale**2 * (0.1 * z.norm(dim=1) / score.norm(dim=1)).square()[:, None]
    close(Langevin(snr=0.1).step(model, x, t, s, noise), x + h * score + (2 * h).sqrt() * z)
    h = 2 * scale**2 * (0.1 * z.norm(dim=1).mean() / score.norm(dim=1).mean()) ** 2
    close(Langevin(snr=0.1, norm="batch").step(model, x, t, s, noise), x + h * score + (2 * h).sqrt() * z)
    h = 2 * scale**2 * (0.1 * sde.sigma(t)) ** 2
    close(AnnealedLangevin(snr=0.1).step(model, x, t, s, noise), x + h * score + (2 * h).sqrt() * z)
    once = AnnealedLangevin(snr=0.1).step(model, x, t, s, noise)
    twice = AnnealedLangevin(snr=0.1).step(model, once, t, s, noise)
    close(AnnealedLangevin(snr=0.1, steps=2).step(model, x, t, s, noise), twice)


@pytest.mark.parametrize("sampler", [*DETERMINISTIC, *STOCHASTIC, Langevin(), AnnealedLangevin()], ids=str)
def test_times_may_differ_within_a_batch_and_steps_leave_their_inputs_alone(sampler: Sampler) -> None:
    model, x, z = bent(SubVPSDE()), numbers(3, 2, 2), numbers(3, 2, 2, seed=1)
    t, s = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64), torch.tensor([0.8, 0.45, 0.08], dtype=torch.float64)
    before = x.clone(), z.clone()
    if isinstance(sampler, FixedODE):  # torchdiffeq has one time for the batch
        together = torch.cat([sampler.step(model, x[i : i + 1], t[i], s[i], refuse) for i in range(3)])
    else:
        together = sampler.step(model, x, t, s, lambda like: z)
    for i in range(3):
        alone = sampler.step(model, x[i : i + 1], t[i], s[i], lambda like, i=i: z[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-9, atol=1e-9)
    assert torch.equal(x, before[0]) and torch.equal(z, before[1])


def test_one_data_point_is_reached_in_one_step() -> None:
    point = numbers(1, 2, 3)
    for chain in CHAINS:
        model = Empirical(chain.as_sde(), point)
        for sampler in (DDIM(), Ancestral(), Heun()):
            end = sample(model, sampler, (4, 2, 3), torch.tensor([1.0, 0.0]), dtype=torch.float64)
            torch.testing.assert_close(end, point.expand(4, 2, 3))


def test_annealed_langevin_has_the_stationary_variance_of_the_unadjusted_langevin_algorithm() -> None:
    """x += h score + sqrt(2h) z on N(0, V) settles at V/(1 - h/(2V))."""
    sde, t, s = VPSDE(), seconds(0.5), seconds(0.49)
    model = Gaussian(sde, MEAN[:1] * 0, 0.25)
    variance = sde.alpha(t) ** 2 * 0.25 + sde.sigma(t) ** 2
    h = 2 * sde.transition(s, t)[0] ** 2 * (0.3 * sde.sigma(t)) ** 2
    zero, one = seconds(0.0)[None, None], seconds(1.0)[None, None]
    sampler = AnnealedLangevin(snr=0.3)
    b = sampler.step(model, one, t, s, lambda like: zero)
    c = sampler.step(model, zero, t, s, lambda like: one)
    close((c**2 / (1 - b**2)).squeeze(), variance / (1 - h / (2 * variance)))


def test_langevin_norms_are_each_examples_own_unless_asked_otherwise() -> None:
    model, x, z = bent(VPSDE()), numbers(4, 8), numbers(4, 8, seed=1)
    other = torch.cat([x[:1], 10 * x[1:]])
    pair = seconds(0.5), seconds(0.49)
    for norm, equal in (("example", True), ("batch", False)):
        corrector = Langevin(norm=norm)  # type: ignore[arg-type]
        a, b = (corrector.step(model, y, *pair, lambda like: z)[0] for y in (x, other))
        assert torch.allclose(a, b) is equal


def test_predictor_corrector_corrects_first_then_predicts_at_the_same_pair_of_times() -> None:
    calls: list[tuple[str, float, float]] = []

    class Told(Sampler):
        def __init__(self, word: str) -> None:
            object.__setattr__(self, "word", word)

        def step(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, noise: Callable) -> Tensor:
            calls.append((self.word, float(t), float(s)))
            return x + 1

    pc, grid = PredictorCorrector(Told("predict"), Told("correct")), torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    states = list(pc.walk(bent(VPSDE()), torch.zeros(1, 1), grid, refuse))
    assert calls == [("correct", 1.0, 0.5), ("predict", 1.0, 0.5), ("correct", 0.5, 0.25), ("predict", 0.5, 0.25)]
    assert [float(x) for x in states] == [2.0, 4.0]
    walked, calls[:] = calls[:2], []
    assert float(pc.step(bent(VPSDE()), torch.zeros(1, 1), grid[0], grid[1], refuse)) == 2.0 and calls == walked


def test_samplers_are_values() -> None:
    assert PredictorCorrector() == PredictorCorrector(ReverseDiffusion(), Langevin(snr=0.16))
    assert "Langevin(snr=0.1, steps=2" in repr(PredictorCorrector(Ancestral(), Langevin(0.1, 2)))
    assert len({DDIM(), DDIM(0.0), DDIM(eta=1.0)}) == 2
    with pytest.raises(ValueError, match="unknown fixed-step ODE method 'rk5'; use one of euler"):
        FixedODE("rk5")
    with pytest.raises(TypeError, match="AdaptiveODE has no single step"):
        AdaptiveODE().step(bent(VPSDE()), torch.zeros(1, 1), seconds(1.0), seconds(0.5), refuse)
    with pytest.raises(ValueError, match="unknown adaptive ODE method 'rk4'; use one of dopri5"):
        last(AdaptiveODE(method="rk4").walk(bent(VPSDE()), torch.zeros(1, 1), times.uniform(VPSDE(), 1), refuse))


# --- the product table

SAMPLERS: list[Sampler] = [
    *DETERMINISTIC,
    *STOCHASTIC,
    AdaptiveODE(rtol=1e-4, atol=1e-4),
    PredictorCorrector(ReverseDiffusion(), AnnealedLangevin(snr=0.1)),
    PredictorCorrector(Ancestral(), Langevin(snr=0.1)),
    PredictorCorrector(DDIM(eta=1.0), Langevin(snr=0.1, norm="batch")),
]
DATA_MEAN, DATA_STD = 1.0, 0.7


def wrapped(sde: SDE, wrapper: str, shape: tuple[int, ...]) -> ScoreModel:
    """A model of N(1, 0.7²) in every dimension."""
    zero, half, one = (torch.full(shape, v, dtype=torch.float64) for v in (0.0, 0.5, 1.0))
    return {
        "plain": lambda: Gaussian(sde, one, DATA_STD**2),
        "given": lambda: Mixture(sde, [0.5, 0.5], torch.stack([-one, one]), DATA_STD**2).given(label=1),
        # of equal covariances, guidance extrapolates the mean at every t
        "guided": lambda: guide(Gaussian(sde, half, DATA_STD**2), Gaussian(sde, zero, DATA_STD**2), 2.0),
    }[wrapper]()


def noisy_steps(sampler: Sampler) -> bool:
    """Whether the size of a step depends on the draw."""
    return isinstance(sampler, PredictorCorrector) and isinstance(sampler.corrector, Langevin)


def grid_for(sde: SDE, sampler: Sampler) -> Tensor:
    """The sampler's grid: a chain's own times, without clean data where a sampler cannot go there."""
    if isinstance(sde, Piecewise):
        grid = torch.linspace(1, 0, sde.steps + 1, dtype=torch.float64)
        grid = grid[:-1] if isinstance(sampler, (FixedODE, AdaptiveODE)) else grid
        return grid[[0, -1]] if isinstance(sampler, AdaptiveODE) else grid
    return times.log_snr(sde, 1 if isinstance(sampler, AdaptiveODE) else 50 if noisy_steps(sampler) else 12)


@cache
def truth(sde: SDE, sampler: Sampler) -> tuple[float, float, float]:
    """Mean and deviation where the sampler's walk ends, and how far it may be off besides the Monte Carlo error.

    A step is linear on Gaussian data, so its walk's moments are exact: those the orders above are measured by.
    A Langevin step whose size depends on the draw is not: there the data's moments, with its own bias allowed for.
    """
    grid, model = grid_for(sde, sampler), Gaussian(sde, torch.tensor([DATA_MEAN], dtype=torch.float64), DATA_STD**2)
    if isinstance(sampler, AdaptiveODE):
        x = model.flow(torch.tensor([[0.0], [sde.prior_std]], dtype=torch.float64), grid[0], grid[-1])
        return float(x[0]), float(x[1] - x[0]), 0.01
    if noisy_steps(sampler):
        return DATA_MEAN, DATA_STD, 0.15
    mean, std = 0.0, sde.prior_std
    x, *draws = torch.tensor([[0.0, 1, 0, 0], [0.0, 0, 1, 0], [0.0, 0, 0, 1]], dtype=torch.float64)[..., None]
    for t, s in pairwise(grid):
        left = iter(draws)  # a predictor and a corrector draw one each
        a, ax, *az = sampler.step(model, x, t, s, lambda like, left=left: next(left))
        mean, std = float(a + (ax - a) * mean), math.sqrt(sum(float(v - a) ** 2 for v in (a + (ax - a) * std, *az)))
    return mean, std, 0.0


# On every SDE and chain; a steep schedule is none for the flow's reverse diffusion (tests/samplers/test_spread.py).
# The wrappers on one SDE and one chain, with one sampler that draws noise and one that does not: a wrapper is a model,
# which knows neither schedule nor sampler, and a sampler sees nothing but the model.
CASES = [
    pytest.param(sde, sampler, wrapper, id=f"{name(sde)}-{sampler}-{wrapper}")
    for sde in [*SDES, *(c.as_sde() for c in CHAINS)]
    for sampler in SAMPLERS
    for wrapper in ("plain", "given", "guided")
    if not (sde in STEEP and sampler == ReverseDiffusion(flow=True))
    and (wrapper == "plain" or (sde in (SDES[0], CHAINS[1].as_sde()) and sampler in (Heun(), Ancestral())))
]


@pytest.mark.parametrize(("sde", "sampler", "wrapper"), CASES)
def test_every_sde_sampler_wrapper_and_rank(sde: SDE, sampler: Sampler, wrapper: str) -> None:
    shapes = [(400, 10), (100, 3, 4, 4)] if wrapper == "plain" and sde in (SDES[0], SDES[2]) else [(100, 3, 4, 4)]
    if isinstance(sampler, (DDIM, EulerMaruyama)) and wrapper == "plain" and sde == SDES[0]:
        shapes += [(400, 2, 6), (100, 2, 2, 3, 4)]  # sequences, volumes
    mean, std, tolerance = truth(sde, sampler)
    for shape in shapes:
        model = wrapped(sde, wrapper, shape[1:])
        stream = torch.Generator().manual_seed(1)
        x = sample(model, sampler, shape, grid_for(sde, sampler), seed=stream, dtype=torch.float32)
        assert x.shape == shape and x.dtype == torch.float32 and bool(x.isfinite().all())
        error = std / math.sqrt(x.numel())  # of the mean; the deviation's is smaller by sqrt(2)
        assert float(x.mean()) == pytest.approx(mean, abs=4.5 * error + tolerance)
        assert float(x.std()) == pytest.approx(std, abs=4.5 * error / math.sqrt(2) + tolerance)


@pytest.mark.parametrize("chain", [DDPM.linear(100, 1e-3, 0.2), SMLD.from_sde(VESDE(), 100)], ids=repr)
def test_a_chains_own_steps_end_near_the_data(chain: DDPM | SMLD) -> None:
    for sampler in SAMPLERS:
        if sampler != ReverseDiffusion(flow=True) and not isinstance(sampler, FixedODE):  # coarse on chains
            mean, std, _ = truth(chain.as_sde(), sampler)
            assert abs(mean - DATA_MEAN) < 0.03 and abs(std - DATA_STD) < 0.06, f"{sampler}: {mean:.3f}, {std:.3f}"


# --- mixtures


def sliced_wasserstein(x: Tensor, y: Tensor) -> float:
    """Mean distance (order 2) between the sorted projections of two sample sets of one size, on 64 directions."""
    directions = torch.nn.functional.normalize(numbers(64, x.shape[1], seed=3), dim=1).T
    return float(((x @ directions).sort(0).values - (y @ directions).sort(0).values).square().mean().sqrt())


@pytest.mark.parametrize(
    ("sde", "sampler", "steps"),
    [
        (SubVPSDE(), AdaptiveODE(1e-4, 1e-4), 1),
        (VPSDE(), DDIM(), 100),
        (VPSDE(), Ancestral(), 80),
        (VESDE(), PredictorCorrector(ReverseDiffusion(), AnnealedLangevin(snr=0.05)), 120),
        pytest.param(VPSDE(), Heun(), 60, marks=pytest.mark.slow),
        pytest.param(VESDE(), EulerMaruyama(), 400, marks=pytest.mark.slow),
        pytest.param(VPSDE(), ReverseDiffusion(), 300, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_mixture_is_sampled_with_its_weights_means_covariances_and_shape(
    sde: SDE, sampler: Sampler, steps: int
) -> None:
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    means = torch.tensor([[-2.0, 0.0], [2.0, -1.0], [1.0, 3.0]], dtype=torch.float64)
    covs = torch.tensor([[[0.3, 0.1], [0.1, 0.2]], [[0.1, 0.0], [0.0, 0.4]], [[0.5, -0.3], [-0.3, 0.4]]]).double()
    model, n = Mixture(sde, weights, means, covs), 2000
    grid = times.log_snr(sde, steps) if steps > 1 else times.uniform(sde, 1)
    x = sample(model, sampler, (n, 2), grid, seed=torch.Generator().manual_seed(5), denoise=True)

    # The components lie 6 deviations apart, so the likeliest one is the one a sample came from.
    component = torch.stack([model.log_prob(x, label=k) + weights[k].log() for k in range(3)]).argmax(0)
    # Besides 4 standard errors, discretisation and the tails of 400 steps may move a moment by 0.03.
    for k in range(3):
        y = x[component == k]
        assert abs(len(y) / n - float(weights[k])) < 4 * math.sqrt(float(weights[k] * (1 - weights[k])) / n) + 0.005
        deviations = covs[k].diagonal().sqrt()
        assert bool(((y.mean(0) - means[k]).abs() < 4 * deviations / math.sqrt(len(y)) + 0.02).all())
        error = (covs[k].square() + torch.outer(deviations, deviations).square()).sqrt() / math.sqrt(len(y))
        assert bool(((y.T.cov() - covs[k]).abs() < 4 * error + 0.03).all())

    g = torch.Generator().manual_seed(1)
    sets = [model.sample(n, g)[0] for _ in range(8)]
    between = torch.tensor([sliced_wasserstein(a, b) for a, b in pairwise(sets)])
    distance = torch.tensor([sliced_wasserstein(x, a) for a in sets]).mean()
    assert distance < between.mean() + 3 * between.std() + 0.03


# --- sample()


def first_draws(seed: int | torch.Generator, first: int, shape: tuple[int, ...], draws: int = 20) -> Tensor:
    noise = noise_source(shape, seed, first, torch.float32, torch.device("cpu"))
    return torch.stack([noise(torch.empty(shape)) for _ in range(draws)])


@pytest.mark.parametrize("shape", [(1,), (2,), (3, 4, 4), (3, 80, 80)], ids=str)
def test_draws_of_an_example_depend_on_seed_and_index_alone_bitwise(shape: tuple[int, ...]) -> None:
    together = first_draws(7, 0, (5, *shape))
    for i, size in ((0, 1), (1, 3), (4, 1)):
        assert torch.equal(first_draws(7, i, (size, *shape)), together[:, i : i + size])
    assert not torch.equal(first_draws(8, 0, (5, *shape)), together)
    assert not torch.equal(first_draws(7, 1, (5, *shape)), together)


def test_draws_are_independent_standard_normal_numbers() -> None:
    z = first_draws(0, 0, (50, 3, 4, 4), 40)
    assert kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    n = z.shape[0] * z[0, 0].numel()
    by_example = z.transpose(0, 1).flatten(1)
    assert (torch.corrcoef(by_example) - torch.eye(50)).abs().max() < 5.5 / math.sqrt(n)
    by_draw = z.flatten(1)
    assert (torch.corrcoef(by_draw) - torch.eye(40)).abs().max() < 5.5 / math.sqrt(by_draw.shape[1])


@pytest.mark.parametrize("sampler", [EulerMaruyama(), PredictorCorrector(), DDIM(), Heun(), AdaptiveODE()], ids=str)
def test_an_example_does_not_depend_on_its_batch(sampler: Sampler) -> None:
    model, grid = Mixture(VPSDE(), [1.0, 1.0], numbers(2, 3, 4, 4), 0.1), times.log_snr(VPSDE(), 20)
    grid = grid[[0, -1]] if isinstance(sampler, AdaptiveODE) else grid
    # float32 rounding, grown by 20 steps; an adaptive method's step sizes depend on the batch: its tolerance
    tolerance = 1e-3 if isinstance(sampler, AdaptiveODE) else 2e-5
    whole = sample(model, sampler, (6, 3, 4, 4), grid, seed=3, first=10, dtype=torch.float32)
    parts = [
        sample(model, sampler, (n, 3, 4, 4), grid, seed=3, first=10 + i, dtype=torch.float32)
        for i, n in ((0, 1), (1, 3), (4, 2))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=tolerance, atol=tolerance)
    again = sample(model, sampler, (6, 3, 4, 4), grid, seed=3, first=10, dtype=torch.float32)
    assert torch.equal(again, whole)


def test_a_generator_serves_the_whole_batch() -> None:
    model, grid = Gaussian(VPSDE(), MEAN, COV), times.uniform(VPSDE(), 5)

    def run(seed: int) -> Tensor:
        return sample(model, EulerMaruyama(), (4, 2), grid, seed=torch.Generator().manual_seed(seed))

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    g = torch.Generator().manual_seed(0)
    assert not torch.equal(sample(model, DDIM(), (4, 2), grid, seed=g), sample(model, DDIM(), (4, 2), grid, seed=g))


def test_samples_leave_the_global_generator_alone() -> None:
    model, grid = Gaussian(VPSDE(), MEAN, COV), times.uniform(VPSDE(), 5)
    state = torch.get_rng_state()
    sample(model, PredictorCorrector(), (4, 2), grid)
    assert torch.equal(torch.get_rng_state(), state)


class Timeless(torch.nn.Module):
    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x)


def test_dtype_and_device_are_the_models_unless_given() -> None:
    grid = times.uniform(VPSDE(), 2)
    network = torch.nn.Linear(2, 2, dtype=torch.float64)
    for model, expected in [
        (from_score(VPSDE(), lambda x, t: -x), torch.float32),
        (from_score(VPSDE(), lambda x, t: -x).given(), torch.float32),
        (Gaussian(VPSDE(), MEAN, COV), torch.float64),
        (Gaussian(VPSDE(), MEAN.float(), 1.0), torch.float32),
        (guide(from_score(VPSDE(), lambda x, t: -x), Gaussian(VPSDE(), MEAN, COV), 0.5), torch.float64),
        (from_score(VPSDE(), Timeless(network)), torch.float64),
    ]:
        assert sample(model, DDIM(), (3, 2), grid).dtype == expected
    x = sample(Gaussian(VPSDE(), MEAN, COV), DDIM(), (3, 2), grid, dtype=torch.float32, device="cpu")
    assert x.dtype == torch.float32 and x.device.type == "cpu" and not x.requires_grad


def test_denoise_returns_the_estimate_of_the_data_at_the_last_time() -> None:
    for sde in SDES:
        model, grid = Gaussian(sde, MEAN, COV), times.uniform(sde, 3)
        x, clean = (sample(model, DDIM(), (4, 2), grid, denoise=denoise) for denoise in (False, True))
        assert torch.equal(clean, model(x, grid[-1]).data)
    for chain in CHAINS:  # at a chain's end the state is clean data already, where a network has nothing to say
        model = Empirical(chain.as_sde(), numbers(3, 2))
        x, clean = (sample(model, DDIM(), (4, 2), chain.times, denoise=denoise) for denoise in (False, True))
        assert torch.equal(clean, x) and bool(x.isfinite().all())


def test_small_cases() -> None:
    model = Gaussian(VPSDE(), MEAN, COV)
    for sampler in SAMPLERS:
        assert sample(model, sampler, (1, 2), times.uniform(VPSDE(), 1)).shape == (1, 2)
        assert sample(model, sampler, (0, 2), times.uniform(VPSDE(), 2)).shape == (0, 2)
        assert bool(sample(model, sampler, (1, 2), times.uniform(VPSDE(), 3)).isfinite().all())


def test_progress_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0)
    model, grid = Gaussian(VPSDE(), MEAN, COV), times.uniform(VPSDE(), 3)
    sample(model, DDIM(), (1, 2), grid)
    assert capsys.readouterr().err == ""
    sample(model, DDIM(), (1, 2), grid, progress=True)
    assert "sampling" in capsys.readouterr().err


@pytest.mark.parametrize(
    "grid",
    [[1.0], [0.0, 1.0], [1.0, 1.0], [[1.0, 0.5]], [1.0, math.nan], [1.0, -0.1], [2.0, 1.0], None, "uniform"],
    ids=str,
)
def test_a_grid_that_does_not_fall_within_the_unit_interval_is_refused(grid: object) -> None:
    for times_ in (grid, torch.tensor(grid)) if isinstance(grid, list) else (grid,):
        with pytest.raises(ValueError, match="times must be a 1-D grid that falls from 1 to 0 or above, got"):
            sample(Gaussian(VPSDE(), MEAN, COV), DDIM(), (4, 2), times_)


def test_times_may_be_any_numbers_and_a_seed_any_integer() -> None:
    model = Gaussian(VPSDE(), MEAN, COV)

    def run(grid: object, seed: object = 3) -> Tensor:
        return sample(model, DDIM(), (2, 2), grid, seed=seed)  # type: ignore[arg-type]

    grid = [1, 0.5, 0.25]
    wanted = run(torch.tensor(grid, dtype=torch.float64))
    for same in (grid, tuple(grid), np.array(grid), np.array(grid, np.float32), torch.tensor(grid)):
        assert torch.equal(run(same), wanted)
    assert torch.equal(run(grid, np.int64(3)), wanted) and torch.equal(run(grid, torch.tensor(3)), wanted)
    chain = Gaussian(CHAINS[0].as_sde(), MEAN, COV)
    assert bool(sample(chain, DDIM(), (2, 2), torch.tensor([1, 0])).isfinite().all())
    for seed in (None, 0.5, -1, "0", np.float64(1)):
        for use in (
            lambda seed=seed: run(grid, seed),
            lambda seed=seed: log_likelihood(model, numbers(2, 2), seed=seed),
            lambda seed=seed: langevin_dynamics(model, numbers(2, 2), 0.1, 1, t=0.5, seed=seed),
            lambda seed=seed: variational_bound(model, numbers(2, 2), seed=seed),
            lambda seed=seed: chain_bound(model, numbers(2, 2), torch.tensor(grid), seed=seed, terms=1),
        ):
            with pytest.raises(ValueError, match="seed must be an integer of at least 0 .*, got"):
                use()
    with pytest.raises(ValueError, match="first must be an integer of at least 0, got -1"):
        sample(model, DDIM(), (2, 2), grid, first=-1)


def test_a_shape_without_batch_or_dimensions_is_refused() -> None:
    for shape in [(), (4,), (-1, 2)]:
        with pytest.raises(ValueError, match=r"shape must be \(B, \*shape\), a batch of states, got"):
            sample(Gaussian(VPSDE(), MEAN, COV), DDIM(), shape, times.uniform(VPSDE(), 2))


def test_scipys_solver_walks_a_trained_model_outside_of_no_grad() -> None:
    network = torch.nn.Linear(2, 2).double()
    model, x = from_score(VPSDE(), lambda x, t: -network(x)), numbers(3, 2)
    grid = torch.tensor([1.0, 0.01], dtype=torch.float64)
    end = last(AdaptiveODE(method="RK45").walk(model, x, grid, refuse))
    with torch.no_grad():
        torch.testing.assert_close(end, last(AdaptiveODE().walk(model, x, grid, refuse)), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="RK45 is scipy's and has no gradient"):
        last(AdaptiveODE(method="RK45").walk(model, x.requires_grad_(), grid, refuse))


@pytest.mark.parametrize("sampler", [FixedODE("rk4"), AdaptiveODE()], ids=str)
@pytest.mark.parametrize("chain", CHAINS, ids=repr)
def test_ode_solvers_refuse_to_end_at_clean_data_and_name_the_remedy(chain: DDPM | SMLD, sampler: Sampler) -> None:
    model = Gaussian(chain.as_sde(), MEAN, COV)
    with pytest.raises(ValueError, match=r"no slope at t = 0, where sigma = 0: end the grid above it"):
        sample(model, sampler, (4, 2), chain.times)
    assert bool(sample(model, sampler, (4, 2), chain.times[:-1], denoise=True).isfinite().all())


@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_model_that_is_not_finite_ends_the_solve(method: str) -> None:
    model = from_score(VPSDE(), lambda x, t: -x if t > 0.5 else -x * torch.nan)
    with pytest.raises(RuntimeError, match=rf"{method} gave up after .* .a slope that is not finite at t = 0"):
        sample(model, AdaptiveODE(method=method), (4, 2), times.uniform(VPSDE(), 1))


@pytest.mark.parametrize("method", ["dopri5", "RK45"])
def test_a_model_that_is_not_smooth_ends_the_solve(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("score_sde.ode.integrators.MAX_EVALUATIONS", 500)
    model = from_score(VPSDE(), lambda x, t: torch.sin(1e6 * t) * torch.sign(torch.sin(1e5 * x)))
    with pytest.raises(RuntimeError, match=f"{method} gave up after 501 evaluations .*too many; t = 0.99. was reached"):
        sample(model, AdaptiveODE(method=method), (4, 2), times.uniform(VPSDE(), 1))


# --- grids


GRIDS = [times.uniform, times.quadratic, times.log_snr, times.karras, times.arcsinh, times.skewed]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("sde", SDES, ids=name)
def test_grids_fall_from_one_to_t_min_and_are_even_in_what_they_say(sde: SDE, grid: Callable) -> None:
    t = grid(sde, 20)
    assert t.shape == (21,) and t.dtype == torch.float64
    assert t[0] == 1 and t[-1] == sde.t_min and bool((t.diff() < 0).all())
    log_snr = sde.log_snr(t)
    log_snr = torch.where(log_snr == -math.inf, -10, log_snr)  # where pure noise begins
    y = log_snr / 2 + math.log(0.8) + 0.35
    evenly = {
        times.uniform: t,
        times.quadratic: t.sqrt(),
        times.log_snr: log_snr,
        times.karras: torch.exp(-log_snr / 14),
        times.arcsinh: torch.asinh(log_snr / 4),
        times.skewed: torch.where(y < 0, 1.25 * torch.asinh(y / 1.25), 2 * torch.asinh(y / 2)),
    }[grid].diff()
    torch.testing.assert_close(evenly, evenly.mean().expand(20), rtol=1e-6, atol=1e-9)
    assert grid(sde, 1).tolist() == [1.0, sde.t_min]
    with pytest.raises(ValueError, match="a grid needs a whole number of steps, at least 1, got 0"):
        grid(sde, 0)
    with pytest.raises(ValueError, match="a whole number of steps, at least 1, got 2.5"):
        grid(sde, 2.5)


def test_a_uniform_grid_of_edms_sde_is_its_papers() -> None:
    n, low, high = 18, 0.002 ** (1 / 7), 80 ** (1 / 7)
    sde = EDMSDE()
    published = torch.tensor([(high + i / n * (low - high)) ** 7 for i in range(n + 1)], dtype=torch.float64)
    torch.testing.assert_close(sde.sigma(times.uniform(sde, n)), published)
    torch.testing.assert_close(sde.sigma(times.karras(sde, n)), published)


def test_a_grid_says_that_the_log_snr_is_infinite_at_t_min() -> None:
    for grid in (times.log_snr, times.karras, times.arcsinh, times.skewed, lambda sde, n: recommended(sde, n)[1]):
        with pytest.raises(ValueError, match=r"has no finite log SNR at t_min = 0; give it a t_min > 0"):
            grid(CHAINS[0].as_sde(), 10)


def test_a_shifted_grid_is_the_published_one_on_the_straight_path_and_has_its_levels_on_others() -> None:
    t = times.uniform(LinearSDE(t_min=1e-12), 20)
    published = 3 * t / (1 + 2 * t)  # Esser et al. 2024, eq. 23, with sqrt(m/n) = 3
    torch.testing.assert_close(times.shifted(LinearSDE(t_min=1e-12), t, 3.0), published, rtol=1e-9, atol=1e-11)
    for sde in SDES:
        even = times.uniform(sde, 20)
        torch.testing.assert_close(times.shifted(sde, even, 1.0), even, rtol=1e-7, atol=1e-9)
        for shift in (0.3, 3.0):
            moved = times.shifted(sde, even, shift)
            assert moved[0] == 1 and moved[-1] == sde.t_min and bool((moved.diff() < 0).all())
            assert bool(((moved > even) == (shift > 1))[1:-1].all())
            back = times.shifted(sde, moved, 1 / shift)
            torch.testing.assert_close(back, even, rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="shift must be above 0 and finite, got 0"):
        times.shifted(VPSDE(), times.uniform(VPSDE(), 3), 0)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_grid_may_begin_below_one(grid: Callable) -> None:
    sde = VPSDE()
    t = grid(sde, 4, start=0.4)
    assert t[0] == 0.4 and t[-1] == sde.t_min and len(t) == 5 and bool((t.diff() < 0).all())
    whole = grid(sde, 4, start=1.0)
    assert torch.equal(whole, grid(sde, 4))
    # the same rule: beginning at one of a grid's times, the steps left are the grid's own
    torch.testing.assert_close(grid(sde, 3, start=float(whole[1])), whole[1:], rtol=1e-9, atol=1e-12)
    for start in (sde.t_min, 1.5, 0.0):
        with pytest.raises(ValueError, match=rf"above the SDE's t_min = 0.001 and at most at 1, got start={start:g}"):
            grid(sde, 4, start=start)


def test_a_chain_begins_at_its_nearest_step() -> None:
    assert times.spaced(10, 4, start=0.4).tolist() == [0.4, 0.3, 0.2, 0.1]
    assert times.spaced(10, 2, start=0.44).tolist() == [0.4, 0.1] and times.spaced(10, 2, start=0.46).tolist() == [
        0.5,
        0.1,
    ]
    assert times.spaced(10, 1, start=0.01).tolist() == [0.1]
    with pytest.raises(ValueError, match="got 5 from t = 0.4"):
        times.spaced(10, 5, start=0.4)
