"""Pictures of samples: PNGs, grids of them, and the plane's points as a picture."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_PADDING = 2


def grid(images: Tensor, columns: int | None = None, zoom: int = 1) -> Tensor:
    """uint8 (N, C, H, W) as one picture (C, H', W'), row by row, two black pixels between and around them.

    As square as may be unless `columns` says otherwise; `zoom` repeats each pixel, for images too small to see.
    """
    n, c, h, w = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    h, w = h * zoom + _PADDING, w * zoom + _PADDING
    out = torch.zeros(c, rows * h + _PADDING, columns * w + _PADDING, dtype=torch.uint8)
    for i, image in enumerate(images.cpu()):
        top, left = i // columns * h + _PADDING, i % columns * w + _PADDING
        out[:, top : top + h - _PADDING, left : left + w - _PADDING] = image.repeat_interleave(
            zoom, 1
        ).repeat_interleave(zoom, 2)
    return out


def write_png(image: Tensor, path: str | Path) -> None:
    """One uint8 picture (C, H, W), C being 1 or 3, as a PNG."""
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"a PNG needs uint8 (1 or 3, H, W), got {image.dtype} {tuple(image.shape)}")
    pixels = image.cpu().permute(1, 2, 0).numpy()
    Image.fromarray(pixels[..., 0] if len(image) == 1 else pixels).save(path, format="PNG")


def write_grid(images: Tensor, path: str | Path, columns: int | None = None, zoom: int = 1) -> None:
    """`grid` of uint8 (N, C, H, W) as a PNG."""
    write_png(grid(images, columns, zoom), path)


def histogram(points: Tensor, size: int = 256, extent: float = 1.5) -> Tensor:
    """Where the points (N, 2) lie in [-extent, extent]², as a picture, uint8 (1, size, size), with y upwards."""
    edges = np.linspace(-extent, extent, size + 1)
    x, y = points.detach().cpu().to(torch.float64).unbind(1)
    counts, _, _ = np.histogram2d(-y.numpy(), x.numpy(), bins=(edges, edges))
    shade = 255 * np.sqrt(counts / max(1.0, counts.max()))
    return torch.from_numpy(shade.astype(np.uint8))[None]


def heat(values: Tensor) -> Tensor:
    """Values (N, 1, H, W) in [0, 1] as colours, uint8 (N, 3, H, W): black, red, yellow, white."""
    return (
        ((3 * values - torch.arange(3, device=values.device).reshape(3, 1, 1)).clamp(0, 1) * 255)
        .round()
        .to(torch.uint8)
    )
