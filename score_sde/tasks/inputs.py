"""What a task reads: the config's data set, and what --input and --mask name."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor

from ..config.build import resolve_classes
from ..data.codecs import AutoencoderCodec, Codec, PixelCodec, codec_of, requantised
from ..data.files import read
from ..data.images import AS_THEY_ARE, Pixels, grey_and_alpha
from ..data.sets import Data, Split, leave_out, load_data
from ..machine import own_code
from ..machine.parallel import Processes
from .class_names import resolve_labels
from .codes import as_asked
from .results import read_arrays


def read_data(config: ConfigDict, processes: Processes) -> Data:
    """The data set of the section data."""
    d = config.data

    def work() -> Data:
        if own_code.is_own(d.dataset):
            own_code.check_unchanged(d.dataset, "data.dataset", d.dataset_sha256)
        size, channels = d.image_size or None, d.num_channels or None
        form = {"image_size": size, "num_channels": channels, "length": d.length, "pixels": Pixels.of(d)}
        data = load_data(d.dataset, d.path or None, **form)
        return leave_out(data, [caption.strip() for caption in d.leave_out.split(",") if caption.strip()])

    return processes.in_turn(work)  # one process downloads, if it must, and the others of its node find the files


def read_for_training(config: ConfigDict, processes: Processes) -> tuple[Data, Codec]:
    """The data set of the section data and its codec; the config gets its number and names of classes."""
    data = read_data(config, processes)
    resolve_classes(config, data.num_classes, f"data.dataset={config.data.dataset}")
    resolve_labels(config, data)
    return data, codec_of(data.levels, config.data.centered, data.rate)


def split_of(data: Data, config: ConfigDict) -> Split:
    """The examples that eval.split names."""
    return data.test if config.eval.split == "test" else data.train


def number_of(split: Split, config: ConfigDict) -> int:
    """How many examples of a split eval.num_images asks for: 0 means all."""
    return min(config.eval.num_images or len(split), len(split))


def read_examples(path: Path, shape: tuple[int, ...], codec: Codec, pixels: Pixels = AS_THEY_ARE) -> Split:
    """The user's examples for a model of examples of `shape`, as a data set stores them; of a folder its train/ if any.

    Images are cropped, resized, made grey or RGB and opaque, and get the data's levels; of files with more bits than
    `Pixels.file_bits` so many are used. Arrays in a .npy or .npz hold levels, or floats for vectors, and stay.

    Raises FileNotFoundError, and ValueError for a file that cannot be read or has another kind or shape.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}: name what is to be read, --input FILE_OR_FOLDER")
    square = len(shape) == 3 and shape[-1] == shape[-2]
    channels = shape[0] if len(shape) == 3 else None
    data = read(path, shape[-1] if square else None, channels, 2**62, replace(pixels, bits=0, mixed=True))
    x = data.train.x
    assert isinstance(x, Tensor)
    if tuple(x.shape[1:]) != shape or (data.levels is None) == isinstance(codec, PixelCodec):
        kind = f"{str(codec.dtype)[6:]} images" if isinstance(codec, PixelCodec) else "floats"
        pictures = " (pictures such as PNGs would be cropped and resized)" if len(shape) == 3 else ""
        raise ValueError(f"{path} holds {str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}, and {kind} of "
                         f"shape {shape} are needed{pictures}")
    if isinstance(codec, PixelCodec) and data.levels is not None:
        if path.suffix.lower() not in (".npy", ".npz"):
            x = requantised(x, data.levels, codec)
        elif int(x.max()) >= codec.levels:
            raise ValueError(f"{path} holds the value {int(x.max())}, and the data have levels 0..{codec.levels - 1}")
        x = x.to(codec.dtype)
    return Split(x)


def own_examples(
    options: argparse.Namespace, config: ConfigDict, images: Data, codec: Codec, device: torch.device
) -> Split:
    """The examples of --input as the data set has them; for a model of codes of these `images`, their codes."""
    split = read_examples(options.input, images.shape, codec.pixels or codec, Pixels.of(config.data))
    if options.mode == "sample" and len(split) > config.sampling.num_samples:
        raise ValueError(f"--input {options.input} holds {len(split)} examples, and "
                         f"sampling.num_samples={config.sampling.num_samples} is fewer: set it to {len(split)} or "
                         "more, or give fewer")
    return as_asked(replace(images, test=split), codec, device).test if isinstance(codec, AutoencoderCodec) else split


def read_latents(path: Path, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """Latents (N, *shape) from the `latents.npz` of --mode encode, or another .npz of `latents`, or a .npy.

    The second are the `labels` (N,) with which they were encoded, if the file has any. Raises FileNotFoundError, and
    ValueError for a file without latents or with latents of another shape.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give --input the latents.npz that --mode encode wrote")
    arrays = {"latents": np.load(path, allow_pickle=False)} if path.suffix == ".npy" else read_arrays(path) or {}
    latents, labels = arrays.get("latents"), arrays.get("labels")
    if latents is None:
        raise ValueError(f"{path} holds no array latents: give --input the latents.npz that --mode encode wrote")
    if latents.shape[1:] != shape or not np.issubdtype(latents.dtype, np.floating) or len(latents) == 0:
        raise ValueError(f"{path} holds {latents.dtype} of shape {latents.shape}, and latents are floats (N, {shape})")
    if not np.isfinite(latents).all():
        raise ValueError(f"{path} holds latents that are not finite")
    if labels is not None and (labels.shape != latents.shape[:1] or not np.issubdtype(labels.dtype, np.integer)):
        raise ValueError(f"{path} holds labels {labels.dtype} of shape {labels.shape} for {len(latents)} latents")
    return torch.from_numpy(latents.astype(np.float32)), None if labels is None else torch.from_numpy(labels)


def read_mask(path: Path | None, shape: tuple[int, ...]) -> Tensor:
    """The mask in an image file, bool (H, W), for examples of `shape`: white where they are known, black where not.

    A mask drawn in transparency, such as a picture with an erased hole, is known where it is opaque. Raises
    FileNotFoundError, and ValueError for none, and one of another size, other colours, nothing to do or two meanings.
    """
    height, width = shape[1:]
    if path is None:
        raise ValueError(f"--mode inpaint needs --mask FILE, an image of {height} x {width}, white where the images "
                         "are known and black where they are to be filled")
    if not path.is_file():
        raise FileNotFoundError(f"there is no mask {path}")
    try:
        grey, alpha = grey_and_alpha(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"the mask {path} {error}") from None
    if alpha.min() < 255:
        if 0 in (shades := set(np.unique(grey[alpha == 255]).tolist())) and shades <= {0, 255}:
            raise ValueError(f"the mask {path} is drawn in black and in transparency, and either could be what is to "
                             "be filled: save it in black and white without transparency")
        grey = alpha
    if grey.shape != (height, width):
        raise ValueError(f"the mask {path} is {grey.shape[0]} x {grey.shape[1]}, and the model's images are {height} x "
                         f"{width}, to which --input is cropped and resized: make the mask of that size")
    other = set(np.unique(grey).tolist()) - {0, 255}
    if other:
        raise ValueError(f"the mask {path} has the grey level {min(other)}: it must be black (fill) and white (known) "
                         "alone; save it without smoothing, as a PNG")
    if grey.min() == grey.max():
        which = "white: nothing is" if grey.max() else "black: all is"
        raise ValueError(f"the mask {path} is all {which} to be filled")
    return torch.from_numpy(grey == 255)
