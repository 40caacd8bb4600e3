"""The exact models against torch.distributions, automatic differentiation, each other and the ODE."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from score_sde import DDPM, SDE, SMLD, VPSDE, from_score
from score_sde.models.closed_form import Boxes, Empirical, Gaussian, Mixture
from score_sde.ode import Solver, integrate
from score_sde.sdes import like
from tests.oracles import SDES, name

# Closed forms in float64 agree to rounding times a condition number of at most 1e3.
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)

SHAPE = (2, 3)
D = math.prod(SHAPE)
K = 3
EYE = torch.eye(D, dtype=torch.float64)
EVERY = pytest.mark.parametrize("sde", [*SDES, DDPM.linear(100).as_sde(), SMLD([0.1, 1.0, 5.0]).as_sde()], ids=name)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariances(kind: str, k: int = K) -> tuple[Tensor, Tensor]:
    """(as given to Mixture, as k full matrices) of the kinds that Mixture takes."""
    positive = numbers(k, D, seed=3).square() + 0.1
    root = numbers(k, D, D, seed=4) / D**0.5
    full = root @ root.mT + 0.05 * EYE

    return {
        "one": (positive[0, 0], positive[0, 0] * EYE.expand(k, D, D)),
        "each": (positive[:, 0], positive[:, :1, None] * EYE),
        "diagonal": (positive.reshape(k, *SHAPE), torch.diag_embed(positive)),
        "full": (full, full),
    }[kind]


KINDS = pytest.mark.parametrize("kind", ["one", "each", "diagonal", "full"])


def mixture(sde: SDE, kind: str) -> tuple[Mixture, Tensor, Tensor, Tensor]:
    given, full = covariances(kind)
    weights, means = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64), 1.5 * numbers(K, *SHAPE, seed=5)
    return Mixture(sde, weights, means, given), weights, means, full


def marginal(sde: SDE, t: Tensor, weights: Tensor, means: Tensor, full: Tensor) -> MixtureSameFamily:
    """p_t by torch.distributions: the data's mixture scaled by alpha, plus noise of variance sigma²."""
    cov = sde.alpha(t) ** 2 * full + sde.sigma(t) ** 2 * EYE
    return MixtureSameFamily(
        Categorical(weights / weights.sum()), MultivariateNormal(sde.alpha(t) * means.reshape(-1, D), cov)
    )


@KINDS
@EVERY
def test_density_and_score_of_a_mixture_are_those_of_torch_distributions(sde: SDE, kind: str) -> None:
    model, *parameters = mixture(sde, kind)
    times = torch.tensor([0.05, 0.3, 0.7, 1.0], dtype=torch.float64)
    x = 2 * numbers(4, *SHAPE, seed=6)
    x.requires_grad_(True)
    truth = torch.stack([marginal(sde, t, *parameters).log_prob(y.flatten()) for t, y in zip(times, x)])
    close(model.log_prob(x, times), truth)
    (score,) = torch.autograd.grad(truth.sum(), x)
    e = model(x.detach(), times)
    close(e.score, score)
    close(like(sde.alpha(times), x) * e.data + like(sde.sigma(times), x) * e.noise, x.detach())
    for i, t in enumerate(times):  # a scalar time is the time of every example
        close(model(x.detach(), t).data[i], e.data[i])
        close(model.log_prob(x.detach(), t)[i], truth[i].detach())


@KINDS
def test_density_of_the_data_is_that_without_noise(kind: str) -> None:
    model, weights, means, full = mixture(VPSDE(), kind)
    x = numbers(5, *SHAPE, seed=6)
    truth = MixtureSameFamily(
        Categorical(weights / weights.sum()), MultivariateNormal(means.reshape(K, D), full)
    ).log_prob(x.flatten(1))
    close(model.log_prob(x), truth)


@KINDS
def test_draws_have_the_mixtures_weights_means_and_covariances(kind: str) -> None:
    model, weights, means, full = mixture(VPSDE(), kind)
    n = 40_000
    x, label = model.sample(n, torch.Generator().manual_seed(0))
    assert x.shape == (n, *SHAPE) and label.shape == (n,)
    for k in range(K):
        y = x[label == k].flatten(1)
        p = weights[k] / weights.sum()
        assert abs(len(y) / n - p) < 4 * math.sqrt(p * (1 - p) / n)
        deviation = (y.mean(0) - means[k].flatten()) / (full[k].diagonal() / len(y)).sqrt()
        assert deviation.abs().max() < 4.5  # standard errors; 18 such numbers
        # a sample covariance has variance (S_ij² + S_ii S_jj)/n
        scale = (full[k].square() + full[k].diagonal() * full[k].diagonal()[:, None]).sqrt() / len(y) ** 0.5
        assert ((y.T.cov() - full[k]) / scale).abs().max() < 4.5


