"""The statistics of `scan` against numpy and scipy, its Gaussian against the closed form, its warnings."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from ml_collections import ConfigDict

from score_sde.config import default_config
from score_sde.data import Data, Split, load_data
from score_sde.data.codecs import PixelCodec, VectorCodec
from score_sde.data.files import Stream
from score_sde.tasks import scan as module
from score_sde.tasks.scan import disagreements, gaussian_fit, gaussian_log_prob, largest_distance, scan


def dataset(x: torch.Tensor, levels: int | None = 256) -> Data:
    return Data(Split(x[: len(x) * 4 // 5]), Split(x[len(x) * 4 // 5 :]), levels)


def uint8(n: int, *shape: int, high: int = 256) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, high, (n, *shape), dtype=np.uint8))


@pytest.mark.parametrize("centered", [True, False])
def test_statistics_are_numpys(centered, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 1000)  # several chunks
    data = dataset(uint8(200, 3, 5, 4, high=200))
    report = scan(data, PixelCodec(256, centered))
    x = data.train.x.numpy() / 255 * (2 if centered else 1) - (1 if centered else 0)
    # encoding is in float32
    assert report.mean == pytest.approx(x.mean(), abs=1e-7)
    assert report.std == pytest.approx(x.std(), rel=1e-6)
    assert report.rms == pytest.approx(np.sqrt((x**2).mean()), rel=1e-6)
    assert report.range == pytest.approx((x.min(), x.max()), rel=1e-6)
    assert report.stored == (data.train.x.min(), data.train.x.max())
    distances = scipy.spatial.distance.pdist(x.reshape(len(x), -1))
    assert report.largest_distance == pytest.approx(distances.max(), rel=1e-6)
    assert report.sigma_min == pytest.approx(0.01 * (x.max() - x.min()), rel=1e-6)
    assert report.gaussian is not None


def test_gaussian_log_prob_is_scipys():
    random = np.random.default_rng(0)
    a, mean, x = random.standard_normal((6, 6)), random.standard_normal(6), random.standard_normal((20, 6))
    cov = a @ a.T + np.eye(6)
    ours = gaussian_log_prob(
        torch.from_numpy(x).reshape(20, 2, 3), torch.from_numpy(mean).reshape(2, 3), torch.from_numpy(cov)
    )
    np.testing.assert_allclose(ours.numpy(), scipy.stats.multivariate_normal(mean, cov).logpdf(x), rtol=1e-12)


def test_gaussian_fit_is_the_sample_mean_and_covariance(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 50)
    x = 1e3 + torch.randn(300, 2, 2, generator=torch.Generator().manual_seed(0))  # far from the origin
    mean, cov = gaussian_fit(x, VectorCodec())
    assert mean.shape == (2, 2)
    np.testing.assert_allclose(mean.numpy(), x.double().mean(0).numpy(), rtol=1e-14)
    np.testing.assert_allclose(
        cov.numpy(), np.cov(x.double().reshape(300, 4).numpy().T, bias=True), rtol=1e-9, atol=1e-12
    )


def test_gaussian_fit_dequantises():
    k = torch.full((40_000, 3), 7, dtype=torch.uint8)
    k[:, 1] = uint8(40_000, 1)[:, 0]
    mean, cov = gaussian_fit(k, PixelCodec(256, centered=True))
    variance = (2 / 256) ** 2 / 12
    # a constant pixel has the mean and variance of its bin, a uniform one those of [-1, 1], to 5 standard errors
    assert mean[0].item() == pytest.approx(2 * 7.5 / 256 - 1, abs=5 * math.sqrt(variance / 40_000))
    assert cov[0, 0].item() == pytest.approx(variance, rel=5 * math.sqrt(0.8 / 40_000))
    assert mean[1].item() == pytest.approx(0, abs=5 * math.sqrt(1 / 3 / 40_000))
    assert cov[1, 1].item() == pytest.approx(1 / 3, rel=5 * math.sqrt(0.8 / 40_000))


def test_gaussian_baseline_of_gaussian_vectors_is_their_entropy():
    d, n = 4, 20_000
    factor = torch.from_numpy(np.random.default_rng(0).standard_normal((d, d)))
    z = torch.from_numpy(np.random.default_rng(1).standard_normal((n, d)))
    report = scan(dataset((z @ factor.T).float(), None), VectorCodec())
    entropy = (d * math.log(2 * math.pi * math.e) / 2 + torch.linalg.slogdet(factor).logabsdet.item()) / d
    value, error = report.gaussian
    assert error == pytest.approx(math.sqrt(d / 2) / d / math.sqrt(n / 5), rel=0.05)  # the density's log is -chi²_d / 2
    # the fit costs (d² + 3 d) / (4 n_train) nats more, 4e-4 / d
    assert abs(value - entropy) < 4 * error


def test_gaussian_baseline_of_coarse_gaussian_pixels_is_their_entropy_in_bits():
    """Rounded N(128, 20²): in units of a level the density's entropy is log2(20 sqrt(2 pi e)) bits."""
    z = np.random.default_rng(0).standard_normal((20_000, 1, 2, 2))
    k = torch.from_numpy(np.rint(128 + 20 * z).clip(0, 255).astype(np.uint8))
    for centered in (True, False):
        value, error = scan(dataset(k), PixelCodec(256, centered)).gaussian
        # dequantisation adds 1/12 to a variance of 400 + 1/12, 3e-4 bits
        exact = math.log2(math.sqrt(400 + 1 / 6) * math.sqrt(2 * math.pi * math.e))
        assert abs(value - exact) < 4 * error
        assert 0.004 < error < 0.01


