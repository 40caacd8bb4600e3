"""The training step against recorded steps of the reference, and every switch of it against plain training."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from scipy.stats import kstest

from score_sde import VPSDE, closed_form, losses
from score_sde.config import default_config
from score_sde.config.build import build_model
from score_sde.config.objective import COUPLINGS, Objective
from score_sde.data import Data, Split, load_data
from score_sde.data.codecs import VectorCodec, codec_of
from score_sde.data.toys import ring, ring_mixture
from score_sde.foreign import score_sde_pytorch as interop
from score_sde.losses.time_laws import SecondMoments
from score_sde.machine.parallel import Processes
from score_sde.sdes import like
from score_sde.tasks.averages import RAMP, ema_decay, ema_update
from score_sde.tasks.show import Metrics, by_noise_level, noise_bins, noise_floor
from score_sde.tasks.step import (
    Batch,
    Batches,
    Record,
    State,
    evaluate_loss,
    learning_rate,
    make_state,
    seed_dropout,
    train_step,
    update,
)
from score_sde.tasks.train import check_finite, of_all, train
from tests import RECORDED
from tests.runs import ALONE, image_config, run_steps, toy_config

NETS = RECORDED / "nets"


def parameters(state: State) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in state.model.state_dict().items()}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in a)


# -- the reference's recorded steps


@pytest.mark.parametrize("net", ["ddpmpp_vp", "ncsnpp_ve"])
def test_recorded_training_steps_are_reproduced(net: str) -> None:
    given = json.loads((NETS / f"{net}.config.json").read_text())
    record = np.load(NETS / f"{net}.train.npz")
    start = {"model": torch.load(NETS / f"{net}.init.pth", weights_only=True)}
    end = interop.read_checkpoint(NETS / f"{net}.ckpt.pth")
    model = interop.load_score_sde(start, given, ema=False).train().requires_grad_(True)
    network = model.network.network if net == "ncsnpp_ve" else model.network
    for name, buffer in network.named_buffers():  # frequencies are no parameters of ours, nor trained there
        assert not buffer.requires_grad, name

    config = default_config()
    config.training.reduce_mean = given["training"]["reduce_mean"]
    for key in ("lr", "beta1", "eps", "warmup", "grad_clip"):
        config.optim[key] = given["optim"][key]
    config.model.ema_rate = given["model"]["ema_rate"]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=config.optim.lr, betas=(0.9, 0.999), eps=config.optim.eps, fused=True)
    state = State(model, copy.deepcopy(model).requires_grad_(False), optimizer)
    objective = Objective(model, config)
    for step in range(len(record["loss"])):
        x0, z = (torch.from_numpy(record[key][step]) for key in ("batch", "z"))
        t = torch.from_numpy(record["t"][step]).double()
        done = train_step(state, objective, Batch(x0, t, torch.ones_like(t), z, z[:, None][:, :0], {}), config)
        assert done.learning_rate == pytest.approx(float(record["lr"][step]), rel=1e-6)
        assert done.loss.mean().item() == pytest.approx(float(record["loss"][step]), rel=1e-5)
        assert done.grad_norm.item() == pytest.approx(float(record["grad_norm_before_clip"][step]), rel=1e-4)

    keys = interop.key_map(network, given)
    theirs = {name.removeprefix("module."): value for name, value in end["model"].items()}
    averages = dict(zip([k.theirs for k in keys if k.trained], end["ema"]["shadow_params"], strict=True))
    averages |= {k.theirs: theirs[k.theirs] for k in keys if not k.trained}
    ema = state.ema.network.network if net == "ncsnpp_ve" else state.ema.network
    for ours, reference in ((network, theirs), (ema, averages)):
        expected = interop.to_ours(reference, keys)
        found = ours.state_dict()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=5e-5, msg=lambda m, n=name: f"{n}: {m}")
    moments = {}
    for index, entry in end["optimizer"]["state"].items():
        name = [k.theirs for k in keys][index]
        moments[name] = entry["exp_avg_sq"]
    moments |= {k.theirs: torch.zeros_like(theirs[k.theirs]) for k in keys if k.theirs not in moments}
    squares = interop.to_ours(moments, keys)
    named = dict(network.named_parameters())
    largest = max(value.max().item() for value in squares.values())
    for name, value in squares.items():
        if name in named:
            found = state.optimizer.state[named[name]]["exp_avg_sq"]
            assert (found - value).abs().max().item() <= 1e-4 * largest, name

    x0, z = torch.from_numpy(record["batch"][0]), torch.from_numpy(record["eval.z"])
    t = torch.from_numpy(record["eval.u"]).double() * (1 - 1e-5) + 1e-5
    with torch.no_grad():
        loss, _ = Objective(state.ema.eval(), config)(x0, t, z, z[:, None][:, :0], {})
    assert loss.mean().item() == pytest.approx(float(record["eval.loss_ema"]), rel=1e-4)


# -- switches that must not change the result


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits")


@pytest.mark.parametrize(
    ("switch", "value", "tolerance"),
    [
        ("training__accumulate", 2, 2e-5),
        ("training__channels_last", True, 2e-5),
        ("training__checkpoint_activations", True, 1e-7),
    ],
)
def test_a_switch_of_memory_or_speed_leaves_the_parameters(
    digits: Data, switch: str, value: object, tolerance: float
) -> None:
    # Adam divides by the gradient's size, so rounding of a vanishing gradient shows up to lr: a large eps damps it.
    plain, _ = run_steps(image_config(optim__eps=1e-2), digits)
    switched, _ = run_steps(image_config(optim__eps=1e-2, **{switch: value}), digits)
    assert largest_difference(parameters(plain), parameters(switched)) < tolerance


def test_bf16_autocast_gives_the_loss_within_its_precision(digits: Data) -> None:
    _, plain = run_steps(image_config(), digits)
    _, half = run_steps(image_config(training__precision="bfloat16"), digits)
    for a, b in zip(plain, half, strict=True):  # bf16 has 8 bits
        torch.testing.assert_close(a.loss.mean(), b.loss.mean(), rtol=0.02, atol=0)
    assert not torch.equal(plain[-1].loss, half[-1].loss), "autocast was not on"


@pytest.mark.slow
def test_compiled_network_gives_the_same_loss(digits: Data) -> None:
    _, plain = run_steps(image_config(), digits, steps=2)
    config = image_config()
    state = make_state(config, digits.shape, torch.device("cpu"))
    state.model.network.compile()
    b = Batches(config, codec_of(17), state.model.sde).draw(digits.train, 0)
    done = train_step(state, Objective(state.model, config), b, config)
    torch.testing.assert_close(done.loss, plain[0].loss, rtol=1e-4, atol=1e-6)


def test_dropout_is_on_in_training_and_seeded(digits: Data) -> None:
    config = image_config(model__dropout=0.5, training__n_iters=2)
    first, second = (list(train_losses(config, digits)) for _ in range(2))
    assert first == second
    assert first != list(train_losses(image_config(training__n_iters=2), digits))


def train_losses(config: ConfigDict, data: Data) -> list[float]:
    import tempfile

    config.training.log_freq = 1
    with tempfile.TemporaryDirectory() as folder:
        codec = codec_of(data.levels)
        found = list(train(config, Path(folder), data, codec, ALONE))
    return [m.scalars["training_loss"] for m in found if "training_loss" in m.scalars]


# -- the objective and what is drawn


def test_the_objectives_reductions_and_weights_are_the_papers() -> None:
    model = closed_form.Gaussian(VPSDE(), torch.zeros(3, 2, 2), torch.tensor(0.3))
    x0, z = torch.randn(2, 5, 3, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    t = torch.tensor([0.01, 0.1, 0.3, 0.6, 1.0], dtype=torch.float64)
    sde = model.sde
    sigma, g = (v.reshape(-1, 1, 1, 1) for v in (sde.sigma(t), sde.g(t)))
    score = model.score(sde.perturb(x0, t, z), t)
    mean = ((score * sigma + z) ** 2).flatten(1).mean(1)
    half_sum = 0.5 * ((score + z / sigma) ** 2 * g**2).flatten(1).sum(1)
    torch.testing.assert_close(Objective(model, toy_config())(x0, t, z, z[:, None][:, :0], {})[0], mean)
    weighted = toy_config(training__likelihood_weighting=True, training__reduce_mean=False)
    torch.testing.assert_close(Objective(model, weighted)(x0, t, z, z[:, None][:, :0], {})[0], half_sum)


def test_edm_s_objective_is_its_weighted_error_of_the_data() -> None:
    sde, g = VPSDE(), torch.Generator().manual_seed(0)
    x0, z = torch.randn(4, 2, generator=g), torch.randn(4, 2, generator=g)
    t = torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)
    config = toy_config(training__time="edm", model__rule="edm", model__sigma_data=0.7)
    model = build_model(config, (2,))
    alpha, sigma = (like(v, x0).float() for v in (sde.alpha(t), sde.sigma(t)))
    with torch.no_grad():
        error = ((model(sde.perturb(x0, t, z), t).data - x0) ** 2).mean(1)
        s = (sigma / alpha)[:, 0]
        wanted = (s**2 + 0.7**2) / (s * 0.7) ** 2 * error
        torch.testing.assert_close(Objective(model, config)(x0, t, z, z[:, None][:, :0])[0], wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_a_batch_is_drawn_from_seed_and_step_and_split_by_slices(coupling: str) -> None:
    config, data = toy_config(training__coupling=coupling, training__objective="flow_matching"), load_data("ring")
    sde, codec = VPSDE(), VectorCodec()
    whole = Batches(config, codec, sde).draw(data.train, 7)
    parts = [Batches(config, codec, sde, slice(a, a + 8)).draw(data.train, 7) for a in (0, 8)]
    for one, halves in zip(whole[:5], zip(*(p[:5] for p in parts), strict=True), strict=True):
        assert torch.equal(one, torch.cat(halves))
    plain = Batches(toy_config(), codec, sde).draw(data.train, 7)
    assert torch.equal(plain.x0, whole.x0) and torch.equal(plain.z, whole.z) == (coupling == "independent")
    distance = [float((b.x0 - b.z).square().sum()) for b in (whole, plain)]
    assert coupling == "independent" or distance[0] < 0.7 * distance[1]
    other = Batches(config, codec, sde).draw(data.train, 8)
    assert not torch.equal(whole.z, other.z) and not torch.equal(whole.t, other.t)
    assert abs(np.corrcoef(whole.z.flatten(), other.z.flatten())[0, 1]) < 0.6


def test_everything_random_in_a_batch_depends_on_the_seed(digits: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times, noise, projections, dequantisation, a low resolution's noise, labels left out, and the examples."""
    config = image_config(
        training__objective="sliced", data__uniform_dequantization=True, model__super_resolution=2,
        training__augmentation=0.5, model__class_conditional=True, training__condition_dropout=0.5,
        training__batch_size=32,
    )  # fmt: skip

    def low_resolution(k, factor, codec, sde, level, spread):  # type: ignore[no-untyped-def]
        return {"level": level, "spread": spread(torch.zeros(len(k), 1, 4, 4))}

    monkeypatch.setattr("score_sde.tasks.step.low_resolution", low_resolution)

    def drawn(seed: int, data: Data) -> dict[str, torch.Tensor]:
        config.seed = seed
        b = Batches(config, codec_of(17), VPSDE()).draw(data.train, 3)
        return {"x0": b.x0, "t": b.t, "z": b.z, "v": b.v, **b.condition}

    one = Split(digits.train.x[:1], digits.train.y[:1])  # type: ignore[index]
    alike = Data(one, one, levels=17, num_classes=10)  # the order of the examples then changes nothing
    first, again, other = (drawn(seed, alike) for seed in (42, 42, 43))
    assert first.keys() == {"x0", "t", "z", "v", "label", "level", "spread"}
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        assert not torch.equal(value, other[name]), name
    assert not torch.equal(drawn(42, digits)["x0"].round(), drawn(43, digits)["x0"].round())


