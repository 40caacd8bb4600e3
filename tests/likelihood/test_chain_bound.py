"""The variational bound: each term against closed forms, the whole against evidence that is known, and its objectives
and laws against the formulas of Improved DDPM."""

import itertools
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor, nn

from score_sde import DDPM, SDE, VPSDE, Ancestral, Estimate, Preconditioned, ScoreModel, chain_bound, clip, guide, times
from score_sde.losses import hybrid, variational
from score_sde.losses.time_laws import SecondMoments, discrete, uniform_numbers
from score_sde.models.closed_form import Gaussian
from score_sde.models.reverse import chain_term, decode, discretised, divergence, prior_divergence, reverse_log_variance
from score_sde.sdes import like
from tests.oracles import CHAINS, SDES, name, numbers

CURVES = [*SDES, *(chain.as_sde() for chain in CHAINS)]
EVERY = pytest.mark.parametrize("sde", CURVES, ids=name)
MEAN, VARIANCE = 0.7, 0.25


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def nodes(mean: float = MEAN, variance: float = VARIANCE) -> tuple[Tensor, Tensor, Tensor]:
    """x0 ~ N(mean, variance) and z ~ N(0, 1), (9, 1) each, and weights: exact for all that is quadratic in both."""
    points, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(3))
    grid, w = torch.cartesian_prod(points, points), torch.cartesian_prod(*[weights / weights.sum()] * 2).prod(1)
    return mean + math.sqrt(variance) * grid[:, :1], grid[:, 1:], w


def exact(sde: SDE) -> Gaussian:
    return Gaussian(sde, torch.tensor([MEAN], dtype=torch.float64), scalar(VARIANCE))


def expected_divergences(model: ScoreModel, s: Tensor, t: Tensor, variance: str = "small") -> Tensor:
    """One for each pair of times s, t of shape (N,)."""
    x0, z, w = nodes()
    x0, z, s, t = x0.repeat(len(t), 1), z.repeat(len(t), 1), s.repeat_interleave(len(w)), t.repeat_interleave(len(w))
    estimate = model(model.sde.perturb(x0, t, z), t)
    return divergence(model.sde, estimate, x0, s, t, variance).reshape(-1, len(w)) @ w


# --- the terms


@pytest.mark.parametrize("variance", ["small", "large"])
@EVERY
def test_a_divergence_is_its_closed_form_on_a_gaussian(sde: SDE, variance: str) -> None:
    """By Bayes' rule from the joint Gaussian of (x_s, x_t), without the posterior's formula."""
    for s, t in [(0.2, 0.6), (0.5, 0.52), (0.94, 1.0)]:
        s, t = (sde.time(sde.log_snr(scalar(u))) for u in (s, t))
        (a, b), (p, q) = (sde.alpha(u).item() for u in (s, t)), (sde.sigma(u).item() ** 2 for u in (s, t))
        scale = b / a
        beta = q - scale**2 * p
        true = 1 / (1 / p + scale**2 / beta)  # precisions of x_s | x_0 and of x_t | x_s add
        share = true * a / p  # of x_0 in that posterior's mean
        mmse = 1 / (1 / VARIANCE + b**2 / q)  # of x_0 given x_t
        v = true if variance == "small" else beta
        wanted = (true / v - 1 - math.log(true / v) + share**2 * mmse / v) / 2
        assert expected_divergences(exact(sde), s[None], t[None], variance).item() == pytest.approx(wanted, rel=1e-8)
        if variance == "small":
            assert wanted == pytest.approx((a**2 / p - b**2 / q) * mmse / 2, rel=1e-6)


def test_the_prior_s_divergence_is_torch_s() -> None:
    x0 = numbers(4, 2, 3)
    for sde in CURVES:
        for t in (scalar(0.3), scalar(1.0)):
            q = torch.distributions.Normal(sde.alpha(t) * x0, sde.sigma(t))
            p = torch.distributions.Normal(torch.zeros_like(x0), sde.prior_std)
            wanted = torch.distributions.kl_divergence(q, p).flatten(1).sum(1)
            torch.testing.assert_close(prior_divergence(sde, x0, t), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("levels", "width"), [(2, 1.0), (17, 2.0), (256, 2.0), (256, 1.0), (65536, 2.0)])
@pytest.mark.parametrize("std", [1e-4, 0.003, 0.1, 3.0])
@pytest.mark.parametrize("mean", [-0.3, 0.0, 0.456, 1.2])
def test_the_decoder_s_levels_share_all_the_mass(levels: int, width: float, std: float, mean: float) -> None:
    k = torch.arange(levels, dtype=torch.float64)
    x = 1 - width + width * (k / (levels - 1) if levels <= 256 else (k + 0.5) / levels)
    mass = discretised(x, torch.full_like(x, mean), scalar(2 * math.log(std)), levels, width)
    assert mass.exp().sum().item() == pytest.approx(1, abs=1e-12)
    edges = torch.cat([x.new_tensor([-math.inf]), (x[1:] + x[:-1]) / 2, x.new_tensor([math.inf])]).numpy()
    wanted = np.diff(norm.cdf(edges, mean, std))
    torch.testing.assert_close(mass.exp(), torch.from_numpy(wanted), rtol=1e-6, atol=1e-14)


