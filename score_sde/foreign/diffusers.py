"""Weights of diffusers' UNet2DModel and DiTTransformer2DModel, read into this package's networks by a key map.

Such a model is a folder of `config.json` and `diffusion_pytorch_model.safetensors`; diffusers is not needed to read it.
Names correspond one to one, with two exceptions: diffusers keeps q, k and v of attention apart, in fully connected
layers, and its DiT has embeddings of time and class in each block, which in published models are copies of one. Our
network computes what diffusers computes, also for the published DiTs: diffusers has the time's frequencies as
10000^(-i/127), their authors as 10000^(-i/128). A key that a config leaves out has diffusers' default (`DEFAULTS`).

With its scheduler's config a network is a score model of the chain on whose steps it was trained: `load_folder`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..machine.whole_files import read_tensors
from ..models.base import ScoreModel
from ..models.rules import Preconditioned, RuleName, label_index
from ..networks import DiT, UNet
from ..networks.conditioning import ClassEmbedding
from ..networks.resample import ConvDown
from ..sdes.chains import DDPM
from .score_sde_pytorch import bare, read_config

WEIGHTS = "diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler_config.json"

# The values that diffusers gives to keys that a config leaves out: a model's, and a scheduler's.
DEFAULTS: dict[str, dict[str, Any]] = {
    "UNet2DModel": {
        "sample_size": None, "in_channels": 3, "out_channels": 3, "center_input_sample": False,
        "time_embedding_type": "positional", "time_embedding_dim": None, "freq_shift": 0, "flip_sin_to_cos": True,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (224, 448, 672, 896), "layers_per_block": 2, "mid_block_scale_factor": 1,
        "downsample_padding": 1, "downsample_type": "conv", "upsample_type": "conv", "dropout": 0.0, "act_fn": "silu",
        "attention_head_dim": 8, "norm_num_groups": 32, "attn_norm_num_groups": None, "norm_eps": 1e-5,
        "resnet_time_scale_shift": "default", "add_attention": True, "class_embed_type": None, "num_class_embeds": None,
        "num_train_timesteps": None,
    },
    "DiTTransformer2DModel": {
        "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": None, "num_layers": 28,
        "dropout": 0.0, "norm_num_groups": 32, "attention_bias": True, "sample_size": 32, "patch_size": 2,
        "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000, "upcast_attention": False,
        "norm_type": "ada_norm_zero", "norm_elementwise_affine": False, "norm_eps": 1e-5,
    },
}  # fmt: skip
CHAIN_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
    "trained_betas": None, "prediction_type": "epsilon",
}  # fmt: skip
SCHEDULERS = (
    "DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler", "DEISMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
)  # fmt: skip
_RULES: dict[str, RuleName] = {"epsilon": "noise", "sample": "data", "v_prediction": "v"}


def is_folder(path: str | Path) -> bool:
    """Whether diffusers wrote this folder: that of a pipeline, or of a model with its config."""
    path = Path(path)
    if (path / "model_index.json").is_file():
        return True
    try:
        return (path / "config.json").is_file() and "_class_name" in read_config(path / "config.json")
    except ValueError:  # the config of a workdir, whose checkpoints carry it too
        return False


def network_folder(folder: Path) -> Path:
    """The folder of the network in a folder of diffusers: a pipeline's `unet` or `transformer`, or itself."""
    places = [folder / name for name in ("unet", "transformer")]
    return next((place for place in places if (place / "config.json").is_file()), folder)