def test_dropout_differs_between_processes_and_steps_and_seeds() -> None:
    def mask(seed: int, step: int, rank: int) -> torch.Tensor:
        seed_dropout(seed, step, Processes(rank, 4, torch.device("cpu")))
        return torch.nn.functional.dropout(torch.ones(64), 0.5)

    assert torch.equal(mask(1, 2, 0), mask(1, 2, 0))
    for other in ((1, 2, 1), (1, 3, 0), (2, 2, 0)):
        assert not torch.equal(mask(1, 2, 0), mask(*other)), other


def test_soft_truncation_draws_a_smallest_time_for_each_batch_of_training() -> None:
    """log tau is uniform for k = 1; above it, 16 even times leave a gap of 1/16 of the range at most."""
    config, data = toy_config(training__soft_truncation=1.0, training__low_discrepancy=True), load_data("ring")
    sde, smallest = VPSDE(), []
    for step in range(150):
        b = Batches(config, VectorCodec(), sde).draw(data.train, step)
        # Weights of uniform times above tau are all (1 - tau)/(1 - t_min).
        tau = 1 - b.importance * (1 - sde.t_min)
        assert tau.max() - tau.min() < 1e-12 and tau[0] <= b.t.min() < tau[0] + (1 - tau[0]) / 16
        smallest.append(tau[0].item())
    assert kstest(np.log(smallest) / math.log(sde.t_min), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(np.log(smallest[:-1]), np.log(smallest[1:]))[0, 1]) < 0.3  # anew in each batch
    state = make_state(config, data.shape, torch.device("cpu"))
    held_out = evaluate_loss(state, config, data.test, VectorCodec())
    config.training.soft_truncation = 0.0
    assert held_out == evaluate_loss(state, config, data.test, VectorCodec())  # of all times


