"""Encoded images as arrays of 8, 12 or 16 bits, with their transparency over a colour, and what is to become of them.

Pillow has no mode for colours of 16 bits and decodes such files to their high bytes. Its decoders can be told the order
of the bytes, though: a second pass in the other order gives the low ones.
"""

from __future__ import annotations

import io
import struct
import sys
import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageColor, ImageFile, ImageOps, UnidentifiedImageError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF")  # no others, some of which run programs
_GREY = ("1", "L", "LA", "La")
_WEIGHTS = (19595, 38470, 7471)  # of red, green and blue in grey, in units of 2^-16 (ITU-R 601), as Pillow has them
_LIGHT, _SAMPLES, _PLANES = 262, 277, 284  # tags of TIFF 6.0: what 0 means, samples per pixel, how they lie
_NATIVE = "L" if sys.byteorder == "little" else "B"


@dataclass(frozen=True)
class Pixels:
    """How the pixels of image files are read.

    Args:
        file_bits: how many bits the files use of each number, such as 12 where white is 4095 in files of 16; 0: all.
        bits: how many are kept, the highest; 0: all.
        background: colour that transparent images are laid over: a name or #rrggbb.
        mixed: files of fewer bits than `file_bits` are read with all of theirs, and not refused.

    Raises ValueError for what is no colour, and for more bits than the files use.
    """

    file_bits: int = 0
    bits: int = 0
    background: str = "white"
    mixed: bool = False

    def __post_init__(self) -> None:
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            raise ValueError(
                f"data.background={self.background!r} is no colour: give a name such as white, or #rrggbb"
            ) from None
        if self.file_bits and self.bits > self.file_bits:
            raise ValueError(f"data.bits={self.bits} must not exceed data.file_bits={self.file_bits}")

    @classmethod
    def of(cls, section: ConfigDict) -> Pixels:
        """As the section data of a config says."""
        return cls(section.file_bits, section.bits, section.background)

    @property
    def colour(self) -> tuple[int, int, int]:
        """The background's red, green and blue, 0 to 255."""
        red, green, blue, *_ = ImageColor.getrgb(self.background)
        return red, green, blue

    def bits_used(self, array: np.ndarray, held: int, where: str) -> int:
        """How many bits the numbers of a file use that has room for `held`.

        Raises ValueError where a number has more, and where more are asked for than there are.
        """
        for key in ("file_bits", "bits"):
            if getattr(self, key) > held and not self.mixed:
                raise ValueError(
                    f"{where} has {held} bits per number: data.{key}={getattr(self, key)} is more than that"
                )
        used = min(self.file_bits or held, held)
        if used < held and int(array.max()) >> used:
            raise ValueError(
                f"{where} holds the value {int(array.max())}, which has more than data.file_bits={used} bits"
            )
        return used

    def kept(self, array: np.ndarray, used: int) -> np.ndarray:
        """Numbers of which so many bits are used, cut to those that are kept."""
        return array >> (used - self.bits) if self.bits else array

    def levels(self, used: int) -> int:
        """How many values the numbers then have."""
        return 1 << (self.bits or used)


AS_THEY_ARE = Pixels()


class Picture(NamedTuple):
    """uint8 or uint16 (H, W, C), C being 1 or 3; whether a pixel was transparent; and of how many frames it is."""

    array: np.ndarray
    bits: int
    transparent: bool
    frames: int


def is_grey(content: bytes) -> bool:
    """Whether an encoded image has no colours. Raises ValueError as `decode` does."""
    with _open(content) as image:
        return image.mode in _GREY or image.mode.startswith("I") or (_deep(image) > 0 and _raw_mode(image) == "LA;16B")


def decode(content: bytes, grey: bool, background: tuple[int, int, int] = (255, 255, 255)) -> Picture:
    """An encoded image, upright, grey or in colours, with its transparent pixels over the background.

    Raises ValueError that says why it cannot be read.
    """
    raw = _raw(content)
    array, top = raw.array, (1 << raw.bits) - 1
    transparent = raw.alpha is not None and bool((raw.alpha < top).any())
    if raw.alpha is not None and transparent:
        array = _over(array, raw.alpha, background, top)
    return Picture(_as_grey(array) if grey else _as_colour(array), raw.bits, transparent, raw.frames)


