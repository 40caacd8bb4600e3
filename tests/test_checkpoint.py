"""Checkpoints: whole or absent, exact, and never half-loaded; runs that are killed, stopped or split over processes."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from score_sde import checkpoint
from score_sde.checkpoint import Card, DataCard, checkpoints, load, newest, prune, read_card, restore, save
from score_sde.codecs import PixelCodec, VectorCodec
from score_sde.config import to_json
from score_sde.data import load_data
from score_sde.train import make_state, train
from tests.test_train import ALONE, toy_config

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
OLD = ROOT / "tests" / "data" / "checkpoints" / "mlp-0.1.0.safetensors"  # of 3 steps on the ring, by version 0.1.0


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
    path, skipped = newest(trained)
    assert path is not None and skipped == []
    assert read_card(path).step == 6 and read_card(path).shape == (2,)
    tensors = load_file(path)
    state = make_state(config, (2,), CPU)
    restore(path, state.model, state.ema, state.optimizer)
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
    path, skipped = newest(trained)
    assert path == whole and len(skipped) == 1 and str(cut) in skipped[0] and "truncated" in skipped[0]
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        load(cut)


def test_a_foreign_checkpoint_is_refused(trained: Path) -> None:
    from safetensors.torch import save_file

    other = trained / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, other)
    with pytest.raises(ValueError, match=r"other\.safetensors was not written by this package"):
        load(other)


def test_a_checkpoint_of_another_network_changes_nothing(trained: Path) -> None:
    state = make_state(toy_config(model__hidden=16), (2,), CPU)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"has shape .* but the config asks for"):
        restore(checkpoints(trained)[-1], state.model, state.ema, state.optimizer)
    deeper = make_state(toy_config(model__depth=4), (2,), CPU)
    with pytest.raises(ValueError, match="is missing from"):
        restore(checkpoints(trained)[-1], deeper.model, deeper.ema, deeper.optimizer)
    for name, value in state.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_file_without_optimizer_cannot_be_resumed(trained: Path) -> None:
    state = make_state(toy_config(), (2,), CPU)
    path = trained / "weights.safetensors"
    save(path, Card(to_json(toy_config()), (2,), 5), state.model, state.ema, None)
    load(path)
    with pytest.raises(ValueError, match="no optimizer state"):
        restore(path, state.model, state.ema, state.optimizer)


def test_after_a_single_step_too_the_optimizer_s_state_is_needed(tmp_path: Path) -> None:
    """Before the first step there is none."""
    state, path = make_state(toy_config(), (2,), CPU), tmp_path / "weights.safetensors"
    save(path, Card(to_json(toy_config()), (2,), 1), state.model, state.ema, None)
    with pytest.raises(ValueError, match="no optimizer state"):
        restore(path, state.model, state.ema, state.optimizer)
    save(path, Card(to_json(toy_config()), (2,), 0), state.model, state.ema, None)
    assert restore(path, state.model, state.ema, state.optimizer).step == 0


def test_an_interrupted_write_leaves_the_old_file(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoints(trained)[-1]
    before = path.read_bytes()
    state = make_state(toy_config(), (2,), CPU)

    def fail(tensors: object, where: Path, header: object) -> None:
        Path(where).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        save(path, Card("{}", (2,), 6), state.model, state.ema, state.optimizer)
    assert path.read_bytes() == before
    assert newest(trained) == (path, [])


def test_the_last_and_every_nth_are_kept(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for step in range(100, 1100, 100):
        checkpoint.checkpoint_path(tmp_path, step).touch()
    prune(tmp_path, keep_last=2, keep_every=400)
    assert [int(p.stem) for p in checkpoints(tmp_path)] == [400, 800, 900, 1000]


def test_a_workdir_without_checkpoints_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train it first with --mode train"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        load(tmp_path / "nothing.safetensors")


def test_the_card_describes_the_data_and_an_old_file_has_none(trained: Path) -> None:
    data = load_data("ring")
    about = DataCard.from_json(read_card(checkpoints(trained)[-1]).data)
    assert about == DataCard(None, None, 0, (), data.train.digest(data.captions))
    assert read_card(OLD).data == ""
    digits = load_data("digits")
    assert DataCard.of(digits, PixelCodec(17)).class_names == tuple("0123456789")
    assert DataCard.of(digits, PixelCodec(17)) == DataCard(17, None, 10, tuple("0123456789"), digits.train.digest())


@pytest.mark.parametrize(
    "change", [{"levels": -1}, {"levels": 2.5}, {"num_classes": None}, {"rate": "44100"}, {"class_names": [1]},
               {"class_names": 3}, {"digest": 5}, {"size": 3}]
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


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


def test_resume_after_kill_9_is_bitwise_exact(tmp_path: Path) -> None:
    """Parameters, averages and moments after a kill and a resume are those of a run that was left alone."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    long = ("--config.training.n_iters=60", "--config.training.keep_last=60")
    assert finish(run(straight, *long)).returncode == 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(run(broken, *long), cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    wait_for(checkpoint.checkpoint_path(broken, 10), process)
    process.kill()
    process.wait()
    left = int(checkpoints(broken)[-1].stem)
    assert 10 <= left < 60, "the run was over before it could be killed"
    done = finish(run(broken, *long))
    assert done.returncode == 0, done.stderr
    assert f"going on from step {left}" in done.stderr or "going on from step" in done.stderr
    for step in (left + 2, 60):
        same(checkpoint.checkpoint_path(straight, step), checkpoint.checkpoint_path(broken, step))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    words = ("--config.training.n_iters=1000000", "--config.training.snapshot_freq=1000000")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(run(tmp_path, *words), cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "log.txt", process)
    deadline = time.monotonic() + 120
    while "step 3/" not in (tmp_path / "log.txt").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    path, skipped = newest(tmp_path)
    assert path is not None and skipped == [] and read_card(path).step >= 3
    assert f"stopped at step {read_card(path).step} of 1000000; the same command goes on" in errors


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """torchrun with 2 processes (DDP over gloo) gives one process' parameters, to the rounding of sums."""
    one, two = tmp_path / "one", tmp_path / "two"
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    alone = finish(run(one))
    both = finish(run(two, launcher=launcher))
    assert alone.returncode == 0 and both.returncode == 0, both.stderr[-3000:]
    a, b = (load_file(checkpoint.checkpoint_path(folder, 12)) for folder in (one, two))
    assert a.keys() == b.keys()
    for name, value in a.items():
        if name.startswith("model/"):  # 12 steps of Adam at 1e-3 that could each be off by 2 lr in a wrong run
            torch.testing.assert_close(b[name], value, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    losses = [_losses(folder / "log.txt") for folder in (one, two)]
    assert len(losses[0]) == len(losses[1]) == 12


@pytest.mark.slow
def test_times_by_second_moments_go_on_exactly_and_are_shared_by_processes(tmp_path: Path) -> None:
    """A run that goes on from its middle, and one of two processes, draw the times of a run that was left alone."""
    words = ["training.continuous=false", "training.objective=vlb", "training.time=second_moment", "model.label=index"]
    words += ["model.learned_variance=true", "model.num_scales=4", "model.beta_max=3", "sampling.steps=4"]
    words += ["sampling.grid=uniform", "model.rule=noise", "training.snapshot_freq=6"]
    overrides = [f"--config.{word}" for word in words]
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


def _losses(path: Path) -> list[float]:
    lines = [line for line in path.read_text().splitlines() if "training_loss" in line]
    return [float(line.split("training_loss ")[1].split(",")[0]) for line in lines]
