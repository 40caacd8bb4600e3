"""A residual MLP: the network for vectors."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Fourier, LabelEmbedding, Sinusoidal
from .conditioning import Conditional
from .layers import Dropout, linear


class MLP(Conditional):
    """F(x, time, /, **condition) -> a tensor of x's shape, (B, features), or (B, out_features).

    It has `depth` residual layers of `width` channels, and can be conditioned on `label`. Sinusoidal embeddings suit
    labels as 999 t, Fourier ones positive labels as sigma; `time` and conditions are as in `UNet`.
    """

    def __init__(
        self, features: int, *,
        width: int = 128, depth: int = 3, embedding: Literal["sinusoidal", "fourier"] = "sinusoidal",
        fourier_scale: float = 1.0, dropout: float = 0.0, out_features: int | None = None, classes: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        label = Sinusoidal(width) if embedding == "sinusoidal" else Fourier(width, fourier_scale)
        self.embed = LabelEmbedding(label, width, F.silu)
        self.learn_conditions(width, F.silu, classes)
        self.first = linear(features, width)
        # Slopes of order 1 and kinks all over the data: with `linear`'s slopes of order 1/sqrt(width) and no biases the
        # layer is all but affine at first, and training begins with a long plateau where the model is a Gaussian.
        nn.init.normal_(self.first.weight, std=2 / math.sqrt(features))
        nn.init.normal_(self.first.bias)
        self.layers = nn.ModuleList(MLPLayer(width, dropout) for _ in range(depth))
        self.last = linear(width, out_features or features, scale=0.0)

    def forward(self, x: Tensor, time: Tensor, /, **condition: Any) -> Tensor:
        embedded = self.embed(time, self.conditions(x, **condition).embedding)
        h = self.first(x)
        for layer in self.layers:
            h = layer(h, embedded)
        return self.last(F.silu(h))


class MLPLayer(nn.Module):
    """h + out(silu(inner(silu(h)) + label))."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.inner = linear(width, width)
        self.label = linear(width, width)
        self.dropout = Dropout(dropout)
        self.out = linear(width, width, scale=0.0)

    def forward(self, h: Tensor, label: Tensor) -> Tensor:
        return h + self.out(self.dropout(F.silu(self.inner(F.silu(h)) + self.label(label))))
