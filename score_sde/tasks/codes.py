"""Data sets of an autoencoder's codes: the autoencoder, the statistics of its codes, and the file of codes.

A model of codes is trained on draws of q(z | x), new ones in every step. So each training image is encoded once, to a
mean and a standard deviation, which are kept in a file named by the autoencoder's hash and the images' digest; mirrored
images are encoded too if training mirrors. Other tasks encode images when they read them.
"""

from __future__ import annotations

import hashlib
import json
import runpy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .. import config as configs
from ..data.codecs import AutoencoderCodec, PixelCodec, Statistics
from ..data.files import Stream
from ..data.sets import Data, Split, digest
from ..machine.parallel import ALONE, Processes
from ..machine.progress import Progress
from ..machine.whole_files import read_header, read_tensors, write_tensors
from ..models.autoencoder import Autoencoder, ConvolutionalAutoencoder
from . import checkpoint
from .checkpoint import Trained

FORMAT = "score_sde codes 1"
_TOGETHER = 250  # images encoded together
_MEASURED = 1000  # training images from which the decoder's deviation is measured, where it has none


@dataclass(frozen=True)
class Source:
    """An autoencoder for images of one shape: their codec, the shape of its codes, its hash, and its path."""

    autoencoder: Autoencoder
    pixels: PixelCodec
    shape: tuple[int, ...]
    sha256: str
    where: str

    def codec(self, statistics: Statistics) -> AutoencoderCodec:
        """The codec between the images and a model of codes with these statistics."""
        return AutoencoderCodec(self.autoencoder, statistics, self.pixels)


