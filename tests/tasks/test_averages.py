"""Averages of weights after the fact, against averages kept directly, by brute force over recorded weights."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import minimize

from score_sde import load
from score_sde.cli import run
from score_sde.data import load_data
from score_sde.data.codecs import VectorCodec
from score_sde.data.sets import digest
from score_sde.tasks import checkpoint
from score_sde.tasks.averages import WIDEST, WIDTHS, combination, ema_update, exponent, power_decay
from score_sde.tasks.checkpoint import Trained
from score_sde.tasks.train import train
from tests.runs import ALONE, line, overrides, refused, run_steps, toy_config, two_nodes


def profile(steps: int, width: float, end: int) -> np.ndarray:
    """How much the weights of each of the first `end` steps count in the power average at step `steps`: (end,)."""
    edges = np.minimum(np.arange(end + 1) / steps, 1.0)
    return np.diff(edges ** (exponent(width) + 1))


def directly(history: torch.Tensor, width: float) -> torch.Tensor:
    """The power average of a history (steps, ...), kept while it runs, from a start that should not matter."""
    average = torch.full_like(history[0], 1e3)
    for step, value in enumerate(history, 1):
        ema_update([average], [value], power_decay(step, width))
    return average


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2, WIDEST])
def test_a_width_is_the_standard_deviation_of_its_profile(width: float) -> None:
    gamma = exponent(width)
    mean, square = (quad(lambda t, k=k: (gamma + 1) * t ** (gamma + k), 0, 1)[0] for k in (1, 2))
    assert math.sqrt(square - mean**2) == pytest.approx(width, rel=1e-6)
    assert exponent(0.05) == pytest.approx(16.97, abs=0.01) and exponent(0.1) == pytest.approx(6.94, abs=0.01)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.3, math.nan])
def test_a_width_that_no_power_has_is_refused(width: float) -> None:
    with pytest.raises(ValueError, match=r"above 0 and at most 0\.289"):
        exponent(width)


@pytest.mark.parametrize("width", [0.05, 0.2])
def test_an_average_kept_step_by_step_has_the_profile_of_a_power(width: float) -> None:
    history = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.from_numpy(profile(40, width, 40))
    torch.testing.assert_close(directly(history, width), weights @ history, rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [0.03, 0.07, 0.15, 0.25])
def test_averages_made_afterwards_differ_from_those_kept_by_the_computed_error(width: float) -> None:
    steps = [40, 80, 120, 160]
    source = torch.Generator().manual_seed(1)
    history = 5 + torch.randn(steps[-1], 20_000, generator=source, dtype=torch.float64)
    stored = torch.stack([torch.stack([directly(history[:step], w) for w in WIDTHS]) for step in steps])
    mixture = combination(steps, width)
    made = torch.einsum("sw,swn->n", torch.from_numpy(mixture.factors), stored)
    off = made - directly(history, width)
    assert mixture.factors.sum() == pytest.approx(1, abs=1e-10)
    # Of independent unit noise the difference has the size |q - p|, which over steps of this length is a little less
    # than the distance of the profiles, by which every weight of every history is limited.
    found = sum(w * profile(s, k, 160) for s, row in zip(steps, mixture.factors) for k, w in zip(WIDTHS, row))
    size = np.linalg.norm(found - profile(160, width, 160))
    assert float(off.square().mean().sqrt()) == pytest.approx(size, rel=0.025)
    assert 0.93 < size / (mixture.error * mixture.norm) <= 1
    assert bool((off.abs() <= mixture.error * mixture.norm * (history - 5).square().sum(0).sqrt()).all())


@pytest.mark.parametrize("width", [0.03, 0.15])
def test_no_other_mixture_is_nearer(width: float) -> None:
    steps = [50, 120, 200]
    t = (np.arange(20_000) + 0.5) / 100
    power = lambda end, w: np.where(t < end, (exponent(w) + 1) / end * (t / end) ** exponent(w), 0)
    profiles = np.stack([power(step, w) for step in steps for w in WIDTHS])
    wanted, mixture = power(200, width), combination(steps, width)
    distance = lambda x: float(np.sqrt(np.mean((x @ profiles - wanted) ** 2) / np.mean(wanted**2)))
    assert distance(mixture.factors.ravel()) == pytest.approx(mixture.error, rel=1e-4)
    assert math.sqrt(np.mean(wanted**2) * 200) == pytest.approx(mixture.norm, rel=1e-6)
    with_sum = {"type": "eq", "fun": lambda x: x.sum() - 1}
    best = minimize(lambda x: distance(x) ** 2, np.full(6, 1 / 6), constraints=with_sum, tol=1e-14)
    assert mixture.error <= math.sqrt(best.fun) + 1e-6


def test_more_checkpoints_come_nearer_and_a_kept_width_is_exact() -> None:
    few, more, many = (combination([640 // n * (i + 1) for i in range(n)], 0.15).error for n in (4, 16, 64))
    assert 0.05 < few < 0.2 and 10 * more < few and 10 * many < more
    exact = combination([100, 200], 0.1)
    assert exact.error == 0 and exact.factors.tolist() == [[0, 0], [0, 1]]
    near = combination([100, 200], 0.1 + 1e-9)  # what the equations give next to it
    assert np.abs(near.factors - exact.factors).max() < 1e-6


# -- runs


STEPS = 12


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy run with power averages and a checkpoint at each step."""
    workdir = tmp_path_factory.mktemp("run")
    config = toy_config(
        model__ema_power=True, training__n_iters=STEPS, training__snapshot_freq=1, training__keep_every=1,
        optim__lr=1e-2,
    )  # fmt: skip
    list(train(config, workdir, load_data("ring"), VectorCodec(), ALONE))
    return workdir


