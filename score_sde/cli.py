"""The command line, ``python main.py --config configs/NAME.py --mode MODE [...]``; `USAGE` explains it."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor

from . import config as configs
from .config.build import is_classifier, resolve_classes, resolve_conditions
from .config.rules import suspects
from .data.captions import HuggingFaceEncoder, Text, embed
from .data.codecs import AutoencoderCodec, Codec, PixelCodec, Statistics, codec_of
from .data.images import Pixels
from .data.sets import Data, Split, leave_out, load_data
from .likelihood.dequantisation import fit_dequantiser
from .machine import own_code, parallel
from .machine.lock import held
from .machine.parallel import Elsewhere, NoDevice, Processes
from .machine.progress import Progress
from .machine.whole_files import whole
from .models.base import ScoreModel
from .models.pixel_levels import bits
from .tasks import checkpoint, failures
from .tasks.carried import as_trained, carried_config, described, reads_data
from .tasks.class_names import resolve_labels
from .tasks.codes import Source, as_asked, check_codes, codec_from, codes_of, open_autoencoder
from .tasks.conditions import RESTORING, Wanted, load_guides, sampled_labels, told, trained_at
from .tasks.demo import summary
from .tasks.dequantize import dequantiser_path, save_dequantiser, was_made_from
from .tasks.evaluate import LATENT, reported, run_likelihood, run_sampling
from .tasks.latents import read_examples, round_trip, run_decoding, run_encoding, run_interpolation
from .tasks.options import MODES, check, scales_of
from .tasks.origin import check_fits, check_origin, foreign_config
from .tasks.restore import restoring_line, run_restoring
from .tasks.scan import scan
from .tasks.show import Show, keep_log, log_to_terminal, warn
from .tasks.stamps import KEYS, asked, stamp
from .tasks.train import train

USAGE = """\
score_sde: score-based generative modelling with stochastic differential equations

  python main.py --config configs/NAME.py --mode MODE [--workdir DIR] [--config.section.key=value ...]
  python main.py --mode MODE [--workdir DIR | --checkpoint FILE] [...]    (with the config that a checkpoint carries)

