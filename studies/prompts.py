"""``python -m studies.prompts [--path FOLDER] [--fill]``: does an image match its prompt better than other prompts?

Samples of CIFAR-10's words at several scales of guidance are shown to a classifier of real images that had no part in
drawing them: how often it names the class of the word, for words that the model was trained on and for those
that were left out. Beside them stand real images of the same words, shown at the same size, the same samples beside
other prompts than their own, and samples without a prompt.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.judges import Judge, judge
from benchmarks.pages import DOCS, cell, fill, picture, table
from benchmarks.timing import machine
from score_sde import guide, recommended, sample
from score_sde.data import Data, load_data
from score_sde.data.captions import HuggingFaceEncoder, Text, embed
from score_sde.data.codecs import PixelCodec
from score_sde.machine.progress import with_progress
from score_sde.models.base import ScoreModel
from score_sde.tasks import checkpoint

from .guidance import Results

EVALUATIONS = 20
SCALES = (0.0, 1.0, 2.0, 4.0)
SHOWN = (
    "a fire engine",
    "a moving van",
    "a tabby cat",
    "an alley cat",
    "an elk",
    "a moose",
    "a boat",
    "a speedboat",
)


class Words(NamedTuple):
    """Captions, and the class of each."""

    captions: list[str]
    label: Tensor
    text: Text


def class_of(data: Data) -> dict[str, int]:
    """The class that most images of each caption have."""
    assert data.train.caption is not None and data.train.y is not None
    count = torch.zeros(len(data.captions), data.num_classes)
    count.index_put_((data.train.caption, data.train.y), torch.ones(len(data.train)), accumulate=True)
    return {caption: int(row.argmax()) for caption, row in zip(data.captions, count, strict=True) if row.sum() > 0}


def draw(model: ScoreModel, words: Words, shape: tuple[int, ...], scale: float, count: int, seed: int) -> Tensor:
    """uint8 images (count, C, H, W) of the words in turn."""
    sampler, times = recommended(replace(model.sde, t_min=1e-3), EVALUATIONS)
    images = []
    for first in range(0, count, 250):
        index = torch.arange(first, min(first + 250, count)) % len(words.captions)
        conditional = model.given(**words.text.condition(index))
        guided = conditional if scale == 1 else guide(conditional, model, scale)
        x = sample(guided, sampler, (len(index), *shape), times, seed=seed, first=first, denoise=True)
        images.append(PixelCodec().decode(x))
    return torch.cat(images)


def scores(who: Judge, images: Tensor, label: Tensor, seed: int) -> dict[str, float]:
    """How often the judge names the word's class, and that of another sample's word."""
    named, own = who.log_prob(images).argmax(1), label[torch.arange(len(images)) % len(label)]
    other = own[torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))]
    right, wrong = (100 * float((named == y).double().mean()) for y in (own, other))
    return {"accuracy": right, "others": wrong, "distance": who.distance(images)}


def real(data: Data, words: Words, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Real images of the words, of both splits, and their words' classes."""
    g, images, label = torch.Generator().manual_seed(seed), [], []
    for i in range(count):
        place = data.captions.index(words.captions[i % len(words.captions)])
        assert data.train.caption is not None and data.test.caption is not None
        split = data.train if place in data.train.caption else data.test
        assert split.caption is not None
        rows = torch.nonzero(split.caption.eq(place))[:, 0]
        row = rows[torch.randint(len(rows), (1,), generator=g)]
        images.append(split[row][0])
        label.append(words.label[i % len(words.captions)])
    return torch.cat(images), torch.stack(label)


