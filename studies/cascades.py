"""``python -m studies.cascades [--data cifar10 --path FOLDER] [--fill]``: a cascade beside one model.

Both were trained on the same classes with the same number of operations (the configs say how many). Their samples, of
each class in turn and unguided, are shown to a classifier of real images: how often it names the class, and how far
they lie from the training images in its features. Beside them stand real images, and real small images enlarged by the
last stage, which shows what the earlier stages cost.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from torch import Tensor

from benchmarks.judges import judge
from benchmarks.pages import DOCS, cell, fill, picture, table
from benchmarks.timing import machine
from score_sde import config as configs
from score_sde import recommended, sample
from score_sde.data import Data, load_data, shrink
from score_sde.data.codecs import PixelCodec
from score_sde.machine.progress import with_progress
from score_sde.models.base import ScoreModel
from score_sde.tasks import checkpoint
from score_sde.tasks.conditions import Wanted

from .guidance import Results, held_out, judged

EVALUATIONS = 20  # of each model
STAGES = {
    "digits": ("cascade_digits_4", "cascade_digits_8"),
    "cifar10": ("cascade_cifar_8", "cascade_cifar_16", "cascade_cifar_32"),
}
SINGLE = {"digits": "cond_digits", "cifar10": "cond_cifar_small"}
REAL, ONE, ENLARGED = "real images, held out", "one model", "last stage, from real small images"
LEVELS = (0.0, 0.05, 0.1, 0.2)  # of noise on the small images


class Stage(NamedTuple):
    """A model, its config, and the shape of its examples."""

    model: ScoreModel
    config: ConfigDict
    shape: tuple[int, ...]


def read(workdir: Path) -> Stage:
    trained = checkpoint.find(workdir)
    assert trained.card is not None
    return Stage(trained.model(), trained.config, trained.card.shape)


def draw(stage: Stage, small: Tensor | None, label: Tensor, level: float, levels: int, seed: int) -> Tensor:
    """uint8 images (N, C, H, W) of these classes, enlarged from `small` if the stage enlarges."""
    codec = PixelCodec(levels)
    sampler, times = recommended(replace(stage.model.sde, t_min=1e-3), EVALUATIONS)
    config = configs.from_text(configs.to_json(stage.config), "")
    config.sampling.augmentation, config.sampling.seed = level, seed
    images = []
    for first in range(0, len(label), 250):
        count = min(250, len(label) - first)
        condition = Wanted([], images=small).of(first, count, config, codec, stage.model.sde)[0]
        model = stage.model.given(label=label[first : first + count], **condition)
        x = sample(model, sampler, (count, *stage.shape), times, seed=seed, first=first, denoise=True)
        images.append(codec.decode(x))
    return torch.cat(images)


def cascade(stages: list[Stage], label: Tensor, level: float, levels: int, seed: int) -> list[Tensor]:
    """The images of all stages, each with noise of its own."""
    found: list[Tensor] = []
    for i, stage in enumerate(stages):
        found.append(draw(stage, found[-1] if found else None, label, level, levels, seed + 1000 * i))
    return found


def shown(single: Tensor, stages: list[Tensor], codec: PixelCodec) -> Figure:
    """Samples of the one model above those of the cascade's stages."""
    rows = [*stages, single]
    names = [f"{k.shape[2]} x {k.shape[3]}" for k in stages] + ["one model"]
    figure, axes = plt.subplots(len(rows), 1, figsize=(9, 0.5 * len(rows)), layout="constrained")
    for place, name, k in zip(axes, names, rows, strict=True):
        factor = single.shape[2] // k.shape[2]
        large = codec.display(k).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        place.imshow(large.permute(2, 0, 3, 1).flatten(1, 2).squeeze(-1), cmap="gray", interpolation="nearest")
        place.set(xticks=[], yticks=[])
        place.set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


def measure(stages: list[Stage], single: Stage, data: Data, path: str | None, name: str, o: argparse.Namespace) -> str:
    """Measure everything that is not in the results yet; return the table."""
    who, levels = judge(name, path), data.levels
    assert levels is not None and isinstance(data.test.x, Tensor)
    hashes = [checkpoint.find(w).sha256 for w in (*o.stages, o.single)]
    results = Results(o.results or Path(f"runs/cascades_{name}.json"), {"count": o.count, "models": hashes})
    label, best = torch.arange(o.count) % data.num_classes, stages[-1].config.sampling.augmentation

    def samples(key: str, seed: int) -> tuple[Tensor, Tensor]:
        k, y = held_out(data, o.count, seed)
        if key == REAL:
            return k, y
        if key == ONE:
            return draw(single, None, label, 0.0, levels, seed), label
        if key == ENLARGED:
            small = shrink(k, single.shape[1] // stages[-2].shape[1])
            return draw(stages[-1], small, y, best, levels, seed), y
        return cascade(stages, label, float(key.rsplit(" ", 1)[1]), levels, seed)[-1], label

    for seed in with_progress(range(o.seeds), "seeds", o.seeds, "seed"):
        for key in (REAL, ONE, *(f"cascade, noise {level:g}" for level in LEVELS), ENLARGED):
            if results.done(key, "accuracy") <= seed:
                begin = time.process_time()
                found = samples(key, seed)
                seconds = (time.process_time() - begin) / o.count
                results.add(key, {**judged(who, *found), "seconds": seconds})
    rows = []
    for key, values in results.found.items():
        cost = "" if key == REAL else cell([1000 * s for s in values["seconds"]], 1)
        rows.append((key, cell(values["accuracy"], 1), cell(values["distance"], 2), cost))
    text = table(("samples", "accuracy, %", "Fréchet distance", "CPU time of one, ms"), rows)
    return text + (
        f"\n{o.count} images, {EVALUATIONS} evaluations of each model; in {who}. Mean and standard deviation of "
        f"{o.seeds} seeds; chance is {100 / data.num_classes:.0f} %. {machine(torch.device('cpu'))}.\n"
    )


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m studies.cascades", description=__doc__.splitlines()[0])
    p.add_argument("--data", choices=tuple(STAGES), default="digits")
    p.add_argument("--path", help="where the data lie")
    p.add_argument("--stages", nargs="+", type=Path, help="the stages' workdirs, the smallest first")
    p.add_argument("--single", type=Path, help="that of the one model")
    p.add_argument("--count", type=int, default=500, help="images of each setting and seed")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--results", type=Path, help="where what is found is kept, and looked for")
    p.add_argument("--fill", action="store_true", help="put table and picture into docs/cascades.md")
    return p


def main() -> None:
    o = parser().parse_args()
    o.stages = o.stages or [Path("runs") / name for name in STAGES[o.data]]
    o.single = o.single or Path("runs") / SINGLE[o.data]
    stages, single, data = [read(w) for w in o.stages], read(o.single), load_data(o.data, o.path)
    block = measure(stages, single, data, o.path, o.data, o)
    print(block)
    if o.fill:
        label, levels = torch.arange(20) % data.num_classes, data.levels or 256
        level = stages[-1].config.sampling.augmentation
        one = draw(single, None, label, 0.0, levels, 7)
        drawn = shown(one, cascade(stages, label, level, levels, 7), PixelCodec(levels))
        file = DOCS / "images" / f"cascade_{o.data}.png"
        caption = "Two samples of each class: the stages of the cascade, and one model"
        fill(DOCS / "cascades.md", {o.data: block, f"{o.data}_shown": picture(drawn, file, caption)})


if __name__ == "__main__":
    main()
