"""``python -m studies.networks [--data cifar10 --path FOLDER] [--fill]``: networks at equal compute, small.

Every network is trained for as many operations as `--steps` steps of the first one take, by the same config otherwise,
and its bits/dim on held-out images are those of the probability flow. Differences from the first are paired by seed.
Operations are those of convolutions and linear layers; what attention multiplies beside them is not counted.
Learning rates were chosen on digits with another seed, the best of three for each kind of network, twice as large each
(``--only edm2 --seeds 100 --rate 0.08``); variants have the rate of their kind, and on CIFAR-10 it is the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from ml_collections import ConfigDict
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.pages import DOCS, cell, fill, table
from benchmarks.timing import machine
from score_sde import cli
from score_sde import config as configs
from score_sde.config.build import build_network
from score_sde.data import load_data

Changes = dict[str, str]
FORGOTTEN = {"optim.weight_decay": "0", "optim.optimizer": "Adam"}  # what a network of normalised weights has no use of
MODERN = {"rms": ("norm", "rms"), "swiglu": ("feed_forward", "swiglu"), "rotary": ("positions", "rotary")}
MODERN |= {"qk_norm": ("qk_norm", "true")}
PARTS: dict[str, Changes] = {part: {f"model.{key}": value} for part, (key, value) in MODERN.items()}
ALL = {key: value for part in PARTS.values() for key, value in part.items()}


class Study(NamedTuple):
    """A config, what all networks of a data set share, how long they train, and each network's changes."""

    config: str
    shared: Changes
    steps: int
    images: int  # held out, whose bits/dim are computed
    networks: dict[str, Changes]


def _edm2(rate: float) -> Changes:
    return {"model.name": "edm2", "model.label": "edm", "optim.lr": f"{rate:g}", **FORGOTTEN}


def _dit(rate: float, width: int, patch: int) -> Changes:
    sizes = {"model.hidden": f"{width}", "model.depth": "4", "model.num_heads": "4", "model.patch_size": f"{patch}"}
    return {"model.name": "dit", "optim.lr": f"{rate:g}", **sizes}


def _networks(dit: Changes) -> dict[str, Changes]:
    """The networks that all data sets have, the first first."""
    unet = {"optim.lr": "0.016"}
    return {
        "ncsnpp": unet, "ncsnpp, adaptive group norm": {**unet, "model.scale_shift": "true"}, "edm2": _edm2(0.08),
        "dit": dit, "dit, all four": {**dit, **ALL},
    }  # fmt: skip


SMALL = {"model.nf": "16", "model.ch_mult": "(1, 2, 2)", "model.ema_halflife": "1500", "optim.warmup": "20"}
DIT = _dit(0.008, 64, 2)
STUDIES = {
    "digits": Study(
        "vp_digits", {"training.batch_size": "64", "model.ema_halflife": "3000"}, 200, 300,
        _networks(DIT) | {f"dit, {part}": {**DIT, **changes} for part, changes in PARTS.items()},
    ),
    "cifar10": Study("vp_cifar_small", SMALL, 200, 50, _networks(_dit(0.008, 96, 4))),
}  # fmt: skip
QUIET = {"training.snapshot_sampling": "false", "training.eval_freq": "1000000", "training.snapshot_freq": "1000000"}
EVALUATED = {"eval.rtol": "1e-3", "eval.atol": "1e-3", "eval.batch_size": "50", "eval.check_images": "0"}


class Found(NamedTuple):
    """What one network has and needs, and the bits/dim of each of its seeds."""

    parameters: int
    cost: float  # of a step, relative to the first network's
    steps: int
    bits: list[float]


def size_of(config: ConfigDict, shape: tuple[int, ...]) -> tuple[int, int]:
    """The parameters of a network, and the floating-point operations of one example's training step."""
    network = build_network(config, shape)
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, *shape), torch.zeros(1)).sum().backward()
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops()


