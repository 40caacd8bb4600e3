"""The bound in continuous time: -log p where the model is exact, above it where not, and free of the schedule."""

import math
import re

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from score_sde import (
    EDMSDE,
    SDE,
    VESDE,
    VPSDE,
    ContinuousBound,
    CosineSDE,
    LearnedVPSDE,
    MonotoneSchedule,
    ScoreModel,
    SubVPSDE,
    from_score,
    times,
    variational_bound,
)
from score_sde.likelihood.chain_bound import chain_bound
from score_sde.likelihood.sde_bound import reconstruction
from score_sde.losses import denoising, likelihood, simple
from score_sde.losses.time_laws import importance, uniform
from score_sde.models.closed_form import Empirical, Gaussian, Mixture
from score_sde.models.reverse import prior_divergence
from score_sde.sdes import like
from tests.oracles import name, numbers

# With beta up to 60, and gamma up to 25, what is left of the data at t = 1 is below 1e-6: the prior is the law of x_1.
PURE: list[SDE] = [
    VPSDE(beta_max=60.0),
    SubVPSDE(beta_max=60.0),
    LearnedVPSDE(schedule=MonotoneSchedule(-12.0, 25.0, units=16)),
]
EVERY = pytest.mark.parametrize("sde", PURE, ids=name)
MEAN = torch.tensor([0.7, -0.2], dtype=torch.float64)
VARIANCES = torch.tensor([0.25, 1.3], dtype=torch.float64)
START = 1e-3
HERMITE = tuple(torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(3))


def one(t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float64)


def legendre(sde: SDE, t_min: float, cells: int = 40) -> tuple[Tensor, Tensor]:
    """Nodes in t and weights of the integral from t_min to 1: ten of Gauss-Legendre's in each of many cells."""
    edges = times.log_snr(type(sde)(**{**vars(sde), "t_min": t_min}), cells).flip(0)
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(10))
    half = edges.diff()[:, None] / 2
    return (edges[:-1, None] + half * (nodes + 1)).flatten(), (half * weights).flatten()


def diffusion(model: ScoreModel, x: Tensor, t_min: float, hermite: tuple[Tensor, Tensor] = HERMITE) -> Tensor:
    """The diffusion term at each x, (B, D), by quadrature over time and noise; exact for a linear model."""
    t, dt = legendre(model.sde, t_min)
    nodes, weights = hermite
    z = torch.cartesian_prod(*[nodes] * x.shape[1]).reshape(-1, x.shape[1])
    w = torch.cartesian_prod(*[weights / weights.sum()] * x.shape[1]).reshape(-1, x.shape[1]).prod(1)
    total = []
    for row in x:
        grid = (len(t), len(z))
        args = row.expand(*grid, -1), t[:, None].expand(grid), z.expand(*grid, -1)
        loss = denoising(model, *(a.reshape(len(t) * len(z), *a.shape[2:]) for a in args), likelihood)
        total.append(dt @ loss.reshape(grid) @ w * x.shape[1] / 2)
    return torch.stack(total)


def bound(model: ScoreModel, x: Tensor, t_min: float, decoder: str, **options: tuple[Tensor, Tensor]) -> Tensor:
    """The whole bound by quadrature."""
    last = reconstruction(model.sde, x, one(t_min), torch.zeros_like(x), decoder)  # type: ignore[arg-type]
    return prior_divergence(model.sde, x, one(1.0)) + diffusion(model, x, t_min, **options) + last


def mean_surprise(x: Tensor, mean: Tensor, variance: Tensor, sde: SDE, t: float) -> Tensor:
    """E[-log N(x_t; mean, variance)] over x_t given x, in closed form."""
    alpha, sigma = sde.alpha(one(t)), sde.sigma(one(t))
    squares = (alpha * x - mean) ** 2 + sigma**2
    return (squares / variance + torch.log(2 * math.pi * variance)).sum(1) / 2


# --- where log p is known


@EVERY
def test_the_bound_of_an_exact_model_is_minus_log_p_at_every_point(sde: SDE) -> None:
    """p(path | x) is then q(path | x), and nothing is lost: of the state at t_min, to the quadrature's precision."""
    model, x = Gaussian(sde, MEAN, VARIANCES), torch.tensor([[0.7, -0.2], [2.0, 1.0], [-1.0, 3.0]], dtype=torch.float64)
    alpha, sigma = sde.alpha(one(START)), sde.sigma(one(START))
    expected = mean_surprise(x, alpha * MEAN, alpha**2 * VARIANCES + sigma**2, sde, START)
    torch.testing.assert_close(bound(model, x, START, "state"), expected, rtol=0, atol=1e-6)
    # As t_min falls this is -log p(x) of the data; with a Gaussian decoder too, from above.
    for decoder in ("state", "gaussian"):
        excess = bound(model, x, 1e-5, decoder) + model.log_prob(x)
        assert excess.abs().max() < 2e-4, decoder


