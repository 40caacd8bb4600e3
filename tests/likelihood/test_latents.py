"""Latents: the flow both ways against a Gaussian's affine map, and the sphere between two of them."""

import math

import pytest
import torch

from score_sde import SDE, VESDE, VPSDE, Ancestral, Heun, Solver, closed_form, log_likelihood, sample, score_flow, times
from score_sde.likelihood.latents import decode, encode, slerp
from score_sde.samplers import DDIM, Churn, EmbeddedODE, UniPC
from tests.oracles import SDES, name, numbers

MEAN = torch.tensor([0.5, -1.0], dtype=torch.float64)
COV = torch.tensor([[0.3, 0.2], [0.2, 0.5]], dtype=torch.float64)
TIGHT = Solver("dopri8", 1e-9, 1e-9)


@pytest.mark.parametrize("sde", SDES, ids=name)
def test_encoding_gaussian_data_is_the_affine_map_and_decoding_its_inverse(sde: SDE) -> None:
    """z = alpha m + V_1^(1/2) V_0^(-1/2) (x - alpha_0 m), by V's eigenvectors: another road than the model's."""
    model, t_min = closed_form.Gaussian(sde, MEAN, COV), 1e-3
    ends = torch.tensor([t_min, 1.0], dtype=torch.float64)
    (a, one), (s, prior) = sde.alpha(ends), sde.sigma(ends)
    variances, basis = torch.linalg.eigh(COV)
    scale = basis @ torch.diag(((one**2 * variances + prior**2) / (a**2 * variances + s**2)).sqrt()) @ basis.T
    x = MEAN + numbers(5, 2)
    z = one * MEAN + (x - a * MEAN) @ scale
    torch.testing.assert_close(encode(model, x, t_min=t_min, solver=TIGHT), z, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(decode(model, z, t_min=t_min, solver=TIGHT), x, rtol=1e-6, atol=1e-6)


def test_a_latent_is_the_likelihood_s() -> None:
    model, x = closed_form.Gaussian(VPSDE(), MEAN, COV), numbers(4, 2)
    found = encode(model, x, solver=Solver("dopri5", 1e-7, 1e-7))
    torch.testing.assert_close(found, log_likelihood(model, x, rtol=1e-7, atol=1e-7).latent, rtol=1e-5, atol=1e-5)


def test_an_example_s_latent_does_not_depend_on_its_batch() -> None:
    """One near a narrow mode needs more steps than its neighbours, who take none of them."""
    model = closed_form.Mixture(VPSDE(), [0.5, 0.5], torch.stack([MEAN, -MEAN]), [1e-4, 0.6])
    x = torch.cat([MEAN + 0.01 * numbers(1, 2), numbers(3, 2)])
    z = encode(model, x)
    for i in range(4):
        torch.testing.assert_close(encode(model, x[i : i + 1])[0], z[i], rtol=1e-9, atol=1e-9)


def test_what_has_no_gradient_refuses_an_x_that_asks_for_one_and_names_what_has() -> None:
    model, x = closed_form.Gaussian(VPSDE(), torch.zeros(2), 0.3), numbers(3, 2).requires_grad_()
    for use, instead in ((encode, "encode"), (decode, "decode"), (log_likelihood, "log_prob")):
        with pytest.raises(
            ValueError, match=rf"has no gradient, and x asks for one: take score_flow\(model\).{instead}"
        ):
            use(model, x)
        with torch.no_grad():
            use(model, x)
        with pytest.raises(ValueError, match="x must be a tensor .*, got ndarray; torch.as_tensor"):
            use(model, x.detach().numpy())  # type: ignore[arg-type]
    flow = score_flow(model, solver=Solver("rk4", steps=2))
    for y in (flow.log_prob(x).sum(), flow.encode(x).sum(), flow.decode(x).sum()):
        assert bool(torch.autograd.grad(y, x)[0].isfinite().all())
    with pytest.raises(ValueError, match=r"t must be a tensor of shape \(\) or \(3,\), got float"):
        model(x, 0.5)  # type: ignore[arg-type]


def test_the_way_back_ends_where_the_way_there_began_to_the_solver_s_error() -> None:
    model = closed_form.Mixture(VESDE(), [0.4, 0.6], torch.stack([MEAN, -MEAN]), [0.05, 0.2])
    x, errors = numbers(6, 2), []
    for tolerance in (1e-3, 1e-6):
        solver = Solver("dopri5", tolerance, tolerance)
        errors.append((decode(model, encode(model, x, solver=solver), solver=solver) - x).abs().max().item())
    assert 1e-6 < errors[0] < 0.5 and errors[1] < errors[0] / 50


def test_interpolation_begins_and_ends_at_the_originals() -> None:
    model = closed_form.Mixture(VPSDE(), [0.4, 0.6], torch.stack([MEAN, -MEAN]), [0.05, 0.2])
    x = numbers(2, 2)
    z = encode(model, x, solver=TIGHT)
    between = slerp(z[:1], z[1:], torch.linspace(0, 1, 5))
    y = decode(model, between.flatten(0, 1), solver=TIGHT)
    torch.testing.assert_close(y[[0, -1]], x, rtol=0, atol=1e-5)


# --- the sphere


@pytest.mark.parametrize("std", [1.0, 50.0])
def test_slerp_keeps_length_at_equal_angles(std: float) -> None:
    """Of equal lengths: every point on the sphere, in the plane of its ends, and equally far from its neighbours."""
    a, b = numbers(3, 4, 5), numbers(3, 4, 5, seed=1)
    a, b = (std * y / y.flatten(1).norm(dim=1)[:, None, None] for y in (a, b))
    found = slerp(a, b, torch.linspace(0, 1, 7, dtype=torch.float64))
    torch.testing.assert_close(found[[0, -1]], torch.stack([a, b]))
    flat = found.flatten(2)
    torch.testing.assert_close(flat.norm(dim=2), torch.full((7, 3), std, dtype=torch.float64))
    cosines = (flat[1:] * flat[:-1]).sum(2) / std**2
    expected = torch.cos(torch.arccos((a * b).flatten(1).sum(1) / std**2) / 6)
    torch.testing.assert_close(cosines, expected.expand(6, 3))


@pytest.mark.parametrize("d", [2, 48])
def test_slerp_between_draws_of_the_prior_stays_within_its_law(d: int) -> None:
    """The mean length is that of N(0, std² I), sqrt(2) Gamma((d + 1)/2)/Gamma(d/2), at every weight, and the direction
    uniform. A straight line's middle is shorter by sqrt(2)."""
    n, std = 10_000, 50.0
    a, b = std * numbers(n, d), std * numbers(n, d, seed=1)
    expected = std * math.sqrt(2) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))
    for z in slerp(a, b, torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)):
        length = z.norm(dim=1)
        assert length.mean().item() == pytest.approx(expected, rel=6 * 0.6 / math.sqrt(n))
        u = z / length[:, None]
        assert float(u.mean(0).norm()) < 5 / math.sqrt(n)
        second = torch.eye(d, dtype=torch.float64)
        torch.testing.assert_close(d * u.T @ u / n, second, rtol=0, atol=7.5 / math.sqrt(n))
    assert ((a + b) / 2).norm(dim=1).mean().item() == pytest.approx(expected / math.sqrt(2), rel=0.02)