def load_folder(folder: str | Path, map_location: str | torch.device = "cpu") -> ScoreModel:
    """The score model in a folder of diffusers, in eval mode: a pipeline's `unet` or `transformer` with its scheduler.

    It may also be the folder of the model alone, with `scheduler_config.json` in it or in the folder `scheduler` beside
    it. The model is one of a chain: its curves are those of the scheduler's betas, its labels the indices of steps.
    Raises FileNotFoundError for files that are missing, and ValueError for a scheduler or an option without
    counterpart.
    """
    folder = Path(folder)
    where = network_folder(folder)
    places = [folder / SCHEDULER, folder / "scheduler" / SCHEDULER, folder.parent / "scheduler" / SCHEDULER]
    scheduler = next((place for place in places if place.is_file()), None)
    if scheduler is None:
        raise FileNotFoundError(
            f"{folder} holds a network of diffusers but no {SCHEDULER}, which says on which chain it was trained: give "
            "the pipeline's whole folder, or read the network alone by score_sde.foreign.diffusers.load_network(folder)"
        )
    network = load_network(where)
    model = model_of(network, read_config(where / "config.json"), read_config(scheduler))
    return model.to(map_location).eval().requires_grad_(False)


def model_of(network: nn.Module, config: Mapping[str, Any], scheduler: Mapping[str, Any]) -> ScoreModel:
    """The score model of a network of diffusers and its scheduler's chain; both configs are those of diffusers.

    Raises ValueError for a scheduler that is not in `SCHEDULERS`, and for an option without counterpart.
    """
    kind = scheduler.get("_class_name")
    if kind not in SCHEDULERS:
        raise ValueError(f"the scheduler must be one of {', '.join(SCHEDULERS)}, got {kind}: no other can be read")
    config, scheduler = _whole(config), {**CHAIN_DEFAULTS, **scheduler}
    if scheduler.get("rescale_betas_zero_snr"):
        raise ValueError("the scheduler's rescale_betas_zero_snr makes the last beta 1, and no SDE has such a chain")
    if scheduler["prediction_type"] not in _RULES:
        raise ValueError(f"prediction_type must be one of {', '.join(_RULES)}, got {scheduler['prediction_type']!r}")
    if scheduler.get("variance_type") == "learned":
        raise ValueError('the scheduler\'s variance_type="learned" cannot be read; "learned_range" can')
    chain = _chain(scheduler)
    learned = (config["out_channels"] or config["in_channels"]) == 2 * config["in_channels"]
    rule, label = _RULES[scheduler["prediction_type"]], partial(label_index, steps=len(chain))
    return Preconditioned(network, chain.as_sde(), rule=rule, label=label, learned_variance=learned)


def _chain(scheduler: Mapping[str, Any]) -> DDPM:
    """The chain of a scheduler's betas."""
    n, first, last = (scheduler[name] for name in ("num_train_timesteps", "beta_start", "beta_end"))
    schedule = scheduler["beta_schedule"]
    if scheduler["trained_betas"] is not None:
        return DDPM(scheduler["trained_betas"])
    if schedule == "linear":
        return DDPM.linear(n, first, last)
    if schedule == "scaled_linear":
        return DDPM(torch.linspace(first**0.5, last**0.5, n, dtype=torch.float64).square())
    if schedule == "squaredcos_cap_v2":
        return DDPM.cosine(n)
    if schedule == "sigmoid":
        return DDPM(torch.sigmoid(torch.linspace(-6, 6, n, dtype=torch.float64)) * (last - first) + first)
    readable = "linear, scaled_linear, squaredcos_cap_v2, sigmoid"
    raise ValueError(f"the scheduler's beta_schedule must be one of {readable}, got {schedule!r}")