def grey_and_alpha(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (H, W) both: an encoded image's shades, whatever is transparent, and how opaque it is, 255 being fully so.

    Raises ValueError as `decode` does.
    """
    raw = _raw(content)
    grey = _as_grey(raw.array)[..., 0]
    alpha = np.full(grey.shape, (1 << raw.bits) - 1, grey.dtype) if raw.alpha is None else raw.alpha
    return tuple((v >> raw.bits - 8).astype(np.uint8) for v in (grey, alpha))  # type: ignore[return-value]


def square(array: np.ndarray, size: int, top: int) -> np.ndarray:
    """The central square of an image (H, W, C), resized to size x size by Lanczos' filter and held to 0..top."""
    height, width = array.shape[:2]
    if (height, width) == (size, size):
        return array
    side = min(height, width)
    left, above = (width - side) // 2, (height - side) // 2
    cut, wanted = array[above : above + side, left : left + side], (size, size)
    if array.dtype == np.uint8:
        whole = Image.fromarray(cut if cut.shape[-1] == 3 else cut[..., 0])
        return np.array(whole.resize(wanted, Image.Resampling.LANCZOS)).reshape(size, size, -1).clip(0, top)
    planes = [Image.fromarray(plane.astype(np.float32)) for plane in np.moveaxis(cut, -1, 0)]
    resized = np.stack([np.array(plane.resize(wanted, Image.Resampling.LANCZOS)) for plane in planes], -1)
    return resized.round().clip(0, top).astype(array.dtype)


class _Refused(ValueError):
    """A sentence about an image, of which the caller knows the name."""


class _Raw(NamedTuple):
    """Numbers as a file has them, (H, W, 1 or 3), and, if it has any, its alpha (H, W)."""

    array: np.ndarray
    alpha: np.ndarray | None
    bits: int
    frames: int


def _raw(content: bytes) -> _Raw:
    try:
        with _open(content) as image:
            frames, deep = getattr(image, "n_frames", 1), _deep(image)
            array, alpha = _deep_planes(image, content, deep) if deep else _planes(image)
            return _Raw(array, alpha, deep or 8, frames)
    except _Refused:
        raise
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        raise _Refused(f"cannot be read as an image ({str(error) or type(error).__name__})") from None


def _open(content: bytes) -> ImageFile.ImageFile:
    """The image, with nothing but its header read."""
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
    except UnidentifiedImageError:  # its message names our buffer
        raise _Refused("cannot be read as an image") from None
    except Exception as error:
        raise _Refused(f"cannot be read as an image ({str(error) or type(error).__name__})") from None
    if image.mode == "F" or (image.mode == "I" and not _deep(image)):
        raise _Refused("has numbers of 32 bits or with a sign: save it with 8 or 16 bits, or as an array of floats")
    return image


def _deep(image: ImageFile.ImageFile) -> int:
    """16 or 12 where an image that is not loaded yet has so many bits per number, else 0."""
    if image.format not in ("PNG", "TIFF") or not image.tile:
        return 0
    raw = _raw_mode(image)
    if raw.startswith("I;12"):
        return 12
    # of colours in planes Pillow's raw mode is that of a plane of 8 bits
    planes = image.format == "TIFF" and max(image.tag_v2.get(258, (1,))) == 16  # type: ignore[attr-defined]
    return 16 if (";16" in raw or planes) and not raw.endswith("S") else 0


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """How a file's bytes are ordered, in Pillow's words, of an image that is not loaded yet."""
    args = image.tile[0].args
    return str(args[0]) if isinstance(args, tuple) else str(args)


def _planes(image: ImageFile.ImageFile) -> tuple[np.ndarray, np.ndarray | None]:
    """uint8 (H, W, 1 or 3) and, of an image with transparency, alpha (H, W)."""
    raw, seen = _raw_mode(image) if image.tile else "", image.info.get("transparency")
    image.load()
    if raw in ("L;2", "L;4") and isinstance(seen, int):  # Pillow scales the shades up to 255, and not this one
        image.info["transparency"] = seen * 255 // (15 if raw == "L;4" else 3)
    upright = ImageOps.exif_transpose(image)
    grey = upright.mode in _GREY
    if upright.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in upright.info:
        whole = np.array(upright.convert("RGBA"))
        return whole[..., :1] if grey else whole[..., :3], whole[..., 3]
    array = np.array(upright.convert("L" if grey else "RGB"))
    return array.reshape(*array.shape[:2], -1), None


def _deep_planes(image: ImageFile.ImageFile, content: bytes, deep: int) -> tuple[np.ndarray, np.ndarray | None]:
    """uint16 (H, W, 1 or 3) and, of an image with transparency, alpha (H, W)."""
    seen = image.info.get("transparency")  # of PNGs: the one colour that is transparent
    tags: Any = getattr(image, "tag_v2", {})  # of TIFFs
    planes = tags.get(_PLANES) == 2 and tags.get(_SAMPLES, 1) > 1  # of these Pillow decodes the high bytes, compressed
    if image.mode.startswith("I"):
        image.load()
        array = np.array(ImageOps.exif_transpose(image)).astype(np.uint16)[..., None]
        if tags.get(_LIGHT) == 0:  # white is 0, which Pillow heeds of 8 bits alone
            array = np.uint16((1 << deep) - 1) - array
    elif _raw_mode(image) == "LA;16B":
        array = _pairs(content)
    elif not planes and _raw_mode(image)[:-1] in ("RGB;16", "RGBA;16", "RGBX;16"):
        array = _high_and_low(image, content)
    else:
        raise _Refused("has 16 bits per number in planes or in another mode: save it as plain grey, RGB or RGBA")
    if array.shape[-1] in (2, 4):
        return array[..., :-1], array[..., -1]
    if seen is None:
        return array, None
    return array, np.where((array == np.array(seen, dtype=np.uint16)).all(-1), 0, 65535).astype(np.uint16)


def _high_and_low(image: ImageFile.ImageFile, content: bytes) -> np.ndarray:
    """uint16 (H, W, C) of an image of 16 bits, by one pass for each half."""
    with _open(content) as second:
        second.tile = [tile._replace(args=_swapped(tile.args)) for tile in second.tile]
        halves = []
        for one in (image, second):
            one.load()
            halves.append(np.array(ImageOps.exif_transpose(one)).astype(np.uint16))
    return halves[0] << 8 | halves[1]


def _swapped(args: tuple[Any, ...] | str | None) -> tuple[Any, ...] | str:
    """A decoder's arguments with the other order of bytes at the end of its raw mode."""
    raw = str(args[0]) if isinstance(args, tuple) else str(args)
    order = _NATIVE if raw[-1] == "N" else raw[-1]
    changed = raw[:-1] + {"B": "L", "L": "B"}[order]
    return (changed, *args[1:]) if isinstance(args, tuple) else changed


def _pairs(content: bytes) -> np.ndarray:
    """uint16 (H, W, 2) of a PNG of grey and alpha with 16 bits: its bytes lie as those of 8-bit RGBA.

    So the header (PNG specification, 11.2.2) is made to say that, bit depth 8 and colour type 6.
    """
    header = content[12:24] + b"\x08\x06" + content[26:29]
    told = content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
    with _open(told) as image:
        image.load()
        four = np.array(ImageOps.exif_transpose(image)).astype(np.uint16)
    return four[..., ::2] << 8 | four[..., 1::2]


def _over(array: np.ndarray, alpha: np.ndarray, background: tuple[int, int, int], top: int) -> np.ndarray:
    """The image (H, W, 1 or 3) over a colour; alpha (H, W) goes up to `top`."""
    colour = np.array(background, dtype=np.int64) * (top // 255)
    under = _as_grey(colour[None, None]) if array.shape[-1] == 1 else colour
    a = alpha.astype(np.int64)[..., None]
    return ((a * array + (top - a) * under + top // 2) // top).astype(array.dtype)


def _as_grey(array: np.ndarray) -> np.ndarray:
    if array.shape[-1] == 1:
        return array
    weighted = (array.astype(np.int64) * np.array(_WEIGHTS)).sum(-1, keepdims=True)
    return (weighted + 0x8000 >> 16).astype(array.dtype)


def _as_colour(array: np.ndarray) -> np.ndarray:
    return array if array.shape[-1] == 3 else np.repeat(array, 3, -1)
