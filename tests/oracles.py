"""What the tests share: every SDE in one list, some chains, and seeded numbers.

A new SDE is one more entry of SDES: the tests of coefficients, orders and products take it from there.
"""

import torch

from score_sde import DDPM, EDMSDE, SDE, SMLD, VESDE, VPSDE, CosineSDE, SubVPSDE

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