modes
  scan         look at the data: range, mean, standard deviation, the Gaussian's bits/dim, settings they suggest
  train        train, or go on from the workdir's newest checkpoint; a model, or a classifier to guide one; with
               --checkpoint FILE a new run begins from its weights (averaged; --config.training.origin_weights=raw)
  sample       draw samples from the newest checkpoint (or --checkpoint FILE): a grid, samples.npz, a stamp; of classes
               by sampling.labels, of what --prompt TEXT says (--negative TEXT: what not), or enlarged from --input
               FILE_OR_FOLDER, or variants of its images with --config.sampling.start=0.4; guided by sampling.guidance,
               or with --scales 0,1,2.5 by each of these scales
  likelihood   bits/dim of held-out data under it, with its errors: exact by the probability-flow ODE, or a
               variational bound (eval.estimate; by default the bound for models of a chain's steps)
  encode       latents of held-out data, or of your own (--input FILE_OR_FOLDER), by the probability-flow ODE, and how
               far decoding them comes back to the data
  decode       the images of latents, --input FILE such as the latents.npz of encode
  interpolate  rows of images between held-out ones, your own (--input FILE_OR_FOLDER) or draws
               (--config.interpolation.between=seeds)
  inpaint      fill in held-out images, or your own (--input FILE_OR_FOLDER), where --mask FILE is black; also
               colorize, superresolve (your own are the small ones) and deblur, by the section inverse; of classes
               or prompts if sampling.labels or --prompt TEXT say so
  dequantize   fit a flow to it that dequantises pixels, for likelihood with eval.dequantization=variational
  demo         train, sample and likelihood in one go, explained (for configs/vp_digits.py)

where things go   --workdir DIR (default runs/NAME): config.json, checkpoints/, samples/, likelihood/, latents/,
                  decoded/, interpolations/, restored/, codes/ (of data.autoencoder), tensorboard/, log.txt; without
                  --config the workdir of the checkpoint, or runs/NAME of a lone file
what is read      sample, decode, interpolate between seeds, and all with --input read no data: a checkpoint is enough
what to change    any key of the config: --config.training.n_iters=1000 --config.sampling.method=ode ...
several GPUs      torchrun --standalone --nproc_per_node=8 main.py ...
"""

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
    mode, workdir = "", ""
    threading.excepthook = failures.thread_failed
    try:
        if not arguments or {"-h", "--help"} & set(arguments):
            print(USAGE + "\nconfigs\n" + "\n".join(_config_lines()))
            code = 0
        else:
            rest, overrides = configs.split_arguments(arguments)
            options = _parser().parse_args(rest)
            mode, workdir = options.mode, options.workdir or ""
            code = main(options, overrides)
        sys.stdout.flush()  # now, where it can be told that nobody reads it
        return code
    except KeyboardInterrupt:
        line = "interrupted; what was finished is on disk, and the same command goes on"
        if parallel.first_to_say(line):
            _tell(line)
        return 130
    except Elsewhere as error:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # once on each node
            _tell(f"error: {error}")
        return 2
    except Exception as error:
        sentence = failures.sentence(error, mode, workdir)
        if sentence is None:
            raise
        if isinstance(error, BrokenPipeError):  # what Python has left for standard output would fail again as it ends
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, NoDevice) or parallel.first_to_say(sentence):
            _tell(f"error: {sentence}")
        return 2
    finally:
        threading.excepthook = threading.__excepthook__
        parallel.finish()


def _tell(line: str) -> None:
    """A last line on standard error, if somebody reads it."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


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


def _name(text: str) -> str:
    """A file's or folder's, which is not "": that would be taken for none, and another command be run."""
    if not text:
        raise argparse.ArgumentTypeError("expected a name, got an empty one (of a variable that is not set?)")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default=None, type=_name)
    parser.add_argument("--mode", required=True, choices=MODES)
    parser.add_argument("--workdir", default=None, type=_name)
    parser.add_argument("--checkpoint", default=None, type=_name)
    parser.add_argument("--input", default=None, type=lambda text: Path(_name(text)))
    parser.add_argument("--mask", default=None, type=lambda text: Path(_name(text)))
    parser.add_argument("--prompt", action="append", default=[])
    parser.add_argument("--negative", default=None)
    parser.add_argument("--scales", default="")
    return parser


def main(options: argparse.Namespace, overrides: dict[str, str]) -> int:
    workdir = _workdir(options)
    config, options.config = _config(options, overrides)
    check(options, config)
    processes = parallel.start(config.device)
    if processes.main:
        log_to_terminal()
        log.info("workdir: %s", workdir)
    with ExitStack() as stack:
        if options.mode in ("train", "demo"):
            processes.agreed(lambda: _reserve(stack, options, config, workdir))
            return _train(options, config, workdir, processes)
        if options.mode == "scan":
            if processes.main:
                keep_log(workdir)
            data = _data(config, processes)
            resolve_classes(config, data.num_classes, f"data.dataset={config.data.dataset}")
            resolve_labels(config, data)
            if processes.main:
                print(scan(data, codec_of(data.levels, config.data.centered, data.rate)))
            return 0
        return _use(options, config, workdir, processes)


