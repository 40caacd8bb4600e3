"""Progress: lines every half minute in a log, and bars on a terminal that leave no blank lines."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from score_sde.machine import progress
from score_sde.machine.parallel import Processes
from score_sde.machine.progress import Progress, with_progress
from score_sde.tasks.results import in_batches


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "clock", made)
    return made


Log = pytest.CaptureFixture[str]  # standard error, which is no terminal


def test_a_log_has_a_line_every_half_minute(clock: Clock, capsys: Log) -> None:
    with Progress("training", 1000) as bar:
        for i in range(1000):
            clock.now += 0.125
            bar.note(f"loss {i}")
            bar.update()
    text = capsys.readouterr().err
    lines = text.splitlines()
    assert "\r" not in text and len(lines) == 5
    assert lines[0] == "training: 240 of 1000 steps, 8 step/s, 01:35 left, loss 239"
    assert lines[3] == "training: 960 of 1000 steps, 8 step/s, 00:05 left, loss 959"
    assert lines[4] == "training: 1000 of 1000 steps in 02:05, loss 999"


def test_what_is_done_in_half_a_minute_leaves_no_line(clock: Clock, capsys: Log) -> None:
    for _ in with_progress(range(290), "sampling", 290):
        clock.now += 0.1
    assert capsys.readouterr().err == ""


def test_loops_within_loops_share_a_line(clock: Clock, capsys: Log) -> None:
    with Progress("batches", 4, "batch") as outer:
        for _ in range(4):
            with Progress("sampling", 50, leave=False) as inner:
                for _ in range(50):
                    clock.now += 4
                    inner.update()
            outer.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 800 // 32 + 1  # the first update after every half a minute
    assert lines[0] == "batches: 0 of 4 batches; sampling: 8 of 50 steps, 4 s/step, 02:48 left"
    assert lines[8].startswith("batches: 1 of 4 batches") and "; sampling: 22 of 50 steps" in lines[8]
    assert lines[-1] == "batches: 4 of 4 batches in 13:20"


def test_the_rate_is_that_of_the_last_half_minute_and_of_this_run(clock: Clock, capsys: Log) -> None:
    with Progress("training", 100_000) as bar:
        bar.start(90_000)
        for speed in (1, 100):
            for _ in range(30):
                clock.now += 1
                bar.update(speed)
    first, second, _ = capsys.readouterr().err.splitlines()
    assert "90030 of 100000 steps, 1 step/s, 2:46:10 left" in first
    assert "93030 of 100000 steps, 100 step/s, 01:10 left" in second


def test_bytes_and_unknown_totals(clock: Clock, capsys: Log) -> None:
    for total in (163_000_000, None):
        with Progress("downloading", total, "B") as bar:
            clock.now += 30
            bar.update(60_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "downloading: 60.0 MB of 163.0 MB, 2.00 MB/s, 00:52 left"
    assert lines[2] == "downloading: 60.0 MB, 2.00 MB/s"


def test_what_is_not_shown_writes_nothing_and_a_failure_no_last_line(clock: Clock, capsys: Log) -> None:
    with Progress("steps", 9, shown=False) as bar:
        clock.now += 100
        bar.update()
    assert capsys.readouterr().err == "" and bar.n == 1
    with pytest.raises(ZeroDivisionError), Progress("steps", 9) as bar:
        clock.now += 40
        bar.update()
        raise ZeroDivisionError
    assert capsys.readouterr().err == "steps: 1 of 9 steps, 40 s/step, 05:20 left\n"
    with Progress("more", 9) as bar:  # and the one that failed runs no more
        clock.now += 40
        bar.update()
    assert capsys.readouterr().err.startswith("more: ")


def screen(text: str) -> list[str]:
    """What a terminal shows in the end of what was written to it."""
    rows, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[\d*[A-Z]|\r|\n|[^\x1b\r\n]+", text):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            rows += [""] * (row + 1 - len(rows))
        elif part == "\x1b[A":
            row -= 1
        else:
            assert part[0] != "\x1b", part
            rows[row] = rows[row].ljust(column)[:column] + part + rows[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in rows]


def on_a_terminal(work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The screen after `work`, of 100 columns."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    found: list[bytes] = []

    def read() -> None:
        try:
            while block := os.read(master, 4096):
                found.append(block)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with open(slave, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        assert sys.stderr.isatty()
        work()
    reader.join(timeout=10)
    os.close(master)
    return screen(b"".join(found).decode())


def test_nested_bars_leave_no_blank_lines_on_a_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    def compute(first: int, count: int) -> dict[str, np.ndarray]:
        with Progress("sampling", 3, leave=False) as bar:
            for _ in range(3):
                threading.Event().wait(0.05)
                bar.update()
        progress.write(f"a line of the log at {first}")
        return {"x": np.zeros(count)}

    def work() -> None:
        for scale in ("0", "1"):
            one = Processes(0, 1, torch.device("cpu"))
            in_batches(tmp_path / scale, 4, 2, one, compute, "batches", lambda bar, done: bar.note(f"{len(done)} done"))
        progress.write("the end")

    *lines, last = on_a_terminal(work, monkeypatch)
    assert last == "" and all(lines), lines
    said = [line for line in lines if "%" not in line]
    assert said == 2 * ["a line of the log at 0", "a line of the log at 2"] + ["the end"]
    bars = [line for line in lines if "%" in line]
    assert len(bars) == 2 and all(re.match(r"batches: 100%.* 2/2 .*2 done", line) for line in bars)
