"""Dequantisers have the density they say, and their bounds reach log P(k), known in closed form, from below."""

import math
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from score_sde import VESDE, VPSDE, Likelihood, Preconditioned, ScoreModel, SubVPSDE, log_likelihood
from score_sde.data import Split
from score_sde.data.codecs import PixelCodec
from score_sde.likelihood.dequantisation import (
    Dequantiser,
    TruncatedNormal,
    Uniform,
    VariationalDequantiser,
    dequantisation_loss,
    fit_dequantiser,
    log_mean_exp,
    log_probability,
    truncation_time,
    uniform_numbers,
)
from score_sde.likelihood.sde_bound import variational_bound
from score_sde.models.closed_form import Gaussian, Mixture
from score_sde.networks import MLP
from score_sde.tasks.dequantize import load_dequantiser, save_dequantiser
from tests.oracles import numbers

CODEC = PixelCodec(4)
START = 1e-3
MIXTURE = Mixture(
    VPSDE(), [0.3, 0.7], torch.tensor([[-0.4, 0.1], [0.5, -0.6]], dtype=torch.float64), torch.tensor([0.02, 0.05])
)


def at(t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float64)


def all_images(codec: PixelCodec, dimensions: int) -> Tensor:
    """Every image of so many pixels, (levels^D, D)."""
    return torch.cartesian_prod(*[torch.arange(codec.levels, dtype=torch.uint8)] * dimensions).reshape(-1, dimensions)


def log_mass(model: Mixture, low: Tensor, high: Tensor, t: float) -> Tensor:
    """log of the mass that a mixture without rotations has at time t in the box from low to high, (B,)."""
    alpha, sigma = model.sde.alpha(at(t)), model.sde.sigma(at(t))
    std = (alpha**2 * model.variances + sigma**2).sqrt()
    upper, lower = (torch.special.ndtr((edge[:, None] - alpha * model.means) / std) for edge in (high, low))
    return torch.log(((upper - lower).prod(-1) * model.log_weights.exp()).sum(1))


def closed_form_draws(
    model: Mixture, k: Tensor, dequantiser: Dequantiser, samples: int, numbers: Tensor | None = None
) -> Tensor:
    """log p(x_i) - log q(x_i | k), (samples, B), with the model's own density at t_min.

    The uniform `numbers` (samples, *k.shape) are those of seed 0 by default.
    """
    draws = []
    for u in (uniform_numbers(tuple(k.shape), samples, 0) if numbers is None else numbers).double():
        x, log_q = dequantiser(k, u)
        draws.append(model.log_prob(x, at(dequantiser.t_min)) - log_q.flatten(1).sum(1))
    return torch.stack(draws)


def bent(
    shape: tuple[int, ...], codec: PixelCodec = CODEC, dtype: torch.dtype = torch.float64
) -> VariationalDequantiser:
    """A flow that is far from uniform."""
    torch.manual_seed(0)  # of its weights
    made = VariationalDequantiser(codec, shape, hidden=8, layers=3, t_min=START).to(dtype)
    with torch.no_grad():
        for p in made.parameters():
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=dtype)
    return made.requires_grad_(False)


# --- each law has its bin for support, and the density that it says

LAWS: dict[str, Dequantiser] = {
    "uniform": Uniform(CODEC, START),
    "uniform on [0, 1]": Uniform(PixelCodec(4, centered=False), START),
    "truncated": TruncatedNormal(CODEC, VPSDE(), 0.05),  # reach 3.5
    "cut off": TruncatedNormal(CODEC, VPSDE(), 0.3),
    "truncated on [0, 1]": TruncatedNormal(PixelCodec(4, centered=False), VESDE(), 0.3),
    "variational": bent((1, 2, 2)),
    "variational on vectors": bent((4,)),
}


