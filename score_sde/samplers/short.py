"""What to take for a given number of network evaluations."""

from __future__ import annotations

from torch import Tensor

from ..sdes import SDE
from .base import Sampler
from .exponential import SHORT, Multistep, UniPC
from .times import arcsinh


def recommended(sde: SDE, nfe: int) -> tuple[Sampler, Tensor]:
    """(sampler, times) of the least error found for `nfe` evaluations of a network, one per step; it draws no noise.

    On the grid `times.arcsinh`, with noise prediction: `Multistep` of order 3 below 10 steps, from there `UniPC`, of
    order 2 below 15 and then of order 3. The choice is measured: ``python -m benchmarks.solvers`` compares it with
    the other samplers here and those of diffusers and score_sde_pytorch (docs/performance.md, also where it loses: on a
    network trained on CIFAR-10 to ``UniPC(2)``, which predicts data, on `times.log_snr`).

        sampler, grid = recommended(model.sde, 20)
        x = sample(model, sampler, (16, 1, 8, 8), grid)

    The grid ends at the SDE's t_min; where that is far below what sampling needs, pass `replace(model.sde, t_min=...)`.
    Raises ValueError for fewer than one evaluation, and for an SDE with sigma(t_min) = 0.
    """
    return fast(nfe), arcsinh(sde, nfe)


def fast(nfe: int) -> Sampler:
    """The sampler alone."""
    if nfe < 10:  # over steps as long as these a corrector makes a network's errors larger
        return Multistep(3, "noise", start="lower")
    return UniPC(2 if nfe < SHORT else 3, predict="noise", start="lower", short=25)
