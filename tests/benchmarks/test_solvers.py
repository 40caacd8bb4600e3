"""The benchmark of samplers measures what it says: errors, budgets, distances of laws, and where the default loses."""

import math
import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import errors, laws, problems, reports, solvers, subjects
from benchmarks.judges import judge
from benchmarks.schedulers import DETERMINISTIC, STOCHASTIC
from benchmarks.subjects import DEFAULT, Adaptive, Subject
from score_sde import (
    DDIM,
    VPSDE,
    Ancestral,
    DPMSolver,
    EmbeddedODE,
    Heun,
    Multistep,
    Sampler,
    UniPC,
    from_score,
    recommended,
    sliced_wasserstein,
    times,
)
from score_sde.data import load_data
from score_sde.data.codecs import PixelCodec
from score_sde.models.closed_form import Gaussian
from score_sde.tasks.scan import gaussian_fit

# of NumPy's and of their own options
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning:diffusers")


@pytest.fixture(scope="module")
def problem() -> problems.Problem:
    return problems.mixture_problem(*next(problems.mixtures()), count=18, chosen=True)


@pytest.mark.parametrize("which", [*(pytest.param(k, marks=pytest.mark.slow) for k in (0, 1, 3)), 2])
def test_references_of_the_flow_agree_where_the_default_was_not_chosen(which: int) -> None:
    name, model = list(problems.held_out())[which]
    held = problems.mixture_problem(name, model, count=2)
    assert held.doubt < 1e-9 and not held.chosen


def test_references_of_the_flow_agree(problem: problems.Problem) -> None:
    assert problem.doubt < 1e-9


