"""The modes encode, decode and interpolate: the probability flow both ways, with the solver of the section eval.

Results are folders as those of `evaluate`: batches are on disk as they are done, and the stamp comes last.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor

from ..data.codecs import Codec, PixelCodec, requantised
from ..data.files import read
from ..data.images import AS_THEY_ARE, Pixels
from ..data.sets import Split
from ..likelihood.dequantisation import uniform_numbers
from ..likelihood.latents import decode, encode, slerp
from ..machine.parallel import Processes
from ..models.base import ScoreModel
from ..models.guidance import guide
from ..noise import noise_source
from ..ode.integrators import Solver
from .checkpoint import file_hash
from .conditions import check_number, in_turn, labelled, sampled_labels, told
from .evaluate import Counted, about_examples
from .results import Arrays, channels_last, in_batches, once, read_arrays, write_arrays, write_pictures
from .stamps import asked, keys_of, stamp

_SHOWN = 32  # images in the grid of encode, each beside what its latent decodes to


def read_examples(path: Path, shape: tuple[int, ...], codec: Codec, pixels: Pixels = AS_THEY_ARE) -> Split:
    """The user's examples for a model of examples of `shape`, as a data set stores them; of a folder its train/ if any.

    An image, or a folder or zip of them, is cropped, resized and made grey or RGB, laid over the background where it is
    transparent, and its levels become those of the data; files of more bits than `Pixels.file_bits` use so many of
    them, as those of the data do. Arrays of a .npy or .npz hold levels, or for vectors floats,
    as they are.

    Raises FileNotFoundError, and ValueError for what cannot be read or is of another kind or shape.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}: name what is to be read, --input FILE_OR_FOLDER")
    square = len(shape) == 3 and shape[-1] == shape[-2]
    channels = shape[0] if len(shape) == 3 else None
    found = read(path, shape[-1] if square else None, channels, 2**62, replace(pixels, bits=0, mixed=True))
    x = found.train.x
    assert isinstance(x, Tensor)
    if tuple(x.shape[1:]) != shape or (found.levels is None) == isinstance(codec, PixelCodec):
        kind = f"{str(codec.dtype)[6:]} images" if isinstance(codec, PixelCodec) else "floats"
        pictures = " (pictures such as PNGs would be cropped and resized)" if len(shape) == 3 else ""
        raise ValueError(
            f"{path} holds {str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}, and {kind} of shape "
            f"{shape} are to be read{pictures}"
        )
    if isinstance(codec, PixelCodec) and found.levels is not None:
        if path.suffix.lower() not in (".npy", ".npz"):
            x = requantised(x, found.levels, codec)
        elif int(x.max()) >= codec.levels:
            raise ValueError(f"{path} holds the value {int(x.max())}, and the data have levels 0..{codec.levels - 1}")
        x = x.to(codec.dtype)
    return Split(x)


