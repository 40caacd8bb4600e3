"""score_sde_pytorch's samplers as samplers on our models: its own functions, from the same noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from score_sde import SDE, VESDE, VPSDE, Sampler, ScoreModel, SubVPSDE
from score_sde.noise import Noise

from .peer import Peer
from .schedulers import seed_of


@dataclass(frozen=True)
class PeerODE(Sampler):
    """The peer's `get_ode_sampler`, scipy's RK45, between the ends of the grid."""

    tolerance: float
    peer: Peer = field(repr=False, compare=False)

    def walk(self, model: ScoreModel, x: Tensor, times: Tensor, noise: Noise) -> Iterator[Tensor]:
        images = _images(x)
        run = self.peer.sampling.get_ode_sampler(
            _sde(self.peer, model.sde, 1000), images.shape, _same, rtol=self.tolerance, atol=self.tolerance,
            eps=times[-1].item(), device=x.device,
        )  # fmt: skip
        yield run(_Network(model, x), images)[0].reshape(x.shape)


@dataclass(frozen=True)
class PeerPC(Sampler):
    """The peer's `get_pc_sampler`, on its own grid of as many steps; noise by its own calls, seeded here."""

    predictor: str
    corrector: str
    peer: Peer = field(repr=False, compare=False)
    flow: bool = False
    snr: float = 0.16

    def walk(self, model: ScoreModel, x: Tensor, times: Tensor, noise: Noise) -> Iterator[Tensor]:
        images, sampling = _images(x), self.peer.sampling
        sde = _sde(self.peer, model.sde, len(times) - 1)
        sde.prior_sampling = lambda shape: images
        run = sampling.get_pc_sampler(
            sde, images.shape, sampling.get_predictor(self.predictor), sampling.get_corrector(self.corrector), _same,
            self.snr, probability_flow=self.flow, continuous=True, eps=times[-1].item(), device=x.device,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(x))
            yield run(_Network(model, x))[0].reshape(x.shape)


def known(sde: SDE) -> bool:
    """Whether the peer has this SDE."""
    return isinstance(sde, VPSDE | VESDE)


class _Network(nn.Module):
    """Our model as the peer's network: for VP and sub-VP from 999 t to the noise, for VE from sigma to the score."""

    def __init__(self, model: ScoreModel, x: Tensor) -> None:
        super().__init__()
        self.model, self.shape = model, x.shape

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        sde, exploding = self.model.sde, isinstance(self.model.sde, VESDE)
        t = sde.time(-2 * torch.log(labels)) if exploding else labels / 999
        estimate = self.model(x.reshape(self.shape), t)
        return (estimate.score if exploding else estimate.noise).reshape(x.shape)


def _sde(peer: Peer, sde: SDE, n: int) -> Any:
    if isinstance(sde, VESDE):
        return peer.sde_lib.VESDE(sigma_min=sde.sigma_min, sigma_max=sde.sigma_max, N=n)
    assert isinstance(sde, VPSDE)
    kind = peer.sde_lib.subVPSDE if isinstance(sde, SubVPSDE) else peer.sde_lib.VPSDE
    return kind(beta_min=sde.beta_min, beta_max=sde.beta_max, N=n)


def _images(x: Tensor) -> Tensor:
    """States with four axes, because the peer broadcasts times against four axes only."""
    return x if x.ndim == 4 else x.reshape(*x.shape[:2], 1, 1)


def _same(x: Tensor) -> Tensor:
    return x
