"""NCSN and NCSNv2: equal to the published code, to their formulas and sizes; their levels, loss and checkpoints.

`tests/data/recorded/nets/refinenet.npz` holds what the published code computed; the README beside it says how.
"""

import json
import math
from functools import cache

import ml_collections
import numpy as np
import pytest
import torch
from torch import Tensor

import score_sde
from score_sde.config import default_config, load, validate
from score_sde.config.build import build_chain, build_model
from score_sde.config.objective import Objective
from score_sde.foreign import score_sde_pytorch as interop
from score_sde.networks import NCSN, NCSNv2
from score_sde.networks.refinenet import InstanceNormPlus, RefineNet
from tests import RECORDED, ROOT
from tests.oracles import numbers

RECORD = RECORDED / "nets" / "refinenet.npz"
NAMES = ["ncsn", "ncsnv2_64", "ncsnv2_128", "ncsnv2_256"]
BOTH = pytest.mark.parametrize("kind", ["ncsn", "ncsnv2"])


@cache
def recorded(name: str) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """(config, their weights, arrays): names and shapes as recorded, weights and inputs drawn as when recording."""
    with np.load(RECORD) as file:
        data = {key.removeprefix(f"{name}/"): file[key] for key in file.files if key.startswith(f"{name}/")}
        tensors = [line.split() for line in str(file["tensors"]).splitlines()]
    config, seed, weights = json.loads(str(data.pop("config"))), int(data.pop("seed")), {}
    random = np.random.RandomState(seed)
    for key, *shape in (line[1:] for line in tensors if line[0] == name):
        w = random.standard_normal(tuple(map(int, shape)))
        if w.ndim == 4:
            w = w / math.sqrt(w[0].size)
        else:
            w = 0.3 * w + (w.ndim == 2 or key.endswith(("alpha", "gamma")))
        weights[key] = torch.from_numpy(w).float()
    random = np.random.RandomState(100 + seed)
    for key in ("x", "v"):
        data[key] = np.float32(random.standard_normal(data["out"].shape))
    return config, weights, {key: torch.from_numpy(value) for key, value in data.items()}


def checkpoint(name: str, scale: float = 1.0) -> dict:
    """A checkpoint as score_sde_pytorch writes them, its averages `scale` times its weights."""
    config, weights, _ = recorded(name)
    m = config["model"]
    sigmas = np.exp(np.linspace(np.log(m["sigma_max"]), np.log(m["sigma_min"]), m["num_scales"]))
    model = {f"module.{key}": value for key, value in weights.items()}
    averages = [scale * value for value in weights.values()]
    return {"model": {"module.sigmas": torch.from_numpy(sigmas), **model}, "ema": {"shadow_params": averages}}


def relative(out: Tensor, expected: Tensor) -> float:
    return ((out - expected).abs().max() / expected.abs().max()).item()


def small(kind: str, channels: int = 3, **options) -> RefineNet:
    """A network of four stages in float64."""
    torch.manual_seed(0)
    options = {"width": 4, **options}
    return (NCSN(channels, levels=5, **options) if kind == "ncsn" else NCSNv2(channels, **options)).double()


# ---------------------------------------------------------------------------------------------------------------------
# The published code


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_of_the_published_code(name):
    config, _, data = recorded(name)
    model = interop.load_score_sde(checkpoint(name), config)
    assert relative(model.network(data["x"], data["label"]), data["out"]) < 5e-6
    model, x = model.double(), data["x"].double().requires_grad_()
    out = model.network(x, data["label"])
    assert relative(out, data["out"]) < 1e-7  # computed in float64, stored in float32
    (gradient,) = torch.autograd.grad(out, x, data["v"].double())
    assert relative(gradient, data["grad_x"]) < 1e-7


