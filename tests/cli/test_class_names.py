"""Classes are called by their names: in sampling.labels, in the checkpoint, in logs and on grids."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from score_sde.cli import run
from score_sde.config import load as load_config
from score_sde.data import load_data
from score_sde.data.codecs import PixelCodec
from score_sde.tasks import checkpoint
from score_sde.tasks import pictures as images
from score_sde.tasks.class_names import class_number
from score_sde.tasks.scan import scan

ANIMALS = ("10", "a dog", "cat")


def test_a_class_is_its_name_or_its_number() -> None:
    def number(label: int | str, names: tuple[str, ...] = ANIMALS) -> int:
        return class_number(label, "sampling.labels", names)

    assert [number(label) for label in ("cat", "a dog", "10", 10, 2, 0, -1, 17)] == [2, 1, 0, 0, 2, 0, -1, 17]
    assert number(17, ()) == 17
    # names that are numbers go before numbers, whatever their order
    folders = tuple(sorted(str(i) for i in range(1, 12)))
    assert [number(i, folders) for i in (1, 2, 10, 11, -1)] == [folders.index(t) for t in ("1", "2", "10", "11")] + [-1]
    assert [number(i, ("00", "01", "05")) for i in (0, 1, 5)] == [0, 1, 2]
    # as they are written, and else by what they count
    assert [number(i, ("cat", "07", "x")) for i in ("07", "01", 1)] == [1, 1, 1]
    assert [number(i, folders) for i in ("01", "007")] == [folders.index(t) for t in ("1", "7")]
    for label, names, words in (
        (
            "catt",
            ANIMALS,
            "sampling.labels: there is no class 'catt': the nearest name is 'cat', and there are 10, a dog",
        ),
        (0, folders, "there is no class '0': the nearest name is '10', and there are 1, 10, 11, 2"),
        ("cat", (), "nothing names the classes of these data, so 'cat' is none: give numbers from 0"),
        ("x", tuple(f"class {i}" for i in range(30)), "class 19 and 10 more, -1 for none"),
    ):
        with pytest.raises(ValueError, match=words):
            number(label, names)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("1,2", (1, 2)),
        ("cat,dog", ("cat", "dog")),
        ("cat, -1, 3", ("cat", -1, 3)),
        ('"a, b",cat', ("a, b", "cat")),
        ("('cat','10')", ("cat", "10")),
        ("'10',", ("10",)),
        ("a dog", ("a dog",)),
        ("07", ("07",)),
        ("None,0,1e3", ("None", 0, "1e3")),
        ("", ()),
    ],
)
def test_the_command_line_takes_names(text: str, labels: tuple[int | str, ...]) -> None:
    config = load_config("configs/cond_digits.py", {"sampling.labels": text, "sampling.negative_label": "07"})
    assert config.sampling.labels == labels and config.sampling.negative_label == "07"


@pytest.mark.parametrize(
    ("value", "answer"),
    [("('cat', 3)", ""), ("'cat'", "names.py, line 22: sampling.labels must be numbers or names of classes, such as")],
)
def test_a_config_file_takes_names(value: str, answer: str, tmp_path: Path) -> None:
    text = (
        Path("configs/cond_digits.py")
        .read_text()
        .replace('Path(__file__).with_name("vp_digits.py")', '"configs/vp_digits.py"')
    )
    path = tmp_path / "names.py"
    path.write_text(text.replace("    return config", f"    config.sampling.labels = {value}\n    return config"))
    if answer:
        with pytest.raises(ValueError, match=re.escape(answer)):
            load_config(str(path), {})
    else:
        assert load_config(str(path), {}).sampling.labels == ("cat", 3)


def animals(root: Path) -> Path:
    for i in range(24):
        path = root / "train" / ANIMALS[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 10 * i, np.uint8)).save(path)
    for name in ANIMALS[:2]:
        (root / "test" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(root / "test" / name / "0.png")
    return root


SETTINGS = {
    "data.dataset": "files", "data.num_channels": 1, "data.image_size": 8, "data.random_flip": "false",
    "training.batch_size": 6, "training.n_iters": 2, "training.eval_freq": 2, "model.nf": 8, "model.ch_mult": 1,
    "model.num_res_blocks": 1, "model.attn_resolutions": "", "sampling.method": "heun", "sampling.steps": 2,
    "sampling.num_samples": 4,
}  # fmt: skip
SMALL = [f"--config.{key}={value}" for key, value in SETTINGS.items()]


@pytest.fixture(autouse=True, scope="module")
def grids_in_few_steps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("score_sde.tasks.show._STEPS", 2)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command of a model of animals, without its mode."""
    root = tmp_path_factory.mktemp("animals")
    words = [f"--config.data.path={animals(root / 'data')}", "--workdir", str(root / "run")]
    command = ["--config", "configs/cond_digits.py", *SMALL, *words]
    assert run([*command, "--mode", "train"]) == 0
    return command


