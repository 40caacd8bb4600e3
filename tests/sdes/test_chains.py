"""Chains: DDPM is the discretised VP SDE and NCSN the discretised VE SDE, down to their published algorithms."""

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from score_sde import (
    DDPM,
    EDMSDE,
    SMLD,
    VESDE,
    VPSDE,
    Ancestral,
    AnnealedLangevin,
    CosineSDE,
    Preconditioned,
    ReverseDiffusion,
    Sampler,
    ScoreModel,
    SubVPSDE,
    losses,
    sample,
    time_laws,
)
from score_sde.models.closed_form import Gaussian, Mixture
from score_sde.sdes import like
from tests.oracles import CHAINS, TABLES, name, numbers, recorded

EVERY = pytest.mark.parametrize("chain", CHAINS, ids=name)
DDPMS = pytest.mark.parametrize("chain", [c for c in CHAINS if isinstance(c, DDPM)], ids=repr)
SMLDS = pytest.mark.parametrize("chain", [c for c in CHAINS if isinstance(c, SMLD)], ids=repr)


def exact(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def slope(n: list[int], error: list[float]) -> float:
    """Least-squares slope of log error against log n."""
    return np.polyfit(np.log(n), np.log(error), 1)[0]


# ---------------------------------------------------------------------------------------------------------------------
# The schedules


def test_the_vp_sde_in_1000_steps_is_the_published_ddpm_schedule():
    chain = DDPM.from_sde(VPSDE(beta_min=0.1, beta_max=20.0), 1000)
    assert torch.equal(chain.betas, torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    assert chain == DDPM.linear(1000) == DDPM(chain.betas)
    # Ho et al.'s code calls numpy, whose linspace rounds half of the values one unit differently.
    np.testing.assert_allclose(chain.betas.numpy(), np.linspace(1e-4, 0.02, 1000), rtol=2.3e-16)
    assert chain.alpha_bar[-1].item() == pytest.approx(4.0358e-5, rel=1e-5)


@pytest.mark.parametrize("n", [21, 100, 10_000])
def test_a_vp_chain_has_the_sdes_beta_over_n(n):
    sde = VPSDE(beta_min=0.2, beta_max=19.0)
    betas = sde.beta(torch.arange(n, dtype=torch.float64) / (n - 1)) / n
    torch.testing.assert_close(DDPM.from_sde(sde, n).betas, betas, rtol=1e-14, atol=0)


def test_the_cosine_chain_is_the_published_one():
    def alpha_bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    published = [min(1 - alpha_bar((i + 1) / 1000) / alpha_bar(i / 1000), 0.999) for i in range(1000)]
    assert DDPM.cosine(1000).betas.tolist() == pytest.approx(published, rel=1e-11)


def test_the_ve_chain_is_geometric_between_the_sdes_ends():
    sigmas = SMLD.from_sde(VESDE(sigma_min=0.01, sigma_max=50.0), 1000).sigmas
    torch.testing.assert_close(sigmas[[0, -1]], torch.tensor([0.01, 50.0], dtype=torch.float64), rtol=1e-14, atol=0)
    ratio = torch.full((999,), 5000 ** (1 / 999), dtype=torch.float64)
    torch.testing.assert_close(sigmas[1:] / sigmas[:-1], ratio, rtol=1e-13, atol=0)


@DDPMS
def test_alpha_bar_is_the_product_of_one_minus_beta(chain):
    product, expected = 1.0, []
    for beta in chain.betas.tolist():
        product *= 1 - beta
        expected.append(product)
    assert chain.alpha_bar.tolist() == pytest.approx(expected, rel=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Convergence of the chains to their SDEs

STEPS = [100, 200, 500, 1000, 2000, 5000, 10_000]


@pytest.mark.parametrize("t", [0.25, 0.5, 1.0])
def test_alpha_bar_converges_to_alpha_squared_at_rate_one_over_n(t):
    sde, error = VPSDE(), []
    for n in STEPS:
        error.append(DDPM.from_sde(sde, n).alpha_bar[round(t * n) - 1].item() - sde.alpha(exact(t)).item() ** 2)
    # At N = 100 the next term of the expansion still has a share of 20 % at t = 1.
    assert slope(STEPS, np.abs(error)) == pytest.approx(-1, abs=0.05)
    assert slope(STEPS[3:], np.abs(error[3:])) == pytest.approx(-1, abs=0.01)
    # Even the constant is known. Sum log(1 - beta_i) over i < t N, with beta_i = beta(i/(N - 1))/N:
    # log alpha_bar - log alpha² = [(beta_max - beta_min) (t - t²)/2 - (integral of beta² to t)/2]/N + O(1/N²).
    rise = sde.beta_max - sde.beta_min
    squares = ((sde.beta_min + rise * t) ** 3 - sde.beta_min**3) / (3 * rise)
    constant = sde.alpha(exact(t)).item() ** 2 * (rise * (t - t**2) - squares) / 2
    assert error[-1] * STEPS[-1] == pytest.approx(constant, rel=5e-3)


@pytest.mark.parametrize("t", [0.25, 0.5])
def test_smld_sigmas_converge_to_the_ve_sdes_at_rate_one_over_n(t):
    """(At t = 1 both are sigma_max, at every N.)"""
    sde = VESDE()
    error = [1 - (SMLD.from_sde(sde, n).sigmas[round(t * n) - 1] / sde.sigma(exact(t))).item() for n in STEPS]
    assert slope(STEPS, np.abs(error)) == pytest.approx(-1, abs=0.01)
    # Level tN - 1 lies at (tN - 1)/(N - 1), which is (1 - t)/N before t.
    assert error[-1] * STEPS[-1] == pytest.approx(math.log(5000) * (1 - t), rel=5e-3)


def markov(chain: DDPM, mean: np.ndarray, cov: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Mean and covariance of x_0, x_1, ... under x_i = sqrt(1 - beta_i) x_{i-1} + sqrt(beta_i) z_i, as printed."""
    for beta in chain.betas.tolist():
        mean, cov = math.sqrt(1 - beta) * mean, (1 - beta) * cov + beta * np.eye(len(mean))
        yield mean, cov


@DDPMS
def test_the_standard_normal_is_invariant_under_the_chain(chain):
    for mean, cov in markov(chain, np.zeros(3), np.eye(3)):
        assert not mean.any()
        np.testing.assert_allclose(cov, np.eye(3), rtol=0, atol=2e-14)


@DDPMS
def test_any_start_converges_to_the_standard_normal_at_the_rate_sqrt_alpha_bar(chain):
    mean, root = numbers(3, seed=1).numpy() * 4, numbers(3, 3, seed=2).numpy()
    cov = root @ root.T
    distance = []  # Wasserstein-2 to N(0, I), between Gaussians with commuting covariances
    for (m, c), alpha_bar in zip(markov(chain, mean, cov), chain.alpha_bar.tolist()):
        np.testing.assert_allclose(m, math.sqrt(alpha_bar) * mean, rtol=1e-12)
        np.testing.assert_allclose(c - np.eye(3), alpha_bar * (cov - np.eye(3)), rtol=1e-9, atol=1e-12)
        distance.append(math.sqrt(m @ m + ((np.linalg.eigvalsh(c) ** 0.5 - 1) ** 2).sum()))
    rate = np.array(distance) / np.sqrt(chain.alpha_bar.numpy())
    # The mean goes as sqrt(alpha_bar), the covariance as alpha_bar: W2/sqrt(alpha_bar) falls to |mean|.
    assert (np.diff(rate) < 1e-12).all()
    spread = np.abs(np.linalg.eigvalsh(cov) - 1).max()
    assert rate[-1] == pytest.approx(np.linalg.norm(mean), rel=spread**2 * chain.alpha_bar[-1].item() + 1e-12)


@EVERY
def test_perturb_is_the_chain_run_from_the_start(chain):
    """The Gaussian of x_i given x_0 by one recursion of the chain's steps, as the papers print them."""
    x0, z = numbers(2, 3), numbers(2, 3, seed=1)
    mean, variance, before = x0, 0.0, 0.0
    for i, value in enumerate((chain.betas if isinstance(chain, DDPM) else chain.sigmas).tolist()):
        if isinstance(chain, DDPM):
            mean, variance = math.sqrt(1 - value) * mean, (1 - value) * variance + value
        else:
            variance, before = variance + value**2 - before**2, value
        if i % 100 == 0 or i == len(chain) - 1:
            torch.testing.assert_close(chain.perturb(x0, i, z), mean + math.sqrt(variance) * z, rtol=1e-11, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Discrete and continuous time


@EVERY
def test_as_sde_goes_through_the_chain(chain):
    n, sde = len(chain), chain.as_sde()
    index = torch.arange(n)
    t = (index + 1) / torch.tensor(n, dtype=torch.float64)
    assert torch.equal(chain.times[:-1].flip(0), t) and chain.times[-1] == 0
    x0, z = numbers(n, 2), numbers(n, 2, seed=1)
    torch.testing.assert_close(sde.perturb(x0, t, z), chain.perturb(x0, index, z), rtol=1e-12, atol=1e-13)
    scale, std = sde.transition(t - 1 / n, t)
    if isinstance(chain, DDPM):
        torch.testing.assert_close(sde.alpha(t) ** 2, chain.alpha_bar, rtol=1e-12, atol=0)
        torch.testing.assert_close(sde.sigma(t) ** 2, 1 - chain.alpha_bar, rtol=1e-12, atol=0)
        steps = torch.sqrt(1 - chain.betas), torch.sqrt(chain.betas)
    else:
        torch.testing.assert_close(sde.sigma(t), chain.sigmas, rtol=1e-12, atol=0)
        steps = torch.ones(n, dtype=torch.float64), chain.sigmas.square().diff(prepend=exact(0.0)[None]).sqrt()
    torch.testing.assert_close(scale, steps[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(std, steps[1], rtol=1e-12, atol=0)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rates_at_a_knot_are_those_of_the_step_before_it(chain, dtype):
    """t = (i + 1)/N, however it rounds, is the end of step i and never the start of the next."""
    n, sde = len(chain), chain.as_sde()
    ends, inside = (torch.arange(n) + 1).to(dtype) / n, (torch.arange(n) + 0.5).to(dtype) / n
    assert torch.equal(sde.g(ends), sde.g(inside)) and torch.equal(sde.f(ends), sde.f(inside))
    if isinstance(chain, DDPM):
        g = torch.sqrt(-n * torch.log1p(-chain.betas))
        torch.testing.assert_close(sde.g(ends).double(), g, rtol=1e-12 if dtype == torch.float64 else 2e-7, atol=0)


def test_curves_are_linear_between_the_steps():
    t = torch.tensor([0.0, 0.1, 0.7, 0.75], dtype=torch.float64)  # 0, half of step 0, half and three quarters of step 3
    betas, sigmas = [0.3, 0.1, 0.6, 0.2, 0.5], [0.1, 0.5, 0.6, 2.0, 7.0]
    log = [0.0, 0.5 * math.log(0.7), *(math.log(0.7 * 0.9 * 0.4) + share * math.log(0.8) for share in (0.5, 0.75))]
    assert (2 * torch.log(DDPM(betas).as_sde().alpha(t))).tolist() == pytest.approx(log, rel=1e-14, abs=1e-16)
    variance = [0.0, 0.5 * 0.01, *(0.36 + share * (4 - 0.36) for share in (0.5, 0.75))]
    assert SMLD(sigmas).as_sde().sigma(t).square().tolist() == pytest.approx(variance, rel=1e-14)


@DDPMS
def test_the_ddpm_posterior_is_the_published_one(chain):
    """Ho et al. 2020, eq. 6-7, with alpha_bar_{-1} = 1."""
    n = len(chain)
    index = torch.arange(n)
    x0, x = numbers(n, 2), numbers(n, 2, seed=1)
    beta, bar = chain.betas[:, None], chain.alpha_bar[:, None]
    before = torch.cat([torch.ones(1, 1, dtype=torch.float64), bar[:-1]])
    expected = before.sqrt() * beta / (1 - bar) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - bar) * x
    mean, variance = chain.posterior(x, x0, index)
    torch.testing.assert_close(mean, expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(variance, (beta * (1 - before) / (1 - bar))[:, 0], rtol=1e-11, atol=0)
    for i in (0, n - 1):
        torch.testing.assert_close(chain.posterior(x, x0, i)[0][i], mean[i], rtol=1e-14, atol=0)
    torch.testing.assert_close(mean[0], x0[0], rtol=1e-12, atol=0)


@SMLDS
def test_the_smld_posterior_is_the_published_one(chain):
    """Song et al. 2021, appendix F, with sigma_{-1} = 0."""
    n = len(chain)
    x0, x = numbers(n, 2), numbers(n, 2, seed=1)
    now = chain.sigmas.square()
    before = torch.cat([exact(0.0)[None], now[:-1]])
    mean, variance = chain.posterior(x, x0, torch.arange(n))
    share = (before / now)[:, None]
    torch.testing.assert_close(mean, share * x + (1 - share) * x0, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(variance, before * (now - before) / now, rtol=1e-11, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# One step of two samplers


def mixture(sde) -> Mixture:
    return Mixture(sde, [0.3, 0.7], [[-1.0, 0.5], [1.0, -0.2]], [0.1, 0.3])


@pytest.mark.parametrize("t", [0.25, 0.5, 1.0])
def test_the_ancestral_and_the_reverse_diffusion_step_differ_by_beta_squared(t):
    """Song et al. 2021, appendix E: x/sqrt(1 - beta) + beta/sqrt(1 - beta) s against (2 - sqrt(1 - beta)) x + beta s.

    The difference is beta² (x/4 + s/2) + O(beta³), with the same noise sqrt(beta) z in both.
    """
    x, z, error, betas = numbers(5, 2), numbers(5, 2, seed=1), [], []
    for n in STEPS:
        chain = DDPM.from_sde(VPSDE(), n)
        model = mixture(chain.as_sde())
        step = exact(t), exact(t - 1 / n), lambda like: z
        apart = Ancestral(variance="large").step(model, x, *step) - ReverseDiffusion().step(model, x, *step)
        betas.append(chain.betas[round(t * n) - 1].item())
        error.append(apart.abs().max().item())
    assert slope(betas, error) == pytest.approx(2, abs=0.05)
    torch.testing.assert_close(apart / betas[-1] ** 2, x / 4 + model.score(x, exact(t)) / 2, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("t", [0.25, 0.5, 1.0])
def test_the_ddpm_step_and_the_vp_sdes_reverse_diffusion_step_agree_to_second_order(t):
    """The same between the chain and the SDE itself, which has other curves: O(beta²) in the mean, O(beta^1.5) in
    the factor of the noise, sqrt(beta_i) against the root of an integral that differs from beta_i by O(beta²)."""
    x, means, noises, betas = numbers(5, 2), [], [], []
    for n in STEPS:
        chain = DDPM.from_sde(VPSDE(), n)
        times = exact(t), exact(t - 1 / n)
        ddpm = [Ancestral("large").step(mixture(chain.as_sde()), x, *times, lambda x, z=z: x * 0 + z) for z in (0, 1)]
        vp = [ReverseDiffusion().step(mixture(VPSDE()), x, *times, lambda x, z=z: x * 0 + z) for z in (0, 1)]
        means.append((ddpm[0] - vp[0]).abs().max().item())
        noises.append(((ddpm[1] - ddpm[0]) - (vp[1] - vp[0])).abs().max().item())
        betas.append(chain.betas[round(t * n) - 1].item())
    assert slope(betas, means) == pytest.approx(2, abs=0.05)
    assert slope(betas, noises) == pytest.approx(1.5, abs=0.05)


def test_the_smld_ancestral_and_the_reverse_diffusion_step_have_one_mean():
    """Here only the noise differs, by the factor sigma_{i-1}/sigma_i: O((sigma_i² - sigma_{i-1}²)^1.5)."""
    x, error, variances = numbers(5, 2), [], []
    for n in STEPS:
        chain = SMLD.from_sde(VESDE(), n)
        model, times = mixture(chain.as_sde()), (exact(0.5), exact(0.5 - 1 / n))
        ones = torch.ones_like
        reverse = ReverseDiffusion().step(model, x, *times, ones)
        torch.testing.assert_close(Ancestral("large").step(model, x, *times, ones), reverse, rtol=1e-12, atol=1e-13)
        error.append((Ancestral("small").step(model, x, *times, ones) - reverse).abs().max().item())
        variances.append(chain.sigmas.square().diff()[n // 2 - 2].item())
    assert slope(variances[2:], error[2:]) == pytest.approx(1.5, abs=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# The published algorithms, line by line


class Network(nn.Module):
    """F(x, i) with weights of its own for every step: a stand-in for eps_theta and s_theta in float64."""

    def __init__(self, steps: int, dim: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(numbers(dim, dim, seed=3) / dim**0.5)
        self.shift = nn.Parameter(numbers(steps, dim, seed=4))

    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        return torch.tanh(x.flatten(1) @ self.mix + self.shift[i]).reshape(x.shape)


def on_chain(network: nn.Module, chain: DDPM | SMLD, rule) -> ScoreModel:
    """The network as a model of the chain: it is told the index i of t = (i + 1)/N."""

    def index(alpha: Tensor, sigma: Tensor, t: Tensor) -> Tensor:
        return (t * len(chain)).round().long() - 1

    return Preconditioned(network, chain.as_sde(), rule, label=index)


def draws(shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [numbers(*shape, seed=100 + k, dtype=dtype) for k in range(count)]


def replay(recorded: list[Tensor]) -> Callable[[Tensor], Tensor]:
    remaining = iter(recorded)
    return lambda like: next(remaining)


def walk(sampler: Sampler, model: ScoreModel, x: Tensor, times: Tensor, recorded: list[Tensor]) -> Tensor:
    """The end of a walk that uses up every recorded draw."""
    remaining = iter(recorded)
    with torch.no_grad():
        for state in sampler.walk(model, x, times, lambda like: next(remaining)):
            x = state
    assert next(remaining, None) is None
    return x


def gradients(loss: Tensor, network: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(network.parameters())))


def test_training_a_ddpm_is_algorithm_1_of_ho_et_al():
    chain = DDPM.linear(1000)
    network = Network(1000, 12).double()
    x0, epsilon, u = numbers(6, 3, 2, 2), numbers(6, 3, 2, 2, seed=1), torch.rand(6, dtype=torch.float64)

    # 1: repeat
    # 2: x_0 ~ q(x_0)
    # 3: t ~ Uniform({1, ..., T})
    t = 1 + (u * 1000).long()
    # 4: epsilon ~ N(0, I)
    # 5: take gradient descent step on || epsilon - epsilon_theta(sqrt(a_t) x_0 + sqrt(1 - a_t) epsilon, t) ||²
    bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t - 1].reshape(6, 1, 1, 1)
    squares = (epsilon - network(bar.sqrt() * x0 + (1 - bar).sqrt() * epsilon, t - 1)).square().sum((1, 2, 3))

    model = on_chain(network, chain, "noise")
    times = time_laws.discrete(1000)(model.sde, u)
    ours = losses.denoising(model, x0, times.t, epsilon, losses.simple) * times.weight
    torch.testing.assert_close(12 * ours, squares, rtol=1e-12, atol=0)
    for got, want in zip(gradients(12 * ours.mean(), network), gradients(squares.mean(), network)):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_sampling_a_ddpm_is_algorithm_2_of_ho_et_al(variance, dtype):
    steps, shape = 50, (4, 3, 2)
    chain = DDPM.linear(steps, 0.002, 0.4)
    network = Network(steps, 6).to(dtype)
    first, *rest = draws(shape, steps, dtype)

    beta = torch.linspace(0.002, 0.4, steps, dtype=torch.float64)
    alpha, bar = 1 - beta, torch.cumprod(1 - beta, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    sigma = (beta if variance == "large" else (1 - before) / (1 - bar) * beta).sqrt()
    remaining = iter(rest)
    with torch.no_grad():
        # 1: x_T ~ N(0, I)
        x = first
        # 2: for t = T, ..., 1 do
        for t in reversed(range(steps)):  # t - 1 in the paper's count
            # 3: z ~ N(0, I) if t > 1, else z = 0
            z = next(remaining) if t > 0 else torch.zeros(shape, dtype=dtype)
            # 4: x_{t-1} = (x_t - (1 - alpha_t)/sqrt(1 - a_t) epsilon_theta(x_t, t))/sqrt(alpha_t) + sigma_t z
            epsilon = network(x, torch.full((4,), t))
            x = (x - (1 - alpha[t]) / (1 - bar[t]).sqrt() * epsilon) / alpha[t].sqrt() + sigma[t] * z
            # 5: end for
    # 6: return x_0

    model = on_chain(network, chain, "noise")
    ours = walk(Ancestral(variance), model, first, chain.times, rest)
    assert ours.dtype == dtype
    # In float32, rounding by 6e-8 in each of 50 steps.
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    assert (ours - x).abs().max().item() <= rtol * x.abs().max().item()
    generator, again = (torch.Generator().manual_seed(5) for _ in range(2))
    whole = sample(model, Ancestral(variance), shape, chain.times, seed=generator, dtype=dtype)
    recorded = [torch.randn(shape, generator=again, dtype=dtype) for _ in range(steps)]
    torch.testing.assert_close(whole, walk(Ancestral(variance), model, recorded[0], chain.times, recorded[1:]))


def test_training_an_ncsn_is_its_sigma_squared_weighted_objective():
    """Song & Ermon 2019, eq. 5-6: mean over levels of sigma² E || s(x + sigma z, sigma) + z/sigma ||² / 2."""
    chain = SMLD.from_sde(VESDE(), 10)
    network = Network(10, 12).double()
    x0, z, u = numbers(6, 3, 2, 2), numbers(6, 3, 2, 2, seed=1), torch.rand(6, dtype=torch.float64)

    i = (u * 10).long()
    sigma = chain.sigmas[i].reshape(6, 1, 1, 1)
    noised = x0 + sigma * z
    squares = (network(noised, i) + (noised - x0) / sigma**2).square().sum((1, 2, 3)) / 2
    objective = (sigma.flatten() ** 2 * squares).mean()

    model = on_chain(network, chain, "score")
    times = time_laws.discrete(10)(model.sde, u)
    ours = 12 / 2 * losses.denoising(model, x0, times.t, z, losses.simple).mean()
    torch.testing.assert_close(ours, objective, rtol=1e-10, atol=0)  # (noised - x0)/sigma² cancels at sigma = 0.01
    for got, want in zip(gradients(ours, network), gradients(objective, network)):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * want.abs().max().item())


def test_sampling_an_ncsn_is_annealed_langevin_dynamics():
    """Algorithm 1 of Song & Ermon 2019, with 10 levels from 1 to 0.01 and epsilon = 2e-5 as they chose."""
    levels, per_level, epsilon, shape = 10, 20, 2e-5, (4, 3, 2)
    chain = SMLD(torch.logspace(-2, 0, levels, dtype=torch.float64))
    network = Network(levels, 6).double()
    first, recorded = numbers(*shape), draws(shape, levels * per_level)

    sigma = np.geomspace(1, 0.01, levels)
    remaining = iter(recorded)
    with torch.no_grad():
        # 1: initialise x
        x = first
        # 2: for i = 1 ... L
        for i in range(levels):
            # 3: alpha_i = epsilon sigma_i²/sigma_L²
            alpha = epsilon * sigma[i] ** 2 / sigma[-1] ** 2
            # 4: for t = 1 ... T
            for _ in range(per_level):
                # 5: draw z ~ N(0, I)
                z = next(remaining)
                # 6: x = x + alpha_i/2 s_theta(x, sigma_i) + sqrt(alpha_i) z
                x = x + alpha / 2 * network(x, torch.full((4,), levels - 1 - i)) + math.sqrt(alpha) * z

    # Its step is 2 (snr sigma_i)² in the package: alpha_i/2, if snr = sqrt(epsilon)/(2 sigma_L).
    sampler = AnnealedLangevin(snr=math.sqrt(epsilon) / (2 * sigma[-1]), steps=per_level)
    ours = walk(sampler, on_chain(network, chain, "score"), first, chain.times, recorded)
    torch.testing.assert_close(ours, x, rtol=1e-11, atol=1e-12)


def test_ancestral_sampling_of_smld_is_equation_47_of_song_et_al():
    steps, shape = 50, (4, 3, 2)
    chain = SMLD.from_sde(VESDE(), steps)
    network = Network(steps, 6).double()
    first, *rest = draws(shape, steps)
    x = 50 * first
    sigma = np.concatenate([[0], np.geomspace(0.01, 50, steps)])
    remaining = iter(rest)
    with torch.no_grad():
        for i in range(steps, 0, -1):
            gained = sigma[i] ** 2 - sigma[i - 1] ** 2
            x = x + gained * network(x, torch.full((4,), i - 1))
            if i > 1:
                x = x + math.sqrt(sigma[i - 1] ** 2 * gained / sigma[i] ** 2) * next(remaining)
    ours = walk(Ancestral(), on_chain(network, chain, "score"), 50 * first, chain.times, rest)
    assert (ours - x).abs().max().item() <= 1e-11 * x.abs().max().item()


@pytest.mark.parametrize(
    "make", [lambda n: DDPM.from_sde(VPSDE(), n), lambda n: SMLD.from_sde(VESDE(), n)], ids=["DDPM", "SMLD"]
)
def test_a_chain_run_backwards_with_the_exact_model_converges_to_the_data(make):
    """Mean and variance follow the sampler's affine steps: no Monte Carlo error, only one of first order in 1/N."""
    x, z = torch.tensor([[[0.0], [1.0], [0.0]], [[0.0], [0.0], [1.0]]], dtype=torch.float64)
    steps, error = [50, 100, 200], []
    for n in steps:
        chain = make(n)
        model = Gaussian(chain.as_sde(), torch.tensor([0.5], dtype=torch.float64), exact(0.3))
        mean, variance = 0.0, chain.as_sde().prior_std ** 2
        for t, s in zip(chain.times[:-1], chain.times[1:]):
            shift, scaled, noised = Ancestral().step(model, x, t, s, lambda like: z).flatten().tolist()
            mean, variance = (scaled - shift) * mean + shift, (scaled - shift) ** 2 * variance + (noised - shift) ** 2
        assert mean == pytest.approx(0.5, abs=1e-4)
        error.append(0.3 - variance)
    # The slope comes to -1 from above: at these N it is -0.84 (DDPM) and -0.95 (SMLD).
    assert slope(steps, error) == pytest.approx(-1, abs=0.2)


# ---------------------------------------------------------------------------------------------------------------------
# Golden values of score_sde_pytorch


@pytest.mark.parametrize("case", ["vp_n1000", "ve_n1000", "ve_n7"])
def test_golden_tables_and_discretisations(case):
    sde, want = recorded(case)
    n, vp = TABLES[case]["N"], TABLES[case]["sde"] == "vpsde"
    chain = DDPM.from_sde(sde, n) if vp else SMLD.from_sde(sde, n)
    if vp:
        tables = {
            "discrete_betas": chain.betas,
            "alphas": 1 - chain.betas,
            "alphas_cumprod": chain.alpha_bar,
            "sqrt_alphas_cumprod": chain.alpha_bar.sqrt(),
            "sqrt_1m_alphas_cumprod": (1 - chain.alpha_bar).sqrt(),
        }
    else:
        tables = {"discrete_sigmas": chain.sigmas}
    for key, table in tables.items():
        # The reference multiplies up 1000 factors in float32, and 1 - cumprod loses digits of the first ones.
        rtol = {"alphas_cumprod": 1e-5, "sqrt_alphas_cumprod": 1e-5, "sqrt_1m_alphas_cumprod": 1e-4}.get(key, 1e-6)
        torch.testing.assert_close(table.float(), want[f"table.{key}"], rtol=rtol, atol=0)
        if f"f64.table.{key}" in want:
            torch.testing.assert_close(table, want[f"f64.table.{key}"], rtol=1e-12, atol=0)

    # The reference asks for the step at floor(t (N - 1)); its f is the step's scale minus 1, its G the deviation.
    x, t, curves = want["x"], want["t"], chain.as_sde()
    index = (t * (n - 1)).long()
    scale, std = curves.transition(index / exact(n), (index + 1) / exact(n))
    score = -0.7 * x + like(0.1 * (1 - t), x)
    f, share = like(scale - 1, x) * x, like(std**2, x) * score
    # In float32 its sqrt(1 - beta) x - x cancels; and its sigmas, exponentials of rounded logarithms, err by 3e-7, so
    # that the difference of two squares which are 1.7 % apart errs by 6e-5.
    close = {"rtol": 1e-5, "atol": 1e-6} if vp else {"rtol": 6e-5, "atol": 0}
    torch.testing.assert_close(f, want["discretize.f"], **close)
    torch.testing.assert_close(f - share, want["reverse.discretize.f"], **close)
    torch.testing.assert_close(f - share / 2, want["ode.discretize.f"], **close)
    assert not want["ode.discretize.G"].any()
    for key in ("discretize.G", "reverse.discretize.G"):
        torch.testing.assert_close(std.float(), want[key], rtol=1e-6 if vp else 3e-5, atol=0)

    index = want["grid.index"]
    assert torch.equal(index, (want["grid.t"] * (n - 1)).long())
    scale, std = curves.transition(index / exact(n), (index + 1) / exact(n))
    torch.testing.assert_close((scale - 1).float(), want["grid.f_of_ones"], rtol=1e-3, atol=6e-8)
    torch.testing.assert_close(std.float(), want["grid.G"], rtol=1e-6 if vp else 3e-5, atol=0)


def test_golden_score_multipliers_of_discrete_networks():
    """The reference divides a discrete VP network's output by the chain's deviation at floor(t (N - 1))."""
    _, want = recorded("vp_n1000")
    sde = DDPM.linear(1000).as_sde()
    deviation = sde.sigma(((want["t"] * 999).long() + 1) / exact(1000))
    torch.testing.assert_close((-1 / deviation).float(), want["score_multiplier.discrete"], rtol=1e-4, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Values and refusals


@EVERY
def test_a_chain_is_a_value(chain):
    with pytest.raises(FrozenInstanceError):
        chain.values = ()
    again = type(chain)(chain.values)
    assert again == chain and hash(again) == hash(chain) and again.as_sde() == chain.as_sde()
    assert type(chain)(chain.values[:3]) != chain
    chain.as_sde().sigma(torch.ones(2))
    for twin in (pickle.loads(pickle.dumps(chain)), copy.deepcopy(chain)):
        assert twin == chain
    assert f"N={len(chain)}" in repr(chain)


@EVERY
def test_curves_remember_their_tables_and_remain_values(chain):
    sde, fresh, t = chain.as_sde(), chain.as_sde(), torch.rand(3, dtype=torch.float64)
    first = sde.sigma(t)
    assert sde._table(t)[0] is sde._table(t)[0]
    assert sde.sigma(t.float()).dtype == torch.float32 and torch.equal(sde.sigma(t), first)
    assert sde == fresh and hash(sde) == hash(fresh) and repr(sde) == repr(fresh)
    for twin in (pickle.loads(pickle.dumps(sde)), copy.deepcopy(sde)):
        assert twin == sde and vars(twin) == vars(fresh) and torch.equal(twin.sigma(t), first)
    with pytest.raises(FrozenInstanceError):
        sde.t_min = 0.5


@pytest.mark.parametrize("n, beta", [(7, "beta_3 = 1.43571 of 7"), (20, "beta_19 = 1 of 20")])
def test_too_few_steps_are_refused(n, beta):
    """score_sde's tables hold NaN for N = 7 and divide by 0 for N = 20."""
    if n == 7:
        _, theirs = recorded("vp_n7")
        assert theirs["table.sqrt_alphas_cumprod"].isnan().any()
    with pytest.raises(ValueError, match=beta + r" lies outside \(0, 1\); take more steps"):
        DDPM.from_sde(VPSDE(), n)
    DDPM.from_sde(VPSDE(), 21)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: DDPM([0.1, 0.0]), r"beta_1 = 0 of 2 lies outside \(0, 1\)"),
        (lambda: DDPM([-0.1]), r"beta_0 = -0.1 of 1 lies outside \(0, 1\)"),
        (lambda: DDPM([]), "betas must be a non-empty sequence of finite numbers"),
        (lambda: DDPM([0.1, math.nan]), "betas must be a non-empty sequence of finite numbers"),
        (lambda: SMLD([]), "sigmas must be a non-empty sequence of finite numbers"),
        (lambda: SMLD([1.0, math.inf]), "sigmas must be a non-empty sequence of finite numbers"),
        (lambda: SMLD([0.0, 1.0]), "sigmas must increase from above 0, got 0 after 0 at index 0"),
        (lambda: SMLD([2.0, 1.0]), "sigmas must increase from above 0, got 1 after 2 at index 1"),
        (lambda: DDPM.from_sde(SubVPSDE(), 100), r"DDPM discretises VPSDE, got SubVPSDE\("),
        (lambda: DDPM.from_sde(CosineSDE(), 100), r"DDPM discretises VPSDE, got CosineSDE\("),
        (lambda: SMLD.from_sde(EDMSDE(), 100), r"SMLD discretises VESDE, got EDMSDE\("),
        (lambda: DDPM.linear(10).perturb(torch.ones(2, 3), -1, torch.ones(2, 3)), r"i must be integers in 0\.\.9"),
        (lambda: SMLD([1.0]).posterior(torch.ones(2), torch.ones(2), 1), r"i must be integers in 0\.\.0"),
        (lambda: SMLD([1.0]).perturb(torch.ones(2), torch.zeros(2), torch.ones(2)), r"i must be integers in 0\.\.0"),
    ],
)
def test_impossible_chains_and_steps_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
