"""SDEs: the curves agree with the papers, with each other and with themselves in float32."""

import copy
import pickle
from dataclasses import FrozenInstanceError, replace
from itertools import product

import mpmath  # torch depends on it through sympy
import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp

from score_sde import EDMSDE, SDE, VESDE, VPSDE, CosineSDE, SubVPSDE
from score_sde.models.rules import label_sigma, label_time
from score_sde.sdes import like
from tests.oracles import CHAINS, LEARNED, PUBLISHED, PURE, SDES, TABLES, first_time, name, numbers, recorded

EVERY = pytest.mark.parametrize("sde", SDES, ids=name)
AND_LEARNED = pytest.mark.parametrize("sde", [*SDES, LEARNED], ids=name)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
CURVES = ["alpha", "sigma", "f", "g"]

# From 1e-5 to 1, dense at both ends, and no knot of a chain: their curves have corners there.
TIMES = torch.cat([torch.logspace(-5, -1.01, 40), torch.linspace(0.1003, 0.9, 40), 1 - torch.logspace(-1.01, -5, 40)])
TIMES = TIMES.double()
CHAIN_TIMES = (torch.arange(0, 1, 1 / 500, dtype=torch.float64) + 0.0007)[:500]

# Exact at t = 0, where each SDE starts.
START = {name(sde): float(curves(mpmath.mpf(0))[1]) for sde, curves in PUBLISHED.items()}


def derivative(curve, t: torch.Tensor) -> torch.Tensor:
    t = t.clone().requires_grad_(True)
    return torch.autograd.grad((curve(t) + 0 * t).sum(), t)[0]  # 0 t: a constant curve has a derivative too


# ---------------------------------------------------------------------------------------------------------------------
# The curves


@EVERY
@DTYPES
def test_alpha_and_sigma_are_the_published_ones(sde, dtype):
    t = TIMES.to(dtype)
    with mpmath.workdps(50):
        truth = [[float(value) for value in PUBLISHED[sde](mpmath.mpf(u))] for u in t.tolist()]
    # Exponents reach 10 (log alpha of VP, log sigma of VE), so float32 rounds them by 10 * 6e-8.
    rtol = 2e-6 if dtype == torch.float32 else 4e-15
    for curve, values in zip((sde.alpha(t), sde.sigma(t)), torch.tensor(truth, dtype=torch.float64).T):
        assert curve.dtype == dtype
        torch.testing.assert_close(curve.double(), values, rtol=rtol, atol=0)


@pytest.mark.parametrize("sde", [*SDES, LEARNED, *(chain.as_sde() for chain in CHAINS)], ids=name)
def test_f_and_g_are_the_rates_of_alpha_and_sigma(sde):
    t = CHAIN_TIMES if sde.steps else TIMES
    f = derivative(lambda u: torch.log(sde.alpha(u)), t)
    g2 = derivative(lambda u: sde.sigma(u) ** 2, t) - 2 * f * sde.sigma(t) ** 2
    # A difference of knots, -log alpha_bar up to 10 and a step of 1e-3, has 1e-12 at worst; 1 - t has so near t = 1.
    torch.testing.assert_close(sde.f(t), f, rtol=4e-12 if sde in PURE else 1e-12, atol=1e-300)
    torch.testing.assert_close(sde.g(t) ** 2, g2, rtol=4e-12 if sde in PURE else 1e-12, atol=0)
    log_snr_rate = derivative(sde.log_snr, t)
    torch.testing.assert_close(-((sde.g(t) / sde.sigma(t)) ** 2), log_snr_rate, rtol=1e-11, atol=0)


@EVERY
def test_alpha_and_sigma_solve_the_moment_equations(sde):
    """m' = f m and v' = 2 f v + g² from data to noise, by scipy (Särkkä & Solin 2019, eq. 5.50-51)."""

    def rates(t, y):
        t = torch.tensor(t, dtype=torch.float64)
        f, g = sde.f(t).item(), sde.g(t).item()
        return [f * y[0], 2 * f * y[1] + g**2]

    t = np.array([0.001, 0.03, 0.25, 0.5, 0.75, 0.95, first_time(sde)])
    start = [1.0, START[name(sde)] ** 2]
    solved = solve_ivp(rates, (0, t[-1]), start, method="DOP853", t_eval=t, rtol=1e-11, atol=1e-16)
    assert solved.success
    grid = torch.from_numpy(t)
    np.testing.assert_allclose(sde.alpha(grid).numpy(), solved.y[0], rtol=1e-9)
    np.testing.assert_allclose(sde.sigma(grid).numpy() ** 2, solved.y[1], rtol=1e-9)


