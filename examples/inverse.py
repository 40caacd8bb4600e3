"""How far is each method for inverse problems from the exact posterior? ``python -m examples.inverse [--samples N]``.

Data of eight numbers, a correlated Gaussian and a mixture of three, of which every other number is seen, or the means
of neighbours (--operator means), exactly or with noise. The posterior is known (`inverse.posterior`); so are its draws
and its score. Three tables: the error of the mean, of the covariance, and the sliced Wasserstein distance from 20,000
exact draws, all in coordinates in which the posterior has mean 0 and covariance I (of an exact y, in the directions
that are left open).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from score_sde import VPSDE, Ancestral, ScoreModel, sample, sliced_wasserstein, times
from score_sde.inverse import (
    Average,
    Mask,
    Observation,
    Projected,
    Spectral,
    ddnm,
    dps,
    moment_matching,
    observe,
    pigdm,
    posterior,
    twisted,
)
from score_sde.machine.progress import with_progress
from score_sde.models.closed_form import Gaussian, Mixture

SHAPE = (1, 8)
SDE = VPSDE()
SEEN: dict[str, Spectral] = {"half": Mask(torch.arange(8) % 2 == 0), "means": Average(2, dimensions=1)}
NOISES = (0.0, 0.2)


def laws() -> dict[str, Mixture]:
    """The data: correlations that fall with the distance, e^(-|i - j|/3), of deviation 1; 0.5 within components."""
    distance = (torch.arange(8.0)[:, None] - torch.arange(8.0)).abs().double()
    smooth = torch.exp(-distance / 3)
    g = torch.Generator().manual_seed(0)
    means = torch.randn(3, *SHAPE, generator=g, dtype=torch.float64)
    covs = 0.25 * smooth.expand(3, 8, 8)
    return {
        "Gaussian": Gaussian(SDE, torch.zeros(SHAPE, dtype=torch.float64), smooth),
        "mixture": Mixture(SDE, [0.5, 0.3, 0.2], means, covs),
    }


def variance(model: Mixture) -> float:
    """Of a number of the data, on average: the c of pigdm and ddnm."""
    x = model.sample(10_000, torch.Generator().manual_seed(1))[0]
    return float(x.flatten(1).var(0).mean())


Method = Callable[[Mixture, Observation, int], Tensor]  # model, observation of the batch, seed -> samples


def methods(steps: int) -> dict[str, Method]:
    """Each draws one sample for each of the observations."""
    grid, sampler = times.log_snr(SDE, steps), Ancestral()

    def of(model: ScoreModel, observation: Observation, seed: int) -> Tensor:
        shape = (len(observation.y), *SHAPE)
        return sample(model, sampler, shape, grid, seed=torch.Generator().manual_seed(seed), denoise=True)

    def repaint(resamplings: int) -> Method:
        def run(model: Mixture, o: Observation, seed: int) -> Tensor:
            g, shape = torch.Generator().manual_seed(seed), (len(o.y), *SHAPE)
            x = sample(model, Projected(sampler, o, resamplings), shape, grid, seed=g, denoise=True)
            return x if o.noise else o.project(x)

        return run

    def particles(k: int) -> Method:
        def run(model: Mixture, o: Observation, seed: int) -> Tensor:
            g, shape = torch.Generator().manual_seed(seed), (len(o.y), *SHAPE)
            found = twisted(model, o, shape, grid, particles=k, variance=variance(model), seed=g)
            return found.draw(g)

        return run

    def one(o: Observation) -> Observation:
        return Observation(o.operator, o.y[:1], o.noise)

    return {
        "exact draws": lambda m, o, seed: posterior(m, one(o)).sample(len(o.y), torch.Generator().manual_seed(seed))[0],
        "the exact score": lambda m, o, seed: of(posterior(m, one(o)), o, seed),
        "no guidance": of,
        "projection": repaint(1),
        "RePaint, 4 times": repaint(4),
        "RePaint, 16 times": repaint(16),
        "DPS, likelihood": lambda m, o, seed: of(dps(m, o), o, seed),
        "DPS, rate 10": lambda m, o, seed: of(dps(m, o, 10.0), o, seed),
        "DPS, rate 40": lambda m, o, seed: of(dps(m, o, 40.0), o, seed),
        "DDNM": lambda m, o, seed: of(ddnm(m, o, variance(m)), o, seed),
        "PiGDM": lambda m, o, seed: of(pigdm(m, o, variance(m)), o, seed),
        "moment matching, 4": lambda m, o, seed: of(moment_matching(m, o, 4), o, seed),
        "twisted, 4 particles": particles(4),
        "twisted, 16 particles": particles(16),
        "twisted, 64 particles": particles(64),
    }


def refused(name: str, noise: float) -> bool:
    """Methods that need a likelihood have none of an exact observation."""
    return noise == 0 and (name == "DPS, likelihood" or name.startswith("twisted"))


def distances(x: Tensor, truth: Tensor) -> tuple[float, float, float]:
    """(mean, covariance, sliced Wasserstein) of samples x from draws of the truth, in the truth's deviations."""
    x, truth = x.flatten(1).double(), truth.flatten(1)
    values, basis = torch.linalg.eigh(truth.T.cov())
    free = values > 1e-6 * values.max()
    whiten = basis[:, free] / values[free].sqrt()
    a, b = (x - truth.mean(0)) @ whiten, (truth - truth.mean(0)) @ whiten
    d = a.shape[1]
    mean = float(a.mean(0).square().mean().sqrt())
    cov = float((a.T.cov() - torch.eye(d, dtype=a.dtype)).norm()) / d**0.5
    return mean, cov, sliced_wasserstein(a, b) if bool(a.isfinite().all()) else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--operator", choices=SEEN, default="half")
    parser.add_argument("--seeds", type=int, default=3, help="each with another y")
    options = parser.parse_args()
    listed, operator, columns = methods(options.steps), SEEN[options.operator], []
    found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    problems = list(product(laws().items(), NOISES, range(options.seeds)))
    for (law, model), noise, seed in with_progress(problems, "observations", len(problems), "observation"):
        column = f"{law}, noise {noise:g}"
        if column not in columns:
            columns.append(column)
        g = torch.Generator().manual_seed(seed)
        o = observe(operator, model.sample(1, g)[0], noise, g)
        many = Observation(operator, o.y.expand(options.samples, *o.y.shape[1:]), noise)
        truth = posterior(model, o).sample(20_000, g)[0]
        for name, method in listed.items():
            if not refused(name, noise):
                found.setdefault((name, column), []).append(distances(method(model, many, seed + 100), truth))
    titles = ("mean, in deviations", "covariance, relative", "sliced Wasserstein")
    print(
        f"{options.samples} samples of {options.steps} ancestral steps, {options.operator} seen; "
        f"mean ± deviation over {options.seeds} y's"
    )
    for i, title in enumerate(titles):
        print(f"\n{title:24}" + "".join(f"{column:>22}" for column in columns))
        for name in listed:
            cells = [cell([r[i] for r in found[name, c]]) if (name, c) in found else "" for c in columns]
            print(f"{name:24}" + "".join(f"{text:>22}" for text in cells), flush=True)


def cell(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


if __name__ == "__main__":
    main()
