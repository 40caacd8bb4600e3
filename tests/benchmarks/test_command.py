"""The benchmarks run and report every row, at sizes where their times mean nothing."""

from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import peer
from benchmarks.likelihood import likelihood
from benchmarks.sampling import SUBJECTS, sampling
from benchmarks.timing import Clock, Table, ratio, spread
from benchmarks.training import training
from score_sde.config import load
from tests import ROOT

CONFIGS = ROOT / "configs"
CLOCK = Clock(torch.device("cpu"), threads=1, seconds=0.0, turns=2)
TINY = {"training.batch_size": "2", "model.nf": "8", "eval.rtol": "1e-3", "eval.atol": "1e-3"}


def cells(table: Table) -> dict[str, dict[str, str]]:
    return {row[0]: dict(zip(table.head[1:], row[1:], strict=True)) for row in table.rows}


@pytest.mark.parametrize("name", ["vp_digits", "vp_toy"])
def test_training_reports_its_parts(name: str) -> None:
    config = load(CONFIGS / f"{name}.py", TINY)
    found = cells(training(config, command.shape_of(config), CLOCK, None))
    parts = ["network forward + backward", "clip + optimizer + EMA", "whole step"]
    assert list(found) == [*parts, "images/s, whole step", "TFLOP/s, whole step"]
    assert all(found[part]["ours"].endswith(" ms") and found[part]["peer"] == "" for part in parts)
    assert all(float(found[row]["ours"]) > 0 for row in list(found)[3:])


def test_sampling_reports_every_sampler_beside_bare_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.sampling.STEPS", 5)
    found = cells(sampling(load(CONFIGS / "ve_toy.py"), CLOCK, None))
    assert list(found) == list(SUBJECTS)
    assert all(row["ours/bare"] and row["bare"].endswith(" ms") and row["peer"] == "" for row in found.values())


@pytest.mark.parametrize("name", [pytest.param("vp_digits", marks=pytest.mark.slow), "ve_toy"])
def test_likelihood_reports_its_error_against_the_closed_form(name: str) -> None:
    small = {"model.num_res_blocks": "1"} if name == "vp_digits" else {}
    config = load(CONFIGS / f"{name}.py", {**TINY, **small, "eval.rtol": "1e-4", "eval.atol": "1e-4"})
    (found,) = cells(likelihood(config, command.shape_of(config), CLOCK, None)).values()
    # at tolerance 1e-4 the solver's error; that of a wrong density would be of order 1
    assert float(found["error, bits/dim"]) < 4e-3
    assert int(found["evaluations"]) > 10 and found["time an image"].endswith(" ms")


def test_ratios_are_taken_within_a_turn() -> None:
    # a machine that is slow in some turns slows both sides: the ratio does not notice
    slow = [1.0, 10.0, 3.0, 1.0]
    assert ratio([2 * s for s in slow], slow) == (2.0, 2.0, 2.0)
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0, 4.0)


def test_candidates_take_turns_in_alternating_order() -> None:
    calls = []
    taken = CLOCK.compare({name: lambda name=name: calls.append(name) for name in "ab"})
    assert "".join(calls) == "ababba"  # the first turn is not measured
    assert {name: len(times) for name, times in taken.items()} == {"a": 2, "b": 2}


def test_command_line_prints_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(CONFIGS / "vp_toy.py")
    tables = command.run(["--config", config, "--parts", "likelihood", "--batch", "3", "--seconds", "0"])
    out = capsys.readouterr().out
    assert len(tables) == 1 and str(tables[0]) in out
    assert f"torch {torch.__version__}" in out and "CPU time of the process" in out and "training.batch_size=3" in out


def test_what_the_peer_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no clone of score_sde_pytorch"):
        peer.load(tmp_path)
    with pytest.raises(ValueError, match=r"no network for vectors: run this config without --peer"):
        peer.config_for(load(CONFIGS / "vp_toy.py"), (2,), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"no SDE 'cosine'"):
        peer.config_for(load(CONFIGS / "vp_cifar.py", {"training.sde": "cosine"}), (3, 32, 32), torch.device("cpu"))
    theirs = peer.config_for(load(CONFIGS / "ve_cifar.py"), (3, 32, 32), torch.device("cpu"))
    assert theirs.model.scale_by_sigma and theirs.model.ch_mult == (1, 2, 2, 2)
