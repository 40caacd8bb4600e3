"""Augmentation that is told: movements against EDM's own, analytic images, exact flips and shifts; their laws."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import kstest
from torch import Tensor

from score_sde.cli import run
from score_sde.config.build import build_network
from score_sde.data import Data, load_data
from score_sde.data.augmentation import TOLD, Movement, movements
from score_sde.data.codecs import codec_of
from score_sde.networks import UNet
from score_sde.sdes import VPSDE
from score_sde.tasks import checkpoint
from score_sde.tasks.step import Batches
from tests import RECORDED
from tests.runs import image_config, line, run_steps

STILL = dict.fromkeys(Movement._fields, 0.0)


def movement(count: int = 1, **numbers: float) -> Movement:
    return Movement(*(torch.full((count,), value, dtype=torch.float64) for value in (STILL | numbers).values()))


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- what a movement does


def test_images_are_moved_as_by_edm_s_own_pipeline() -> None:
    recorded = {name: torch.from_numpy(a) for name, a in np.load(RECORDED / "augmentation.npz").items()}
    own = Movement(*recorded["movement"])
    assert recorded["movement"][[2, 3, 4, 6, 7]].ne(0).all() and own.axis.ne(0).sum() >= 3  # all changes at once
    torch.testing.assert_close(own.of(recorded["x"].double()), recorded["moved"].double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(own.of(recorded["x"]), recorded["moved"], rtol=0, atol=1e-5)
    torch.testing.assert_close(own.told, recorded["told"], rtol=0, atol=1e-6)


def waves(places: np.ndarray) -> np.ndarray:
    """A smooth function of places (..., 2) in pixels, without any symmetry."""
    x, y = places[..., 0], places[..., 1]
    return np.sin(0.18 * x + 0.07 * y + 0.4) + 0.5 * np.cos(0.07 * x - 0.16 * y) + 0.02 * x - 0.03 * y


def affine(m: dict[str, float], width: int, height: int) -> np.ndarray:
    """The published product of matrices, from the image to the result, in homogeneous coordinates."""

    def turn(angle: float) -> np.ndarray:
        c, s = math.cos(angle), math.sin(angle)
        return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])

    shift = np.array([[1, 0, width / 8 * m["shift_x"]], [0, 1, height / 8 * m["shift_y"]], [0, 0, 1]])
    size, stretch = 2 ** (0.2 * m["size"]), 2 ** (0.2 * m["stretch"])
    stretched = turn(-m["axis"]) @ np.diag([stretch, 1 / stretch, 1]) @ turn(m["axis"])
    return shift @ stretched @ turn(-m["turn"]) @ np.diag([size, size, 1])


MOVED = [
    {"size": 1.3}, {"size": -1.1}, {"turn": 0.7}, {"turn": -2.5}, {"stretch": 1.2}, {"stretch": 1.2, "axis": 0.9},
    {"shift_x": 0.63, "shift_y": -0.4},
    {"size": 0.8, "turn": 1.1, "stretch": -0.9, "axis": 2.1, "shift_x": 0.5, "shift_y": 0.7},
]  # fmt: skip


@pytest.mark.parametrize("numbers", MOVED, ids=lambda m: " ".join(m))
def test_an_analytic_image_is_where_an_affine_map_takes_it(numbers: dict[str, float]) -> None:
    height, width = 40, 32
    x, y = np.meshgrid(np.arange(width) - (width - 1) / 2, np.arange(height) - (height - 1) / 2)
    places = np.stack([x, y, np.ones_like(x)], -1)
    back = (places @ np.linalg.inv(affine(STILL | numbers, width, height)).T)[..., :2]
    image = torch.from_numpy(waves(places[..., :2]))[None, None]
    found = movement(**numbers).of(image)[0, 0].numpy()
    inside = (np.abs(back) < np.array([width, height]) / 2 - 4).all(-1)
    assert inside.sum() > 300
    # The filter's centre of mass is 0.05 pixels off, up to twice that after a turn, and the image's slope up to 0.3.
    assert np.abs(found - waves(back))[inside].max() < 0.035
    assert np.abs(found - waves(places[..., :2]))[inside].max() > 0.3


def test_flips_are_exact_and_come_first() -> None:
    x = torch.rand(1, 2, 6, 5, generator=source())
    assert torch.equal(movement(flip_x=1).of(x), x.flip(-1)) and torch.equal(movement(flip_y=1).of(x), x.flip(-2))
    assert torch.equal(movement().of(x), x)
    both = movement(flip_x=1, turn=0.5, shift_x=0.3).of(x)
    torch.testing.assert_close(both, movement(turn=0.5, shift_x=0.3).of(x.flip(-1)), rtol=0, atol=1e-7)
    assert torch.equal(movement(flip_x=0.0, flip_y=0.0, axis=2.0).of(x), x)  # an axis alone moves nothing


@pytest.mark.parametrize(("right", "down"), [(3, 0), (0, -2), (-4, 3)])
def test_a_shift_by_whole_pixels_is_exact_and_reflects_at_the_border(right: int, down: int) -> None:
    x = torch.rand(2, 3, 8, 8, generator=source(), dtype=torch.float64)
    found = movement(2, shift_x=right, shift_y=down).of(x)  # an eighth of 8 pixels is one
    padded = F.pad(x, (7, 7, 7, 7), mode="reflect")
    torch.testing.assert_close(found, padded[..., 7 - down : 15 - down, 7 - right : 15 - right], rtol=0, atol=1e-7)
    inner = (slice(None), slice(None), slice(3, 6), slice(3, 4))
    torch.testing.assert_close(found[inner], x.roll((down, right), (2, 3))[inner], rtol=0, atol=1e-7)


def test_quarter_turns_are_those_of_pixels_on_smooth_images() -> None:
    grid = np.stack(np.meshgrid(np.arange(16) - 7.5, np.arange(16) - 7.5), -1)
    x = torch.from_numpy(waves(grid))[None, None]
    for quarters in (1, 2, 3):
        found = movement(turn=quarters * math.pi / 2).of(x)  # y points down: a turn of the image anticlockwise
        off = (found - x.rot90(quarters, (2, 3))).abs()[..., 2:-2, 2:-2]
        assert off.max() < 0.035
        assert (found - x.rot90(-quarters, (2, 3))).abs().max() > 0.3 or quarters == 2


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    x, m = torch.rand(6, 1, 9, 9, generator=source()), movements(6, 1.0, source(1))
    whole = m.of(x)
    for i in range(6):
        own = slice(i, i + 1)
        torch.testing.assert_close(m.part(own, "cpu").of(x[own]), whole[own], rtol=0, atol=1e-6)


# -- how movements are drawn


def test_the_first_movements_do_not_depend_on_how_many_are_drawn() -> None:
    few, many = movements(3, 0.5, source()), movements(1000, 0.5, source())
    assert all(torch.equal(a, b[:3]) for a, b in zip(few, many, strict=True))
    assert not torch.equal(movements(3, 0.5, source(1)).shift_x, few.shift_x)


def test_movements_have_the_published_laws() -> None:
    n, p = 40_000, 0.3
    m = movements(n, p, source())
    within = lambda share, expected: abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / n)
    assert within(float(m.flip_x.mean()), 0.5) and within(float(m.flip_y.mean()), p / 2)
    for value in (m.size, m.stretch, m.shift_x, m.shift_y):
        assert within(float((value != 0).double().mean()), p)
        assert kstest(value[value != 0].numpy(), "norm").pvalue > 1e-3
    assert torch.equal(m.shift_x != 0, m.shift_y != 0)
    assert within(float((m.turn != 0).double().mean()), p) and within(float((m.axis != 0).double().mean()), 0.5)
    for angle in (m.turn, m.axis):
        assert kstest(angle[angle != 0].numpy() / (2 * math.pi) + 0.5, "uniform").pvalue > 1e-3
    drawn = torch.stack([m.flip_x - 0.5, m.flip_y - p / 2, *m[2:]])
    assert (drawn.corrcoef() - torch.eye(8)).abs().max() < 0.03  # 5 standard errors
    assert not movements(1000, 0.0, source()).told[:, 1:].any()


def test_the_network_is_told_nothing_exactly_where_nothing_was_done() -> None:
    m, x = movements(400, 0.1, source()), torch.rand(400, 1, 4, 4, generator=source(2))
    told, same = m.told, (m.of(x) == x).flatten(1).all(1)
    assert told.shape == (400, TOLD) and 0.2 < same.double().mean() < 0.5
    assert torch.equal(same, (told == 0).all(1))


# -- training


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits")


def test_a_batch_is_moved_as_it_is_told_and_each_process_takes_its_part(digits: Data) -> None:
    plain, config = image_config(), image_config(training__geometric=0.5)
    codec, sde = codec_of(17), VPSDE()
    before, b = (Batches(c, codec, sde).draw(digits.train, 3) for c in (plain, config))
    assert "movement" not in before.condition and b.condition["movement"].shape == (4, TOLD)
    assert torch.equal(before.z, b.z) and torch.equal(before.t, b.t)
    still = (b.condition["movement"] == 0).all(1)
    assert torch.equal(b.x0[still], before.x0[still]) and not still.all()
    assert ((b.x0 - before.x0).flatten(1).abs().amax(1) > 0.1).equal(~still)
    for part in (slice(0, 2), slice(2, 4)):
        own = Batches(config, codec, sde, part).draw(digits.train, 3)
        torch.testing.assert_close(own.x0, b.x0[part], rtol=0, atol=1e-6)
        assert torch.equal(own.condition["movement"], b.condition["movement"][part])
    later = Batches(config, codec, sde).draw(digits.train, 4)
    assert not torch.equal(later.condition["movement"], b.condition["movement"])
    held_out = Batches(config, codec, sde).draw(digits.test, 3, held_out=True)
    assert "movement" not in held_out.condition


def test_the_network_learns_from_what_it_is_told(digits: Data) -> None:
    state, _ = run_steps(image_config(training__geometric=0.5, optim__lr=1e-2), digits, 2)
    fresh = build_network(image_config(training__geometric=0.5), (1, 8, 8))
    after, before = state.model.network.embed.beside.weight, fresh.embed.beside.weight  # type: ignore[union-attr]
    assert (after - before).abs().max() > 1e-3


def test_a_command_trains_with_it_samples_without_and_tunes_either_way(tmp_path: Path) -> None:
    moving = {"training__geometric": 0.5, "model__ch_mult": 1, "model__attn_resolutions": "()"}
    still = {**moving, "training__geometric": 0}
    assert run(line("vp_digits", "train", tmp_path / "a", **moving)) == 0
    assert run(line("vp_digits", "sample", tmp_path / "a")) == 0
    assert run(line("vp_digits", "train", tmp_path / "b", "--checkpoint", str(tmp_path / "a"), **still)) == 0
    assert run(line("vp_digits", "train", tmp_path / "c", "--checkpoint", str(tmp_path / "b"), **moving)) == 0
    names = [set(checkpoint.load(tmp_path / folder).state_dict()) for folder in "abc"]
    assert names[0] == names[2] and names[0] - names[1] == {"network.embed.beside.weight"}


# -- the network


def unet(embedding: str = "sinusoidal", movement: int = TOLD) -> UNet:
    torch.manual_seed(0)
    options = {"width": 16, "multipliers": (1,), "blocks": 1, "attention": (), "init_scale": 1.0, "image_size": 8}
    return UNet(1, **options, embedding=embedding, movement=movement)  # type: ignore[arg-type]


def output(network: UNet, told: Tensor | None) -> Tensor:
    with torch.no_grad():
        x, time = torch.rand(2, 1, 8, 8, generator=source()), torch.tensor([10.0, 500.0])
        answer: Tensor = network.eval()(x, time, movement=told)
    return answer


def test_zeros_are_no_movement_and_others_are_added_to_the_features_of_the_time() -> None:
    network, told = unet(), torch.rand(2, TOLD, generator=source())
    assert torch.equal(output(network, None), output(network, torch.zeros(2, TOLD)))
    assert (output(network, told) - output(network, None)).abs().max() > 1e-3
    embed, time = network.embed, torch.tensor([10.0, 500.0])
    assert embed is not None and embed.beside is not None and embed.beside.bias is None
    hidden = embed.hidden(embed.features(time) + told @ embed.beside.weight.T)
    torch.testing.assert_close(embed(time, beside=told), F.silu(embed.out(F.silu(hidden))))


def test_its_embedding_starts_as_published() -> None:
    """U(-b, b) with b² = 6/(9 + width) for Song et al.'s networks, and zeros for ADM."""
    weight = unet().embed.beside.weight.detach()  # type: ignore[union-attr]
    bound = math.sqrt(6 / (9 + 16))
    assert 0.9 * bound < weight.abs().max() <= bound
    assert float(weight.square().mean()) == pytest.approx(bound**2 / 3, rel=0.3)
    assert not unet("transformer").embed.beside.weight.any()  # type: ignore[union-attr]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"movement must have shape \(2, 9\), got \(2, 3\)"):
        output(unet(), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"takes no condition movement.*training\.geometric"):
        output(unet(movement=0), torch.zeros(2, TOLD))
    with pytest.raises(ValueError, match="need a time embedding"):
        UNet(1, movement=TOLD, embedding=None)
    with pytest.raises(ValueError, match=r"examples of shape \(3,\) cannot be moved"):
        movement(2).of(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"moves images, but the data have shape \(1, 16\)"):
        build_network(image_config(training__geometric=0.1), (1, 16))
