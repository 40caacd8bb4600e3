"""The laboratory: what it measures of models that are known, and that it keeps, reads back and writes what it found."""

import math
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from examples.laboratory import __main__ as command
from examples.laboratory import experiment, page, pictures, workers
from examples.laboratory.experiment import LEVELS, SMALLEST, VP, Job, Result, read, run, truth
from examples.laboratory.subjects import CONFIGS, DATA, OBJECTIVES, affordable
from score_sde import Estimate, Likelihood, ScoreModel, log_likelihood
from score_sde import config as configs
from score_sde.data.toys import EXACT
from score_sde.sdes import like


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measures of few points and levels, and a judge that need not be fitted (test_demo.py has the real one)."""
    for name, value in {"POINTS": 200, "DRAWN": 1000, "IMAGES": 4, "DIGITS_DRAWN": 4, "TERMS": 2}.items():
        monkeypatch.setattr(experiment, name, value)
    monkeypatch.setattr(pictures, "STEPS", 40)
    for module in (experiment, pictures):
        monkeypatch.setattr(module, "LEVELS", LEVELS[::6])
    monkeypatch.setattr(experiment, "confidence", lambda data, samples: (0.5, 0.9, 10))
    for key, value in {"model.nf": "8", "model.ch_mult": "1", "model.attn_resolutions": ""}.items():
        monkeypatch.setitem(DATA["digits"].settings, key, value)
    monkeypatch.setattr(experiment, "log_likelihood", solved_to(1e-3))
    truth.cache_clear()
    yield
    truth.cache_clear()


@pytest.fixture
def loose(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures whose likelihoods are solved roughly, where their numbers do not count."""
    monkeypatch.setattr(experiment, "log_likelihood", solved_to(0.3))


def solved_to(tolerance: float) -> Callable[..., Likelihood]:
    """`log_likelihood` with this tolerance, whatever else is asked."""

    def solved(*given: Any, **named: Any) -> Likelihood:
        return log_likelihood(*given, **{**named, "rtol": tolerance, "atol": tolerance})

    return solved


class Shifted(ScoreModel):
    """A model whose noise is off by `shift` in each dimension, everywhere."""

    def __init__(self, exact: ScoreModel, shift: float) -> None:
        super().__init__(exact.sde)
        self.exact, self.shift = exact, shift

    def forward(self, x: Tensor, t: Tensor) -> Estimate:  # type: ignore[override]
        e = self.exact(x, t)
        ratio = like(self.sde.sigma(t) / self.sde.alpha(t), x)
        return Estimate(e.data - ratio * self.shift, e.noise + self.shift, e.sigma)


def measured(data: str, shift: float = 0.0) -> tuple[dict[str, float], dict[str, object]]:
    exact = EXACT[data](VP)
    numbers, arrays = experiment._measure_plane(Shifted(exact, shift) if shift else exact, truth(data))
    return numbers, dict(arrays)


def test_the_truth_has_the_entropy_of_the_data() -> None:
    """Of y = x_0 + SMALLEST z: eight Gaussians 7.6 standard deviations apart, and squares with blurred edges."""
    ring = truth("ring").log_prob
    variance = 0.1**2 + SMALLEST**2
    entropy = math.log(8) + 1 + math.log(2 * math.pi * variance)
    assert len(ring) == experiment.POINTS
    assert ring.mean().item() == pytest.approx(-entropy, abs=4 / math.sqrt(len(ring)))  # std of log p is 1, chi²_2 / 2
    inside = truth("checkerboard").log_prob
    assert (inside + math.log(2)).abs().median() < 1e-6  # uniform on an area of 2, away from the edges


def test_the_exact_model_is_at_its_own_floor(small: None) -> None:
    for data in ("ring", "checkerboard"):
        numbers, arrays = measured(data)
        assert abs(numbers["integral"]) < 1e-6 and abs(numbers["fisher"]) < 0.01  # float32 beside float64
        assert abs(numbers["divergence"]) < 0.02  # the solver's, and the prior's beside p_1
        assert max(numbers["distance_ode"], numbers["distance_sde"]) < 2 * truth(data).floor
        assert torch.allclose(torch.as_tensor(arrays["loss"]), torch.as_tensor(arrays["floor"]), atol=1e-5)


def test_a_known_error_is_measured_as_it_is(small: None) -> None:
    """Noise off by c in both dimensions: score by c/sigma, 1/2 E|s - s*|² = c²/sigma², and g² dt = sigma² dlog r²."""
    c = 0.1
    numbers, arrays = measured("ring", c)
    assert numbers["fisher"] == pytest.approx(c**2 / SMALLEST**2, rel=1e-3)
    assert numbers["integral"] == pytest.approx(c**2 * 2 * math.log(LEVELS[-1] / LEVELS[0]), rel=1e-3)
    assert torch.as_tensor(arrays["excess"]).sub(c**2).abs().max() < 1e-5
    assert numbers["divergence"] > 4 * numbers["divergence_error"] > 0


