"""EDM2's network: magnitudes, forced weight normalisation, its formula, its sizes."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from score_sde import cli
from score_sde.data import load_data
from score_sde.data.codecs import codec_of
from score_sde.machine.parallel import ALONE
from score_sde.networks import EDM2
from score_sde.networks.edm2 import EDM2Block, MPAttention
from score_sde.networks.levels import LevelOptions
from score_sde.networks.magnitude import MPClasses, MPConv, MPFourier, mp_cat, mp_silu, mp_sum, normalise_, unit
from score_sde.tasks.train import train
from tests import RECORDED
from tests.oracles import awake, numbers
from tests.runs import image_config, line, refused, results, two_nodes

TINY = {"width": 8, "multipliers": (1, 2), "blocks": 2, "attention": (4,), "image_size": 8, "head_channels": 4}
LABEL = torch.tensor([0.03, 0.5, 7.0], dtype=torch.float64).log() / 4
CLASS = torch.tensor([1, 4, -1])
OPTIONS = LevelOptions(width=8, heads=2, dropout=0.0, label_width=6)


def small(**options: object) -> EDM2:
    torch.manual_seed(0)
    network = EDM2(3, **{**TINY, **options})  # type: ignore[arg-type]
    return awake(network).double().eval()  # type: ignore[return-value]


def magnitude(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


# --- sizes and the published code


@pytest.mark.parametrize(
    ("width", "millions"), [(128, 124.7), (192, 280.2), (256, 497.8), (320, 777.5), (384, 1119.3), (448, 1523.2)],
    ids=["XS", "S", "M", "L", "XL", "XXL"],
)  # fmt: skip
def test_parameter_counts_are_the_paper_s(width: int, millions: float) -> None:
    """Of latents 4x64x64 with ImageNet's classes; the published ones have 128 more, for the uncertainty."""
    with torch.device("meta"):
        network = EDM2(4, width=width, classes=1000)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize(("name", "classes"), [("classes", 5), ("plain", 0)])
def test_it_is_the_published_network(name: str, classes: int) -> None:
    """Recorded from NVlabs/edm2; `tests/data/recorded/nets/README.md` says how."""
    network = EDM2(3, **TINY, classes=classes)  # type: ignore[arg-type]
    random = np.random.RandomState(0)
    for _, value in sorted(network.state_dict().items()):
        value.copy_(torch.from_numpy(random.standard_normal(value.shape)))
    x, v = (torch.from_numpy(np.random.RandomState(seed).standard_normal((3, 3, 8, 8))).float() for seed in (1, 2))
    told = {"label": CLASS} if classes else {}
    with np.load(RECORDED / "nets" / "edm2_network.npz") as file:
        recorded = {key: torch.from_numpy(file[f"{name}.{key}"]) for key in ("out", "trained", "gradient", "weight")}
    close = {"rtol": 0, "atol": 1e-5}  # float32; training normalises twice, which changes the output by 1e-4
    torch.testing.assert_close(network.eval()(x, LABEL.float(), **told), recorded["out"], **close)
    trained = network.train()(x, LABEL.float(), **told)
    torch.testing.assert_close(trained, recorded["trained"], **close)
    (gradient,) = torch.autograd.grad((trained * v).sum(), network.first.weight)
    torch.testing.assert_close(gradient, recorded["gradient"], **close)
    torch.testing.assert_close(network.first.weight.detach(), recorded["weight"], rtol=0, atol=1e-6)


# --- magnitudes


def test_mp_silu_has_magnitude_1_on_normal_numbers() -> None:
    z, weight = np.polynomial.hermite_e.hermegauss(60)
    square = mp_silu(torch.from_numpy(z)).square().numpy() @ weight / weight.sum()
    assert math.sqrt(square) == pytest.approx(1, abs=1e-3)  # 0.596 has three digits
    assert float(mp_silu(torch.tensor(2.0))) == pytest.approx(2 / (1 + math.exp(-2)) / 0.596, rel=1e-6)


