"""Guidance against closed forms: labelled mixtures, whose conditional scores and classifier are known exactly."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from score_sde import VESDE, CosineSDE, classifier, from_score, guide, log_likelihood, sample, times
from score_sde.config.objective import CrossEntropy
from score_sde.models.base import of_examples
from score_sde.models.classifier import NoisyClassifier
from score_sde.models.closed_form import Gaussian, Mixture
from score_sde.models.guidance import both, gradient
from score_sde.models.rules import Preconditioned
from score_sde.networks import MLP, Encoder, UNet
from score_sde.noise import noise_source
from score_sde.samplers import AdaptiveSDE, Ancestral, EmbeddedODE, Heun, Sampler
from tests.oracles import MIXTURE, T, awake, points, posterior

SDE = MIXTURE.sde
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
SCALES = torch.tensor([0.0, 1.0, 2.5, 0.7], dtype=torch.float64)


@pytest.mark.parametrize("label", [1, torch.tensor([2, 0, 1, 2])])
@pytest.mark.parametrize("t", [T, torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64)])
def test_by_the_exact_classifier_the_score_is_bayes_rule(label: Any, t: Tensor) -> None:
    x, told = points(), MIXTURE.given(label=label)
    for scale in (0.0, 1.0, 2.5, SCALES):
        found, s = classifier(MIXTURE, posterior, scale, label=label)(x, t), torch.as_tensor(scale).reshape(-1, 1)
        for name in ("data", "noise", "score"):
            whole, one = getattr(MIXTURE(x, t), name), getattr(told(x, t), name)
            torch.testing.assert_close(getattr(found, name), whole + s * (one - whole), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["free", "classifier"])
def test_scale_0_gives_all_and_scale_1_the_class(kind: str, scale: float) -> None:
    """The same samples as of the model that is known, to rounding."""
    label, grid = torch.arange(64) % 3, times.log_snr(SDE, 10)
    told = MIXTURE.given(label=label)
    guided = guide(told, MIXTURE, scale) if kind == "free" else classifier(MIXTURE, posterior, scale, label=label)
    wanted = told if scale else MIXTURE
    for sampler in (Heun(), Ancestral()):
        x, y = (sample(m, sampler, (64, 2), grid, dtype=torch.float64) for m in (guided, wanted))
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["free", "classifier"])
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_at_t_0_the_guided_score_is_that_of_the_tilted_density(kind: str, scale: float) -> None:
    x = MIXTURE.sample(200, torch.Generator().manual_seed(2))[0]
    tilted = gradient(lambda x, t: MIXTURE.log_prob(x) + scale * posterior(x, None, 1), x, T).detach()
    errors = []
    for t in (1e-4, 1e-5):
        now = torch.tensor(t, dtype=torch.float64)
        free = guide(MIXTURE.given(label=1), MIXTURE, scale)
        model = free if kind == "free" else classifier(MIXTURE, posterior, scale, label=1)
        errors.append(float((model.score(x, now).detach() - tilted).abs().max() / tilted.abs().max()))
    assert errors[1] < 1e-3 and errors[1] < 0.2 * errors[0]


def test_with_noise_it_is_another_one() -> None:
    """In one dimension, by quadrature: p(x) p(y|x)^3 with noise has not the guided score; p(x) p(y|x) has."""
    one = Mixture(SDE, [0.4, 0.6], torch.tensor([[-0.6], [0.5]]), [0.2, 0.3])
    x0, x = torch.linspace(-6, 6, 4001, dtype=torch.float64)[:, None], torch.linspace(-2, 2, 9, dtype=torch.float64)
    alpha, sigma = SDE.alpha(T), SDE.sigma(T)
    off = {}
    for scale in (1.0, 3.0):
        log_weight = one.log_prob(x0) + scale * posterior(x0, None, 1, of=one)
        y = x.clone().requires_grad_()
        density = torch.logsumexp(log_weight - 0.5 * ((y[:, None] - alpha * x0[:, 0]) / sigma) ** 2, 1)
        (truth,) = torch.autograd.grad(density.sum(), y)
        found = guide(one.given(label=1), one, scale).score(x[:, None], T)[:, 0]
        off[scale] = float((found - truth).abs().max())
    assert off[1.0] < 1e-8 and off[3.0] > 0.1


def test_a_likelihood_takes_the_classifier_s_second_derivatives() -> None:
    x = points()
    settings: dict[str, Any] = {"probe": "exact", "rtol": 1e-6, "atol": 1e-6}
    for method in ("embedded", "dopri5"):
        settings["prior_log_prob"] = lambda x: MIXTURE.log_prob(x, torch.ones(()), label=2)
        wanted = log_likelihood(MIXTURE.given(label=2), x, method=method, **settings).log_prob
        found = log_likelihood(classifier(MIXTURE, posterior, label=2), x, method=method, **settings).log_prob
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        torch.testing.assert_close(found, MIXTURE.log_prob(x, torch.tensor(1e-5), label=2), rtol=0, atol=3e-4)


def test_a_gradient_has_a_gradient_where_one_is_wanted() -> None:
    x, cube = points().requires_grad_(), lambda x, t: x.pow(3).sum(1)
    with torch.no_grad():
        assert not gradient(cube, x, T).requires_grad
    found = gradient(cube, x, T)
    torch.testing.assert_close(found, 3 * x**2)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x)[0], 6 * x)


def test_a_network_with_attention_has_the_classifier_s_second_derivatives() -> None:
    """Fused kernels of attention have none: what a likelihood asks of U-Nets, against differences."""
    size = dict(width=8, multipliers=(1, 2), blocks=1, attention=(4,), image_size=8)
    network, judge = awake(UNet(1, **size)), awake(Encoder(1, 3, **size))
    model = Preconditioned(network.double().eval(), SDE, "noise")
    guided = classifier(model, NoisyClassifier(judge.double().eval(), SDE, classes=3), 2.0, label=1)
    g = torch.Generator().manual_seed(0)
    x, v, w = torch.randn(3, 2, 1, 8, 8, generator=g, dtype=torch.float64)
    y = x.clone().requires_grad_()
    slopes = [torch.autograd.grad((w * m(y, T).noise).sum(), y)[0].mul(v).sum() for m in (guided, model)]
    with torch.no_grad():
        differences = [
            (w * (m(x + 1e-5 * v, T).noise - m(x - 1e-5 * v, T).noise)).sum() / 2e-5 for m in (guided, model)
        ]
    torch.testing.assert_close(torch.stack(slopes), torch.stack(differences), rtol=1e-6, atol=1e-6)
    assert abs(float(slopes[0] - slopes[1])) > 1e-3  # the classifier's part of it


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_rescaling_brings_the_deviation_back(rescale: float) -> None:
    """Lin et al. 2023, section 3.4, in numpy."""
    shape = (3, 4, 4)
    a, b = (torch.randn(5, *shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1))
    model, reference = (from_score(SDE, lambda x, t, v=v: v[: len(x)]) for v in (a, b))
    x, t = torch.randn(5, *shape, dtype=torch.float64), torch.linspace(0.3, 0.9, 5, dtype=torch.float64)
    found = guide(model, reference, 4.0, rescale=rescale)(x, t)
    positive, negative = (m(x, t).data.numpy() for m in (model, reference))
    guided = negative + 4 * (positive - negative)
    sizes = [np.array([v.std() for v in values]).reshape(-1, 1, 1, 1) for values in (positive, guided)]
    assert float(np.abs(sizes[0] / sizes[1] - 1).min()) > 0.1
    wanted = rescale * guided * sizes[0] / sizes[1] + (1 - rescale) * guided
    torch.testing.assert_close(found.data, torch.from_numpy(wanted))
    alpha, sigma = SDE.alpha(t).reshape(-1, 1, 1, 1), SDE.sigma(t).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(alpha * found.data + sigma * found.noise, x)
    if rescale == 1:
        torch.testing.assert_close(found.data.flatten(1).std(1), model(x, t).data.flatten(1).std(1))


def test_a_single_dimension_has_no_contrast_to_bring_back() -> None:
    one = Mixture(SDE, [0.4, 0.6], torch.tensor([[-0.6], [0.5]]), [0.2, 0.3])
    x = points()[:, :1]
    plain, rescaled = (guide(one.given(label=1), one, 3.0, rescale=r)(x, T) for r in (0.0, 1.0))
    torch.testing.assert_close(rescaled.data, plain.data)


def test_autoguidance_of_gaussians_is_a_gaussian() -> None:
    """Precisions go along the line: of N(0, v) against a blurred N(0, w) by scale s it is s/v_t + (1 - s)/w_t."""
    good, weak = Gaussian(SDE, [0.0, 0.0], 0.25), Gaussian(SDE, [0.0, 0.0], 0.64)
    guided, s = guide(good, weak, 2.0), 2.0
    grid = times.log_snr(SDE, 100)
    x = sample(guided, Heun(), (3, 2), grid, dtype=torch.float64)
    # d log x/dt = f + g²/2 precision, by the trapezoid rule on a fine grid: the flow is linear
    t = torch.linspace(1, SDE.t_min, 200_001, dtype=torch.float64)
    a, v = SDE.alpha(t), SDE.sigma(t) ** 2
    precision = s / (a**2 * 0.25 + v) + (1 - s) / (a**2 * 0.64 + v)
    rate = SDE.f(t) + SDE.g(t) ** 2 / 2 * precision
    factor = torch.exp(torch.trapezoid(rate, t))
    first = SDE.prior((3, 2), noise_source((3, 2), 0, 0, torch.float64, torch.device("cpu")))
    torch.testing.assert_close(x, factor * first, rtol=4e-3, atol=1e-6)
    assert float(factor) < 0.45  # narrower than the data, of deviation 0.5


KINDS = {
    "free": lambda label, scale: guide(MIXTURE.given(label=label), MIXTURE.given(label=None), scale),
    "auto": lambda label, scale: guide(
        MIXTURE.given(label=label), Mixture(SDE, [1.0], torch.zeros(1, 2), [1.5]), scale, rescale=0.5
    ),
    "classifier": lambda label, scale: classifier(MIXTURE, posterior, scale, label=label),
    "nested": lambda label, scale: guide(
        classifier(MIXTURE, posterior, scale, label=label).given(label=label), MIXTURE, scale
    ),
}


@pytest.mark.parametrize(
    ("kind", "sampler"),
    [*((kind, s) for kind in KINDS for s in (EmbeddedODE(1e-3, 1e-3), Heun())), ("nested", AdaptiveSDE(0.2, 0.2))],
)
def test_a_scale_goes_with_its_example(kind: str, sampler: Sampler) -> None:
    label, make = torch.tensor([0, 2, 1, 0]), KINDS[kind]
    grid = times.log_snr(SDE, 8) if sampler == Heun() else torch.tensor([1.0, 0.02], dtype=torch.float64)
    together = sample(make(label, SCALES), sampler, (4, 2), grid, dtype=torch.float64)
    for i in (1, 2):
        alone = make(int(label[i]), float(SCALES[i]))
        one = sample(alone, sampler, (1, 2), grid, first=i, dtype=torch.float64)
        torch.testing.assert_close(together[i : i + 1], one, rtol=1e-5, atol=1e-5)


def test_of_some_examples_their_scales_are_taken() -> None:
    inner = guide(MIXTURE.given(label=torch.tensor([0, 2, 1, 0])), MIXTURE, SCALES)
    model = classifier(inner, posterior, -SCALES, label=1)
    with of_examples(model, torch.tensor([1, 3]), 4):
        assert model.condition["scale"].tolist() == [-1.0, -0.7] and model.condition["label"] == 1
        assert inner.condition["scale"].tolist() == [1.0, 0.7]
    assert len(model.condition["scale"]) == len(inner.condition["scale"]) == 4


def test_what_is_bound_inside_is_not_doubled() -> None:
    """Two conditions of a model that itself holds a value for each example are asked one after the other."""
    x, inner = points(), classifier(MIXTURE, posterior, SCALES, label=torch.tensor([1, 0, 2, 1]))
    pair = [inner.given(label=torch.tensor([0, 1, 2, 0])), inner.given(label=None)]
    for found, model in zip(both(*pair, x, T), pair, strict=True):
        torch.testing.assert_close(found.data, model(x, T).data)


def test_classifier_guidance_keeps_to_its_interval() -> None:
    asked: list[Tensor] = []

    def counted(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        return posterior(x, t, 0)

    ratio = lambda t: float(SDE.sigma(torch.tensor(t).double()) / SDE.alpha(torch.tensor(t).double()))
    model = classifier(MIXTURE, counted, SCALES[1:], low=ratio(0.3), high=ratio(0.6))
    x, t = points(3), torch.tensor([0.2, 0.45, 0.8], dtype=torch.float64)
    always = classifier(MIXTURE, posterior, SCALES[1:], label=0).score(x, t)
    wanted = torch.stack([MIXTURE.score(x, t)[0], always[1], MIXTURE.score(x, t)[2]])
    torch.testing.assert_close(model.score(x, t), wanted)
    asked.clear()
    torch.testing.assert_close(model.score(x, t[0]), MIXTURE.score(x, t[0]))
    assert asked == []


@pytest.mark.parametrize("make", ["guide", "classifier"])
def test_an_interval_is_open_below_and_closed_above(make: str) -> None:
    t, x = torch.tensor([0.3, 0.45, 0.6], dtype=torch.float64), points(3)
    low, _, high = (SDE.sigma(t) / SDE.alpha(t)).tolist()
    if make == "guide":
        model, other = MIXTURE, Gaussian(SDE, torch.zeros(x.shape[1:], dtype=torch.float64), 1.0)
        within, always = guide(model, other, 3.0, low=low, high=high), guide(model, other, 3.0)
    else:
        model = MIXTURE
        within, always = (classifier(model, posterior, 3.0, label=0, **i) for i in ({"low": low, "high": high}, {}))
    for each in (t, *t):  # a time for every example, and one for all
        found, free, guided = (m(x, each).noise for m in (within, model, always))
        wanted = torch.where((SDE.sigma(each) / SDE.alpha(each) > low).reshape(-1, 1), guided, free)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(free, guided)


def test_any_log_prob_guides() -> None:
    """log p(y | x_t) = -|x - y|²/2 has the gradient y - x; a module is asked in its own precision."""
    model, y, x = Gaussian(SDE, [0.0, 0.0], 0.25), torch.tensor([0.3, -0.2]), points()
    near = classifier(model, lambda x, t: -0.5 * (x - y).square().sum(1), 2.0)
    torch.testing.assert_close(near.score(x, T), model.score(x, T) + 2 * (y - x))

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.y = nn.Parameter(y.float(), requires_grad=False)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            assert x.dtype == torch.float32
            return -0.5 * (x - self.y).square().sum(1)

    torch.testing.assert_close(classifier(model, Half(), 2.0).score(x, T), near.score(x, T), rtol=1e-5, atol=1e-5)


def network_classifier(classes: int = 3) -> NoisyClassifier:
    return NoisyClassifier(awake(MLP(2, width=16, depth=1, out_features=classes)), SDE, classes)


def test_a_classifier_of_noisy_examples_is_a_log_prob() -> None:
    x, model = points(), network_classifier().double()
    t = torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64)
    found = model.log_probs(x, t)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(4, dtype=torch.float64))
    label = torch.tensor([2, -1, 0, 1])
    wanted = torch.stack([found[0, 2], 0 * found[1, 0], found[2, 0], found[3, 1]])
    torch.testing.assert_close(model(x, t, label), wanted)
    for i in range(4):
        torch.testing.assert_close(model(x[i : i + 1], t[i], int(label[i])), model(x, t, label)[i : i + 1])
    assert not torch.equal(model.log_probs(x, t), model.log_probs(x, t.flip(0)))  # it is told the time
    guided = classifier(MIXTURE, model, 2.0, label=label)
    torch.testing.assert_close(guided.score(x, t)[1], MIXTURE.score(x, t)[1])  # no label, no guidance
    for wrong in (3, -2, torch.tensor([0, 1, 2, 3]), torch.tensor([0.0] * 4)):
        with pytest.raises(ValueError, match=r"label must lie in 0\.\.2"):
            model(x, t, wrong)
    with pytest.raises(ValueError, match=r"shape \(4, 3\) for 4 examples of 5 classes"):
        NoisyClassifier(model.network, SDE, 5).log_probs(x, T)


def test_cross_entropy_teaches_the_posterior() -> None:
    """After 200 steps of a small network its loss on fresh states is the exact classifier's, to 0.05 nats of 0.58."""
    torch.manual_seed(0)
    g, network = torch.Generator().manual_seed(3), MLP(2, width=32, depth=2, out_features=3)
    model = NoisyClassifier(network, SDE, 3)
    objective, optimizer = CrossEntropy(model), torch.optim.Adam(model.parameters(), 1e-2)

    def batch(n: int) -> tuple[Tensor, ...]:
        x0, label = MIXTURE.sample(n, g)
        t = torch.rand(n, generator=g, dtype=torch.float64) * 0.6 + 1e-3
        return x0.float(), t, torch.randn(n, 2, generator=g), torch.zeros(n, 0, 2), label

    for step in range(200):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 200)
        *states, label = batch(256)
        optimizer.zero_grad()
        objective(*states, {"label": label})[0].mean().backward()
        optimizer.step()
    x0, t, z, v, label = batch(4000)
    with torch.no_grad():
        loss, right = objective(x0, t, z, v, {"label": label})
        x = SDE.perturb(x0.double(), t, z.double())
        exact = torch.stack([posterior(x, t, k) for k in range(3)], 1)
    best = -exact.gather(1, label[:, None]).mean()
    assert 0 < float(loss.mean() - best) < 0.05
    assert float(right.mean()) > float((exact.argmax(1) == label).double().mean()) - 0.02
    assert float(best) > 0.2


