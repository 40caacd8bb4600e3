"""What ends a command is one sentence with a remedy and exit code 2; a mistake of the program keeps its traceback."""

import builtins
import errno
import io
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError

from score_sde.cli import run
from score_sde.machine import parallel, progress
from score_sde.machine.whole_files import whole
from score_sde.tasks import dequantize, failures, sample, train
from score_sde.tasks.options import MODES

TOY = {
    "training.n_iters": 4, "training.snapshot_freq": 2, "training.log_freq": 1, "training.batch_size": 4,
    "model.hidden": 8, "model.depth": 1, "sampling.steps": 3, "sampling.num_samples": 3, "sampling.batch_size": 2,
    "eval.num_images": 3, "eval.batch_size": 2, "eval.rtol": 0.1, "eval.atol": 0.1, "eval.check_images": 0,
    "interpolation.pairs": 1, "interpolation.steps": 2, "data.dataset": "files",
}  # fmt: skip
PIXELS = TOY | {
    "data.dataset": "digits", "model.nf": 8, "model.ch_mult": "1,1", "model.num_res_blocks": 1,
    "eval.heat_map": 1, "sampling.single_png": "true", "dequantizer.n_iters": 1, "dequantizer.hidden": 4,
    "dequantizer.layers": 1,
}  # fmt: skip


@cache
def points() -> Path:
    """A file of data whose exact density nobody knows: training on them begins at once."""
    path = Path(tempfile.mkdtemp()) / "points.npy"
    np.save(path, np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32))
    return path


def command(mode: str, workdir: Path, *more: str, pixels: bool = False) -> list[str]:
    config, settings = ("vp_digits", PIXELS) if pixels else ("vp_toy", TOY)
    keys = [f"--config.{key}={value}" for key, value in settings.items()]
    if not pixels:
        keys.append(f"--config.data.path={points()}")
    return ["--config", f"configs/{config}.py", "--mode", mode, "--workdir", str(workdir), *keys, *more]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of the plane, `toy`, one of digits, `digits`, and a mask."""
    base = tmp_path_factory.mktemp("runs")
    quick = "--config.training.snapshot_sampling=false"
    assert run(command("train", base / "toy", quick)) == 0
    assert run(command("train", base / "digits", quick, "--config.training.n_iters=1", pixels=True)) == 0
    Image.fromarray(np.repeat(np.uint8([[0], [255]]), 4, 0).repeat(8, 1)).save(base / "mask.png")
    return base


def only_sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """The one error on standard error, which is its last line."""
    text = capsys.readouterr().err
    lines = text.splitlines()
    assert "Traceback" not in text and "Errno" not in text and "rror ---" not in text, text
    assert lines[-1].startswith("error: ") and sum(line.startswith("error: ") for line in lines) == 1, text
    return lines[-1]


# --- the disk


class Disk:
    """Counts what is made or opened to be written below a folder, and refuses it from some time on."""

    def __init__(self, below: Path, first: int = 10**9, code: int = errno.ENOSPC) -> None:
        self.below, self.first, self.code = str(below), first, code
        self.sites: list[str] = []  # who asked, and not the writer in machine/ that all use
        self.lock = threading.Lock()

    def asked(self, path: Any) -> None:
        if not isinstance(path, str | bytes | os.PathLike) or not os.fsdecode(path).startswith(self.below):
            return
        frame, site = sys._getframe(2), ""
        while frame is not None and not site:
            name = frame.f_code.co_filename
            if ("/score_sde/" in name and "/machine/" not in name) or "tensorboard" in name:
                site = f"{Path(name).name} {frame.f_code.co_name} {frame.f_lineno}"
            frame = frame.f_back  # type: ignore[assignment]
        with self.lock:
            self.sites.append(site)
            refused = len(self.sites) > self.first
        if refused:
            raise OSError(self.code, os.strerror(self.code), os.fsdecode(path))


@contextmanager
def on(disk: Disk) -> Iterator[None]:
    """Within it, files are opened and folders made on `disk`."""
    real_open, real_mkdir, real_serialize = io.open, os.mkdir, safetensors.torch.serialize_file

    def opened(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if set(mode) & set("wax+"):
            disk.asked(file)
        return real_open(file, mode, *rest, **named)

    def made(path: Any, *rest: Any, **named: Any) -> None:
        if not os.path.exists(path):
            disk.asked(path)
        real_mkdir(path, *rest, **named)

    def serialized(tensors: Any, path: Any, **named: Any) -> None:
        try:
            disk.asked(path)
        except OSError as error:
            raise SafetensorError(f"I/O error: {error.strerror} (os error {error.errno})") from None
        real_serialize(tensors, path, **named)

    with pytest.MonkeyPatch.context() as patch:
        for module in (builtins, io):
            patch.setattr(module, "open", opened)
        patch.setattr(os, "mkdir", made)
        patch.setattr(safetensors.torch, "serialize_file", serialized)
        yield


# Mode -> whether it is tried on images of digits, else on points of the plane.
WRITING = {
    "train": False, "sample": True, "likelihood": False, "encode": False, "decode": False, "interpolate": False,
    "inpaint": True, "dequantize": True,
}  # fmt: skip
REFUSALS = {
    errno.ENOSPC: "No space left on device): free some space or give another --workdir",
    errno.EROFS: "Read-only file system): change its permissions, or give another --workdir",
    errno.EACCES: "Permission denied): change its permissions, or give another --workdir",
}


@pytest.fixture(scope="module")
def tried() -> set[str]:
    """The places in the code that could not write in the test of a mode before."""
    return set()


@pytest.mark.parametrize("mode", WRITING)
def test_a_disk_that_refuses_from_some_write_on_is_one_sentence(
    mode: str, trained: Path, tried: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each place in the code that writes is once the first that cannot: the disk is full, read-only or forbidden."""
    pixels, more = WRITING[mode], list[str]()
    if mode != "train":
        more += ["--checkpoint", str(max((trained / ("digits" if pixels else "toy") / "checkpoints").iterdir()))]
    if mode == "inpaint":
        more += ["--mask", str(trained / "mask.png")]
    if mode == "decode":
        np.save(trained / "z.npy", np.zeros((2, 2), np.float32))
        more += ["--input", str(trained / "z.npy")]
    with on(disk := Disk(tmp_path)):
        assert run(command(mode, tmp_path / "whole", *more, pixels=pixels)) == 0
    sites = list(dict.fromkeys(disk.sites))
    assert len(sites) >= 3
    sites = [site for site in sites if site not in tried] or sites[-1:]
    tried.update(sites)
    capsys.readouterr()
    for site, (refusal, words) in zip(sites, cycle(REFUSALS.items()), strict=False):
        with on(Disk(tmp_path, disk.sites.index(site), refusal)):
            code = run(command(mode, tmp_path / site, *more, pixels=pixels))
        if code == 0 and mode == "train":  # the last picture, when the last checkpoint was there
            assert "nothing is shown of step 4, and training goes on" in capsys.readouterr().err
            continue
        assert code == 2, site
        said = only_sentence(capsys)
        assert words in said, site
    assert run(command(mode, tmp_path / site, *more, pixels=pixels)) == 0, "it does not go on"