def orthogonal(a: int, b: int) -> tuple[Tensor, Tensor]:
    """Features (1, a, 16) and (1, b, 16) of magnitude 1, channels along Hadamard's rows, so that all are orthogonal."""
    rows = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    return rows[None, :a], rows[None, a : a + b]


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_sums_keep_the_magnitude_of_orthogonal_features(t: float) -> None:
    a, b = orthogonal(5, 5)
    total = mp_sum(a, b, t)
    assert magnitude(total) == pytest.approx(1, abs=1e-15)
    norm = math.sqrt((1 - t) ** 2 + t**2)
    torch.testing.assert_close(total, ((1 - t) * a + t * b) / norm, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("a", "b"), [(4, 4), (2, 9), (10, 3)])
def test_concatenations_keep_the_magnitude_and_both_parts_count_equally(a: int, b: int) -> None:
    joined = mp_cat(*orthogonal(a, b))
    assert magnitude(joined) == pytest.approx(1, abs=1e-15)
    first, second = joined.square().sum((0, 2)).split([a, b])
    assert float(first.sum()) == pytest.approx(float(second.sum()), rel=1e-14)


def test_fourier_features_have_magnitude_1() -> None:
    """Exactly, in the mean over phases that are evenly spread; and waves of the label in whole turns."""
    waves = MPFourier(7).double()
    waves.frequencies.fill_(0.3)
    waves.phases.copy_(torch.arange(7).double() / 7)
    label = torch.tensor([-1.3, 0.0, 0.8], dtype=torch.float64)
    torch.testing.assert_close(waves(label).square().mean(1), torch.ones(3).double(), rtol=0, atol=1e-14)
    expected = [[math.sqrt(2) * math.cos(2 * math.pi * (0.3 * t + i / 7)) for i in range(7)] for t in label.tolist()]
    np.testing.assert_allclose(waves(label), expected, rtol=0, atol=1e-13)


def test_random_waves_are_drawn_as_the_paper_says() -> None:
    torch.manual_seed(0)
    waves = MPFourier(100_000)
    assert waves.frequencies.mean().abs() < 4 / math.sqrt(1e5)
    assert waves.frequencies.var().item() == pytest.approx(1, abs=4 * math.sqrt(2 / 1e5))
    assert waves.phases.mean().item() == pytest.approx(0.5, abs=4 / math.sqrt(12e5))
    assert 0 <= waves.phases.min() < 1e-3 and 1 - 1e-3 < waves.phases.max() < 1


@pytest.mark.parametrize(("size", "dimensions"), [(1, 0), (1, 2), (3, 1), (3, 2), (3, 3)])
def test_layers_keep_the_magnitude_of_independent_inputs(size: int, dimensions: int) -> None:
    """The output is a sum over inputs with weights of squared sum 1: those that single impulses come back with."""
    torch.manual_seed(0)
    layer = MPConv(4, 5, size, dimensions).double()
    with torch.no_grad():
        layer.weight *= torch.linspace(0.5, 20, 5).reshape(-1, *[1] * (dimensions + 1))  # lengths do not count
    impulses = torch.zeros(4, 4, *[5] * dimensions, dtype=torch.float64)
    for i in range(4):
        impulses[(i, i, *[2] * dimensions)] = 1
    squares = layer(impulses).square().transpose(0, 1).flatten(1).sum(1)
    torch.testing.assert_close(squares, torch.ones(5).double(), rtol=0, atol=5e-4)  # eps = 1e-4, of rows of 0.3
    doubled = layer(impulses, gain=torch.tensor(2.0).double()).square().transpose(0, 1).flatten(1).sum(1)
    torch.testing.assert_close(doubled, 4 * squares, rtol=1e-12, atol=0)


def test_layers_are_matrices_with_unit_rows_and_without_a_bias() -> None:
    layer, x = MPConv(6, 3).double(), numbers(2, 6)
    rows = layer.weight / (1e-4 + layer.weight.square().mean(1, keepdim=True).sqrt()) / math.sqrt(6)
    torch.testing.assert_close(layer(x), x @ rows.T, rtol=0, atol=1e-13)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]


def test_embedded_classes_have_magnitude_1_over_the_classes() -> None:
    """A fully connected layer of one-hot labels that are scaled by sqrt(classes), and zeros for none."""
    torch.manual_seed(0)
    table = MPClasses(7, 5).double()
    found = table(torch.arange(7), 7)
    torch.testing.assert_close(found.square().mean(0), torch.ones(5).double(), rtol=0, atol=1e-3)
    layer = MPConv(7, 5).double()
    layer.weight = nn.Parameter(table.table.T)
    torch.testing.assert_close(found, layer(math.sqrt(7) * torch.eye(7).double()), rtol=0, atol=1e-13)
    assert not table(torch.tensor([-1]), 1).any()