@pytest.mark.parametrize("name", NAMES)
def test_scores_of_the_published_code_at_its_levels(name):
    """Level y of N, the first the largest, lies at t = 1 - y/(N - 1)."""
    config, _, data = recorded(name)
    model = interop.load_score_sde(checkpoint(name), config).double()
    t = 1 - data["label"].double() / (config["model"]["num_scales"] - 1)
    assert relative(model.score(data["x"].double(), t), data["out"]) < 1e-7
    sigma = checkpoint(name)["model"]["module.sigmas"][data["label"]]
    torch.testing.assert_close(model.sde.sigma(t), sigma, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_names_come_in_the_order_of_their_parameters(name):
    config, weights, _ = recorded(name)
    network = interop.build_network(config)
    keys = interop.key_map(network, config)
    assert [key.theirs for key in keys] == list(weights)
    assert sorted(str(key.ours) for key in keys) == sorted(network.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_a_file_gives_its_averages_or_its_weights(name, tmp_path):
    config, _, _ = recorded(name)
    torch.save({**checkpoint(name, scale=1.5), "optimizer": {}, "step": 7}, tmp_path / "checkpoint_1.pth")
    raw = score_sde.load(tmp_path / "checkpoint_1.pth", config, ema=False).state_dict()
    ema = score_sde.load(tmp_path / "checkpoint_1.pth", ml_collections.ConfigDict(config)).state_dict()
    for key, value in raw.items():
        assert torch.equal(ema[key], value if key.endswith("divisors") else 1.5 * value)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("model", "normalization", "VarianceNorm", "must be \"InstanceNorm\\+\\+\", got 'VarianceNorm'"),
        ("model", "nf", 6, r"first.weight of shape \(4, 3, 3, 3\), the config's network \(6, 3, 3, 3\)"),
        ("model", "name", "ncsnv2_128", "network has .* tensors that the checkpoint lacks, such as refine5"),
        ("model", "sigma_max", 50.0, "noise levels from 20 to 0.1, the config from model.sigma_max=50"),
        ("training", "sde", "vpsde", "training.sde of NCSN and NCSNv2 must be \"vesde\", got 'vpsde'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(section, key, value, message):
    config, _, _ = recorded("ncsnv2_64")
    changed = {name: {**content} for name, content in config.items()}
    changed[section][key] = value
    with pytest.raises(ValueError, match=message):
        interop.load_score_sde(checkpoint("ncsnv2_64"), changed, ema=False)


def test_a_checkpoint_without_its_levels_is_refused():
    config, _, _ = recorded("ncsnv2_64")
    state = checkpoint("ncsnv2_64")
    del state["model"]["module.sigmas"]
    with pytest.raises(ValueError, match="lacks the table `sigmas`, by which the network's output is divided"):
        interop.load_score_sde(state, config)


@pytest.mark.parametrize(
    ("network", "count"),
    [
        (lambda: NCSN(3, levels=10), 30_117_635),
        (lambda: NCSNv2(3), 29_694_083),
        (lambda: NCSNv2(3, multipliers=(1, 2, 2, 4, 4)), 83_445_379),
        (lambda: NCSNv2(3, multipliers=(1, 2, 2, 2, 4, 4)), 94_132_611),
    ],
    ids=NAMES,
)
def test_parameter_counts_are_the_published_code_s(network, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in network().parameters()) == count


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def test_instance_norm_plus_is_its_formula():
    norm, x = InstanceNormPlus(3).double(), numbers(2, 3, 4, 5) + numbers(3, 1, 1, seed=4)
    gamma, alpha, beta = numbers(3, 3, seed=1)
    norm.load_state_dict({"gamma": gamma, "alpha": alpha, "beta": beta})
    out = norm(x, None)
    for b in range(2):
        means = np.array([x[b, c].numpy().mean() for c in range(3)])
        spread = math.sqrt(((means - means.mean()) ** 2).sum() / 2 + 1e-5)
        for c in range(3):
            z = (x[b, c] - means[c]) / math.sqrt(x[b, c].numpy().var() + 1e-5)
            expected = gamma[c] * (z + alpha[c] * (means[c] - means.mean()) / spread) + beta[c]
            torch.testing.assert_close(out[b, c], expected, rtol=0, atol=1e-13)


def test_norms_begin_near_one():
    """alpha and gamma are N(1, 0.02²), beta is 0."""
    torch.manual_seed(0)
    network = NCSN(1, levels=40, width=16)
    gamma, alpha, beta = network.norm.table.chunk(3, dim=1)  # 640 numbers each: 3.5 standard errors
    assert beta.abs().max() == 0
    for scale in (gamma, alpha):
        assert abs(scale.mean() - 1) < 0.0028 and abs(scale.std() / 0.02 - 1) < 0.1


def test_between_two_indices_the_parameters_of_the_norms_are_interpolated():
    """At 1.25 the network's are 3/4 of row 1 and 1/4 of row 2; beyond both ends they are the last row's."""
    network, x = small("ncsn"), numbers(1, 3, 8, 8)
    for label, rows in [(1.25, 0.75 * torch.eye(5)[1] + 0.25 * torch.eye(5)[2]), (-3.0, torch.eye(5)[0])]:
        mixed = small("ncsn")
        for norm in mixed.modules():
            if hasattr(norm, "table"):
                norm.table.data[:] = rows.double() @ norm.table
        out = network(x, torch.tensor([label]))
        torch.testing.assert_close(out, mixed(x, torch.tensor([3])), rtol=0, atol=1e-12)
        assert not torch.allclose(out, network(x, torch.tensor([2])), atol=1e-3)
    assert torch.equal(network(x, torch.tensor([4])), network(x, torch.tensor([9.5])))


def test_ncsnv2_ignores_the_label():
    network, x = small("ncsnv2"), numbers(2, 3, 8, 8)
    assert torch.equal(network(x, torch.zeros(2)), network(x, torch.full((2,), 700.0)))


# ---------------------------------------------------------------------------------------------------------------------
# Networks


LABEL = torch.tensor([1, 3])


@BOTH
@pytest.mark.parametrize("size", [(13, 7), (8, 19), (4, 4), (1, 1)], ids=str)
def test_any_size_is_padded_by_the_border_and_cropped(kind, size):
    network, x = small(kind, multipliers=(1, 2, 2, 2, 2)), numbers(2, 3, *size)
    whole = torch.nn.functional.pad(x, (0, -size[1] % 4, 0, -size[0] % 4), mode="replicate")
    out = network(x, LABEL)
    assert out.shape == x.shape and torch.isfinite(out).all()
    torch.testing.assert_close(out, network(whole, LABEL)[..., : size[0], : size[1]], rtol=0, atol=1e-13)


@BOTH
def test_examples_do_not_see_each_other(kind):
    network, x = small(kind), numbers(2, 3, 8, 8)
    torch.testing.assert_close(network(x, LABEL)[1:], network(x[1:], LABEL[1:]), rtol=0, atol=1e-13)


@BOTH
def test_uncentred_data_are_mapped_to_the_centred_range(kind):
    x = numbers(2, 3, 8, 8)
    out, expected = small(kind, centered=False)(x, LABEL), small(kind)(2 * x - 1, LABEL)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


@BOTH
def test_checkpointing_changes_neither_output_nor_gradients(kind):
    results = []
    for recompute in [False, True]:
        network, x = small(kind, checkpoint_activations=recompute), numbers(2, 3, 8, 8).requires_grad_()
        out = network(x, LABEL)
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in network.parameters())])
    for a, b in zip(*results):
        assert torch.equal(a, b)