def test_the_decoder_is_exact_in_both_tails() -> None:
    """Against the integral of the density over the bin, relative to its value at the nearer edge."""
    levels, std = 17, 0.02
    x = torch.linspace(-1, 1, levels, dtype=torch.float64)
    for mean, k in [(-0.9, 9), (0.9, 4), (-1.0, 15), (1.0, 1), (0.013, 8), (0.9, 0), (-0.9, 16)]:
        found = discretised(x, torch.full_like(x, mean), scalar(2 * math.log(std)), levels)[k].item()
        low, high = ((x[k].item() + side / (levels - 1) - mean) / std for side in (-1, 1))
        low, high = sorted((abs(low), abs(high))) if low * high > 0 else (low, high)
        high = math.inf if k in (0, levels - 1) else high
        near = low if low > 0 else 0.0
        integral = quad(lambda y, near=near: math.exp((near**2 - y**2) / 2), low, min(high, near + 40))[0]
        wanted = math.log(integral) - near**2 / 2 - math.log(2 * math.pi) / 2
        assert found == pytest.approx(wanted, rel=1e-10), (mean, k)


def test_the_decoder_in_single_precision_and_its_gradients() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (500,), generator=g).double() / 127.5 - 1
    mean = x + 0.05 * torch.randn(500, generator=g).double()
    log_variance = 2 * torch.rand(500, generator=g).double() - 9
    double = discretised(x, mean, log_variance, 256)
    single = discretised(x.float(), mean.float(), log_variance.float(), 256)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)
    inputs = (mean[:40].requires_grad_(True), log_variance[:40].requires_grad_(True))
    assert torch.autograd.gradcheck(lambda m, v: discretised(x[:40], m, v, 256), inputs, rtol=1e-4)
    # 1e4 standard deviations away the slope is that of -(edge - m)²/(2 v), at the nearer edge of the bin
    far = torch.tensor([-1.0, 0.2, 1.0], dtype=torch.float64)
    edge = far + torch.tensor([1, -1, -1]) / 254
    mean = torch.tensor([4.0, -4.0, -4.0], dtype=torch.float64, requires_grad=True)
    value = discretised(far, mean, scalar(-16.0).expand(3), 255)
    (slope,) = torch.autograd.grad(value.sum(), mean)
    torch.testing.assert_close(slope, (edge - mean).detach() * math.exp(16), rtol=1e-6, atol=0)


def test_a_gaussian_decoder_is_the_log_density() -> None:
    x, mean, log_variance = numbers(3, 2, 2), numbers(3, 2, 2, seed=1), numbers(3, 2, 2, seed=2)
    wanted = torch.distributions.Normal(mean, torch.exp(log_variance / 2)).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(decode(x, mean, log_variance), wanted)


# --- the whole


def test_more_steps_lower_the_diffusion_terms_to_the_continuous_limit() -> None:
    """10.242, 4.207 and 3.897 nats, and 3.865 in the limit, which is half the log of a ratio of signal to noise."""
    sde = VPSDE()

    def total(steps: int) -> float:
        grid = times.log_snr(sde, steps)
        return expected_divergences(exact(sde), grid[1:], grid[:-1]).sum().item()

    found = [total(steps) for steps in (10, 100, 1000)]
    assert [round(value, 3) for value in found] == [10.242, 4.207, 3.897]
    late, early = torch.exp(sde.log_snr(torch.tensor([1.0, sde.t_min], dtype=torch.float64)))
    limit = math.log((1 + early * VARIANCE) / (1 + late * VARIANCE)) / 2
    assert round(limit, 3) == 3.865
    assert 9 < (found[1] - limit) / (found[2] - limit) < 11  # the excess falls as 1/T


