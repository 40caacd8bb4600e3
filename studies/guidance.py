"""``python -m studies.guidance [--data cifar10 --path FOLDER] [--fill]``: what guidance does, measured.

Samples of each class in turn, by every kind of guidance and scale, are shown to a classifier of clean real images that
had no part in drawing them: how often it names the class that was asked for, and how far the samples lie from the
training images in its features (the Fréchet distance, `benchmarks.judges`). And the other way round, a classifier
trained on samples alone is asked about real held-out images (classification accuracy score, Ravuri & Vinyals 2019,
arXiv:1905.10887).

The model is class-conditional and was trained with dropout of its labels, so that it is the unconditional model, too.
The classifier of noisy images guides that one; the weaker model of autoguidance is conditioned on the labels.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from sklearn.neural_network import MLPClassifier
from torch import Tensor, nn

from benchmarks.judges import Judge, Training, convolutions, judge, train
from benchmarks.pages import DOCS, cell, fill, picture, table
from benchmarks.timing import machine
from score_sde import classifier, guide, load, load_classifier, recommended, sample
from score_sde.data import Data, Split, load_data
from score_sde.data.codecs import PixelCodec
from score_sde.machine.progress import Progress
from score_sde.models.base import ScoreModel
from score_sde.models.classifier import NoisyClassifier
from score_sde.tasks.pictures import grid

EVALUATIONS = 20
BATCH = 1 << 17  # numbers in the states that are sampled together: more do not fit a processor's cache
INTERVAL = (0.3, 3.0)  # of sigma/alpha: where which class it is is being decided; Kynkäänniemi et al. have 0.28 to 2.9
RESCALE = 0.7  # Lin et al. 2023
CHANCE = 10.0  # per cent: both data sets have ten classes
KINDS = ("no label", "unguided", "classifier-free", "in an interval", "rescaled", "autoguidance", "classifier")
SCALES: dict[str, dict[str, tuple[float, ...]]] = {
    "digits": {
        "no label": (0,),
        "unguided": (1,),
        "classifier-free": (0.5, 1.5, 2, 3, 5),
        "in an interval": (2, 3, 5),
        "rescaled": (2, 3, 5),
        "autoguidance": (1.5, 2, 3),
        "classifier": (1, 2, 4, 8),
    },
    "cifar10": {
        "no label": (0,),
        "unguided": (1,),
        "classifier-free": (2, 4),
        "in an interval": (4,),
        "rescaled": (4,),
        "autoguidance": (2,),
        "classifier": (4,),
    },
}
TAUGHT = {  # whose samples a classifier is trained on
    "digits": (("unguided", 1), ("classifier-free", 2), ("classifier-free", 5), ("classifier", 1)),
    "cifar10": (("unguided", 1), ("classifier-free", 2)),
}


class Parts(NamedTuple):
    """What samples are drawn with."""

    model: ScoreModel
    weak: ScoreModel
    noisy: NoisyClassifier

    def given(self, kind: str, scale: float, label: Tensor) -> ScoreModel:
        """The model with this kind of guidance, conditioned on these classes, (B,)."""
        conditional, unconditional = self.model.given(label=label), self.model.given(label=None)
        if kind == "no label":
            return unconditional
        if kind == "unguided":
            return conditional
        if kind == "classifier":
            return classifier(unconditional, self.noisy, scale, label=label)
        if kind == "autoguidance":
            return guide(conditional, self.weak.given(label=label), scale)
        low, high = INTERVAL if kind == "in an interval" else (0.0, float("inf"))
        rescale = RESCALE if kind == "rescaled" else 0.0
        return guide(conditional, unconditional, scale, low=low, high=high, rescale=rescale)


def draw(parts: Parts, data: Data, kind: str, scale: float, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (count, C, H, W) as the data set has them, uint8, and their classes, in turn."""
    assert data.levels is not None
    codec, label = PixelCodec(data.levels), torch.arange(count) % data.num_classes
    sampler, times = recommended(replace(parts.model.sde, t_min=1e-3), EVALUATIONS)
    images = []
    together = max(1, BATCH // math.prod(data.shape))
    for first in range(0, count, together):
        y = label[first : first + together]
        model, shape = parts.given(kind, scale, y), (len(y), *data.shape)
        images.append(codec.decode(sample(model, sampler, shape, times, seed=seed, first=first, denoise=True)))
    return torch.cat(images), label


def held_out(data: Data, count: int, seed: int, split: str = "test") -> tuple[Tensor, Tensor]:
    """`count` real images, and their classes."""
    whole = getattr(data, split)
    k, y = whole[torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))[:count]]
    assert y is not None
    return k, y


def judged(who: Judge, images: Tensor, label: Tensor) -> dict[str, float]:
    """How often the judge names the class, and the distance of the law."""
    right = (who.log_prob(images).argmax(1) == label).double().mean()
    return {"accuracy": 100 * float(right), "distance": who.distance(images)}


