"""What a sampler does in a step besides asking the model: passes over the state, and nothing else."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from score_sde import (
    VESDE,
    VPSDE,
    Langevin,
    Multistep,
    PredictorCorrector,
    Sampler,
    ScoreModel,
    UniPC,
    times,
)
from score_sde.models.base import Estimate
from score_sde.sdes import SDE
from tests.oracles import SAMPLERS

# sampler: operations on whole states in a step, without the draws of noise
PASSES: dict[Sampler, int] = {
    **{row.sampler: row.passes for row in SAMPLERS if row.passes},
    UniPC(3, predict="noise", start="lower", short=25): 8,
    UniPC(3, predict="both", start="lower", short=25): 8,
}
# Langevin's step sizes are found on the way, from the norms of each example
SMALL: dict[Sampler, int] = {Langevin(): 12, PredictorCorrector(): 12}
FREE = {"aten.view", "aten.detach", "aten.alias"}


class Counted(TorchDispatchMode):
    """Counts operations: those that see a tensor of `size` numbers, and the others."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.whole, self.small = size, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if str(func).rsplit(".", 1)[0] not in FREE:
            whole = any(isinstance(v, Tensor) and v.numel() == self.size for v in (*args, result))
            self.whole, self.small = self.whole + whole, self.small + (not whole)
        return result


class Free(ScoreModel):
    """A model whose answer lies ready."""

    def __init__(self, sde: SDE, answer: Tensor) -> None:
        super().__init__(sde)
        self.answer = Estimate(answer, answer, torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, *args: Any, **condition: Any) -> Estimate:
        return self.answer


def operations(sampler: Sampler, sde: SDE, steps: int) -> tuple[int, int]:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model, grid = Free(sde, x), times.uniform(sde, steps)
    with torch.no_grad(), Counted(x.numel()) as counted:
        for _ in sampler.walk(model, x, grid, lambda like: x):
            pass
    return counted.whole, counted.small


@pytest.mark.parametrize("sampler", PASSES, ids=str)
def test_a_step_is_its_formulas_passes_over_the_state_and_no_arithmetic_of_small_tensors(sampler: Sampler) -> None:
    (whole, small), (more, smaller) = (operations(sampler, VPSDE(), n) for n in (30, 40))
    assert more - whole == 10 * PASSES[sampler]
    assert smaller - small <= 10 * SMALL.get(sampler, 0)


@pytest.mark.parametrize("sampler", [Multistep(3, "noise"), UniPC(3, predict="noise")], ids=str)
def test_what_is_kept_as_it_is_costs_no_pass(sampler: Sampler) -> None:
    whole, more = (operations(sampler, VESDE(), n)[0] for n in (30, 40))
    assert more - whole == 10 * (PASSES[Multistep(3)] - 1 if isinstance(sampler, Multistep) else PASSES[UniPC(3)] - 1)


@pytest.mark.parametrize("sampler", PASSES, ids=str)
def test_what_a_walk_does_once_does_not_hang_on_its_length(sampler: Sampler) -> None:
    once = operations(sampler, VPSDE(), 40)[1] - 40 * SMALL.get(sampler, 0)
    assert once < 250
