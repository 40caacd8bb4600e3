"""Inverse problems: operators against their matrices, models and samplers against the exact posterior."""

import math
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from score_sde import (
    DDIM,
    DDPM,
    SDE,
    VESDE,
    VPSDE,
    Ancestral,
    EulerMaruyama,
    Heun,
    Langevin,
    Multistep,
    PredictorCorrector,
    ReverseDiffusion,
    Sampler,
    ScoreModel,
    classifier,
    log_likelihood,
    sample,
    times,
)
from score_sde.inverse import (
    Average,
    Blur,
    Dense,
    Grey,
    Linear,
    Mask,
    Observation,
    Operator,
    Projected,
    Spectral,
    ddnm,
    dps,
    moment_matching,
    observe,
    pigdm,
    posterior,
    twisted,
)
from score_sde.inverse.samplers import _systematic
from score_sde.models.closed_form import Gaussian, Mixture
from score_sde.models.rules import Preconditioned
from score_sde.networks import UNet
from score_sde.samplers import EmbeddedODE
from tests.oracles import PURE, SDES, awake, name, numbers

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)

MEAN = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)
ROOT = torch.tensor([[0.8, 0.0, 0.0], [0.5, 0.4, 0.0], [-0.3, 0.2, 0.6]], dtype=torch.float64)
COV = ROOT @ ROOT.T
FIRST = Mask(torch.tensor([True, False, False]))
ROWS = Dense(torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]], dtype=torch.float64), (3,))
LOW_RANK = Dense(numbers(5, 2, seed=1) @ numbers(2, 24, seed=2), (2, 3, 4))

OPERATORS: list[tuple[Spectral, tuple[int, ...]]] = [
    (Mask(torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1], [1, 1, 1, 0]])), (2, 3, 4)),
    (Grey(), (3, 2, 4)),
    (Grey(torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)), (3, 2, 4)),
    (Average(2), (2, 4, 6)),
    (Average(3, dimensions=1), (2, 6)),
    (Blur.gaussian(0.7), (2, 5, 6)),
    (Blur(torch.tensor([0.2, 0.5, 0.1], dtype=torch.float64)), (2, 3, 5)),
    (LOW_RANK, (2, 3, 4)),
]
EACH_OPERATOR = pytest.mark.parametrize(("operator", "shape"), OPERATORS, ids=lambda v: name(v))


def time(t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float64)


def matrix_of(operator: Operator, shape: tuple[int, ...]) -> Tensor:
    d = math.prod(shape)
    return operator.apply(torch.eye(d, dtype=torch.float64).reshape(d, *shape)).flatten(1).T


# --- operators


@EACH_OPERATOR
def test_an_operator_s_parts_are_those_of_its_matrix(operator: Spectral, shape: tuple[int, ...]) -> None:
    """The adjoint, the pseudo-inverse, a gain and a function of A'A, by the matrix and its eigenvectors."""
    a, x = matrix_of(operator, shape), numbers(4, *shape)
    y = operator.apply(x) + operator.clean(numbers(*operator.apply(x).shape, seed=1))
    close(operator.adjoint(y).flatten(1), y.flatten(1) @ a)
    close(operator.pseudo_inverse(y).flatten(1), y.flatten(1) @ torch.linalg.pinv(a, rtol=1e-7).T)
    r2 = torch.tensor([0.1, 0.5, 2.0, 7.0], dtype=torch.float64)
    for variance in (0.3, r2.reshape(-1, *(1,) * len(shape))):
        each = torch.as_tensor(variance, dtype=torch.float64).flatten().expand(4)
        inverse = torch.linalg.inv(each[:, None, None] * (a @ a.T) + 0.2**2 * torch.eye(len(a), dtype=a.dtype))
        close(operator.gain(y, variance, 0.2).flatten(1), torch.einsum("nm,bnk,bk->bm", a, inverse, y.flatten(1)))
    values, basis = torch.linalg.eigh(a.T @ a)
    values = values.where(values > 1e-9, 0.0)
    expected = x.flatten(1) @ basis @ torch.diag(torch.cos(values)) @ basis.T
    close(operator.filtered(x, torch.cos).flatten(1), expected)


