"""The training step: the network's passes, what follows them, and the whole of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from score_sde.config.kinds import kind_of
from score_sde.data import Split
from score_sde.data.codecs import codec_of
from score_sde.tasks.averages import ema_decay, ema_update
from score_sde.tasks.step import Batches, make_state, train_step, update

from .peer import Peer, config_for, parameters
from .timing import Clock, Table, Times, milliseconds, ratio

Works = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Case:
    """One batch for the network alone, and the gradient that comes back to its output."""

    x: Tensor
    label: Tensor
    gradient: Tensor


def training(config: ConfigDict, shape: tuple[int, ...], clock: Clock, peer: Peer | None) -> Table:
    """Milliseconds of the step's parts, images/s and TFLOP/s of the whole; weights and data are random."""
    g = torch.Generator().manual_seed(0)
    batch = config.training.batch_size
    x, back = (torch.randn(batch, *shape, generator=g).to(clock.device) for _ in range(2))
    case = Case(x, (1 + 998 * torch.rand(batch, generator=g)).to(clock.device), back)
    network, update, whole, count = _ours(config, shape, clock, case)
    parts: dict[str, Works] = {
        "network forward + backward": {"ours": network},
        "clip + optimizer + EMA": {"ours": update},
        "whole step": {"ours": whole},
    }
    flops = _flops(network)
    notes = [
        f"batch {batch} of {'x'.join(map(str, shape))}, {count / 1e6:.4g} million parameters, "
        f"{flops / batch / 1e9:.4g} GFLOP an image (forward and backward, a multiplication and an addition are 2), "
        f"training.precision={config.training.precision}, training.channels_last={config.training.channels_last}",
        "weights are moved off their initialisation: its zeros make gradients denormal numbers, slow on a CPU",
    ]
    if peer is not None:
        for works, work in zip(parts.values(), _theirs(peer, config, shape, clock, case)):
            works["peer"] = work
        notes.append("both sides' whole step draws times, noise and dropout; ours also draws the batch from uint8 data")
        if config.optim.optimizer != "Adam":
            notes.append(f"the peer has no {config.optim.optimizer}: its optimizer is Adam")
    taken = {part: clock.compare(works) for part, works in parts.items()}
    rows = [_row(part, times) for part, times in taken.items()]
    step = taken["whole step"]
    rows.append(_speed("images/s", "whole step", batch, step))
    rows.append(_speed("TFLOP/s", "whole step", flops / 1e12, step))
    return Table("Training step", ("", "ours", "peer", "peer/ours"), rows, notes)


@torch.no_grad()
def _wake(network: nn.Module) -> None:
    """Move all weights off their initialisation: behind layers that start at 0, gradients are denormal numbers."""
    g = torch.Generator().manual_seed(2)
    for p in network.parameters():
        p.add_(0.01 * torch.randn(p.shape, generator=g).to(p.device))


def _row(name: str, taken: dict[str, Times]) -> tuple[str, ...]:
    if "peer" not in taken:
        return name, milliseconds(taken["ours"]), "", ""
    return name, milliseconds(taken["ours"]), milliseconds(taken["peer"]), str(ratio(taken["peer"], taken["ours"]))


def _speed(unit: str, of: str, amount: float, taken: dict[str, Times]) -> tuple[str, ...]:
    ours, peer = (f"{amount / statistics.median(taken[s]):.3g}" if s in taken else "" for s in ("ours", "peer"))
    return f"{unit}, {of}", ours, peer, ""


def _flops(network: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        network()
    return counter.get_total_flops()


def _ours(
    config: ConfigDict, shape: tuple[int, ...], clock: Clock, case: Case
) -> tuple[Callable[[], object], Callable[[], object], Callable[[], object], int]:
    """(network, update, whole step) of `score_sde.tasks.train`, and the number of parameters."""
    t, o = config.training, config.optim
    state = make_state(config, shape, clock.device)
    state.model.train()
    net: Any = state.model.network
    _wake(net)
    if t.compile:
        net.compile()
    x = case.x.contiguous(memory_format=torch.channels_last) if t.channels_last and case.x.ndim == 4 else case.x

    def network() -> None:
        state.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(clock.device.type, torch.bfloat16, enabled=t.precision == "bfloat16"):
            y = net(x, case.label)
        y.backward(case.gradient.to(y.dtype))

    def optimize() -> None:
        update(state, o.grad_clip if o.grad_clip >= 0 else math.inf)
        decay = ema_decay(1, rate=config.model.ema_rate, halflife=config.model.ema_halflife, batch_size=t.batch_size)
        ema_update(state.averages, state.values, decay)

    g = torch.Generator().manual_seed(1)
    if len(shape) == 3:
        pixels = torch.randint(0, 256, (max(256, t.batch_size), *shape), dtype=torch.uint8, generator=g)
        split, codec = Split(pixels).to(clock.device), codec_of(256, config.data.centered)
    else:
        split, codec = Split(torch.randn(max(256, t.batch_size), *shape, generator=g)).to(clock.device), codec_of(None)
    objective, sde = kind_of(config).objective(state.model, config, None), kind_of(config).sde(state.model, config)

    def whole() -> None:
        b = Batches(config, codec, sde).draw(split, state.step, flip=config.data.random_flip)
        train_step(state, objective, b, config)

    return network, optimize, whole, parameters(net)


def _theirs(
    peer: Peer, config: ConfigDict, shape: tuple[int, ...], clock: Clock, case: Case
) -> tuple[Callable[[], object], ...]:
    """The same three of the peer: its network, its optimize_fn and EMA, its step_fn."""
    theirs = config_for(config, shape, clock.device)
    t = theirs.training
    net = peer.network(theirs, make_state(config, shape, torch.device("cpu")).model).train()
    _wake(net)
    optimizer = peer.losses.get_optimizer(theirs, net.parameters())
    ema = peer.ema.ExponentialMovingAverage(net.parameters(), decay=theirs.model.ema_rate)
    optimize = peer.losses.optimization_manager(theirs)

    def network() -> None:
        optimizer.zero_grad(set_to_none=True)
        net(case.x, case.label).backward(case.gradient)

    def update() -> None:
        optimize(optimizer, net.parameters(), step=theirs.optim.warmup)
        ema.update(net.parameters())

    step = peer.losses.get_step_fn(
        peer.sde(theirs),
        train=True,
        optimize_fn=optimize,
        reduce_mean=t.reduce_mean,
        continuous=t.continuous,
        likelihood_weighting=t.likelihood_weighting,
    )
    state = {"model": net, "optimizer": optimizer, "ema": ema, "step": 0}
    return network, update, lambda: step(state, case.x)
