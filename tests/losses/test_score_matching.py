"""Score matching without noise: closed forms, one identity for all objectives, and their exact variances."""

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from score_sde import (
    SDE,
    VPSDE,
    Energy,
    ScoreModel,
    denoising_at,
    explicit,
    finite_difference,
    fisher_divergence,
    from_score,
    implicit,
    projections,
    sliced,
)
from score_sde.config.objective import DECODED, OBJECTIVES, PROJECTED, WEIGHTED, Objective
from score_sde.data import load_data
from score_sde.data.codecs import VectorCodec
from score_sde.data.toys import ring, ring_mixture
from score_sde.models.closed_form import Gaussian, Mixture
from score_sde.networks import UNet
from score_sde.tasks.show import noise_floor
from score_sde.tasks.train import train
from tests.oracles import SDES, name, numbers
from tests.runs import ALONE, image_config, run_steps, toy_config

NOW = torch.tensor(0.3, dtype=torch.float64)
Score = Callable[[Tensor, Tensor], Tensor]


def signs(d: int, shape: tuple[int, ...]) -> Tensor:
    """All 2^D projections of signs, (2^D, *shape): averaged over them the sliced objectives are exact."""
    rows = torch.tensor(list(product([-1.0, 1.0], repeat=d)), dtype=torch.float64)
    return rows.reshape(len(rows), 1, *shape[1:]).expand(len(rows), *shape)


class Smooth(nn.Module):
    """A float64 network of vectors and time, tanh(x A + t b) C: (B, D) to (B, outputs), or to (B,) for none."""

    def __init__(self, d: int, outputs: int | None, width: int = 8, seed: int = 0) -> None:
        super().__init__()
        a, b, c = (
            numbers(d, width, seed=seed),
            numbers(width, seed=seed + 1),
            numbers(width, outputs or 1, seed=seed + 2),
        )
        self.a, self.b, self.c = (nn.Parameter(p / 2) for p in (a, b, c))
        self.scalar = outputs is None

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = torch.tanh(x @ self.a + t.reshape(-1, 1) * self.b) @ self.c
        return y[:, 0] + x.square().sum(1) if self.scalar else y


def gradient(value: Tensor, module: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(module.parameters()), retain_graph=True)])


# -- closed forms


def test_on_gaussians_the_mean_is_the_closed_form() -> None:
    """Data N(0, s2 I), model N(0, q I): E J = d (s2/(2 q²) - 1/q), least at q = s2, where it is -d/(2 s2)."""
    d, s2, t = 3, 0.7, torch.zeros((), dtype=torch.float64)
    points, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(3))
    x = math.sqrt(s2) * torch.cartesian_prod(*[points] * d)
    w = torch.cartesian_prod(*[weights / weights.sum()] * d).prod(1)  # exact: J is quadratic here
    v = signs(d, tuple(x.shape))
    for q in (0.5, 0.7, 1.3):
        score: Score = lambda x, t, q=q: -x / q
        energy = Energy(lambda x, t, q=q: x.square().sum(1) / (2 * q))
        expected = d * (s2 / (2 * q**2) - 1 / q)
        for model in (score, energy, from_score(VPSDE(), score)):
            for values in (
                implicit(model, x, t),
                sliced(model, x, t, v),
                sliced(model, x, t, v, variance_reduced=False),
                finite_difference(model, x, t, v, 0.1),
            ):
                assert float(w @ values.detach()) == pytest.approx(expected, rel=1e-9)
    assert d * (s2 / (2 * s2**2) - 1 / s2) == pytest.approx(-d / (2 * s2))


