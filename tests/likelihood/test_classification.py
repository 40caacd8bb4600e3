"""The generative classifier: Bayes' rule with conditional likelihoods, against mixtures whose posterior is known."""

import math
import re

import pytest
import torch
from torch import Tensor

from score_sde import VPSDE, SubVPSDE, from_score
from score_sde.likelihood import log_likelihood
from score_sde.likelihood.classification import classify
from score_sde.likelihood.sde_bound import variational_bound
from score_sde.models.closed_form import Mixture

START = torch.tensor(1e-5, dtype=torch.float64)
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
MEANS = torch.tensor([[0.3, -0.7, 0.0], [-0.4, 0.2, 0.5], [0.1, 0.1, -0.6]], dtype=torch.float64)
COVS = torch.tensor(
    [
        [[0.5, 0.3, 0.1], [0.3, 0.6, 0.0], [0.1, 0.0, 0.2]],
        [[0.5, 0.2, 0.1], [0.2, 0.5, 0.1], [0.1, 0.1, 0.2]],
        [[0.4, 0.3, 0.1], [0.3, 0.6, 0.1], [0.1, 0.1, 0.3]],
    ],
    dtype=torch.float64,
)
# With beta up to 60 what is left of the data at t = 1 is below 1e-6: the prior is the law of x_1 under each class.
MIXTURE = Mixture(VPSDE(beta_max=60.0), WEIGHTS, MEANS, COVS)
CLASSES = [MIXTURE.given(label=y) for y in range(3)]


def points(n: int = 6) -> tuple[Tensor, Tensor]:
    return MIXTURE.sample(n, torch.Generator().manual_seed(0))


def conditional(x: Tensor) -> Tensor:
    """log p(x | y) of the state at t_min, (B, 3): a label leaves log of weight times density of its component."""
    return torch.stack([MIXTURE.log_prob(x, START, label=y) for y in range(3)], 1)


def test_the_conditional_likelihood_of_a_labelled_mixture_is_its_component_s() -> None:
    x, y = points()
    truth = conditional(x)
    component = [Mixture(MIXTURE.sde, [1.0], MEANS[i : i + 1], COVS[i : i + 1]).log_prob(x, START) for i in range(3)]
    torch.testing.assert_close(truth, torch.stack(component, 1))
    each = log_likelihood(MIXTURE.given(label=y), x, probe="exact", rtol=1e-6, atol=1e-6).log_prob
    torch.testing.assert_close(each, truth.gather(1, y[:, None])[:, 0], rtol=0, atol=1e-4)


def test_the_posterior_is_the_mixture_s() -> None:
    x, _ = points()
    found = classify(CLASSES, x, log_prior=WEIGHTS.log(), probe="exact", rtol=1e-5, atol=1e-5)
    joint = conditional(x) + WEIGHTS.log()
    torch.testing.assert_close(found.log_posterior, torch.log_softmax(joint, 1), rtol=0, atol=2e-3)
    torch.testing.assert_close(found.log_posterior, torch.log_softmax(found.log_likelihood + WEIGHTS.log(), 1))
    torch.testing.assert_close(found.log_likelihood, conditional(x), rtol=0, atol=1e-3)
    assert torch.equal(found.label, joint.argmax(1)) and found.nfe > 3 * 30
    even = classify(CLASSES, x, probe="exact", rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(even.log_posterior, torch.log_softmax(even.log_likelihood, 1))
    assert (even.log_posterior - found.log_posterior).abs().max() > 0.1


@pytest.mark.parametrize("method,fraction", [("dopri5", 1 / 3), ("embedded", 1 / 2)])
def test_classes_share_their_probes_which_drop_out_of_the_quotient(method: str, fraction: float) -> None:
    """The log odds of one probe: their error is a fraction of that with probes of each class' own.

    On the circle a probe sees less in the first place, for the linear part that all classes share is known.
    """
    x = points(1)[0].expand(400, 3)
    truth = conditional(x[:1])[0]
    settings = {"probe": "gaussian", "rtol": 1e-3, "atol": 1e-3, "method": method}
    shared = classify(CLASSES[:2], x, **settings).log_likelihood  # type: ignore[arg-type]
    own = [log_likelihood(m, x, seed=7 + i, **settings).log_prob for i, m in enumerate(CLASSES[:2])]  # type: ignore[arg-type]
    odds = truth[0] - truth[1]
    error = (shared[:, 0] - shared[:, 1] - odds).square().mean().sqrt()
    apart = (own[0] - own[1] - odds).square().mean().sqrt()
    assert error < fraction * apart
    assert abs(float((shared[:, 0] - shared[:, 1] - odds).mean())) < 4 * float(error) / math.sqrt(400)  # unbiased


def test_by_the_bound_it_is_the_same_classifier_where_the_model_is_exact() -> None:
    x, _ = points(3)
    options = {"t_min": 1e-4, "draws": 400, "seed": 2}
    found = classify(CLASSES, x, log_prior=WEIGHTS.log(), estimate="bound", **options)  # type: ignore[arg-type]
    bound = variational_bound(CLASSES[1], x, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(found.log_likelihood[:, 1], -bound.total)
    assert bool(((found.log_likelihood[:, 1] - conditional(x)[:, 1]).abs() < 4 * bound.std_error + 1e-3).all())
    assert bound.std_error.max() < 2
    posterior = torch.log_softmax(found.log_likelihood + WEIGHTS.log(), 1)
    torch.testing.assert_close(found.log_posterior, posterior)
    assert found.nfe == 3 * 400


def test_models_may_be_different_networks_of_different_sdes() -> None:
    x, _ = points()
    other = Mixture(SubVPSDE(beta_max=60.0), [1.0], MEANS[1:2], COVS[1:2])
    found = classify([CLASSES[0], other], x, probe="exact", rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found.log_posterior, torch.log_softmax(conditional(x)[:, :2], 1), rtol=0, atol=1e-3  # noise at t_min differs
    )  # fmt: skip
    whole = classify(CLASSES, x, probes=2, seed=3, first=5, rtol=1e-3, atol=1e-3).log_posterior
    part = classify(CLASSES, x[2:4], probes=2, seed=3, first=7, rtol=1e-3, atol=1e-3).log_posterior
    torch.testing.assert_close(part, whole[2:4], rtol=0, atol=1e-4)


def test_errors_name_the_thing() -> None:
    model, x = from_score(VPSDE(), lambda x, t: -x), torch.zeros(1, 3)
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        classify([model], x)
    with pytest.raises(ValueError, match=re.escape("log_prior must have shape (2,), got (3,)")):
        classify([model, model], x, log_prior=torch.zeros(3))
    with pytest.raises(ValueError, match='unknown estimate \'elbo\'; use "ode" or "bound"'):
        classify([model, model], x, estimate="elbo")  # type: ignore[arg-type]
