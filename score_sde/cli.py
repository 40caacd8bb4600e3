"""The command line, ``python main.py --config configs/NAME.py --mode MODE [...]``; `USAGE` explains it."""

from __future__ import annotations

import argparse
import logging
import math
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from ml_collections import ConfigDict
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from . import checkpoint, parallel
from . import config as configs
from .build import build_sde, resolve_classes
from .codecs import Codec, PixelCodec, codec_of
from .data import Data, Split, load_data
from .demo import summary
from .dequantisation import fit_dequantiser, save_dequantiser
from .evaluate import dequantiser_path, reported, run_likelihood, run_sampling
from .images import grid, histogram, write_png
from .latent_modes import fingerprint, read_examples, round_trip, run_decoding, run_encoding, run_interpolation
from .model import ScoreModel
from .ode import GaveUp
from .parallel import Processes
from .samplers import Heun, sample, times
from .scan import disagreements, scan
from .toys import EXACT, TOYS
from .train import Metrics, noise_floor, train

USAGE = """\
score_sde: score-based generative modelling with stochastic differential equations

  python main.py --config configs/NAME.py --mode MODE [--workdir DIR] [--config.section.key=value ...]

modes
  scan         look at the data: range, mean, standard deviation, the Gaussian's bits/dim, settings they suggest
  train        train, or go on from the workdir's newest checkpoint
  sample       draw samples from the newest checkpoint (or --checkpoint FILE): a grid, samples.npz, a stamp
  likelihood   bits/dim of held-out data under it, with its errors: exact by the probability-flow ODE, or a
               variational bound (eval.estimate; by default the bound for models of a chain's steps)
  encode       latents of held-out data, or of your own (--input FILE_OR_FOLDER), by the probability-flow ODE, and how
               far decoding them comes back to the data
  decode       the images of latents, --input FILE such as the latents.npz of encode
  interpolate  rows of images between held-out ones, your own (--input FILE_OR_FOLDER) or draws
               (--config.interpolation.between=seeds)
  dequantize   fit a flow to it that dequantises pixels, for likelihood with eval.dequantization=variational
  demo         train, sample and likelihood in one go, explained (for configs/vp_digits.py)

where things go   --workdir DIR (default runs/NAME): config.json, checkpoints/, samples/, likelihood/, latents/,
                  decoded/, interpolations/, tensorboard/, log.txt
what to change    any key of the config: --config.training.n_iters=1000 --config.sampling.method=ode ...
several GPUs      torchrun --standalone --nproc_per_node=8 main.py ...
"""

MODES = ("scan", "train", "sample", "likelihood", "encode", "decode", "interpolate", "dequantize", "demo")

log = logging.getLogger("score_sde")


