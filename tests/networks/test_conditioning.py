"""What networks are told: images, text and its summary; absent is None, and no example is told another's."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from score_sde import VPSDE, guide
from score_sde.models.base import absent
from score_sde.models.rules import Preconditioned
from score_sde.networks import MLP, DiT, UNet
from score_sde.networks.blocks import Attention, Style, Text
from tests.oracles import STYLE, awake, numbers

MODERN = {"norm": "rms", "feed_forward": "swiglu", "positions": "rotary", "qk_norm": True}
NETWORKS = {
    "unet": lambda **options: UNet(2, width=8, multipliers=(1, 2), blocks=1, attention=(4,), image_size=8, **options),
    "dit": lambda **options: DiT(2, width=16, depth=2, heads=2, **options),
    "modern dit": lambda **options: DiT(2, width=16, depth=2, heads=2, **MODERN, **options),
}
BUILT = pytest.mark.parametrize("name", NETWORKS)
TOLD: dict[str, dict[str, int]] = {
    "label": {"classes": 3},
    "image": {"image_channels": 3},
    "augmentation": {"image_channels": 3},
    "text": {"text_width": 6},
    "pooled": {"pooled_width": 5},
}
ALL = {key: value for options in TOLD.values() for key, value in options.items()}


def built(name: str, **options: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return awake(NETWORKS[name](**options)).double().eval()


def conditions(batch: int = 3, size: tuple[int, ...] = (4, 4)) -> dict[str, Tensor]:
    mask = torch.tensor([[True, True, False, False], [True, True, True, True], [False] * 4])
    return {
        "label": torch.tensor([2, -1, 0])[:batch],
        "image": numbers(3, 3, *size, seed=3)[:batch],
        "augmentation": torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64)[:batch],
        "text": numbers(3, 4, 6, seed=4)[:batch],
        "mask": mask[:batch],
        "pooled": numbers(3, 5, seed=5)[:batch],
    }


def inputs(*size: int) -> tuple[Tensor, Tensor]:
    return numbers(3, 2, *(size or (8, 8))), torch.tensor([3.0, 400.0, 900.0], dtype=torch.float64)


def test_attention_with_text_is_its_formula() -> None:
    torch.manual_seed(0)
    block = Attention(8, Style(**{**vars(STYLE), "heads": 2, "text_width": 6})).double()
    x, tokens = numbers(2, 8, 3, 5), numbers(2, 4, 6, seed=1)
    mask = torch.tensor([[True, False, True, False], [False] * 4])
    qkv = F.conv2d(block.norm(x), block.qkv.weight, block.qkv.bias).flatten(2)
    more = (tokens @ block.text.weight.T + block.text.bias).transpose(1, 2)
    rows = []
    for i in range(2):
        heads = []
        for head in (slice(0, 4), slice(4, 8)):
            q, k, v = (part[i, head] for part in qkv.chunk(3, dim=1))
            k, v = (torch.cat([a, b[i, head][:, mask[i]]], 1) for a, b in zip((k, v), more.chunk(2, dim=1)))
            heads.append(v @ torch.softmax(q.T @ k / math.sqrt(4), dim=1).T)
        rows.append(torch.cat(heads))
    out = F.conv2d(torch.stack(rows).reshape(x.shape), block.out.weight, block.out.bias)
    torch.testing.assert_close(block(x, Text(tokens, mask)), (x + out) / math.sqrt(2), rtol=0, atol=1e-12)


@BUILT
@pytest.mark.parametrize("size", [(8, 8), (7, 5)], ids=str)
def test_each_example_is_told_its_own(name: str, size: tuple[int, int]) -> None:
    network, (x, t), told = built(name, **ALL), inputs(*size), conditions()
    y = network(x, t, **told)
    for i in range(3):
        own = {key: value[i : i + 1] for key, value in told.items()}
        torch.testing.assert_close(y[i : i + 1], network(x[i : i + 1], t[i : i + 1], **own))


@BUILT
@pytest.mark.parametrize("condition", TOLD)
def test_what_is_absent_is_none_and_what_is_not_counts(name: str, condition: str) -> None:
    network, (x, t), told = built(name, **TOLD[condition]), inputs(), conditions()
    given = {key: told[key] for key in ((condition, "mask") if condition == "text" else (condition,))}
    nothing = network(x, t)
    for gone in ({key: absent(value) for key, value in given.items()}, {condition: absent(told[condition])}):
        torch.testing.assert_close(network(x, t, **gone), nothing, rtol=0, atol=1e-12)
    moved = (network(x, t, **given) - nothing).abs().flatten(1).amax(1)
    here = {"label": [True, False, True], "text": [True, True, False], "augmentation": [False, True, True]}
    assert (moved > 1e-4).tolist() == here.get(condition, [True] * 3)


@BUILT
def test_where_the_mask_is_false_tokens_are_not_seen(name: str) -> None:
    network, (x, t), told = built(name, text_width=6), inputs(), conditions()
    text, mask = told["text"], told["mask"]
    y = network(x, t, text=text, mask=mask)
    assert bool(y.isfinite().all())
    assert torch.equal(y, network(x, t, text=torch.where(mask[..., None], text, 1e3 * numbers(3, 4, 6)), mask=mask))
    assert torch.equal(network(x, t, text=text * mask[..., None]), y)  # without a mask, zeros are none
    back = torch.tensor([1, 0, 2, 3])  # the tokens are a set; their order is the encoder's business
    torch.testing.assert_close(network(x, t, text=text[:, back], mask=mask[:, back]), y, rtol=0, atol=1e-12)


@BUILT
def test_gradients_reach_every_condition_and_every_part(name: str) -> None:
    network, (x, t) = built(name, **ALL), inputs()
    told = {key: value.requires_grad_() if value.is_floating_point() else value for key, value in conditions().items()}
    network(x, t, **told).square().sum().backward()
    for key in ("image", "augmentation", "text", "pooled"):
        assert bool(told[key].grad.abs().reshape(3, -1).amax(1)[:2].min() > 0), key
    assert bool((told["text"].grad[~told["mask"]] == 0).all())
    assert all(bool((p.grad != 0).any()) for p in network.parameters())


@BUILT
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_batched_products_are_the_single_ones(name: str) -> None:
    """As a likelihood takes them, for several probes at once."""
    network, (x, t), told = built(name, **ALL), inputs(), conditions()
    x, probes = x.requires_grad_(), numbers(2, *x.shape, seed=1)
    out = network(x, t, **told)
    (together,) = torch.autograd.grad(out, x, probes, retain_graph=True, is_grads_batched=True)
    singly = torch.stack([torch.autograd.grad(out, x, v, retain_graph=True)[0] for v in probes])
    torch.testing.assert_close(together, singly, rtol=0, atol=1e-11)


@BUILT
def test_a_network_in_bfloat16_is_told_levels_in_float32(name: str) -> None:
    network, (x, t), told = built(name, **ALL).to(torch.bfloat16), inputs(), conditions()
    seen = []
    network.augmentation.features.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    told["augmentation"] = torch.tensor([0.5, 0.501, 0.502], dtype=torch.float64)
    y = network(x.bfloat16(), t, **told)
    assert y.dtype == torch.bfloat16 and bool(y.isfinite().all())
    torch.testing.assert_close(seen[0].double(), 999 * told["augmentation"], rtol=1e-6, atol=0)


@BUILT
def test_a_condition_adds_its_parts_and_changes_no_other(name: str) -> None:
    plain = dict(built(name).named_parameters())
    for condition, options in TOLD.items():
        told = dict(built(name, **options).named_parameters())
        assert plain.keys() < told.keys()
        changed = [key for key in plain if plain[key].shape != told[key].shape]
        assert len(changed) == (1 if condition in ("image", "augmentation") else 0)


@BUILT
def test_an_image_of_another_size_is_interpolated(name: str) -> None:
    network, (x, t) = built(name, image_channels=3), inputs(7, 6)
    small = numbers(3, 3, 3, 4, seed=7)
    large = F.interpolate(small, size=(7, 6), mode="bicubic", align_corners=False)
    torch.testing.assert_close(network(x, t, image=small), network(x, t, image=large), rtol=0, atol=1e-12)
    assert not torch.allclose(network(x, t, image=large.flip(2)), network(x, t, image=large))


def test_uncentred_images_are_centred_with_x() -> None:
    options = dict(image_channels=3)
    centred, (x, t), image = built("unet", **options), inputs(), conditions(size=(8, 8))["image"]
    uncentred = built("unet", **options, centered=False)
    y = centred(2 * x - 1, t, image=2 * image - 1)
    torch.testing.assert_close(uncentred(x, t, image=image), y, rtol=0, atol=1e-12)


@BUILT
def test_guidance_asks_both_in_one_batch(name: str) -> None:
    network, (x, _), told = built(name, **ALL), inputs(), conditions()
    sizes: list[int] = []
    network.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    model, t = Preconditioned(network, VPSDE()), torch.tensor(0.4, dtype=torch.float64)
    one, other = model.given(**told), model.given(label=None)
    apart = other.score(x, t) + 3 * (one.score(x, t) - other.score(x, t))
    sizes.clear()
    torch.testing.assert_close(guide(one, other, 3.0).score(x, t), apart)
    assert sizes == [6]


@BUILT
@pytest.mark.parametrize(
    ("condition", "key"),
    [
        ("image", "model.image_channels"),
        ("augmentation", "model.image_channels"),
        ("text", "model.text_width"),
        ("pooled", "model.pooled_width"),
        ("label", "model.class_conditional"),
    ],
)
def test_what_a_network_was_not_built_for_is_refused(name: str, condition: str, key: str) -> None:
    for network, (x, t) in [(built(name), inputs()), (MLP(4).double(), (numbers(3, 4), inputs()[1]))]:
        with pytest.raises(ValueError, match=rf"the network takes no condition {condition}: .*{key}"):
            network(x, t, **{condition: conditions()[condition]})


@BUILT
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"image": torch.zeros(3, 1, 4, 4)}, "image must have 4 axes, the first of 3 examples and the second of 3"),
        ({"image": torch.zeros(3, 3, 4)}, "image must have 4 axes"),
        ({"text": torch.zeros(3, 4, 5)}, r"text must have shape \(3, 4, 6\), got \(3, 4, 5\)"),
        ({"text": torch.zeros(1, 4, 6)}, r"text must have shape \(3, 4, 6\)"),
        ({"text": torch.ones(3, 4, 6), "mask": torch.ones(3, 5, dtype=torch.bool)}, r"mask must have shape \(3, 4\)"),
        ({"text": torch.ones(3, 4, 6), "mask": torch.ones(3, 4)}, "mask must be True where there is a token"),
        ({"mask": torch.ones(3, 4, dtype=torch.bool)}, "mask says where text has tokens, but text is missing"),
        ({"pooled": torch.zeros(3, 6)}, r"pooled must have shape \(3, 5\)"),
        ({"augmentation": torch.zeros(2)}, r"augmentation must be a number or 3 of them, got shape \(2,\)"),
    ],
)
def test_conditions_of_another_shape_are_refused(name: str, wrong: dict[str, Tensor], words: str) -> None:
    x, t = inputs()
    with pytest.raises(ValueError, match=words):
        built(name, **ALL)(x, t, **wrong)


def test_a_network_that_is_not_conditioned_on_the_time_takes_no_other_condition() -> None:
    for options in ({"classes": 2}, {"image_channels": 1}, {"pooled_width": 4}):
        with pytest.raises(ValueError, match="need a time embedding to add to: set embedding"):
            UNet(2, embedding=None, **options)