@pytest.mark.parametrize("name", LAWS)
def test_the_density_is_that_of_the_map(name: str) -> None:
    """1/|det dx/du| for u uniform, by autograd."""
    law, shape = LAWS[name], (4,) if "vectors" in name else (1, 2, 2)
    k = torch.tensor([0, 3, 1, 2], dtype=torch.uint8).reshape(1, *shape)
    u = torch.tensor([0.2, 0.7, 0.55, 0.9], dtype=torch.float64).reshape(1, *shape)
    jacobian = torch.autograd.functional.jacobian(lambda v: law(k, v).x.flatten(), u).reshape(4, 4)
    found = law(k, u).log_q
    assert found.shape == u.shape
    assert float(found.sum()) == pytest.approx(-float(torch.linalg.slogdet(jacobian)[1]), abs=1e-9)
    if "variational" in name:
        assert (jacobian - torch.diag(jacobian.diagonal())).abs().max() > 1e-3, "no dimension sees another"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["uniform", "uniform on [0, 1]", "truncated", "cut off"])
def test_a_bin_s_mass_is_the_mean_of_the_weights_wherever_the_density_has_its_peak(
    name: str, dtype: torch.dtype
) -> None:
    """E p/q is the mass of p in the bin, for 2^20 even u and uniform p on narrow intervals that fill the bin's ends."""
    law, n = LAWS[name], 2**20
    u = (torch.arange(n, dtype=torch.float64) / n).to(dtype)
    x, log_q = (value.double() for value in law(torch.ones(n, dtype=torch.uint8), u))
    low, high = x.min().item(), x.max().item()
    for part in (2.0**-15, 2.0**-10):
        width = part * (high - low)
        for edge in (low, high - width):
            inside = (x >= edge - 1e-12) & (x <= edge + width + 1e-12)
            mass = (torch.exp(-log_q) * inside / width).mean().item()
            # 32 of the u at least lie in the interval; float32 has its ends to 2^-24
            assert mass == pytest.approx(1, abs=0.12 if part == 2.0**-15 else 0.02), (part, edge)