def of_layer(path: Path, ema: bool | float) -> torch.Tensor:
    model: Any = load(path, ema=ema)
    weights: torch.Tensor = model.network.first.weight
    return weights


def history_of(workdir: Path) -> torch.Tensor:
    """The weights of one layer after every step."""
    return torch.stack([of_layer(path, False) for path in checkpoint.checkpoints(workdir)]).double()


def test_a_run_s_averages_of_any_width_are_those_of_its_weights(whole: Path, tmp_path: Path) -> None:
    history = history_of(whole)
    for width in (*WIDTHS, 0.07, 0.2):
        found, expected = of_layer(whole, width).double(), directly(history, width)
        mixture = combination(range(1, STEPS + 1), width)
        allowed = mixture.error * mixture.norm * (history - history.mean(0)).square().sum(0).sqrt()
        assert bool(((found - expected).abs() <= allowed + 2e-7).all())
        assert (found - history[-1]).abs().max() > 1e-3  # and not the raw weights
    earlier = of_layer(checkpoint.checkpoint_path(whole, 7), 0.1).double()
    torch.testing.assert_close(earlier, directly(history[:7], 0.1), rtol=0, atol=2e-7)
    last, alone = checkpoint.checkpoints(whole)[-1], tmp_path / "alone.safetensors"
    alone.write_bytes(last.read_bytes())
    for width in WIDTHS:
        assert torch.equal(of_layer(alone, width), of_layer(last, width))
    assert not torch.equal(of_layer(alone, 0.2), of_layer(last, 0.2))


@pytest.mark.parametrize("kept", [True, False])
def test_power_averages_change_nothing_else(kept: bool) -> None:
    data = load_data("ring")
    plain, _ = run_steps(toy_config(), data)
    state, _ = run_steps(toy_config(model__ema_power=kept), data)
    names = checkpoint.tensors_of(state).keys() - checkpoint.tensors_of(plain).keys()
    assert {name.partition("/")[0] for name in names} == ({"ema_0.05", "ema_0.1"} if kept else set())
    for name, value in checkpoint.tensors_of(plain).items():
        assert torch.equal(checkpoint.tensors_of(state)[name], value)


TOY = {"model__ema_power": "true", "data__dataset": "ring", "training__snapshot_freq": 3, "training__keep_every": 1}
TOY |= {"optim__decay": 0, "optim__warmup": 0}


def tensors(workdir: Path, step: int) -> dict[str, torch.Tensor]:
    return checkpoint.read_tensors(checkpoint.checkpoint_path(workdir, step))


def test_a_resumed_run_has_the_same_power_averages_bit_for_bit(tmp_path: Path) -> None:
    for name, lengths in (("whole", (9,)), ("parts", (5, 9))):
        for length in lengths:
            assert run(line("vp_toy", "train", tmp_path / name, **TOY, training__n_iters=length)) == 0
    whole, parts = tensors(tmp_path / "whole", 9), tensors(tmp_path / "parts", 9)
    assert sum(name.startswith("ema_0.1/") for name in whole) > 5
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def node(rank: int, folder: Path) -> list[int]:
    settings = {**TOY, "training__snapshot_freq": 1}
    codes = [run(line("vp_toy", "train", folder / "two", **settings, training__n_iters=length)) for length in (3, 6)]
    return [*codes, run(line("vp_toy", "sample", folder / "two", sampling__ema=0.2))]


