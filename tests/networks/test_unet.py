"""Networks: resampling by its definition, blocks by their formulas, the U-Net: sizes, gradients and switches."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from score_sde import VPSDE
from score_sde.data.toys import EXACT, ring
from score_sde.networks import MLP, UNet
from score_sde.networks.blocks import Attention, Fourier, ResidualBlock, Sinusoidal, Style, Waves
from score_sde.networks.layers import ACTIVATIONS, Dropout, conv, group_norm, variance_scaling_
from score_sde.networks.resample import ConvDown, ConvUp, down, up
from tests import RECORDED
from tests.oracles import STYLE, numbers

TAPS = pytest.mark.parametrize(
    "taps", [(1, 3, 3, 1), (1, 2, 1), (1, 1), (1,), (1, 4, 6, 4, 1), (1, 2, 5), (1, 3, 2, 5)], ids=str
)


def small(**options) -> UNet:
    """A U-Net of two levels with attention, all of whose branches are alive."""
    torch.manual_seed(0)
    options = {
        "width": 8,
        "multipliers": (1, 2),
        "blocks": 1,
        "attention": (4,),
        "image_size": 8,
        "dropout": 0.0,
        **options,
    }
    return UNet(3, init_scale=1.0, **options).double()


def labels(network: UNet, count: int = 2) -> torch.Tensor:
    return torch.linspace(3, 700, count, dtype=torch.float64)


def test_fourier_features_of_the_input_join_its_channels() -> None:
    x = numbers(2, 3, 4, 5)
    found = Waves((7, 8))(x)
    waves = [f(2**n * math.pi * x.numpy()) for n in (7, 8) for f in (np.sin, np.cos)]
    np.testing.assert_allclose(found.numpy(), np.concatenate([x.numpy(), *waves], axis=1), rtol=0, atol=1e-12)
    # A level of 256 in [-1, 1] is half a period of the first, a whole one of the second: even and odd differ in one.
    level = torch.linspace(-1, 1, 257, dtype=torch.float64)[None, None, :, None]
    first, second = Waves((7, 8))(level)[0, [2, 4], :, 0]
    assert (first - (-1.0) ** torch.arange(257)).abs().max() < 1e-10 and (second - 1).abs().max() < 1e-10


def test_a_network_with_fourier_features_tells_levels_apart_that_it_could_not_otherwise() -> None:
    network = small(fourier_features=(7, 8))
    assert network.first.weight.shape[1] == 15 and network.head.conv.weight.shape[0] == 3
    x, label = numbers(2, 3, 8, 8), labels(network)
    changes = [(n(x + 2**-7, label) - n(x, label)).abs().mean() for n in (network, small())]
    assert changes[0] > 10 * changes[1]  # measured: 0.3 and 0.004
    uncentred = small(fourier_features=(7, 8), centered=False)
    torch.testing.assert_close(uncentred((x + 1) / 2, label), network(x, label), rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Resampling


def upfirdn(x: np.ndarray, kernel: np.ndarray, enlarge: int, shrink: int, before: int, after: int) -> np.ndarray:
    """Zero-stuff, pad (or crop, if negative), convolve, decimate: StyleGAN2's definition, on (H, W), loop by loop."""
    stuffed = np.zeros((x.shape[0] * enlarge, x.shape[1] * enlarge))
    stuffed[::enlarge, ::enlarge] = x
    padded = np.pad(stuffed, [(max(before, 0), max(after, 0))] * 2)
    padded = padded[
        max(-before, 0) : padded.shape[0] - max(-after, 0), max(-before, 0) : padded.shape[1] - max(-after, 0)
    ]
    height, width = (size - len(kernel) + 1 for size in padded.shape)
    out = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            out[i, j] = (padded[i : i + len(kernel), j : j + len(kernel)] * kernel[::-1, ::-1]).sum()
    return out[::shrink, ::shrink]


def filter_of(taps: tuple[float, ...]) -> np.ndarray:
    kernel = np.outer(taps, taps).astype(float)
    return kernel / kernel.sum()


def per_channel(x: torch.Tensor, function) -> torch.Tensor:
    return torch.stack([torch.stack([torch.from_numpy(function(c.numpy())) for c in image]) for image in x])


def in_float64(layer_of) -> nn.Module:
    """A layer with its filter in float64 from the start: a third is no float32 number."""
    torch.set_default_dtype(torch.float64)
    try:
        return layer_of()
    finally:
        torch.set_default_dtype(torch.float32)


