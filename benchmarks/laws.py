"""Distances of laws: what samplers that draw noise are judged by, and the default and a few known ones besides."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

import torch
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from score_sde import CosineSDE, recommended, sliced_wasserstein, times
from score_sde.closed_form import Gaussian
from score_sde.data import load_data
from score_sde.samplers.base import noise_source

from .errors import BUDGETS, LONG, walk, within
from .problems import Problem, mixtures
from .reports import mean
from .subjects import DEFAULT, LISTED, OURS, Adaptive, Subject
from .timing import Table

SAMPLES, DIGITS, SEEDS = 1024, 200, 3
Law = Subject | Adaptive
End = tuple[str, int, Tensor]


def ends(problem: Problem, subjects: Sequence[Law], budgets: Sequence[int], seed: int) -> Iterator[End]:
    """Where the default and the subjects take the problem's states, with their names and budgets."""
    for subject in subjects:
        if isinstance(subject, Adaptive):
            tried = []
            for sampler in subject.samplers:
                tried.append(walk(problem, sampler, times.uniform(problem.sde, 1), seed))
                if tried[-1][1] > max(budgets):
                    break
            yield from ((str(subject), budget, x) for budget, (x, _) in within(budgets, tried, lambda run: run[1]))
            continue
        for budget in budgets:
            grid = subject.times(problem.sde, budget, subject.grid or "log_snr")
            if grid is not None:
                yield str(subject), budget, walk(problem, subject.sampler, grid, seed)[0]


def default(problem: Problem, budgets: Sequence[int]) -> Iterator[End]:
    """The same of the default."""
    return ((DEFAULT, budget, walk(problem, *recommended(problem.sde, budget))[0]) for budget in budgets)


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
            truth = [("another sample of the data", budget, other) for budget in once]
            for who, budget, x in (*truth, *default(problem, once), *ends(problem, subjects, once, own)):
                cell = found.setdefault((who, budget), [[] for _ in range(seeds)])
                cell[seed].append(sliced_wasserstein(x, aim))
    whole = {key: [mean(values) for values in cell if len(values) == len(known)] for key, cell in found.items()}
    names = dict.fromkeys(who for who, _ in found)
    rows = [(who, *(spread(whole[who, b]) if whole.get((who, b)) else "" for b in budgets)) for who in names]
    notes = [
        f"{count} points; mean and standard deviation of {seeds} runs, each with other data and other noise; of "
        f"{LONG} evaluations one run",
    ]
    title = "Sliced Wasserstein distance, geometric mean over the VP and VE mixtures"
    return Table(title, ("", *map(str, budgets)), rows, notes)


class Features:
    """The hidden layer of a classifier of real digits, 64 numbers, and the Fréchet distance between laws there."""

    def __init__(self) -> None:
        data = load_data("digits")
        assert isinstance(data.train.x, Tensor) and data.train.y is not None and data.levels is not None
        assert isinstance(data.test.x, Tensor) and data.test.y is not None
        self.top = data.levels - 1
        self.train, self.test = (x.flatten(1).double() / self.top for x in (data.train.x, data.test.x))
        self.judge = MLPClassifier((64,), max_iter=400, random_state=0).fit(self.train.numpy(), data.train.y.numpy())
        self.accuracy = float(self.judge.score(self.test.numpy(), data.test.y.numpy()))
        self.real = self(self.train)

    def __call__(self, pixels: Tensor) -> Tensor:
        w, b = torch.from_numpy(self.judge.coefs_[0]), torch.from_numpy(self.judge.intercepts_[0])
        return torch.relu(pixels.double() @ w.double() + b.double())

    def distance(self, pixels: Tensor) -> float:
        """From the training images; pixels (N, 64) in [0, 1]."""
        return frechet(self(pixels), self.real)

    def of_states(self, x: Tensor) -> float:
        """The same of states in [-1, 1], rounded to the levels as `--mode sample` does."""
        levels = ((x.double() + 1) / 2 * (self.top + 1)).floor().clamp(0, self.top)
        return self.distance(levels.flatten(1) / self.top)


def frechet(x: Tensor, y: Tensor) -> float:
    """Squared Fréchet distance of the Gaussians fitted to x (N, D) and y (M, D): Wasserstein's of order 2 (Dowson &
    Landau 1982), |m - n|² + tr(C + D - 2 (C D)^(1/2))."""
    if not bool(x.isfinite().all() and y.isfinite().all()):
        return math.nan
    a, b = x.T.cov(), y.T.cov()
    root = torch.linalg.eigvals(a @ b).real.clamp_min(0).sqrt().sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * root)


def of_digits(
    problem: Problem,
    subjects: Sequence[Law],
    budgets: Sequence[int] = BUDGETS,
    count: int = DIGITS,
    seeds: int = SEEDS,
) -> Table:
    """Fréchet distance of a trained model's digits from real ones, beside that of real digits, and of a Gaussian.

    With the most evaluations our samplers alone, and once.
    """
    features, sde, shape = Features(), problem.sde, (count, *problem.start.shape[1:])
    short = [b for b in budgets if b < LONG]
    found: dict[tuple[str, int], list[float]] = {}
    real, gaussian = [], []
    uniform = torch.rand(features.train.shape, generator=torch.Generator().manual_seed(0))
    pixels = (features.top * features.train + uniform) / (features.top + 1)
    whole = Gaussian(sde, pixels.mean(0), pixels.T.cov())
    for seed in range(seeds):
        g = torch.Generator().manual_seed(seed)
        real.append(features.distance(features.test[torch.randperm(len(features.test), generator=g)[:count]]))
        gaussian.append(features.of_states(2 * whole.sample(count, g)[0] - 1))
        start = sde.prior(shape, noise_source(shape, g, 0, torch.float32, torch.device("cpu")))
        own = int(torch.randint(2**31, (), generator=g))
        here = problem._replace(start=start)
        runs = [*default(here, short), *ends(here, [*LISTED, *subjects], short, own)]
        if seed == 0 and LONG in budgets:
            mine = [s for s in subjects if s.maker == OURS and isinstance(s, Subject)]
            runs += ends(here, mine, [LONG], own)
        for who, budget, x in runs:
            found.setdefault((who, budget), []).append(features.of_states(x))
    fixed = [("real digits, held out", real), ("a Gaussian fitted to the digits", gaussian)]
    rows = [(who, *[spread(values)] * len(budgets)) for who, values in fixed]
    names = dict.fromkeys(who for who, _ in found)
    rows += [(who, *(spread(found[who, b]) if (who, b) in found else "" for b in budgets)) for who in names]
    notes = [
        f"{count} digits against the {len(features.train)} of training, in the 64 features of a classifier that is "
        f"right of {100 * features.accuracy:.1f} % of {len(features.test)} held-out ones; small samples, and no FID",
        f"mean and standard deviation of {seeds} runs, each from other noise; of {LONG} evaluations one run",
    ]
    return Table(f"Fréchet distance, {problem.name}", ("", *map(str, budgets)), rows, notes)
