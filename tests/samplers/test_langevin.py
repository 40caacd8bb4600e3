"""Langevin dynamics: annealed as published, its known bias, Metropolis adjustment, NCSNv2's rules, mode weights."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from examples import mode_weights
from score_sde import SMLD, VESDE, AnnealedLangevin, Estimate, Langevin, Sampler, langevin_dynamics, sample
from score_sde.config import load
from score_sde.config.build import build_sampler, build_sde, build_times
from score_sde.models.closed_form import Gaussian, Mixture
from score_sde.noise import noise_source
from score_sde.samplers.langevin import _line_integral, langevin_walk, log_acceptance
from tests import ROOT
from tests.oracles import numbers

TOY = ROOT / "configs" / "ve_toy.py"
stream = torch.Generator().manual_seed  # one for a whole batch is quicker than one for each of thousands of walks
close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)  # float64, a few operations

# Two separated modes of unequal weight.
WEIGHTS = torch.tensor([0.2, 0.8], dtype=torch.float64)
MEANS = torch.tensor([[-5.0, -5.0], [5.0, 5.0]], dtype=torch.float64)


def smoothed_score(x: Tensor, sigma: float) -> Tensor:
    """Score of 1/5 N((-5, -5), (1 + sigma²) I) + 4/5 N((5, 5), (1 + sigma²) I), by autograd of the density itself."""
    y = x.detach().requires_grad_()
    distances = (y[:, None] - MEANS).square().sum(2)
    log_density = (WEIGHTS * torch.exp(-distances / (2 * (1 + sigma**2)))).sum(1).log()
    return torch.autograd.grad(log_density.sum(), y)[0]


# --- annealed Langevin dynamics


ALD = {
    "training.continuous": "false",
    "training.time": "uniform",
    "training.likelihood_weighting": "false",
    "model.embedding_type": "positional",
    "model.label": "index",
    "model.sigma_min": "0.5",
    "model.sigma_max": "20",
    "model.num_scales": "7",
    "sampling.grid": "uniform",
    "sampling.method": "ald",
    "sampling.corrector": "none",
    "sampling.step_lr": "0.02",
    "sampling.n_steps_each": "3",
    "sampling.steps": "7",
}


@pytest.mark.parametrize("denoise", [True, False])
def test_a_config_s_annealed_langevin_dynamics_is_the_published_algorithm(denoise: bool) -> None:
    config = load(TOY, {**ALD, "sampling.noise_removal": str(denoise)})
    model = Mixture(build_sde(config), WEIGHTS, MEANS, 1.0)
    grid, noise_removal = build_times(config, model.sde), config.sampling.noise_removal
    ours = sample(model, build_sampler(config), (50, 2), grid, seed=3, denoise=noise_removal)

    # Song & Ermon 2019, algorithm 1, with the step of the published code; 2020, section 2: the denoising step
    sigmas = [20 * (0.5 / 20) ** (i / 6) for i in range(7)]
    noise = noise_source((50, 2), 3, 0, torch.float64, torch.device("cpu"))
    x = 20 * noise(MEANS)  # not the paper's uniform noise but the prior N(0, sigma_1²)
    for sigma in sigmas:
        alpha = 0.02 * sigma**2 / sigmas[-1] ** 2
        for _ in range(3):
            x = x + alpha * smoothed_score(x, sigma) + math.sqrt(2 * alpha) * noise(x)
    close(ours, x + sigmas[-1] ** 2 * smoothed_score(x, sigmas[-1]) if denoise else x)


@pytest.mark.parametrize("grid_ends_at", ["the smallest level", "clean data"])
@pytest.mark.parametrize("corrector", [AnnealedLangevin(0.1, steps=2), Langevin(0.1, steps=2)], ids=repr)
def test_a_corrector_alone_visits_every_level_once(corrector: Sampler, grid_ends_at: str) -> None:
    chain = SMLD([0.1, 0.5, 2.0, 7.0])
    seen: list[float] = []

    class Told(Gaussian):
        def forward(self, x: Tensor, t: Tensor, label: Any = None) -> Estimate:
            seen.append(self.sde.sigma(t).item())
            return super().forward(x, t, label)

    model = Told(chain.as_sde(), torch.zeros(2, dtype=torch.float64), 1.0)
    grid = chain.times if grid_ends_at == "clean data" else chain.times[:-1]
    states = list(corrector.walk(model, numbers(3, 2), grid, lambda like: numbers(3, 2, seed=1)))
    assert seen == pytest.approx([7, 7, 2, 2, 0.5, 0.5, 0.1, 0.1], rel=1e-12)
    assert len(states) == len(grid) - 1


def test_step_lr_is_ncsn_s_eps() -> None:
    """h = eps (sigma/sigma_L)²; NCSNv2's on CIFAR-10, eps = 6.2e-6 at sigma_L = 0.01, is the snr 0.176."""
    cifar = {**ALD, "model.sigma_min": "0.01", "sampling.step_lr": "6.2e-6", "sampling.n_steps_each": "5"}
    sampler = build_sampler(load(TOY, cifar))
    assert isinstance(sampler, AnnealedLangevin) and sampler.steps == 5
    assert sampler.snr == pytest.approx(math.sqrt(0.031), rel=1e-12)
    by_snr = load(TOY, {**cifar, "sampling.step_lr": "0", "sampling.snr": "0.3"})
    assert build_sampler(by_snr) == AnnealedLangevin(0.3, 5)
    beside = load(TOY, {**cifar, "sampling.method": "pc", "sampling.corrector": "ald"})
    assert build_sampler(beside).corrector == sampler  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "slip, sentence",
    [
        ({"sampling.method": "ddim"}, "step_lr is for annealed Langevin dynamics: set sampling.method=ald"),
        ({"sampling.method": "pc", "sampling.corrector": "langevin"}, "set sampling.method=ald, or sampling.step_lr=0"),
        ({"training.sde": "vpsde", "model.num_scales": "100"}, "for training.sde=vpsde set sampling.snr"),
        ({"sampling.step_lr": "0.5"}, "sampling.step_lr=0.5 must be below 2 model.sigma_min²=0.5"),
        ({"sampling.step_lr": "-1"}, "sampling.step_lr must be at least 0"),
    ],
)
def test_a_step_that_means_nothing_is_refused(slip: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        load(TOY, {**ALD, **slip})


# --- the weights of separated modes (Song & Ermon 2019, figure 3)


def share_on_a_grid(sigmas: list[float], steps: int, start: Callable[[Tensor], Tensor], fine: int = 12) -> float:
    """The share of states at the lighter mode after `steps` Langevin steps on each level, without chance.

    Across the line through the means nothing depends on the mode. Along it, at u = (x + y)/sqrt(2), the law on a grid
    of sigma/fine is carried on by the steps' transition matrix; `start` is its density up to a constant.
    """
    mean, points, law = 5 * math.sqrt(2), torch.zeros(0), torch.zeros(0)
    for level, sigma in enumerate(sigmas):
        h = 0.05 * sigma**2
        half = round((mean / sigma + 6) * fine)
        u = torch.arange(-half, half + 1, dtype=torch.float64) * sigma / fine
        after = u + h * (mean * torch.tanh(mean * u / sigma**2 + math.log(2)) - u) / sigma**2  # log(4)/2 = log 2
        moves = torch.softmax(-((u[:, None] - after) ** 2) / (4 * h), dim=0)
        law = torch.from_numpy(np.interp(u, points, law, left=0, right=0)) if level else start(u)
        points, law = u, torch.linalg.matrix_power(moves, steps) @ (law / law.sum())
    return (law[points < 0].sum() + law[points == 0].sum() / 2).item()


def levels(n: int) -> list[float]:
    """From 20 to 1 in geometric progression."""
    return [20 ** (1 - i / (n - 1)) for i in range(n)]


def prior(u: Tensor) -> Tensor:
    return torch.exp(-(u**2) / 800)


def uniform_square(u: Tensor) -> Tensor:
    """Density of (x + y)/sqrt(2) for x and y uniform in [-8, 8]."""
    return (16 - math.sqrt(2) * u.abs()).clamp_min(0)


def test_plain_langevin_gets_the_modes_weights_wrong_and_annealed_does_not() -> None:
    n = 3000
    x = mode_weights.plain(n, seed=1)
    share, error = mode_weights.lighter(x)
    expected = share_on_a_grid([1.0], 1000, uniform_square)
    assert expected == pytest.approx(0.491, abs=0.001) and share == pytest.approx(expected, abs=4 * error)
    assert share - 0.2 > 30 * error  # walks end at the mode they began nearer to, whatever it weighs
    # each mode by itself is right, but for the unadjusted steps' variance
    for mean, part in ((5, x[x.sum(1) > 0]), (-5, x[x.sum(1) < 0])):
        assert (part.mean() - mean).abs() < 4 / math.sqrt(part.numel())
        assert (part - mean).square().mean().item() == pytest.approx(1 / 0.975, rel=4 * math.sqrt(2 / part.numel()))

    share, error = mode_weights.lighter(mode_weights.annealed(n, seed=1))
    expected = share_on_a_grid(levels(10), 100, prior)
    assert expected == pytest.approx(0.218, abs=0.001) and share == pytest.approx(expected, abs=4 * error)


def test_the_annealed_weights_tend_to_the_mixture_s() -> None:
    """On more levels, and with more steps on each; both laws by the grid, which itself has converged."""
    errors = [share_on_a_grid(levels(n), 100, prior) - 0.2 for n in (10, 20, 40)]
    assert errors[0] > 2 * errors[1] > 0 and 0.006 > errors[2] > 0
    assert 0 < share_on_a_grid(levels(10), 1000, prior) - 0.2 < 0.004
    assert share_on_a_grid(levels(10), 100, prior, fine=20) - 0.2 == pytest.approx(errors[0], abs=2e-4)


def test_the_example_prints_the_shares_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mode_weights, "STEPS", 10)
    mode_weights.main(["--walks", "50", "--picture", str(tmp_path / "modes.png")])
    assert len(capsys.readouterr().out.splitlines()) == 7 and (tmp_path / "modes.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        mode_weights.main(["--walks", "0"])
    assert "--walks must be at least 1, got 0" in capsys.readouterr().err


# --- Langevin dynamics at one density


def gaussian(x: Tensor) -> Tensor:
    """Log density of N(0, 0.8) in one dimension, up to a constant."""
    return -(x[:, 0] ** 2) / 1.6


def mixture(x: Tensor) -> Tensor:
    """Log density of 0.3 N(-1, 0.25) + 0.7 N(1, 0.49) in one dimension, up to a constant."""
    left, right = (x[:, 0] + 1) ** 2 / 0.5 - math.log(0.3 / 0.5), (x[:, 0] - 1) ** 2 / 0.98 - math.log(0.7 / 0.7)
    return torch.logsumexp(torch.stack([-left, -right]), 0)


def gradient(log_density: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def score(x: Tensor) -> Tensor:
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            return torch.autograd.grad(log_density(y).sum(), y)[0]

    return score


def normal(x: Tensor, mean: Tensor, variance: float) -> Tensor:
    """Log density of N(mean, variance), elementwise."""
    return -((x - mean) ** 2) / (2 * variance) - math.log(2 * math.pi * variance) / 2


@pytest.mark.parametrize("kind", ["log density", "score", "model"])
def test_the_unadjusted_variance_is_the_formula_s(kind: str) -> None:
    """x += h score + sqrt(2h) z on N(0, s²) settles at s²/(1 - h/(2 s²)): by the recursion, and by simulation."""
    h, s2, t = 0.5, 0.8, 0.3
    model = Gaussian(VESDE(), torch.zeros(1, dtype=torch.float64), s2 - 0.01**2 * 5000 ** (2 * t))
    target: Any = {"log density": gaussian, "score": lambda x: -x / s2, "model": model}[kind]
    options = {"t": t} if kind == "model" else {}
    start = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    step, _ = next(langevin_walk(target, start, h, lambda like: 1 - start, **options))
    contraction, spread = step[:, 0].tolist()
    variance = s2 / (1 - h / (2 * s2))
    assert spread**2 / (1 - contraction**2) == pytest.approx(variance, rel=1e-12)
    x, acceptance = langevin_dynamics(target, start.new_zeros(40_000, 1), h, 12, seed=stream(1), **options)
    # 0.375² of what is missing is left after every step: 6e-11 in the end; 4 standard errors of a variance
    assert x.var().item() == pytest.approx(variance, rel=4 * math.sqrt(2 / 40_000))
    assert bool((acceptance == 1).all())


def test_log_acceptance_is_the_ratio_of_densities_and_proposals() -> None:
    x, y, h = numbers(40, 3, 2), numbers(40, 3, 2, seed=1), 0.3
    s_x, s_y, rise = numbers(40, 3, 2, seed=2), numbers(40, 3, 2, seed=3), numbers(40, seed=4)
    back, there = normal(x, y + h * s_y, 2 * h), normal(y, x + h * s_x, 2 * h)
    close(log_acceptance(rise, x, s_x, y, s_y, h), rise + (back - there).sum((1, 2)))


def test_the_metropolis_step_is_in_detailed_balance_with_the_density() -> None:
    """p(x) q(y|x) a(x, y) = p(y) q(x|y) a(y, x) on a grid, with what the walk itself accepts."""
    h, points = 0.7, torch.linspace(-2, 2.5, 41, dtype=torch.float64)
    x, y = (g.reshape(-1, 1) for g in torch.meshgrid(points, points, indexing="ij"))
    score = gradient(mixture)
    z = (y - x - h * score(x)) / math.sqrt(2 * h)
    # Bisect for the largest uniform number that is accepted, in the normal number behind it.
    low, high = torch.full_like(x, -40.0), torch.full_like(x, 9.0)
    for _ in range(60):
        middle = (low + high) / 2
        draws = iter([z, middle]).__next__
        _, moved = next(langevin_walk(mixture, x, h, lambda like, draw=draws: draw(), metropolis=True))
        low, high = torch.where(moved[:, None], middle, low), torch.where(moved[:, None], high, middle)
    log_rate = torch.special.log_ndtr(low[:, 0])
    flow = (mixture(x) + normal(y, x + h * score(x), 2 * h)[:, 0] + log_rate).reshape(41, 41)
    torch.testing.assert_close(flow, flow.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["log density", "score"])
def test_metropolis_removes_the_bias(kind: str) -> None:
    """From exact draws of a mixture, 20 steps of h = 0.5 leave its moments alone; unadjusted ones do not."""
    n = 20_000
    right = torch.rand(n, 1, generator=torch.Generator().manual_seed(7), dtype=torch.float64) < 0.7
    x0 = torch.where(right, 1 + 0.7 * numbers(n, 1), -1 + 0.5 * numbers(n, 1))
    target = mixture if kind == "log density" else gradient(mixture)
    x, acceptance = langevin_dynamics(target, x0, 0.5, 20, metropolis=True, seed=stream(2))
    biased, _ = langevin_dynamics(target, x0, 0.5, 20, seed=stream(2))
    points = torch.linspace(-9, 9, 20_001, dtype=torch.float64)[:, None]
    p = torch.softmax(mixture(points), 0)
    for k in (1, 2, 3, 4):
        mean, mean_square = (p * points[:, 0] ** k).sum().item(), (p * points[:, 0] ** (2 * k)).sum().item()
        error = math.sqrt((mean_square - mean**2) / n)
        assert abs((x**k).mean().item() - mean) < 4 * error
        assert k in (1, 3) or abs((biased**k).mean().item() - mean) > 8 * error
    assert 0.5 < acceptance.mean().item() < 0.95


def test_the_acceptance_rate_on_a_gaussian_is_its_integral() -> None:
    h, s2, n = 0.6, 0.8, 40_000
    points = torch.linspace(-6, 6, 1201, dtype=torch.float64)
    x, y = torch.meshgrid(points, points, indexing="ij")
    there = normal(x, torch.zeros(()), s2) + normal(y, x - h * x / s2, 2 * h)
    back = normal(y, torch.zeros(()), s2) + normal(x, y - h * y / s2, 2 * h)
    rate = torch.exp(torch.minimum(there, back)).sum().item() * 0.01**2
    start = math.sqrt(s2) * numbers(n, 1)
    for seed, target in enumerate((gaussian, lambda x: -x / s2)):
        x, acceptance = langevin_dynamics(target, start, h, 1, metropolis=True, seed=stream(10 + seed))
        assert acceptance.mean().item() == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / n))
        assert torch.equal(x != start, acceptance[:, None] == 1)
    assert 0.8 < rate < 0.95