def test_slerp_between_a_latent_and_itself_or_nearly() -> None:
    a, weights = numbers(1, 6, dtype=torch.float32), torch.tensor([0.0, 0.3, 1.0])
    torch.testing.assert_close(slerp(a, a, weights), a.expand(3, 1, 6))
    torch.testing.assert_close(slerp(a, 2 * a, weights)[1], 1.3 * a)
    near = a + 1e-4 * numbers(1, 6, seed=1, dtype=torch.float32)
    torch.testing.assert_close(slerp(a, near, weights)[1], torch.lerp(a, near, 0.3), rtol=0, atol=1e-6)


def test_slerp_refuses_what_has_no_great_circle() -> None:
    a, half = numbers(2, 3), torch.tensor([0.5])
    with pytest.raises(ValueError, match="opposite directions"):
        slerp(a, -3 * a, half)
    with pytest.raises(ValueError, match="a latent that is 0"):
        slerp(a, 0 * a, half)
    with pytest.raises(ValueError, match=r"two batches of one shape .* got \(2, 3\), \(1, 3\)"):
        slerp(a, a[:1], half)


# --- temperature


@pytest.mark.parametrize(
    "sde, sampler",
    [
        *((VPSDE(t_min=1e-3), sampler) for sampler in (Heun(), DDIM(), UniPC(), Churn(0.0), EmbeddedODE(1e-6, 1e-6))),
        (VESDE(), Heun()),
    ],
    ids=str,
)
def test_temperature_scales_the_deviation_of_gaussian_samples(sde: SDE, sampler: object) -> None:
    """The flow of a Gaussian is affine: samples are the mean plus temperature times what they were at 1."""
    model, grid = closed_form.Gaussian(sde, MEAN, COV), times.log_snr(sde, 20)
    middle, one, less = (
        sample(model, sampler, (6, 2), grid, seed=3, temperature=temperature)  # type: ignore[arg-type]
        for temperature in (0.0, 1.0, 0.7)
    )
    torch.testing.assert_close(less - middle, 0.7 * (one - middle), rtol=0, atol=1e-5)
    assert middle.std(0).max() < 1e-9 and (one - middle).std() > 0.2
    if sampler == Heun() and isinstance(sde, VPSDE):
        torch.testing.assert_close(middle[0], MEAN, rtol=0, atol=0.02)


def test_temperature_is_refused_where_noise_is_drawn_and_below_0() -> None:
    model, grid = closed_form.Gaussian(VPSDE(), MEAN, COV), times.log_snr(VPSDE(), 3)
    for sampler in (Ancestral(), DDIM(eta=0.5), Churn()):
        with pytest.raises(
            ValueError, match=r"temperature=0\.9 is for samplers that draw no noise, and .* draws noise: take another"
        ):
            sample(model, sampler, (2, 2), grid, temperature=0.9)
    with pytest.raises(ValueError, match="temperature must be a number of at least 0, got -1"):
        sample(model, Heun(), (2, 2), grid, temperature=-1.0)
