"""What a model is given of its examples: the label, the caption, the image at a lower resolution.

In training these come with the data, and `left_out` makes the model unconditional for some examples; a model that was
trained so can be guided.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from ml_collections import ConfigDict
from torch import Tensor

from ..config.build import takes_labels
from ..data.captions import Text
from ..data.codecs import Codec
from ..data.sets import Split, shrink
from ..machine.devices import sent
from ..models.base import absent
from ..sdes.linear import SDE

Conditions = dict[str, Tensor]


def of_data(config: ConfigDict, split: Split, index: Tensor, text: Text | None) -> Conditions:
    """Labels and captions of a split's examples at `index`, (B,) on the CPU, as the model takes them; `text` is of the
    data's captions.

    Raises ValueError where the split has none.
    """
    found: Conditions = {}
    where = sent(index, split.device)
    if takes_labels(config):
        if split.y is None:
            raise ValueError("the model takes labels, and these examples have none: set eval.conditional=False")
        found["label"] = split.y[where]
    if config.model.text_encoder:
        if split.caption is None or text is None:
            raise ValueError("the model takes captions, and these examples have none: set eval.conditional=False")
        found |= text.condition(split.caption[where])
    return found


def left_out(conditions: Conditions, dropped: Tensor) -> Conditions:
    """All of them left out, together, for the examples where `dropped`, (B,), is true (Ho & Salimans 2022)."""
    dropped = sent(dropped, next(iter(conditions.values())).device)
    return {
        name: torch.where(dropped.reshape(-1, *[1] * (value.ndim - 1)), absent(value), value)
        for name, value in conditions.items()
    }


def low_resolution(
    k: Tensor, factor: int, codec: Codec, sde: SDE, augmentation: Tensor, noise: Callable[[Tensor], Tensor]
) -> Conditions:
    """Images k (B, C, H, W) at 1/factor of their size, noised to the times `augmentation`, (B,) in [0, 1].

    A stage of a cascade that was trained on noisy images forgives the errors of the stage before (Ho et al. 2022,
    arXiv:2106.15282, section 4.2); it is told how noisy they are.
    """
    return augmented(codec.encode(shrink(k, factor)), sde, augmentation, noise)


def augmented(image: Tensor, sde: SDE, augmentation: Tensor, noise: Callable[[Tensor], Tensor]) -> Conditions:
    """The conditions `image` and `augmentation`: images noised to these times, and left as they are for time 0."""
    noised = sde.perturb(image, augmentation, noise(image))
    augmentation = sent(augmentation, image.device, image.dtype)
    clean = augmentation.reshape(-1, *[1] * (image.ndim - 1)) == 0
    return {"image": torch.where(clean, image, noised), "augmentation": augmentation}
