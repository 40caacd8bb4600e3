"""Training: one short step that tests can call, and a loop that yields what there is to report.

Everything random in step n (which examples, flips, times, noise, dropout) is drawn from (seed, n) for the whole batch,
of which each process takes its part. So a resumed run repeats an uninterrupted one bit for bit on a CPU, and several
processes compute what one would.
"""

from __future__ import annotations

import copy
import json
import math
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .. import config as configs
from .. import losses
from ..config.build import Trainable, build_sde, build_trained, code_shape, is_autoencoder, is_classifier
from ..config.objective import PARTS, PROJECTED, build_objective, importance_weighted, learned_law, measure, time_law
from ..data.captions import Text
from ..data.codecs import AutoencoderCodec, Codec
from ..data.files import Stream
from ..data.sets import Data, Split, batch_indices, mirrored
from ..losses import time_laws
from ..losses.time_laws import SecondMoments, TimeLaw
from ..machine.devices import sent
from ..machine.parallel import Processes
from ..machine.whole_files import remove_leftovers
from ..models.autoencoder import ConvolutionalAutoencoder
from ..models.base import ScoreModel
from ..noise import StepStream, generator
from ..sdes.linear import SDE, like
from . import checkpoint
from .batches import left_out, low_resolution, of_data
from .ema import ema_decay, ema_update
from .origin import check_origin, take_weights


@dataclass
class State:
    """What training changes: the model, the average of its weights, the optimizer's moments, the step, and a law of t.

    Most laws learn nothing: `law` is there where the config's does, and takes the place of `time_law(config)`.
    """

    model: Trainable
    ema: Trainable
    optimizer: Optimizer
    step: int = 0
    law: SecondMoments | None = None

    def __post_init__(self) -> None:
        # Listed once: a walk over the modules in every step would cost more than the fused update of a small network.
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.values = [p.detach() for p in self.model.parameters()]
        self.averages = [p.detach() for p in self.ema.parameters()]


class Batch(NamedTuple):
    """One process' part of a batch: data, times and importance weights (float64, CPU), noise, and projections."""

    x0: Tensor
    t: Tensor
    importance: Tensor
    z: Tensor
    v: Tensor  # (B, M, *shape), M = 0 where the objective takes none
    condition: dict[str, Tensor]  # (B, ...) each, what the model is given of the examples

    def parts(self, count: int) -> list[Batch]:
        """The batch in `count` parts."""
        x0, t, importance, z, v = (value.chunk(count) for value in self[:5])
        given = {name: value.chunk(count) for name, value in self.condition.items()}
        return [
            Batch(x0[i], t[i], importance[i], z[i], v[i], {name: value[i] for name, value in given.items()})
            for i in range(len(x0))
        ]


class Record(NamedTuple):
    """What one step leaves for the log, unread until then so that no step waits for the device."""

    step: int
    learning_rate: float
    grad_norm: Tensor
    measure: Tensor  # per example: mean squared error of the noise, unweighted, or what else the objective measures
    loss: Tensor
    t: Tensor


@dataclass
class Metrics:
    """What the loop yields after each step; with scalars every log_freq steps, after evaluations and checkpoints."""

    step: int
    scalars: dict[str, float] = field(default_factory=dict)
    checkpoint: Path | None = None
    notes: list[str] = field(default_factory=list)


def make_state(config: ConfigDict, shape: tuple[int, ...], device: torch.device) -> State:
    """A fresh state for examples of `shape`; its weights depend on config.seed alone."""
    o, t = config.optim, config.training
    model = build_trained(config, shape).to(device)
    if t.channels_last and len(shape) == 3:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    kind = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[o.optimizer]
    parameters = [p for p in model.parameters() if p.requires_grad]
    fused = device.type in ("cpu", "cuda")
    optimizer = kind(
        parameters, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay, fused=fused or None
    )
    return State(model, ema, optimizer, law=learned_law(config))


