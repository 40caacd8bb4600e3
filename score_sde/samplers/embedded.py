"""The probability flow by an embedded Runge-Kutta pair, with a step size for each example."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ..models.base import ScoreModel, of_examples
from ..noise import Noise
from ..ode.circle import FIRST_STEP, Circle
from ..ode.integrators import GaveUp, check_tolerances, integrate_each
from .base import Sampler, refuse_learned
from .deterministic import check_noisy


@dataclass(frozen=True)
class EmbeddedODE(Sampler):
    """The probability flow by Dormand-Prince 5(4), also known as dopri5 and RK45, with a step size for each example.

    The flow is solved on its `Circle`, which suits both ends of every SDE, and chains. A step is accepted where the
    root mean square of error/(atol + rtol |y|) over an example is at most 1. No example depends on its neighbours or
    waits for them: only those that have not arrived are evaluated. States are reported at the grid's points. Raises
    ValueError for impossible tolerances, and where the grid ends at clean data (sigma = 0); RuntimeError, which names
    the examples, where the solver gives up between two times of the grid (see `ode.integrate_each`).
    """

    rtol: float = 1e-4
    atol: float = 1e-4

    def __post_init__(self) -> None:
        check_tolerances(self.rtol, self.atol)

    def walk(self, model: ScoreModel, x: Tensor, times: Tensor, noise: Noise) -> Iterator[Tensor]:
        check_noisy(model, times)
        circle, batch = Circle(model), len(x)

        def field(u: Tensor, y: Tensor, rows: Tensor, whole: bool) -> Tensor:
            with of_examples(model, rows, batch):
                return circle.velocity(u, y)

        places, radii = circle.place(times), circle.radius(times).tolist()
        refuse_learned(places, "EmbeddedODE")
        h = FIRST_STEP * (places[0] - places[-1]).expand(batch)
        for i, (start, end) in enumerate(pairwise(places)):
            x, h, _, failure = integrate_each(
                field, x / radii[i], start, end, rtol=self.rtol, atol=self.atol, step=h, time=circle.time,
                name="EmbeddedODE",
            )  # fmt: skip
            if failure:
                raise GaveUp(failure)
            x = x * radii[i + 1]
            yield x
