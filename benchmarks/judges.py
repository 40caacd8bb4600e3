"""Judges of samples: classifiers of a data set's real images, and the Fréchet distance between laws in their features.

`judge("digits")` is a multilayer perceptron of scikit-learn, fitted in a second; `judge("cifar10", path)` a small
convolutional network, trained for some minutes of one CPU thread and kept in a file named by its settings. Neither
is Inception: their distances are no FID, and compare with each other alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.neural_network import MLPClassifier
from torch import Tensor, nn

from score_sde.data import Data, batch, load_data
from score_sde.machine.progress import with_progress
from score_sde.machine.whole_files import read_tensors, write_tensors

JUDGES = Path("runs/judges")  # where trained networks are kept


class Judge:
    """A classifier in two parts: `body`, from pixels in [0, 1] to features, and `head`, from there to logits.

    Images are uint8 levels (N, C, H, W), as the data set stores them. `real` are the features of the training images,
    and `accuracy` is the share of held-out images whose class it names.
    """

    def __init__(self, data: Data, body: nn.Module, head: nn.Module, what: str) -> None:
        assert isinstance(data.train.x, Tensor) and isinstance(data.test.x, Tensor)
        assert data.levels is not None and data.test.y is not None
        self.body, self.head, self.what, self.levels = body.eval(), head.eval(), what, data.levels
        self.train, self.test = data.train.x, data.test.x
        self.real = self.features(self.train)
        self.accuracy = float((self.log_prob(self.test).argmax(1) == data.test.y).double().mean())

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features of the images, (N, D) float64."""
        dtype = next(self.body.parameters()).dtype
        parts = [self.body(part.to(dtype) / (self.levels - 1)) for part in images.split(500)]
        return torch.cat(parts).double()

    @torch.no_grad()
    def log_prob(self, images: Tensor) -> Tensor:
        """Log-probabilities of the classes, (N, classes)."""
        parameter = next(self.head.parameters())
        return self.head(self.features(images).to(parameter.dtype)).log_softmax(1)

    def distance(self, images: Tensor) -> float:
        """The squared Fréchet distance from the training images."""
        return frechet(self.features(images), self.real)

    def __str__(self) -> str:
        return (
            f"the {self.real.shape[1]} features of {self.what} that names {100 * self.accuracy:.1f} % of "
            f"{len(self.test)} held-out images correctly"
        )


def frechet(x: Tensor, y: Tensor) -> float:
    """Squared Fréchet distance of the Gaussians fitted to x (N, D) and y (M, D): Wasserstein's of order 2 (Dowson &
    Landau 1982), |m - n|² + tr(C + D - 2 (C D)^(1/2))."""
    if not bool(x.isfinite().all() and y.isfinite().all()):
        return math.nan
    a, b = x.T.cov(), y.T.cov()
    root = torch.linalg.eigvals(a @ b).real.clamp_min(0).sqrt().sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * root)


def judge(dataset: str, path: str | Path | None = None, kept: Path = JUDGES, size: int | None = None) -> Judge:
    """The judge of "digits" or "cifar10", whose files are at `path`; what takes minutes to train is kept in `kept`.

    `size` is the images', where they are shrunk.
    Raises ValueError for another data set.
    """
    if dataset not in _JUDGES:
        raise ValueError(f"there is no judge of {dataset!r}, only of {', '.join(_JUDGES)}")
    return _JUDGES[dataset](load_data(dataset, path, image_size=size), kept)


def _digits(data: Data, kept: Path) -> Judge:
    """A perceptron of 64 hidden units, in float64."""
    assert isinstance(data.train.x, Tensor) and data.train.y is not None and data.levels is not None
    pixels = data.train.x.flatten(1).double() / (data.levels - 1)
    fitted = MLPClassifier((64,), max_iter=400, random_state=0).fit(pixels.numpy(), data.train.y.numpy())
    layers = []
    for weight, bias in zip(fitted.coefs_, fitted.intercepts_, strict=True):
        layer = nn.Linear(weight.shape[0], weight.shape[1], dtype=torch.float64)
        layer.load_state_dict({"weight": torch.from_numpy(weight.T), "bias": torch.from_numpy(bias)})
        layers.append(layer)
    first, last = layers
    return Judge(data, nn.Sequential(nn.Flatten(), first, nn.ReLU()), last, "a perceptron")


@dataclass(frozen=True)
class Training:
    """How the network for CIFAR-10 is trained: SGD with momentum, a rate that rises and falls linearly."""

    seed: int = 0
    epochs: int = 3
    batch: int = 128
    rate: float = 0.2
    warmup: float = 0.2  # share of the steps in which the rate rises
    momentum: float = 0.9
    decay: float = 5e-4
    widths: tuple[int, int, int] = (32, 64, 64)


def convolutions(widths: tuple[int, int, int]) -> nn.Sequential:
    """Four 3x3 convolutions with batch normalisation, pooled to the mean over places: (N, 3, 32, 32) -> (N, D)."""

    def block(into: int, out: int, *more: nn.Module) -> list[nn.Module]:
        return [nn.Conv2d(into, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(), *more]

    a, b, c = widths
    layers = [*block(3, a, nn.MaxPool2d(2)), *block(a, b, nn.MaxPool2d(2)), *block(b, c, nn.MaxPool2d(2)), *block(c, c)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def convolutional(data: Data, kept: Path, training: Training = Training()) -> Judge:
    """A convolutional network, whose 64 features are the last convolution's means over the image."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        network = nn.Sequential(convolutions(training.widths), nn.Linear(training.widths[-1], 10))
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a quarter faster
    key = hashlib.sha256(f"{training}, {len(data.train)} images{_size(data)}".encode()).hexdigest()[:12]
    file = kept / f"cifar10-{key}.safetensors"
    if file.is_file():
        network.load_state_dict(read_tensors(file))
    else:
        train(network, data, training)
        write_tensors(file, network.state_dict(), {})
    return Judge(data, network[0], network[1], "a convolutional network")


def _size(data: Data) -> str:
    """The size of shrunk images, for the file's name."""
    return "" if data.shape[-1] == 32 else f" of {data.shape[-1]}"


def train(network: nn.Module, data: Data, training: Training) -> None:
    """Train by cross-entropy on mirrored images; the order depends on the seed alone."""
    steps = training.epochs * len(data.train) // training.batch
    optimizer = torch.optim.SGD(
        network.parameters(), training.rate, training.momentum, weight_decay=training.decay, nesterov=True
    )
    up = training.warmup * steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: (i + 1) / up if i < up else max(steps - i, 1) / (steps - up)
    )
    network.train()
    for step in with_progress(range(steps), "a judge of CIFAR-10", steps):
        x, y = batch(data.train, step, training.batch, training.seed, flip=True)
        assert y is not None and data.levels is not None
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x.float() / (data.levels - 1)), y).backward()
        optimizer.step()
        schedule.step()


_JUDGES: dict[str, Callable[[Data, Path], Judge]] = {"digits": _digits, "cifar10": convolutional}
