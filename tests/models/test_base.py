"""What a model answers with: every rule keeps x = alpha data + sigma noise and means what it says."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from score_sde import (
    DDIM,
    DDPM,
    SDE,
    SMLD,
    VPSDE,
    Estimate,
    LinearSDE,
    Preconditioned,
    ScoreModel,
    from_score,
    guide,
    sample,
    times,
)
from score_sde.models.closed_form import Gaussian
from score_sde.models.rules import (
    RULES,
    label_edm,
    label_log_sigma,
    label_sigma,
    label_time,
    predict_edm,
    unit_variance,
)
from score_sde.sdes import WrongShape, like
from tests.oracles import CHAINS, PURE, SDES, first_time, name, numbers

# Everything here is float64 and a handful of operations long: 1e-10 leaves room for sigma or alpha of 1e-3.
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)

ZERO = torch.zeros(3, 2, 2, dtype=torch.float64)


class Fixed(nn.Module):
    """A network that answers with a given tensor and remembers what it was asked."""

    def __init__(self, output: Tensor | None = None) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor, time: Tensor, **condition: Any) -> Tensor:
        self.x, self.label, self.condition = x, time, condition
        return x if self.output is None else self.output


def case(sde: SDE, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x0, z, t, x_t) for six times from early to late."""
    g = torch.Generator().manual_seed(seed)
    x0, z = torch.randn(2, 6, 3, 2, 2, generator=g, dtype=torch.float64)
    t = torch.tensor([0.02, 0.1, 0.3, 0.5, 0.8, first_time(sde)], dtype=torch.float64)
    return x0, z, t, sde.perturb(x0, t, z)


@pytest.mark.parametrize(
    "rule", [*RULES, "velocity", partial(predict_edm, sigma_data=0.8)], ids=[*RULES, "velocity", "edm 0.8"]
)
@pytest.mark.parametrize("sde", [*SDES, *(c.as_sde() for c in CHAINS)], ids=name)
def test_every_rule_splits_x_into_data_and_noise(sde: SDE, rule: Any) -> None:
    output, _, t, x = case(sde)
    e = Preconditioned(Fixed(output), sde, rule)(x, t)
    close(like(sde.alpha(t), x) * e.data + like(sde.sigma(t), x) * e.noise, x)


@pytest.mark.parametrize("chain", CHAINS, ids=repr)
def test_rule_mean_splits_x_into_data_and_noise(chain: DDPM | SMLD) -> None:
    sde = chain.as_sde()
    output, _, _, _ = case(sde)
    t = chain.times[torch.tensor([0, 1, 2, 2, -3, -2])]
    x = sde.perturb(output, t, output.flip(0))
    e = Preconditioned(Fixed(output), sde, "mean")(x, t)
    # Between neighbouring steps of a long chain the mean fixes the data only up to a factor of 1/(new noise): 1e-8.
    recovered = like(sde.alpha(t), x) * e.data + like(sde.sigma(t), x) * e.noise
    torch.testing.assert_close(recovered, x, rtol=1e-8, atol=1e-8 * e.data.abs().max().item())


@pytest.mark.parametrize("sde", SDES, ids=name)
def test_the_right_output_of_each_rule_gives_the_data_and_the_noise(sde: SDE) -> None:
    x0, z, t, x = case(sde)
    alpha, sigma = like(sde.alpha(t), x), like(sde.sigma(t), x)
    outputs = {"noise": z, "data": x0, "score": -z / sigma, "v": alpha * z - sigma * x0}
    moments = torch.func.jvp(lambda u: (sde.alpha(u), sde.sigma(u)), (t,), (torch.ones_like(t),))[1]  # their rates
    outputs["velocity"] = like(moments[0], x) * x0 + like(moments[1], x) * z
    for rule, output in outputs.items():
        e = Preconditioned(Fixed(output), sde, rule)(x, t)  # type: ignore[arg-type]
        torch.testing.assert_close(e.data, x0, rtol=1e-8, atol=1e-8, msg=rule)  # x / alpha(1): alpha is 6.6e-3 for VP
        torch.testing.assert_close(e.noise, z, rtol=1e-8, atol=1e-8, msg=rule)
        close(e.score, -e.noise / sigma)