def test_operators_do_what_their_names_say() -> None:
    x = numbers(2, 3, 6, 4)
    close(Average(2).apply(x), torch.nn.functional.avg_pool2d(x, 2))
    weights = torch.tensor([0.2, 0.5, 0.1], dtype=torch.float64)
    close(Grey(weights).apply(x), torch.einsum("c,bchw->bhw", weights, x)[:, None])
    close(Blur(weights).apply(x), 0.2 * x.roll(-1, 3) + 0.5 * x + 0.1 * x.roll(1, 3))
    kernel = numbers(3, 5)
    padded = torch.nn.functional.pad(x, (2, 2, 1, 1), mode="circular").flatten(0, 1)[:, None]
    expected = torch.nn.functional.conv2d(padded, kernel.flip(0, 1)[None, None]).reshape(x.shape)
    close(Blur(kernel).apply(x), expected)
    wide = Blur.gaussian(1.5)
    assert float(wide.kernel.sum()) == pytest.approx(1)
    assert float((wide.kernel.sum(1) * torch.arange(-5, 6).square()).sum()) == pytest.approx(
        1.5**2, rel=0.06
    )  # cut off


def test_grey_is_the_first_channel_of_score_sde_s_change_of_channels() -> None:
    couple = torch.tensor(
        [
            [5.7735014e-01, -8.1649649e-01, 4.7008697e-08],
            [5.7735026e-01, 4.0824834e-01, 7.0710671e-01],
            [5.7735026e-01, 4.0824822e-01, -7.0710683e-01],
        ]
    )
    x = numbers(2, 3, 4, 4, dtype=torch.float32)
    expected = torch.einsum("bihw,ij->bjhw", x, couple)[:, :1]
    torch.testing.assert_close(Grey().apply(x), expected, rtol=0, atol=1e-6)


def test_any_function_is_an_operator_by_its_gradient() -> None:
    operator = Linear(lambda x: torch.stack([x[:, 0] + 2 * x[:, 1], x[:, 1] - x[:, 2]], 1), (3,))
    x, y = numbers(4, 3), numbers(4, 2, seed=1)
    close(operator.apply(x), ROWS.apply(x))
    with torch.no_grad():
        close(operator.adjoint(y), ROWS.adjoint(y))


def test_what_a_mask_hides_is_never_read() -> None:
    x = numbers(2, 3)
    hidden = torch.where(FIRST.known, x, math.nan)
    assert torch.equal(observe(FIRST, hidden).y, observe(FIRST, x).y)
    assert torch.equal(Observation(FIRST, hidden).y, observe(FIRST, x).y)
    assert FIRST.count(x) == 1


def test_projection_explains_y_and_moves_as_little_as_may_be() -> None:
    x, truth = numbers(4, 3), numbers(4, 3, seed=1)
    observation = observe(ROWS, truth)
    found = observation.project(x)
    close(observation.residual(found), torch.zeros(4, 2, dtype=torch.float64))
    null = torch.tensor([2.0, -1.0, -1.0], dtype=torch.float64)  # what ROWS does not see
    close((found - x) @ null, torch.zeros(4, dtype=torch.float64))


def test_noise_of_an_observation_has_its_deviation() -> None:
    x = numbers(20_000, 3)
    z = observe(ROWS, x, 0.3, torch.Generator().manual_seed(0)).residual(x)
    assert z.std(0).tolist() == pytest.approx([0.3, 0.3], rel=0.03)


# --- the exact posterior


def mixture(sde: SDE) -> Mixture:
    means = torch.stack([MEAN, -MEAN, MEAN.roll(1)])
    return Mixture(sde, [0.2, 0.5, 0.3], means, torch.stack([COV, 0.3 * COV, COV.flip(0, 1)]))


@pytest.mark.parametrize("operator", [FIRST, ROWS, Dense(numbers(4, 3), (3,))], ids=name)
def test_the_posterior_is_prior_times_likelihood(operator: Operator) -> None:
    model, x = mixture(VPSDE()), numbers(6, 3, seed=3)
    observation = observe(operator, numbers(1, 3, seed=4), 0.3, torch.Generator().manual_seed(0))
    likelihood = -observation.residual(x).square().sum(1) / (2 * 0.3**2)
    found, expected = posterior(model, observation).log_prob(x), model.log_prob(x) + likelihood
    close(found - found[0], expected - expected[0])


def test_the_posterior_of_an_exact_y_is_the_limit_of_little_noise() -> None:
    model, y = mixture(VPSDE()), ROWS.apply(numbers(1, 3, seed=4))
    exact, near = (posterior(model, Observation(ROWS, y, noise)) for noise in (0.0, 1e-4))
    x, t = numbers(5, 3), time(0.3)
    torch.testing.assert_close(exact(x, t).data, near(x, t).data, rtol=0, atol=1e-6)
    drawn = exact.sample(50, torch.Generator().manual_seed(0))[0]
    torch.testing.assert_close(ROWS.apply(drawn), y.expand(50, 2), rtol=0, atol=1e-6)


