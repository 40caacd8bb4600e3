"""Checkpoints: whole or absent, exact, and never half-loaded; runs that are killed, stopped or split over processes."""

import json
import multiprocessing
import os
import pickle
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from score_sde import cli
from score_sde.config import to_json
from score_sde.data import load_data
from score_sde.data.codecs import PixelCodec, VectorCodec
from score_sde.foreign import diffusers as interop_diffusers
from score_sde.machine.whole_files import write_tensors
from score_sde.tasks import checkpoint
from score_sde.tasks import train as training
from score_sde.tasks.checkpoint import (
    Card,
    DataCard,
    checkpoints,
    file_hash,
    find,
    load,
    newest,
    prune,
    read_card,
    restore,
    save,
)
from score_sde.tasks.step import make_state
from score_sde.tasks.train import train
from tests import RECORDED, ROOT
from tests.runs import ALONE, toy_config, two_nodes

CPU = torch.device("cpu")
OLD = RECORDED / "checkpoints" / "mlp-0.1.0.safetensors"  # of 3 steps on the ring, by version 0.1.0


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    list(train(toy_config(), tmp_path, load_data("ring"), VectorCodec(), ALONE))
    return tmp_path


def run(workdir: Path, *words: str, env: dict[str, str] | None = None, launcher: tuple[str, ...] = ()) -> list[str]:
    """The command of a toy training run of 12 steps with a checkpoint every 2."""
    settings = {
        "training.n_iters": "12", "training.batch_size": "16", "training.snapshot_freq": "2",
        "training.snapshot_sampling": "false", "training.log_freq": "1", "training.keep_last": "9",
        "model.hidden": "16", "model.dropout": "0",
    }  # fmt: skip
    changes = [f"--config.{key}={value}" for key, value in settings.items()]
    start = [*(launcher or (sys.executable,)), "main.py", "--config", "configs/vp_toy.py", "--mode", "train"]
    return [*start, "--workdir", str(workdir), *changes, *words]


def finish(command: list[str], **changes: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **changes}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)


# -- files


def test_a_checkpoint_gives_back_every_tensor(trained: Path) -> None:
    config = toy_config()
    last, skipped = newest(trained)
    assert last is not None and last.card is not None and skipped == []
    path = last.path
    assert last.card.step == 6 and last.card.shape == (2,)
    tensors = load_file(path)
    state = make_state(config, (2,), CPU)
    restore(path, state)
    for name, value in state.model.state_dict().items():
        assert torch.equal(value, tensors[f"model/{name}"])
    for name, value in state.ema.state_dict().items():
        assert torch.equal(value, tensors[f"ema/{name}"])
        assert torch.equal(load(trained).state_dict()[name], value)
        assert torch.equal(load(trained, ema=False).state_dict()[name], tensors[f"model/{name}"])
    for name, p in state.model.named_parameters():
        assert torch.equal(state.optimizer.state[p]["exp_avg"], tensors[f"optimizer/exp_avg/{name}"])
        assert state.optimizer.state[p]["step"] == 6


def test_no_pickle_is_in_the_file(trained: Path) -> None:
    path = checkpoints(trained)[-1]
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(path.read_bytes())
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert "__metadata__" in json.loads(path.read_bytes()[8 : 8 + length])


@pytest.mark.parametrize("length", [0, 7, 100, 5000])
def test_a_truncated_newest_checkpoint_is_named_and_skipped(trained: Path, length: int) -> None:
    whole = checkpoints(trained)[-1]
    cut = checkpoint.checkpoint_path(trained, 7)
    cut.write_bytes(whole.read_bytes()[:length])
    last, skipped = newest(trained)
    assert last is not None and last.path == whole
    assert len(skipped) == 1 and str(cut) in skipped[0] and "truncated" in skipped[0]
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        load(cut)


def test_a_foreign_checkpoint_is_refused(trained: Path) -> None:
    other = trained / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, other)
    with pytest.raises(ValueError, match=r"other\.safetensors was not written by this package"):
        load(other)