class Line(ScoreModel):
    """data = a x + b, whatever the time."""

    def __init__(self, sde: SDE, a: float, b: float) -> None:
        super().__init__(sde)
        self.a, self.b = a, b

    def forward(self, x: Tensor, t: Tensor) -> Estimate:
        data = self.a * x + self.b
        sigma = like(self.sde.sigma(t), x)
        return Estimate(data, (x - like(self.sde.alpha(t), x) * data) / sigma, sigma)


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize(
    "sde", [DDPM.linear(20, 0.01, 0.5).as_sde(), DDPM.cosine(12).as_sde(), CHAINS[4].as_sde()], ids=repr
)
def test_the_bound_lies_above_a_chain_s_own_evidence_at_every_point(sde: SDE, variance: str) -> None:
    """A linear model's chain draws x_0 from a Gaussian that its own recursion gives: -log p(x_0) is known exactly."""
    model, n = Line(sde, 0.4, 0.1), sde.steps  # type: ignore[attr-defined]
    grid = torch.arange(n, -1, -1, dtype=torch.float64) / n
    mean, var = 0.0, sde.prior_std**2
    for t, s in pairwise(grid):
        (at_zero, small), (at_one, _) = (sde.posterior(scalar(u)[None], model.a * scalar(u)[None] + model.b, s, t)
                                         for u in (0.0, 1.0))  # fmt: skip
        slope = (at_one - at_zero).item()
        noise = small if variance == "small" else sde.transition(s, t)[1] ** 2
        if s == 0:  # DDPM: the decoder has the variance of the step before
            u = t + 1 / n
            noise = (sde.sigma(t) * sde.transition(t, u)[1] / sde.sigma(u)) ** 2
        mean, var = slope * mean + at_zero.item(), slope**2 * var + noise.item()
    points, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(3))
    x = torch.tensor([-1.5, 0.0, mean, 0.8], dtype=torch.float64)
    x0, z = x.repeat_interleave(3)[:, None], points.repeat(4)[:, None]
    total = prior_divergence(sde, x[:, None], grid[0])
    for t in grid[:-1]:  # the mean over z of what is quadratic in it: three nodes are exact
        estimate = model(sde.perturb(x0, t, z), t)
        total += chain_term(sde, estimate, x0, t.expand(12), variance).reshape(4, 3) @ (weights / weights.sum())
    assert bool((total > (math.log(2 * math.pi * var) + (x - mean) ** 2 / var) / 2).all())


def test_the_bound_of_the_exact_model_falls_to_the_entropy() -> None:
    """In nats, averaged over data and noise: prior, diffusion and Gaussian decoder sum up to the data's own entropy."""
    entropy = math.log(2 * math.pi * math.e * VARIANCE) / 2
    x0, z, w = nodes()
    excess = []
    sde = VPSDE(t_min=1e-4)
    for steps in (20, 100, 500):
        grid, model = times.log_snr(sde, steps), exact(sde)
        total = float(w @ prior_divergence(sde, x0, grid[0]))
        total += expected_divergences(model, grid[1:], grid[:-1]).sum().item()
        estimate = model(sde.perturb(x0, grid[-1], z), grid[-1])
        total -= float(w @ decode(x0, estimate.data, -sde.log_snr(grid[-1])[None, None]))
        excess.append(total - entropy)
    assert min(excess) > 0 and excess[2] < 0.15 and excess[0] > 4 * excess[1] > 16 * excess[2]


def by_hand(model: ScoreModel, x0: Tensor, grid: Tensor, variance: str, levels: int | None) -> list[Tensor]:
    """The bound's terms from the last time down to the decoder, one draw of noise each."""
    g, found = torch.Generator().manual_seed(5), []
    for t in grid[:-1]:
        z = torch.randn(x0.shape, generator=g, dtype=x0.dtype)
        estimate = model(model.sde.perturb(x0, t, z), t)
        found.append(chain_term(model.sde, estimate, x0, t.expand(len(x0)), variance, levels))
    return found


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("levels", [None, 17])
def test_the_parts_sum_to_the_total_and_are_the_chain_s_terms(variance: str, levels: int | None) -> None:
    sde = DDPM.linear(10, 0.01, 0.5).as_sde()
    x0 = torch.randint(0, 17, (6, 2, 3), generator=torch.Generator().manual_seed(0)).double() / 8 - 1
    model = Line(sde, 0.5, 0.2)
    bound = chain_bound(model, x0, variance=variance, levels=levels, seed=torch.Generator().manual_seed(5))
    grid = torch.arange(10, -1, -1, dtype=torch.float64) / 10
    terms = by_hand(model, x0, grid, variance, levels)
    torch.testing.assert_close(bound.diffusion, torch.stack(terms[:-1], 1))
    torch.testing.assert_close(bound.reconstruction, terms[-1])
    torch.testing.assert_close(bound.prior, prior_divergence(sde, x0, grid[0]))
    torch.testing.assert_close(bound.total, bound.prior + sum(terms))
    torch.testing.assert_close(bound.rate, bound.prior + bound.diffusion.sum(1))
    assert torch.equal(bound.times, grid[:-2]) and bound.std_error.eq(0).all()
    torch.testing.assert_close(bound.bits_per_dim(), bound.total / (6 * math.log(2)))
    torch.testing.assert_close(bound.bits_per_dim(bound.prior), bound.prior / (6 * math.log(2)))


def test_a_model_that_knows_nothing_needs_the_bits_of_its_decoder() -> None:
    """Levels that are all alike cost log2(levels) when the decoder is flat over them, and nothing else."""
    sde = DDPM.linear(5, 0.9999, 0.99999).as_sde()
    x0 = torch.linspace(-1, 1, 3, dtype=torch.float64)[:, None]
    total = chain_bound(Line(sde, 0.0, 0.0), x0, levels=3, variance="small").bits_per_dim()
    wanted = [-math.log2(norm.cdf(-0.5)), -math.log2(1 - 2 * norm.cdf(-0.5)), -math.log2(norm.cdf(-0.5))]
    assert total.tolist() == pytest.approx(wanted, abs=2e-3)


