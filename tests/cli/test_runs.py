"""Runs and their workdirs: one at a time, begun and gone on with soundly, fine-tuned, and sampled from a file alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from score_sde.cli import run
from score_sde.machine import lock
from score_sde.tasks import checkpoint, inputs, job
from tests import RECORDED
from tests.runs import line, overrides, refused, results


def last(workdir: Path) -> Path:
    return checkpoint.find(workdir).path


def same(a: Path, b: Path) -> None:
    one, other = load_file(a), load_file(b)
    assert one.keys() == other.keys() and len(one) > 10
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a model of points."""
    workdir = tmp_path_factory.mktemp("runs") / "points"
    assert run(line("vp_toy", "train", workdir)) == 0
    return workdir


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a class-conditional model of digits."""
    workdir = tmp_path_factory.mktemp("runs") / "classes"
    assert run(line("cond_digits", "train", workdir)) == 0
    return workdir


# -- one run's workdir


@pytest.mark.parametrize("mode", ["train", "demo", "dequantize"])
def test_a_second_run_in_a_workdir_is_refused(
    mode: str, points: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(points, workdir)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    folder = workdir / "dequantizers" if mode == "dequantize" else workdir
    name = "vp_toy" if mode == "train" else "vp_digits"
    if mode == "dequantize":
        shutil.rmtree(workdir)
        assert run(line(name, "train", workdir)) == 0
        before = {path: path.read_bytes() for path in (workdir / "checkpoints").rglob("*")}
    with lock.held(folder, "training the first"):
        error = refused(capsys, line(name, mode, workdir, training__n_iters=6))
    assert f"{folder} is in use: process " in error and "(training the first since 20" in error
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_refused_command_leaves_nothing_that_the_next_one_trips_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = tmp_path / "run"
    assert "cannot be mirrored" not in refused(capsys, line("vp_toy", "train", workdir, model__name="ncsnpp"))
    assert not workdir.exists()
    assert run(line("vp_toy", "train", workdir, training__n_iters=2)) == 0
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    error = refused(capsys, line("vp_toy", "train", workdir, model__hidden=16))
    assert "network.embed.hidden.weight is torch.float32 of shape (8, 8)" in error
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before
    for name in ("tensorboard", "checkpoints"):  # what shows it cannot be written
        (workdir / name).rename(workdir / "away")
        (workdir / name).touch()
        assert f"{workdir / name} is a file where a folder is needed" in refused(
            capsys, line("vp_toy", "train", workdir, training__n_iters=9)
        )
        (workdir / name).unlink()
        (workdir / "away").rename(workdir / name)
        assert (workdir / "config.json").read_bytes() == before[workdir / "config.json"]
    assert run(line("vp_toy", "train", workdir)) == 0
    assert json.loads((workdir / "config.json").read_text())["training"]["n_iters"] == 4
    assert run(line("vp_toy", "likelihood", workdir)) == 0
    assert run(line("vp_toy", "train", workdir, training__n_iters=3)) == 0
    assert "training is complete: 4 steps" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["train", "demo", "scan"])
def test_a_workdir_without_a_run_asks_for_a_config(
    mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("none", "none.yet"):
        error = refused(capsys, ["--mode", mode, "--workdir", str(tmp_path / name)])
        assert f"{tmp_path / name} holds no run whose config could be taken: give one, --config FILE" in error
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "000000001.safetensors").write_bytes(b"broken")
    assert "(skipped: " in refused(capsys, ["--mode", mode, "--workdir", str(tmp_path)])


def test_a_log_begins_where_the_command_does_and_not_before(tmp_path: Path) -> None:
    assert run(line("vp_toy", "train", tmp_path / "run")) == 0
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert "workdir: " in lines[0] and any("a new run" in text for text in lines)


def test_a_broken_config_json_stops_nobody(points: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(points, workdir)
    for text, what in (('{"seed": 4', "not JSON"), ('{"training": {"quantum": 3}}', "training.quantum")):
        (workdir / "config.json").write_text(text)
        command = line("vp_toy", "train", workdir)
        command[1] = str(workdir / "config.json")
        error = refused(capsys, command)
        assert what in error and f"leave --config out and give --workdir {workdir}" in error
        assert run(["--mode", "train", "--workdir", str(workdir), "--config.training.n_iters=6"]) == 0
        assert json.loads((workdir / "config.json").read_text())["training"]["n_iters"] == 6
    assert checkpoint.read_card(last(workdir)).step == 6


def test_changed_data_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1)).astype(np.uint8), np.arange(20) % 3
    for i, (images, labels, told) in enumerate(
        [
            (x, y, []),
            (x, y, []),
            (x[::-1], y, ["digest: "]),
            (x[:-2], np.arange(18) % 4, ["digest: ", "num_classes: 3 -> 4", "examples: 18 -> 17"]),
            (x.transpose(0, 3, 1, 2) / np.float32(255), y, ["levels: 256 -> None"]),
            (x[:, :4], y, ["shape: [1, 8, 8] -> [1, 4, 8]"]),
        ]
    ):
        np.savez(tmp_path / "data.npz", x=images, y=labels)
        workdir = tmp_path / str(i)
        if i:
            shutil.copytree(tmp_path / "0", workdir)
        change: dict[str, Any] = {"data__dataset": "files", "data__path": tmp_path / "data.npz", "data__image_size": 0}
        change |= {"data__uniform_dequantization": "false", "training__n_iters": 1 + (i > 0)}
        capsys.readouterr()
        assert run(line("vp_digits", "train", workdir, **change)) == 0
        found = [text for text in capsys.readouterr().err.splitlines() if "the data differ from" in text]
        assert bool(found) == bool(told), found
        for words in told:
            assert any(words in text for text in found), (words, found)


# -- fine-tuning


def weights(path: Path, part: str) -> dict[str, torch.Tensor]:
    return {name.partition("/")[2]: value for name, value in load_file(path).items() if name.startswith(f"{part}/")}


@pytest.mark.parametrize("kind", ["ema", "raw"])
def test_a_fine_tuned_run_begins_as_the_model_that_it_was_given(kind: str, points: Path, tmp_path: Path) -> None:
    """At step 0, before a step of zero length, parameters and their average are the chosen weights of the file."""
    command = line("vp_toy", "train", tmp_path / "run", "--checkpoint", str(last(points)), training__n_iters=1)
    assert run([*command, *overrides(training__origin_weights=kind, optim__lr=1e-38)]) == 0
    path = last(tmp_path / "run")
    assert checkpoint.read_card(path).step == 1
    given = weights(last(points), "ema" if kind == "ema" else "model")
    for part in ("model", "ema"):
        for name, value in weights(path, part).items():
            torch.testing.assert_close(value, given[name], rtol=0, atol=1e-30, msg=name)
    x, t = torch.randn(5, 2), torch.tensor(0.3, dtype=torch.float64)
    before = checkpoint.load(last(points), ema=kind == "ema")(x, t)
    assert torch.equal(checkpoint.load(path)(x, t).data, before.data)
    step = next(value for name, value in load_file(path).items() if name.startswith("optimizer/step/"))
    assert step == 1, "moments are not fresh"


def test_a_fine_tuned_run_goes_on_bitwise_and_with_the_same_command(
    points: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    origin = tmp_path / "origin.safetensors"
    shutil.copy(last(points), origin)
    words = ("--checkpoint", str(origin))
    assert run(line("vp_toy", "train", tmp_path / "straight", *words)) == 0
    assert run(line("vp_toy", "train", tmp_path / "broken", *words, training__n_iters=2)) == 0
    # another end of the run would be another schedule of the learning rate: the first half is the straight run's
    shutil.copy(checkpoint.checkpoint_path(tmp_path / "straight", 2), tmp_path / "broken" / "checkpoints")
    assert run(line("vp_toy", "train", tmp_path / "broken", *words)) == 0
    assert "going on from step 2" in capsys.readouterr().err
    same(last(tmp_path / "straight"), last(tmp_path / "broken"))
    # without --checkpoint, and when the file is gone, it is the same run still
    shutil.copytree(tmp_path / "broken", tmp_path / "again")
    origin.unlink()
    assert run(line("vp_toy", "train", tmp_path / "again", training__n_iters=5)) == 0
    assert "going on from step 4" in capsys.readouterr().err
    assert json.loads((tmp_path / "again" / "config.json").read_text())["training"]["origin"] == str(origin)
    assert run(["--mode", "train", "--workdir", str(tmp_path / "again"), "--config.training.n_iters=6"]) == 0
    assert "no checkpoint" in refused(capsys, line("vp_toy", "train", tmp_path / "again", *words))


def test_another_file_than_a_run_began_from_is_refused(
    points: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = checkpoint.checkpoint_path(points, 2)
    assert run(line("vp_toy", "train", tmp_path / "run", "--checkpoint", str(last(points)))) == 0
    before = last(tmp_path / "run").read_bytes()
    error = refused(capsys, line("vp_toy", "train", tmp_path / "run", "--checkpoint", str(first), training__n_iters=9))
    assert "holds a run already, which began from" in error and "leave --checkpoint" in error
    own = refused(capsys, line("vp_toy", "train", points, "--checkpoint", str(first), training__n_iters=9))
    assert "did not begin from a file" in own
    assert last(tmp_path / "run").read_bytes() == before
    missing = line("vp_toy", "train", tmp_path / "new", "--checkpoint", str(tmp_path / "no.safetensors"))
    assert f"there is no checkpoint {tmp_path / 'no.safetensors'} to begin from" in refused(capsys, missing)
    assert not (tmp_path / "new").exists()


def test_which_weights_a_run_began_from_is_its_own_affair(
    points: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Others are refused in its workdir, and a run that begins from its checkpoint takes the average as any does."""
    begin = line("vp_toy", "train", tmp_path / "run", "--checkpoint", str(points), training__n_iters=1)
    assert run([*begin, *overrides(training__origin_weights="raw")]) == 0
    assert "which began from other weights of" in (said := refused(capsys, begin))
    assert "set training.origin_weights=raw to go on with it" in said
    assert run(line("vp_toy", "train", tmp_path / "run", training__n_iters=2)) == 0
    for workdir, kind in ((tmp_path / "run", "raw"), (tmp_path / "next", "averaged")):
        origin = [] if kind == "raw" else ["--checkpoint", str(tmp_path / "run")]
        more = overrides(training__n_iters=3, optim__lr=1e-38)
        assert run(["--mode", "train", "--workdir", str(workdir), *origin, *more]) == 0
        kept = json.loads((workdir / "config.json").read_text())["training"]["origin_weights"]
        assert kept == {"raw": "raw", "averaged": "ema"}[kind]
    assert "from the averaged weights of" in capsys.readouterr().err