def test_a_gaussian_decoder_makes_another_model_whose_mean_surprise_exceeds_the_entropy() -> None:
    """x_t plus its noise once more is wider than the data: at much noise a good deal."""
    sde = PURE[0]
    model, nodes = Gaussian(sde, MEAN, VARIANCES), torch.cartesian_prod(HERMITE[0], HERMITE[0])
    w = torch.cartesian_prod(HERMITE[1], HERMITE[1]).prod(1)
    x, w = MEAN + VARIANCES.sqrt() * nodes, w / w.sum()
    gaps = [(w @ (bound(model, x, t_min, "gaussian") + model.log_prob(x))).item() for t_min in (0.1, 0.01, 0.001)]
    assert gaps[0] > 4 * gaps[1] > 16 * gaps[2] > 0


@EVERY
def test_a_wrong_model_costs_more_than_its_own_surprise(sde: SDE) -> None:
    """A linear score of the wrong slope: the reverse SDE's density at t_min is Gaussian, by its moment equations."""
    exact = Gaussian(sde, MEAN[:1], VARIANCES[:1])
    model = from_score(sde, lambda x, t: 1.3 * exact.score(x, t))

    def rates(t: float, y: np.ndarray) -> list[float]:
        f, g2 = sde.f(one(t)).item(), sde.g(one(t)).item() ** 2
        alpha, sigma = sde.alpha(one(t)).item(), sde.sigma(one(t)).item()
        slope = 1.3 / (alpha**2 * 0.25 + sigma**2)
        # dx = [f x + g² slope (x - alpha m)] dt + g dw, backwards: the noise is added as t falls
        b = f + g2 * slope
        return [b * y[0] - g2 * slope * alpha * 0.7, 2 * b * y[1] - g2]

    end = solve_ivp(rates, (1.0, START), [0.0, 1.0], method="LSODA", rtol=1e-7, atol=1e-9)
    assert end.success
    mean, variance = (torch.tensor([v]) for v in end.y[:, -1])
    x = torch.tensor([[0.7], [2.0], [-1.0]], dtype=torch.float64)
    surprise, found = mean_surprise(x, mean, variance, sde, START), bound(model, x, START, "state")
    # KL between two laws of the path given x, measured 0.3 to 1.2; an exact model has 0.
    assert bool((found > surprise + 0.1).all()) and bool((found < surprise + 3).all())


@EVERY
def test_the_form_with_the_divergence_is_the_same_number(sde: SDE) -> None:
    """Song et al. 2021b, eq. 12: E[-log prior(x_1)] + E integral of g² div s + g² |s|²/2 - f D, for a nonlinear score.

    It holds at each time, by partial integration against the Gaussian q(x_t | x); 40 nodes for the noise.
    """
    model = Mixture(sde, [0.3, 0.7], torch.tensor([[-1.0], [1.0]], dtype=torch.float64), 0.3)
    wrong = from_score(sde, lambda x, t: 1.2 * model.score(x, t) + 0.1 * torch.sin(x))
    hermite = tuple(torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(40))
    x, (t, dt) = torch.tensor([[0.4]], dtype=torch.float64), legendre(sde, 0.01)
    z, w = hermite[0][:, None], hermite[1] / hermite[1].sum()
    total = 0.5 * math.log(2 * math.pi) + (sde.sigma(one(1.0)) ** 2 + (sde.alpha(one(1.0)) * x) ** 2).item() / 2
    times_of_each = t.repeat_interleave(40)
    state = sde.perturb(x.expand(40 * len(t), 1), times_of_each, z.repeat(len(t), 1)).requires_grad_(True)
    score = wrong.score(state, times_of_each)
    divergence = torch.autograd.grad(score.sum(), state)[0]
    inside = sde.g(times_of_each) ** 2 * (divergence + score**2 / 2)[:, 0] - sde.f(times_of_each)
    total += (dt @ inside.reshape(len(t), 40) @ w).item()
    found = bound(wrong, x, 0.01, "state", hermite=hermite)  # type: ignore[arg-type]
    assert found.item() == pytest.approx(total, abs=1e-6)


# --- in what it depends on the SDE


