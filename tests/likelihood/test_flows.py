"""Flows: densities equal to closed forms, gradients three ways, memory, regularisers, and training."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.flows import peak_saved_bytes
from examples import flows as example
from score_sde import (
    DDPM,
    SDE,
    VESDE,
    VPSDE,
    Flow,
    LinearSDE,
    NetworkVelocity,
    Preconditioned,
    Solver,
    TrigonometricSDE,
    log_likelihood,
    score_flow,
)
from score_sde.likelihood.flows import Evaluation, ProbabilityFlow, straightness
from score_sde.models.closed_form import Gaussian
from score_sde.networks import MLP, UNet
from score_sde.ode import integrate
from tests.oracles import name, numbers

A = torch.tensor([[0.6, -1.1, 0.2], [0.9, -0.4, 0.5], [-0.3, 0.1, 0.7]], dtype=torch.float64)
TIGHT = Solver("dopri8", 1e-9, 1e-9)
KINDS = pytest.mark.parametrize("gradient", ["backprop", "adjoint"])


class Linear(nn.Module):
    """v = A x."""

    def __init__(self, a: Tensor = A) -> None:
        super().__init__()
        self.a = nn.Parameter(a.clone())

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return x @ self.a.T


class Bent(nn.Module):
    """A field that depends on t, with parameters and a Jacobian that is neither symmetric nor constant."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.w = nn.Parameter(0.8 * numbers(4, 3, seed=1, dtype=dtype))
        self.u = nn.Parameter(0.8 * numbers(3, 4, seed=2, dtype=dtype))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w.T + t) @ self.u.T


def small_network(dtype: torch.dtype = torch.float32) -> MLP:
    """An MLP in the plane, moved off its start at zero velocity."""
    torch.manual_seed(0)
    network = MLP(2, width=16, depth=2)
    for p in network.parameters():
        nn.init.normal_(p, std=0.3)
    return network.to(dtype)


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


def gradients(flow: Flow, loss: Callable[[Flow], Tensor]) -> Tensor:
    """The loss's gradient in all parameters, as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss(flow), list(flow.parameters()))])


# --- truth


@pytest.mark.parametrize(
    "solver", [Solver("dopri5", 1e-8, 1e-8), Solver("rk4", steps=16), Solver("RK45", 1e-8, 1e-8)], ids=str
)
def test_a_linear_field_carries_a_gaussian_and_goes_both_ways(solver: Solver) -> None:
    """x at t1 is exp(A T) x, so x at t0 is N(0, (exp(A T)ᵀ exp(A T))⁻¹)."""
    flow, x = Flow(Linear(), t0=-0.2, t1=0.6, solver=solver), numbers(5, 3)
    m = torch.matrix_exp(0.8 * A)
    truth = torch.distributions.MultivariateNormal(torch.zeros(3).double(), precision_matrix=m.T @ m)
    with torch.no_grad():
        found = flow.evaluate(x, probe="rademacher", probes=3)  # the trace alone differs, by a constant
        torch.testing.assert_close(found.latent, x @ m.T, rtol=0, atol=1e-6)
        log_prob = flow.log_prob(x)
        torch.testing.assert_close(log_prob, truth.log_prob(x), rtol=0, atol=2e-6)
        z = flow.encode(x)
        torch.testing.assert_close(z, x @ m.T, rtol=0, atol=1e-6)
        torch.testing.assert_close(flow.decode(z), x, rtol=0, atol=1e-6)
        half = flow.path(x, [-0.2, 0.2, 0.6])
        torch.testing.assert_close(half[1], x @ torch.matrix_exp(0.4 * A).T, rtol=0, atol=1e-6)
        # from the middle on it is a flow too, whose data are the states there
        later = flow.replace(t0=0.2).log_prob(half[1])
        torch.testing.assert_close(later, log_prob - 0.4 * A.trace(), rtol=0, atol=2e-6)


def test_samples_are_decoded_draws_of_the_base_and_belong_to_their_seed() -> None:
    flow = Flow(Linear(), t0=0.0, t1=0.8, solver=TIGHT)
    x = flow.replace(solver=Solver("rk4", steps=8)).sample((20_000, 3), seed=torch.Generator().manual_seed(1))
    assert x.dtype == torch.float64 and not x.requires_grad
    m = torch.matrix_exp(0.8 * A)
    cov = torch.linalg.inv(m.T @ m)
    assert relative(torch.cov(x.T), cov) < 4 * math.sqrt(4 / 20_000)
    whole = flow.sample((4, 3), seed=5)
    torch.testing.assert_close(flow.sample((2, 3), seed=5, first=2), whole[2:], rtol=1e-7, atol=1e-7)
    single = Flow(lambda t, x: -x, solver=TIGHT).sample((4, 3), seed=5)
    assert single.dtype == torch.float32


@pytest.mark.parametrize("probe", ["exact", "rademacher", "gaussian"])
@pytest.mark.parametrize("method", ["dopri5", "embedded"])
@pytest.mark.parametrize("sde", [VPSDE(), LinearSDE(), VESDE()], ids=name)
def test_samples_come_with_the_log_density_that_they_have(sde: SDE, method: str, probe: Any) -> None:
    """A Gaussian's, whose divergence is the same everywhere: with probes right on average, over all signs of one."""
    model = Gaussian(
        sde, torch.tensor([0.3, -0.2], dtype=torch.float64), torch.tensor([[0.5, 0.3], [0.3, 1.2]]).double()
    )
    one, late = torch.ones((), dtype=torch.float64), torch.tensor(0.05, dtype=torch.float64)
    flow = score_flow(model, t_min=0.05, solver=Solver(method, 1e-7, 1e-7))
    n = 4 if probe == "exact" else 600
    x, log_prob = flow.sample((n, 2), seed=3, log_prob=True, probe=probe)
    torch.testing.assert_close(x, flow.sample((n, 2), seed=3), rtol=0, atol=1e-5)
    z = model.flow(x, late, one)
    truth = model.log_prob(x, late) - model.log_prob(z, one) + sde.prior_log_prob(z)  # the start is the prior's
    error = log_prob - truth
    if probe == "exact":
        assert error.abs().max() < 1e-5
    else:
        assert error.std() > 0.05 and abs(error.mean()) < 4 * error.std() / math.sqrt(n)


