"""Likelihoods: time, evaluations and error at the same tolerance, with a network whose answer is known exactly.

Without a trained model it is Gaussian data's exact noise plus 0 times the network's output. So every evaluation costs
what the network's costs, while states, steps and log densities are those of a probability flow with a closed form, and
the error is the solver's. The Gaussian's covariance is diagonal: its divergence is exact for Rademacher probes too.

A trained model is measured on held-out images. Both sides then ask one network, ours, with one probe, and the error is
the distance from our result in float64 at a tolerance of 1e-7.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

from score_sde.config.build import build_network, build_sde
from score_sde.data import load_data
from score_sde.likelihood import log_likelihood
from score_sde.models.base import ScoreModel
from score_sde.models.closed_form import Gaussian
from score_sde.models.rules import Preconditioned, label_sigma, label_time
from score_sde.sdes import SDE, VESDE, like
from score_sde.tasks.checkpoint import load

from .peer import Peer, config_for
from .timing import Clock, Table, milliseconds, ratio

LOOSER = 2  # times the tolerance, in a second run of ours: the peer's error at its tolerance is larger
MEAN, VARIANCES = 0.2, (0.02, 0.5)  # of the data: every dimension has one mean, and variances go from first to last


class Known(nn.Module):
    """exact(x, label) + 0 · network(x, label)."""

    def __init__(self, network: nn.Module, exact: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.exact = network, exact

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.exact(x, label) + 0.0 * self.network(x, label)


class AsPeer(nn.Module):
    """Our model in the place of the peer's network: the noise at its labels, and for the VE SDE the score."""

    def __init__(self, model: ScoreModel) -> None:
        super().__init__()
        self.model, self.ve = model, isinstance(model.sde, VESDE)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        label = label.double()
        t = self.model.sde.time(-2 * torch.log(label)) if self.ve else label / 999
        noise = self.model(x, t).noise
        return -noise / like(label, x) if self.ve else noise


def trained_likelihood(config: ConfigDict, workdir: Path, clock: Clock, peer: Peer | None) -> Table:
    """The same for a trained model, on the first `training.batch_size` held-out images."""
    e, d = config.eval, config.data
    model = load(workdir, map_location=clock.device)
    data = load_data(d.dataset, d.path or None, image_size=d.image_size or None, num_channels=d.num_channels or None)
    k, _ = data.test[torch.arange(min(config.training.batch_size, len(data.test)))]
    if data.levels is None:
        raise ValueError(f"data.dataset={d.dataset} has no images of levels, and errors here are in bits/dim")
    u = torch.rand(k.shape, generator=torch.Generator().manual_seed(0))
    x = ((k + u) / data.levels * 2 - 1).to(clock.device)
    size = math.prod(x.shape[1:])
    torch.manual_seed(0)
    probe = (torch.randint_like(x, low=0, high=2).float() * 2 - 1)[None]  # as the peer draws it
    exact = load(workdir, map_location=clock.device).double()
    settings = {"t_min": e.t_min, "method": e.ode_method}
    truth = _bits(log_likelihood(exact, x.double(), probe=probe, rtol=1e-7, atol=1e-7, t_min=e.t_min).log_prob, size)
    found: dict[str, tuple[Tensor, float]] = {}

    def ours(name: str, times: float) -> None:
        result = log_likelihood(model, x, probe=probe, rtol=times * e.rtol, atol=times * e.atol, **settings)
        found[name] = _bits(result.log_prob, size), result.nfe

    loose = f"ours, tolerance {LOOSER * e.rtol:g}"
    works: dict[str, Callable[[], object]] = {"ours": partial(ours, "ours", 1), loose: partial(ours, loose, LOOSER)}
    if peer is not None:
        theirs = peer.sde(config_for(config, tuple(x.shape[1:]), clock.device))
        bits = peer.likelihood.get_likelihood_fn(theirs, lambda x: 7.0, rtol=e.rtol, atol=e.atol, eps=e.t_min)
        network = AsPeer(model)

        def run() -> None:
            torch.manual_seed(0)
            values, _, nfe = bits(network, x)
            found["peer"] = values, nfe

        works["peer"] = run
    notes = [
        f"{len(x)} held-out images of {'x'.join(map(str, x.shape[1:]))}, {model.sde}, rtol {e.rtol:g}, "
        f"atol {e.atol:g}, t_min {e.t_min:g}, one Rademacher probe, the same for both; ours: {e.ode_method}"
        + ("; the peer: scipy's RK45, asking our network" if peer else "")
    ]
    return _table(f"Likelihood of {workdir}", works, found, truth, len(x), clock, notes)