@pytest.mark.parametrize("name", LAWS)
def test_the_bins_are_disjoint(name: str) -> None:
    law, shape = LAWS[name], (4,) if "vectors" in name else (1, 2, 2)
    u = torch.rand(4000, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u[0], u[1] = 0.0, 1 - 2.0**-24
    k = torch.randint(4, u.shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    x = law(k, u).x
    if isinstance(law, TruncatedNormal):
        alpha = law.sde.alpha(at(law.t_min))
        center, half = alpha * law.codec.encode(k).double(), alpha * law.codec.width / 6
        assert bool(((x - center).abs() <= half * (1 + 1e-6)).all())
        assert (x - center).abs().max() > 0.99 * half * min(1.0, 3 / law.reach)
    else:
        codec = law.codec  # type: ignore[attr-defined]
        assert torch.equal(codec.decode(x), k)


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("centered", [False, True])
def test_of_65536_levels_the_bound_is_the_mass_of_their_bins(centered: bool, truncated: bool) -> None:
    """A Gaussian's, in closed form; float32 states, and of uniform noise the part of a bin that it leaves out."""
    codec, sde = PixelCodec(65536, centered), VPSDE()
    law: Dequantiser = TruncatedNormal(codec, sde) if truncated else Uniform(codec)
    model = Gaussian(sde, torch.full((6,), 0.3, dtype=torch.float64), 0.2 * torch.eye(6, dtype=torch.float64))
    k = torch.tensor([[0, 1, 20_000, 32_768, 65_534, 65_535]], dtype=torch.int32)
    u = uniform_numbers((1, 6), 200, 0)[:, 0]
    x, log_q = law(k.expand(200, 6), u)
    assert x.dtype == torch.float32
    found = (model.log_prob(x.double(), at(law.t_min)) - log_q.double().sum(1)).mean().item()
    edges = codec.width * torch.stack([k[0], k[0] + 1]).double() / 65536 + codec.range[0]
    alpha, sigma = sde.alpha(at(1e-5)).item(), sde.sigma(at(1e-5)).item()
    edges = alpha * edges if truncated else edges
    cells = norm.cdf(edges.numpy(), 0.3 * alpha, math.sqrt(0.2 * alpha**2 + sigma**2))
    wanted = np.log(cells[1] - cells[0]).sum() + (0 if truncated else 6 * math.log(codec.filled))
    assert found == pytest.approx(wanted, abs=2e-3)  # the density changes by 1e-4 of itself over a bin
    assert codec.filled == 1 - 2.0**-7


def test_a_flow_that_was_not_fitted_is_uniform() -> None:
    law, u = (
        VariationalDequantiser(CODEC, (2, 3, 3)),
        torch.rand(5, 2, 3, 3, generator=torch.Generator().manual_seed(0)),
    )
    k = torch.randint(4, u.shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    for found, expected in zip(law(k, u), Uniform(CODEC)(k, u)):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


def test_truncation_is_at_three_standard_deviations_where_there_is_a_time_for_it() -> None:
    for sde in (VPSDE(), SubVPSDE()):
        for codec in (PixelCodec(256), PixelCodec(17), PixelCodec(256, centered=False)):
            t = truncation_time(codec, sde, least=1e-6)
            assert t > 1e-6 and TruncatedNormal(codec, sde, t).reach == pytest.approx(3, rel=1e-6)
    eight_bits = truncation_time(PixelCodec(256), VPSDE(), 3.02 * 256 / 255)
    log_snr = VPSDE().log_snr(at(eight_bits)).item()
    assert log_snr == pytest.approx(13.3, abs=0.01)  # where Kingma et al. 2021 begin, with bins of 2/256
    assert truncation_time(PixelCodec(256), VESDE()) == 1e-5  # sigma_min is more than a third of half a bin
    assert truncation_time(PixelCodec(17), VPSDE(), least=0.2) == 0.2


# --- the bounds


@pytest.mark.parametrize("name", ["uniform", "cut off", "variational"])
def test_the_bound_rises_with_the_draws_to_the_exact_log_probability(name: str) -> None:
    law: Dequantiser = {
        "uniform": Uniform(CODEC, START), "cut off": TruncatedNormal(CODEC, VPSDE(), 0.1), "variational": bent((2,)),
    }[name]  # fmt: skip
    levels = all_images(CODEC, 2)
    if isinstance(law, TruncatedNormal):
        alpha = VPSDE().alpha(at(law.t_min))
        center, half = alpha * CODEC.encode(levels).double(), alpha / 3
        low, high = center - half, center + half
    else:
        low, high = CODEC.encode(levels, torch.zeros(16, 2, dtype=torch.float64)), CODEC.encode(levels).double()
        high = low + 0.5
    truth = log_mass(MIXTURE, low, high, law.t_min)
    assert torch.exp(truth).sum() < 1  # what lies beyond the first and the last bin is lost
    n, most = 64, 256
    even = torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(n * most, dtype=torch.float64)
    u = even[torch.randperm(n * most, generator=torch.Generator().manual_seed(0))].reshape(most, n, 2).repeat(1, 16, 1)
    draws = closed_form_draws(MIXTURE, levels.repeat_interleave(n, 0), law, most, u)
    gaps = []
    for k in (1, 4, 16, 64, 256):
        bound = torch.stack([log_mean_exp(part) for part in draws.split(k)]).reshape(-1, 16, n).mean((0, 2))
        gaps.append(truth - bound)
    for coarse, fine in pairwise(gaps):
        assert bool((fine < coarse).all())
    assert gaps[0].min() > 0.03 and bool((gaps[0] > 5 * gaps[2]).all())
    assert gaps[-1].abs().max() < 0.1 and gaps[-1].abs().median() < 0.02
    # and from below: the numbers are even together, and so the mean's error is small
    assert all(bool((gap > -0.002).all()) for gap in gaps)


def test_one_draw_s_mean_is_the_integral_of_the_log_density() -> None:
    """Over the part of the bin that is filled, by quadrature in u and in x."""
    k = torch.tensor([[1, 2]], dtype=torch.uint8).expand(1600, 2)
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(40))
    u, w = torch.cartesian_prod((nodes + 1) / 2, (nodes + 1) / 2), torch.cartesian_prod(weights, weights).prod(1) / 4
    found = float(w @ closed_form_draws(MIXTURE, k, Uniform(CODEC, START), 1, u[None])[0])
    x = CODEC.encode(k, torch.zeros_like(u)) + 0.5 * CODEC.filled * u
    expected = float(w @ MIXTURE.log_prob(x, at(START))) + 2 * math.log(0.5 * CODEC.filled)
    assert found == pytest.approx(expected, abs=1e-6)


def test_data_on_their_levels_ask_for_the_truncated_normal() -> None:
    """Exact model of images on four levels: log P(k) but for the mass cut off; with uniform noise nothing near it."""
    codec, sde = PixelCodec(4), VPSDE()
    images = torch.tensor([[0, 3], [2, 1], [3, 3]], dtype=torch.uint8)
    model = Mixture(sde, [0.5, 0.3, 0.2], codec.encode(images).double(), 0.0)
    law = TruncatedNormal(codec, sde, truncation_time(codec, sde))
    draws = closed_form_draws(model, images, law, 8)
    expected = model.log_weights + 2 * math.log(math.erf(3 / math.sqrt(2)))
    torch.testing.assert_close(draws, expected.expand(8, 3), rtol=0, atol=1e-6)  # every single draw
    assert closed_form_draws(model, images, Uniform(codec, law.t_min), 8).mean() < expected.mean() - 4


def test_by_the_probability_flow_it_is_the_same_number() -> None:
    levels, law = all_images(CODEC, 2), Uniform(CODEC, START)
    settings = {"probe": "exact", "rtol": 1e-5, "atol": 1e-5, "prior_log_prob": lambda z: MIXTURE.log_prob(z, at(1.0))}
    found = log_probability(MIXTURE, levels, law, samples=2, seed=3, dtype=torch.float64, **settings)
    u = uniform_numbers((16, 2), 2, 3)
    draws = closed_form_draws(MIXTURE, levels, law, 2, u)
    torch.testing.assert_close(found.draws, draws, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.log_prob, torch.logsumexp(draws, 0) - math.log(2), rtol=0, atol=1e-3)
    torch.testing.assert_close(found.bits_per_dim(), -found.log_prob / math.log(4))
    assert found.nfe > 2 * 20 and bool((found.std_error == 0).all())
    # the offset of `Likelihood.bits_per_dim` is log q's, for the width that is filled
    x, _ = law(levels, u[0].double())
    alone = log_likelihood(MIXTURE, x, t_min=START, **settings)  # type: ignore[arg-type]
    torch.testing.assert_close(
        alone.bits_per_dim(4, 2.0 * CODEC.filled), -found.draws[0] / math.log(4), rtol=0, atol=1e-6
    )


def test_draws_depend_on_seed_and_index_alone_and_share_their_probes() -> None:
    cov = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.4], [0.0, 0.4, 1.0]], dtype=torch.float64)
    model, levels = Gaussian(VPSDE(), numbers(3), cov), all_images(CODEC, 3)[::7]
    run = {"seed": 5, "probes": 2, "rtol": 1e-3, "atol": 1e-3, "dtype": torch.float64}
    law = Uniform(CODEC, START)
    whole = log_probability(model, levels, law, samples=2, first=2, **run)  # type: ignore[arg-type]
    part = log_probability(model, levels[4:6], law, samples=2, first=6, **run)  # type: ignore[arg-type]
    torch.testing.assert_close(part.draws, whole.draws[:, 4:6], rtol=0, atol=1e-6)
    assert (whole.draws[0] - whole.draws[1]).abs().min() > 1e-3
    # A Gaussian's Jacobian is the same everywhere, and so is a shared probe's error.
    exact = log_probability(model, levels, law, samples=2, first=2, **{**run, "probe": "exact"})  # type: ignore[arg-type]
    errors = whole.draws - exact.draws
    assert (errors - errors[0]).abs().max() < 0.02 < 0.05 < errors.abs().max()
    assert float(whole.std_error.max()) > 0.05 and log_probability(model, levels[:0], law, samples=2).draws.shape == (
        2,
        0,
    )


