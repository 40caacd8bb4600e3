"""Traces, divergences and their gradients beside finite differences: every network with every guidance and probe."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from score_sde import ScoreModel, Solver, classifier, dps, guide, moment_matching, pigdm, score_flow
from score_sde.build import NETWORKS, build_classifier, build_model
from score_sde.config import default_config
from score_sde.flows import ProbabilityFlow
from score_sde.inverse import Dense, Observation
from score_sde.model import of_examples

from .oracles import numbers

IMAGES, VECTORS, CLASSES, T = (1, 2, 4), (5,), 3, 0.4
EXTRA = {
    "ddpm": {"nf": 32, "resblock_type": "ddpm"},
    "ncsnpp": {"fir": True, "progressive": "output_skip", "progressive_input": "residual"},
    "adm": {"scale_shift": True},
    "dit": {"hidden": 8, "depth": 1, "num_heads": 2},
    "ncsn": {"ch_mult": (1, 1, 1), "num_scales": 10, "label": "index"},
    "ncsnv2": {"ch_mult": (1, 1, 1)},
    "mlp": {"hidden": 8, "depth": 2},
}


def shape_of(name: str) -> tuple[int, ...]:
    return VECTORS if name == "mlp" else IMAGES


def config_of(name: str, seed: int, recompute: bool = False):
    config = default_config()
    config.seed, config.training.checkpoint_activations = seed, recompute
    config.model.update(
        {"name": name, "nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (2,), "dropout": 0.0}
        | {
            "label": "edm",
            "num_classes": 0 if name.startswith("ncsnv") or name == "ncsn" else CLASSES,
            "init_scale": 1.0,
        }
        | EXTRA[name]
    )
    return config


def awake(module: nn.Module) -> nn.Module:
    """In float64 and eval mode, with numbers where parameters begin at zero."""
    for i, p in enumerate(module.double().eval().parameters()):
        p.data += 0.1 * numbers(*p.shape, seed=i)
    return module


@cache
def network_model(name: str, seed: int = 0, recompute: bool = False) -> ScoreModel:
    return awake(build_model(config_of(name, seed, recompute), shape_of(name)))


def states(name: str, seed: int = 0) -> Tensor:
    return 0.7 * numbers(2, *shape_of(name), seed=10 + seed)


def observed(name: str):
    shape = shape_of(name)
    operator = Dense(numbers(2, math.prod(shape), seed=5), shape)
    return Observation(operator, operator.apply(states(name, 1)), 0.5)


LABEL = torch.tensor([2, 0])


def classified(name: str, model: ScoreModel) -> ScoreModel:
    judge = awake(build_classifier(config_of("mlp" if name == "mlp" else "ncsnpp", 7), shape_of(name)))
    return classifier(model, judge, 1.5, label=LABEL)


def free(name: str, model: ScoreModel) -> ScoreModel:
    if name in ("ncsn", "ncsnv2"):  # without classes: led by a weaker model
        return guide(model, network_model(name, 1), 2.0)
    return guide(model.given(label=LABEL), model.given(label=None), 2.0)


GUIDANCE: dict[str, Callable[[str, ScoreModel], ScoreModel]] = {
    "plain": lambda name, model: model,
    "classifier": classified,
    "classifier-free": free,
    "dps": lambda name, model: dps(model, observed(name)),
    "pigdm": lambda name, model: pigdm(model, observed(name)),
    "moment_matching": lambda name, model: moment_matching(model, observed(name), 2),
}


def slopes(model: ScoreModel, x: Tensor, e: Tensor, h: float = 3e-4) -> Tensor:
    """e^T J e of the probability flow at T, (K, B), off by O(h⁴): all probes' differences in one evaluation."""
    t, steps = torch.tensor(T, dtype=torch.float64), (h, -h, 2 * h, -2 * h)
    rows = torch.arange(len(x)).repeat(4 * len(e))
    with torch.no_grad(), of_examples(model, rows, len(x)):
        v = ProbabilityFlow(model)(t, torch.cat([x + step * e for step in steps]).flatten(0, 1))
    up, down, farther_up, farther_down = v.unflatten(0, (4, len(e), len(x)))
    return ((8 * (up - down) - (farther_up - farther_down)) * e / (12 * h)).flatten(2).sum(2)


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("name", NETWORKS)
def test_divergences_are_those_of_finite_differences(name: str, guidance: str) -> None:
    model, x = GUIDANCE[guidance](name, network_model(name)), states(name)
    units = torch.eye(x[0].numel(), dtype=x.dtype).reshape(-1, 1, *x.shape[1:]).expand(-1, *x.shape)
    e = numbers(3, *x.shape, seed=3)
    truth = slopes(model, x, torch.cat([e, units]))
    wanted = {1: truth[:1].mean(0), 3: truth[:3].mean(0), "exact": truth[3:].sum(0)}
    flow = score_flow(model, base=lambda z: z.new_zeros(len(z)), t_min=T, solver=Solver("euler", steps=1))
    with torch.no_grad():
        for key, probe in ((1, e[:1]), (3, e), ("exact", "exact")):
            torch.testing.assert_close(flow.log_prob(x, probe=probe) / (1 - T), wanted[key], rtol=1e-4, atol=1e-6)


