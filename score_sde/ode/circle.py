"""The probability flow on a circle, solved with a step size for each example.

With tan(a) = sigma/(c alpha) the state y = x/sqrt(c² alpha² + sigma²) is cos(a) data/c + sin(a) noise, and as dx = data
d alpha + noise d sigma along the flow (Song et al. 2021, eq. 13),

    dy/da = cos(a) noise - sin(a) data/c.

The angle goes from about 0 to about pi/2 for every SDE. The slope is bounded at both ends and smooth where a chain's f
and g jump. For data N(0, c² I) it is 0, and it is the output of a network with EDM's preconditioning (Karras et al.
2022, table 1, with sigma_data = c). The linear part of the flow, which i-DODE integrates exactly in noise prediction
(Zheng et al. 2023, arXiv:2305.03935, section 4), is integrated exactly here at every noise level.

Data have structure on many scales: where data vary by s in some direction, y turns at tan(a) = s/c. Towards both ends
the steps that an error allows therefore shrink by factors, and in a a solver would try many steps in vain. It steps in

    u = log(a + e) - log(pi/2 - a + e),    e = 0.02,

where steps of one size suit all angles: u is like log(sigma/alpha), but with its ends at a finite distance. Well below
e, as for the levels of 8-bit images (a of 0.004), it is linear in a again. `python -m benchmarks.coordinates` compares
it with a, t and the log SNR: only for smooth densities a is better.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..machine.devices import widest
from ..models.base import ScoreModel, of_examples
from ..sdes.linear import add_, like
from .integrators import GaveUp, Solver, integrate_each, root_mean_square

SCALE = 0.5  # standard deviation of data in [-1, 1], as EDM's sigma_data
SOFT = 0.02  # the e above
WHOLE = math.pi / 2 + 2 * SOFT
FIRST_STEP = 0.02  # of the whole way: near the data the error estimate of a long step may miss a network's roughness
NO_JACOBIAN = "the score has no gradient in x, and a density needs its Jacobian"


@dataclass(frozen=True)
class Circle:
    """The probability flow of `model` on its circle, in u, for data of standard deviation `scale`, the c above."""

    model: ScoreModel
    scale: float = SCALE

    def place(self, t: Tensor) -> Tensor:
        """u at time t."""
        data, noise = self.scale * self.model.sde.alpha(t), self.model.sde.sigma(t)
        return torch.log((torch.atan2(noise, data) + SOFT) / (torch.atan2(data, noise) + SOFT))

    def angles(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """a and pi/2 - a: the second by a formula of its own, as the difference has few digits where alpha is small."""
        a, rest = (WHOLE * torch.sigmoid(v) - SOFT for v in (u, -u))
        return a, rest.clamp_min(0)  # it is 0 where no data are left, and must not be -1e-18

    def time(self, u: Tensor) -> Tensor:
        """The time at which sigma/alpha = c tan(a)."""
        a, rest = self.angles(u)
        return self.model.sde.time(-2 * torch.log(self.scale * torch.sin(a) / torch.sin(rest)))

    def radius(self, t: Tensor) -> Tensor:
        """x/y at time t: sqrt(c² alpha² + sigma²)."""
        return torch.hypot(self.scale * self.model.sde.alpha(t), self.model.sde.sigma(t))

    def velocity(self, u: Tensor, y: Tensor) -> Tensor:
        """dy/du at u, (B,). Raises ValueError where y requires a gradient and the model has none in x."""
        t, (a, rest) = self.time(u), self.angles(u)
        e = self.model(like(self.radius(t), y) * y, t)
        if y.requires_grad and not e.noise.requires_grad:
            raise ValueError(NO_JACOBIAN)
        rate = WHOLE * torch.sigmoid(u) * torch.sigmoid(-u)  # da/du
        noise, data = rate * torch.sin(rest), -rate * torch.sin(a) / self.scale
        return add_(like(noise, y) * e.noise.to(y.dtype), data, e.data.to(y.dtype))


# (velocity: y (n, *shape) -> dy/du, y, rows) -> (dy/du, (n, columns)): the slope, and rates to be integrated with it
Slopes = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], tuple[Tensor, Tensor]]


def carry(
    circle: Circle, x: Tensor, t: float, s: float, solver: Solver, slopes: Slopes | None = None, columns: int = 0,
    dimensions: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Carry x (B, *shape) from time t to s along the probability flow, with a step size for each example.

    Args:
        circle: of any score model, also one with conditions bound for each example.
        solver: its tolerances. A step is accepted where the root mean squares of its error over atol + rtol |v| are at
            most 1 both for the state (v = y) and for the integrals (v = an integral's mean over dimensions).
        slopes: the slope with terms or estimates of its divergence, to be integrated too; by default the slope alone.
        columns, dimensions: number of these terms, and how many dimensions each of them sums over.

    Returns x at time s in float64 (float32 on MPS); the integrals (B, columns) over t of the same terms of div dx/dt;
    and the evaluations that each example took, (B,). Raises RuntimeError where the solver gives up.
    """
    batch, shape, d = len(x), x.shape[1:], math.prod(x.shape[1:])
    wide = widest(x)
    ends = torch.tensor([t, s], dtype=torch.float64)

    def field(u: Tensor, state: Tensor, rows: Tensor, whole: bool) -> Tensor:
        y = state[:, :d].to(x.dtype).reshape(-1, *shape)
        slope = torch.zeros_like(state)
        with of_examples(circle.model, rows, batch):
            if slopes is None or not whole:
                with torch.no_grad():
                    slope[:, :d] = circle.velocity(u, y).flatten(1)
            else:
                velocity, rates = slopes(lambda y: circle.velocity(u, y), y, rows)
                slope[:, :d], slope[:, d:] = velocity.detach().flatten(1), rates
        return slope

    def norm(error: Tensor, old: Tensor, new: Tensor, rtol: float, atol: float) -> Tensor:
        size = root_mean_square(error[:, :d], old[:, :d], new[:, :d], rtol, atol)
        if columns:
            error, old, new = (value[:, d:] / dimensions for value in (error, old, new))
            size = torch.maximum(size, root_mean_square(error, old, new, rtol, atol))
        return size

    (before, after), (start, end) = circle.radius(ends).tolist(), circle.place(ends)
    state = torch.cat([x.flatten(1).to(wide) / before, x.new_zeros(batch, columns, dtype=wide)], dim=1)
    state, _, nfe, failure = integrate_each(
        field, state, start, end, rtol=solver.rtol, atol=solver.atol,
        step=FIRST_STEP * (end - start).abs().expand(batch), norm=norm, time=circle.time,
    )  # fmt: skip
    if failure:
        if slopes is None or bool(state.isnan().any(1).all()):
            raise GaveUp(failure)
        warnings.warn(failure, RuntimeWarning, stacklevel=2)
    # x = radius · y: a dimension's divergence in t is that on the circle plus the rate of log radius.
    integrals = state[:, d:] + dimensions * math.log(after / before)
    return (after * state[:, :d]).reshape(x.shape), integrals, nfe
