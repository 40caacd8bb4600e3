"""``python -m studies.averages [--fill]``: how long an average of the weights should be, measured on digits.

A short `vp_digits` is trained with power averages, once as it is and once with a constant learning rate; what is
trained already is not trained again. For each width the average is made afterwards of the run's checkpoints, and
judged by the bits/dim of the held-out digits (`--mode likelihood --config.sampling.ema=WIDTH`) and by its samples: of
how many a classifier of real digits is more than 90 % sure, and how far they lie from the training images in the
features of another (the Fréchet distance, `benchmarks.judges`). Beside them the average that training keeps in any
case, and the raw weights.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from benchmarks.judges import Judge, judge
from benchmarks.pages import DOCS, cell, fill, picture, table
from benchmarks.timing import machine
from score_sde import cli, load, recommended, sample
from score_sde.data import Data, load_data
from score_sde.data.codecs import PixelCodec
from score_sde.models.base import ScoreModel
from score_sde.tasks import checkpoint
from score_sde.tasks.averages import combination
from score_sde.tasks.demo import confidence

RUNS = {"the learning rate falls to 0": 0.3, "constant learning rate": 0.0}  # by optim.decay
WIDTHS = (0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25)
SHORT = {  # less than a third of the config's images, and a half-life that is as much shorter
    "training.n_iters": 1500,
    "training.batch_size": 64,
    "training.snapshot_freq": 50,
    "model.ema_halflife": 9000,
}
EVALUATIONS = 20


@dataclass(frozen=True)
class Quality:
    """What was found of some weights: bits/dim of each image (N,), shares and distances of each seed's samples."""

    bits: np.ndarray
    sure: list[float]
    distance: list[float]


def train(workdir: Path, decay: float) -> Path:
    """Train `vp_digits` with power averages and this optim.decay, unless that is done; returns the last checkpoint."""
    settings = {**SHORT, "model.ema_power": True, "optim.decay": decay, "training.keep_every": 1}
    settings |= {"training.snapshot_sampling": False}
    line = ["--config", "configs/vp_digits.py", "--mode", "train", "--workdir", str(workdir)]
    found = checkpoint.newest(workdir)[0]
    unfinished = found is None or found.step < SHORT["training.n_iters"]
    if unfinished and cli.run([*line, *(f"--config.{key}={value}" for key, value in settings.items())]):
        raise SystemExit(1)
    return checkpoint.find(workdir).path


def bits(path: Path, ema: bool | float) -> np.ndarray:
    """Bits/dim of each held-out digit, (N,), by --mode likelihood."""
    name, workdir = checkpoint.weights_name(ema), path.parent.parent
    weights = f"--config.eval.weights={name}" if isinstance(ema, bool) else f"--config.sampling.ema={ema}"
    options = [weights, "--config.eval.check_images=0", "--config.eval.rtol=1e-3", "--config.eval.atol=1e-3"]
    if cli.run(["--mode", "likelihood", "--checkpoint", str(path), *options]):
        raise SystemExit(1)
    (found,) = (workdir / "likelihood").glob(f"{path.stem}-{name}-*/likelihood.npz")
    with np.load(found) as stored:
        values: np.ndarray = stored["bits_per_dim"].mean(1)
    return values


def drawn(model: ScoreModel, data: Data, count: int, seed: int) -> Tensor:
    """Samples as the data set has its images, uint8."""
    assert data.levels is not None
    sampler, times = recommended(replace(model.sde, t_min=1e-3), EVALUATIONS)
    shape = (count, *data.shape)
    return PixelCodec(data.levels).decode(sample(model, sampler, shape, times, seed=seed, denoise=True))


def quality(path: Path, ema: bool | float, *, data: Data, who: Judge, count: int, seeds: int) -> Quality:
    """Bits/dim and samples of a checkpoint with these weights, see `load`."""
    samples = [drawn(load(path, ema=ema), data, count, seed) for seed in range(seeds)]
    sure = [100 * confidence(data, k.permute(0, 2, 3, 1).numpy())[0] for k in samples]
    return Quality(bits(path, ema), sure, [who.distance(k) for k in samples])


