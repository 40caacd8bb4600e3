"""Distances of laws: the judge of samplers that draw noise, beside the default and a few known ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from score_sde import CosineSDE, Sampler, recommended, sliced_wasserstein, times
from score_sde.data.codecs import PixelCodec
from score_sde.noise import noise_source
from score_sde.tasks.scan import gaussian_fit

from .errors import BUDGETS, LONG, Recall, Run, anew, walk, within
from .judges import Judge
from .problems import Problem, Trained, mixtures
from .reports import mean
from .subjects import DEFAULT, LISTED, OURS, Adaptive, Subject
from .timing import Table

SAMPLES, DIGITS, SEEDS = 1024, 200, 3
VALUES = 2**18  # of the states in one walk: more go no faster
TRUTH = "another sample of the data"
Law = Subject | Adaptive
End = tuple[str, int, Callable[[], Tensor]]


def walked(problem: Problem, sampler: Sampler, grid: Tensor, seed: int) -> tuple[Tensor, float]:
    """`walk` in batches of states."""
    parts = problem.start.split(max(1, VALUES // problem.start[0].numel()))
    runs = [walk(problem._replace(start=part), sampler, grid, seed + i) for i, part in enumerate(parts)]
    return torch.cat([x for x, _ in runs]), sum(nfe * len(x) for x, nfe in runs) / len(problem.start)


def ends(problem: Problem, subjects: Sequence[Law], budgets: Sequence[int], seed: int) -> Iterator[End]:
    """Name, budget and a function that computes the end states, for each subject."""
    for subject in subjects:
        if isinstance(subject, Adaptive):
            tried = []
            for sampler in subject.samplers:
                tried.append(walked(problem, sampler, times.uniform(problem.sde, 1), seed))
                if tried[-1][1] > max(budgets):
                    break
            for budget, (x, _) in within(budgets, tried, lambda run: run[1]):
                yield str(subject), budget, lambda x=x: x  # type: ignore[misc]
            continue
        for budget in budgets:
            grid = subject.times(problem.sde, budget, subject.grid or "log_snr")
            if grid is not None:
                yield str(subject), budget, lambda s=subject, grid=grid: walked(problem, s.sampler, grid, seed)[0]  # type: ignore[misc]


def default(problem: Problem, budgets: Sequence[int]) -> Iterator[End]:
    """The same for the default."""
    for budget in budgets:
        yield DEFAULT, budget, lambda b=budget: walked(problem, *recommended(problem.sde, b), 0)[0]  # type: ignore[misc]


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    if not all(map(math.isfinite, values)):
        return "not finite"
    return f"{statistics.fmean(values):.3g}" + (f" ± {statistics.stdev(values):.1g}" if len(values) > 1 else "")


def of_mixtures(
    subjects: Sequence[Law], budgets: Sequence[int] = BUDGETS, count: int = SAMPLES, seeds: int = SEEDS
) -> Table:
    """Sliced Wasserstein distance from as many points of the data, geometric mean over the VP and VE mixtures."""
    known = [(name, model) for name, model in mixtures() if not isinstance(model.sde, CosineSDE)]  # the peer lacks it
    found: dict[tuple[str, int], list[list[float]]] = {}  # for each seed a list over problems
    for seed in range(seeds):
        once = budgets if seed == 0 else [b for b in budgets if b < LONG]
        for name, model in known:
            sde, end = model.sde, torch.tensor(model.sde.t_min, dtype=torch.float64)
            g = torch.Generator().manual_seed(seed)
            noise = noise_source((count, *model.shape), g, 0, torch.float64, torch.device("cpu"))
            aim, other = (sde.perturb(model.sample(count, g)[0], end, noise(end)) for _ in range(2))
            start = sde.prior((count, *model.shape), noise)
            problem = Problem(name, model, sde, start, start, math.nan)
            own = int(torch.randint(2**31, (), generator=g))  # of the samplers' noise: not that of the data
            for budget in once:
                found.setdefault((TRUTH, budget), [[] for _ in range(seeds)])[seed].append(
                    sliced_wasserstein(other, aim)
                )
            for who, budget, find in (*default(problem, once), *ends(problem, subjects, once, own)):
                cell = found.setdefault((who, budget), [[] for _ in range(seeds)])
                cell[seed].append(sliced_wasserstein(find(), aim))
    whole = {key: [mean(values) for values in cell if len(values) == len(known)] for key, cell in found.items()}
    names = dict.fromkeys(who for who, _ in found)
    rows = [(who, *(spread(whole[who, b]) if whole.get((who, b)) else "" for b in budgets)) for who in names]
    notes = [
        f"{count} points; mean and standard deviation of {seeds} runs, each with other data and other noise; of "
        f"{LONG} evaluations one run",
    ]
    title = "Sliced Wasserstein distance, geometric mean over the VP and VE mixtures"
    return Table(title, ("", *map(str, budgets)), rows, notes)


def of_images(
    trained: Trained,
    judge: Judge,
    subjects: Sequence[Law],
    budgets: Sequence[int] = BUDGETS,
    count: int = DIGITS,
    seeds: int = SEEDS,
    recall: Recall = anew,
) -> Table:
    """Fréchet distance of a trained model's images from real ones, beside that of real images, and of a Gaussian.

    With the largest budget only our own samplers of `subjects` run, once.
    """
    model, sde, data, shape = trained.model, trained.sde, trained.data, trained.shape
    codec = PixelCodec(judge.levels, trained.centered)
    short = [b for b in budgets if b < LONG]
    found: dict[tuple[str, int], list[float]] = {}
    real, gaussian = [], []
    mean, covariance = gaussian_fit(judge.train, codec)
    factor = torch.linalg.cholesky(covariance)

    def distance(x: Tensor) -> float:
        return judge.distance(codec.decode(x)) if bool(x.isfinite().all()) else math.nan

    for seed in range(seeds):
        g = torch.Generator().manual_seed(seed)
        real.append(judge.distance(judge.test[torch.randperm(len(judge.test), generator=g)[:count]]))
        z = torch.randn(count, len(factor), generator=g, dtype=factor.dtype)
        gaussian.append(distance((z @ factor.T).reshape(count, *shape) + mean))
        start = sde.prior((count, *shape), noise_source((count, *shape), g, 0, torch.float32, torch.device("cpu")))
        own = int(torch.randint(2**31, (), generator=g))
        here = Problem(data, model, sde, start, start, math.nan)
        runs = [*default(here, short), *ends(here, [*LISTED, *subjects], short, own)]
        if seed == 0 and LONG in budgets:
            mine = [s for s in subjects if s.maker == OURS and isinstance(s, Subject)]
            runs += ends(here, mine, [LONG], own)
        for who, budget, find in runs:
            row = Run(who, "law", data, budget)
            row = recall(start, row, lambda row, find=find: row._replace(median=distance(find())))  # type: ignore[misc]
            found.setdefault((who, budget), []).append(row.median)
    fixed = [("real images, held out", real), ("a Gaussian fitted to the images", gaussian)]
    rows = [(who, *[spread(values)] * len(budgets)) for who, values in fixed]
    names = dict.fromkeys(who for who, _ in found)
    rows += [(who, *(spread(found[who, b]) if (who, b) in found else "" for b in budgets)) for who in names]
    notes = [f"{count} images against the {len(judge.train)} of training, in {judge}; no FID"]
    if seeds > 1:
        notes.append(
            f"mean and standard deviation of {seeds} runs, each from other noise; of {LONG} evaluations one run"
        )
    return Table(f"Fréchet distance, network: {data}", ("", *map(str, budgets)), rows, notes)