# --- models

KINDS: dict[str, Any] = {
    "dps": lambda model, o: dps(model, replace(o, noise=max(o.noise, 0.5))),
    "dps, a rate": lambda model, o: dps(model, o, rate=5.0),
    "pigdm": pigdm,
    "ddnm": ddnm,
    "moment matching": moment_matching,
}


@pytest.mark.parametrize("t", [0.02, 0.4, 0.9])
@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("sde", SDES, ids=name)
def test_pigdm_is_exact_for_gaussian_data_of_its_variance(sde: SDE, noise: float, t: float) -> None:
    """Of r² = sigma² c/(alpha² c + sigma²) with c the data's; with another c, or correlated data, it is not."""
    model, x = Gaussian(sde, MEAN, 0.4), numbers(4, 3, seed=1)
    for operator in (FIRST, ROWS):
        observation = observe(operator, numbers(1, 3, seed=2), noise, torch.Generator().manual_seed(0))
        many = replace(observation, y=observation.y.expand(4, -1))
        truth = posterior(model, observation)(x, time(t))
        found = pigdm(model, many, variance=0.4)(x, time(t))
        close(found.noise, truth.noise)
        close(found.data, truth.data, rtol=1e-7, atol=1e-7)
        if 0.1 < float(sde.sigma(time(t)) / sde.alpha(time(t))) < 10:
            assert (pigdm(model, many)(x, time(t)).data - truth.data).abs().max() > 1e-3
            assert (ddnm(model, many, 0.4)(x, time(t)).data - truth.data).abs().max() < 1e-7  # J = r² I too


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("sde", [VPSDE(), VESDE()], ids=name)
def test_moment_matching_is_exact_for_every_gaussian(sde: SDE, noise: float) -> None:
    model, x, t = Gaussian(sde, MEAN, COV), numbers(4, 3, seed=1), time(0.4)
    for operator in (FIRST, ROWS, Linear(ROWS.apply, (3,))):
        observation = observe(operator, numbers(1, 3, seed=2), noise, torch.Generator().manual_seed(0))
        many = replace(observation, y=observation.y.expand(4, -1))
        truth = posterior(model, observation)(x, t)
        found = moment_matching(model, many, iterations=2)(x, t)
        close(found.data, truth.data, rtol=1e-6, atol=1e-6)
        if isinstance(operator, Spectral):
            assert (pigdm(model, many, float(COV.diagonal().mean()))(x, t).data - truth.data).abs().max() > 1e-2


@pytest.mark.parametrize("sde", PURE, ids=name)
def test_guidance_begins_in_pure_noise_where_the_state_tells_nothing(sde: SDE) -> None:
    """All gradients are left out there, by observations and by classifiers; later walks are those of the posterior."""
    model, x, one = Gaussian(sde, MEAN, COV), numbers(4, 3, seed=1), time(1.0)
    observation = observe(ROWS, numbers(1, 3, seed=2), 0.3, torch.Generator().manual_seed(0))
    many = replace(observation, y=observation.y.expand(4, -1))
    guided = [guide(model, many) for name, guide in KINDS.items() if name != "ddnm"]
    for each in [*guided, classifier(model, lambda y, t: -y.square().sum(1))]:
        for t in (one, one.expand(4)):
            e, own = each(x, t), model(x, t)
            close(e.data, own.data)
            close(e.noise, own.noise)
    exact, grid = posterior(model, observation), times.log_snr(sde, 200)
    found = sample(moment_matching(model, many, iterations=2), Multistep(3), (4, 3), grid, start=x)
    wanted = sample(exact, Multistep(3), (4, 3), grid, start=x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3)


@pytest.mark.parametrize("sde", [VPSDE(), VESDE()], ids=name)
def test_dps_follows_the_gradient_of_the_residual_at_the_mean(sde: SDE) -> None:
    """By hand: dm/dx = alpha C V⁻¹ of a Gaussian, V = alpha² C + sigma² I."""
    model, x, t, y = Gaussian(sde, MEAN, COV), numbers(4, 3, seed=1), time(0.3), numbers(4, 2, seed=2)
    alpha, sigma, a = sde.alpha(t), sde.sigma(t), ROWS.matrix
    inverse = torch.linalg.inv(alpha**2 * COV + sigma**2 * torch.eye(3, dtype=torch.float64))
    mean = MEAN + (x - alpha * MEAN) @ (alpha * inverse @ COV)
    residual = y - mean @ a.T
    pull = residual @ a @ (alpha * COV @ inverse)
    prior = -(x - alpha * MEAN) @ inverse
    close(dps(model, Observation(ROWS, y, 0.3)).score(x, t), prior + pull / 0.3**2)
    rated = dps(model, Observation(ROWS, y), rate=7.0).score(x, t)
    close(rated, prior + 7 / sde.g(t) ** 2 * pull / residual.norm(dim=1, keepdim=True))