def test_several_processes_keep_the_averages_of_their_weights(tmp_path: Path) -> None:
    assert two_nodes(tmp_path, node) == [[0, 0, 0], [0, 0, 0]]
    history = history_of(tmp_path / "two")
    assert len(history) == 6 and float((history[-1] - history[0]).abs().max()) > 1e-3
    for width in WIDTHS:
        found = of_layer(tmp_path / "two", width).double()
        torch.testing.assert_close(found, directly(history, width), rtol=0, atol=2e-7)
    (path,) = (tmp_path / "two" / "samples").glob("*-ema0.2-*/stamp.json")
    model: Any = load(tmp_path / "two", ema=0.2)
    assert json.loads(path.read_text())["weights_sha256"] == digest(*model.parameters())


def test_every_mode_takes_a_width_and_says_how_it_was_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    workdir = tmp_path / "run"
    assert run(line("vp_toy", "train", workdir, **TOY, training__n_iters=9)) == 0
    width = overrides(sampling__ema=0.2)
    for mode, folder in (("sample", "samples"), ("likelihood", "likelihood")):
        assert run([*line("vp_toy", mode, workdir), *width]) == 0
        (made,) = (workdir / folder).glob("*-ema0.2-*")
        stamp = json.loads((made / "stamp.json").read_text())
        assert stamp["weights"] == "ema0.2" and len(stamp["weights_sha256"]) == 64
    assert "power average of width 0.2: of 3 checkpoints" in caplog.text
    sampled = {path.name for path in (workdir / "samples").glob("*")}
    checkpoint.checkpoint_path(workdir, 3).unlink()  # other averages now, and so other weights
    assert run([*line("vp_toy", "sample", workdir), *width]) == 0
    assert len({path.name for path in (workdir / "samples").glob("*")} - sampled) == 1


def test_where_no_power_averages_are_one_sentence_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = tmp_path / "plain"
    assert run(line("vp_toy", "train", plain, training__n_iters=2)) == 0
    width = overrides(sampling__ema=0.05)
    for mode in ("sample", "likelihood"):
        said = refused(capsys, [*line("vp_toy", mode, plain), *width])
        assert "000000002.safetensors has no power averages" in said and "--config.model.ema_power=true" in said
    said = refused(capsys, line("vp_toy", "train", plain, **TOY, training__n_iters=4))
    assert "would count every step from the first: go on with model.ema_power=False" in said
    for mode in ("train", "demo"):  # before it has run for long
        said = refused(capsys, [*line("vp_digits", mode, tmp_path / "new"), *width])
        assert "sampling.ema=0.05 would be made of power averages" in said and not (tmp_path / "new").exists()
    said = refused(capsys, [*line("vp_toy", "sample", plain), *width, *overrides(sampling__weights="raw")])
    assert "sampling.ema=0.05 is an average: set sampling.weights=ema" in said
    assert "between 0 and 0.288" in refused(capsys, [*line("vp_toy", "sample", plain), *overrides(sampling__ema=0.3)])
    with pytest.raises(ValueError, match="has no power averages"):
        Trained(tmp_path / "model.pth").model(0.05)


def test_a_run_without_power_averages_goes_on_from_one_that_had_them(tmp_path: Path) -> None:
    assert run(line("vp_toy", "train", tmp_path, **TOY, training__n_iters=3)) == 0
    assert run(line("vp_toy", "train", tmp_path, **{**TOY, "model__ema_power": "false"}, training__n_iters=6)) == 0
    assert not any(name.startswith("ema_") for name in tensors(tmp_path, 6))


def test_a_damaged_checkpoint_is_left_out(whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    cut = checkpoint.checkpoint_path(whole, 5)
    content = cut.read_bytes()
    cut.write_bytes(content[:100])
    load(whole, ema=0.2)
    cut.write_bytes(content)
    assert f"left out of the power average: {cut}" in caplog.text and f"of {STEPS - 1} checkpoints" in caplog.text
