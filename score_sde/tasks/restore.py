"""The modes inpaint, colorize, superresolve and deblur: the section inverse, on held-out images or on the user's.

Results are folders as those of `evaluate`: batches are on disk as they are done, and the stamp comes last.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor

from ..config.build import build_sampler, build_times, grid_name
from ..data.codecs import Codec, PixelCodec
from ..data.images import Pixels, grey_and_alpha
from ..data.sets import Data, Split, digest
from ..inverse import (
    Average,
    Blur,
    Grey,
    Mask,
    Observation,
    Projected,
    Spectral,
    ddnm,
    dps,
    moment_matching,
    pigdm,
    twisted,
)
from ..machine.parallel import Processes
from ..metrics import psnr
from ..models.base import ScoreModel
from ..noise import ExampleStream, example_generators, noise_source
from ..samplers import Sampler, sample
from .conditions import Guides, Wanted, about, check_number, conditional, in_turn
from .evaluate import Counted, about_examples, about_grid, held
from .latents import as_trained, read_examples
from .pictures import write_grid, write_png
from .results import Arrays, channels_last, in_batches, mean_and_error, once, write_arrays
from .stamps import asked, keys_of, stamp

_SHOWN = 32  # images in the grid

Guidance = Callable[[ScoreModel, Observation, ConfigDict], ScoreModel]
GUIDED: dict[str, Guidance] = {
    "dps": lambda model, o, i: dps(model, o, i.rate),
    "pigdm": lambda model, o, i: pigdm(model, o, i.variance),
    "ddnm": lambda model, o, i: ddnm(model, o, i.variance),
    "moment_matching": lambda model, o, i: moment_matching(model, o, i.iterations),
}
METHODS = (*GUIDED, "projection", "repaint", "twisted")
# The keys of the section inverse that a method or a task has to itself.
OWN = {
    "dps": ("rate",),
    "pigdm": ("variance",),
    "ddnm": ("variance",),
    "moment_matching": ("iterations",),
    "repaint": ("resamplings",),
    "twisted": ("variance", "particles"),
    "superresolve": ("factor",),
    "deblur": ("blur",),
}


def read_mask(path: Path | None, shape: tuple[int, ...]) -> Tensor:
    """bool (H, W) of an image file for examples of `shape`: white where they are known, black where they are not.

    A mask drawn in transparency is known where it is opaque: such as a picture with a hole rubbed out.
    Raises FileNotFoundError, and ValueError for no path or image, for another size, for other colours, and for a mask
    that leaves nothing to do, or that could mean two things.
    """
    height, width = shape[1:]
    if path is None:
        raise ValueError(
            f"--mode inpaint needs --mask FILE, an image of {height} x {width}, white where the images are known and "
            "black where they are to be filled"
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no mask {path}")
    try:
        grey, alpha = grey_and_alpha(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"the mask {path} {error}") from None
    if alpha.min() < 255:
        if 0 in (shades := set(np.unique(grey[alpha == 255]).tolist())) and shades <= {0, 255}:
            raise ValueError(
                f"the mask {path} is drawn in black and in transparency, and either could be what is to be filled: "
                "save it in black and white without transparency"
            )
        grey = alpha
    if grey.shape != (height, width):
        raise ValueError(
            f"the mask {path} is {grey.shape[0]} x {grey.shape[1]}, and the model's images are {height} x {width}, to "
            "which --input is cropped and resized: make the mask of that size"
        )
    other = set(np.unique(grey).tolist()) - {0, 255}
    if other:
        raise ValueError(
            f"the mask {path} has the grey level {min(other)}: it must be black (fill) and white (known) alone; "
            "save it without smoothing, as a PNG"
        )
    if grey.min() == grey.max():
        raise ValueError(
            f"the mask {path} is all {'white: nothing is' if grey.max() else 'black: all is'} to be filled"
        )
    return torch.from_numpy(grey == 255)


def operator_for(task: str, config: ConfigDict, shape: tuple[int, ...], mask: Path | None) -> Spectral:
    """What a task's images are seen through. Raises ValueError for images that it does not fit."""
    if task == "inpaint":
        return Mask(read_mask(mask, shape))
    if task == "colorize":
        if shape[0] != 3:
            raise ValueError(f"--mode colorize needs a model of colour images, and this one's have {shape[0]} channel")
        return Grey(torch.full((3,), 1 / 3, dtype=torch.float64))
    if task == "deblur":
        return Blur.gaussian(config.inverse.blur)
    factor = config.inverse.factor
    if shape[1] % factor or shape[2] % factor:
        raise ValueError(
            f"inverse.factor={factor} does not divide the model's images of {shape[1]} x {shape[2]}: take one that does"
        )
    return Average(factor)


