"""Progress of a loop on standard error, as a bar or, in logs and pipes, a line every 30 s; and stopping by Ctrl-C."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import FrameType
from typing import ClassVar, TypeVar

from tqdm import tqdm

EVERY = 30.0  # seconds between lines
clock = time.monotonic

T = TypeVar("T")


class Progress:
    """Progress bar of a `with` block: how much is done, how fast, and how long the rest will take.

    Loops may be nested: a line then reports all of them, the outermost first.

    Args:
        what: name of the work.
        total: number of units; None if unknown.
        unit: what is counted. "B" is for bytes, shown as kB and MB.
        leave: keep the bar at the end, or write a last line if it took more than half a minute.
        shown: False shows nothing.
    """

    _running: ClassVar[list[Progress]] = []  # those that are shown in lines
    _written: ClassVar[float] = -math.inf  # when the last line was written

    def __init__(
        self, what: str, total: int | None, unit: str = "step", *, leave: bool = True, shown: bool = True
    ) -> None:
        self.what, self.total, self.unit, self.leave, self.shown = what, total, unit, leave, shown
        self.n, self.remark = 0, ""
        self._bar: tqdm | None = None
        self._last = (0, 0.0)  # units done, and the time, at the last line
        self._reported = False

    def __enter__(self) -> Progress:
        if self.shown and sys.stderr.isatty():
            scaled = self.unit == "B"
            self._bar = tqdm(total=self.total, desc=self.what, unit=self.unit, leave=self.leave, unit_scale=scaled)
        elif self.shown:
            self._begin = clock()
            self._last = (self.n, self._begin)
            if not self._running:
                Progress._written = self._begin
            self._running.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self.shown:
            self._running.remove(self)
            if self.leave and self._reported and error[0] is None:
                remark = self.remark and f", {self.remark}"
                write(f"{self.what}: {self._amount()} in {_duration(clock() - self._begin)}{remark}")

    def update(self, count: int = 1) -> None:
        """Count `count` more units as done."""
        self.n += count
        if self._bar is not None:
            self._bar.update(count)
        elif self.shown and clock() - self._written >= EVERY:
            Progress._written = clock()
            write("; ".join(each._line() for each in self._running))

    def start(self, n: int) -> None:
        """Begin at `n` units that an earlier run did; speed and remaining time count only new ones."""
        self.n = n
        self._last = (n, self._last[1])
        if self._bar is not None:
            self._bar.initial = self._bar.n = n

    def note(self, remark: str) -> None:
        """Show a remark beside the progress from now on."""
        self.remark = remark
        if self._bar is not None:
            self._bar.set_postfix_str(remark, refresh=False)

    def _line(self) -> str:
        (n, then), now = self._last, clock()
        self._last, self._reported = (self.n, now), True
        line = f"{self.what}: {self._amount()}"
        if self.n > n and now > then:
            rate = (self.n - n) / (now - then)
            line += f", {self._rate(rate)}"
            if self.total is not None:
                line += f", {_duration((self.total - self.n) / rate)} left"
        return line + (self.remark and f", {self.remark}")

    def _amount(self) -> str:
        if self.unit == "B":
            amount = f"{self.n / 1e6:.1f} MB"
            return amount if self.total is None else f"{amount} of {self.total / 1e6:.1f} MB"
        unit = {"batch": "batches"}.get(self.unit, f"{self.unit}s")
        return f"{self.n} {unit}" if self.total is None else f"{self.n} of {self.total} {unit}"

    def _rate(self, rate: float) -> str:
        if self.unit == "B":
            return f"{rate / 1e6:.2f} MB/s"
        return f"{rate:.3g} {self.unit}/s" if rate >= 1 else f"{1 / rate:.3g} s/{self.unit}"


def with_progress(items: Iterable[T], what: str, total: int | None, unit: str = "step") -> Iterator[T]:
    """Iterate over items with a `Progress` that counts the finished ones."""
    with Progress(what, total, unit) as bar:
        for item in items:
            yield item
            bar.update()


class Stop:
    """Stop on Ctrl-C: called within its `with` block it is true after SIGINT or SIGTERM; a second signal interrupts."""

    def __enter__(self) -> Stop:
        self.asked = False
        self.before = {name: signal.signal(name, self._ask) for name in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for name, handler in self.before.items():
            signal.signal(name, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __call__(self) -> bool:
        return self.asked


def write(text: str) -> None:
    """Write text to standard error above the running bars; it is lost if nobody can read it any more."""
    with suppress(OSError):  # a closed pipe or a full disk must not end the work
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()


def _duration(seconds: float) -> str:
    """ "1:02:03" or "02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
