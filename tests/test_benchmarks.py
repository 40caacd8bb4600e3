"""The benchmarks run and report every row, at sizes where their times mean nothing."""

import math
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import peer, solvers
from benchmarks.likelihood import likelihood
from benchmarks.sampling import SUBJECTS, sampling
from benchmarks.schedulers import DETERMINISTIC
from benchmarks.timing import Clock, Table, ratio, spread
from benchmarks.training import training
from score_sde import DDIM, DPMSolver, Heun, Multistep, Sampler, UniPC, recommended, times
from score_sde.config import load

# of NumPy's and of their own options
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning:diffusers")

CONFIGS = Path(__file__).parent.parent / "configs"
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


def test_sampling_reports_every_sampler_beside_bare_operations() -> None:
    found = cells(sampling(load(CONFIGS / "ve_toy.py"), CLOCK, None))
    assert list(found) == list(SUBJECTS)
    assert all(row["ours/bare"] and row["bare"].endswith(" ms") and row["peer"] == "" for row in found.values())


@pytest.mark.parametrize("name", ["vp_digits", "ve_toy"])
def test_likelihood_reports_its_error_against_the_closed_form(name: str) -> None:
    config = load(CONFIGS / f"{name}.py", TINY)
    (found,) = cells(likelihood(config, command.shape_of(config), CLOCK, None)).values()
    # at tolerance 1e-3 the solver's error; that of a wrong density would be of order 1
    assert float(found["error, bits/dim"]) < 1e-2
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


@pytest.fixture(scope="module")
def problem() -> solvers.Problem:
    return solvers.mixture_problem(*next(solvers.mixtures()), count=16)


def test_references_of_the_flow_agree(problem: solvers.Problem) -> None:
    assert problem.doubt < 1e-9


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("DDIM", DDIM()),
        ("Heun", Heun()),
        ("DEIS 3", Multistep(3, "noise", start="lower")),
        ("UniPC 3", UniPC(3, start="lower", short=100)),
        ("UniPC 3, noise", UniPC(3, predict="noise", start="lower", short=100)),
    ],
)
def test_schedulers_of_diffusers_end_where_ours_do_on_the_same_grid(
    problem: solvers.Problem, name: str, ours: Sampler
) -> None:
    for n in (6, 20):
        grid = times.arcsinh(problem.sde, n)
        (x, nfe), (y, same) = (solvers.walk(problem, sampler, grid) for sampler in (DETERMINISTIC[name], ours))
        assert nfe == same == n * (2 if name == "Heun" else 1)
        torch.testing.assert_close(x, y, rtol=0, atol=1e-9)


def test_errors_fall_at_the_solvers_orders_in_evaluations_counted(problem: solvers.Problem) -> None:
    subjects = [solvers.Subject("ours", str(s), s) for s in (DDIM(), DPMSolver(2), Multistep(2))]
    runs = solvers.compare(problem, [(subject, ["log_snr"]) for subject in subjects], (50, 100))
    assert all(run.budget == run.nfe for run in runs)
    score = solvers.scores(runs)
    for subject, order in zip(subjects, (1, 2, 2), strict=True):
        errors = score[str(subject), "log_snr"]
        assert math.log2(errors[50] / errors[100]) == pytest.approx(order, abs=0.3)
    assert score[solvers.DEFAULT, ""][100] < 1e-5


def test_budgets_are_kept_by_counting() -> None:
    assert solvers.steps_within(UniPC(3), 10) == 8  # its start takes two more
    assert solvers.steps_within(DPMSolver(3), 10) == 3 and solvers.steps_within(DPMSolver(3), 2) == 0
    assert solvers.steps_within(Heun(), 7) == 3


def test_every_loss_is_listed_and_the_summary_is_relative_to_the_default() -> None:
    rows = [(solvers.DEFAULT, "", 1.0), ("ours: a", "karras", 0.5), ("ours: a", "log_snr", 2.0)]
    runs = [
        solvers.Run(who, grid, problem, budget, budget, error, 2 * error)
        for who, grid, error in rows
        for problem in ("p", "q")
        for budget in solvers.JUDGED
    ]
    assert solvers.best_grids(runs)["ours: a"] == "karras"
    table = solvers.summary(runs, "", solvers.best_grids(runs))
    assert [(row[0], row[-2]) for row in table.rows] == [("ours: a", "0.50"), (solvers.DEFAULT, "1.00")]
    lost = solvers.losses(runs).rows
    assert len(lost) == 2 * len(solvers.JUDGED) and {row[-2] for row in lost} == {"2.00"}


def test_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=g, dtype=torch.float64)
    assert solvers.frechet(x, x) == pytest.approx(0, abs=1e-10)
    scale, shift = torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64), torch.tensor([1.0, 0.0, -2.0])
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T  # unit covariance
    assert solvers.frechet(x, x * scale) == pytest.approx(
        float((x.mean(0) * (1 - scale)).square().sum()) + 1 + 0.25, rel=1e-9
    )
    assert solvers.frechet(x, x + shift) == pytest.approx(5, rel=1e-9)


def test_recommended_keeps_its_budget_and_beats_ddim(problem: solvers.Problem) -> None:
    for nfe in (1, 2, 9, 10, 14, 15, 24, 25, 40):
        sampler, grid = recommended(problem.sde, nfe)
        x, counted = solvers.walk(problem, sampler, grid)
        y, _ = solvers.walk(problem, DDIM(), times.log_snr(problem.sde, nfe))
        assert counted == nfe
        assert nfe < 7 or solvers.distances(x, problem.end).median() < solvers.distances(y, problem.end).median() / 2
