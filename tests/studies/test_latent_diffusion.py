"""The benchmark of codes against pixels: what its scores say of real digits, and the autoencoder's bound alone."""

import pytest
import torch
from torch import nn

from benchmarks.judges import Judge
from score_sde.data import load_data
from score_sde.data.codecs import AutoencoderCodec, PixelCodec, Statistics
from score_sde.models.autoencoder import ConvolutionalAutoencoder
from studies.latent_diffusion import Scores, autoencoder_alone


def test_real_digits_score_high_and_noise_does_not(digits_judge: Judge) -> None:
    data, scores = load_data("digits32"), Scores(digits_judge, load_data("digits32", image_size=8))
    noise = torch.randint(0, 17, (300, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (sure, distance, _), (noisy, far, _) = scores.of([data.test.x]), scores.of([noise])  # type: ignore[list-item]
    assert float(sure) > 80 > 20 > float(noisy) and float(far) > 20 * float(distance)
    assert scores.of([noise, noise], "3")[0].endswith("± 0.0") and scores.of([noise], "3")[2] == "3"


def test_the_autoencoder_s_own_bound_does_not_depend_on_its_codes_statistics() -> None:
    torch.manual_seed(0)
    own = ConvolutionalAutoencoder(nn.Conv2d(1, 4, 3, 2, 1), nn.ConvTranspose2d(2, 1, 2, 2)).requires_grad_(False)
    data = load_data("digits")
    plain, moved = (
        autoencoder_alone(AutoencoderCodec(own, Statistics(mean, std, 0.3), PixelCodec(17)), data, 10)
        for mean, std in (((0.0, 0.0), (1.0, 1.0)), ((0.3, -2.0), (2.0, 0.1)))
    )
    assert moved["value"][0] == pytest.approx(plain["value"][0], rel=1e-4)
    assert abs(moved["latent"][0] - plain["latent"][0]) > 0.01
    assert moved["latent"][0] - moved["entropy"][0] == pytest.approx(plain["latent"][0] - plain["entropy"][0], rel=1e-3)
