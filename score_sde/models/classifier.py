"""A classifier of noisy examples: log P(y | x_t), for guidance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..machine.devices import sent
from ..sdes.linear import SDE, WrongShape
from .base import at
from .rules import TimeMap, label_time, network_input, unscaled


class NoisyClassifier(nn.Module):
    """log P(y | x_t) of the classes y, by a network conditioned on the noise level (Song et al. 2021, section 5).

    Trained by cross-entropy on x_t = alpha x_0 + sigma z, it approaches the posterior of the data's classes at every t.
    Called with a label, it is a `log_prob` for `classifier`.

    The network F(x, label) -> logits (B, classes) takes a label (B,) of the time, both positional; `label` and `scale`
    are functions (alpha, sigma, t) -> (B,) for this label and a factor of the network's input.
    """

    def __init__(
        self, network: nn.Module, sde: SDE, classes: int, label: TimeMap = label_time, scale: TimeMap = unscaled
    ) -> None:
        super().__init__()
        self.network, self.sde, self.classes, self.label, self.scale = network, sde, classes, label, scale

    def log_probs(self, x: Tensor, t: Tensor) -> Tensor:
        """log P(y | x_t) of all classes, (B, classes), in the dtype of x; x is (B, *shape), t () or (B,)."""
        logits = self.network(*network_input(self, x, t, self.sde.alpha(t), self.sde.sigma(t)))
        if logits.shape != (len(x), self.classes):
            raise WrongShape(
                f"the network returned shape {tuple(logits.shape)} for {len(x)} examples of {self.classes} classes at "
                f"{at(t)}"
            )
        return torch.log_softmax(logits.to(x.dtype), 1)

    def forward(self, x: Tensor, t: Tensor, label: Any) -> Tensor:
        """log P(label | x_t), (B,), for one label or (B,); -1 is no label and has the probability 1.

        Raises ValueError for a class that does not exist.
        """
        chosen = torch.as_tensor(label)
        on_cpu = chosen.device.type == "cpu"  # elsewhere the check would wait for the device in every step
        if chosen.is_floating_point() or (on_cpu and bool(((chosen < -1) | (chosen >= self.classes)).any())):
            raise ValueError(f"label must lie in 0..{self.classes - 1}, or be -1 for none, got {label}")
        chosen = sent(chosen, x.device).expand(len(x))
        log_prob = self.log_probs(x, t).gather(1, chosen.clamp_min(0)[:, None])[:, 0]
        return torch.where(chosen < 0, 0.0, log_prob)
