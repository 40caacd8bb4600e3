"""Data sets by name, and the order of batches: every epoch a permutation, from (seed, step) alone."""

import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from score_sde import VPSDE, closed_form
from score_sde.data import Split, batch, batch_indices, load_data
from score_sde.data.files import Stream
from score_sde.data.sets import _subset
from score_sde.data.toys import (
    EXACT,
    TOYS,
    checkerboard,
    checkerboard_log_prob,
    moons_mixture,
    ring,
    ring_mixture,
    swiss_roll_mixture,
)
from score_sde.models.closed_form import Mixture


def images(n: int, seed: int = 0) -> Split:
    random = np.random.default_rng(seed)
    x = torch.from_numpy(random.integers(0, 256, (n, 3, 4, 5), dtype=np.uint8))
    return Split(x, torch.arange(n))


@pytest.mark.parametrize("n, batch_size", [(10, 4), (7, 7), (5, 3), (3, 8), (1, 2), (64, 16)])
def test_every_epoch_is_a_permutation(n, batch_size):
    steps = math.lcm(n, batch_size) // batch_size * 2
    order = torch.cat([batch_indices(n, batch_size, step, seed=3) for step in range(steps)])
    epochs = order.reshape(-1, n)
    assert torch.equal(epochs.sort(1).values, torch.arange(n).expand_as(epochs))
    if n > 4:
        assert not torch.equal(epochs[0], epochs[1])


def test_order_depends_on_seed_and_step_alone():
    forwards = [batch_indices(100, 32, step, seed=5) for step in range(20)]
    backwards = [batch_indices(100, 32, step, seed=5) for step in reversed(range(20))]
    assert all(torch.equal(a, b) for a, b in zip(forwards, reversed(backwards)))
    assert not torch.equal(forwards[0], batch_indices(100, 32, 0, seed=6))


def test_order_is_the_same_in_every_version():
    # what a run begun with another version of numpy goes on with
    assert batch_indices(10, 10, 0, seed=42).tolist() == [9, 7, 8, 2, 1, 0, 6, 4, 5, 3]


def test_any_epoch_is_reached_without_the_ones_before():
    assert len(batch_indices(50_000, 128, 10**9, seed=0)) == 128


def test_batches_are_the_indexed_examples():
    split = images(20)
    x, y = batch(split, step=1, batch_size=8, seed=2)
    index = batch_indices(20, 8, 1, 2)
    assert torch.equal(x, split.x[index])
    assert torch.equal(y, index)
    assert x.dtype == torch.uint8
    assert batch(Split(split.x), 0, 8, 2)[1] is None


def test_parts_of_processes_join_to_the_whole_batch():
    split = images(21)
    for step in range(4):
        x, y = batch(split, step, 12, seed=1, flip=True)
        parts = [batch(split, step, 12, seed=1, flip=True, rows=slice(r * 3, r * 3 + 3)) for r in range(4)]
        assert torch.equal(x, torch.cat([p[0] for p in parts]))
        assert torch.equal(y, torch.cat([p[1] for p in parts]))


def test_flips_mirror_half_of_the_examples_left_to_right():
    split, flipped = images(50), 0
    for step in range(40):
        x, _ = batch(split, step, 50, seed=7, flip=True)
        plain, _ = batch(split, step, 50, seed=7)
        mirrored = (x == plain.flip(-1)).flatten(1).all(1)
        assert torch.equal(mirrored, ~(x == plain).flatten(1).all(1))  # random pixels are never symmetric
        assert 0 < mirrored.sum() < 50
        flipped += int(mirrored.sum())
    assert abs(flipped - 1000) < 5 * math.sqrt(2000) / 2  # binomial


def test_vectors_are_not_mirrored():
    with pytest.raises(ValueError, match="data.random_flip=False"):
        batch(Split(torch.zeros(4, 2)), 0, 2, 0, flip=True)


def test_streams_give_what_tensors_give():
    whole = images(30)
    reads = []

    def read(index):
        reads.append(len(index))
        return whole.x[list(index)]

    stream = Split(Stream(tuple(whole.x.shape), read), whole.y)
    assert stream.shape == whole.shape
    assert len(stream) == 30
    for step in range(6):
        for a, b in zip(batch(stream, step, 8, 3, flip=True), batch(whole, step, 8, 3, flip=True)):
            assert torch.equal(a, b)
    assert reads == [8] * 6