def test_a_truncated_loss_carries_its_weights() -> None:
    config, data = toy_config(training__soft_truncation=1.0), load_data("ring")
    state, records = run_steps(config, data)
    for record in records:
        b = Batches(config, VectorCodec(), state.model.sde).draw(data.train, record.step)
        torch.testing.assert_close(record.loss, (record.measure * b.importance).float())
        assert b.importance.max() < 1


def test_the_seed_decides_weights_and_batches() -> None:
    first, again = (parameters(run_steps(toy_config(), load_data("ring"))[0]) for _ in range(2))
    assert largest_difference(first, again) == 0
    config = toy_config()
    config.seed = 43
    assert largest_difference(first, parameters(run_steps(config, load_data("ring"))[0])) > 1e-3


def chain_config(**changes: object) -> ConfigDict:
    """The ring as a chain of four steps, trained for its bound with times by second moments."""
    changes = dict(model__num_scales=4, model__beta_max=3.0, model__label="index", sampling__steps=4) | changes
    config = toy_config(training__continuous=False, training__objective="vlb", **changes)
    config.model.learned_variance = True
    config.training.time = "second_moment"
    return config


def test_the_law_of_second_moments_learns_from_unweighted_losses_and_draws_the_next_batch() -> None:
    config, data = chain_config(training__batch_size=64), load_data("ring")
    state = make_state(config, data.shape, torch.device("cpu"))
    assert isinstance(state.law, SecondMoments)
    objective, sde, seen = Objective(state.model, config), state.model.sde, []
    for _ in range(3):
        b = Batches(config, VectorCodec(), sde).draw(data.train, state.step, law=state.law)
        record = train_step(state, objective, b, config)
        torch.testing.assert_close(record.loss, record.measure * b.importance.float())
        state.law.update(b.t, record.measure)
        seen.append((b.t, record.measure.double()))
    t, errors = (torch.cat(parts) for parts in zip(*seen))
    assert state.law.counts.sum() == 3 * 64 and state.law.counts.min() >= 10
    size = torch.stack([errors[(t * 4).round() == i + 1][-10:].square().mean().sqrt() for i in range(4)])
    chances = 0.999 * size / size.sum() + 0.001 / 4
    b = Batches(config, VectorCodec(), sde).draw(data.train, 3, law=state.law)
    torch.testing.assert_close(b.importance, 1 / (4 * chances[(b.t * 4).round().long() - 1]))
    assert b.importance.std() > 0.1
    evaluated = Batches(config, VectorCodec(), sde).draw(data.test, 0)  # held-out losses: evenly
    assert bool((evaluated.importance == 1).all())


