"""A run that is interrupted and goes on is the run that was left alone, bit for bit, whatever switches it has."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ml_collections import ConfigDict

from score_sde.config.build import resolve_classes, resolve_conditions
from score_sde.data import Data, Split, load_data
from score_sde.data.captions import Text
from score_sde.data.codecs import codec_of
from score_sde.tasks import checkpoint
from score_sde.tasks.step import make_state
from score_sde.tasks.train import train
from tests.runs import ALONE, image_config, toy_config

CHAIN = {"training__continuous": False, "model__num_scales": 4, "model__beta_max": 3.0, "model__label": "index"}
VARIANCE = {**CHAIN, "model__learned_variance": True}
LEARNED = {"training__sde": "learned", "model__label": "log_sigma", "training__likelihood_weighting": True}
OF_POINTS = {
    "AdamW, warm-up, decay, clipping": {
        "optim__optimizer": "AdamW",
        "optim__weight_decay": 0.1,
        "optim__warmup": 3,
        "optim__decay": 0.5,
        "optim__grad_clip": 0.01,
    },
    "half-life, dropout, no clipping": {
        "model__ema_halflife": 100,
        "model__dropout": 0.3,
        "optim__grad_clip": -1.0,
    },
    "importance, low discrepancy": {"training__low_discrepancy": True, "training__time": "importance"},
    "soft truncation": {"training__soft_truncation": 1.0, "training__likelihood_weighting": True},
    "hybrid": {**VARIANCE, "training__objective": "hybrid"},
    "second moments": {  # a batch in which each step comes ten times and more, so that the next is drawn by them
        **VARIANCE,
        "training__objective": "vlb",
        "training__time": "second_moment",
        "training__batch_size": 128,
    },
    "sliced": {"training__objective": "sliced", "training__projections": 2},
    "finite difference": {"training__objective": "finite_difference"},
    "edm": {"training__sde": "edm", "training__time": "edm", "model__rule": "edm", "model__label": "edm"},
    "learned schedule and ends": {**LEARNED, "model__learn_ends": True},
}
OF_IMAGES = {
    "AdamW, bfloat16, accumulate, checkpoint_activations, dropout": {
        "optim__optimizer": "AdamW", "training__precision": "bfloat16", "training__accumulate": 2,
        "training__checkpoint_activations": True, "model__dropout": 0.2,
    },
    "ncsnv2": {
        "model__name": "ncsnv2", "model__ch_mult": (1, 1, 1), "training__sde": "vesde", "data__random_flip": True,
    },
    "dit": {"model__name": "dit", "model__hidden": 16, "model__depth": 1, "model__num_heads": 2},
    "edm2, accumulate": {
        "model__name": "edm2", "model__label": "edm", "model__class_conditional": True, "training__accumulate": 2,
    },
    "classifier": {"training__objective": "cross_entropy"},
    "autoencoder": {"training__objective": "autoencoder"},
    "classes, super-resolution": {
        "model__class_conditional": True, "model__super_resolution": 2, "training__augmentation": 0.5,
    },
    "learned schedule": {**LEARNED, "model__learn_ends": True, "model__fourier_features": (3, 4)},
}  # fmt: skip


def subset(data: Data, count: int = 40) -> Data:
    def part(split: Split) -> Split:
        return Split(split.x[:count], None if split.y is None else split.y[:count])

    return replace(data, train=part(data.train), test=part(data.test))


def straight_and_interrupted(config: ConfigDict, data: Data, workdir: Path, text: Text | None = None) -> None:
    """Two steps, and the second again from the checkpoint of the first: all that is kept is the same.

    And as it goes on, each moment lies in memory as its parameter does.
    """
    resolve_classes(config, data.num_classes, "these")
    if text is None:
        resolve_conditions(config, data.shape[0])
    config.training.n_iters, config.training.snapshot_freq, config.training.log_freq = 2, 1, 1
    codec = codec_of(data.levels)
    list(train(config, workdir / "a", data, codec, ALONE, text=text))
    shutil.copytree(workdir / "a", workdir / "b")
    first, last = checkpoint.checkpoints(workdir / "b")
    written = last.read_bytes()
    last.unlink()
    list(train(config, workdir / "b", data, codec, ALONE, text=text))
    assert last.read_bytes() == written
    state = make_state(config, data.shape, ALONE.device)
    checkpoint.restore(first, state)
    assert len(state.optimizer.state) == len(state.parameters)
    for p in state.parameters:
        kept = state.optimizer.state[p]
        for moment in (kept["exp_avg"], kept["exp_avg_sq"]):
            assert (moment.stride(), moment.dtype, moment.device) == (p.stride(), p.dtype, p.device)


@pytest.fixture(scope="module")
def digits() -> Data:
    return subset(load_data("digits"))


@pytest.mark.parametrize("changes", OF_POINTS.values(), ids=OF_POINTS.keys())
def test_points_straight_and_interrupted_are_the_same(tmp_path: Path, changes: dict[str, object]) -> None:
    straight_and_interrupted(toy_config(model__hidden=8, **changes), subset(load_data("ring")), tmp_path)


@pytest.mark.parametrize("changes", OF_IMAGES.values(), ids=OF_IMAGES.keys())
def test_images_straight_and_interrupted_are_the_same_channels_last(
    tmp_path: Path, digits: Data, changes: dict[str, object]
) -> None:
    straight_and_interrupted(image_config(training__channels_last=True, **changes), digits, tmp_path)


def test_codes_and_captions_straight_and_interrupted_are_the_same(tmp_path: Path) -> None:
    """Of laws of codes each step has draws of its own, and of captions it leaves some out."""
    draws = torch.Generator().manual_seed(0)
    x, std = torch.randn(2, 40, 2, 4, 4, generator=draws)
    coded = Split(x, caption=torch.arange(40) % 3, std=std.abs())
    text = Text(torch.randn(3, 2, 4, generator=draws), torch.ones(3, 2, dtype=torch.bool), torch.randn(3, 5))
    config = image_config(
        training__channels_last=True, model__text_encoder="one", model__text_width=4, model__pooled_width=5
    )
    straight_and_interrupted(config, Data(coded, coded, levels=None, captions=("a", "b", "c")), tmp_path, text)


@pytest.mark.slow
def test_compiled_straight_and_interrupted_are_the_same(tmp_path: Path, digits: Data) -> None:
    config = image_config(training__compile=True, training__channels_last=True, model__name="dit", model__hidden=16)
    config.model.depth, config.model.num_heads = 1, 2
    straight_and_interrupted(config, digits, tmp_path)