# --- likelihood training


def along(parameters: list[Tensor], value: Callable[[], Tensor], h: float = 1e-3) -> tuple[list[Tensor], float]:
    """A unit direction of the parameters, and the value's derivative along it by central differences, off by O(h⁴)."""
    ways = [numbers(*p.shape, seed=i) for i, p in enumerate(parameters)]
    length = math.sqrt(sum(float(way.square().sum()) for way in ways))
    ways = [way / length for way in ways]
    found = {}
    for step in (1, -1, 2, -2):
        for p, way in zip(parameters, ways, strict=True):
            p.data += step * h * way
        with torch.no_grad():
            found[step] = value().item()
        for p, way in zip(parameters, ways, strict=True):
            p.data -= step * h * way
    return ways, (8 * (found[1] - found[-1]) - (found[2] - found[-2])) / (12 * h)


def slope_along(gradients: tuple[Tensor | None, ...], ways: list[Tensor]) -> float:
    return sum(float((g * way).sum()) for g, way in zip(gradients, ways, strict=True) if g is not None)


TRAINED = [pytest.param(name, "plain", False, id=name) for name in NETWORKS]
TRAINED += [
    pytest.param("ncsnpp", g, False, id=f"ncsnpp-{g}", marks=[pytest.mark.slow] if g != "dps" else [])
    for g in list(GUIDANCE)[1:]
]
TRAINED += [
    pytest.param(name, guidance, True, id=f"{name}-{guidance}-recomputed")
    for name, guidance in (("ncsnpp", "plain"), ("ncsn", "plain"), ("dit", "dps"))
]


@pytest.mark.parametrize(("name", "guidance", "recompute"), TRAINED)
def test_likelihood_training_has_the_gradient_of_finite_differences(name: str, guidance: str, recompute: bool) -> None:
    model, x = GUIDANCE[guidance](name, network_model(name, recompute=recompute)), states(name).requires_grad_()
    e = numbers(3, *x.shape, seed=3)
    steps = Solver("midpoint", steps=1)
    # a short way, on which one step is nearly exact; its end has a constant density, so that only the divergence counts
    flow = score_flow(model, base=lambda z: z.new_zeros(len(z)), t_min=T, solver=steps).replace(t1=T + 1e-6)
    trained = [x, *network_model(name, recompute=recompute).parameters()]
    ways, truth = along(trained, lambda: flow.log_prob(x, probe=e).mean())
    for gradient, close in (("backprop", 1e-5), ("adjoint", 1e-3)):
        loss = flow.replace(solver=replace(steps, gradient=gradient)).log_prob(x, probe=e).mean()
        found = torch.autograd.grad(loss, trained, allow_unused=True)
        assert slope_along(found, ways) == pytest.approx(truth, rel=close), gradient
