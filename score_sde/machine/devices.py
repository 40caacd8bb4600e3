"""Devices and dtypes of tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(a: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Move a tensor to a device and dtype (default: its own); copies from the CPU do not block.

    A blocking copy of a few numbers would stall a GPU's queue several times per step.
    """
    return a.to(device, dtype, non_blocking=a.device.type == "cpu")


def widest(a: Tensor) -> torch.dtype:
    """float64, or float32 for a tensor on MPS, which has no wider type."""
    return torch.float32 if a.device.type == "mps" else torch.float64
