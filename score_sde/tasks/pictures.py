"""Pictures of samples: PNGs, grids of images, heat maps, and histograms of points of the plane."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..machine.whole_files import whole

_PADDING = 2
_LETTERS = 24  # of a name beside a row


def grid(
    images: Tensor, columns: int | None = None, zoom: int | None = None, groups: Sequence[int] | None = None,
    names: Sequence[str] = (),
) -> Tensor:
    """A grid of images, uint8 (N, C, H, W), as one picture (C, H', W'), with two black pixels around each.

    Args:
        images: C is 1 or 3.
        columns: images in a row; by default the picture is as nearly square as possible.
        zoom: repeats each pixel, by default until an image is some 32 pixels wide.
        groups: each image's group, counted from 0: a class, a prompt, a scale of guidance. The images of a group are
            in rows of their own, in order (see `layout`); image j has the same place in each group. `columns` has no
            effect then.
        names: the groups' names, written in front of their first rows.
    """
    n, c, h, w = images.shape
    zoom = zoom or max(1, 32 // w)
    h, w, of = h * zoom + _PADDING, w * zoom + _PADDING, [0] * n if groups is None else list(groups)
    counts = Counter(of)
    across, down, wide = layout(len(counts), max(counts.values(), default=1), h / w)
    if groups is None and columns:
        down, wide = math.ceil(n / columns), columns
    labels = [_written(name, h) for name in names]
    margin = max((label.shape[1] + _PADDING for label in labels), default=0)
    height, width = math.ceil(len(counts) / across) * down * h, across * (margin + wide * w)
    out = torch.zeros(c, height + _PADDING, width + _PADDING, dtype=torch.uint8)
    place, seen = {group: i for i, group in enumerate(sorted(counts))}, Counter[int]()
    for image, group in zip(images.cpu(), of, strict=True):
        j, seen[group] = seen[group], seen[group] + 1
        top = (place[group] // across * down + j // wide) * h + _PADDING
        left = place[group] % across * (margin + wide * w) + margin + j % wide * w + _PADDING
        enlarged = image.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
        out[:, top : top + h - _PADDING, left : left + w - _PADDING] = enlarged
        if j == 0 and labels:
            label = labels[group]
            out[:, top : top + len(label), left - margin : left - margin + label.shape[1]] = label
    return out


def layout(groups: int, most: int, ratio: float = 1.0) -> tuple[int, int, int]:
    """(groups side by side, rows of a group, columns of a group) in a grid of groups of `most` images or fewer.

    Each group is one row where the grid is then nearly as square as possible; else the longer side is made shortest.
    `ratio` is an image's height over its width.
    """

    def side(across: int, down: int) -> float:
        return max(math.ceil(groups / across) * down * ratio, across * math.ceil(most / down))

    ways = [(across, down) for across in range(1, max(groups, 1) + 1) for down in range(1, most + 1)]
    best = min(ways, key=lambda way: side(*way))
    across, down = (1, 1) if groups > 1 and side(1, 1) <= 1.5 * side(*best) else best
    return across, down, math.ceil(most / down)


def first_of_each(groups: Sequence[int], most: int) -> list[int]:
    """Indices, in order, of at most `most` images: the first ones of each group, equally many, at least one."""
    each, seen, chosen = max(1, most // max(len(set(groups)), 1)), Counter[int](), list[int]()
    for i, group in enumerate(groups):
        if seen[group] < each:
            seen[group] += 1
            chosen.append(i)
    return chosen[:most]


def _written(text: str, height: int) -> Tensor:
    """A line of text, uint8 (height, its width), centred vertically."""
    text = text if len(text) <= _LETTERS else text[: _LETTERS - 3] + "..."
    font = ImageFont.load_default()
    try:
        width = math.ceil(font.getlength(text))
    except UnicodeEncodeError:  # the plain font that Pillow has without FreeType
        text = text.encode("latin-1", "replace").decode("latin-1")
        width = math.ceil(font.getlength(text))
    canvas = Image.new("L", (max(width, 1), height))
    ImageDraw.Draw(canvas).text((0, height / 2), text, 255, font, anchor="lm")
    return torch.from_numpy(np.array(canvas))


def write_png(image: Tensor, path: str | Path) -> None:
    """Write one uint8 picture (C, H, W) as a PNG, which is whole or absent. C is 1 or 3."""
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"a PNG needs uint8 (1 or 3, H, W), got {image.dtype} {tuple(image.shape)}")
    pixels = image.cpu().permute(1, 2, 0).numpy()
    with whole(Path(path)) as file:
        Image.fromarray(pixels[..., 0] if len(image) == 1 else pixels).save(file, format="PNG")


def histogram(points: Tensor, size: int = 256, extent: float = 1.5) -> Tensor:
    """The histogram of points (N, 2) in [-extent, extent]², as a picture, uint8 (1, size, size), with y upwards."""
    edges = np.linspace(-extent, extent, size + 1)
    x, y = points.detach().cpu().to(torch.float64).unbind(1)
    counts, _, _ = np.histogram2d(-y.numpy(), x.numpy(), bins=(edges, edges))
    shade = 255 * np.sqrt(counts / max(1.0, counts.max()))
    return torch.from_numpy(shade.astype(np.uint8))[None]


def heat(values: Tensor) -> Tensor:
    """Values (N, 1, H, W) in [0, 1] as colours, uint8 (N, 3, H, W): black, red, yellow, white."""
    rgb = (3 * values - torch.arange(3, device=values.device).reshape(3, 1, 1)).clamp(0, 1)
    return (255 * rgb).round().to(torch.uint8)
