"""Learned uncertainty: at its minimum each level's loss is divided by its mean."""

import copy
import math

import pytest
import torch
from torch import Tensor

from score_sde import DDPM, SDE, VPSDE, LinearSDE
from score_sde.cli import run
from score_sde.config.build import build_model
from score_sde.config.objective import Objective
from score_sde.losses import Uncertainty, min_snr
from score_sde.sdes.linear import EDMSDE
from score_sde.tasks import checkpoint
from score_sde.tasks.checkpoint import load
from tests.oracles import SDES, name
from tests.runs import line, refused, toy_config

LEVELS = torch.tensor([0.05, 0.2, 0.45, 0.7, 1.0], dtype=torch.float64)


def fitted(t: Tensor, loss: Tensor, sde: SDE) -> Uncertainty:
    """The uncertainty that minimises the mean of `weighted`, which is convex in its parameters."""
    own = Uncertainty().double()
    search = torch.optim.LBFGS(own.parameters(), max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def value() -> Tensor:
        search.zero_grad()
        mean = own.weighted(loss, sde, t).mean()
        mean.backward()
        return mean

    search.step(value)
    return own


@pytest.mark.parametrize("sde", [VPSDE(), EDMSDE()], ids=name)
def test_at_the_minimum_the_weight_of_a_level_is_one_over_its_mean_loss(sde: SDE) -> None:
    t = LEVELS.repeat(40)
    loss = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * (1 + 50 * t**3) + 0.01
    means = loss.reshape(40, 5).mean(0)
    own = fitted(t, loss, sde)
    torch.testing.assert_close(torch.exp(-own(sde, LEVELS)), 1 / means, rtol=1e-4, atol=0)
    torch.testing.assert_close(own.weighted(means, sde, LEVELS), 1 + means.log(), rtol=1e-6, atol=1e-6)


def test_the_network_s_gradient_has_the_weight_and_a_fresh_one_is_1() -> None:
    config = toy_config(training__uncertainty=True, training__likelihood_weighting=True)
    model, source = build_model(config, (2,)), torch.Generator().manual_seed(0)
    plain = toy_config(training__likelihood_weighting=True)
    x0, z = torch.randn(2, 5, 2, generator=source)
    with torch.no_grad():
        for p in model.network.parameters():  # its last layer begins at 0
            p.add_(0.1 * torch.randn(p.shape, generator=source))
    same = copy.deepcopy(model)
    del same.uncertainty

    def losses(model: torch.nn.Module, config: object) -> Tensor:
        loss: Tensor = Objective(model, config)(x0, LEVELS, z, z[:, None][:, :0])[0]  # type: ignore[arg-type]
        return loss

    torch.testing.assert_close(losses(model, config), losses(same, plain))
    with torch.no_grad():
        model.uncertainty.weight.copy_(0.3 * torch.randn(128, generator=source))
    u = model.uncertainty(model.sde, LEVELS).detach()
    assert u.abs().min() > 0.01 and u.std() > 0.1
    losses(model, config).sum().backward()
    (torch.exp(-u) * losses(same, plain)).sum().backward()
    for own, p in zip(model.network.parameters(), same.network.parameters(), strict=True):
        torch.testing.assert_close(own.grad, p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sde", SDES, ids=name)
def test_it_depends_on_the_noise_level_alone_and_is_finite(sde: SDE) -> None:
    own = Uncertainty()
    torch.nn.init.normal_(own.weight, generator=torch.Generator().manual_seed(0))
    u = own(sde, LEVELS)
    again = own(EDMSDE(sigma_max=200), EDMSDE(sigma_max=200).time(sde.log_snr(LEVELS)))
    assert u.shape == (5,) and u.dtype == torch.float32
    inside = (sde.log_snr(LEVELS) < -2 * torch.tensor(0.002).log()) & (sde.log_snr(LEVELS) > -10)
    assert bool(inside.sum() >= 3)
    torch.testing.assert_close(again[inside], u[inside], rtol=0, atol=1e-4)
    ends = own(DDPM.linear(10).as_sde(), torch.tensor([0.0, 1e-300], dtype=torch.float64))  # no noise: infinite SNR
    assert bool(ends.isfinite().all()) and ends[0] == ends[1]
    assert bool(own(LinearSDE(), torch.ones(1, dtype=torch.float64)).isfinite().all())  # no signal


def test_its_features_are_those_of_edm2() -> None:
    own, sde = Uncertainty(), EDMSDE()
    with torch.no_grad():
        own.weight[3] = 1.0
    c_noise = sde.sigma(LEVELS).log() / 4
    wave = math.sqrt(2) * torch.cos(c_noise * own.frequencies[3] + own.phases[3])
    torch.testing.assert_close(own(sde, LEVELS), wave.float(), rtol=0, atol=1e-5)
    assert 0.8 < own.frequencies.std() / (2 * math.pi) < 1.2 and 2.5 < own.phases.mean() < 3.8


def test_a_config_s_gamma_is_the_weight_s() -> None:
    config = toy_config(training__min_snr=0.3)
    model, source = build_model(config, (2,)), torch.Generator().manual_seed(0)
    x0, z = torch.randn(2, 5, 2, generator=source)
    loss, error = Objective(model, config)(x0, LEVELS, z, z[:, None][:, :0])
    torch.testing.assert_close(loss, error * min_snr(model.sde, LEVELS, 0.3).float())
    assert loss.lt(error).any()


TOY = {"training__uncertainty": "true", "optim__warmup": 0, "optim__decay": 0, "training__time": "uniform"}


def test_it_is_trained_saved_and_resumed_and_the_model_does_without(tmp_path, caplog) -> None:  # type: ignore[no-untyped-def]
    for folder, lengths in (("whole", (4,)), ("parts", (2, 4))):
        for length in lengths:
            assert run(line("vp_toy", "train", tmp_path / folder, **TOY, training__n_iters=length)) == 0
    whole, parts = (
        checkpoint.read_tensors(checkpoint.checkpoint_path(tmp_path / folder, 4)) for folder in ("whole", "parts")
    )
    assert whole["model/uncertainty.weight"].abs().max() > 1e-3
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    assert run(line("vp_toy", "sample", tmp_path / "whole")) == 0
    tuned = line("vp_toy", "train", tmp_path / "tuned", "--checkpoint", str(tmp_path / "whole"))
    assert run(tuned) == 0  # without it
    back = line("vp_toy", "train", tmp_path / "back", "--checkpoint", str(tmp_path / "tuned"), **TOY, optim__lr=1e-38)
    assert run(back) == 0
    assert "made anew, as they are others there, or none: uncertainty" in caplog.text
    before, after = (dict(load(tmp_path / folder).named_parameters()) for folder in ("tuned", "back"))
    assert after.keys() - before.keys() == {"uncertainty.weight"}
    assert all(torch.allclose(after[key], before[key], rtol=1e-6) for key in before)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"training__objective": "implicit"}, "set training.objective=denoising"),
        ({"training__objective": "cross_entropy"}, "denoising"),
    ],
)
def test_what_is_no_squared_error_is_refused(settings, words, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    assert words in refused(capsys, line("vp_toy", "train", tmp_path, **{**TOY, **settings}))
