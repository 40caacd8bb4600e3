"""The learned schedule: its formula, what its gradients are, that it lowers the loss's variance, and where it goes."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mpmath  # torch depends on it through sympy
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from torch import Tensor

from score_sde import (
    VPSDE,
    CosineSDE,
    Heun,
    LearnedVPSDE,
    MonotoneSchedule,
    Preconditioned,
    Sampler,
    ScoreModel,
    from_score,
    guide,
    load,
    log_likelihood,
    sample,
    times,
)
from score_sde.config import default_config
from score_sde.config.build import build_sde
from score_sde.config.objective import Objective
from score_sde.data import Data, load_data
from score_sde.data.codecs import codec_of
from score_sde.losses import denoising, likelihood, simple
from score_sde.losses.time_laws import low_discrepancy, uniform_numbers
from score_sde.machine.parallel import Processes
from score_sde.models.closed_form import Gaussian, Mixture
from score_sde.models.rules import label_log_sigma
from score_sde.networks import MLP
from score_sde.tasks.step import Batches, evaluate_loss, make_state, train_step
from score_sde.tasks.train import train
from tests.oracles import DETERMINISTIC, FLOW_ORDERS, LEARNED, STOCHASTIC, bent, moments_after, numbers

ZERO_TO_ONE = torch.linspace(0, 1, 401, dtype=torch.float64)


SDE = LEARNED


# --- the curves


def test_the_schedule_is_the_papers_network() -> None:
    """A line plus sigmoids with positive weights, moved and scaled to pass through its ends; in 50 digits."""

    def softplus(y: float) -> mpmath.mpf:
        return mpmath.log(1 + mpmath.exp(y))

    def raw(t: mpmath.mpf) -> mpmath.mpf:
        units = SDE.schedule.units.T.tolist()
        sigmoids = [softplus(h) / (1 + mpmath.exp(-(softplus(w) * t + b))) for h, w, b in units]
        return softplus(SDE.schedule.slope.item()) * t + sum(sigmoids) / len(units)

    low, high = SDE.schedule.ends.tolist()
    assert low == pytest.approx(-13.3) and high == 5.0
    t = ZERO_TO_ONE[::10]
    with mpmath.workdps(50):
        first, whole = raw(0), raw(1) - raw(0)
        gamma = [low + (high - low) * (raw(mpmath.mpf(u)) - first) / whole for u in t.tolist()]
        alpha = torch.tensor([float(1 / mpmath.sqrt(1 + mpmath.exp(g))) for g in gamma], dtype=torch.float64)
        sigma = torch.tensor([float(1 / mpmath.sqrt(1 + mpmath.exp(-g))) for g in gamma], dtype=torch.float64)
    torch.testing.assert_close(SDE.alpha(t), alpha, rtol=1e-14, atol=0)
    torch.testing.assert_close(SDE.sigma(t), sigma, rtol=1e-14, atol=0)


def test_variance_is_preserved() -> None:
    assert SDE.prior_std == 1 and (SDE.alpha(ZERO_TO_ONE) ** 2 + SDE.sigma(ZERO_TO_ONE) ** 2 - 1).abs().max() < 1e-15


def test_it_starts_as_a_line_and_stays_monotone_between_its_ends_whatever_its_weights() -> None:
    schedule = MonotoneSchedule(-8.0, 3.0)
    gamma, rate = schedule(ZERO_TO_ONE)
    assert gamma.dtype == rate.dtype == torch.float64
    assert (gamma - (-8 + 11 * ZERO_TO_ONE)).abs().max() < 11e-4
    with torch.no_grad():
        for parameter in schedule.parameters():
            parameter.normal_(0, 30, generator=torch.Generator().manual_seed(0))
    gamma, rate = schedule(ZERO_TO_ONE)
    assert bool((rate > 0).all()) and bool((gamma.diff() > 0).all())
    assert [gamma[0].item(), gamma[-1].item()] == pytest.approx([-8, 3], abs=1e-12)
    inverse = LearnedVPSDE(schedule=schedule).time(-gamma)
    torch.testing.assert_close(schedule(inverse)[0], gamma, rtol=0, atol=1e-9)


def test_impossible_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gamma_min must be below gamma_max, got 5.0 and 5.0"):
        MonotoneSchedule(5.0, 5.0)
    with pytest.raises(ValueError, match="units must be at least 1, got 0"):
        MonotoneSchedule(units=0)


# --- gradients


def test_of_the_parameters_the_curves_move_the_ends_alone() -> None:
    schedule = bent(learn_ends=True)
    sde = LearnedVPSDE(schedule=schedule)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    for curve in ("alpha", "sigma", "f", "g", "log_snr"):
        grads = torch.autograd.grad(getattr(sde, curve)(t).sum(), list(schedule.parameters()), allow_unused=True)
        given = {name: g for (name, _), g in zip(schedule.named_parameters(), grads, strict=True) if g is not None}
        assert list(given) == ["ends"] and given["ends"].dtype == torch.float32

        def moved(end: int, by: float, curve: str = curve) -> float:
            ends = schedule.ends.tolist()
            ends[end] += by
            other = MonotoneSchedule(*ends, units=8)
            other.load_state_dict({**schedule.state_dict(), "ends": torch.tensor(ends)})
            return float(getattr(LearnedVPSDE(schedule=other), curve)(t).sum())

        slopes = [(moved(i, 0.125) - moved(i, -0.125)) / 0.25 for i in (0, 1)]
        np.testing.assert_allclose(given["ends"].numpy(), slopes, rtol=0.02)


def second_moment(schedule: MonotoneSchedule, error: Callable[[Tensor], Tensor]) -> Tensor:
    """E (s'(t) error(gamma(t)))² over uniform t, differentiable in the shape, by Gauss-Legendre's rule."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(200))
    value, rate, _ = schedule.shape((nodes + 1) / 2)
    low, high = schedule.ends.double()
    return (weights / 2 * (rate * error(low + (high - low) * value)) ** 2).sum()


def test_a_scalar_time_has_the_gradients_of_equal_times() -> None:
    model = Preconditioned(MLP(2, width=8).double(), LearnedVPSDE(schedule=bent(learn_ends=True)))
    x, grads = numbers(4, 2), []
    for t in (torch.tensor(0.4, dtype=torch.float64), torch.full((4,), 0.4, dtype=torch.float64)):
        e = model(x, t)
        model.zero_grad()
        (e.data.square() + e.noise.square()).sum().backward()
        grads.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    assert model.sde.module.ends.grad.abs().min() > 0
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-9)


