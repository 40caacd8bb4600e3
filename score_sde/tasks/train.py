"""The mode train: the training loop, its checkpoints, and how a run begins or resumes."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from ml_collections import ConfigDict
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .. import config as configs
from ..config.build import resolve_conditions
from ..config.kinds import kind_of
from ..config.rules import suspects
from ..data.captions import Text
from ..data.codecs import AutoencoderCodec, Codec, Statistics
from ..data.files import Stream
from ..data.sets import Data
from ..machine.lock import held
from ..machine.log import keep_log, log
from ..machine.parallel import Processes
from ..machine.progress import Progress, Stop
from ..machine.whole_files import remove_leftovers, whole
from ..sdes.linear import SDE
from . import checkpoint, failures
from .checkpoint import State, Trained
from .codes import Source, check_codes, codes_of, opened
from .inputs import read_for_training
from .job import source_of
from .origin import check_fits, check_origin, take_weights
from .show import Metrics, Show, by_noise_level, warn
from .step import Batches, Record, evaluate_loss, make_state, part_of, seed_dropout, train_step
from .texts import embedded_captions


def command(options: argparse.Namespace, config: ConfigDict, workdir: Path, processes: Processes) -> int:
    """--mode train; returns the exit code."""
    with ExitStack() as stack:
        reserve(stack, options, config, workdir, processes)
        data, codec = read_for_training(config, processes)
        resolve_conditions(config, data.shape[0])
        autoencoder = opened(config.data.autoencoder, processes.device) if config.data.autoencoder else None
        source = source_of(config, autoencoder, data)
        if source is not None or config.model.text_encoder:  # refuse before all images or captions are encoded
            processes.agreed(lambda: check_fits(config, workdir, data.shape if source is None else source.shape))
        if source is not None:
            data, codec = _codes(source, data, config, workdir, processes)
        text = embedded_captions(config, data, workdir, processes)
        return run_training(config, workdir, data, codec, processes, text)


def reserve(
    stack: ExitStack, options: argparse.Namespace, config: ConfigDict, workdir: Path, processes: Processes
) -> None:
    """Lock the workdir for this run, and check the checkpoint that it begins from."""

    def work() -> None:
        stack.enter_context(held(workdir, "training"))
        if options.checkpoint:
            config.training.origin, config.training.origin_sha256 = options.checkpoint, ""
            check_origin(config, workdir, checkpoint.newest(workdir)[0])

    processes.agreed(work)


def run_training(
    config: ConfigDict, workdir: Path, data: Data, codec: Codec, processes: Processes, text: Text | None = None
) -> int:
    """Run the loop of `train` and show it as a bar, a log, TensorBoard scalars and grids; returns the exit code.

    The loop yields for the first time when the command is accepted: before that, nothing is written into the workdir
    that another command reads.
    """
    n, step, show = config.training.n_iters, 0, None
    if processes.main:
        warn(config, data, codec)
    with Stop() as stop, Progress("training", n, shown=processes.main) as bar:
        try:
            for m in train(config, workdir, data, codec, processes, stop, text):
                step = m.step
                if show is None and processes.main:
                    _accept(config, workdir)
                    show = Show(config, workdir, data, codec, processes.device, bar, text)
                if show is not None:
                    show(m)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}{suspects(config)}") from None
    if show is not None:
        show.close()
        if step < n:
            log.info("stopped at step %d of %d; the same command goes on from there", step, n)
        else:
            log.info("training is complete: %d steps in %s", step, workdir)
    return 0 if step >= n else 130


def _accept(config: ConfigDict, workdir: Path) -> None:
    """Make the folders of an accepted run, and write its config, whole or not at all."""
    pictures = config.training.snapshot_sampling and kind_of(config).pictures
    for name in ("checkpoints", "tensorboard", *(("samples",) if pictures else ())):
        failures.writable(workdir / name)
    keep_log()
    with whole(workdir / "config.json") as file:
        file.write((configs.to_json(config) + "\n").encode())


def _codes(source: Source, data: Data, config: ConfigDict, workdir: Path, processes: Processes) -> tuple[Data, Codec]:
    """The data as codes, read from the workdir's file of codes or encoded and written there, and their codec.

    Raises ValueError if the workdir's model was trained on other codes.
    """

    def check(statistics: Statistics | None = None) -> None:
        failures.writable(workdir / "codes")
        begun, _ = checkpoint.newest(workdir)
        if begun is not None:
            check_codes(begun, source.sha256, source.where, statistics)

    processes.agreed(check)
    coded, statistics = codes_of(source, data, workdir / "codes", config.data.random_flip, processes)
    processes.agreed(lambda: check(statistics))
    return coded, source.codec(statistics)


def check_finite(records: list[Record], sde: SDE) -> None:
    """Raise FloatingPointError for the first step whose loss or gradient is not finite, with what may explain it."""
    for r in records:
        bad = ~torch.isfinite(r.loss.cpu())
        count = int(bad.sum())
        if count or not bool(torch.isfinite(r.grad_norm)):
            t = r.t[bad] if count else r.t
            sigma = sde.sigma(t.double())
            raise FloatingPointError(
                f"the loss is not finite at step {r.step}: {count} of {len(bad)} examples, gradient norm "
                f"{float(r.grad_norm):.3g}, learning rate {r.learning_rate:.3g}, noise levels t = {t.min():.3g} to "
                f"{t.max():.3g} (sigma {sigma.min():.3g} to {sigma.max():.3g}); the last checkpoint is intact: lower "
                "optim.lr, raise optim.warmup, lower optim.grad_clip or set training.precision=float32, and run again"
            )


def of_all(records: list[Record], processes: Processes) -> list[Record]:
    """The records of whole batches, joined from those that each process has of its parts, in all processes.

    So the log shows the whole batch, and all processes stop when the loss is not finite in one of them.
    """
    if processes.world == 1 or not records:
        return records

    def joined(parts: list[Tensor]) -> Tensor:
        """(records, batch, ...)."""
        each = processes.gather(torch.stack(parts)).unflatten(0, (processes.world, len(parts)))
        return each.transpose(0, 1).flatten(1, 2)

    measures, losses_, t = (joined(list(parts)) for parts in zip(*[(r.measure, r.loss, r.t) for r in records]))
    return [r._replace(measure=measures[i], loss=losses_[i], t=t[i]) for i, r in enumerate(records)]


def train(
    config: ConfigDict, workdir: Path, data: Data, codec: Codec, processes: Processes,
    stop: Callable[[], bool] = lambda: False, text: Text | None = None,
) -> Iterator[Metrics]:
    """Train, or resume from the workdir's newest checkpoint, to step training.n_iters; yield what there is to report.

    `text` are the embedded captions, for a model of captions. A new run begins from the weights of training.origin, if
    that is set. The first Metrics hold notes about where the run begins: every refusal has been raised by then, and
    nothing was written yet. Of several processes the main one reads the checkpoint, and sends it to the others.
    Writes checkpoints every snapshot_freq steps, at the end and when `stop()` turns true. Raises FloatingPointError
    if the loss is not finite, and leaves the last checkpoint as it was.
    """
    t = config.training
    run = _Run(config, workdir, data, codec, processes, text)
    yield Metrics(run.state.step, notes=run.notes)
    run.begin()
    while run.state.step < t.n_iters:
        if processes.any(stop()):
            if run.saved != run.state.step:
                yield run.snapshot()
            return
        run.step()
        step = run.state.step
        yield Metrics(step)
        last = step == t.n_iters
        if step % t.log_freq == 0 or last:
            yield run.report()
        for frequency, work in ((t.eval_freq, run.evaluation), (t.snapshot_freq, run.snapshot)):
            if step % frequency == 0 or last:
                before = time.perf_counter()
                yield work()
                run.clock += time.perf_counter() - before  # it is no time of the steps


class _Run:
    """A run of `train`: its state, its batches, and the records of steps that are not reported yet."""

    def __init__(
        self, config: ConfigDict, workdir: Path, data: Data, codec: Codec, processes: Processes, text: Text | None
    ) -> None:
        t = config.training
        if t.batch_size % (processes.world * t.accumulate):
            raise ValueError(f"training.batch_size={t.batch_size} cannot be split over {processes.world} processes "
                             f"with training.accumulate={t.accumulate}; make it a multiple of "
                             f"{processes.world * t.accumulate}")
        self.config, self.workdir, self.processes = config, workdir, processes
        self.state = make_state(config, data.shape, processes.device)
        self.state.model.train()
        codes = codec.statistics.to_json() if isinstance(codec, AutoencoderCodec) else ""
        about_data = checkpoint.DataCard.of(data, codec).to_json()
        self.card = checkpoint.Card(configs.to_json(config), data.shape, 0, codes, about_data)
        _check_data(data, self.card, processes)
        self.saved, self.notes = processes.agreed(lambda: _begin(config, workdir, self.state, self.card))
        _receive(self.state, self.saved, processes)
        if t.compile:
            getattr(self.state.model, "network", self.state.model).compile()
        kind = kind_of(config)
        self.objective, sde = kind.objective(self.state.model, config, codec), kind.sde(self.state.model, config)
        if processes.world > 1:
            gpu = [processes.device.index] if processes.device.type == "cuda" else None
            self.objective = DistributedDataParallel(self.objective, device_ids=gpu)
        self.split, self.held_out = data.train.to(processes.device), data.test.to(processes.device)
        text = None if text is None else text.to(processes.device)
        self.batches = Batches(config, codec, sde, part_of(config, processes), text)

    def begin(self) -> None:
        """Start the clock: the command is accepted, and the main process has made the workdir."""
        self.records: list[Record] = []
        self.since, self.clock = self.state.step, time.perf_counter()
        self.made = (self.workdir / "checkpoints").is_dir()

    def step(self) -> None:
        state, config = self.state, self.config
        seed_dropout(config.seed, state.step, self.processes)
        flip = config.data.random_flip and self.split.std is None  # codes of mirrored images are stored
        b = self.batches.draw(self.split, state.step, flip=flip, law=state.law)
        self.records.append(train_step(state, self.objective, b, config))
        if state.law is not None:  # the next step's times depend on these losses: this law alone waits for the device
            state.law.update(self.processes.gather(b.t), self.processes.gather(self.records[-1].measure))

    def report(self) -> Metrics:
        """Losses and speed of the steps since the last report."""
        sde, step, kind = self.batches.sde, self.state.step, kind_of(self.config)
        records = of_all(self.records, self.processes)
        check_finite(records, sde)
        seconds = max(time.perf_counter() - self.clock, 1e-9)
        scalars = {
            "training_loss": float(torch.cat([r.loss for r in records]).mean()),
            "grad_norm": float(torch.stack([r.grad_norm for r in records]).mean()),
            "learning_rate": records[-1].learning_rate,
            "images_per_second": (step - self.since) * self.config.training.batch_size / seconds,
        }
        measured = torch.cat([r.measure for r in records]).cpu()
        if kind.noisy:
            levels = by_noise_level(sde, torch.cat([r.t for r in records]), measured)
            scalars |= {f"{kind.measures[0]}/{name}": value for name, value in levels.items()}
        else:
            scalars |= kind.means(measured)
        self.records.clear()
        self.since, self.clock = step, time.perf_counter()
        return Metrics(step, scalars)

    def evaluation(self) -> Metrics:
        """The loss on held-out data."""
        b = self.batches
        loss = evaluate_loss(self.state, self.config, self.held_out, b.codec, b.text, self.processes)
        return Metrics(self.state.step, loss)

    def snapshot(self) -> Metrics:
        """Write a checkpoint. Raises FileNotFoundError, after writing it, if the workdir was deleted during the run."""
        t, state, processes = self.config.training, self.state, self.processes
        check_finite(of_all(self.records, processes), self.batches.sde)
        path = checkpoint.checkpoint_path(self.workdir, state.step)
        gone = self.made and not path.parent.is_dir()
        if processes.main:
            now = replace(self.card, config=configs.to_json(self.config), step=state.step)
            checkpoint.save(path, now, state)
            checkpoint.prune(path, t.keep_last, t.keep_every * t.snapshot_freq)
        if processes.any(gone):
            raise FileNotFoundError(f"{self.workdir} was deleted during the run: the checkpoint of step {state.step} "
                                    f"is there again, as {path}, and the same command goes on from it")
        self.saved = state.step
        return Metrics(state.step, checkpoint=path)


def _check_data(data: Data, card: checkpoint.Card, processes: Processes) -> None:
    """Raise ValueError if another process has read other data, such as those of another node's disk."""
    description = {"shape": card.shape, **json.loads(card.data)}
    if isinstance(data.train.x, Stream):
        del description["digest"]  # it contains the files' times, which differ between copies
    remedy = "give every host the same files, or one shared folder"
    processes.check_same(json.dumps(description, sort_keys=True), "the processes have read different data", remedy)