@pytest.mark.parametrize(
    "rule", ["velocity", "v", "data", partial(predict_edm, sigma_data=0.8)], ids=["velocity", "v", "data", "edm 0.8"]
)
@pytest.mark.parametrize("sde", PURE, ids=name)
def test_a_network_estimates_the_data_from_pure_noise(sde: SDE, rule: Any) -> None:
    """At t = 1 noise is x, and the data are what the network makes of it."""
    x, output, one = numbers(6, 3), numbers(6, 3, seed=1), torch.ones((), dtype=torch.float64)
    e = Preconditioned(Fixed(output), sde, rule)(x, one)
    rate = {"LinearSDE": 1.0, "TrigonometricSDE": math.pi / 2}[type(sde).__name__]
    data = {"velocity": x * (rate == 1) - output, "v": -output, "data": output}
    expected = data[rule] / (rate if rule == "velocity" else 1) if isinstance(rule, str) else 0.8 * output
    torch.testing.assert_close(e.data, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(e.noise, x, rtol=1e-12, atol=1e-15)


def test_a_rule_of_the_noise_alone_says_that_it_knows_no_data_in_pure_noise() -> None:
    model = Preconditioned(Fixed(numbers(2, 3)), LinearSDE(), "noise")
    with pytest.raises(FloatingPointError, match=r"alpha = 0 there.* use rule velocity, v, data or edm"):
        sample(model, DDIM(), (2, 3), times.uniform(LinearSDE(), 4))


@pytest.mark.parametrize("chain", [DDPM.linear(20, 0.01, 0.4), SMLD([0.1, 0.5, 0.6, 2.0, 7.0])], ids=repr)
def test_rule_mean_means_the_posterior_mean_of_the_chain(chain: DDPM | SMLD) -> None:
    sde = chain.as_sde()
    x0, z, _, _ = case(sde)
    for i in range(len(chain)):
        x = chain.perturb(x0, torch.tensor(i), z)
        mean, _ = chain.posterior(x, x0, torch.tensor(i))
        e = Preconditioned(Fixed(mean), sde, "mean")(x, chain.times[len(chain) - 1 - i])
        close(e.data, x0)
        close(e.noise, z)


@pytest.mark.parametrize("sde", SDES, ids=name)
def test_edm_rule_starts_at_the_optimum_of_gaussian_data_with_a_target_of_unit_variance(sde: SDE) -> None:
    exact = Gaussian(sde, ZERO, 0.8**2)
    x0, z, t, x = case(sde)
    start = Preconditioned(Fixed(torch.zeros_like(x)), sde, partial(predict_edm, sigma_data=0.8))(x, t)
    close(start.data, exact(x, t).data)
    close(start.noise, exact(x, t).noise)
    # The target is what F must be for data = x0: linear in the independent x0 and z, so its variance is read off.
    _, (lift, gain) = predict_edm(sde.alpha(t), sde.sigma(t), sigma_data=0.8)
    of_x0, of_z = -lift * sde.alpha(t) / gain, (1 - lift * sde.sigma(t)) / gain
    close((0.8 * of_x0) ** 2 + of_z**2, torch.ones_like(t))


@pytest.mark.parametrize("rule", [*RULES, "velocity"])
def test_a_scalar_time_is_the_time_of_every_example(rule: Any) -> None:
    output, _, _, x = case(VPSDE())
    network = Fixed(output)
    model = Preconditioned(network, VPSDE(), rule, label=label_log_sigma, scale=unit_variance)
    t = torch.tensor(0.3, dtype=torch.float64)
    one = model(x, t)
    assert network.label.shape == (6,)
    every = model(x, t.expand(6))
    close(one.data, every.data)
    close(one.noise, every.noise)
    close(one.score, every.score)


def test_the_network_is_told_the_label_and_sees_the_scaled_state() -> None:
    _, _, t, x = case(VPSDE())
    alpha, sigma = VPSDE().alpha(t), VPSDE().sigma(t)
    network = Fixed()
    Preconditioned(network, VPSDE())(x, t)
    assert network.x is x
    close(network.label, 999 * t)
    Preconditioned(network, VPSDE(), label=label_sigma, scale=partial(unit_variance, sigma_data=0.8))(x, t)
    close(network.label, sigma / alpha)
    close(network.x, x / like((alpha**2 * 0.64 + sigma**2).sqrt(), x))
    Preconditioned(network, VPSDE(), label=lambda alpha, sigma, t: (1000 * t).long() - 1)(x.float(), t)
    assert network.label.tolist() == [19, 99, 299, 499, 799, 999] and network.label.dtype == torch.int64
    Preconditioned(network, VPSDE())(x.float(), t)
    assert network.label.dtype == torch.float32


def test_a_network_in_half_precision_answers_in_the_states_precision() -> None:
    _, _, t, x = case(VPSDE())
    e = Preconditioned(Fixed(torch.ones_like(x, dtype=torch.bfloat16)), VPSDE())(x.float(), t)
    assert e.data.dtype == e.noise.dtype == torch.float32


@pytest.mark.parametrize("sde", SDES, ids=name)
def test_a_lifted_score_is_the_score_and_splits_x(sde: SDE) -> None:
    _, _, t, x = case(sde)
    model = from_score(sde, lambda x, t, shift=0.0: torch.tanh(x) + shift)
    for u in (t, t[2]):
        e = model(x, u)
        close(e.score, torch.tanh(x))
        close(model.score(x, u), torch.tanh(x))
        close(like(sde.alpha(u), x) * e.data + like(sde.sigma(u), x) * e.noise, x)
    close(model.given(shift=1.0).score(x, t), torch.tanh(x) + 1)


def test_a_lifted_module_brings_its_parameters_along() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.layer(x)

    model = from_score(VPSDE(), Linear())
    assert len(list(model.parameters())) == 2
    model(torch.randn(4, 2), torch.full((4,), 0.5)).data.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_conditions_are_bound_once_and_added_to() -> None:
    _, _, t, x = case(VPSDE())
    network = Fixed()
    model = Preconditioned(network, VPSDE())
    model.given(label=3).given(low=x).score(x, t)
    assert network.condition == {"label": 3, "low": x}
    model.given(label=3)(x, t, label=4)
    assert network.condition == {"label": 4}
    assert model.given(label=3).sde == model.sde


def test_guidance_is_a_line_through_two_models() -> None:
    _, _, t, x = case(VPSDE())
    a, b = Gaussian(VPSDE(), ZERO + 1, 0.5), Gaussian(VPSDE(), ZERO, 2.0)
    for scale, expected in ((0.0, b), (1.0, a)):
        close(guide(a, b, scale)(x, t).data, expected(x, t).data)
    # Ho & Salimans' w is scale - 1: (1 + w) of the one minus w of the other, in the score as in every view.
    close(guide(a, b, 3.0).score(x, t), 3 * a.score(x, t) - 2 * b.score(x, t))
    e = guide(a, b, 3.0)(x, t)
    close(like(VPSDE().alpha(t), x) * e.data + like(VPSDE().sigma(t), x) * e.noise, x)
    with pytest.raises(ValueError, match="one SDE"):
        guide(a, Gaussian(SDES[1], ZERO, 2.0), 1.0)


def test_a_user_defined_model_needs_only_forward() -> None:
    class Zero(ScoreModel):
        def forward(self, x: Tensor, t: Tensor) -> Estimate:  # type: ignore[override]
            sigma = like(self.sde.sigma(t), x)
            return Estimate(torch.zeros_like(x), x / sigma, sigma)

    x, t = ZERO + 2, torch.tensor(0.5, dtype=torch.float64)
    close(Zero(VPSDE()).score(x, t), -x / VPSDE().sigma(t) ** 2)


def test_errors_name_the_thing_and_the_remedy() -> None:
    _, _, t, x = case(VPSDE())
    with pytest.raises(ValueError, match="unknown rule 'eps'; use one of noise"):
        Preconditioned(Fixed(), VPSDE(), "eps")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"returned shape \(6, 3\) for an input of shape \(6, 3, 2, 2\)"):
        Preconditioned(Fixed(torch.zeros(6, 3)), VPSDE())(x, t)
    with pytest.raises(ValueError, match="t must have shape"):
        Preconditioned(Fixed(), VPSDE())(x, t[:4])
    with pytest.raises(ValueError, match='rule "mean" needs the SDE of a chain'):
        Preconditioned(Fixed(), VPSDE(), "mean")(x, t)


def test_label_time_is_the_published_label() -> None:
    t = torch.tensor([0.0, 0.5, 1.0])
    assert label_time(t, t, t).tolist() == [0.0, 499.5, 999.0]


def test_labels_are_their_formulas_of_the_noise_level() -> None:
    """Of sigma/alpha = 4: 4 itself, 4 log 4, and EDM's log(4)/4."""
    alpha, sigma, t = (torch.tensor(v, dtype=torch.float64) for v in (0.2, 0.8, 0.3))
    found = {label: label(alpha, sigma, t).item() for label in (label_sigma, label_log_sigma, label_edm)}
    wanted = {label_sigma: 4.0, label_log_sigma: 4 * math.log(4), label_edm: math.log(4) / 4}
    assert found == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("half", ["data", "noise"])
def test_an_estimate_of_which_one_half_has_another_shape_is_refused(half: str) -> None:
    class Halved(ScoreModel):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> Estimate:
            return Estimate(x, x, torch.ones(()))._replace(**{half: x[:, :1]})

    with pytest.raises(WrongShape, match=rf"Halved returned {half} of shape \(3, 1\) for a state of shape \(3, 2\)"):
        Halved(VPSDE())(torch.zeros(3, 2), torch.tensor(0.5))