@dataclass(frozen=True)
class Opened:
    """An autoencoder that was read, before its images are known; its hash and its path."""

    autoencoder: Autoencoder
    sha256: str
    where: Path
    device: torch.device | str

    @torch.no_grad()
    def decoded_shape(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the images that codes of this shape decode to. Raises ValueError for codes that it cannot decode."""
        try:
            return tuple(self.autoencoder.decode(torch.zeros(1, *codes, device=self.device)).shape[1:])
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(f"data.autoencoder={self.where} cannot decode codes of shape {codes}: {error}; take the "
                             "one that the model was trained with") from error

    def source(self, levels: int | None, shape: tuple[int, ...]) -> Source:
        """The autoencoder for uint8 images of `shape` (C, H, W) with this number of levels.

        Raises ValueError for an autoencoder of other images, and for data that are no images.
        """
        if levels is None or len(shape) != 3:
            raise ValueError(f"data.autoencoder={self.where} is for images, and the data are floats of shape {shape}")
        pixels = PixelCodec(levels, getattr(self.autoencoder, "centered", True))
        return Source(self.autoencoder, pixels, _code_shape(self, pixels, shape), self.sha256, str(self.where))


class DiffusersAutoencoder(nn.Module):
    """`diffusers`' AutoencoderKL as an `Autoencoder`; `pip install score_sde[latents]` brings the library."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        law = self.model.encode(x).latent_dist
        return law.mean, law.std

    def decode(self, z: Tensor) -> Tensor:
        images: Tensor = self.model.decode(z).sample
        return images


def open_autoencoder(
    where: str | Path, levels: int | None, shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> Source:
    """Open the autoencoder at `where`, for uint8 images of `shape` (C, H, W) with this number of levels.

    `where` is a workdir or checkpoint of this package's, a folder with `diffusers`' AutoencoderKL (config.json and
    safetensors; only local files are read), or a Python file whose get_autoencoder() returns a module, see
    `Autoencoder`.

    Raises FileNotFoundError if there is none, and ValueError for one of other images, or data that are no images.
    """
    return opened(where, device).source(levels, shape)


def opened(where: str | Path, device: torch.device | str = "cpu") -> Opened:
    """The autoencoder at `where`, see `open_autoencoder`, on a device."""
    where = Path(where)
    if not where.exists():
        raise FileNotFoundError(f"data.autoencoder={where}: there is no such file or folder; train one there first, "
                                "such as the config autoencoder_digits32")
    if where.suffix == ".py":
        made, sha256 = _from_file(where)
    elif (where / "config.json").is_file() and "_class_name" in json.loads((where / "config.json").read_text()):
        made, sha256 = _from_diffusers(where)
    else:
        trained = checkpoint.find(where)
        made, sha256 = trained.only(ConvolutionalAutoencoder), trained.sha256
    return Opened(made.to(device).eval().requires_grad_(False), sha256, where, device)


def _from_file(where: Path) -> tuple[Any, str]:
    get_autoencoder = runpy.run_path(str(where)).get("get_autoencoder")
    if not callable(get_autoencoder):
        raise ValueError(f"{where} defines no get_autoencoder(); it returns a module with encode and decode")
    made = get_autoencoder()
    if not isinstance(made, nn.Module) or not all(callable(getattr(made, name, None)) for name in ("encode", "decode")):
        raise ValueError(f"get_autoencoder() of {where} must return a torch.nn.Module with encode and decode")
    own = hashlib.sha256(where.read_bytes())
    own.update(digest(*made.state_dict().values()).encode())
    return made, own.hexdigest()


def _from_diffusers(where: Path) -> tuple[DiffusersAutoencoder, str]:
    name = json.loads((where / "config.json").read_text())["_class_name"]
    if name != "AutoencoderKL":
        raise ValueError(f"{where} holds a {name}, and data.autoencoder takes diffusers' AutoencoderKL")
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ImportError("this folder is read by diffusers: pip install score_sde[latents]") from error
    try:
        model = AutoencoderKL.from_pretrained(where, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{where} holds no AutoencoderKL that diffusers can read: {error}") from error
    return DiffusersAutoencoder(model), checkpoint.file_hash(where)


def _code_shape(made: Opened, pixels: PixelCodec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the code of a black image, which must come back as an image."""
    where, black = made.where, pixels.encode(torch.zeros(1, *shape, dtype=torch.uint8)).to(made.device)
    try:
        with torch.no_grad():
            mean, std = made.autoencoder.encode(black)
            back = made.autoencoder.decode(mean)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"data.autoencoder={where} cannot encode and decode images of shape {shape}: {error}; take an "
                         "autoencoder of these images") from error
    if back.shape != black.shape or std.shape != mean.shape or mean.ndim != 4:
        raise ValueError(f"data.autoencoder={where} makes of an image {shape} a code of mean {tuple(mean.shape[1:])} "
                         f"and deviation {tuple(std.shape[1:])}, and of that {tuple(back.shape[1:])}: mean and "
                         "deviation are (B, c, h, w), and images come back in their shape")
    return tuple(mean.shape[1:])


def codes_of(
    source: Source, data: Data, folder: Path, mirror: bool, processes: Processes = ALONE
) -> tuple[Data, Statistics]:
    """The data's images as normalised codes, and the codes' statistics over the training images.

    The main process reads them from a file in `folder`, or writes it, and sends them to the others. With `mirror` each
    training image is encoded twice, once mirrored. Raises ValueError for codes that do not vary.
    """
    both = (replace(split, y=None, caption=None).digest() for split in (data.train, data.test))
    images = hashlib.sha256(" ".join(both).encode()).hexdigest()
    made_from = {"autoencoder": source.sha256, "images": images, "mirror": str(mirror)}
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]
    path = folder / f"{source.sha256[:16]}-{key}.safetensors"

    def work() -> dict[str, Tensor]:
        header = {"format": FORMAT, **made_from}
        try:
            if read_header(path) == header:
                return read_tensors(path)
        except (FileNotFoundError, ValueError):
            pass  # there is no file of codes, or a broken one, which is replaced
        encoded = _encode_all(source, data, mirror)
        write_tensors(path, encoded, header)
        return encoded

    codes = processes.copies(work)
    statistics = Statistics(tuple(codes["mean"].tolist()), tuple(codes["std"].tolist()), codes["deviation"].item())
    mean, std = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (statistics.mean, statistics.std))

    def part(split: Split, name: str) -> Split:
        x, deviation = (codes[f"{name}/mean"] - mean) / std, codes[f"{name}/std"] / std
        times = len(x) // len(split)
        y, caption = (None if v is None else torch.cat([v] * times) for v in (split.y, split.caption))
        return Split(x, y, caption=caption, std=deviation)

    levels = source.codec(statistics).levels
    coded = replace(data, train=part(data.train, "train"), test=part(data.test, "test"), levels=levels)
    return coded, statistics


def as_asked(data: Data, codec: AutoencoderCodec, device: torch.device | str) -> Data:
    """The data's images as the means of their normalised codes, encoded whenever they are read."""

    def part(split: Split) -> Split:
        def read(index: Sequence[int]) -> Tensor:
            return codec.posterior(split[torch.tensor(list(index), dtype=torch.int64)][0].to(device))[0].cpu()

        one = codec.posterior(torch.zeros(1, *split.shape, dtype=torch.uint8, device=device))[0]
        return replace(split, x=Stream((len(split), *one.shape[1:]), read, f"codes of {split.digest()}"))

    return replace(data, train=part(data.train), test=part(data.test), levels=None)


def as_drawn(data: Data) -> Data:
    """The data with one draw of each training example's code, as training steps see them."""
    x, std = data.train.x, data.train.std
    if std is None or not isinstance(x, Tensor):
        return data
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return replace(data, train=replace(data.train, x=x + std * noise, std=None))


def codec_from(path: str | Path | Trained, source: Source) -> AutoencoderCodec:
    """The codec between the pixels and the model of a workdir or checkpoint, whose autoencoder must be `source`.

    Raises ValueError if it is another, or the model has no codes.
    """
    trained = path if isinstance(path, Trained) else checkpoint.find(path)
    check_codes(trained, source.sha256, source.where)
    assert trained.card is not None
    return source.codec(Statistics.from_json(trained.card.codes))


def check_codes(trained: Trained, sha256: str, where: str, statistics: Statistics | None = None) -> None:
    """Raise ValueError unless a checkpoint's model has the codes of the autoencoder at `where`, with these statistics.

    `sha256` is that autoencoder's, or '' for a model of pixels.
    """
    path, card = trained.path, trained.card
    theirs = (trained.config or configs.default_config()).data
    if theirs.autoencoder_sha256 != sha256:
        if not sha256 or not theirs.autoencoder_sha256:
            was, now = ("codes", "pixels") if theirs.autoencoder_sha256 else ("pixels", "codes")
            remedy = f"={theirs.autoencoder}" if was == "codes" else " empty"
            raise ValueError(f"{path} is a model of {was}, and the config says {now}: set data.autoencoder{remedy}")
        raise ValueError(f"{path} is a model of the codes of another autoencoder, sha256 "
                         f"{theirs.autoencoder_sha256[:12]}..., than data.autoencoder={where}, {sha256[:12]}...: that "
                         "one was trained further, or replaced; restore the first one, or train a new model in another "
                         "workdir")
    if statistics is not None and card is not None and card.codes != statistics.to_json():
        raise ValueError(f"{path} was trained on codes with other statistics, so on other data: use those, or train a "
                         "new model in another workdir")


@torch.no_grad()
def _encode_all(source: Source, data: Data, mirror: bool) -> dict[str, Tensor]:
    """Mean and standard deviation of every code, (N, c, h, w) float32 in the autoencoder's units, and statistics."""
    parameters = source.autoencoder.parameters() if isinstance(source.autoencoder, nn.Module) else iter(())
    device = next((p.device for p in parameters), torch.device("cpu"))
    turned = [("train", data.train, True)] if mirror else []
    passes = [("train", data.train, False), *turned, ("test", data.test, False)]
    parts: dict[str, list[Tensor]] = defaultdict(list)
    with Progress("encoding", sum(len(split) for _, split, _ in passes), "image") as bar:
        for name, split, mirrored in passes:
            for index in torch.arange(len(split)).split(_TOGETHER):
                k = split[index][0].to(device)
                x = source.pixels.encode(k.flip(-1) if mirrored else k)
                for kind, value in zip(("mean", "std"), source.autoencoder.encode(x)):
                    parts[f"{name}/{kind}"].append(value.float().cpu())
                bar.update(len(index))
    codes = {name: torch.cat(values) for name, values in parts.items()}
    # the variance of draws is that of the means and the mean of the variances
    mean = torch.stack([c.double().mean() for c in codes["train/mean"].unbind(1)])
    spread = torch.stack([c.double().var(correction=0) for c in codes["train/mean"].unbind(1)])
    within = torch.stack([c.double().square().mean() for c in codes["train/std"].unbind(1)])
    std = (spread + within).sqrt()
    if not bool((std > 0).all()):
        raise ValueError(f"data.autoencoder={source.where}: channel {int((std == 0).nonzero()[0])} of its codes is the "
                         "same number everywhere; take an autoencoder whose codes have fewer channels")
    known = getattr(source.autoencoder, "deviation", None)
    deviation = _measured_deviation(source, data.train, codes, device) if known is None else known
    statistics = {"mean": mean, "std": std, "deviation": torch.as_tensor(deviation, dtype=torch.float64).detach().cpu()}
    return codes | statistics


def _measured_deviation(source: Source, split: Split, codes: dict[str, Tensor], device: torch.device) -> Tensor:
    """Root mean square distance of training pixels from what draws of their codes decode to: the likeliest one."""
    draws, squares = torch.Generator().manual_seed(0), list[Tensor]()
    for index in torch.arange(min(len(split), _MEASURED)).split(_TOGETHER):
        x = source.pixels.encode(split[index][0].to(device))
        noise = torch.randn(codes["train/mean"][index].shape, generator=draws)
        z = codes["train/mean"][index] + codes["train/std"][index] * noise
        squares.append((source.autoencoder.decode(z.to(device)) - x).double().square().flatten(1).mean(1).cpu())
    least = source.pixels.width / (2 * source.pixels.levels)  # of the rounding to levels, were all else perfect
    return torch.cat(squares).mean().sqrt().clamp_min(least / 3**0.5)