@pytest.mark.parametrize("objective", ["vlb", "hybrid"])
def test_a_chain_s_objectives_decode_the_levels_of_the_data(digits: Data, objective: str) -> None:
    config = image_config(training__continuous=False, model__num_scales=40, training__objective=objective)
    config.model.learned_variance = True
    state, codec = make_state(config, digits.shape, torch.device("cpu")), codec_of(17)
    x0, z = codec.encode(digits.train.x[:6]), torch.zeros(6, 1, 8, 8)  # type: ignore[index]
    t = torch.arange(1, 7, dtype=torch.float64) / 40
    loss = {"vlb": losses.variational, "hybrid": losses.hybrid}[objective]
    with torch.no_grad():
        found = Objective(state.model, config, codec)(x0, t, z, z[:, None][:, :0], {})[1]
        torch.testing.assert_close(found, loss(state.model, x0, t, z, levels=17, width=2.0))
        floats = loss(state.model, x0, t, z)
    assert torch.equal(found[1:], floats[1:]) and found[0] != floats[0]


# -- schedules


def test_learning_rate_rises_and_falls() -> None:
    config = toy_config(optim__lr=1.0, optim__warmup=10, optim__decay=0.25, training__n_iters=100)
    assert [learning_rate(config, s) for s in (0, 5, 10, 75)] == [0.0, 0.5, 1.0, 1.0]
    assert learning_rate(config, 80) == pytest.approx(0.8)
    assert learning_rate(config, 99) == pytest.approx(0.04)


