"""Derivatives of derivatives beside finite differences.

Divergences of every network with every guidance and probe, training by likelihood, walks of every sampler, and the
steps of a backward pass that several products may take together.
"""

import copy
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _pytest.mark import ParameterSet
from ml_collections import ConfigDict
from torch import Tensor, nn

from score_sde import (
    SDE,
    VPSDE,
    Energy,
    LearnedVPSDE,
    LinearSDE,
    MonotoneSchedule,
    Preconditioned,
    ScoreModel,
    Solver,
    classifier,
    dps,
    explicit,
    guide,
    moment_matching,
    pigdm,
    samplers,
    score_flow,
)
from score_sde.config import default_config
from score_sde.config.build import NETWORKS, build_classifier, build_model
from score_sde.inverse import Dense, Observation, Projected
from score_sde.likelihood.flows import ProbabilityFlow
from score_sde.models import traces
from score_sde.models.base import of_examples
from score_sde.models.rules import label_edm
from score_sde.networks import EDM2, DiT
from score_sde.networks.layers import layer_norm, recomputed
from score_sde.samplers import (
    DDIM,
    AdaptiveODE,
    AdaptiveSDE,
    Ancestral,
    AnnealedLangevin,
    Balanced,
    Churn,
    DPMSolver,
    EmbeddedODE,
    Heun,
    Langevin,
    Multistep,
    PredictorCorrector,
    Sampler,
    UniPC,
)
from score_sde.samplers.adaptive import improved_euler
from score_sde.samplers.langevin import langevin_walk
from tests.oracles import SAMPLERS as ROWS
from tests.oracles import name as name_of
from tests.oracles import numbers

IMAGES, VECTORS, CLASSES, T = (1, 2, 4), (5,), 3, 0.4
MODERN: dict[str, Any] = {"norm": "rms", "feed_forward": "swiglu", "positions": "rotary", "qk_norm": True}
EXTRA = {
    "ddpm": {"nf": 32, "ch_mult": (1, 2), "resblock_type": "ddpm"},
    "ncsnpp": {"fir": True, "progressive": "output_skip", "progressive_input": "residual"},
    "adm": {"scale_shift": True},
    "edm2": {},
    "dit": {"hidden": 8, "depth": 1, "num_heads": 2},
    "modern dit": {"name": "dit", "hidden": 8, "depth": 1, "num_heads": 2, **MODERN},
    "ncsn": {"ch_mult": (1, 1, 1), "num_scales": 10, "label": "index"},
    "ncsnv2": {"ch_mult": (1, 1, 1)},
    "mlp": {"hidden": 8, "depth": 2},
}
assert NETWORKS.keys() <= EXTRA.keys()


def shape_of(name: str) -> tuple[int, ...]:
    return VECTORS if name == "mlp" else IMAGES


