"""How far a loop has come, on standard error: a bar on a terminal, and a line every half minute in a log or a pipe; and
how it is stopped, by Ctrl-C."""

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
    """Shows, within its `with` block, what is done of something, how fast, and how long the rest will take.

    Loops may contain one another: a line then tells of all that are running, the outermost first.

    Args:
        what: is done.
        total: how much of it there is; None where nobody knows.
        unit: what is counted. "B" is for bytes, shown in thousands and millions.
        leave: a bar stays at its end, and what took more than half a minute has a last line.
        shown: False shows nothing.
    """

    _running: ClassVar[list[Progress]] = []  # those that are shown in lines
    _said: ClassVar[float] = -math.inf  # when the last line was written

    def __init__(
        self, what: str, total: int | None, unit: str = "step", *, leave: bool = True, shown: bool = True
    ) -> None:
        self.what, self.total, self.unit, self.leave, self.shown = what, total, unit, leave, shown
        self.n, self.remark = 0, ""
        self._bar: tqdm | None = None
        self._last = (0, 0.0)  # how much was done when, at the last line
        self._told = False

    def __enter__(self) -> Progress:
        if self.shown and sys.stderr.isatty():
            scaled = self.unit == "B"
            self._bar = tqdm(total=self.total, desc=self.what, unit=self.unit, leave=self.leave, unit_scale=scaled)
        elif self.shown:
            self._begin = clock()
            self._last = (self.n, self._begin)
            if not self._running:
                Progress._said = self._begin
            self._running.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self.shown:
            self._running.remove(self)
            if self.leave and self._told and error[0] is None:
                write(f"{self.what}: {self._amount()} in {_duration(clock() - self._begin)}{self._remark()}")

    def update(self, count: int = 1) -> None:
        """`count` more are done."""
        self.n += count
        if self._bar is not None:
            self._bar.update(count)
        elif self.shown and clock() - self._said >= EVERY:
            Progress._said = clock()
            write("; ".join(each._line() for each in self._running))

    def start(self, n: int) -> None:
        """So many were done before, by an earlier run: the time that is left is reckoned from here."""
        self.n = n
        self._last = (n, self._last[1])
        if self._bar is not None:
            self._bar.initial = self._bar.n = n

    def note(self, remark: str) -> None:
        """Show these words, too, from now on."""
        self.remark = remark
        if self._bar is not None:
            self._bar.set_postfix_str(remark, refresh=False)

    def _line(self) -> str:
        (n, then), now = self._last, clock()
        self._last, self._told = (self.n, now), True
        line = f"{self.what}: {self._amount()}"
        if self.n > n and now > then:
            rate = (self.n - n) / (now - then)
            line += f", {self._rate(rate)}"
            if self.total is not None:
                line += f", {_duration((self.total - self.n) / rate)} left"
        return line + self._remark()

    def _remark(self) -> str:
        return f", {self.remark}" if self.remark else ""

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
    """The items one by one, under a `Progress` that counts those that have been worked on."""
    with Progress(what, total, unit) as bar:
        for item in items:
            yield item
            bar.update()


class Stop:
    """Within its `with` block, turns true on SIGINT or SIGTERM; a second one interrupts at once."""

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
    """Lines of text on standard error, above the bars that run there; lost where nobody reads them any more."""
    with suppress(OSError):  # a pipe that was closed, a full disk: no reason to end what is being done
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()


def _duration(seconds: float) -> str:
    """ "1:02:03" or "02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
