"""EDM2's U-Net, whose layers preserve magnitudes (Karras et al. 2024, arXiv:2312.02696, configuration G, figure 21)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import attend, spread
from .conditioning import Conditional
from .layers import Dropout, cropped, padded, recomputed
from .levels import LevelOptions
from .magnitude import MPClasses, MPConv, MPFourier, mp_cat, mp_silu, mp_sum, normalise_, unit
from .resample import down, up

RESIDUAL = ATTENTION = 0.3  # the share t of a branch in `mp_sum` with what it is added to
CLASS = 0.5  # that of the class in the embedding
LIMIT = 256.0  # of features, for half precision


class EDM2(Conditional):
    """F(x, time, /, **condition) -> a tensor of x's shape, (B, channels, H, W), or with `out_channels` in their place.

    With `dimensions` 1 it takes signals, (B, channels, L), and with 3 volumes, (B, channels, D, H, W). `time` is a
    label of order 1, (B,): EDM's is log(sigma/alpha)/4. The only condition is `label`, a class. Input and output have
    magnitude 1 if EDM's preconditioning is around the network, which returns 0 before it is trained.

    In training, each evaluation begins with forced weight normalisation (`magnitude.normalise_`), which sets the rows
    of all weights to magnitude 1. In evaluation no weight changes: rows are normalised as they are used, those of
    averaged weights too.

    Lengths may be anything: they are padded inside to multiples of 2^(levels - 1), by repeating the border, and the
    output is cropped.

    Args:
        width: channels of the finest level; level i has width * multipliers[i] and 1/2^i of the resolution. The paper's
            XS has 128, S 192, M 256, L 320, XL 384, XXL 448.
        blocks: of a level on the way down; one more on the way up.
        attention, image_size: there is self-attention in the levels i where image_size // 2^i is in `attention`, and
            always at the bottom.
        head_channels, heads: channels of each head, or if 0 the number of heads.
        dropout: in the branch of each block.
        centered: the data is in [-1, 1]; if False, in [0, 1], and the network begins with 2 x - 1.
        checkpoint_activations: recompute blocks in the backward pass, which saves memory.
        classes: number of classes of the condition `label`; 0: none.

    Raises ValueError if the heads do not divide a level's channels.
    """

    def __init__(
        self, channels: int, *, width: int = 192, multipliers: Sequence[float] = (1, 2, 3, 4), blocks: int = 3,
        attention: Sequence[int] = (16, 8), image_size: int = 64, head_channels: int = 64, heads: int = 1,
        dropout: float = 0.0, centered: bool = True, checkpoint_activations: bool = False, dimensions: int = 2,
        out_channels: int | None = None, classes: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        label_width = max(round(width * m) for m in multipliers)
        o = LevelOptions(
            width=width, multipliers=multipliers, blocks=blocks, attention=attention, image_size=image_size,
            head_channels=head_channels, heads=heads, dropout=dropout, centered=centered, dimensions=dimensions,
            checkpoint_activations=checkpoint_activations, label_width=label_width,
        )  # fmt: skip
        finest = o.levels[0][0]
        self.centered, self.multiple = centered, o.multiple
        self.waves = MPFourier(finest)
        self.embed = MPConv(finest, label_width)
        self.learn_conditions(label_width, mp_silu)
        self.classes = MPClasses(classes, label_width) if classes else None
        self.first = MPConv(channels + 1, finest, 3, dimensions)
        self.down, skips = _way_down(o)
        self.up = _way_up(skips, o)
        self.last = MPConv(finest, out_channels or channels, 3, dimensions)
        self.gain = nn.Parameter(torch.zeros([]))

    def forward(self, x: Tensor, time: Tensor, /, **condition: Any) -> Tensor:
        if self.training:
            normalise_(self)
        size, embedded = x.shape[2:], self._embedded(time, self.conditions(x, **condition).embedding)
        x = padded(x if self.centered else 2 * x - 1, self.multiple)
        h = self.first(torch.cat([x, torch.ones_like(x[:, :1])], dim=1))  # ones in place of a bias
        skips = [h]
        for block in self.down:
            h = block(h, embedded)
            skips.append(h)
        for block in self.up:
            h = block(mp_cat(h, skips.pop()) if block.joins else h, embedded)
        return cropped(self.last(h, self.gain), size)

    def _embedded(self, time: Tensor, label: Tensor | None) -> Tensor:
        kind = self.embed.weight.dtype
        # float32 for networks in half precision, as in `LabelEmbedding`
        h = self.embed(self.waves(time.to(torch.promote_types(kind, torch.float32))).to(kind))
        return mp_silu(h if label is None else mp_sum(h, label, CLASS))


class EDM2Block(nn.Module):
    """A residual block, and attention if it `attends`: (B, inputs, ...) to (B, outputs, ...).

    On the way down the block begins with pixel norm, behind the convolution of the shortcut, which stands at the end of
    the main branch on the way up. The label scales the features of the branch. A block that `joins` takes a skip beside
    the features before it.
    """

    def __init__(
        self, inputs: int, outputs: int, o: LevelOptions, *, decodes: bool, attends: bool = False,
        resample: nn.Module | None = None, joins: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        assert o.label_width is not None
        d = o.dimensions
        self.decodes, self.joins, self.recompute = decodes, joins, o.checkpoint_activations
        self.resample = resample or nn.Identity()
        self.label = MPConv(o.label_width, outputs)
        self.gain = nn.Parameter(torch.zeros([]))
        self.inner = MPConv(inputs if decodes else outputs, outputs, 3, d)
        self.dropout = Dropout(o.dropout)
        self.outer = MPConv(outputs, outputs, 3, d)
        self.shortcut = nn.Identity() if inputs == outputs else MPConv(inputs, outputs, 1, d)
        self.attention = MPAttention(outputs, o) if attends else nn.Identity()

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return recomputed(self.block, x, label) if self.recompute else self.block(x, label)

    def block(self, x: Tensor, label: Tensor) -> Tensor:
        x = self.resample(x)
        if not self.decodes:
            x = unit(self.shortcut(x), [1])
        h = self.inner(mp_silu(x)) * spread(self.label(label, self.gain) + 1, x.ndim)
        h = self.outer(self.dropout(mp_silu(h)))
        h = mp_sum(self.shortcut(x) if self.decodes else x, h, RESIDUAL)
        return self.attention(h).clamp(-LIMIT, LIMIT)


class MPAttention(nn.Module):
    """Cosine attention: each head's queries, keys and values have magnitude 1, so that logits are bounded."""

    def __init__(self, channels: int, o: LevelOptions) -> None:
        super().__init__()
        self.heads = o.heads_of(channels)
        self.qkv, self.out = MPConv(channels, 3 * channels), MPConv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x.flatten(2).transpose(1, 2)).unflatten(2, (3 * self.heads, -1))
        h = self.out(attend(unit(qkv, [3]).flatten(2), self.heads))
        return mp_sum(x, h.transpose(1, 2).reshape(x.shape), ATTENTION)


