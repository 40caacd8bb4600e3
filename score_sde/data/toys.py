"""Toy data sets in the plane, each with its exact model at every noise level.

`ring` is a Gaussian mixture; `checkerboard` is uniform on squares. `moons` and `swiss_roll` are curves, uniform in an
angle and blurred by a Gaussian: their density is an integral over the angle. Gauss-Legendre nodes turn it into a
mixture with one Gaussian per node, which is exact to rounding once the nodes lie closer than the blur.
`EXACT[name](sde)` is the model. Every sampler takes (n, seed), seed >= 0, and returns float32 (n, 2) of order 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..models.closed_form import Boxes, Mixture
from ..noise import natural
from ..sdes.linear import SDE


def ring_mixture(components: int = 8, radius: float = 1.0, std: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    """Equal isotropic Gaussians on a circle: weights (K,), means (K, 2), variances (K,), float64."""
    angle = torch.arange(components, dtype=torch.float64) * (2 * math.pi / components)
    means = radius * torch.stack([angle.cos(), angle.sin()], dim=1)
    return torch.full_like(angle, 1 / components), means, torch.full_like(angle, std**2)


def ring(n: int, seed: int = 0) -> Tensor:
    """Eight Gaussians on a circle: n points from `ring_mixture()`."""
    random = _random(seed)
    weights, means, variances = (a.numpy() for a in ring_mixture())
    k = random.choice(len(weights), n, p=weights)
    return _float32(means[k] + np.sqrt(variances[k])[:, None] * random.standard_normal((n, 2)))


def moons(n: int, seed: int = 0) -> Tensor:
    """Two interleaved half circles of radius 0.8, blurred by 0.05 in each direction."""
    random = _random(seed)
    angle, upper = math.pi * random.random(n), random.integers(0, 2, n)
    return _float32(_moons(angle, 2 * upper - 1) + 0.05 * random.standard_normal((n, 2)))


def moons_mixture(nodes: int = 128) -> tuple[Tensor, Tensor, float]:
    """`moons` as a Gaussian mixture: weights (2 nodes,), means (2 nodes, 2) and one variance, float64."""
    u, weights = _gauss_legendre(nodes)
    means = np.concatenate([_moons(math.pi * u, side) for side in (-1, 1)])
    return torch.from_numpy(np.tile(weights, 2) / 2), torch.from_numpy(means), 0.05**2


def _moons(angle: np.ndarray, side: np.ndarray | int) -> np.ndarray:
    """The points (N, 2) at angles in [0, pi] of the lower (side -1) or the upper half circle (1)."""
    return np.stack([0.8 * np.cos(angle) - 0.4 * side, side * (0.8 * np.sin(angle) - 0.2)], axis=1)


def checkerboard(n: int, seed: int = 0) -> Tensor:
    """Uniform on the 8 black squares, of side 1/2, of a 4 x 4 board that covers [-1, 1]²."""
    random = _random(seed)
    row = random.integers(0, 4, n)
    column = 2 * random.integers(0, 2, n) + row % 2
    corner = np.stack([column, row], axis=1)
    return _float32((corner + random.random((n, 2))) / 2 - 1)


def checkerboard_boxes() -> tuple[Tensor, Tensor, Tensor]:
    """`checkerboard` as boxes: weights (8,), lower and upper corners (8, 2) of its squares, float64."""
    low = torch.tensor([(2 * c + r % 2, r) for r in range(4) for c in range(2)], dtype=torch.float64) / 2 - 1
    return torch.full((8,), 1 / 8, dtype=torch.float64), low, low + 0.5


def checkerboard_log_prob(x: Tensor) -> Tensor:
    """Log density of `checkerboard`, in nats, (B,): -log 2 on the black squares, whose area is 2, else -inf."""
    square = ((x + 1) * 2).floor()
    black = (square.sum(1) % 2 == 0) & (square >= 0).all(1) & (square < 4).all(1)
    return torch.where(black, -math.log(2.0), -math.inf).to(x.dtype)


def swiss_roll(n: int, seed: int = 0) -> Tensor:
    """A spiral of one and a half turns, uniform in angle, blurred by 0.03."""
    random = _random(seed)
    return _float32(_spiral(random.random(n)) + 0.03 * random.standard_normal((n, 2)))


def swiss_roll_mixture(nodes: int = 384) -> tuple[Tensor, Tensor, float]:
    """`swiss_roll` as a Gaussian mixture: weights (nodes,), means (nodes, 2) and one variance, float64."""
    u, weights = _gauss_legendre(nodes)
    return torch.from_numpy(weights), torch.from_numpy(_spiral(u)), 0.03**2


def _spiral(u: np.ndarray) -> np.ndarray:
    """The points (N, 2) of the spiral at fractions u in [0, 1] of its angle."""
    angle = 1.5 * math.pi * (1 + 2 * u)
    return np.stack([angle * np.cos(angle), angle * np.sin(angle)], axis=1) / (4.5 * math.pi)


TOYS: dict[str, Callable[[int, int], Tensor]] = {
    "ring": ring, "moons": moons, "checkerboard": checkerboard, "swiss_roll": swiss_roll,
}  # fmt: skip

EXACT: dict[str, Callable[[SDE], Boxes | Mixture]] = {
    "ring": lambda sde: Mixture(sde, *ring_mixture()),
    "moons": lambda sde: Mixture(sde, *moons_mixture()),
    "checkerboard": lambda sde: Boxes(sde, *checkerboard_boxes()),
    "swiss_roll": lambda sde: Mixture(sde, *swiss_roll_mixture()),
}


def _gauss_legendre(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes in [0, 1] and weights of sum 1, each (nodes,)."""
    x, weights = np.polynomial.legendre.leggauss(nodes)
    return (x + 1) / 2, weights / 2


def _random(seed: int) -> np.random.Generator:
    return np.random.default_rng(natural(seed, "seed"))


def _float32(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x.astype(np.float32))