def test_ema_follows_its_recursion_and_its_half_life() -> None:
    assert ema_decay(1, rate=0.9999) == pytest.approx(2 / 11)
    assert ema_decay(10**7, rate=0.999) == 0.999
    late = ema_decay(10**9, rate=0.0, halflife=1000, batch_size=50)
    assert late ** (1000 / 50) == pytest.approx(0.5)
    young = ema_decay(3, rate=0.0, halflife=1000, batch_size=50)
    assert young ** (RAMP * 3 * 50 / 50) == pytest.approx(0.5)
    model, average = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    averages, values = ([p.detach() for p in m.parameters()] for m in (average, model))
    expected = [0.9 * a + 0.1 * p for a, p in zip(averages, values, strict=True)]
    ema_update(averages, values, 0.9)
    for a, e in zip(averages, expected, strict=True):
        torch.testing.assert_close(a, e)


# -- what is reported


def test_noise_levels_are_binned_by_log_snr() -> None:
    sde = VPSDE()
    edges, names = noise_bins(sde)
    middles = sde.time((edges[1:] + edges[:-1]) / 2)
    found = by_noise_level(sde, middles, torch.arange(5.0))
    assert list(found) == names and list(found.values()) == [0, 1, 2, 3, 4]


def test_noise_levels_begin_at_1e_5_where_t_min_is_0() -> None:
    edges, names = noise_bins(VPSDE(t_min=0.0))
    ends = VPSDE().log_snr(torch.tensor([1e-5, 1.0], dtype=torch.float64))
    torch.testing.assert_close(edges, torch.linspace(*ends.tolist(), 6, dtype=torch.float64))
    assert names[0].startswith("sigma 0.001 to")


def test_the_floor_is_the_error_of_the_exact_model_and_no_model_beats_it() -> None:
    sde = VPSDE(t_min=1e-5)
    exact = closed_form.Gaussian(sde, torch.zeros(1), torch.tensor([0.25]))
    floor = noise_floor(exact, lambda n: 0.5 * torch.randn(n, 1, generator=torch.Generator().manual_seed(0)), sde)
    edges, names = noise_bins(sde)
    for i, name in enumerate(names):  # E(z - z*)² = alpha² s²/(alpha² s² + sigma²), averaged evenly over log SNR
        snr = torch.linspace(edges[i], edges[i + 1], 201, dtype=torch.float64).exp()
        expected = (0.25 * snr / (0.25 * snr + 1)).mean().item()
        assert floor[name] == pytest.approx(expected, rel=0.06), name  # about 4,000 draws per bin: 0.02 of sqrt(2)