def test_the_variance_losss_gradient_is_that_of_the_second_moment() -> None:
    """With the error a known function of gamma, the derivative goes through gamma(t): another route, the same end."""
    schedule = bent()

    def error(gamma: Tensor) -> Tensor:
        return torch.sigmoid(1.5 * gamma + 6) * torch.sigmoid(-gamma) + 0.05

    expected = torch.autograd.grad(second_moment(schedule, error), list(schedule.parameters()))
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(200))
    t = (nodes + 1) / 2
    loss = schedule.variance_loss(t, error(schedule(t)[0]))
    assert bool((loss == 0).all())  # it adds nothing to what is reported
    found = torch.autograd.grad((weights / 2 * loss).sum(), list(schedule.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(b.abs().max()))


# --- what it is for


def problem(sde: VPSDE | CosineSDE | LearnedVPSDE) -> Mixture:
    """Three narrow clusters in four dimensions: the noise levels between their width and their distance are hard."""
    means = torch.tensor([[-1.0, 0.5, 0, 0], [1.0, -0.5, 0.2, 0], [0, 1, 1, -1]], dtype=torch.float64)
    return Mixture(sde, [0.3, 0.4, 0.3], means, 0.05**2)


def losses(model: ScoreModel, first: float, last: float, n: int = 20_000) -> Tensor:
    """n draws of the diffusion term's one-sample estimate, uniform t in [first, last], in nats."""
    g = torch.Generator().manual_seed(1)
    x0, _ = problem(model.sde).sample(n, g)
    t = first + (last - first) * uniform_numbers(n, g)
    z = torch.randn(x0.shape, generator=g, dtype=torch.float64)
    with torch.no_grad():
        return (last - first) * x0.shape[1] / 2 * denoising(model, x0, t, z, likelihood)


def test_the_learned_schedule_lowers_the_measured_variance_of_the_loss() -> None:
    """Of one draw of t, noise and data, between the same ends, where the mean is the same for all schedules."""
    ends = -torch.tensor([-13.3, 5.0], dtype=torch.float64)
    measured = {}
    for sde in (VPSDE(), CosineSDE()):
        measured[type(sde).__name__] = losses(problem(sde), *sde.time(ends).tolist())
    schedule = MonotoneSchedule(units=64)
    model = problem(LearnedVPSDE(schedule=schedule))
    measured["linear"] = losses(model, 0, 1)
    optimizer = torch.optim.Adam(schedule.parameters(), lr=0.03, betas=(0.9, 0.99))
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        x0, t = model.sample(64, g)[0], low_discrepancy(64, g)
        with torch.no_grad():
            error = denoising(model, x0, t, torch.randn(x0.shape, generator=g, dtype=torch.float64), simple)
        optimizer.zero_grad()
        schedule.variance_loss(t, error).mean().backward()
        optimizer.step()
    measured["learned"] = losses(model, 0, 1)
    variance = {name: float(values.var()) for name, values in measured.items()}
    best = float(measured["learned"].mean())
    for values in measured.values():
        assert abs(values.mean() - best) < 4 * math.sqrt(float(values.var() + measured["learned"].var()) / len(values))
    assert variance["learned"] < 0.6 * variance["linear"] < 0.02 * min(variance["VPSDE"], variance["CosineSDE"])


# --- in a model


def learned_model(**options: bool) -> Preconditioned:
    torch.manual_seed(0)  # of the network's initial weights, which PyTorch draws from its global generator
    sde = LearnedVPSDE(schedule=bent(**options), t_min=1e-3)
    return Preconditioned(MLP(2, width=8, depth=1), sde, "residual", label_log_sigma)


def test_the_schedule_is_a_part_of_the_model_and_copies_with_it() -> None:
    model = learned_model()
    names = [name for name, _ in model.named_parameters() if name.startswith("schedule.")]
    assert names == ["schedule.slope", "schedule.units"] and "schedule.ends" in model.state_dict()
    twin = copy.deepcopy(model)
    assert twin.sde.module is twin.schedule is not model.schedule
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    before = model.sde.sigma(t)
    with torch.no_grad():
        twin.schedule.units[0] += 3 * numbers(8, dtype=torch.float32)
    assert torch.equal(model.sde.sigma(t), before) and not torch.allclose(twin.sde.sigma(t), before)
    assert model.sde != twin.sde
    model.load_state_dict(twin.state_dict())
    assert torch.equal(model.sde.sigma(t), twin.sde.sigma(t))
    later = replace(model.sde, t_min=0.1)
    assert later.module is model.schedule and times.uniform(later, 2).tolist() == pytest.approx([1, 0.55, 0.1])
    assert model.sde == twin.sde and model.sde != later and hash(later) != hash(twin.sde)
    assert repr(later) == "LearnedVPSDE(gamma=-13.3..5, t_min=0.1)"


def test_a_model_in_another_precision_has_the_same_curves_in_float64() -> None:
    model = learned_model()
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    before = model.sde.sigma(t)
    assert torch.equal(model.double().sde.sigma(t), before)
    assert (model.bfloat16().sde.sigma(t) / before - 1).abs().max() < 0.1 and model.sde.sigma(t).dtype == torch.float64


@pytest.mark.parametrize("sampler", [*DETERMINISTIC, *STOCHASTIC], ids=str)
def test_every_sampler_walks_a_learned_schedule(sampler: Sampler) -> None:
    """A Gaussian's law is carried from t = 1 to t_min, but for an error that finer steps reduce at the order."""
    model = Gaussian(SDE, torch.tensor([0.4], dtype=torch.float64), 0.25)
    start, end = (
        (float(SDE.alpha(t) * 0.4), float(SDE.alpha(t) ** 2 * 0.25 + SDE.sigma(t) ** 2))
        for t in torch.tensor([1.0, SDE.t_min], dtype=torch.float64)
    )
    errors = []
    for n in (40, 80):
        mean, var = moments_after(sampler, model, times.log_snr(SDE, n), *start)
        errors.append((abs(mean - end[0]), abs(math.sqrt(var) - math.sqrt(end[1]))))
    for coarse, fine in zip(*errors, strict=True):
        if coarse > 1e-9:  # the mean is exact for some
            assert math.log2(coarse / fine) == pytest.approx(FLOW_ORDERS.get(sampler, 1), abs=0.15)
    assert errors[0][1] > 1e-9


def test_the_likelihood_along_a_learned_schedule_is_the_closed_forms() -> None:
    model = Gaussian(SDE, torch.tensor([0.3, -0.7], dtype=torch.float64), torch.tensor([0.5, 0.1], dtype=torch.float64))
    x, _ = model.sample(3, torch.Generator().manual_seed(0))
    end, start = (torch.tensor(t, dtype=torch.float64) for t in (1.0, 0.0))
    settings = dict(probe="exact", t_min=0.0, rtol=1e-7, atol=1e-7, prior_log_prob=lambda z: model.log_prob(z, end))
    found = log_likelihood(model, x, **settings)
    torch.testing.assert_close(found.log_prob, model.log_prob(x, start), rtol=0, atol=1e-5)


# --- in training


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits")


def config_of(**changes: object) -> ConfigDict:
    """A few steps of a tiny U-Net on digits, with a learned schedule."""
    config = default_config()
    config.data.dataset, config.data.random_flip = "digits", False
    config.model.nf, config.model.ch_mult, config.model.num_res_blocks, config.model.attn_resolutions = 8, (1,), 1, ()
    config.model.label, config.model.rule, config.model.t_min = "log_sigma", "residual", 0.0
    config.model.fourier_features = (3, 4)
    config.training.sde, config.training.likelihood_weighting = "learned", True
    config.training.low_discrepancy, config.training.snapshot_sampling = True, False
    config.training.batch_size, config.training.n_iters, config.optim.warmup, config.optim.lr = 8, 4, 0, 0.01
    with config.unlocked():
        for key, value in changes.items():
            section, name = key.split("__")
            config[section][name] = value
    return config


ALONE = Processes(0, 1, torch.device("cpu"))


def test_the_config_says_where_the_schedule_ends() -> None:
    config = config_of(model__gamma_min=-7.0, model__gamma_max=4.0, model__learn_ends=True, model__t_min=0.01)
    sde = build_sde(config)
    assert isinstance(sde, LearnedVPSDE) and sde.t_min == 0.01
    assert sde.schedule.ends.tolist() == [-7, 4] and isinstance(sde.schedule.ends, torch.nn.Parameter)
    assert not isinstance(build_sde(config_of()).schedule.ends, torch.nn.Parameter)  # type: ignore[attr-defined]


@pytest.mark.parametrize("learn_ends", [False, True])
def test_a_step_moves_network_shape_and_ends_as_told(digits: Data, learn_ends: bool) -> None:
    config = config_of(model__learn_ends=learn_ends)
    state = make_state(config, digits.shape, torch.device("cpu"))
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    codec = codec_of(17)
    objective = Objective(state.model, config, codec)
    b = Batches(config, codec, state.model.sde).draw(digits.train, 0)
    record = train_step(state, objective, b, config)
    moved = {name for name, value in state.model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"schedule.slope", "schedule.units", "network.first.weight"} <= moved
    assert ("schedule.ends" in moved) == learn_ends
    assert all(p.grad is not None for p in state.model.parameters())  # what DistributedDataParallel asks for
    averages = state.ema.state_dict()
    for name in ("schedule.units", "schedule.slope"):
        mixed = torch.lerp(before[name], state.model.state_dict()[name], 9 / 11)
        torch.testing.assert_close(averages[name], mixed, rtol=1e-5, atol=1e-7)
    if not learn_ends:  # then the loss is the weighted error, and the shape's gradient adds nothing to it
        weighted = record.measure * 18.3  # the line's rate
        torch.testing.assert_close(record.loss, weighted, rtol=1e-3, atol=0)


def test_the_ends_follow_the_bound(digits: Data) -> None:
    """Their gradient is that of the diffusion term, through the curves, and of the end terms in closed form.

    A linear model's loss is known: with noise estimate c x, c constant, E|z - c x|² = (1 - c sigma)² + (c alpha)² m2.
    """
    config = config_of(model__learn_ends=True)
    config.data.uniform_dequantization = True
    schedule = MonotoneSchedule(-4.0, 3.0, learn_ends=True, units=8)
    sde = LearnedVPSDE(schedule=schedule)
    model = from_score(sde, lambda x, t: -0.3 * x / sde.sigma(t)[:, None].to(x))
    # The loss is quadratic in data and noise: three nodes of Gauss-Hermite's rule each, and 40 of Legendre's for t.
    hermite, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(3))
    legendre, steps = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(40))
    grid = torch.cartesian_prod(hermite, hermite, (legendre + 1) / 2)
    w = torch.cartesian_prod(weights / weights.sum(), weights / weights.sum(), steps / 2).prod(1)
    x0, z = 0.5 * grid[:, :1], grid[:, 1:2]
    loss, _ = Objective(model, config)(x0, grid[:, 2], z, z[:, None][:, :0])
    loss = w @ loss
    loss.backward()

    def bound(ends: Tensor) -> Tensor:
        nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(100))
        gamma = ends[0] + (ends[1] - ends[0]) * (nodes + 1) / 2
        alpha2, sigma2 = torch.sigmoid(-gamma), torch.sigmoid(gamma)
        error = (1 - 0.3 * sigma2.sqrt()) ** 2 + 0.09 * alpha2 * 0.25
        diffusion = (ends[1] - ends[0]) / 2 * (weights * error).sum()  # twice that in nats: a mean over dimensions
        prior = 0.25 * torch.sigmoid(-ends[1]) + torch.sigmoid(ends[1]) - 1 - torch.log(torch.sigmoid(ends[1]))
        return diffusion + prior + ends[0] + math.log(2 * math.pi * math.e)  # decoder N(x, exp(gamma_0))

    ends = torch.tensor([-4.0, 3.0], dtype=torch.float64, requires_grad=True)
    bound(ends).backward()
    assert schedule.ends.grad is not None and ends.grad is not None
    np.testing.assert_allclose(schedule.ends.grad.numpy(), ends.grad.numpy(), rtol=1e-5)  # float32 parameters
    assert loss.item() == pytest.approx(bound(ends).item(), rel=1e-6)