def config_of(name: str, seed: int, recompute: bool = False) -> ConfigDict:
    config = default_config()
    config.seed, config.training.checkpoint_activations = seed, recompute
    config.model.update(
        {"name": name, "nf": 8, "ch_mult": (1, 1), "num_res_blocks": 1, "attn_resolutions": (2,), "dropout": 0.0}
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


def observed(name: str) -> Observation:
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


def cell(*values: object, slow: bool) -> ParameterSet:
    """A case, and whether it is another of a kind that is tested anyway."""
    return pytest.param(*values, id="-".join(map(str, values)), marks=[pytest.mark.slow] if slow else [])


FEW = ("ncsnpp", "edm2", "dit", "mlp")
DIVERGENCES = [  # each guidance by the cheap networks, and the dearest derivatives by every network
    cell(name, guidance, slow=name not in ("dit", "mlp") and guidance != "dps")
    for name, guidance in itertools.product(EXTRA, GUIDANCE)
]


@pytest.mark.parametrize(("name", "guidance"), DIVERGENCES)
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


TRAINED = [
    *(cell(name, "plain", "kept", slow=name not in FEW) for name in EXTRA),
    *(cell("ncsnpp", guidance, "kept", slow=True) for guidance in list(GUIDANCE)[1:]),
    *(cell(name, guidance, "kept", slow=True) for name, guidance in (("ncsn", "dps"), ("dit", "moment_matching"))),
    *(cell(name, "plain", "recomputed", slow=True) for name in ("ncsnpp", "ncsn")),
    cell("dit", "dps", "recomputed", slow=False),
    cell("modern dit", "dps", "kept", slow=False),
]


@pytest.mark.parametrize(("name", "guidance", "activations"), TRAINED)
def test_likelihood_training_has_the_gradient_of_finite_differences(name: str, guidance: str, activations: str) -> None:
    recompute = activations == "recomputed"
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


# --- samplers


class Bare(nn.Module):
    """A network of three numbers that is given the state itself, so that its gradient needs what a sampler holds."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.first, self.time, self.last = nn.Linear(3, 8), nn.Linear(1, 8), nn.Linear(8, outputs)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x) + self.time(label[:, None])))


def bare(sde: SDE, learned_variance: bool = False) -> ScoreModel:
    network = awake(Bare(3 + 3 * learned_variance))
    return Preconditioned(network, sde, label=label_edm, learned_variance=learned_variance)


OBSERVED = Observation(Dense(numbers(1, 3, seed=3), (3,)), numbers(2, 1, seed=4), 0.1)


def smooth(sampler: Sampler) -> Sampler:
    """One whose steps do not decide by the numbers: as tight as differences show, or without a choice of steps."""
    if isinstance(sampler, AdaptiveSDE):
        return AdaptiveSDE(rtol=1e3, atol=1e3, first=1.0)  # which takes the grid's steps
    if isinstance(sampler, AdaptiveODE):
        return AdaptiveODE(1e-8, 1e-8, "dopri8")
    return EmbeddedODE(1e-8, 1e-8) if isinstance(sampler, EmbeddedODE) else sampler


SAMPLERS: list[Sampler] = [
    *(smooth(row.sampler) for row in ROWS if row.main or not isinstance(row.sampler, (Multistep, UniPC))),
    Ancestral("learned"), Langevin(steps=2, norm="batch"), PredictorCorrector(Ancestral(), AnnealedLangevin()),
    Multistep(3, "both"), UniPC(3), UniPC(2, "b1", "both", "lower"),
    Projected(DDIM(1.0), OBSERVED, jump=2, resamplings=2), Projected(PredictorCorrector(), OBSERVED),
]  # fmt: skip
GRID = torch.tensor([1.0, 0.7, 0.4, 0.15, 0.02], dtype=torch.float64)


def end_of(sampler: Sampler, model: ScoreModel, x: Tensor, grid: Tensor = GRID) -> Tensor:
    """A number made of the walk's end, with the same noise each time; a solver of its own steps takes a shorter way."""
    grid = grid[[1, -2]] if isinstance(sampler, (AdaptiveODE, EmbeddedODE)) else grid
    generator = torch.Generator().manual_seed(0)
    *_, end = sampler.walk(model, x, grid, lambda like: torch.randn(like.shape, generator=generator).to(like))
    return (end * numbers(*x.shape, seed=9)).sum()


def test_every_sampler_is_among_those_whose_gradient_is_tested() -> None:
    named = {value for value in vars(samplers).values() if isinstance(value, type) and issubclass(value, Sampler)}
    assert named - {Sampler} <= {type(sampler) for sampler in SAMPLERS}


def written(sampler: Sampler) -> str:
    """A test's id: the settings, without where an operator lies in memory, which differs between processes."""
    return re.sub(r" object at 0x\w+", "", repr(sampler))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=written)
def test_walks_have_the_gradient_of_finite_differences(sampler: Sampler) -> None:
    model, x = bare(VPSDE(), "learned" in repr(sampler)), numbers(2, 3).requires_grad_()
    trained = [x, *model.parameters()]
    ways, truth = along(trained, lambda: end_of(sampler, model, x))
    found = torch.autograd.grad(end_of(sampler, model, x), trained)
    assert slope_along(found, ways) == pytest.approx(truth, rel=1e-4)  # of adaptive ones to their tolerance


