"""What to take for a given number of network evaluations."""

from __future__ import annotations

from torch import Tensor

from ..sdes import SDE
from .base import Sampler
from .exponential import SHORT, Multistep, UniPC
from .times import arcsinh


def recommended(sde: SDE, nfe: int) -> tuple[Sampler, Tensor]:
    """(sampler, times) of the least error found for `nfe` evaluations of a network, one per step; it draws no noise.

    On the grid `times.arcsinh`, with ``predict="both"``, which interpolates estimates of the data where noise outweighs
    them and of the noise afterwards: `Multistep` of order 3 below 7 steps, from there `UniPC`, of order 2 below 15 and
    then of order 3. The choice is measured: ``python -m benchmarks.solvers`` compares it with the other samplers here
    and those of diffusers and score_sde_pytorch (docs/performance.md, also where it loses).

        sampler, grid = recommended(model.sde, 20)
        x = sample(model, sampler, (16, 1, 8, 8), grid)

    The grid ends at the SDE's t_min; where that is far below what sampling needs, pass `replace(model.sde, t_min=...)`.
    Raises ValueError for fewer than one evaluation, and for an SDE with sigma(t_min) = 0.
    """
    return fast(nfe), arcsinh(sde, nfe)


def fast(nfe: int) -> Sampler:
    """The sampler alone."""
    if nfe < 7:  # over steps as long as these a corrector makes a network's errors larger
        return Multistep(3, "both", start="lower")
    return UniPC(2 if nfe < SHORT else 3, predict="both", start="lower", short=25)
