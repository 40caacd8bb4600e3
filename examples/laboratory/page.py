"""The page: a hand-written text in docs/laboratory.md whose marked blocks are the results of a run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.pages import fill, table
from benchmarks.timing import machine
from score_sde.data import load_data
from score_sde.metrics import sliced_wasserstein

from . import pictures
from .experiment import DIGITS_DRAWN, PROJECTIONS, Result, truth
from .subjects import DATA, OBJECTIVES

TEXT = Path(__file__).parents[2] / "docs" / "laboratory.md"
PATHS = "log_snr"  # the objective whose model is walked in the picture of paths, if it was run, else the first


def write_page(page: Path, results: Sequence[Result], base: Path, command: str) -> None:
    """Draw the pictures into `page`'s images/ and write the page with the results in its blocks."""
    blocks = {
        **dict.fromkeys(("samples", "levels", "fields", "paths"), _ABSENT),
        "command": f"    {command}\n\n{machine(torch.device('cpu'))}; one thread a process.\n",
        "objectives": _objectives(results),
        **{name: _table(name, results) for name in DATA},
    }
    for name, (draw, caption) in _pictures(results, base).items():
        file = page.parent / "images" / f"lab_{name}.png"
        draw(file)
        blocks[name] = f"![{caption}](images/{file.name})\n"
    if page != TEXT:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(TEXT.read_text(encoding="utf-8"), encoding="utf-8")
    fill(page, blocks)


_ABSENT = "Not part of this run.\n"


def _pictures(results: Sequence[Result], base: Path) -> dict[str, tuple[Callable[[Path], None], str]]:
    """Name -> (what draws it, its caption), of those that the results allow."""
    found: dict[str, tuple[Callable[[Path], None], str]] = {
        "samples": (lambda file: pictures.samples(results, file), "Samples of every objective's model"),
        "levels": (lambda file: pictures.levels(results, file), "Loss by noise level beside its floor"),
    }
    plane = [r for r in results if "excess" in r.arrays]
    if plane:
        names = [r.job.objective for r in plane]
        walked = PATHS if PATHS in names else names[0]
        found["fields"] = (lambda file: pictures.fields(plane, base, file), "Learned fields of scores and the exact")
        found["paths"] = (lambda file: pictures.paths(plane, base, file, walked), "Paths of the SDE and the ODE")
    return found


def _objectives(results: Sequence[Result]) -> str:
    """What each objective sets beside the configs, as the command line has it."""
    used = {r.job.objective for r in results}
    rows = []
    for name, o in OBJECTIVES.items():
        if name in used:
            flags = " ".join(f"--config.{key}={value}" for key, value in o.settings.items())
            rows.append((f"`{name}`", o.label, f"`{flags}`" if flags else "nothing"))
    return table(("objective", "what", "sets"), rows)


def _table(name: str, results: Sequence[Result]) -> str:
    """The table of one data set."""
    own = [r for r in results if r.job.data == name]
    if not own:
        return _ABSENT
    steps, seeds = own[0].job.steps, {r.job.seed for r in own}
    config = own[0].job.config()
    said = f"`configs/{DATA[name].config}.py`; {steps} steps of {config.training.batch_size} examples; " + (
        f"{len(seeds)} seeds: mean ± their standard deviation."
        if len(seeds) > 1
        else "one seed, and ± the standard error over held-out examples."
    )
    columns = _COLUMNS["digits" if name == "digits" else "plane"]
    rows = [("the truth" if name != "digits" else "held-out digits", *_reference(name))]
    for objective, o in OBJECTIVES.items():
        numbers = [r.numbers for r in own if r.job.objective == objective]
        if numbers:
            rows.append((o.label, *(_cell(numbers, key, digits) for _, key, digits in columns)))
    return f"{said}\n\n{table(('objective', *(head for head, *_ in columns)), rows)}"


_COLUMNS = {
    "plane": [
        ("½ ∫ g² E\\|s − s*\\|² dt", "integral", 3),
        ("½ E\\|s − s*\\|² at t_min", "fisher", 1),
        ("log p, ODE", "log_prob", 3),
        ("below the truth", "divergence", 3),
        ("sliced W₂, ODE", "distance_ode", 3),
        ("sliced W₂, SDE", "distance_sde", 3),
        ("ms/step", "milliseconds", 2),
    ],
    "digits": [
        ("bits/dim, ODE", "bits_per_dim", 3),
        ("sliced W₂", "distance_ode", 3),
        ("judge is sure of", "sure", 2),
        ("ms/step", "milliseconds", 1),
    ],
}


def _reference(name: str) -> tuple[str, ...]:
    """What exact samples, or real digits, have in each column."""
    if name == "digits":
        data = load_data("digits")
        train, test = data.train.x[torch.arange(DIGITS_DRAWN)], data.test.x[torch.arange(len(data.test.x))]
        floor = sliced_wasserstein(train / 16, test / 16, projections=PROJECTIONS)
        return "", f"{floor:.3f}", f"{_sure_of_real():.2f}", ""
    known = truth(name)
    return "0", "0", f"{known.log_prob.mean():.3f}", "0", f"{known.floor:.3f}", f"{known.floor:.3f}", ""


def _sure_of_real() -> float:
    from score_sde.tasks.demo import confidence

    data = load_data("digits")
    return confidence(data, data.test.x[torch.arange(len(data.test.x))].permute(0, 2, 3, 1).numpy())[1]


def _cell(numbers: Sequence[dict[str, float]], key: str, digits: int) -> str:
    """The mean over seeds ± their standard deviation; of one seed the value, ± its standard error where it has one."""
    values = [n[key] for n in numbers]
    mean, error = f"{statistics.fmean(values):.{digits}f}", numbers[0].get(f"{key}_error")
    if len(values) > 1:
        error = statistics.stdev(values)
    return mean if error is None else f"{mean} ± {error:.{digits}f}"