def bits(study: Study, changes: Changes, workdir: Path, data: Changes) -> float:
    """Train, unless that was done before, and evaluate: mean bits/dim of held-out images."""
    settings = {**study.shared, **data, **QUIET, **changes}
    words = ["--config", f"configs/{study.config}.py", "--workdir", str(workdir)]
    words += [f"--config.{key}={value}" for key, value in settings.items()]
    evaluated = [f"--config.{key}={value}" for key, value in EVALUATED.items()]
    evaluated.append(f"--config.eval.num_images={study.images}")
    for mode, more in (("train", []), ("likelihood", evaluated)):
        if cli.run([*words, "--mode", mode, *more]) != 0:
            raise SystemExit(f"{mode} of {workdir} did not end")
    (file,) = workdir.glob("likelihood/*/likelihood.npz")
    return float(np.load(file)["bits_per_dim"].mean())


def measure(
    study: Study, runs: Path, seeds: Sequence[int], steps: int, path: str | None, only: Sequence[str]
) -> dict[str, Found]:  # fmt: skip
    """The networks of these names, or if there are none all, with every seed."""
    data: Changes = {"data.path": path} if path else {}
    config = configs.load(f"configs/{study.config}.py", {**study.shared, **data})
    shape = load_data(config.data.dataset, path).shape
    found, first = dict[str, Found](), 0
    for name, changes in study.networks.items():
        parameters, cost = size_of(configs.load(f"configs/{study.config}.py", {**study.shared, **changes}), shape)
        first = first or cost
        n = round(steps * first / cost)
        whole = {**changes, "training.n_iters": f"{n}"}
        if name in only or not only:
            folders = {seed: runs / f"{name.replace(', ', '_').replace(' ', '_')}-{seed}" for seed in seeds}
            own = [bits(study, {**whole, "seed": f"{seed}"}, folder, data) for seed, folder in folders.items()]
            found[name] = Found(parameters, cost / first, n, own)
    return found


def page(found: dict[str, Found], study: Study, steps: int) -> str:
    """The page's table, with differences from the first network paired by seed."""
    first = next(iter(found.values()))
    rows = []
    for name, each in found.items():
        differences = [own - other for own, other in zip(each.bits, first.bits, strict=True)]
        against = "" if each is first else cell(differences, 3)
        counts = (f"{each.parameters / 1000:,.0f}", f"{each.cost:.2f}", f"{each.steps}")
        rows.append((f"`{study.config}`: {name}" if each is first else name, *counts, cell(each.bits, 3), against))
    head = ("network", "thousand parameters", "operations of a step", "steps", "bits/dim", "from the first")
    return table(head, rows) + (
        f"\nOperations of {steps} steps of the first network; {study.images} held-out images; mean and standard "
        f"deviation of {len(first.bits)} seed{'s' if len(first.bits) > 1 else ''}. {machine(torch.device('cpu'))}.\n"
    )


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m studies.networks", description=__doc__.splitlines()[0])
    p.add_argument("--data", choices=tuple(STUDIES), default="digits")
    p.add_argument("--path", help="where the data lie")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--steps", type=int, help="of the first network; default as in the page")
    p.add_argument("--only", nargs="+", default=[], help="names of networks; default all")
    p.add_argument("--rate", type=float, help="learning rate of all networks in place of their own")
    p.add_argument("--runs", type=Path, default=Path("runs/networks"), help="where runs are kept, and looked for")
    p.add_argument("--fill", action="store_true", help="put the table into docs/networks.md")
    return p


def main() -> None:
    o = parser().parse_args()
    study = STUDIES[o.data]
    steps, runs = o.steps or study.steps, o.runs / o.data
    if o.rate:
        tried = {name: {**changes, "optim.lr": f"{o.rate:g}"} for name, changes in study.networks.items()}
        study, runs = study._replace(networks=tried), runs / f"rate_{o.rate:g}"
    found = measure(study, runs, o.seeds, steps, o.path, o.only)
    text = page(found, study, steps)
    print(text)
    if o.fill:
        fill(DOCS / "networks.md", {f"{o.data}_networks": text})


if __name__ == "__main__":
    main()
