"""Log-likelihoods: equal to closed forms, unbiased with the variance of the formula, and in the right bits."""

import math
import os
import warnings
from functools import partial

import pytest
import torch
from torch import Tensor

from score_sde import (
    DDPM,
    SDE,
    SMLD,
    VESDE,
    VPSDE,
    Estimate,
    Preconditioned,
    ScoreModel,
    SubVPSDE,
    from_score,
    log_likelihood,
)
from score_sde.data import load_data
from score_sde.data.codecs import PixelCodec
from score_sde.likelihood import Likelihood
from score_sde.likelihood.flows import score_flow
from score_sde.models import traces
from score_sde.models.closed_form import Gaussian, Mixture
from score_sde.models.traces import draw_probes
from score_sde.networks import UNet
from score_sde.ode import Solver
from score_sde.sdes import like
from score_sde.tasks.scan import gaussian_fit
from tests.oracles import SDES, name, numbers

CHAINS = [DDPM.linear(1000).as_sde(), SMLD.from_sde(VESDE(), 50).as_sde()]
EVERY = pytest.mark.parametrize("sde", [*SDES, *CHAINS], ids=name)
MEAN = torch.tensor([0.3, -0.7, 0.0], dtype=torch.float64)
COV = torch.tensor([[0.5, 0.3, 0.1], [0.3, 1.2, 0.0], [0.1, 0.0, 0.2]], dtype=torch.float64)
START, END = torch.tensor(1e-5, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)


def exactly(model: Mixture, x: Tensor, **options: object) -> Likelihood:
    """With nothing estimated: exact trace, the true density at t = 1, and a tight solver."""
    settings = {"probe": "exact", "rtol": 1e-6, "atol": 1e-6, "prior_log_prob": lambda z: model.log_prob(z, END)}
    return log_likelihood(model, x, **{**settings, **options})  # type: ignore[arg-type]


# --- truth


@EVERY
def test_gaussians_have_their_closed_forms_density(sde: SDE) -> None:
    model = Gaussian(sde, MEAN, COV)
    x, _ = model.sample(4, torch.Generator().manual_seed(0))
    found = exactly(model, x)
    torch.testing.assert_close(found.log_prob, model.log_prob(x, START), rtol=0, atol=5e-5)
    assert bool((found.std_error == 0).all())
    torch.testing.assert_close(found.latent, model.flow(x, START, END), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sde", [VESDE(), CHAINS[0]], ids=name)
def test_mixtures_have_their_closed_forms_density(sde: SDE) -> None:
    model = Mixture(sde, [0.3, 0.7], torch.stack([MEAN, -2 * MEAN]), torch.stack([COV, 0.2 * COV]))
    x, _ = model.sample(4, torch.Generator().manual_seed(0))
    torch.testing.assert_close(exactly(model, x).log_prob, model.log_prob(x, START), rtol=0, atol=5e-5)


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "RK45"])
def test_every_method_agrees(method: str) -> None:
    model = Gaussian(VPSDE(), MEAN, COV)
    x, _ = model.sample(6, torch.Generator().manual_seed(0))
    found = exactly(model, x, method=method, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.log_prob, model.log_prob(x, START), rtol=0, atol=1e-3)


def test_x_is_the_state_at_t_min() -> None:
    model = Gaussian(VPSDE(), MEAN, COV)
    x, _ = model.sample(6, torch.Generator().manual_seed(0))
    for t in (1e-3, 0.3):  # 1e-5 is meant everywhere else
        truth = model.log_prob(x, torch.tensor(t, dtype=torch.float64))
        torch.testing.assert_close(exactly(model, x, t_min=t).log_prob, truth, rtol=0, atol=5e-5)


@pytest.mark.parametrize(("sde", "shift"), [(VPSDE(), 0.0046), (VESDE(), 0.014)], ids=["VP", "VE"])
def test_the_sdes_prior_is_not_the_density_at_the_end(sde: SDE, shift: float) -> None:
    """For data N(0.7, 0.25) it is off by this much at a latent one deviation from 0."""
    model = Gaussian(sde, torch.tensor([0.7], dtype=torch.float64), 0.25)
    x = model.flow(torch.tensor([[-sde.prior_std]], dtype=torch.float64), END, START)
    true, default = exactly(model, x), exactly(model, x, prior_log_prob=None)
    assert float(default.log_prob - true.log_prob) == pytest.approx(shift, rel=0.05)


