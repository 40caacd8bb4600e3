"""Checkpoints of score_sde_pytorch (Song et al. 2021), read as models of this package.

Such a file is a dict of `model` (weights), `ema` (averaged weights, without names), `optimizer` and `step`; it carries
no config. Its network is a list of modules numbered in the order in which they run. Our network has named modules, made
in the same order, so one walk over them names theirs, for every option of its networks `ddpm` and `ncsnpp`. The modules
of its NCSN and NCSNv2 have names.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..models.base import ScoreModel
from ..models.rules import Preconditioned, label_sigma, label_time
from ..networks import NCSN, NCSNv2, UNet
from ..networks.blocks import Attention, Head, LabelEmbedding, ResidualBlock
from ..networks.pyramid import InputSkip, OutputSkip
from ..networks.refinenet import RefineNet
from ..networks.resample import Blur, ConvDown, ConvUp, Repeat, Stuff
from ..sdes.chains import DDPM
from ..sdes.linear import VESDE, VPSDE, SubVPSDE, like

Config = Mapping[str, Any]  # a dict or a ConfigDict with score_sde's sections and keys
_REMEDY = "give the config that the checkpoint was trained with"


def load_score_sde_file(
    path: str | Path, config: Config | str | Path | None, ema: bool = True, map_location: str | torch.device = "cpu"
) -> ScoreModel:
    """The model in a checkpoint file of score_sde_pytorch, on the device `map_location`.

    `config` is the one that the checkpoint was trained with: a dict, a ConfigDict, or the path of a JSON file.
    Raises FileNotFoundError for a missing file, and ValueError for a broken file or a config that does not fit.
    """
    if config is None:
        raise ValueError(
            f"{path} is a checkpoint of score_sde_pytorch, which carries no config; "
            "pass the one it was trained with, load(path, config=...), as a dict, a ConfigDict or a JSON file"
        )
    if isinstance(config, (str, Path)):
        config = read_config(config)
    return load_score_sde(read_checkpoint(path), config, ema).to(map_location).eval().requires_grad_(False)


def load_score_sde(state: Mapping[str, Any], config: Any, ema: bool = True) -> ScoreModel:
    """The model in `state`, a checkpoint dict of score_sde_pytorch; its averaged weights if `ema`.

    The model takes every t in continuous time, with the labels and curves of that project. Its data lie in [0, 1],
    or in [-1, 1] where the config says `centered`. Raises ValueError unless every tensor is used exactly once.
    """
    network = build_network(config)
    keys = key_map(network, config)
    theirs = {bare(name): tensor for name, tensor in state["model"].items()}
    sigmas = theirs.pop("sigmas", None)
    if ema:
        trained, averages = [key.theirs for key in keys if key.trained], state["ema"]["shadow_params"]
        if len(averages) != len(trained):
            counts = f"the checkpoint's EMA has {len(averages)} tensors, the config's network {len(trained)}"
            raise ValueError(f"{counts}: {_REMEDY}")
        theirs.update(zip(trained, averages))
    wanted = {key.theirs for key in keys}
    for one, other, names in [
        ("config's network", "checkpoint", wanted - theirs.keys()),
        ("checkpoint", "config's network", theirs.keys() - wanted),
    ]:
        if names:
            lacked = f"{len(names)} tensors that the {other} lacks, such as {min(names)}"
            raise ValueError(f"the {one} has {lacked}: {_REMEDY}")
    ours, shapes = to_ours(theirs, keys), {name: tensor.shape for name, tensor in network.state_dict().items()}
    for name, tensor in ours.items():
        if tensor.shape != shapes[name]:
            sizes = f"shape {tuple(tensor.shape)}, the config's network {tuple(shapes[name])}"
            raise ValueError(f"the checkpoint has {name} of {sizes}: {_REMEDY}")
    network.load_state_dict(ours)
    return as_model(network, sigmas, config)


def bare(name: str) -> str:
    """A tensor's name without the prefixes of wrappers, in any order: ``module.`` of data parallelism, and
    ``_orig_mod.`` of torch.compile, which stands before the module that was compiled."""
    return re.sub(r"(^|\.)_orig_mod(?=\.)", "", re.sub(r"^((module|_orig_mod)\.)+", "", name)).removeprefix(".")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The dict in a checkpoint file of score_sde_pytorch; nothing in the file is executed.

    The file may hold tensors, plain containers and numpy scalars. Raises FileNotFoundError, and ValueError for a file
    that is truncated, of another kind, or holds pickled code.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint file {path}")
    # After warm-up the stored learning rate is a numpy.float64, whose constructor has another name in numpy 1.
    scalar: Any = np.float64(0).__reduce__()[0]
    allowed: list[Any] = [np.dtype, *(type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int32, np.int64))]
    allowed += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals(allowed):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for bytes that are no archive of tensors
        raise ValueError(
            f"{path} is truncated, no checkpoint, or holds more than tensors and numbers: nothing else is ever loaded"
        ) from error
    if not isinstance(state, dict) or not {"model", "ema"} <= state.keys() or "shadow_params" not in state["ema"]:
        raise ValueError(f"{path} is no checkpoint of score_sde_pytorch: it lacks `model` or `ema.shadow_params`")
    return state


def read_config(path: str | Path) -> dict[str, Any]:
    """The dict in a JSON file."""
    try:
        config = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"config {path} is not a JSON file: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"config {path} must hold an object with the sections data, model and training")
    return config


def build_network(config: Any) -> UNet | RefineNet:
    """Our network with the options of a score_sde config; model.name is "ddpm", "ncsnpp", "ncsn" or in `NCSNV2`.

    Options that crash there (resampling by convolution without FIR, fused FIR up-convolution, unconditional `ddpm`) are
    built as their code means them, `ncsn` and NCSNv2 as in their original projects.
    """
    name = _get(config, "model.name")
    if name == "ncsn" or name in NCSNV2:
        return _build_refinenet(config)
    shared = dict(
        channels=_get(config, "data.num_channels"), width=_get(config, "model.nf"),
        multipliers=tuple(_get(config, "model.ch_mult")), blocks=_get(config, "model.num_res_blocks"),
        attention=tuple(_get(config, "model.attn_resolutions")), image_size=_get(config, "data.image_size"),
        dropout=_get(config, "model.dropout"),
        embedding=("fourier" if _fourier(config) else "sinusoidal") if _get(config, "model.conditional") else None,
        resample_conv=_get(config, "model.resamp_with_conv"), activation=_get(config, "model.nonlinearity").lower(),
        centered=_get(config, "data.centered"),
    )  # fmt: skip
    if name == "ddpm":
        return UNet(**shared, block="ddpm", skip_rescale=False, groups=32)
    if name != "ncsnpp":
        readable = ", ".join(("ddpm", "ncsnpp", "ncsn", *NCSNV2))
        raise ValueError(f"model.name of a score_sde checkpoint must be one of {readable}, got {name!r}")
    return UNet(
        **shared, block=_get(config, "model.resblock_type").lower(),
        fir=tuple(_get(config, "model.fir_kernel")) if _get(config, "model.fir") else None,
        skip_rescale=_get(config, "model.skip_rescale"), progressive=_get(config, "model.progressive").lower(),
        progressive_input=_get(config, "model.progressive_input").lower(),
        combine=_get(config, "model.progressive_combine").lower(), init_scale=_get(config, "model.init_scale"),
    )  # fmt: skip


def _build_refinenet(config: Any) -> RefineNet:
    """NCSN or NCSNv2 with the options of a score_sde config."""
    norm = _get(config, "model.normalization")
    if norm != "InstanceNorm++":
        raise ValueError(f'model.normalization of NCSN and NCSNv2 must be "InstanceNorm++", got {norm!r}')
    name, channels = _get(config, "model.name"), _get(config, "data.num_channels")
    shared = dict(
        width=_get(config, "model.nf"), activation=_get(config, "model.nonlinearity").lower(),
        centered=_get(config, "data.centered"),
    )  # fmt: skip
    if name == "ncsn":
        return NCSN(channels, levels=_get(config, "model.num_scales"), **shared)
    return NCSNv2(channels, multipliers=NCSNV2[name], **shared)


@dataclass(frozen=True)
class Key:
    """One of their tensors, and where it goes in our network."""

    theirs: str  # without the prefixes of wrappers
    ours: str | None  # None: unused there; q, k and v have the same name, as they are one tensor here
    transposed: bool = False  # (in, out) there, (out, in, 1, 1) here
    trained: bool = True  # it has an average in the EMA


def key_map(network: UNet | RefineNet, config: Any) -> list[Key]:
    """All their tensors except `sigmas`, in the order of their `parameters()` and so of the EMA's list."""
    if isinstance(network, RefineNet):
        return [
            Key(f"{theirs}.{'embed.weight' if leaf == 'table' else leaf}", f"{ours}.{leaf}")
            for ours, theirs in _refinenet_parts(network)
            for leaf, _ in network.get_submodule(ours).named_parameters()
        ]
    keys = []
    if _fourier(config):
        ours = None if network.embed is None else "embed.features.frequencies"
        keys.append(Key("all_modules.0.W", ours, trained=False))
    for number, (name, parts) in enumerate(_numbered(network), start=len(keys)):
        for part, their_part in parts:
            dense = their_part.startswith("NIN")
            for leaf, their_leaf in [("weight", "W"), ("bias", "b")] if dense else [("weight",) * 2, ("bias",) * 2]:
                theirs = ".".join(filter(None, ["all_modules", str(number), their_part, their_leaf]))
                ours = None if part is None else ".".join(filter(None, [name, part, leaf]))
                keys.append(Key(theirs, ours, transposed=dense and leaf == "weight"))
    return keys