def _whole(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config with all keys. Raises ValueError for a class that cannot be read."""
    kind = config.get("_class_name")
    if kind not in DEFAULTS:
        raise ValueError(f"the network must be one of {', '.join(DEFAULTS)}, got {kind}: no other can be read")
    return {**DEFAULTS[kind], **config}


def load_network(folder: str | Path) -> UNet | DiT:
    """The network in a folder that diffusers' `save_pretrained` wrote, in evaluation mode.

    Its labels are the indices of the chain's steps, as in diffusers. Raises FileNotFoundError for missing files, and
    ValueError for a broken file and for an option without counterpart.
    """
    folder = Path(folder)
    for name in ("config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"there is no {folder / name}: give the folder of a model of diffusers that was saved as one file by "
                'model.save_pretrained(folder, max_shard_size="99GB")'
            )
    return network_from(read_tensors(folder / WEIGHTS), read_config(folder / "config.json"))


def settings(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Values of our section model for a network of diffusers with this config, for images of `size`.

    Options that our config does not have, such as another time embedding of ddpm, are left out.
    """
    config = _whole(config)
    if config["_class_name"] == "DiTTransformer2DModel":
        return {
            "name": "dit", "patch_size": config["patch_size"],
            "hidden": config["num_attention_heads"] * config["attention_head_dim"], "depth": config["num_layers"],
            "num_heads": config["num_attention_heads"], "head_channels": 0,
        }  # fmt: skip
    widths = config["block_out_channels"]
    attends = [kind.startswith("Attn") for kind in config["down_block_types"]]
    return {
        "name": "adm" if config["downsample_type"] == "resnet" else "ddpm", "nf": widths[0],
        "ch_mult": tuple(width // widths[0] for width in widths), "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": tuple(size // 2**i for i, attend in enumerate(attends) if attend), "attend_each": True,
        "num_heads": 1, "head_channels": config["attention_head_dim"] or 0,
        "scale_shift": config["resnet_time_scale_shift"] == "scale_shift",
    }  # fmt: skip


def network_from(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> UNet | DiT:
    """Our network with the weights `state` of diffusers, in their precision; `config` is theirs, with `_class_name`.

    Raises ValueError for a class that cannot be read, for an option without counterpart, and unless every tensor is
    used.
    """
    config = _whole(config)
    build, read = _BUILDERS[config["_class_name"]]
    left = {bare(name): tensor for name, tensor in state.items()}
    network = build(config, left).to(next(iter(left.values())).dtype)
    ours = {}
    for name, tensor in network.state_dict().items():
        value = read(name, left, {**config, "blockwise": isinstance(network, BlockwiseDiT)})
        if value.shape != tensor.shape and value.numel() != tensor.numel():
            raise ValueError(
                f"the weights give {name} the shape {tuple(value.shape)}, the config {tuple(tensor.shape)}: give both "
                "from one folder"
            )
        ours[name] = value.reshape(tensor.shape)
    if left:
        raise ValueError(
            f"the weights have {len(left)} tensors that the config's network lacks, such as {min(left)}: give both "
            "from one folder"
        )
    network.load_state_dict(ours)
    return network.eval()


def _take(names: list[str], left: dict[str, Tensor]) -> list[Tensor]:
    """Take the tensors with these names out of those that are left."""
    for name in names:
        if name not in left:
            raise ValueError(f"the weights lack {name}, which the config's network has: give both from one folder")
    return [left.pop(name) for name in names]


def _renamed(name: str, rules: list[tuple[str, str]]) -> list[str]:
    """The names in diffusers of our tensor: three for q, k and v."""
    for pattern, theirs in rules:
        name = re.sub(pattern, theirs, name)
    return [name.replace("qkv", f"to_{part}") for part in "qkv"] if "qkv" in name else [name]


def _expect(config: Mapping[str, Any], **wanted: tuple[Any, ...]) -> None:
    for key, values in wanted.items():
        if config[key] not in values:
            readable = " or ".join(map(repr, values))
            raise ValueError(f"the network's {key} must be {readable}, got {config[key]!r}: no other can be read")


def _unet(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> UNet:
    down, up, widths = config["down_block_types"], config["up_block_types"], config["block_out_channels"]
    resnet = config["downsample_type"] == "resnet"
    _expect(
        config, center_input_sample=(False,), time_embedding_type=("positional",), time_embedding_dim=(None,),
        freq_shift=(0, 1), mid_block_type=("UNetMidBlock2D",), mid_block_scale_factor=(1,), downsample_padding=(0, 1),
        upsample_type=(config["downsample_type"],), resnet_time_scale_shift=("default", "scale_shift"),
        add_attention=(True,), class_embed_type=(None,), act_fn=("silu", "swish"),
    )  # fmt: skip
    attends = [kind.startswith("Attn") for kind in down]
    plain, attending = "Resnet{}sampleBlock2D" if resnet else "{}Block2D", "Attn{}Block2D"
    kinds = [attending if attend else plain for attend in attends]
    mirrored = [kind.format("Down") for kind in kinds], [kind.format("Up") for kind in reversed(kinds)]
    if (list(down), list(up)) != mirrored:
        raise ValueError(f"the network's blocks must be {mirrored}, got {(down, up)}: no others can be read")
    scale_shift = config["resnet_time_scale_shift"] == "scale_shift"
    groups = config["norm_num_groups"]  # without scale_shift, None means the same
    if config["attn_norm_num_groups"] not in ((groups,) if scale_shift else (groups, None)):
        raise ValueError("the network's attn_norm_num_groups must be its norm_num_groups: no other can be read")
    size = 2 ** len(widths)
    network = UNet(
        config["in_channels"], out_channels=config["out_channels"], width=widths[0],
        multipliers=[width / widths[0] for width in widths], blocks=config["layers_per_block"],
        attention=[size // 2**i for i, attend in enumerate(attends) if attend], image_size=size,
        dropout=config["dropout"], block="biggan" if resnet else "ddpm",
        embedding="sinusoidal" if config["freq_shift"] else "transformer", skip_rescale=False, groups=groups,
        norm_eps=config["norm_eps"], scale_shift=scale_shift, head_channels=config["attention_head_dim"] or 0,
        attend_each=True, project=False, classes=config["num_class_embeds"] or 0,
    )  # fmt: skip
    for module in network.modules():
        if isinstance(module, ConvDown):
            module.before = config["downsample_padding"]
    return network


def _read_unet(name: str, left: dict[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    last = config["layers_per_block"]  # the index of a level's last attention: on the way up it has one block more
    rules = [
        (r"^embed\.hidden\.", "time_embedding.linear_1."), (r"^embed\.out\.", "time_embedding.linear_2."),
        (r"^classes\.table$", "class_embedding.weight"), (r"^first\.", "conv_in."),
        (r"^head\.norm\.", "conv_norm_out."), (r"^head\.conv\.", "conv_out."),
        (r"^down\.(\d+)\.stages\.(\d+)\.residual\.", r"down_blocks.\1.resnets.\2."),
        (r"^down\.(\d+)\.stages\.(\d+)\.attention\.", r"down_blocks.\1.attentions.\2."),
        (r"^down\.(\d+)\.step\.", r"down_blocks.\1.downsamplers.0."), (r"^middle\.before\.", "mid_block.resnets.0."),
        (r"^middle\.attention\.", "mid_block.attentions.0."), (r"^middle\.after\.", "mid_block.resnets.1."),
        (r"^up\.(\d+)\.blocks\.(\d+)\.", r"up_blocks.\1.resnets.\2."),
        (r"^up\.(\d+)\.attentions\.(\d+)\.", r"up_blocks.\1.attentions.\2."),
        (r"^up\.(\d+)\.attention\.", rf"up_blocks.\1.attentions.{last}."),
        (r"^up\.(\d+)\.step\.", r"up_blocks.\1.upsamplers.0."), (r"\.label\.", ".time_emb_proj."),
        (r"\.shortcut\.", ".conv_shortcut."), (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
        (r"(attentions\.\d+)\.out\.", r"\1.to_out.0."),
    ]  # fmt: skip
    value = torch.cat(_take(_renamed(name, rules), left))
    if name == "embed.hidden.weight" and config["flip_sin_to_cos"]:  # diffusers has the cosines first
        return torch.cat(value.chunk(2, dim=1)[::-1], dim=1)
    return value


class BlockwiseDiT(DiT):
    """A DiT whose blocks have embeddings of time and class of their own; the last layer has that of the first block."""

    def __init__(self, channels: int, *, depth: int, classes: int, **options: Any) -> None:
        super().__init__(channels, depth=depth, classes=classes, **options)
        width = self.first.out_channels
        self.others = nn.ModuleList(_OwnEmbedding(copy.deepcopy(self.embed), classes, width) for _ in range(depth - 1))

    def labels(self, time: Tensor, embedding: Tensor | None, label: Any) -> list[Tensor]:
        first = self.embed(time, embedding)
        return [first, *(each(time, label) for each in self.others), first]


class _OwnEmbedding(nn.Module):
    """A block's embedding of time and class."""

    def __init__(self, embed: nn.Module, classes: int, width: int) -> None:
        super().__init__()
        self.embed, self.classes = embed, ClassEmbedding(classes, width)

    def forward(self, time: Tensor, label: Any) -> Tensor:
        embedded: Tensor = self.embed(time, self.classes(label, len(time)))
        return embedded


_OF_EACH_BLOCK = {
    "embed.hidden.weight": "timestep_embedder.linear_1.weight", "embed.hidden.bias": "timestep_embedder.linear_1.bias",
    "embed.out.weight": "timestep_embedder.linear_2.weight", "embed.out.bias": "timestep_embedder.linear_2.bias",
    "classes.table": "class_embedder.embedding_table.weight",
}  # fmt: skip


def _of_blocks(name: str, config: Mapping[str, Any]) -> list[str]:
    """The names that an embedding's tensor has in each block."""
    return [f"transformer_blocks.{i}.norm1.emb.{name}" for i in range(config["num_layers"])]


def _dit(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> DiT:
    _expect(
        config,
        norm_type=("ada_norm_zero",),
        activation_fn=("gelu-approximate",),
        attention_bias=(True,),
        norm_elementwise_affine=(False,),
        norm_eps=(1e-6, 1e-5),  # no norm uses it: adaLN-Zero replaces them, or has an eps of its own
    )
    heads = config["num_attention_heads"]
    shared = True
    for name in _OF_EACH_BLOCK.values():
        copies = [state[each] for each in _of_blocks(name, config) if each in state]
        shared = shared and all(torch.equal(copies[0], copy) for copy in copies)
    return (DiT if shared else BlockwiseDiT)(
        config["in_channels"], out_channels=config["out_channels"], patch=config["patch_size"],
        width=heads * config["attention_head_dim"], depth=config["num_layers"], heads=heads, embedding="sinusoidal",
        dropout=config["dropout"], classes=config["num_embeds_ada_norm"],
    )  # fmt: skip


def _read_dit(name: str, left: dict[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    rules = [
        (r"^first\.", "pos_embed.proj."), (r"^modulation\.", "proj_out_1."), (r"^last\.", "proj_out_2."),
        (r"^blocks\.(\d+)\.modulation\.", r"transformer_blocks.\1.norm1.linear."),
        (r"^blocks\.(\d+)\.qkv\.", r"transformer_blocks.\1.attn1.qkv."),
        (r"^blocks\.(\d+)\.out\.", r"transformer_blocks.\1.attn1.to_out.0."),
        (r"^blocks\.(\d+)\.hidden\.", r"transformer_blocks.\1.ff.net.0.proj."),
        (r"^blocks\.(\d+)\.last\.", r"transformer_blocks.\1.ff.net.2."),
    ]  # fmt: skip
    own = re.match(r"others\.(\d+)\.(.*)", name)
    block, leaf = (int(own[1]) + 1, own[2]) if own else (0, name)
    if leaf not in _OF_EACH_BLOCK:
        return torch.cat(_take(_renamed(name, rules), left))
    # the table's last row, that of no class, is in our network added to the bias of the time's embedding
    table = left[_of_blocks(_OF_EACH_BLOCK["classes.table"], config)[block]] if leaf == "embed.out.bias" else None
    names = _of_blocks(_OF_EACH_BLOCK[leaf], config)
    value, *_ = _take(names[block : block + 1] if config["blockwise"] else names, left)
    if leaf == "embed.hidden.weight":
        return torch.cat(value.chunk(2, dim=1)[::-1], dim=1)
    if leaf == "classes.table":
        return value[:-1] - value[-1]
    return value if table is None else value + table[-1]


_BUILDERS: dict[str, tuple[Any, Any]] = {
    "UNet2DModel": (_unet, _read_unet),
    "DiTTransformer2DModel": (_dit, _read_dit),
}
