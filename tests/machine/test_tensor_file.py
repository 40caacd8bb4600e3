"""Files of tensors: equal content in equal bytes, whole or absent, and never anything but what was saved."""

import json
import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from score_sde.machine.whole_files import is_finite, read_header, read_tensors, remove_leftovers, whole, write_tensors

TENSORS = {
    "a/weight": torch.arange(6, dtype=torch.float32).reshape(2, 3) / 7,
    "a/channels_last": torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
    "b/count": torch.tensor(5),
    "b/none": torch.zeros(0, 3),
    "b/flag": torch.tensor([True, False, True]),
    "c/half": torch.tensor([1.5, -2.0, 3.0], dtype=torch.bfloat16),
    "c/double": torch.tensor([1 / 3], dtype=torch.float64),
}
HEADER = {"format": "test 1", "text": 'quotes " and ünicode', "step": "3"}


def split(path: Path) -> tuple[dict[str, object], bytes]:
    """(header as JSON, payload) of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(path: Path, header: dict[str, object], payload: bytes) -> None:
    first = json.dumps(header).encode()
    first += b" " * (-len(first) % 8)
    path.write_bytes(len(first).to_bytes(8, "little") + first + payload)


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == TENSORS.keys() and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in TENSORS.items()
    )


def test_what_is_read_is_what_was_written_here_and_by_the_library(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.safetensors"
    write_tensors(path, TENSORS, HEADER)
    assert same(read_tensors(path)) and same(load_file(path)) and read_header(path) == HEADER
    assert read_tensors(path, "b/").keys() == {"b/count", "b/none", "b/flag"}
    header, payload = split(path)
    for name, value in TENSORS.items():  # aligned, as the library's own readers on other machines need it
        begin = header[name]["data_offsets"][0]  # type: ignore[index]
        assert begin % value.element_size() == 0
    save_file({name: value.contiguous() for name, value in TENSORS.items()}, tmp_path / "theirs.safetensors", HEADER)
    assert same(read_tensors(tmp_path / "theirs.safetensors"))
    assert split(tmp_path / "theirs.safetensors")[1] == payload


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    write_tensors(paths[0], TENSORS, HEADER)
    write_tensors(paths[1], dict(reversed(TENSORS.items())), dict(reversed(HEADER.items())))
    write_tensors(paths[2], TENSORS, {**HEADER, "step": "4"})
    assert paths[0].read_bytes() == paths[1].read_bytes() != paths[2].read_bytes()


def test_every_flipped_byte_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS, HEADER)
    content, refused = path.read_bytes(), 0
    length = int.from_bytes(content[:8], "little")
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            assert same(read_tensors(path)) and read_header(path) == HEADER
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert place < 8 + length, f"byte {place} of the payload was changed, and nobody said so"
    assert refused > 0.95 * len(content)


def test_a_changed_tensor_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS, HEADER)
    header, payload = split(path)
    begin, _ = header["a/weight"]["data_offsets"]  # type: ignore[index]
    join(path, header, payload[: begin + 1] + b"\x55" + payload[begin + 2 :])
    with pytest.raises(ValueError, match=r"x\.safetensors was changed: its tensor a/weight is not what was saved"):
        read_tensors(path)
    read_tensors(path, "b/")  # only what is asked for is read
    renamed = {{"a/weight": "a/wait"}.get(name, name): value for name, value in header.items()}
    join(path, renamed, payload)
    with pytest.raises(ValueError, match="a/wait was not saved"):
        read_tensors(path)
    join(path, {name: value for name, value in header.items() if name != "b/flag"}, payload[:-3])  # the last one
    with pytest.raises(ValueError, match="b/flag was lost"):
        read_tensors(path)
    begin, end = header["c/double"]["data_offsets"]  # type: ignore[index]
    join(path, {**header, "c/double": {"dtype": "I64", "shape": [1], "data_offsets": [begin, end]}}, payload)
    with pytest.raises(ValueError, match="its tensor c/double is not what was saved"):
        read_tensors(path)
    begin, end = header["a/weight"]["data_offsets"]  # type: ignore[index]
    join(path, {**header, "a/weight": {"dtype": "F32", "shape": [3, 2], "data_offsets": [begin, end]}}, payload)
    with pytest.raises(ValueError, match="its tensor a/weight is not what was saved"):
        read_tensors(path)


@pytest.mark.parametrize("key", [*HEADER, "tensors_sha256", "header_sha256"])
def test_a_changed_or_lost_line_of_the_header_is_told(tmp_path: Path, key: str) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS, HEADER)
    header, payload = split(path)
    text = dict(header["__metadata__"])  # type: ignore[call-overload]
    changed = {**text, key: text[key] + " "}
    lost = {name: value for name, value in text.items() if name != key}
    for one in (changed, lost, {**text, "more": "x"}):
        join(path, {**header, "__metadata__": one}, payload)
        with pytest.raises(ValueError, match="was changed: its header is not what was saved"):
            read_header(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, value: float, kind: torch.dtype) -> None:
    bad = torch.ones(5, dtype=kind)
    assert is_finite(bad) and is_finite(torch.full((9,), torch.finfo(kind).max, dtype=kind))  # whose sum is infinite
    bad[3] = value
    assert not is_finite(bad)
    save_file({"fine": torch.ones(2), "bad": bad}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors holds numbers that are not finite in bad"):
        read_tensors(tmp_path / "x.safetensors")
    assert is_finite(torch.tensor([1, 2]))


def test_a_type_that_is_never_written_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"eighth": torch.ones(2).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(ValueError, match="holds eighth as torch.float8_e4m3fn"):
        read_tensors(path)


def test_a_missing_file_a_folder_and_other_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_tensors(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_header(tmp_path)
    for content in (b"", b"1234567", b"\xff" * 100, b"{}", (2).to_bytes(8, "little") + b"[]", b"PK\x03\x04" * 9):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(ValueError, match="truncated or not a safetensors file"):
            read_tensors(tmp_path / "x")


# -- whole or absent


def test_a_block_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="no space"), whole(path) as file:
        file.write(b"half")
        raise OSError("no space left")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with whole(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_files_have_the_permissions_that_the_umask_leaves(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_tensors(tmp_path / "x.safetensors", TENSORS, HEADER)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == 0o666 & ~mask


def test_leftovers_of_dead_processes_go_and_those_of_live_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a process that was killed and of one that lives; and of another host, new and two days old."""
    sleep = [sys.executable, "-c", "import time; time.sleep(100)"]
    dead, alive = subprocess.Popen(sleep), subprocess.Popen(sleep)
    dead.kill()
    dead.wait()
    begun = []

    def begin(name: str, process: int) -> Path:
        """The temporary file of a process that is about to write."""
        with monkeypatch.context() as as_if:
            as_if.setattr(os, "getpid", lambda: process)
            begun.append(whole(tmp_path / name))
            return Path(begun[-1].__enter__().name)

    try:
        begin("a", dead.pid)
        writing = begin("b", alive.pid)
        with monkeypatch.context() as there:
            there.setattr(socket, "gethostname", lambda: "other.cluster")
            new, old = begin("c", alive.pid), begin("d", alive.pid)
        before, other = tmp_path / ".e.safetensors.12.partial", tmp_path / "mine.partial"  # of 0.1.0, and a user's
        before.touch()
        other.touch()
        for path in (old, before):
            os.utime(path, (time.time() - 2 * 86400,) * 2)
        write_tensors(tmp_path / "x.safetensors", TENSORS, HEADER)
        assert {*tmp_path.iterdir()} == {writing, new, other, tmp_path / "x.safetensors"}
    finally:
        alive.kill()
        alive.wait()
    remove_leftovers(tmp_path)
    assert {*tmp_path.iterdir()} == {new, other, tmp_path / "x.safetensors"}
