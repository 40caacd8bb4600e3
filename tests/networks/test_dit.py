"""The transformer of patches: its formula, its sizes, what it starts as."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from score_sde.networks import DiT
from score_sde.networks.dit import DiTBlock, positions
from tests.oracles import awake, numbers


def small(**options) -> DiT:
    torch.manual_seed(0)
    options = {"width": 16, "depth": 2, "heads": 2, **options}
    return awake(DiT(3, **options)).double().eval()


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


def test_checkpointing_changes_neither_output_nor_gradients() -> None:
    results = []
    for recompute in (False, True):
        network = small(dropout=0.3, checkpoint_activations=recompute, text_width=4).train()
        x, text = numbers(2, 3, 8, 8).requires_grad_(), numbers(2, 3, 4, seed=2)
        torch.manual_seed(1)
        out = network(x, TIME, text=text)
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in network.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert not torch.equal(results[0][0], small(text_width=4)(numbers(2, 3, 8, 8), TIME, text=numbers(2, 3, 4, seed=2)))


@pytest.mark.parametrize(("width", "heads"), [(16, 3), (10, 2)])
def test_widths_that_do_not_divide_are_refused(width: int, heads: int) -> None:
    with pytest.raises(ValueError, match=f"width={width} must be divisible by heads={heads}, and by 4"):
        DiT(3, width=width, heads=heads, depth=1)