@pytest.mark.parametrize("which", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_field_of_many_dimensions_is_like_images_and_its_ends_are_the_closed_forms(which: int) -> None:
    name, model = list(problems.fields())[which]
    field = problems.mixture_problem(name, model, count=2)
    assert isinstance(model, Gaussian) and model.shape == (3072,)
    assert 200 < float(model.variances.max()) < 300 and 0.001 < float(model.variances.median()) < 0.01
    assert float(model.variances.mean()) == pytest.approx(1 / 4)
    first, last = (torch.tensor(t, dtype=torch.float64) for t in (1.0, model.sde.t_min))
    torch.testing.assert_close(field.end, model.flow(field.start, first, last), rtol=0, atol=1e-9)
    pixels = field.end.square().mean()  # of variance 1/4, up to the few large directions of two states
    assert field.doubt < 1e-9 and 0.05 < float(pixels) < 1


@torch.no_grad()
def of_both_and_of_noise(model: Gaussian, nfe: int) -> tuple[float, float]:
    """The default's median error, and that of the same sampler with noise prediction alone."""
    x = torch.randn(16, *model.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = model.flow(x, *(torch.tensor(t, dtype=torch.float64) for t in (1.0, model.sde.t_min)))
    problem = problems.Problem("", model, model.sde, x, ends, 0.0)
    sampler, grid = recommended(model.sde, nfe)
    assert isinstance(sampler, UniPC)
    both, noise = (
        float(problems.distances(errors.walk(problem, s, grid)[0], ends).median())
        for s in (sampler, replace(sampler, predict="noise"))
    )
    return both, noise


@pytest.mark.parametrize("nfe", [10, 20, 35])
def test_the_default_gains_by_both_predictions_where_a_few_of_many_dimensions_are_large(nfe: int) -> None:
    (_, field), *_ = problems.fields()
    assert isinstance(field, Gaussian)
    both, noise = of_both_and_of_noise(field, nfe)
    assert both < noise / 4


@pytest.mark.slow
@pytest.mark.skipif(
    "SCORE_SDE_CIFAR10" not in os.environ,
    reason="needs the environment variable SCORE_SDE_CIFAR10: a folder that holds CIFAR-10's official files",
)
def test_the_field_stands_for_the_gaussian_of_cifar10s_images() -> None:
    """Its large variances, what the default gains over noise prediction alone, and how far it ends from the truth."""
    train = load_data("cifar10", os.environ["SCORE_SDE_CIFAR10"]).train.x
    assert isinstance(train, Tensor)
    variances = torch.linalg.eigvalsh(gaussian_fit(train[:10_000], PixelCodec())[1])
    assert float(variances.max()) == pytest.approx(220, rel=0.05)
    assert float(variances.mean()) == pytest.approx(0.25, rel=0.05)
    (_, field), *_ = problems.fields()
    assert isinstance(field, Gaussian)
    image = Gaussian(field.sde, torch.zeros(3072, dtype=torch.float64), variances)
    (a, _), (b, noise) = (of_both_and_of_noise(model, 20) for model in (field, image))
    assert b < noise / 4 and 0.5 < a / b < 2


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
    problem: problems.Problem, name: str, ours: Sampler
) -> None:
    for n in (6, 20):
        grid = times.arcsinh(problem.sde, n)
        (x, nfe), (y, same) = (errors.walk(problem, sampler, grid) for sampler in (DETERMINISTIC[name], ours))
        assert nfe == same == n * (2 if name == "Heun" else 1)
        torch.testing.assert_close(x, y, rtol=0, atol=1e-9)


def test_errors_fall_at_the_solvers_orders_in_evaluations_counted(problem: problems.Problem) -> None:
    found = [Subject("ours", str(s), s) for s in (DDIM(), DPMSolver(2), Multistep(2))]
    runs = errors.compare(problem, [(subject, ["log_snr"]) for subject in found], (50, 100))
    assert all(run.budget == run.nfe for run in runs)
    score = reports.scores(runs)
    for subject, order in zip(found, (1, 2, 2), strict=True):
        distance = score[str(subject), "log_snr"]
        assert math.log2(distance[50] / distance[100]) == pytest.approx(order, abs=0.3)
    assert score[DEFAULT, ""][100] < 1e-5


def test_budgets_are_kept_by_counting() -> None:
    assert subjects.steps_within(UniPC(3), 10) == 8  # its start takes two more
    assert subjects.steps_within(DPMSolver(3), 10) == 3 and subjects.steps_within(DPMSolver(3), 2) == 0
    assert subjects.steps_within(Heun(), 7) == 3


def test_an_adaptive_sampler_is_counted_per_path_and_takes_what_it_can_of_a_budget(problem: problems.Problem) -> None:
    walks = [errors.walk(problem, EmbeddedODE(e, e), times.uniform(problem.sde, 1)) for e in (0.1, 1e-3)]
    alone = [
        errors.walk(problem._replace(start=row[None]), EmbeddedODE(1e-3, 1e-3), times.uniform(problem.sde, 1))[1]
        for row in problem.start
    ]
    assert walks[1][1] == pytest.approx(sum(alone) / len(alone)) and min(alone) < max(alone)
    subject = Adaptive("ours", "", [EmbeddedODE(e, e) for e in (0.1, 1e-3, 1e-10)])
    budgets = (3, math.ceil(walks[0][1]), math.ceil(walks[1][1]))
    runs = errors.adaptive(problem, subject, budgets)
    assert [(run.budget, run.nfe) for run in runs] == [(b, n) for b, (_, n) in zip(budgets[1:], walks, strict=True)]


def test_rows_are_kept_for_the_same_problem_only(problem: problems.Problem, tmp_path: Path) -> None:
    file, row = tmp_path / "rows.jsonl", errors.Run("a", "log_snr", "", 5)
    grid = times.log_snr(problem.sde, 5)
    first = errors.Kept(file)(problem, DDIM(), grid, row)
    assert first == errors.measure(problem, DDIM(), grid, row) and len(first.parts) == 3
    with file.open("a") as lines:
        lines.write('\n[1.0, "a", "log_sn')  # stopped here
    kept = errors.Kept(file)
    assert kept(problem, None, None, row) == first  # type: ignore[arg-type]  # nothing is run
    other = problem._replace(end=problem.end + 1)
    assert kept(other, DDIM(), grid, row).median > first.median
    assert len(errors.Kept(file).found) == 2


def test_a_grid_fitted_to_some_paths_serves_others(problem: problems.Problem) -> None:
    ((plain, fit),) = errors.fitted(problem, (6,), 32)
    assert plain.subject == DEFAULT and fit.nfe == plain.nfe == 6 and fit.median < plain.median


def runs_of(rows: list[tuple[str, str, float]]) -> list[errors.Run]:
    return [
        errors.Run(who, grid, problem, budget, budget, error, 2 * error, (error, error, 2 * error))
        for who, grid, error in rows
        for problem in ("p", "q")
        for budget in errors.JUDGED
    ]


def test_every_loss_is_listed_and_the_summary_is_relative_to_the_default() -> None:
    runs = runs_of([(DEFAULT, "", 1.0), ("ours: a", "karras", 0.5), ("ours: a", "log_snr", 2.0), ("b", "", 0.999)])
    best = reports.best_grids(runs)
    assert best["ours: a"] == "karras"
    table = reports.summary(runs, "", best)
    assert [(row[0], row[-3]) for row in table.rows] == [("ours: a", "0.50"), ("b", "1.00"), (DEFAULT, "1.00")]
    lost = reports.losses(runs).rows
    assert len(lost) == 2 * len(errors.JUDGED) and {row[-2:] for row in lost} == {("2.00", "1")}  # b is a tie


def test_the_verdict_takes_the_nearest_other_on_its_best_grid_and_draws_the_line_at_five_percent() -> None:
    for error, answer in ((0.95, "no"), (0.96, "yes")):
        runs = runs_of([(DEFAULT, "", 1.0), ("ours: a", "karras", error), ("ours: a", "log_snr", 2.0), ("b", "x", 3.0)])
        runs += [run._replace(problem="r", median=9 * run.median) for run in runs if run.problem == "q"]
        row = dict(zip((table := reports.verdict(runs, {"all": {"p", "q"}})).head, table.rows[0], strict=True))
        assert row["nearest other"] == "ours: a, karras" and row["within 5 % of the best"] == answer
        assert row["nearest of theirs"] == "b, x" and table.rows[0][3] == f"{error:.2f} ({error:.2f} to {error:.2f})"


def test_the_ratio_has_the_range_of_its_thirds() -> None:
    runs = runs_of([(DEFAULT, "", 1.0), ("a", "", 3.0)])
    runs = [run._replace(parts=(1.0, 3.0, 9.0)) if run.subject == "a" else run for run in runs]
    assert reports.ratios(runs)["a", ""] == pytest.approx((3.0, 1.0, 4.5))


def test_the_command_prints_every_table_and_goes_on_where_it_was(
    problem: problems.Problem, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, elsewhere = next(problems.mixtures()), next(problems.held_out())
    monkeypatch.setattr(solvers, "mixtures", lambda: [here])
    monkeypatch.setattr(solvers, "held_out", lambda: [elsewhere])
    monkeypatch.setattr(solvers, "fields", lambda: [])
    solved = {
        here[0]: problem._replace(start=problem.start[:3], end=problem.end[:3]),
        elsewhere[0]: problems.mixture_problem(*elsewhere, count=3),
    }
    monkeypatch.setattr(solvers, "mixture_problem", lambda name, model, chosen=False: solved[name])
    few = [Subject("ours", "DDIM", DDIM()), Subject("diffusers", "UniPC 2", DETERMINISTIC["UniPC 2"], "log_snr")]
    monkeypatch.setattr(solvers, "deterministic", lambda peer: few)
    monkeypatch.setattr(solvers, "LONG", 60)
    monkeypatch.setattr(solvers, "REST", (5,))
    monkeypatch.setattr(solvers, "adaptive_flows", lambda peer: [Adaptive("ours", "", [EmbeddedODE(0.1, 0.1)])])
    monkeypatch.setattr(solvers, "fits", lambda of, measure: {p.name: errors.fitted(p, (7,), 4, measure) for p in of})
    blocks = ("machine", "problems", "exact", "all", "verdict", "losses", "fits")
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- SOLVERS: {name} -->\n<!-- /SOLVERS -->\n" for name in blocks))
    arguments = ["--keep", str(tmp_path / "rows"), "--page", str(page)]
    tables = solvers.run([*arguments, "--plot", str(tmp_path / "plot.png")])
    out = capsys.readouterr().out
    names = ["Problems", "2-D, VP", "3-D, VP", "Exact scores", "All 2 problems", "The default and the nearest others"]
    assert [table.title for table in tables[:6]] == names and all(str(table) in out for table in tables)
    assert {row[0]: row[1] for row in tables[5].rows} == {
        "all": "2",
        "chosen on": "1",
        "held out": "1",
        "exact scores": "2",
    }
    assert all(str(table) in page.read_text() for table in (tables[0], *tables[3:]))
    assert (tmp_path / "plot.png").stat().st_size > 0
    monkeypatch.setattr(errors, "walk", None)  # nothing is left to run
    assert [table.rows for table in solvers.run(arguments)] == [table.rows for table in tables]


def test_distances_of_laws_fall_to_that_of_another_sample() -> None:
    ancestral = Subject("ours", "ancestral", Ancestral(), "log_snr")
    table = laws.of_mixtures([ancestral], (5, 60), count=256, seeds=2)
    cells = {row[0]: [float(cell.split(" ± ")[0]) for cell in row[1:]] for row in table.rows}
    floor, (few, many) = cells["another sample of the data"][0], cells[str(ancestral)]
    assert few > 2 * floor and many < 1.5 * floor and cells[DEFAULT][1] < 1.5 * floor
    assert all(" ± " in cell for row in table.rows for cell in row[1:])


def test_spreads() -> None:
    assert laws.spread([1.0, 2.0, 3.0]) == "2 ± 1" and laws.spread([0.5]) == "0.5"
    assert laws.spread([1.0, math.inf]) == laws.spread([math.nan]) == "not finite"


known = cache(judge)


def gaussian_of_digits() -> problems.Trained:
    """A model that is the Gaussian of the digits."""
    mean, covariance = gaussian_fit(known("digits").train, PixelCodec(17))
    model = Gaussian(VPSDE(), mean.flatten().float(), covariance.float())
    images = from_score(model.sde, lambda x, t: model.score(x.flatten(1), t).reshape(x.shape))
    return problems.Trained(images, model.sde, "digits", "", True, (1, 8, 8))


@pytest.mark.slow
def test_laws_of_images_fall_to_that_of_the_gaussian_that_is_sampled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained = gaussian_of_digits()
    monkeypatch.setattr(laws, "VALUES", 64 * 90)  # walks of 90 digits
    monkeypatch.setattr(laws, "LISTED", laws.LISTED[:1])
    ancestral = Subject("ours", "ancestral", Ancestral(), "log_snr")

    def measured() -> laws.Table:
        return laws.of_images(
            trained, known("digits"), [ancestral], (5, 30), 150, 2, errors.Kept(tmp_path / "rows").recall
        )

    table = measured()
    cells = {row[0]: [float(cell.split(" ± ")[0]) for cell in row[1:]] for row in table.rows}
    real, gaussian = cells["real images, held out"], cells["a Gaussian fitted to the images"]
    assert real[0] < gaussian[0] == gaussian[1] and cells[DEFAULT][1] == pytest.approx(gaussian[0], rel=0.2)
    assert cells[str(ancestral)][0] > 1.5 * cells[str(ancestral)][1]
    assert "150 images against the 1497 of training" in table.notes[0] and "no FID" in table.notes[0]
    monkeypatch.setattr(laws, "walk", None)  # nothing is left to run
    assert measured() == table


def test_the_command_has_a_table_of_laws_for_every_model_with_a_judge(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    digits = gaussian_of_digits()
    names = {"a": digits, "b": digits._replace(data="cifar10"), "c": digits._replace(data="ring")}
    monkeypatch.setattr(solvers, "trained", lambda workdir: names[str(workdir)])
    monkeypatch.setattr(solvers, "judge", lambda data, path="": known("digits"))
    monkeypatch.setattr(solvers, "of_mixtures", lambda subjects: laws.Table("mixtures", (), [], []))
    monkeypatch.setattr(solvers, "stochastic", lambda peer: [])
    monkeypatch.setattr(solvers, "few", lambda peer: [])
    monkeypatch.setattr(laws, "LISTED", [])
    monkeypatch.setattr(solvers, "FEW_BUDGETS", (5, 10))
    page = tmp_path / "page.md"
    blocks = ("laws_machine", "law_of_mixtures", "law_of_digits", "law_of_cifar10")
    page.write_text("".join(f"<!-- SOLVERS: {name} -->\n<!-- /SOLVERS -->\n" for name in blocks))
    _, first, second = solvers.run(["--laws", "--model", *names, "--page", str(page)])
    assert first.title == "Fréchet distance, network: digits" and second.head == ("", "5", "10")
    assert second.title == "Fréchet distance, network: cifar10"
    assert second.notes[0].startswith(f"{solvers.FEW_IMAGES} images")
    assert str(first) in page.read_text() and str(second) in page.read_text()


def test_walks_in_parts_end_where_whole_ones_do_and_count_the_same(
    problem: problems.Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, samplers = times.log_snr(problem.sde, 4), (Heun(), EmbeddedODE(0.01, 0.01))
    whole = [errors.walk(problem, sampler, grid) for sampler in samplers]
    monkeypatch.setattr(laws, "VALUES", 10)  # five of 18 at a time
    for sampler, (x, nfe) in zip(samplers, whole, strict=True):
        y, again = laws.walked(problem, sampler, grid, 0)
        torch.testing.assert_close(y, x, rtol=1e-9, atol=1e-9)
        assert again == pytest.approx(nfe)


@pytest.mark.parametrize("name", list(STOCHASTIC))
def test_noisy_schedulers_of_diffusers_reach_the_law(name: str) -> None:
    (_, model), count = next(problems.mixtures()), 512
    g = torch.Generator().manual_seed(0)

    def noise(like: Tensor | None = None) -> Tensor:
        return torch.randn(count, 2, generator=g, dtype=torch.float64)

    end = torch.tensor(model.sde.t_min, dtype=torch.float64)
    aim, other = (model.sde.perturb(model.sample(count, g)[0], end, noise()) for _ in range(2))
    start = model.sde.prior((count, 2), noise)
    problem = problems.Problem("", model, model.sde, start, start, 0.0)
    x, nfe = errors.walk(problem, STOCHASTIC[name], times.log_snr(model.sde, 100))
    assert nfe == 100 and sliced_wasserstein(x, aim) < 2 * sliced_wasserstein(other, aim)


def test_recommended_keeps_its_budget_and_beats_ddim(problem: problems.Problem) -> None:
    for nfe in (1, 2, 9, 10, 14, 15, 24, 25, 40):
        sampler, grid = recommended(problem.sde, nfe)
        x, counted = errors.walk(problem, sampler, grid)
        y, _ = errors.walk(problem, DDIM(), times.log_snr(problem.sde, nfe))
        assert counted == nfe
        assert nfe < 7 or problems.distances(x, problem.end).median() < problems.distances(y, problem.end).median() / 2