def taught(data: Data, images: Tensor, label: Tensor, seed: int) -> float:
    """Per cent of real held-out images that a classifier trained only on these images names correctly."""
    test = data.test
    assert data.levels is not None and isinstance(test.x, Tensor) and test.y is not None
    top = data.levels - 1
    if data.shape[0] == 1:
        pupil = MLPClassifier((64,), max_iter=400, random_state=seed).fit(
            images.flatten(1).numpy() / top, label.numpy()
        )
        return 100 * float(pupil.score(test.x.flatten(1).numpy() / top, test.y.numpy()))
    torch.manual_seed(seed)
    training = Training(seed=seed, epochs=max(3, 30_000 // len(images)))
    network = nn.Sequential(convolutions(training.widths), nn.Linear(training.widths[-1], data.num_classes))
    train(network, Data(Split(images, label), data.test, data.levels, data.num_classes), training)
    with torch.no_grad():
        parts = [network.eval()(part.float() / top).argmax(1) for part in test.x.split(500)]
    return 100 * float((torch.cat(parts) == test.y).double().mean())


class Results:
    """What was found, kept in a file after each: {"kind/scale": {"accuracy": [one of each seed], ...}}."""

    def __init__(self, file: Path, about: dict[str, object]) -> None:
        self.file, self.about = file, about
        kept = json.loads(file.read_text()) if file.is_file() else {}
        self.found: dict[str, dict[str, list[float]]] = kept.get("found", {}) if kept.get("about") == about else {}

    def add(self, key: str, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.found.setdefault(key, {}).setdefault(name, []).append(value)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps({"about": self.about, "found": self.found}, indent=1) + "\n")

    def done(self, key: str, name: str) -> int:
        return len(self.found.get(key, {}).get(name, []))


def key_of(kind: str, scale: float) -> str:
    return f"{kind}/{scale:g}"


def measure(
    parts: Parts, data: Data, who: Judge, results: Results, name: str, count: int, pupils: int, seeds: int
) -> None:
    """Measure everything that is not in the results yet."""
    settings = [(kind, scale) for kind, scales in SCALES[name].items() for scale in scales]
    with Progress(name, seeds * (len(settings) + len(TAUGHT[name]) + 2), "cell") as bar:
        for seed in range(seeds):
            if results.done("real", "accuracy") <= seed:
                results.add("real", judged(who, *held_out(data, count, seed)))
            bar.update()
            for kind, scale in settings:
                if results.done(key_of(kind, scale), "accuracy") <= seed:
                    results.add(key_of(kind, scale), judged(who, *draw(parts, data, kind, scale, count, seed)))
                bar.update()
            for kind, scale in TAUGHT[name]:
                if pupils and results.done(key_of(kind, scale), "taught") <= seed:
                    # other samples than those that were judged
                    score = taught(data, *draw(parts, data, kind, scale, pupils, 1000 + seed), seed)
                    results.add(key_of(kind, scale), {"taught": score})
                bar.update()
            if pupils and results.done("real", "taught") <= seed:
                results.add("real", {"taught": taught(data, *held_out(data, pupils, seed, "train"), seed)})
            bar.update()


def tables(results: Results, data: Data, who: Judge, name: str, count: int, pupils: int) -> dict[str, str]:
    """The page's blocks."""
    found = results.found
    rows = [("real images, held out", "", *(cell(found["real"][m], d) for m, d in (("accuracy", 1), ("distance", 2))))]
    rows.append(("chance", "", f"{CHANCE:.1f}", ""))
    for kind, scales in SCALES[name].items():
        for scale in scales:
            here = found.get(key_of(kind, scale))
            if here is None:  # a run that was stopped
                continue
            rows.append((kind, f"{scale:g}", cell(here["accuracy"], 1), cell(here["distance"], 2)))
    seeds = len(found["real"]["accuracy"])
    text = table(("samples", "scale", "accuracy, %", "Fréchet distance"), rows)
    text += (
        f"\n{count} images, {EVALUATIONS} evaluations each; in {who}. Mean and standard deviation of {seeds} seeds. "
        f"{machine(torch.device('cpu'))}.\n"
    )
    blocks = {f"{name}_scales": text}
    if pupils:
        pairs = [("as many real images", found["real"])]
        pairs += [(f"{kind}, scale {scale:g}", found[key_of(kind, scale)]) for kind, scale in TAUGHT[name]]
        scored = [(whose, cell(here["taught"], 1)) for whose, here in pairs]
        scored.append(("chance", f"{CHANCE:.1f}"))
        blocks[f"{name}_taught"] = table((f"trained on {pupils} of", "right of real held-out images, %"), scored)
    return blocks


def curve(results: Results, name: str) -> Figure:
    """The trade-off: the accuracy against the distance, along each kind's scales from where it begins."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    found, plain, none = results.found, key_of("unguided", 1), key_of("no label", 0)
    begins = {"classifier-free": {0.0: none, 1.0: plain}, "classifier": {0.0: none}}
    for i, kind in enumerate(KINDS):
        own = {scale: key_of(kind, scale) for scale in SCALES[name][kind]}
        alone = kind in ("no label", "unguided")
        keys = own if alone else begins.get(kind, {1.0: plain}) | own
        keys = {scale: keys[scale] for scale in sorted(keys) if keys[scale] in found}
        runs = [found[key] for key in keys.values()]
        x, y = ([statistics.fmean(run[m]) for run in runs] for m in ("distance", "accuracy"))
        dx, dy = ([statistics.pstdev(run[m]) for run in runs] for m in ("distance", "accuracy"))
        style = "s" if alone else "o-"
        axes.errorbar(x, y, dy, dx, style, ms=4, lw=1.2, elinewidth=0.6, color="k" if alone else f"C{i}")
        for scale, a, b in zip(keys, x, y, strict=True):
            if alone:
                axes.annotate(kind, (a, b), (6, -9), textcoords="offset points", fontsize=8)
            elif scale in own:
                axes.annotate(f"{scale:g}", (a, b), (3, 4), textcoords="offset points", fontsize=7, color=f"C{i}")
        if not alone:
            axes.plot([], [], "o-", ms=4, color=f"C{i}", label=kind)
    real = [statistics.fmean(found["real"][m]) for m in ("distance", "accuracy")]
    axes.plot(*real, "k*", ms=9, label="real, held out")
    axes.axhline(CHANCE, color="0.7", lw=0.8, label="chance")
    axes.set(xlabel="Fréchet distance", ylabel="accuracy of the classifier of real images, %", xscale="log")
    axes.legend(fontsize=8, loc="center right")
    return figure


def samples(parts: Parts, data: Data, scales: Sequence[float] = (0, 1, 2, 4, 8)) -> Figure:
    """Rows of scales by classifier-free guidance, from the same noise, a column for each class."""
    assert data.levels is not None
    codec, classes = PixelCodec(data.levels), data.num_classes
    figure, axes = plt.subplots(len(scales), 1, figsize=(7, 1.5 * len(scales)), layout="constrained")
    for place, scale in zip(axes, scales, strict=True):
        images = codec.display(draw(parts, data, "classifier-free", scale, 2 * classes, seed=3)[0])
        place.imshow(grid(images, classes).permute(1, 2, 0).squeeze(-1), cmap="gray")
        place.set(xticks=[], yticks=[], ylabel=f"scale {scale:g}")
    return figure


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m studies.guidance", description=__doc__.splitlines()[0])
    p.add_argument("--data", choices=tuple(SCALES), default="digits")
    p.add_argument("--path", help="where the data lie")
    p.add_argument(
        "--model", help="the class-conditional model's workdir; default runs/cond_digits or cond_cifar_small"
    )
    p.add_argument("--weak", help="a weaker one's; default runs/cond_digits_weak or cond_cifar_weak")
    p.add_argument("--classifier", help="that of noisy images; default runs/classifier_digits or classifier_cifar")
    p.add_argument("--count", type=int, help="images of each setting and seed; default 300 digits, 100 of CIFAR-10")
    p.add_argument("--pupils", type=int, help="images that classifiers are trained on, 0: none; default 1437 or 0")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--results", type=Path, help="where what is found is kept, and looked for")
    p.add_argument("--fill", action="store_true", help="put tables and pictures into docs/guidance.md")
    return p


def main() -> None:
    o = parser().parse_args()
    digits = o.data == "digits"
    names = ("cond_digits", "cond_digits_weak", "classifier_digits")
    if not digits:
        names = ("cond_cifar_small", "cond_cifar_weak", "classifier_cifar")
    where = [given or f"runs/{name}" for given, name in zip((o.model, o.weak, o.classifier), names, strict=True)]
    parts = Parts(load(where[0]), load(where[1]), load_classifier(where[2]))
    data, who = load_data(o.data, o.path), judge(o.data, o.path)
    count, pupils = o.count or (300 if digits else 100), (1437 if digits else 0) if o.pupils is None else o.pupils
    about: dict[str, object] = {"count": count, "pupils": pupils, "parts": where, "judge": str(who)}
    results = Results(o.results or Path(f"runs/guidance_{o.data}.json"), about)
    measure(parts, data, who, results, o.data, count, pupils, o.seeds)
    blocks = tables(results, data, who, o.data, count, pupils)
    for text in blocks.values():
        print(text)
    if o.fill:
        images = DOCS / "images"
        caption = "Accuracy against distance, along the scales of each kind of guidance"
        blocks[f"{o.data}_curve"] = picture(curve(results, o.data), images / f"guidance_{o.data}.png", caption)
        shown = samples(parts, data) if digits else samples(parts, data, (0, 1, 2, 4))
        caption = "Two samples of each class at each scale, from the same noise"
        blocks[f"{o.data}_samples"] = picture(shown, images / f"guidance_{o.data}_samples.png", caption)
        fill(DOCS / "guidance.md", blocks)


if __name__ == "__main__":
    main()
