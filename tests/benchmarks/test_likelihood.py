"""The benchmarks of likelihoods: coordinates agree with each other, and a trained model is measured on its own data."""

from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.coordinates import CANDIDATES, T_MIN, Angle, LogSNR, gaussian, measure, needed
from benchmarks.likelihood import AsPeer
from benchmarks.timing import Clock
from score_sde import SDE, VESDE, VPSDE
from score_sde.cli import run
from score_sde.models.closed_form import Gaussian
from score_sde.ode.circle import Circle
from tests.oracles import numbers

VARIANCES = torch.tensor([0.02, 0.1, 0.9], dtype=torch.float64)


@pytest.mark.parametrize("coordinate", [LogSNR, Angle, Circle])
def test_every_coordinate_is_of_the_same_flow(coordinate: type[Circle]) -> None:
    model = Gaussian(VPSDE(), 0 * VARIANCES, VARIANCES)
    circle, x, now = coordinate(model), numbers(4, 3), torch.tensor(0.3, dtype=torch.float64)
    u, h = circle.place(now), 1e-4
    assert float(circle.time(u)) == pytest.approx(0.3, rel=1e-6)
    ends = [model.flow(x, now, circle.time(v)) / circle.radius(circle.time(v)) for v in (u - h, u + h)]
    slope = circle.velocity(u.expand(4), x / circle.radius(now))
    torch.testing.assert_close(slope, (ends[1] - ends[0]) / (2 * h), rtol=1e-4, atol=1e-5)


def test_every_candidate_comes_near_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.coordinates.TOLERANCES", (1e-3, 1e-5))
    found = measure(gaussian("three", VPSDE(), VARIANCES))
    assert list(found) == list(CANDIDATES) and T_MIN == 1e-5
    for runs in found.values():
        assert runs[-1][1] < 2e-4 and runs[-1][0] > runs[0][0]


def test_evaluations_needed_are_read_off_a_line() -> None:
    runs = [(10 * 10**i, 1e-3 * 10 ** (-5 * i)) for i in range(4)]  # a method of order 5
    assert needed(runs, 1e-3) == pytest.approx(10) and needed(runs, 1e-8) == pytest.approx(100)


@pytest.mark.parametrize("sde", [VPSDE(), VESDE()])
def test_the_peer_asks_our_model_by_its_own_labels(sde: SDE) -> None:
    model, x, t = Gaussian(sde, 0 * VARIANCES, VARIANCES), numbers(4, 3), torch.full((4,), 0.4, dtype=torch.float64)
    if isinstance(sde, VESDE):  # it takes the network's answer for the score, VP's for minus the score times sigma
        answer = model.score(x, t)
        torch.testing.assert_close(AsPeer(model)(x, sde.sigma(t)), answer, rtol=1e-8, atol=1e-8)
    else:
        answer = -model.score(x, t) * sde.sigma(t)[:, None]
        torch.testing.assert_close(AsPeer(model)(x, 999 * t), answer, rtol=1e-8, atol=1e-8)


def test_a_trained_model_is_measured_on_its_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "Clock", partial(Clock, turns=1))
    config = ["--config", "configs/vp_digits.py", "--config.model.nf=8"]
    quick = ["training.n_iters=2", "training.batch_size=8", "training.snapshot_sampling=false", "model.nf=8"]
    quick += ["model.num_res_blocks=1", "model.ch_mult=1,1"]
    settings = [f"--config.{setting}" for setting in quick]
    assert run([*config, "--mode", "train", "--workdir", str(tmp_path), *settings]) == 0
    words = ["--parts", "likelihood", "--batch", "1", "--seconds", "0", "--model", str(tmp_path)]
    coarse = [f"--config.eval.{setting}" for setting in ("rtol=1e-4", "atol=1e-4", "t_min=0.05")]
    (table,) = command.run([*config, *words, *coarse])
    tight, loose = (dict(zip(table.head, row, strict=True)) for row in table.rows)
    assert loose[""] == "ours, tolerance 0.0002" and int(loose["evaluations"]) < int(tight["evaluations"])
    assert float(tight["error, bits/dim"]) < 1e-3 and float(loose["error, bits/dim"]) < 1e-2