def to_ours(theirs: Mapping[str, Tensor], keys: Iterable[Key]) -> dict[str, Tensor]:
    """Tensors (weights, averages, gradients, moments) by our names instead of theirs, without the unused ones."""
    ours: dict[str, list[Tensor]] = {}
    for key in keys:
        if key.ours is not None:
            tensor = theirs[key.theirs]
            ours.setdefault(key.ours, []).append(tensor.T[:, :, None, None] if key.transposed else tensor)
    return {name: torch.cat(tensors) if len(tensors) > 1 else tensors[0] for name, tensors in ours.items()}


def to_theirs(ours: Mapping[str, Tensor], keys: Sequence[Key]) -> dict[str, Tensor]:
    """The inverse of `to_ours`, in the order of their parameters."""
    counts = Counter(key.ours for key in keys)
    left = {name: list(tensor.chunk(counts[name])) for name, tensor in ours.items()}
    theirs = {key: left[key.ours].pop(0) for key in keys if key.ours is not None}
    return {key.theirs: tensor[:, :, 0, 0].T if key.transposed else tensor for key, tensor in theirs.items()}


def as_model(network: UNet | RefineNet, sigmas: Tensor | None, config: Any) -> ScoreModel:
    """The score model of `network`, with the labels, the scaling and the curves of score_sde's `get_score_fn`.

    NCSN and NCSNv2 have a list of noise levels only, and NCSNv2 always divides by sigma: for them
    `training.continuous` and `model.scale_by_sigma` are ignored.
    """
    kind, steps = _get(config, "training.sde").lower(), _get(config, "model.num_scales")
    refinenet = isinstance(network, RefineNet)
    if refinenet and kind != "vesde":
        raise ValueError(f'training.sde of NCSN and NCSNv2 must be "vesde", got {kind!r}')
    continuous = not refinenet and _get(config, "training.continuous")
    raw: nn.Module = network
    if isinstance(network, NCSNv2) or (not refinenet and _get(config, "model.scale_by_sigma")):
        if not _fourier(config) and sigmas is None:
            raise ValueError("the checkpoint lacks the table `sigmas`, by which the network's output is divided")
        raw = Divided(network, None if _fourier(config) else sigmas)

    if kind == "vesde":
        sde = VESDE(sigma_min=_get(config, "model.sigma_min"), sigma_max=_get(config, "model.sigma_max"))
        ends = [sde.sigma_max, sde.sigma_min]
        if sigmas is not None and not np.allclose(sigmas[[0, -1]].cpu(), ends, rtol=1e-3):
            raise ValueError(
                f"the checkpoint has noise levels from {sigmas[0]:g} to {sigmas[-1]:g}, the config from "
                f"model.sigma_max={ends[0]:g} to model.sigma_min={ends[1]:g}: set these to the checkpoint's"
            )
        return Preconditioned(raw, sde, rule="score", label=label_sigma if continuous else partial(_rank, steps=steps))
    betas = dict(beta_min=_get(config, "model.beta_min"), beta_max=_get(config, "model.beta_max"))
    if kind == "subvpsde":
        return Preconditioned(raw, SubVPSDE(**betas), rule="noise", label=label_time)
    if kind != "vpsde":
        raise ValueError(f'training.sde of a score_sde checkpoint must be "vpsde", "subvpsde" or "vesde", got {kind!r}')
    vp = VPSDE(**betas)
    if continuous:
        return Preconditioned(raw, vp, rule="noise", label=label_time)
    std = torch.sqrt(1 - DDPM.from_sde(vp, steps).alpha_bar)
    return Preconditioned(Divided(raw, -std), vp, rule="score", label=partial(_index, steps=steps))