def test_dps_with_euler_maruyama_is_the_paper_s_algorithm() -> None:
    """x_s less zeta times the gradient of the residual's norm, with rate = zeta n."""
    sde, n, zeta = VPSDE(), 50, 0.3
    model, x, y = Gaussian(sde, MEAN, COV), numbers(4, 3, seed=1), numbers(4, 2, seed=2)
    t, s = time(0.4), time(0.4 - 1 / n)
    z = numbers(4, 3, seed=5)
    found = EulerMaruyama().step(dps(model, Observation(ROWS, y), rate=zeta * n), x, t, s, lambda like: z.clone())
    state = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((y - ROWS.apply(model(state, t).data)).norm(dim=1).sum(), state)
    close(found, EulerMaruyama().step(model, x, t, s, lambda like: z.clone()) - zeta * gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_guided_models_are_models_at_one_time_and_at_many(kind: str) -> None:
    sde = VPSDE()
    model, x, t = mixture(sde), numbers(4, 3, seed=1), torch.linspace(0.1, 0.9, 4, dtype=torch.float64)
    y = numbers(4, 2, seed=2)
    guided = KINDS[kind](model, Observation(ROWS, y))
    e = guided(x, t)
    close(sde.alpha(t)[:, None] * e.data + sde.sigma(t)[:, None] * e.noise, x)
    for i in range(4):
        alone = KINDS[kind](model, Observation(ROWS, y[i : i + 1]))(x[i : i + 1], t[i])
        close(alone.data, e.data[i : i + 1], rtol=1e-7, atol=1e-7)
    with torch.no_grad():
        quiet = guided(x, t)
    close(quiet.data, e.data, rtol=1e-7, atol=1e-7)
    assert not quiet.data.requires_grad and e.data.dtype == torch.float64
    assert guided(x.float(), t).data.dtype == torch.float32
    hidden = Mask(torch.tensor([True, False, False]))
    a, b = numbers(4, 3, seed=6), numbers(4, 3, seed=6)
    b[:, 1:] = math.nan
    one, other = (KINDS[kind](model, Observation(hidden, v))(x, t).data for v in (a, b))
    assert torch.equal(one, other)


def test_guidance_stands_on_models_with_conditions() -> None:
    model, x, t = mixture(VPSDE()), numbers(2, 3, seed=1), time(0.5)
    component = Gaussian(VPSDE(), -MEAN, 0.3 * COV)
    observation = Observation(ROWS, numbers(2, 2, seed=2), 0.1)
    for method in (pigdm, ddnm):
        expected = method(component, observation)(x, t).data
        close(method(model.given(label=1), observation)(x, t).data, expected)
        close(method(model, observation).given(label=1)(x, t).data, expected)


def test_a_network_with_attention_has_a_likelihood_given_y() -> None:
    """Its score is a gradient, of which the divergence takes another, that fused attention has not."""
    network = awake(UNet(1, width=8, multipliers=(1, 2), blocks=1, attention=(4,), image_size=8)).double().eval()
    guided = pigdm(Preconditioned(network, VPSDE(), "noise"), Observation(Average(2), numbers(2, 1, 4, 4), 0.1))
    (x, v, w), t = numbers(3, 2, 1, 8, 8, seed=1), time(0.4)
    y = x.clone().requires_grad_()
    slope = torch.autograd.grad((w * guided(y, t).noise).sum(), y)[0].mul(v).sum()
    with torch.no_grad():
        difference = (w * (guided(x + 1e-5 * v, t).noise - guided(x - 1e-5 * v, t).noise)).sum() / 2e-5
    torch.testing.assert_close(slope, difference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sampler", [Heun(), Ancestral(), Multistep(2), EmbeddedODE(1e-5, 1e-5)], ids=name)
def test_samples_of_an_exact_guided_model_are_those_of_the_posterior(sampler: Sampler) -> None:
    """Draw for draw; by a sampler whose examples leave the batch at times of their own too."""
    sde = VPSDE()
    model, grid = Gaussian(sde, MEAN, 0.4), times.log_snr(sde, 20)
    observation = observe(ROWS, numbers(1, 3, seed=2), 0.2, torch.Generator().manual_seed(0))
    many = replace(observation, y=observation.y.expand(5, -1))
    draw = partial(sample, sampler=sampler, shape=(5, 3), times=grid, seed=3, denoise=True)
    torch.testing.assert_close(draw(pigdm(model, many, 0.4)), draw(posterior(model, observation)), rtol=1e-4, atol=1e-4)


def test_examples_of_an_adaptive_sampler_keep_their_own_observations() -> None:
    sde, y = VPSDE(), 2 * numbers(4, 2, seed=2)
    model, sampler, grid = Gaussian(sde, MEAN, 0.4), EmbeddedODE(1e-5, 1e-5), times.uniform(sde, 1)
    whole = sample(pigdm(model, Observation(ROWS, y, 0.2), 0.4), sampler, (4, 3), grid, seed=3)
    for i in (0, 3):
        one = pigdm(model, Observation(ROWS, y[i : i + 1], 0.2), 0.4)
        alone = sample(one, sampler, (1, 3), grid, seed=3, first=i)
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=0, atol=1e-4)


def test_the_likelihood_of_a_guided_model_is_the_posterior_s() -> None:
    """Its divergence is a gradient of a gradient."""
    sde = VPSDE()
    model, x = Gaussian(sde, MEAN, 0.4), MEAN + 0.3 * numbers(3, 3)
    observation = observe(ROWS, MEAN[None] + 0.2, 0.3, torch.Generator().manual_seed(0))
    truth = posterior(model, observation)
    guided = pigdm(model, replace(observation, y=observation.y.expand(3, -1)), 0.4)
    found = log_likelihood(
        guided,
        x,
        probe="exact",
        rtol=1e-6,
        atol=1e-6,
        method="dopri5",
        prior_log_prob=lambda z: truth.log_prob(z, time(1.0)),
    )
    torch.testing.assert_close(found.log_prob, truth.log_prob(x, time(1e-5)), rtol=0, atol=1e-4)


# --- projection and RePaint


def test_projection_leaves_what_is_known_equal_to_y_and_reads_nothing_else() -> None:
    """On a chain, which ends at clean data, to the bit."""
    chain = DDPM.linear(20, 0.003, 0.8)
    model, x = Gaussian(chain.as_sde(), MEAN, COV), numbers(4, 3, seed=1)
    ends = torch.cat([chain.times[:-1], torch.zeros(1, dtype=torch.float64)])
    found = []
    for hidden in (0.0, math.nan):
        seen = torch.where(FIRST.known, x, hidden)
        sampler = Projected(Ancestral(), Observation(FIRST, seen), 3, 2)
        found.append(sample(model, sampler, (4, 3), ends, dtype=torch.float64, seed=1))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0][:, 0], x[:, 0])


