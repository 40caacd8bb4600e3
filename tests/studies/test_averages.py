"""The study of averages: which weights it judges, what its table compares, and that it goes on where it was stopped."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from score_sde import load
from score_sde.data import Data, load_data
from score_sde.tasks import checkpoint
from studies import averages
from studies.averages import Quality


@pytest.fixture(scope="module")
def last(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a tiny run of the study, which was stopped half-way."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    tiny = {"training.batch_size": 4, "training.snapshot_freq": 1, "model.nf": 8, "model.ch_mult": 1}
    tiny |= {"model.attn_resolutions": "()", "optim.warmup": 0, "training.keep_last": 9}
    with pytest.MonkeyPatch.context() as patch:
        for steps in (2, 4):
            patch.setattr(averages, "SHORT", {**tiny, "training.n_iters": steps})
            path = averages.train(workdir, 0.0)
        assert averages.train(workdir, 0.0) == path  # and nothing is trained again
    return path


def test_the_run_keeps_what_any_width_is_made_of(last: Path) -> None:
    assert averages.steps_of(last) == [1, 2, 3, 4]
    assert averages.steps_of(last.with_name("000000002.safetensors")) == [1, 2]
    assert checkpoint.Trained.open(last).config.optim.decay == 0
    assert not torch.equal(*(load(last, ema=width).network.first.weight for width in (0.05, 0.2)))  # type: ignore


def test_bits_are_those_of_the_weights_that_were_asked_for(last: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def command(line: list[str]) -> int:
        asked.extend(line)
        name = next(word.rpartition("=")[2] for word in line if ".ema=" in word or ".weights=" in word)
        name = name if name in ("ema", "raw") else f"ema{name}"
        folder = last.parent.parent / "likelihood" / f"{last.stem}-{name}-test-0"
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / "likelihood.npz", bits_per_dim=np.add(len(name), [[-1, 1]] * 3))
        return 0

    monkeypatch.setattr(averages.cli, "run", command)
    assert averages.bits(last, 0.05).tolist() == [7, 7, 7] and averages.bits(last, False).tolist() == [3, 3, 3]
    assert "--config.sampling.ema=0.05" in asked and "--config.eval.weights=raw" in asked and str(last) in asked


def test_samples_are_of_the_model_and_have_the_data_s_levels(last: Path) -> None:
    data, model = load_data("digits"), load(last, ema=0.2)
    k = averages.drawn(model, data, 2, 0)
    assert k.shape == (2, 1, 8, 8) and k.dtype == torch.uint8 and int(k.max()) < 17
    assert torch.equal(averages.drawn(model, data, 2, 0), k) and not torch.equal(averages.drawn(model, data, 2, 1), k)


def test_a_row_compares_image_by_image_and_a_table_says_how_far_profiles_are_off() -> None:
    usual = Quality(np.array([1.0, 2.0, 3.0]), [50.0, 60.0], [0.1, 0.3])
    better = Quality(usual.bits - 0.1 - np.array([0.01, 0.0, -0.01]), [70.0, 70.0], [0.1, 0.1])
    assert averages.row("x", "", better, usual) == [
        "x", "", "1.9000", "-0.1000 ± 0.0058", "70.0 ± 0.0", "0.100 ± 0.000",
    ]  # fmt: skip
    table = averages.tabled([10, 20], usual, better, {0.1: better, 0.2: usual})
    rows = [line.split(" | ") for line in table.splitlines()]
    assert len(rows) == 6 and rows[2][3] == "" and rows[3][3] == "-0.1000 ± 0.0058"
    assert rows[4][1] == "0 %" and float(rows[5][1].removesuffix(" %")) > 10
    figure = averages.curves({"run": {0.1: better, 0.2: usual}})
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[0.1, pytest.approx(1.9)], [0.2, 2.0]]  # type: ignore


def test_blocks_hold_every_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, last: Path) -> None:
    def quality(path: Path, ema: bool | float, *, data: Data, who: object, count: int, seeds: int) -> Quality:
        return Quality(np.arange(3.0) + ema, [50.0] * seeds, [0.1] * seeds)

    trained: list[tuple[str, float]] = []

    def train(workdir: Path, decay: float) -> Path:
        trained.append((workdir.name, decay))
        return last

    monkeypatch.setattr(averages, "quality", quality)
    monkeypatch.setattr(averages, "train", train)
    monkeypatch.setattr(averages, "judge", lambda name: SimpleNamespace(test=None, distance=lambda images: 0.125))
    monkeypatch.setattr(averages, "confidence", lambda data, samples: (0.0, 0.887, 10))
    blocks = averages.run(tmp_path, 5, 2, tmp_path)
    assert trained == [("averages-0.3", 0.3), ("averages-0", 0.0)]
    text = blocks["widths"]
    assert text.count("| width ") == 2 * len(averages.WIDTHS) and "5 samples for each of 2" in text
    for first in ("| `ema_halflife` of the config |  | 2.0000 |", "| raw weights |  | 1.0000 | -1.0000"):
        assert text.count(first) == 2
    assert "held-out digits have 88.7 % and 0.125" in text
    assert (tmp_path / "averages.png").is_file() and "images/averages.png" in blocks["curves"]