def test_training_lowers_the_loss_towards_the_floor(tmp_path: Path) -> None:
    config = toy_config(
        training__n_iters=150, training__batch_size=256, model__hidden=32, optim__lr=1e-2, training__time="log_snr",
        training__low_discrepancy=True, training__eval_freq=150, training__log_freq=150, model__ema_halflife=2500,
    )  # fmt: skip
    data = load_data("ring")
    config.model.label = "log_sigma"
    found = [m for m in train(config, tmp_path, data, VectorCodec(), ALONE) if m.scalars]
    last = next(m.scalars["eval_loss"] for m in found if "eval_loss" in m.scalars)
    sde = VPSDE(t_min=config.model.t_min)
    floor = noise_floor(closed_form.Mixture(sde, *ring_mixture()), lambda n: ring(n, 1), sde)
    irreducible = float(np.mean(list(floor.values())))
    assert irreducible < last < irreducible + 0.15 * (1 - irreducible)


def test_a_loss_that_is_not_finite_stops_with_all_that_may_explain_it(tmp_path: Path) -> None:
    config = toy_config(training__n_iters=30, training__snapshot_freq=3, training__log_freq=5)
    good = load_data("ring")
    list(train(toy_config(training__n_iters=3), tmp_path, good, VectorCodec(), ALONE))
    before = (tmp_path / "checkpoints" / "000000003.safetensors").read_bytes()
    x = good.train.x[:].clone()
    x[:] = math.nan
    bad = Data(Split(x), good.test, levels=None)
    with pytest.raises(FloatingPointError) as caught:
        list(train(config, tmp_path, bad, VectorCodec(), ALONE))
    text = str(caught.value)
    assert "step 3" in text and "16 of 16" in text and "learning rate 0.0002" in text and "gradient norm nan" in text
    assert "sigma" in text and "lower optim.lr" in text
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["000000003.safetensors"]
    assert (tmp_path / "checkpoints" / "000000003.safetensors").read_bytes() == before


def test_check_finite_names_the_noise_levels_of_the_bad_examples() -> None:
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    loss = torch.tensor([1.0, math.inf, 1.0])
    record = Record(12, 1e-3, torch.tensor(3.0), loss, loss, t)
    with pytest.raises(FloatingPointError, match=r"step 12: 1 of 3 examples.*t = 0.5 to 0.5"):
        check_finite([record], VPSDE())


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_though_the_loss_is(norm: float) -> None:
    t, loss = torch.tensor([0.1, 0.5], dtype=torch.float64), torch.ones(2)
    check_finite([Record(11, 1e-3, torch.tensor(3.0), loss, loss, t)], VPSDE())
    with pytest.raises(FloatingPointError, match=f"step 12: 0 of 2 examples, gradient norm {norm}"):
        check_finite([Record(12, 1e-3, torch.tensor(norm), loss, loss, t)], VPSDE())


def test_the_batch_must_be_divisible(tmp_path: Path) -> None:
    config = toy_config(training__accumulate=3)
    with pytest.raises(ValueError, match="multiple of 3"):
        next(iter(train(config, tmp_path, load_data("ring"), VectorCodec(), ALONE)))


def test_the_loop_yields_a_word_each_step_and_scalars_when_asked(tmp_path: Path) -> None:
    config = toy_config(training__log_freq=2, training__eval_freq=3, training__snapshot_freq=6)
    found = list(train(config, tmp_path, load_data("ring"), VectorCodec(), ALONE))
    assert [m.step for m in found if m == Metrics(m.step)] == [1, 2, 3, 4, 5, 6]
    logged = [m for m in found if "training_loss" in m.scalars]
    assert [m.step for m in logged] == [2, 4, 6]
    assert {"grad_norm", "learning_rate", "images_per_second"} <= logged[0].scalars.keys()
    assert [m.step for m in found if "eval_loss" in m.scalars] == [3, 6]
    assert [m.checkpoint.name for m in found if m.checkpoint] == ["000000006.safetensors"]


def test_held_out_loss_is_the_same_at_every_call(digits: Data) -> None:
    config = image_config()
    state = make_state(config, digits.shape, torch.device("cpu"))
    values = [evaluate_loss(state, config, digits.test, codec_of(17)) for _ in range(2)]
    assert values[0] == values[1]


class Alone(Processes):
    """One of several processes that are not there: it keeps its part."""

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return values


