"""One experiment: train with one objective on one data set, then measure what was learned; all of it on disk.

Every measure takes y = x_t/alpha = x_0 + r z, data with noise of a level r = sigma/alpha, so that models of any SDE are
asked the same. They end where r is `SMALLEST`, about a hundredth of the data's size, and samples, densities and
likelihoods are of y there, whose exact density is known.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor

import score_sde
from score_sde import (
    VPSDE,
    Ancestral,
    Heun,
    Sampler,
    ScoreModel,
    log_likelihood,
    losses,
    sample,
    sliced_wasserstein,
    times,
)
from score_sde import config as configs
from score_sde.config.build import build_bound_times
from score_sde.data import load_data
from score_sde.data.codecs import PixelCodec, codec_of
from score_sde.data.toys import EXACT, TOYS
from score_sde.likelihood.chain_bound import chain_bound
from score_sde.machine.parallel import Processes
from score_sde.tasks import checkpoint
from score_sde.tasks.demo import confidence
from score_sde.tasks.results import folder_for, mean_and_error, read_arrays, write_arrays
from score_sde.tasks.train import train

from .subjects import CONFIGS, DATA, OBJECTIVES

VP = VPSDE(t_min=1e-3)  # the SDE in which the truth is computed; y does not depend on it
SMALLEST, LARGEST = math.exp(-VP.log_snr(torch.tensor(1e-3, dtype=torch.float64)).item() / 2), 10.0
LEVELS = torch.logspace(math.log10(SMALLEST), math.log10(LARGEST), 25, dtype=torch.float64)
POINTS, DRAWN = 1000, 2000  # held-out points of each measure, and samples drawn
IMAGES, DIGITS_DRAWN = 200, 300
PROJECTIONS = 64
TERMS = 100  # of a chain's bound, drawn for each image


@dataclass(frozen=True)
class Job:
    """One experiment; the seed decides initial weights, order of the data, times and noise."""

    data: str
    objective: str
    seed: int
    steps: int

    def config(self) -> ConfigDict:
        """The base's with the settings of data set and objective."""
        data, objective = DATA[self.data], OBJECTIVES[self.objective]
        own = {"training.n_iters": str(self.steps), "seed": str(self.seed)}
        quiet = dict.fromkeys(("training.eval_freq", "training.snapshot_freq"), str(self.steps))
        quiet["training.log_freq"] = str(max(self.steps // 10, 1))
        pixels = objective.pixels if self.data == "digits" and objective.pixels else {}
        settings = {**data.settings, **objective.settings, **pixels, **own, **quiet}
        return configs.load(CONFIGS / f"{data.config}.py", settings)

    def folder(self, base: Path) -> Path:
        """Its own for every change of settings, version and measures."""
        measures = [LEVELS.tolist(), POINTS, DRAWN, IMAGES, DIGITS_DRAWN, PROJECTIONS, TERMS]
        made_from = {"config": configs.to_json(self.config()), "version": score_sde.__version__, "measures": measures}
        return folder_for(base, f"{self.data}-{self.objective}-{self.seed}", {**asdict(self), **made_from})


class Result(NamedTuple):
    """What an experiment found: numbers by name, and arrays for the pictures."""

    job: Job
    numbers: dict[str, float]
    arrays: dict[str, np.ndarray]


def read(job: Job, base: Path) -> Result | None:
    """The result on disk, or None."""
    folder = job.folder(base)
    arrays = read_arrays(folder / "arrays.npz")
    if arrays is None or not (folder / "numbers.json").is_file():
        return None
    return Result(job, json.loads((folder / "numbers.json").read_text()), arrays)


def run(job: Job, base: Path, step: Callable[[], None]) -> None:
    """Train and measure, and leave the result on disk; `step` is called after every step of training.

    What an experiment that was stopped has left is put away: steps are timed from the first to the last.
    """
    config, folder = job.config(), job.folder(base)
    shutil.rmtree(folder, ignore_errors=True)
    data = load_data(config.data.dataset)
    codec = codec_of(data.levels, config.data.centered)
    seconds: list[float] = []
    clock = time.process_time()
    for m in train(config, folder, data, codec, Processes(0, 1, torch.device("cpu"))):
        now = time.process_time()
        if not m.scalars and m.checkpoint is None and not m.notes:
            seconds.append(now - clock)
            step()
        clock = now
    model = checkpoint.load(folder)
    numbers, arrays = _measure_digits(model, config) if job.data == "digits" else _measure_plane(model, truth(job.data))
    numbers["milliseconds"] = 1e3 * float(np.median(seconds))
    write_arrays(folder / "arrays.npz", arrays)
    (folder / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")


class Truth(NamedTuple):
    """What is known of a density in the plane, in float64."""

    y: Tensor  # held-out points at every level, (L, N, 2)
    z: Tensor  # their noise, the same at every level, (N, 2)
    noise: Tensor  # E[z | y]
    log_prob: Tensor  # exact log density of y[0], (N,)
    draws: Tensor  # of y at the smallest level, to compare samples with, (M, 2)
    floor: float  # sliced Wasserstein distance of as many exact samples to them as models draw


@lru_cache
def truth(data: str) -> Truth:
    """The truth of a data set of `toys`."""
    exact = EXACT[data](VP)
    x0 = TOYS[data](POINTS, 1).double()
    z = torch.randn(POINTS, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = x0 + LEVELS[:, None, None] * z
    at = [time_of(VP, r) for r in LEVELS.tolist()]
    with torch.no_grad():
        noise = torch.stack([exact(VP.alpha(t) * v, t).noise for t, v in zip(at, y)])
        log_prob = exact.log_prob(VP.alpha(at[0]) * y[0], at[0]) + 2 * VP.alpha(at[0]).log()
    draws = exact_samples(data, 5 * DRAWN, 2)
    floor = np.mean(
        [sliced_wasserstein(exact_samples(data, DRAWN, 3 + i), draws, projections=PROJECTIONS) for i in range(5)]
    )
    return Truth(y, z, noise, log_prob, draws, float(floor))


def exact_samples(data: str, n: int, seed: int) -> Tensor:
    """Samples of y at the smallest level, (n, 2) in float64."""
    z = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return TOYS[data](n, seed).double() + SMALLEST * z


def time_of(sde: score_sde.SDE, level: float) -> Tensor:
    """The time () at which sigma/alpha is `level`."""
    return sde.time(torch.tensor(-2 * math.log(level), dtype=torch.float64)).clamp(max=1.0)


def draw(model: ScoreModel, sampler: Sampler, steps: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Samples of y at the smallest level, by `steps` steps on Karras's grid."""
    end = time_of(model.sde, SMALLEST)
    grid = times.karras(replace(model.sde, t_min=end.item()), steps)
    return sample(model, sampler, shape, grid, seed=seed) / model.sde.alpha(end).float()


def _measure_plane(model: ScoreModel, truth: Truth) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    sde, d = model.sde, 2
    at = [time_of(sde, r) for r in LEVELS.tolist()]
    with torch.no_grad():
        noise = torch.stack([model((sde.alpha(t) * y).float(), t).noise.double() for t, y in zip(at, truth.y)])
    excess = (noise - truth.noise).square().mean((1, 2))  # sigma² |s - s*|²/D
    loss, floor = ((z - truth.z).square().mean((1, 2)) for z in (noise, truth.noise))
    likelihood = log_likelihood(
        model, (sde.alpha(at[0]) * truth.y[0]).float(), probe="exact", t_min=at[0].item(), rtol=1e-4, atol=1e-4
    )
    log_prob = likelihood.log_prob.double() + d * sde.alpha(at[0]).log()
    numbers = {
        "fisher": d / 2 * excess[0].item() / SMALLEST**2,
        "integral": d / 2 * torch.trapezoid(excess, 2 * LEVELS.log()).item(),
        **_log_prob_numbers(log_prob, truth),
    }
    arrays = {"excess": excess.numpy(), "loss": loss.numpy(), "floor": floor.numpy()}
    for name, sampler, steps in (("ode", Heun(), 20), ("sde", Ancestral(), 100)):
        x = draw(model, sampler, steps, (DRAWN, d))
        numbers[f"distance_{name}"] = sliced_wasserstein(x, truth.draws, projections=PROJECTIONS)
        arrays[f"samples_{name}"] = x.numpy()
    return numbers, arrays


def _log_prob_numbers(log_prob: Tensor, truth: Truth) -> dict[str, float]:
    """Mean log density of held-out points, and how far it is below the truth's: the Kullback-Leibler divergence."""
    gap, error = mean_and_error((truth.log_prob - log_prob).numpy())
    return {"log_prob": log_prob.mean().item(), "divergence": gap, "divergence_error": error}


def _measure_digits(model: ScoreModel, config: ConfigDict) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    data = load_data("digits")
    codec = PixelCodec(17)
    sde, k = model.sde, data.test.x[torch.arange(len(data.test.x))]
    levels = not config.data.uniform_dequantization  # trained on the levels themselves, to decode them
    x0 = codec.encode(k, None if levels else torch.rand(k.shape, generator=torch.Generator().manual_seed(0)))
    z = torch.randn(k.shape, generator=torch.Generator().manual_seed(1))
    at = [time_of(sde, r) for r in LEVELS.tolist()]
    with torch.no_grad():
        loss = torch.stack([losses.denoising(model, x0, t.expand(len(x0)), z, losses.simple).mean() for t in at])
    if levels:  # they have no density, and the model's likelihood is that of its chain, by the bound
        chain, variance = build_bound_times(config, sde), config.sampling.variance
        each = chain_bound(
            model, x0[:IMAGES], chain, variance=variance, levels=codec.levels, terms=TERMS
        ).bits_per_dim()
    else:
        likelihood = log_likelihood(model, x0[:IMAGES], t_min=at[0].item(), rtol=1e-3, atol=1e-3)
        each = likelihood.bits_per_dim(codec.levels, codec.width * codec.filled)
    bits, error = mean_and_error(each.double().numpy())
    x = codec.decode(draw(model, Heun(), 20, (DIGITS_DRAWN, *data.shape)))
    sure, _, classes = confidence(data, x.permute(0, 2, 3, 1).numpy())
    numbers = {
        "bits_per_dim": bits,
        "bits_per_dim_error": error,
        "distance_ode": sliced_wasserstein(x / 16, k / 16, projections=PROJECTIONS),
        "sure": sure,
        "classes": float(classes),
    }
    return numbers, {"loss": loss.double().numpy(), "samples_ode": x.numpy()}