def _config(options: argparse.Namespace, overrides: dict[str, str]) -> tuple[ConfigDict, str]:
    """The config of a file, or else the one that the workdir or the checkpoint carries; and where it is from."""
    if options.config:
        return configs.load(options.config, overrides), options.config
    own = options.mode in ("train", "demo", "scan")  # a workdir's own run goes on, whatever it began from
    places = [options.workdir, options.checkpoint] if own else [options.checkpoint or options.workdir]
    places = [place for place in places if place]
    if not places:
        raise ValueError("give --config FILE, or what carries one: --workdir DIR that is trained, or --checkpoint FILE")
    for place in places:
        try:
            given, path = carried_config(place)
        except FileNotFoundError as error:
            if place != places[-1]:
                continue
            if own and place == options.workdir:
                raise FileNotFoundError(
                    f"{place} holds no run whose config could be taken: give one, --config FILE"
                    + "".join(f" ({said})" for said in checkpoint.newest(Path(place))[1])
                ) from error
            raise
        if own and place == options.checkpoint:  # what its own run began from is not asked for of this one
            given.training.origin_weights = configs.default_config().training.origin_weights
        break
    return configs.overridden(given, overrides, f"{path}: "), str(path)


def _workdir(options: argparse.Namespace) -> Path:
    """Where results go: --workdir, runs/NAME of the config, or the checkpoint's workdir, runs/NAME of a lone one."""
    if options.workdir or (not options.checkpoint and not options.config):
        return Path(options.workdir or "runs")
    if options.config:
        return Path("runs") / Path(options.config).stem
    path = Path(options.checkpoint)
    if path.is_dir():
        return path
    return path.parent.parent if path.parent.name == "checkpoints" else Path("runs") / path.stem


def _reserve(stack: ExitStack, options: argparse.Namespace, config: ConfigDict, workdir: Path) -> None:
    """Make the workdir this run's, and look for what it is to begin from."""
    stack.enter_context(held(workdir, "training"))
    if options.checkpoint:
        config.training.origin, config.training.origin_sha256 = options.checkpoint, ""
        check_origin(config, workdir, checkpoint.newest(workdir)[0])


def _train(options: argparse.Namespace, config: ConfigDict, workdir: Path, processes: Processes) -> int:
    """The modes train and demo."""
    data = _data(config, processes)
    codec: Codec = codec_of(data.levels, config.data.centered, data.rate)
    resolve_classes(config, data.num_classes, f"data.dataset={config.data.dataset}")
    resolve_labels(config, data)
    resolve_conditions(config, data.shape[0])
    if options.mode == "demo":
        return _demo(config, workdir, data, codec, processes)
    source = _source(config, data, processes)
    if source is not None or config.model.text_encoder:  # before all is encoded
        processes.agreed(lambda: check_fits(config, workdir, data.shape if source is None else source.shape))
    if source is not None:
        data, codec = _codes(source, data, config, workdir, processes)
    return run_training(config, workdir, data, codec, processes, _captions(config, data, workdir, processes))


def _source(config: ConfigDict, data: Data, processes: Processes) -> Source | None:
    """The autoencoder of whose codes the model is, if it is of codes; its hash goes into the config."""
    config.data.autoencoder_sha256 = ""
    if not config.data.autoencoder:
        return None
    source = open_autoencoder(config.data.autoencoder, data.levels, data.shape, processes.device)
    config.data.autoencoder_sha256 = source.sha256
    log.info("autoencoder: %s, codes of shape %s", source.where, source.shape)
    return source