@pytest.mark.parametrize("shape", [(5,), (2, 1, 2, 2)], ids=str)
def test_any_rank(shape: tuple[int, ...]) -> None:
    model = Gaussian(VPSDE(), 0.3 * numbers(*shape), numbers(*shape, seed=1).square() + 0.1)
    x, _ = model.sample(3, torch.Generator().manual_seed(0))
    for probe in ("exact", "rademacher"):  # Rademacher probes are exact for a diagonal Jacobian
        found = exactly(model, x, probe=probe)
        torch.testing.assert_close(found.log_prob, model.log_prob(x, START), rtol=0, atol=5e-5)
        assert found.latent.shape == x.shape


def test_single_precision_costs_single_precision() -> None:
    model = Gaussian(VPSDE(), MEAN, COV)
    x, _ = model.sample(6, torch.Generator().manual_seed(0))
    found = exactly(model, x.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.log_prob, model.log_prob(x, START), rtol=0, atol=1e-3)
    assert found.latent.dtype == torch.float32 and found.log_prob.dtype == torch.float64


def test_layout_in_memory_does_not_matter() -> None:
    model = Gaussian(VPSDE(), numbers(3, 4, 4), 0.3)
    x, _ = model.sample(4, torch.Generator().manual_seed(0))
    coarse = {"probe": "gaussian", "probes": 2, "rtol": 1e-3, "atol": 1e-3}
    expected = exactly(model, x, **coarse)
    for y in (x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT, x.repeat_interleave(2, 0)[::2]):
        assert torch.equal(y, x) and not y.is_contiguous()
        found = exactly(model, y, **coarse)
        torch.testing.assert_close(found.log_prob, expected.log_prob, rtol=1e-9, atol=1e-9)


def test_an_example_does_not_depend_on_its_batch() -> None:
    model = Mixture(VPSDE(), [0.3, 0.7], torch.stack([MEAN, -2 * MEAN]), torch.stack([COV, 0.2 * COV]))
    x, _ = model.sample(5, torch.Generator().manual_seed(0))
    run = partial(log_likelihood, model, probe="gaussian", probes=3, rtol=1e-3, atol=1e-3, seed=4)
    whole = run(x, first=10)
    parts = [run(x[i : i + n], first=10 + i) for i, n in ((0, 1), (1, 3), (4, 1))]
    for key in ("log_prob", "std_error", "latent"):  # each example has steps of its own
        found = torch.cat([getattr(p, key) for p in parts])
        torch.testing.assert_close(found, getattr(whole, key), rtol=1e-8, atol=1e-8)


def test_an_empty_batch_has_an_empty_likelihood() -> None:
    model = Gaussian(VPSDE(), numbers(1, 2, 2), 0.3)
    for probe, probes in (("exact", 1), ("rademacher", 1), ("gaussian", 3)):
        found = log_likelihood(model, numbers(0, 1, 2, 2), probe=probe, probes=probes)  # type: ignore[arg-type]
        assert found.log_prob.shape == found.std_error.shape == found.bits_per_dim().shape == (0,)
        assert found.latent.shape == (0, 1, 2, 2) and found.nfe == 0


def test_evaluations_are_counted() -> None:
    class Counted(ScoreModel):
        calls = 0

        def forward(self, x: Tensor, t: Tensor) -> Estimate:  # type: ignore[override]
            self.calls += 1
            return Gaussian(VPSDE(), MEAN, COV)(x, t)

    for method, batch in (("dopri5", 2), ("RK45", 2), ("embedded", 1)):
        model = Counted(VPSDE())
        found = log_likelihood(model, numbers(batch, 3), probes=4, method=method, rtol=1e-3, atol=1e-3)
        assert found.nfe == model.calls > 10


# --- estimates of the trace


def total_jacobian(model: Gaussian) -> Tensor:
    """Integral of the Jacobian over the angle of the circle: half the log of V(1) V(0)⁻¹, for the covariances commute,
    less the log of the radii's ratio, which is known without probes."""
    v0, v1 = model.sde.sigma(START) ** 2, model.sde.sigma(END) ** 2
    a0, a1 = model.sde.alpha(START) ** 2, model.sde.alpha(END) ** 2
    eigenvalues, basis = torch.linalg.eigh(COV)
    known = (a1 / 4 + v1) / (a0 / 4 + v0)
    return basis @ torch.diag(((a1 * eigenvalues + v1) / (a0 * eigenvalues + v0) / known).log() / 2) @ basis.T