def equal_ends(low: float = -10.0, high: float = 8.0) -> list[tuple[SDE, float]]:
    """SDEs that all have log SNR -low at a t_min of their own and -high at t = 1."""
    beta = 2 * math.log1p(math.exp(high)) - 0.1
    sigma = 2 / (1 + math.sqrt(1 + 4 * math.exp(-high)))  # sub-VP's: sigma = 1 - alpha², alpha/sigma = exp(-high/2)
    sub = -2 * math.log1p(-sigma) - 0.1
    flat, steep = (MonotoneSchedule(low, high, units=8) for _ in range(2))
    with torch.no_grad():
        steep.units[0] += 2 * numbers(8, dtype=torch.float32)
    sdes = [
        VPSDE(beta_max=beta),
        SubVPSDE(beta_max=sub),
        VESDE(sigma_min=math.exp(low / 2), sigma_max=math.exp(high / 2)),
        EDMSDE(sigma_min=math.exp(low / 2), sigma_max=math.exp(high / 2)),
        LearnedVPSDE(schedule=flat),
        LearnedVPSDE(schedule=steep),
    ]
    return [(sde, max(sde.time(one(-low)).item(), 0.0)) for sde in sdes]


def test_the_diffusion_term_depends_on_the_snr_at_the_ends_alone() -> None:
    """The same at each x for every SDE between the same ends, of an exact model and of a wrong one."""
    found: dict[str, list[Tensor]] = {"exact": [], "wrong": []}
    x = torch.tensor([[0.4], [1.5]], dtype=torch.float64)
    hermite = tuple(torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(40))
    for sde, t_min in equal_ends():
        ends = sde.log_snr(torch.tensor([t_min, 1.0], dtype=torch.float64))
        torch.testing.assert_close(ends, torch.tensor([10.0, -8.0], dtype=torch.float64), rtol=0, atol=1e-5)
        exact = Mixture(sde, [0.3, 0.7], torch.tensor([[-1.0], [1.0]], dtype=torch.float64), 0.3)

        def wrong(y: Tensor, t: Tensor, exact: Mixture = exact) -> Tensor:
            """A function of the SNR and of x/alpha alone, as a network told the noise level is."""
            sigma, alpha = like(exact.sde.sigma(t), y), like(exact.sde.alpha(t), y)
            return 0.8 * exact.score(y, t) + 0.1 * torch.sin(y / alpha) / sigma

        found["exact"].append(diffusion(exact, x, t_min, hermite))  # type: ignore[arg-type]
        found["wrong"].append(diffusion(from_score(sde, wrong), x, t_min, hermite))  # type: ignore[arg-type]
    for values in found.values():
        for value in values[1:]:
            torch.testing.assert_close(value, values[0], rtol=1e-5, atol=1e-5)  # ends of float32 parameters: 1e-6
    assert (found["wrong"][0] - found["exact"][0]).mean() > 0.05
    sde, t_min = equal_ends(high=6.0)[0]
    exact = Mixture(sde, [0.3, 0.7], torch.tensor([[-1.0], [1.0]], dtype=torch.float64), 0.3)
    other = diffusion(exact, x, t_min, hermite)  # type: ignore[arg-type]
    assert (other - found["exact"][0]).abs().max() > 1e-3  # another end is another number


def test_on_gaussian_data_the_mean_diffusion_term_has_a_closed_form() -> None:
    """1/2 integral of mmse dSNR = 1/2 log((1 + S_0 s²)/(1 + S_1 s²)): 3.865 nats for N(m, 0.25) and VP from 1e-3."""
    for sde in (VPSDE(), SubVPSDE(), VESDE(), CosineSDE()):
        model, snr = Gaussian(sde, MEAN[:1], 0.25), sde.log_snr(torch.tensor([1e-3, 1.0], dtype=torch.float64)).exp()
        x = MEAN[:1] + 0.5 * HERMITE[0][:, None]
        mean = diffusion(model, x, 1e-3) @ (HERMITE[1] / HERMITE[1].sum())
        truth = torch.log((1 + snr[0] * 0.25) / (1 + snr[1] * 0.25)) / 2
        torch.testing.assert_close(mean, truth, rtol=1e-7, atol=0)
        if sde == VPSDE():
            assert truth.item() == pytest.approx(3.865, abs=5e-4)


# --- by Monte Carlo


