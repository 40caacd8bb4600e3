"""Autoencoders of images: the encoder's posterior q(z | x) of a code z, the decoder p(x | z), and the bound they give.

For a prior p(z) of any kind (Kingma & Welling 2014, arXiv:1312.6114, eq. 3)

    -log P(x) <= E_q [-log P(x | z)] + KL(q(z | x) || p(z)),

It counts bits of the pixels if P(x | z) gives a probability to each level. Here the decoder is a normal law around the
decoded image, with one standard deviation for all pixels, learned or measured (Rybkin et al. 2021, arXiv:2006.13202).
An autoencoder is trained with p(z) = N(0, I) and a weight of the divergence (Higgins et al. 2017; Rombach et al. 2022,
arXiv:2112.10752, section 3.1); a score model of its codes then replaces the prior.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .reverse import decode


class Autoencoder(Protocol):
    """What a model of codes needs of an autoencoder; any module with these two methods is one.

    Images x are (B, C, H, W) in [-1, 1], or in [0, 1] if it has ``centered = False``; codes are (B, c, h, w). Its
    `deviation`, a number or a tensor (), is the standard deviation of x around decode(z); without one it is measured.
    """

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(z | x), a normal law with independent dimensions.

        With a standard deviation of 0 the code is a point: a model of such codes can be sampled, but has no bound.
        """

    def decode(self, z: Tensor) -> Tensor:
        """The mean of p(x | z)."""


class Evidence(NamedTuple):
    """The negative evidence lower bound (ELBO) under N(0, I), (B,) nats, in two parts, and the decoded images."""

    reconstruction: Tensor
    divergence: Tensor
    decoded: Tensor


class ConvolutionalAutoencoder(nn.Module):
    """This package's own `Autoencoder` (VAE): two networks, and the decoder's standard deviation as a parameter.

    The encoder F(x) -> (B, 2 c, h, w) gives the posterior's mean and its log variance, clamped to [-30, 20], the
    decoder F(z) -> (B, C, H, W) images, in [-1, 1], or in [0, 1] if not `centered`.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, *, centered: bool = True) -> None:
        super().__init__()
        self.encoder, self.decoder, self.centered = encoder, decoder, centered
        # a tenth of its logarithm: Adam moves all parameters by equal steps, and this one has far to go
        self.log_deviation = nn.Parameter(torch.tensor(math.log(0.25 if centered else 0.125) / 10))

    @property
    def deviation(self) -> Tensor:
        return torch.exp(10 * self.log_deviation)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encoder(x).to(x.dtype).chunk(2, dim=1)
        return mean, torch.exp(log_variance.clamp(-30, 20) / 2)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z).to(z.dtype)

    def forward(self, x: Tensor, noise: Tensor, levels: int | None = None, width: float = 2.0) -> Evidence:
        """The bound at images x for one draw of z, made of standard normal `noise` of the codes' shape."""
        mean, std = self.encode(x)
        decoded = self.decode(mean + std * noise)
        return Evidence(-log_prob(x, decoded, self.deviation, levels, width), divergence(mean, std), decoded)


def log_prob(x: Tensor, decoded: Tensor, deviation: Tensor, levels: int | None = None, width: float = 2.0) -> Tensor:
    """log p(x | z) of N(decoded, deviation²), (B,) nats; with levels a log probability, see `reverse.discretised`."""
    return decode(x, decoded, (2 * deviation.log()).expand_as(x), levels, width)


def divergence(mean: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std²) || N(0, I)), (B,) nats."""
    return (mean.square() + std.square() - 1 - 2 * std.log()).flatten(1).sum(1) / 2


def entropy(std: Tensor) -> Tensor:
    """Entropy of N(mean, std²), (B,) nats: E[-log q(z | x)]."""
    return (std.log() + (1 + math.log(2 * math.pi)) / 2).flatten(1).sum(1)
