"""Reports of training, from what `train` yields: a bar, the log, TensorBoard, errors by noise level, and samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from ml_collections import ConfigDict
from torch import Tensor

from .. import losses
from ..config.build import build_sde
from ..config.kinds import MODEL, kind_of
from ..data.captions import Text
from ..data.codecs import Codec, PixelCodec
from ..data.sets import Data
from ..data.toys import EXACT, TOYS
from ..losses import time_laws
from ..machine.log import log
from ..machine.progress import Progress
from ..models.autoencoder import ConvolutionalAutoencoder
from ..models.base import ScoreModel
from ..noise import StepStream, generator
from ..samplers import Heun, sample, times
from ..sdes.linear import SDE
from . import checkpoint, failures
from .class_names import class_name
from .codes import as_drawn
from .conditions import given, in_turn
from .pictures import grid, histogram, write_png
from .scan import about_empty_classes, disagreements

_PICTURES = 64  # in the grids that training draws
_STEPS = 18  # of Heun's method, for samples in them


@dataclass
class Metrics:
    """What the loop yields after each step, and after reports (with scalars), evaluations and checkpoints."""

    step: int
    scalars: dict[str, float] = field(default_factory=dict)
    checkpoint: Path | None = None
    notes: list[str] = field(default_factory=list)


class Show:
    """Shows what the training loop yields: on the bar, in the log, and in TensorBoard."""

    def __init__(
        self, config: ConfigDict, workdir: Path, data: Data, codec: Codec, device: torch.device, bar: Progress,
        text: Text | None,
    ) -> None:
        self.config, self.workdir, self.shape, self.codec = config, workdir, data.shape, codec
        self.device, self.bar = device, bar
        self.conditioned: Callable[[ScoreModel], ScoreModel] | None = None  # on the first held-out captions or images
        self.held_out = data.test
        self.failed: str | None = None  # the last reason why something could not be shown
        labels = (i for i in range(config.model.num_classes) if i not in data.empty_classes)
        self.classes = {i: class_name(i, data.class_names) for i in labels}
        if config.model.super_resolution or text is not None:
            held_out, text = data.test.to(device), None if text is None else text.to(device)
            index = torch.arange(_PICTURES) % len(held_out)
            self.conditioned = partial(given, config, split=held_out, index=index, text=text, codec=codec)
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and needed in training alone

        self.writer = SummaryWriter(str(workdir / "tensorboard"))
        self.floor = dict[str, float]()  # the irreducible error, for data whose density is known
        name = config.data.dataset
        if name in EXACT and kind_of(config) is MODEL:
            sde = build_sde(config)
            self.floor = noise_floor(EXACT[name](sde), lambda count: TOYS[name](count, 1), sde)
            log.info("irreducible error by noise level: %s", _line(self.floor))

    def __call__(self, m: Metrics) -> None:
        """Show the metrics. If they cannot be written, training goes on, and one warning says why."""
        try:
            self._show(m)
        except OSError as error:
            reason = failures.sentence(error, "train", str(self.workdir))
            if reason != self.failed:
                log.warning("warning: nothing is shown of step %d, and training goes on: %s", m.step, reason)
            self.failed = reason

    def close(self) -> None:
        """Write TensorBoard's pending events."""
        with suppress(OSError):
            self.writer.close()

    def _show(self, m: Metrics) -> None:
        for sentence in m.notes:
            log.info(sentence)
            self.bar.start(m.step)
        if "training_loss" in m.scalars:
            loss, speed = m.scalars["training_loss"], m.scalars["images_per_second"]
            self.bar.note(f"loss {loss:.4g}, {speed:.3g} images/s")
            for name, value in self.floor.items():
                self.writer.add_scalar(f"noise_error_floor/{name}", value, m.step)
        self.bar.update(m.step - self.bar.n)
        if m.scalars:
            log.debug("step %d/%d %s", m.step, self.bar.total, _line(m.scalars))
        for name, value in m.scalars.items():
            self.writer.add_scalar(name, value, m.step)
        if "eval_accuracy" in m.scalars:
            log.info("step %d: right of %.1f %% of held-out examples", m.step, 100 * m.scalars["eval_accuracy"])
        if m.checkpoint is not None:
            log.info("checkpoint: %s", m.checkpoint)
            if self.config.training.snapshot_sampling and kind_of(self.config).pictures:
                self._pictures(m.checkpoint, m.step)
        if "eval_psnr" in m.scalars:
            parts = (m.scalars[f"eval_{name}"] for name in ("reconstruction_bits", "kl_bits", "psnr"))
            log.info("step %d: held-out reconstruction %.3f + KL %.3f bits/dim, PSNR %.1f dB", m.step, *parts)

    def _pictures(self, path: Path, step: int) -> None:
        """Pictures of a checkpoint, by its averaged and by its raw weights."""
        folder, name = self.workdir / "samples" / f"step-{step:09d}", kind_of(self.config).pictures
        trained = checkpoint.Trained.open(path)
        for weights in ("ema", "raw"):
            picture = {"samples": self._samples, "reconstructions": self._reconstructions}[name](trained, weights)
            if picture is not None:
                folder.mkdir(parents=True, exist_ok=True)
                write_png(picture, folder / f"{weights}.png")
                self.writer.add_image(f"{name}/{weights}", picture, step)

    def _samples(self, trained: checkpoint.Trained, weights: str) -> Tensor | None:
        model = trained.model(weights == "ema", self.device)
        if self.conditioned is not None:
            return _picture(self.conditioned(model), self.shape, self.codec, {})
        return _picture(model, self.shape, self.codec, self.classes)

    @torch.no_grad()
    def _reconstructions(self, trained: checkpoint.Trained, weights: str) -> Tensor:
        """A grid of held-out images, each beside the image that the mean of its code decodes to."""
        autoencoder, codec = trained.only(ConvolutionalAutoencoder, weights == "ema", self.device), self.codec
        assert isinstance(codec, PixelCodec)
        k = self.held_out[torch.arange(min(_PICTURES // 2, len(self.held_out)))][0].to(self.device)
        pairs = torch.stack([k, codec.decode(autoencoder.decode(autoencoder.encode(codec.encode(k))[0]))], 1)
        return grid(codec.display(pairs.flatten(0, 1)), min(8, 2 * len(k)))


def warn(config: ConfigDict, data: Data, codec: Codec) -> None:
    """Log what was not read of the data, and where data and config disagree."""
    for sentence in data.notes:
        log.info("data: %s", sentence)
    if data.empty_classes:
        log.warning("warning: %s", about_empty_classes(data))
    o = config.optim
    if o.warmup > config.training.n_iters:
        highest = o.lr * config.training.n_iters / o.warmup
        log.warning(
            f"warning: optim.warmup={o.warmup} is longer than training.n_iters={config.training.n_iters}: the learning "
            f"rate rises only to {highest:.3g}, and not to optim.lr={o.lr:g}"
        )
    for sentence in disagreements(as_drawn(data), codec, config):
        log.warning("warning: %s", sentence)


def noise_bins(sde: SDE, count: int = 5) -> tuple[Tensor, list[str]]:
    """Edges in log SNR, even from t_min (1e-5 at least) to 1, and the range of sigma/alpha of each bin as its name.

    Where the state at t = 1 is pure noise, the bins are even down to -10, and the last has all that is below.
    """
    first, last = sde.log_snr(torch.tensor([max(sde.t_min, 1e-5), 1.0], dtype=torch.float64)).tolist()
    edges = torch.linspace(first, -10.0 if last == -math.inf else last, count + 1, dtype=torch.float64)
    levels = torch.exp(-edges / 2).tolist()
    levels[-1] = math.exp(-last / 2) if last > -math.inf else math.inf
    return edges, [f"sigma {a:.2g} to {b:.2g}" for a, b in pairwise(levels)]


def by_noise_level(sde: SDE, t: Tensor, error: Tensor) -> dict[str, float]:
    """Mean of an error (or another measure) in each bin of `noise_bins` that has examples."""
    edges, names = noise_bins(sde)
    bins = torch.bucketize(-sde.log_snr(t), -edges[1:-1])
    return {name: float(error[bins == i].mean()) for i, name in enumerate(names) if bool((bins == i).any())}


def noise_floor(exact: ScoreModel, sample: Callable[[int], Tensor], sde: SDE, n: int = 20_000) -> dict[str, float]:
    """The irreducible error E|z - E[z|x_t]|² per dimension in each bin, for data whose exact model is known."""
    t = time_laws.log_snr(sde, time_laws.low_discrepancy(n, generator(0, 0, StepStream.FLOOR))).t
    x0 = sample(n).double()
    z = torch.randn(x0.shape, generator=generator(0, 0, StepStream.FLOOR_NOISE), dtype=x0.dtype)
    parts = zip(*(v.split(2_000) for v in (x0, t, z)))  # a mixture of many components takes memory
    with torch.no_grad():
        error = [losses.noise_error(exact, x0_, t_, z_) for x0_, t_, z_ in parts]
    return by_noise_level(sde, t, torch.cat(error))


def _line(scalars: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in scalars.items())


def _picture(
    model: ScoreModel, shape: tuple[int, ...], codec: Codec, classes: Mapping[int, str]
) -> torch.Tensor | None:
    """A grid of 64 samples, or a histogram of 4096 points in the plane; None for other data.

    Samples come from 18 steps of Heun's method on Karras's grid. A class-conditional model draws equally many of each
    class, in rows of their own; `classes` are the names of the classes that were trained on.
    """
    steps, pixels = model.sde.steps, codec.pixels
    if pixels is None and shape != (2,):
        return None
    walk = times.karras(replace(model.sde, t_min=1 / steps if steps else max(model.sde.t_min, 1e-3)), _STEPS)
    count = _PICTURES if pixels is not None else 4096
    groups, names = None, list[str]()
    if pixels is not None and 1 < len(classes) <= _PICTURES:
        count = _PICTURES // len(classes) * len(classes)
        groups, names = [i % len(classes) for i in range(count)], list(classes.values())
    if classes:
        model = model.given(label=in_turn(list(classes), 0, count))
    x = codec.decode(sample(model, Heun(), (count, *shape), walk, denoise=True))
    if pixels is None:
        return histogram(x)
    return grid(pixels.display(x), groups=groups, names=names)
