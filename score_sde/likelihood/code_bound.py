"""The bound on -log P of images under a score model of an autoencoder's codes (latent diffusion), and its terms.

With the posterior q(y | k) of an image's normalised code y, the decoder's P(k | y) and the model's log p(y),

    -log P(k) <= E_q [-log P(k | y)] + E_q [-log p(y)] - H(q(y | k))

(Kingma & Welling 2014, arXiv:1312.6114, eq. 2; Vahdat et al. 2021, arXiv:2106.05931, eq. 3). Its gap is
KL(q(y | k) || p(y | k)), 0 where q is the posterior of decoder and model. The decoder gives each level a probability,
so images are not dequantised. With y = (z - mean)/std both log p and log q change by log std, which cancels in their
difference: the second and the third term depend on the statistics of the codes, the bound does not.
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

    `std_error` is that of log p(y), over probes or draws, and `nfe` its number of evaluations.
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
    codec: AutoencoderCodec, k: Tensor, log_prob: Callable[[Tensor], Likelihood], *,
    seed: int = 0, first: int = 0, noise: Tensor | None = None,
) -> LatentBound:  # fmt: skip
    """The bound for uint8 images k (B, C, H, W).

    Args:
        log_prob: y (B, c, h, w) -> `Likelihood`, the model's log density or a lower bound on it, such as
            ``lambda y: log_likelihood(model, y)``.
        seed, first: example i's draw of the code depends on (seed, first + i) alone.
        noise: (B, c, h, w), standard normal numbers for the draw instead of the seed's.

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
    likelihood = log_prob(y)
    return LatentBound(-codec.log_prob(k, y), -likelihood.log_prob, entropy(std), likelihood.std_error, likelihood.nfe)


def in_bits(bound: LatentBound, dimensions: int) -> dict[str, Tensor]:
    """The terms and their sum in bits per dimension of the pixels: value, reconstruction, latent and entropy, (B,)."""
    nats = (bound.total, bound.reconstruction, bound.latent, bound.entropy)
    names = ("value", "reconstruction", "latent", "entropy")
    return {name: bits(term, dimensions) for name, term in zip(names, nats, strict=True)}


def of_standard_normal(y: Tensor) -> Likelihood:
    """log N(y; 0, I), the prior of an autoencoder's training, as a `Likelihood`."""
    log_prob = normal_log_prob(y)
    return Likelihood(log_prob, torch.zeros_like(log_prob), y, 0)