def test_what_only_shows_does_not_end_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard's file, the grids and the log are lost where the disk is full for a while; checkpoints are not."""

    def refuses(*ignored: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fills(state: Any, *rest: Any) -> Any:
        monkeypatch.setattr("tensorboard.compat.tensorflow_stub.io.gfile.LocalFileSystem._write", refuses)
        monkeypatch.setattr("score_sde.machine.log._LogFile.flush", refuses)
        return real(state, *rest)

    real = train.train_step
    monkeypatch.setattr(train, "train_step", fills)
    assert run(command("train", tmp_path)) == 0
    said = capsys.readouterr().err
    assert said.count("and training goes on: a file in") == 1 and "Traceback" not in said
    assert [p.stem for p in sorted((tmp_path / "checkpoints").iterdir())] == ["000000002", "000000004"]


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("", "scan"), ("", "train"), ("", "sample"), ("checkpoints", "train"), ("samples", "train"),
        ("tensorboard", "train"), ("samples", "sample"), ("likelihood", "likelihood"), ("latents", "encode"),
        ("interpolations", "interpolate"), ("restored", "inpaint"), ("dequantizers", "dequantize"),
    ],
)  # fmt: skip
def test_a_file_in_a_folder_s_place_is_named(
    name: str, mode: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """And before any work: no step is trained, no batch computed."""
    blocked = tmp_path / "run" / name if name else tmp_path / "run"
    blocked.parent.mkdir(exist_ok=True)
    blocked.write_text("")
    pixels = WRITING.get(mode, False)
    more = [] if mode in ("scan", "train") else ["--checkpoint", str(trained / ("digits" if pixels else "toy"))]
    more += ["--mask", str(trained / "mask.png")] if mode == "inpaint" else []
    monkeypatch.setattr(train, "train_step", None)
    monkeypatch.setattr(dequantize, "fit_dequantiser", None)
    assert run(command(mode, tmp_path / "run", *more, pixels=pixels)) == 2
    said = only_sentence(capsys)
    assert f"{blocked} is a file where a folder is needed: move it away" in said
    assert run(command(mode, blocked / "below" / "it", *more, pixels=pixels)) == 2
    assert f"{blocked} is a file where a folder is needed" in only_sentence(capsys)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.EROFS, "/a/b cannot be used (Read-only file system): change its permissions, or give another --workdir"),
        (errno.EACCES, "/a/b cannot be used (Permission denied)"),
        (errno.EPERM, "/a/b cannot be used (Operation not permitted)"),
        (errno.EDQUOT, "/a/b could not be written (Disk quota exceeded): free some space"),
        (errno.EISDIR, "/a/b is a folder where a file is needed"),
        (errno.ENAMETOOLONG, "the name /a/b is too long"),
        (errno.ENOENT, "/a/b is not there: if it was deleted during the run, give the same command again"),
        (errno.ENOMEM, "out of memory (Cannot allocate memory): compute the batch in parts (--config.training.acc"),
        (errno.EMFILE, "/a/b cannot be opened (Too many open files): allow more open files by ulimit -n"),
        (errno.EIO, "/a/b: Input/output error; what was finished is kept"),
        (errno.EPIPE, "the output was closed before its end, as `| head` does"),
    ],
)
def test_what_the_system_refuses_has_a_remedy(code: int, words: str) -> None:
    assert str(failures.sentence(OSError(code, "ignored", "/a/b"), "train")).startswith(words)
    rust = SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")
    anonymous = str(failures.sentence(rust, "train", "runs/x"))
    assert anonymous.startswith(words.replace("/a/b", "a file in runs/x"))


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    """And not the temporary file that was to be put there."""
    (tmp_path / "config.json").mkdir()
    with pytest.raises(OSError) as caught, whole(tmp_path / "config.json"):
        pass
    said = str(failures.sentence(caught.value, "train"))
    assert said.startswith(f"{tmp_path / 'config.json'} is a folder where a file is needed")