def read_observed(
    path: Path, task: str, operator: Spectral, shape: tuple[int, ...], codec: Codec, pixels: Pixels
) -> Split:
    """The user's images: what is left of them to restore, which for superresolve are the small ones."""
    seen = operator.apply(torch.zeros(1, *shape)).shape[1:] if task == "superresolve" else shape
    return read_examples(path, tuple(seen), codec, pixels)


def restore(
    model: ScoreModel,
    config: ConfigDict,
    observation: Observation,
    shape: tuple[int, ...],
    times: Tensor,
    first: int,
    sampler: Sampler | None = None,
) -> Tensor:
    """One draw of x given y for each of the observations, (B, *shape), by the method of the section inverse.

    It walks along `times` by `sampler`, that of the section sampling if none is given; twisted by steps of its own.
    """
    i, s = config.inverse, config.sampling
    whole, device = (len(observation.y), *shape), observation.y.device
    if i.method == "twisted":
        found = twisted(
            model,
            observation,
            whole,
            times,
            particles=i.particles,
            variance=i.variance,
            seed=s.seed,
            first=first,
            device=device,
        )
        generators = example_generators(s.seed, first, len(found.x), stream=ExampleStream.PARTICLE)
        weights = found.log_weights.exp().cpu()
        chosen = [torch.multinomial(w, 1, generator=g) for w, g in zip(weights, generators, strict=True)]
        return found.x[torch.arange(len(found.x)), torch.cat(chosen)]
    sampler = sampler or build_sampler(config)
    if i.method in GUIDED:
        model = GUIDED[i.method](model, observation, i)
    else:
        sampler = Projected(sampler, observation, i.resamplings if i.method == "repaint" else 1)
    x = sample(
        model,
        sampler,
        whole,
        times,
        seed=s.seed,
        first=first,
        device=device,
        denoise=s.noise_removal,
        temperature=s.temperature,
    )
    exact = observation.noise == 0 and not isinstance(observation.operator, Blur)
    return observation.project(x) if exact else x


def shown(observation: Observation, x: Tensor) -> Tensor:
    """An observation as a picture of x's shape: hidden pixels have the mean of the known ones, small images are
    enlarged by repeating pixels, grey ones are grey, and blurred ones as they are."""
    operator, y = observation.operator, observation.y
    if isinstance(operator, Blur):
        return y
    assert isinstance(operator, Spectral)
    picture = operator.pseudo_inverse(y)
    if isinstance(operator, Mask):
        known = operator.known.to(x.device).expand_as(x)
        mean = picture.flatten(2).sum(2) / known.flatten(2).sum(2)
        picture = torch.where(known, picture, mean[..., None, None])
    return picture


