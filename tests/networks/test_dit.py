"""The transformer of patches: its formula, its sizes, what it starts as."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from score_sde.networks import DiT
from score_sde.networks.blocks import HeadNorm, Text, attend, turned
from score_sde.networks.dit import DiTBlock, angles, positions
from score_sde.networks.layers import rms_norm
from tests.oracles import awake, numbers


def small(**options) -> DiT:
    torch.manual_seed(0)
    options = {"width": 16, "depth": 2, "heads": 2, **options}
    return awake(DiT(3, **options)).double().eval()


MODERN = {"norm": "rms", "feed_forward": "swiglu", "positions": "rotary", "qk_norm": True}
TIME = torch.tensor([3.0, 700.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("width", "depth", "heads", "millions"),
    [(384, 12, 6, 33), (768, 12, 12, 130), (1024, 24, 16, 458), (1152, 28, 16, 675)],
    ids=["S/2", "B/2", "L/2", "XL/2"],
)
def test_parameter_counts_are_the_paper_s(width: int, depth: int, heads: int, millions: int) -> None:
    """Of latents 4x32x32 with learned variances and ImageNet's classes (Peebles & Xie 2023, table 4)."""
    with torch.device("meta"):
        network = DiT(4, width=width, depth=depth, heads=heads, classes=1000, out_channels=8)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == millions


def test_a_block_is_its_formula() -> None:
    torch.manual_seed(0)
    block = awake(DiTBlock(8, 2, 0.0, 0)).double()
    x, label = numbers(2, 5, 8), numbers(2, 8, seed=1)
    shift, scale, gate, shift2, scale2, gate2 = (label @ block.modulation.weight.T + block.modulation.bias).split(8, 1)
    standard = lambda h: (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    h = block.qkv(standard(x) * (1 + scale[:, None]) + shift[:, None])
    heads = []
    for i in (slice(0, 4), slice(4, 8)):
        q, k, v = (part[..., i] for part in h.chunk(3, dim=2))
        heads.append(torch.softmax(q @ k.transpose(1, 2) / 2, dim=2) @ v)
    y = x + gate[:, None] * block.out(torch.cat(heads, 2))
    h = block.hidden(standard(y) * (1 + scale2[:, None]) + shift2[:, None])
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    torch.testing.assert_close(block(x, label, None), y + gate2[:, None] * block.last(h), rtol=0, atol=1e-12)


def test_positions_tell_column_and_row() -> None:
    found = positions(2, 3, torch.zeros(1, 8, dtype=torch.float64))
    for row in range(2):
        for column in range(3):
            angles = [(n, n / 100) for n in (column, row)]
            expected = [f(a) for pair in angles for f in (math.sin, math.cos) for a in pair]
            np.testing.assert_allclose(found[3 * row + column], expected, atol=1e-15)


def test_it_starts_at_nothing_with_blocks_that_are_the_identity() -> None:
    torch.manual_seed(0)
    network, x = DiT(3, width=16, depth=2, heads=2), numbers(2, 3, 8, 8).float()
    assert 0 < network(x, TIME.float()).abs().max() < 1e-3
    h, label = numbers(2, 5, 16).float(), numbers(2, 16, seed=1).float()
    torch.testing.assert_close(network.blocks[0](h, label, None), h, rtol=0, atol=1e-3)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patches_go_back_to_where_they_came_from(patch: int) -> None:
    """Without blocks, a last layer that undoes the first one gives back the standardised pixels, each in its place."""
    network = DiT(1, width=16, depth=0, heads=1, patch=patch, out_channels=1).double()
    x = numbers(2, 1, 8, 12)
    weight = torch.linalg.qr(numbers(16, 16, seed=1))[0][:, : patch**2]
    with torch.no_grad():
        network.first.weight.copy_(weight.reshape(16, 1, patch, patch))
        network.last.weight.copy_(weight.T)
        network.modulation.weight.zero_()
    h = F.unfold(x, patch, stride=patch).transpose(1, 2) @ weight.T + positions(8 // patch, 12 // patch, weight[None])
    wanted = F.fold((F.layer_norm(h, (16,), eps=1e-6) @ weight).transpose(1, 2), (8, 12), patch, stride=patch)
    torch.testing.assert_close(network(x, TIME), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(7, 7), (8, 5), (1, 3)], ids=str)
def test_any_size_is_padded_by_the_border_and_cropped(size: tuple[int, int]) -> None:
    network, x = small(patch=4), numbers(2, 3, *size)
    whole = np.pad(x.numpy(), [(0, 0), (0, 0), (0, -size[0] % 4), (0, -size[1] % 4)], mode="edge")
    expected = network(torch.from_numpy(whole), TIME)[..., : size[0], : size[1]]
    assert torch.equal(network(x, TIME), expected)


def test_uncentred_data_are_mapped_to_the_centred_range() -> None:
    x = numbers(2, 3, 8, 8)
    torch.testing.assert_close(small(centered=False)(x, TIME), small()(2 * x - 1, TIME), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, MODERN], ids=["published", "modern"])