def test_a_checkpoint_of_another_network_changes_nothing(trained: Path) -> None:
    state = make_state(toy_config(model__hidden=16), (2,), CPU)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"of shape .* but the config asks for"):
        restore(checkpoints(trained)[-1], state)
    deeper = make_state(toy_config(model__depth=4), (2,), CPU)
    with pytest.raises(ValueError, match="is missing from"):
        restore(checkpoints(trained)[-1], deeper)
    for name, value in state.model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("step", [1, 5])
def test_a_file_without_optimizer_cannot_be_resumed(trained: Path, step: int) -> None:
    state = make_state(toy_config(), (2,), CPU)
    path = trained / "weights.safetensors"
    save(path, Card(to_json(toy_config()), (2,), step), state)
    load(path)
    with pytest.raises(ValueError, match="no optimizer state"):
        restore(path, state)


def test_after_a_single_step_too_the_optimizer_s_state_is_needed(tmp_path: Path) -> None:
    """Before the first step there is none."""
    state, path = make_state(toy_config(), (2,), CPU), tmp_path / "weights.safetensors"
    save(path, Card(to_json(toy_config()), (2,), 1), state)
    with pytest.raises(ValueError, match="no optimizer state"):
        restore(path, state)
    save(path, Card(to_json(toy_config()), (2,), 0), state)
    assert restore(path, state).step == 0


