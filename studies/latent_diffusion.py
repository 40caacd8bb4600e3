"""``python -m studies.latent_diffusion [--fill]``: a model of codes against one of pixels, at equal training time.

Digits of 32x32. The autoencoder, the model of its codes and the model of pixels are trained by their configs, the last
for as many CPU seconds as the other two took together; what is there already is not trained again. Both draw by the
same sampler. Samples are shrunk to 8x8 and shown to classifiers of real digits, shrunk likewise: of how many one is
more than 90 % sure, and how far they lie from the training images in the features of another (the Fréchet distance,
`benchmarks.judges`). Beside them real held-out digits, these after the autoencoder, what the autoencoder alone draws,
and chance: draws of the Gaussian fitted to the training pixels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ml_collections import ConfigDict
from torch import Tensor

from benchmarks.judges import Judge, frechet, judge
from benchmarks.pages import DOCS, cell, fill, table
from benchmarks.timing import machine
from score_sde import cli, load, sample
from score_sde import config as configs
from score_sde.config.build import build_sampler, build_times
from score_sde.config.kinds import kind_of
from score_sde.data import Data, load_data, shrink
from score_sde.data.codecs import AutoencoderCodec, Codec, PixelCodec, codec_of
from score_sde.likelihood.code_bound import in_bits, latent_bound, of_standard_normal
from score_sde.machine.parallel import Processes
from score_sde.metrics import psnr
from score_sde.models.base import ScoreModel
from score_sde.tasks import checkpoint
from score_sde.tasks.codes import codec_from, open_autoencoder
from score_sde.tasks.demo import confidence
from score_sde.tasks.job import Job
from score_sde.tasks.likelihood import run_likelihood
from score_sde.tasks.pictures import grid, write_png
from score_sde.tasks.results import mean_and_error
from score_sde.tasks.scan import gaussian_fit
from score_sde.tasks.step import Batches, make_state, train_step

AUTOENCODER, LATENT, PIXELS = "autoencoder_digits32", "latent_digits32", "vp_digits32"
CPU = torch.device("cpu")
QUIET = ["--config.training.snapshot_sampling=false", "--config.training.eval_freq=1000000"]


class Trained(NamedTuple):
    """A config that has been trained, where, and in how many CPU seconds."""

    config: ConfigDict
    workdir: Path
    seconds: float


def train(name: str, runs: Path, *more: str) -> Trained:
    """Train a config by the command line, unless that is done; the workdir keeps the CPU seconds of all its runs."""
    workdir, overrides = runs / name, [*QUIET, *more]
    kept = workdir / "seconds.json"
    before = json.loads(kept.read_text())["cpu_seconds"] if kept.is_file() else 0.0
    line = ["--config", f"configs/{name}.py", "--workdir", str(workdir), *overrides]
    config = configs.load(f"configs/{name}.py", configs.split_arguments(overrides)[1])
    found = checkpoint.newest(workdir)[0]
    if found is None or found.card is None or found.card.step < config.training.n_iters:
        began = time.process_time()
        code = cli.run([*line, "--mode", "train"])
        before += time.process_time() - began
        kept.write_text(json.dumps({"cpu_seconds": before}))
        if code:
            raise SystemExit(code)
    return Trained(config, workdir, before)


def steps_in(seconds: float, name: str, data: Data) -> int:
    """How many training steps of a config on these data fit into so many CPU seconds, by the median of ten."""
    config = configs.load(f"configs/{name}.py")
    codec = codec_of(data.levels, config.data.centered)
    state = make_state(config, data.shape, CPU)
    objective, taken = kind_of(config).objective(state.model, config, codec), list[float]()
    assert isinstance(state.model, ScoreModel)
    for step in range(13):
        began = time.process_time()
        b = Batches(config, codec, state.model.sde).draw(data.train, step)
        train_step(state, objective, b, config)
        taken.append(time.process_time() - began)
    return max(int(seconds / statistics.median(taken[3:])), 1)


def drawn(
    trained: Trained, model: ScoreModel, codec: Codec, shape: tuple[int, ...], count: int, seed: int
) -> tuple[Tensor, float]:
    """uint8 samples by the config's sampler, and CPU seconds a sample, decoding included."""
    config, parts = trained.config, list[Tensor]()
    sampler, times = build_sampler(config), build_times(config, model.sde)
    began = time.process_time()
    for first in range(0, count, 100):
        size = (min(100, count - first), *shape)
        parts.append(codec.decode(sample(model, sampler, size, times, seed=seed, first=first, denoise=True)))
    return torch.cat(parts), (time.process_time() - began) / count


