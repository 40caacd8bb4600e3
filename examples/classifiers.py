"""Bayes' rule with a trained class-conditional model: ``python -m examples.classifiers [--workdir DIR] [--fill]``.

Held-out digits are classified by the class under which the model finds them likeliest (`score_sde.classify`), and
beside it by two classifiers: that of noisy images, asked about nearly clean ones,
and a perceptron. After `--mode train` of configs/cond_digits.py and configs/classifier_digits.py.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from benchmarks.pages import DOCS, fill, table
from score_sde import classify, load, load_classifier
from score_sde.data import load_data
from score_sde.data.codecs import PixelCodec
from score_sde.likelihood.dequantisation import uniform_numbers
from score_sde.machine.progress import with_progress


def score(log_prob: Tensor, label: Tensor) -> tuple[float, float, float]:
    """Accuracy in per cent, its standard error, and the mean of -log P(label) in nats."""
    right = (log_prob.argmax(1) == label).double()
    return (
        100 * float(right.mean()),
        100 * float(right.std()) / len(label) ** 0.5,
        -float(log_prob[range(len(label)), label].mean()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/cond_digits", help="of the class-conditional model")
    parser.add_argument("--classifier", default="runs/classifier_digits", help="the workdir of that of noisy images")
    parser.add_argument("--images", type=int, default=300, help="held-out ones")
    parser.add_argument("--fill", action="store_true", help="put the table into docs/likelihood.md")
    options = parser.parse_args()
    data, model, noisy = load_data("digits"), load(options.workdir), load_classifier(options.classifier)
    assert isinstance(data.train.x, Tensor) and data.train.y is not None and data.levels is not None
    k, y = data.test[torch.arange(min(options.images, len(data.test)))]
    assert y is not None
    codec, classes = PixelCodec(data.levels), range(data.num_classes)
    x = codec.encode(k, uniform_numbers(tuple(k.shape), 1, 0, 0)[0]).float()
    models = [model.given(label=c) for c in classes]

    found: dict[str, Tensor] = {}
    ways: dict[str, dict[str, Any]] = {
        "p(x \\| y) by the probability flow": {"rtol": 1e-3, "atol": 1e-3},
        "p(x \\| y) by the SDE's bound, 64 draws": {"estimate": "bound", "t_min": 1e-3},
        "the same, 8 draws": {"estimate": "bound", "draws": 8, "t_min": 1e-3},
    }
    for name, way in ways.items():
        split = x.split(100)
        parts = [
            classify(models, part, first=100 * i, **way)
            for i, part in enumerate(with_progress(split, name, len(split), "batch"))
        ]
        found[name] = torch.cat([part.log_posterior for part in parts])
        print(f"{name}: {score(found[name], y)[0]:.1f} %, {parts[0].nfe:.0f} evaluations an image", flush=True)
    with torch.no_grad():
        found["the classifier of noisy images, at t = 0.001"] = noisy.log_probs(x, torch.tensor(1e-3))
    top = data.levels - 1
    pixels, images = (v.flatten(1).numpy() / top for v in (data.train.x, k))
    judge = MLPClassifier((64,), max_iter=400, random_state=0).fit(pixels, data.train.y.numpy())
    found["a perceptron of 64 units"] = torch.from_numpy(judge.predict_log_proba(images))
    found["chance"] = torch.full((len(y), len(classes)), 1 / len(classes)).log()
    rows = []
    for name, log_prob in found.items():
        right, error, loss = score(log_prob, y)
        right = 100 / len(classes) if name == "chance" else right
        rows.append((name, f"{right:.1f}" + (f" ± {error:.1f}" if name != "chance" else ""), f"{loss:.2f}"))
    text = table((f"{len(y)} held-out digits", "right, %", "-log P(y \\| x), nats"), rows)
    print(text)
    if options.fill:
        fill(DOCS / "likelihood.md", {"digits": text})


if __name__ == "__main__":
    main()