def test_an_interrupted_write_leaves_the_old_file(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoints(trained)[-1]
    before = path.read_bytes()
    state = make_state(toy_config(), (2,), CPU)

    def fail(number: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        save(path, Card("{}", (2,), 6), state)
    assert path.read_bytes() == before
    assert find(trained).path == path and newest(trained)[1] == [] and list(path.parent.iterdir()) == [path]


def test_a_state_that_is_not_finite_is_never_written(trained: Path) -> None:
    path = checkpoints(trained)[-1]
    before = path.read_bytes()
    state = make_state(toy_config(), (2,), CPU)
    restore(path, state)
    state.optimizer.state[state.parameters[0]]["exp_avg_sq"][0] = torch.inf
    with pytest.raises(FloatingPointError, match=r"optimizer/exp_avg_sq/.* is not finite at step 6"):
        save(path, Card(to_json(toy_config()), (2,), 6), state)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_equal_states_are_equal_files(trained: Path, tmp_path: Path) -> None:
    """Whatever order things were in; so their hashes, in stamps and configs, are equal, too."""
    path, other = checkpoints(trained)[-1], tmp_path / "other.safetensors"
    state = make_state(toy_config(), (2,), CPU)
    card = restore(path, state)
    save(other, card, state)
    assert other.read_bytes() == path.read_bytes() and file_hash(other) == file_hash(path)


# -- which checkpoint


def small(workdir: Path, *steps: int) -> list[Path]:
    """Checkpoints of these steps, of a model of a few numbers."""
    state = make_state(toy_config(model__hidden=4, model__depth=1), (2,), CPU)
    paths = [checkpoint.checkpoint_path(workdir, step) for step in steps]
    for step, path in zip(steps, paths, strict=True):
        save(path, Card(to_json(toy_config(model__hidden=4, model__depth=1)), (2,), step), state)
    return paths


def damage(path: Path) -> None:
    """Change one bit of the last tensor."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 4
    path.write_bytes(content)


def test_the_newest_is_of_the_highest_step_inside_and_named_files_do_not_count(tmp_path: Path) -> None:
    two, four, six = small(tmp_path, 2, 4, 6)
    shutil.copy(two, checkpoint.checkpoint_path(tmp_path, 9))
    for name in ("best", "000000012 (copy)", "12", "zz-000000012", "٠٠٠٠٠٠٠١٢"):
        shutil.copy(four, four.with_name(f"{name}.safetensors"))
    assert newest(tmp_path)[1] == [] and find(tmp_path).path == six
    assert [path.stem for path in checkpoints(tmp_path)] == ["000000002", "000000004", "000000006", "000000009"]
    six.unlink()
    assert find(tmp_path).path == four
    many = small(tmp_path, 2_000_000_000, 1_000_000_000, 999_999_999)  # ten digits come after nine
    assert find(tmp_path).path == many[0] and checkpoints(tmp_path)[-3:] == [many[2], many[1], many[0]]


def test_a_checkpoint_is_read_once_to_be_found_and_again_when_it_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = small(tmp_path, 1, 2)
    read, real = [], checkpoint.read_tensors
    monkeypatch.setattr(checkpoint, "read_tensors", lambda *given: (read.append(given[0]), real(*given))[1])
    assert find(tmp_path).path == find(tmp_path).path == two
    os.utime(two)  # a change, also where the lines before took long
    time.sleep(0.11)
    read.clear()
    assert find(tmp_path).path == find(tmp_path).path == find(tmp_path).path == two and read == [two]
    damage(two)
    assert find(tmp_path).path == one
    shutil.copy(one, two.with_name("other"))
    os.replace(two.with_name("other"), one)
    read.clear()
    assert find(tmp_path).path == one and read == [two, one]


def test_a_workdir_of_named_files_alone_says_how_to_read_them(tmp_path: Path) -> None:
    best = small(tmp_path, 4)[0].rename(tmp_path / "checkpoints" / "best.safetensors")
    with pytest.raises(FileNotFoundError, match=r"or name the file that you mean, such as .*best\.safetensors"):
        load(tmp_path)
    load(best)


def test_a_broken_checkpoint_is_told_and_the_one_before_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Cut short, changed in a tensor, without a header's key, of no JSON: each is skipped with a sentence."""
    paths = small(tmp_path, 1, 2, 3, 4, 5, 6, 7)
    paths[0].write_bytes(b"an older one is not told of")
    damage(paths[2])
    paths[3].write_bytes(paths[3].read_bytes()[:-1])
    write_tensors(paths[4], {}, {"format": "score_sde 1", "config": "{}", "shape": "[2]"})
    write_tensors(
        paths[5], {}, {"format": "score_sde 1", "config": '{"model": {"name": 3}}', "shape": "[2]", "step": "6"}
    )
    paths[6].write_bytes(b"")
    found, skipped = newest(tmp_path)
    assert found is not None and found.path == paths[1]
    assert [re.search(r"\d{9}", sentence)[0] for sentence in skipped] == [path.stem for path in paths[:1:-1]]
    for sentence, words in zip(
        skipped, ("truncated", "model.name", "has no step", "truncated", "was changed"), strict=True
    ):
        assert words in sentence
    with caplog.at_level("WARNING"):
        assert find(tmp_path).path == find(tmp_path).path == paths[1]
    assert [record.message for record in caplog.records] == skipped  # once, however often they are looked for
    damage(paths[1])
    with pytest.raises(FileNotFoundError, match=r"has no checkpoint in .*000000002.*was changed.*000000001"):
        find(tmp_path)


def test_training_goes_on_from_the_last_whole_checkpoint_and_says_what_it_skipped(tmp_path: Path) -> None:
    ring, config = load_data("ring"), toy_config(training__snapshot_freq=2, training__keep_last=9)
    list(train(config, tmp_path / "a", ring, VectorCodec(), ALONE))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    a, b = (checkpoints(tmp_path / name) for name in "ab")
    damage(b[-1])
    left = b[0].parent / ".000000009.safetensors.1.partial"
    left.touch()
    os.utime(left, (0, 0))
    notes = [note for m in train(config, tmp_path / "b", ring, VectorCodec(), ALONE) for note in m.notes]
    assert len(notes) == 2 and str(b[-1]) in notes[0] and "was changed" in notes[0]
    assert notes[1] == f"going on from step 4 of {b[1]}"
    assert a[-1].read_bytes() == b[-1].read_bytes() and not left.exists()
    left.touch()
    os.utime(left, (0, 0))
    list(train(config, tmp_path / "b", ring, VectorCodec(), ALONE))  # it is complete, and writes nothing
    assert not left.exists()


def test_the_last_and_every_nth_are_kept(tmp_path: Path) -> None:
    paths = small(tmp_path, *range(100, 1100, 100))
    prune(paths[-1], keep_last=2, keep_every=400)
    assert [int(p.stem) for p in checkpoints(tmp_path)] == [400, 800, 900, 1000]


def test_what_was_written_and_what_training_did_not_name_is_never_pruned(tmp_path: Path) -> None:
    """Nor what cannot be read, which does not count among the last."""
    paths = small(tmp_path, 1, 2, 3, 4, 5, 6)
    paths[5].write_bytes(paths[5].read_bytes()[:300])
    best = shutil.copy(paths[0], paths[0].with_name("best.safetensors"))
    copied = shutil.copy(paths[0], checkpoint.checkpoint_path(tmp_path, 7))
    prune(paths[4], keep_last=2, keep_every=0)
    assert sorted(paths[0].parent.iterdir()) == sorted([paths[3], paths[4], paths[5], copied, best])
    prune(paths[3], keep_last=1, keep_every=0)  # a run to fewer steps, whose file is older than another
    assert sorted(paths[0].parent.iterdir()) == sorted([paths[3], paths[4], paths[5], copied, best])


# -- files that are not as they were saved


def rewritten(path: Path, header: dict[str, str] | None = None, **tensors: torch.Tensor | None) -> None:
    """A file as version 0.1.0 wrote it, without hashes, with other tensors (None: without) or another header."""
    with safe_open(path, "pt") as file:
        known = {key: value for key, value in (file.metadata() or {}).items() if not key.endswith("sha256")}
    kept = {**load_file(path), **tensors}
    save_file(
        {name: value for name, value in kept.items() if value is not None}, path, known if header is None else header
    )


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("shape", None, "no shape"), ("step", None, "no step"), ("config", None, "no config"),
        ("step", "-3", "step is no count"), ("step", "3.0", "step is no count"), ("step", "", "step is no JSON"),
        ("step", "true", "step is no count"), ("step", '"3"', "step is no count"), ("step", "٣", "step is no JSON"),
        ("shape", "2", "shape is no list"), ("shape", "[]", "shape is no list"), ("shape", "[2.5]", "shape is no list"),
        ("shape", "[0]", "shape is no list"), ("shape", "[-2]", "shape is no list"), ("shape", "[2", "shape is no JS"),
        ("shape", '["2"]', "shape is no list"), ("shape", "[true]", "shape is no list"),
        ("config", "", "config is no JSON"), ("config", "[]", "config is no JSON object"),
        ("config", "[" * 100_000, "config is no JSON"), ("config", '{"model": {"nams": "mlp"}}', "model.nam"),
        ("config", '{"model": {"hidden": "wide"}}', "model.hidden"), ("config", "{}", "build no model"),
        ("codes", "{}", "statistics of codes"), ("codes", "x", "statistics of codes"),
        ("data", "[]", "a model's data"), ("data", '{"levels": 3}', "a model's data"), ("format", "score_sde 9", "not"),
    ],
)  # fmt: skip
def test_a_header_that_cannot_be_is_told_in_one_sentence(
    tmp_path: Path, key: str, text: str | None, words: str
) -> None:
    """Also in a file without hashes."""
    path = Path(shutil.copy(OLD, tmp_path / "x.safetensors"))
    with safe_open(path, "pt") as file:
        header = file.metadata()
    rewritten(path, {**header, key: text} if text is not None else {k: v for k, v in header.items() if k != key})
    with pytest.raises(ValueError, match=words) as caught:
        load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_was_changed_anywhere_is_refused_or_holds_what_was_saved(tmp_path: Path) -> None:
    """Bits turned and ends cut off at places all over a checkpoint: one sentence, or all of it as it was."""
    path = small(tmp_path, 3)[0]
    content, card, weights = path.read_bytes(), read_card(path), load_file(path)
    places = range(3, len(content), 397)
    changed = [content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :] for place in places]
    changed += [content[:length] for length in range(0, len(content), 1499)] + [content + b"\0"]
    for i, now in enumerate(changed):
        path.write_bytes(now)
        try:
            found = load(path).state_dict()
            assert read_card(path) == card
            assert all(torch.equal(found[name], weights[f"ema/{name}"]) for name in found), i
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            assert newest(tmp_path) == (None, [f"skipped: {error}"])
        else:
            assert i < len(places), f"cut number {i - len(places)} was not told"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer/exp_avg/network.first.bias": torch.zeros(5)}, r"first.bias is torch.float32 of shape \(5,\)"),
        ({"optimizer/exp_avg/network.first.bias": torch.zeros(4, dtype=torch.int32)}, "first.bias is torch.int32"),
        ({"optimizer/exp_avg_sq/network.first.bias": torch.zeros(4, dtype=torch.float64)}, "is torch.float64"),
        ({"optimizer/exp_avg_sq/network.first.bias": None}, "exp_avg_sq/network.first.bias is missing"),
        ({"optimizer/step/network.first.bias": None}, "step/network.first.bias is missing"),
        ({"optimizer/step/network.first.bias": torch.tensor(3)}, "step/network.first.bias is torch.int64"),
        ({"optimizer/exp_avg_sq/network.first.bias": None, "optimizer/exp_avg_s/network.first.bias": torch.zeros(4)},
         r"exp_avg_s/network.first.bias is in"),
        ({"optimizer/exp_avg/network.first.bias": torch.full((4,), torch.nan)}, "not finite in optimizer/exp_avg"),
        ({"optimizer/exp_avg/other": torch.zeros(4)}, "optimizer/exp_avg/other is in"),
        ({"optimizer/odd": torch.zeros(4)}, "optimizer/odd is in"),
        ({"model/network.first.bias": torch.zeros(4, dtype=torch.int32)}, "model/network.first.bias is torch.int32"),
        ({"ema/network.first.bias": torch.zeros(4, dtype=torch.float16)}, "ema/network.first.bias is torch.float16"),
        ({"ema/network.first.bias": torch.full((4,), torch.inf)}, "not finite in ema/network.first.bias"),
        ({"ema/network.first.bias": None}, "ema/network.first.bias is missing"),
    ],
)  # fmt: skip
def test_a_tensor_that_cannot_be_is_named_and_nothing_is_restored(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], words: str
) -> None:
    path = Path(shutil.copy(OLD, tmp_path / "x.safetensors"))
    rewritten(path, **changes)
    state = make_state(toy_config(model__hidden=4, model__depth=1), (2,), CPU)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    with pytest.raises(ValueError, match=words) as caught:
        restore(path, state)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in state.model.state_dict().items())
    assert not state.optimizer.state


