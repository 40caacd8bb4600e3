"""Fast solvers: their orders, the identities between them, noise, and step by step diffusers' schedulers."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from scipy.integrate import quad
from torch import Tensor

from score_sde import (
    DDIM,
    DDPM,
    EDMSDE,
    SDE,
    SMLD,
    VESDE,
    VPSDE,
    AdaptiveSDE,
    Ancestral,
    AnnealedLangevin,
    Churn,
    CosineSDE,
    DPMSolver,
    EmbeddedODE,
    EulerMaruyama,
    Heun,
    Langevin,
    Multistep,
    Preconditioned,
    Sampler,
    ScoreModel,
    Solver,
    SubVPSDE,
    UniPC,
    fit_times,
    from_score,
    guide,
    sample,
    threshold,
    times,
)
from score_sde.models.closed_form import Empirical, Gaussian, Mixture
from score_sde.models.rules import RULES
from score_sde.ode import integrate
from score_sde.ode import integrators as ode
from score_sde.ode.circle import Circle
from score_sde.samplers import adaptive, exponential
from score_sde.samplers.exponential import (
    SHORT,
    TURN,
    Point,
    advance,
    moments,
    orders,
    plan,
    point,
    predicted,
    predictions,
    weights,
)
from score_sde.sdes import like
from tests.oracles import EXPONENTIAL, FLOW_ORDERS, SDES, first_time, moments_after, name, numbers

# of NumPy's and of their own options
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning:diffusers")

close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)  # float64, a few operations

MEAN = torch.tensor([0.3, -0.7], dtype=torch.float64)
COV = torch.tensor([[0.5, 0.3], [0.3, 1.2]], dtype=torch.float64)
CHAINS: list[DDPM | SMLD] = [DDPM.linear(24, 0.003, 0.8), SMLD.from_sde(VESDE(), 24)]
FINE_CHAINS: list[DDPM | SMLD] = [DDPM.linear(100, 1e-3, 0.2), SMLD.from_sde(VESDE(), 100)]
EVERY = pytest.mark.parametrize("sde", [*SDES, *(c.as_sde() for c in CHAINS)], ids=name)

# Solvers know an SDE by its curves alone: paths on others are VP's, rescaled, which is tested for each of them.
FIRST_AND_SLOWLY_OTHERS = [SDES[0], *(pytest.param(sde, marks=pytest.mark.slow) for sde in SDES[1:4])]

ORDERS = {s: order for s, order in FLOW_ORDERS.items() if isinstance(s, EXPONENTIAL)}
OLD = {s: order for s, order in FLOW_ORDERS.items() if s not in ORDERS}  # test_samplers.py measures them on Gaussians
NOISY: list[Sampler] = [Multistep(1, eta=1), Multistep(2, eta=1), Multistep(3, eta=1), Multistep(2, eta=0.5), Churn(5)]
ALL: list[Sampler] = [*ORDERS, *NOISY, EmbeddedODE(), AdaptiveSDE(0.1, 0.1)]


def refuse(like: Tensor) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def last(states: Iterator[Tensor]) -> Tensor:
    return list(states)[-1]


def bent(sde: SDE) -> ScoreModel:
    """A model that is not linear, so that no error cancels."""
    return from_score(sde, lambda x, t: -torch.sin(2 * x) / like(sde.sigma(t), x))


def draws(seed: int = 0) -> Callable[[Tensor], Tensor]:
    """A source of noise that gives the same numbers in the same order."""
    g = torch.Generator().manual_seed(seed)
    return lambda like: torch.randn(like.shape, generator=g, dtype=like.dtype)


# --- the weights


@pytest.mark.parametrize("predict", ["data", "noise"])
@pytest.mark.parametrize("z", [1e-9, 1e-4, 0.03, 0.9, 5.0, 40.0])
def test_moments_are_the_integrals_they_claim_also_of_tiny_steps(z: float, predict: str) -> None:
    found = moments(torch.tensor(z, dtype=torch.float64), 4, predict)  # type: ignore[arg-type]
    for k, m in enumerate(found):
        power = (lambda u: 1 - u) if predict == "data" else (lambda u: u)
        exact = quad(lambda u, k=k, power=power: z * math.exp(-z * power(u)) * u**k, 0, 1, epsabs=0, epsrel=1e-13)[0]
        assert m.item() == pytest.approx(exact, rel=1e-12)


def test_a_step_to_clean_data_is_infinitely_long_and_takes_all_of_the_estimate() -> None:
    for predict in ("data", "noise"):
        (m,) = moments(torch.tensor(math.inf, dtype=torch.float64), 1, predict)  # type: ignore[arg-type]
        assert m == 1


@pytest.mark.parametrize("predict", ["data", "noise"])
def test_weights_integrate_polynomials_through_their_nodes_exactly(predict: str) -> None:
    z, nodes = torch.tensor([0.3, 2.0], dtype=torch.float64), [0.0, -0.7, 1.0, -1.5]
    for n in range(1, 5):
        w = weights(z, [torch.full((2,), c, dtype=torch.float64) for c in nodes[:n]], predict, "exact")  # type: ignore[arg-type]
        for k, m in enumerate(moments(z, n, predict)):  # type: ignore[arg-type]
            close(sum(v * c**k for v, c in zip(w, nodes, strict=False)), m)


def test_orders_are_lowered_at_the_start_and_at_the_end_of_short_grids_or_clean_ones_alone() -> None:
    sde, chain = VPSDE(), DDPM.linear(100, 1e-3, 0.2).as_sde()
    for n in (1, 2, 5, SHORT - 1):
        assert orders(point(sde, times.uniform(sde, n)), 3) == [min(3, i + 1, n - i) for i in range(n)]
    assert orders(point(sde, times.uniform(sde, SHORT)), 3) == [1, 2] + [3] * (SHORT - 2)
    to_zero = torch.linspace(1, 0, SHORT + 1, dtype=torch.float64)
    assert orders(point(chain, to_zero), 3) == [1, 2] + [3] * (SHORT - 3) + [1]
    assert orders(point(chain, to_zero[:-1]), 3) == [1, 2] + [3] * (SHORT - 5) + [2, 1]


# --- orders


def problem(sde: SDE, kind: str) -> ScoreModel:
    if kind == "gaussian":
        return Gaussian(sde, MEAN, COV)
    return Mixture(sde, [0.4, 0.6], [[-1.0, 0.5], [1.5, 0.0]], [0.3, 0.6])


@cache
def journey(sde: SDE, kind: str) -> tuple[ScoreModel, Tensor, Tensor, Tensor]:
    """(model, its two times, states at the first, where the flow takes them), where the log SNR goes from -3 to 2."""
    model, ends = problem(sde, kind), sde.time(torch.tensor([-3.0, 2.0], dtype=torch.float64))
    x = torch.hypot(sde.alpha(ends[0]), sde.sigma(ends[0])) * numbers(6, 2)
    if isinstance(model, Gaussian):
        return model, ends, x, model.flow(x, ends[0], ends[1])

    def field(t: Tensor, y: Tensor) -> Tensor:
        return sde.velocity(y, t, model.score(y, t))

    with torch.no_grad():
        y, _ = integrate(field, x, *ends.tolist(), solver=Solver("dopri8", 1e-13, 1e-13))
    return model, ends, x, y


@torch.no_grad()
def measured_order(sampler: Sampler, sde: SDE, kind: str, n: int) -> float:
    model, (t, s), x, y = journey(sde, kind)
    errors = []
    for steps in (n, 2 * n):
        grid = t + (s - t) * torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        errors.append(float((last(sampler.walk(model, x, grid, refuse)) - y).abs().mean()))
    return math.log2(errors[0] / errors[1])


GAUSSIAN = [pytest.param(sampler, "gaussian", marks=pytest.mark.slow) for sampler in ORDERS]


@pytest.mark.parametrize(("sampler", "kind"), [*((s, "mixture") for s in ORDERS | OLD), *GAUSSIAN], ids=str)
@pytest.mark.parametrize("sde", FIRST_AND_SLOWLY_OTHERS, ids=name)
def test_solvers_converge_to_the_flow_at_their_order(sde: SDE, sampler: Sampler, kind: str) -> None:
    order = (ORDERS | OLD)[sampler]
    n = {1: 40, 2: 40, 3: 80, 4: 60}[order]
    if sde is not SDES[0]:  # the cosine's log SNR is steepest where it begins: orders above 2 show on finer grids
        n = 160 if isinstance(sde, CosineSDE) and order >= 3 else 80 if order >= 3 else 50
    assert measured_order(sampler, sde, kind, n) == pytest.approx(order, abs=0.15)


def test_what_the_published_code_loses() -> None:
    """Half of the third-order term costs an order, and so do first steps of order 1 where the error there is seen."""
    assert measured_order(Multistep(3, rule="published"), VPSDE(), "gaussian", 200) == pytest.approx(2, abs=0.1)
    model, grid = bent(VPSDE()), torch.linspace(0.5, 0.1, 3, dtype=torch.float64)
    x = numbers(6, 2)
    ends = {
        n: grid[0] + (grid[-1] - grid[0]) * torch.linspace(0, 1, n + 1, dtype=torch.float64) for n in (800, 100, 200)
    }
    for single, lower, order in (
        (Multistep(3), Multistep(3, start="lower"), 3),
        (UniPC(3), UniPC(3, start="lower"), 4),
    ):
        y = last(UniPC(3).walk(model, x, ends[800], refuse))
        a, b = (
            [(last(s.walk(model, x, ends[n], refuse)) - y).abs().mean() for n in (100, 200)] for s in (single, lower)
        )
        assert math.log2(a[0] / a[1]) == pytest.approx(order, abs=0.3)
        assert math.log2(b[0] / b[1]) < order - 0.5


def test_the_embedded_pair_is_of_orders_5_and_4() -> None:
    """For data of another scale than the circle's: on its own, the errors of 16 steps are those of rounding."""
    model, (t, s), x, y = journey(VPSDE(), "gaussian")
    circle, rows = Circle(model, 0.05), torch.arange(len(x))
    a, b, start, end = circle.place(t), circle.place(s), circle.radius(t), circle.radius(s)

    def field(u: Tensor, y: Tensor, rows: Tensor, whole: bool) -> Tensor:
        return circle.velocity(u, y)

    errors, estimates = [], []
    for n in (16, 32):
        state, h = x / start, ((b - a) / n).expand(len(x))
        for i in range(n):
            u = a.expand(len(x)) + i * h
            state, error, _ = ode.trial(field, state, u, h, circle.velocity(u, state), rows)
            if i == 0:
                estimates.append(float(error.abs().mean()))
        errors.append(float((end * state - y).abs().mean()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(5, abs=0.25)
    assert math.log2(estimates[0] / estimates[1]) == pytest.approx(5, abs=0.25)  # of one step: the order 4 and one more


def test_the_embedded_pair_takes_back_steps_that_are_too_long() -> None:
    """Between narrow modes the flow turns suddenly, from smooth where it begins."""
    model = Mixture(VPSDE(), [0.5, 0.5], [[-1.0, 0.5], [1.5, 0.0]], 1e-4)
    grid, x = torch.tensor([1.0, 1e-3], dtype=torch.float64), numbers(8, 2)
    ends = [last(EmbeddedODE(tol, tol).walk(model, x, grid, refuse)) for tol in (1e-5, 1e-9)]
    assert (ends[0] - ends[1]).abs().max() < 1e-3


@pytest.mark.parametrize(("error", "accepted"), [(0.99, True), (1.0, True), (1.01, False), (2.9, False)])
def test_a_step_is_accepted_where_its_error_is_at_most_1(error: float, accepted: bool) -> None:
    """The first step's error is given, those after it vanish: a step taken back costs six evaluations more."""
    errors, starts = [error], []

    def norm(e: Tensor, old: Tensor, new: Tensor, rtol: float, atol: float) -> Tensor:
        starts.append(old.item())
        return torch.full((1,), errors.pop() if errors else 1e-3, dtype=torch.float64)

    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    field = lambda u, y, rows, whole: torch.ones_like(y)
    half = torch.full((1,), 0.5, dtype=torch.float64)
    found = ode.integrate_each(field, zero.reshape(1, 1), zero, one, rtol=1e-5, atol=1e-5, step=half, norm=norm)
    assert starts[:2] == ([0.0, pytest.approx(0.5)] if accepted else [0.0, 0.0])
    assert found.nfe.item() == 1 + 6 * len(starts) and found.state.item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("sde", "kind"),
    [
        *((sde, "gaussian") for sde in [*SDES, *(c.as_sde() for c in CHAINS)]),
        *((sde, "mixture") for sde in (VPSDE(), VESDE(), CHAINS[0].as_sde())),
        *(
            pytest.param(sde, "mixture", marks=pytest.mark.slow)
            for sde in [*SDES, *(c.as_sde() for c in CHAINS[1:])]
            if not isinstance(sde, (VPSDE, VESDE))
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else name(value),
)
def test_the_embedded_pair_keeps_its_tolerance_from_end_to_end(sde: SDE, kind: str) -> None:
    model = problem(sde, kind)
    grid = torch.tensor([1.0, max(sde.t_min, 1 / 24)], dtype=torch.float64)
    x = sde.prior_std * numbers(6, 2)
    ends = [last(EmbeddedODE(tol, tol).walk(model, x, grid, refuse)) for tol in (1e-3, 1e-5, 1e-8)]
    truth = model.flow(x, grid[0], grid[1]) if isinstance(model, Gaussian) else ends[2]
    assert (ends[2] - truth).abs().max() < 1e-6
    assert 1e-8 < (ends[1] - truth).abs().max() < 1e-3 and (ends[0] - truth).abs().max() < 0.2


# --- identities


@EVERY
def test_first_order_is_ddim_and_with_noise_ancestral_sampling(sde: SDE) -> None:
    model, x = bent(sde), numbers(6, 3, 2, 2)
    for pair in [(first_time(sde), 0.97), (0.6, 0.5), (0.3, 0.02), (0.02, 0.01)]:
        grid = torch.tensor(pair, dtype=torch.float64)
        ddim = last(DDIM().walk(model, x, grid, refuse))
        tolerance = 1e-12 * (1 + float((x / sde.alpha(grid[0])).abs().max()))
        for sampler in (Multistep(1), Multistep(1, "noise"), DPMSolver(1), DPMSolver(1, "data"), UniPC(1), UniPC(3)):
            y = last(sampler.walk(model, x, grid, refuse))  # on a grid of one step there is nothing to correct
            torch.testing.assert_close(y, ddim, rtol=1e-12, atol=tolerance)
        noisy = [last(s.walk(model, x, grid, draws())) for s in (Multistep(1, eta=1), DDIM(eta=1), Ancestral())]
        for y in noisy[:2]:
            torch.testing.assert_close(y, noisy[2], rtol=1e-12, atol=tolerance)


@pytest.mark.parametrize("make", [Multistep, UniPC])
@pytest.mark.parametrize("order", [2, 3])
def test_both_predictions_are_that_of_the_data_below_the_turn_and_of_the_noise_above(
    make: type[Multistep | UniPC], order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a walk over the turn goes on from the values before it as the other prediction would have."""
    sde, x = VPSDE(), numbers(4, 3)
    model, grid = bent(sde), sde.time(torch.linspace(-8, 4, 21, dtype=torch.float64))

    def ends(predict: str, x: Tensor, grid: Tensor) -> Tensor:
        return last(make(order, predict=predict, start="lower").walk(model, x, grid, refuse))  # type: ignore[arg-type]

    low, high = grid[sde.log_snr(grid) < TURN], grid[sde.log_snr(grid) >= TURN]
    assert torch.equal(ends("both", x, low), ends("data", x, low))
    assert torch.equal(ends("both", x, high), ends("noise", x, high))
    data, both = (list(make(order, predict=p, start="lower").walk(model, x, grid, refuse)) for p in ("data", "both"))  # type: ignore[arg-type]
    turn = int((sde.log_snr(grid[:-1]) < TURN).sum())
    assert all(torch.equal(a, b) for a, b in zip(data[:turn], both[:turn], strict=True))
    # The step after them starts from the same state, UniPC's corrected by data, and takes the same estimates' noise.
    estimates = [model(data[i - 1], grid[i]) for i in range(turn, turn - order, -1)]
    rule: Literal["exact", "b2"] = "exact" if make is Multistep else "b2"
    by: dict[str, tuple[float, Tensor]] = {}
    for kind in ("data", "noise"):
        keep, _, *row = plan(point(sde, grid), [min(order, i + 1) for i in range(20)], [kind] * 20, rule)[turn]  # type: ignore[list-item]
        by[kind] = keep, sum((w * predicted(e, kind) for w, e in zip(row, estimates, strict=True)), torch.zeros(()))  # type: ignore[arg-type]
    state = (data[turn] - by["data"][1]) / by["data"][0]
    close(both[turn], by["noise"][0] * state + by["noise"][1])
    for predict, where in (("data", math.inf), ("noise", -math.inf)):
        monkeypatch.setattr(exponential, "TURN", where)
        assert torch.equal(ends("both", x, grid), ends(predict, x, grid))


def test_where_noise_outweighs_a_direction_the_data_are_the_smoother_estimate_and_afterwards_the_noise() -> None:
    """What the turn rests on: of order p, one misses 2^(p-1) times what the other does, and the other way round."""
    sde, model = VPSDE(), Gaussian(VPSDE(), torch.zeros(1, dtype=torch.float64), 1.0)
    for order, log_snr in itertools.product((1, 2, 3), (-7.0, 7.0)):
        h, missed = 0.02, {}
        for kind in ("data", "noise"):
            grid = sde.time(log_snr + 2 * h * torch.arange(-order + 1, 2, dtype=torch.float64))
            path = [model.flow(numbers(1, 1), grid[0], t) for t in grid]
            row = plan(point(sde, grid), range(1, order + 1), [kind] * order, "exact")[-1]  # type: ignore[list-item]
            values = [predicted(model(y, t), kind) for y, t in zip(path[:-1], grid[:-1], strict=True)][::-1]  # type: ignore[arg-type]
            missed[kind] = float((advance(path[-2], values, row) - path[-1]).abs())
        worse, better = ("noise", "data") if log_snr < 0 else ("data", "noise")
        assert missed[worse] / missed[better] == pytest.approx(2 ** (order - 1), rel=0.1)


def test_a_step_that_begins_at_a_log_snr_of_minus_2_or_above_takes_the_noise() -> None:
    """What the docstrings of Multistep and UniPC say; the last time is where nothing begins."""
    sde = EDMSDE()
    grid = sde.time(torch.tensor([-9.0, -2.1, -1.9, 1.0, 9.0], dtype=torch.float64))
    assert predictions(point(sde, grid), "both") == ["data", "data", "noise", "noise"]
    ones = np.ones(2)
    assert predictions(Point(ones, ones, np.array([-1.0, 0.0])), "both") == ["noise"]
    assert predictions(point(sde, grid), "data") == ["data"] * 4


@EVERY
def test_ddim_is_eulers_method_in_sigma_over_alpha_and_the_exponential_eulers(sde: SDE) -> None:
    model, x, grid = bent(sde), numbers(6, 3), torch.linspace(0.9, 0.1, 6, dtype=torch.float64)
    y = x / sde.alpha(grid[0])
    for t, s in itertools.pairwise(grid):
        r, next_r = (sde.sigma(u) / sde.alpha(u) for u in (t, s))
        y = y + (next_r - r) * model(sde.alpha(t) * y, t).noise
    ends = [last(sampler.walk(model, x, grid, refuse)) for sampler in (DDIM(), Multistep(1), Multistep(1, "noise"))]
    for end in ends:
        torch.testing.assert_close(end, sde.alpha(grid[-1]) * y, rtol=1e-11, atol=1e-11 * (1 + float(y.abs().max())))


def test_churn_without_noise_is_heun_and_its_step_is_the_papers() -> None:
    sde, grid = EDMSDE(), torch.linspace(0.8, 0.2, 5, dtype=torch.float64)
    model, x = bent(sde), numbers(4, 3)
    assert torch.equal(last(Churn(0).walk(model, x, grid, refuse)), last(Heun().walk(model, x, grid, refuse)))
    outside = Churn(40, low=1e3, high=1e4)
    assert torch.equal(last(outside.walk(model, x, grid, refuse)), last(Heun().walk(model, x, grid, refuse)))

    # Karras et al. 2022, algorithm 2, for one of two steps; D = x + sigma² score
    z, pair = numbers(4, 3, seed=5), grid[[1, 2, 3]]
    sigma, after = sde.sigma(pair[0]), sde.sigma(pair[1])
    gamma = min(0.3 / 2, math.sqrt(2) - 1)
    raised = sigma * (1 + gamma)
    x_hat = x + (raised**2 - sigma**2).sqrt() * 1.01 * z

    def slope(y: Tensor, level: Tensor) -> Tensor:
        return (y - model(y, sde.time(-2 * level.log())).data) / level

    first = slope(x_hat, raised)
    euler = x_hat + (after - raised) * first
    expected = x_hat + (after - raised) * (first + slope(euler, after)) / 2
    found = next(Churn(0.3, inflate=1.01).walk(model, x, pair, lambda like: z))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_churn_s_interval_holds_both_of_its_ends() -> None:
    sde, grid = VPSDE(), torch.linspace(0.8, 0.2, 5, dtype=torch.float64)
    model, x, ratios = bent(sde), numbers(4, 3), (sde.sigma(grid) / sde.alpha(grid)).tolist()
    drawn: list[int] = []
    noise = lambda like: drawn.append(1) or torch.zeros_like(like)  # type: ignore[func-returns-value]
    for low, high, count in ((ratios[2], ratios[1], 2), (ratios[2], ratios[2], 1), (0.0, ratios[3], 1), (1e-9, 1e9, 4)):
        drawn.clear()
        last(Churn(1, low=low, high=high).walk(model, x, grid, noise))
        assert len(drawn) == count, (low, high)


def test_churn_never_raises_noise_above_the_prior_and_never_by_more_than_sqrt_2() -> None:
    seen: list[float] = []
    sde = VESDE()
    model = from_score(sde, lambda x, t: seen.append(float(sde.sigma(t))) or -x)  # type: ignore[func-returns-value]
    last(Churn(1e9).walk(model, numbers(2, 2), torch.tensor([1.0, 0.9, 0.8], dtype=torch.float64), torch.zeros_like))
    levels = [float(sde.sigma(torch.tensor(t, dtype=torch.float64))) for t in (1.0, 0.9, 0.8)]
    assert seen == pytest.approx([levels[0], levels[1], levels[1] * math.sqrt(2), levels[2]], rel=1e-12)


@dataclass(frozen=True, kw_only=True)
class Exploded(SDE):
    """The VE SDE that a VP one becomes in x/alpha: the same log SNR, in the same time."""

    of: SDE

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.of.sigma(t) / self.of.alpha(t)

    def f(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def g(self, t: Tensor) -> Tensor:
        return self.of.g(t) / self.of.alpha(t)

    def time(self, log_snr: Tensor) -> Tensor:
        return self.of.time(log_snr)


RESCALED = [
    *(s for s in ALL if not isinstance(s, AdaptiveSDE)),
    DDIM(),
    DDIM(0.6),
    Ancestral(),
    Heun(),
]


@pytest.mark.parametrize(
    ("vp", "sampler"),
    [
        *((VPSDE(), sampler) for sampler in RESCALED),
        *((sde, s) for sde in (SubVPSDE(), CosineSDE()) for s in (UniPC(3), Multistep(2, eta=1), Churn(5), DDIM(0.6))),
    ],
    ids=str,
)
def test_ve_and_vp_give_the_same_paths_under_their_rescaling(vp: SDE, sampler: Sampler) -> None:
    ve, grid, x = Exploded(of=vp, t_min=vp.t_min), torch.linspace(0.9, 0.05, 9, dtype=torch.float64), numbers(5, 2)
    a, b = (problem(sde, "mixture") for sde in (vp, ve))
    one = sampler.walk(a, x, grid, draws())
    other = sampler.walk(b, x / vp.alpha(grid[0]), grid, draws())
    for s, y, z in zip(grid[1:], one, other, strict=True):
        torch.testing.assert_close(y / vp.alpha(s), z, rtol=1e-9, atol=1e-9)


# --- noise


@pytest.mark.parametrize("sampler", [*ORDERS, EmbeddedODE(), DDIM(), Heun(), Multistep(3, start="lower")], ids=str)
def test_deterministic_solvers_draw_no_noise(sampler: Sampler) -> None:
    last(sampler.walk(problem(VPSDE(), "mixture"), numbers(3, 2), times.log_snr(VPSDE(), 6), refuse))


def truth(model: Gaussian, t: Tensor, s: Tensor, eta: float) -> tuple[float, float, float, float]:
    """Mean and variance at t of states that start off the marginals by 1 in the mean, and at s.

    With V the marginal variances the flow takes a deviation from the mean to sqrt(V_s/V_t) of it, and the reverse SDE,
    on average, to alpha_t V_s/(alpha_s V_t); what lies between is log-linear in eta².
    """
    sde = model.sde
    (a_t, v_t), (a_s, v_s) = (
        (sde.alpha(u), sde.alpha(u) ** 2 * model.variances[0, 0] + sde.sigma(u) ** 2) for u in (t, s)
    )
    factor = (v_s / v_t) ** ((1 - eta**2) / 2) * (a_t / a_s * v_s / v_t) ** eta**2
    mean = model.means[0, 0]
    return float(a_t * mean) + 1, float(v_t), float(a_s * mean + factor), float(v_s)


@dataclass(frozen=True)
class ImprovedEuler(Sampler):
    """The adaptive solver's step on a fixed grid."""

    def step(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, noise: Callable[[Tensor], Tensor]) -> Tensor:
        dw = (t - s).sqrt() * noise(x)
        return adaptive.improved_euler(model, x, t.expand(len(x)), s.expand(len(x)), dw)[1]


# sampler: its weak order and its eta as a solver of the reverse SDE
WEAK: dict[Sampler, tuple[int, float]] = {
    EulerMaruyama(): (1, 1.0),
    Ancestral(): (1, 1.0),
    Multistep(1, eta=1): (1, 1.0),
    Multistep(1, eta=0.5): (1, 0.5),
    Multistep(2, eta=1): (2, 1.0),
    Multistep(2, eta=0.5): (2, 0.5),
    Multistep(2, eta=1, rule="published"): (2, 1.0),
    Multistep(3, eta=1): (2, 1.0),
    ImprovedEuler(): (2, 1.0),
}


@pytest.mark.parametrize("sampler", WEAK, ids=str)
@pytest.mark.parametrize("sde", FIRST_AND_SLOWLY_OTHERS, ids=name)
def test_weak_orders_by_the_exact_recursion_of_mean_and_variance(sde: SDE, sampler: Sampler) -> None:
    model, (order, eta) = Gaussian(sde, MEAN[:1], 0.25), WEAK[sampler]
    ends = sde.time(torch.tensor([-2.0, 2.0], dtype=torch.float64))
    mean, var, *exact = truth(model, ends[0], ends[1], eta)
    errors = []
    late = sampler == Multistep(3, eta=1) or (isinstance(sampler, ImprovedEuler) and isinstance(sde, VESDE))
    n = 600 if late else 100 if sde is SDES[0] else 200  # there the second term is large
    for steps in (n, 2 * n):
        grid = ends[0] + (ends[1] - ends[0]) * torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        found = moments_after(sampler, model, grid, mean, var)
        errors.append([a - b for a, b in zip(found, exact, strict=True)])
    for coarse, fine in zip(*errors, strict=True):
        if abs(coarse) > 1e-9:  # where the reverse SDE's estimate of the data is a martingale, the mean is exact
            assert math.log2(abs(coarse / fine)) == pytest.approx(order, abs=0.15)
    assert abs(errors[0][1]) > 1e-9 and (abs(errors[0][0]) > 1e-9 or eta == 1)


def test_churn_keeps_the_marginals_to_second_order() -> None:
    """Noise is put back exactly, and the flow back down is Heun's; how much of it there is depends on the grid."""
    for sde in SDES[:4]:
        model = Gaussian(sde, MEAN[:1], 0.25)
        ends = sde.time(torch.tensor([-2.0, 2.0], dtype=torch.float64))
        mean, var, _, exact = truth(model, ends[0], ends[1], 0.0)
        errors = []
        for steps in (100, 200):
            grid = ends[0] + (ends[1] - ends[0]) * torch.linspace(0, 1, steps + 1, dtype=torch.float64)
            found = moments_after(Churn(2), model, grid, mean - 1, var)
            assert found[0] == pytest.approx(float(sde.alpha(ends[1])) * 0.3, abs=1e-9)
            errors.append(found[1] - exact)
        assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize(
    ("sde", "eta"),
    [
        *((SDES[0], eta) for eta in (0.0, 0.3, 1.0, 1.7)),
        *(
            pytest.param(sde, eta, marks=[] if eta == fast else pytest.mark.slow)
            for sde, fast in zip([*SDES[1:4], DDPM.linear(1000).as_sde()], (0.3, 1.0, 1.7, 1.7), strict=True)
            for eta in (0.0, 0.3, 1.0, 1.7)
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, float) else name(value),
)
def test_every_eta_of_the_reverse_sde_keeps_the_marginals(sde: SDE, eta: float) -> None:
    model = Gaussian(sde, MEAN[:1], 0.25)
    grid = sde.time(torch.linspace(-6, 6, 151, dtype=torch.float64))
    mean, var, _, exact = truth(model, grid[0], grid[-1], eta)
    for sampler, tolerance in ((Multistep(2, eta=eta), 1e-3), (Multistep(1, eta=eta), 0.05), (DDIM(eta), 0.05)):
        found = moments_after(sampler, model, grid, mean - 1, var)
        assert found[0] == pytest.approx(float(sde.alpha(grid[-1])) * 0.3, abs=1e-9)
        assert found[1] == pytest.approx(exact, abs=tolerance)


# --- step sizes per example


class Rows(ScoreModel):
    """Counts the examples that are evaluated."""

    def __init__(self, model: ScoreModel) -> None:
        super().__init__(model.sde)
        self.model, self.rows = model, 0

    def forward(self, x: Tensor, t: Tensor) -> Any:
        self.rows += len(x)
        return self.model(x, t)


@pytest.mark.parametrize("sampler", [EmbeddedODE(1e-4, 1e-4), AdaptiveSDE(0.1, 0.1)], ids=name)
def test_an_adaptive_examples_path_and_cost_are_its_own(sampler: Sampler) -> None:
    model = Rows(Mixture(VPSDE(), [0.5, 0.5], [[-1.0, 0.5], [1.5, 0.0]], [1e-4, 0.6]))
    grid = torch.tensor([1.0, 0.5, 1e-3], dtype=torch.float64)
    whole = sample(model, sampler, (3, 2), grid, seed=3)
    cost, model.rows = model.rows, 0
    alone, costs = [], []
    for i in range(3):
        alone.append(sample(model, sampler, (1, 2), grid, seed=3, first=i))
        costs.append(model.rows - sum(costs))
    torch.testing.assert_close(torch.cat(alone), whole, rtol=1e-9, atol=1e-9)
    assert cost == sum(costs) and len(set(costs)) > 1


def test_conditions_go_with_the_examples_of_an_adaptive_sde_solve() -> None:
    model = Mixture(VPSDE(), [0.5, 0.5], [[-1.0, 0.5], [1.5, 0.0]], [1e-4, 0.6])
    label, grid = torch.tensor([0, 1, 0, 1]), torch.tensor([1.0, 0.5, 1e-3], dtype=torch.float64)
    bound = model.given(label=label)
    for wrap in (lambda m: m, lambda m: guide(m, model, 1.5)):
        together = sample(wrap(bound), AdaptiveSDE(0.1, 0.1), (4, 2), grid, seed=3)
        for i in (1, 2):
            given = model.given(label=int(label[i]))
            alone = sample(wrap(given), AdaptiveSDE(0.1, 0.1), (1, 2), grid, seed=3, first=i)
            torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-9, atol=1e-9)
    assert bound.condition["label"] is label  # type: ignore[comparison-overlap]


def test_adaptive_sde_steps_are_the_papers() -> None:
    """Jolicoeur-Martineau et al. 2021, algorithm 1, line by line, on a path none of whose steps is rejected."""
    sde, sampler, end = VPSDE(), AdaptiveSDE(rtol=0.2, atol=0.02, safety=0.7), 1e-3
    model, x = Gaussian(sde, torch.zeros(64, dtype=torch.float64), 0.04), numbers(1, 64)
    grid, noise = torch.tensor([1.0, end], dtype=torch.float64), draws(1)
    found = last(sampler.walk(model, x, grid, draws(1)))
    past, t, h, by_past = x, 1.0, sampler.first, list[bool]()

    def increment(y: Tensor, u: float, step: float, z: Tensor) -> Tensor:
        time = torch.tensor([u], dtype=torch.float64)
        return -step * sde.reverse_drift(y, time, model.score(y, time)) + math.sqrt(step) * sde.g(time) * z

    while t > end:
        step, z = min(h, t - end), noise(x)
        euler = x + increment(x, t, step, z)
        improved = (x + euler + increment(euler, t - step, step, z)) / 2
        size = (sampler.rtol * torch.maximum(euler.abs(), past.abs())).clamp_min(sampler.atol)
        error = float(((improved - euler) / size).square().mean().sqrt())
        assert error <= 1
        by_past.append(bool((size == sampler.rtol * past.abs()).any()))
        x, past, t, h = improved, euler, t - step, sampler.safety * step * error**-sampler.exponent
    assert sum(by_past) > 5
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


def test_an_adaptive_sde_step_that_overflows_is_rejected() -> None:
    """A score of -1000 x, none beyond |x| = 5: there a first step of 0.015 throws x = 1."""
    asked = []

    def estimate(x: Tensor, t: Tensor) -> Tensor:
        beyond = (x.abs() > 5).any(1, keepdim=True)
        asked.append(bool(beyond.any()))
        return torch.where(beyond, math.inf, -1000 * x)

    grid, x = torch.tensor([0.02, 1e-3], dtype=torch.float64), torch.ones(4, 2, dtype=torch.float64)
    *_, end = AdaptiveSDE(first=0.015).walk(from_score(VPSDE(), estimate), x, grid, draws())
    assert any(asked) and bool((end.abs() < 0.15).all())


def test_the_adaptive_sde_solver_keeps_the_noise_of_rejected_steps() -> None:
    """In two dimensions many steps are rejected: drawing anew each time, variances come out almost twice too large."""
    model, n = Gaussian(VPSDE(), MEAN, COV), 500
    x = sample(model, AdaptiveSDE(0.05, 0.02), (n, 2), torch.tensor([1.0, 1e-3]), seed=torch.Generator().manual_seed(1))
    spread = COV.diagonal().sqrt()
    assert bool(((x.mean(0) - MEAN).abs() < 4 * spread / math.sqrt(n)).all())
    error = (COV.square() + torch.outer(spread, spread).square()).sqrt() / math.sqrt(n)
    assert bool(((x.T.cov() - COV).abs() < 4 * error).all())


def test_a_brownian_path_adds_up_however_it_is_cut() -> None:
    path, z = adaptive.Path(1), draws()
    row, none, yes = torch.tensor([0]), torch.tensor([False]), torch.tensor([True])

    def look(step: float, taken: Tensor) -> Tensor:
        h = torch.tensor([step], dtype=torch.float64)
        dw = path.increments(row, h, z(torch.empty(1, 50_000, dtype=torch.float64)))
        path.settle(row, h, dw, taken)
        return dw

    whole = look(1.0, none)
    half = look(0.5, none)
    quarter = look(0.25, yes)
    second = look(0.25, yes)
    torch.testing.assert_close(quarter + second, half)
    rest = look(0.5, yes)
    torch.testing.assert_close(quarter + second + rest, whole)
    assert path.pieces == [[]]
    for dw, variance in ((whole, 1.0), (half, 0.5), (quarter, 0.25), (second, 0.25), (rest, 0.5)):
        assert float(dw.var()) == pytest.approx(variance, rel=0.03)
    assert abs(float((quarter * second).mean())) < 0.006 and abs(float((half * rest).mean())) < 0.01
    look(1.0, none)
    longer = look(1.5, none)  # half a unit beyond what was seen
    assert float(longer.var()) == pytest.approx(1.5, rel=0.03)
    torch.testing.assert_close(look(1.0, yes) + look(0.5, yes), longer)


@pytest.mark.parametrize("sampler", [EmbeddedODE(), AdaptiveSDE()], ids=name)
def test_adaptive_solvers_stop_where_there_is_no_going_on(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    model = from_score(VPSDE(), lambda x, t: torch.where(like(t, x) > 0.5, -x, torch.nan))
    with pytest.raises(RuntimeError, match=rf"{name(sampler)} gave up on . of 4 examples.*, at t = 0\..* not finite"):
        sample(model, sampler, (4, 2), times.uniform(VPSDE(), 1))
    monkeypatch.setattr(adaptive, "MAX_STEPS", 5)
    monkeypatch.setattr(ode, "MAX_STEPS", 1)
    with pytest.raises(RuntimeError, match=r"gave up on 4 of 4 examples, at t = .* steps\).*; check the model"):
        sample(problem(VPSDE(), "mixture"), sampler, (4, 2), times.uniform(VPSDE(), 1))
    with pytest.raises(ValueError, match="end the grid above it"):
        chain = CHAINS[0]
        sample(Gaussian(chain.as_sde(), MEAN, COV), sampler, (4, 2), chain.times)


# --- every SDE, chain and prediction


SOME = [DPMSolver(2), DPMSolver(3, "data"), Multistep(2), Multistep(3), Multistep(3, "noise"), UniPC(2), UniPC(3, "b1")]


EVERYWHERE: list[Sampler] = [Multistep(3), UniPC(3, "b1"), Multistep(2, eta=1), Churn(5), EmbeddedODE()]
OF_DATA = [
    pytest.param(
        sde,
        sampler,
        id=f"{name(sde)}-{sampler}",
        marks=[] if sampler in EVERYWHERE or isinstance(sde, usual) else [pytest.mark.slow],
    )
    for sde in [*SDES, *(c.as_sde() for c in FINE_CHAINS)]
    for sampler in [*SOME, *NOISY, EmbeddedODE(), AdaptiveSDE(0.1, 0.1)]
    for usual in [(VPSDE, VESDE) if isinstance(sampler, AdaptiveSDE) else VPSDE]
]


@pytest.mark.parametrize(("sde", "sampler"), OF_DATA)
def test_samples_have_the_datas_mean_and_spread(sde: SDE, sampler: Sampler) -> None:
    model = Gaussian(sde, MEAN, COV)
    if isinstance(sampler, (EmbeddedODE, AdaptiveSDE)):
        grid = torch.tensor([1.0, max(sde.t_min, 0.01)], dtype=torch.float64)
    elif sde.t_min == 0 and not isinstance(sde, EDMSDE):
        grid = torch.linspace(1, 0, sde.steps + 1, dtype=torch.float64)  # type: ignore[attr-defined]
    else:
        grid = times.log_snr(sde, 40)
    n = 300
    x = sample(model, sampler, (n, 2), grid, seed=torch.Generator().manual_seed(2), denoise=True)
    spread = COV.diagonal().sqrt()
    # four standard errors, and what 40 steps of order 1 leave of a deviation
    assert bool(((x.mean(0) - MEAN).abs() < 4 * spread / math.sqrt(n) + 0.04).all())
    assert bool(((x.std(0) - spread).abs() < 4 * spread / math.sqrt(2 * n) + 0.08).all())


@pytest.mark.parametrize("sampler", ALL, ids=str)
def test_one_step_no_example_and_one_data_point(sampler: Sampler) -> None:
    for sde in (VPSDE(), CHAINS[0].as_sde()):
        model, ends = Gaussian(sde, MEAN, COV), torch.tensor([1.0, 1 / 24], dtype=torch.float64)
        assert bool(sample(model, sampler, (2, 2), ends).isfinite().all())
        assert sample(model, sampler, (0, 2), ends).shape == (0, 2)
        assert sample(model, sampler, (2, 2), ends, dtype=torch.float32).dtype == torch.float32
    if isinstance(sampler, (EmbeddedODE, AdaptiveSDE)):
        return
    point = numbers(1, 2, 3)
    for chain in CHAINS:
        for grid in (torch.tensor([1.0, 0.0]), chain.times):
            end = sample(Empirical(chain.as_sde(), point), sampler, (4, 2, 3), grid, dtype=torch.float64)
            torch.testing.assert_close(end, point.expand(4, 2, 3))


@pytest.mark.parametrize("sampler", [DPMSolver(3), Multistep(3), Multistep(2, eta=1), UniPC(3)], ids=str)
def test_what_a_network_predicts_does_not_matter(sampler: Sampler) -> None:
    """Every rule, with the network that answers what the exact model does."""
    sde = VPSDE()
    exact, grid, x = problem(sde, "mixture"), times.log_snr(sde, 6), numbers(4, 2)
    wanted = last(sampler.walk(exact, x, grid, draws()))
    for rule in RULES.values():

        class Network(torch.nn.Module):
            def forward(self, y: Tensor, label: Tensor, rule: Any = rule) -> Tensor:
                t = label / 999
                (skip, out), _ = rule(sde.alpha(t), sde.sigma(t))
                return (exact(y, t).data - like(skip, y) * y) / like(out, y)

        model = Preconditioned(Network(), sde, rule)
        torch.testing.assert_close(last(sampler.walk(model, x, grid, draws())), wanted, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("sampler", [DPMSolver(2), DPMSolver(3)], ids=str)
def test_times_may_differ_within_a_batch(sampler: Sampler) -> None:
    model, x = bent(SubVPSDE()), numbers(3, 2, 2)
    t, s = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64), torch.tensor([0.8, 0.45, 0.08], dtype=torch.float64)
    together = sampler.step(model, x, t, s, refuse)
    for i in range(3):
        close(sampler.step(model, x[i : i + 1], t[i], s[i], refuse), together[i : i + 1])


def test_evaluations_per_walk() -> None:
    sde, n = VPSDE(), 20
    for sampler, wanted in {
        DPMSolver(3): 3 * n, Multistep(2): n, Multistep(3): n + 1, Multistep(3, start="lower"): n,
        Multistep(3, eta=1): n, UniPC(2): n, UniPC(3): n + 2, UniPC(3, start="lower"): n,
    }.items():  # fmt: skip
        model = Rows(problem(sde, "gaussian"))
        last(sampler.walk(model, numbers(1, 2), times.log_snr(sde, n), draws()))
        assert model.rows == wanted, sampler


def test_settings_that_mean_nothing_are_refused() -> None:
    for wrong, words in [
        (lambda: DPMSolver(4), "order must be 1, 2 or 3, got 4"),
        (lambda: DDIM(-0.1), r"eta must be finite and at least 0 \(0: no noise, 1: ancestral sampling\), got -0.1"),
        (lambda: DDIM(math.nan), "eta must be finite and at least 0 .* got nan"),
        (lambda: Ancestral("medium"), "variance must be one of small, large, learned, got 'medium'"),  # type: ignore[arg-type]
        (lambda: Langevin(snr=-1), "an snr above 0 and at least 1 step, got snr -1 and steps 1"),
        (lambda: Langevin(norm="all"), 'norm must be "example" or "batch", got \'all\''),  # type: ignore[arg-type]
        (lambda: AnnealedLangevin(steps=0), "at least 1 step, got snr 0.16 and steps 0"),
        (lambda: UniPC(0), "order must be 1, 2 or 3, got 0"),
        (lambda: Multistep(predict="score"), "predict must be one of data, noise, both"),  # type: ignore[arg-type]
        (lambda: Multistep(2, "noise", eta=1.0), 'eta must be 0, or above with predict="data"'),
        (lambda: Multistep(eta=-1), "eta must be 0, or above"),
        (lambda: UniPC(2, "b3"), 'variant must be "b1" or "b2"'),  # type: ignore[arg-type]
        (lambda: Multistep(rule="b1"), 'rule must be "exact" or "published"'),  # type: ignore[arg-type]
        (lambda: UniPC(start="high"), 'start must be "singlestep" or "lower"'),  # type: ignore[arg-type]
        (lambda: Churn(low=2, high=1), "0 <= low <= high"),
        (lambda: Churn(-1), "churn and inflate must be at least 0"),
    ]:
        with pytest.raises(ValueError, match=words):
            wrong()


# --- grids and thresholding


@pytest.mark.parametrize(
    "sampler", [UniPC(3, start="lower"), Heun(), pytest.param(Multistep(2), marks=pytest.mark.slow)], ids=str
)
def test_a_fitted_grid_is_best_on_its_trajectories_and_better_on_others(sampler: Sampler) -> None:
    sde, n = VPSDE(), 8
    model = Mixture(sde, [0.2, 0.3, 0.5], [[-2.0, 0.0], [2.0, -1.0], [1.0, 3.0]], [0.02, 0.05, 0.01])
    grid = fit_times(model, sampler, n, (64, 2))
    assert grid.shape == (n + 1,) and grid[0] == 1 and grid[-1] == sde.t_min and bool((grid.diff() < 0).all())
    others = [g(sde, n) for g in (times.uniform, times.quadratic, times.log_snr, times.karras)]
    for seed, factor in ((0, 1.0), (7, 1.1)):  # its own trajectories, and new ones
        noise = draws(seed)
        x = (
            sample(model, Replay(), (64, 2), grid[[0, -1]], seed=0)
            if seed == 0
            else noise(torch.empty(256, 2).double())
        )
        y = last(Multistep(3).walk(model, x, times.log_snr(sde, 200), refuse))

        def distance(grid: Tensor, x: Tensor = x, y: Tensor = y) -> float:
            return float((last(sampler.walk(model, x, grid, refuse)) - y).square().mean(1).sqrt().mean())

        assert distance(grid) < factor * min(map(distance, others))


def test_a_grid_is_fitted_alike_each_time() -> None:
    model = problem(VPSDE(), "mixture")
    assert torch.equal(*(fit_times(model, DDIM(), 3, (8, 2)) for _ in range(2)))


class Replay(Sampler):
    """Leaves the state as the prior gave it."""

    def step(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, noise: Callable[[Tensor], Tensor]) -> Tensor:
        return x


def test_fitted_grids_need_a_deterministic_solver_and_noise_at_their_end() -> None:
    model = problem(VPSDE(), "gaussian")
    with pytest.raises(ValueError, match="fit_times needs a sampler that draws no noise"):
        fit_times(model, Multistep(eta=1), 4, (4, 2))
    with pytest.raises(ValueError, match="a grid needs a whole number of steps, at least 1, got 0"):
        fit_times(model, Multistep(), 0, (4, 2))
    with pytest.raises(ValueError, match=r"B of at least 1, got shape \(0, 2\)"):
        fit_times(model, Multistep(), 4, (0, 2))
    chain = Gaussian(CHAINS[0].as_sde(), MEAN, COV)
    with pytest.raises(ValueError, match="has no finite log SNR at t_min = 0"):
        fit_times(chain, Multistep(), 4, (4, 2))
    grid = fit_times(chain, Multistep(), 4, (4, 2), sde=replace(chain.sde, t_min=1 / 24))
    assert grid[-1] == 1 / 24 and len(grid) == 5


def test_dynamic_thresholding() -> None:
    sde, t = VPSDE(), torch.tensor(0.4, dtype=torch.float64)
    data = torch.stack([torch.linspace(-3, 2, 101), torch.linspace(-0.5, 0.9, 101)]).double()
    z = numbers(2, 101)
    x = sde.perturb(data, t, z)
    model = from_score(sde, lambda y, u: -z / sde.sigma(u))
    e = threshold(model, 0.9)(x, t)
    m = np.quantile(data[0].abs().numpy(), 0.9)
    close(e.data[0], data[0].clamp(-m, m) / m)
    close(e.data[1], data[1])  # all within the range: as it is
    close(sde.alpha(t) * e.data + sde.sigma(t) * e.noise, x)
    shifted = threshold(from_score(sde, lambda y, u: -z / sde.sigma(u)), 0.9, low=0.0, high=1.0)
    e = shifted(sde.perturb((data + 1) / 2, t, z), t)  # pixels in [0, 1]: the same about their middle
    close(e.data[0], (data[0].clamp(-m, m) / m + 1) / 2)
    scheduler = DPMSolverMultistepScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=100.0)
    theirs = scheduler._threshold_sample(data[:, None, None].float())[:, 0, 0]
    torch.testing.assert_close(threshold(model, 0.9)(x, t).data.float(), theirs, rtol=1e-5, atol=1e-5)
    for wrong in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"quantile must lie in \(0, 1\]"):
            threshold(model, wrong)
    for sampler in (Multistep(2), UniPC(3), DPMSolver(2)):
        y = sample(threshold(problem(sde, "mixture"), 0.9), sampler, (50, 2), times.log_snr(sde, 10), denoise=True)
        assert float(y.abs().max()) <= 1 + 1e-9


# --- diffusers, step by step: the same betas, grid, network and noise. Their schedulers compute in float32.

BETAS = {"beta_start": 1e-4, "beta_end": 0.008}  # at the usual 0.02 float32 has lost 3 digits where alpha is small
CHAIN = DDPM.linear(1000, 1e-4, 0.008)


@cache
def network() -> ScoreModel:
    return Mixture(CHAIN.as_sde(), [0.3, 0.7], numbers(2, 3, 4, 4, seed=8) / 2, [0.05, 0.2])


def follow(scheduler: Any, sampler: Sampler, steps: int, tolerance: float = 2e-5) -> None:
    """Walk both, the network evaluated where each stands, and compare all states."""
    scheduler.set_timesteps(steps)
    sde, model = CHAIN.as_sde(), network()
    grid = sde.time(-2 * scheduler.sigmas.double().log())
    noises = [numbers(2, 3, 4, 4, seed=100 + i, dtype=torch.float32) for i in range(steps)]
    x = numbers(2, 3, 4, 4, seed=9, dtype=torch.float32)
    theirs = []
    for i, t in enumerate(scheduler.timesteps):
        noise = {"variance_noise": noises[i]} if "sde" in scheduler.config.get("algorithm_type", "") else {}
        x = scheduler.step(model(x.double(), grid[i]).noise.float(), t, x, **noise).prev_sample
        theirs.append(x)
    each = iter(noises)
    start = numbers(2, 3, 4, 4, seed=9, dtype=torch.float32).double()
    ours = list(sampler.walk(model, start, grid, lambda like: next(each).double()))
    assert len(ours) == len(theirs) == steps
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.double(), rtol=tolerance, atol=tolerance * float(a.abs().max()))


@pytest.mark.parametrize("steps", [1, 5, 12, 20])
@pytest.mark.parametrize(
    ("algorithm", "order", "solver", "sampler"),
    [
        ("dpmsolver++", 1, "midpoint", Multistep(1)),
        ("dpmsolver++", 2, "midpoint", Multistep(2, rule="published")),
        ("dpmsolver++", 2, "heun", Multistep(2)),
        ("dpmsolver++", 3, "midpoint", Multistep(3, rule="published", start="lower")),
        ("dpmsolver", 2, "midpoint", Multistep(2, "noise", rule="published")),
        ("dpmsolver", 2, "heun", Multistep(2, "noise")),
        ("dpmsolver", 3, "midpoint", Multistep(3, "noise", rule="published", start="lower")),
        ("sde-dpmsolver++", 1, "midpoint", Multistep(1, eta=1)),
        ("sde-dpmsolver++", 2, "midpoint", Multistep(2, eta=1, rule="published")),
        ("sde-dpmsolver++", 2, "heun", Multistep(2, eta=1)),
        # theirs of order 3 with noise has the 0.5 of its last weight with the wrong sign
    ],
    ids=str,
)
def test_multistep_steps_are_diffusers(algorithm: str, order: int, solver: str, sampler: Sampler, steps: int) -> None:
    final = "sigma_min" if algorithm == "dpmsolver" else "zero"
    scheduler = DPMSolverMultistepScheduler(
        **BETAS, solver_order=order, algorithm_type=algorithm, solver_type=solver,
        final_sigmas_type=final, timestep_spacing="linspace",
    )  # fmt: skip
    follow(scheduler, sampler, steps)


@pytest.mark.parametrize("predict", ["data", "noise"])
@pytest.mark.parametrize("variant", ["b1", "b2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_steps_are_diffusers(order: int, variant: Any, predict: Any) -> None:
    for steps, final in ((1, "sigma_min"), (5, "sigma_min"), (12, "sigma_min"), (12, "zero"), (20, "sigma_min")):
        if final == "zero" and (variant == "b1" or predict == "noise"):
            continue  # theirs is NaN there
        scheduler = UniPCMultistepScheduler(
            **BETAS, solver_order=order, solver_type=f"bh{variant[1]}",
            predict_x0=predict == "data", final_sigmas_type=final, timestep_spacing="trailing",
            lower_order_final=steps < SHORT,
        )  # fmt: skip
        follow(scheduler, UniPC(order, variant, predict, start="lower"), steps)


@pytest.mark.parametrize("order", [2, 3])
def test_deis_is_multistep_with_noise_prediction(order: int) -> None:
    scheduler = DEISMultistepScheduler(**BETAS, solver_order=order)
    scheduler.set_timesteps(12)
    scheduler.sigmas[-1] = 0.01  # at their default 0 its logarithm is not finite
    follow(scheduler, Multistep(order, "noise", start="lower"), 12)


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("steps", [1, 6, 20])
def test_heuns_steps_are_diffusers(steps: int, karras: bool) -> None:
    """Theirs walks x/alpha, and yields also the middle of each step."""
    scheduler = HeunDiscreteScheduler(**BETAS, beta_schedule="linear", use_karras_sigmas=karras)
    scheduler.set_timesteps(steps)
    sde, model = CHAIN.as_sde(), network()
    sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1:-1:2], scheduler.sigmas[-1:]])
    grid = sde.time(-2 * sigmas.double().log())
    y = float(sigmas[0]) * numbers(2, 3, 4, 4, seed=9, dtype=torch.float32)
    ours = Heun().walk(model, sde.alpha(grid[0]) * y.double(), grid, refuse)
    for i, t in enumerate(scheduler.timesteps):
        level = sigmas[(i + 1) // 2]
        alpha = torch.rsqrt(1 + level**2)
        here = (y * alpha).double()
        y = scheduler.step(model(here, sde.time(-2 * level.double().log())).noise.float(), t, y).prev_sample
        if i % 2 == 1 or i == len(scheduler.timesteps) - 1:
            s = grid[(i + 1) // 2 + (i % 2 == 0)]
            found = next(ours) / sde.alpha(s)
            torch.testing.assert_close(found, y.double(), rtol=5e-5, atol=5e-5 * float(y.abs().max()))


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_and_ddpm_steps_are_diffusers(eta: float) -> None:
    steps = 20
    model = network()
    ddim = DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="leading")
    ddpm = DDPMScheduler(**BETAS, clip_sample=False, timestep_spacing="leading")
    large = DDPMScheduler(**BETAS, clip_sample=False, timestep_spacing="leading", variance_type="fixed_large")
    for scheduler, sampler in (
        (ddim, DDIM(eta)),
        (ddpm, Ancestral()),
        (ddpm, Multistep(1, eta=1)),
        (large, Ancestral("large")),
    ):
        scheduler.set_timesteps(steps)
        grid = torch.cat([(scheduler.timesteps + 1) / 1000, torch.zeros(1)]).double()
        x = numbers(2, 3, 4, 4, seed=9, dtype=torch.float32)
        noises = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) for i in range(steps)]
        each = iter(noises)
        ours = sampler.walk(model, x.double(), grid, lambda like, each=each: next(each).double())
        for i, t in enumerate(scheduler.timesteps):
            options = {"eta": eta} if scheduler is ddim else {}
            g = torch.Generator().manual_seed(i)
            x = scheduler.step(model(x.double(), grid[i]).noise.float(), t, x, generator=g, **options).prev_sample
            torch.testing.assert_close(next(ours), x.double(), rtol=2e-5, atol=2e-5 * float(x.abs().max()))