def test_a_digest_changes_with_all_that_a_split_holds_and_with_nothing_else():
    x, y, places = torch.arange(12.0).reshape(3, 4), torch.tensor([0, 1, 0]), torch.tensor([1, 0, 1])
    split = Split(x, y, caption=places, std=torch.ones(3, 4))
    others = [
        replace(split, x=x + torch.eye(3, 4)),
        replace(split, x=x.reshape(3, 2, 2)),
        replace(split, x=x.double()),
        replace(split, x=x[[1, 0, 2]]),
        replace(split, y=1 - y),
        replace(split, y=None),
        replace(split, caption=1 - places),
        replace(split, std=None),
    ]
    assert len({split.digest(), split.digest(["a", "b"]), split.digest(["ab"]), *(s.digest() for s in others)}) == 11
    assert split.digest() == Split(x.clone(), y.clone(), "elsewhere", places.clone(), torch.ones(3, 4)).digest()


def test_a_stream_is_known_by_its_files_and_where_these_are_unknown_by_its_examples(tmp_path):
    def streamed(size: int = 4, memory: int = 10):
        return load_data("files", tmp_path, image_size=size, memory=memory).train.digest()

    for i in range(8):
        Image.fromarray(np.full((4, 4), i, dtype=np.uint8)).save(tmp_path / f"{i}.png")
        os.utime(tmp_path / f"{i}.png", ns=(0, 10**18 + i))
    first = streamed()
    assert first == streamed() != streamed(memory=10_000) and first != streamed(size=2)
    kept = load_data("files", tmp_path, image_size=4).train  # of 7; a tenth is held out
    changed = next(i for i in range(8) if i in kept.x[:, 0, 0, 0])
    os.utime(tmp_path / f"{changed}.png", ns=(0, 10**18 + changed + 1))
    assert streamed() != first
    os.utime(tmp_path / f"{changed}.png", ns=(0, 10**18 + changed))
    assert streamed() == first
    (tmp_path / f"{changed}.png").rename(tmp_path / f"{changed}_.png")
    assert streamed() != first

    whole = images(30)
    nameless = [Split(Stream((30, 3, 4, 5), lambda i, x=x: x[list(i)])) for x in (whole.x, whole.x, 255 - whole.x)]
    a, b, c = (split.digest() for split in nameless)
    assert a == b != c
    known = Stream((4, 1), lambda i: torch.zeros(len(i), 1), "known")
    parts = [_subset(Split(known), torch.tensor(index)).digest() for index in ([0, 1], [1, 0], [0, 1])]
    assert parts[0] == parts[2] != parts[1]


def test_splits_move_with_their_labels():
    split = images(4).to("meta")
    assert split.x.device.type == split.y.device.type == "meta"
    assert load_data("digits").to("meta").test.x.device.type == "meta"


def test_digits_are_scikit_learns_split_once_and_for_all():
    data, digits = load_data("digits"), load_digits()
    assert (len(data.train), len(data.test), data.levels, data.num_classes) == (1497, 300, 17, 10)
    assert data.class_names == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    assert data.shape == (1, 8, 8)
    order = np.random.default_rng(0).permutation(1797)
    for split, index in ((data.test, order[:300]), (data.train, order[300:])):
        assert split.x.dtype == torch.uint8
        np.testing.assert_array_equal(split.x[:, 0].numpy(), digits.images[index])
        np.testing.assert_array_equal(split.y.numpy(), digits.target[index])
    assert data.test.y[:9].tolist() == [6, 6, 6, 2, 5, 6, 6, 2, 2]  # in every version of numpy


def test_names_are_found_in_any_case_and_wrong_ones_get_the_nearest():
    assert load_data("Digits").levels == 17
    with pytest.raises(ValueError, match="no data set 'checker_board': the nearest name is 'checkerboard'"):
        load_data("checker_board")
    with pytest.raises(ValueError, match=r"needs the path of your data: --config\.data\.path=PATH"):
        load_data("files", "")


@pytest.mark.parametrize("name", TOYS)
def test_toys_are_of_unit_size_and_repeat_by_seed(name):
    x = TOYS[name](5000, 3)
    assert x.shape == (5000, 2)
    assert x.dtype == torch.float32
    assert 0.3 < x.square().mean().sqrt() < 1
    assert x.abs().max() < 1.6
    assert torch.equal(x, TOYS[name](5000, 3))
    assert not torch.equal(x, TOYS[name](5000, 4))
    data = load_data(name)
    assert (data.shape, data.levels, data.num_classes) == ((2,), None, 0)
    assert not torch.equal(data.train.x[: len(data.test)], data.test.x)