def test_samples_log_density_is_their_own_whatever_the_batch() -> None:
    flow = score_flow(Gaussian(VPSDE(), torch.zeros(2).double(), 0.5), t_min=0.05, solver=Solver("embedded"))
    whole, part = (flow.sample((n, 2), seed=3, first=f, log_prob=True, probe="gaussian") for n, f in ((6, 0), (2, 4)))
    for a, b in zip(whole, part, strict=True):
        torch.testing.assert_close(a[4:], b, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="unknown probe 'sine'"):
        flow.sample((2, 2), log_prob=True, probe="sine")


def test_straightness_is_nought_on_straight_paths_and_the_energy_s_excess_on_others() -> None:
    """x_t = x_0 + t v is straight; x' = x bends by integral |x|² - |x_1 - x_0|²/T, known in closed form."""
    x = numbers(4, 3)
    still = Flow(lambda t, y: torch.ones_like(y) * 0.7, t0=0.0, t1=2.0, solver=TIGHT)
    assert straightness(still, x).abs().max() < 1e-9
    bent = straightness(Flow(lambda t, y: y, t0=0.5, t1=2.0, solver=TIGHT), x)
    t, square = 1.5, x.square().sum(1)
    torch.testing.assert_close(
        bent, square * ((math.exp(2 * t) - 1) / 2 - (math.exp(t) - 1) ** 2 / t), rtol=1e-7, atol=0
    )
    # data in one point are reached on straight lines along the straight path, and on no other
    for sde, straight in ((LinearSDE(), True), (TrigonometricSDE(), False)):
        point = Gaussian(sde, torch.tensor([0.3, -0.2], dtype=torch.float64), 1e-12)
        flow = Flow(ProbabilityFlow(point), t0=0.05, t1=1.0, solver=TIGHT, sde=sde)
        assert (straightness(flow, flow.decode(numbers(4, 2))).max() < 1e-6) == straight


