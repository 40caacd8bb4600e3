"""Distributed processes: join those that torchrun started, and share values between them.

Other processes get from the main process what it reads or computes (`agreed`, `copies`). They never read it from disk,
because another node may have another disk. Without torchrun there is one process, which gets its own values.
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
    """Another process raised an error, which it reports itself."""


class NoDevice(ValueError):
    """The device of a process does not exist."""


@dataclass(frozen=True)
class Processes:
    """Rank of this process among `world` processes, and its device; `local` is its rank on its node."""

    rank: int
    world: int
    device: torch.device
    control: dist.ProcessGroup | None = None  # gloo, for messages that must not wait for a GPU
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
        """Whether `flag` is true in any process, so that all stop together."""
        if self.world == 1:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.control)
        return bool(value)

    def gather(self, values: Tensor) -> Tensor:
        """Join `values`, of the same shape in all processes, along the first dimension by rank, on the CPU."""
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

    def check_same(self, own: str, what: str, remedy: str) -> None:
        """Raise ValueError where the processes have different texts `own`, with `what` that means and the remedy."""
        hosts, texts = zip(*(text.split(" ", 1) for text in self.texts(f"{socket.gethostname()} {own}")))
        for rank, text in enumerate(texts):
            if text != texts[0]:
                first, other = f"process 0 on {hosts[0]}", f"process {rank} on {hosts[rank]}"
                raise ValueError(f"{what}: {first} has {texts[0]}, {other} has {text}: {remedy}")

    def agreed(self, work: Callable[[], T]) -> T:
        """Call `work` in the main process only; all processes return its result, which must be valid as JSON.

        An error is raised in the main process, and as Elsewhere in the others.
        """
        if self.world == 1:
            return work()
        result: T = json.loads(self._turn(lambda: json.dumps(work()), self.main)[0])
        return result

    def in_turn(self, work: Callable[[], T]) -> T:
        """Call `work` in the main process, then in the first process of each node, then in the others.

        Later processes find on disk what earlier ones wrote, such as a download. An error in one process is raised
        there, and as Elsewhere in all others.
        """
        if self.world == 1:
            return work()
        results: list[T] = []
        turn = 0 if self.main else 1 if self.local == 0 else 2
        for i in range(3):
            self._turn(lambda: results.append(work()) or "", turn == i)  # type: ignore[func-returns-value]
        return results[0]

    def copies(self, work: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Call `work` in the main process; all get exact copies of its tensors on the CPU. Errors as in `agreed`."""
        if self.world == 1:
            return dict(work())
        own: dict[str, Tensor] = {}

        def types_and_shapes() -> list[Any]:
            own.update(work())
            return [[name, str(v.dtype).removeprefix("torch."), list(v.shape)] for name, v in own.items()]

        tensors: dict[str, Tensor] = {}
        for name, dtype, shape in self.agreed(types_and_shapes):
            empty = torch.empty(shape, dtype=getattr(torch, dtype))
            value = own[name].detach().cpu().contiguous() if self.main else empty
            if value.numel():
                dist.broadcast(value.reshape(-1).view(torch.uint8), 0, group=self.control)
            tensors[name] = value
        return tensors

    def _turn(self, work: Callable[[], str], mine: bool) -> list[str]:
        """Results of `work` from all processes, "" from those without `mine`; an error is raised in all."""
        answer, error = "", None
        if mine:
            try:
                answer = f"+{work()}"
            except Exception as caught:  # raised below, after the others know
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
    """Join the processes that torchrun started (nccl on GPUs, gloo on CPUs), or return a single process.

    `device` is "auto" (a GPU if there is one) or any device name of torch. Raises NoDevice if it does not exist.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    name = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(f"cuda:{local}" if name == "cuda" else name)
        torch.ones(1, device=where).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0].split(". ")[0].rstrip(".")  # PyTorch's message has many lines
        raise NoDevice(f"device {device!r} cannot be used here ({reason}): set --config.device=cpu or auto") from None
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if world == 1:
        return Processes(0, 1, where)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    # At the end, one process with harder examples may keep the others waiting for longer than torch's half an hour.
    control = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    return Processes(dist.get_rank(), world, where, control, local)


def first_to_say(line: str) -> bool:
    """Whether no other process of the run has printed this line; all of them usually meet the same error.

    Before they join, only the main process prints, because all read the same command.
    """
    if not dist.is_initialized():
        return int(os.environ.get("RANK", "0")) == 0
    try:
        store = dist.distributed_c10d._get_default_store()
        return int(store.add(f"said {hashlib.sha256(line.encode()).hexdigest()}", 1)) == 1
    except (RuntimeError, ValueError):  # the store ended with its process
        return True


def finish() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
