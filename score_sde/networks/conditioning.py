"""How a network is conditioned on more than the time: on a class, a low-resolution image with its noise level, text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..machine.devices import sent
from .blocks import LabelEmbedding, Sinusoidal, Text
from .layers import linear


class ClassEmbedding(nn.Module):
    """Class labels to (B, outputs): a row of a table for each, zeros for -1, which means no label.

    It is added to the embedding of the time (Dhariwal & Nichol 2021, section 4.1).
    """

    def __init__(self, classes: int, outputs: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(classes, outputs))

    def forward(self, label: Any, batch: int) -> Tensor:
        """`label` is an integer, or integers (B,); None is -1. Raises ValueError for a class that does not exist."""
        label = torch.as_tensor(-1 if label is None else label)
        if label.ndim > 1 or label.is_floating_point() or (label.ndim and len(label) != batch):
            raise ValueError(
                f"label must be an integer or {batch} of them, one for each example, got {label.dtype} of shape "
                f"{tuple(label.shape)}"
            )
        if label.device.type == "cpu" and label.numel() and not -1 <= label.min() <= label.max() < len(self.table):
            raise ValueError(
                f"label must lie in 0..{len(self.table) - 1}, or be -1 for none, got {label.min()} to {label.max()}"
            )
        label = sent(label, self.table.device).expand(batch)
        return self.rows()[label.clamp_min(0)] * (label >= 0)[:, None]

    def rows(self) -> Tensor:
        """The embedding of each class, (classes, outputs)."""
        return self.table


class Conditions(NamedTuple):
    """Conditions as a network uses them; None where the network was built without that condition."""

    embedding: Tensor | None  # (B, outputs), to be added to the time's
    image: Tensor | None  # (B, C', *size of x), to join x's channels
    text: Text | None  # for the attention


class Conditional(nn.Module):
    """A network F(x, time, /, **condition), which takes the conditions that `learn_conditions` builds layers for.

    label: a class, or (B,) of them; it is added to the time's embedding.
    image: (B, C', ...) of any size, brought to x's by interpolation (bicubic for images, Saharia et al. 2021,
        arXiv:2104.07636) and put behind x's channels; in x's range.
    augmentation: (B,) in [0, 1], how far noise was added to `image`, added to the time's embedding (Ho et al. 2022,
        arXiv:2106.15282, conditioning augmentation: the time of its diffusion); 0 is none.
    text: (B, L, D) tokens, for the attention; with `mask` (B, L), False where there is no token. Without a mask, a
        token of zeros counts as none.
    pooled: (B, P), a summary of the text, mapped linearly and added to the time's embedding (Saharia et al. 2022,
        arXiv:2205.11487).

    None means the same as what `models.base.absent` gives: -1, zeros, False. Raises ValueError for a condition that the
    network was built without, and for another shape.
    """

    classes: ClassEmbedding | None
    augmentation: LabelEmbedding | None
    tokens: nn.LayerNorm | None
    pooled: nn.Linear | None

    def learn_conditions(
        self, outputs: int, activation: Callable[[Tensor], Tensor], classes: int = 0, image_channels: int = 0,
        text_width: int = 0, pooled_width: int = 0,
    ) -> None:  # fmt: skip
        """Build the layers; `outputs` is the width of the time's embedding, and 0 leaves a condition out."""
        self.classes = ClassEmbedding(classes, outputs) if classes else None
        self.image_channels = image_channels
        self.augmentation = None
        if image_channels:
            self.augmentation = LabelEmbedding(Sinusoidal(outputs // 4), outputs, activation)
        self.tokens = nn.LayerNorm(text_width) if text_width else None
        self.pooled = linear(pooled_width, outputs) if pooled_width else None
        if self.pooled is not None:
            self.pooled.register_parameter("bias", None)  # the absent summary, zeros, adds nothing

    def conditions(
        self, x: Tensor, label: Any = None, image: Tensor | None = None, augmentation: Tensor | None = None,
        text: Tensor | None = None, mask: Tensor | None = None, pooled: Tensor | None = None,
    ) -> Conditions:  # fmt: skip
        """The conditions of a batch x as this network uses them."""
        embeddings = []
        if self.classes is None:
            refuse(label, "label", "model.class_conditional=True")
        else:
            embeddings.append(self.classes(label, len(x)))
        low = self._image(x, image, augmentation)
        if self.augmentation is not None:
            level = torch.as_tensor(0.0 if augmentation is None else augmentation)
            if level.shape not in ((), (len(x),)):
                raise ValueError(f"augmentation must be a number or {len(x)} of them, got shape {tuple(level.shape)}")
            # in float32 at least, as labels of the time are: bfloat16 would round 999 level to whole numbers
            level = sent(level, x.device, torch.promote_types(x.dtype, torch.float32)).expand(len(x))
            embeddings.append(self.augmentation.before(999 * level))
        if self.pooled is None:
            refuse(pooled, "pooled", "model.pooled_width")
        elif pooled is not None:
            check(pooled, "pooled", (len(x), self.pooled.in_features))
            embeddings.append(self.pooled(sent(pooled, x.device, self.pooled.weight.dtype)))
        total = sum(embeddings[1:], embeddings[0]) if embeddings else None
        return Conditions(total, low, self._text(x, text, mask))

    def _image(self, x: Tensor, image: Tensor | None, augmentation: Tensor | None) -> Tensor | None:
        if not self.image_channels:
            refuse(image, "image", "model.image_channels")
            refuse(augmentation, "augmentation", "model.image_channels")
            return None
        if image is None:
            return x.new_zeros(len(x), self.image_channels, *x.shape[2:])
        if image.ndim != x.ndim or image.shape[:2] != (len(x), self.image_channels):
            raise ValueError(
                f"image must have {x.ndim} axes, the first of {len(x)} examples and the second of "
                f"{self.image_channels} channels, got shape {tuple(image.shape)}"
            )
        return resize(sent(image, x.device, x.dtype), x.shape[2:])

    def _text(self, x: Tensor, text: Tensor | None, mask: Tensor | None) -> Text | None:
        if self.tokens is None:
            refuse(text, "text", "model.text_width")
            return None
        if text is None:
            if mask is not None and bool(mask.any()):
                raise ValueError("mask says where text has tokens, but text is missing: give both, or neither")
            return None
        check(text, "text", (len(x), text.shape[1] if text.ndim > 1 else 0, *self.tokens.normalized_shape))
        if mask is None:
            mask = (text != 0).any(2)
        check(mask, "mask", tuple(text.shape[:2]))
        if mask.dtype != torch.bool:
            raise ValueError(f"mask must be True where there is a token and False elsewhere, got {mask.dtype}")
        return Text(self.tokens(sent(text, x.device, self.tokens.weight.dtype)), sent(mask, x.device))


def resize(image: Tensor, size: torch.Size) -> Tensor:
    """(B, C, ...) at another size: bicubic for images, (multi)linear for signals and volumes."""
    if image.shape[2:] == size:
        return image
    mode = {1: "linear", 2: "bicubic", 3: "trilinear"}[len(size)]
    return F.interpolate(image, size=tuple(size), mode=mode, align_corners=False)


def refuse(value: Any, name: str, key: str) -> None:
    if value is not None:
        raise ValueError(f"the network takes no condition {name}: leave it out, or train a network with {key}")


def check(value: Tensor, name: str, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
