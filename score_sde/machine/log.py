"""The log of a command: on the terminal, and once the command is accepted all of them in the workdir's log.txt."""

from __future__ import annotations

import logging
import sys
from logging.handlers import MemoryHandler
from pathlib import Path

from . import progress

log = logging.getLogger("score_sde")
_FORMAT = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")


def log_to_terminal() -> None:
    """All but the lines of numbers, which the bar shows there, to the terminal; the rest waits for `keep_log`."""
    log.setLevel(logging.DEBUG)
    log.handlers.clear()
    terminal: logging.Handler = logging.StreamHandler(_BarSafe())
    terminal.setLevel(logging.INFO)
    terminal.setFormatter(_FORMAT)
    log.addHandler(terminal)
    log.addHandler(MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1))


def keep_log(workdir: Path) -> None:
    """Everything to the workdir's log.txt, from the beginning on: the command is accepted."""
    workdir.mkdir(parents=True, exist_ok=True)
    file = _LogFile(workdir / "log.txt")
    file.setFormatter(_FORMAT)
    for waiting in [handler for handler in log.handlers if isinstance(handler, MemoryHandler)]:
        waiting.setTarget(file)
        waiting.close()
        log.removeHandler(waiting)
        log.addHandler(file)


class _LogFile(logging.FileHandler):
    """A file whose lines are lost where the disk is full: what is being done may go on, and the terminal has them."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _BarSafe:
    """A stream that prints above a running progress bar."""

    def write(self, text: str) -> None:
        if text.strip():
            progress.write(text.rstrip("\n"))

    def flush(self) -> None:
        sys.stderr.flush()