class Stop:
    """Within its `with` block, turns true on SIGINT or SIGTERM; a second one interrupts at once."""

    def __enter__(self) -> Stop:
        self.asked = False
        self.before = {name: signal.signal(name, self._ask) for name in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for name, handler in self.before.items():
            signal.signal(name, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __call__(self) -> bool:
        return self.asked


def run(arguments: list[str] | None = None) -> int:
    """Entry point of `main.py` and of the console script; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments in (["-h"], ["--help"]):
        print(USAGE + "\nconfigs\n" + "\n".join(_config_lines()))
        return 0
    try:
        rest, overrides = configs.split_arguments(arguments)
        options = _parser().parse_args(rest)
        return main(options, overrides)
    except (ValueError, FileNotFoundError, FloatingPointError, GaveUp) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(
            f"error: out of memory ({str(error).splitlines()[0]}); compute the batch in parts "
            "(--config.training.accumulate=2), recompute activations (--config.training.checkpoint_activations=true), "
            "or sample and evaluate fewer at a time (--config.sampling.batch_size, --config.eval.batch_size)",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was finished is on disk, and the same command goes on", file=sys.stderr)
        return 130
    finally:
        parallel.finish()


def _config_lines() -> list[str]:
    """The configs in the folder, each with the first line of its docstring."""
    lines = []
    for path in sorted(Path("configs").glob("*.py")):
        text = path.read_text().lstrip()
        summary = text[3:].split("\n", 1)[0].removesuffix('"""') if text.startswith('"""') else ""
        lines.append(f"  {path!s:32} {summary}")
    return lines


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(f"{message}; python main.py alone explains the command line")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--mode", required=True, choices=MODES)
    parser.add_argument("--workdir", default=None)
    parser.add_argument("--checkpoint", default=None)
    parser.add_argument("--input", default=None, type=Path)
    return parser


def main(options: argparse.Namespace, overrides: dict[str, str]) -> int:
    config = configs.load(options.config, overrides)
    _check_input(options, config)
    workdir = Path(options.workdir or Path("runs") / Path(options.config).stem)
    processes = parallel.start(config.device)
    if processes.main:
        workdir.mkdir(parents=True, exist_ok=True)
        _log_to(workdir)
        log.info("workdir: %s", workdir)
    data, codec = _data(config, processes)
    resolve_classes(config, data.num_classes, f"data.dataset={config.data.dataset}")
    if options.mode == "scan":
        if processes.main:
            print(scan(data, codec))
        return 0
    if options.mode == "train":
        return run_training(config, workdir, data, codec, processes)
    if options.mode == "demo":
        return _demo(config, workdir, data, codec, processes)
    model, path = _model(options.checkpoint or workdir, options.mode, config, data, processes)
    if options.mode == "sample":
        folder, _ = run_sampling(model, config, data.shape, codec, path, workdir / "samples", processes)
        log.info("%d samples: %s", config.sampling.num_samples, folder)
    elif options.mode == "dequantize":
        if processes.main:
            log.info("dequantizer: %s", run_dequantizing(model, config, data.train, codec, path, workdir, processes))
    elif options.mode in ("encode", "decode", "interpolate"):
        _latents(options, model, config, data, codec, path, workdir, processes)
    else:
        split = {"test": data.test, "train": data.train}[config.eval.split]
        folder, result = run_likelihood(model, config, split, codec, path, workdir / "likelihood", processes)
        what = (result[key] for key in ("images", "split", "estimate"))
        log.info("%s (%d %s examples; %s): %s", reported(result), *what, folder)
        if "diffusion" in result:
            parts = [result[key] for key in ("prior", "diffusion", "reconstruction")]
            log.info("of it prior %.4f + diffusion %.4f (the rate), reconstruction %.4f (the distortion)", *parts)
    return 0


def _check_input(options: argparse.Namespace, config: ConfigDict) -> None:
    """Refuse an --input that nobody would read, and a decode without one."""
    if options.mode == "decode" and options.input is None:
        raise ValueError("--mode decode needs latents: --input FILE, such as the latents.npz that --mode encode wrote")
    seeds = options.mode == "interpolate" and config.interpolation.between == "seeds"
    if options.input is not None and (seeds or options.mode not in ("encode", "decode", "interpolate")):
        what = "interpolation.between=seeds" if seeds else f"--mode {options.mode}"
        raise ValueError(f"{what} reads no --input, got {options.input}; leave it out")


def _latents(
    options: argparse.Namespace,
    model: ScoreModel,
    config: ConfigDict,
    data: Data,
    codec: Codec,
    path: Path,
    workdir: Path,
    processes: Processes,
) -> None:
    """The modes encode, decode and interpolate."""
    if options.mode == "decode":
        given = (options.input, data.shape, codec, path, workdir / "decoded", processes)
        folder, result = run_decoding(model, config, *given)
        log.info("%d latents decoded, NFE %.0f: %s", result["number"], result["nfe"], folder)
        return
    split, source = {"test": data.test, "train": data.train}[config.eval.split], None
    if options.input is not None:
        split = read_examples(options.input, data.shape, codec)
        source = f"sha256 {fingerprint(split)}"
    if options.mode == "encode":
        folder, result = run_encoding(model, config, split, codec, path, workdir / "latents", processes, source)
        log.info("%s: %s", round_trip(result), folder)
        return
    between = None if config.interpolation.between == "seeds" else split
    folder, result = run_interpolation(
        model, config, between, data.shape, codec, path, workdir / "interpolations", processes, source
    )
    unit = " levels of a pixel" if codec.levels else ""
    off = f"; the ends are off by {result['ends_rms_error']:.3g}{unit} (RMS)" if between is not None else ""
    log.info("%d rows of %d, NFE %.0f%s: %s", result["pairs"], result["steps"], result["nfe"], off, folder)


def _log_to(workdir: Path) -> None:
    """Everything to the workdir's log.txt; to the terminal all but the lines of numbers, which the bar shows there."""
    log.setLevel(logging.DEBUG)
    log.handlers.clear()
    terminal: logging.Handler = logging.StreamHandler(_BarSafe())
    terminal.setLevel(logging.INFO)
    for handler in (terminal, logging.FileHandler(workdir / "log.txt")):
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)


class _BarSafe:
    """A stream that prints above a running progress bar."""

    def write(self, text: str) -> None:
        if text.strip():
            tqdm.write(text.rstrip("\n"), file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def _data(config: ConfigDict, processes: Processes) -> tuple[Data, Codec]:
    d = config.data

    def read() -> Data:
        size, channels = d.image_size or None, d.num_channels or None
        return load_data(d.dataset, d.path or None, image_size=size, num_channels=channels, length=d.length)

    if not processes.main:
        processes.barrier()  # the main process downloads, if it must, and the others then find the files
    data = read()
    if processes.main:
        processes.barrier()
    return data, codec_of(data.levels, d.centered, data.rate)


def run_training(config: ConfigDict, workdir: Path, data: Data, codec: Codec, processes: Processes) -> int:
    """--mode train: the loop of `train.train`, shown as a bar, lines of a log, TensorBoard scalars and grids."""
    n, step = config.training.n_iters, 0
    if processes.main:
        _remember(config, workdir)
        _warn(config, data, codec)
    with Stop() as stop, tqdm(total=n, desc="training", unit="step", disable=not processes.main) as bar:
        show = Show(config, workdir, data, codec, processes.device, bar) if processes.main else None
        for m in train(config, workdir, data, codec, processes, stop):
            step = m.step
            if show is not None:
                show(m)
    if show is not None:
        show.writer.close()
        if step < n:
            log.info("stopped at step %d of %d; the same command goes on from there", step, n)
        else:
            log.info("training is complete: %d steps in %s", n, workdir)
    return 0 if step >= n else 130


def run_dequantizing(
    model: ScoreModel,
    config: ConfigDict,
    split: Split,
    codec: Codec,
    path: Path,
    workdir: Path,
    processes: Processes,
) -> Path:
    """--mode dequantize: fit the flow that the section dequantizer describes to a checkpoint; return its file."""
    if not isinstance(codec, PixelCodec):
        raise ValueError(f"--mode dequantize is for pixels; data.dataset={config.data.dataset} holds floats")
    d, e = config.dequantizer, config.eval
    with tqdm(total=d.n_iters, desc="dequantizer", unit="step") as bar:

        def progress(step: int, loss: torch.Tensor) -> None:
            bar.update()
            if step % 50 == 0:
                bar.set_postfix_str(f"loss {loss.item() / math.prod(split.shape) / math.log(2):.3f} bits/dim")

        dequantiser = fit_dequantiser(
            model,
            split.to(processes.device),
            codec,
            steps=d.n_iters,
            batch_size=d.batch_size,
            lr=d.lr,
            hidden=d.hidden,
            layers=d.layers,
            t_min=e.t_min,
            seed=config.seed,
            progress=progress,
        )
    target = dequantiser_path(workdir, path, e.weights)
    save_dequantiser(target, dequantiser, checkpoint_sha256=checkpoint.file_hash(path))
    return target


class Show:
    """Shows what the training loop yields: on the bar, in the log, and in TensorBoard."""

    def __init__(
        self, config: ConfigDict, workdir: Path, data: Data, codec: Codec, device: torch.device, bar: tqdm
    ) -> None:
        self.config, self.workdir, self.shape, self.codec = config, workdir, data.shape, codec
        self.device, self.bar = device, bar
        self.writer = SummaryWriter(str(workdir / "tensorboard"))
        self.floor = _floor(config) if config.data.dataset in EXACT else {}
        if self.floor:
            log.info("irreducible error by noise level: %s", _line(self.floor))

    def __call__(self, m: Metrics) -> None:
        for sentence in m.notes:
            log.info(sentence)
            self.bar.initial = self.bar.n = m.step  # where a resumed run begins, lest the time left be wrong
        self.bar.update(m.step - self.bar.n)
        if "training_loss" in m.scalars:
            loss, speed = m.scalars["training_loss"], m.scalars["images_per_second"]
            self.bar.set_postfix_str(f"loss {loss:.4g}, {speed:.3g} images/s")
            for name, value in self.floor.items():
                self.writer.add_scalar(f"noise_error_floor/{name}", value, m.step)
        if m.scalars:
            log.debug("step %d/%d %s", m.step, self.bar.total, _line(m.scalars))
        for name, value in m.scalars.items():
            self.writer.add_scalar(name, value, m.step)
        if m.checkpoint is not None:
            log.info("checkpoint: %s", m.checkpoint)
            if self.config.training.snapshot_sampling:
                self._pictures(m.checkpoint, m.step)

    def _pictures(self, path: Path, step: int) -> None:
        """Samples of the averaged and of the raw weights: 18 steps of Heun's method on Karras's grid."""
        folder = self.workdir / "samples" / f"step-{step:09d}"
        for weights in ("ema", "raw"):
            model = checkpoint.load(path, ema=weights == "ema", map_location=self.device)
            picture = _picture(model, self.shape, self.codec)
            if picture is not None:
                folder.mkdir(parents=True, exist_ok=True)
                write_png(picture, folder / f"{weights}.png")
                self.writer.add_image(f"samples/{weights}", picture, step)


def _warn(config: ConfigDict, data: Data, codec: Codec) -> None:
    """Say where the data and the config disagree."""
    d, m = config.data, config.model
    unscaled = config.training.sde in ("vesde", "edm")
    for sentence in disagreements(
        data,
        codec,
        image_size=d.image_size,
        num_channels=d.num_channels,
        sigma_data=m.sigma_data if m.rule == "edm" else None,
        sigma_max=m.sigma_max if unscaled else None,
    ):
        log.warning("warning: %s", sentence)


def _line(scalars: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in scalars.items())


def _remember(config: ConfigDict, workdir: Path) -> None:
    """Write the config into the workdir; a change against what was there is told."""
    path = workdir / "config.json"
    if path.is_file():
        for line in configs.differences(configs.from_json(path), config):
            log.warning("warning: the config differs from that of this workdir's earlier run: %s", line)
    path.write_text(configs.to_json(config) + "\n")


def _floor(config: ConfigDict) -> dict[str, float]:
    """The irreducible error by noise level, for a data set whose density is known."""
    name = config.data.dataset
    sde = build_sde(config)
    return noise_floor(EXACT[name](sde), lambda count: TOYS[name](count, 1), sde)


def _picture(model: ScoreModel, shape: tuple[int, ...], codec: Codec) -> torch.Tensor | None:
    """A grid of 64 images, or where 4096 points of the plane fall; None for other data."""
    steps = getattr(model.sde, "steps", None)
    walk = times.karras(replace(model.sde, t_min=1 / steps if steps else max(model.sde.t_min, 1e-3)), 18)
    count = 64 if isinstance(codec, PixelCodec) else 4096
    if not isinstance(codec, PixelCodec) and shape != (2,):
        return None
    x = codec.decode(sample(model, Heun(), (count, *shape), walk, denoise=True))
    return grid(codec.display(x), zoom=max(1, 32 // shape[-1])) if isinstance(codec, PixelCodec) else histogram(x)


def _model(
    where: str | Path, mode: str, config: ConfigDict, data: Data, processes: Processes
) -> tuple[ScoreModel, Path]:
    """The model to sample from or to evaluate, on this process' device, and the checkpoint it is from."""
    path = checkpoint.find(where)
    weights = (config.sampling if mode == "sample" else config.eval).weights
    foreign = path.suffix != checkpoint.SUFFIX
    shape = data.shape if foreign else checkpoint.read_card(path).shape
    if shape != data.shape:
        raise ValueError(f"{path} was trained on examples of shape {shape}, but {config.data.dataset} has {data.shape}")
    log.info("checkpoint: %s (%s weights)", path, weights)
    return checkpoint.load(path, _theirs(config) if foreign else None, weights == "ema", processes.device), path


def _theirs(config: ConfigDict) -> dict[str, Any]:
    """The config as score_sde_pytorch has it, whose files carry none: there VE networks are divided by sigma."""
    given: dict[str, Any] = config.to_dict()
    given["model"]["scale_by_sigma"] = config.training.sde == "vesde"
    return given


def _demo(config: ConfigDict, workdir: Path, data: Data, codec: Codec, processes: Processes) -> int:
    """--mode demo: the three commands one after the other, and what came of them in words."""
    begin = time.perf_counter()
    code = run_training(config, workdir, data, codec, processes)
    if code:
        return code
    model, path = _model(workdir, "sample", config, data, processes)
    folder, _ = run_sampling(model, config, data.shape, codec, path, workdir / "samples", processes)
    _, result = run_likelihood(model, config, data.test, codec, path, workdir / "likelihood", processes)
    if processes.main:
        seconds, samples = time.perf_counter() - begin, np.load(folder / "samples.npz")
        print(summary(data, codec, workdir, samples["arr_0"], folder, result, seconds))
    return 0