@pytest.mark.parametrize("levels", [None, 17])
@pytest.mark.parametrize("variance", ["small", "large"])
def test_a_chain_of_one_step_is_its_prior_and_its_decoder(levels: int | None, variance: str) -> None:
    """There is no step before, whose variance the decoder could take: it has (sigma/alpha)²."""
    sde = DDPM([0.4]).as_sde()
    model, x0 = Line(sde, 0.5, 0.2), torch.tensor([[-1.0, 0.5], [0.25, 1.0]], dtype=torch.float64)
    bound = chain_bound(model, x0, levels=levels, variance=variance, seed=torch.Generator().manual_seed(5))
    z = torch.randn(x0.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    mean, var = 0.5 * (math.sqrt(0.6) * x0 + math.sqrt(0.4) * z) + 0.2, torch.tensor(0.4 / 0.6, dtype=torch.float64)
    if levels is None:
        wanted = -torch.distributions.Normal(mean, var.sqrt()).log_prob(x0).sum(1)
    else:
        low, high = (torch.where(x0 * side == 1, side * math.inf, x0 + side / 16) for side in (-1, 1))
        cdf = lambda v: torch.from_numpy(norm.cdf(v.numpy(), mean.numpy(), var.sqrt().item()))
        wanted = -(cdf(high) - cdf(low)).log().sum(1)
    torch.testing.assert_close(bound.reconstruction, wanted, rtol=1e-10, atol=0)
    assert bound.diffusion.shape == (2, 0)
    torch.testing.assert_close(bound.total, bound.prior + wanted)
    with pytest.raises(ValueError, match="a chain of at least 2 steps"):
        chain_term(sde, model(x0, scalar(1.0)), x0, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("width", [1.0, 2.0])
def test_data_between_their_levels_are_refused(width: float) -> None:
    """0.005 of a level is rounding; 0.02 and 0.2 of it are dequantisation, of a single number and on either side."""
    sde = DDPM.linear(5, 0.01, 0.5).as_sde()
    x0 = (1 - width + width * torch.arange(17) / 16).to(torch.float32).reshape(1, 17)
    for off in (-0.005, 0.0, 0.005):
        chain_bound(Line(sde, 0.5, 0.2), x0 + off * width / 16, levels=17, width=width)
    beyond = [(-1.0, 0), (1.0, 16)]  # other levels, which there are not
    for off, k in [*itertools.product((-0.2, -0.02, 0.02, 0.2, 0.5), (0, 8, 16)), *beyond]:
        moved = x0.clone()
        moved[0, k] += off * width / 16
        with pytest.raises(ValueError, match="x0 must hold 17 evenly spaced values from"):
            chain_bound(Line(sde, 0.5, 0.2), moved, levels=17, width=width)


@pytest.mark.parametrize("log_variance", [20.0, 60.0, 90.0])
def test_a_decoder_of_huge_variance_has_a_finite_gradient(log_variance: float) -> None:
    """An inner bin then has the mass half/std times twice the density at 0; float64 cannot see it beyond 1e-16."""
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)
    mean = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    spread = torch.full((5,), log_variance, dtype=torch.float64, requires_grad=True)
    value = discretised(x, mean, spread, 5)
    gradients = torch.autograd.grad(value.sum(), (mean, spread))
    assert all(bool(v.isfinite().all()) for v in (value, *gradients))
    if log_variance < 70:
        inner = math.log(0.5) - log_variance / 2 - math.log(2 * math.pi) / 2
        torch.testing.assert_close(value[1:4], torch.full((3,), inner, dtype=torch.float64), rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(value[[0, 4]].exp(), torch.full((2,), 0.5, dtype=torch.float64), rtol=1e-3, atol=0)


def test_an_example_s_bound_depends_on_seed_and_index_alone() -> None:
    sde = DDPM.linear(8, 0.01, 0.5).as_sde()
    model, x0 = Line(sde, 0.5, 0.2), numbers(5, 3)
    for terms in (None, 3):
        whole = chain_bound(model, x0, terms=terms, seed=3)
        parts = [chain_bound(model, x0[a:b], terms=terms, seed=3, first=a) for a, b in ((0, 2), (2, 5))]
        torch.testing.assert_close(whole.total, torch.cat([p.total for p in parts]), rtol=1e-12, atol=0)
        assert not torch.allclose(whole.total, chain_bound(model, x0, terms=terms, seed=4).total)
    assert chain_bound(model, x0[:0]).total.shape == (0,)


def test_some_of_the_terms_estimate_all_of_them() -> None:
    sde = DDPM.linear(30, 0.01, 0.3).as_sde()
    model, n = Line(sde, 0.5, 0.2), 2000
    x0 = scalar(0.3).expand(n, 2)
    all_of_them = chain_bound(model, x0, seed=1)
    for terms in (1, 6, 7, 29):
        some = chain_bound(model, x0, terms=terms, seed=2)
        assert some.diffusion.shape == some.times.shape == (n, terms)
        error = math.sqrt(float(some.total.var() + all_of_them.total.var()) / n)
        assert abs(some.total.mean() - all_of_them.total.mean()) < 4 * error
        if terms == 1:
            assert bool(some.std_error.isnan().all())
        else:  # what the choice of terms, and their own noise, add to the variance
            spread = (some.total - some.prior - some.reconstruction).var()
            assert spread < 1.05 * some.std_error.square().mean()
    assert torch.equal(some.times, all_of_them.times.expand(n, -1))


def test_the_bound_of_a_continuous_model_is_its_grid_s() -> None:
    """Cut at a grid that ends above clean data every pair is a divergence, and the decoder has (sigma/alpha)²."""
    sde = VPSDE()
    grid, x0 = times.log_snr(sde, 6), numbers(4, 1)
    bound = chain_bound(exact(sde), x0, grid, seed=torch.Generator().manual_seed(0))
    assert bound.diffusion.shape == (4, 6) and torch.equal(bound.times, grid[:-1])
    g = torch.Generator().manual_seed(0)
    *_, z = (torch.randn(x0.shape, generator=g, dtype=x0.dtype) for _ in range(7))
    estimate = exact(sde)(sde.perturb(x0, grid[-1], z), grid[-1])
    std = sde.sigma(grid[-1]) / sde.alpha(grid[-1])
    wanted = -torch.distributions.Normal(estimate.data, std).log_prob(x0)[:, 0]
    torch.testing.assert_close(bound.reconstruction, wanted)


def test_errors_name_the_thing_and_the_remedy() -> None:
    sde, x0 = DDPM.linear(4, 0.1, 0.5).as_sde(), numbers(3, 2)
    model = Line(sde, 0.5, 0.0)
    with pytest.raises(ValueError, match=r"has no steps of its own: pass times, a grid such as times.log_snr"):
        chain_bound(Line(VPSDE(), 0.5, 0.0), x0)
    for grid in ([0.5, 1.0], [1.5, 0.5], [[1.0, 0.5]]):
        with pytest.raises(ValueError, match="times must be a 1-D grid that falls from 1"):
            chain_bound(model, x0, torch.tensor(grid))
    with pytest.raises(ValueError, match="times must hold at least one with noise"):
        chain_bound(model, x0, torch.zeros(1))
    with pytest.raises(ValueError, match="terms must be between 1 and the chain's 3 diffusion terms, got 4"):
        chain_bound(model, x0, terms=4)
    for wrong in (x0, torch.full_like(x0, -1.25), torch.full_like(x0, 1.25)):
        with pytest.raises(ValueError, match=r"x0 must hold 17 evenly spaced values from -1 to 1, .*: encode"):
            chain_bound(model, wrong, levels=17)
    with pytest.raises(ValueError, match=r'no learned variances: use variance="small" or "large", or train one with'):
        chain_bound(model, x0, variance="learned")
    with pytest.raises(ValueError, match="needs the SDE of a chain of at least 2 steps, got VPSDE"):
        chain_term(VPSDE(), model(x0, scalar(0.5)), x0, torch.full((3,), 0.5))


# --- learned variances


class Both(nn.Module):
    """Twice the channels of x: a mean and a variance with a parameter each, so that gradients can be told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))
        self.spread = nn.Parameter(torch.tensor([0.5, 0.1], dtype=torch.float64))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        wave = torch.sin(like(label, x) / 100)
        halves = [p[0] * torch.tanh(x) + p[1] * wave for p in (self.mean, self.spread)]
        return torch.cat(halves, dim=1).to(x.dtype)


class Plain(nn.Module):
    """As many channels as x has."""

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return x


def published(betas: np.ndarray, keep: list[int]) -> dict[str, np.ndarray]:
    """Improved DDPM's tables for a chain of which the steps `keep` are left, as its code has them in numpy."""
    kept = np.cumprod(1 - betas)[keep]
    before = np.append(1.0, kept[:-1])
    betas = 1 - kept / before
    posterior = betas * (1 - before) / (1 - kept)
    return {
        "kept": kept,
        "betas": betas,
        "clipped": np.log(np.append(posterior[1], posterior[1:])),
        "of_x0": betas * np.sqrt(before) / (1 - kept),
        "of_xt": (1 - before) * np.sqrt(1 - betas) / (1 - kept),
    }


def reverse_by_tables(
    tables: dict[str, np.ndarray], network: nn.Module, i: int, step: int, n: int, x: Tensor
) -> tuple[Tensor, Tensor]:
    """(mean, log variance) of p(x_{i-1} | x_i): `step` is i's place in the whole chain of n, which the label tells."""
    output, w = network(x, torch.full((len(x),), 999 * (step + 1) / n, dtype=torch.float64)).chunk(2, dim=1)
    kept = tables["kept"][i]
    data = x / math.sqrt(kept) - math.sqrt(1 / kept - 1) * output
    fraction = (w + 1) / 2
    log_variance = fraction * math.log(tables["betas"][i]) + (1 - fraction) * tables["clipped"][i]
    return tables["of_x0"][i] * data + tables["of_xt"][i] * x, log_variance


RESPACED = pytest.mark.parametrize("count", [40, 9, 2])
SCHEDULES = pytest.mark.parametrize("chain", [DDPM.linear(40, 1e-3, 0.3), DDPM.cosine(40)], ids=repr)


@RESPACED
@SCHEDULES
def test_respaced_sampling_with_learned_variances_is_the_published_one(chain: DDPM, count: int) -> None:
    grid = torch.cat([times.spaced(40, count), torch.zeros(1, dtype=torch.float64)])
    keep = ((grid[:-1] * 40).round().long() - 1).flip(0).tolist()
    tables, network = published(chain.betas.numpy(), keep), Both()
    model = Preconditioned(network, chain.as_sde(), "noise", learned_variance=True)
    theirs, draws = numbers(3, 2, 2), [numbers(3, 2, 2, seed=10 + i) for i in range(count)]
    stream = iter(draws)
    with torch.no_grad():
        *_, ours = Ancestral("learned").walk(model, theirs, grid, lambda like: next(stream))
        for i, z in zip(reversed(range(count)), draws):
            mean, log_variance = reverse_by_tables(tables, network, i, keep[i], 40, theirs)
            theirs = mean + (torch.exp(log_variance / 2) * z if i > 0 else 0)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12 * theirs.abs().max().item())


@RESPACED
@SCHEDULES
def test_the_bound_of_a_respaced_chain_with_learned_variances_is_the_published_one(chain: DDPM, count: int) -> None:
    grid = torch.cat([times.spaced(40, count), torch.zeros(1, dtype=torch.float64)])
    keep = ((grid[:-1] * 40).round().long() - 1).flip(0).tolist()
    tables, network = published(chain.betas.numpy(), keep), Both()
    model = Preconditioned(network, chain.as_sde(), "noise", learned_variance=True)
    x0 = torch.randint(0, 256, (3, 2, 2), generator=torch.Generator().manual_seed(0)).double() / 127.5 - 1
    bound = chain_bound(model, x0, grid, variance="learned", levels=256, seed=torch.Generator().manual_seed(7))
    g, theirs = torch.Generator().manual_seed(7), []
    for i in reversed(range(count)):
        kept = tables["kept"][i]
        x = math.sqrt(kept) * x0 + math.sqrt(1 - kept) * torch.randn(x0.shape, generator=g, dtype=x0.dtype)
        with torch.no_grad():
            mean, log_variance = reverse_by_tables(tables, network, i, keep[i], 40, x)
        true, clipped = tables["of_x0"][i] * x0 + tables["of_xt"][i] * x, tables["clipped"][i]
        if i > 0:
            ratio = torch.exp(clipped - log_variance)
            term = (log_variance - clipped - 1 + ratio + (true - mean) ** 2 * torch.exp(-log_variance)) / 2
        else:
            std = torch.exp(log_variance / 2)
            above = torch.where(x0 > 0.999, math.inf, (x0 + 1 / 255 - mean) / std)
            below = torch.where(x0 < -0.999, -math.inf, (x0 - 1 / 255 - mean) / std)
            above, below = torch.where(above + below > 0, -below, above), torch.where(above + below > 0, -above, below)
            term = -torch.log(torch.special.ndtr(above) - torch.special.ndtr(below))
        theirs.append(term.flatten(1).sum(1))
    ours = torch.cat([bound.diffusion, bound.reconstruction[:, None]], 1)
    torch.testing.assert_close(ours, torch.stack(theirs, 1), rtol=1e-9, atol=1e-12)


def test_respaced_steps_are_the_published_ones() -> None:
    def space_timesteps(n: int, count: int) -> list[int]:
        stride, at, taken = (n - 1) / (count - 1) if count > 1 else 1, 0.0, []
        for _ in range(count):
            taken.append(round(at))
            at += stride
        return taken

    for n in (10, 50, 1000, 4000):
        for count in (1, 2, 3, 7, 10):
            found = times.spaced(n, count)
            assert ((found * n).round().long() - 1).flip(0).tolist() == space_timesteps(n, count)
    assert ((times.spaced(50, 25) * 50).round().long() - 1).flip(0).tolist() == space_timesteps(50, 25)  # 24.5
    with pytest.raises(ValueError, match="a chain of 10 steps can be walked in 1 to 10 of them, got 11"):
        times.spaced(10, 11)


def test_variances_lie_between_beta_tilde_and_beta_on_a_log_scale() -> None:
    x, low, high = numbers(3, 2), scalar(0.01), torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64)
    fraction = torch.tensor([[0.0, 1.0], [0.5, 0.25], [2.0, -1.0]], dtype=torch.float64)
    estimate = Estimate(x, x, scalar(1.0), fraction)
    found = reverse_log_variance(estimate, low, high, "learned").exp()
    wanted = torch.tensor([[0.01, 0.1], [math.sqrt(0.002), 0.01 * 20**0.25], [16.0, 0.01 / 40]], dtype=torch.float64)
    torch.testing.assert_close(found, wanted)
    for variance, wanted in (("small", low), ("large", high[:, None])):
        torch.testing.assert_close(reverse_log_variance(estimate, low, high, variance).exp(), wanted.expand_as(wanted))


