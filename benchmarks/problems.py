"""Flows to be solved: models, noise to start from, and where the probability flow takes it.

`mixtures` and `fields` had a part in choosing the package's default sampler, and so had the digits; `held_out` and
every other trained model had none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from score_sde import SDE, VESDE, VPSDE, CosineSDE, EmbeddedODE, Multistep, ScoreModel, Solver, SubVPSDE, UniPC, times
from score_sde.data.toys import EXACT
from score_sde.models.closed_form import Gaussian, Mixture
from score_sde.noise import noise_source
from score_sde.ode import integrate
from score_sde.samplers.deterministic import velocity
from score_sde.sdes import EDMSDE
from score_sde.tasks.checkpoint import find

PATHS, IMAGES, LARGE_IMAGES = 126, 33, 15  # multiples of three: a third of them is a repetition
CHOSEN_ON = "digits"  # the trained model that had a part in the choice


class Problem(NamedTuple):
    """A model, states at t = 1, where the flow takes them at t_min, and two references' median distance.

    `chosen` says whether the default sampler was chosen on it, `network` whether the model is a trained one, and
    `large` whether it is too slow for every sampler on every grid.
    """

    name: str
    model: ScoreModel
    sde: SDE
    start: Tensor
    end: Tensor
    doubt: float
    chosen: bool = False
    network: bool = False
    large: bool = False


def mixtures() -> Iterator[tuple[str, Mixture]]:
    """Eight unequal Gaussians, of deviations from 0.05 to 0.3 in each dimension, under three SDEs."""
    g = torch.Generator().manual_seed(0)
    for d in (2, 10):
        means = 0.7 * torch.randn(8, d, generator=g, dtype=torch.float64)
        log_std = torch.empty(8, d, dtype=torch.float64).uniform_(math.log(0.05), math.log(0.3), generator=g)
        for name, sde in {"VP": VPSDE(), "VE": VESDE(), "cosine": CosineSDE()}.items():
            yield f"{d}-D, {name}", Mixture(sde, range(1, 9), means, torch.exp(2 * log_std))


def fields() -> Iterator[tuple[str, Mixture]]:
    """A Gaussian of many dimensions, a few of them large, in its principal axes: variances fall as rank^(-3/2), 1/4 in
    the mean, about as those of CIFAR-10's images do (220 the largest, 0.0015 the median)."""
    variances = torch.arange(1, 3073, dtype=torch.float64) ** -1.5
    for name, sde in {"VP": VPSDE(), "VE": VESDE()}.items():
        yield f"3072-D, {name}", Gaussian(sde, torch.zeros_like(variances), variances / variances.mean() / 4)


def held_out() -> Iterator[tuple[str, Mixture]]:
    """Five Gaussians in space, full covariances, deviations from 0.05 to 0.5; and two moons, which are curved."""
    g = torch.Generator().manual_seed(1)
    means = 0.8 * torch.randn(5, 3, generator=g, dtype=torch.float64)
    axes, _ = torch.linalg.qr(torch.randn(5, 3, 3, generator=g, dtype=torch.float64))
    log_std = torch.empty(5, 1, 3, dtype=torch.float64).uniform_(math.log(0.05), math.log(0.5), generator=g)
    covs = axes * torch.exp(2 * log_std) @ axes.mT
    for name, sde in {"VP": VPSDE(), "sub-VP": SubVPSDE()}.items():
        yield f"3-D, {name}", Mixture(sde, range(1, 6), means, covs)
    for name, other in {"VE": VESDE(), "EDM": EDMSDE()}.items():
        moons = EXACT["moons"](other)
        assert isinstance(moons, Mixture)
        yield f"moons, {name}", moons


@torch.no_grad()
def mixture_problem(name: str, model: Mixture, count: int = PATHS, *, chosen: bool = False) -> Problem:
    """A problem with ends by torchdiffeq's dopri8 in t, at 1e-12, and again by our embedded pair on the circle."""
    sde = model.sde
    start = _start(sde, (count, *model.shape), 0, torch.float64)
    solver = Solver("dopri8", 1e-12, 1e-12)
    end, _ = integrate(lambda t, x: velocity(model, x, t), start, 1.0, sde.t_min, solver=solver, sde=sde)
    *_, again = EmbeddedODE(1e-11, 1e-11).walk(model, start, times.log_snr(sde, 1), refuse)
    return Problem(name, model, sde, start, end, float(distances(end, again).median()), chosen)


class Trained(NamedTuple):
    """A trained model, the SDE to the t at which sampling ends, as the demo's does, and its data set."""

    model: ScoreModel
    sde: SDE
    data: str
    path: str
    centered: bool
    shape: tuple[int, ...]


def trained(workdir: Path) -> Trained:
    """Load a trained model; models of vectors are float64."""
    checkpoint = find(workdir)
    card, data, model = checkpoint.card, checkpoint.config.data, checkpoint.model()
    assert card is not None
    model = model.double() if len(card.shape) == 1 else model
    sde = replace(model.sde, t_min=max(model.sde.t_min, 1e-3))
    return Trained(model, sde, data.dataset, data.path, data.centered, card.shape)


@torch.no_grad()
def trained_problem(workdir: Path, count: int = 0, seed: int = 0) -> Problem:
    """A trained model from noise to data; by default with a number of paths that suits its cost.

    The ends come from 300 steps of order 4 (vectors: 1200, in float64), and from as many of order 3 on another grid.
    """
    model, sde, data, _, _, shape = trained(workdir)
    vectors, large = len(shape) == 1, math.prod(shape) > 1000
    count = count or (PATHS if vectors else LARGE_IMAGES if large else IMAGES)
    start = _start(sde, (count, *shape), seed, torch.float64 if vectors else torch.float32)
    n = 1200 if vectors else 300
    *_, end = UniPC(3, predict="noise").walk(model, start, times.arcsinh(sde, n), refuse)
    *_, again = Multistep(3).walk(model, start, times.log_snr(sde, n), refuse)
    doubt = float(distances(end, again).median())
    return Problem(f"network: {data}", model, sde, start, end, doubt, data == CHOSEN_ON, True, large)


def _start(sde: SDE, shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    return sde.prior(shape, noise_source(shape, seed, 0, dtype, torch.device("cpu")))


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Root mean square over an example's values, (B,)."""
    return (x - y).flatten(1).square().mean(1).sqrt()


def refuse(like: Tensor) -> Tensor:
    """The noise of samplers that draw none."""
    raise ValueError("a deterministic sampler asked for noise")