@AND_LEARNED
def test_float32_curves_equal_float64_ones(sde):
    t = TIMES.float()
    for curve in CURVES:
        single, double = getattr(sde, curve)(t), getattr(sde, curve)(t.double())
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), double, rtol=2e-6, atol=0)
    # The logarithm turns the relative error of alpha/sigma into an absolute one.
    torch.testing.assert_close(sde.log_snr(t).double(), sde.log_snr(t.double()), rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("sde", [chain.as_sde() for chain in CHAINS], ids=name)
def test_float32_curves_of_a_chain_equal_float64_ones(sde):
    """To what rounding t does: its relative error eps moves log alpha by eps t |f|, log sigma by eps t (g/sigma)²/2.

    (In the last step of the cosine chain |f| = 173: there beta = 0.999 falls in 1/50 of the time.)
    """
    t, eps = CHAIN_TIMES.float(), torch.finfo(torch.float32).eps
    wide = t.double()
    moved = wide * (sde.f(wide).abs() + (sde.g(wide) / sde.sigma(wide)) ** 2 / 2)
    bound = 4 * eps * (1 + moved)
    for curve in CURVES:
        single, double = getattr(sde, curve)(t).double(), getattr(sde, curve)(t.double())
        assert bool(((single - double).abs() <= bound * double.abs()).all()), curve


@EVERY
def test_the_ends_are_data_and_noise(sde):
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert sde.alpha(ends)[0].item() == pytest.approx(1, abs=1e-15)
    assert sde.sigma(ends)[0].item() == pytest.approx(START[name(sde)], rel=1e-14)
    # With data of unit variance, x_1 has the prior's but for a share 4e-4 (VE), 2e-4 (EDM) or 4e-5 (sub-VP).
    variance = (sde.alpha(ends) ** 2 + sde.sigma(ends) ** 2)[1].item()
    assert variance == pytest.approx(sde.prior_std**2, rel=5e-4)
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert bool((sde.sigma(t).diff() > 0).all()) and bool((sde.log_snr(t).diff() < 0).all())


# ---------------------------------------------------------------------------------------------------------------------
# The inverse of log SNR


def rounding(sde: SDE, t: torch.Tensor) -> torch.Tensor:
    """How far t moves when log SNR is rounded (by its size, and by the error of alpha/sigma) and when t itself is."""
    rate = (sde.g(t) / sde.sigma(t)) ** 2
    return (sde.log_snr(t).abs() + 8) / rate + t


@pytest.mark.parametrize("sde", [*SDES, LEARNED, *(chain.as_sde() for chain in CHAINS)], ids=name)
@DTYPES
@pytest.mark.parametrize("bisection", [False, True], ids=["own", "bisection"])
def test_time_inverts_log_snr(sde, dtype, bisection):
    t = TIMES.to(dtype)
    inverse = SDE.time(sde, sde.log_snr(t)) if bisection else sde.time(sde.log_snr(t))
    assert inverse.dtype == dtype
    # 4 eps of what either rounding does; bisection of [0, 1] stops at 2^-64 or 2^-32.
    bound = 4 * torch.finfo(dtype).eps * rounding(sde, t.double()) + (2.0**-32 if dtype == torch.float32 else 2.0**-64)
    error = (inverse.double() - t.double()).abs()
    assert bool((error <= bound).all()), (error / bound).max()


@EVERY
def test_bisection_stays_between_data_and_noise(sde):
    beyond = torch.tensor([1e3, -1e3], dtype=torch.float64)
    torch.testing.assert_close(SDE.time(sde, beyond), torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=0, atol=1e-15)


# ---------------------------------------------------------------------------------------------------------------------
# Transitions and posteriors

TRIPLES = [(0.0, 0.2, 1.0), (1e-5, 1e-3, 0.01), (0.1, 0.101, 0.9), (0.3, 0.5, 0.50001), (0.9, 0.99, 1.0)]


@pytest.mark.parametrize("sde", [*SDES, LEARNED, *(chain.as_sde() for chain in CHAINS)], ids=name)
def test_transitions_compose(sde):
    s, t, u = torch.tensor(TRIPLES, dtype=torch.float64).T
    (first, first_std), (second, second_std) = sde.transition(s, t), sde.transition(t, u)
    scale, std = sde.transition(s, u)
    torch.testing.assert_close(first * second, scale, rtol=1e-14, atol=0)
    torch.testing.assert_close(((second * first_std) ** 2 + second_std**2).sqrt(), std, rtol=1e-12, atol=0)


@AND_LEARNED
@pytest.mark.parametrize("s, t", [(0.0, 0.3), (0.1, 0.102), (0.2, 0.9), (0.97, 1.0)])
def test_a_transition_collects_the_noise_of_its_interval(sde, s, t):
    """std² = integral over u from s to t of g(u)² (alpha(t)/alpha(u))², by scipy's quadrature."""
    t = min(t, first_time(sde))

    def one(u):
        return torch.tensor(u, dtype=torch.float64)

    scale, std = sde.transition(one(s), one(t))
    variance, _ = quad(
        lambda u: (sde.g(one(u)) * sde.alpha(one(t)) / sde.alpha(one(u))).item() ** 2, s, t, epsabs=0, epsrel=1e-11
    )
    assert scale.item() == pytest.approx((sde.alpha(one(t)) / sde.alpha(one(s))).item(), rel=1e-14)
    assert std.item() ** 2 == pytest.approx(variance, rel=1e-10)


@pytest.mark.parametrize("sde", [*SDES, LEARNED, *(chain.as_sde() for chain in CHAINS)], ids=name)
@pytest.mark.parametrize("s, t", [(0.2, 0.4), (0.6, 0.61), (0.001, 1.0)])
def test_the_posterior_is_gaussian_conditioning(sde, s, t):
    """Stack x_s and x_t (3 dimensions each) given x_0 into one Gaussian and condition it on x_t with matrices."""
    s, t = torch.tensor(s, dtype=torch.float64), torch.tensor(t, dtype=torch.float64)
    x0, x_t = numbers(4, 3, seed=1), numbers(4, 3, seed=2)
    scale, std = (value.item() for value in sde.transition(s, t))
    eye, v = np.eye(3), sde.sigma(s).item() ** 2
    step = np.block([[eye, 0 * eye], [scale * eye, std * eye]])  # (x_s, x_t) - mean = step (x_s - mean, z)
    cov = step @ np.block([[v * eye, 0 * eye], [0 * eye, eye]]) @ step.T
    gain = cov[:3, 3:] @ np.linalg.inv(cov[3:, 3:])
    expected = sde.alpha(s).item() * x0.numpy() + (x_t.numpy() - sde.alpha(t).item() * x0.numpy()) @ gain.T
    covariance = cov[:3, :3] - gain @ cov[3:, :3]
    mean, variance = sde.posterior(x_t, x0, s, t)
    np.testing.assert_allclose(mean.numpy(), expected, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(variance.item() * eye, covariance, rtol=1e-9, atol=1e-15 * v)


@pytest.mark.parametrize("sde", [sde for sde in SDES if START[name(sde)] == 0], ids=name)
def test_the_posterior_at_zero_is_the_data(sde):
    zero, t, x0 = torch.zeros((), dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64), numbers(2, 3)
    mean, variance = sde.posterior(numbers(2, 3, seed=1), x0, zero, t)
    torch.testing.assert_close(mean, x0, rtol=1e-14, atol=0)
    assert variance.item() == 0


# ---------------------------------------------------------------------------------------------------------------------
# Flows and priors


@AND_LEARNED
def test_the_flow_and_the_reverse_sde_carry_the_marginals(sde):
    """On data N(0, 0.7) the marginal variance V is known, and so must be how both change it.

    A flow x' = b x changes it by V' = 2 b V; the SDE dx = b x dt + g dw, run backwards, by -V' = -2 b V + g².
    """
    t, x = TIMES.clamp_max(first_time(sde)), numbers(len(TIMES))
    v = 0.7 * sde.alpha(t) ** 2 + sde.sigma(t) ** 2
    v_rate = derivative(lambda u: 0.7 * sde.alpha(u) ** 2 + sde.sigma(u) ** 2, t)
    score = -x / v
    torch.testing.assert_close(2 * v * sde.velocity(x, t, score) / x, v_rate, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(
        2 * v * sde.reverse_drift(x, t, score) / x - sde.g(t) ** 2, v_rate, rtol=1e-9, atol=1e-11
    )
    torch.testing.assert_close(sde.drift(x, t), sde.f(t) * x, rtol=0, atol=0)
    torch.testing.assert_close(sde.diffusion(t), sde.g(t), rtol=0, atol=0)


@EVERY
@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 1, 2, 3)], ids=str)
def test_prior_log_prob_is_the_prior_density(sde, shape):
    drawn = numbers(*shape, dtype=torch.float32)
    x = sde.prior(shape, lambda like: drawn)
    torch.testing.assert_close(x, sde.prior_std * drawn, rtol=0, atol=0)
    density = torch.distributions.Normal(0.0, torch.tensor(sde.prior_std, dtype=torch.float64))
    truth = density.log_prob(x.double()).reshape(4, -1).sum(1)
    torch.testing.assert_close(sde.prior_log_prob(x.double()), truth, rtol=1e-13, atol=0)
    assert sde.prior_log_prob(x).dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Shapes

