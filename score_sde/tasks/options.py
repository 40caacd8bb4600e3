"""The modes of the command line, and the options that each reads; an option that its mode does not read is refused."""

from __future__ import annotations

import argparse
import math
from typing import NoReturn

from ml_collections import ConfigDict

from ..config.kinds import kind_of
from .conditions import RESTORING, check_number

MODES = ("scan", "train", "sample", "likelihood", "encode", "decode", "interpolate", *RESTORING, "dequantize", "demo")
# --config, its keys and --workdir are for every mode.
READ_BY: dict[str, tuple[str, ...]] = {
    "--checkpoint": tuple(mode for mode in MODES if mode not in ("scan", "demo")),
    "--input": ("sample", "encode", "decode", "interpolate", *RESTORING),
    "--mask": ("inpaint",),
    "--prompt": ("sample", *RESTORING),
    "--negative": ("sample", *RESTORING),
    "--scales": ("sample",),
}
JUDGED = ("digits", "digits32")  # data sets whose samples the demo judges


class Parser(argparse.ArgumentParser):
    """A parser of options without abbreviations, whose errors are one sentence."""

    def __init__(self, program: str = "score_sde") -> None:
        super().__init__(program, add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; `score_sde --help` explains the command line")


def check(options: argparse.Namespace, config: ConfigDict) -> None:
    """Raise ValueError, in one sentence, for a mode that the config is not for, or an option that would have no effect.

    `options` has an attribute for each of `READ_BY`, empty or None where it was not given.
    """
    _mode(options, config)
    for option, modes in READ_BY.items():
        value = getattr(options, option.removeprefix("--"))
        value = next(iter(value), "") if isinstance(value, list) else value
        if value not in (None, "") and options.mode not in modes:
            raise ValueError(f"--mode {options.mode} reads no {option}, got {value}; leave it out ({option} is for "
                             f"{', '.join(modes)})")
    _input(options, config)
    _prompt(options, config)
    if options.mode in READ_BY["--prompt"]:
        _guidance(options, config)
        _number(options, config)
    m, width = config.model, config.sampling.ema
    if options.mode in ("train", "demo") and width > 0 and not m.ema_power:
        raise ValueError(f"sampling.ema={width:g} would be made of power averages, which --mode {options.mode} keeps "
                         "only with model.ema_power=True: set it, or sampling.ema=0")
    if options.mode == "demo" and (config.data.dataset not in JUDGED or m.super_resolution or m.text_encoder):
        raise ValueError(f"--mode demo judges digits that a model draws from nothing, and {options.config} is of "
                         "something else: take --config vp_digits, or the modes train, sample and likelihood one by "
                         "one")


def scales_of(options: argparse.Namespace) -> list[float]:
    """--scales 0,1,2.5 as numbers; none where it was not given. Raises ValueError for others."""
    text = options.scales
    try:
        scales = [float(number) for number in text.split(",")] if text else []
    except ValueError:
        raise ValueError(f"--scales must be numbers such as 0,1,2.5, got {text!r}") from None
    if any(not 0 <= scale < math.inf for scale in scales):
        raise ValueError(f"--scales must be at least 0, got {text}")
    return scales


def _mode(options: argparse.Namespace, config: ConfigDict) -> None:
    """Refuse modes that need a score model, a model of pixels, or one of whole images, if the config is for another."""
    mode, d, m = options.mode, config.data, config.model
    kind = kind_of(config)
    if kind.use and mode not in ("scan", "train"):
        raise ValueError(f"{options.config} is of {kind.name}, and --mode {mode} of models: {kind.use}=WORKDIR (its "
                         "held-out loss is eval_loss in its log)")
    if d.autoencoder and mode in (*RESTORING, "dequantize", "demo"):
        raise ValueError(f"--mode {mode} works on pixels, and data.autoencoder={d.autoencoder} makes this a model of "
                         "codes: take a model of pixels")
    if mode in RESTORING and m.super_resolution:
        raise ValueError(f"--mode {mode} is for a model of whole images, and "
                         f"model.super_resolution={m.super_resolution} makes this one of smaller ones: --mode sample "
                         "--input FILE_OR_FOLDER enlarges by it")


def _input(options: argparse.Namespace, config: ConfigDict) -> None:
    """Refuse --input if the mode does not read it with this config, and a missing --input."""
    if options.mode == "decode" and options.input is None:
        raise ValueError("--mode decode needs latents: --input FILE, such as the latents.npz that --mode encode wrote")
    mode, start = options.mode, config.sampling.start
    if start < 1 and mode == "sample" and options.input is None:
        raise ValueError(f"sampling.start={start:g} begins with examples that are noised to that time: give them, "
                         "--input FILE_OR_FOLDER, or set it to 1")
    if start < 1 and mode in (*RESTORING, "demo"):
        raise ValueError(f"sampling.start={start:g} is of --mode sample, and this is --mode {mode}: set it to 1")
    if mode == "sample" and options.input is not None and config.sampling.base:
        raise ValueError(f"--input {options.input} and sampling.base={config.sampling.base} both give the images that "
                         "are enlarged: leave one of them out")
    unread = ""
    if mode == "interpolate" and config.interpolation.between == "seeds":
        unread, remedy = "interpolation.between=seeds", ""
    elif mode == "sample" and start == 1 and not config.model.super_resolution:
        unread, remedy = "--mode sample", ", or begin with it: --config.sampling.start=0.4"
    if unread and options.input is not None:
        raise ValueError(f"{unread} reads no --input, got {options.input}; leave it out{remedy}")


def _prompt(options: argparse.Namespace, config: ConfigDict) -> None:
    """Refuse prompts for models without captions, and a negative prompt without a prompt."""
    if (options.prompt or options.negative) and not config.model.text_encoder:
        name, value = ("--prompt", options.prompt[0]) if options.prompt else ("--negative", options.negative)
        raise ValueError(f"{name} {value!r} is for a model of text, which this is not: train one with "
                         "model.text_encoder")
    if options.negative and not options.prompt:
        raise ValueError(f"--negative {options.negative!r} is beside a --prompt, and there is none: give one")
    s = config.sampling
    if options.negative and (s.classifier or s.guidance_checkpoint):
        raise ValueError(f"--negative {options.negative!r} is for classifier-free guidance: leave sampling.classifier "
                         "and sampling.guidance_checkpoint alone")


def _guidance(options: argparse.Namespace, config: ConfigDict) -> None:
    """Refuse guidance without effect."""
    s, scales = config.sampling, scales_of(options) or [config.sampling.guidance]
    classes = (config.model.class_conditional or s.classifier) and (options.mode == "sample" or s.labels)
    guided = classes or s.guidance_checkpoint or options.prompt
    if options.mode in RESTORING and s.classifier and not s.labels:
        raise ValueError(f"sampling.classifier has no class to guide to in --mode {options.mode}: set sampling.labels")
    if not options.scales and s.guidance != 1 and not guided:
        text = config.model.text_encoder
        what, remedy = ("prompt", "give one, --prompt TEXT") if text else ("class", "set sampling.labels")
        raise ValueError(f"sampling.guidance={s.guidance:g} has no {what} to guide by: {remedy}")
    away = f"--negative {options.negative!r}" if options.negative else f"sampling.negative_label={s.negative_label}"
    if (options.negative or s.negative_label != -1) and all(scale == 1 for scale in scales):
        raise ValueError(f"{away} has no effect without guidance: set sampling.guidance above 1, such as 2")
    nobody = {*s.labels} == {-1} and s.negative_label == -1 and not (s.guidance_checkpoint or options.prompt)
    if nobody and any(scale != 1 for scale in scales):
        asked = f"--scales {options.scales}" if options.scales else f"sampling.guidance={s.guidance:g}"
        raise ValueError(f"{asked} has no effect on samples without class, sampling.labels=-1: name classes, or set "
                         "the scale to 1")
    if options.scales and not guided:
        raise ValueError(f"--scales {options.scales} has no effect without a condition: take a class-conditional "
                         "model, give a --prompt, or set sampling.classifier or sampling.guidance_checkpoint")


def _number(options: argparse.Namespace, config: ConfigDict) -> None:
    """Refuse more classes or prompts than examples; examples of data sets are counted when they have been read."""
    s, e = config.sampling, config.eval
    if options.mode == "sample":
        check_number(s.labels, options.prompt, s.num_samples, "sampling.num_samples")
    elif e.num_images:
        check_number(s.labels, options.prompt, e.num_images, "eval.num_images")