def test_draws_of_uneven_weight_enter_value_and_error_by_their_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first image's draws 1, 2 and 5 of 8; uniform noise has the same log q in each, log 2 a dimension or so."""
    values = iter(([1.0, 1.0, 1.0], [2.0, 1.0, 0.0], [5.0, 1.0, 0.0]))  # densities of three images, in three draws
    errors = iter(([0.1, 0.1, 0.3], [0.2, 0.4, 0.9], [0.4, 0.1, 0.9]))

    def given(model: ScoreModel, x: Tensor, **options: object) -> Likelihood:
        density, error = (torch.tensor(next(v), dtype=torch.float64) for v in (values, errors))
        return Likelihood(density.log(), error, x, 7)

    monkeypatch.setattr("score_sde.likelihood.dequantisation.log_likelihood", given)
    k = torch.ones(3, 1, dtype=torch.uint8)
    found = log_probability(MIXTURE, k, Uniform(CODEC), samples=3, dtype=torch.float64)
    log_q = Uniform(CODEC)(k, torch.zeros(3, 1, dtype=torch.float64))[1].expand(3, 1)[:, 0]
    means = torch.tensor([8 / 3, 1.0, 1 / 3], dtype=torch.float64)
    torch.testing.assert_close(found.log_prob, means.log() - log_q, rtol=1e-12, atol=0)
    assert bool(((log_q - math.log(2)).abs() < 1e-3).all())
    wanted = [(1 * 0.1 + 2 * 0.2 + 5 * 0.4) / 8, (0.1 + 0.4 + 0.1) / 3, 0.3]
    assert found.std_error.tolist() == pytest.approx(wanted, rel=1e-12) and found.nfe == 21