def test_the_projected_state_has_the_noised_observation_s_law() -> None:
    """Mean alpha y + variance sigma² in what is known, also where y has noise of its own; the rest is left alone."""
    sde, n, t = VPSDE(), 40_000, time(0.2)
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    truth, g = numbers(1, 3, seed=3).expand(n, 3), torch.Generator().manual_seed(0)
    for operator, noise in ((ROWS, 0.0), (ROWS, 0.3), (FIRST, 0.3)):
        observation = observe(operator, truth, noise, g)
        x = numbers(n, 3, seed=4)
        new = Projected(Ancestral(), observation).replace(sde, x, t, lambda like: numbers(n, 3, seed=5))
        a = matrix_of(operator, (3,))
        a = torch.linalg.svd(a, full_matrices=False)[2][: torch.linalg.matrix_rank(a)]  # orthonormal rows
        seen = (new - alpha * truth) @ a.T
        assert seen.mean(0).abs().max() < 5 * sigma / 200
        torch.testing.assert_close(
            seen.T.cov().reshape(len(a), -1),
            sigma**2 * torch.eye(len(a), dtype=torch.float64),
            rtol=0,
            atol=0.02 * sigma**2,
        )
        unseen = torch.eye(3, dtype=torch.float64) - a.T @ a
        close(new @ unseen, x @ unseen)


def test_late_an_observation_noisier_than_the_state_changes_nothing() -> None:
    sde, x = VPSDE(), numbers(3, 3)
    projected = Projected(Ancestral(), Observation(FIRST, numbers(3, 3, seed=1), 0.3))
    t = time(0.05)
    assert float(sde.sigma(t)) < 0.3 * float(sde.alpha(t))
    assert torch.equal(projected.replace(sde, x, t, lambda like: numbers(3, 3)), x)


