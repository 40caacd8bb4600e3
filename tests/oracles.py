"""The mathematics that tests share: every SDE in one list, some chains, seeded numbers, a mixture with classes.

A new SDE is one more entry of SDES: the tests of coefficients, orders and products take it from there.
"""

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from score_sde import DDPM, EDMSDE, SDE, SMLD, VESDE, VPSDE, CosineSDE, SubVPSDE
from score_sde.models.closed_form import Mixture
from score_sde.networks.blocks import Style
from tests import RECORDED

SDES: list[SDE] = [VPSDE(), SubVPSDE(), VESDE(), CosineSDE(), EDMSDE()]

CHAINS: list[DDPM | SMLD] = [
    DDPM.linear(1000),
    DDPM.cosine(50),
    DDPM([0.3, 0.1, 0.6, 0.2, 0.5]),
    SMLD.from_sde(VESDE(), 1000),
    SMLD([0.1, 0.5, 0.6, 2.0, 7.0]),
]


def name(value: object) -> str:
    """A test's id: the SDE's or sampler's class."""
    return type(value).__name__


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Standard normal numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


MIXTURE = Mixture(VPSDE(), [0.2, 0.5, 0.3], torch.tensor([[-1.0, 0.0], [0.5, 1.0], [1.0, -1.0]]), [0.02, 0.05, 0.1])
T = torch.tensor(0.4, dtype=torch.float64)  # a time at which the mixture has all three modes


def awake(network: torch.nn.Module) -> torch.nn.Module:
    """A network whose branches do not start at nothing."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p += 0.2 * torch.randn(p.shape, generator=g)
    return network


def posterior(x: Tensor, t: Tensor | None, label: Any, of: Mixture = MIXTURE) -> Tensor:
    """log P(y | x_t) by Bayes' rule; log_prob of a label leaves out the weight."""
    weight = of.log_weights[torch.as_tensor(label)]
    return weight + of.log_prob(x, t, label=label) - of.log_prob(x, t)


def points(n: int = 4) -> Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


STYLE = Style(dropout=0.0, init_scale=1.0)


TABLES = json.loads((RECORDED / "sde_tables.json").read_text())


def recorded(case: str) -> tuple[SDE, dict[str, torch.Tensor]]:
    """An SDE of score_sde_pytorch, and what that project computes of it."""
    known = TABLES[case]
    kinds = {"vpsde": VPSDE, "vesde": VESDE}
    sde = kinds[known["sde"]](**{k: v for k, v in known.items() if k.split("_")[0] in ("beta", "sigma")})
    with np.load(RECORDED / "sde_tables.npz") as file:
        arrays = {k.removeprefix(case + "/"): torch.from_numpy(file[k]) for k in file if k.startswith(case + "/")}
    return sde, arrays
