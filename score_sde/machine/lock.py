"""Lock of a folder: one process at a time works there, named by a file `.lock` that it removes when it is done.

On one machine the kernel decides (flock): a lock is free as soon as its process ends, by whatever signal, and the next
process takes the file over. The file tells others who holds the lock: machine, host, process, since when, doing what.
If the file system has no flock, we look for the process by its number and start time. If the file names another
machine, whose locks and processes may be invisible here, we watch the file: its holder renews the file's time every
`BEAT` seconds, and a holder that does not do so for `SILENCE` seconds is gone. A restarted machine counts as another.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from .log import log
from .whole_files import is_alive

try:
    import fcntl
except ImportError:  # pragma: no cover (Windows has none)
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
BEAT = 15.0  # seconds
SILENCE = 120.0

Record = dict[str, Any]  # describes the process that holds a lock


class Busy(ValueError):
    """Another process holds the lock of the folder."""


@contextmanager
def held(folder: Path, doing: str) -> Iterator[None]:
    """Hold the lock of `folder`, created if missing; `doing`, such as "training", tells other processes why.

    It takes over the lock of a process that died, and logs that. Raises Busy with the process that holds the lock, its
    host and since when.
    """
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    file = _acquire(path)
    try:
        file.truncate(0)  # it was opened for appending
        file.write(json.dumps(_own_record(doing)))
        file.flush()
        done = threading.Event()
        beat = threading.Thread(target=_renew, args=(path, done), daemon=True)
        beat.start()
        try:
            yield
        finally:
            done.set()
            beat.join()
    finally:
        path.unlink(missing_ok=True)  # while we hold it: once closed it may be another's
        file.close()
        if created:
            with suppress(OSError):
                folder.rmdir()  # if it is still empty


def _acquire(path: Path) -> IO[str]:
    """Open the lock file and lock it. Raises Busy if another process holds it."""
    while True:
        file = path.open("a+")
        try:
            granted = _flock(file)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                holder = _read(file)
                if holder and _alive(holder, path, granted):
                    raise Busy(_refusal(path.parent, holder))
                if holder:
                    log.warning("%s is gone: taking over its lock of %s", _describe(holder), path.parent)
                return file
            file.close()  # between open and lock its holder finished and removed it: try again
        except BlockingIOError:
            holder = _read(file)
            file.close()
            raise Busy(_refusal(path.parent, holder)) from None
        except BaseException:
            file.close()
            raise


def _flock(file: IO[str]) -> bool:
    """Lock the file; False if its file system cannot. Raises BlockingIOError if another process holds the lock."""
    if fcntl is None:  # pragma: no cover
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            return False
        raise
    return True


def _alive(record: Record, path: Path, granted: bool) -> bool:
    """Whether the process of a record still works; `granted` if we got the lock from flock."""
    if record["machine"] == _machine():
        return not granted and _start_time(record["pid"]) == record["began"]
    log.info("%s holds %s: waiting up to %.0f s for a sign that it still works", _describe(record), path, SILENCE)
    start, last = time.monotonic(), _modified(path)
    while time.monotonic() - start < SILENCE:
        time.sleep(min(1.0, SILENCE / 10))
        if _modified(path) != last:
            return True
    return False


def _modified(path: Path) -> int:
    """When the file was renewed, in ns by its server's clock: opening it makes network file systems look again."""
    try:
        with path.open() as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return 0  # its holder has just finished


def _refusal(folder: Path, record: Record) -> str:
    holder = _describe(record) if record else "another process"
    return f"{folder} is in use: {holder} works there; wait for it, stop it, or choose another folder"


def _describe(record: Record) -> str:
    return f"process {record['pid']} on {record['host']} ({record['doing']} since {record['since']})"


def _own_record(doing: str) -> Record:
    """What this process writes into its lock file."""
    pid, since = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S")
    process = {"host": socket.gethostname(), "machine": _machine(), "pid": pid, "began": _start_time(pid)}
    return {**process, "since": since, "doing": doing}


def _machine() -> str:
    """Identity of this machine since its last start: the boot id on Linux, elsewhere the host name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _start_time(pid: int) -> str | None:
    """When a process of this machine started, in ticks since boot; "" if unknown, None if there is no such process.

    Process numbers are reused, but not together with a start time.
    """
    if not is_alive(pid):
        return None
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]  # field 22; the name in parentheses may hold spaces


def _renew(path: Path, done: threading.Event) -> None:
    while not done.wait(BEAT):
        try:
            os.utime(path)
        except OSError:
            return  # the folder is gone


def _read(file: IO[str]) -> Record:
    """The record in a lock file; {} if it cannot be read because a process died while writing it."""
    file.seek(0)
    try:
        record = json.loads(file.read())
    except ValueError:
        return {}
    complete = isinstance(record, dict) and {*_own_record("")} <= record.keys() and isinstance(record["pid"], int)
    return record if complete else {}