def test_pixel_norm_sets_the_magnitude_of_each_pixel() -> None:
    x = numbers(2, 6, 3, 4)
    expected = x / (1e-4 + x.square().mean(1, keepdim=True).sqrt())
    torch.testing.assert_close(unit(x, [1]), expected, rtol=0, atol=1e-14)
    with torch.no_grad():  # zeros stay zeros, and have a gradient
        assert not unit(torch.zeros_like(x), [1]).any()
    zeros = torch.zeros(1, 2, requires_grad=True)
    assert torch.autograd.grad(unit(zeros, [1]).sum(), zeros)[0].isfinite().all()


def test_a_fresh_network_has_features_of_magnitude_about_1_everywhere() -> None:
    """Every convolution's output, on normal input: borders of zeros and inputs that are not independent change it."""
    torch.manual_seed(0)
    network = EDM2(3, width=64, multipliers=(1, 2), blocks=2, attention=(), image_size=16)
    found: dict[str, float] = {}
    for name, module in network.named_modules():
        if isinstance(module, MPConv) and "label" not in name and "attention" not in name and name != "last":
            module.register_forward_hook(lambda m, i, out, name=name: found.update({name: magnitude(out)}))
    with torch.no_grad():
        network(torch.randn(8, 3, 16, 16), torch.linspace(-1, 1, 8))
    assert len(found) > 20 and all(0.65 < value < 1.15 for value in found.values()), found


# --- the blocks


def conv(layer: MPConv, x: Tensor) -> Tensor:
    """The published convolution, written out."""
    w = layer.weight
    w = w / (1e-4 + w.square().mean(tuple(range(1, w.ndim)), keepdim=True).sqrt()) / math.sqrt(w[0].numel())
    return F.linear(x, w) if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


SILU = lambda x: x / (1 + torch.exp(-x)) / 0.596
PIXEL_NORM = lambda x: x / (1e-4 + x.square().mean(1, keepdim=True).sqrt())


@pytest.mark.parametrize("decodes", [False, True])
@pytest.mark.parametrize("outputs", [8, 12])
def test_a_block_is_its_formula(decodes: bool, outputs: int) -> None:
    torch.manual_seed(0)
    block = awake(EDM2Block(8, outputs, OPTIONS, decodes=decodes)).double()
    x, label = numbers(2, 8, 3, 5), numbers(2, 6, seed=1)
    short = (lambda h: conv(block.shortcut, h)) if outputs != 8 else lambda h: h
    start = x if decodes else PIXEL_NORM(short(x))
    h = conv(block.inner, SILU(start)) * (1 + block.gain * conv(block.label, label))[..., None, None]
    h = conv(block.outer, SILU(h))
    expected = (0.7 * (short(start) if decodes else start) + 0.3 * h) / math.sqrt(0.58)
    torch.testing.assert_close(block(x, label), expected, rtol=0, atol=1e-12)
    large = block(300 * x / x.abs().max(), label) if decodes and outputs == 8 else block(x, label)
    assert large.abs().max() <= 256


def test_cosine_attention_is_its_formula() -> None:
    torch.manual_seed(0)
    layer = MPAttention(8, OPTIONS).double()
    x = numbers(2, 8, 3, 5)
    q, k, v = (part.unflatten(2, (2, 4)) for part in conv(layer.qkv, x.flatten(2).transpose(1, 2)).chunk(3, dim=2))
    q, k, v = (part / (1e-4 + part.square().mean(3, keepdim=True).sqrt()) for part in (q, k, v))
    weight = torch.softmax(torch.einsum("bnhc,bmhc->bhnm", q, k) / 2, dim=3)
    h = conv(layer.out, torch.einsum("bhnm,bmhc->bnhc", weight, v).flatten(2)).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(layer(x), (0.7 * x + 0.3 * h) / math.sqrt(0.58), rtol=0, atol=1e-12)


