"""A classifier of noisy examples: log P(y | x_t), for guidance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..machine.devices import sent
from ..sdes.linear import SDE, WrongShape, like
from .base import at, in_precision_of
from .rules import TimeMap, label_time, unscaled


class NoisyClassifier(nn.Module):
    """log P(y | x_t) of the classes y, by a network that is told the noise level (Song et al. 2021, section 5).

    Trained by cross-entropy on x_t = alpha x_0 + sigma z, it approaches the posterior of the data's own classes, of any
    t in one network. Called with a label, it is a `log_prob` for `classifier`.

    Args:
        network: module F(x, label) -> logits (B, classes), with a label of shape (B,), both given by position.
        sde: whose states are classified.
        classes: how many there are.
        label, scale: (alpha, sigma, t) -> (B,): what the network is told of the time, and a factor of its input.
    """

    def __init__(
        self, network: nn.Module, sde: SDE, classes: int, label: TimeMap = label_time, scale: TimeMap = unscaled
    ) -> None:
        super().__init__()
        self.network, self.sde, self.classes, self.label, self.scale = network, sde, classes, label, scale

    def log_probs(self, x: Tensor, t: Tensor) -> Tensor:
        """Of all classes, (B, classes), in the dtype of x; x is (B, *shape), t () or (B,)."""
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        label = sent(self.label(alpha, sigma, t), x.device, x.dtype).expand(x.shape[0])
        scaled = x if self.scale is unscaled else like(self.scale(alpha, sigma, t), x) * x
        logits = self.network(in_precision_of(self.network, scaled), label)
        if logits.shape != (len(x), self.classes):
            raise WrongShape(
                f"the network returned shape {tuple(logits.shape)} for {len(x)} examples of {self.classes} classes at "
                f"{at(t)}"
            )
        return torch.log_softmax(logits.to(x.dtype), 1)

    def forward(self, x: Tensor, t: Tensor, label: Any) -> Tensor:
        """log P(label | x_t), (B,), of one label or of (B,), where -1 is none, with the probability 1.

        Raises ValueError for a class that does not exist.
        """
        chosen = torch.as_tensor(label)
        on_cpu = chosen.device.type == "cpu"  # elsewhere a look at them would wait for the device in every step
        if chosen.is_floating_point() or (on_cpu and bool(((chosen < -1) | (chosen >= self.classes)).any())):
            raise ValueError(f"label must lie in 0..{self.classes - 1}, or be -1 for none, got {label}")
        chosen = sent(chosen, x.device).expand(len(x))
        found = self.log_probs(x, t).gather(1, chosen.clamp_min(0)[:, None])[:, 0]
        return torch.where(chosen < 0, 0.0, found)