def test_the_estimate_is_unbiased_and_knows_its_error() -> None:
    sde = PURE[0]
    model, n = Gaussian(sde, MEAN, VARIANCES), 1000
    x = torch.tensor([2.0, 1.0], dtype=torch.float64).expand(n, 2)
    truth = diffusion(model, x[:1], START).item()
    for law in (None, uniform, importance(likelihood)):
        options = {} if law is None else {"law": law}
        found = variational_bound(model, x, t_min=START, draws=16, decoder="state", **options)  # type: ignore[arg-type]
        spread = found.diffusion.std().item()
        assert abs(found.diffusion.mean().item() - truth) < 4 * spread / math.sqrt(n), law
        error = found.std_error.square().mean().sqrt().item()
        assert 0.92 * spread < error < 1.3 * spread, law  # neighbours differ by their times too: too large, if anything
    late = variational_bound(
        model, x, t_min=0.3, draws=16, decoder="state"
    ).diffusion  # where t's interval is far from 1
    error = late.std().item() / math.sqrt(n)
    assert late.mean().item() == pytest.approx(diffusion(model, x[:1], 0.3).item(), abs=4 * error) and error < 0.005
    assert torch.equal(found.prior, prior_divergence(sde, x, one(1.0)))
    assert found.total[0].item() == pytest.approx((found.prior + found.diffusion + found.reconstruction)[0].item())


def test_sampling_by_the_weight_lowers_the_variance_of_the_bound() -> None:
    sde = VPSDE()
    model, x = Gaussian(sde, MEAN, VARIANCES), torch.tensor([2.0, 1.0], dtype=torch.float64).expand(2000, 2)
    laws = (uniform, importance(likelihood))
    plain, better = (variational_bound(model, x, draws=16, law=law).diffusion.var() for law in laws)
    assert better < plain / 100  # measured: 1/760


def test_times_spread_evenly_lower_the_variance() -> None:
    """Of 16 draws with noise that hardly counts: independent times would leave 1/16 of one draw's variance."""
    sde = SubVPSDE(t_min=0.1)
    model = from_score(sde, lambda x, t: torch.zeros_like(x))  # its error is |z|², of relative variance 2/D
    x = torch.zeros(200, 500, dtype=torch.float64)
    one, many = (variational_bound(model, x, t_min=0.1, draws=k, law=uniform).diffusion for k in (1, 16))
    assert many.mean().item() == pytest.approx(one.mean().item(), rel=0.1)
    assert many.var() < one.var() / 16 / 8  # measured: 1/16 of it