def test_features_are_clipped() -> None:
    block = awake(EDM2Block(8, 8, OPTIONS, decodes=True)).double()
    h = block(1e3 * numbers(1, 8, 3, 5), numbers(1, 6))
    assert h.max() == 256 and h.min() == -256


# --- forced weight normalisation


def test_gradients_are_orthogonal_to_their_weights() -> None:
    """Row by row: what a row's length changes is nothing but the eps of 1e-4."""
    network = small(classes=5).train()
    out = network(numbers(3, 3, 8, 8), LABEL, label=CLASS)
    (out * numbers(*out.shape, seed=1)).sum().backward()
    rows = [(m.weight, m.weight.grad) for m in network.modules() if isinstance(m, MPConv)]
    rows.append((network.classes.table.T, network.classes.table.grad.T))
    for weight, gradient in rows:
        w, g = weight.detach().flatten(1), gradient.flatten(1)
        assert ((w * g).sum(1).abs() <= 2e-4 * w.norm(dim=1) * g.norm(dim=1)).all() and g.any()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_keeps_rows_at_magnitude_1(tmp_path: Path, accumulate: int) -> None:
    """At every evaluation: without it, three Adam steps of 0.1 lengthen them by some per cent."""
    config = image_config(
        model__name="edm2", model__label="edm", model__rule="edm", model__class_conditional=True, model__num_classes=10,
        optim__lr=0.1, optim__warmup=0, optim__grad_clip=-1.0, training__accumulate=accumulate,
    )  # fmt: skip
    config.training.n_iters, config.training.snapshot_freq, config.training.log_freq = 3, 3, 1
    data = load_data("digits")
    seen, norms = [], lambda m: [w.square().mean(tuple(range(1, w.ndim))).sqrt() for w in weights(m)]
    original = EDM2._embedded

    def watched(self: EDM2, *arguments: object) -> Tensor:
        if self.training:
            seen.append(torch.cat([norm.detach() for norm in norms(self)]))
        return original(self, *arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EDM2, "_embedded", watched)
        list(train(config, tmp_path, data, codec_of(data.levels), ALONE))
    assert len(seen) == 3 * accumulate and (seen[0] - 1).abs().max() < 1e-3  # eps beside rows drawn at random
    assert all((norm - 1).abs().max() < 1.2e-4 for norm in seen[1:])


def weights(network: nn.Module) -> list[Tensor]:
    """All normalised weights, rows first."""
    found = [m.weight for m in network.modules() if isinstance(m, MPConv)]
    return found + [m.table.T for m in network.modules() if isinstance(m, MPClasses)]


def test_forced_normalisation_reaches_every_weight_and_gains_alone_stay() -> None:
    network = small(classes=5)
    normal = {id(w) for w in weights(network)} | {id(network.classes.table)}
    others = [name for name, p in network.named_parameters() if id(p) not in normal]
    assert others == ["gain", *(f"{way}.{i}.gain" for way, n in (("down", 5), ("up", 9)) for i in range(n))]
    normalise_(network)
    for w in weights(network):
        torch.testing.assert_close(
            w.square().mean(tuple(range(1, w.ndim))).sqrt(), torch.ones(len(w)).double(), rtol=0, atol=1e-3
        )


def test_evaluation_changes_no_weight_and_counts_directions_alone() -> None:
    network, x = small(classes=5), numbers(3, 3, 8, 8)
    before = copy.deepcopy(network.state_dict())
    out = network(x, LABEL, label=CLASS)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(network(x, LABEL, label=CLASS), out)
    with torch.no_grad():
        for w in weights(network):
            w *= torch.linspace(1, 3, len(w)).reshape(-1, *[1] * (w.ndim - 1))
    torch.testing.assert_close(network(x, LABEL, label=CLASS), out, rtol=0, atol=1e-3)  # eps


def test_two_evaluations_may_come_before_a_backward_pass() -> None:
    """As in losses by differences: the second normalises weights that the first still needs."""
    network, x = small().train(), numbers(3, 3, 8, 8)
    normalise_(network)
    loss = lambda: (network(x + 0.1, LABEL) - network(x, LABEL)).square().sum()
    loss().backward()
    weight = network.up[0].inner.weight
    way = numbers(*weight.shape, seed=3)
    ends = []
    network.eval()  # the same function, whose weights stay
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            weight += step * way
            ends.append(loss().item())
            weight -= step * way
    assert float((weight.grad * way).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=2e-3)  # eps, twice