def test_no_baseline_where_none_can_be_fitted(monkeypatch):
    few = scan(dataset(uint8(20, 1, 6, 6)), PixelCodec())
    assert few.gaussian is None
    assert "none: it needs at most 4096 dimensions" in str(few)
    assert scan(dataset(torch.ones(50, 3), None), VectorCodec()).gaussian is None  # singular
    monkeypatch.setattr(module, "_DIMENSIONS", 8)
    assert scan(dataset(uint8(100, 9)), PixelCodec()).gaussian is None


@pytest.mark.parametrize("n, d", [(1, 3), (2, 1), (300, 2), (500, 30)])
def test_largest_distance_is_the_largest(n, d):
    random = np.random.default_rng(n)
    x = random.standard_normal((n, d)) * random.exponential(size=(n, 1))
    exact = scipy.spatial.distance.cdist(x, x).max()
    found = largest_distance(torch.from_numpy(x).float(), VectorCodec())
    assert found == (pytest.approx(exact, rel=1e-6), True)


def test_a_bound_on_the_largest_distance_says_so(monkeypatch):
    monkeypatch.setattr(module, "_FARTHEST", 50)
    x = torch.nn.functional.normalize(torch.randn(2000, 30, generator=torch.Generator().manual_seed(0)))
    distance, exact = largest_distance(x, VectorCodec())  # on a sphere nothing can be left out
    true = scipy.spatial.distance.pdist(x.double().numpy()).max()
    assert not exact
    assert 0.9 * true < distance <= true * (1 + 1e-6)
    assert ", at least: only the farthest from the mean were compared" in str(scan(dataset(x, None), VectorCodec()))


def test_digits():
    data = load_data("digits")
    report = scan(data, PixelCodec(17))
    # 2.964 ± 0.036 was measured with other dequantisation noise; the fit's and the evaluation's move it by some 0.005
    assert report.gaussian[0] == pytest.approx(2.964, abs=0.015)
    assert report.gaussian[1] == pytest.approx(0.038, abs=0.006)
    assert (report.std, report.rms) == (pytest.approx(0.7515, abs=1e-4), pytest.approx(0.8468, abs=1e-4))
    text = str(report)
    for part in (
        "1497 to train on, 300 held out",
        "1 x 8 x 8, 10 classes",
        "-1 to 1, on file 0 to 16 of 17 levels",
        "4.087 bits/dim",
        "{:.3f} ± {:.3f} bits/dim on the held-out examples, dequantised with seed 1".format(*report.gaussian),
        "--config.model.sigma_data=0.847",
        "--config.model.sigma_max=9.63",
        "--config.model.sigma_min=0.02",
    ):
        assert part in text


def test_streams_are_scanned_in_part_and_it_says_so(monkeypatch):
    monkeypatch.setattr(module, "_STREAM", 40 * 12 * 4)
    x = uint8(200, 3, 2, 2)
    stream = Split(Stream((200, 3, 2, 2), lambda index: x[list(index)]))
    report = scan(Data(stream, Split(x[:10])), PixelCodec())
    assert report.scanned == (40, 10)
    assert "200 to train on, 10 held out; looked at 40 and 10, chosen with seed 0" in str(report)


def config_of(size: int = 0, channels: int = 0, sigma_data: float = 0.0, sigma_max: float = 0.0) -> ConfigDict:
    """A config of images, whose model uses the noise levels that are not 0."""
    config = default_config()
    config.data.image_size, config.data.num_channels = size, channels
    if sigma_data:
        config.model.rule, config.model.sigma_data = "edm", sigma_data
    if sigma_max:
        config.training.sde, config.model.sigma_max = "vesde", float(sigma_max)
    return config


def test_agreement_is_silent():
    data = load_data("digits")
    fits = disagreements(data, PixelCodec(17), config_of(8, 1, sigma_data=0.8, sigma_max=9))
    assert fits == disagreements(load_data("moons"), VectorCodec(), config_of(32, 3)) == []


def test_disagreements_are_named():
    digits = load_data("digits")
    config = config_of(32, 3, sigma_data=0.4, sigma_max=1.0)
    channels, size, data_sigma, max_sigma = disagreements(digits, PixelCodec(17), config)
    assert channels == "the images have 1 channels, but data.num_channels=3"
    assert size == "the images are 8 x 8, but data.image_size=32"
    assert data_sigma.startswith("the data's root mean square is 0.84")
    assert "model.sigma_data=0.4" in data_sigma
    assert "model.sigma_max=1 leaves modes apart" in max_sigma
    (dark,) = disagreements(dataset(uint8(50, 1, 4, 4, high=2)), PixelCodec(), config_of())
    assert dark == "pixels reach 1 of 255: if that is their white, multiply them by 255"
    (scale,) = disagreements(dataset(torch.rand(50, 3) * 255, None), VectorCodec(), config_of())
    assert "root mean square is" in scale
    assert "divide the data by it" in scale


def test_held_out_noise_is_not_the_noise_that_was_fitted():
    """Constant images are noise alone: log2(sqrt(2 pi e / 12)) bits under their Gaussian, more under a fit."""
    k = torch.full((250, 1, 8, 8), 7, dtype=torch.uint8)
    value, _ = scan(dataset(k), PixelCodec()).gaussian
    assert value > math.log2(math.sqrt(2 * math.pi * math.e / 12)) + 0.1  # its own noise would have less, not more