def learning_rate(config: ConfigDict, step: int) -> float:
    """Rises linearly from 0 over optim.warmup steps, and falls to 0 over the last fraction optim.decay of the run."""
    o, n = config.optim, config.training.n_iters
    rise = min(step / o.warmup, 1.0) if o.warmup else 1.0
    fall = min((n - step) / (o.decay * n), 1.0) if o.decay else 1.0
    return o.lr * rise * max(fall, 0.0)


def draw(
    config: ConfigDict,
    split: Split,
    codec: Codec,
    sde: SDE,
    step: int,
    part: slice,
    *,
    flip: bool,
    held_out: bool = False,
    law: TimeLaw | None = None,
    text: Text | None = None,
) -> Batch:
    """One process' part of the batch of step `step`: data, times and noise, all from (seed, step), and from `law`.

    `text` is of the data's captions, for a model that takes them.
    """
    n, seed = config.training.batch_size, config.seed
    index = batch_indices(len(split), n, step, seed)[part]
    k, _ = split[index]
    if flip:
        k = mirrored(k, step, n, seed, part)
    numbers = time_laws.low_discrepancy if config.training.low_discrepancy else time_laws.uniform_numbers
    apart = StepStream.HELD_OUT if held_out else 0
    source, truncation = generator(seed, step, StepStream.TIMES + apart), config.training.soft_truncation
    law, drawn = law or time_law(config), numbers(n, source)
    if truncation > 0 and not held_out:  # a held-out loss is one over all times
        law = time_laws.soft_truncation(law, truncation, time_laws.uniform_numbers(1, source)[0])
    times = law(sde, drawn)
    noise = generator(seed, step, StepStream.NOISE + apart, k.device)
    shape, floats = (n, *k.shape[1:]), torch.float32
    u = torch.rand(shape, generator=noise, device=k.device)[part] if config.data.uniform_dequantization else None
    of_noise = (n, *code_shape(config, split.shape)) if is_autoencoder(config) else shape
    z = torch.randn(of_noise, generator=noise, device=k.device, dtype=floats)[part]
    x0 = codec.encode(k, u).to(floats)
    if split.std is not None:  # examples are laws of codes, of which each step has a draw of its own
        source = generator(seed, step, StepStream.CODES + apart, k.device)
        x0 = x0 + split.std[sent(index, k.device)] * _normal_part(x0, n, part, source)
    m = config.training.projections if config.training.objective in PROJECTED else 0
    v = torch.randn((n, m, *k.shape[1:]), generator=noise, device=k.device, dtype=floats)[part]
    if config.training.channels_last and x0.ndim == 4:
        x0, z = (v.contiguous(memory_format=torch.channels_last) for v in (x0, z))
    condition = of_data(config, split, index, text)
    if not held_out and condition and not is_classifier(config):
        u = time_laws.uniform_numbers(n, generator(seed, step, StepStream.CONDITION))[part]
        condition = left_out(condition, u < config.training.condition_dropout)
    if config.model.super_resolution:
        u = time_laws.uniform_numbers(n, generator(seed, step, StepStream.AUGMENTATION + apart))[part]
        source = generator(seed, step, StepStream.AUGMENTATION_NOISE + apart, k.device)
        spread = partial(_normal_part, n=n, part=part, generator=source)
        level = config.training.augmentation * u
        condition |= low_resolution(k, config.model.super_resolution, codec, sde, level, spread)
    return Batch(x0, times.t[part], times.weight[part], z, v, condition)


def _normal_part(like: Tensor, n: int, part: slice, generator: torch.Generator) -> Tensor:
    """Standard normal numbers for one process' part of n examples."""
    return torch.randn((n, *like.shape[1:]), generator=generator, device=like.device, dtype=like.dtype)[part]