def _use(options: argparse.Namespace, config: ConfigDict, workdir: Path, processes: Processes) -> int:
    """The modes that work on a checkpoint, which carries a description of its data where they need not be read."""
    path = _checkpoint(options.checkpoint or workdir, processes)
    scales = scales_of(options)
    known = described(path, config, processes.device)
    reads = reads_data(options.mode, config, options.input is not None)
    data = _data(config, processes) if known is None or reads else known
    resolve_labels(config, data, options.mode in RESTORING)
    as_trained(config, path, options.mode, scales)
    codec: Codec = codec_of(data.levels, config.data.centered, data.rate)
    resolve_classes(config, data.num_classes, f"data.dataset={config.data.dataset}")
    images, source = data, _source(config, data, processes)
    model = _model(path, options.mode, config, data.shape if source is None else source.shape, processes)
    if source is not None:
        codec = codec_from(path, source)
        data = as_asked(data, codec, processes.device)
    if processes.main:
        keep_log(workdir)
    if options.mode == "sample":
        changed = _own(options, config, images, codec, processes) if config.sampling.start < 1 else None
        folder = _sample(options, model, config, data.shape, codec, path, workdir, processes, changed)
        log.info("%d samples: %s", config.sampling.num_samples * max(1, len(scales)), folder)
    elif options.mode == "dequantize":
        if processes.main:
            with held(workdir / "dequantizers", "dequantizing"):
                found = run_dequantizing(model, config, data.train, codec, path, workdir, processes)
            log.info("dequantizer: %s", found)
    elif options.mode in ("encode", "decode", "interpolate"):
        _latents(options, model, config, data, codec, path, workdir, processes, images)
    elif options.mode in RESTORING:
        guides = load_guides(config, model, data.shape, processes.device)
        labels = sampled_labels(config, guides) if config.sampling.labels else []
        wanted = _prompted(Wanted(labels), options, config, workdir, processes)
        given = (workdir / "restored", processes, options.input, options.mask, guides, wanted)
        folder, result = run_restoring(options.mode, model, config, data, codec, path, *given)
        log.info("%s: %s", restoring_line(result), folder)
    else:
        split = {"test": images.test, "train": images.train}[config.eval.split]
        text = _captions(config, data, workdir, processes) if told(config) else None
        folder, result = run_likelihood(model, config, split, codec, path, workdir / "likelihood", processes, text)
        what = (result[key] for key in ("images", "split", "estimate"))
        log.info("%s (%d %s examples; %s): %s", reported(result), *what, folder)
        if "diffusion" in result:
            parts = [result[key] for key in ("prior", "diffusion", "reconstruction")]
            log.info("of it prior %.4f + diffusion %.4f (the rate), reconstruction %.4f (the distortion)", *parts)
        if "entropy" in result:
            parts = [f"{result[key]:.4f} ± {result['errors_of_parts'][key]:.4f}" for key in LATENT]
            log.info("at most so many: the reconstruction's %s + the latent's %s - the posterior's entropy %s", *parts)
    return 0


def _codes(source: Source, data: Data, config: ConfigDict, workdir: Path, processes: Processes) -> tuple[Data, Codec]:
    """The data as codes, from the workdir's file of them, which is made if it is not there.

    Raises ValueError where the workdir's model was trained on other codes.
    """

    def check(statistics: Statistics | None = None) -> None:
        failures.writable(workdir / "codes")
        begun, _ = checkpoint.newest(workdir)
        if begun is not None:
            check_codes(begun, source.sha256, source.where, statistics)

    processes.agreed(check)
    coded, statistics = codes_of(source, data, workdir / "codes", config.data.random_flip, processes)
    processes.agreed(lambda: check(statistics))
    return coded, AutoencoderCodec(source.autoencoder, statistics, source.pixels)


def _captions(config: ConfigDict, data: Data, workdir: Path, processes: Processes) -> Text | None:
    """What the model is told of the data's captions, each encoded once and kept in the workdir; None if of none."""
    m = config.model
    if not m.text_encoder:
        return None
    if not data.captions:
        raise ValueError(
            f"model.text_encoder needs captions, and data.dataset={config.data.dataset} has none: put a NAME.txt "
            "beside each image, or a metadata.jsonl; of CIFAR-10 take the python version"
        )
    return _embedded(config, data.captions, workdir, processes)


def _embedded(config: ConfigDict, captions: Sequence[str], workdir: Path, processes: Processes) -> Text:
    """The captions' embeddings, which the main process reads from the workdir's file, or makes, for all."""
    m = config.model
    cache = workdir / "text" / f"{m.text_sha256[:16]}-{m.text_length}.safetensors"

    def work() -> dict[str, Tensor]:
        failures.writable(cache.parent)
        encoder = HuggingFaceEncoder(m.text_encoder, length=m.text_length, device=processes.device)
        return embed(encoder, captions, cache)._asdict()

    return Text(**processes.copies(work))


