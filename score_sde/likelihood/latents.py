"""Latents of the probability flow: encoding data to the prior, decoding, and interpolation (slerp).

The flow ``dx/dt = f x - g² score / 2`` is an ODE, so a model maps every x at t_min to one latent z at t = 1, whose law
is nearly the prior's, N(0, prior_std² I) (Song et al. 2021, section 4.3). `encode` and `decode` solve it in the two
directions; the distance of decode(encode(x)) from x is the solver's error, not the model's.

Latents are interpolated along the sphere. Nearly all of the prior lies at |z| = prior_std sqrt(D), but the middle of a
straight line between two draws at 1/sqrt(2) of that, where the model was never trained.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..machine.devices import widest
from ..models.base import ScoreModel
from ..ode.integrators import EACH, Solver
from .flows import refuse_gradient, score_flow

DEFAULT = Solver(EACH)


def encode(model: ScoreModel, x: Tensor, *, t_min: float = 1e-5, solver: Solver = DEFAULT) -> Tensor:
    """The latents z at t = 1 of x, (B, *shape), at t_min, as in `log_likelihood`.

    Bind conditions first, as in ``encode(model.given(label=y), x)``. The result has no gradient, which
    ``score_flow(model).encode(x)`` has. Raises ValueError if x requires one, RuntimeError where the solver gives up.
    """
    refuse_gradient(x, "encode", "encode(x)")
    with torch.no_grad():
        return score_flow(model, t_min=t_min, solver=solver).encode(x)


def decode(model: ScoreModel, z: Tensor, *, t_min: float = 1e-5, solver: Solver = DEFAULT) -> Tensor:
    """The data x at t_min of latents z, (B, *shape), at t = 1: the inverse of `encode`, to the solver's error.

    The result has no gradient. Raises ValueError if z requires one, RuntimeError where the solver gives up.
    """
    refuse_gradient(z, "decode", "decode(z)")
    with torch.no_grad():
        return score_flow(model, t_min=t_min, solver=solver).decode(z)


def slerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Spherical interpolation (slerp), (N, B, *shape), at `weights` (N,) from 0 for a to 1 for b.

    Directions move along the great circle, lengths linearly. For two independent draws a and b of a prior N(0, std² I)
    with any std the direction at each weight is again uniform, and the mean length is the prior's. For equal lengths it
    is Shoemake's slerp (1985; Song et al. 2021, arXiv:2010.02502, appendix D.5), whose length otherwise need not lie
    between those of its ends. Raises ValueError for shapes that differ, for a zero, which has no direction, and for
    opposite directions, which no single great circle joins.
    """
    if a.shape != b.shape or a.ndim < 2 or weights.ndim != 1:
        raise ValueError(
            f"slerp needs two batches of one shape and weights (N,), got {tuple(a.shape)}, {tuple(b.shape)} and "
            f"{tuple(weights.shape)}"
        )
    wide = widest(a)
    u, v = (y.to(wide).flatten(1) for y in (a, b))
    length_u, length_v = u.norm(dim=1, keepdim=True), v.norm(dim=1, keepdim=True)
    if bool((length_u == 0).any()) or bool((length_v == 0).any()):
        raise ValueError("slerp is between directions, and a latent that is 0 has none: change it")
    u, v = u / length_u, v / length_v
    # the angle from both chords keeps its digits near 0 and pi, where an arc cosine loses half of them
    angle = 2 * torch.atan2((u - v).norm(dim=1, keepdim=True), (u + v).norm(dim=1, keepdim=True))
    if bool((angle > math.pi - 1e-6).any()):
        raise ValueError("slerp is not defined between opposite directions: change one of the latents")
    w = weights.to(u)[:, None, None]
    sine = torch.sin(angle)
    near = angle < 1e-8  # sin((1 - w) angle)/sin(angle) is then 1 - w
    left = torch.where(near, 1 - w, torch.sin((1 - w) * angle) / sine.masked_fill(near, 1))
    right = torch.where(near, w, torch.sin(w * angle) / sine.masked_fill(near, 1))
    length = (1 - w) * length_u + w * length_v
    return (length * (left * u + right * v)).reshape(len(weights), *a.shape).to(a.dtype)