def test_a_zip_that_cannot_be_closed_after_an_error_tells_that_one() -> None:
    with pytest.raises(ValueError, match="close the ZIP file") as caught, ZipFile(io.BytesIO(), "w") as archive:
        member = archive.open("x", "w")
        member.write(b"begun")
        raise OSError(errno.ENOSPC, "ignored")
    assert "No space left on device" in str(failures.sentence(caught.value, "sample", "runs/x"))
    member.close()
    archive.close()


def test_a_name_that_is_too_long_is_shortened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command("scan", tmp_path / (300 * "x"))) == 2
    assert "is too long for the file system: give a shorter one" in (said := only_sentence(capsys)) and len(said) < 250


def test_a_workdir_that_is_deleted_during_training_has_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = train.train_step

    def deletes(state: Any, *rest: Any) -> Any:
        if state.step == 2:
            shutil.rmtree(tmp_path / "run")
        return real(state, *rest)

    monkeypatch.setattr(train, "train_step", deletes)
    assert run(command("train", tmp_path / "run", "--config.training.snapshot_freq=3")) == 2
    said = only_sentence(capsys)
    assert "run was deleted during the run: the checkpoint of step 3 is there again" in said
    assert run(command("train", tmp_path / "run")) == 0 and "going on from step 3" in capsys.readouterr().err


def test_a_workdir_that_is_deleted_during_sampling(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sample.sample

    def deletes(*rest: Any, **named: Any) -> torch.Tensor:
        shutil.rmtree(tmp_path / "run")
        return real(*rest, **named)

    monkeypatch.setattr(sample, "sample", deletes)
    more = ("--checkpoint", str(trained / "toy"))
    assert run(command("sample", tmp_path / "run", *more)) == 2
    said = only_sentence(capsys)
    assert "is not there: if it was deleted during the run, give the same command again" in said


# --- memory, devices, pipes


def _allocator() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def _numpy() -> None:
    np.empty(2**60, dtype=np.uint8)


def _overflow() -> None:
    torch.empty(2**40, 2**40)


def _gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nand more")


def _python() -> None:
    raise MemoryError


@pytest.mark.parametrize("asks", [_allocator, _numpy, _overflow, _gpu, _python])
def test_too_little_memory_names_what_takes_less(
    asks: Callable[[], None], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "train_step", lambda *ignored: asks())
    assert run(command("train", tmp_path)) == 2
    said = only_sentence(capsys)
    switches = ("accumulate=2", "checkpoint_activations=true", "precision=bfloat16", "batch_size")
    assert said.startswith("error: out of memory (") and all(f"--config.training.{name}" in said for name in switches)
    assert "sampling" not in said


def test_too_little_memory_in_a_likelihood_names_all_that_multiplies_its_work() -> None:
    said = str(failures.sentence(MemoryError(), "likelihood"))
    assert all(f"--config.eval.{name}" in said for name in ("batch_size", "probes", "draws", "importance_samples"))


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("train", "demo")])
def test_too_little_memory_elsewhere_names_what_helps_there(mode: str) -> None:
    said = str(failures.sentence(MemoryError("Unable to allocate"), mode))
    (keys,) = {re.search(r"--config\.(\w+)", said)[1]} if "--config." in said else {""}  # type: ignore[index]
    assert keys == {"sample": "sampling", "dequantize": "dequantizer", "scan": "data"}.get(mode, "eval")
    assert "training" not in said


