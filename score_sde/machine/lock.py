"""One process at a time works in a folder: a file `.lock` in it says which, and goes when that process is done.

On one machine the kernel decides (flock): a lock whose process is gone, by whatever signal, is free at once, and what
is left of its file is taken over. The file tells the others who holds it: machine, host, process, since when, doing
what. Where the file system knows no flock, the process is looked for by its number and beginning. And where the file
names another machine, whose locks and processes may not be seen from here, it is watched: its holder renews the file's
time every `BEAT` seconds, and who has not done so for `SILENCE` is gone. A machine started again is another one.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # pragma: no cover (no such thing on Windows)
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
BEAT = 15.0  # seconds
SILENCE = 120.0

log = logging.getLogger("score_sde")


Record = dict[str, Any]  # of a process that holds a lock


class Busy(ValueError):
    """Another process works in the folder."""


@contextmanager
def held(folder: Path, doing: str) -> Iterator[None]:
    """Work in `folder` (made if it is not there) alone; `doing` says what, such as "training", to those that come.

    A lock that a process left behind as it died is taken over, which is logged. Raises Busy, which names the process
    that holds it, its host and when it began.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    file = _taken(path)
    try:
        _write(file, _own(doing))
        done = threading.Event()
        beat = threading.Thread(target=_renew, args=(path, done), daemon=True)
        beat.start()
        try:
            yield
        finally:
            done.set()
            beat.join()
    finally:
        path.unlink(missing_ok=True)  # before it is closed, so that nobody can hold it yet
        file.close()
        if made:
            with suppress(OSError):
                folder.rmdir()  # nothing came of it, if it is empty


def _taken(path: Path) -> IO[str]:
    """The lock file, open, and held by this process."""
    while True:
        file = path.open("a+")
        try:
            known = _flock(file)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                left = _read(file)
                if left and _at_work(left, path, known):
                    raise Busy(_refusal(path.parent, left))
                if left:
                    log.warning("%s is gone: its lock of %s is taken over", _told(left), path.parent)
                return file
            file.close()  # its holder was done, and took it away, between open and lock
        except BlockingIOError:
            holder = _read(file)
            file.close()
            raise Busy(_refusal(path.parent, holder)) from None
        except BaseException:
            file.close()
            raise


def _flock(file: IO[str]) -> bool:
    """Lock the file, if its file system can. Raises BlockingIOError where another process holds it."""
    if fcntl is None:  # pragma: no cover
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            return False
        raise
    return True


def _at_work(record: Record, path: Path, known: bool) -> bool:
    """Whether the process of a record still holds the lock; `known` where flock was granted."""
    if record["machine"] == _machine():
        return not known and _began(record["pid"]) == record["began"]
    log.info("%s has left a lock in %s: waiting up to %.0f s for a sign of it", _told(record), path.parent, SILENCE)
    since, seen = time.monotonic(), _changed(path)
    while time.monotonic() - since < SILENCE:
        time.sleep(min(1.0, SILENCE / 10))
        if _changed(path) != seen:
            return True
    return False


def _changed(path: Path) -> int:
    """When the file was renewed, as its server knows it: network file systems look anew when a file is opened."""
    try:
        with path.open() as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return 0  # its holder was at work, and is done


def _refusal(folder: Path, record: Record) -> str:
    who = f"{_told(record)} works there" if record else "another process works there"
    return f"{folder} is in use: {who}; wait for it, stop it, or choose another folder"


def _told(record: Record) -> str:
    return f"process {record['pid']} on {record['host']} ({record['doing']} since {record['since']})"


def _own(doing: str) -> Record:
    """What this process writes into its lock."""
    since, pid = time.strftime("%Y-%m-%d %H:%M:%S"), os.getpid()
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": pid,
        "began": _began(pid),
        "since": since,
        "doing": doing,
    }


def _machine() -> str:
    """What tells this machine, since it was last started, from all others: Linux' boot id, elsewhere its name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _began(pid: int) -> str | None:
    """When a process of this machine began (in ticks since the machine did), "" if that is unknown, None: no process.

    Numbers of processes are used again; a number and its beginning are not.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # somebody else's
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


def _write(file: IO[str], record: Record) -> None:
    file.truncate(0)  # it is open for appending
    file.write(json.dumps(record))
    file.flush()


def _read(file: IO[str]) -> Record:
    """The record in a lock file, {} where there is none that can be read: a process died as it wrote it."""
    file.seek(0)
    try:
        found = json.loads(file.read())
    except ValueError:
        return {}
    return found if isinstance(found, dict) and {*_own("")} <= found.keys() and isinstance(found["pid"], int) else {}