def test_broken_weights_of_diffusers_are_told_in_one_sentence(tmp_path: Path) -> None:
    weights = tmp_path / interop_diffusers.WEIGHTS
    (tmp_path / "config.json").write_text("{}")
    weights.write_bytes(OLD.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors is truncated"):
        interop_diffusers.load_network(tmp_path)
    save_file({"conv_in.bias": torch.tensor([1.0, torch.nan])}, weights)
    with pytest.raises(ValueError, match=r"safetensors holds numbers that are not finite in conv_in\.bias"):
        interop_diffusers.load_network(tmp_path)


def test_a_checkpoint_of_version_0_1_0_is_read_and_gone_on_from(tmp_path: Path) -> None:
    """It has no hashes, and does not say what its data were; on goes the run that went on then."""
    path = checkpoint.checkpoint_path(tmp_path / "on", 3)
    path.parent.mkdir(parents=True)
    shutil.copy(OLD, path)
    card = read_card(path)
    assert (card.step, card.shape, card.data, card.codes) == (3, (2,), "", "")
    ring, config = load_data("ring"), toy_config(model__hidden=4, model__depth=1)
    for name in ("on", "new"):
        list(train(config, tmp_path / name, ring, VectorCodec(), ALONE))
    a, b = (load_file(checkpoint.checkpoint_path(tmp_path / name, 6)) for name in ("on", "new"))
    assert a.keys() == b.keys()
    for name, value in a.items():  # to the rounding of another machine
        torch.testing.assert_close(b[name], value, rtol=1e-4, atol=1e-6)
    weights = load_file(OLD)
    assert all(torch.equal(value, weights[f"ema/{name}"]) for name, value in load(OLD).state_dict().items())


def test_a_workdir_without_checkpoints_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train it first with --mode train"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        load(tmp_path / "nothing.safetensors")


def test_the_card_describes_the_data_and_an_old_file_has_none(trained: Path) -> None:
    data = load_data("ring")
    about = DataCard.from_json(read_card(checkpoints(trained)[-1]).data)
    assert about == DataCard(None, None, 0, (), data.train.digest(data.captions), examples=20_000)
    assert read_card(OLD).data == ""
    digits = load_data("digits")
    assert DataCard.of(digits, PixelCodec(17)).class_names == tuple("0123456789")
    names = tuple("0123456789")
    assert DataCard.of(digits, PixelCodec(17)) == DataCard(17, None, 10, names, digits.train.digest(), examples=1497)


@pytest.mark.parametrize(
    "change", [{"levels": -1}, {"levels": 2.5}, {"num_classes": None}, {"rate": "44100"}, {"class_names": [1]},
               {"class_names": 3}, {"digest": 5}, {"examples": None}, {"size": 3}]
)  # fmt: skip
def test_a_description_of_data_that_is_none_is_refused(change: dict[str, object]) -> None:
    good = {"levels": 17, "rate": None, "num_classes": 2, "class_names": ["a", "b"], "digest": "0f"}
    assert DataCard.from_json(json.dumps(good)) == DataCard(17, None, 2, ("a", "b"), "0f")
    with pytest.raises(ValueError, match=r"a model's data"):
        DataCard.from_json(json.dumps({**good, **change}))


# -- runs


def same(a: Path, b: Path) -> None:
    one, other = load_file(a), load_file(b)
    assert one.keys() == other.keys() and len(one) > 10
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def _begin(command: list[str], errors: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    with errors.open("w") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = command[command.index("main.py") :]
    os.chdir(ROOT)
    runpy.run_path(sys.argv[0], run_name="__main__")


def begun(command: list[str], errors: Path) -> multiprocessing.process.BaseProcess:
    """A command in a process of its own, which begins with all modules there; what it says goes to a file."""
    process = multiprocessing.get_context("fork").Process(target=_begin, args=(command, errors))
    process.start()
    return process


def wait_for(there: Callable[[], bool], process: multiprocessing.process.BaseProcess) -> None:
    deadline = time.monotonic() + 120
    while not there():
        assert process.is_alive() and time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def words(command: list[str]) -> list[str]:
    return command[command.index("main.py") + 1 :]


def here(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> int:
    """The exit code of a training command in this process, which spares what a process takes to begin."""
    return cli.run(words(command))


def test_resume_after_kill_9_is_bitwise_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parameters, averages and moments after a kill and a resume are those of a run that was left alone."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    long = ("--config.training.n_iters=60", "--config.training.keep_last=60")
    process = begun(run(broken, *long), tmp_path / "errors")
    wait_for(checkpoint.checkpoint_path(broken, 10).exists, process)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = int(checkpoints(broken)[-1].stem)
    assert 10 <= left < 60, "the run was over before it could be killed"
    assert here(monkeypatch, run(broken, *long)) == 0
    assert "going on from step" in capsys.readouterr().err
    assert here(monkeypatch, run(straight, *long)) == 0
    for step in (left + 2, 60):
        same(checkpoint.checkpoint_path(straight, step), checkpoint.checkpoint_path(broken, step))


ENDLESS = ("--config.training.n_iters=1000000", "--config.training.snapshot_freq=1000000")


def check_stopped(workdir: Path, code: int | None, errors: str) -> None:
    assert code == 130, errors
    last, skipped = newest(workdir)
    assert last is not None and last.card is not None and skipped == [] and last.card.step >= 3
    assert f"stopped at step {last.card.step} of 1000000; the same command goes on" in errors


def test_a_signal_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    process, log = begun(run(tmp_path / "run", *ENDLESS), tmp_path / "errors"), tmp_path / "run" / "log.txt"
    wait_for(lambda: log.exists() and "step 3/" in log.read_text(), process)
    process.terminate()
    process.join(timeout=60)
    check_stopped(tmp_path / "run", process.exitcode, (tmp_path / "errors").read_text())


def test_an_interrupt_from_the_keyboard_saves_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, before = training.train_step, signal.getsignal(signal.SIGINT)

    def interrupted(state: Any, *rest: Any) -> Any:
        if state.step == 3:
            signal.raise_signal(signal.SIGINT)
        return real(state, *rest)

    monkeypatch.setattr(training, "train_step", interrupted)
    code = here(monkeypatch, run(tmp_path, *ENDLESS))
    check_stopped(tmp_path, code, capsys.readouterr().err)
    assert signal.getsignal(signal.SIGINT) == before


def test_two_processes_train_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 processes (DDP over gloo) give one process' parameters, to the rounding of sums."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert two_nodes(tmp_path, lambda rank, folder: cli.run(words(run(two)))) == [0, 0]
    assert here(monkeypatch, run(one)) == 0
    a, b = (load_file(checkpoint.checkpoint_path(folder, 12)) for folder in (one, two))
    assert a.keys() == b.keys()
    for name, value in a.items():
        if name.startswith("model/"):  # 12 steps of Adam at 1e-3 that could each be off by 2 lr in a wrong run
            torch.testing.assert_close(b[name], value, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    alone, both = (_numbers(folder / "log.txt") for folder in (one, two))  # of the whole batch, whoever computed what
    assert len(alone) == len(both) == 13 and {"training_loss", "grad_norm"} < alone[0].keys()
    assert {"eval_loss", "eval_noise_error"} == alone[-1].keys()
    for one_line, other in zip(alone, both, strict=True):
        assert other == pytest.approx(one_line, rel=1e-3)


@pytest.mark.slow
def test_times_by_second_moments_go_on_exactly_and_are_shared_by_processes(tmp_path: Path) -> None:
    """A run that goes on from its middle, and one of two of torchrun, draw the times of a run that was left alone."""
    keys = ["training.continuous=false", "training.objective=vlb", "training.time=second_moment", "model.label=index"]
    keys += ["model.learned_variance=true", "model.num_scales=4", "model.beta_max=3", "sampling.steps=4"]
    keys += ["sampling.grid=uniform", "model.rule=noise", "training.snapshot_freq=6"]
    overrides = [f"--config.{word}" for word in keys]
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    for name, start in [("one", ()), ("two", launcher), ("parts", ())]:
        if name == "parts":
            half = checkpoint.checkpoint_path(tmp_path / name, 6)
            half.parent.mkdir(parents=True)
            shutil.copy(checkpoint.checkpoint_path(tmp_path / "one", 6), half)
        done = finish(run(tmp_path / name, *overrides, launcher=start))
        assert done.returncode == 0, done.stderr[-3000:]
    assert "going on from step 6" in done.stderr
    files = {name: checkpoint.checkpoint_path(tmp_path / name, 12) for name in ("one", "two", "parts")}
    same(files["one"], files["parts"])
    a, b = (load_file(files[name]) for name in ("one", "two"))
    assert int(a["law/counts"].sum()) == 12 * 16 and torch.equal(a["law/counts"], b["law/counts"])
    assert a["law/counts"].min() >= 10, "the law never woke"
    torch.testing.assert_close(b["law/losses"], a["law/losses"], rtol=1e-3, atol=1e-4)
    for name, value in a.items():
        if name.startswith("model/"):
            torch.testing.assert_close(b[name], value, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def _numbers(path: Path) -> list[dict[str, float]]:
    """The numbers in the lines of a log, but for those that hang on the machine's speed."""
    lines = [line.split(" step ", 1)[1].split(" ", 1)[1] for line in path.read_text().splitlines() if "_loss" in line]
    pairs = [[part.rsplit(" ", 1) for part in line.split(", ")] for line in lines]
    return [{name: float(value) for name, value in line if name != "images_per_second"} for line in pairs]