@KINDS
def test_a_label_leaves_its_component(kind: str) -> None:
    model, _, means, _ = mixture(VPSDE(), kind)
    given, _ = covariances(kind)
    x, t = numbers(3, *SHAPE, seed=6), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    for k in range(K):
        alone = Gaussian(VPSDE(), means[k], given[k] if given.ndim else given)
        close(model.given(label=k)(x, t).data, alone(x, t).data)
        close(model.log_prob(x, t, label=k), alone.log_prob(x, t))
    each = model.given(label=torch.tensor([2, 0, 1]))(x, t)
    for i, k in enumerate([2, 0, 1]):
        close(each.score[i], model.given(label=k)(x, t).score[i])
    close(model.given(label=None)(x, t).noise, model(x, t).noise)


@EVERY
def test_a_data_set_is_a_mixture_of_points(sde: SDE) -> None:
    points = numbers(7, *SHAPE, seed=7)
    exact, dots = Empirical(sde, points), Mixture(sde, torch.ones(7), points, 0.0)
    x, t = numbers(4, *SHAPE, seed=8), torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)
    # x - alpha mean cancels where the noise is small, as Empirical's noise is computed
    for a, b in zip(exact(x, t)[:2], dots(x, t)[:2]):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)
    near = sde.perturb(points, torch.tensor(0.01, dtype=torch.float64), 0.1 * numbers(7, *SHAPE, seed=9))
    torch.testing.assert_close(exact(near, torch.tensor(0.01, dtype=torch.float64)).data, points, rtol=0, atol=1e-3)


LOW = [[-1.0, 0.0], [0.5, -0.7]]
HIGH = [[-0.2, 0.4], [0.7, 1.0]]


@EVERY
def test_boxes_are_mixtures_of_their_points(sde: SDE) -> None:
    """Gauss and Legendre's nodes in each box stand for all its points, once they lie closer than the noise."""
    boxes = Boxes(sde, [1.0, 3.0], LOW, HIGH)
    u, w = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(48))
    low, high = torch.tensor(LOW, dtype=torch.float64), torch.tensor(HIGH, dtype=torch.float64)
    nodes = low[:, None] + (high - low)[:, None] * (u[:, None] + 1) / 2  # (box, node, dimension)
    points = torch.cat([torch.cartesian_prod(*box.T) for box in nodes])
    weights = torch.cat([share * torch.outer(w, w).flatten() / 4 for share in (0.25, 0.75)])
    dots = Mixture(sde, weights, points, 0.0)
    levels = torch.tensor([0.1, 0.4, 1.5, 100.0], dtype=torch.float64)  # sigma/alpha
    times = sde.time(-2 * torch.log(levels)).clamp(max=1)
    x = sde.perturb(points[[5, 1000, 3000, 4000]], times, 2 * numbers(4, 2, seed=6))
    for a, b in zip(boxes(x, times), dots(x, times)):
        close(a, b)
    close(boxes.log_prob(x, times), dots.log_prob(x, times))
    close(boxes(x, times[2]).data[2], boxes(x, times).data[2])  # a scalar time is the time of every example