def test_other_classes_make_their_layer_anew_and_no_other(
    classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    k = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1)).astype(np.uint8)
    np.savez(tmp_path / "data.npz", x=k, y=np.arange(20) % 3)
    np.savez(tmp_path / "rgb.npz", x=np.concatenate([k, k, k], 3), y=np.arange(20) % 10)
    given = weights(last(classes), "ema")
    for name, data, layers in (
        ("cond_digits", "data.npz", {"network.classes"}),
        ("vp_digits", "data.npz", None),
        ("cond_digits", "rgb.npz", {"network.first", "network.head.conv"}),
    ):
        change: dict[str, Any] = {"data__dataset": "files", "data__path": tmp_path / data, "data__image_size": 0}
        change |= {"data__num_channels": 0, "training__n_iters": 1, "optim__lr": 1e-38}
        if name == "vp_digits":
            change["model__scale_shift"] = "true"
        workdir = tmp_path / f"{name}-{data}"
        assert run(line(name, "train", workdir, "--checkpoint", str(classes), **change)) == 0
        found, said = weights(last(workdir), "model"), capsys.readouterr().err
        anew = {key for key, value in found.items() if key not in given or value.shape != given[key].shape}
        if layers is None:
            assert "without its network.classes" in said and not anew and "network.classes.table" in given
        else:
            assert f"made anew, as they are others there, or none: {', '.join(sorted(layers))}" in said
            assert {key.rpartition(".")[0] for key in anew} == layers
        for key, value in found.items():
            if key.rpartition(".")[0] not in (layers or ()):
                torch.testing.assert_close(value, given[key], rtol=0, atol=1e-30, msg=key)