@TAPS
def test_fir_down_is_filter_and_decimation(taps):
    x, p = numbers(2, 3, 8, 6), len(taps) - 2
    expected = per_channel(x, lambda c: upfirdn(c, filter_of(taps), 1, 2, (p + 1) // 2, p // 2))
    torch.testing.assert_close(in_float64(lambda: down(taps))(x), expected, rtol=0, atol=1e-14)


@TAPS
def test_fir_up_is_zero_stuffing_and_filter(taps):
    x, p = numbers(2, 3, 4, 6), len(taps) - 2
    expected = per_channel(x, lambda c: upfirdn(c, 4 * filter_of(taps), 2, 1, (p + 1) // 2 + 1, p // 2))
    torch.testing.assert_close(in_float64(lambda: up(taps))(x), expected, rtol=0, atol=1e-14)


@TAPS
@pytest.mark.parametrize("make", [down, up])
def test_gradient_of_fir_resampling_is_the_transposed_matrix(make, taps):
    p = len(taps) - 2
    layer = in_float64(lambda: make(taps))
    arguments = (
        (filter_of(taps), 1, 2, (p + 1) // 2, p // 2)
        if make is down
        else (4 * filter_of(taps), 2, 1, (p + 1) // 2 + 1, p // 2)
    )
    columns = [upfirdn(unit.reshape(4, 4), *arguments).ravel() for unit in np.eye(16)]
    x = numbers(1, 1, 4, 4).requires_grad_()
    out = layer(x)
    v = numbers(*out.shape, seed=1)
    (gradient,) = torch.autograd.grad(out, x, v)
    expected = torch.from_numpy(np.stack(columns)) @ v.flatten()
    torch.testing.assert_close(gradient.flatten(), expected, rtol=0, atol=1e-13)


def convolve(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Sum over input channels of the "valid" correlation of x (I, H, W) with weight (O, I, 3, 3)."""
    height, width = x.shape[1] - 2, x.shape[2] - 2
    out = np.zeros((len(weight), height, width))
    for i in range(height):
        for j in range(width):
            out[:, i, j] = (weight * x[None, :, i : i + 3, j : j + 3]).sum((1, 2, 3))
    return out


@TAPS
def test_fused_fir_convolution_down(taps):
    """The filter with two more zeros around the image than alone, then every second pixel of a convolution."""
    layer, p = in_float64(lambda: ConvDown(2, 3, taps)), len(taps)
    x = numbers(1, 2, 8, 6)
    blurred = np.stack([upfirdn(c.numpy(), filter_of(taps), 1, 1, (p + 1) // 2, p // 2) for c in x[0]])
    expected = convolve(blurred, layer.conv.weight.detach().numpy())[:, ::2, ::2]
    np.testing.assert_allclose(layer(x)[0].detach(), expected, rtol=0, atol=1e-13)


@TAPS
def test_fused_fir_convolution_up(taps):
    """Zero-stuffing, the whole convolution, the filter: StyleGAN2's order."""
    layer, p = in_float64(lambda: ConvUp(2, 3, taps)), len(taps) - 4
    x = numbers(1, 2, 4, 6)
    stuffed = np.stack([upfirdn(c.numpy(), np.ones((1, 1)), 2, 1, 2, 1) for c in x[0]])
    convolved = convolve(stuffed, layer.conv.weight.detach().numpy())
    expected = np.stack([upfirdn(c, 4 * filter_of(taps), 1, 1, (p + 1) // 2 + 1, p // 2 + 1) for c in convolved])
    np.testing.assert_allclose(layer(x)[0].detach(), expected, rtol=0, atol=1e-13)


def test_fused_convolution_up_is_upsampling_and_convolution_inside():
    layer, x = ConvUp(2, 3, (1, 3, 3, 1)).double(), numbers(2, 2, 8, 8)
    apart = layer.conv(up((1, 3, 3, 1)).double()(x))
    torch.testing.assert_close(layer(x)[..., 2:-2, 2:-2], apart[..., 2:-2, 2:-2], rtol=0, atol=1e-13)


def test_plain_resampling_is_mean_and_repetition():
    x = numbers(2, 3, 4, 6)
    torch.testing.assert_close(down(None)(x), x.reshape(2, 3, 2, 2, 3, 2).mean((3, 5)))
    assert torch.equal(up(None)(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    layer = ConvDown(3, 4, None).double()  # pads as TensorFlow's "SAME" does: below and to the right
    torch.testing.assert_close(layer(x), F.conv2d(F.pad(x, (0, 1, 0, 1)), layer.conv.weight, layer.conv.bias, stride=2))


def test_repetition_and_convolution_in_one_are_the_two():
    x, layer = numbers(2, 3, 4, 6).requires_grad_(), conv(3, 5, 3).double()
    nn.init.normal_(layer.bias)
    repeat = up(None).double()
    together, apart = repeat.convolve(x, layer), layer(repeat(x))
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-13)
    v = numbers(*apart.shape, seed=1)
    inputs = [x, layer.weight, layer.bias]
    for a, b in zip(torch.autograd.grad(together, inputs, v), torch.autograd.grad(apart, inputs, v)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [down, up])
def test_resampling_keeps_a_constant_image_and_the_memory_format(make):
    x = torch.full((1, 8, 16, 16), 0.7).to(memory_format=torch.channels_last)
    out = make((1, 3, 3, 1))(x)
    torch.testing.assert_close(out[..., 2:-2, 2:-2], torch.full_like(out[..., 2:-2, 2:-2], 0.7))
    assert out.is_contiguous(memory_format=torch.channels_last)


def along(axis: int, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A map of signals along one axis of x (1, 1, ...)."""
    lines = x.movedim(axis, -1)
    out = layer(lines.reshape(-1, 1, lines.shape[-1])).reshape(*lines.shape[:-1], -1)
    return out.movedim(-1, axis)


@pytest.mark.parametrize("taps", [None, (1, 3, 3, 1), (1, 2, 5)], ids=str)
@pytest.mark.parametrize("make", [down, up, ConvDown, ConvUp])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_resampling_of_images_and_volumes_is_that_of_signals_in_each_direction(make, taps, dimensions):
    line = make(1, 1, taps, 1).double() if isinstance(make, type) else in_float64(lambda: make(taps, 1))
    whole = make(1, 1, taps, dimensions) if isinstance(make, type) else in_float64(lambda: make(taps, dimensions))
    whole.double()
    if isinstance(make, type):  # taps of 1 + 2 + 5 are no float32 numbers
        for layer, d in ((line, 1), (whole, dimensions)):
            exact = in_float64(lambda d=d: make(1, 1, taps, d))
            for name, value in layer.named_buffers():
                value.copy_(dict(exact.named_buffers())[name])
        weight = line.conv.weight
        for _ in range(dimensions - 1):
            weight = weight[..., None] * line.conv.weight[0, 0]
        whole.conv.weight = nn.Parameter(weight)
    x = numbers(1, 1, 4, 6, 8)[..., :8] if dimensions == 3 else numbers(1, 1, 4, 6)
    expected = x
    for axis in range(2, 2 + dimensions):
        expected = along(axis, line, expected)
    torch.testing.assert_close(whole(x), expected, rtol=0, atol=1e-13)


# ---------------------------------------------------------------------------------------------------------------------
# Layers and blocks


def test_initialisation_has_the_stated_variance():
    torch.manual_seed(0)
    for scale, variance in [(1.0, 2 / (9 * 300)), (0.1, 0.2 / (9 * 300)), (0.0, 2e-10 / (9 * 300))]:
        weight = conv(100, 200, 3, scale=scale).weight.detach()
        assert weight.var().item() == pytest.approx(variance, rel=0.02)  # 180,000 draws
        assert weight.abs().max() <= math.sqrt(3 * variance)
        assert weight.abs().max() > 0
    assert not conv(4, 4, 3).bias.any()
    # q, k and v start as three maps of 128 to 128 channels with scale 0.1, not as one of 128 to 384
    assert Attention(128, STYLE).qkv.weight.var().item() == pytest.approx(0.1 / 128, rel=0.02)


def test_variance_scaling_averages_the_fans():
    weight = torch.empty(300, 50)
    torch.manual_seed(0)
    variance_scaling_(weight)
    assert weight.var().item() == pytest.approx(1 / 175, rel=0.03)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_dropout_zeroes_its_share_and_keeps_the_mean(memory_format):
    torch.manual_seed(0)
    x = torch.full((9, 37, 31, 33), 3.0).contiguous(memory_format=memory_format).requires_grad_()
    out = Dropout(0.1)(x)
    dropped = out == 0
    torch.testing.assert_close(out, torch.where(dropped, 0.0, 3.0 / 0.9), rtol=1e-4, atol=0)  # p to 16 bits
    std = math.sqrt(0.1 * 0.9 / x.numel())
    assert abs(dropped.double().mean().item() - 0.1) < 4 * std
    for axis in range(4):  # along no axis is there a pattern
        pairs = (dropped.narrow(axis, 1, x.shape[axis] - 1) & dropped.narrow(axis, 0, x.shape[axis] - 1)).double()
        assert abs(pairs.mean().item() - 0.01) < 5 * math.sqrt(0.01 / pairs.numel())
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, out.detach() / 3)
    assert out.is_contiguous(memory_format=memory_format)
    assert torch.equal(Dropout(0.1).eval()(x), x)
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\), got 1.0"):
        Dropout(1.0)


@pytest.mark.parametrize(("channels", "groups"), [(16, 4), (128, 32), (256, 32), (144, 24), (18, 3), (3, 1), (2, 1)])
def test_group_rule(channels, groups):
    assert group_norm(channels, None).num_groups == groups


def test_fixed_groups_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="16 channels do not divide into groups=32"):
        group_norm(16, 32)


def test_sinusoidal_embedding():
    label = torch.tensor([0.0, 1.5, 999.0], dtype=torch.float64)
    out = Sinusoidal(9)(label)
    for row, value in zip(out, label.tolist()):
        angles = [value * 10_000 ** (-i / 3) for i in range(4)]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles] + [0.0]
        torch.testing.assert_close(row, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_sinusoidal_embedding_without_the_last_frequency():
    label = torch.tensor([0.0, 1.5, 999.0], dtype=torch.float64)
    for row, value in zip(Sinusoidal(8, ends=False)(label), label.tolist()):
        angles = [value * 10_000 ** (-i / 4) for i in range(4)]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        torch.testing.assert_close(row, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_fourier_embedding_takes_the_logarithm():
    features = Fourier(5, scale=16.0).double()
    out = features(torch.tensor([0.01, 50.0], dtype=torch.float64))
    for row, value in zip(out, [0.01, 50.0]):
        angles = [2 * math.pi * w * math.log(value) for w in features.frequencies.tolist()]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        torch.testing.assert_close(row, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-11)
    assert not list(features.parameters())
    assert list(features.state_dict()) == ["frequencies"]


@pytest.mark.parametrize(
    ("name", "at_minus_two"),
    [("elu", math.expm1(-2)), ("relu", 0.0), ("lrelu", -0.4), ("swish", -2 / (1 + math.exp(2)))],
)
def test_activations(name, at_minus_two):
    torch.testing.assert_close(ACTIVATIONS[name](torch.tensor([-2.0]).double()), torch.tensor([at_minus_two]).double())


def test_attention_is_its_formula():
    torch.manual_seed(0)
    block, x = Attention(8, STYLE).double(), numbers(2, 8, 3, 5)
    h = block.norm(x).flatten(2)  # (B, C, N)
    q, k, v = (w[:, :, 0, 0] @ h + b[:, None] for w, b in zip(block.qkv.weight.chunk(3), block.qkv.bias.chunk(3)))
    weights = torch.softmax(torch.einsum("bcn,bcm->bnm", q, k) / math.sqrt(8), dim=-1)
    mixed = torch.einsum("bnm,bcm->bcn", weights, v)
    out = block.out.weight[:, :, 0, 0] @ mixed + block.out.bias[:, None]
    torch.testing.assert_close(block(x), (x + out.reshape(x.shape)) / math.sqrt(2), rtol=0, atol=1e-12)


def test_attention_with_heads_is_one_head_s_formula_in_each_share_of_the_channels():
    torch.manual_seed(0)
    block, x = Attention(8, Style(**{**vars(STYLE), "heads": 2})).double(), numbers(2, 8, 3, 5)
    qkv = F.conv2d(block.norm(x), block.qkv.weight, block.qkv.bias).flatten(2)
    mixed = []
    for head in (slice(0, 4), slice(4, 8)):
        q, k, v = (part[:, head] for part in qkv.chunk(3, dim=1))
        weights = torch.softmax(torch.einsum("bcn,bcm->bnm", q, k) / math.sqrt(4), dim=-1)
        mixed.append(torch.einsum("bnm,bcm->bcn", weights, v))
    out = F.conv2d(torch.cat(mixed, 1).reshape(x.shape), block.out.weight, block.out.bias)
    torch.testing.assert_close(block(x), (x + out) / math.sqrt(2), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="3 heads of attention cannot share 8 channels"):
        Attention(8, Style(**{**vars(STYLE), "heads": 3}))


def test_a_residual_block_whose_label_scales_is_its_formula():
    torch.manual_seed(0)
    style = Style(**{**vars(STYLE), "label_width": 6, "scale_shift": True})
    block, x, label = ResidualBlock(8, 8, style).double(), numbers(2, 8, 6, 6), numbers(2, 6, seed=1)
    h = F.conv2d(F.silu(block.norm1(x)), block.conv1.weight, block.conv1.bias, padding=1)
    told = (label @ block.label.weight.T + block.label.bias)[:, :, None, None]
    h = F.silu(block.norm2(h) * (1 + told[:, :8]) + told[:, 8:])
    h = F.conv2d(h, block.conv2.weight, block.conv2.bias, padding=1)
    torch.testing.assert_close(block(x, label), (x + h) / math.sqrt(2), rtol=0, atol=1e-12)


def test_residual_block_is_its_formula():
    torch.manual_seed(0)
    style = Style(**{**vars(STYLE), "label_width": 6})
    block, x, label = ResidualBlock(4, 8, style, down(None)).double(), numbers(2, 4, 6, 6), numbers(2, 6, seed=1)
    h = F.conv2d(F.avg_pool2d(F.silu(block.norm1(x)), 2), block.conv1.weight, block.conv1.bias, padding=1)
    h = h + (label @ block.label.weight.T + block.label.bias)[:, :, None, None]
    h = F.conv2d(F.silu(block.norm2(h)), block.conv2.weight, block.conv2.bias, padding=1)
    shortcut = F.conv2d(F.avg_pool2d(x, 2), block.shortcut.weight, block.shortcut.bias)
    torch.testing.assert_close(block(x, label), (shortcut + h) / math.sqrt(2), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# The U-Net


@pytest.mark.parametrize(
    ("options", "count"),
    [  # CIFAR-10's networks, counted in score_sde_pytorch at commit cb1f359
        (
            {"block": "ddpm", "blocks": 2, "multipliers": (1, 2, 2, 2), "groups": 32, "skip_rescale": False},
            35_218_947,
        ),  # vp/ddpm/cifar10
        ({}, 61_804_419),  # vp/cifar10_ddpmpp_continuous
        ({"blocks": 8}, 106_632_579),  # vp/cifar10_ddpmpp_deep_continuous
        (
            {"embedding": "fourier", "fir": (1, 3, 3, 1), "progressive_input": "residual"},
            62_758_787,
        ),  # ve/cifar10_ncsnpp_continuous
    ],
    ids=["ddpm", "ddpm++", "ddpm++ deep", "ncsn++"],
)
def test_parameter_counts_are_the_reference_s(options, count):
    with torch.device("meta"):
        network = UNet(3, **options)
    assert sum(p.numel() for p in network.parameters()) == count


ADM = {"embedding": "transformer", "scale_shift": True, "attend_each": True, "skip_rescale": False, "project": False,
       "norm_eps": 1e-5, "attention": (32, 16, 8), "head_channels": 64}  # fmt: skip
IDDPM = {"block": "ddpm", "blocks": 3, "embedding": "transformer", "scale_shift": True, "attend_each": True,
         "skip_rescale": False, "attention": (16, 8), "heads": 4}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "millions"),
    [  # Dhariwal & Nichol 2021, table 11 and the flags of guided-diffusion's README; classes are ImageNet's
        ({"width": 192, "multipliers": (1, 2, 3, 4), "blocks": 3, "image_size": 64}, 296),
        ({"multipliers": (1, 1, 2, 3, 4), "image_size": 128, "head_channels": 0, "heads": 4}, 422),
        ({"multipliers": (1, 1, 2, 2, 4, 4), "image_size": 256}, 554),
        ({"width": 128, "time_width": 256, "multipliers": (1, 2, 2, 4, 4, 8, 8), "image_size": 512}, 559),
        # Nichol & Dhariwal 2021: CIFAR-10 (the 50M of its file names is 52.5), ImageNet 64 with classes, "270M"
        ({**IDDPM, "width": 128, "multipliers": (1, 2, 2, 2), "classes": 0, "head_channels": 0}, 52.5),
        ({**IDDPM, "width": 192, "multipliers": (1, 2, 3, 4), "image_size": 64, "head_channels": 0}, 273),
    ],
    ids=["ADM-64", "ADM-128", "ADM-256", "ADM-512", "IDDPM-32", "IDDPM-64"],
)
def test_parameter_counts_are_adm_s(options, millions):
    with torch.device("meta"):
        network = UNet(3, **{**ADM, "width": 256, "blocks": 2, "out_channels": 6, "classes": 1000, **options})
    count = sum(p.numel() for p in network.parameters()) / 1e6
    assert round(count, 1 if millions < 100 else 0) == millions


EDM = {  # the options of EDM's three networks, and what these are told of the noise levels 0.03 and 7
    "vp": ({"width": 16, "multipliers": (2, 2, 2)}, lambda sigma: sigma.log() / 4),
    "ve": (
        {"width": 16, "multipliers": (2, 2, 2), "embedding": "fourier", "fourier_scale": 4.0, "fir": (1, 3, 3, 1),
         "progressive_input": "residual"},
        lambda sigma: sigma,
    ),
    "adm": ({**ADM, "width": 32, "multipliers": (1, 2), "classes": 5, "head_channels": 64}, lambda s: s.log() / 4),
}  # fmt: skip


@pytest.mark.parametrize("name", EDM)
def test_outputs_of_edm_s_networks(name):
    """Recorded from NVlabs/edm; `tests/data/recorded/nets/README.md` says how."""
    options, label = EDM[name]
    network = UNet(3, **{**options, "blocks": 1, "attention": (4,), "image_size": 8}).eval()
    random = np.random.RandomState(0)
    for key, value in sorted(network.state_dict().items()):
        drawn = 0.2 * random.standard_normal(value.shape) + (value.ndim == 1 and key.endswith("weight"))
        value.copy_(torch.from_numpy(drawn))
    x = torch.from_numpy(np.random.RandomState(1).standard_normal((2, 3, 8, 8))).float()
    told = {"label": torch.tensor([1, 4])} if name == "adm" else {}
    with np.load(RECORDED / "nets" / "edm_networks.npz") as file, torch.no_grad():
        found = network(x, label(torch.tensor([0.03, 7.0])), **told)
        torch.testing.assert_close(found, torch.from_numpy(file[name]), rtol=0, atol=1e-4)  # of size 2; float32


@pytest.mark.parametrize(("name", "millions"), [("vp", 55.7), ("ve", 56.4), ("adm", 295.9)])
def test_parameter_counts_are_edm_s(name, millions):
    """Karras et al. 2022, section 4 and table 7 of the appendix."""
    more = {"width": 192, "multipliers": (1, 2, 3, 4), "blocks": 3, "attention": (32, 16, 8), "image_size": 64}
    options = {**EDM[name][0], "width": 128, **({**more, "classes": 1000} if name == "adm" else {})}
    with torch.device("meta"):
        network = UNet(3, **options)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions


def test_on_the_way_up_attention_may_follow_each_block():
    network, once = small(attend_each=True, blocks=2), small(blocks=2)
    assert [len(level.attentions) for level in network.up] == [2, 0]
    added = network.state_dict().keys() - once.state_dict().keys()
    assert {name.rpartition(".")[0] for name in added} == {
        f"up.0.attentions.{i}.{part}" for i in (0, 1) for part in ("norm", "qkv", "out")
    }
    calls = []
    for level in network.up:
        for name, module in level.named_modules():
            if isinstance(module, Attention | ResidualBlock) and name != "step":
                module.register_forward_hook(lambda module, *_: calls.append(type(module).__name__[0]))
    network(numbers(1, 3, 8, 8), labels(network, 1))
    assert "".join(calls) == "RARARA" + "RRR"


def test_heads_have_a_width_or_a_number():
    assert [Style(**{**vars(STYLE), "head_channels": 4}).heads_of(c) for c in (4, 8, 24)] == [1, 2, 6]
    with pytest.raises(ValueError, match="6 channels do not divide into heads of 4"):
        Style(**{**vars(STYLE), "head_channels": 4}).heads_of(6)


def test_blocks_that_resample_need_no_convolution_in_the_shortcut():
    style = Style(**{**vars(STYLE), "project": False, "skip_rescale": False})
    block, x = ResidualBlock(4, 4, style, down(None)).double(), numbers(2, 4, 6, 6)
    assert isinstance(block.shortcut, nn.Identity) and isinstance(ResidualBlock(4, 8, style).shortcut, nn.Conv2d)
    nn.init.zeros_(block.conv2.weight)
    torch.testing.assert_close(block(x, None), F.avg_pool2d(x, 2))


PYRAMIDS = [
    {"progressive": progressive, "progressive_input": progressive_input, "combine": combine}
    for progressive in ["none", "output_skip", "residual"]
    for progressive_input, combine in [
        ("none", "sum"),
        ("input_skip", "sum"),
        ("input_skip", "cat"),
        ("residual", "sum"),
    ]
]


@pytest.mark.parametrize(
    "pyramid, size",
    [*((pyramid, (8, 19)) for pyramid in PYRAMIDS), (PYRAMIDS[-1], (13, 13)), (PYRAMIDS[-1], (4, 4))],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else str(value),
)
def test_any_size_is_padded_by_the_border_and_cropped(pyramid, size):
    network = small(**pyramid, multipliers=(1, 1, 2), fir=(1, 3, 3, 1))
    x, label = numbers(2, 3, *size), labels(network)
    padded = np.pad(x.numpy(), [(0, 0), (0, 0), (0, -size[0] % 4), (0, -size[1] % 4)], mode="edge")
    with torch.no_grad():
        out = network(x, label)
        expected = network(torch.from_numpy(padded), label)[..., : size[0], : size[1]]
    assert out.shape == x.shape
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"block": "ddpm"}, {"scale_shift": True, "attend_each": True}, {"progressive_input": "input_skip"}],
    ids=["biggan", "ddpm", "adm", "pyramid"],
)
@pytest.mark.parametrize("dimensions", [1, 2])
def test_what_is_constant_in_one_more_direction_is_seen_as_without_it(dimensions, options):
    """Kernels that look along the other directions alone: the U-Net in d + 1 dimensions then is that in d."""
    less, more = (small(**options, dimensions=d, image_channels=1) for d in (dimensions, dimensions + 1))
    state = {}
    for name, value in less.state_dict().items():
        if value.ndim == 2 + dimensions and "label" not in name:
            wide = torch.zeros(more.state_dict()[name].shape, dtype=value.dtype)
            wide[:, :, wide.shape[2] // 2] = value
            value = wide
        state[name] = value
    more.load_state_dict(state)
    x, image = numbers(2, 3, *(6, 8)[:dimensions]), numbers(2, 1, *(6, 8)[:dimensions], seed=1)
    out = less(x, labels(less), image=image)
    repeated = [v[:, :, None].expand(-1, -1, 4, *v.shape[2:]).contiguous() for v in (x, image)]
    wide = more(repeated[0], labels(more), image=repeated[1])
    torch.testing.assert_close(wide, out[:, :, None].expand(wide.shape), rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", [(13,), (5, 4, 7)], ids=str)
@pytest.mark.parametrize("fir", [None, (1, 3, 3, 1)], ids=str)
def test_signals_and_volumes_of_any_size_are_padded_by_the_border_and_cropped(size, fir):
    network = small(dimensions=len(size), multipliers=(1, 1, 2), fir=fir, progressive="residual")
    x, label = numbers(2, 3, *size), labels(network)
    padded = np.pad(x.numpy(), [(0, 0), (0, 0), *((0, -n % 4) for n in size)], mode="edge")
    expected = network(torch.from_numpy(padded), label)[(..., *(slice(n) for n in size))]
    assert torch.equal(network(x, label), expected)


@pytest.mark.parametrize(("size", "mode"), [((6,), "linear"), ((4, 6, 8), "trilinear")])
def test_a_lower_resolution_of_signals_and_volumes_is_interpolated(size, mode):
    network = small(dimensions=len(size), image_channels=1)
    low, x = numbers(2, 1, *(n // 2 for n in size), seed=1), numbers(2, 3, *size)
    whole = F.interpolate(low, size=size, mode=mode, align_corners=False)
    torch.testing.assert_close(network(x, labels(network), image=low), network(x, labels(network), image=whole))


def test_attention_belongs_to_a_level_whatever_the_size():
    network = small(image_size=32, attention=(16,))
    attending = [level.stages[0].attention for level in network.down]
    assert [isinstance(module, Attention) for module in attending] == [False, True]
    assert isinstance(network.middle.attention, Attention)
    calls = []
    attending[1].register_forward_hook(lambda *_: calls.append(1))
    network(numbers(1, 3, 12, 20), labels(network, 1))
    assert calls == [1]


@pytest.mark.parametrize("embedding", ["sinusoidal", "fourier", None])
def test_the_label_counts_where_it_is_embedded(embedding):
    network, x = small(embedding=embedding), numbers(2, 3, 8, 8)
    with torch.no_grad():
        a, b = network(x, torch.tensor([3, 3])), network(x, torch.tensor([3.0, 500.0]))
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1]) == (embedding is None)


def test_uncentred_data_are_mapped_to_the_centred_range():
    x = numbers(2, 3, 8, 8)
    centered, uncentered = small(), small(centered=False)
    torch.testing.assert_close(
        uncentered(x, labels(centered)), centered(2 * x - 1, labels(centered)), rtol=0, atol=1e-13
    )


def test_examples_do_not_see_each_other():
    network, x = small(), numbers(3, 3, 8, 8)
    alone = network(x[1:2], labels(network, 3)[1:2])
    torch.testing.assert_close(network(x, labels(network, 3))[1:2], alone, rtol=0, atol=1e-12)


def test_default_output_starts_near_zero():
    torch.manual_seed(0)
    out = UNet(3, width=8, multipliers=(1, 2), blocks=1)(numbers(2, 3, 16, 16).float(), torch.tensor([5.0, 900.0]))
    assert 0 < out.abs().max() < 1e-3


@pytest.mark.parametrize(
    "options", [{}, {"fir": (1, 3, 3, 1), "progressive": "residual", "block": "ddpm"}], ids=["plain", "fir"]
)
def test_checkpointing_changes_neither_output_nor_gradients(options):
    results = []
    for recompute in [False, True]:
        network = small(**options, dropout=0.3, checkpoint_activations=recompute).train()
        x = numbers(2, 3, 8, 8).requires_grad_()
        torch.manual_seed(1)
        out = network(x, labels(network))
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in network.parameters())])
    for a, b in zip(*results):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "options",
    [{}, {"fir": (1, 3, 3, 1), "progressive": "output_skip", "progressive_input": "residual"}],
    ids=["plain", "fir"],
)
@pytest.mark.parametrize("size", [8, 7])
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_batched_products_are_the_single_ones(options, size):
    network = small(**options).eval()
    x, probes = numbers(2, 3, size, size).requires_grad_(), numbers(3, 2, 3, size, size, seed=1)
    out = network(x, labels(network))
    (together,) = torch.autograd.grad(out, x, probes, retain_graph=True, is_grads_batched=True)
    singly = torch.stack([torch.autograd.grad(out, x, v, retain_graph=True)[0] for v in probes])
    torch.testing.assert_close(together, singly, rtol=0, atol=1e-12)


def test_gradient_is_the_derivative():
    network = small(fir=(1, 3, 3, 1), progressive="residual", progressive_input="input_skip", combine="cat").eval()
    x, v, direction = numbers(1, 3, 8, 8), numbers(1, 3, 8, 8, seed=1), numbers(1, 3, 8, 8, seed=2)
    x.requires_grad_()
    label = labels(network, 1)
    (gradient,) = torch.autograd.grad(network(x, label), x, v)
    h = 1e-5
    with torch.no_grad():
        slope = ((network(x + h * direction, label) - network(x - h * direction, label)) * v).sum() / (2 * h)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-7, atol=0)  # O(h²) and rounding/h


def test_channels_last_gives_the_same():
    network, x = small(fir=(1, 3, 3, 1)), numbers(2, 3, 8, 8)
    expected = network(x, labels(network))
    network.to(memory_format=torch.channels_last)
    out = network(x.contiguous(memory_format=torch.channels_last), labels(network))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_the_graph_has_no_breaks():
    network, x = small(progressive="output_skip", progressive_input="residual"), numbers(2, 3, 7, 8)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, labels(network)), network(x, labels(network)), rtol=0, atol=1e-13)


def test_dropout_acts_in_training_only():
    network, x = small(dropout=0.5), numbers(2, 3, 8, 8)
    assert torch.equal(network.eval()(x, labels(network)), small().eval()(x, labels(network)))
    assert not torch.equal(network.train()(x, labels(network)), network(x, labels(network)))


def test_filters_are_no_state():
    plain, fir = small(), small(fir=(1, 3, 3, 1))
    assert plain.state_dict().keys() == fir.state_dict().keys()


@pytest.mark.parametrize(
    ("option", "value"),
    [("block", "resnet"), ("embedding", "positional"), ("progressive", "skip"), ("progressive_input", "output_skip"),
     ("combine", "add"), ("activation", "gelu")],
)  # fmt: skip
def test_unknown_options_are_named(option, value):
    with pytest.raises(ValueError, match=f"unknown {option} '{value}'; use one of"):
        small(**{option: value})


# ---------------------------------------------------------------------------------------------------------------------
# The network for vectors


@pytest.mark.parametrize("features", [1, 2, 17])
@pytest.mark.parametrize("embedding", ["sinusoidal", "fourier"])
def test_mlp_maps_vectors_of_any_dimension(features, embedding):
    torch.manual_seed(0)
    network, x = MLP(features, width=16, embedding=embedding), numbers(5, features).float()
    nn.init.normal_(network.last.weight)
    nn.init.normal_(network.layers[0].out.weight)
    out = network(x, torch.full((5,), 3.0))
    assert out.shape == x.shape
    assert torch.isfinite(out).all()
    assert not torch.allclose(out, network(x, torch.full((5,), 700.0)))
    torch.testing.assert_close(network(x[3:], torch.full((2,), 3.0)), out[3:])


def test_mlp_fits_a_function_of_point_and_label():
    """Noise that depends on both inputs is found to 3 % of its variance within 150 steps."""
    torch.manual_seed(0)
    network = MLP(2, width=64)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(150):
        x, t = torch.randn(128, 2, generator=generator), torch.rand(128, generator=generator)
        target = torch.sin(2 * x + 3 * t[:, None])
        loss = (network(x, 999 * t) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.03 * target.var()


def test_mlp_s_first_layer_is_far_from_affine():
    """A linear map of a fresh network's first features has half of the noise's estimate on eight Gaussians."""
    torch.manual_seed(0)
    sde, t = VPSDE(), torch.tensor(0.03, dtype=torch.float64)
    x = sde.perturb(ring(4000).double(), t, numbers(4000, 2))
    target = EXACT["ring"](sde)(x, t).noise
    h = F.silu(MLP(2, width=64).first(x.float())).detach().double()
    h = torch.cat([h, torch.ones(4000, 1)], dim=1)
    weights = torch.linalg.solve(h.T @ h + torch.eye(65), h.T @ target)
    assert (h @ weights - target).square().mean() < 0.55 * target.square().mean()  # affine ones: 0.95
