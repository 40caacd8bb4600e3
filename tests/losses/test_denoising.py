"""Denoising score matching: what minimises it, what it costs at best, and the laws from which times are drawn."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import kstest, truncnorm
from torch import Tensor

from score_sde import DDPM, EDMSDE, SDE, SMLD, VPSDE, LinearSDE, Preconditioned, ScoreModel, from_score
from score_sde.losses import denoising, edm, flow_matching, likelihood, min_snr, noise_error, simple, velocity
from score_sde.losses.time_laws import (
    TimeLaw,
    discrete,
    importance,
    log_normal,
    log_snr,
    low_discrepancy,
    mode,
    soft_truncation,
    truncation,
    uniform,
    uniform_numbers,
)
from score_sde.models.closed_form import Gaussian, Mixture
from score_sde.models.rules import RuleName, label_log_sigma, predict_edm, unit_variance
from score_sde.networks import MLP
from score_sde.sdes import like
from tests.oracles import PURE, SDES, first_time, name, numbers

EVERY = pytest.mark.parametrize("sde", [*SDES, DDPM.linear(100).as_sde(), SMLD([0.1, 1.0, 5.0]).as_sde()], ids=name)
WEIGHTS = pytest.mark.parametrize("weight", [simple, likelihood])
MEAN = torch.tensor([0.3, -0.7], dtype=torch.float64)
COV = torch.tensor([[0.5, 0.3], [0.3, 1.2]], dtype=torch.float64)


def nodes() -> tuple[Tensor, Tensor, Tensor]:
    """Data and noise (81, 2), and weights, of a quadrature over x0 ~ N(MEAN, COV), z ~ N(0, I), exact to degree 5."""
    points, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(3))
    grid = torch.cartesian_prod(*[points] * 4)
    w = torch.cartesian_prod(*[weights / weights.sum()] * 4).prod(1)
    return MEAN + grid[:, :2] @ torch.linalg.cholesky(COV).T, grid[:, 2:], w


def expected_loss(model: ScoreModel, t: float, weight: Callable = simple) -> float:
    """The loss at time t averaged over data and noise: exact for a linear model, whose loss is quadratic."""
    x0, z, w = nodes()
    return float(w @ denoising(model, x0, torch.full((len(x0),), t, dtype=torch.float64), z, weight))


@WEIGHTS
@EVERY
def test_the_exact_model_costs_the_irreducible_loss(sde: SDE, weight: Callable) -> None:
    eigenvalues = torch.linalg.eigvalsh(COV)
    for t in (0.02, 0.2, 0.5, first_time(sde)):
        time = torch.tensor(t, dtype=torch.float64)
        a2s2, v = sde.alpha(time) ** 2 * eigenvalues, sde.sigma(time) ** 2
        floor = weight(sde, time) * (a2s2 / (a2s2 + v)).mean()
        assert expected_loss(Gaussian(sde, MEAN, COV), t, weight) == pytest.approx(floor.item(), rel=1e-9)


@EVERY
def test_every_perturbation_of_the_exact_model_costs_more(sde: SDE) -> None:
    exact = Gaussian(sde, MEAN, COV)
    perturbations = {
        "longer": lambda s, x: 1.01 * s,
        "shorter": lambda s, x: 0.99 * s,
        "shifted": lambda s, x: s + 0.01,
        "turned": lambda s, x: s + 0.01 * s.flip(1),
        "sheared": lambda s, x: s + 0.01 * x.flip(1),
    }
    for t in (0.02, 0.2, 0.5, first_time(sde)):
        time = torch.tensor(t, dtype=torch.float64)
        x0, z, w = nodes()
        x = sde.perturb(x0, time, z)
        score, best = exact.score(x, time), expected_loss(exact, t)
        for change in perturbations.values():
            worse = from_score(sde, lambda x, t, change=change: change(exact.score(x, t), x))
            # E |e + d - z|² - E |e - z|² = E |d|² for the conditional mean e: the excess is the Fisher divergence.
            excess = sde.sigma(time) ** 2 * (w @ (change(score, x) - score).square().mean(1))
            assert excess > 0
            assert expected_loss(worse, t) - best == pytest.approx(excess.item(), rel=1e-6, abs=1e-14)


@EVERY
def test_likelihood_weighting_is_the_papers(sde: SDE) -> None:
    x0, z, _ = nodes()
    t = torch.linspace(0.02, 1, len(x0), dtype=torch.float64)
    model = from_score(sde, lambda x, t: torch.sin(x))
    score = torch.sin(sde.perturb(x0, t, z))
    paper = sde.g(t) ** 2 * (score + z / like(sde.sigma(t), z)).square().mean(1)
    torch.testing.assert_close(denoising(model, x0, t, z, likelihood), paper, rtol=1e-9, atol=1e-12)
    lambda_sigma2 = sde.sigma(t) ** 2 * (score + z / like(sde.sigma(t), z)).square().mean(1)
    torch.testing.assert_close(denoising(model, x0, t, z, simple), lambda_sigma2, rtol=1e-9, atol=1e-12)


def test_a_loss_is_one_value_per_example_of_any_rank_and_passes_conditions_on() -> None:
    g = torch.Generator().manual_seed(0)
    means = torch.tensor([[0.0], [3.0]], dtype=torch.float64)
    for shape in [(5, 1), (5, 3), (5, 3, 4, 4), (5, 2, 3, 4, 5)]:
        x0, z = torch.randn(2, *shape, generator=g, dtype=torch.float64)
        t = torch.rand(5, generator=g, dtype=torch.float64)
        loss = denoising(from_score(VPSDE(), lambda x, t: -x), x0, t, z, simple)
        assert loss.shape == (5,)
        alone = denoising(from_score(VPSDE(), lambda x, t: -x), x0[3:4], t[3:4], z[3:4], simple)
        torch.testing.assert_close(loss[3:4], alone)
    model = Mixture(VPSDE(), [1.0, 1.0], means, 0.1)
    x0, z = torch.randn(2, 5, 1, generator=g, dtype=torch.float64)
    label = torch.tensor([0, 1, 0, 1, 1])
    conditional = denoising(model, x0, t, z, simple, label=label)
    torch.testing.assert_close(conditional, denoising(model.given(label=label), x0, t, z, simple))
    assert not torch.allclose(conditional, denoising(model, x0, t, z, simple))


def test_shapes_that_do_not_fit_are_refused() -> None:
    model, x0 = from_score(VPSDE(), lambda x, t: -x), torch.zeros(4, 2)
    for t, z in [(torch.rand(()), x0), (torch.rand(3), x0), (torch.rand(4), x0[:, :1])]:
        with pytest.raises(ValueError, match=r"t must have shape \(4,\) and z \(4, 2\), got"):
            denoising(model, x0, t, z, simple)


def test_gradients_lead_a_linear_model_to_the_closed_form() -> None:
    """At one time the best linear noise estimate is sigma V⁻¹ (x - alpha m): gradient descent finds it."""
    sde, t = VPSDE(), torch.tensor(0.3, dtype=torch.float64)
    x0, z, w = nodes()
    network = torch.nn.Linear(2, 2, dtype=torch.float64)
    model = from_score(sde, lambda x, t: -network(x) / sde.sigma(t)[:, None])
    optimizer = torch.optim.LBFGS(network.parameters(), max_iter=100, tolerance_grad=1e-12, tolerance_change=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = w @ denoising(model, x0, t.expand(len(x0)), z, simple)
        loss.backward()
        return loss

    optimizer.step(closure)
    v = sde.alpha(t) ** 2 * COV + sde.sigma(t) ** 2 * torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(network.weight, sde.sigma(t) * v.inverse(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(network.bias, -sde.sigma(t) * sde.alpha(t) * (v.inverse() @ MEAN), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", ["noise", "data", "v", "score", "edm", "mean"])
def test_every_parametrisation_is_led_to_the_same_optimum(rule: RuleName) -> None:
    """A linear network with a bias is all that Gaussian data ask for; what its output means is the rule's affair."""
    x0, z, w = nodes()
    for sde, t in [(DDPM.linear(20, 0.01, 0.3).as_sde(), 0.35), (SMLD([0.1, 1.0, 5.0]).as_sde(), 2 / 3)]:
        times = torch.full((len(x0),), t, dtype=torch.float64)
        linear = torch.nn.Linear(2, 2, dtype=torch.float64)
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
        model = Preconditioned(WithoutLabel(linear), sde, rule)
        optimizer = torch.optim.LBFGS(
            linear.parameters(), max_iter=200, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure(model: ScoreModel = model, times: Tensor = times, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = w @ denoising(model, x0, times, z, simple)
            loss.backward()
            return loss

        optimizer.step(closure)
        x = model.sde.perturb(x0, times, z)
        with torch.no_grad():
            found, wanted = model(x, times), Gaussian(sde, MEAN, COV)(x, times)
        torch.testing.assert_close(found.noise, wanted.noise, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.data, wanted.data, rtol=0, atol=1e-4)


# --- flow matching


@EVERY
def test_flow_matching_is_denoising_with_the_velocity_s_weight(sde: SDE) -> None:
    """And the error of the velocity itself, alpha' data + sigma' noise with the curves' rates by autodiff."""
    t = torch.tensor([0.021, 0.1, 0.33, 0.5, 0.8, 0.97], dtype=torch.float64)  # no step of a chain
    x0, z, output = (numbers(6, 3, 2, 2, seed=seed) for seed in range(3))
    model = Preconditioned(Given(output), sde, "v")
    found = flow_matching(model, x0, t, z)
    torch.testing.assert_close(found, denoising(model, x0, t, z, velocity), rtol=1e-9, atol=0)
    alpha_rate, sigma_rate = torch.func.jvp(lambda u: (sde.alpha(u), sde.sigma(u)), (t,), (torch.ones_like(t),))[1]
    e = model(sde.perturb(x0, t, z), t)
    error = like(alpha_rate, x0) * (e.data - x0) + like(sigma_rate, x0) * (e.noise - z)
    torch.testing.assert_close(found, error.square().mean((1, 2, 3)), rtol=1e-9, atol=0)


@pytest.mark.parametrize("sde", PURE, ids=name)
def test_flow_matching_is_the_network_s_own_error_up_to_pure_noise_in_float32(sde: SDE) -> None:
    """On the straight path mean (F - (noise - data))²; on the trigonometric one (pi/2)² times v's error."""
    t = torch.tensor([0.001, 0.5, 1 - 1e-7, 1.0], dtype=torch.float64)
    x0, z, output = (numbers(4, 8, seed=seed).float() for seed in range(3))
    alpha_rate, sigma_rate = (like(rate, x0) for rate in sde.rates(t))
    wanted = (output - (alpha_rate * x0 + sigma_rate * z)).square().mean(1)
    found = flow_matching(Preconditioned(Given(output), sde, "velocity"), x0, t, z)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    if isinstance(sde, LinearSDE):
        torch.testing.assert_close(found, (output - (z - x0)).square().mean(1), rtol=1e-5, atol=0)


def test_log_normal_noise_on_the_straight_path_is_logit_normal_time() -> None:
    """Esser et al. 2024, eq. 19: logit(t) is normal."""
    law = partial(log_normal, mean=0.4, std=0.9)
    t = law(LinearSDE(t_min=1e-9), uniform_numbers(20_000, torch.Generator().manual_seed(0))).t
    assert kstest(torch.logit(t).numpy(), "norm", (0.4, 0.9)).pvalue > 1e-3


def test_mode_s_times_stay_a_map_of_increasing_numbers() -> None:
    for scale in (-1.0, 0.0, 1.29, 1.75):
        t = mode(LinearSDE(t_min=0.0), torch.linspace(0, 1, 1001, dtype=torch.float64), scale).t
        assert bool((t.diff() >= 0).all()) and t[0] < 1e-15 and t[-1] == 1, scale
    for scale in (-1.01, 1.76):
        with pytest.raises(ValueError, match=r"scale must lie between -1 and 1.752, got"):
            mode(LinearSDE(), torch.rand(3), scale)


class Given(torch.nn.Module):
    """A network with a given output."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.output


class WithoutLabel(torch.nn.Module):
    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.network(x)


# --- time laws


def rising(sde: SDE, t: Tensor) -> Tensor:
    return 1 + 3 * t


LAWS: dict[str, TimeLaw] = {
    "uniform": uniform,
    "log_snr": log_snr,
    "importance(likelihood)": importance(likelihood),
    "importance(rising)": importance(rising),
    "log_normal": partial(log_normal, mean=-0.5, std=4.0),
    "mode": mode,
    "mode(-0.8)": partial(mode, scale=-0.8),
}
EVERY_LAW = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())


@EVERY_LAW
@pytest.mark.parametrize("sde", SDES, ids=name)
def test_weighted_times_average_as_uniform_times(sde: SDE, law: TimeLaw) -> None:
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    t, weight = law(sde, u)
    assert t.min() >= sde.t_min and t.max() <= 1 and bool((weight > 0).all())
    for h in (np.cos, np.sqrt, lambda t: t**3):
        truth = quad(h, sde.t_min, 1)[0] / (1 - sde.t_min)
        mean = float((weight * torch.from_numpy(h(t.numpy()))).mean())
        assert mean == pytest.approx(truth, rel=2e-4)  # the midpoint rule; log-SNR times of EDM begin at t = 1e-5


def test_times_have_the_density_they_claim() -> None:
    sde, g = VPSDE(), torch.Generator().manual_seed(0)
    first, last = sde.log_snr(torch.tensor([sde.t_min, 1.0], dtype=torch.float64))
    cdfs: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "uniform": lambda t: (t - sde.t_min) / (1 - sde.t_min),
        "log_snr": lambda t: ((sde.log_snr(torch.from_numpy(t)) - first) / (last - first)).numpy(),
        # (g/sigma)² = -(log SNR)': likelihood weighting's own law is uniform in log SNR
        "importance(likelihood)": lambda t: ((sde.log_snr(torch.from_numpy(t)) - first) / (last - first)).numpy(),
        "importance(rising)": lambda t: (
            (t + 1.5 * t**2 - sde.t_min - 1.5 * sde.t_min**2) / (2.5 - sde.t_min - 1.5 * sde.t_min**2)
        ),
        "log_normal": lambda t: truncnorm.cdf(
            -sde.log_snr(torch.from_numpy(t)).numpy() / 2, *((-e / 2 + 0.5) / 4 for e in (first, last)), -0.5, 4
        ),
    }

    def unmapped(t: float, scale: float) -> float:
        """The v of t = 1 - v - scale (cos²(pi v/2) - 1 + v)."""
        return float(brentq(lambda v: 1 - v - scale * (math.cos(math.pi * v / 2) ** 2 - 1 + v) - t, 0, 1))

    for law, scale in {"mode": 1.29, "mode(-0.8)": -0.8}.items():
        cdfs[law] = lambda t, s=scale: np.array([1 - unmapped(x, s) / unmapped(sde.t_min, s) for x in t])
    for law in LAWS:
        t = LAWS[law](sde, uniform_numbers(20_000, g)).t.numpy()
        assert kstest(t, cdfs[law]).pvalue > 1e-3, law
        # and not only at random: the map from u is the inverse of the distribution function
        u = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
        np.testing.assert_allclose(cdfs[law](LAWS[law](sde, u).t.numpy()), u.numpy(), atol=1e-4)


def test_edm_s_noise_is_log_normal_and_its_weight_is_one_of_the_network_s_own_error() -> None:
    sde, sigma_data = EDMSDE(t_min=0.0), 0.7
    t = log_normal(sde, uniform_numbers(20_000, torch.Generator().manual_seed(0))).t
    assert kstest(sde.sigma(t).log().numpy(), "norm", (-1.2, 1.2)).pvalue > 1e-3
    # the network's target has unit variance: F's error, by rule "edm", is the noise's error over the rule's gain
    for curve in SDES:
        times = torch.tensor([0.1, 0.6], dtype=torch.float64)
        (_, _), (_, gain) = predict_edm(curve.alpha(times), curve.sigma(times), sigma_data)
        torch.testing.assert_close(edm(curve, times, sigma_data), 1 / gain**2)


def test_the_ends_of_u_stay_inside_the_law() -> None:
    u = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for sde in SDES:
        for law in LAWS.values():
            t, weight = law(sde, u)
            assert bool(((t >= sde.t_min) & (t <= 1)).all()) and bool(weight.isfinite().all())


@pytest.mark.parametrize("law", [log_snr, log_normal])
def test_where_t_min_is_0_the_smallest_time_is_1e_5(law: TimeLaw) -> None:
    """VP's log SNR is infinite at t = 0; EDM's is not, and is taken as it is."""
    assert law(VPSDE(t_min=0.0), torch.zeros(1, dtype=torch.float64)).t.item() == pytest.approx(1e-5, rel=1e-6)
    assert law(EDMSDE(), torch.zeros(1, dtype=torch.float64)).t.item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("sde", SDES[:2], ids=name)
def test_importance_sampling_lowers_the_variance_of_the_likelihood_weighted_loss(sde: SDE) -> None:
    model = Gaussian(sde, MEAN, COV)
    g = torch.Generator().manual_seed(0)
    n = 20_000
    x0, _ = model.sample(n, g)
    z = torch.randn(x0.shape, generator=g, dtype=torch.float64)
    values = {}
    for law in ("uniform", "importance(likelihood)"):
        t, weight = LAWS[law](sde, uniform_numbers(n, g))
        values[law] = weight * denoising(model, x0, t, z, likelihood)
    plain, better = values["uniform"], values["importance(likelihood)"]
    assert better.var() < plain.var() / 20  # measured: 1/60 (VP), 1/200 (sub-VP)
    error = math.sqrt(float(plain.var() + better.var()) / n)
    assert abs(plain.mean() - better.mean()) < 4 * error


@pytest.mark.parametrize("sde", SDES[:2], ids=name)
def test_with_an_imperfect_score_too_importance_sampling_is_unbiased_and_of_lower_variance(sde: SDE) -> None:
    """A score that is 30 % too long, and bent: the truth by quadrature over t of the quadratic part's closed form."""
    exact = Gaussian(sde, MEAN, COV)
    model = from_score(sde, lambda x, t: 1.3 * exact.score(x, t) + 0.2 * x.flip(1))
    steps = torch.cat([sde.t_min + (1 - sde.t_min) * edge for edge in torch.logspace(-6, 0, 301).double().split(1)])
    middles, widths = (steps[1:] + steps[:-1]) / 2, steps.diff()
    nodes_x0, nodes_z, w = nodes()
    each = middles.repeat_interleave(len(w))
    of_each = denoising(model, nodes_x0.repeat(300, 1), each, nodes_z.repeat(300, 1), likelihood)
    truth = widths @ of_each.reshape(300, -1) @ w
    g, n = torch.Generator().manual_seed(0), 20_000
    x0, _ = exact.sample(n, g)
    z = torch.randn(x0.shape, generator=g, dtype=torch.float64)
    values = {}
    for law in ("uniform", "importance(likelihood)"):
        t, weight = LAWS[law](sde, uniform_numbers(n, g))
        values[law] = (1 - sde.t_min) * weight * denoising(model, x0, t, z, likelihood)
    plain, better = values["uniform"], values["importance(likelihood)"]
    for value in values.values():
        assert abs(value.mean() - truth) < 4 * value.std() / math.sqrt(n)
    assert better.std() / math.sqrt(n) < 0.011 * truth  # so that 4.4 % would be seen
    assert better.var() < plain.var() / 10  # measured: 1/21 (VP), 1/29 (sub-VP)


# --- soft truncation

TRUNCATIONS = pytest.mark.parametrize("k", [0.5, 1.0, 1.2, 2.0])


def above(t: Tensor, t_min: float, k: float) -> Tensor:
    """P(tau <= t) for density tau^-k on [t_min, 1]."""
    if k == 1:
        return torch.log(t / t_min) / -math.log(t_min)
    return (t ** (1 - k) - t_min ** (1 - k)) / (1 - t_min ** (1 - k))


@TRUNCATIONS
def test_the_smallest_time_of_a_batch_has_its_density(k: float) -> None:
    v = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    tau = truncation(1e-3, k, v)
    torch.testing.assert_close(above(tau, 1e-3, k), v, rtol=0, atol=1e-9)
    ends = truncation(1e-3, k, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([1e-3, 1.0], dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "sde, k, law",
    [
        *((SDES[0], 1.0, law) for law in ("uniform", "log_snr", "importance(likelihood)")),
        (SDES[0], 2.0, "uniform"),
        (SDES[2], 1.0, "uniform"),
    ],
    ids=str,
)
def test_softly_truncated_times_average_with_the_general_weight(sde: SDE, k: float, law: str) -> None:
    """Over batches, as uniform times do under the weight P(tau <= t) (Kim et al. 2022, theorem 1)."""
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    means = []
    for v in (torch.arange(100, dtype=torch.float64) + 0.5) / 100:
        tau = truncation(sde.t_min, k, v)
        t, weight = soft_truncation(LAWS[law], k, v)(sde, u)
        assert bool((t >= tau).all()) and t.max() <= 1
        means.append(torch.stack([(weight * h(t)).mean() for h in (torch.ones_like, torch.cos, torch.sqrt)]))
    found = torch.stack(means).mean(0)
    for value, h in zip(found.tolist(), (lambda t: 1.0, math.cos, math.sqrt), strict=True):

        def weighted(y: float, h: Callable[[float], float] = h) -> float:
            """In log t, where the weight of k = 2 is smooth near t_min."""
            t = math.exp(y)
            return t * above(torch.tensor(t, dtype=torch.float64), sde.t_min, k).item() * h(t)

        truth = quad(weighted, math.log(sde.t_min), 0)[0] / (1 - sde.t_min)
        assert value == pytest.approx(truth, rel=5e-3)  # of the midpoint rule over tau


def test_above_the_truncation_times_follow_their_law() -> None:
    sde, v = VPSDE(), torch.tensor(0.6, dtype=torch.float64)
    tau, g = truncation(sde.t_min, 1.0, v), torch.Generator().manual_seed(0)
    t = soft_truncation(log_snr, 1.0, v)(sde, low_discrepancy(64, g)).t
    first, last = sde.log_snr(torch.stack([tau, torch.ones_like(tau)]))
    cells = ((sde.log_snr(t) - first) / (last - first) * 64).sort().values.floor()
    assert cells.tolist() == list(range(64))  # even numbers stay even
    u = torch.linspace(0, 0.99, 7, dtype=torch.float64)
    torch.testing.assert_close(soft_truncation(uniform, 1.0, v)(sde, u).t, tau + (1 - tau) * u, rtol=0, atol=1e-12)


def test_soft_truncation_needs_a_time_above_zero() -> None:
    with pytest.raises(ValueError, match=r"soft truncation needs t_min above 0, got 0.0; 1e-5 is usual"):
        soft_truncation(uniform, 1.0, torch.tensor(0.5))(SDES[4], torch.rand(3))


def test_low_discrepancy_numbers_are_uniform_one_by_one_and_even_together() -> None:
    g = torch.Generator().manual_seed(0)
    batches = torch.stack([low_discrepancy(16, g) for _ in range(2000)])
    assert batches.min() >= 0 and batches.max() < 1
    for i in (0, 7, 15):  # each place of the batch, so that no example is always early or late
        assert kstest(batches[:, i].numpy(), "uniform").pvalue > 1e-3
    ordered = (batches.sort(1).values * 16).floor()
    assert bool((ordered == torch.arange(16)).all())  # one number in each of 16 cells
    assert abs(torch.corrcoef(batches[:, :2].T)[0, 1] + 1 / 15) < 0.1  # no order: exclusion is all that is left


def test_low_discrepancy_lowers_the_variance_over_times_and_keeps_the_mean() -> None:
    sde, g = VPSDE(), torch.Generator().manual_seed(0)

    def means(numbers: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        t = torch.stack([uniform(sde, numbers(32, g)).t for _ in range(1000)])
        return likelihood(sde, t.clamp_min(0.05)).mean(1)

    independent, even = means(uniform_numbers), means(low_discrepancy)
    assert even.var() < independent.var() / 10
    error = math.sqrt(float(independent.var() + even.var()) / 1000)
    assert abs(independent.mean() - even.mean()) < 4 * error


def test_discrete_times_are_a_chains_steps_with_equal_chances() -> None:
    n = 8
    t, weight = discrete(n)(DDPM.linear(n, 0.1, 0.4).as_sde(), torch.arange(80, dtype=torch.float64) / 80)
    steps = DDPM.linear(n, 0.1, 0.4).times[:-1]
    assert set(t.tolist()) == set(steps.tolist())
    assert all(int((t == s).sum()) == 10 for s in steps)
    assert bool((weight == 1).all())


@pytest.mark.parametrize("numbers", [uniform_numbers, low_discrepancy])
def test_times_come_from_the_generator_alone(numbers: Callable[[int, torch.Generator], Tensor]) -> None:
    a, b, c = (numbers(5, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert a.tolist() == b.tolist() != c.tolist()
    assert a.dtype == torch.float64 and numbers(0, torch.Generator()).shape == (0,)


# --- training


def test_a_network_trained_on_a_mixture_knows_its_score_at_every_noise_level() -> None:
    """At most 5 % of the zero score's Fisher divergence, at five noise levels from sigma/alpha = 0.2 to 100.

    The data's components have a standard deviation of 0.3: 0.2 is below all of their structure.
    """
    sde = VPSDE()
    truth = Mixture(sde, [0.3, 0.7], torch.tensor([[-1.0, 0.5], [1.0, -0.5]]), 0.09)
    torch.manual_seed(0)  # of the network's initial weights, which PyTorch draws from its global generator
    network = MLP(2, width=64, depth=2)
    model = Preconditioned(
        network, sde, partial(predict_edm, sigma_data=1.0), label_log_sigma, partial(unit_variance, sigma_data=1.0)
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    steps, g = 250, torch.Generator().manual_seed(0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x0 = truth.sample(256, g)[0].float()
        t = log_snr(sde, low_discrepancy(256, g)).t
        loss = denoising(model, x0, t, torch.randn(x0.shape, generator=g), simple).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    x0 = truth.sample(4096, g)[0].float()
    for ratio in (0.2, 0.5, 1.0, 5.0, 100.0):
        t = sde.time(-2 * torch.log(torch.tensor(ratio, dtype=torch.float64)))
        x = sde.perturb(x0, t, torch.randn(x0.shape, generator=g))
        with torch.no_grad():
            exact = truth.score(x, t)
            error = (model.score(x, t) - exact).square().mean() / exact.square().mean()
        assert error < 0.05, f"sigma/alpha = {ratio}: {error:.3f}"


@pytest.mark.parametrize("gamma", [0.1, 5.0, 1e9])
@pytest.mark.parametrize("sde", SDES, ids=name)
def test_minimal_snr_is_the_paper_s_weight_of_data_noise_and_v(sde: SDE, gamma: float) -> None:
    source = torch.Generator().manual_seed(0)
    x0, z = torch.randn(2, 50, 3, generator=source, dtype=torch.float64)
    t = torch.linspace(0.02, 1, 50, dtype=torch.float64)
    model = Gaussian(sde, torch.zeros(3).double(), torch.tensor(0.3).double())  # some model, of any errors
    estimate = model(sde.perturb(x0, t, z), t)
    alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
    snr = (alpha / sigma).square()[:, 0]
    weight, data_error = min_snr(sde, t, gamma), (estimate.data - x0).square().mean(1)
    torch.testing.assert_close(weight * noise_error(model, x0, t, z), snr.clamp_max(gamma) * data_error)
    if gamma > 1e8:
        assert torch.equal(weight, simple(sde, t))
    v_error = ((alpha * estimate.noise - sigma * estimate.data) - (alpha * z - sigma * x0)).square().mean(1)
    norm = (alpha**2 + sigma**2)[:, 0]  # 1 in the paper
    torch.testing.assert_close(weight * noise_error(model, x0, t, z), snr.clamp_max(gamma) / (snr + 1) * v_error / norm)


def test_minimal_snr_is_finite_where_there_is_no_signal_or_no_noise() -> None:
    class Ends(SDE):
        def alpha(self, t: Tensor) -> Tensor:
            return 1 - t

        def sigma(self, t: Tensor) -> Tensor:
            return t

        f = g = alpha

    assert min_snr(Ends(), torch.tensor([0.0, 0.5, 1.0])).tolist() == [0, 1, 1]