class Scores:
    """What classifiers of real digits say of images of 32x32, seed by seed."""

    def __init__(self, features: Judge, real: Data) -> None:
        assert isinstance(real.train.x, Tensor)
        self.judge, self.real, self.truth = features, real, features.features(real.train.x)

    def of(self, samples: list[Tensor], seconds: str = "") -> list[str]:
        small = [shrink(k, 4) for k in samples]
        sure = [100 * confidence(self.real, k.permute(0, 2, 3, 1).numpy())[0] for k in small]
        distance = [frechet(self.judge.features(k), self.truth) for k in small]
        return [cell(sure, 1), cell(distance, 2), seconds]


def bits(trained: Trained, model: ScoreModel, codec: Codec, data: Data, images: int) -> dict[str, Any]:
    """The stamp of --mode likelihood, by the ODE, for the first held-out images."""
    config = trained.config
    with config.unlocked():
        config.eval.update(num_images=images, batch_size=25, check_images=5, rtol=1e-3, atol=1e-3)
    found, one = checkpoint.find(trained.workdir), Processes(0, 1, CPU)
    assert found.card is not None
    job = Job(model, config, codec, found, found.card.shape, trained.workdir, one)
    return run_likelihood(job, data.test)[1]


def autoencoder_alone(codec: AutoencoderCodec, data: Data, images: int) -> dict[str, tuple[float, float]]:
    """The autoencoder's bound under the prior of its training, in bits/dim: mean and error."""
    statistics_ = codec.statistics

    def prior(y: Tensor) -> Any:
        shape = (1, -1, 1, 1)
        std, mean = (torch.tensor(v).to(y).reshape(shape) for v in (statistics_.std, statistics_.mean))
        found = of_standard_normal(std * y + mean)
        places = y[0, 0].numel()
        return found._replace(log_prob=found.log_prob + places * std.log().sum())

    k = data.test[torch.arange(images)][0]
    found = in_bits(latent_bound(codec, k, prior), k[0].numel())
    return {name: mean_and_error(value.double().numpy()) for name, value in found.items()}


