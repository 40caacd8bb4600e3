"""The probability flow on its circle: its slope and its solver, with steps of each example's own."""

import math
import re

import pytest
import torch
from torch import Tensor

from score_sde import DDPM, SDE, VESDE, VPSDE, Estimate, ScoreModel, Solver, log_likelihood, score_flow
from score_sde.models.closed_form import Gaussian, Mixture
from score_sde.ode import GaveUp, integrate_each
from score_sde.ode.circle import Circle, carry
from score_sde.ode.integrators import MAX_STEPS
from score_sde.samplers import EmbeddedODE, sample
from tests.oracles import SDES, name, numbers

EVERY = pytest.mark.parametrize("sde", [*SDES, DDPM.linear(200).as_sde()], ids=name)
MEAN = torch.tensor([0.3, -0.7], dtype=torch.float64)
COV = torch.tensor([[0.5, 0.3], [0.3, 1.2]], dtype=torch.float64)
START, END = torch.tensor(1e-2, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
EASY_AND_HARD = Mixture(VPSDE(), [0.5, 0.5], [[-1.0, 0.5], [1.5, 0.0]], [1e-4, 0.6])


class Rows(ScoreModel):
    """A model that counts the examples it is asked for."""

    def __init__(self, model: ScoreModel) -> None:
        super().__init__(model.sde)
        self.model, self.rows = model, 0

    def forward(self, x: Tensor, t: Tensor) -> Estimate:  # type: ignore[override]
        self.rows += len(x)
        return self.model(x, t)


@EVERY
@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_the_slope_is_the_derivative_along_the_exact_flow(sde: SDE, scale: float) -> None:
    model = Gaussian(sde, MEAN, COV)
    circle, x = Circle(model, scale), numbers(4, 2)
    for t in (0.01, 0.3, 0.9):
        now = torch.tensor(t, dtype=torch.float64)
        u, h = circle.place(now), 1e-4
        assert float(circle.time(u)) == pytest.approx(t, rel=1e-6)
        ends = []
        for v in (u - h, u + h):
            s = circle.time(v)
            ends.append(model.flow(x, now, s) / circle.radius(s))
        slope = circle.velocity(u.expand(4), x / circle.radius(now))
        torch.testing.assert_close(slope, (ends[1] - ends[0]) / (2 * h), rtol=1e-4, atol=1e-5)


@EVERY
def test_errors_follow_the_tolerance_on_every_sde(sde: SDE) -> None:
    model = Gaussian(sde, MEAN, COV)
    x, _ = model.sample(6, torch.Generator().manual_seed(0))
    truth, errors, costs = model.log_prob(x, START), [], []
    for tolerance in (1e-3, 1e-6):
        found = log_likelihood(
            model, x, probe="exact", rtol=tolerance, atol=tolerance, t_min=0.01, method="embedded",
            prior_log_prob=lambda z: model.log_prob(z, END),
        )  # fmt: skip
        errors.append(float((found.log_prob - truth).abs().max()) / 2)
        costs.append(found.nfe)
        assert errors[-1] < 20 * tolerance
    assert errors[1] < errors[0] / 20 and costs[0] < costs[1]
    torch.testing.assert_close(found.latent, model.flow(x, START, END), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sde", [VPSDE(), VESDE()], ids=name)
def test_the_log_density_has_an_error_control_of_its_own(sde: SDE) -> None:
    """Half way between two modes the state stays where it is, by any steps, and says nothing of the divergence."""
    model = Mixture(sde, [0.5, 0.5], [[-0.5, 0.2], [0.5, -0.2]], 0.02)
    x = torch.zeros(1, 2, dtype=torch.float64)
    for tolerance in (1e-4, 1e-6):
        found = log_likelihood(
            model, x, probe="exact", rtol=tolerance, atol=tolerance, t_min=0.01,
            prior_log_prob=lambda z: model.log_prob(z, END),
        )  # fmt: skip
        assert found.latent.abs().max() < 1e-12
        assert float((found.log_prob - model.log_prob(x, START)).abs()) / 2 < 20 * tolerance


def test_examples_carry_their_own_steps_and_cost() -> None:
    model = Rows(EASY_AND_HARD)
    x, _ = EASY_AND_HARD.sample(6, torch.Generator().manual_seed(0))
    settings = {"probe": "gaussian", "probes": 2, "method": "embedded", "seed": 3, "rtol": 1e-3, "atol": 1e-3}
    whole = log_likelihood(model, x, **settings)
    cost, model.rows = model.rows, 0
    alone = [log_likelihood(model, x[i : i + 1], first=i, **settings) for i in range(6)]
    for key in ("log_prob", "std_error", "latent"):
        torch.testing.assert_close(
            torch.cat([getattr(a, key) for a in alone]), getattr(whole, key), rtol=1e-9, atol=1e-9
        )
    assert model.rows == cost == sum(a.nfe for a in alone) == 6 * whole.nfe
    assert max(a.nfe for a in alone) > 1.3 * min(a.nfe for a in alone)


def test_conditions_go_with_their_examples() -> None:
    x, label = numbers(4, 2), torch.tensor([0, 1, 0, 1])
    together = log_likelihood(EASY_AND_HARD.given(label=label), x, method="embedded")
    alone = [
        log_likelihood(EASY_AND_HARD.given(label=y), x[i : i + 1], method="embedded", first=i)
        for i, y in enumerate(label.tolist())
    ]
    assert len({a.nfe for a in alone}) > 1
    torch.testing.assert_close(torch.cat([a.log_prob for a in alone]), together.log_prob, rtol=1e-9, atol=1e-9)
    model, ends = EASY_AND_HARD.given(label=label), torch.tensor([1.0, 0.01], dtype=torch.float64)
    drawn = sample(model, EmbeddedODE(), (4, 2), ends, dtype=torch.float64)
    for i, y in enumerate(label.tolist()):
        own = sample(EASY_AND_HARD.given(label=y), EmbeddedODE(), (1, 2), ends, first=i, dtype=torch.float64)
        torch.testing.assert_close(own, drawn[i : i + 1], rtol=1e-9, atol=1e-9)
    assert model.condition["label"] is label  # type: ignore[comparison-overlap]


def test_the_way_there_and_back() -> None:
    model = Gaussian(VPSDE(), MEAN, COV)
    x = numbers(3, 2)
    flow = score_flow(model, t_min=0.01, solver=Solver("embedded", 1e-8, 1e-8))
    with torch.no_grad():
        z = flow.encode(x)
        torch.testing.assert_close(z, model.flow(x, START, END), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(flow.decode(z), x, rtol=1e-6, atol=1e-6)


def test_only_slopes_that_enter_the_integral_are_asked_to_be_whole() -> None:
    """The second stage of Dormand and Prince has weight 0 in solution and error: no product with the Jacobian there."""
    asked = []

    def slopes(velocity: object, y: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(len(rows))
        return velocity(y), torch.ones(len(y), 1)  # type: ignore[operator]

    model = Gaussian(VPSDE(), MEAN, COV)
    with torch.no_grad():
        _, integral, nfe = carry(Circle(model), numbers(1, 2), 0.01, 1.0, Solver("embedded"), slopes, 1, 2)
    steps = (int(nfe) - 1) // 6
    assert len(asked) == 1 + 5 * steps and steps > 1
    ends = torch.stack([START, END])
    places, radii = Circle(model).place(ends), Circle(model).radius(ends)
    # a rate of 1 integrates to the way gone
    assert integral.item() == pytest.approx(float(places.diff()) + 2 * math.log(radii[1] / radii[0]), rel=1e-9)


def test_a_trial_step_that_overflows_is_rejected_and_a_shorter_one_taken() -> None:
    """dy/du = -k y³ has y(1) = y/sqrt(1 + 2 k y²); a first step of a tenth overshoots, and its stages overflow."""
    y, k = torch.tensor([[10.0], [3.0], [0.01]], dtype=torch.float64), 1000.0
    overflows = []

    def field(u: Tensor, y: Tensor, rows: Tensor, whole: bool) -> Tensor:
        overflows.append(not y.isfinite().all())
        return -k * y**3

    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    found = integrate_each(field, y, zero, one, rtol=1e-8, atol=1e-8)
    assert any(overflows) and found.failure == ""
    torch.testing.assert_close(found.state, y / torch.sqrt(1 + 2 * k * y**2), rtol=1e-6, atol=1e-8)


def test_an_example_without_an_end_fails_alone() -> None:
    """dy/du = y² is 1/(1/y - u): for y = 2 there is no u beyond 1/2; nor any for a slope that is NaN."""
    y = torch.tensor([[0.5], [2.0], [-1.0], [100.0]], dtype=torch.float64)

    def field(u: Tensor, y: Tensor, rows: Tensor, whole: bool) -> Tensor:
        return torch.where(y > 50, torch.where(rows[:, None] == 3, math.nan, y**2), y**2)

    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    found = integrate_each(field, y, zero, one, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found.state[[0, 2]], 1 / (1 / y[[0, 2]] - 1), rtol=1e-4, atol=0)
    assert bool(found.state[[1, 3]].isnan().all()) and found.nfe[3] == 1 and found.nfe[1] < 10_000
    answer = r"gave up on 2 of 4 examples \(1, 3\), at t = 0.5 \(steps too short to advance\) after \d+ evaluations"
    assert re.search(answer, found.failure)
    wall = integrate_each(lambda u, y, rows, whole: 1 / (u < 0.3)[:, None], y[:1], zero, one, rtol=1e-9, atol=1e-9)
    assert "at t = 0.3 (a slope that is not finite, after steps however short)" in wall.failure


class Wall(ScoreModel):
    """A model that has no estimate for states far to the right."""

    def forward(self, x: Tensor, t: Tensor) -> Estimate:  # type: ignore[override]
        e = EASY_AND_HARD(x, t)
        return e._replace(noise=e.noise / (x[:, :1] < 6))


def test_one_bad_example_costs_a_likelihood_nothing_and_is_named() -> None:
    x = numbers(4, 2)
    good = log_likelihood(EASY_AND_HARD, x, method="embedded")
    x[2] = 7
    with pytest.warns(RuntimeWarning, match=r"gave up on 1 of 4 examples \(2\), at t = 1e-05 \(a slope that is not"):
        found = log_likelihood(Wall(VPSDE()), x, method="embedded")
    kept = [0, 1, 3]
    assert bool(found.log_prob[2].isnan()) and bool(found.latent[2].isnan().all())
    torch.testing.assert_close(found.log_prob[kept], good.log_prob[kept], rtol=1e-9, atol=1e-9)
    with pytest.raises(GaveUp, match=r"gave up on 1 of 1 examples, at t"):
        log_likelihood(Wall(VPSDE()), x[2:3], method="embedded")
    with pytest.raises(GaveUp, match=r"gave up on 1 of 4 examples \(2\), at t"), torch.no_grad():
        score_flow(Wall(VPSDE()), solver=Solver("embedded")).encode(x)
    ends = torch.tensor([1.0, 0.01], dtype=torch.float64)
    with pytest.raises(GaveUp, match=r"EmbeddedODE gave up on 1 of 4 examples \(2\), at t"):
        list(EmbeddedODE().walk(Wall(VPSDE()), x, ends, lambda like: like))


def test_a_solver_without_progress_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("score_sde.ode.integrators.MAX_STEPS", 3)
    assert MAX_STEPS == 10_000
    with pytest.raises(RuntimeError, match=r"gave up on 6 of 6 examples, at t = .* \(3 steps\) after 19 evaluations"):
        log_likelihood(EASY_AND_HARD, numbers(6, 2), method="embedded")
    one = torch.ones((), dtype=torch.float64)
    nothing = integrate_each(lambda u, y, rows, whole: y, numbers(2, 2), one, one, rtol=1e-5, atol=1e-5)
    assert torch.equal(nothing.state, numbers(2, 2)) and nothing.nfe.tolist() == [0, 0]