def test_learned_variances_pass_through_wrappers_and_clean_steps_draw_none_of_them() -> None:
    sde = DDPM.linear(10, 0.01, 0.5).as_sde()
    model = Preconditioned(Both(), sde, "v", learned_variance=True)
    x = numbers(4, 2)
    t = torch.tensor([0.1, 0.3, 0.5, 1.0], dtype=torch.float64)
    with torch.no_grad():
        e = model(x, t)
        assert torch.equal(guide(model, Line(sde, 0.1, 0.2), 3.0)(x, t).fraction, e.fraction)
        assert torch.equal(model.given()(x, t).fraction, e.fraction)
        assert torch.equal(clip(model)(x, t).fraction, e.fraction)
        # a batch whose steps differ: the first ends at clean data, without noise
        s = t - torch.tensor([0.1, 0.1, 0.2, 0.1], dtype=torch.float64)
        s[0] = 0.0
        moved = Ancestral("learned").step(model, x, t, s, torch.ones_like)
        alone = [Ancestral("learned").step(model, x[i : i + 1], t[i], s[i], torch.ones_like) for i in range(4)]
    torch.testing.assert_close(moved, torch.cat(alone))
    torch.testing.assert_close(moved[:1], e.data[:1])
    with pytest.raises(ValueError, match="which needs twice its channels for learned variances"):
        Preconditioned(Plain(), sde, learned_variance=True)(x, t)