def _begin(config: ConfigDict, workdir: Path, state: State, card: checkpoint.Card) -> tuple[int, list[str]]:
    """Restore a fresh state from the workdir's newest checkpoint, or else its weights from training.origin, if set.

    Returns the checkpoint's step, -1 without a checkpoint, and notes for the log.
    """
    remove_leftovers(workdir / "checkpoints")
    begun, notes = checkpoint.newest(workdir)
    check_origin(config, workdir, begun)
    if begun is not None:
        checkpoint.restore(begun.path, state)
        return state.step, [*notes, f"going on from step {state.step} of {begun.path}", *_changes(begun, card)]
    if not config.training.origin:
        return -1, [*notes, "a new run"]
    notes += take_weights(config, state.model, card.shape)
    state.ema.load_state_dict(state.model.state_dict())
    return -1, notes


def _changes(begun: Trained, now: checkpoint.Card) -> list[str]:
    """Warnings where the config or the data of a resumed run differ from its checkpoint's."""
    assert begun.card is not None
    config = configs.differences(begun.config, configs.from_text(now.config, "its config"))
    old, new = ({"shape": list(card.shape), **json.loads(card.data or "{}")} for card in (begun.card, now))
    keys = [key for key in sorted(old.keys() & new.keys()) if old[key] != new[key]]
    data = [f"{key}: {old[key]!r} -> {new[key]!r}" for key in keys]
    return [
        *(f"warning: the config differs from that of this workdir's earlier run: {line}" for line in config),
        *(f"warning: the data differ from those of this workdir's earlier run: {line}" for line in data),
    ]


def _receive(state: State, saved: int, processes: Processes) -> None:
    """Copy the main process's state to every other process, bit for bit."""
    if processes.world > 1:
        tensors = processes.copies(lambda: checkpoint.tensors_of(state))
        if not processes.main:
            state.step = max(saved, 0)
            checkpoint.put(tensors, state)
