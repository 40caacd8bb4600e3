"""A transformer of image patches: DiT with adaLN-Zero (Peebles & Xie 2023, arXiv:2212.09748, section 3).

Four options bring its block to what language models use: normalisation by the root mean square, a gated layer (SwiGLU),
rotary positions, and normalised queries and keys. Yao & Wang 2025 (arXiv:2501.01423, section 4) found them to help.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import HeadNorm, LabelEmbedding, Sinusoidal, Text, attend
from .conditioning import Conditional
from .layers import Dropout, conv, cropped, layer_norm, linear, padded, recomputed, rms_norm

Norm = Literal["layer", "rms"]
FeedForward = Literal["gelu", "swiglu"]
Positions = Literal["absolute", "rotary"]

class DiT(Conditional):
    """F(x, time, /, **condition) -> a tensor of x's shape, (B, channels, H, W), or with `out_channels` in their place.

    `time` is a label of the time, (B,), of the size of 999 t; the conditions are those of `Conditional`. Height and
    width may be anything: they are padded inside to multiples of `patch`, and the output is cropped.

    Args:
        patch: pixels of a token's side.
        width, depth, heads: channels of a token, blocks, heads of attention. The paper's S is 384, 12, 6; B 768, 12,
            12; L 1024, 24, 16; XL 1152, 28, 16.
        embedding: of the time: "transformer" with the paper's frequencies, "sinusoidal" with DDPM's (see `Sinusoidal`).
        dropout: in both branches of each block; the paper has none.
        norm: of tokens: "layer", or "rms", by the root mean square (`rms_norm`).
        feed_forward: behind the attention: "gelu", a layer of 4 width channels, or "swiglu", a gated one of two thirds
            as many, which has the same number of weights.
        positions: "absolute", added to the first tokens, or "rotary": queries and keys are turned by them (`turned`),
            half of their channels by the column and half by the row, so that only differences of positions count.
        qk_norm: normalise queries and keys (`HeadNorm`).
        centered: the data is in [-1, 1]; if False, in [0, 1], and the network begins with 2 x - 1.
        checkpoint_activations: recompute blocks in the backward pass, which saves memory.
        classes, image_channels, text_width, pooled_width: as in `UNet`; tokens of the text are more keys and values.

    Raises ValueError for a width that `heads` or 4 does not divide, for rotary positions of heads whose width is no
    multiple of 4, and for an unknown name.
    """

    def __init__(
        self, channels: int, *, patch: int = 2, width: int = 384, depth: int = 12, heads: int = 6,
        embedding: Literal["transformer", "sinusoidal"] = "transformer", dropout: float = 0.0, norm: Norm = "layer",
        feed_forward: FeedForward = "gelu", positions: Positions = "absolute", qk_norm: bool = False,
        centered: bool = True, checkpoint_activations: bool = False, out_channels: int | None = None,
        classes: int = 0, image_channels: int = 0, text_width: int = 0, pooled_width: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if width % heads or width % 4:
            raise ValueError(f"width={width} must be divisible by heads={heads}, and by 4 for the positions")
        _check(norm=(norm, Norm), feed_forward=(feed_forward, FeedForward), positions=(positions, Positions))
        self.rotary, self.head = positions == "rotary", width // heads
        if self.rotary and self.head % 4:
            raise ValueError(f"rotary positions turn heads of a multiple of 4 channels, not of {self.head}: take other "
                             f"heads than {heads} for width={width}")
        self.patch, self.centered, self.recompute = patch, centered, checkpoint_activations
        self.embed = LabelEmbedding(Sinusoidal(256, ends=embedding == "sinusoidal"), width, F.silu)
        self.learn_conditions(width, F.silu, classes, image_channels, text_width, pooled_width)
        if self.classes is not None:
            with torch.no_grad():
                self.classes.table.mul_(0.02)  # the published deviation
        self.first = conv(channels + image_channels, width, patch, stride=patch, padding=0)
        self.blocks = nn.ModuleList(
            DiTBlock(width, heads, dropout, text_width, norm=norm, feed_forward=feed_forward, qk_norm=qk_norm)
            for _ in range(depth)
        )
        self.norm = _NORMS[norm]
        self.modulation = linear(width, 2 * width, scale=0.0)
        self.last = linear(width, patch**2 * (out_channels or channels), scale=0.0)

    def forward(self, x: Tensor, time: Tensor, /, **condition: Any) -> Tensor:
        conditions, size = self.conditions(x, **condition), x.shape[2:]
        x = padded(x if conditions.image is None else torch.cat([x, conditions.image], dim=1), self.patch)
        h = self.first(x if self.centered else 2 * x - 1)  # (B, width, rows, columns)
        rows, columns = h.shape[2:]
        at = angles(rows, columns, self.head, h) if self.rotary else None
        where = 0.0 if self.rotary else positions(rows, columns, h)
        h = h.flatten(2).transpose(1, 2) + where
        *labels, label = self.labels(time, conditions.embedding, condition.get("label"))
        for block, each in zip(self.blocks, labels, strict=True):
            run = partial(recomputed, block) if self.recompute else block
            h = run(h, each, conditions.text, at)
        shift, scale = self.modulation(label)[:, None].chunk(2, dim=2)
        h = self.last(self.norm(h) * (1 + scale) + shift)
        pixels = h.unflatten(2, (self.patch, self.patch, -1)).unflatten(1, (rows, columns))  # (B, R, C, p, p, channels)
        return cropped(pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3), size)

    def labels(self, time: Tensor, embedding: Tensor | None, label: Any) -> list[Tensor]:
        """The embedding (B, width) of time and conditions for each block, and behind these for the last layer."""
        return [self.embed(time, embedding)] * (len(self.blocks) + 1)


def _check(**options: tuple[str, Any]) -> None:
    """Raise ValueError for a name that is no value of its option."""
    for name, (value, kind) in options.items():
        if value not in get_args(kind):
            raise ValueError(f"unknown {name} {value!r}; use one of {', '.join(map(repr, get_args(kind)))}")


class DiTBlock(nn.Module):
    """x + gate attention(norm(x) (1 + scale) + shift), then the same with two layers in place of the attention.

    Gates, scales and shifts, six in all, are linear in the embedded label and 0 at first: adaLN-Zero.
    """

    def __init__(
        self, width: int, heads: int, dropout: float, text_width: int, *, norm: Norm = "layer",
        feed_forward: FeedForward = "gelu", qk_norm: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.gated = heads, feed_forward == "swiglu"
        hidden = round(8 * width / 3) if self.gated else 4 * width
        self.modulation = linear(width, 6 * width, scale=0.0)
        self.qkv = linear(width, 3 * width)
        self.text = linear(text_width, 2 * width) if text_width else None
        self.out = linear(width, width)
        self.hidden = linear(width, 2 * hidden if self.gated else hidden)
        self.last = linear(hidden, width)
        self.dropout = Dropout(dropout)
        self.head_norm = HeadNorm(width // heads) if qk_norm else None
        self.norm = _NORMS[norm]

    def forward(self, x: Tensor, label: Tensor, text: Text | None, angles: Tensor | None = None) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(label)[:, None].chunk(6, dim=2)
        qkv = self.qkv(self.norm(x) * (1 + scale) + shift)
        h = attend(qkv, self.heads, self.text, text, self.head_norm, angles)
        x = x + gate * self.dropout(self.out(h))
        h = self._activated(self.hidden(self.norm(x) * (1 + scale2) + shift2))
        return x + gate2 * self.dropout(self.last(h))

    def _activated(self, h: Tensor) -> Tensor:
        """GELU, or SwiGLU: silu of one half times the other (Shazeer 2020, arXiv:2002.05202)."""
        if not self.gated:
            return F.gelu(h, approximate="tanh")
        gate, value = h.chunk(2, dim=2)
        return F.silu(gate) * value


def _layer_norm(x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], eps=1e-6)


def _rms_norm(x: Tensor) -> Tensor:
    return rms_norm(x, x.shape[-1:])


_NORMS: dict[str, Callable[[Tensor], Tensor]] = {"layer": _layer_norm, "rms": _rms_norm}


def positions(rows: int, columns: int, like: Tensor) -> Tensor:
    """Positional embedding (rows columns, width) for `like` (B, width, ...), in its type: columns, then rows.

    Each half has sines, then cosines of the coordinate times 10000^(-i/(width/4)), in the published order.
    """
    column, row = angles(rows, columns, like.shape[1], like).chunk(2, dim=1)
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1).to(like.dtype)


def angles(rows: int, columns: int, width: int, like: Tensor) -> Tensor:
    """(rows columns, width/2): the column, then the row times 10000^(-i/(width/4)), in float32 or wider."""
    quarter = width // 4
    wide = torch.promote_types(like.dtype, torch.float32)
    index = torch.arange(quarter, dtype=wide, device=like.device)
    frequencies = torch.exp(index * (-math.log(10_000) / quarter))
    column, row = (torch.arange(n, dtype=wide, device=like.device)[:, None] * frequencies for n in (columns, rows))
    column, row = column[None].expand(rows, -1, -1), row[:, None].expand(-1, columns, -1)
    return torch.cat([column, row], dim=2).flatten(0, 1)
