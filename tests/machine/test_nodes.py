"""Two processes over gloo, as of two nodes: each with a workdir and a cache of its own, or with shared ones."""

import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from score_sde.cli import run
from score_sde.data import load_data
from score_sde.machine import parallel
from score_sde.machine.parallel import Elsewhere
from score_sde.tasks import checkpoint
from score_sde.tasks.codes import codes_of
from tests.runs import halves, line, results, two_nodes


def test_tensors_texts_and_refusals_reach_the_other_process(tmp_path: Path) -> None:
    kinds = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    tensors = {str(kind): (torch.arange(6).reshape(2, 3) % 3).to(kind) for kind in kinds}
    tensors |= {"nothing": torch.zeros(0, 3), "one": torch.tensor(float("nan")), "strided": torch.arange(6.0)[::2]}

    def refuses() -> None:
        raise ValueError("the main process says no")

    data = load_data("digits")  # both have it from here

    def work(rank: int, folder: Path) -> Any:
        processes = parallel.start("cpu")
        copies = processes.copies(lambda: tensors if rank == 0 else {}["not asked"])
        told = processes.agreed(lambda: [rank, "word"])
        order = processes.in_turn(lambda: _look(folder, rank))
        codes, _ = codes_of(halves(), data, folder / f"codes-{rank}", False, processes)
        found = [copies, told, order, processes.texts("héllo" if rank else ""), codes.train.x, codes.test.std]
        for attempt in (processes.agreed, processes.in_turn):
            try:
                attempt(refuses if rank == 0 else lambda: None)
            except (ValueError, Elsewhere) as error:
                found.append(f"{type(error).__name__}: {error}")
        parallel.finish()
        return found

    main, other = two_nodes(tmp_path, work)
    assert main[1] == other[1] == [0, "word"] and main[3] == other[3] == ["", "héllo"]
    assert main[2] == ["seen-0"] and other[2] == ["seen-0", "seen-1"]
    assert main[6:] == ["ValueError: the main process says no"] * 2
    said = f"Elsewhere: process 0 on {socket.gethostname()}: the main process says no"
    assert other[6:] == [said] * 2
    assert torch.equal(main[4], other[4]) and torch.equal(main[5], other[5]) and len(main[4]) == 1497
    assert len(list((tmp_path / "codes-0").iterdir())) == 1 and not (tmp_path / "codes-1").exists()
    for name, value in tensors.items():
        assert other[0][name].dtype == value.dtype and other[0][name].shape == value.shape
        assert torch.equal(other[0][name].nan_to_num(7), value.nan_to_num(7)), name


def _look(folder: Path, rank: int) -> list[str]:
    """What is there, when this process has left its own sign."""
    (folder / f"seen-{rank}").touch()
    return sorted(path.name for path in folder.glob("seen-*"))


def test_a_node_with_another_workdir_goes_on_from_the_main_one_s_state(tmp_path: Path) -> None:
    """With a checkpoint on that node alone, or beside one of another run: bitwise what one shared folder gives."""
    change: dict[str, Any] = {"training__time": "second_moment", "training__objective": "vlb", "model__rule": "noise"}
    change |= {"training__continuous": "false", "model__learned_variance": "true", "model__label": "index"}
    change |= {"model__num_scales": 4, "model__beta_max": 3, "sampling__grid": "uniform", "optim__warmup": 0}
    begun, other = tmp_path / "begun", tmp_path / "other"
    assert run(line("vp_toy", "train", begun, training__n_iters=2, **change)) == 0
    assert run(line("vp_toy", "train", other, training__n_iters=3, seed=1, **change)) == 0
    for name in ("shared", "node-0", "lone-0"):
        shutil.copytree(begun, tmp_path / name)
    shutil.copytree(other, tmp_path / "node-1")

    def work(rank: int, folder: Path) -> Any:
        codes = [run(line("vp_toy", "train", folder / "shared", **change))]
        codes.append(run(line("vp_toy", "train", folder / f"node-{rank}", **change)))
        codes.append(run(line("vp_toy", "train", folder / f"lone-{rank}", **change)))
        words = ("--checkpoint", str(begun if rank == 0 else folder / "nothing.safetensors"))
        codes.append(run(line("vp_toy", "train", folder / f"tuned-{rank}", *words, **change)))
        codes.append(run(line("vp_toy", "train", folder / "tuned", *words, **change)))
        return codes

    assert two_nodes(tmp_path, work) == [[0] * 5] * 2
    for one, two in (("shared", "node-0"), ("shared", "lone-0"), ("tuned", "tuned-0")):
        a, b = (load_file(checkpoint.checkpoint_path(tmp_path / name, 4)) for name in (one, two))
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert torch.equal(value, b[name]), (two, name)
    assert not (tmp_path / "lone-1" / "checkpoints").exists(), "the other node wrote a checkpoint"


def test_classifiers_and_models_of_captions_are_of_two_processes_as_of_one(tmp_path: Path) -> None:
    """Trained and sampled, with captions that the main process alone encodes, guided by the classifier's workdir."""
    pytest.importorskip("transformers")
    from tests.files import bert

    images = tmp_path / "images"
    images.mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (20, 8, 8)).astype(np.uint8)):
        Image.fromarray(image).save(images / f"{i:02d}.png")
        (images / f"{i:02d}.txt").write_text(("a red cat", "a dog")[i % 2])
    steps = {"optim__warmup": 0, "optim__lr": 1e-3, "training__n_iters": 2}
    told: dict[str, Any] = {**steps, "data__dataset": "files", "data__path": images, "training__condition_dropout": 0.5}
    told |= {"model__text_encoder": bert(tmp_path / "bert"), "sampling__num_samples": 3, "sampling__batch_size": 2}
    words = ("--prompt=a red cat", "--prompt=a dog", "--scales=1,2")

    def work(rank: int, folder: Path) -> Any:
        place = folder / "two"
        codes = [run(line("classifier_digits", "train", place / "classifier", **steps))]
        codes.append(run(line("vp_digits", "train", place / "text", **told)))
        codes.append(run(line("vp_digits", "sample", place / "text", *words, **told)))
        guided = {"sampling__classifier": place / "classifier", "sampling__num_samples": 3, "sampling__labels": "1,2"}
        words_of = ("--checkpoint", str(folder / "one" / "plain"))
        codes.append(run(line("vp_digits", "sample", place / "plain", *words_of, sampling__batch_size=2, **guided)))
        return codes

    one = tmp_path / "one"
    assert run(line("vp_digits", "train", one / "plain", training__n_iters=1)) == 0
    assert run(line("classifier_digits", "train", one / "classifier", **steps)) == 0
    assert run(line("vp_digits", "train", one / "text", **told)) == 0
    assert two_nodes(tmp_path, work) == [[0] * 4] * 2  # these have from here what is slow to import
    for name in ("classifier", "text"):
        a, b = (load_file(checkpoint.checkpoint_path(tmp_path / place / name, 2)) for place in ("one", "two"))
        for key, value in a.items():
            if key.startswith("model/"):  # two steps of Adam at 1e-3
                torch.testing.assert_close(b[key], value, rtol=0, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")
    assert (
        run(line("vp_digits", "sample", one / "text", "--checkpoint", str(tmp_path / "two" / "text"), *words, **told))
        == 0
    )
    a, b = (results(tmp_path / place / "text", "samples")["arr_0"] for place in ("one", "two"))
    assert a.shape == (6, 8, 8, 1) and (a == b).mean() > 0.99
    assert results(tmp_path / "two" / "plain", "samples")["arr_0"].shape == (3, 8, 8, 1)