@BOTH
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_batched_products_are_the_single_ones(kind):
    network = small(kind)
    x, probes = numbers(2, 3, 8, 8).requires_grad_(), numbers(3, 2, 3, 8, 8, seed=1)
    out = network(x, LABEL)
    (together,) = torch.autograd.grad(out, x, probes, retain_graph=True, is_grads_batched=True)
    singly = torch.stack([torch.autograd.grad(out, x, v, retain_graph=True)[0] for v in probes])
    torch.testing.assert_close(together, singly, rtol=0, atol=1e-12)


@BOTH
def test_gradient_of_a_directional_derivative_is_its_slope(kind):
    """d/dw v·(dF/dx)v along a direction of the weights, as sliced score matching needs it, beside finite differences.

    ELU's second derivative jumps at 0 and max pooling chooses: swish, and a step so small that no maximum changes.
    """
    network, x, v = small(kind, activation="swish"), numbers(1, 3, 8, 8).requires_grad_(), numbers(1, 3, 8, 8, seed=1)
    weights = [p for p in network.parameters() if p.ndim == 4]
    directions = [numbers(*p.shape, seed=i) for i, p in enumerate(weights)]

    def curvature() -> Tensor:
        (product,) = torch.autograd.grad(network(x, LABEL[:1]), x, v, create_graph=True)
        return (product * v).sum()

    gradients = torch.autograd.grad(curvature(), weights)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions))
    values, h = [], 1e-6
    for step in (h, -2 * h):
        for p, d in zip(weights, directions):
            p.data += step * d
        values.append(curvature().detach())
    torch.testing.assert_close(slope, (values[0] - values[1]) / (2 * h), rtol=1e-4, atol=0)