def test_clipping_holds_the_data_to_their_range_and_leaves_the_rest() -> None:
    sde = VPSDE()
    model, x, t = Line(sde, 2.0, 0.1), numbers(50, 2), scalar(0.4)
    e, held = model(x, t), clip(model, -0.5, 1.0)(x, t)
    inside = (e.data >= -0.5) & (e.data <= 1.0)
    assert held.data.min() == -0.5 and held.data.max() == 1.0 and inside.any()
    assert torch.equal(held.data[inside], e.data[inside]) and torch.equal(held.noise[inside], e.noise[inside])
    torch.testing.assert_close(sde.alpha(t) * held.data + sde.sigma(t) * held.noise, x)


def test_the_best_learned_variance_on_a_gaussian_is_the_true_reverse_variance() -> None:
    """Trained by L_vlb, with the exact mean: Var(x_s | x_t) = beta-tilde + share² Var(x_0 | x_t)."""
    chain = DDPM.linear(6, 0.1, 0.5)
    sde, grid = chain.as_sde(), chain.times
    x0, z, w = nodes()
    x0, z, t = x0.repeat(5, 1), z.repeat(5, 1), grid[:5].flip(0).repeat_interleave(9)
    given_state = exact(sde)(sde.perturb(x0, t, z), t)
    fraction = nn.Parameter(torch.full((5,), 0.5, dtype=torch.float64))  # of the steps i = 1..5
    optimizer = torch.optim.LBFGS([fraction], max_iter=50, tolerance_grad=1e-12, tolerance_change=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        estimate = given_state._replace(fraction=fraction.repeat_interleave(9)[:, None])
        loss = chain_term(sde, estimate, x0, t, "learned") @ w.repeat(5)
        loss.backward()
        return loss

    optimizer.step(closure)
    for i in range(1, 6):
        t, s = grid[5 - i], grid[6 - i]
        a, b, p, q = sde.alpha(s), sde.alpha(t), sde.sigma(s) ** 2, sde.sigma(t) ** 2
        joint = torch.stack([a * a * VARIANCE + p, a * b * VARIANCE + b / a * p, b * b * VARIANCE + q])
        true = joint[0] - joint[1] ** 2 / joint[2]  # of x_s given x_t, from their joint Gaussian
        small, large = sde.posterior(x0[:1], x0[:1], s, t)[1], sde.transition(s, t)[1] ** 2
        assert small < true < large
        found = small.log() + fraction[i - 1] * (large / small).log()
        assert found.exp().item() == pytest.approx(true.item(), rel=1e-6)


# --- objectives


def batch(levels: int | None = 17) -> tuple[Preconditioned, Tensor, Tensor, Tensor]:
    sde = DDPM.linear(10, 0.01, 0.5).as_sde()
    x0 = torch.randint(0, 17, (10, 2, 3), generator=torch.Generator().manual_seed(0)).double() / 8 - 1
    t = torch.arange(1, 11, dtype=torch.float64) / 10
    return Preconditioned(Both(), sde, "noise", learned_variance=True), x0, t, numbers(10, 2, 3, seed=1)


def gradients(model: Preconditioned, loss: Tensor) -> tuple[Tensor, Tensor]:
    network = model.network
    return torch.autograd.grad(loss.sum(), (network.mean, network.spread), materialize_grads=True)  # type: ignore[arg-type]


def test_the_hybrid_s_mean_learns_from_l_simple_and_its_variance_from_l_vlb() -> None:
    model, x0, t, z = batch()
    simple = (model(model.sde.perturb(x0, t, z), t).noise - z).square().flatten(1).mean(1)
    vlb = variational(model, x0, t, z, levels=17)
    both = hybrid(model, x0, t, z, levels=17)
    torch.testing.assert_close(both, simple + 0.001 * vlb)
    of_simple, of_vlb, of_both = (gradients(model, loss) for loss in (simple, vlb, both))
    assert torch.equal(of_both[0], of_simple[0]) and bool((of_simple[1] == 0).all())
    torch.testing.assert_close(of_both[1], 0.001 * of_vlb[1], rtol=1e-12, atol=0)
    assert of_vlb[0].abs().min() > 0 and of_vlb[1].abs().min() > 0


def test_l_vlb_averages_to_the_bound_without_its_prior_in_bits() -> None:
    model, x0, t, _ = batch()
    g = torch.Generator().manual_seed(4)
    x0 = x0[:1].expand(10, -1, -1)
    z = torch.stack([torch.randn(1, 2, 3, generator=g, dtype=torch.float64)[0] for _ in range(10)]).flip(0)
    with torch.no_grad():
        loss = variational(model, x0, t, z, levels=17)
    bound = chain_bound(model, x0[:1], variance="learned", levels=17, seed=torch.Generator().manual_seed(4))
    assert loss.mean().item() == pytest.approx(bound.bits_per_dim(bound.total - bound.prior).item(), rel=1e-12)


# --- times by second moments


def test_second_moments_draw_evenly_until_all_steps_are_known_and_then_by_their_losses() -> None:
    law, sde = SecondMoments(3, history=2), DDPM.linear(3, 0.1, 0.5).as_sde()
    u = (torch.arange(3000, dtype=torch.float64) + 0.5) / 3000

    def shares() -> list[float]:
        t = law(sde, u).t
        return [(t * 3).round().eq(i + 1).double().mean().item() for i in range(3)]

    law.update(torch.tensor([1, 1, 2, 2, 2, 3]) / 3, torch.tensor([1.0, 7.0, 3.0, 4.0, 8.0, 5.0]))
    assert shares() == pytest.approx([1 / 3] * 3)
    assert law(sde, u).weight.unique().tolist() == pytest.approx([1.0])
    law.update(torch.tensor([1.0]), torch.tensor([12.0]))  # and now there are two of each; the 3 was overwritten
    size = [math.sqrt(25), math.sqrt(40), math.sqrt(84.5)]
    wanted = [0.999 * s / sum(size) + 0.001 / 3 for s in size]
    assert law.chances.tolist() == pytest.approx(wanted, rel=1e-12) and shares() == pytest.approx(wanted, abs=1e-3)


def test_second_moments_weights_average_as_even_draws_and_lower_the_variance() -> None:
    """L_vlb of a chain whose first steps cost the most: the paper's reason for this law (section 3.3)."""
    sde, truth = DDPM.linear(50, 1e-3, 0.2).as_sde(), exact(DDPM.linear(50, 1e-3, 0.2).as_sde())
    law, g = SecondMoments(50), torch.Generator().manual_seed(0)

    def loss(t: Tensor) -> Tensor:
        x0 = truth.sample(len(t), g)[0]
        z = torch.randn(x0.shape, generator=g, dtype=x0.dtype)
        return variational(truth, x0, t, z, "small")

    while bool((law.counts < 10).any()):
        t = law(sde, uniform_numbers(128, g)).t
        law.update(t, loss(t))
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    t, weight = law(sde, u)
    for h in (torch.cos, torch.exp):
        assert float((weight * h(t)).mean()) == pytest.approx(float(h(torch.arange(1, 51) / 50).mean()), rel=1e-3)
    drawn = [chosen(sde, uniform_numbers(20_000, g)) for chosen in (discrete(50), law)]
    even, learned = (weight * loss(t) for t, weight in drawn)
    error = math.sqrt(float(even.var() + learned.var()) / 20_000)
    assert abs(even.mean() - learned.mean()) < 4 * error
    assert learned.var() < even.var() / 2