def read_latents(path: Path, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """Latents (N, *shape) from the `latents.npz` of --mode encode, or another .npz of `latents`, or a .npy.

    Beside them the `labels` (N,) with which they were encoded, if the file has any. Raises FileNotFoundError, and
    ValueError for what holds no latents, or such of another shape.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give --input the latents.npz that --mode encode wrote")
    arrays = {"latents": np.load(path, allow_pickle=False)} if path.suffix == ".npy" else read_arrays(path) or {}
    found, labels = arrays.get("latents"), arrays.get("labels")
    if found is None:
        raise ValueError(f"{path} holds no array latents, such as --mode encode writes into its latents.npz")
    if found.shape[1:] != shape or not np.issubdtype(found.dtype, np.floating) or len(found) == 0:
        raise ValueError(f"{path} holds {found.dtype} of shape {found.shape}, and latents are floats (N, {shape})")
    if not np.isfinite(found).all():
        raise ValueError(f"{path} holds latents that are not finite")
    if labels is not None and (labels.shape != found.shape[:1] or not np.issubdtype(labels.dtype, np.integer)):
        raise ValueError(f"{path} holds labels {labels.dtype} of shape {labels.shape} for {len(found)} latents")
    return torch.from_numpy(found.astype(np.float32)), None if labels is None else torch.from_numpy(labels)


def run_encoding(
    model: ScoreModel,
    config: ConfigDict,
    split: Split,
    codec: Codec,
    checkpoint: Path,
    base: Path,
    processes: Processes,
    own: bool = False,
) -> tuple[Path, dict[str, Any]]:
    """Latents of a split's first eval.num_images examples, into a folder below `base`.

    `latents.npz` has `latents` (N, *shape) and, each example's, `largest_error` and `rms_error` of decode(encode(x)),
    in levels of pixels, and of class-conditional models the `labels` that were given; the stamp has the errors of all,
    and the fraction of pixels that come back to their level. A grid shows the first images, each beside what its latent
    decodes to. `own` says that the split is the user's, of --input, and not that of eval.split.
    """
    e = config.eval
    n = min(e.num_images, len(split)) if e.num_images else len(split)
    source = "input" if own else e.split
    about = {"mode": "encode", **about_examples(split, source, n), "number": n, **_road(model, config)}
    made_from = stamp(checkpoint, e.weights, codec, config, keys_of("encode", config), about)
    label, config = f"{checkpoint.stem}-{e.weights}-{source}", asked(config, keys_of("encode", config))
    e, counted, split = config.eval, Counted(model), split.to(processes.device)

    def compute(first: int, count: int) -> Arrays:
        k, y = split[torch.arange(first, first + count)]
        x = as_trained(k, codec, config, first)
        model = labelled(config, counted, y)
        counted.nfe = 0
        z = encode(model, x, **_options(config))
        there, counted.nfe = counted.nfe, 0
        back = decode(model, z, **_options(config))
        error = _in_levels(back - x, codec).flatten(1).double()
        shown = max(0, min(count, _SHOWN - first))
        found = {
            "latents": z.to(torch.float32).cpu().numpy(),
            "largest_error": error.abs().amax(1).cpu().numpy(),
            "rms_error": error.square().mean(1).sqrt().cpu().numpy(),
            "nfe": np.array([[there, counted.nfe]]),
        }
        if told(config) and y is not None:
            found["labels"] = y.cpu().numpy()
        if isinstance(codec, PixelCodec):
            found["same"] = (codec.decode(back) == k).double().flatten(1).mean(1).cpu().numpy()
        if codec.pixels is not None:  # of a code, what it decodes to beside what its latent does
            image = k if isinstance(codec, PixelCodec) else codec.decode(k)
            found["pairs"] = channels_last(torch.stack([image, codec.decode(back)], 1)[:shown].flatten(0, 1))
        return found

    def work(folder: Path) -> dict[str, Any]:
        joined = in_batches(folder, n, e.batch_size, processes, compute, "encoding")
        if processes.main:
            kept = ("latents", "largest_error", "rms_error", "labels")
            write_arrays(folder / "latents.npz", {name: joined[name] for name in kept if name in joined})
            if "pairs" in joined:
                write_pictures(joined["pairs"], codec, folder, columns=min(8, len(joined["pairs"])))
        deviation = float(np.sqrt((joined["latents"].astype(np.float64) ** 2).mean()))
        return {
            "unit": "levels" if codec.levels else "data",
            "largest_error": float(joined["largest_error"].max()),
            "rms_error": math.sqrt(float((joined["rms_error"] ** 2).mean())),
            "same_level": float(joined["same"].mean()) if "same" in joined else None,
            "latent_deviation": deviation / model.sde.prior_std,
            "nfe": joined["nfe"].mean(0).tolist(),
        }

    return once(base, label, made_from, "latents.npz", processes, work)


def round_trip(result: dict[str, Any]) -> str:
    """What an encoding's stamp says of the way there and back, in a line."""
    same = result["same_level"]
    unit = " levels of a pixel" if result["unit"] == "levels" else ""
    return (
        f"{result['number']} latents, of {result['latent_deviation']:.3f} times the prior's deviation; decoded again "
        f"they are off by {result['rms_error']:.3g}{unit} (RMS) and {result['largest_error']:.3g} at most"
        + (f", {100 * same:.4g} % of the pixels have their level" if same is not None else "")
        + f"; NFE {result['nfe'][0]:.0f} there and {result['nfe'][1]:.0f} back"
    )


def run_decoding(
    model: ScoreModel,
    config: ConfigDict,
    path: Path,
    shape: tuple[int, ...],
    codec: Codec,
    checkpoint: Path,
    base: Path,
    processes: Processes,
) -> tuple[Path, dict[str, Any]]:
    """What the latents of a file decode to, times sampling.temperature: `samples.npz` as of --mode sample, a grid.

    A class-conditional model is given the labels in the file. Raises ValueError where there are none.
    """
    e, (latents, labels) = config.eval, read_latents(path, shape)
    if told(config) and labels is None:
        raise ValueError(
            f"{path} holds no labels, and the model is class-conditional: encode with this model, or set "
            "eval.conditional=False"
        )
    about = {"mode": "decode", "latents_sha256": file_hash(path), "number": len(latents), **_road(model, config)}
    made_from = stamp(checkpoint, e.weights, codec, config, keys_of("decode", config), about)
    label, config = f"{checkpoint.stem}-{e.weights}", asked(config, keys_of("decode", config))
    e, counted = config.eval, Counted(model)

    def compute(first: int, count: int) -> Arrays:
        counted.nfe = 0
        z = config.sampling.temperature * latents[first : first + count].to(processes.device)
        y = None if labels is None else labels[first : first + count]
        x = decode(labelled(config, counted, y), z, **_options(config))
        return {"arr_0": channels_last(codec.decode(x)), "nfe": np.array([counted.nfe])}

    def work(folder: Path) -> dict[str, Any]:
        joined = in_batches(folder, len(latents), e.batch_size, processes, compute, "decoding")
        if processes.main:
            write_arrays(folder / "samples.npz", {"arr_0": joined["arr_0"]})
            write_pictures(joined["arr_0"], codec, folder)
        return {"nfe": float(joined["nfe"].mean())}

    return once(base, label, made_from, "samples.npz", processes, work)


def run_interpolation(
    model: ScoreModel,
    config: ConfigDict,
    split: Split | None,
    shape: tuple[int, ...],
    codec: Codec,
    checkpoint: Path,
    base: Path,
    processes: Processes,
    own: bool = False,
) -> tuple[Path, dict[str, Any]]:
    """From one latent to another on the sphere, decoded: `interpolations.npz` (`arr_0`, a row for each pair), a grid.

    The latents are those of a split's examples, the first and second, the third and fourth, and so on; for a split of
    None draws from the prior, latent i from (sampling.seed, i) as in --mode sample. All are multiplied by
    sampling.temperature. Of examples the stamp has how far the decoded ends are from them.

    A class-conditional model is given the labels of a split's examples, or for draws sampling.labels in turn; between
    two labels its score goes along the line from one to the other.
    """
    e, i = config.eval, config.interpolation
    pairs = i.pairs if split is None else min(i.pairs, len(split) // 2)
    if pairs < 1:
        remedy = "add another to --input" if own else f"eval.split={e.split} has no more, so give two, --input FOLDER"
        raise ValueError(f"an interpolation is between two images, and there is one: {remedy}")
    labels = sampled_labels(config) if split is None and told(config) else []
    if split is None:
        check_number(
            config.sampling.labels if labels else (), (), 2 * pairs, "the number of ends, twice interpolation.pairs"
        )
        ends = {"shape": list(shape), "labels": labels}
    else:
        ends = about_examples(split, "input" if own else e.split, 2 * pairs)
    about = {"mode": "interpolate", **ends, "pairs": pairs, "steps": i.steps, **_road(model, config)}
    keys = keys_of("interpolate" if split is not None else "interpolate seeds", config)
    made_from = stamp(checkpoint, e.weights, codec, config, keys, about)
    label, config = f"{checkpoint.stem}-{e.weights}-{i.between}", asked(config, keys)
    e, i, temperature = config.eval, config.interpolation, config.sampling.temperature
    split = None if split is None else split.to(processes.device)
    counted, weights = Counted(model), torch.linspace(0, 1, i.steps, dtype=torch.float64, device=processes.device)

    def compute(first: int, count: int) -> Arrays:
        counted.nfe = 0
        model: ScoreModel = counted
        if split is None:
            y: Tensor | None = in_turn(labels, 2 * first, 2 * count) if labels else None
            noise = noise_source((2 * count, *shape), config.sampling.seed, 2 * first, torch.float32, processes.device)
            z = model.sde.prior((2 * count, *shape), noise)
        else:
            k, y = split[torch.arange(2 * first, 2 * (first + count))]
            x = as_trained(k, codec, config, 2 * first)
            z = encode(labelled(config, counted, y), x, **_options(config))
        between = temperature * slerp(z[0::2], z[1::2], weights).transpose(0, 1)
        if told(config) and y is not None:
            begin, end = (counted.given(label=half.repeat_interleave(i.steps)) for half in (y[0::2], y[1::2]))
            model = guide(end, begin, weights.repeat(count))
        decoded = decode(model, between.reshape(-1, *shape), **_options(config)).reshape(between.shape)
        rows = channels_last(codec.decode(decoded.flatten(0, 1)))
        found = {"arr_0": rows.reshape(count, i.steps, *rows.shape[1:])}
        if split is not None:
            error = _in_levels(torch.stack([decoded[:, 0] - x[0::2], decoded[:, -1] - x[1::2]], 1), codec).flatten(1)
            found["error"] = error.double().square().mean(1).cpu().numpy()
        return {**found, "nfe": np.array([counted.nfe])}

    def work(folder: Path) -> dict[str, Any]:
        joined = in_batches(folder, pairs, max(1, e.batch_size // i.steps), processes, compute, "interpolating")
        if processes.main:
            rows = joined["arr_0"]
            write_arrays(folder / "interpolations.npz", {"arr_0": rows})
            write_pictures(rows.reshape(-1, *rows.shape[2:]), codec, folder, columns=i.steps)
        found: dict[str, Any] = {"nfe": float(joined["nfe"].mean())}
        if split is not None:
            found |= {"unit": "levels" if codec.levels else "data", "ends_rms_error": math.sqrt(joined["error"].mean())}
        return found

    return once(base, label, made_from, "interpolations.npz", processes, work)


def _road(model: ScoreModel, config: ConfigDict) -> dict[str, Any]:
    """What the stamp says of the ODE, beside its keys of the section eval."""
    return {"sde": repr(model.sde), "given_labels": told(config)}


def _options(config: ConfigDict) -> dict[str, Any]:
    e = config.eval
    return {"t_min": e.t_min, "solver": Solver(e.ode_method, e.rtol, e.atol)}


def as_trained(k: Tensor, codec: Codec, config: ConfigDict, first: int) -> Tensor:
    """Stored values as the model saw them, which if it was trained so is with uniform noise within a level.

    The noise is that of the likelihood, of (eval.seed, first + i). Without it an even surface would be encoded far from
    where the prior is.
    """
    u = None
    if isinstance(codec, PixelCodec) and config.data.uniform_dequantization:
        u = uniform_numbers(tuple(k.shape), 1, config.eval.seed, first)[0].to(k.device)
    return codec.encode(k, u).to(torch.float32)


def _in_levels(difference: Tensor, codec: Codec) -> Tensor:
    """A difference of the model's values in levels of pixels; of vectors as it is."""
    return difference * (codec.levels / codec.width) if codec.levels else difference