def _sample(
    options: argparse.Namespace,
    model: ScoreModel,
    config: ConfigDict,
    shape: tuple[int, ...],
    codec: Codec,
    path: Path,
    workdir: Path,
    processes: Processes,
    changed: Split | None = None,
) -> Path:
    """--mode sample; of a cascade, the samples of the stage before first. Those of `changed` begin with examples."""
    guides = load_guides(config, model, shape, processes.device)
    wanted = Wanted(sampled_labels(config, guides), changed=changed)
    wanted = _prompted(wanted, options, config, workdir, processes)
    if config.model.super_resolution:
        wanted = wanted._replace(images=_smaller(options, config, shape, codec, processes))
    scales = scales_of(options)
    folder, _ = run_sampling(model, config, shape, codec, path, workdir / "samples", processes, guides, wanted, scales)
    return folder


def _prompted(
    wanted: Wanted, options: argparse.Namespace, config: ConfigDict, workdir: Path, processes: Processes
) -> Wanted:
    """With the prompts, if there are any, and behind them what is not wanted."""
    if not options.prompt:
        return wanted
    unwanted = [options.negative] if options.negative else []
    text = _embedded(config, [*options.prompt, *unwanted], workdir, processes)
    return wanted._replace(prompts=tuple(options.prompt), text=text)


