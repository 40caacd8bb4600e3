"""One process or several: what torchrun's environment says, and how processes come to agree.

What the main process reads or finds out the others get from it (`agreed`, `copies`), never from a disk, which on
another node may be another one. Without torchrun everything here is the identity of a single process.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Elsewhere(RuntimeError):
    """Another process has refused to go on; it says why."""


class NoDevice(ValueError):
    """A process's device is not there."""


@dataclass(frozen=True)
class Processes:
    """This process's place among `world` processes, and its device; `local` is its place on its own node."""

    rank: int
    world: int
    device: torch.device
    control: dist.ProcessGroup | None = None  # gloo, for words between hosts that must not wait for a GPU
    local: int = 0

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

    def texts(self, own: str) -> list[str]:
        """The texts of all processes, in order of rank."""
        if self.world == 1:
            return [own]
        data = own.encode()
        lengths = self.gather(torch.tensor([len(data)])).tolist()
        padded = data.ljust(max(1, *lengths), b" ")
        rows = self.gather(torch.frombuffer(bytearray(padded), dtype=torch.uint8)[None])
        return [bytes(row[:length].tolist()).decode() for row, length in zip(rows, lengths, strict=True)]

    def agreed(self, work: Callable[[], T]) -> T:
        """What `work` returns in the main process, a plain value as JSON has them, in all; the others do no work.

        An error in the main process is raised there, and as Elsewhere in the others.
        """
        if self.world == 1:
            return work()
        found: T = json.loads(self._turn(lambda: json.dumps(work()), self.main)[0])
        return found

    def in_turn(self, work: Callable[[], T]) -> T:
        """work() in the main process, then in the first of each node, then in the others.

        What one of them leaves on disk, such as a download, is there for the next. An error in any is raised in all, as
        Elsewhere but where it happened.
        """
        if self.world == 1:
            return work()
        found: list[T] = []
        turn = 0 if self.main else 1 if self.local == 0 else 2
        for i in range(3):
            self._turn(lambda: found.append(work()) or "", turn == i)  # type: ignore[func-returns-value]
        return found[0]

    def copies(self, work: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors that `work` returns in the main process, in all, bit for bit, on the CPU; errors as `agreed`."""
        if self.world == 1:
            return dict(work())
        own: dict[str, Tensor] = {}

        def about() -> list[Any]:
            own.update(work())
            return [[name, str(v.dtype).removeprefix("torch."), list(v.shape)] for name, v in own.items()]

        found: dict[str, Tensor] = {}
        for name, kind, shape in self.agreed(about):
            empty = torch.empty(shape, dtype=getattr(torch, kind))
            value = own[name].detach().cpu().contiguous() if self.main else empty
            if value.numel():
                dist.broadcast(value.reshape(-1).view(torch.uint8), 0, group=self.control)
            found[name] = value
        return found

    def _turn(self, work: Callable[[], str], mine: bool) -> list[str]:
        """What work() returned in each process where it was to do it (`mine`), else ""; an error is raised in all."""
        answer, error = "", None
        if mine:
            try:
                answer = f"+{work()}"
            except Exception as caught:  # raised as soon as the others know of it
                answer, error = f"-process {self.rank} on {socket.gethostname()}: {caught}", caught
        answers = self.texts(answer)
        if error is not None:
            raise error
        refused = next((text[1:] for text in answers if text.startswith("-")), None)
        if refused is not None:
            raise Elsewhere(refused)
        return [text[1:] for text in answers]


ALONE = Processes(0, 1, torch.device("cpu"))


def start(device: str = "auto") -> Processes:
    """Join the processes that torchrun started (nccl on GPUs, gloo on CPUs), or be alone.

    `device` is "auto" (a GPU where there is one) or any name that torch knows. Raises NoDevice for one that is
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
        raise NoDevice(f"device {device!r} cannot be used here ({reason}): set --config.device=cpu or auto") from None
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if world == 1:
        return Processes(0, 1, where)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    # One may have much harder examples than another: at the end it is waited for longer than torch's half an hour.
    control = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    return Processes(dist.get_rank(), world, where, control, local)


def first_to_say(line: str) -> bool:
    """Whether no other process of the run has said the same: mostly all of them meet the same error.

    Before they are joined it is the main one that speaks, as all of them read the same command.
    """
    if not dist.is_initialized():
        return int(os.environ.get("RANK", "0")) == 0
    try:
        store = dist.distributed_c10d._get_default_store()
        return int(store.add(f"said {hashlib.sha256(line.encode()).hexdigest()}", 1)) == 1
    except (RuntimeError, ValueError):  # the store is gone with its process
        return True


def finish() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