@pytest.mark.parametrize(
    ("name", "change", "answer"),
    [
        ("vp_digits", {}, "there and (8,) here; take the config that it was trained with"),  # no scale_shift
        ("cond_digits", {"model__nf": 16}, "network.classes.table is (10, 32) there and (10, 64) here"),
        ("cond_digits", {"model__num_res_blocks": 2}, "is none there and"),
        ("cond_digits", {"model__nonlinearity": "elu"}, "set model.nonlinearity=swish as it was"),
        ("cond_digits", {"model__skip_rescale": "false"}, "set model.skip_rescale=True as it was"),
        ("classifier_digits", {}, "it has a score model, the config a classifier"),
        ("autoencoder_digits32", {"model__ch_mult": "1,2"}, "it has a score model, the config an autoencoder"),
        ("vp_toy", {}, "examples of shape (channels and 2 dimensions), the config (2,)"),
    ],
)
def test_what_does_not_fit_is_refused_before_work(
    name: str, change: dict[str, Any], answer: str, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, line(name, "train", tmp_path / "run", "--checkpoint", str(classes), **change))
    assert answer in error
    assert not (tmp_path / "run").exists()


def test_weights_that_are_read_otherwise_are_told(
    classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = line("cond_digits", "train", tmp_path, "--checkpoint", str(classes), training__n_iters=1)
    assert run([*command, *overrides(model__rule="v", model__hidden=99)]) == 0
    said = [text for text in capsys.readouterr().err.splitlines() if "read otherwise" in text]
    assert len(said) == 1 and said[0].endswith("model.rule: 'edm' -> 'v'")


@pytest.mark.parametrize(
    ("config", "net", "multipliers", "wrong"),
    [
        ("vp_cifar", "ddpmpp_vp", "1,2", {"model__label": "log_sigma"}),
        ("ve_cifar", "ncsnpp_ve", "1,2,2", {"model__rule": "v"}),
    ],
)
def test_a_checkpoint_of_score_sde_pytorch_is_trained_further(
    config: str,
    net: str,
    multipliers: str,
    wrong: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its answers are those of `load` exactly; a VE network's sign, which is the other there, is turned."""
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3)).astype(np.uint8))
    change: dict[str, Any] = {"data__dataset": "files", "data__path": tmp_path / "images.npy", "data__image_size": 16}
    change |= {"model__nf": 16, "model__ch_mult": multipliers, "model__attn_resolutions": 8, "optim__lr": 1e-38}
    words = ("--checkpoint", f"tests/data/recorded/nets/{net}.ckpt.pth")
    command = line(config, "train", tmp_path / "run", *words, training__n_iters=1, **change)
    assert run(command) == 0
    theirs = json.loads((RECORDED / "nets" / f"{net}.config.json").read_text())
    model = checkpoint.load(words[1], config=theirs)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor(0.4, dtype=torch.float64)
    torch.testing.assert_close(checkpoint.load(tmp_path / "run").score(x, t), model.score(x, t), rtol=1e-5, atol=1e-6)
    error = refused(capsys, line(config, "train", tmp_path / "x", *words, **{**change, **wrong}))
    assert "and the config compute different outputs from its weights" in error


