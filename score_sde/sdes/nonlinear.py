"""Nonlinear SDEs, simulated by paths: ``dx = f(x, t) dt + g(t) dw`` for t in [0, 1] from data to noise.

Their kernel x_t | x_0 has no closed form, so there is no `Estimate` of data and noise, and denoising has no target. But
`score_matching.sliced` and `implicit` need only samples of x_t: paths simulated from the data train a score s(x, t) at
every t, and that score runs the SDE backwards (Anderson 1982; Song et al. 2021, appendix A)

    dx = (f - g² s) dt + g dw,        or without noise, with the same marginals,        dx/dt = f - g² s / 2.

`paths` and `backward` also take the linear SDEs, for which results are known exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .linear import SDE, Reversible, like


@dataclass(frozen=True, kw_only=True)
class Diffusion(Reversible):
    """``dx = drift(x, t) dt + diffusion(t) dw``: drift of x's shape, diffusion of t's; x is (B, *shape), t () or (B,).

    Without a diffusion that depends on x the Itô and Stratonovich readings agree, and the reverse drift has no
    divergence term.
    """

    drift: Callable[[Tensor, Tensor], Tensor]
    diffusion: Callable[[Tensor], Tensor]


def paths(sde: Diffusion | SDE, x0: Tensor, times: Tensor, generator: torch.Generator) -> Tensor:
    """States (len(times), B, *shape) of paths from x0 at times[0], by Euler-Maruyama: weak and strong order 1.

    `times` is an increasing 1-D grid. Raises ValueError for another.
    """
    _check_grid(times, 1)
    states = [x0]
    for s, t in pairwise(times.double().cpu()):
        x, h = states[-1], t - s
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)
        states.append(x + like(h, x) * sde.drift(x, s) + like(h.sqrt() * sde.diffusion(s), x) * z)
    return torch.stack(states)


@torch.no_grad()
def backward(
    sde: Diffusion | SDE, score: Callable[[Tensor, Tensor], Tensor], x: Tensor, times: Tensor,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """The states at times[1], times[2], ... of a walk back from x at times[0], led by score(x, t).

    With a generator, Euler-Maruyama on the reverse SDE (weak order 1); without one, Heun's method on the probability
    flow (order 2). `times` is a decreasing 1-D grid. Raises ValueError for another.
    """
    _check_grid(times, -1)
    for t, s in pairwise(times.double().cpu()):
        h = s - t  # negative
        if generator is not None:
            z = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)
            mean = x + like(h, x) * sde.reverse_drift(x, t, score(x, t))
            x = mean + like((-h).sqrt() * sde.diffusion(t), x) * z
        else:
            slope = sde.velocity(x, t, score(x, t))
            y = x + like(h, x) * slope
            x = x + like(h / 2, x) * (slope + sde.velocity(y, s, score(y, s)))
        yield x


def _check_grid(times: Tensor, direction: int) -> None:
    if times.ndim != 1 or len(times) < 2 or not bool((direction * times.diff() > 0).all()):
        order = "increasing" if direction > 0 else "decreasing"
        raise ValueError(f"times must be a 1-D {order} grid of at least 2 times, got {times}")