def _smaller(
    options: argparse.Namespace, config: ConfigDict, shape: tuple[int, ...], codec: Codec, processes: Processes
) -> Tensor:
    """The images that a model of super-resolution enlarges: those of --input, or the samples of sampling.base.

    The stage before has its own config, and the number, classes, prompts and seed of this one.
    """
    s, factor = config.sampling, config.model.super_resolution
    small = (shape[0], *(size // factor for size in shape[1:]))
    if options.input is not None:
        images = read_examples(options.input, small, codec, Pixels.of(config.data)).x
        assert isinstance(images, Tensor)
        s.num_samples = min(s.num_samples, len(images))
        return images
    if not s.base:
        raise ValueError(
            "the model enlarges images: give it some, --input FILE_OR_FOLDER, or the stage before, "
            "--config.sampling.base=WORKDIR"
        )
    path = trained_at(s.base, "sampling.base", f"the stage before (a model of images of {small[1]} x {small[2]})")
    card = checkpoint.read_card(path)
    if card.codes:
        raise ValueError(f"sampling.base={s.base} is a model of codes: take one of pixels for the stage before")
    if card.shape != small:
        raise ValueError(
            f"sampling.base={s.base} makes examples of shape {card.shape}, and {small} are to be enlarged: name the "
            "workdir of a model that makes these"
        )
    theirs = configs.from_text(card.config, str(path))
    for key in ("num_samples", "batch_size", "seed", "labels", "negative_label"):
        theirs.sampling[key] = s[key]
    theirs.sampling.start = 1.0
    resolve_conditions(theirs, card.shape[0])
    log.info("the stage before: %s", path)
    model = checkpoint.load(path, ema=theirs.sampling.weights == "ema", map_location=processes.device)
    workdir = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    plain = argparse.Namespace(prompt=options.prompt if theirs.model.text_encoder else [], negative=options.negative)
    plain.input, plain.scales = None, ""
    own = codec_of(codec.levels, theirs.data.centered)
    folder = _sample(plain, model, theirs, card.shape, own, path, workdir, processes)
    log.info("%d samples: %s", s.num_samples, folder)
    with np.load(folder / "samples.npz") as samples:
        return torch.from_numpy(samples["arr_0"]).permute(0, 3, 1, 2).contiguous()


def _own(options: argparse.Namespace, config: ConfigDict, images: Data, codec: Codec, processes: Processes) -> Split:
    """The examples of --input, of a model of codes as codes, as the data set has them."""
    split = read_examples(options.input, images.shape, codec.pixels or codec, Pixels.of(config.data))
    if options.mode == "sample" and len(split) > config.sampling.num_samples:
        raise ValueError(
            f"--input {options.input} holds {len(split)} examples, and sampling.num_samples="
            f"{config.sampling.num_samples} is fewer: set it to {len(split)} or more, or give fewer"
        )
    if isinstance(codec, AutoencoderCodec):
        return as_asked(replace(images, test=split), codec, processes.device).test
    return split


def _latents(
    options: argparse.Namespace,
    model: ScoreModel,
    config: ConfigDict,
    data: Data,
    codec: Codec,
    path: Path,
    workdir: Path,
    processes: Processes,
    images: Data,
) -> None:
    """The modes encode, decode and interpolate; of a model of codes, `data`, of these images."""
    m = config.model
    if m.super_resolution or (m.text_encoder and config.eval.conditional):
        what = "smaller images" if m.super_resolution else "captions, unless --config.eval.conditional=false"
        raise ValueError(f"--mode {options.mode} keeps no {what}, which this model is given")
    if options.mode == "decode":
        given = (options.input, data.shape, codec, path, workdir / "decoded", processes)
        folder, result = run_decoding(model, config, *given)
        log.info("%d latents decoded, NFE %.0f: %s", result["number"], result["nfe"], folder)
        return
    split, own = {"test": data.test, "train": data.train}[config.eval.split], options.input is not None
    if own:
        split = _own(options, config, images, codec, processes)
    if options.mode == "encode":
        folder, result = run_encoding(model, config, split, codec, path, workdir / "latents", processes, own)
        log.info("%s: %s", round_trip(result), folder)
        return
    between = None if config.interpolation.between == "seeds" else split
    folder, result = run_interpolation(
        model, config, between, data.shape, codec, path, workdir / "interpolations", processes, own
    )
    unit = " levels of a pixel" if codec.levels else ""
    off = f"; the ends are off by {result['ends_rms_error']:.3g}{unit} (RMS)" if between is not None else ""
    log.info("%d rows of %d, NFE %.0f%s: %s", result["pairs"], result["steps"], result["nfe"], off, folder)


def _data(config: ConfigDict, processes: Processes) -> Data:
    d = config.data

    def read() -> Data:
        if own_code.is_own(d.dataset):
            own_code.check_unchanged(d.dataset, "data.dataset", d.dataset_sha256)
        size, channels = d.image_size or None, d.num_channels or None
        form = {"image_size": size, "num_channels": channels, "length": d.length, "pixels": Pixels.of(d)}
        data = load_data(d.dataset, d.path or None, **form)
        return leave_out(data, [caption.strip() for caption in d.leave_out.split(",") if caption.strip()])

    return processes.in_turn(read)  # one process downloads, if it must, and the others of its node find the files


def run_training(
    config: ConfigDict,
    workdir: Path,
    data: Data,
    codec: Codec,
    processes: Processes,
    text: Text | None = None,
) -> int:
    """--mode train: the loop of `train.train`, shown as a bar, lines of a log, TensorBoard scalars and grids.

    The first that the loop yields comes when the command is accepted: before it nothing is written into the workdir
    that another command reads.
    """
    n, step, show = config.training.n_iters, 0, None
    if processes.main:
        warn(config, data, codec)
    with Stop() as stop, Progress("training", n, shown=processes.main) as bar:
        try:
            for m in train(config, workdir, data, codec, processes, stop, text):
                step = m.step
                if show is None and processes.main:
                    failures.writable(workdir / "checkpoints")
                    failures.writable(workdir / "tensorboard")
                    if config.training.snapshot_sampling and not is_classifier(config):
                        failures.writable(workdir / "samples")
                    keep_log(workdir)
                    _remember(config, workdir)
                    show = Show(config, workdir, data, codec, processes.device, bar, text)
                if show is not None:
                    show(m)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}{suspects(config)}") from None
    if show is not None:
        show.close()
        if step < n:
            log.info("stopped at step %d of %d; the same command goes on from there", step, n)
        else:
            log.info("training is complete: %d steps in %s", step, workdir)
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
    """--mode dequantize: fit the flow that the section dequantizer describes to a checkpoint; return its file.

    Where that file is there, and says that it was made from the same, nothing is fitted again.
    """
    if not isinstance(codec, PixelCodec):
        raise ValueError(f"--mode dequantize is for pixels; data.dataset={config.data.dataset} holds floats")
    about = {"sde": repr(model.sde), "examples_sha256": split.digest()}
    made_from = json.dumps(stamp(path, config.eval.weights, codec, config, KEYS["dequantize"], about))
    target = dequantiser_path(workdir, path, config.eval.weights)
    if was_made_from(target, made_from):
        return target
    config = asked(config, KEYS["dequantize"])
    d, e = config.dequantizer, config.eval
    failures.writable(target.parent)
    with Progress("dequantizer", d.n_iters) as bar:

        def progress(step: int, loss: torch.Tensor) -> None:
            if step % 50 == 0:
                bar.note(f"loss {bits(loss.item(), math.prod(split.shape)):.3f} bits/dim")
            bar.update()

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
    save_dequantiser(target, dequantiser, checkpoint_sha256=checkpoint.file_hash(path), made_from=made_from)
    return target


def _remember(config: ConfigDict, workdir: Path) -> None:
    """Write the config of an accepted run into the workdir, whole or not at all."""
    with whole(workdir / "config.json") as file:
        file.write((configs.to_json(config) + "\n").encode())


def _checkpoint(where: str | Path, processes: Processes) -> Path:
    """The checkpoint that the main process finds at `where`, and that must be there for the others too."""
    path = Path(processes.agreed(lambda: str(checkpoint.find(where))))
    if processes.world > 1:
        own = checkpoint.file_hash(path) if path.is_file() else "nothing"
        found = [text.split(" ") for text in processes.texts(f"{own} {socket.gethostname()}")]
        other = next((rank for rank, (sha256, _) in enumerate(found) if sha256 != found[0][0]), None)
        if other is not None:
            raise ValueError(
                f"{path} is not the same file for process 0 on {found[0][1]} and process {other} on {found[other][1]}: "
                "work in one shared folder"
            )
    return path


def _model(path: Path, mode: str, config: ConfigDict, example: tuple[int, ...], processes: Processes) -> ScoreModel:
    """The model to sample from or to evaluate, on this process' device."""
    weights = (config.sampling if mode == "sample" else config.eval).weights
    foreign = path.suffix != checkpoint.SUFFIX
    check_codes(path, config.data.autoencoder_sha256, config.data.autoencoder)
    shape = example if foreign else checkpoint.read_card(path).shape
    if shape != example:
        raise ValueError(f"{path} was trained on examples of shape {shape}, but {config.data.dataset} has {example}")
    log.info("checkpoint: %s (%s weights)", path, weights)
    return checkpoint.load(path, foreign_config(config) if foreign else None, weights == "ema", processes.device)


def _demo(config: ConfigDict, workdir: Path, data: Data, codec: Codec, processes: Processes) -> int:
    """--mode demo: the three commands one after the other, and what came of them in words."""
    begin = time.perf_counter()
    code = run_training(config, workdir, data, codec, processes)
    if code:
        return code
    path = _checkpoint(workdir, processes)
    model = _model(path, "sample", config, data.shape, processes)
    guides = load_guides(config, model, data.shape, processes.device)
    folder, _ = run_sampling(model, config, data.shape, codec, path, workdir / "samples", processes, guides)
    _, result = run_likelihood(model, config, data.test, codec, path, workdir / "likelihood", processes)
    if processes.main:
        seconds, samples = time.perf_counter() - begin, np.load(folder / "samples.npz")
        print(summary(data, codec, workdir, samples["arr_0"], folder, result, seconds))
    return 0