RANKS = [(3,), (3, 3), (3, 3, 3), (3, 3, 3, 3), (3, 3, 2, 3, 3)]


@pytest.mark.parametrize("sde, shape", [*product(SDES, RANKS), (LEARNED, (3, 3, 3))], ids=str)
def test_times_meet_states_of_any_rank(sde, shape):
    """A (B,) time does to example i what its i-th value does as a scalar: sizes equal B, to hide no wrong axis."""
    x, z, score = numbers(*shape), numbers(*shape, seed=1), numbers(*shape, seed=2)
    s, t = torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.5, 0.7]], dtype=torch.float64)
    maps = [
        lambda i, s, t: sde.perturb(x[i], t, z[i]),
        lambda i, s, t: sde.drift(x[i], t),
        lambda i, s, t: sde.velocity(x[i], t, score[i]),
        lambda i, s, t: sde.reverse_drift(x[i], t, score[i]),
        lambda i, s, t: sde.posterior(x[i], z[i], s, t)[0],
    ]
    for act in maps:
        batch = act(slice(None), s, t)
        each = torch.cat([act(slice(i, i + 1), s[i], t[i]) for i in range(3)])
        assert batch.shape == shape
        torch.testing.assert_close(batch, each, rtol=1e-14, atol=0)
        torch.testing.assert_close(act(slice(None), s[0], t[0]), act(slice(None), s[:1].expand(3), t[:1].expand(3)))


