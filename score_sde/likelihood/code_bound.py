"""The bound on -log P of images under a model of an autoencoder's codes, and what it consists of.

With the posterior q(y | k) of an image's normalised code y, the decoder's P(k | y) and the model's log p(y),

    -log P(k) <= E_q [-log P(k | y)] + E_q [-log p(y)] - H(q(y | k))

(Kingma & Welling 2014, arXiv:1312.6114, eq. 2; Vahdat et al. 2021, arXiv:2106.05931, eq. 3). It is exact where q is the
posterior of decoder and model, and the gap is KL(q(y | k) || p(y | k)). The decoder gives a probability to each level,
so nothing is dequantised. With y = (z - mean)/std both log p(z) and log q(z | k) lose log std, which their difference
does not see: the bound does not depend on the statistics, its second and third part do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.codecs import AutoencoderCodec
from ..models.autoencoder import entropy
from ..models.pixel_levels import bits
from ..noise import ExampleStream, noise_source
from ..sdes.linear import normal_log_prob
from .exact import Likelihood


class LatentBound(NamedTuple):
    """-log P(k) is at most `reconstruction` + `latent` - `entropy`, all (B,) nats, for one draw of the code.

    `std_error` is log p(y)'s, over probes or draws, and `nfe` what that took.
    """

    reconstruction: Tensor
    latent: Tensor
    entropy: Tensor
    std_error: Tensor
    nfe: float

    @property
    def total(self) -> Tensor:
        return self.reconstruction + self.latent - self.entropy

    @property
    def log_prob(self) -> Tensor:
        """The lower bound on log P(k)."""
        return -self.total


def latent_bound(
    codec: AutoencoderCodec,
    k: Tensor,
    log_prob: Callable[[Tensor], Likelihood],
    *,
    seed: int = 0,
    first: int = 0,
    noise: Tensor | None = None,
) -> LatentBound:
    """The bound for uint8 images k (B, C, H, W).

    Args:
        codec: of the codes.
        k: images.
        log_prob: y (B, c, h, w) -> `Likelihood`, the model's log density or a lower bound on it, such as
            ``lambda y: log_likelihood(model, y)``.
        seed: example i's draw of the code depends on (seed, first + i) alone.
        first: index of the batch's first example.
        noise: (B, c, h, w), standard normal numbers of which to make the code, in place of the seed.

    Raises ValueError for an autoencoder whose codes are points: without a posterior there is no bound.
    """
    mean, std = codec.posterior(k)
    if not bool((std > 0).all()):
        raise ValueError(
            "the autoencoder's codes have no spread, q(z | x) is a point, and the bound needs its entropy: take an "
            "autoencoder whose encode returns standard deviations above 0"
        )
    if noise is None:
        noise = noise_source(tuple(mean.shape), seed, first, mean.dtype, mean.device, ExampleStream.CODE)(mean)
    y = mean + std * noise
    found = log_prob(y)
    return LatentBound(-codec.log_prob(k, y), -found.log_prob, entropy(std), found.std_error, found.nfe)


def in_bits(bound: LatentBound, dimensions: int) -> dict[str, Tensor]:
    """The parts and their sum in bits per dimension of the pixels: value, reconstruction, latent and entropy, (B,)."""
    parts = {"value": bound.total, "reconstruction": bound.reconstruction, "latent": bound.latent}
    return {name: bits(nats, dimensions) for name, nats in {**parts, "entropy": bound.entropy}.items()}


def of_standard_normal(y: Tensor) -> Likelihood:
    """log N(y; 0, I): the prior under which an autoencoder was trained."""
    log_prob = normal_log_prob(y)
    return Likelihood(log_prob, torch.zeros_like(log_prob), y, 0)