def seed_dropout(seed: int, step: int, processes: Processes) -> None:
    """Seed torch's own generator, the only one that dropout knows, for one step of one process."""
    state = int(np.random.SeedSequence([seed, step, StepStream.DROPOUT, processes.rank]).generate_state(1)[0])
    torch.default_generator.manual_seed(state)
    if processes.device.type == "cuda":
        torch.cuda.manual_seed(state)


def train_step(state: State, objective: nn.Module, b: Batch, config: ConfigDict) -> Record:
    """One update of the parameters and their average by a batch; nothing is read back from the device."""
    t, o = config.training, config.optim
    rate = learning_rate(config, state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.zero_grad(set_to_none=True)
    parts = b.parts(t.accumulate)
    measures, values = [], []
    for i, p in enumerate(parts):
        last = i == len(parts) - 1
        synced = objective.no_sync() if isinstance(objective, DistributedDataParallel) and not last else nullcontext()
        with synced, in_precision(config, p.x0.device):
            loss, measured = loss_of(objective, p, config)
            (loss.mean() / len(parts)).backward()
        measures.append(measured)
        values.append(loss.detach())
    norm = update(state, o.grad_clip if o.grad_clip >= 0 else math.inf)
    record = Record(state.step, rate, norm, torch.cat(measures), torch.cat(values), b.t)
    state.step += 1
    decay = ema_decay(
        state.step, rate=config.model.ema_rate, halflife=config.model.ema_halflife, batch_size=t.batch_size
    )
    ema_update(state.averages, state.values, decay)
    return record


def in_precision(config: ConfigDict, device: torch.device) -> torch.autocast:
    """The autocast of training.precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.training.precision == "bfloat16")


def loss_of(objective: nn.Module, b: Batch, config: ConfigDict) -> tuple[Tensor, Tensor]:
    """The objective's loss and measure of each example, the loss with the importance weight of its time."""
    loss, measured = objective(b.x0, b.t, b.z, b.v, b.condition)
    return loss * like(b.importance, loss) if importance_weighted(config) else loss, measured


def update(state: State, limit: float) -> Tensor:
    """One step of the optimizer with the gradient scaled down to norm `limit` where it exceeds it; return the norm.

    A fused optimizer divides by its `grad_scale`, which mixed precision made for it, as it reads the gradients: the
    clipping costs no pass over memory of its own.
    """
    optimizer = state.optimizer
    if not optimizer.param_groups[0]["fused"]:
        norm = torch.nn.utils.clip_grad_norm_(state.parameters, limit)
    else:
        norm = torch.nn.utils.get_total_norm([p.grad for p in state.parameters if p.grad is not None])
        optimizer.grad_scale = (norm / limit).clamp_min(1.0)  # type: ignore[attr-defined]
    optimizer.step()
    return norm


def check_finite(records: list[Record], sde: SDE) -> None:
    """Raise FloatingPointError for the first step whose loss or gradient is not finite, with what may explain it."""
    for r in records:
        loss = r.loss.cpu()
        bad = ~torch.isfinite(loss)
        if bool(bad.any()) or not bool(torch.isfinite(r.grad_norm)):
            t = r.t[bad] if bool(bad.any()) else r.t
            sigma = sde.sigma(t.double())
            raise FloatingPointError(
                f"the loss is not finite at step {r.step}: {int(bad.sum())} of {len(bad)} examples, gradient norm "
                f"{float(r.grad_norm):.3g}, learning rate {r.learning_rate:.3g}, noise levels t = {t.min():.3g} to "
                f"{t.max():.3g} (sigma {sigma.min():.3g} to {sigma.max():.3g}); the last checkpoint is intact: lower "
                "optim.lr, raise optim.warmup, lower optim.grad_clip or set training.precision=float32, and run again"
            )


def of_all(records: list[Record], processes: Processes) -> list[Record]:
    """The records of whole batches, in all processes, of those that each process has of its parts.

    So that the log tells of the whole batch, and all stop at a loss that is not finite in one of them.
    """
    if processes.world == 1 or not records:
        return records

    def joined(parts: list[Tensor]) -> Tensor:
        """(records, batch, ...)."""
        each = processes.gather(torch.stack(parts)).unflatten(0, (processes.world, len(parts)))
        return each.transpose(0, 1).flatten(1, 2)

    measures, losses_, t = (joined(list(parts)) for parts in zip(*[(r.measure, r.loss, r.t) for r in records]))
    return [r._replace(measure=measures[i], loss=losses_[i], t=t[i]) for i, r in enumerate(records)]


def noise_bins(sde: SDE, count: int = 5) -> tuple[Tensor, list[str]]:
    """Edges in log SNR, even from t_min (1e-5 at least) to 1, and the range of sigma/alpha of each bin as its name."""
    ends = sde.log_snr(torch.tensor([max(sde.t_min, 1e-5), 1.0], dtype=torch.float64))
    if not bool(torch.isfinite(ends).all()):  # pragma: no cover
        raise ValueError(f"{sde} has no finite log SNR between {sde.t_min} and 1")
    edges = torch.linspace(ends[0].item(), ends[1].item(), count + 1, dtype=torch.float64)
    levels = torch.exp(-edges / 2).tolist()
    return edges, [f"sigma {a:.2g} to {b:.2g}" for a, b in pairwise(levels)]


def by_noise_level(sde: SDE, t: Tensor, error: Tensor) -> dict[str, float]:
    """Mean of an error, or of another measure, in each bin of `noise_bins` that has examples."""
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


@torch.no_grad()
def evaluate_loss(
    state: State,
    config: ConfigDict,
    split: Split,
    codec: Codec,
    text: Text | None = None,
    processes: Processes | None = None,
) -> dict[str, float]:
    """Loss of the averaged weights on a batch of held-out data, with the same times and noise at every call.

    As in training each of the `processes` computes its part of the batch, in training.accumulate parts and in
    training.precision; all have the whole batch's numbers, to the rounding of sums.
    """
    sde, part = sde_of(state.ema, config), slice(None) if processes is None else part_of(config, processes)
    whole = draw(config, split, codec, sde, 0, part, flip=False, held_out=True, text=text)
    objective = build_objective(state.ema, config, codec)
    with in_precision(config, whole.x0.device):
        found = [loss_of(objective, b, config) for b in whole.parts(config.training.accumulate)]
    loss, measured = (torch.cat(each).double() for each in zip(*found, strict=True))
    if processes is not None:
        loss, measured = processes.gather(loss), processes.gather(measured)
    if is_autoencoder(config):
        return {"eval_loss": float(loss.mean()), **parts_of(measured, "eval_")}
    return {"eval_loss": float(loss.mean()), f"eval_{measure(config)}": float(measured.mean())}


def part_of(config: ConfigDict, processes: Processes) -> slice:
    """What this process takes of each batch."""
    share = config.training.batch_size // processes.world
    return slice(processes.rank * share, (processes.rank + 1) * share)


def parts_of(measured: Tensor, prefix: str = "") -> dict[str, float]:
    """Means of an autoencoder's PARTS, (B, 3)."""
    return {prefix + name: float(value) for name, value in zip(PARTS, measured.double().mean(0), strict=True)}


def sde_of(model: Trainable | ScoreModel, config: ConfigDict) -> SDE:
    """Whose times the loop draws: the model's, which may learn it; an autoencoder does not look at them."""
    return build_sde(config) if isinstance(model, ConvolutionalAutoencoder) else model.sde


def train(
    config: ConfigDict,
    workdir: Path,
    data: Data,
    codec: Codec,
    processes: Processes,
    stop: Callable[[], bool] = lambda: False,
    text: Text | None = None,
) -> Iterator[Metrics]:
    """Train, or go on from the workdir's newest checkpoint, to step training.n_iters; yield what there is to report.

    `text` is of the data's captions, for a model that takes them. A new run begins from the weights of training.origin,
    if that is set. The first that is yielded are notes of where it begins: what can be refused has been refused then,
    and nothing was written yet. Of several processes the main one reads the checkpoint, and the others get all from it.
    Writes checkpoints every snapshot_freq steps, at the end and where `stop()` turns true. Raises FloatingPointError
    where the loss is not finite, and leaves the last checkpoint as it was.
    """
    t = config.training
    if t.batch_size % (processes.world * t.accumulate):
        raise ValueError(
            f"training.batch_size={t.batch_size} cannot be split over {processes.world} processes with "
            f"training.accumulate={t.accumulate}; make it a multiple of {processes.world * t.accumulate}"
        )
    state = make_state(config, data.shape, processes.device)
    state.model.train()
    card = _card(config, data, codec)
    _check_data(data, card, processes)
    saved, notes = processes.agreed(lambda: _begin(config, workdir, state, card))
    _receive(state, saved, processes)
    part = part_of(config, processes)
    if t.compile:
        getattr(state.model, "network", state.model).compile()
    objective, sde = build_objective(state.model, config, codec), sde_of(state.model, config)
    if processes.world > 1:
        gpu = [processes.device.index] if processes.device.type == "cuda" else None
        objective = DistributedDataParallel(objective, device_ids=gpu)
    split, held_out = data.train.to(processes.device), data.test.to(processes.device)
    text = None if text is None else text.to(processes.device)
    yield Metrics(state.step, notes=notes)  # all that could be refused has been by now
    records: list[Record] = []
    since, clock = state.step, time.perf_counter()

    def report() -> Metrics:
        nonlocal since, clock
        whole = of_all(records, processes)
        check_finite(whole, sde)
        seconds = max(time.perf_counter() - clock, 1e-9)
        scalars = {
            "training_loss": float(torch.cat([r.loss for r in whole]).mean()),
            "grad_norm": float(torch.stack([r.grad_norm for r in whole]).mean()),
            "learning_rate": whole[-1].learning_rate,
            "images_per_second": (state.step - since) * t.batch_size / seconds,
        }
        measured = torch.cat([r.measure for r in whole]).cpu()
        if is_autoencoder(config):
            scalars |= parts_of(measured)
        else:
            levels = by_noise_level(sde, torch.cat([r.t for r in whole]), measured)
            scalars |= {f"{measure(config)}/{name}": value for name, value in levels.items()}
        records.clear()
        since, clock = state.step, time.perf_counter()
        return Metrics(state.step, scalars)

    def snapshot() -> Path:
        check_finite(of_all(records, processes), sde)
        path = checkpoint.checkpoint_path(workdir, state.step)
        gone = made and not path.parent.is_dir()
        if processes.main:
            now = replace(card, config=configs.to_json(config), step=state.step)
            checkpoint.save(path, now, state.model, state.ema, state.optimizer, state.law)
            checkpoint.prune(path, t.keep_last, t.keep_every * t.snapshot_freq)
        if processes.any(gone):
            raise FileNotFoundError(
                f"{workdir} was deleted during the run: the checkpoint of step {state.step} is there again, as {path}, "
                "and the same command goes on from it"
            )
        return path

    made = (workdir / "checkpoints").is_dir()
    while state.step < t.n_iters:
        if processes.any(stop()):
            if saved != state.step:
                yield Metrics(state.step, checkpoint=snapshot())
            return
        seed_dropout(config.seed, state.step, processes)
        flip = config.data.random_flip and split.std is None  # codes are there of both
        b = draw(config, split, codec, sde, state.step, part, flip=flip, law=state.law, text=text)
        records.append(train_step(state, objective, b, config))
        if state.law is not None:  # the next step's times depend on these losses: this law alone waits for the device
            state.law.update(processes.gather(b.t), processes.gather(records[-1].measure))
        yield Metrics(state.step)
        last = state.step == t.n_iters
        if state.step % t.log_freq == 0 or last:
            yield report()
        if state.step % t.eval_freq == 0 or last:
            before = time.perf_counter()
            yield Metrics(state.step, evaluate_loss(state, config, held_out, codec, text, processes))
            clock += time.perf_counter() - before
        if state.step % t.snapshot_freq == 0 or last:
            before = time.perf_counter()
            saved = state.step
            yield Metrics(state.step, checkpoint=snapshot())
            clock += time.perf_counter() - before


def _card(config: ConfigDict, data: Data, codec: Codec) -> checkpoint.Card:
    """What the run's checkpoints say of themselves, at step 0."""
    codes = codec.statistics.to_json() if isinstance(codec, AutoencoderCodec) else ""
    about = checkpoint.DataCard.of(data, codec).to_json()
    return checkpoint.Card(configs.to_json(config), data.shape, 0, codes, about)


def _check_data(data: Data, card: checkpoint.Card, processes: Processes) -> None:
    """Raise ValueError where another process has read other data, such as those of another node's disk."""
    about = {"shape": card.shape, **json.loads(card.data)}
    if isinstance(data.train.x, Stream):
        del about["digest"]  # of files' times, which may be others for each copy
    own = json.dumps(about, sort_keys=True)
    found = processes.texts(f"{socket.gethostname()} {own}")
    hosts, texts = zip(*(text.split(" ", 1) for text in found))
    other = next((rank for rank, text in enumerate(texts) if text != texts[0]), None)
    if other is not None:
        raise ValueError(
            f"process {other} on {hosts[other]} has read other data than process 0 on {hosts[0]} ({texts[other]}, not "
            f"{texts[0]}): give every host the same files, or one shared folder"
        )


def _begin(config: ConfigDict, workdir: Path, state: State, card: checkpoint.Card) -> tuple[int, list[str]]:
    """Bring a fresh state to the workdir's newest checkpoint, or else to the weights of training.origin if that is set.

    Returns the checkpoint's step, -1 where there is none, and notes for the log.
    """
    remove_leftovers(workdir / "checkpoints")
    found, notes = checkpoint.newest(workdir)
    check_origin(config, workdir, found)
    if found is not None:
        theirs = checkpoint.restore(found, state.model, state.ema, state.optimizer, state.law)
        state.step = theirs.step
        return theirs.step, [*notes, f"going on from step {theirs.step} of {found}", *_changes(theirs, card)]
    if not config.training.origin:
        return -1, [*notes, "a new run"]
    notes += take_weights(config, state.model, card.shape)
    state.ema.load_state_dict(state.model.state_dict())
    return -1, notes


def _changes(was: checkpoint.Card, now: checkpoint.Card) -> list[str]:
    """In what a run that goes on differs from its checkpoint, as warnings."""
    try:
        keys = configs.differences(*(configs.from_text(card.config, "its config") for card in (was, now)))
    except ValueError as error:  # another version has written it
        keys = [str(error)]
    found = [f"warning: the config differs from that of this workdir's earlier run: {line}" for line in keys]
    old, new = ({"shape": list(card.shape), **json.loads(card.data or "{}")} for card in (was, now))
    others = [f"{name}: {old[name]!r} -> {new[name]!r}" for name in sorted(old.keys() & new.keys())]
    lines = [line for line, name in zip(others, sorted(old.keys() & new.keys())) if old[name] != new[name]]
    return found + [f"warning: the data differ from those of this workdir's earlier run: {line}" for line in lines]


def _receive(state: State, saved: int, processes: Processes) -> None:
    """Bring the state of every process to that of the main one, bit for bit."""
    if processes.world == 1:
        return
    parts = (state.model, state.ema, state.optimizer, state.law)
    found = processes.copies(lambda: checkpoint.tensors_of(*parts))
    if not processes.main:
        state.step = max(saved, 0)
        checkpoint.put(found, *parts)
