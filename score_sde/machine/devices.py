"""Where tensors are, and in what precision."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(a: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """`a` on a device, in a dtype or its own; from the CPU without waiting.

    A blocking copy of a few numbers would stop a GPU's queue, several times in every step.
    """
    return a.to(device, dtype, non_blocking=a.device.type == "cpu")


def widest(a: Tensor) -> torch.dtype:
    """float64, or float32 for a tensor on MPS, which knows nothing wider."""
    return torch.float32 if a.device.type == "mps" else torch.float64