def row(name: str, off: str, found: Quality, usual: Quality) -> list[str]:
    """A row of the table; bits/dim are compared with the `usual` weights' image by image."""
    gain, n = found.bits - usual.bits, math.sqrt(len(found.bits))
    difference = f"{gain.mean():+.4f} ± {gain.std(ddof=1) / n:.4f}" if found is not usual else ""
    return [name, off, f"{found.bits.mean():.4f}", difference, cell(found.sure, 1), cell(found.distance, 3)]


def steps_of(path: Path) -> list[int]:
    """Steps of the run's checkpoints up to this one."""
    return [int(each.stem) for each in checkpoint.checkpoints(path.parent.parent) if int(each.stem) <= int(path.stem)]


def curves(found: dict[str, dict[float, Quality]]) -> plt.Figure:
    """Bits/dim and Fréchet distance against the width, for each run."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name, by_width in found.items():
        widths = list(by_width)
        axes[0].plot(widths, [each.bits.mean() for each in by_width.values()], "o-", label=name)
        spread = np.array([each.distance for each in by_width.values()])
        axes[1].errorbar(widths, spread.mean(1), spread.std(1, ddof=1 if spread.shape[1] > 1 else 0), marker="o")
    for axis, label in zip(axes, ("bits/dim", "Fréchet distance")):
        axis.set(xlabel="relative width of the average", ylabel=label)
    axes[0].legend()
    return figure


def tabled(steps: list[int], usual: Quality, raw: Quality, by_width: dict[float, Quality]) -> str:
    """The table of a run with checkpoints at these steps."""
    rows = [row("`ema_halflife` of the config", "", usual, usual), row("raw weights", "", raw, usual)]
    for width, found in by_width.items():
        rows.append(row(f"width {width:g}", f"{100 * combination(steps, width).error:.2g} %", found, usual))
    head = ["weights", "profile off by", "bits/dim", "less the first's", "like digits, %", "Fréchet distance"]
    return table(head, rows)


def run(runs: Path, count: int, seeds: int, images: Path) -> dict[str, str]:
    """Train what is not trained yet, judge each width, and return the page's blocks."""
    data, who = load_data("digits"), judge("digits")
    blocks, by_run = list[str](), dict[str, dict[float, Quality]]()
    for name, decay in RUNS.items():
        path = train(runs / f"averages-{decay:g}", decay)
        steps, judged = steps_of(path), partial(quality, path, data=data, who=who, count=count, seeds=seeds)
        by_run[name] = {width: judged(width) for width in WIDTHS}
        blocks.append(f"{name[0].upper()}{name[1:]} (`optim.decay={decay:g}`), {len(steps)} checkpoints:\n")
        blocks.append(tabled(steps, judged(True), judged(False), by_run[name]))
    _, real, _ = confidence(data, np.zeros((1, 8, 8, 1)))
    blocks.append(
        f"One training run each. Shares and distances: {count} samples for each of {seeds} seeds, mean ± "
        f"standard deviation over them; held-out digits have {100 * real:.1f} % and {who.distance(who.test):.3f}. "
        "Bits/dim: the 300 held-out digits; the errors of differences are over them.\n\n"
        f"{machine(torch.device('cpu'))}.\n"
    )
    shown = picture(curves(by_run), images / "averages.png", "bits/dim and Fréchet distance against the width")
    return {"widths": "\n".join(blocks), "curves": shown}


def main() -> None:
    p = argparse.ArgumentParser("python -m studies.averages", description=__doc__.partition("\n")[0])
    p.add_argument("--runs", type=Path, default=Path("runs"), help="where the workdirs are")
    p.add_argument("--samples", type=int, default=300)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--fill", action="store_true", help="put the results into docs/averages.md, with a picture")
    options = p.parse_args()
    torch.set_num_threads(1)
    blocks = run(options.runs, options.samples, options.seeds, DOCS / "images" if options.fill else options.runs)
    print("\n".join(blocks.values()))
    if options.fill:
        fill(DOCS / "averages.md", blocks)


if __name__ == "__main__":
    main()
