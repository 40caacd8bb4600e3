"""The demo's judge of digits: sure of real ones, and of nothing else."""

import sys
from pathlib import Path

import numpy as np

from score_sde.data import load_data
from score_sde.data.codecs import PixelCodec
from score_sde.tasks.commands import as_options
from score_sde.tasks.demo import confidence, summary
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


def test_the_commands_that_it_names_are_those_of_this_environment() -> None:
    data, workdir = load_data("digits"), Path("runs/mine")
    result = {"images": 3, "mean": 1.8, "standard_error": 0.1}
    text = summary(data, PixelCodec(17), workdir, np.zeros((2, 8, 8, 1), np.uint8), workdir / "samples", result, 60.0)
    commands = [line.strip().split("   ")[0].split() for line in text.splitlines() if "bin/" in line]
    assert all(Path(program).absolute().parent == Path(sys.executable).parent for program, *_ in commands)
    named = [words[1:] for words in commands if words[0].endswith("score_sde")]
    assert [as_options(words)[:2] for words in named] == [
        ["--mode", "sample"],
        ["--mode", "train"],
        ["--mode", "train"],
    ]
    assert named[0][1:3] == ["--workdir", str(workdir)]
