"""torch.func over times: curves and models mapped over t are the loop, and their derivatives the rates."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import jacfwd, jacrev, jvp, vmap

from score_sde import DDPM, SDE, SMLD, VESDE, VPSDE, Preconditioned, ScoreModel, from_score, guide
from score_sde.models.closed_form import Boxes, Empirical, Gaussian, Mixture
from score_sde.models.guidance import clip, threshold
from score_sde.models.rules import RULES
from score_sde.networks import EDM2, MLP, DiT, NCSNv2, UNet
from score_sde.sdes import like
from score_sde.sdes.learned import LearnedVPSDE, MonotoneSchedule
from tests.oracles import SDES, numbers

CURVES = [
    *SDES,
    DDPM.linear(50, 1e-3, 0.2).as_sde(),
    SMLD.from_sde(VESDE(), 50).as_sde(),
    LearnedVPSDE(schedule=MonotoneSchedule(units=16)),
]
T = torch.tensor([0.07, 0.31, 0.5, 0.86], dtype=torch.float64)
# of torch's: rules for mapping that it has yet to write are loops
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


@pytest.mark.parametrize("sde", CURVES, ids=lambda sde: type(sde).__name__)
def test_curves_map_over_times_and_have_derivatives_there(sde: SDE) -> None:
    for curve in (sde.alpha, sde.sigma, sde.f, sde.g, sde.log_snr):
        torch.testing.assert_close(vmap(curve)(T), torch.stack([curve(t) for t in T]))
    rate = sde.f(T) * sde.alpha(T)  # alpha' = f alpha
    for found in (
        vmap(jacrev(sde.alpha))(T),
        vmap(jacfwd(sde.alpha))(T),
        jvp(sde.alpha, (T,), (torch.ones_like(T),))[1],
    ):
        torch.testing.assert_close(found, rate, rtol=1e-6, atol=1e-9)
    variance = vmap(jacrev(lambda t: sde.sigma(t) ** 2))(T)  # (sigma²)' = g² + 2 f sigma²
    torch.testing.assert_close(variance, sde.g(T) ** 2 + 2 * sde.f(T) * sde.sigma(T) ** 2, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(vmap(sde.time)(sde.log_snr(T).detach()), T)
    for found, wanted in zip(vmap(sde.transition)(T - 0.05, T), sde.transition(T - 0.05, T), strict=True):
        torch.testing.assert_close(found, wanted)


class Wave(torch.nn.Module):
    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return torch.sin(x) * like(torch.cos(label), x)


ZERO, ONE = torch.zeros(2, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)
MODELS: dict[str, Callable[[SDE], ScoreModel]] = {
    "gaussian": lambda sde: Gaussian(sde, ZERO, 0.3),
    "mixture": lambda sde: Mixture(sde, [0.3, 0.7], torch.stack([ZERO, ONE]), 0.2).given(label=1),
    "boxes": lambda sde: Boxes(sde, [1.0], ZERO[None], ONE[None]),
    "empirical": lambda sde: Empirical(sde, torch.stack([ZERO, ONE])),
    "score": lambda sde: from_score(sde, lambda x, t: -torch.tanh(x)),
    **{rule: lambda sde, rule=rule: Preconditioned(Wave(), sde, rule) for rule in RULES},  # type: ignore[misc]
    "guided": lambda sde: guide(Gaussian(sde, ZERO, 0.3), Gaussian(sde, ONE, 0.3), 2.0, low=0.1, high=1.0, rescale=0.5),
    "one batch": lambda sde: guide(*(MODELS["mixture"](sde).model.given(label=y) for y in (1, None)), 2.0),
    "clipped": lambda sde: clip(Gaussian(sde, ZERO, 0.3)),
    "thresholded": lambda sde: threshold(Gaussian(sde, ZERO, 4.0)),
}


def check(model: ScoreModel, x: Tensor) -> None:
    """The estimates of single examples, each at its time, mapped and in a loop."""

    def one(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        e = model(x[None], t)
        return e.data[0], e.noise[0]

    for found, wanted in zip(vmap(one)(x, T), zip(*map(one, x, T), strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(wanted))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("sde", [VPSDE(), *CURVES[-3:]], ids=lambda sde: type(sde).__name__)
def test_models_map_over_states_and_times(sde: SDE, kind: str) -> None:
    check(MODELS[kind](copy.deepcopy(sde)), numbers(4, 2, 3))


@torch.no_grad()
def test_networks_map_over_states_and_times() -> None:
    torch.manual_seed(0)
    small = {"width": 8, "multipliers": (1, 1), "blocks": 1, "attention": (4,), "image_size": 8}
    networks = [UNet(1, **small), UNet(1, embedding="fourier", fir=(1, 3, 3, 1), **small), NCSNv2(1, width=4)]
    networks.append(DiT(1, patch=2, width=16, depth=1, heads=2))
    modern = {"norm": "rms", "feed_forward": "swiglu", "positions": "rotary", "qk_norm": True}
    networks.append(DiT(1, patch=2, width=16, depth=1, heads=2, **modern))
    networks.append(EDM2(1, head_channels=8, **small))
    for network in networks:
        check(Preconditioned(network, VPSDE()).double().eval(), numbers(4, 1, 8, 8))
    check(Preconditioned(MLP(3, width=8, depth=1), VPSDE()).double(), numbers(4, 3))
