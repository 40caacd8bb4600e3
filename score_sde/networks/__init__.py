"""Networks: modules F(x, label) built from numbers. They know neither an SDE, nor sigma, nor a config."""

from .autoencoder import CodeDecoder, CodeEncoder
from .dit import DiT
from .edm2 import EDM2
from .encoder import Encoder
from .mlp import MLP
from .refinenet import NCSN, NCSNv2
from .unet import UNet

__all__ = ["EDM2", "MLP", "NCSN", "CodeDecoder", "CodeEncoder", "DiT", "Encoder", "NCSNv2", "UNet"]
