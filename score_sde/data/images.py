"""Decode image files to arrays of 8, 12 or 16 bits, upright, with transparent pixels over a background colour.

Pillow has no mode for colours of 16 bits and decodes such files to their high bytes. Its decoders accept an order of
bytes, so a second pass in the other order returns the low bytes.
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
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF")  # no others: decoders of some formats run programs
_GREY = ("1", "L", "LA", "La")
_WEIGHTS = (19595, 38470, 7471)  # red, green and blue in grey, in units of 2^-16 (ITU-R 601), as in Pillow
_LIGHT, _SAMPLES, _PLANES = 262, 277, 284  # tags of TIFF 6.0: meaning of 0, samples per pixel, planar or not
_NATIVE = "L" if sys.byteorder == "little" else "B"


@dataclass(frozen=True)
class Pixels:
    """How the pixels of image files are read.

    Args:
        file_bits: number of bits that the files use, such as 12 if white is 4095 in files of 16 bits; 0: all.
        bits: number of (highest) bits to keep; 0: all.
        background: colour behind transparent pixels: a name or #rrggbb.
        mixed: accept files of fewer bits than `file_bits`, and use all of their bits.

    Raises ValueError for an unknown colour, and for more bits than the files use.
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
                f"data.background={self.background!r} is not a colour: set a name such as white, or #rrggbb"
            ) from None
        if self.file_bits and self.bits > self.file_bits:
            raise ValueError(f"data.bits={self.bits} must not exceed data.file_bits={self.file_bits}")

    @classmethod
    def of(cls, section: ConfigDict) -> Pixels:
        """Create it from the section `data` of a config."""
        return cls(section.file_bits, section.bits, section.background)

    @property
    def colour(self) -> tuple[int, int, int]:
        """The background's red, green and blue, 0 to 255."""
        red, green, blue, *_ = ImageColor.getrgb(self.background)
        return red, green, blue

    def bits_used(self, array: np.ndarray, stored: int, where: str) -> int:
        """The number of bits that are used in a file of `stored` bits per number.

        Raises ValueError for a number with more bits, and if the config asks for more bits than are stored.
        """
        for key in ("file_bits", "bits"):
            if getattr(self, key) > stored and not self.mixed:
                raise ValueError(
                    f"{where} has {stored} bits per number: reduce data.{key}={getattr(self, key)} to that or less"
                )
        used = min(self.file_bits or stored, stored)
        if used < stored and int(array.max()) >> used:
            raise ValueError(
                f"{where} holds the value {int(array.max())}, which needs more than {used} bits: raise data.file_bits"
            )
        return used

    def kept(self, array: np.ndarray, used: int) -> np.ndarray:
        """Numbers of `used` bits, reduced to their highest `bits`."""
        return array >> (used - self.bits) if self.bits else array

    def levels(self, used: int) -> int:
        """The number of levels after that."""
        return 1 << (self.bits or used)


AS_THEY_ARE = Pixels()


class Picture(NamedTuple):
    """A decoded image: uint8 or uint16 (H, W, 1 or 3), its bits, any transparency, its number of frames."""

    array: np.ndarray
    bits: int
    transparent: bool
    frames: int


def is_grey(content: bytes) -> bool:
    """Whether an encoded image is grey. Raises ValueError as `decode` does."""
    with _open(content) as image:
        return image.mode in _GREY or image.mode.startswith("I") or (_deep(image) > 0 and _raw_mode(image) == "LA;16B")