@pytest.mark.parametrize("shape", RANKS, ids=str)
def test_perturb_scales_and_adds_noise(shape):
    sde, x, z = VPSDE(), numbers(*shape), numbers(*shape, seed=1)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    expected = [sde.alpha(u).item() * a.numpy() + sde.sigma(u).item() * b.numpy() for u, a, b in zip(t, x, z)]
    np.testing.assert_allclose(sde.perturb(x, t, z).numpy(), np.stack(expected), rtol=1e-14)


def test_states_keep_their_dtype():
    t = torch.rand(2, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.ones(2, 3, dtype=dtype)
        for times in (t, t[0]):
            assert VPSDE().perturb(x, times, x).dtype == dtype
            assert VPSDE().posterior(x, x, times / 2, times)[0].dtype == dtype


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1), (1, 1)], ids=str)
def test_a_time_that_fits_no_batch_is_refused(shape):
    with pytest.raises(ValueError, match=r"t must have shape \(\) or \(2,\) for a state of shape \(2, 3\)"):
        VPSDE().perturb(torch.ones(2, 3), torch.full(shape, 0.5), torch.ones(2, 3))


def test_integer_states_are_refused():
    with pytest.raises(ValueError, match="states must be floating point, got torch.uint8"):
        like(torch.tensor(0.5), torch.ones(2, 3, dtype=torch.uint8))


# ---------------------------------------------------------------------------------------------------------------------
# Values


@EVERY
def test_an_sde_is_a_value(sde):
    with pytest.raises(FrozenInstanceError):
        sde.t_min = 0.5
    with pytest.raises(TypeError):
        type(sde)(1.0)  # keyword-only
    assert type(sde)() == sde and hash(type(sde)()) == hash(sde)
    other = replace(sde, t_min=0.25)
    assert other.t_min == 0.25 and other != sde and replace(other, t_min=sde.t_min) == sde
    assert eval(repr(sde), {name(sde): type(sde)}) == sde
    assert pickle.loads(pickle.dumps(sde)) == sde and copy.deepcopy(sde) == sde
    assert len({sde, *SDES}) == len(SDES)


