"""Distances: of samples from a distribution (sliced Wasserstein), and of images from the truth (PSNR)."""

from __future__ import annotations

import torch
from torch import Tensor


def sliced_wasserstein(x: Tensor, y: Tensor, *, projections: int = 256, p: float = 2.0, seed: int = 0) -> float:
    """Sliced Wasserstein distance of order p between two samples: (E_theta W_p(theta·x, theta·y)^p)^(1/p).

    theta is uniform on the sphere; on a line the optimal transport joins equal quantiles (Rabin et al. 2011; Bonneel et
    al. 2015), so W_p^p is the integral over u in [0, 1] of |F_x^-1(u) - F_y^-1(u)|^p, exact for any two sizes. Two
    samples of one distribution have a distance above 0 too: compare with that of two samples of the truth.

    x is (N, *shape) and y (M, *shape); the seed is that of the `projections`, of which in one dimension one is enough,
    and p is at least 1. Raises ValueError for examples of different shapes, or none.
    """
    if x.shape[1:] != y.shape[1:] or not (len(x) and len(y)):
        raise ValueError(f"x and y must hold examples of one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    x, y = x.flatten(1).double(), y.flatten(1).double()
    theta = torch.randn(x.shape[1], projections, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    theta = (theta / theta.norm(dim=0)).to(x.device)
    a, b = (x @ theta).sort(0).values, (y @ theta).sort(0).values
    # Both inverse distribution functions are constant between the multiples of 1/N and 1/M: count in units of 1/(N M).
    n, m = len(a), len(b)
    ends = torch.cat([m * torch.arange(n + 1), n * torch.arange(m + 1)]).unique().to(x.device)
    begins, width = ends[:-1], ends.diff().to(a) / (n * m)
    cost = (a[begins.div(m, rounding_mode="floor")] - b[begins.div(n, rounding_mode="floor")]).abs() ** p
    return float((width @ cost).mean() ** (1 / p))


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (PSNR) of images y to x, (B, ...) in [0, 1]: -10 log10 of the mean square error.

    In dB, (B,), and at most 60, so that a mean over images with equal ones among them is finite.
    """
    return -10 * torch.log10((x - y).flatten(1).double().square().mean(1).clamp_min(1e-6))
