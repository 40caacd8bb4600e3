"""The demo's judge of digits: sure of real ones, and of nothing else."""

import numpy as np

from score_sde.data import load_data
from score_sde.data.codecs import PixelCodec
from score_sde.tasks.demo import confidence
from score_sde.tasks.scan import gaussian_fit


def test_the_judge_is_sure_of_digits_and_not_of_noise_or_of_the_gaussian() -> None:
    data, random = load_data("digits"), np.random.default_rng(0)
    noise = random.integers(0, 17, (500, 8, 8, 1))
    sure, real, _ = confidence(data, noise)
    assert sure == 0 and real > 0.85
    mean, covariance = (v.numpy() for v in gaussian_fit(data.train.x[:], PixelCodec(17)))
    drawn = (random.multivariate_normal(mean.flatten(), covariance, 1000) + 1) / 2
    levels = np.floor(17 * drawn).clip(0, 16).reshape(-1, 8, 8, 1)
    assert 0.05 < confidence(data, levels)[0] < 0.15
    held_out = data.test.x[:].permute(0, 2, 3, 1).numpy()
    sure, real, classes = confidence(data, held_out)
    assert sure == real and classes == 10
