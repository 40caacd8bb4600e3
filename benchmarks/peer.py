"""score_sde_pytorch beside us: its own modules, imported from a clone, and its config with the sizes of ours.

Nothing of it is copied. Two things stand in its way and are replaced: its `op` package compiles CUDA code when it is
imported, and offers in plain PyTorch what that does; and its data sets and evaluation need TensorFlow and JAX, but
are not needed here and stay unloaded.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

STUBS = (
    "of the peer's code, torch.utils.cpp_extension.load is a stub and op.upfirdn2d is its own upfirdn2d_native; "
    "run_lib, datasets, evaluation and utils, which import TensorFlow and JAX, are not loaded"
)
SDES = ("vpsde", "subvpsde", "vesde")


@dataclass(frozen=True)
class Peer:
    """The modules of score_sde_pytorch that are measured."""

    version: str
    models: Any
    sde_lib: Any
    losses: Any
    sampling: Any
    likelihood: Any
    ema: Any

    def sde(self, config: ConfigDict) -> Any:
        """The peer's SDE."""
        m = config.model
        if config.training.sde == "vesde":
            return self.sde_lib.VESDE(sigma_min=m.sigma_min, sigma_max=m.sigma_max, N=m.num_scales)
        kind = {"vpsde": self.sde_lib.VPSDE, "subvpsde": self.sde_lib.subVPSDE}[config.training.sde]
        return kind(beta_min=m.beta_min, beta_max=m.beta_max, N=m.num_scales)

    def network(self, config: ConfigDict, ours: nn.Module) -> nn.Module:
        """The peer's network, refused unless it has as many parameters as `ours`."""
        with torch.random.fork_rng(devices=[]):
            network: nn.Module = self.models.create_model(config)
        theirs = parameters(network)
        if theirs != parameters(ours):
            raise ValueError(f"the peer's network has {theirs} parameters and ours {parameters(ours)}: not comparable")
        return network


def parameters(network: nn.Module) -> int:
    """The number of trained parameters."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def load(path: Path) -> Peer:
    """Import the peer's modules from a clone. Raises FileNotFoundError where there is none."""
    if not (path / "sde_lib.py").is_file():
        raise FileNotFoundError(f"{path} is no clone of score_sde_pytorch: it has no sde_lib.py")
    stub = mock.patch("torch.utils.cpp_extension.load", lambda *args, **options: None)
    with stub, mock.patch.object(sys, "path", [str(path), *sys.path]):
        op = import_module("op")
        native = sys.modules["op.upfirdn2d"].upfirdn2d_native

        def upfirdn2d(x: Tensor, kernel: Tensor, up: int = 1, down: int = 1, pad: tuple[int, int] = (0, 0)) -> Tensor:
            return native(x, kernel, up, up, down, down, *pad, *pad)

        op.upfirdn2d = upfirdn2d  # type: ignore[attr-defined]
        for network in ("ddpm", "ncsnpp"):
            import_module(f"models.{network}")
        named = {name: import_module(name) for name in ("sde_lib", "losses", "sampling", "likelihood")}
        return Peer(_version(path), import_module("models.utils"), ema=import_module("models.ema"), **named)


def _version(path: Path) -> str:
    if not (path / ".git").exists():
        return f"{path.name}, which is no git clone: its commit is not known"
    commit = subprocess.run(["git", "-C", path, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return f"commit {commit.stdout.strip()}"


def config_for(config: ConfigDict, shape: tuple[int, ...], device: torch.device) -> ConfigDict:
    """The peer's config with the sizes and settings of ours. Raises ValueError for settings that it does not have."""
    if config.model.name == "mlp":
        raise ValueError("score_sde_pytorch has no network for vectors: run this config without --peer")
    if config.training.sde not in SDES:
        raise ValueError(f"score_sde_pytorch has no SDE {config.training.sde!r}: run this config without --peer")
    theirs = ConfigDict(config.to_dict())
    theirs.device = str(device)
    theirs.data.num_channels, theirs.data.image_size = shape[0], shape[-1]
    theirs.model.update(
        normalization="GroupNorm",
        attention_type="ddpm",
        conv_size=3,
        scale_by_sigma=config.training.sde == "vesde" and config.model.name == "ncsnpp",
    )
    theirs.optim.optimizer = "Adam"
    return theirs