def test_denoising_on_gaussians_is_the_closed_form() -> None:
    """Data N(0, s2 I), model N(0, q I): |(1/sigma - sigma/q) z - x0/q|²/2 on average, least at q = s2 + sigma²."""
    d, s2, sigma, t = 2, 0.7, 0.6, torch.zeros((), dtype=torch.float64)
    points, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(3))
    x0, z = (torch.cartesian_prod(*[points] * 2 * d)[:, part] for part in (slice(d), slice(d, 2 * d)))
    w = torch.cartesian_prod(*[weights / weights.sum()] * 2 * d).prod(1)
    smoothed = s2 + sigma**2
    for q in (0.5, smoothed, 1.3):
        expected = d / 2 * ((1 / sigma - sigma / q) ** 2 + s2 / q**2)
        explicit_loss = d / 2 * smoothed * (1 / q - 1 / smoothed) ** 2
        assert expected - explicit_loss == pytest.approx(d / 2 * (1 / sigma**2 - 1 / smoothed))  # without q
        for model in (lambda x, t, q=q: -x / q, Energy(lambda x, t, q=q: x.square().sum(1) / (2 * q))):
            found = w @ denoising_at(model, math.sqrt(s2) * x0, t, z, sigma).detach()
            assert float(found) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("sde", SDES, ids=name)