def _way_down(o: LevelOptions) -> tuple[nn.ModuleList, list[int]]:
    """The blocks of the way down, and the channels of the skips that they and the first convolution leave."""
    blocks, skips = nn.ModuleList(), [o.levels[0][0]]
    for i, (outputs, attends) in enumerate(o.levels):
        if i > 0:
            above = skips[-1]
            blocks.append(EDM2Block(above, above, o, decodes=False, resample=down(None, o.dimensions)))
            skips.append(above)
        for _ in range(o.blocks):
            blocks.append(EDM2Block(skips[-1], outputs, o, decodes=False, attends=attends))
            skips.append(outputs)
    return blocks, skips


def _way_up(skips: Sequence[int], o: LevelOptions) -> nn.ModuleList:
    """The blocks of the way up, which begin with two at the bottom and take the skips from the last on."""
    left, h = list(skips), skips[-1]
    blocks = nn.ModuleList([EDM2Block(h, h, o, decodes=True, attends=True), EDM2Block(h, h, o, decodes=True)])
    for i, (outputs, attends) in enumerate(reversed(o.levels)):
        if i > 0:
            blocks.append(EDM2Block(h, h, o, decodes=True, resample=up(None, o.dimensions)))
        for _ in range(o.blocks + 1):
            blocks.append(EDM2Block(h + left.pop(), outputs, o, decodes=True, attends=attends, joins=True))
            h = outputs
    return blocks
