"""Langevin dynamics: annealed as published, its known bias, Metropolis adjustment, NCSNv2's rules, mode weights."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from score_sde import SMLD, AnnealedLangevin, Langevin, Sampler, sample
from score_sde.build import build_sampler, build_sde, build_times
from score_sde.closed_form import Gaussian, Mixture
from score_sde.config import load
from score_sde.samplers.base import noise_source
from tests.oracles import numbers

TOY = Path(__file__).parent.parent / "configs" / "ve_toy.py"
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
        def score(self, x: Tensor, t: Tensor) -> Tensor:
            seen.append(self.sde.sigma(t).item())
            return super().score(x, t)

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
        ({"sampling.method": "ddim"}, "step_lr is the step of annealed Langevin dynamics: set sampling.method=ald"),
        ({"sampling.method": "pc", "sampling.corrector": "langevin"}, "set sampling.method=ald, or step_lr=0"),
        ({"training.sde": "vpsde", "model.num_scales": "100"}, "for training.sde=vpsde set sampling.snr"),
        ({"sampling.step_lr": "0.5"}, "sampling.step_lr=0.5 is not below 2 model.sigma_min²=0.5"),
        ({"sampling.step_lr": "-1"}, "sampling.step_lr must be at least 0"),
    ],
)
def test_a_step_that_means_nothing_is_refused(slip: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        load(TOY, {**ALD, **slip})