def test_parameters_act():
    t = torch.tensor(0.5, dtype=torch.float64)
    assert VPSDE(beta_min=2.0, beta_max=2.0).alpha(t).item() == pytest.approx(np.exp(-0.5), rel=1e-14)
    assert VPSDE(beta_min=2.0, beta_max=2.0).time(VPSDE(beta_min=2.0, beta_max=2.0).log_snr(t)).item() == 0.5
    assert VESDE(sigma_min=0.1, sigma_max=10.0).sigma(t).item() == pytest.approx(1, rel=1e-14)
    assert EDMSDE(sigma_min=1.0, sigma_max=3.0, rho=1.0).sigma(t).item() == pytest.approx(2, rel=1e-14)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: VPSDE(t_min=1.0), r"t_min must lie in \[0, 1\), got 1.0"),
        (lambda: CosineSDE(t_min=-1e-3), r"t_min must lie in \[0, 1\), got -0.001"),
        (lambda: SubVPSDE(beta_min=0.0), "beta_min and beta_max must be positive, got 0.0 and 20.0"),
        (lambda: VESDE(sigma_min=0.0), "0 < sigma_min < sigma_max, got 0.0 and 50.0"),
        (lambda: EDMSDE(sigma_max=0.001), "0 < sigma_min < sigma_max, got 0.002 and 0.001"),
        (lambda: VESDE(sigma_min=2.0, sigma_max=2.0), "0 < sigma_min < sigma_max, got 2.0 and 2.0"),
        (lambda: EDMSDE(sigma_min=2.0, sigma_max=2.0), "0 < sigma_min < sigma_max, got 2.0 and 2.0"),
    ],
)
def test_impossible_parameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------------------------------------------------------------
# Golden values of score_sde_pytorch


@pytest.mark.parametrize("case", TABLES)
def test_golden_curves_drifts_and_priors(case):
    sde, want = recorded(case)
    x, t, z = want["x"], want["t"], want["prior.z"]
    score = -0.7 * x + like(0.1 * (1 - t), x)
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(sde.drift(x, t), want["sde.drift"], **close)
    torch.testing.assert_close(sde.diffusion(t), want["sde.diffusion"], **close)
    torch.testing.assert_close(sde.alpha(t), want["marginal.mean_coeff"], **close)
    torch.testing.assert_close(sde.perturb(x, t, torch.zeros_like(x)), want["marginal.mean"], **close)
    torch.testing.assert_close(sde.reverse_drift(x, t, score), want["reverse.drift"], rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(sde.diffusion(t), want["reverse.diffusion"], **close)
    torch.testing.assert_close(sde.velocity(x, t, score), want["ode.drift"], rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(sde.prior_log_prob(z), want["prior.logp"], rtol=1e-5, atol=0)
    # The reference loses digits of the deviation below t = 1e-3: 1e-4 at 1e-3 and 0.6 % at 1e-5.
    late = t > 1e-3
    torch.testing.assert_close(sde.sigma(t)[late], want["marginal.std"][late], rtol=2e-5, atol=0)
    torch.testing.assert_close(sde.sigma(t)[~late], want["marginal.std"][~late], rtol=1e-2, atol=0)

    wide = t.double()
    torch.testing.assert_close(sde.diffusion(wide), want["f64.sde.diffusion"], rtol=1e-12, atol=0)
    torch.testing.assert_close(sde.alpha(wide), want["f64.marginal.mean_coeff"], rtol=1e-12, atol=0)
    torch.testing.assert_close(sde.prior_log_prob(z.double()), want["f64.prior.logp"], rtol=1e-12, atol=0)
    # In float64 the reference's 1 - exp(-b) still has an error of 1e-16/b, with b down to 1e-6.
    torch.testing.assert_close(sde.sigma(wide), want["f64.marginal.std"], rtol=1e-10, atol=0)
    torch.testing.assert_close(sde.sigma(wide)[late], want["f64.marginal.std"][late], rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", TABLES)
def test_golden_labels_of_continuous_networks(case):
    sde, want = recorded(case)
    t = want["t"].double()
    label = {"vpsde": label_time, "vesde": label_sigma}[TABLES[case]["sde"]]
    got = label(sde.alpha(t), sde.sigma(t), t)
    torch.testing.assert_close(got.float(), want["labels.continuous"], rtol=1e-6, atol=0)
