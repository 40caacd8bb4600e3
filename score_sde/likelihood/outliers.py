"""Outlier scores (out-of-distribution detection): the higher, the less likely an example is from a model's data.

Bits per dimension alone mislead: a density may be higher at simple images that never occur than at its training data
(Nalisnick et al. 2019, arXiv:1810.09136). There are two corrections, of numbers that `--mode likelihood` writes:

- typicality, the distance of the bits from their mean over the data, on either side (Nalisnick et al. 2019b,
  arXiv:1906.02994, for single examples);
- the bits minus a measure of the example's complexity: those of a lossless compressor (Serrà et al. 2020,
  arXiv:1909.11480), or of a background model that was trained on other data too (Ren et al. 2019, arXiv:1906.02845).
  This is a difference, and needs no function here.
"""

from __future__ import annotations

import io
import math

import torch
from PIL import Image
from torch import Tensor


def typicality(bits: Tensor, reference: Tensor) -> Tensor:
    """|bits - mean of reference|, (N,), for bits per dimension (N,) and those of the distribution's data, (M,)."""
    if not len(reference):
        raise ValueError("reference must hold the bits of at least one example of the distribution")
    return (bits - reference.to(bits).mean()).abs()


def png_bits_per_dim(k: Tensor) -> Tensor:
    """Length of each uint8 image of k (N, C, H, W), C being 1 or 3, as a PNG in bits per dimension, float64 (N,).

    It includes the file's header, which is the same for all images of a size and does not change their order.
    """
    if k.dtype != torch.uint8 or k.ndim != 4 or k.shape[1] not in (1, 3):
        raise ValueError(f"images must be uint8 (N, 1 or 3, H, W), got {k.dtype} {tuple(k.shape)}")
    sizes = []
    for image in k.cpu().permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, format="PNG", optimize=True)
        sizes.append(8 * file.tell())
    return torch.tensor(sizes, dtype=torch.float64) / math.prod(k.shape[1:])


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Area under the ROC curve: the chance that one of `outside` (N,) has a higher score than one of `inside` (M,).

    Ties count half. Raises ValueError where either is empty or a score is NaN.
    """
    if not len(inside) or not len(outside):
        raise ValueError(f"both sets need scores, got {len(inside)} inside and {len(outside)} outside")
    if inside.isnan().any() or outside.isnan().any():
        raise ValueError("a score is NaN, which has no place among the others")
    lower = inside.double().sort().values
    wins = sum(torch.searchsorted(lower, outside.double(), right=ties).double().mean() for ties in (False, True))
    return float(wins) / (2 * len(inside))