class Recording(Ancestral):
    """Counts visits to times."""

    seen: list[float]

    def take(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, *rest: Any) -> Tensor:
        self.seen.append(t.item())
        return super().take(model, x, t, s, *rest)


def test_repaint_walks_each_jump_as_often_as_it_is_told() -> None:
    sampler = Recording()
    object.__setattr__(sampler, "seen", [])
    model, grid = Gaussian(VPSDE(), MEAN, COV), times.uniform(VPSDE(), 5)
    projected = Projected(sampler, Observation(FIRST, numbers(2, 3)), resamplings=2, jump=2)
    states = list(projected.walk(model, numbers(2, 3), grid, lambda like: numbers(2, 3)))
    assert len(states) == 5
    assert sampler.seen == grid[[0, 1, 0, 1, 2, 3, 2, 3, 4, 4]].tolist()


def test_repaint_carries_back_up_by_the_forward_sde() -> None:
    """With a sampler that goes nowhere: after the jump up the state has the law of the earlier time."""
    sde, n = VPSDE(), 40_000

    class Still(Sampler):
        def step(self, model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, noise: Any) -> Tensor:
            seen.append(x[:, 1].var().item())
            return model.sde.sigma(s) / model.sde.sigma(t) * x

    seen: list[float] = []
    model = Gaussian(sde, torch.zeros(3, dtype=torch.float64), 1e-12)
    grid, g = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.Generator().manual_seed(0)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(n, 3, generator=g, dtype=torch.float64)

    x = sde.sigma(grid[0]) * noise(torch.empty(0))
    list(Projected(Still(), Observation(FIRST, torch.zeros(n, 3)), 3).walk(model, x, grid, noise))
    expected = [sde.sigma(t).item() ** 2 for t in grid[[0, 0, 0, 1, 1, 1]]]
    assert seen == pytest.approx(expected, rel=0.03)


def test_more_resampling_brings_repaint_nearer_to_the_posterior() -> None:
    """Correlated data, one number known: projection alone leaves the rest half ignorant of it."""
    sde, n = VPSDE(), 1500
    cov = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    model, grid = Gaussian(sde, torch.zeros(2, dtype=torch.float64), cov), times.log_snr(sde, 12)
    known = Mask(torch.tensor([True, False]))
    y = torch.tensor([[1.5, 0.0]], dtype=torch.float64)
    errors = []
    for resamplings in (1, 4, 16):
        sampler = Projected(Ancestral("large"), Observation(known, y.expand(n, 2)), resamplings)
        x = sample(model, sampler, (n, 2), grid, dtype=torch.float64, denoise=True)[:, 1]
        errors.append(abs(x.mean().item() - 1.35) / math.sqrt(0.19))
    assert errors[0] > 0.3 and errors[1] < 0.7 * errors[0] and errors[2] < 0.4 * errors[1], errors


def test_resampling_does_not_forget_an_observation_with_noise() -> None:
    """Walks repeated where nothing is replaced any more would drift to the prior, of variance 1."""
    sde, n = VPSDE(), 2000
    cov = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    model, grid = Gaussian(sde, torch.zeros(2, dtype=torch.float64), cov), times.log_snr(sde, 30)
    y = torch.tensor([[1.5, 0.0]], dtype=torch.float64).expand(n, 2)
    observation = Observation(Mask(torch.tensor([True, False])), y, 0.2)
    x = sample(model, Projected(Ancestral("large"), observation, 8), (n, 2), grid, dtype=torch.float64, denoise=True)
    assert x[:, 0].mean().item() == pytest.approx(1.5 / 1.04, abs=0.08)
    assert x[:, 0].var().item() < 3 * 0.04  # twice, and more for the length of the step in which y becomes the noisier


def test_both_parts_of_a_predictor_corrector_are_projected() -> None:
    sde, t, s = VESDE(), time(0.3), time(0.2)
    x, observation = numbers(4, 3, seed=1), Observation(FIRST, numbers(4, 3, seed=2))
    seen: list[tuple[Tensor, Tensor]] = []

    class Watching(Gaussian):
        def forward(self, x: Tensor, t: Tensor, label: Any = None) -> Any:
            seen.append((x.clone(), t))
            return super().forward(x, t, label)

    sampler = Projected(PredictorCorrector(ReverseDiffusion(), Langevin()), observation)
    out = sampler.step(Watching(sde, MEAN, COV), x, t, s, torch.ones_like)
    (_, first), (between, second) = seen
    assert first == second == t
    close(between[:, 0], observation.y[:, 0] + sde.sigma(t))
    close(out[:, 0], observation.y[:, 0] + sde.sigma(s))