def test_the_checkpoint_keeps_the_names_and_grids_show_them(
    trained: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir, written = Path(trained[-1]), []
    card = checkpoint.read_card(checkpoint.find(workdir).path)
    assert checkpoint.DataCard.from_json(card.data).class_names == ANIMALS
    monkeypatch.setattr(
        images, "_written", lambda text, height, kept=images._written: written.append(text) or kept(text, height)
    )
    names = ["--config.sampling.labels=cat,-1,a dog", "--config.sampling.negative_label=10"]
    assert run([*trained, "--mode", "sample", *names[:1]]) == 0
    assert written == ["cat", "no label", "a dog"]
    (folder,) = (workdir / "samples").glob("*/samples.npz")
    assert np.load(folder)["arr_1"].tolist() == [2, -1, 1, 2]
    assert "classes: 2 is cat, -1 is no label, 1 is a dog" in (workdir / "log.txt").read_text()
    assert run([*trained, "--mode", "sample", *names, "--config.sampling.guidance=2"]) == 0
    capsys.readouterr()
    assert run([*trained, "--mode", "sample", "--config.sampling.labels=kat"]) == 2
    assert "error: sampling.labels: there is no class 'kat': the nearest name is 'cat'" in capsys.readouterr().err
    assert (
        run([*trained, "--mode", "sample", "--config.sampling.negative_label=kat", "--config.sampling.guidance=2"]) == 2
    )
    assert "sampling.negative_label: there is no class 'kat'" in capsys.readouterr().err


def test_grids_of_training_show_names_too(trained: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(
        images, "_written", lambda text, height, kept=images._written: written.append(text) or kept(text, height)
    )
    assert run([*trained, "--mode", "train", "--config.training.n_iters=3"]) == 0
    assert written == [*ANIMALS, *ANIMALS]  # of averaged and of raw weights


def test_scan_lists_classes_by_name(tmp_path: Path) -> None:
    text = str(scan(load_data("files", animals(tmp_path)), PixelCodec()))
    assert "classes             10 8 + 1, a dog 8 + 1, cat 8 + 0\n" in text


def test_classes_without_examples_are_told_and_not_sampled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=np.array([1, 2, 4] * 10))
    data = load_data("files", tmp_path / "a.npz")
    told = "2 of 5 classes have no examples to train on and are not sampled: 0, 3"
    assert told in str(scan(data, PixelCodec()))
    command = ["--config", "configs/cond_digits.py", *SMALL, f"--config.data.path={tmp_path / 'a.npz'}"]
    command += ["--workdir", str(tmp_path / "run")]
    assert run([*command, "--mode", "train"]) == 0
    assert told in (tmp_path / "run" / "log.txt").read_text()
    card = checkpoint.read_card(checkpoint.find(tmp_path / "run").path)
    assert checkpoint.DataCard.from_json(card.data).empty_classes == (0, 3)
    assert run([*command, "--mode", "sample"]) == 0
    (folder,) = (tmp_path / "run" / "samples").glob("*/samples.npz")
    assert np.load(folder)["arr_1"].tolist() == [1, 2, 4, 1]
    assert "classes without training examples are not sampled: 0, 3" in (tmp_path / "run" / "log.txt").read_text()
