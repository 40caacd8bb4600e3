"""The bound of a model of an autoencoder's codes, where all is known: linear and normal, or one pixel by quadrature."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from score_sde import VPSDE, AutoencoderCodec, latent_bound, log_likelihood
from score_sde.data.codecs import PixelCodec, Statistics, VectorCodec
from score_sde.likelihood import Likelihood
from score_sde.likelihood.code_bound import in_bits, of_standard_normal
from score_sde.models.autoencoder import ConvolutionalAutoencoder, divergence, entropy, log_prob
from score_sde.models.closed_form import Gaussian

SDE = VPSDE()
D, C = 6, 2  # numbers of an image and of a code
WEIGHTS = torch.linalg.qr(torch.randn(D, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
WEIGHTS = WEIGHTS * torch.tensor([1.5, 0.7], dtype=torch.float64)  # orthogonal columns: the posterior is independent
SHIFT, DEVIATION = torch.linspace(-1, 1, D, dtype=torch.float64), 0.4
PRECISION = 1 + (WEIGHTS**2).sum(0) / DEVIATION**2
SIGMA_POINTS = math.sqrt(C) * torch.cat([torch.eye(C), -torch.eye(C)]).double()  # exact for means of quadratics


class Linear(nn.Module):
    """x = W z + b + noise of z ~ N(0, I), with the true posterior, or one that is off by so much."""

    deviation = DEVIATION

    def __init__(self, off: float = 0.0, wider: float = 1.0) -> None:
        super().__init__()
        self.off, self.wider = off, wider

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = (x.flatten(1) - SHIFT) @ WEIGHTS / DEVIATION**2 / PRECISION + self.off
        std = self.wider * PRECISION.rsqrt().expand_as(mean)
        return mean.reshape(-1, C, 1, 1), std.reshape(-1, C, 1, 1)

    def decode(self, z: Tensor) -> Tensor:
        return (z.flatten(1) @ WEIGHTS.T + SHIFT).reshape(-1, 1, 1, D)


def bound_of(autoencoder: nn.Module, x: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """E_q of the bound at each x, exact over q by sigma points, with log p(y) by the probability flow; and its latent
    part. The model is of codes that these statistics normalise."""
    codec = AutoencoderCodec(
        autoencoder, Statistics(tuple(mean.tolist()), tuple(std.tolist()), DEVIATION), VectorCodec()
    )
    model = Gaussian(SDE, (-mean / std).reshape(C, 1, 1), (1 / std**2).reshape(C, 1, 1))
    one = torch.ones((), dtype=torch.float64)

    def density(y: Tensor) -> Likelihood:
        prior = lambda z: model.log_prob(z, one)
        return log_likelihood(model, y, probe="exact", t_min=1e-7, rtol=1e-6, atol=1e-6, prior_log_prob=prior)

    noise = SIGMA_POINTS.repeat_interleave(len(x), 0)[..., None, None]
    each = latent_bound(codec, x.repeat(len(SIGMA_POINTS), 1, 1, 1), density, noise=noise)
    return each.total.reshape(-1, len(x)).mean(0), each.latent.reshape(-1, len(x)).mean(0)


X = MultivariateNormal(SHIFT, WEIGHTS @ WEIGHTS.T + DEVIATION**2 * torch.eye(D))
DRAWS = torch.randn(3, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
IMAGES = (SHIFT + DRAWS @ X.scale_tril.T).reshape(3, 1, 1, D)
NONE = torch.zeros(C, dtype=torch.float64), torch.ones(C, dtype=torch.float64)


def test_with_the_true_posterior_the_bound_is_the_likelihood() -> None:
    exact = -X.log_prob(IMAGES.flatten(1))
    total, _ = bound_of(Linear(), IMAGES, *NONE)
    torch.testing.assert_close(total, exact, atol=1e-4, rtol=0)


@pytest.mark.parametrize("off, wider", [(0.1, 1.0), (0.0, 1.5), (-0.2, 0.6)])
def test_the_gap_is_the_divergence_from_the_true_posterior(off: float, wider: float) -> None:
    true, taken = Linear(), Linear(off, wider)
    gap = kl_divergence(Normal(*taken.encode(IMAGES)), Normal(*true.encode(IMAGES))).flatten(1).sum(1)
    total, _ = bound_of(taken, IMAGES, *NONE)
    exact = -X.log_prob(IMAGES.flatten(1))
    assert gap.min() > 0.05 and bool((total > exact).all())
    torch.testing.assert_close(total - exact, gap, atol=1e-4, rtol=0)


def test_statistics_move_the_parts_by_their_jacobian_and_leave_the_sum() -> None:
    mean, std = torch.tensor([0.5, -2.0], dtype=torch.float64), torch.tensor([3.0, 0.2], dtype=torch.float64)
    total, latent = bound_of(Linear(0.1), IMAGES, *NONE)
    normalised, moved = bound_of(Linear(0.1), IMAGES, mean, std)
    torch.testing.assert_close(normalised, total, atol=1e-4, rtol=0)
    torch.testing.assert_close(moved, latent - std.log().sum(), atol=1e-4, rtol=0)


class OnePixel(nn.Module):
    """Decodes to tanh z; its posterior is a rough one."""

    deviation = 0.3

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return 1.5 * x, 0.3 + 0.2 * x.abs()

    def decode(self, z: Tensor) -> Tensor:
        return torch.tanh(z)


def test_levels_have_probabilities_and_the_bound_is_above_their_logarithm() -> None:
    pixels, k = PixelCodec(5), torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1)
    codec = AutoencoderCodec(OnePixel(), Statistics((0.0,), (1.0,), 0.3), pixels)
    z = torch.linspace(-9, 9, 4001, dtype=torch.float64).reshape(-1, 1, 1, 1)
    weight = torch.exp(of_standard_normal(z).log_prob) * float(z[1] - z[0])
    exact = torch.stack([(weight * codec.log_prob(one.expand(len(z), 1, 1, 1), z).exp()).sum() for one in k])
    assert float(exact.sum()) == pytest.approx(1, abs=1e-6)
    points, weights = np.polynomial.hermite_e.hermegauss(60)
    totals = [
        latent_bound(codec, k, of_standard_normal, noise=torch.full((5, 1, 1, 1), float(p))).total for p in points
    ]
    bound = torch.stack(totals, 1).double() @ torch.from_numpy(weights / weights.sum())
    gap = bound + exact.log()
    assert bool((gap > 1e-3).all()) and float(gap.max()) < 2


def test_parts_are_what_they_are_called() -> None:
    g = torch.Generator().manual_seed(1)
    mean, std = torch.randn(4, 3, 2, 2, generator=g), torch.rand(4, 3, 2, 2, generator=g) + 0.1
    law = Normal(mean, std)
    torch.testing.assert_close(divergence(mean, std), kl_divergence(law, Normal(0.0, 1.0)).flatten(1).sum(1))
    torch.testing.assert_close(entropy(std), law.entropy().flatten(1).sum(1))
    x, decoded, deviation = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2), torch.tensor(0.7)
    torch.testing.assert_close(
        log_prob(x, decoded, deviation), Normal(decoded, deviation).log_prob(x).flatten(1).sum(1)
    )
    found = latent_bound(
        AutoencoderCodec(OnePixel(), Statistics((0.0,), (1.0,), 0.3), PixelCodec(5)),
        torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1),
        of_standard_normal,
    )
    bits = in_bits(found, 1)
    torch.testing.assert_close(bits["value"], bits["reconstruction"] + bits["latent"] - bits["entropy"])
    torch.testing.assert_close(bits["value"] * math.log(2), -found.log_prob)


def test_the_code_s_draw_depends_on_seed_and_place_alone() -> None:
    codec = AutoencoderCodec(OnePixel(), Statistics((0.0,), (1.0,), 0.3), PixelCodec(5))
    k = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1)
    whole = latent_bound(codec, k, of_standard_normal, seed=3).total
    parts = [latent_bound(codec, k[i:j], of_standard_normal, seed=3, first=i).total for i, j in ((0, 2), (2, 5))]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, latent_bound(codec, k, of_standard_normal, seed=4).total)


def test_an_autoencoder_s_own_bound_is_the_bound_under_a_normal_prior() -> None:
    """Over many draws; for one they differ, for the objective's divergence is in closed form."""
    torch.manual_seed(0)
    own = ConvolutionalAutoencoder(nn.Conv2d(1, 4, 3, 2, 1), nn.ConvTranspose2d(2, 1, 2, 2)).requires_grad_(False)
    pixels = PixelCodec(17)
    k = torch.randint(0, 17, (1, 1, 4, 4), dtype=torch.uint8).expand(4000, 1, 4, 4)
    codec = AutoencoderCodec(own, Statistics((0.0, 0.0), (1.0, 1.0), own.deviation.item()), pixels)
    noise = torch.randn(4000, 2, 2, 2, generator=torch.Generator().manual_seed(2))
    evidence = own(pixels.encode(k), noise, 17)
    bound = latent_bound(codec, k, of_standard_normal, noise=noise)
    torch.testing.assert_close(bound.reconstruction, evidence.reconstruction, atol=1e-2, rtol=1e-4)
    kl = bound.latent - bound.entropy
    error = kl.std() / math.sqrt(len(kl))
    assert error > 0 and (kl.mean() - evidence.divergence[0]).abs() < 4 * error


def test_points_have_no_bound() -> None:
    class Point(OnePixel):
        def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, torch.zeros_like(x)

    codec = AutoencoderCodec(Point(), Statistics((0.0,), (1.0,), 0.3), PixelCodec(5))
    with pytest.raises(ValueError, match=r"codes have no spread, .* encode returns standard deviations above 0"):
        latent_bound(codec, torch.zeros(1, 1, 1, 1, dtype=torch.uint8), of_standard_normal)


def test_statistics_of_another_autoencoder_are_refused() -> None:
    with pytest.raises(ValueError, match="deviations above 0"):
        AutoencoderCodec(OnePixel(), Statistics((0.0,), (0.0,), 0.3), PixelCodec(5))
    codec = AutoencoderCodec(OnePixel(), Statistics((0.0, 0.0), (1.0, 1.0), 0.3), PixelCodec(5))
    with pytest.raises(ValueError, match="codes have 1 channels, but their statistics have 2: give the autoencoder"):
        codec.decode(torch.zeros(1, 1, 1, 1))