VARIANCES = {
    "gaussian": lambda s: 2 * s.square().sum(),
    "rademacher": lambda s: 2 * (s.square().sum() - s.diagonal().square().sum()),
    "sphere": lambda s: 2 * len(s) / (len(s) + 2) * (s.square().sum() - s.trace() ** 2 / len(s)),
}


@pytest.mark.parametrize(
    ("sde", "probe"),
    [*((VPSDE(), probe) for probe in VARIANCES), (SubVPSDE(), "gaussian"), (VESDE(), "gaussian")],
    ids=lambda value: value if isinstance(value, str) else name(value),
)
def test_hutchinsons_estimate_is_unbiased_with_the_variance_of_the_formula(sde: SDE, probe: str) -> None:
    model, k = Gaussian(sde, MEAN, COV), 2000
    x, _ = model.sample(2, torch.Generator().manual_seed(0))
    found = exactly(model, x, probe=probe, probes=k, rtol=1e-4, atol=1e-4, method="embedded")
    variance = VARIANCES[probe](total_jacobian(model))
    # 4 standard errors; a sample variance of such products is off by some sqrt(14/k), relatively
    assert bool(((found.log_prob - model.log_prob(x, START)).abs() < 4 * (variance / k).sqrt()).all())
    assert bool((found.std_error.square() * k / variance - 1).abs().max() < 4 * math.sqrt(14 / k))


def test_only_the_symmetric_part_of_a_jacobian_adds_variance() -> None:
    """Score -A x with A not symmetric: v = (A - I) x beta/2, whose Jacobian integrates to (A - I) B/2."""
    a = torch.tensor([[1.0, 0.5, 0.0], [-0.3, 1.1, 0.2], [0.0, 0.0, 0.9]], dtype=torch.float64)
    model, k = from_score(VPSDE(), lambda x, t: -x @ a.T), 2000
    x = numbers(2, 3)
    found = log_likelihood(model, x, probe="gaussian", probes=k, rtol=1e-6, atol=1e-6, method="embedded")
    integral = (a - torch.eye(3, dtype=torch.float64)) * (VPSDE()._integral(END) - VPSDE()._integral(START)) / 2
    end = x @ torch.matrix_exp(integral).T
    torch.testing.assert_close(found.latent, end, rtol=1e-4, atol=1e-5)
    truth = VPSDE().prior_log_prob(end) + integral.trace()
    first, last = (torch.hypot(VPSDE().alpha(t) / 2, VPSDE().sigma(t)) for t in (START, END))
    variance = VARIANCES["gaussian"]((integral + integral.T) / 2 - torch.log(last / first) * torch.eye(3))
    assert bool(((found.log_prob - truth).abs() < 4 * (variance / k).sqrt()).all())
    assert bool((found.std_error.square() * k / variance - 1).abs().max() < 4 * math.sqrt(14 / k))


def test_the_standard_error_is_the_spread_over_probes() -> None:
    model, x = Gaussian(VPSDE(), MEAN, COV), MEAN.expand(2, 3)
    e = numbers(3, 2, 3, seed=4)
    coarse = {"rtol": 1e-4, "atol": 1e-4}
    found = exactly(model, x, probe=e, **coarse)
    single = [exactly(model, x, probe=e[k : k + 1], **coarse) for k in range(3)]
    apart = torch.stack([each.log_prob for each in single])
    torch.testing.assert_close(found.log_prob, apart.mean(0), rtol=0, atol=2e-3)
    torch.testing.assert_close(found.std_error, apart.std(0) / math.sqrt(3), rtol=0.01, atol=0)
    assert bool(torch.stack([each.std_error for each in single]).isnan().all())  # one probe cannot tell


