"""Runs that tests share: tiny configs, command lines of them, an autoencoder, and two processes side by side."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from ml_collections import ConfigDict
from torch import Tensor, nn
from tqdm import tqdm

from score_sde.cli import run
from score_sde.config import default_config
from score_sde.config.keys import check
from score_sde.config.objective import Objective
from score_sde.data import Data
from score_sde.data.codecs import PixelCodec, codec_of
from score_sde.machine.parallel import Processes
from score_sde.tasks.codes import Source
from score_sde.tasks.step import Batches, Record, State, make_state, train_step
from tests import ROOT

TINY = {
    "training.n_iters": 4, "training.batch_size": 4, "training.snapshot_freq": 2, "training.snapshot_sampling": "false",
    "training.log_freq": 100, "training.eval_freq": 100, "training.compile": "false", "training.precision": "float32",
    "model.hidden": 8, "model.nf": 8, "model.ch_mult": "1", "model.num_res_blocks": 1, "model.attn_resolutions": "8",
    "model.dropout": 0, "sampling.steps": 2, "sampling.num_samples": 4, "sampling.batch_size": 4, "eval.num_images": 2,
    "eval.check_images": 0, "eval.rtol": 0.5, "eval.atol": 0.5, "interpolation.pairs": 1, "interpolation.steps": 3,
    "eval.probe": "rademacher",
}  # fmt: skip


def put(config: ConfigDict, key: str, value: Any) -> None:
    """Set a key such as "training.n_iters", checked."""
    section, _, name = key.rpartition(".")
    target = config[section] if section else config
    with target.ignore_type():  # classes have numbers or names
        target[name] = check(key, value)


def overrides(**changes: object) -> list[str]:
    return [f"--config.{key.replace('__', '.')}={value}" for key, value in changes.items()]


def line(name: str, mode: str, workdir: Path, *words: str, **changes: object) -> list[str]:
    settings = {**TINY, **{key.replace("__", "."): value for key, value in changes.items()}}
    command = ["--config", f"configs/{name}.py", "--mode", mode, "--workdir", str(workdir)]
    return [*command, *(f"--config.{key}={value}" for key, value in settings.items()), *words]


def results(workdir: Path, kind: str) -> dict[str, np.ndarray]:
    (path,) = (workdir / kind).glob("*/*.npz")
    return dict(np.load(path))


def refused(capsys: pytest.CaptureFixture[str], command: list[str]) -> str:
    """The sentence with which a command is refused."""
    capsys.readouterr()
    assert run(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


SHRUNK = {
    "training.n_iters": 1, "training.batch_size": 4, "training.compile": "false", "training.precision": "float32",
    "model.nf": 8, "model.ch_mult": "1,2", "model.num_res_blocks": 1, "model.attn_resolutions": "4",
    "model.head_channels": 0, "model.hidden": 16, "model.num_scales": 25, "data.image_size": 8,
    "sampling.steps": 3, "sampling.n_steps_each": 2, "sampling.num_samples": 5, "sampling.batch_size": 5,
    "eval.num_images": 3, "eval.batch_size": 3, "eval.rtol": 1, "eval.atol": 1, "eval.steps": 5,
    "eval.probe": "rademacher", "eval.check_images": 0, "sampling.rtol": 0.1, "sampling.atol": 0.1,
}  # fmt: skip


def words(name: str, mode: str, workdir: Path, images: Path, **changes: object) -> list[str]:
    settings = {**SHRUNK, **{key.replace("__", "."): value for key, value in changes.items()}}
    if name.endswith(("ddpm_cifar", "flow_cifar")):
        settings["model.nf"] = 32  # 32 groups of channels
    if name.startswith("ncsn"):
        settings["model.ch_mult"] = "1,1,1"
    if name == "vp_digits":  # of most tests here
        settings |= {"model.ch_mult": 1, "model.attn_resolutions": "()"}
    if name == "vdm_digits":
        settings["eval.terms"] = 3  # of the bound's five
    if not any(data in name for data in ("digits", "toy")):
        settings |= {"data.dataset": "files", "data.path": images}
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    return ["--config", f"configs/{name}.py", "--mode", mode, "--workdir", str(workdir), *overrides]


ALONE = Processes(0, 1, torch.device("cpu"))


def toy_config(**changes: object) -> ConfigDict:
    """A few steps of a small MLP on the ring."""
    config = default_config()
    config.data.dataset = "ring"
    config.model.name = "mlp"
    config.model.hidden = 32
    config.model.dropout = 0.0
    config.data.random_flip = False
    config.training.batch_size = 16
    config.training.n_iters = 6
    config.optim.warmup = 0
    config.training.snapshot_sampling = False
    with config.unlocked():
        for key, value in changes.items():
            section, name = key.split("__")
            config[section][name] = value
    return config


def image_config(**changes: object) -> ConfigDict:
    """A tiny U-Net on 8x8 digits, with attention."""
    config = toy_config(
        data__dataset="digits", model__name="ncsnpp", model__nf=8, model__ch_mult=(1, 2), model__num_res_blocks=1,
        model__attn_resolutions=(4,), training__batch_size=4,
    )  # fmt: skip
    for key, value in changes.items():
        section, name = key.split("__")
        config[section][name] = value
    return config


def run_steps(config: ConfigDict, data: Data, steps: int = 3) -> tuple[State, list[Record]]:
    state = make_state(config, data.shape, torch.device("cpu"))
    objective = Objective(state.model, config)
    codec = codec_of(data.levels, config.data.centered)
    records = []
    for _ in range(steps):
        b = Batches(config, codec, state.model.sde).draw(data.train, state.step)
        records.append(train_step(state, objective, b, config))
    return state, records


Node = Callable[[int, Path], Any]


def _enter(rank: int, ports: list[int], folder: Path, work: Node) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(ports[0]), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    leave, others = dist.destroy_process_group, iter(ports[1:])

    def leave_and_go_on() -> None:
        leave()
        os.environ["MASTER_PORT"] = str(next(others))

    dist.destroy_process_group = leave_and_go_on
    os.chdir(ROOT)
    torch.save(work(rank, folder), folder / f"answer-{rank}")


def two_nodes(folder: Path, work: Node) -> list[Any]:
    """work(rank, folder) in two processes that torchrun might have started on two nodes; what they return.

    As torchrun does, the parent keeps the stores by which they find each other, one for each of at most seven commands.
    If the main process did, the other one might begin its next command at the store of the last, and wait for ever.
    """
    stores = [dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) for _ in range(8)]
    if tqdm.monitor is not None:  # a thread; were it to hold tqdm's lock when we fork, the children would wait for ever
        tqdm.monitor.exit()
        tqdm.monitor = None
    ports = [store.port for store in stores]
    both = multiprocessing.start_processes(_enter, (ports, folder, work), nprocs=2, join=False, start_method="fork")
    deadline = time.monotonic() + 300
    try:
        while not both.join(timeout=1):
            assert time.monotonic() < deadline, "the two wait for each other"
    finally:
        for process in both.processes:
            process.kill()
    return [torch.load(folder / f"answer-{rank}") for rank in range(2)]


class Halves(nn.Module):
    """The code of an image is the means of its 2x2 squares, with a large deviation that grows with them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.asked = 0

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.asked += len(x)
        mean = self.scale * nn.functional.avg_pool2d(x, 2)
        return mean, 0.5 + 0.2 * mean.abs()

    def decode(self, z: Tensor) -> Tensor:
        return nn.functional.interpolate(z / self.scale, scale_factor=2.0)


def halves(sha256: str = "a" * 64) -> Source:
    return Source(Halves().requires_grad_(False), PixelCodec(17), (1, 4, 4), sha256, "halves")