def test_the_bound_of_the_sde_is_on_the_same_scale_and_not_below_the_exact_number() -> None:
    """Bits of dequantised levels by both roads; the prior is the law of x_1, and the model exact.

    At a t_min without noise to speak of the bound is tight; at more its decoder adds noise once more.
    """
    sde = VPSDE(beta_max=60.0)
    model = Mixture(sde, [0.3, 0.7], torch.tensor([[-0.4, 0.1], [0.5, -0.6]], dtype=torch.float64), 0.1)
    codec, n = PixelCodec(17), 200
    k = codec.decode(model.sample(n, torch.Generator().manual_seed(0))[0].clamp(-1, 1))
    for t_min, low, high in ((1e-4, -1e-3, 1e-3), (0.1, 0.4, 0.8)):
        x, log_q = Uniform(codec, t_min)(k, uniform_numbers((n, 2), 1, 0)[0].double())
        width = codec.width * codec.filled
        exact = log_likelihood(model, x, probe="exact", t_min=t_min, rtol=1e-3, atol=1e-3).bits_per_dim(17, width)
        bound = variational_bound(model, x, t_min=t_min, draws=150)
        bits = bound.bits_per_dim(17, width)
        torch.testing.assert_close(bits, (bound.total + log_q.sum(1)) / (2 * math.log(2)))
        error = bound.std_error.square().sum().sqrt() / n / (2 * math.log(2))
        assert low - 4 * error < (bits - exact).mean() < high + 4 * error and error < 0.09, (
            t_min,
            (bits - exact).mean(),
            error,
        )


# --- the flow, fitted


def correlated(sde: VPSDE, pixels: int) -> Gaussian:
    """Pixels that are nearly equal: within a bin their noise should be, too."""
    cov = 0.3 * torch.ones(pixels, pixels, dtype=torch.float64) + 0.01 * torch.eye(pixels, dtype=torch.float64)
    return Gaussian(sde, torch.zeros(1, 1, pixels, dtype=torch.float64), cov)