def test_on_mixtures_every_value_is_the_closed_form(sde: SDE) -> None:
    """J = |grad log p|²/2 + laplace log p, differentiated from the mixture's own log density."""
    cov = torch.tensor([[0.5, 0.3], [0.3, 1.2]], dtype=torch.float64)
    truth = Mixture(sde, [0.3, 0.7], [[-1.0, 0.5], [1.0, -0.5]], torch.stack([cov, cov / 4]))
    x = numbers(6, 2)
    for t in (torch.tensor(0.2, dtype=torch.float64), torch.linspace(0.1, 0.9, 6, dtype=torch.float64)):

        def log_prob(y: Tensor, when: Tensor) -> Tensor:
            return truth.log_prob(y[None], when)[0]

        dims = 0 if t.ndim else None
        slope = torch.func.vmap(torch.func.grad(log_prob), (0, dims))(x, t)
        bend = torch.func.vmap(torch.func.jacrev(torch.func.grad(log_prob)), (0, dims))(x, t)
        expected = slope.square().sum(1) / 2 + bend.diagonal(dim1=1, dim2=2).sum(1)
        v = signs(2, (6, 2))
        torch.testing.assert_close(implicit(truth, x, t), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(sliced(truth, x, t, v), expected, rtol=1e-9, atol=1e-9)
        plain = sliced(truth, x, t, v, variance_reduced=False)
        torch.testing.assert_close(plain, expected, rtol=1e-9, atol=1e-9)
        energy = Energy(lambda y, when: -truth.log_prob(y, when))
        torch.testing.assert_close(implicit(energy, x, t), expected, rtol=1e-9, atol=1e-9)
        for model in (truth, energy):  # off by O(step²)
            near = finite_difference(model, x, t, v, 1e-3)
            torch.testing.assert_close(near, expected, rtol=1e-4, atol=1e-4)


def test_the_mean_is_the_fisher_divergence_less_a_constant_of_the_data() -> None:
    """E_p J(q) = E_p |s_q - s_p|²/2 - E_p |s_p|²/2 by quadrature over the plane, for two unlike mixtures."""
    sde = VPSDE()
    p = Mixture(sde, [0.3, 0.7], [[-1.0, 0.5], [1.0, -0.5]], [0.3, 0.5])
    q = Mixture(sde, [0.5, 0.5], [[-0.5, 0.0], [1.5, 0.5]], [0.6, 0.4])
    axis = torch.linspace(-8, 8, 161, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    w = p.log_prob(x, NOW).exp() * 0.1**2  # the trapezoidal rule converges exponentially here
    assert float(w.sum()) == pytest.approx(1, abs=1e-9)
    constant = w @ p.score(x, NOW).square().sum(1) / 2
    expected = w @ explicit(q, p, x, NOW) - constant
    with torch.no_grad():
        assert float(w @ implicit(q, x, NOW)) == pytest.approx(float(expected), rel=1e-8)
        assert float(w @ implicit(p, x, NOW)) == pytest.approx(-float(constant), rel=1e-8)


def test_fisher_divergence_of_gaussians_and_its_standard_error() -> None:
    """Half of E |x|² (1/a - 1/b)² under N(0, a I): d a (1/a - 1/b)²/2, and the error of a chi-square mean."""
    n, d, a, b = 40_000, 3, 0.7, 1.3
    x = math.sqrt(a) * numbers(n, d)
    found = fisher_divergence(lambda x, t: -x / a, lambda x, t: -x / b, x, NOW)
    expected = d * a * (1 / a - 1 / b) ** 2 / 2
    assert float(found.std_error) == pytest.approx(expected * math.sqrt(2 / (d * n)), rel=0.03)
    assert abs(float(found.mean) - expected) < 4 * float(found.std_error)
    sde = VPSDE()
    p, q = Gaussian(sde, torch.zeros(d), a), Gaussian(sde, torch.zeros(d), b)
    assert float(fisher_divergence(p, p, x, NOW).mean) == 0
    v_p, v_q = (float(sde.alpha(NOW)) ** 2 * s + float(sde.sigma(NOW)) ** 2 for s in (a, b))
    at_t = fisher_divergence(p, q, x / math.sqrt(a) * math.sqrt(v_p), NOW)
    assert float(at_t.mean / found.mean) == pytest.approx(v_p * (1 / v_p - 1 / v_q) ** 2 / (a * (1 / a - 1 / b) ** 2))


def test_fisher_divergence_of_few_examples() -> None:
    """Of three values 0, 1/2 and 2 the variance of the mean is 13/36, by n - 1; one says nothing of its error."""
    x = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    found = fisher_divergence(lambda x, t: x, lambda x, t: 0 * x, x, NOW)
    assert float(found.mean) == pytest.approx(5 / 6) and float(found.std_error) == pytest.approx(math.sqrt(13) / 6)
    single = fisher_divergence(lambda x, t: x, lambda x, t: 0 * x, x[1:2], NOW)
    assert float(single.mean) == 0.5 and math.isnan(float(single.std_error))


def test_no_gradient_goes_into_the_truth() -> None:
    model, truth = (torch.nn.Linear(2, 2).double() for _ in range(2))
    x = numbers(5, 2).requires_grad_(True)
    explicit(lambda x, t: model(x), lambda x, t: truth(x), x, NOW).sum().backward()
    assert all(p.grad is None for p in truth.parameters()) and model.weight.grad is not None
    error = model(x.detach()) - truth(x.detach())
    torch.testing.assert_close(x.grad, error.detach() @ model.weight.detach())  # through the model alone
    torch.testing.assert_close(model.weight.grad, error.detach().T @ x.detach())


# -- sliced: unbiased, and its variance


def test_sliced_is_unbiased_for_implicit_in_value_and_gradient() -> None:
    """Means over all signs are exact for Rademacher, over 9 x 9 nodes for Gaussian, over 3 angles for the sphere."""
    network = Smooth(2, 2)
    x, t = numbers(5, 2, seed=5), torch.linspace(0, 1, 5, dtype=torch.float64)
    points, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(3))
    angles = torch.arange(3, dtype=torch.float64) * (2 * math.pi / 3) + 0.4
    laws = {
        "rademacher": (signs(2, (1, 2))[:, 0], torch.full((4,), 0.25, dtype=torch.float64)),
        "gaussian": (torch.cartesian_prod(points, points), torch.cartesian_prod(weights, weights).prod(1)),
        "sphere": (math.sqrt(2) * torch.stack([angles.cos(), angles.sin()], dim=1), torch.ones(3, dtype=torch.float64)),
    }
    exact = implicit(network, x, t)
    for directions, w in laws.values():
        for reduced in (True, False):
            each = [sliced(network, x, t, v.expand(1, 5, 2), variance_reduced=reduced) for v in directions]
            mean = (w / w.sum()) @ torch.stack(each)
            torch.testing.assert_close(mean, exact, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(gradient(mean.sum(), network), gradient(exact.sum(), network), rtol=1e-9, atol=0)
    many = torch.cat([v.expand(1, 5, 2) for v in laws["sphere"][0]])
    torch.testing.assert_close(sliced(network, x, t, many), exact, rtol=1e-10, atol=1e-12)  # three in one call


# For s = -x/q, data N(0, s2 I) and R = |v|², given which v.x is N(0, s2 R): plain is -R/q + s2 R chi²_1/(2 q²), the
# variance-reduced form -R/q + s2 chi²_d/(2 q²). R is d for signs and on the sphere, chi²_d for Gaussian projections.
def variances(d: int, s2: float, q: float, law: str, reduced: bool) -> float:
    c, gaussian = s2 / (2 * q**2), law == "gaussian"
    if reduced:
        return 2 * d * c**2 + (2 * d / q**2 if gaussian else 0)
    second_moment = d * (d + 2) if gaussian else d**2  # of R
    return 2 * c**2 * second_moment + (2 * d * (c - 1 / q) ** 2 if gaussian else 0)


@pytest.mark.parametrize("law", ["rademacher", "gaussian", "sphere"])
def test_variances_of_the_sliced_objectives_are_the_closed_ones(law: str) -> None:
    n, d, s2, q = 400_000, 5, 0.7, 1.3
    x = math.sqrt(s2) * numbers(n, d)
    v = projections(numbers(1, n, d, seed=1), law)
    for reduced in (True, False):
        values = sliced(lambda x, t: -x / q, x, NOW, v, variance_reduced=reduced).detach()
        expected = variances(d, s2, q, law, reduced)
        error = float((values - values.mean()).pow(4).mean() / values.var() ** 2 - 1) ** 0.5 / math.sqrt(n)
        assert error < 0.01 and abs(float(values.var()) / expected - 1) < 4 * error
        mean = d * (s2 / (2 * q**2) - 1 / q)
        assert abs(float(values.mean()) - mean) < 4 * math.sqrt(expected / n)


def test_variance_reduction_helps_signs_and_not_gaussian_projections_here() -> None:
    """Once measured as 6.22 / 6.39 and 2.15 / 0.43; the closed forms say 6.16 / 6.35 and 2.14 / 0.43."""
    found = [variances(5, 0.7, 1.3, law, r) for law in ("gaussian", "rademacher") for r in (False, True)]
    assert found == pytest.approx([6.22, 6.39, 2.15, 0.43], rel=0.01)


def test_projections_have_unit_covariance_and_their_own_lengths() -> None:
    z = numbers(4, 20_000, 1, 3)
    for law in ("rademacher", "gaussian", "sphere"):
        v = projections(z, law)
        rows = v.reshape(-1, 3)
        torch.testing.assert_close(rows.T @ rows / len(rows), torch.eye(3, dtype=z.dtype), rtol=0, atol=0.02)  # 5 s.e.
        assert abs(float(rows.mean())) < 0.01 and bool(((v > 0) == (z > 0)).all())
    assert set(projections(z, "rademacher").unique().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(
        projections(z, "sphere").flatten(2).square().sum(2), torch.full((4, 20_000), 3.0).double()
    )
    assert projections(z, "gaussian") is z


# -- one optimum: denoising, explicit and implicit


def test_all_gradients_agree_on_the_smoothed_density() -> None:
    """Three data points, smoothed by N(0, sigma² I): at a fixed noise all objectives pull the same way."""
    sigma, t = 0.9, torch.zeros((), dtype=torch.float64)
    data = torch.tensor([[-1.0, 0.3], [0.2, -0.8], [1.0, 0.6]], dtype=torch.float64)
    points, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(36))
    z = torch.cartesian_prod(points, points)
    w = torch.cartesian_prod(weights, weights).prod(1).repeat(3) / (3 * weights.sum() ** 2)
    x0, z = data.repeat_interleave(36**2, 0), z.repeat(3, 1)
    x = x0 + sigma * z

    def truth(x: Tensor, t: Tensor) -> Tensor:
        r = (data - x[:, None]) / sigma**2
        return (torch.softmax(-r.square().sum(2) * sigma**2 / 2, dim=1)[..., None] * r).sum(1)

    v = signs(2, tuple(x.shape))
    for network in (Smooth(2, 2), Energy(Smooth(2, None))):
        score = network if isinstance(network, Energy) else network.forward
        wanted = gradient(w @ explicit(score, truth, x, t), network)
        assert wanted.norm() > 0.1
        for value in (
            denoising_at(score, x0, t, z, sigma),
            implicit(score, x, t),
            sliced(score, x, t, v),
            sliced(score, x, t, v, variance_reduced=False),
        ):
            torch.testing.assert_close(gradient(w @ value, network), wanted, rtol=0, atol=1e-6)
        close = gradient(w @ finite_difference(score, x, t, v, 1e-3), network)
        torch.testing.assert_close(close, wanted, rtol=0, atol=1e-4)
    constant = float(w @ truth(x, t).square().sum(1)) / 2 - 1 / sigma**2  # E |z|²/(2 sigma²) = 1/sigma² in the plane
    got = float((w @ denoising_at(network, x0, t, z, sigma) - w @ explicit(network, truth, x, t)).detach())
    assert got == pytest.approx(-constant, rel=1e-6)


# -- finite differences


@pytest.mark.parametrize("energy", [False, True])
def test_finite_differences_converge_with_order_two(energy: bool) -> None:
    model = Energy(Smooth(3, None)) if energy else Smooth(3, 3).forward
    x, t, v = numbers(4, 3), torch.linspace(0, 1, 4, dtype=torch.float64), numbers(2, 4, 3, seed=9)
    exact = sliced(model, x, t, v, variance_reduced=not energy)
    steps = np.array([0.08, 0.04, 0.02, 0.01])
    errors = [float((finite_difference(model, x, t, v, h) - exact).norm().detach()) for h in steps]
    assert np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(2, abs=0.05)
    assert errors[-1] < 1e-3 * float(exact.detach().norm())
    each = torch.tensor([0.08, 0.04, 0.02, 0.01], dtype=torch.float64)  # a step for each example
    one = [finite_difference(model, x[i : i + 1], t[i : i + 1], v[:, i : i + 1], h) for i, h in enumerate(each)]
    alone = torch.cat(one)
    torch.testing.assert_close(finite_difference(model, x, t, v, each), alone)


def test_finite_differences_take_no_derivative_in_x() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            assert not x.requires_grad
            return x

    x, v = numbers(4, 3), numbers(2, 4, 3, seed=1)
    for model in (lambda x, t: Once.apply(x) * 2, Energy(lambda x, t: Once.apply(x).square().sum(1))):
        assert finite_difference(model, x, NOW, v).isfinite().all()


# -- how it is computed


@pytest.mark.parametrize("module", [True, False], ids=["module", "function"])
def test_parts_of_the_trace_change_neither_value_nor_gradient(module: bool) -> None:
    network = Smooth(5, 5)
    model = network if module else network.forward
    x, t = numbers(3, 5, seed=3), torch.rand(3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = implicit(model, x, t, products=15)
    slope = gradient(whole.square().sum(), network)
    for products in (1, 3, 6, 9):  # one, one, two and three unit vectors at a time
        parts = implicit(model, x, t, products=products)
        torch.testing.assert_close(parts, whole)
        torch.testing.assert_close(gradient(parts.square().sum(), network), slope)
        with torch.no_grad():
            quiet = implicit(model, x, t, products=products)
        torch.testing.assert_close(quiet, whole)
        assert not quiet.requires_grad
        y = x.clone().requires_grad_(True)
        torch.testing.assert_close(
            torch.autograd.grad(implicit(model, y, t, products=products).sum(), y)[0],
            torch.autograd.grad(implicit(model, y, t, products=15).sum(), y)[0],
        )


class Noisy(nn.Module):
    """A network with dropout that is always on."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 4)).double()
        for i, p in enumerate(self.net.parameters()):
            p.data = numbers(*p.shape, seed=i) / 2

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x)


def test_recomputed_parts_draw_the_same_random_numbers_again() -> None:
    network, x = Noisy(), numbers(3, 4)
    entry = network.net[0].weight

    def value() -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return implicit(network, x, NOW, products=3).sum()

    (slope,) = torch.autograd.grad(value(), entry)
    direction, h, ends = numbers(*entry.shape, seed=7), 1e-5, []
    for step in (h, -2 * h):
        entry.data += step * direction
        ends.append(value().detach())
    assert float((slope * direction).sum()) == pytest.approx(float((ends[0] - ends[1]) / (2 * h)), rel=1e-6)


def test_what_vmap_refuses_is_done_one_by_one() -> None:
    class Recomputing(Noisy):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:  # its backward pass draws random numbers: not for vmap
            return checkpoint(self.net, x, use_reentrant=False)

    network, same, x, v = Recomputing(), Noisy(), numbers(3, 4), numbers(3, 3, 4, seed=1)
    s = network(y := x.clone().requires_grad_(True), NOW)
    with pytest.raises(RuntimeError, match="random"):
        torch.autograd.grad(s, y, v, is_grads_batched=True, retain_graph=True)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        together = sliced(network, x, NOW, v)
        torch.manual_seed(3)
        plain = sliced(same, x, NOW, v)
    torch.testing.assert_close(together, plain)


@pytest.mark.parametrize("shape", [(1,), (2, 3, 3), (1, 2, 2, 2)])
def test_states_have_any_rank_and_examples_do_not_meet(shape: tuple[int, ...]) -> None:
    x, t, v = numbers(4, *shape), torch.linspace(0.1, 1, 4, dtype=torch.float64), numbers(2, 4, *shape, seed=1)
    model = from_score(VPSDE(), lambda x, t: torch.sin(x) * x.flatten(1).sum(1).reshape(-1, *(1,) * len(shape)))
    for f in (
        implicit,
        lambda m, x, t: sliced(m, x, t, v[:, : len(x)] if len(x) > 1 else v[:, 2:3]),
        lambda m, x, t: finite_difference(m, x, t, v[:, : len(x)] if len(x) > 1 else v[:, 2:3]),
    ):
        together = f(model, x, t)
        assert together.shape == (4,)
        torch.testing.assert_close(f(model, x[2:3], t[2:3]), together[2:3])


@pytest.mark.parametrize(
    "objective",
    [
        implicit,
        partial(implicit, products=2),
        lambda m, x, t: sliced(m, x, t, numbers(2, 2, 3, seed=8)),
        lambda m, x, t: sliced(m, x, t, numbers(2, 2, 3, seed=8), variance_reduced=False),
        lambda m, x, t: finite_difference(m, x, t, numbers(2, 2, 3, seed=8), 0.1),
        lambda m, x, t: denoising_at(m, x, t, numbers(2, 3, seed=8), 0.3),
    ],
    ids=["implicit", "implicit in parts", "sliced_vr", "sliced", "finite_difference", "denoising_at"],
)
@pytest.mark.parametrize("energy", [False, True], ids=["score", "energy"])
def test_gradcheck(objective: Callable, energy: bool) -> None:
    """Gradients in x and in the parameters, against differences in float64."""
    network = Energy(Smooth(3, None, width=4)) if energy else Smooth(3, 3, width=4)
    x, t = numbers(2, 3).requires_grad_(True), torch.tensor([0.2, 0.8], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, *parameters: objective(network, x, t), (x, *network.parameters()))


def test_float32_agrees_with_float64() -> None:
    network, x, v = Smooth(3, 3), numbers(4, 3), numbers(2, 4, 3, seed=1)
    low = Smooth(3, 3).float()
    t = torch.linspace(0, 1, 4)
    for f, tolerance in ((implicit, 1e-5), (partial(sliced, v=v), 1e-5), (partial(finite_difference, v=v), 1e-3)):
        given = {k: u.float() for k, u in getattr(f, "keywords", {}).items()}
        single = getattr(f, "func", f)(low, x.float(), t, **given)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), f(network, x, t.double()), rtol=tolerance, atol=tolerance)


def test_an_energy_is_a_score_a_model_and_works_without_gradients() -> None:
    sde = VPSDE()
    truth = Gaussian(sde, torch.zeros(2), 0.5)
    energy = Energy(lambda x, t: -truth.log_prob(x, t))
    x = numbers(3, 2)
    with torch.no_grad():
        score = energy(x, NOW)
        assert not score.requires_grad
        torch.testing.assert_close(score, truth.score(x, NOW))
        torch.testing.assert_close(from_score(sde, energy)(x, NOW).noise, truth(x, NOW).noise)
    network = Smooth(2, None)
    assert {id(p) for p in from_score(sde, Energy(network)).parameters()} == {id(p) for p in network.parameters()}


def test_attention_is_differentiated_twice() -> None:
    torch.manual_seed(0)  # of the initial weights
    network = UNet(1, width=8, multipliers=(1,), blocks=1, attention=(2,), image_size=2, init_scale=1.0)
    x, t = numbers(2, 1, 2, 2).float(), torch.tensor([0.1, 0.7])
    for value in (sliced(network, x, t, numbers(2, 2, 1, 2, 2, seed=1).float()), implicit(network, x, t, products=8)):
        gradients = torch.autograd.grad(value.sum(), list(network.parameters()), allow_unused=True)
        assert all(bool(g.isfinite().all()) for g in gradients if g is not None)


def test_what_does_not_fit_is_refused() -> None:
    x, v = numbers(2, 6), numbers(1, 2, 6)
    score: Score = lambda x, t: -x
    with pytest.raises(ValueError, match=r"each of 6 dimensions, more than limit=5: use sliced"):
        implicit(score, x, NOW, limit=5)
    for f in (sliced, finite_difference):
        for wrong in (v[0], v[:0], v[:, :1]):
            with pytest.raises(ValueError, match=r"v must have shape \(M, 2, 6\) with M >= 1, got"):
                f(score, x, NOW, wrong)
    with pytest.raises(ValueError, match="step must be positive, got -1"):
        finite_difference(score, x, NOW, v, -1)
    with pytest.raises(ValueError, match="no gradient in x"):
        implicit(lambda x, t: -x.detach(), x, NOW)
    with pytest.raises(ValueError, match=r"z must have the shape of x0, \(2, 6\), got \(6,\)"):
        denoising_at(score, x, NOW, x[0], 0.1)
    with pytest.raises(ValueError, match=r"energy must have shape \(2,\), one value per example, got \(2, 6\)"):
        implicit(Energy(score), x, NOW)
    with pytest.raises(ValueError, match="unknown law of projections 'uniform'"):
        projections(v, "uniform")  # type: ignore[arg-type]


# -- rows of the config


def expectation(
    objective: str, model: ScoreModel, x0: Tensor, t: Tensor, z: Tensor, w: Tensor, **keys: object
) -> Tensor:
    """The config's weighted loss averaged over data, noise with weights w, and all signs."""
    config = toy_config(training__objective=objective, **keys)
    values = []
    for v in signs(x0.shape[1], tuple(x0.shape)) if objective in PROJECTED else [z]:
        values.append(w @ Objective(model, config)(x0, t.expand(len(x0)), z, v[:, None])[0])
    return torch.stack(values).mean()


@pytest.mark.parametrize("keys", [{}, {"training__likelihood_weighting": True, "training__reduce_mean": False}])
@pytest.mark.parametrize("objective", sorted(set(OBJECTIVES) - {"denoising", *DECODED, *WEIGHTED}))
def test_every_objective_is_in_expectation_the_noise_error(objective: str, keys: dict) -> None:
    """In the plane, for three data points and a network, in value and gradient; the weights multiply both alike."""
    sde = VPSDE()
    points, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(20))
    data = torch.tensor([[-1.0, 0.3], [0.2, -0.8], [1.0, 0.6]], dtype=torch.float64)
    x0, z = data.repeat_interleave(400, 0), torch.cartesian_prod(points, points).repeat(3, 1)
    w = torch.cartesian_prod(weights, weights).prod(1).repeat(3) / (3 * weights.sum() ** 2)
    network = Smooth(2, 2)
    model = from_score(sde, network)
    constant = 1.0
    for t in (0.2, 0.9):
        time = torch.tensor(t, dtype=torch.float64)
        wanted = expectation("denoising", model, x0, time, z, w, **keys)
        got = expectation(objective, model, x0, time, z, w, **keys, training__difference_step=1e-3)
        if keys:  # the row's 1 is weighted too
            constant = float((sde.g(time) / sde.sigma(time)) ** 2)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * constant)
        torch.testing.assert_close(gradient(got, network), gradient(wanted, network), rtol=0, atol=1e-5 * constant)


@pytest.mark.parametrize("objective", sorted(set(OBJECTIVES) - set(DECODED)))
def test_every_objective_trains_and_resumes_bitwise(objective: str, tmp_path: Path) -> None:
    """On vectors and on images, whole, and in a run that stops half-way and goes on."""
    config = toy_config(training__objective=objective, training__projections=2, training__n_iters=4)
    data = load_data("ring")
    stopped = partial(train, config, tmp_path / "stopped", data, VectorCodec(), ALONE)
    seen = []
    list(stopped(stop=lambda: len(seen.append(0) or seen) > 2))  # type: ignore[func-returns-value]
    last = list(stopped())
    list(train(config, tmp_path / "whole", data, VectorCodec(), ALONE))
    assert any("going on from step 2" in note for m in last for note in m.notes)
    files = [tmp_path / run / "checkpoints" / "000000004.safetensors" for run in ("stopped", "whole")]
    a, b = (load_file(f) for f in files)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "objective",
    [
        "sliced_vr",
        "finite_difference",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("sliced", "implicit")),
    ],
)
def test_switches_of_memory_leave_the_step_of_a_unet(objective: str) -> None:
    """Accumulation, channels-last and recomputed activations, on images; bfloat16 within its precision."""
    digits = load_data("digits")
    plain = image_config(training__objective=objective, model__init_scale=1.0)
    _, (expected,) = run_steps(plain, digits, 1)
    switches = {"training__accumulate": 2, "training__channels_last": True, "training__checkpoint_activations": True}
    for key, value in switches.items():
        changed = image_config(training__objective=objective, model__init_scale=1.0, **{key: value})
        _, (record,) = run_steps(changed, digits, 1)
        torch.testing.assert_close(record.loss, expected.loss, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(record.grad_norm, expected.grad_norm, rtol=1e-3, atol=0)
    if objective != "finite_difference":
        half = image_config(training__objective=objective, model__init_scale=1.0, training__precision="bfloat16")
        _, (record,) = run_steps(half, digits, 1)
        torch.testing.assert_close(record.loss.mean(), expected.loss.mean(), rtol=0.05, atol=0)


@pytest.mark.parametrize(
    "objective, settings",
    [
        pytest.param("implicit", {}, marks=pytest.mark.slow),
        pytest.param("sliced", {"projections": 4}, marks=pytest.mark.slow),
        ("sliced_vr", {"projection": "sphere"}),
        pytest.param("finite_difference", {}, marks=pytest.mark.slow),
    ],
)
def test_training_without_denoising_lowers_the_noise_error(objective: str, settings: dict, tmp_path: Path) -> None:
    """As `test_training_lowers_the_loss_towards_the_floor`, judged by denoising on held-out data."""
    config = toy_config(
        training__n_iters=150, training__batch_size=192, model__hidden=64, optim__lr=4e-3, training__time="log_snr",
        training__low_discrepancy=True, model__label="log_sigma", model__ema_halflife=5000,
        training__objective=objective, **{f"training__{key}": value for key, value in settings.items()},
    )  # fmt: skip
    state, _ = run_steps(config, load_data("ring"), config.training.n_iters)
    sde, exact = state.ema.sde, Mixture(VPSDE(t_min=config.model.t_min), *ring_mixture())
    found, floor = (noise_floor(m, lambda n: ring(n, 1).double(), sde) for m in (state.ema.double(), exact))
    excess = sum(found.values()) - sum(floor.values())
    assert 0 < excess < 0.2 * (len(floor) - sum(floor.values()))