def test_runs_resume_and_load_with_their_schedule(digits: Data, tmp_path: Path) -> None:
    codec = codec_of(17)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    list(train(config_of(), whole, digits, codec, ALONE))
    list(train(config_of(training__n_iters=2), parts, digits, codec, ALONE))
    list(train(config_of(), parts, digits, codec, ALONE))
    t = torch.linspace(0, 1, 7, dtype=torch.float64)
    a, b, raw = load(whole), load(parts), load(whole, ema=False)
    assert all(torch.equal(v, b.state_dict()[name]) for name, v in a.state_dict().items())
    assert torch.equal(a.sde.sigma(t), b.sde.sigma(t)) and not torch.equal(a.sde.sigma(t), raw.sde.sigma(t))
    assert not torch.equal(a.sde.sigma(t), LearnedVPSDE(schedule=MonotoneSchedule()).sigma(t))
    x = sample(a, Heun(), (2, 1, 8, 8), times.log_snr(a.sde, 4))
    assert x.dtype == torch.float32 and bool(x.isfinite().all()) and not x.requires_grad


def test_held_out_loss_is_the_bounds_diffusion_term(digits: Data) -> None:
    config = config_of()
    state = make_state(config, digits.shape, torch.device("cpu"))
    value = evaluate_loss(state, config, digits.test, codec_of(17))["eval_loss"]
    assert value == pytest.approx(evaluate_loss(state, config, digits.test, codec_of(17))["eval_loss"], rel=1e-12)
    assert 0 < value < 30


def test_two_models_with_one_schedule_or_with_copies_of_it_guide_each_other() -> None:
    sde = LearnedVPSDE(schedule=MonotoneSchedule(units=16), t_min=1e-3)
    model, weak = (Gaussian(sde, torch.zeros(2), variance) for variance in (0.3, 0.5))
    twin = copy.deepcopy(weak)
    grid = times.log_snr(sde, 6)
    one, other = (sample(guide(model, w, 1.5), Heun(), (3, 2), grid) for w in (weak, twin))
    assert torch.equal(one, other)
    assert twin.sde == sde and hash(twin.sde) == hash(sde) and twin.sde is not sde and sde != VPSDE()
    assert twin.sde != LearnedVPSDE(schedule=twin.sde.schedule)  # its t_min is 0
    for part in ("slope", "units", "ends"):
        other = copy.deepcopy(weak)
        with torch.no_grad():
            getattr(other.schedule, part).add_(0.1)
        assert other.sde != sde
        words = "both models must share one SDE, got " + (
            r"LearnedVPSDE\(.* and LearnedVPSDE\(" if part == "ends" else "two of the kind .* up to .* apart, at t = "
        )
        with pytest.raises(ValueError, match=words):
            guide(model, other, 1.5)
