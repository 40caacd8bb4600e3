"""One process or several: what torchrun's environment says, and the two things that processes must agree on.

Without torchrun everything here is the identity of a single process.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process's place among `world` processes, and its device."""

    rank: int
    world: int
    device: torch.device
    control: dist.ProcessGroup | None = None  # gloo, for words between hosts that must not wait for a GPU

    @property
    def main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier(group=self.control)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process: they stop together or not at all."""
        if self.world == 1:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.control)
        return bool(value)

    def gather(self, values: Tensor) -> Tensor:
        """`values`, of one shape in all processes, joined along the first dimension in order of rank, on the CPU."""
        values = values.detach().cpu().contiguous()
        if self.world == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.world)]
        dist.all_gather(parts, values, group=self.control)
        return torch.cat(parts)


def start(device: str = "auto") -> Processes:
    """Join the processes that torchrun started (nccl on GPUs, gloo on CPUs), or be alone.

    `device` is "auto" (a GPU where there is one) or any name that torch knows. Raises ValueError for one that is
    not there.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    name = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(f"cuda:{local}" if name == "cuda" else name)
        torch.ones(1, device=where).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0].split(". ")[0].rstrip(".")  # PyTorch goes on for pages
        raise ValueError(f"device {device!r} cannot be used here ({reason}): set --config.device=cpu or auto") from None
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if world == 1:
        return Processes(0, 1, where)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    # One may have much harder examples than another: at the end it is waited for longer than torch's half an hour.
    control = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    return Processes(dist.get_rank(), world, where, control)


def finish() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
