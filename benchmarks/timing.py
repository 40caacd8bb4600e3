"""Timing by turns: whatever slows the machine for a while slows every candidate, and ratios are taken within a turn."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

Times = list[float]


@dataclass(frozen=True)
class Clock:
    """Seconds for comparisons on one device: how they are read, and how long a comparison goes on at least."""

    device: torch.device
    threads: int
    seconds: float = 5.0
    turns: int = 5

    @property
    def processor_time(self) -> bool:
        """Whether the process's CPU time is taken, which a machine shared with others does not stretch."""
        return self.device.type == "cpu" and self.threads == 1

    def read(self) -> float:
        if self.processor_time:
            return time.process_time()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def compare(self, candidates: dict[str, Callable[[], object]]) -> dict[str, Times]:
        """Seconds of each candidate in each turn, after one unmeasured turn; every other turn goes backwards."""
        for work in candidates.values():
            work()
        taken: dict[str, Times] = {name: [] for name in candidates}
        order = list(candidates.items())
        began, turns = time.perf_counter(), 0
        while turns < self.turns or time.perf_counter() - began < self.seconds:
            for name, work in order:
                start = self.read()
                work()
                taken[name].append(self.read() - start)
            order.reverse()
            turns += 1
        return taken


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of the values."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def ratio(above: Times, below: Times) -> Spread:
    """above/below within each turn."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def milliseconds(taken: Times, per: int = 1) -> str:
    """The median, for one of `per` equal parts."""
    return f"{1e3 * statistics.median(taken) / per:.3g} ms"


class Table(NamedTuple):
    """What a benchmark found, with what must be said beside it."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: list[str]

    def __str__(self) -> str:
        """In Markdown, with columns aligned."""
        lines = [self.head, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.head))]
        text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in lines]
        text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
        return "\n".join([f"### {self.title}", "", *text, "", *(f"- {note}" for note in self.notes)])


def machine(device: torch.device) -> str:
    """The processor or GPU, and the versions that matter for speed."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    cpu = f"{names[0] if names else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    load = f"{os.cpu_count()} cores with a load of {os.getloadavg()[0]:.1f}"
    return f"{where}; {load}; torch {torch.__version__}, Python {platform.python_version()}"