def test_the_line_integral_of_a_score_stands_for_the_log_density() -> None:
    """The same walk, to the quadrature's error, for an anharmonic density in eight dimensions."""
    x0 = numbers(200, 2, 4)

    def log_density(x: Tensor) -> Tensor:
        return -(x.flatten(1) ** 4 / 4 + torch.sin(3 * x.flatten(1))).sum(1)

    ends = [langevin_dynamics(f, x0, 0.1, 30, metropolis=True) for f in (log_density, gradient(log_density))]
    close(ends[0].x, ends[1].x)
    assert torch.equal(ends[0].acceptance, ends[1].acceptance)
    assert 0.3 < ends[0].acceptance.mean() < 0.9
    errors = []
    for scale in (0.2, 0.1):
        y = x0 + scale * numbers(200, 2, 4, seed=1)
        integral = _line_integral(lambda x: (None, gradient(log_density)(x)), x0, y)
        errors.append((integral - log_density(y) + log_density(x0)).abs().mean())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(9, abs=0.7)  # of the integral; of its mean value 8
    assert errors[0] < 1e-7


def test_mini_batch_scores_make_it_sgld() -> None:
    """Posterior of a mean: the gradient's noise adds h² times its variance to that of every step, and a falling step
    removes both errors (Welling & Teh 2011)."""
    data, b, walks, h = 2 + numbers(40, seed=5), 4, 20_000, 0.004
    precision = 1 + 40.0  # prior N(0, 1), data N(theta, 1)
    mean, generator = data.sum().item() / precision, torch.Generator().manual_seed(0)

    def score(theta: Tensor) -> Tensor:
        batch = data[torch.randint(40, (len(theta), b), generator=generator)]  # drawn anew for every walk
        return -theta + 40 / b * (batch - theta).sum(1, keepdim=True)

    noise = (40 / b) ** 2 * b * data.var(correction=0).item()
    x, _ = langevin_dynamics(score, torch.full((walks, 1), mean, dtype=torch.float64), h, 40, seed=stream(0))
    variance = (2 * h + h**2 * noise) / (1 - (1 - h * precision) ** 2)
    assert x.var().item() == pytest.approx(variance, rel=4 * math.sqrt(2 / walks))
    assert x.mean().item() == pytest.approx(mean, abs=4 * math.sqrt(variance / walks))
    assert variance * precision > 1.6  # what the mini-batches did
    x, _ = langevin_dynamics(score, x, lambda i: h * (1 + i / 10) ** -0.8, 400, seed=stream(1))
    assert x.var().item() * precision == pytest.approx(1, abs=0.1)