def run_restoring(
    task: str,
    model: ScoreModel,
    config: ConfigDict,
    data: Data,
    codec: Codec,
    checkpoint: Path,
    base: Path,
    processes: Processes,
    given: Path | None = None,
    mask: Path | None = None,
    guides: Guides | None = None,
    wanted: Wanted | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Degrade the first eval.num_images examples of eval.split and restore them, or restore the user's, which are
    `given`; into a folder below `base`.

    The model is given the classes and prompts of `wanted`, in turn, and guided as the section sampling says; it answers
    without any where there are none.

    `restored.npz` has `restored` and `observed` (N, H, W, C), `labels` (N,) if some are asked for, and of a split's
    examples, whose truth is known, `truth` and `psnr` and `psnr_observed` (N,), whose means the stamp has. `grid.png`
    shows truth, observation and result side by side, and every result of the user's images is a PNG.
    """
    e, i, s = config.eval, config.inverse, config.sampling
    guides, wanted = guides or Guides(), wanted or Wanted([])
    if not isinstance(codec, PixelCodec) or len(data.shape) != 3:
        raise ValueError(f"--mode {task} is for images, and data.dataset={config.data.dataset} has {data.shape}")
    if i.method == "twisted" and grid_name(config) == "ends":
        raise ValueError(
            f"inverse.method=twisted walks on sampling's grid, and sampling.method={s.method} chooses its own steps: "
            "set sampling.method=pc"
        )
    shape, operator = data.shape, operator_for(task, config, data.shape, mask)
    split, own = {"test": data.test, "train": data.train}[e.split], given is not None
    if given is not None:
        split = read_observed(given, task, operator, shape, codec, Pixels.of(config.data))
    n = min(e.num_images, len(split)) if e.num_images else len(split)
    check_number(s.labels, wanted.prompts, n, "the number of images")
    # Two methods ask for some noise; then y has that of its rounding to levels at least.
    rounding = 1 / (codec.levels * math.sqrt(12)) if task == "deblur" or i.method == "twisted" else 0.0
    noise = codec.width * max(i.noise, rounding)
    counted = Counted(model)
    times, sampler = build_times(config, model.sde, counted, shape), build_sampler(config)
    keys = (*keys_of("restore", config), *(f"inverse.{name}" for of in (task, i.method) for name in OWN.get(of, ())))
    made_from = stamp(
        checkpoint,
        e.weights,
        codec,
        config,
        keys,
        {
            "mode": task,
            "sde": repr(model.sde),
            **about_examples(split, "input" if own else e.split, n),
            "number": n,
            "mask_sha256": digest(operator.known) if isinstance(operator, Mask) else None,
            "method": i.method,
            "noise": noise,
            "sampler": "ancestral steps" if i.method == "twisted" else repr(sampler),
            "grid": about_grid(config, times),
            **about(wanted, [s.guidance], guides),
        },
    )
    label, scale = f"{checkpoint.stem}-{e.weights}-{task}-{i.method}", s.guidance
    config = asked(config, keys)
    e, i, s, split = config.eval, config.inverse, config.sampling, split.to(processes.device)

    def observed(k: Tensor, first: int) -> Observation:
        if own and task in ("superresolve", "deblur"):
            u = torch.full_like(k, 0.5, dtype=torch.float32) if config.data.uniform_dequantization else None
            return Observation(operator, codec.encode(k, u), noise)
        y = operator.apply(as_trained(k, codec, config, first))
        if i.noise > 0 and not own:
            draws = noise_source(tuple(y.shape), e.seed, first, y.dtype, y.device, ExampleStream.OBSERVATION)
            y = y + codec.width * i.noise * draws(y)
        return Observation(operator, y, noise)

    def compute(first: int, count: int) -> Arrays:
        counted.nfe = 0
        k, _ = split[torch.arange(first, first + count)]
        observation = observed(k, first)
        labels, conditions = in_turn(wanted.labels, first, count), wanted.of(first, count, config, codec, model.sde)
        guided = held(conditional(counted, conditions, labels, config, guides, scale), config, codec)
        x = restore(guided, config, observation, shape, times, first, sampler)
        restored, before = codec.decode(x), codec.decode(shown(observation, x))
        found = {"restored": channels_last(restored), "observed": channels_last(before)}
        if wanted.labels:
            found["labels"] = labels.numpy()
        if not own:
            to_truth = partial(psnr, k.double() / (codec.levels - 1))
            found["truth"] = channels_last(k)
            for name, y in (("psnr", restored), ("psnr_observed", before)):
                found[name] = to_truth(y.double() / (codec.levels - 1)).cpu().numpy()
        return {**found, "nfe": np.array([counted.nfe])}

    def work(folder: Path) -> dict[str, Any]:
        joined = in_batches(folder, n, e.batch_size, processes, compute, task)
        nfe = float(joined.pop("nfe").mean())
        if processes.main:
            write_arrays(folder / "restored.npz", joined)
            kinds = [name for name in ("truth", "observed", "restored") if name in joined]
            rows = np.stack([joined[name][:_SHOWN] for name in kinds], 1)
            images = codec.display(torch.from_numpy(rows.reshape(-1, *rows.shape[2:])).permute(0, 3, 1, 2))
            abreast = max(1, min(4, len(rows) // 2))
            write_grid(images, folder / "grid.png", len(kinds) * abreast, zoom=max(1, 32 // images.shape[-1]))
            if own:
                pictures = codec.display(torch.from_numpy(joined["restored"]).permute(0, 3, 1, 2))
                for j, picture in enumerate(pictures):
                    write_png(picture, folder / f"{j:06d}.png")
        found: dict[str, Any] = {"nfe": nfe}
        for name in ("psnr", "psnr_observed"):
            if name in joined:
                mean, error = mean_and_error(joined[name])
                found |= {name: mean, f"{name}_error": None if math.isnan(error) else error}
        return found

    return once(base, label, made_from, "restored.npz", processes, work)


def restoring_line(result: dict[str, Any]) -> str:
    """What a result's stamp says, in a line."""
    line = f"{result['number']} images, {result['mode']} by {result['method']}, NFE {result['nfe']:.0f}"
    if "psnr" in result:
        error = result["psnr_error"]
        spread = f" ± {error:.2f}" if error is not None else ""
        line += f"; PSNR {result['psnr']:.2f}{spread} dB, of what was seen {result['psnr_observed']:.2f} dB"
    return line