# --- the network


def test_it_starts_at_nothing() -> None:
    assert not EDM2(3, **TINY)(numbers(3, 3, 8, 8).float(), LABEL.float()).any()  # type: ignore[arg-type]


def test_classes_are_told_and_none_is_zeros() -> None:
    network, x = small(classes=5), numbers(3, 3, 8, 8)
    out = network(x, LABEL, label=CLASS)
    for i, label in enumerate(CLASS.tolist()):
        torch.testing.assert_close(out[i : i + 1], network(x[i : i + 1], LABEL[i : i + 1], label=label))
    torch.testing.assert_close(network(x, LABEL), network(x, LABEL, label=-1))
    assert (network(x, LABEL, label=0) - network(x, LABEL, label=1)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="takes no condition label"):
        small()(x, LABEL, label=1)
    with pytest.raises(ValueError, match="takes no condition text"):
        network(x, LABEL, text=numbers(3, 2, 4))


@pytest.mark.parametrize("size", [(7, 7), (8, 5), (1, 3)], ids=str)
def test_any_size_is_padded_by_the_border_and_cropped(size: tuple[int, int]) -> None:
    network, x = small(), numbers(3, 3, *size)
    whole = np.pad(x.numpy(), [(0, 0), (0, 0), (0, size[0] % 2), (0, size[1] % 2)], mode="edge")
    assert torch.equal(network(x, LABEL), network(torch.from_numpy(whole), LABEL)[..., : size[0], : size[1]])


def test_uncentred_data_are_mapped_to_the_centred_range() -> None:
    x = numbers(3, 3, 8, 8)
    torch.testing.assert_close(small(centered=False)(x, LABEL), small()(2 * x - 1, LABEL), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("shape", "dimensions"), [((3, 8), 1), ((3, 4, 8, 4), 3)])
def test_signals_and_volumes(shape: tuple[int, ...], dimensions: int) -> None:
    network, x = small(dimensions=dimensions), numbers(3, *shape)
    assert network(x, LABEL).shape == x.shape and network.first.weight.ndim == dimensions + 2


def test_checkpointing_changes_neither_output_nor_gradients() -> None:
    results = []
    for recompute in (False, True):
        network = small(dropout=0.3, checkpoint_activations=recompute).train()
        x = numbers(3, 3, 8, 8).requires_grad_()
        torch.manual_seed(1)
        out = network(x, LABEL)
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in network.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert (results[0][0] - small().train()(numbers(3, 3, 8, 8), LABEL)).abs().max() > 1e-3  # something is dropped


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="16 channels do not divide into heads of 5"):
        EDM2(3, **{**TINY, "head_channels": 5})  # type: ignore[arg-type]


# --- commands


def command(mode: str, workdir: Path) -> list[str]:
    return line("edm2_digits", mode, workdir, training__snapshot_freq=4, optim__warmup=0, sampling__method="heun",
                model__ch_mult="1,2", model__attn_resolutions=4)  # fmt: skip


def test_two_processes_train_as_one_and_draw_and_evaluate_by_the_average(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert two_nodes(tmp_path, lambda rank, folder: cli.run(command("train", two))) == [0, 0]
    assert [cli.run(command(mode, one)) for mode in ("train", "sample", "likelihood")] == [0, 0, 0]
    a, b = (load_file(folder / "checkpoints" / "000000004.safetensors") for folder in (one, two))
    for name in a:
        if name.startswith(("model/", "ema/")):  # four steps of Adam that move each number by 0.01 at first
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-4)
    assert any(name.startswith("ema/") for name in a)
    assert results(one, "samples")["arr_0"].shape == (4, 8, 8, 1)
    assert np.isfinite(results(one, "likelihood")["bits_per_dim"]).all()


def test_labels_that_its_waves_cannot_tell_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*command("train", tmp_path), "--config.model.label=log_sigma"]
    assert "model.name=edm2 has waves for labels of order 1: set model.label=edm, not 'log_sigma'" in refused(
        capsys, words
    )