def test_a_fitted_flow_comes_nearer_to_the_exact_probability() -> None:
    model, codec = correlated(VPSDE(), 2), PixelCodec(4)
    x, _ = model.sample(3000, torch.Generator().manual_seed(0))
    levels = codec.decode(x)
    losses: list[float] = []
    law = fit_dequantiser(
        model, Split(levels), codec, steps=70, batch_size=128, lr=2e-2, hidden=16, layers=4, t_min=START,
        progress=lambda step, loss: losses.append(loss.item()),
    )  # fmt: skip
    held_out, _ = model.sample(500, torch.Generator().manual_seed(1))
    k = codec.decode(held_out)
    images = all_images(codec, 2)[:, None, None]  # 16, and each held-out one is one of them
    of_each = log_mean_exp(closed_form_draws(model, images, Uniform(codec, START), 2000))
    truth = of_each[(4 * k[..., 0] + k[..., 1]).flatten().long()].mean()
    before, after = (closed_form_draws(model, k, q, 20).mean() for q in (Uniform(codec, START), law.double()))
    assert truth - before > 0.3  # nats: half of it and more is won back
    assert -0.01 < truth - after < 0.5 * (truth - before)
    assert len(losses) == 70 and all(p.grad is None for p in model.parameters())


def test_the_loss_is_the_bound_with_q() -> None:
    model, law, n, m = MIXTURE, bent((2,)), 20_000, 4000
    k = torch.tensor([[1, 2]], dtype=torch.uint8).expand(n, 2)
    g = torch.Generator().manual_seed(0)
    u, z = torch.rand(n, 2, generator=g, dtype=torch.float64), torch.randn(n, 2, generator=g, dtype=torch.float64)
    v = (torch.randperm(n, generator=g) + torch.rand(n, generator=g, dtype=torch.float64)) / n
    loss = dequantisation_loss(model, law, k, u, v, z)
    x, log_q = law(k[:m], u[:m])
    found = variational_bound(model, x, t_min=START, draws=16, seed=1)
    other = found.total + log_q.sum(1)
    error = math.hypot(float(loss.std()) / math.sqrt(n), float(other.std()) / math.sqrt(m))
    assert abs(float(loss.mean() - other.mean())) < 4 * error < 0.6


def test_a_network_s_weights_stay_as_they_are(tmp_path: Path) -> None:
    torch.manual_seed(0)  # of the network's initial weights
    model: ScoreModel = Preconditioned(MLP(6, width=8, depth=1), VPSDE())
    before = {name: p.clone() for name, p in model.state_dict().items()}
    split = Split(torch.randint(4, (50, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8))
    fits = [fit_dequantiser(model, split, CODEC, steps=3, batch_size=8, hidden=8, layers=2) for _ in range(2)]
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    for name, p in fits[0].state_dict().items():
        assert torch.equal(p, fits[1].state_dict()[name]), "not reproducible"

    save_dequantiser(tmp_path / "a" / "flow.safetensors", fits[0], checkpoint="abc")
    law, header = load_dequantiser(tmp_path / "a" / "flow.safetensors")
    assert header["checkpoint"] == "abc" and law.t_min == fits[0].t_min and law.codec == CODEC
    k, _ = split[torch.arange(4)]
    u = uniform_numbers((4, 6), 1, 0)[0]
    for found, expected in zip(law(k, u), fits[0](k, u)):
        assert torch.equal(found, expected)
    with pytest.raises(FileNotFoundError, match="fit one with --mode dequantize"):
        load_dequantiser(tmp_path / "b.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        load_dequantiser(tmp_path / "b.safetensors")


def test_errors_name_the_thing_and_the_remedy() -> None:
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        log_probability(MIXTURE, all_images(CODEC, 2), Uniform(CODEC), samples=0)
    with pytest.raises(ValueError, match=re.escape("no noise at t_min = 0 to truncate; 1e-5 is usual")):
        TruncatedNormal(CODEC, VPSDE(), 0.0)
    with pytest.raises(ValueError, match=re.escape("images (C, H, W) or vectors (D,), got (2, 2)")):
        VariationalDequantiser(CODEC, (2, 2))