def likelihood(config: ConfigDict, shape: tuple[int, ...], clock: Clock, peer: Peer | None) -> Table:
    """Milliseconds an image, evaluations, and mean absolute error in bits/dim."""
    e, batch = config.eval, config.training.batch_size
    sde = build_sde(config)
    d = math.prod(shape)
    variances = torch.linspace(*VARIANCES, d, dtype=torch.float64).reshape(shape)
    data = Gaussian(sde, torch.full(shape, MEAN, dtype=torch.float64), variances)
    x, _ = data.sample(batch, torch.Generator().manual_seed(0))
    truth = _bits(_exact(data, variances, x, e.t_min), d)
    x = x.float().to(clock.device)
    network = build_network(config, shape).to(clock.device).eval()
    ve = isinstance(sde, VESDE)

    def noise(x: Tensor, label: Tensor) -> Tensor:
        t = sde.time(-2 * torch.log(label)) if ve else label / 999
        a, s = like(sde.alpha(t), x), like(sde.sigma(t), x)
        return s * (x - a * MEAN) / (a**2 * variances.to(x) + s**2)

    label = label_sigma if ve else label_time
    model = Preconditioned(Known(network, noise), sde, label=label)
    found: dict[str, tuple[Tensor, float]] = {}

    def ours() -> None:
        result = log_likelihood(model, x, rtol=e.rtol, atol=e.atol, t_min=e.t_min, method=e.ode_method)
        found["ours"] = _bits(result.log_prob, d), result.nfe

    works: dict[str, Callable[[], object]] = {"ours": ours}
    notes = [
        f"batch {batch} of {'x'.join(map(str, shape))}, {sde}, rtol {e.rtol:g}, atol {e.atol:g}, t_min {e.t_min:g}, "
        f"one Rademacher probe; ours: {e.ode_method}" + ("; the peer: scipy's RK45" if peer else ""),
        "the model is a diagonal Gaussian's exact noise plus 0 times the network, so that time is the network's and "
        "the error the solver's; exact bits/dim take the prior at t = 1, as both sides do",
    ]
    if peer is not None:
        theirs = config_for(config, shape, clock.device)

        def score(x: Tensor, label: Tensor) -> Tensor:
            return noise(x, label) / -like(label, x)

        their_network = Known(peer.network(theirs, network), score if ve else noise)
        bits = peer.likelihood.get_likelihood_fn(
            peer.sde(theirs), lambda x: 7.0, rtol=e.rtol, atol=e.atol, eps=e.t_min
        )  # 7 - 7 = 0 is then its offset for pixels

        def run() -> None:
            values, _, nfe = bits(their_network, x)
            found["peer"] = values, nfe

        works["peer"] = run
    return _table("Likelihood", works, found, truth, batch, clock, notes)


def _table(
    title: str,
    works: dict[str, Callable[[], object]],
    found: dict[str, tuple[Tensor, float]],
    truth: Tensor,
    batch: int,
    clock: Clock,
    notes: list[str],
) -> Table:
    """Time `works`, which leave (bits/dim, evaluations) in `found`."""
    taken = replace(clock, turns=min(clock.turns, 3)).compare(works)  # a turn is long, and its time steady
    rows = []
    for side, seconds in taken.items():
        bits, nfe = found[side]
        rows.append(
            (
                side,
                milliseconds(seconds, batch),
                f"{nfe:.0f}",
                milliseconds(seconds, round(batch * nfe)),
                f"{(bits.cpu() - truth.cpu()).abs().mean():.1e}",
                str(ratio(taken["peer"], seconds)) if "peer" in taken and side != "peer" else "",
            )
        )
    head = (
        "",
        "time an image",
        "evaluations",
        "time an image and evaluation",
        "error, bits/dim",
        "peer's time over it",
    )
    return Table(title, head, rows, [*notes, "error: mean absolute"])


def _bits(log_prob: Tensor, d: int) -> Tensor:
    """Bits per dimension of a density, without an offset for pixels."""
    return -log_prob.double() / (d * math.log(2))


def _exact(data: Gaussian, variances: Tensor, x: Tensor, t_min: float) -> Tensor:
    """Log density of x under the prior carried back along the exact flow from t = 1 to t_min."""
    sde: SDE = data.sde
    t, one = torch.tensor(t_min, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    start, end = (sde.alpha(u) ** 2 * variances + sde.sigma(u) ** 2 for u in (t, one))
    return sde.prior_log_prob(data.flow(x, t, one)) + torch.log(end / start).sum() / 2