# --- twisted sequential Monte Carlo


def walk_law(sde: SDE, mean: float, var: float, grid: Tensor) -> tuple[float, float]:
    """Mean and variance of what ancestral steps on this grid and a last estimate draw for 1-D Gaussian data."""
    m, v = 0.0, sde.prior_std**2

    def data(t: Tensor) -> tuple[float, float]:  # E[x_0 | x] = a + b x
        alpha, sigma = sde.alpha(t).item(), sde.sigma(t).item()
        b = alpha * var / (alpha**2 * var + sigma**2)
        return mean - b * alpha * mean, b

    for t, s in pairwise(grid):
        keep, weight, std = (c.item() for c in sde.posterior_weights(s, t))
        a, b = data(t)
        m, v = weight * a + (keep + weight * b) * m, (keep + weight * b) ** 2 * v + std**2
    a, b = data(grid[-1])
    return a + b * m, b**2 * v


@pytest.mark.parametrize("variance", [1.0, 0.05])
@pytest.mark.parametrize("sde", [VPSDE(), VESDE(sigma_max=10.0)], ids=name)
def test_particles_are_exact_for_the_sampler_s_own_law(sde: SDE, variance: float) -> None:
    """On a grid so coarse that it is far from the data's: moments and evidence, whatever the twisting function."""
    grid, problems, k, noise = times.log_snr(replace(sde, t_min=1e-2), 6), 40, 4096, 0.4
    m, v = walk_law(sde, 0.5, 0.3, grid)
    model, y = Gaussian(sde, torch.tensor([0.5], dtype=torch.float64), 0.3), 1.4
    assert abs(v - 0.3) > 0.02
    observation = Observation(Dense(torch.ones(1, 1), (1,)), torch.full((problems, 1), y, dtype=torch.float64), noise)
    found = twisted(model, observation, (problems, 1), grid, particles=k, variance=variance, dtype=torch.float64)
    total = v + noise**2
    mean, var = m + v / total * (y - m), v * noise**2 / total
    w = found.log_weights.exp()
    error = 5 * math.sqrt(var / (0.1 * k * problems))  # a tenth of the particles counts, at least
    assert found.mean.mean().item() == pytest.approx(mean, abs=error)
    second = (w * (found.x[..., 0] - mean).square()).sum(1).mean().item()
    assert second == pytest.approx(var, rel=0.03)
    evidence = -((y - m) ** 2) / (2 * total) - math.log(math.sqrt(2 * math.pi * total))
    assert found.log_evidence.mean().item() == pytest.approx(evidence, abs=0.01)


def test_more_particles_come_nearer_to_a_mixture_s_posterior() -> None:
    """Of the mean, over problems, in deviations of the posterior: nearly by sqrt(8) for 8 times as many."""
    sde, problems = VPSDE(), 64
    model, grid = mixture(sde), times.log_snr(sde, 40)
    observation = observe(ROWS, numbers(1, 3, seed=2), 0.3, torch.Generator().manual_seed(0))
    truth = posterior(model, observation)
    drawn = truth.sample(50_000, torch.Generator().manual_seed(0))[0]
    many = replace(observation, y=observation.y.expand(problems, -1))
    errors = []
    for k in (8, 64):
        found = twisted(model, many, (problems, 3), grid, particles=k, dtype=torch.float64)
        errors.append(((found.mean - drawn.mean(0)) / drawn.std(0)).square().mean().sqrt().item())
    assert errors[1] < 0.3 and errors[1] < 0.55 * errors[0], errors
    one = found.draw(torch.Generator().manual_seed(0))
    assert one.shape == (problems, 3) and ((one.mean(0) - drawn.mean(0)) / drawn.std(0)).abs().max() < 0.6
    density = torch.distributions.MultivariateNormal
    a = ROWS.matrix
    components = density(
        model.means @ a.T, a @ torch.stack([COV, 0.3 * COV, COV.flip(0, 1)]) @ a.T + 0.09 * torch.eye(2)
    )
    evidence = torch.logsumexp(model.log_weights + components.log_prob(observation.y), 0).item()
    assert found.log_evidence.exp().mean().log().item() == pytest.approx(evidence, abs=0.1)


