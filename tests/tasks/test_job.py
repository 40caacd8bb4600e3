"""A command on a checkpoint: what it opens, and what is there of it when it is refused."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from score_sde.cli import run
from score_sde.tasks import checkpoint, results
from tests.runs import line, refused


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy's workdir, with one checkpoint."""
    workdir = tmp_path_factory.mktemp("job") / "run"
    assert run(line("vp_toy", "train", workdir, training__n_iters=1)) == 0
    return workdir


def counted(monkeypatch: pytest.MonkeyPatch, names: dict[str, Any]) -> Counter[str]:
    """How often functions are called: name -> the module or class that it is looked up in."""
    calls = Counter[str]()

    def counting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (calls.update([name]), real(*args, **kwargs))[1]

    for name, place in names.items():
        monkeypatch.setattr(place, name, counting(name, getattr(place, name)))
    return calls


@pytest.mark.parametrize("mode", ["sample", "likelihood"])
@pytest.mark.parametrize("config", [True, False])
def test_a_command_reads_a_card_and_its_config_once(
    mode: str, config: bool, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a file has the config or the checkpoint carries it; a checkpoint is hashed once, for the stamp."""
    words = line("vp_toy", mode, tmp_path, "--checkpoint", str(trained))
    places = {"read_card": checkpoint, "from_text": checkpoint.configs}
    calls = counted(monkeypatch, places)
    hashed: list[Path] = []
    real = checkpoint.file_hash
    monkeypatch.setattr(checkpoint, "file_hash", lambda path: (hashed.append(path), real(path))[1])
    assert run(words if config else words[2:]) == 0
    assert calls == {"read_card": 1, "from_text": 1} and len(hashed) == 1


def test_a_refused_command_leaves_no_log_in_a_new_workdir(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = line("vp_toy", "sample", tmp_path / "new", "--checkpoint", str(trained))
    refused(capsys, [*words, "--config.sampling.guidance=2", f"--config.sampling.guidance_checkpoint={tmp_path}/none"])
    assert not (tmp_path / "new").exists()
    assert run(words) == 0
    lines = (tmp_path / "new" / "log.txt").read_text().splitlines()
    assert "workdir: " in lines[0] and lines[-1].endswith(str(next((tmp_path / "new" / "samples").iterdir())))


@pytest.mark.parametrize("mode", ["sample", "likelihood"])
def test_batches_with_other_arrays_are_refused_by_name(
    mode: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Made by hand, where a run that was stopped would have left its own."""
    words = line("vp_toy", mode, tmp_path, "--checkpoint", str(trained))
    with monkeypatch.context() as patch:
        patch.setattr(results, "remove_parts", lambda folder: None)
        assert run(words) == 0
    (stamp,), (part, *_) = tmp_path.rglob("stamp.json"), tmp_path.rglob("parts/*.npz")
    stamp.unlink()
    np.savez(part, other=np.zeros(3))
    error = refused(capsys, words)
    assert (
        "holds no array" in error and str(part.parents[1]) in error and "delete it, and give the command again" in error
    )
    part.unlink()
    assert run(words) == 0