def test_ring_is_its_mixture():
    weights, means, variances = ring_mixture()
    n = 40_000
    x = ring(n).double()
    nearest = torch.cdist(x, means).argmin(1)  # components lie 7.7 standard deviations apart
    for k in range(8):
        own = x[nearest == k]
        share = len(own) / n
        assert abs(share - weights[k]) < 5 * math.sqrt(1 / 8 * 7 / 8 / n)
        se = math.sqrt(variances[k] / len(own))
        assert (own.mean(0) - means[k]).abs().max() < 5 * se
        assert (own.var(0) / variances[k] - 1).abs().max() < 5 * math.sqrt(2 / len(own))
    model = closed_form.Mixture(VPSDE(), weights, means, variances)
    at_end = model(x[:5], torch.tensor(1e-9, dtype=torch.float64)).data
    torch.testing.assert_close(at_end, x[:5], atol=1e-4, rtol=0)  # next to no noise: the clean data are x


def test_checkerboard_lies_on_its_density_which_integrates_to_one():
    x = checkerboard(20_000)
    assert torch.isfinite(checkerboard_log_prob(x)).all()
    side = torch.arange(-1.5, 1.5, 1 / 64) + 1 / 128
    plane = torch.cartesian_prod(side, side)
    assert checkerboard_log_prob(plane).exp().sum().item() / 64**2 == pytest.approx(1, abs=1e-5)
    squares = ((x + 1) * 2).floor()
    counts = torch.bincount((4 * squares[:, 0] + squares[:, 1]).long(), minlength=16)
    assert ((counts > 0) == (torch.arange(16) // 4 + torch.arange(16) % 4).remainder(2).eq(0)).all()
    assert (counts[counts > 0] / 20_000 - 1 / 8).abs().max() < 5 * math.sqrt(1 / 8 * 7 / 8 / 20_000)


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("t", [0.003, 0.1], ids=["little noise", "much noise"])
def test_exact_models_answer_for_the_points_that_are_drawn(name, t):
    """What is left of the noise is uncorrelated with any function of x_t, as it is for E[z | x_t] alone."""
    sde, n = VPSDE(), 10_000
    time = torch.tensor(t, dtype=torch.float64)
    x0 = TOYS[name](n, 5).double()
    z = torch.randn(n, 2, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    x = sde.perturb(x0, time, z)
    noise = EXACT[name](sde)(x, time).noise
    waves = torch.cat([(x @ torch.tensor(w, dtype=torch.float64)).sin() for w in ([[9.0], [2.0]], [[-3.0], [8.0]])], 1)
    for f in (noise, x, x.flip(1), waves):
        each = (z - noise) * f
        assert (each.mean(0) / (each.std(0) / n**0.5)).abs().max() < 4  # standard errors, 16 numbers a case


@pytest.mark.parametrize("mixture", [moons_mixture, swiss_roll_mixture])
def test_more_nodes_do_not_change_a_curve(mixture):
    t = torch.tensor(1e-5, dtype=torch.float64)
    x = TOYS[mixture.__name__.removesuffix("_mixture")](1000, 2).double()
    few, many = (Mixture(VPSDE(), *m) for m in (mixture(), mixture(1000)))
    torch.testing.assert_close(few(x, t).noise, many(x, t).noise, rtol=0, atol=1e-8)
    torch.testing.assert_close(few.log_prob(x, t), many.log_prob(x, t), rtol=0, atol=1e-7)


def test_boxes_of_the_checkerboard_are_its_black_squares():
    model, t = EXACT["checkerboard"](VPSDE()), torch.tensor(1e-5, dtype=torch.float64)  # sigma 0.001
    grid = (torch.arange(64, dtype=torch.float64) + 0.5) / 32 - 1  # none within 0.0156 of an edge
    plane = torch.cartesian_prod(grid, grid)
    black = torch.isfinite(checkerboard_log_prob(plane))
    density = model.log_prob(plane, t).exp()
    assert int(black.sum()) == 64**2 // 2 and (density[black] - 0.5).abs().max() < 1e-5
    assert density[~black].max() < 1e-40