class Divided(nn.Module):
    """A network whose output is divided by `divisors[int(label)]`, or by the label itself if there is no table."""

    divisors: Tensor | None

    def __init__(self, network: nn.Module, divisors: Tensor | None) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("divisors", divisors)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        divisor = label if self.divisors is None else self.divisors[label.long()]
        return self.network(x, label) / like(divisor, x)


def _index(alpha: Tensor, sigma: Tensor, t: Tensor, steps: int) -> Tensor:
    """t (N - 1), not rounded: the label of discrete VP models."""
    return t * (steps - 1)


def _rank(alpha: Tensor, sigma: Tensor, t: Tensor, steps: int) -> Tensor:
    """round((1 - t)(N - 1)): the label of discrete VE models, 0 at the largest sigma."""
    return ((1 - t) * (steps - 1)).round().long()


Parts = list[tuple[str | None, str]]  # (our name, their name); None: unused there


def _numbered(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Parts]]:
    """(our module's name, its parts) for each module in their numbered list, in its order."""
    for name, child in module.named_children():
        modules = _modules(child)
        if modules is None:
            yield from _numbered(child, f"{prefix}{name}.")
        else:
            yield from ((prefix + name, parts) for parts in modules)


def _modules(module: nn.Module) -> list[Parts] | None:
    """Their consecutive modules for our `module`, also those without tensors; None: look inside `module`."""
    match module:
        case ResidualBlock():
            label = None if module.label is None else "label"
            parts = [("norm1", "GroupNorm_0"), ("conv1", "Conv_0"), (label, "Dense_0"), ("norm2", "GroupNorm_1")]
            parts.append(("conv2", "Conv_1"))
            if not isinstance(module.shortcut, nn.Identity):
                parts.append(("shortcut", "NIN_0" if module.style.block == "ddpm" else "Conv_2"))
            return [parts]
        case Attention():
            return [[("norm", "GroupNorm_0"), ("qkv", "NIN_0"), ("qkv", "NIN_1"), ("qkv", "NIN_2"), ("out", "NIN_3")]]
        case ConvDown(blur=None) | ConvUp(enlarge=Repeat()) | InputSkip():
            return [[("conv", "Conv_0")]]
        case ConvDown() | ConvUp():
            return [[("conv", "Conv2d_0")]]
        case Blur() | Stuff() | Repeat() | nn.AvgPool2d():
            return [[]]
        case LabelEmbedding():
            return [[("hidden", "")], [("out", "")]]
        case OutputSkip():
            return [[("head.norm", "")], [("head.conv", "")]]
        case Head():
            return [[("norm", "")], [("conv", "")]]
        case nn.Conv2d():
            return [[("", "")]]
    return None


