"""Is an example from the distribution that a model was trained on? Scores that are higher the less it seems so.

Bits per dimension alone mislead: a density may well be higher at simple images that never occur than at those it was
trained on (Nalisnick et al. 2019, arXiv:1810.09136). Two corrections, both of numbers that `--mode likelihood` writes:

- typicality, how far the bits are from their mean over the data, on either side (Nalisnick et al. 2019b,
  arXiv:1906.02994, with one example at a time);
- bits less those of something that knows only how complex an example is: a lossless compressor (Serrà et al. 2020,
  arXiv:1909.11480), or a background model that was trained on what is foreign too (Ren et al. 2019, arXiv:1906.02845).
  It is a difference, and needs no function here.
"""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def typicality(bits: Tensor, reference: Tensor) -> Tensor:
    """|bits - mean of reference|, (N,), for bits per dimension (N,) and those of data of the distribution, (M,)."""
    if not len(reference):
        raise ValueError("reference must hold the bits of at least one example of the distribution")
    return (bits - reference.to(bits).mean()).abs()


def png_bits_per_dim(k: Tensor) -> Tensor:
    """Length of each uint8 image of k (N, C, H, W), C being 1 or 3, as a PNG in bits per dimension, float64 (N,).

    The file's head is part of it; it is the same for all images of a size, and no order of scores depends on it.
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
    from sklearn.metrics import roc_auc_score  # slow to import, and needed here alone

    if not len(inside) or not len(outside):
        raise ValueError(f"both sets need scores, got {len(inside)} inside and {len(outside)} outside")
    scores = torch.cat([inside.double(), outside.double()]).cpu().numpy()
    return float(roc_auc_score(np.repeat([0, 1], [len(inside), len(outside)]), scores))