def test_given_probes_are_used_as_they_are() -> None:
    model = Gaussian(VPSDE(), MEAN, COV)
    x, _ = model.sample(2, torch.Generator().manual_seed(0))
    truth = model.log_prob(x, START)
    unit = math.sqrt(3) * torch.eye(3, dtype=torch.float64)[:, None].expand(3, 2, 3)  # e^T J e averages to the trace
    torch.testing.assert_close(exactly(model, x, probe=unit).log_prob, truth, rtol=0, atol=5e-5)
    # random signs in the Jacobian's eigenbasis: one probe that is exact
    basis = torch.linalg.eigh(COV).eigenvectors
    turned = torch.tensor([[[1.0, -1.0, 1.0], [1.0, 1.0, 1.0]]], dtype=torch.float64) @ basis.T
    torch.testing.assert_close(exactly(model, x, probe=turned).log_prob, truth, rtol=0, atol=5e-5)


def test_probes_have_unit_covariance_and_come_from_seed_and_index_alone() -> None:
    x = torch.zeros(6, 2, 2)
    for kind in ("gaussian", "rademacher", "sphere"):
        e = draw_probes(kind, 5000, x, 3, 10)  # type: ignore[arg-type]
        assert e.shape == (5000, *x.shape)
        if kind == "rademacher":
            assert bool((e.abs() == 1).all())
        if kind == "sphere":
            torch.testing.assert_close(e.flatten(2).norm(dim=2), torch.full((5000, 6), 2.0))
        flat = e.flatten(2)
        assert (flat.mT @ flat / 6 - torch.eye(4)).mean(0).abs().max() < 4 / math.sqrt(30_000) * math.sqrt(2)
        assert torch.equal(draw_probes(kind, 5000, x[:2], 3, 12), e[:, 2:4])  # type: ignore[arg-type]
        assert not torch.equal(draw_probes(kind, 5000, x, 4, 10), e)  # type: ignore[arg-type]
        whole = draw_probes(kind, 5, x, torch.Generator().manual_seed(1), 0)  # type: ignore[arg-type]
        assert torch.equal(draw_probes(kind, 5, x, torch.Generator().manual_seed(1), 9), whole)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["embedded", "dopri5"])