def test_an_encoder_answers_each_image_by_its_own_time() -> None:
    make = partial(Encoder, 2, 5, width=8, multipliers=(1, 2), blocks=1, attention=(4,), image_size=8)
    assert float(make()(torch.randn(2, 2, 8, 8), torch.zeros(2)).detach().abs().max()) < 1e-3  # even odds at first
    network = awake(make()).double().eval()
    x, t = torch.randn(3, 2, 7, 9, dtype=torch.float64), torch.tensor([3.0, 500.0, 900.0], dtype=torch.float64)
    y = network(x, t)
    assert y.shape == (3, 5)
    for i in range(3):
        torch.testing.assert_close(y[i : i + 1], network(x[i : i + 1], t[i : i + 1]))
    assert bool(((y - network(x, t.flip(0)))[[0, 2]].abs().amax(1) > 1e-3).all())
    uncentered = make(centered=False).double().eval()
    uncentered.load_state_dict(network.state_dict())
    torch.testing.assert_close(uncentered((x + 1) / 2, t), y)


@pytest.mark.parametrize(
    ("words", "make"),
    [
        ("share one SDE", lambda: guide(MIXTURE, Gaussian(CosineSDE(), [0.0, 0.0], 1.0), 2.0)),
        ("share one SDE", lambda: classifier(Gaussian(VESDE(), [0.0, 0.0], 1.0), network_classifier(), 2.0)),
        ("rescale must lie between 0 and 1, got 1.5", lambda: guide(MIXTURE, MIXTURE, 2.0, rescale=1.5)),
        ("low=1 and high=0.5", lambda: classifier(MIXTURE, posterior, low=1.0, high=0.5)),
        (r"scale must be a number, or \(B,\)", lambda: guide(MIXTURE, MIXTURE, torch.ones(2, 1))),
        ("one value per example", lambda: classifier(MIXTURE, lambda x, t: x)(points(), T)),
        ("no gradient in x", lambda: classifier(MIXTURE, lambda x, t: x.detach().sum(1))(points(), T)),
        (r"shape \(4,\)|must have shape", lambda: classifier(MIXTURE, posterior, torch.ones(3), label=0)(points(), T)),
    ],
)
def test_what_cannot_guide_is_said(words: str, make: Any) -> None:
    with pytest.raises(ValueError, match=words):
        make()