@pytest.mark.parametrize("data", DATA)
def test_what_the_page_says_is_set_is_the_experiment(data: str) -> None:
    """The settings of its table, on the command line of main.py beside the data set's, give the experiment's config."""
    for name in OBJECTIVES:
        job = Job(data, name, 3, 40)
        config = job.config()
        assert (config.seed, config.training.n_iters, config.data.dataset) == (3, 40, data)
        lines = page._objectives([Result(job, {}, {})]).splitlines()
        flags = lines[-1].split("|")[3].strip().strip("`")
        _, given = configs.split_arguments([] if flags == "nothing" else flags.split())
        pixels = OBJECTIVES[name].pixels if data == "digits" else None
        again = configs.load(CONFIGS / f"{DATA[data].config}.py", {**DATA[data].settings, **given, **(pixels or {})})
        assert again.training.objective == config.training.objective and again.model == config.model


def test_every_experiment_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [Job(d, o, 0, 2) for d in DATA for o in OBJECTIVES] + [Job("ring", "ddpm", 1, 2), Job("ring", "ddpm", 0, 3)]
    folders = {job.folder(tmp_path) for job in jobs}
    assert len(folders) == len(jobs) and all(folder.parent == tmp_path for folder in folders)
    monkeypatch.setattr(experiment, "POINTS", 7)
    assert jobs[0].folder(tmp_path) not in folders


@pytest.mark.parametrize(("data", "objective"), [("moons", "vdm"), ("digits", "ddpm"), ("digits", "hybrid")])
def test_an_experiment_is_kept_and_read_back(loose: None, tmp_path: Path, data: str, objective: str) -> None:
    job, steps = Job(data, objective, 0, 2), []
    assert read(job, tmp_path) is None
    run(job, tmp_path, lambda: steps.append(1))
    found = read(job, tmp_path)
    assert found is not None and len(steps) == 2
    columns = {key for _, key, _ in page._COLUMNS["digits" if data == "digits" else "plane"]}
    assert columns <= found.numbers.keys() and all(map(math.isfinite, found.numbers.values()))
    assert len(found.arrays["loss"]) == len(LEVELS[::6])
    if objective != "hybrid":
        return
    (job.folder(tmp_path) / "numbers.json").unlink()  # as where it was stopped
    assert read(job, tmp_path) is None
    run(job, tmp_path, lambda: None)
    again = read(job, tmp_path)
    assert again is not None and (again.arrays["loss"] == found.arrays["loss"]).all()


def test_the_command_runs_what_is_missing_and_writes_the_page(
    loose: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def threads(n: int, context: object, **options: Any) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(n, **options)

    monkeypatch.setattr(workers, "ProcessPoolExecutor", threads)  # processes take seconds to begin
    monkeypatch.setattr(Figure, "draw", lambda figure, renderer: None)  # what is on them is put there before
    arguments = ["--data", "ring", "--steps", "2", "--workers", "1", "--workdir", str(tmp_path / "work")]
    made = command.main([*arguments, "--seeds", "2", "--objectives", "ddpm"])
    assert "2 of 2 experiments run" in capsys.readouterr().out
    first = made.read_text()
    outside = re.compile(r"(?<=-->\n).*?(?=<!-- /laboratory)", re.DOTALL)
    assert outside.sub("", first) == outside.sub("", page.TEXT.read_text())
    assert "`ddpm` | DDPM" in first and "`implicit` | implicit" not in first
    assert "| the truth | 0 |" in first and "2 seeds" in first
    row = next(line for line in first.splitlines() if line.startswith("| DDPM, L_simple |"))
    assert row.count("±") == 7 and "nan" not in row
    assert first.count(page._ABSENT) == 4 and "images/lab_levels.png" in first
    assert {f.name for f in made.parent.joinpath("images").iterdir()} == {
        f"lab_{name}.png" for name in ("fields", "paths", "samples", "levels")
    }
    # the same with an objective more: what is there stays, and only that is run
    monkeypatch.setattr(page, "_pictures", lambda results, base: {})
    command.main([*arguments, "--seeds", "1", "--objectives", "ddpm", "sliced"])
    assert "1 of 2 experiments run" in capsys.readouterr().out
    assert "| sliced |" in made.read_text()


def test_a_plan_is_every_affordable_experiment_first_seeds_first() -> None:
    jobs = command.plan(command.parser().parse_args(["--seeds", "2"]))
    wanted = {(d, o, s) for d in DATA for o in OBJECTIVES if affordable(d, o) for s in (0, 1)}
    assert {(job.data, job.objective, job.seed) for job in jobs} == wanted and len(jobs) == len(wanted)
    assert jobs[0].data == "digits" and [job.seed for job in jobs] == sorted(job.seed for job in jobs)
    with pytest.raises(ValueError, match="implicit on digits takes 64 products in every step"):
        command.plan(command.parser().parse_args(["--data", "digits", "--objectives", "implicit"]))
    with pytest.raises(SystemExit):
        command.parser().parse_args(["--seeds", "0"])
    quick = command.plan(command.parser().parse_args(["--quick"]))
    assert all(job.seed == 0 and job.steps == DATA[job.data].steps // command.QUICK for job in quick)