@pytest.mark.parametrize("sampler", [DDIM(), Heun(), Multistep(3), smooth(AdaptiveSDE())], ids=written)
def test_walks_from_pure_noise_have_a_gradient_too(sampler: Sampler) -> None:
    model = Preconditioned(awake(Bare()), LinearSDE(), "velocity", label=lambda alpha, sigma, t: t)
    x, grid = numbers(2, 3).requires_grad_(), torch.tensor([1.0, 0.8, 0.4, 0.1], dtype=torch.float64)
    trained = [x, *model.parameters()]
    ways, truth = along(trained, lambda: end_of(sampler, model, x, grid))
    found = torch.autograd.grad(end_of(sampler, model, x, grid), trained)
    assert slope_along(found, ways) == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=written)
def test_walks_have_a_learned_schedules_gradient_or_say_that_they_have_none(sampler: Sampler) -> None:
    torch.manual_seed(0)  # the shape's first units are drawn
    schedule = MonotoneSchedule(-6.0, 4.0, learn_ends=True, units=8).double()
    model = bare(LearnedVPSDE(schedule=schedule, t_min=0.01), "learned" in repr(sampler))
    x = numbers(2, 3)
    if isinstance(sampler, (Balanced, DPMSolver, Multistep, UniPC, EmbeddedODE)) or (
        isinstance(sampler, Churn) and sampler.churn > 0
    ):
        with pytest.raises(ValueError, match="gives no gradient to a learned schedule: hold the schedule constant"):
            end_of(sampler, model, x)
        schedule.requires_grad_(False)
        return
    ways, truth = along([schedule.ends], lambda: end_of(sampler, model, x), 1e-2)
    found = torch.autograd.grad(end_of(sampler, model, x), [schedule.ends])
    assert slope_along(found, ways) == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize("sampler", [Churn(), UniPC()], ids=name_of)
def test_walks_of_guided_images_have_the_gradient_of_finite_differences(sampler: Sampler) -> None:
    model, x = GUIDANCE["dps"]("ncsnpp", network_model("ncsnpp")), states("ncsnpp").requires_grad_()
    grid = torch.tensor([0.6, 0.4, 0.3], dtype=torch.float64)
    ways, truth = along([x], lambda: end_of(sampler, model, x, grid), 1e-4)
    found = torch.autograd.grad(end_of(sampler, model, x, grid), [x])
    assert slope_along(found, ways) == pytest.approx(truth, rel=1e-4)


