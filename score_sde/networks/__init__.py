"""Networks: modules F(x, label) built from numbers. They know neither an SDE, nor sigma, nor a config."""

from torch import nn

from .mlp import MLP
from .unet import UNet

NETWORKS: dict[str, type[nn.Module]] = {"unet": UNet, "mlp": MLP}

__all__ = ["MLP", "NETWORKS", "UNet"]