def test_checkpointing_changes_neither_output_nor_gradients(options: dict[str, object]) -> None:
    results = []
    for recompute in (False, True):
        network = small(dropout=0.3, checkpoint_activations=recompute, text_width=4, **options).train()
        x, text = numbers(2, 3, 8, 8).requires_grad_(), numbers(2, 3, 4, seed=2)
        torch.manual_seed(1)
        out = network(x, TIME, text=text)
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in network.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert not torch.equal(
        results[0][0], small(text_width=4, **options)(numbers(2, 3, 8, 8), TIME, text=numbers(2, 3, 4, seed=2))
    )


@pytest.mark.parametrize(("width", "heads"), [(16, 3), (10, 2)])
def test_widths_that_do_not_divide_are_refused(width: int, heads: int) -> None:
    with pytest.raises(ValueError, match=f"width={width} must be divisible by heads={heads}, and by 4"):
        DiT(3, width=width, heads=heads, depth=1)


# --- the modern block


def test_rms_norm_is_torch_s_and_its_formula() -> None:
    x = numbers(2, 3, 8)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(F.rms_norm(x, (8,), eps=1e-6), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(rms_norm(x, (8,)), expected, rtol=0, atol=1e-14)
    with sdpa_kernel(SDPBackend.MATH):  # plain operations
        torch.testing.assert_close(rms_norm(x, (8,)), expected, rtol=0, atol=1e-14)


def test_a_modern_block_is_its_formula() -> None:
    torch.manual_seed(0)
    block = awake(DiTBlock(12, 2, 0.0, 5, norm="rms", feed_forward="swiglu", qk_norm=True)).double()
    x, label, where = numbers(2, 5, 12), numbers(2, 12, seed=1), numbers(5, 3, seed=2)
    text = Text(numbers(2, 3, 5, seed=3), torch.tensor([[True, True, False], [False, False, False]]))
    shift, scale, gate, shift2, scale2, gate2 = (label @ block.modulation.weight.T + block.modulation.bias).split(12, 1)
    unit = lambda h: h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    h = block.qkv(unit(x) * (1 + scale[:, None]) + shift[:, None])
    more = text.tokens @ block.text.weight.T + block.text.bias
    turn = torch.polar(torch.ones_like(where), where)  # channels i and i + 3 are a complex number
    spin = lambda h: torch.view_as_real(torch.complex(h[..., :3], h[..., 3:]) * turn).movedim(-1, -2).flatten(-2)
    rows = []
    for i in range(2):
        heads = []
        for head in (slice(0, 6), slice(6, 12)):
            q, k, v = (part[i, :, head] for part in h.chunk(3, dim=2))
            keys, values = (part[i, text.mask[i]][:, head] for part in more.chunk(2, dim=2))
            q, k = spin(unit(q) * block.head_norm.query), spin(unit(k) * block.head_norm.key)
            k, v = torch.cat([k, unit(keys) * block.head_norm.key]), torch.cat([v, values])
            heads.append(torch.softmax(q @ k.T / math.sqrt(6), dim=1) @ v)
        rows.append(torch.cat(heads, 1))
    y = x + gate[:, None] * block.out(torch.stack(rows))
    a, b = block.hidden(unit(y) * (1 + scale2[:, None]) + shift2[:, None]).chunk(2, dim=2)
    wanted = y + gate2[:, None] * block.last(a / (1 + torch.exp(-a)) * b)
    torch.testing.assert_close(block(x, label, text, where), wanted, rtol=0, atol=1e-12)


def test_a_modern_network_is_its_blocks() -> None:
    network, x = small(**MODERN), numbers(2, 3, 4, 6)
    h, label = network.first(x).flatten(2).transpose(1, 2), network.embed(TIME, None)
    for each in network.blocks:
        block = DiTBlock(16, 2, 0.0, 0, norm="rms", feed_forward="swiglu", qk_norm=True).double()
        block.load_state_dict(each.state_dict())
        h = block(h, label, None, angles(2, 3, 8, h))
    shift, scale = network.modulation(label)[:, None].chunk(2, dim=2)
    h = network.last(h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift)
    pixels = h.unflatten(2, (4, 3)).transpose(2, 3).flatten(2).transpose(1, 2)  # F.fold has channels first
    torch.testing.assert_close(network(x, TIME), F.fold(pixels, (4, 6), 2, stride=2), rtol=0, atol=1e-12)


def test_rotary_logits_depend_on_the_difference_of_positions_alone() -> None:
    """One query and one key, at every pair of places: equal displacements give equal logits, different ones do not."""
    rows, columns, channels = 4, 5, 8
    where = angles(rows, columns, channels, torch.zeros(1, dtype=torch.float64))
    q, k = (turned(numbers(1, channels, seed=seed).expand(rows * columns, -1), where) for seed in (0, 1))
    logits = (q @ k.T).reshape(rows, columns, rows, columns)
    of_difference: dict[tuple[int, int], float] = {}
    for r, c, r2, c2 in np.ndindex(logits.shape):
        expected = of_difference.setdefault((r - r2, c - c2), logits[r, c, r2, c2].item())
        assert logits[r, c, r2, c2].item() == pytest.approx(expected, abs=1e-13)
    values = sorted(of_difference.values())
    assert len(values) == 7 * 9 and min(np.diff(values)) > 1e-6
    torch.testing.assert_close(turned(q, -where), numbers(1, channels).expand_as(q), rtol=0, atol=1e-14)


def test_rotary_angles_are_those_of_the_waves() -> None:
    found = angles(2, 3, 8, torch.zeros(1, dtype=torch.float64))
    expected = [[column, column / 100, row, row / 100] for row in range(2) for column in range(3)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-15)


def test_a_rotary_network_knows_displacements_but_no_places() -> None:
    """A constant image gives equal patches, which absolute positions tell apart."""
    network, x = small(positions="rotary", heads=1, width=16), numbers(1, 3, 8, 8)
    reordered = network(x.roll((2, 4), (2, 3)), TIME[:1]).roll((-2, -4), (2, 3))  # whole patches
    assert (reordered - network(x, TIME[:1])).abs().max() > 1e-3
    constant = network(torch.full_like(x, 0.3), TIME[:1])
    torch.testing.assert_close(constant, constant[..., :2, :2].repeat(1, 1, 4, 4), rtol=0, atol=1e-12)
    absolute = small()(torch.full_like(x, 0.3), TIME[:1])
    assert (absolute - absolute[..., :2, :2].repeat(1, 1, 4, 4)).abs().max() > 1e-3


def test_normalised_queries_and_keys_bound_the_logits() -> None:
    """They forget their sizes, but for the eps of 1e-6 in their squares."""
    qkv, norm = numbers(2, 5, 24), HeadNorm(4).double()
    torch.testing.assert_close(
        attend(torch.cat([1e3 * qkv[..., :16], qkv[..., 16:]], 2), 2, norm=norm),
        attend(qkv, 2, norm=norm), rtol=0, atol=1e-4,
    )  # fmt: skip
    torch.testing.assert_close(
        norm.queries(qkv[..., :4]).norm(dim=-1), torch.full((2, 5), 2.0).double(), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize(("width", "hidden"), [(384, 1024), (768, 2048), (1024, 2731), (1152, 3072)])
def test_a_gated_layer_has_as_many_weights(width: int, hidden: int) -> None:
    with torch.device("meta"):
        plain, gated = DiTBlock(width, 6, 0.0, 0), DiTBlock(width, 6, 0.0, 0, feed_forward="swiglu")
    assert gated.hidden.weight.shape == (2 * hidden, width) and gated.last.weight.shape == (width, hidden)
    counts = [sum(p.numel() for p in block.parameters() if p.ndim == 2) for block in (plain, gated)]
    assert abs(counts[1] / counts[0] - 1) < 1e-4


def test_modern_options_add_what_they_say_and_nothing_else() -> None:
    old, new = ({name: p.shape for name, p in small(**options).named_parameters()} for options in ({}, MODERN))
    assert new.keys() - old.keys() == {f"blocks.{i}.head_norm.{which}" for i in range(2) for which in ("query", "key")}
    changed = [name for name, shape in old.items() if new[name] != shape]
    gated = ("hidden.weight", "hidden.bias", "last.weight")
    assert changed == [f"blocks.{i}.{name}" for i in range(2) for name in gated]


def test_modern_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown norm 'batch'; use one of 'layer', 'rms'"):
        DiT(3, norm="batch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rotary positions turn heads of a multiple of 4 channels, not of 6"):
        DiT(3, width=12, heads=2, positions="rotary")