@pytest.mark.parametrize("objective", ["denoising", "autoencoder"])
def test_held_out_loss_is_the_whole_batch_s_in_parts_and_over_processes(objective: str, digits: Data) -> None:
    kind = {"training__objective": objective, "training__batch_size": 8, "model__dropout": 0.0}
    config, codec = image_config(**kind, model__code_channels=1, training__time="importance"), codec_of(17)
    state = make_state(config, digits.shape, torch.device("cpu"))
    whole = evaluate_loss(state, config, digits.test, codec)
    seen: list[int] = []
    first = next(m for m in state.ema.modules() if isinstance(m, torch.nn.Conv2d))
    first.register_forward_pre_hook(lambda m, inputs: seen.append(len(inputs[0])))
    config.training.accumulate = 4
    assert evaluate_loss(state, config, digits.test, codec) == pytest.approx(whole, rel=1e-5) and set(seen) == {2}
    config.training.accumulate = 1
    parts = [
        evaluate_loss(state, config, digits.test, codec, None, Alone(rank, 2, torch.device("cpu"))) for rank in (0, 1)
    ]
    assert {name: (parts[0][name] + parts[1][name]) / 2 for name in whole} == pytest.approx(whole, rel=1e-5)
    assert parts[0]["eval_loss"] != pytest.approx(whole["eval_loss"], rel=1e-3)
    config.training.precision = "bfloat16"
    half = evaluate_loss(state, config, digits.test, codec)
    assert half == pytest.approx(whole, rel=0.05) and half != whole


def test_records_of_parts_become_those_of_whole_batches() -> None:
    class Two(Processes):
        """Two processes, the second of which has what the first has plus 100."""

        def gather(self, values: torch.Tensor) -> torch.Tensor:
            return torch.cat([values, values + 100])

    def record(step: int) -> Record:
        values = torch.arange(3.0) + 10 * step
        return Record(step, 0.1, torch.tensor(1.0), values[:, None].expand(3, 2), values, values.double())

    found = of_all([record(0), record(1)], Two(0, 2, torch.device("cpu")))
    assert [r.loss.tolist() for r in found] == [[0, 1, 2, 100, 101, 102], [10, 11, 12, 110, 111, 112]]
    assert [r.measure.shape for r in found] == [(6, 2)] * 2 and found[1].t.tolist() == found[1].loss.tolist()
    assert found[1].measure[:, 1].tolist() == found[1].loss.tolist() and found[1].step == 1
    assert of_all([], Two(0, 2, torch.device("cpu"))) == []
    bad = record(0)._replace(loss=torch.tensor([math.nan, 0.0, 0.0]))
    with pytest.raises(FloatingPointError, match="2 of 6 examples"):
        check_finite(of_all([bad], Two(0, 2, torch.device("cpu"))), VPSDE())


def test_held_out_loss_is_of_the_averaged_weights(digits: Data) -> None:
    config = image_config()
    state = make_state(config, digits.shape, torch.device("cpu"))

    def value() -> float:
        return evaluate_loss(state, config, digits.test, codec_of(17))["eval_loss"]

    before = value()
    with torch.no_grad():
        for p in state.model.parameters():
            p.add_(0.3)
        assert value() == before
        for p in state.ema.parameters():
            p.add_(0.3)
        assert abs(value() - before) > 1e-3


@pytest.mark.parametrize("fused", [True, False])
def test_clipping_scales_large_gradients_down_and_leaves_small_ones(fused: bool) -> None:
    """Adam's first moment after one step is (1 - beta1) times the gradient that it was given."""
    for limit, factor in ((math.inf, 1.0), (100.0, 1.0), (5.0, 1.0), (1.0, 0.2)):
        model = torch.nn.Linear(1, 2, bias=False)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.999), fused=fused)
        state = State(model, copy.deepcopy(model), optimizer)  # type: ignore[arg-type]
        gradient = torch.tensor([[3.0], [-4.0]])
        model.weight.grad = gradient.clone()
        assert update(state, limit).item() == pytest.approx(5.0)
        given = optimizer.state[model.weight]["exp_avg"] / 0.1
        torch.testing.assert_close(given, factor * gradient, rtol=1e-5, atol=0)