def test_a_base_of_its_own_is_used() -> None:
    base = torch.distributions.Laplace(torch.zeros(3).double(), 2.0)
    draws = lambda shape, noise: 2 + noise(torch.empty(shape))
    flow = Flow(lambda t, x: 0.3 * x, lambda z: base.log_prob(z).sum(1), draws, solver=TIGHT)
    x, grow = numbers(5, 3), math.exp(0.3)
    torch.testing.assert_close(flow.log_prob(x), base.log_prob(grow * x).sum(1) + 0.9, rtol=0, atol=1e-8)
    assert abs(float(flow.sample((4000, 3), dtype=torch.float64).mean()) - 2 / grow) < 4 / math.sqrt(12_000)


@pytest.mark.parametrize("shape", [(3,), (1, 2, 2), (2, 1, 2, 2)], ids=str)
def test_any_rank_and_an_empty_batch(shape: tuple[int, ...]) -> None:
    rates = 0.5 * numbers(*shape, seed=3)
    flow, x = Flow(lambda t, x: rates * x, solver=TIGHT), numbers(4, *shape)
    z = x * rates.exp()
    truth = torch.distributions.Normal(0.0, 1.0).log_prob(z).flatten(1).sum(1) + rates.sum()
    for probe in ("exact", "rademacher"):  # exact for a diagonal Jacobian
        found = flow.evaluate(x, probe=probe, kinetic=True, jacobian=True)
        torch.testing.assert_close(found.log_prob, truth, rtol=0, atol=1e-8)
        torch.testing.assert_close(found.latent, z, rtol=0, atol=1e-8)
    none = flow.evaluate(x[:0], kinetic=True)
    assert none.log_prob.shape == none.kinetic.shape == (0,) and none.nfe == 0
    assert flow.encode(x[:0]).shape == (0, *shape)


def test_a_field_that_moves_all_points_alike_keeps_the_density() -> None:
    shift = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    flow, x = Flow(lambda t, x: shift.expand(x.shape), solver=TIGHT), numbers(4, 3)
    torch.testing.assert_close(flow.log_prob(x), Flow(lambda t, x: 0 * x).log_prob(x + shift), rtol=0, atol=1e-8)


def test_networks_take_one_label_for_the_batch() -> None:
    torch.manual_seed(0)
    unet = UNet(1, width=8, multipliers=(1, 2), blocks=1, attention=(4,), image_size=8, dropout=0.0, init_scale=1.0)
    for network, x in ((small_network(), numbers(3, 2).float()), (unet, numbers(3, 1, 8, 8).float())):
        t = torch.tensor(0.3)
        torch.testing.assert_close(NetworkVelocity(network)(t, x), network(x, (10 * t).expand(3)))
        torch.testing.assert_close(NetworkVelocity(network, scale=999.0)(t, x), network(x, (999 * t).expand(3)))


# --- one path for both likelihoods