@BOTH
def test_channels_last_gives_the_same(kind):
    network, x = small(kind), numbers(2, 3, 8, 8)
    expected = network(x, LABEL)
    network.to(memory_format=torch.channels_last)
    out = network(x.contiguous(memory_format=torch.channels_last), LABEL)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_the_graph_has_no_breaks():
    network, x = small("ncsn", multipliers=(1, 1, 1, 1)), numbers(2, 3, 7, 8)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, LABEL), network(x, LABEL), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"multipliers": (1, 2)}, r"at least 3 stages, the last two dilated, got multipliers \(1, 2\)"),
        ({"width": 1}, r"width must be at least 2, because InstanceNorm\+\+ compares channels, got 1"),
        ({"activation": "gelu"}, "unknown activation 'gelu'; use one of 'elu', 'relu'"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        small("ncsnv2", **options)


# ---------------------------------------------------------------------------------------------------------------------
# Models from a config


def config_of(name: str, **changes: object) -> ml_collections.ConfigDict:
    shrunk = {"model.nf": "4", "model.ch_mult": "1,1,1"}
    return load(ROOT / "configs" / f"{name}.py", shrunk | {k.replace("__", "."): str(v) for k, v in changes.items()})


@pytest.mark.parametrize(("name", "first", "levels"), [("ncsn_cifar", 1.0, 10), ("ncsnv2_cifar", 50.0, 232)])
def test_the_levels_are_the_published_ones_from_small_to_large(name, first, levels):
    theirs = np.exp(np.linspace(np.log(first), np.log(0.01), levels))
    ours = build_chain(config_of(name)).sigmas.numpy()
    np.testing.assert_allclose(ours[::-1], theirs, rtol=1e-12)


def test_ncsn_s_norms_take_the_row_of_the_chain_s_step_and_its_output_is_the_score():
    config = config_of("ncsn_cifar")
    model, x = build_model(config, (3, 8, 8)).double(), numbers(10, 3, 8, 8)
    index = torch.arange(10)
    t = (index + 1).double() / 10
    torch.testing.assert_close(model.score(x, t), model.network(x, index), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model.sde.sigma(t), build_chain(config).sigmas, rtol=1e-12, atol=0)


def test_ncsnv2_s_score_is_the_output_over_sigma_up_to_its_sign():
    model, x = build_model(config_of("ncsnv2_cifar"), (3, 8, 8)).double(), numbers(3, 3, 8, 8)
    t = torch.tensor([1, 100, 232]).double() / 232
    sigma = model.sde.sigma(t)[:, None, None, None]
    torch.testing.assert_close(model.score(x, t), -model.network(x, t) / sigma, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["ncsn_cifar", "ncsnv2_cifar"])
def test_the_loss_is_half_sigma_squared_times_the_score_s_error(name):
    """1/2 sigma² ||s(x0 + sigma z) + z/sigma||² (Song & Ermon 2019, eq. 5-6 with lambda = sigma²): weight 1 here."""
    config = config_of(name)
    model, n = build_model(config, (3, 8, 8)).double(), config.model.num_scales
    x0, z = numbers(2, 4, 3, 8, 8)
    index = torch.tensor([0, 2, n // 2, n - 1])
    t = (index + 1).double() / n
    sigma = build_chain(config).sigmas[index]
    s = model.score(x0 + sigma[:, None, None, None] * z, t)
    error = (s + z / sigma[:, None, None, None]).square().flatten(1).sum(1)
    loss, _ = Objective(model, config)(x0, t, z, z[:, None][:, :0])
    torch.testing.assert_close(loss, sigma**2 / 2 * error, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["ncsn_cifar", "ncsnv2_cifar"])
def test_sliced_score_matching_is_weighted_alike_on_every_level(name):
    """sigma² (v·∂(v·s) + |s|²/2) at x0 + sigma z, up to half the dimension (Song & Ermon 2019, section 4.2)."""
    config = config_of(name, training__objective="sliced_vr", training__projections=2)
    model, n = build_model(config, (3, 8, 8)).double(), config.model.num_scales
    x0, z = numbers(2, 3, 3, 8, 8)
    v = numbers(3, 2, 3, 8, 8, seed=1)
    index = torch.tensor([0, n // 2, n - 1])
    t, sigma = (index + 1).double() / n, build_chain(config).sigmas[index]
    x = (x0 + sigma[:, None, None, None] * z).requires_grad_()
    s = model.score(x, t)
    slopes = []
    for direction in v.sign().unbind(1):
        (product,) = torch.autograd.grad((s * direction).sum(), x, retain_graph=True)
        slopes.append((product * direction).flatten(1).sum(1))
    expected = sigma**2 * (torch.stack(slopes).mean(0) + s.square().flatten(1).sum(1) / 2) + x0[0].numel() / 2
    loss, _ = Objective(model, config)(x0, t, z, v)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__label": "time"}, "model.name=ncsn has parameters for each noise level of a chain: set model.label="),
        ({"training__continuous": False, "model__label": "index"}, "has no dropout: set model.dropout=0, not 0.1"),
        ({"model__name": "ncsnv2", "model__dropout": 0.0, "model__ch_mult": (1, 2)}, "the last two dilated: give"),
        ({"model__name": "ncsnv2", "model__dropout": 0.0, "model__nf": 1}, "model.nf must be at least 2, got 1"),
    ],
)
def test_contradictions_are_told_in_one_sentence(changes, message):
    config = default_config()
    config.training.sde, config.model.name = "vesde", "ncsn"
    config.sampling.steps = 1000
    for key, value in changes.items():
        section, name = key.split("__")
        config[section][name] = value
    with pytest.raises(ValueError, match=message):
        validate(config)