def shown(model: ScoreModel, text: Text, shape: tuple[int, ...]) -> Figure:
    """A column for each prompt of `SHOWN`, a row for each scale, from the same noise."""
    words = Words(list(SHOWN), torch.zeros(len(SHOWN)), text)
    figure, axes = plt.subplots(len(SCALES), len(SHOWN), figsize=(9, 4.9), layout="constrained")
    for row, scale in zip(axes, SCALES, strict=True):
        for place, image in zip(row, draw(model, words, shape, scale, len(SHOWN), seed=1), strict=True):
            place.imshow(image.permute(1, 2, 0))
            place.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"scale {scale:g}")
    for place, caption in zip(axes[0], SHOWN, strict=True):
        place.set_title(caption, fontsize=9)
    return figure


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m studies.prompts", description=__doc__.splitlines()[0])
    p.add_argument("--path", help="where CIFAR-10 lies")
    p.add_argument("--model", default="runs/text_cifar_16", help="the model's workdir")
    p.add_argument("--count", type=int, default=400, help="images of each setting and seed")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--results", type=Path, default=Path("runs/prompts.json"), help="where what is found is kept")
    p.add_argument("--fill", action="store_true", help="put table and picture into docs/text.md")
    return p


def main() -> None:
    o = parser().parse_args()
    trained = checkpoint.find(o.model)
    config = trained.config
    model, size, m = trained.model(), config.data.image_size, config.model
    data, who = load_data("cifar10", o.path, image_size=size), judge("cifar10", o.path, size=size)
    encoder, classes = HuggingFaceEncoder(m.text_encoder, length=m.text_length), class_of(data)
    out = config.data.leave_out.split(",")
    groups = {"trained on": [c for c in classes if c not in out], "left out": out}
    text = embed(encoder, [*data.captions, *SHOWN], Path(o.model) / "text" / "prompts.safetensors")

    def words(captions: list[str]) -> Words:
        index = torch.tensor([data.captions.index(caption) for caption in captions])
        return Words(captions, torch.tensor([classes[c] for c in captions]), Text(*(part[index] for part in text)))

    about: dict[str, object] = {"count": o.count, "model": trained.sha256, "judge": str(who)}
    results = Results(o.results, about)
    for seed in with_progress(range(o.seeds), "seeds", o.seeds, "seed"):
        for name, captions in groups.items():
            # as many words of each group, other ones for each seed
            g = torch.Generator().manual_seed(seed)
            chosen = words([captions[i] for i in torch.randperm(len(captions), generator=g)[: len(out)]])
            if results.done(f"{name}/real", "accuracy") <= seed:
                k, label = real(data, chosen, o.count, seed)
                results.add(f"{name}/real", scores(who, k, label, seed))
            for scale in SCALES:
                if results.done(f"{name}/{scale:g}", "accuracy") <= seed:
                    images = draw(model, chosen, data.shape, scale, o.count, seed)
                    results.add(f"{name}/{scale:g}", scores(who, images, chosen.label, seed))
    rows = []
    for name in groups:
        for kind in ("real", *(f"{scale:g}" for scale in SCALES)):
            found = results.found[f"{name}/{kind}"]
            samples = {"real": "real images", "0": "without a prompt", "1": "unguided"}.get(kind, f"scale {kind}")
            cells = (
                cell(found[measure], digits) for measure, digits in (("accuracy", 1), ("others", 1), ("distance", 2))
            )
            rows.append((name, samples, *cells))
    head = ("words", "samples", "of the word's class, %", "of another prompt's, %", "Fréchet distance")
    block = table(head, rows)
    block += (
        f"\n{o.count} images of {len(out)} words in each cell, {EVALUATIONS} evaluations; in {who}. Mean and standard "
        f"deviation of {o.seeds} seeds. {machine(torch.device('cpu'))}.\n"
    )
    print(block)
    if o.fill:
        index = torch.arange(len(data.captions), len(data.captions) + len(SHOWN))
        drawn = shown(model, Text(*(part[index] for part in text)), data.shape)
        caption = "Samples for prompts, at four scales, from the same noise"
        fill(DOCS / "text.md", {"words": block, "shown": picture(drawn, DOCS / "images" / "text_cifar.png", caption)})


if __name__ == "__main__":
    main()
