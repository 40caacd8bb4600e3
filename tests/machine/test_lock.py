"""A folder is one process' at a time: refused while it works, free when it is done, taken over when it has died."""

import errno
import json
import multiprocessing
import os
import threading
import time
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from score_sde.machine import lock
from score_sde.machine.lock import Busy, held


def another(folder: Path) -> BaseProcess:
    """A process that works in the folder."""
    fork = multiprocessing.get_context("fork")
    inside = fork.Event()
    process = fork.Process(target=_hold, args=(folder, inside))
    process.start()
    assert inside.wait(60)
    return process


def _hold(folder: Path, inside: Event) -> None:
    with held(folder, "training"):
        inside.set()
        time.sleep(60)


def record(folder: Path, **changes: object) -> None:
    """What a process has left in the folder's lock."""
    folder.mkdir(exist_ok=True)
    (folder / lock.NAME).write_text(json.dumps(lock._own_record("training") | changes))


def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", unknown)


@pytest.mark.parametrize("kernel", [True, False])
def test_a_second_process_is_refused_and_a_killed_one_s_folder_taken_over(
    kernel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not kernel:
        without_flock(monkeypatch)
    process = another(tmp_path)
    try:
        with pytest.raises(Busy) as caught, held(tmp_path, "training"):
            pass
        said = str(caught.value)
        assert f"{tmp_path} is in use: process {process.pid} on {os.uname().nodename} (training since 20" in said
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == process.pid, "it was taken from its holder"
    finally:
        process.kill()
        process.join()
    assert caplog.text == ""
    with held(tmp_path, "sampling"):
        assert f"process {process.pid} on" in caplog.text and "is gone" in caplog.text
        assert json.loads((tmp_path / lock.NAME).read_text())["doing"] == "sampling"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_free_again_after_work_and_after_an_error(tmp_path: Path) -> None:
    again = pytest.raises(Busy, match=f"process {os.getpid()} ")
    with held(tmp_path / "new", "training"), again, held(tmp_path / "new", "training"):
        pass
    with pytest.raises(KeyError), held(tmp_path / "new", "training"):
        raise KeyError
    with held(tmp_path / "new", "training"), held(tmp_path / "other", "training"):
        pass
    assert not (tmp_path / "new").exists(), "an empty folder was left"


def test_a_process_number_that_is_used_again_is_not_its_former_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_flock(monkeypatch)
    record(tmp_path)
    with pytest.raises(Busy), held(tmp_path, "training"):
        pass
    for changes in ({"began": "1"}, {"pid": 2**22 + 1, "began": "1"}):
        record(tmp_path, **changes)
        with held(tmp_path, "training"):
            pass


def test_a_lock_of_another_machine_is_watched_for_a_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "SILENCE", 0.5)
    monkeypatch.setattr(lock, "BEAT", 0.05)
    record(tmp_path, machine="another", host="node7")
    done = threading.Event()
    beats = threading.Thread(target=lock._renew, args=(tmp_path / lock.NAME, done))
    beats.start()
    with pytest.raises(Busy, match=r"process \d+ on node7 \(training since"), held(tmp_path, "training"):
        pass
    done.set()
    beats.join()
    with held(tmp_path, "training"):
        assert "on node7 (training" in caplog.text and "is gone" in caplog.text
        before = (tmp_path / lock.NAME).stat().st_mtime_ns
        time.sleep(0.2)
        assert (tmp_path / lock.NAME).stat().st_mtime_ns > before, "its holder gives no sign"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', '{"pid": "x"}'])
def test_a_lock_that_was_never_written_is_nobody_s(content: str, tmp_path: Path) -> None:
    (tmp_path / lock.NAME).write_text(content)
    with held(tmp_path, "training"):
        pass