def decode(content: bytes, grey: bool, background: tuple[int, int, int] = (255, 255, 255)) -> Picture:
    """Decode an image, upright, to grey or RGB, with transparent pixels over the background.

    Raises ValueError with the reason if it cannot be read.
    """
    raw = _raw(content)
    array, top = raw.array, (1 << raw.bits) - 1
    transparent = raw.alpha is not None and bool((raw.alpha < top).any())
    if raw.alpha is not None and transparent:
        array = _over(array, raw.alpha, background, top)
    array = _as_grey(array) if grey else np.repeat(array, 3 // array.shape[-1], -1)
    return Picture(array, raw.bits, transparent, raw.frames)


def grey_and_alpha(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Decode a mask to its grey values, transparent or not, and its alpha (255 is opaque), both uint8 (H, W).

    Raises ValueError as `decode` does.
    """
    raw = _raw(content)
    grey = _as_grey(raw.array)[..., 0]
    alpha = np.full(grey.shape, (1 << raw.bits) - 1, grey.dtype) if raw.alpha is None else raw.alpha
    return tuple((v >> raw.bits - 8).astype(np.uint8) for v in (grey, alpha))  # type: ignore[return-value]


def square(array: np.ndarray, size: int, top: int) -> np.ndarray:
    """Crop an image (H, W, C) to its central square, resize it to size x size (Lanczos) and clip it to 0..top."""
    height, width = array.shape[:2]
    if (height, width) == (size, size):
        return array
    side = min(height, width)
    left, above = (width - side) // 2, (height - side) // 2
    crop, target = array[above : above + side, left : left + side], (size, size)
    if array.dtype == np.uint8:
        image = Image.fromarray(crop if crop.shape[-1] == 3 else crop[..., 0])
        return np.array(image.resize(target, Image.Resampling.LANCZOS)).reshape(size, size, -1).clip(0, top)
    planes = [Image.fromarray(plane.astype(np.float32)) for plane in np.moveaxis(crop, -1, 0)]
    resized = np.stack([np.array(plane.resize(target, Image.Resampling.LANCZOS)) for plane in planes], -1)
    return resized.round().clip(0, top).astype(array.dtype)


class _Refused(ValueError):
    """Why an image is refused; the caller adds its name."""


class _Raw(NamedTuple):
    """Numbers as stored in a file, (H, W, 1 or 3), and its alpha (H, W), if any."""

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
    except Exception as error:  # a damaged file can make Pillow's decoders raise anything
        raise _Refused(f"cannot be read as an image ({str(error) or type(error).__name__})") from None


def _open(content: bytes) -> ImageFile.ImageFile:
    """The image, of which only the header is read."""
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
    except Exception as error:
        # the message of an unknown format names our buffer
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({str(error) or type(error).__name__})"
        raise _Refused(f"cannot be read as an image{reason}") from None
    if image.mode == "F" or (image.mode == "I" and not _deep(image)):
        raise _Refused("has numbers of 32 bits or signed ones: save it with 8 or 16 bits, or as an array of floats")
    return image


def _deep(image: ImageFile.ImageFile) -> int:
    """The bits per number of an image that is not loaded yet, if they are 16 or 12, else 0."""
    if image.format not in ("PNG", "TIFF") or not image.tile:
        return 0
    raw = _raw_mode(image)
    if raw.startswith("I;12"):
        return 12
    # for colours in planes, Pillow's raw mode is that of a plane of 8 bits
    planes = image.format == "TIFF" and max(image.tag_v2.get(258, (1,))) == 16  # type: ignore[attr-defined]
    return 16 if (";16" in raw or planes) and not raw.endswith("S") else 0


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """Pillow's name for the order of the bytes in the file of an image that is not loaded yet."""
    args = image.tile[0].args
    return str(args[0]) if isinstance(args, tuple) else str(args)


def _planes(image: ImageFile.ImageFile) -> tuple[np.ndarray, np.ndarray | None]:
    """Decode an image of 8 bits: uint8 (H, W, 1 or 3), and alpha (H, W) if it has transparency."""
    raw, transparent = _raw_mode(image) if image.tile else "", image.info.get("transparency")
    image.load()
    if raw in ("L;2", "L;4") and isinstance(transparent, int):  # Pillow scales shades to 255, but not this one
        image.info["transparency"] = transparent * 255 // (15 if raw == "L;4" else 3)
    upright = ImageOps.exif_transpose(image)
    grey = upright.mode in _GREY
    if upright.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in upright.info:
        rgba = np.array(upright.convert("RGBA"))
        return rgba[..., :1] if grey else rgba[..., :3], rgba[..., 3]
    array = np.array(upright.convert("L" if grey else "RGB"))
    return array.reshape(*array.shape[:2], -1), None


def _deep_planes(image: ImageFile.ImageFile, content: bytes, deep: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Decode an image of 12 or 16 bits: uint16 (H, W, 1 or 3), and alpha (H, W) if it has transparency."""
    transparent = image.info.get("transparency")  # PNG: the one transparent colour
    tags: Any = getattr(image, "tag_v2", {})  # TIFF
    planes = tags.get(_PLANES) == 2 and tags.get(_SAMPLES, 1) > 1  # compressed, Pillow decodes only their high bytes
    if image.mode.startswith("I"):
        image.load()
        array = np.array(ImageOps.exif_transpose(image)).astype(np.uint16)[..., None]
        if tags.get(_LIGHT) == 0:  # white is 0; Pillow only respects this for 8 bits
            array = np.uint16((1 << deep) - 1) - array
    elif _raw_mode(image) == "LA;16B":
        array = _pairs(content)
    elif not planes and _raw_mode(image)[:-1] in ("RGB;16", "RGBA;16", "RGBX;16"):
        array = _high_and_low(image, content)
    else:
        raise _Refused("has 16 bits per number in separate planes or in another mode: save it as grey, RGB or RGBA")
    if array.shape[-1] in (2, 4):
        return array[..., :-1], array[..., -1]
    if transparent is None:
        return array, None
    return array, np.where((array == np.array(transparent, dtype=np.uint16)).all(-1), 0, 65535).astype(np.uint16)


def _high_and_low(image: ImageFile.ImageFile, content: bytes) -> np.ndarray:
    """Decode colours of 16 bits, uint16 (H, W, C), in one pass for the high and one for the low bytes."""
    with _open(content) as second:
        second.tile = [tile._replace(args=_swapped(tile.args)) for tile in second.tile]
        halves = []
        for half in (image, second):
            half.load()
            halves.append(np.array(ImageOps.exif_transpose(half)).astype(np.uint16))
    return halves[0] << 8 | halves[1]


def _swapped(args: tuple[Any, ...] | str | None) -> tuple[Any, ...] | str:
    """The arguments of a decoder with the other order of bytes, which ends its raw mode."""
    raw = str(args[0]) if isinstance(args, tuple) else str(args)
    order = _NATIVE if raw[-1] == "N" else raw[-1]
    changed = raw[:-1] + {"B": "L", "L": "B"}[order]
    return (changed, *args[1:]) if isinstance(args, tuple) else changed


def _pairs(content: bytes) -> np.ndarray:
    """Decode a PNG of grey and alpha with 16 bits, uint16 (H, W, 2).

    Its bytes lie as those of 8-bit RGBA, so we decode it as such: the header (PNG specification, 11.2.2) gets bit depth
    8 and colour type 6.
    """
    header = content[12:24] + b"\x08\x06" + content[26:29]
    as_rgba = content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
    with _open(as_rgba) as image:
        image.load()
        rgba = np.array(ImageOps.exif_transpose(image)).astype(np.uint16)
    return rgba[..., ::2] << 8 | rgba[..., 1::2]


def _over(array: np.ndarray, alpha: np.ndarray, background: tuple[int, int, int], top: int) -> np.ndarray:
    """Compose an image (H, W, 1 or 3) over a colour; alpha (H, W) is opaque at `top`."""
    colour = np.array(background, dtype=np.int64) * (top // 255)
    under = _as_grey(colour[None, None]) if array.shape[-1] == 1 else colour
    a = alpha.astype(np.int64)[..., None]
    return ((a * array + (top - a) * under + top // 2) // top).astype(array.dtype)


def _as_grey(array: np.ndarray) -> np.ndarray:
    if array.shape[-1] == 1:
        return array
    weighted = (array.astype(np.int64) * np.array(_WEIGHTS)).sum(-1, keepdims=True)
    return (weighted + 0x8000 >> 16).astype(array.dtype)
