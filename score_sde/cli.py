"""The command line, ``score_sde MODE NAME [...]`` or ``python main.py --mode MODE --config FILE``; see `USAGE`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
from pathlib import Path

from ml_collections import ConfigDict

from . import config as configs
from .machine import parallel
from .machine.log import log, log_to_terminal
from .machine.parallel import Elsewhere, NoDevice
from .tasks import checkpoint, demo, dequantize, failures, latents, likelihood, restore, sample, scan, train
from .tasks.checkpoint import Trained
from .tasks.commands import COMMANDS, as_options, listed
from .tasks.conditions import RESTORING
from .tasks.job import carried_config, open_job
from .tasks.options import MODES, Parser, check
from .tasks.stamps import VERSIONS

USAGE = """\
score_sde: score-based generative modelling with stochastic differential equations

  score_sde MODE NAME [--workdir DIR] [--config.section.key=value ...]    NAME: a config of those below, or its file
  score_sde MODE [--workdir DIR | --checkpoint FILE] [...]                with the config that a checkpoint carries
  python main.py --mode MODE --config FILE [...]                          the same; so is python -m score_sde

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
  demo         train, sample and likelihood in one go, explained (for vp_digits)

commands
  configs                  the configs, as below: those of the package, and of the folder configs/ here
  config NAME              its keys with their values and meanings; with --diff what differs from the defaults
  new FILE.py --from NAME  a config of your own to edit, which begins as NAME
  completion SHELL         a script by which bash or zsh completes modes, configs and options

where things go   --workdir DIR (default runs/NAME): config.json, checkpoints/, samples/, likelihood/, latents/,
                  decoded/, interpolations/, restored/, codes/ (of data.autoencoder), tensorboard/, log.txt; without
                  --config the workdir of the checkpoint, or runs/NAME of a lone file
what is read      sample, decode, interpolate between seeds, and all with --input read no data: a checkpoint is enough
what to change    any key of the config: --config.training.n_iters=1000 --config.sampling.method=ode ...
several GPUs      torchrun --standalone --nproc_per_node=8 -m score_sde MODE NAME ...
"""

# The commands of modes, of (options, config, workdir, processes); those on a checkpoint, of (options, job, data).
RUNS = {"train": train.command, "demo": demo.command, "scan": scan.command}
ON_CHECKPOINTS = {
    **{"sample": sample.command, "likelihood": likelihood.command, "dequantize": dequantize.command},
    **dict.fromkeys(("encode", "decode", "interpolate"), latents.command),
    **dict.fromkeys(RESTORING, restore.command),
}


def run(arguments: list[str] | None = None) -> int:
    """The entry point of `main.py` and of the console script; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    mode, workdir, code = "", "", 0
    threading.excepthook = failures.thread_failed
    try:
        if not arguments or {"-h", "--help"} & set(arguments):
            print(f"{USAGE}\nconfigs\n{listed()}")
        elif "--version" in arguments:
            print(", ".join(f"{name} {version}" for name, version in VERSIONS.items()))
        elif arguments[0] in COMMANDS:
            print(COMMANDS[arguments[0]](arguments[1:]))
        else:
            rest, overrides = configs.split_arguments(as_options(arguments))
            options = _parser().parse_args(rest)
            mode, workdir = options.mode, options.workdir or ""
            code = main(options, overrides)
        sys.stdout.flush()  # here, where a closed pipe can be reported
        return code
    except KeyboardInterrupt:
        line = "interrupted; what was finished is on disk, and the same command goes on"
        if parallel.first_to_say(line):
            _say(line)
        return 130
    except Elsewhere as error:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # once on each node
            _say(f"error: {error}")
        return 2
    except Exception as error:
        sentence = failures.sentence(error, mode, workdir)
        if sentence is None:
            raise
        if isinstance(error, BrokenPipeError):  # Python flushes standard output again as it ends, which would fail
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, NoDevice) or parallel.first_to_say(sentence):
            _say(f"error: {sentence}")
        return 2
    finally:
        threading.excepthook = threading.__excepthook__
        parallel.finish()


def _say(line: str) -> None:
    """Print a last line on standard error, if somebody reads it."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _name(text: str) -> str:
    """The name of a file or folder. "" is refused: it would count as no option, and another command would run."""
    if not text:
        raise argparse.ArgumentTypeError("expected a name, got an empty one (of a variable that is not set?)")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = Parser()
    parser.add_argument("--mode", required=True, choices=MODES)
    for name in ("--config", "--workdir", "--checkpoint"):
        parser.add_argument(name, type=_name)
    for name in ("--input", "--mask"):
        parser.add_argument(name, type=lambda text: Path(_name(text)))
    parser.add_argument("--prompt", action="append", default=[])
    parser.add_argument("--negative")
    parser.add_argument("--scales", default="")
    return parser


def main(options: argparse.Namespace, overrides: dict[str, str]) -> int:
    workdir = _workdir(options)
    config, carried = _config(options, overrides)
    check(options, config)
    processes = parallel.start(config.device)
    if processes.main:
        log_to_terminal(workdir)
        log.info("workdir: %s", workdir)
    if options.mode in RUNS:
        return RUNS[options.mode](options, config, workdir, processes)
    job, data = open_job(options, config, carried, workdir, processes)
    ON_CHECKPOINTS[options.mode](options, job, data)
    return 0


def _config(options: argparse.Namespace, overrides: dict[str, str]) -> tuple[ConfigDict, Trained | None]:
    """The config of a file, or of the workdir or checkpoint that carries one, and that one; sets options.config."""
    if options.config:
        return configs.load(options.config, overrides), None
    own = options.mode in RUNS  # a workdir's own run goes on, whatever checkpoint it began from
    places = [options.workdir, options.checkpoint] if own else [options.checkpoint or options.workdir]
    places = [place for place in places if place]
    if not places:
        raise ValueError("give --config FILE, or what carries one: --workdir DIR that is trained, or --checkpoint FILE")
    for place in places:
        try:
            config, path, trained = carried_config(place)
        except FileNotFoundError as error:
            if place != places[-1]:
                continue
            if own and place == options.workdir:
                raise FileNotFoundError(
                    f"{place} holds no run whose config could be taken: give one, --config FILE"
                    + "".join(f" ({why})" for why in checkpoint.newest(Path(place))[1])
                ) from error
            raise
        if own and place == options.checkpoint:  # what its own run began from does not matter to this one
            config.training.origin_weights = configs.default_config().training.origin_weights
        break
    options.config = str(path)
    return configs.overridden(config, overrides, f"{path}: "), trained


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