def test_exact_traces_in_many_dimensions_come_in_parts(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few products at a time, and the D unit vectors once, not for every example."""
    model = Gaussian(VPSDE(), MEAN, COV)
    x, _ = model.sample(4, torch.Generator().manual_seed(0))
    coarse = {"method": method, "rtol": 1e-3, "atol": 1e-3}
    whole, parts, products = exactly(model, x, **coarse), list[Tensor](), traces._products

    def watched(h: Tensor, y: Tensor, e: Tensor, *how: bool) -> Tensor:
        parts.append(e)
        return products(h, y, e, *how)

    monkeypatch.setattr(traces, "_products", watched)
    for size in (1, 8):
        parts.clear()
        monkeypatch.setattr(traces, "BLOCK", size)
        torch.testing.assert_close(exactly(model, x, **coarse).log_prob, whole.log_prob, rtol=1e-9, atol=1e-9)
        assert all(len(e) == 1 or len(e) * e.shape[1] <= size for e in parts)
        assert max(e.untyped_storage().nbytes() for e in parts) == 3 * 3 * x.element_size()


def test_unit_vectors_are_shared_by_the_examples_they_are_chosen_for() -> None:
    x, rows = numbers(4, 2, 2), torch.tensor([3, 0])
    for kind, exact in (("exact", True), ("gaussian", False)):
        e = draw_probes(kind, 5, x, 0, 0)  # type: ignore[arg-type]
        found = traces.of_rows(e, rows, exact)
        assert torch.equal(found, e[:, rows]) and (found.data_ptr() == e.data_ptr()) == exact


@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])
def test_several_probes_through_a_network_with_attention_are_the_single_ones(recompute: bool) -> None:
    torch.manual_seed(0)  # of the network's initial weights
    network = UNet(
        1, width=8, multipliers=(1, 2), blocks=1, attention=(4,), image_size=8, dropout=0.0, init_scale=1.0,
        checkpoint_activations=recompute,
    ).eval()  # fmt: skip
    step = Solver("euler", steps=1)
    flow = score_flow(Preconditioned(network, VPSDE()), base=lambda z: z.new_zeros(len(z)), t_min=0.3, solver=step)
    x, e = numbers(2, 1, 8, 8, dtype=torch.float32), numbers(3, 2, 1, 8, 8, seed=1, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch warns where it must fall back on a loop over the probes
        with torch.no_grad():
            together = flow.evaluate(x, probe=e)
    with torch.no_grad():
        alone = torch.stack([flow.log_prob(x, probe=e[k : k + 1]) for k in range(3)], dim=1)
    torch.testing.assert_close(together.log_prob, alone.mean(1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(together.std_error, alone.std(1) / math.sqrt(3), rtol=1e-4, atol=1e-4)
    assert not together.latent.requires_grad and all(p.grad is None for p in network.parameters())


# --- bits per dimension


def test_bits_are_nats_over_log_two_plus_the_size_of_a_level() -> None:
    nats = Likelihood(torch.tensor([-math.log(2) * 12]), torch.zeros(1), torch.zeros(1, 3, 2, 2), 1)
    assert nats.bits_per_dim().tolist() == [1 + 7.0]
    assert nats.bits_per_dim(width=1.0).tolist() == [1 + 8.0]
    assert nats.bits_per_dim(levels=17).item() == pytest.approx(1 + math.log2(17) - 1)
    uniform = Likelihood(torch.tensor([-math.log(2) * 12]), torch.zeros(1), torch.zeros(1, 12), 1)  # on [-1, 1]^12
    for levels in (256, 17, 2):
        assert uniform.bits_per_dim(levels).item() == pytest.approx(math.log2(levels), abs=1e-6)


class Uniform(ScoreModel):
    """Exact model of data uniform on [low, high] in every dimension."""

    def __init__(self, sde: SDE, low: float, high: float) -> None:
        super().__init__(sde)
        self.middle, self.half = (low + high) / 2, (high - low) / 2

    def log_density(self, x: Tensor, t: Tensor) -> Tensor:
        """log [Phi((a h - |r|)/s) - Phi((-a h - |r|)/s)]/(2 a h) for r = x - a middle, one value per number."""
        alpha, sigma = like(self.sde.alpha(t), x), like(self.sde.sigma(t), x)
        r, h = (x - alpha * self.middle).abs(), alpha * self.half
        near, far = torch.special.log_ndtr((h - r) / sigma), torch.special.log_ndtr((-h - r) / sigma)
        return near + torch.log1p(-torch.exp(far - near)) - torch.log(2 * h)

    def forward(self, x: Tensor, t: Tensor) -> Estimate:  # type: ignore[override]
        with torch.enable_grad():
            y = x if x.requires_grad else x.detach().requires_grad_(True)
            (score,) = torch.autograd.grad(self.log_density(y, t).sum(), y, create_graph=x.requires_grad)
        alpha, sigma = like(self.sde.alpha(t), x), like(self.sde.sigma(t), x)
        return Estimate((x + sigma**2 * score) / alpha, -sigma * score, sigma)


@pytest.mark.parametrize(("levels", "centered"), [(256, True), (2, False)])
def test_uniform_noise_has_the_bits_of_its_levels(levels: int, centered: bool) -> None:
    """8 for 256: through the codec, the flow of the exact model of a uniform density, and the offset."""
    codec, g = PixelCodec(levels, centered), torch.Generator().manual_seed(0)
    k = torch.randint(levels, (4, 3, 8, 8), generator=g, dtype=torch.uint8)
    x = codec.encode(k, torch.rand(k.shape, generator=g, dtype=torch.float64))
    model = Uniform(VPSDE(), 1 - codec.width, 1.0)
    found = log_likelihood(model, x)  # Rademacher probes are exact: every number flows by itself
    truth = found._replace(log_prob=model.log_density(x, START).flatten(1).sum(1))
    bits, expected = found.bits_per_dim(levels, codec.width), truth.bits_per_dim(levels, codec.width)
    torch.testing.assert_close(bits, expected, rtol=0, atol=2e-3)
    # at t_min noise of 0.001 takes a little density across the edges
    torch.testing.assert_close(bits, torch.full_like(bits, math.log2(levels)), rtol=0, atol=0.01)


def signs_in_the_basis(model: Gaussian, x: Tensor, seed: int) -> Tensor:
    """A probe (1, *x.shape) of random signs in the covariance's eigenbasis.

    There the Jacobian of a Gaussian's velocity is diagonal at every time, and Rademacher probes are exact.
    """
    assert model.basis is not None
    signs = torch.where(numbers(*x.flatten(1).shape, seed=seed) < 0, -1.0, 1.0).to(x)
    return (signs @ model.basis[0].T.to(x)).reshape(1, *x.shape)


def test_the_gaussian_fitted_to_digits_has_its_closed_forms_bits() -> None:
    data, codec = load_data("digits"), PixelCodec(17)
    model = Gaussian(VPSDE(), *gaussian_fit(data.train.x, codec))
    k = data.test.x
    x = codec.encode(k, torch.rand(k.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    dimensions = x[0].numel()
    truth = -model.log_prob(x) / (dimensions * math.log(2)) + math.log2(17 / 2)
    assert float(truth.mean()) == pytest.approx(2.964, abs=0.05)  # measured elsewhere with other dequantisation noise

    x, truth = x[:100], truth[:100]
    fast = log_likelihood(model, x, probe=signs_in_the_basis(model, x, 0)).bits_per_dim(17, codec.width)
    assert float(fast.mean()) == pytest.approx(float(truth.mean()), abs=0.002)
    x, truth = x[:10], truth[:10]
    exact = log_likelihood(model, x, probe="exact").bits_per_dim(17, codec.width)
    torch.testing.assert_close(exact, truth, rtol=0, atol=0.005)
    estimate = log_likelihood(model, x, probe="rademacher", probes=16, rtol=1e-4, atol=1e-4)
    error = estimate.std_error / (dimensions * math.log(2))
    assert ((estimate.bits_per_dim(17, codec.width) - truth) / error).abs().max() < 5


@pytest.mark.slow
@pytest.mark.skipif(
    "SCORE_SDE_CIFAR10" not in os.environ,
    reason="needs the environment variable SCORE_SDE_CIFAR10: a folder that holds CIFAR-10's official files",
)
def test_the_gaussian_fitted_to_cifar10_has_4644_bits() -> None:
    data, codec = load_data("cifar10", os.environ["SCORE_SDE_CIFAR10"]), PixelCodec()
    assert isinstance(data.train.x, Tensor) and isinstance(data.test.x, Tensor)
    # At t = 1e-5 sub-VP has noise of 1e-6 and leaves the density alone; VP's noise of 1e-3 moves it by -0.0015 bits.
    model = Gaussian(SubVPSDE(), *gaussian_fit(data.train.x, codec))

    def bits(log_prob: Tensor) -> Tensor:
        return -log_prob / (3072 * math.log(2)) + 7

    g = torch.Generator().manual_seed(0)
    total, count = 0.0, 100
    for i, k in enumerate(data.test.x.split(500)):
        x = codec.encode(k, torch.rand(k.shape, generator=g, dtype=torch.float64))
        truth = bits(model.log_prob(x))
        total += float(truth.sum())
        if i == 0:
            found = log_likelihood(model, x[:count], probe=signs_in_the_basis(model, x[:count], 0))
            torch.testing.assert_close(found.bits_per_dim(), truth[:count], rtol=0, atol=0.002)
    assert total / len(data.test) == pytest.approx(4.644, abs=0.002)


# --- errors


def test_errors_name_the_thing_and_the_remedy() -> None:
    model, x = Gaussian(VPSDE(), MEAN, COV), numbers(2, 3)
    with pytest.raises(ValueError, match="unknown probe 'cube'; use \"rademacher\""):
        log_likelihood(model, x, probe="cube")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must be \(K, \*x.shape\), got \(2, 3\)"):
        log_likelihood(model, x, probe=x)
    with pytest.raises(ValueError, match="probes must be at least 1, got 0"):
        log_likelihood(model, x, probes=0)
    with pytest.raises(ValueError, match="unknown adaptive ODE method 'rk4'; use one of dopri5"):
        log_likelihood(model, x, method="rk4")
    with pytest.raises(ValueError, match="no gradient in x"):
        log_likelihood(from_score(VPSDE(), lambda x, t: -x.detach()), x)
    broken = from_score(VPSDE(), lambda x, t: x / 0)
    with pytest.raises(RuntimeError, match="a slope that is not finite at t = 1e-05"):
        log_likelihood(broken, x, method="dopri5")
    with pytest.raises(RuntimeError, match=r"embedded gave up on 2 of 2 examples, at t = 1e-05 \(a slope .* finite\)"):
        log_likelihood(broken, x)