def test_problems_do_not_interact_and_depend_on_seed_and_index_alone() -> None:
    sde = VPSDE()
    model, grid, y = mixture(sde), times.log_snr(sde, 10), numbers(4, 2, seed=2)
    run = partial(twisted, model, times=grid, particles=8, seed=5, dtype=torch.float64, threshold=0.9)
    whole = run(Observation(ROWS, y, 0.3), shape=(4, 3))
    part = run(Observation(ROWS, y[2:3], 0.3), shape=(1, 3), first=2)
    close(part.x[0], whole.x[2])
    close(part.log_evidence, whole.log_evidence[2:3])
    assert whole.least.min() < 0.9 * 8


def test_particles_are_told_what_their_problem_is() -> None:
    """Of components of a mixture, one for each problem, as of each component by itself."""
    model, grid, y = mixture(VPSDE()), times.log_snr(VPSDE(), 10), numbers(3, 2, seed=2)
    run = partial(twisted, times=grid, particles=4, seed=5, dtype=torch.float64)
    told = run(model.given(label=torch.tensor([1, 0, 1])), Observation(ROWS, y, 0.3), shape=(3, 3))
    for i, label in enumerate((1, 0, 1)):
        alone = run(model.given(label=label), Observation(ROWS, y[i : i + 1], 0.3), shape=(1, 3), first=i)
        close(alone.x[0], told.x[i])
        close(alone.log_evidence, told.log_evidence[i : i + 1])


def test_systematic_resampling_repeats_each_particle_by_its_weight() -> None:
    log_w = 2 * numbers(50, 16)
    counts = torch.stack([torch.bincount(row, minlength=16) for row in _systematic(log_w, numbers(50, seed=1))])
    expected = 16 * log_w.softmax(1)
    assert ((counts - expected).abs() < 1).all()
    many = _systematic(log_w[:1].expand(20_000, 16), numbers(20_000, seed=2))
    frequency = torch.bincount(many.flatten(), minlength=16) / 20_000
    torch.testing.assert_close(frequency.double(), expected[0], rtol=0, atol=0.02)


# --- refusals


def test_what_cannot_be_is_refused_with_the_remedy() -> None:
    model, exact = Gaussian(VPSDE(), MEAN, COV), Observation(ROWS, numbers(2, 2))
    anything = Observation(Linear(ROWS.apply, (3,)), numbers(2, 2), 0.1)
    grid = times.uniform(VPSDE(), 3)
    for words, attempt in {
        "dps with noise 0 .* give the observation noise, or dps a rate": lambda: dps(model, exact),
        "rate must be above 0, got -1": lambda: dps(model, exact, rate=-1.0),
        "pigdm needs the singular values .* Linear has none: give its matrix to Dense": lambda: pigdm(model, anything),
        "ddnm needs the singular values": lambda: ddnm(model, anything),
        "projection needs the singular values": lambda: Projected(Ancestral(), anything),
        "iterations must be at least 1, got 0": lambda: moment_matching(model, exact, 0),
        "variance must be above 0, got 0": lambda: pigdm(model, exact, 0.0),
        "Multistep has none: take Ancestral": lambda: Projected(Multistep(2), exact),
        "resamplings and jump must be at least 1, got 0 and 1": lambda: Projected(DDIM(), exact, 0),
        "with noise 0 there is none: give it a little": lambda: twisted(model, exact, (2, 3), grid),
        "the batch of 3, got 4, 0.5 and one of 2": lambda: twisted(
            model, replace(exact, noise=0.1), (3, 3), grid, particles=4
        ),
        "2 examples were observed, and 3 are sampled": lambda: sample(
            model, Projected(Ancestral(), exact), (3, 3), grid
        ),
        "noise is a standard deviation of at least 0, got -1": lambda: Observation(ROWS, exact.y, -1.0),
        "true or 1 where x is known": lambda: Mask(torch.tensor([0.5, 1.0, 0.0])),
        r"mask has shape \(2,\), which does not fit examples of shape \(3,\)": lambda: observe(
            Mask(torch.tensor([1, 0])), numbers(2, 3)
        ),
        "3 weights mix as many channels, and the examples have 1": lambda: observe(Grey(), numbers(2, 1, 4, 4)),
        "factor 3 does not divide a size of examples of shape": lambda: observe(Average(3), numbers(2, 1, 4, 6)),
        "factor must be a whole number of at least 1, got 0": lambda: Average(0),
        "must be above 0, got 0": lambda: Blur.gaussian(0.0),
        r"the matrix must be \(M, 3\)": lambda: Dense(numbers(2, 4), (3,)),
        "needs a torch.Generator": lambda: observe(ROWS, numbers(2, 3), 0.1),
        "posterior takes one observation, got 2": lambda: posterior(model, exact),
    }.items():
        with pytest.raises(ValueError, match=words):
            attempt()
