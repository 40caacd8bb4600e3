"""Weights of diffusers' UNet2DModel and DiTTransformer2DModel, read into this package's networks by a key map.

Such a model is a folder of `config.json` and `diffusion_pytorch_model.safetensors`; diffusers is not needed to read it.
Names correspond one to one, but that they keep q, k and v apart and count attention's weights as of fully connected
layers, and that the DiT has a copy of its time and class embeddings in each block. What is read computes what diffusers
does, and so, of the DiTs that it converted from their authors', with the frequencies 10000^(-i/127) of the time where
those have 10000^(-i/128).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .networks import DiT, UNet
from .tensor_file import read_tensors

WEIGHTS = "diffusion_pytorch_model.safetensors"


def load_network(folder: str | Path) -> UNet | DiT:
    """The network in a folder that diffusers' `save_pretrained` wrote, in evaluation mode.

    Its labels are theirs: the index of a step of the chain. Raises FileNotFoundError for files that are missing, and
    ValueError for a broken one and for an option that has no counterpart here.
    """
    folder = Path(folder)
    for name in ("config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"there is no {folder / name}: give the folder of one model of diffusers'")
    return network_from(read_tensors(folder / WEIGHTS), json.loads((folder / "config.json").read_text()))


def network_from(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> UNet | DiT:
    """Our network with their weights, in their precision; `config` is their model's, with `_class_name`.

    Raises ValueError for another class, for an option without counterpart, and unless every tensor is used.
    """
    kind = config.get("_class_name")
    if kind not in _BUILDERS:
        raise ValueError(f"a model of diffusers' must be one of {', '.join(_BUILDERS)}, got {kind}")
    build, read = _BUILDERS[kind]
    network = build(config).to(next(iter(state.values())).dtype)
    left = dict(state)
    ours = {}
    for name, tensor in network.state_dict().items():
        value = read(name, left, config)
        if value.shape != tensor.shape and value.numel() != tensor.numel():
            raise ValueError(f"the config makes {name} {tuple(tensor.shape)}, the weights {tuple(value.shape)}")
        ours[name] = value.reshape(tensor.shape)
    if left:
        raise ValueError(f"the weights have {len(left)} tensors that the network does not know, such as {min(left)}")
    network.load_state_dict(ours)
    return network.eval()


def _take(names: list[str], left: dict[str, Tensor]) -> list[Tensor]:
    """The tensors of these names, which are then used."""
    missing = next((name for name in names if name not in left), None)
    if missing is not None:
        raise ValueError(f"the weights lack {missing}, which their config asks for")
    return [left.pop(name) for name in names]


def _renamed(name: str, rules: list[tuple[str, str]]) -> list[str]:
    """Their names of our tensor: three for q, k and v."""
    for pattern, theirs in rules:
        name = re.sub(pattern, theirs, name)
    return [name.replace("qkv", f"to_{part}") for part in "qkv"] if "qkv" in name else [name]


def _expect(config: Mapping[str, Any], **wanted: tuple[Any, ...]) -> None:
    for key, values in wanted.items():
        if key in config and config[key] not in values:
            among = " or ".join(map(repr, values))
            raise ValueError(f"{key} of a model of diffusers' must be {among} to be read here, got {config[key]!r}")


def _unet(config: Mapping[str, Any]) -> UNet:
    down, up, widths = config["down_block_types"], config["up_block_types"], config["block_out_channels"]
    resnet = config.get("downsample_type") == "resnet"
    _expect(
        config,
        center_input_sample=(False,),
        time_embedding_type=("positional",),
        time_embedding_dim=(None,),
        freq_shift=(0, 1),
        mid_block_type=("UNetMidBlock2D",),
        mid_block_scale_factor=(1,),
        downsample_padding=(0, 1) if resnet else (0,),
        upsample_type=(config.get("downsample_type", "conv"),),
        resnet_time_scale_shift=("default", "scale_shift"),
        add_attention=(True,),
        class_embed_type=(None,),
        act_fn=("silu", "swish"),
    )
    attends = [kind.startswith("Attn") for kind in down]
    plain, attending = "Resnet{}sampleBlock2D" if resnet else "{}Block2D", "Attn{}Block2D"
    kinds = [attending if attend else plain for attend in attends]
    mirrored = [kind.format("Down") for kind in kinds], [kind.format("Up") for kind in reversed(kinds)]
    if (list(down), list(up)) != mirrored:
        raise ValueError(f"blocks of a UNet2DModel must be {mirrored} to be read here, got {(down, up)}")
    scale_shift = config.get("resnet_time_scale_shift", "default") == "scale_shift"
    if scale_shift and config.get("attn_norm_num_groups") != config.get("norm_num_groups", 32):
        raise ValueError("attn_norm_num_groups of a model of diffusers' must be its norm_num_groups to be read here")
    size = 2 ** len(widths)
    return UNet(
        config.get("in_channels", 3),
        out_channels=config.get("out_channels", 3),
        width=widths[0],
        multipliers=[width / widths[0] for width in widths],
        blocks=config.get("layers_per_block", 2),
        attention=[size // 2**i for i, attend in enumerate(attends) if attend],
        image_size=size,
        dropout=config.get("dropout", 0.0),
        block="biggan" if resnet else "ddpm",
        embedding="sinusoidal" if config.get("freq_shift", 0) else "transformer",
        skip_rescale=False,
        groups=config.get("norm_num_groups", 32),
        norm_eps=config.get("norm_eps", 1e-5),
        scale_shift=scale_shift,
        head_channels=config.get("attention_head_dim", 8) or 0,
        attend_each=True,
        project=False,
        classes=config.get("num_class_embeds") or 0,
    )


_RESIDUAL = [
    (r"\.label\.", ".time_emb_proj."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.out\.", r"\1.to_out.0."),
]


def _read_unet(name: str, left: dict[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    last = config.get("layers_per_block", 2)  # an upper level has one block, and so one attention, more
    rules = [
        (r"^embed\.hidden\.", "time_embedding.linear_1."),
        (r"^embed\.out\.", "time_embedding.linear_2."),
        (r"^classes\.table$", "class_embedding.weight"),
        (r"^first\.", "conv_in."),
        (r"^head\.norm\.", "conv_norm_out."),
        (r"^head\.conv\.", "conv_out."),
        (r"^down\.(\d+)\.stages\.(\d+)\.residual\.", r"down_blocks.\1.resnets.\2."),
        (r"^down\.(\d+)\.stages\.(\d+)\.attention\.", r"down_blocks.\1.attentions.\2."),
        (r"^down\.(\d+)\.step\.", r"down_blocks.\1.downsamplers.0."),
        (r"^middle\.before\.", "mid_block.resnets.0."),
        (r"^middle\.attention\.", "mid_block.attentions.0."),
        (r"^middle\.after\.", "mid_block.resnets.1."),
        (r"^up\.(\d+)\.blocks\.(\d+)\.", r"up_blocks.\1.resnets.\2."),
        (r"^up\.(\d+)\.attentions\.(\d+)\.", r"up_blocks.\1.attentions.\2."),
        (r"^up\.(\d+)\.attention\.", rf"up_blocks.\1.attentions.{last}."),
        (r"^up\.(\d+)\.step\.", r"up_blocks.\1.upsamplers.0."),
        *_RESIDUAL,
    ]
    value = torch.cat(_take(_renamed(name, rules), left))
    if name == "embed.hidden.weight" and config.get("flip_sin_to_cos", True):  # cosines come first there
        return torch.cat(value.chunk(2, dim=1)[::-1], dim=1)
    return value


def _dit(config: Mapping[str, Any]) -> DiT:
    _expect(
        config,
        norm_type=("ada_norm_zero",),
        activation_fn=("gelu-approximate",),
        attention_bias=(True,),
        norm_elementwise_affine=(False,),
        norm_eps=(1e-6, 1e-5),  # of norms that adaLN-Zero replaces, but for one that has its own
    )
    heads = config.get("num_attention_heads", 16)
    return DiT(
        config.get("in_channels", 4),
        out_channels=config.get("out_channels"),
        patch=config.get("patch_size", 2),
        width=heads * config.get("attention_head_dim", 72),
        depth=config.get("num_layers", 28),
        heads=heads,
        embedding="sinusoidal",
        dropout=config.get("dropout", 0.0),
        classes=config.get("num_embeds_ada_norm", 1000),
    )


def _read_dit(name: str, left: dict[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    rules = [
        (r"^first\.", "pos_embed.proj."),
        (r"^modulation\.", "proj_out_1."),
        (r"^last\.", "proj_out_2."),
        (r"^blocks\.(\d+)\.modulation\.", r"transformer_blocks.\1.norm1.linear."),
        (r"^blocks\.(\d+)\.qkv\.", r"transformer_blocks.\1.attn1.qkv."),
        (r"^blocks\.(\d+)\.out\.", r"transformer_blocks.\1.attn1.to_out.0."),
        (r"^blocks\.(\d+)\.hidden\.", r"transformer_blocks.\1.ff.net.0.proj."),
        (r"^blocks\.(\d+)\.last\.", r"transformer_blocks.\1.ff.net.2."),
    ]
    shared = {
        "embed.hidden.weight": "timestep_embedder.linear_1.weight",
        "embed.hidden.bias": "timestep_embedder.linear_1.bias",
        "embed.out.weight": "timestep_embedder.linear_2.weight",
        "embed.out.bias": "timestep_embedder.linear_2.bias",
        "classes.table": "class_embedder.embedding_table.weight",
    }
    if name not in shared:
        return torch.cat(_take(_renamed(name, rules), left))
    where = [f"transformer_blocks.{i}.norm1.emb." for i in range(config.get("num_layers", 28))]
    if name == "embed.out.bias":  # the row of no class, the table's last, is here part of the time's embedding
        nothing = left[where[0] + shared["classes.table"]][-1]
    value, *others = _take([at + shared[name] for at in where], left)
    if any(not torch.equal(value, other) for other in others):
        raise ValueError(f"the blocks have different {shared[name]}, and this package's DiT one for all")
    if name == "embed.hidden.weight":
        return torch.cat(value.chunk(2, dim=1)[::-1], dim=1)
    if name == "classes.table":
        return value[:-1] - value[-1]
    return value + nothing if name == "embed.out.bias" else value


_BUILDERS: dict[str, tuple[Any, Any]] = {
    "UNet2DModel": (_unet, _read_unet),
    "DiTTransformer2DModel": (_dit, _read_dit),
}