@pytest.mark.parametrize("device", ["cuda:99", "cuda", "meta", "tpu", "mps", "hip", "cuda:x", ""])
def test_a_device_that_is_not_here_is_refused(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if device == "cuda" and torch.cuda.is_available():
        device = "xpu"
    assert run(command("scan", tmp_path / "run", f"--config.device={device}")) == 2
    said = only_sentence(capsys)
    assert "device" in said and "cpu" in said and len(said) < 400
    assert not (tmp_path / "run").exists()


def test_output_that_nobody_reads(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with monkeypatch.context() as patch, open(writing, "w") as out:
        patch.setattr(sys, "stdout", out)
        assert run(["--help"]) == 2
        assert "the output was closed before its end" in only_sentence(capsys)
        assert os.path.samestat(os.fstat(out.fileno()), os.stat(os.devnull))  # so that Python's own flush is quiet


def test_lines_that_nobody_reads_do_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with monkeypatch.context() as patch, os.fdopen(os.dup(writing), "wb", buffering=0) as raw:
        patch.setattr(sys, "stderr", io.TextIOWrapper(raw, write_through=True))
        patch.setattr(progress, "EVERY", 0)
        assert run(command("train", tmp_path)) == 0
        assert run(command("nothing", tmp_path)) == 2
    os.close(writing)


@pytest.mark.parametrize("kind", [TypeError, KeyError, IndexError, AttributeError, AssertionError, RuntimeError])
def test_a_mistake_of_the_program_keeps_its_traceback(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(*ignored: object) -> None:
        raise kind("a mistake")

    monkeypatch.setattr(train, "train_step", mistaken)
    with pytest.raises(kind, match="a mistake"):
        run(command("train", tmp_path))


@pytest.mark.parametrize(
    "words", [["--help"], ["-h"], ["--mode", "train", "--help"], ["-h", "--config", "configs/nothing.py"],
              ["--config", "configs/vp_toy.py", "--config.nonsense.key=1", "--help"]],
)  # fmt: skip
def test_help_beside_anything(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("score_sde: ") and "  vp_toy " in shown.out and shown.err == ""


# --- several processes

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] "


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(GLOO + "Connection closed by peer [127.0.0.1]:35750. This is typically caused by a crash. Check"),
        RuntimeError(GLOO + "Read error [127.0.0.1]:719: Connection reset by peer. This is typically caused by a bug"),
        torch.distributed.DistNetworkError("The client socket has timed out after 1000ms"),
    ],
)
def test_a_process_whose_neighbour_died_says_so(error: Exception) -> None:
    said = str(failures.sentence(error, "train"))
    assert said.startswith("another process of this run has ended or cannot be reached (")
    assert "its own message says why" in said and "typically" not in said


def test_a_mistake_between_processes_keeps_its_traceback() -> None:
    assert failures.sentence(RuntimeError(GLOO + "op.preamble.length <= op.nbytes. 8 vs 4"), "train") is None


def test_what_all_processes_meet_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before they are joined by the main one, and then by the first; a device that one of them lacks by that one."""
    monkeypatch.setenv("RANK", "1")
    assert run(command("scan", tmp_path, "--config.optim.lr=0")) == 2 and capsys.readouterr().err == ""
    assert run(command("scan", tmp_path, "--config.device=meta")) == 2 and "meta" in only_sentence(capsys)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        said = [parallel.first_to_say(line) for line in ("one", "another", "one", "another", "third")]
    finally:
        parallel.finish()
    assert said == [True, True, False, False, True]