def test_a_walk_depends_on_its_seed_and_number_alone() -> None:
    x0 = numbers(6, 3)
    for metropolis in (False, True):
        walk = partial(langevin_dynamics, lambda x: -x, step=0.5, n=5, metropolis=metropolis, seed=3)
        whole, half = walk(x=x0, first=10), walk(x=x0[4:], first=14)
        assert torch.equal(whole.x[4:], half.x) and torch.equal(whole.acceptance[4:], half.acceptance)
        assert not torch.equal(whole.x, walk(x=x0, first=11).x)
    assert torch.equal(x0, numbers(6, 3))


def test_steps_out_of_the_density_s_support_are_refused() -> None:
    def half_normal(x: Tensor) -> Tensor:
        return torch.where(x[:, 0] > 0, -(x[:, 0] ** 2) / 2, -math.inf)

    x, acceptance = langevin_dynamics(half_normal, numbers(4000, 1).abs(), 0.5, 20, metropolis=True, seed=stream(5))
    assert bool((x > 0).all()) and 0.3 < acceptance.mean() < 0.9
    assert x.mean().item() == pytest.approx(math.sqrt(2 / math.pi), abs=4 * 0.603 / math.sqrt(4000))


def test_targets_that_are_none_are_refused() -> None:
    x, model = numbers(3, 2), Gaussian(VESDE(), torch.zeros(2), 1.0)
    for target, options, start, sentence in (
        (model, {}, x, "a score model has a density at every time: pass t"),
        (gaussian, {"t": 0.5}, x, "t=0.5 is the time of a score model; a function of x has none"),
        (lambda x: x.sum(), {}, x, r"must return a log density \(3,\) or a score \(3, 2\) .* got \(\)"),
        (lambda x: x.sum(1).detach(), {}, x, "the log density has no gradient"),
        (gaussian, {}, x[:, 0], r"x must be \(B, \*shape\), a batch of states, got shape \(3,\)"),
    ):
        with pytest.raises(ValueError, match=sentence):
            langevin_dynamics(target, start, 0.1, 1, **options)  # type: ignore[arg-type]