# -- a checkpoint is enough


def test_a_checkpoint_is_enough_to_sample_decode_and_interpolate(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No config, no data: the same bytes as with both, in the workdir, and of a copy of its file anywhere."""
    workdir = tmp_path / "run"
    shutil.copytree(classes, workdir)
    np.savez(tmp_path / "latents.npz", latents=np.random.default_rng(0).normal(size=(2, 1, 8, 8)).astype(np.float32))
    modes = {
        "sample": ("samples", ["--config.sampling.labels=1,2"]),
        "decode": ("decoded", ["--input", str(tmp_path / "latents.npz"), "--config.eval.conditional=false"]),
        "interpolate": ("interpolations", ["--config.interpolation.between=seeds", "--config.interpolation.pairs=1"]),
        "inpaint": ("restored", ["--input", str(tmp_path / "digits.npy"), "--mask", str(tmp_path / "mask.png")]),
    }
    np.save(tmp_path / "digits.npy", np.zeros((2, 8, 8), np.uint8))
    from PIL import Image

    Image.fromarray((np.arange(64).reshape(8, 8) % 2 * 255).astype(np.uint8)).save(tmp_path / "mask.png")
    given = {}
    for mode, (folder, words) in modes.items():
        assert run([*line("cond_digits", mode, workdir), *words]) == 0
        given[mode] = results(workdir, folder)
        shutil.rmtree(workdir / folder)
    lone = tmp_path / "lone.safetensors"
    shutil.copy(last(workdir), lone)

    def nothing(*args: object, **kwargs: object) -> None:
        raise AssertionError("data were read")

    monkeypatch.setattr(inputs, "load_data", nothing)
    monkeypatch.chdir(tmp_path)
    for mode, (folder, words) in modes.items():
        for start, place in (
            (["--workdir", str(workdir)], workdir),
            (["--checkpoint", str(last(workdir))], workdir),
            (["--checkpoint", str(lone)], tmp_path / "runs" / "lone"),
        )[0 if mode == "sample" else 2 :]:
            assert run([*start, "--mode", mode, *words]) == 0
            for name, value in results(place, folder).items():
                assert np.array_equal(value, given[mode][name]), (mode, start, name)
            shutil.rmtree(place / folder)
    with pytest.raises(AssertionError, match="data were read"):
        run(["--workdir", str(workdir), "--mode", "likelihood"])
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert run(["--workdir", str(workdir), "--mode", "likelihood", "--config.eval.num_images=3"]) == 0
    assert results(workdir, "likelihood")["bits_per_dim"].shape == (3, 1)
    for command, answer in (
        (["--mode", "sample"], "give --config FILE, or what carries one"),
        (["--mode", "sample", "--workdir", str(tmp_path / "none")], "there is no checkpoint"),
        (["--mode", "sample", "--checkpoint", str(tmp_path / "none.safetensors")], "there is no checkpoint"),
    ):
        assert answer in refused(capsys, command)
    assert not (tmp_path / "none").exists()


def test_an_old_checkpoint_s_data_are_read(classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose card describes no data is sampled as ever."""
    from dataclasses import replace

    from score_sde.tasks.step import make_state

    config = job.carried_config(classes)[0]
    card, path = checkpoint.read_card(last(classes)), tmp_path / "run" / "checkpoints" / "000000004.safetensors"
    state = make_state(config, card.shape, torch.device("cpu"))
    checkpoint.restore(last(classes), state)
    checkpoint.save(path, replace(card, data=""), state)
    read: list[object] = []
    real = inputs.load_data
    monkeypatch.setattr(inputs, "load_data", lambda *a, **k: (read.append(a), real(*a, **k))[1])
    assert run(["--mode", "sample", "--workdir", str(tmp_path / "run")]) == 0
    assert len(read) == 1 and results(tmp_path / "run", "samples")["arr_0"].shape == (4, 8, 8, 1)


def test_a_config_beside_a_checkpoint_does_not_change_its_model(
    classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the config says of the network, the noise and the data's scale is the checkpoint's, and is told."""
    workdir = tmp_path / "run"
    shutil.copytree(classes, workdir)
    assert run(line("cond_digits", "sample", workdir, sampling__grid="uniform")) == 0
    expected = results(workdir, "samples")["arr_0"]
    shutil.rmtree(workdir / "samples")
    change = {"training__continuous": "false", "model__beta_max": 9, "data__centered": "false", "model__num_heads": 2}
    change |= {"sampling__grid": "uniform", "training__time": "uniform"}
    capsys.readouterr()
    assert run(line("cond_digits", "sample", workdir, **change)) == 0
    said = [text for text in capsys.readouterr().err.splitlines() if "is used as it is" in text]
    assert [text.rpartition("is: ")[2].split(":")[0] for text in said] == [
        "data.centered", "model.beta_max", "model.num_heads", "training.continuous",
    ]  # fmt: skip
    assert np.array_equal(results(workdir, "samples")["arr_0"], expected)
