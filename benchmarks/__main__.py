"""``python -m benchmarks --config configs/NAME.py [--peer PATH] [--config.section.key=value ...]``"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from ml_collections import ConfigDict
from threadpoolctl import threadpool_limits

from score_sde import config as configs
from score_sde.data.toys import TOYS
from score_sde.machine import parallel

from . import peer as peers
from .likelihood import likelihood, trained_likelihood
from .sampling import SHAPES, sampling
from .timing import Clock, Table, machine
from .training import training

PARTS = ("training", "sampling", "likelihood")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m benchmarks", description="Measure training, sampling and likelihood.")
    p.add_argument("--config", required=True, help="a file in configs/; --config.section.key=value sets a key of it")
    p.add_argument("--peer", type=Path, help="a clone of score_sde_pytorch, to be measured in the same run")
    p.add_argument("--model", type=Path, help="a workdir trained with that config: the likelihood is then this model's")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    p.add_argument("--batch", type=int, help="images at a time in training and likelihood; default training.batch_size")
    p.add_argument("--threads", type=int, default=1, help="threads of the CPU (1)")
    p.add_argument("--seconds", type=float, default=5.0, help="each comparison goes on for as long, and for 5 turns")
    return p


def shape_of(config: ConfigDict) -> tuple[int, ...]:
    """Shape of an example; the data themselves are not needed."""
    d = config.data
    if d.dataset in TOYS:
        return tuple(TOYS[d.dataset](1, 0).shape[1:])
    if not (d.image_size and d.num_channels):
        raise ValueError("data.image_size and data.num_channels must be set here, where no data are read")
    return d.num_channels, d.image_size, d.image_size


def run(arguments: list[str]) -> list[Table]:
    """Measure and print what the command line asks for."""
    rest, overrides = configs.split_arguments(arguments)
    options = parser().parse_args(rest)
    if options.batch:
        overrides["training.batch_size"] = str(options.batch)
    config = configs.load(options.config, overrides)
    device = parallel.start(config.device).device
    clock = Clock(device, options.threads, options.seconds)
    peer = peers.load(options.peer) if options.peer else None
    torch.set_num_threads(options.threads)

    print(f"{options.config} {' '.join(f'{k}={v}' for k, v in overrides.items())}".strip())
    print(machine(device))
    kind = "CPU time of the process" if clock.processor_time else "wall time"
    print(f"{options.threads} thread(s), {kind}; medians of turns, ratios within a turn with quartiles")
    if peer is not None:
        print(f"peer: score_sde_pytorch, {peer.version}; {peers.STUBS}")
    shape = shape_of(config)
    tables = []
    with threadpool_limits(options.threads):
        for part in options.parts:
            if part == "training":
                works = [partial(training, config, shape)]
            elif part == "sampling":
                works = [partial(sampling, config, shape=size) for size in SHAPES]
            elif options.model:
                works = [partial(trained_likelihood, config, options.model)]
            else:
                works = [partial(likelihood, config, shape)]
            for work in works:
                tables.append(work(clock=clock, peer=peer))
                print(f"\n{tables[-1]}", flush=True)
    return tables


if __name__ == "__main__":
    try:
        run(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