def test_score_of_boxes_is_the_gradient_of_their_log_density_inside_and_far_outside() -> None:
    sde, t = VPSDE(), torch.tensor(1e-3, dtype=torch.float64)  # sigma 0.01: the far points lie 400 of it away
    model = Boxes(sde, [1.0, 3.0], LOW, HIGH)
    x = torch.tensor([[-0.6, 0.2], [-0.2, 0.41], [0.0, 0.0], [5.0, -4.0], [-0.6, 4.0]], dtype=torch.float64)
    x.requires_grad_(True)
    (score,) = torch.autograd.grad(model.log_prob(x, t).sum(), x)
    e = model(x.detach(), t)
    torch.testing.assert_close(e.score, score, rtol=1e-9, atol=1e-7)
    assert e.score[0].abs().max() < 1e-9  # flat deep inside
    # Far outside, the data are the nearest corner but for sigma²/distance.
    corners = torch.tensor([[0.7, -0.7], [0.5, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(e.data[3:], corners, rtol=0, atol=1.2e-4)
    close(sde.alpha(t) * e.data + sde.sigma(t) * e.noise, x.detach())
    single = model(x.detach().float(), t)
    assert single.data.dtype == single.noise.dtype == model.log_prob(x.float(), t).dtype == torch.float32
    torch.testing.assert_close(single.data.double(), e.data, rtol=0, atol=1e-5)


def test_one_point_is_known_at_every_noise_level() -> None:
    point = numbers(1, *SHAPE)
    model = Empirical(VPSDE(), point)
    for t in torch.tensor([0.01, 0.5, 1.0], dtype=torch.float64):
        close(model(5 * numbers(2, *SHAPE, seed=2), t).data, point.expand(2, *SHAPE))


@pytest.mark.parametrize("kind", ["one", "diagonal", "full"])
@pytest.mark.parametrize("sde", SDES, ids=name)
def test_flow_of_a_gaussian_solves_the_probability_flow_ode(sde: SDE, kind: str) -> None:
    given, _ = covariances(kind, 1)
    model = Gaussian(sde, numbers(*SHAPE, seed=5), given[0] if given.ndim else given)
    x = model.sde.prior_std * numbers(3, *SHAPE, seed=6)

    def velocity(t: Tensor, y: Tensor) -> Tensor:
        return sde.flow(*model(y, t)[:2], t)  # finite at t = 1 too

    end, _ = integrate(velocity, x, 1.0, 0.05, sde=sde, solver=Solver("dopri8", rtol=1e-9, atol=1e-10))
    one, late = torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.05, dtype=torch.float64)
    flown = model.flow(x, one, late)
    torch.testing.assert_close(flown, end, rtol=1e-7, atol=1e-7)  # the solver's global error
    half = torch.tensor(0.4, dtype=torch.float64)
    close(model.flow(model.flow(x, one, half), half, late), flown)
    close(model.flow(flown, late, one), x)


def test_computations_follow_the_dtype_of_x() -> None:
    model, *_ = mixture(VPSDE(), "full")
    x, t = numbers(4, *SHAPE, seed=6), torch.tensor(0.3, dtype=torch.float64)
    e = model(x.float(), t)
    assert e.data.dtype == e.noise.dtype == model.log_prob(x.float(), t).dtype == torch.float32
    torch.testing.assert_close(e.data.double(), model(x, t).data, rtol=1e-4, atol=1e-5)
    assert Gaussian(VPSDE(), torch.zeros(3), 1.0).means.dtype == torch.float32
    assert Gaussian(VPSDE(), [0.0, 1.0], 1.0).means.dtype == torch.float64


def test_an_empty_batch_has_empty_answers() -> None:
    t = torch.tensor(0.3, dtype=torch.float64)
    for model in (mixture(VPSDE(), "full")[0], Empirical(VPSDE(), numbers(3, *SHAPE))):
        assert model(numbers(0, *SHAPE), t).data.shape == (0, *SHAPE)


def test_the_score_is_continuous_where_components_are_far_away() -> None:
    model = Mixture(VPSDE(), [1.0, 1.0], [[-1e3], [1e3]], 1e-4)
    x = torch.tensor([[-2e3], [0.0], [3e3]], dtype=torch.float64)
    for t in torch.tensor([1e-5, 0.5, 1.0], dtype=torch.float64):
        e = model(x, t)
        assert all(bool(y.isfinite().all()) for y in (e.data, e.noise, e.score, model.log_prob(x, t)))


def test_errors_name_the_thing_and_the_remedy() -> None:
    sde, means = VPSDE(), numbers(K, *SHAPE)
    with pytest.raises(ValueError, match="weights must be 3 positive numbers"):
        Mixture(sde, [1.0, 2.0], means, 1.0)
    with pytest.raises(ValueError, match="weights must be 3 positive numbers"):
        Mixture(sde, [1.0, 0.0, 1.0], means, 1.0)
    with pytest.raises(ValueError, match=r"covs must have shape \(\), \(3,\), \(3, 2, 3\) or \(3, 6, 6\)"):
        Mixture(sde, [1.0, 1.0, 1.0], means, torch.ones(3, 6))
    with pytest.raises(ValueError, match="positive semi-definite, got the eigenvalue -1"):
        Gaussian(sde, numbers(2), [[0.0, 1.0], [1.0, 0.0]])
    model = Mixture(sde, [1.0, 1.0, 1.0], means, 1.0)
    with pytest.raises(ValueError, match=r"x must have shape \(B, 2, 3\), got \(4, 6\)"):
        model(numbers(4, 6), torch.tensor(0.5))
    with pytest.raises(ValueError, match=r"label must lie in 0..2"):
        model.given(label=3)(numbers(4, *SHAPE), torch.tensor(0.5))
    with pytest.raises(ValueError, match=r"one per box, and low and high \(K, \*shape\) alike, got \[1.0\], \(2, 2\)"):
        Boxes(sde, [1.0], LOW, HIGH)
    with pytest.raises(ValueError, match=r"low must be below high in every dimension of every box, got -0.2"):
        Boxes(sde, [1.0, 1.0], HIGH, LOW)
    with pytest.raises(ValueError, match=r"x must have shape \(B, 2\), got \(4, 6\)"):
        Boxes(sde, [1.0, 1.0], LOW, HIGH)(numbers(4, 6), torch.tensor(0.5))
    with pytest.raises(ValueError, match=r"data must have shape \(N, \*shape\)"):
        Empirical(sde, torch.zeros(5))


def test_an_exact_model_is_a_model_like_any_other() -> None:
    model = Gaussian(VPSDE(), numbers(2), 0.5)
    x, t = numbers(4, 2, seed=1), torch.tensor(0.3, dtype=torch.float64)
    close(from_score(VPSDE(), model.score)(x, t).data, model(x, t).data)
    assert {n for n, _ in model.named_buffers()} == {"log_weights", "means", "variances"}  # moves and saves with .to()
