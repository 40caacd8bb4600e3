"""The log of a command: on the terminal and, once the command is accepted, in the workdir's log.txt."""

from __future__ import annotations

import logging
import sys
from logging.handlers import MemoryHandler
from pathlib import Path

from . import progress

log = logging.getLogger("score_sde")
_FORMAT = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")


def log_to_terminal(workdir: Path) -> None:
    """Log to the terminal, without the lines of numbers, which the bar shows; all lines wait for `keep_log`."""
    log.setLevel(logging.DEBUG)
    for handler in list(log.handlers):  # of an earlier command of this process
        log.removeHandler(handler)
        handler.close()
    terminal: logging.Handler = logging.StreamHandler(_BarSafe())
    terminal.setLevel(logging.INFO)
    terminal.setFormatter(_FORMAT)
    log.addHandler(terminal)
    log.addHandler(_Waiting(workdir))


def keep_log() -> None:
    """The command is accepted: write all lines, earlier ones too, to the workdir's log.txt. Again it does nothing."""
    for waiting in [handler for handler in log.handlers if isinstance(handler, _Waiting)]:
        waiting.workdir.mkdir(parents=True, exist_ok=True)
        file = _LogFile(waiting.workdir / "log.txt")
        file.setFormatter(_FORMAT)
        waiting.setTarget(file)
        waiting.close()
        log.removeHandler(waiting)
        log.addHandler(file)


class _Waiting(MemoryHandler):
    """Keeps the lines of a command until it is accepted."""

    def __init__(self, workdir: Path) -> None:
        super().__init__(10_000, flushLevel=logging.CRITICAL + 1)
        self.workdir = workdir


class _LogFile(logging.FileHandler):
    """A log file that loses lines if the disk is full: the work goes on, and the terminal shows them."""

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
