"""Densities in the plane: small enough to see, two of them with an exact model.

`ring` is a Gaussian mixture: `closed_form.Mixture(sde, *ring_mixture())` is its exact model at every noise level.
`checkerboard` is uniform on squares: `checkerboard_log_prob` is its exact density. The other two have no closed form.
Every sampler takes (n, seed) and returns float32 (n, 2) of unit order of magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def ring_mixture(components: int = 8, radius: float = 1.0, std: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    """Equal round Gaussians on a circle: weights (K,), means (K, 2), variances (K,), in float64."""
    angle = torch.arange(components, dtype=torch.float64) * (2 * math.pi / components)
    means = radius * torch.stack([angle.cos(), angle.sin()], dim=1)
    return (
        torch.full((components,), 1 / components, dtype=torch.float64),
        means,
        torch.full((components,), std**2, dtype=torch.float64),
    )


def ring(n: int, seed: int = 0) -> Tensor:
    """n points of `ring_mixture()`."""
    random = np.random.default_rng(seed)
    weights, means, variances = (a.numpy() for a in ring_mixture())
    k = random.choice(len(weights), n, p=weights)
    return _float32(means[k] + np.sqrt(variances[k])[:, None] * random.standard_normal((n, 2)))


def moons(n: int, seed: int = 0) -> Tensor:
    """Two interleaved half circles of radius 0.8, blurred by 0.05 in each direction."""
    random = np.random.default_rng(seed)
    angle, upper = math.pi * random.random(n), random.integers(0, 2, n)
    side = 2 * upper - 1
    x = np.stack([0.8 * np.cos(angle) - 0.4 * side, side * (0.8 * np.sin(angle) - 0.2)], axis=1)
    return _float32(x + 0.05 * random.standard_normal((n, 2)))


def checkerboard(n: int, seed: int = 0) -> Tensor:
    """Uniform on the 8 black squares, of side 1/2, of a 4 x 4 board that covers [-1, 1]²."""
    random = np.random.default_rng(seed)
    row = random.integers(0, 4, n)
    column = 2 * random.integers(0, 2, n) + row % 2
    corner = np.stack([column, row], axis=1)
    return _float32((corner + random.random((n, 2))) / 2 - 1)


def checkerboard_log_prob(x: Tensor) -> Tensor:
    """Log density of `checkerboard`, in nats, (B,): -log 2 on the black squares, whose area is 2, else -inf."""
    square = ((x + 1) * 2).floor()
    black = (square.sum(1) % 2 == 0) & (square >= 0).all(1) & (square < 4).all(1)
    return torch.where(black, -math.log(2.0), -math.inf).to(x.dtype)


def swiss_roll(n: int, seed: int = 0) -> Tensor:
    """A spiral of one and a half turns, uniform in angle, blurred by 0.03."""
    random = np.random.default_rng(seed)
    angle = 1.5 * math.pi * (1 + 2 * random.random(n))
    x = np.stack([angle * np.cos(angle), angle * np.sin(angle)], axis=1) / (4.5 * math.pi)
    return _float32(x + 0.03 * random.standard_normal((n, 2)))


TOYS: dict[str, Callable[[int, int], Tensor]] = {
    "ring": ring,
    "moons": moons,
    "checkerboard": checkerboard,
    "swiss_roll": swiss_roll,
}


def _float32(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x.astype(np.float32))