def test_examples_depend_on_seed_and_index_alone() -> None:
    model, x = Gaussian(VPSDE(), MEAN, VARIANCES), numbers(5, 2)
    whole = variational_bound(model, x, draws=3, seed=7)
    parts = [variational_bound(model, x[a:b], draws=3, seed=7, first=a) for a, b in ((0, 2), (2, 5))]
    torch.testing.assert_close(whole.total, torch.cat([part.total for part in parts]), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(whole.diffusion, variational_bound(model, x, draws=3, seed=8).diffusion)
    assert bool(variational_bound(model, x, draws=1).std_error.isnan().all())
    single = variational_bound(model, x.float(), draws=3, seed=7)
    assert single.total.dtype == torch.float32 and variational_bound(model, x[:0], draws=2).total.shape == (0,)


def test_it_is_the_limit_of_the_chains_bound() -> None:
    """A grid of ever more steps in log SNR, decoded by the same Gaussian: from above, the gap falls as 1/steps."""
    sde = VPSDE(beta_max=60.0, t_min=START)
    model = Gaussian(sde, MEAN, VARIANCES)
    x = torch.tensor([2.0, 1.0], dtype=torch.float64).expand(1500, 2)
    limit = diffusion(model, x[:1], START).item()
    gaps = [chain_bound(model, x, times.log_snr(sde, n)).diffusion.sum(1).mean().item() - limit for n in (50, 200)]
    assert gaps[0] > 1 and gaps[1] == pytest.approx(gaps[0] / 4, rel=0.25)  # and Monte Carlo's error


# --- discrete data

LEVELS = torch.linspace(-1, 1, 5, dtype=torch.float64)


def test_the_discrete_decoder_is_bayes_rule_with_equal_chances() -> None:
    sde, t, state = VPSDE(), one(0.02), numbers(1, 3)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    table = []
    for value in LEVELS:  # x_t stays, so z must be what leads from this level to it
        x = value.expand(1, 3)
        one_dimension = [
            reconstruction(sde, x[:, i : i + 1], t, (state - alpha * x)[:, i : i + 1] / sigma, LEVELS.flip(0))
            for i in range(3)
        ]
        table.append(torch.stack(one_dimension))
        whole = reconstruction(sde, x, t, (state - alpha * x) / sigma, LEVELS)
        torch.testing.assert_close(whole, torch.stack(one_dimension).sum(0))
    found = torch.exp(-torch.stack(table)[..., 0])  # (levels, dimensions)
    density = torch.exp(-((state - alpha * LEVELS[:, None]) ** 2) / (2 * sigma**2))
    torch.testing.assert_close(found, density / density.sum(0), rtol=1e-10, atol=1e-300)


def test_a_model_that_knows_its_discrete_data_pays_log_n() -> None:
    """Eight images of four pixels and five levels, equally likely: -log P = log 8 nats each, 0.75 bits/dim."""
    data = LEVELS[torch.randint(5, (8, 4), generator=torch.Generator().manual_seed(0))]
    assert len(data.unique(dim=0)) == 8
    sde = LearnedVPSDE(schedule=MonotoneSchedule(-7.0, 12.0, units=16))
    found = variational_bound(Empirical(sde, data), data.repeat(250, 1), decoder=LEVELS, t_min=0.0, draws=32)
    error = found.total.std().item() / math.sqrt(2000)
    assert error < 0.035 and abs(found.total.mean().item() - math.log(8)) < 4 * error + 1e-3
    by_image = found.total.reshape(250, 8)
    assert bool(((by_image.mean(0) - math.log(8)).abs() < 4.5 * by_image.std(0) / math.sqrt(250) + 1e-3).all())
    assert found.bits_per_dim(levels=1, width=1).mean().item() == pytest.approx(0.75, abs=0.03)


def test_data_between_the_decoder_s_levels_are_refused() -> None:
    model, x = Gaussian(VPSDE(), MEAN, VARIANCES), LEVELS[torch.tensor([[0, 4], [2, 3]])]
    for off in (-0.2, -0.02, 0.02, 0.2):  # of the distance between two levels, 1/2
        moved = x.clone()
        moved[1, 0] += off / 2
        with pytest.raises(
            ValueError, match=re.escape(f"x is up to {abs(off) / 2:.3g} away from the decoder's 5 levels")
        ):
            variational_bound(model, moved, decoder=LEVELS, draws=1)
    variational_bound(model, x.float(), decoder=LEVELS, draws=1)
    variational_bound(model, x + 1e-4, decoder=LEVELS, draws=1)  # rounding


def test_bits_per_dim_count_the_dequantisation() -> None:
    zero = torch.zeros(1)
    nats = torch.tensor([3 * math.log(2) * 2.5])
    terms = ContinuousBound(zero, nats, zero, zero, 3)
    assert terms.bits_per_dim().item() == pytest.approx(9.5)  # 2.5 and log2(256/2)
    assert terms.bits_per_dim(17, 1.0).item() == pytest.approx(2.5 + math.log2(17))


def test_what_is_impossible_is_refused() -> None:
    model, x = Gaussian(VPSDE(), MEAN, VARIANCES), numbers(2, 2)
    refusals: list[tuple[dict[str, object], str]] = [
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"t_min": 0.0}, "has no noise at t_min = 0, where the bound is infinite; 1e-5 is usual"),
        ({"decoder": "laplace"}, 'unknown decoder \'laplace\'; use "gaussian", "state" or a tensor of levels'),
        ({"decoder": LEVELS}, "away from the decoder's 5 levels; leave out the dequantisation, or use"),
    ]
    for options, answer in refusals:
        with pytest.raises(ValueError, match=re.escape(answer)):
            variational_bound(model, x, **options)  # type: ignore[arg-type]


def test_the_default_times_weigh_every_noise_level_alike() -> None:
    """One draw's value is 1/2 (log SNR range) |noise error|²: its variance is that of the error alone."""
    sde = VPSDE()
    model = from_score(sde, lambda x, t: torch.zeros_like(x))  # its error is z itself
    found = variational_bound(model, torch.zeros(4000, 2, dtype=torch.float64), draws=1)
    span = (sde.log_snr(one(1e-5)) - sde.log_snr(one(1.0))).item()
    assert found.diffusion.mean().item() == pytest.approx(span, rel=0.06)
    assert found.diffusion.std().item() == pytest.approx(span, rel=0.1)  # |z|²/2 in two dimensions is exponential
    weighted = denoising(model, torch.zeros(3, 2), torch.tensor([0.1, 0.2, 0.3]), torch.ones(3, 2), simple)
    assert weighted.tolist() == [1.0, 1.0, 1.0]