def test_a_gradient_through_adaptive_steps_holds_them_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the steps that were taken, taken again."""
    model, x, steps = bare(VPSDE()), numbers(1, 3).requires_grad_(), list[tuple[Tensor, Tensor, Tensor]]()

    def recorded(model: ScoreModel, x: Tensor, t: Tensor, s: Tensor, dw: Tensor) -> tuple[Tensor, Tensor]:
        steps.append((t, s, dw))
        return improved_euler(model, x, t, s, dw)

    monkeypatch.setattr("score_sde.samplers.adaptive.improved_euler", recorded)
    (found,) = torch.autograd.grad(end_of(AdaptiveSDE(0.1, 0.1), model, x), x)
    taken = [steps[i] for i in range(len(steps)) if i + 1 == len(steps) or bool(steps[i + 1][0] == steps[i][1])]
    assert 5 < len(taken) < len(steps) and not any(number.requires_grad for step in steps for number in step)

    def again() -> Tensor:
        y = x
        for t, s, dw in taken:
            y = improved_euler(model, y, t, s, dw)[1]
        return (y * numbers(*x.shape, seed=9)).sum()

    ways, truth = along([x], again)
    assert slope_along((found,), ways) == pytest.approx(truth, rel=1e-6)


def test_what_gives_no_gradient_says_so() -> None:
    model, x = bare(VPSDE()), numbers(2, 3)
    with pytest.raises(ValueError, match="RK45 is scipy's and has no gradient"):
        end_of(AdaptiveODE(method="RK45"), model, x)  # whose parameters ask for one
    with torch.no_grad():
        assert end_of(AdaptiveODE(method="RK45"), model, x).isfinite()
    walk = langevin_walk(model, x.requires_grad_(), 0.01, lambda like: torch.zeros_like(like), t=0.5)
    assert not next(walk)[0].requires_grad


# --- products


def norms(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1).sqrt()


STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "arithmetic": lambda x: (x.abs() + 2) / (3 - x * 0.5) - 1 / (x * x + 1) + (1.5 - x).reciprocal() * -x,
    "functions": lambda x: x.sin() * x.cos() + x.exp().log1p() + x.expm1() + (x * x + 1).log() + x.tanh() + x.sigmoid(),
    "powers": lambda x: (x * x + 1).sqrt() + (x * x + 1).rsqrt() + x**3,
    "activations": lambda x: F.silu(x) + F.softplus(x) + F.gelu(x) + F.elu(x) + F.relu(x) + F.leaky_relu(x, 0.2),
    "bounds": lambda x: x.clamp(-0.5, 0.5) + x.clamp(-x * x, x * x + 1) + x.clamp_min(0.1) + x.clamp_min(-x.detach())
    + torch.maximum(x, 1 - x) * torch.minimum(x, x * x),
    "choices": lambda x: torch.where(x > 0, x * x, x).masked_fill(x > 1, 0.0) + x[:, [1, 0, 2]] + x[:, :1],
    "sums": lambda x: x * x.sum() + x * (x * x).sum(1, keepdim=True) + x * x.mean() + x.mean(1, keepdim=True) ** 2,
    "shapes": lambda x: torch.cat([x[:, 1:], x[:, 0, None]], 1) + torch.stack(x.unbind(1), 1).flip(1)
    + F.pad(x[:, :2], (1, 0)) + x.unsqueeze(0).expand(2, *x.shape).sum(0) + torch.cat(x.split(2, 1)[::-1], 1)
    + x.T.reshape(-1).view(x.shape[::-1]).permute(1, 0).clone().unsqueeze(2).squeeze(2) * x.transpose(0, 1).T
    + (x * x)[::2].reshape(-1, 3)[:1],
    "products": lambda x: torch.addmm(x, x, MIX) @ MIX + F.linear(x, x[:1] * MIX, MIX[0]) + (x[:, None] @ MIX)[:, 0] * x
    + torch.bmm(x[:, None], MIX.expand(len(x), 3, 3))[:, 0],
    "means": lambda x: torch.addcmul(x, x, x.exp()) + torch.lerp(x, x * x, x.sigmoid()) + torch.lerp(x, x * x, 0.3),
    "softmaxes": lambda x: x.softmax(1) + x.log_softmax(1) + x.logsumexp(1)[:, None] * norms(x),
    "types": lambda x: (x * x).float().double() + x,
}  # fmt: skip
MIX = numbers(3, 3, seed=8)


def gradient_of(h: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What a guided model holds: a gradient of h, which has one too."""
    return lambda x: torch.autograd.grad((h(x) * 0.7).sin().sum(), x, create_graph=True)[0]


def test_every_step_that_products_take_together_is_right() -> None:
    """Values and gradients, of functions and of their gradients, in several shapes; no other step is trusted."""
    seen: set[str] = set()
    for (what, h), inner, (batch, k) in itertools.product(STEPS.items(), (False, True), ((3, 3), (2, 4))):
        function = gradient_of(h) if inner else h
        weight = numbers(3, 3, seed=4).requires_grad_()
        x, e = 0.8 * numbers(batch, 3, seed=5), numbers(k, batch, 3, seed=6)
        found: list[list[Tensor]] = [[], []]
        for graph, own in itertools.product((False, True), found):
            y = x.clone().requires_grad_()
            value = function(y @ weight)
            take = partial(torch.autograd.grad, value, y, create_graph=graph, retain_graph=True)
            product = take(e, is_grads_batched=True)[0] if own is found[0] else torch.stack([take(v)[0] for v in e])
            own += [product, *(torch.autograd.grad((product * e).sin().sum(), (y, weight)) if graph else ())]
        seen |= set(traces._steps(value, y))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12, msg=f"{what} {inner} {batch}")
    assert seen >= traces.ELEMENTARY - {"_StitchGradientBackward"}, traces.ELEMENTARY - seen


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize(
    "shape, groups", [((4, 16, 2, 2), 4), ((2, 8, 2, 2), 4), ((1, 16, 4, 4), 1), ((2, 4, 3, 2), 2)]
)
def test_group_norms_are_differentiated_right(shape: tuple[int, ...], groups: int, layout: torch.memory_format) -> None:
    """Of a function and of its gradient. Batched, the second is wrong in these shapes, without a word."""
    x = numbers(*shape).contiguous(memory_format=layout)
    e, direction, h = numbers(3, *shape, seed=1), numbers(*shape, seed=2), 1e-4
    normed = lambda x: torch.tanh(F.group_norm(x, groups, eps=1e-2))
    for function in (normed, gradient_of(normed)):
        value, y, graph = traces.differentiable(function, x, "a gradient")
        forms = traces.quadratic_forms(value, y, e, graph)
        for form, v in zip(forms, e, strict=True):
            ends = [function((x + step * v).requires_grad_()) for step in (h, -h, 2 * h, -2 * h)]
            slope = (8 * (ends[0] - ends[1]) - (ends[2] - ends[3])) / (12 * h)
            torch.testing.assert_close(form, (slope * v).flatten(1).sum(1), rtol=1e-5, atol=1e-7)
        (found,) = torch.autograd.grad(forms.sum(), y)

        def total(x: Tensor, function: Callable[[Tensor], Tensor] = function) -> float:
            value, y, graph = traces.differentiable(function, x, "a gradient")
            return traces.quadratic_forms(value, y, e, graph).sum().item()

        ends = [total(x + step * direction) for step in (h, -h, 2 * h, -2 * h)]
        slope = (8 * (ends[0] - ends[1]) - (ends[2] - ends[3])) / (12 * h)
        assert float((found * direction).sum()) == pytest.approx(slope, rel=1e-4)


NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer": lambda x: F.layer_norm(x, x.shape[2:]),
    "batch": lambda x: F.batch_norm(x, None, None, training=True),
    "instance": F.instance_norm,
}


@pytest.mark.parametrize("name", NORMS)
def test_third_derivatives_that_torch_has_wrong_are_refused(name: str) -> None:
    x, e, needed = numbers(2, 3, 4), numbers(2, 2, 3, 4, seed=1), "a gradient"
    plain = lambda x: torch.tanh(NORMS[name](x))
    value, y, graph = traces.differentiable(plain, x, needed)  # the second is right
    traces.quadratic_forms(value, y, e, graph).sum().backward()
    with torch.no_grad():  # of a gradient, too
        traces.quadratic_forms(*traces.differentiable(gradient_of(plain), x, needed)[:2], e, False)
    with pytest.raises(ValueError, match="takes third derivatives, and those of torch's layer, batch and instance"):
        traces.differentiable(gradient_of(plain), x, needed)


def test_an_energy_with_attention_trains() -> None:
    network = awake(build_classifier(config_of("ncsnpp", 7), IMAGES))
    energy = Energy(lambda x, t: network.network(x, t.expand(len(x)))[:, 0])
    x, t = states("ncsnpp"), torch.tensor(T, dtype=torch.float64)
    value = lambda: explicit(energy, lambda x, t: -x, x, t).sum()
    trained = list(network.parameters())
    ways, truth = along(trained, value)
    found = torch.autograd.grad(value(), trained, allow_unused=True)
    assert slope_along(found, ways) == pytest.approx(truth, rel=1e-5)


def test_looking_for_plain_operations_does_not_break_a_compiled_graph() -> None:
    def layer(x: Tensor) -> Tensor:
        return recomputed(lambda y: layer_norm(torch.tanh(y), (3,)), x)

    x = numbers(2, 3).requires_grad_()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("options", [{}, MODERN], ids=["published", "modern"])
def test_a_transformer_s_compiled_graph_has_no_breaks(recompute: bool, options: dict[str, Any]) -> None:
    network = awake(DiT(1, width=8, depth=1, heads=2, checkpoint_activations=recompute, **options))
    x, label = states("dit"), torch.tensor([0.3, 0.7], dtype=torch.float64)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, label), network(x, label), rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["evaluated", "trained"])
def test_edm2_s_compiled_graph_has_no_breaks(training: bool) -> None:
    """In training it sets its own weights."""
    network = awake(EDM2(1, width=8, multipliers=(1, 2), blocks=1, attention=(2,), head_channels=8)).train(training)
    other, x, label = copy.deepcopy(network), states("edm2"), torch.tensor([0.3, 0.7], dtype=torch.float64)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    for found, expected in ((compiled(x, label), other(x, label)), (compiled(x, label), other(x, label))):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        found.square().sum().backward(), expected.square().sum().backward()
    for p, q in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close((p, p.grad), (q, q.grad), rtol=1e-10, atol=1e-12)
