"""The benchmarks of prompts and of cascades: what they draw, and that their scores are high where they should be."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from score_sde import VPSDE
from score_sde.config import load as load_config
from score_sde.config.build import build_model, resolve_classes, resolve_conditions
from score_sde.data import Data, Split, load_data, shrink
from score_sde.data.captions import Text
from score_sde.data.codecs import PixelCodec
from score_sde.models.base import Estimate, ScoreModel
from studies import cascades, prompts
from studies.prompts import Words

SDE = VPSDE()


def captioned() -> Data:
    """Six grey images, of which two have a caption that another class has once."""
    x = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 3, 4, 4)
    label, caption = torch.tensor([0, 0, 1, 1, 1, 0]), torch.tensor([0, 0, 1, 1, 2, 2])
    test = Split(x[:2] + 100, label[:2], caption=torch.tensor([3, 3]))
    return Data(Split(x, label, caption=caption), test, 256, 2, ("a", "b", "c", "d"))


class Sure:
    """A judge whose classes are what an image's first pixel says."""

    def __init__(self, classes: dict[int, int]) -> None:
        self.classes = classes

    def log_prob(self, images: Tensor) -> Tensor:
        named = torch.tensor([self.classes[int(image.flatten()[0])] for image in images])
        return torch.nn.functional.one_hot(named, 2).double()

    def distance(self, images: Tensor) -> float:
        return 0.0


def test_a_word_is_of_the_class_that_most_of_its_images_have() -> None:
    assert prompts.class_of(captioned()) == {"a": 0, "b": 1, "c": 0}  # of "c" the first of two alike


def test_real_images_are_those_of_their_words_in_either_split() -> None:
    words = Words(["b", "d"], torch.tensor([1, 0]), Text(*torch.zeros(3, 2)))
    k, label = prompts.real(captioned(), words, 6, 0)
    assert {int(image.flatten()[0]) for image in k[0::2]} <= {2, 3} and label.tolist() == [1, 0] * 3
    assert {int(image.flatten()[0]) for image in k[1::2]} <= {100, 101}


def test_own_prompts_score_and_others_by_chance() -> None:
    images = torch.arange(400)[:, None, None, None].remainder(2).expand(400, 3, 4, 4)
    found = prompts.scores(Sure({0: 0, 1: 1}), images, torch.tensor([0, 1]), 0)  # type: ignore[arg-type]
    assert found["accuracy"] == 100 and 40 < found["others"] < 60


class Told(ScoreModel):
    """A model whose clean image is the number that it is told."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor | None = None, **more: Tensor) -> Estimate:
        value = torch.zeros(len(x)) if text is None else text[:, 0, 0]
        data = value[:, None, None, None].expand(x.shape)
        sigma = self.sde.sigma(t).to(x)
        return Estimate(data, (x - self.sde.alpha(t).to(x) * data) / sigma, sigma)


def test_prompts_are_drawn_in_turn_at_any_scale() -> None:
    values = torch.tensor([-0.5, 0.0, 0.5])
    text = Text(values[:, None, None], torch.ones(3, 1, dtype=torch.bool), values[:, None])
    words = Words(["x", "y", "z"], torch.zeros(3), text)
    wanted = {0.0: [0, 0, 0], 1.0: values, 2.0: 2 * values}
    for scale, each in wanted.items():
        k = prompts.draw(Told(SDE), words, (3, 4, 4), scale, 7, seed=0)
        expected = PixelCodec().decode(torch.as_tensor(each)[torch.arange(7) % 3].float())
        assert (k[:, 0, 0, 0].int() - expected.int()).abs().max() <= 1


def test_a_cascade_s_stage_is_given_what_the_one_before_drew(stages: tuple[Path, Path]) -> None:
    both, label = [cascades.read(where) for where in stages], torch.tensor([3, 5, 7])
    small, large = cascades.cascade(both, label, 0.1, 17, seed=4)
    assert small.shape == (3, 1, 4, 4) and large.shape == (3, 1, 8, 8)
    assert torch.equal(large, cascades.draw(both[1], small, label, 0.1, 17, seed=1004))
    assert torch.equal(small, cascades.draw(both[0], None, label, 0.0, 17, seed=4))
    k = load_data("digits").test.x[:3]
    figure = cascades.shown(k, [shrink(k, 2), k], PixelCodec(17))  # type: ignore[arg-type]
    assert len(figure.axes) == 3


def operations(name: str) -> tuple[float, float]:
    """(of an image in training, in MFLOP; of the config's whole training), by torch's counter."""
    config = load_config(f"configs/{name}.py")
    resolve_classes(config, 10, name)
    resolve_conditions(config, config.data.num_channels)
    size, factor = config.data.image_size, config.model.super_resolution
    x = torch.randn(2, config.data.num_channels, size, size)
    image = {"image": x[:, :, ::factor, ::factor]} if factor else {}
    with FlopCounterMode(display=False) as counter:
        build_model(config, tuple(x.shape[1:]))(
            x, torch.rand(2), label=torch.tensor([0, 1]), **image
        ).data.sum().backward()
    each = counter.get_total_flops() / 2e6
    return each, each * config.training.n_iters * config.training.batch_size


@pytest.mark.parametrize("data", ["digits", pytest.param("cifar10", marks=pytest.mark.slow)])
def test_a_cascade_is_trained_with_the_operations_of_one_model_and_its_docstring_says_which(data: str) -> None:
    stages, (one, whole) = [operations(name) for name in cascades.STAGES[data]], operations(cascades.SINGLE[data])
    assert sum(total for _, total in stages) == pytest.approx(whole, rel=0.02)
    text = " ".join(Path(f"configs/{cascades.STAGES[data][0]}.py").read_text().split())
    told = [
        float(number) for number in re.findall(r"(?:steps of|, \d+ of|against \d+ of|and \d+ of) (\d+(?:\.\d+)?)", text)
    ]
    assert set(round(each, 1 if each < 50 else None) for each in (*[e for e, _ in stages], one)) <= set(told)
