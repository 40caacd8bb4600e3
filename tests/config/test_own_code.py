"""A network, an SDE and a data set of the user's own, named FILE.py:NAME, in every command and from the checkpoint."""

import json
import re
from pathlib import Path

import pytest

from score_sde import load
from score_sde.cli import run
from score_sde.config import default_config, from_text, to_json
from score_sde.config import load as load_config
from score_sde.config.build import build_network, build_sde
from score_sde.tasks.checkpoint import read_card
from tests import ROOT

NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, shape, hidden, extra=3):
        super().__init__()
        self.inner, self.out = nn.Linear(shape[0] + 1, hidden), nn.Linear(hidden, shape[0])

    def forward(self, x, time, /, **condition):
        return self.out(torch.tanh(self.inner(torch.cat([x, time[:, None] / 1000], 1))))
"""
SDE = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from score_sde import SDE
from torch import Tensor

@dataclass(frozen=True, kw_only=True)
class Straight(SDE):
    beta_max: float = 1.0
    power: float = 2.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-self.beta_max * t**self.power / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(-self.beta_max * t**self.power)).sqrt()

    def f(self, t: Tensor) -> Tensor:
        return -self.beta_max * self.power * t ** (self.power - 1) / 2

    def g(self, t: Tensor) -> Tensor:
        return (self.beta_max * self.power * t ** (self.power - 1)).sqrt()
"""
DATA = """
import torch
from score_sde.data import Data, Split

def load(path, count=40):
    points = torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    return Data(Split(points[:30]), Split(points[30:]), levels=None)
"""
OWN = {"model.name": "net.py:Net", "training.sde": "sde.py:Straight", "data.dataset": "data.py:load"}
SMALL = {
    "training.n_iters": 4, "training.batch_size": 8, "training.log_freq": 2, "training.snapshot_sampling": "false",
    "model.hidden": 5, "sampling.steps": 3, "sampling.num_samples": 4, "eval.num_images": 3, "eval.rtol": 1e-2,
    "eval.atol": 1e-2, "eval.check_images": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, text in (("net", NETWORK), ("sde", SDE), ("data", DATA)):
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def command(mode: str, config: bool = False, **change: object) -> int:
    keys = {**(OWN | SMALL if config else {}), **{key.replace("__", "."): value for key, value in change.items()}}
    given = ["--config", str(ROOT / "configs" / "vp_toy.py")] if config else []
    return run([*given, "--mode", mode, "--workdir", "run", *(f"--config.{key}={v}" for key, v in keys.items())])


def test_a_run_of_own_network_sde_and_data_is_trained_sampled_evaluated_and_resumed_from_its_checkpoint(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("train", config=True) == 0
    model = load("run")
    assert type(model.network).__name__ == "Net" and model.network.inner.out_features == 5  # type: ignore[union-attr, operator]
    assert type(model.sde).__name__ == "Straight" and model.sde == load("run").sde
    assert (model.sde.beta_max, model.sde.power, model.sde.t_min) == (20.0, 2.0, 1e-5)  # type: ignore[attr-defined]
    for mode in ("sample", "likelihood"):
        assert command(mode) == 0, mode
    assert command("train", training__n_iters=6) == 0
    assert read_card(Path("run/checkpoints/000000006.safetensors")).step == 6

    (folder / "data.py").unlink()  # which is not needed to sample
    assert command("sample", sampling__seed=1) == 0
    assert command("likelihood", eval__seed=1) == 2
    assert "data.dataset=data.py:load: there is no file data.py" in capsys.readouterr().err


def test_a_file_that_has_moved_is_named_where_it_is_now_and_another_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("train", config=True) == 0
    (folder / "lib").mkdir()
    for name in ("net", "sde", "data"):
        (folder / f"{name}.py").rename(folder / "lib" / f"{name}.py")
    assert command("sample") == 2 and "give its path from this folder" in capsys.readouterr().err
    moved: dict[str, object] = {key: f"lib/{name}" for key, name in OWN.items()}
    assert command("sample", **moved) == 0 and "not as the config says" not in capsys.readouterr().err
    (folder / "lib" / "net.py").write_text(NETWORK + "# better\n")
    assert command("sample", **moved) == 2
    assert "has model.name=net.py:Net, and the config lib/net.py:Net" in capsys.readouterr().err


@pytest.mark.parametrize("key", OWN)
def test_a_file_that_has_changed_is_refused_until_it_is_named_again(
    key: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("train", config=True) == 0
    path = folder / OWN[key].split(":")[0]
    path.write_text(path.read_text() + "# better\n")
    mode = "likelihood" if key == "data.dataset" else "sample"
    assert command(mode) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{key}={OWN[key]}: the file is not the one that was trained with (sha256 " in line
    assert f"--mode train --config.{key}={OWN[key]}" in line
    assert command("train", **{key: OWN[key], "training.n_iters": 6}) == 0
    assert f"{key}_sha256" in capsys.readouterr().err  # told as a difference from the earlier run
    assert command(mode) == 0


def test_code_that_a_checkpoint_names_is_not_run_without_its_hash(folder: Path) -> None:
    assert command("train", config=True) == 0
    card = json.loads(read_card(Path("run/checkpoints/000000004.safetensors")).config)
    (folder / "net.py").write_text("open('ran', 'w')\n")
    for sha256 in ("", "0" * 64):
        card["model"]["name_sha256"] = sha256
        with pytest.raises(ValueError, match="has no model.name_sha256" if not sha256 else "is not the one"):
            build_network(from_text(json.dumps(card), "it"), (2,))
    assert not (folder / "ran").exists()


def test_a_config_file_names_own_code_anew_and_json_keeps_its_hash(folder: Path) -> None:
    text = "from score_sde.config import default_config\ndef get_config():\n    config = default_config()\n"
    (folder / "a.py").write_text(f"{text}    config.model.name = 'net.py:Net'\n    return config\n")
    (folder / "b.py").write_text(
        "from score_sde.config import load\ndef get_config():\n    config = load('a.py')\n"
        "    config.model.name = 'other.py:Net'\n    return config\n"
    )
    (folder / "other.py").write_text(NETWORK + "\n")
    a, b = load_config("a.py"), load_config("b.py")
    assert len(a.model.name_sha256) == 64 and a.model.name_sha256 != b.model.name_sha256
    assert load_config("a.py", {"model.name": "ncsnpp"}).model.name_sha256 == ""
    config = default_config()
    config.model.name = "net.py:Net"
    assert from_text(to_json(config), "it").model.name_sha256 == a.model.name_sha256 and config.model.name_sha256 == ""


@pytest.mark.parametrize(
    ("key", "value", "text", "words"),
    [
        ("model.name", "gone.py:Net", "", "model.name=gone.py:Net: there is no file gone.py with your code"),
        ("model.name", "gone.py", "", "model.name must be one of ddpm, .* or FILE.py:NAME of your own, got 'gone.py'"),
        ("model.name", "bad.py:Net", "", "model.name=bad.py:Net: bad.py defines no function or class Net"),
        ("model.name", "bad.py:Net", "def Net(shape): return 3", "must return an instance of Module, got int"),
        ("model.name", "bad.py:Net", "def Net(width): ...", "has an argument width, for which there is no value"),
        ("model.name", "bad.py:Net", "import nonsense", "bad.py, line 1: No module named 'nonsense'"),
        ("model.name", "bad.py:Net", "def Net(shape):\n    return a", "bad.py, line 2: name 'a' is not defined"),
        ("model.name", "bad.py:Net", "def Net(:", "bad.py, line 1: "),
        (
            "model.name",
            "bad.py:Net",
            NETWORK.replace("return self.out(", "return self.inner(torch.cat([x, x[:, :1]], 1))\n        ("),
            r"bad.py:Net must return shape \(1, 2\) for one example x and its time, got \(1, 5\)",
        ),
        ("training.sde", "bad.py:It", "def It(): return 3", "=bad.py:It must return an instance of SDE, got int"),
        ("data.dataset", "bad.py:it", "def it(): return 3", "=bad.py:it must return an instance of Data, got int"),
        (
            "data.dataset",
            "bad.py:load",
            DATA.replace("levels=None", "levels=256"),
            "bad.py:load has torch.float32 examples and levels=256: floats are float32, with levels=None",
        ),
        ("data.dataset", "bad.py:load", DATA.replace("points[30:]", "points[40:]"), r"bad.py:load has 0 examples"),
    ],
)
def test_what_is_wrong_with_own_code_is_answered_in_a_sentence(
    key: str, value: str, text: str, words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bad.py").write_text(text)
    assert command("train", config=True, **{key: value}) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and re.search(words, line), line
    assert not (folder / "run" / "checkpoints").exists()


def test_own_sde_is_one_class_in_all_processes_of_a_run() -> None:
    config = default_config()
    config.training.sde = "sde.py:Straight"
    assert build_sde(config) == build_sde(config)
