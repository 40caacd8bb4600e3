"""One step of training, which tests and other loops can call: a batch, the update by it, and the held-out loss.

Everything random in step n (examples, flips, times, noise, dropout) is drawn from (seed, n) for the whole batch, and
each process takes its part. So a resumed run repeats an uninterrupted one bit for bit on a CPU, and several processes
compute what one would.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..config.kinds import kind_of
from ..config.objective import COUPLINGS, PROJECTED, importance_weighted, learned_law, time_law
from ..data.augmentation import movements
from ..data.captions import Text
from ..data.codecs import Codec
from ..data.sets import Split, batch_indices, mirrored
from ..losses import time_laws
from ..losses.couplings import independent
from ..losses.time_laws import TimeLaw
from ..machine.devices import sent
from ..machine.parallel import ALONE, Processes
from ..noise import StepStream, generator
from ..sdes.linear import SDE, like
from .averages import WIDTHS, ema_decay, ema_update, power_decay
from .checkpoint import State
from .conditions import Conditions, left_out, low_resolution, of_data


class Batch(NamedTuple):
    """One process's part of a batch: data, times and importance weights (float64, CPU), noise, and projections."""

    x0: Tensor
    t: Tensor
    importance: Tensor
    z: Tensor
    v: Tensor  # (B, M, *shape), M = 0 where the objective takes none
    condition: dict[str, Tensor]  # (B, ...) each: the model's conditions

    def examples(self, rows: slice) -> Batch:
        """Those of some rows."""
        x0, t, importance, z, v = (value[rows] for value in self[:5])
        return Batch(x0, t, importance, z, v, {name: value[rows] for name, value in self.condition.items()})

    def parts(self, count: int) -> list[Batch]:
        """The batch in `count` parts."""
        x0, t, importance, z, v = (value.chunk(count) for value in self[:5])
        names, values = self.condition.keys(), zip(*(value.chunk(count) for value in self.condition.values()))
        conditions = [dict(zip(names, each)) for each in values] or [{} for _ in x0]
        return list(map(Batch, x0, t, importance, z, v, conditions))


class Record(NamedTuple):
    """What one step leaves for the log; nobody reads it before, so that no step waits for the device."""

    step: int
    learning_rate: float
    grad_norm: Tensor
    measure: Tensor  # of each example: mean squared error of the noise, unweighted, or another measure of the objective
    loss: Tensor
    t: Tensor


def make_state(config: ConfigDict, shape: tuple[int, ...], device: torch.device) -> State:
    """A fresh state for examples of `shape`; its weights depend on config.seed alone."""
    o, t = config.optim, config.training
    model = kind_of(config).build(config, shape).to(device)
    if t.channels_last and len(shape) == 3:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    options = {"lr": o.lr, "betas": (o.beta1, o.beta2), "eps": o.eps, "weight_decay": o.weight_decay}
    fused = True if device.type in ("cpu", "cuda") else None
    optimizer = getattr(torch.optim, o.optimizer)(parameters, **options, fused=fused)  # Adam or AdamW
    widths = WIDTHS if config.model.ema_power else ()
    powers = {width: [p.detach().clone() for p in model.parameters()] for width in widths}
    return State(model, ema, optimizer, law=learned_law(config), powers=powers)


def learning_rate(config: ConfigDict, step: int) -> float:
    """It rises linearly from 0 over optim.warmup steps, and falls to 0 over the run's last fraction optim.decay."""
    o, n = config.optim, config.training.n_iters
    rise = min(step / o.warmup, 1.0) if o.warmup else 1.0
    fall = min((n - step) / (o.decay * n), 1.0) if o.decay else 1.0
    return o.lr * rise * max(fall, 0.0)