# Their names of NCSNv2, and the stages' widths in units of model.nf.
NCSNV2: dict[str, tuple[int, ...]] = {
    "ncsnv2_64": (1, 2, 2, 2), "ncsnv2_128": (1, 2, 2, 4, 4), "ncsnv2_256": (1, 2, 2, 2, 4, 4),
}  # fmt: skip


def _refinenet_parts(network: RefineNet) -> Iterator[tuple[str, str]]:
    """(our module's name, theirs) for all modules with parameters, in the order in which theirs are made."""
    yield from [("first", "begin_conv"), ("norm", "normalizer"), ("last", "end_conv")]
    # the sixth stage, "31", runs between the third and the fourth; the refinements are made in order of their names
    numbers = ["1", "2", "3", "31", "4", "5"] if len(network.stages) == 6 else ["1", "2", "3", "4", "5"]
    for i, stage in enumerate(network.stages):
        for j, (name, block) in enumerate(stage.named_children()):
            ours, theirs = f"stages.{i}.{name}", f"res{numbers[i]}.{j}"
            inner = ".conv" if block.halves else ""
            yield from [(f"{ours}.conv1", f"{theirs}.conv1"), (f"{ours}.norm2", f"{theirs}.normalize2")]
            yield from [(f"{ours}.conv2", f"{theirs}.conv2{inner}"), (f"{ours}.shortcut", f"{theirs}.shortcut{inner}")]
            yield f"{ours}.norm1", f"{theirs}.normalize1"
    run = ["1", "2", "31", "3", "4", "5"] if len(network.stages) == 6 else ["1", "2", "3", "4", "5"]
    for number, (i, refinement) in sorted(zip(run, enumerate(network.refinements))):
        ours, theirs = f"refinements.{i}", f"refine{number}"
        for part, their_part in [("own", "adapt_convs.0"), ("below", "adapt_convs.1"), ("out", "output_convs")]:
            for k in range(len(refine.convs) if (refine := getattr(refinement, part)) else 0):
                for kind in ("norm", "conv"):
                    yield f"{ours}.{part}.{kind}s.{k}", f"{theirs}.{their_part}.{k // 2 + 1}_{k % 2 + 1}_{kind}"
        if refinement.join is not None:
            for ours_, kind in [("", "convs"), ("norm_", "norms")]:
                for k, part in enumerate(("own", "below")):
                    yield f"{ours}.join.{ours_}{part}", f"{theirs}.msf.{kind}.{k}"
        for kind in ("convs", "norms"):
            yield from [(f"{ours}.pooling.{kind}.{k}", f"{theirs}.crp.{kind}.{k}") for k in range(2)]


def _get(config: Any, path: str) -> Any:
    """The value at "section.key" of a dict or ConfigDict."""
    section, key = path.split(".")
    if section not in config or key not in config[section]:
        raise ValueError(f"the config lacks {path}, which a checkpoint of score_sde_pytorch needs")
    return config[section][key]


def _fourier(config: Any) -> bool:
    """Whether Fourier features embed the label; `ddpm` ignores this key."""
    return _get(config, "model.name") == "ncsnpp" and _get(config, "model.embedding_type").lower() == "fourier"
