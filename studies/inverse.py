"""Held-out images degraded and restored by every method: ``python -m studies.inverse --config configs/NAME.py``.

``--workdir DIR`` has the trained model. Three tables over the tasks: PSNR from the truth, PSNR of the mean of the
seeds' samples, and the distance from the truth in the features of a classifier of real images; each beside what was
seen, an unguided run, and another image. The sampler is that of the section sampling, the tasks' settings those of
inverse.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor
from torch.nn.functional import interpolate

from benchmarks.judges import judge
from benchmarks.laws import spread
from benchmarks.timing import Table, machine
from score_sde import config as configs
from score_sde import load, sample
from score_sde.config.build import build_sampler, build_times
from score_sde.data import load_data
from score_sde.data.codecs import PixelCodec
from score_sde.inverse import Average, Blur, Grey, Mask, Observation, Spectral, observe
from score_sde.metrics import psnr
from score_sde.models.base import ScoreModel
from score_sde.tasks.latents import as_in_training
from score_sde.tasks.restore import METHODS, restore, shown

Look = Callable[[Tensor], Tensor]  # uint8 levels (N, C, H, W) -> (N, D)
DEBLUR_NOISE = 0.02  # where black to white is 1: without any, deblurring is a division by almost nothing


def tasks(config: ConfigDict, shape: tuple[int, ...]) -> dict[str, Spectral]:
    """The tasks: a square in the middle to be filled, half as wide as the image, and those of the section inverse."""
    channels, height, width = shape
    known = torch.ones(height, width, dtype=torch.bool)
    known[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = False
    found: dict[str, Spectral] = {"inpaint": Mask(known)}
    if channels == 3:
        found["colorize"] = Grey(torch.full((3,), 1 / 3, dtype=torch.float64))
    found[f"superresolve {config.inverse.factor}"] = Average(config.inverse.factor)
    found["deblur"] = Blur.gaussian(config.inverse.blur)
    return found


def features_of(dataset: str, path: str) -> Look | None:
    """Features by the judge of digits or of CIFAR-10, whose training takes minutes once; None for other data."""
    return judge(dataset, path or None).features if dataset in ("digits", "cifar10") else None


def relative_distance(features: Look, k: Tensor, truth: Tensor) -> float:
    """Root mean square distance of images from their truths in features, over that of truths from other truths."""
    a, b = features(k), features(truth)
    return float((a - b).square().sum(1).mean().sqrt() / (b - b.roll(1, 0)).square().sum(1).mean().sqrt())


class Scores:
    """What samples of one method score on one task, seed by seed."""

    def __init__(self, truth: Tensor, codec: PixelCodec, features: Look | None) -> None:
        self.truth, self.codec, self.features = truth, codec, features
        self.psnr: list[float] = []
        self.distance: list[float] = []
        self.samples: list[Tensor] = []

    def _psnr(self, k: Tensor) -> float:
        top = self.codec.levels - 1
        return float(psnr(self.truth.double() / top, k.double() / top).mean())

    def add(self, x: Tensor) -> Tensor:
        k = self.codec.decode(x)
        self.psnr.append(self._psnr(k))
        if self.features is not None:
            self.distance.append(relative_distance(self.features, k, self.truth))
        self.samples.append(k)
        return k

    @property
    def of_mean(self) -> float:
        return self._psnr(torch.stack(self.samples).double().mean(0))


def measure(
    model: ScoreModel, config: ConfigDict, methods: list[str], images: int, seeds: int, save: Path | None
) -> list[Table]:
    d = config.data
    data = load_data(d.dataset, d.path or None, image_size=d.image_size or None, num_channels=d.num_channels or None)
    if data.levels is None:
        raise ValueError(f"these are tasks of images, and data.dataset={d.dataset} holds floats")
    codec, features = PixelCodec(data.levels, d.centered), features_of(d.dataset, d.path)
    truth = data.test[torch.arange(images)][0]
    x0 = as_in_training(truth, codec, config, 0)
    grid, listed = build_times(config, model.sde, model, data.shape), tasks(config, data.shape)
    found: dict[tuple[str, str], Scores] = {}
    seconds: dict[str, list[float]] = {}
    kept: dict[str, np.ndarray] = {"truth": truth.numpy()}

    def score(who: str, task: str, x: Tensor) -> None:
        k = found.setdefault((who, task), Scores(truth, codec, features)).add(x)
        kept[f"{task}, {who}, {len(found[who, task].psnr)}"] = k.numpy()

    for task, operator in listed.items():
        noise = codec.width * max(config.inverse.noise, DEBLUR_NOISE if task == "deblur" else 0.0)
        observation = observe(operator, x0, noise, torch.Generator().manual_seed(config.eval.seed))
        score("what is seen", task, shown(observation, x0))
        if isinstance(operator, Average):
            large = interpolate(observation.y, size=data.shape[1:], mode="bicubic", align_corners=False)
            score("bicubic", task, large)
        score("another image", task, x0.roll(1, 0))
        for method in methods:
            for seed in range(seeds):
                config.inverse.method, config.sampling.seed = method, seed
                own = observation
                if method == "twisted" and noise == 0:
                    own = Observation(operator, observation.y, codec.width / (codec.levels * math.sqrt(12)))
                began = time.process_time()
                score(method, task, restore(model, config, own, data.shape, grid, 0))
                seconds.setdefault(method, []).append((time.process_time() - began) / images)
    for seed in range(seeds):
        began, sampler = time.process_time(), build_sampler(config)
        x = sample(model, sampler, (images, *data.shape), grid, seed=seed, denoise=True)
        seconds.setdefault("no guidance", []).append((time.process_time() - began) / images)
        for task in listed:
            score("no guidance", task, x)
    if save is not None:
        np.savez_compressed(save, **kept)  # type: ignore[arg-type]
    rows = ["what is seen", "bicubic", "another image", "no guidance", *methods]

    def table(title: str, cell: Callable[[Scores], str], notes: list[str]) -> Table:
        cells = [(w, *(cell(found[w, t]) if (w, t) in found else "" for t in listed)) for w in rows]
        return Table(title, ("", *listed), cells, notes)

    about = [
        f"{images} held-out images, {len(grid) - 1} steps; mean and standard deviation over {seeds} seeds",
        "CPU seconds an image: " + ", ".join(f"{m} {min(values):.3g}" for m, values in seconds.items()),
    ]
    tables = [
        table("PSNR from the truth, dB", lambda s: spread(s.psnr), about),
        table("PSNR of the mean of the seeds' samples, dB", lambda s: f"{s.of_mean:.3g}", []),
    ]
    if features is not None:
        note = ["1 is the distance of one image from another"]
        tables.append(table("Distance in a classifier's features, relative", lambda s: spread(s.distance), note))
    return tables


def main(arguments: list[str]) -> None:
    rest, overrides = configs.split_arguments(arguments)
    p = argparse.ArgumentParser("python -m studies.inverse", description=__doc__.partition("\n")[0])
    p.add_argument("--config", required=True)
    p.add_argument("--workdir", required=True, help="of a model trained with that config")
    p.add_argument("--images", type=int, default=100)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    p.add_argument("--save", type=Path, help="an .npz for all results")
    options = p.parse_args(rest)
    config = configs.load(options.config, overrides)
    model = load(options.workdir, ema=config.eval.weights == "ema")
    torch.set_num_threads(1)
    print(machine(torch.device("cpu")))
    for table in measure(model, config, options.methods, options.images, options.seeds, options.save):
        print(f"\n{table}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