def run(runs: Path, count: int, seeds: int, images: int, picture: Path | None) -> dict[str, str]:
    """Train what is not there, measure, and return the page's blocks."""
    data, real = load_data("digits32"), load_data("digits32", image_size=8)
    assert isinstance(data.test.x, Tensor) and isinstance(data.train.x, Tensor)
    pixels = PixelCodec(17)
    first = train(AUTOENCODER, runs)
    where = f"--config.data.autoencoder={first.workdir}"
    second = train(LATENT, runs, where)
    kept = runs / PIXELS / "steps.json"
    if kept.is_file():
        steps = int(json.loads(kept.read_text())["n_iters"])
    else:
        steps = steps_in(first.seconds + second.seconds, PIXELS, data)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"n_iters": steps}))
    third = train(PIXELS, runs, f"--config.training.n_iters={steps}")

    source = open_autoencoder(first.workdir, 17, data.shape)
    codec = codec_from(second.workdir, source)
    latent, pixel = load(second.workdir), load(third.workdir)
    by_latent = [drawn(second, latent, codec, source.shape, count, seed) for seed in range(seeds)]
    by_pixel = [drawn(third, pixel, pixels, data.shape, count, seed) for seed in range(seeds)]
    centre, spread = codec.posterior(data.test.x)
    back, used = codec.decode(centre), spread.mean((0, 2, 3)).tolist()
    mean, covariance = gaussian_fit(data.train.x, pixels)
    factor = torch.linalg.cholesky(covariance)

    def normal(seed: int) -> Tensor:
        z = torch.randn(count, len(factor), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return pixels.decode((mean.flatten() + z @ factor.T).reshape(count, *data.shape))

    def alone(seed: int) -> Tensor:
        z = torch.randn(count, *source.shape, generator=torch.Generator().manual_seed(seed))
        return pixels.decode(source.autoencoder.decode(z))

    def each(make: Callable[[int], Tensor]) -> list[Tensor]:
        return [make(seed) for seed in range(seeds)]

    scores = Scores(judge("digits"), real)
    rows = [
        ["codes (`latent_digits32`)", *scores.of([k for k, _ in by_latent], cell([1e3 * s for _, s in by_latent], 1))],
        ["pixels (`vp_digits32`)", *scores.of([k for k, _ in by_pixel], cell([1e3 * s for _, s in by_pixel], 1))],
        ["the autoencoder alone, z of N(0, I)", *scores.of(each(alone))],
        ["Gaussian of the pixels (chance)", *scores.of(each(normal))],
        ["held-out digits after the autoencoder", *scores.of([back])],
        ["held-out digits", *scores.of([data.test.x])],
    ]
    quality = table(["", "like digits, %", "Fréchet distance", "CPU ms a sample"], rows)
    near = psnr(data.test.x.double() / 16, back.double() / 16)

    ours = bits(second, latent, codec, data, images)
    theirs = bits(third, pixel, pixels, data, images)
    own = autoencoder_alone(codec, data, images)

    def of_stamp(stamp: dict[str, Any], name: str) -> str:
        error = stamp["errors_of_parts"][name] if name != "mean" else stamp["standard_error"]
        return f"{stamp[name]:.3f} ± {error:.3f}"

    parts = ("reconstruction", "latent", "entropy")
    whole = [
        ["codes: a bound", of_stamp(ours, "mean"), *(of_stamp(ours, name) for name in parts)],
        [
            "the autoencoder alone, p(z) = N(0, I): a bound",
            *("{:.3f} ± {:.3f}".format(*own[name]) for name in ("value", *parts)),
        ],
        ["pixels: dequantised", of_stamp(theirs, "mean"), "", "", ""],
    ]
    head = ["", "bits/dim, at most", "reconstruction", "latent -log p(y)", "entropy of q, subtracted"]
    about = (
        f"CPU seconds of training: autoencoder {first.seconds:.0f} and model of codes {second.seconds:.0f}, together "
        f"{first.seconds + second.seconds:.0f}; model of pixels {third.seconds:.0f} ({steps} steps). {count} samples "
        f"for each of {seeds} seeds, mean ± standard deviation over them; one thread. The autoencoder's held-out PSNR "
        f"is {float(near.mean()):.1f} dB; the mean deviation of q(y | x) in the code's channels, each of variance 1, "
        f"is {', '.join(f'{value:.3f}' for value in used)}: where it is 1 the channel says nothing of the image.\n\n"
        f"{machine(CPU)}.\n"
    )
    if picture is not None:
        shown = [data.test.x[:10], back[:10], by_latent[0][0][:20], by_pixel[0][0][:20]]
        picture.parent.mkdir(parents=True, exist_ok=True)
        write_png(grid(pixels.display(torch.cat(shown)), 10), picture)
    note = f"The first {images} held-out digits; errors are over images.\n"
    return {"quality": quality + "\n" + about, "bits": table(head, whole) + "\n" + note}


def main() -> None:
    p = argparse.ArgumentParser("python -m studies.latent_diffusion", description=__doc__.partition("\n")[0])
    p.add_argument("--runs", type=Path, default=Path("runs"), help="where the workdirs are")
    p.add_argument("--samples", type=int, default=200)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--images", type=int, default=50, help="held-out images whose bits/dim are computed")
    p.add_argument("--fill", action="store_true", help="put the results into docs/latent_diffusion.md, with a picture")
    options = p.parse_args()
    torch.set_num_threads(1)
    picture = DOCS / "images" / "latent_diffusion.png" if options.fill else None
    blocks = run(options.runs, options.samples, options.seeds, options.images, picture)
    print("\n".join(blocks.values()))
    if options.fill:
        fill(DOCS / "latent_diffusion.md", blocks)


if __name__ == "__main__":
    main()