@dataclass(frozen=True)
class Batches:
    """Draws the batches of a run, from any split and for any step.

    Args:
        codec: between the split's examples and the model's.
        sde: whose times are drawn.
        part: of each batch, for this process.
        text: the embedded captions, for a model of captions.
    """

    config: ConfigDict
    codec: Codec
    sde: SDE
    part: slice = field(default_factory=lambda: slice(None))
    text: Text | None = None

    def draw(
        self, split: Split, step: int, *, flip: bool = False, held_out: bool = False, law: TimeLaw | None = None
    ) -> Batch:
        """This process's part of batch `step`: data, times and noise, all from (seed, step), and from `law`.

        A coupling of data and noise is one of the whole batch, which each process then reads.
        """
        couple = COUPLINGS[self.config.training.coupling]
        if couple is not independent and self.part != slice(None):
            whole = replace(self, part=slice(None))
            return whole.draw(split, step, flip=flip, held_out=held_out, law=law).examples(self.part)
        config, part, n, seed = self.config, self.part, self.config.training.batch_size, self.config.seed
        index = batch_indices(len(split), n, step, seed)[part]
        k, _ = split[index]
        if flip:
            k = mirrored(k, step, n, seed, part)
        apart = StepStream.HELD_OUT if held_out else 0
        times = self._times(step, held_out, law)
        noise = generator(seed, step, StepStream.NOISE + apart, k.device)
        u = None
        if config.data.uniform_dequantization:
            u = torch.rand((n, *k.shape[1:]), generator=noise, device=k.device)[part]
        z = self._normal(kind_of(config).noise_shape(config, split.shape), noise)
        m = config.training.projections if config.training.objective in PROJECTED else 0
        v = self._normal((m, *k.shape[1:]), noise)
        x0 = self.codec.encode(k, u).to(torch.float32)
        if split.std is not None:  # examples are means of codes, and each step draws codes around them
            own = self._normal(x0.shape[1:], generator(seed, step, StepStream.CODES + apart, k.device))
            x0 = x0 + split.std[sent(index, k.device)] * own
        condition = self._left_out(of_data(config, split, index, self.text), step, held_out)
        if config.training.geometric > 0 and not held_out:
            source = generator(seed, step, StepStream.MOVEMENT)
            movement = movements(n, config.training.geometric, source).part(part, x0.device)
            x0, condition = movement.of(x0), {**condition, "movement": movement.told}
        z = couple(x0, z, generator(seed, step, StepStream.COUPLING + apart))
        if config.training.channels_last and x0.ndim == 4:
            x0, z = (each.contiguous(memory_format=torch.channels_last) for each in (x0, z))
        if config.model.super_resolution:
            condition |= self._smaller(k, step, apart)
        return Batch(x0, times.t[part], times.weight[part], z, v, condition)

    def _times(self, step: int, held_out: bool, law: TimeLaw | None) -> time_laws.Times:
        """The times of the whole batch."""
        t, law = self.config.training, law or time_law(self.config)
        numbers = time_laws.low_discrepancy if t.low_discrepancy else time_laws.uniform_numbers
        source = generator(self.config.seed, step, StepStream.TIMES + (StepStream.HELD_OUT if held_out else 0))
        drawn = numbers(t.batch_size, source)
        if t.soft_truncation > 0 and not held_out:  # a held-out loss covers all times
            law = time_laws.soft_truncation(law, t.soft_truncation, time_laws.uniform_numbers(1, source)[0])
        return law(self.sde, drawn)

    def _left_out(self, condition: Conditions, step: int, held_out: bool) -> Conditions:
        """The conditions; training leaves them out for some of the examples."""
        if held_out or not condition or not kind_of(self.config).left_out:
            return condition
        t = self.config.training
        u = time_laws.uniform_numbers(t.batch_size, generator(self.config.seed, step, StepStream.CONDITION))[self.part]
        return left_out(condition, u < t.condition_dropout)

    def _smaller(self, k: Tensor, step: int, apart: int) -> Conditions:
        """The images k at a lower resolution, noised as the config says."""
        config, t = self.config, self.config.training
        numbers = generator(config.seed, step, StepStream.AUGMENTATION + apart)
        level = t.augmentation * time_laws.uniform_numbers(t.batch_size, numbers)[self.part]
        source = generator(config.seed, step, StepStream.AUGMENTATION_NOISE + apart, k.device)
        noise = lambda x: self._normal(x.shape[1:], source, x.dtype)
        return low_resolution(k, config.model.super_resolution, self.codec, self.sde, level, noise)

    def _normal(self, shape: Sequence[int], source: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers, of `shape` for each example of this process's part of a batch."""
        whole = (self.config.training.batch_size, *shape)
        return torch.randn(whole, generator=source, device=source.device, dtype=dtype)[self.part]


def seed_dropout(seed: int, step: int, processes: Processes) -> None:
    """Seed torch's default generator, the only one that dropout uses, for one step of one process."""
    state = int(np.random.SeedSequence([seed, step, StepStream.DROPOUT, processes.rank]).generate_state(1)[0])
    torch.default_generator.manual_seed(state)
    if processes.device.type == "cuda":
        torch.cuda.manual_seed(state)


def train_step(state: State, objective: nn.Module, b: Batch, config: ConfigDict) -> Record:
    """One update of the parameters and their averages by a batch; nothing is read back from the device."""
    t, o, m = config.training, config.optim, config.model
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
    decay = ema_decay(state.step, rate=m.ema_rate, halflife=m.ema_halflife, batch_size=t.batch_size)
    ema_update(state.averages, state.values, decay)
    for width, averages in state.powers.items():
        ema_update(averages, state.values, power_decay(state.step, width))
    return record


def in_precision(config: ConfigDict, device: torch.device) -> torch.autocast:
    """The autocast of training.precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.training.precision == "bfloat16")


def loss_of(objective: nn.Module, b: Batch, config: ConfigDict) -> tuple[Tensor, Tensor]:
    """The objective's loss and measure of each example; the loss carries the importance weight of its time."""
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


@torch.no_grad()
def evaluate_loss(
    state: State, config: ConfigDict, split: Split, codec: Codec, text: Text | None = None,
    processes: Processes = ALONE,
) -> dict[str, float]:
    """Loss of the averaged weights on a batch of held-out data, with the same times and noise at every call.

    As in training each of the `processes` computes its part of the batch, in training.accumulate parts and in
    training.precision; all return the whole batch's numbers, up to the rounding of sums.
    """
    kind = kind_of(config)
    batches = Batches(config, codec, kind.sde(state.ema, config), part_of(config, processes), text)
    batch, objective = batches.draw(split, 0, held_out=True), kind.objective(state.ema, config, codec)
    with in_precision(config, batch.x0.device):
        results = [loss_of(objective, b, config) for b in batch.parts(config.training.accumulate)]
    loss, measured = (processes.gather(torch.cat(each).double()) for each in zip(*results, strict=True))
    return {"eval_loss": float(loss.mean()), **kind.means(measured, "eval_")}


def part_of(config: ConfigDict, processes: Processes) -> slice:
    """The part of each batch that is for this process."""
    share = config.training.batch_size // processes.world
    return slice(processes.rank * share, (processes.rank + 1) * share)