@pytest.mark.parametrize("sde", [VESDE(), DDPM.from_sde(VPSDE(), 50).as_sde()], ids=name)
def test_a_score_model_is_a_flow_with_its_likelihood(sde: SDE) -> None:
    model = Gaussian(sde, [0.3, -0.7], [[0.5, 0.3], [0.3, 1.2]])
    x, _ = model.sample(6, torch.Generator().manual_seed(0))
    end, start = torch.tensor(1.0, dtype=torch.float64), torch.tensor(1e-3, dtype=torch.float64)
    flow = score_flow(model, base=lambda z: model.log_prob(z, end), t_min=1e-3, solver=Solver(rtol=1e-5, atol=1e-5))
    torch.testing.assert_close(flow.log_prob(x), model.log_prob(x, start), rtol=0, atol=5e-4)
    z = flow.encode(x)
    torch.testing.assert_close(z, model.flow(x, start, end), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(flow.decode(z), x, rtol=0, atol=1e-3)
    flow = flow.replace(solver=Solver(rtol=1e-4, atol=1e-4))
    drawn = flow.sample((4000, 2), seed=torch.Generator().manual_seed(0))
    assert float((drawn.mean(0) - torch.tensor([0.3, -0.7])).abs().max()) < 0.1
    assert relative(torch.cov(drawn.T), torch.tensor([[0.5, 0.3], [0.3, 1.2]]).double()) < 0.1
    coarse = Solver(rtol=1e-2, atol=1e-2)
    same = log_likelihood(model, x, probe="gaussian", probes=2, seed=4, method="dopri5", rtol=1e-2, atol=1e-2)
    found = score_flow(model, solver=coarse).evaluate(x, probe="gaussian", probes=2, seed=4)
    for key in ("log_prob", "std_error", "latent", "nfe"):
        torch.testing.assert_close(getattr(found, key), getattr(same, key), rtol=0, atol=0)


def test_a_score_models_likelihood_has_its_parameters_gradient() -> None:
    network = small_network(torch.float64)
    model = Preconditioned(network, VPSDE(), label=lambda alpha, sigma, t: t)  # smooth in t: few evaluations
    flow, x = score_flow(model, t_min=0.1, solver=Solver("rk4", steps=10)), 0.5 * numbers(3, 2)
    adjoint = flow.replace(solver=Solver("rk4", steps=10, gradient="adjoint"))
    found = [gradients(f, lambda f: f.log_prob(x).mean()) for f in (flow, adjoint)]
    parameters = list(network.parameters())
    direction = [numbers(*p.shape, seed=i) for i, p in enumerate(parameters)]
    step, values = 1e-4, []
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(parameters, direction):
                p.add_(d, alpha=sign * step)
            values.append(flow.log_prob(x).mean())
    slope = (values[0] - values[1]) / (2 * step)
    for gradient in found:
        assert float(gradient @ torch.cat([d.flatten() for d in direction])) == pytest.approx(float(slope), rel=1e-3)


# --- gradients


def regularised(found: Evaluation) -> Tensor:
    assert found.kinetic is not None and found.jacobian is not None
    return (0.3 * found.kinetic + 0.2 * found.jacobian - found.log_prob).mean()


LOSSES: dict[str, Callable[[Flow], Tensor]] = {
    "probes": lambda f: f.log_prob(numbers(4, 3), probe=numbers(2, 4, 3, seed=5)).mean(),
    "regularised": lambda f: regularised(f.evaluate(numbers(4, 3), kinetic=True, jacobian=True)),
    "path": lambda f: (f.path(numbers(4, 3), [0.0, 0.4, 1.0]) * numbers(3, 4, 3, seed=6)).sum(),
    "decoded": lambda f: f.decode(numbers(4, 3)).square().sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_backprop_and_the_adjoint_agree(loss: str) -> None:
    flow = Flow(Bent())
    fine = gradients(flow.replace(solver=Solver("rk4", steps=16)), LOSSES[loss])
    for method, steps, error in (("rk4", 8, 1e-3), ("dopri5", None, 1e-3)):
        for gradient in ("backprop", "adjoint"):
            solver = Solver(method, 1e-5, 1e-5, steps, gradient)  # type: ignore[arg-type]
            found = gradients(flow.replace(solver=solver), LOSSES[loss])
            assert relative(found, fine) < error, (method, gradient)


@KINDS
def test_gradients_are_the_derivatives(gradient: str) -> None:
    """By finite differences, in x and parameters; of fixed steps by backprop exactly, else to the solver's error.

    Of a sum of all results, each entry with a weight of its own.
    """
    velocity, e = Bent(), numbers(2, 2, 3, seed=5)
    solver = Solver("rk4", steps=4) if gradient == "backprop" else Solver("rk4", steps=10, gradient="adjoint")
    flow = Flow(velocity, solver=solver)

    def weighted(x: Tensor, w: Tensor, u: Tensor) -> Tensor:
        found = flow.evaluate(x, probe=e, kinetic=True, jacobian=True)
        assert found.kinetic is not None and found.jacobian is not None
        parts = found.log_prob, found.kinetic, found.jacobian, found.latent.flatten()
        return torch.cat(parts) @ numbers(12, seed=7)

    x, error = numbers(2, 3).requires_grad_(), 1e-6 if gradient == "backprop" else 1e-4
    assert torch.autograd.gradcheck(weighted, (x, velocity.w, velocity.u), atol=error, rtol=error, fast_mode=True)


@KINDS
def test_single_precision_trains_too(gradient: str) -> None:
    """The state is solved in float64, and gradients come back in the parameters' float32."""
    x = numbers(4, 3)
    exact = gradients(Flow(Bent(), solver=Solver("rk4", steps=20)), lambda f: f.log_prob(x).mean())
    flow = Flow(Bent(torch.float32), solver=Solver("rk4", steps=20, gradient=gradient))  # type: ignore[arg-type]
    found = gradients(flow, lambda f: f.log_prob(x.float()).mean())
    assert found.dtype == torch.float32 and relative(found.double(), exact) < 1e-4


@KINDS
def test_frozen_parameters_stay_and_nothing_is_kept_without_gradients(gradient: str) -> None:
    velocity = Bent()
    velocity.w.requires_grad_(False)
    flow = Flow(velocity, solver=Solver("rk4", steps=4, gradient=gradient))  # type: ignore[arg-type]
    flow.log_prob(numbers(4, 3)).mean().backward()
    assert velocity.w.grad is None and velocity.u.grad is not None
    with torch.no_grad():
        found = flow.evaluate(numbers(4, 3), kinetic=True, jacobian=True)
    assert not any(v.requires_grad for v in found if isinstance(v, Tensor))


def test_evaluations_of_the_adjoint_cost_no_memory() -> None:
    """Bytes that autograd keeps alive at the worst moment of a forward and backward pass, counted exactly."""
    velocity, x = NetworkVelocity(small_network()), numbers(32, 2).float()
    peaks = {}
    for gradient in ("backprop", "adjoint"):
        for steps in (2, 4):
            flow = Flow(velocity, solver=Solver("rk4", steps=steps, gradient=gradient))  # type: ignore[arg-type]
            peaks[gradient, steps] = peak_saved_bytes(lambda flow=flow: flow.log_prob(x).mean().backward())
    assert peaks["backprop", 4] == pytest.approx(2 * peaks["backprop", 2], rel=0.1)
    assert peaks["adjoint", 4] == peaks["adjoint", 2]
    assert peaks["adjoint", 4] < peaks["backprop", 4] / 8


# --- estimates and regularisers


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_hutchinsons_estimates_are_unbiased(probe: str) -> None:
    """Of the trace and of |J|², by 4 standard errors over 20,000 probes of one example each."""
    x, n = numbers(1, 3), 20_000
    flow = Flow(Bent(), solver=Solver("rk4", steps=5))
    with torch.no_grad():
        exact = flow.evaluate(x, jacobian=True, kinetic=True)
        found = flow.evaluate(x.expand(n, 3), probe=probe, seed=torch.Generator().manual_seed(1), jacobian=True)  # type: ignore[arg-type]
    assert found.jacobian is not None and exact.jacobian is not None and found.kinetic is None
    for values, truth in ((found.log_prob, exact.log_prob), (found.jacobian, exact.jacobian)):
        assert abs(float(values.mean() - truth)) < 4 * float(values.std()) / math.sqrt(n)
        assert float(values.std()) > 0.1


@pytest.mark.parametrize("probes", [1, 3])
def test_regularisers_of_a_linear_field_have_their_closed_forms(probes: int) -> None:
    """|J|² = |A|² for all x, estimated by |eᵀ A|²; |v|² = |A exp(A t) x|²: a Lyapunov integral of AᵀA."""
    x, span = numbers(4, 3), 0.7
    flow = Flow(Linear(), t0=0.0, t1=span, solver=TIGHT)
    # d/dt of exp(Aᵀt) P exp(At) is exp(Aᵀt) AᵀA exp(At) for AᵀP + PA = AᵀA
    eye = torch.eye(3, dtype=torch.float64)
    p = torch.linalg.solve(
        torch.kron(A.T.contiguous(), eye) + torch.kron(eye, A.T.contiguous()), (A.T @ A).flatten()
    ).reshape(3, 3)
    m = torch.matrix_exp(span * A)
    energy = torch.einsum("bi,ij,bj->b", x, m.T @ p @ m - p, x)
    e = numbers(probes, 4, 3, seed=2)
    with torch.no_grad():
        exact = flow.evaluate(x, kinetic=True, jacobian=True)
        found = flow.evaluate(x, probe=e, kinetic=True, jacobian=True)
        alone = flow.evaluate(x, jacobian=True)
    for values, norm in ((exact, A.square().sum().expand(4)), (found, (e @ A).square().sum(2).mean(0))):
        torch.testing.assert_close(values.kinetic, energy, rtol=0, atol=1e-6)
        torch.testing.assert_close(values.jacobian, span * norm, rtol=0, atol=1e-6)
    assert alone.kinetic is None
    torch.testing.assert_close(alone.jacobian, exact.jacobian, rtol=0, atol=1e-6)
    truth = flow.evaluate(x).log_prob
    torch.testing.assert_close(exact.log_prob, truth, rtol=0, atol=1e-6)


class Changing(nn.Module):
    """v = (A_0 + t A_1 + t² A_2) x."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.stack([start, 0 * start, 0 * start]))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return x @ torch.einsum("k,kij->ji", t ** torch.arange(3, dtype=t.dtype), self.a)


@pytest.mark.slow
def test_kinetic_energy_leads_to_optimal_transport() -> None:
    """Between N(0, C) and N(0, I), whose squared Wasserstein distance is tr C + 2 - 2 tr sqrt(C).

    A rotation costs no likelihood: started with one, maximum likelihood keeps it, and the kinetic energy takes it away.
    """
    cov = torch.tensor([[2.0, 1.2], [1.2, 1.5]], dtype=torch.float64)
    root = torch.linalg.cholesky(cov)
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    x = corners @ root.T  # of covariance C exactly: enough for a linear field, whose losses are quadratic
    distance = cov.trace() + 2 - 2 * torch.linalg.eigvalsh(cov).sqrt().sum()

    def fitted(weight: float) -> Evaluation:
        velocity = Changing(torch.tensor([[0.0, 3.0], [-3.0, 0.0]], dtype=torch.float64))
        flow = Flow(velocity, solver=Solver("rk4", steps=6))
        steps = 30 if weight else 15
        optimizer = torch.optim.LBFGS(velocity.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            result = flow.evaluate(x, kinetic=True)
            assert result.kinetic is not None
            value = (weight * result.kinetic - result.log_prob).mean()
            value.backward()
            return value

        optimizer.step(loss)  # type: ignore[arg-type]
        with torch.no_grad():
            return flow.replace(solver=Solver(rtol=1e-5, atol=1e-5)).evaluate(x, kinetic=True)

    free, short = fitted(0.0), fitted(0.02)
    entropy = math.log(2 * math.pi * math.e) + torch.logdet(cov) / 2
    assert free.kinetic is not None and short.kinetic is not None
    torch.testing.assert_close(-free.log_prob.mean(), entropy, rtol=0, atol=1e-3)
    torch.testing.assert_close(-short.log_prob.mean(), entropy, rtol=0, atol=2e-3)
    assert float(free.kinetic.mean()) > 20 * distance
    assert float(short.kinetic.mean()) == pytest.approx(float(distance), rel=0.05)
    assert short.nfe < free.nfe / 1.5


# --- densities in the plane


@pytest.fixture
def few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the examples, so that the network costs little beside its calls."""
    monkeypatch.setattr(example, "BATCH", 128)
    monkeypatch.setattr(example, "HELD_OUT", 500)
    monkeypatch.setattr(example, "TRAINING", Solver("heun2", steps=2))
    monkeypatch.setattr(example, "FINE_TUNING", Solver("dopri5", 1e-2, 1e-2))
    monkeypatch.setattr(example, "EVALUATION", Solver("dopri5", 1e-3, 1e-3))


@pytest.mark.usefixtures("few_points")
def test_a_few_steps_of_likelihood_beat_the_fitted_gaussian() -> None:
    flow, _ = example.train_flow("ring", steps=30)
    assert example.held_out(flow, "ring").log_prob > example.gaussian_log_prob("ring") + 0.3


@pytest.mark.slow
@pytest.mark.usefixtures("few_points")
def test_a_score_model_improves_by_its_flows_likelihood() -> None:
    model = example.new_score_model()
    flow = score_flow(model, t_min=example.SDE.t_min)
    example.train_score(model, "moons", steps=50)
    before = example.held_out(flow, "moons")
    example.fine_tune(model, "moons", steps=3)
    after = example.held_out(flow, "moons")
    assert before.gap > after.gap + 0.05 > 0


@pytest.mark.slow
@pytest.mark.parametrize("density", ["ring", "moons", "checkerboard"])
def test_a_flow_comes_near_the_true_entropy(density: str) -> None:
    """Within 0.05 nats, 0.2 for the sharp edges; the Gaussian is 1.0 and more below. Not above but by chance."""
    flow, _ = example.train_flow(density, example.STEPS)
    found = example.held_out(flow, density)
    assert -4 * found.error < found.gap < (0.2 if density == "checkerboard" else 0.05)


@pytest.mark.slow
def test_a_label_too_fast_for_the_steps_learns_to_fool_them() -> None:
    """Told 999 t, the velocity swings between four steps, which then claim more than any density can have."""
    flow, _ = example.train_flow("ring", 300, regularisers=(0.0, 0.0), scale=999.0)
    x = example.TOYS["ring"](example.HELD_OUT, 1)
    with torch.no_grad():
        claimed = flow.log_prob(x).mean()
    assert claimed > example.true_log_prob("ring", x).mean() + 1
    assert example.held_out(flow, "ring").gap > 1


# --- errors


def test_errors_name_the_thing_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    x = numbers(4, 3)
    with pytest.raises(ValueError, match=r"unknown adaptive ODE method 'rk4'; use one of dopri5.*or set steps"):
        Solver("rk4")
    with pytest.raises(ValueError, match=r"unknown fixed-step ODE method 'dopri5'; use one of euler.*leave steps out"):
        Solver("dopri5", steps=5)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        Solver("rk4", steps=0)
    with pytest.raises(ValueError, match='unknown gradient \'forward\'; use "backprop" or "adjoint"'):
        Solver(gradient="forward")  # type: ignore[arg-type]
    for t0, t1 in ((1.0, 1.0), (1.0, 0.0), (0.0, math.inf)):
        with pytest.raises(ValueError, match="at a later t1, got t0"):
            Flow(Linear(), t0=t0, t1=t1)
    for velocity in (lambda t, x: x[:, :2], lambda t, x: x.sum()):
        for run in (Flow(velocity).log_prob, Flow(velocity).encode):
            with pytest.raises(ValueError, match=r"the velocity has shape \(.*\) for a state of shape \(4, 3\)"):
                run(x)
    with pytest.raises(ValueError, match=r"base log density must have shape \(4,\), one each, got \(4, 3\)"):
        Flow(Linear(), lambda z: z).log_prob(x)
    with pytest.raises(ValueError, match="the velocity has no gradient in x, and a density needs its Jacobian"):
        Flow(lambda t, x: x.detach()).log_prob(x)
    with pytest.raises(ValueError, match=r"give Flow a draw\(shape, noise\)"):
        Flow(Linear(), lambda z: z.sum(1)).sample((4, 3))
    with pytest.raises(ValueError, match="make it an nn.Module instead of a function"):
        Flow(lambda t, x: -x, solver=Solver(gradient="adjoint")).log_prob(x)
    with pytest.raises(ValueError, match="RK45 is scipy's and has no gradient"):
        Flow(Linear(), solver=Solver("RK45")).log_prob(x)
    each = Solver("embedded")
    with pytest.raises(ValueError, match="use dopri5 for another velocity"), torch.no_grad():
        Flow(Linear(), solver=each).log_prob(x)
    scored = score_flow(Gaussian(VPSDE(), torch.zeros(3), 0.3), solver=each)
    with pytest.raises(ValueError, match='"embedded" has no gradient: use dopri5'):
        scored.log_prob(x.clone().requires_grad_(True))
    with pytest.raises(ValueError, match="kinetic and jacobian are integrals over t: use dopri5"):
        scored.evaluate(x, kinetic=True)
    with pytest.raises(ValueError, match='"embedded" steps the probability flow of a score model; use one of dopri5'):
        integrate(lambda t, y: y, x, 0.0, 1.0, solver=each)
    for times in ([0.0, 0.5, 0.5], [0.0, 1.5], [[0.0, 1.0]]):
        with pytest.raises(ValueError, match=r"times must rise or fall within \[0, 1\], got"):
            Flow(Linear()).path(x, torch.tensor(times))
    for solver in (Solver(), Solver("rk4", steps=4)):
        with pytest.raises(RuntimeError, match="a slope that is not finite at t = 0"):
            Flow(lambda t, x: x / 0, solver=solver).log_prob(x)
    monkeypatch.setattr("score_sde.ode.integrators.MAX_EVALUATIONS", 50)
    for run in (Flow(lambda t, x: 100 * x).log_prob, Flow(Linear(), solver=Solver("rk4", steps=20)).log_prob):
        with pytest.raises(RuntimeError, match=r"gave up after 51 evaluations .*\(too many; t = .* was reached\)"):
            run(x)
