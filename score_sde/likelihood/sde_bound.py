"""The variational bound (ELBO) on -log p in continuous time, for any SDE and any model of its score.

With q the noising process from x and p the reverse SDE with a model's score from the prior, Girsanov's theorem gives
(Kingma et al. 2021, arXiv:2107.00630, eq. 11-18; Song et al. 2021b, arXiv:2101.09258, theorem 3)

    -log p(x) <= KL(q(x_1 | x) || prior) + 1/2 E integral of (g/sigma)² |noise error|² dt + E_q[-log p(x | x_0)],

with the integral from t_min to 1 and x_0 the state at t_min. As (g/sigma)² = -(log SNR)', the integral depends on the
SDE only by its SNR at the two ends. If the model is exact and the prior is the law of x_1, the bound is equal to
-log p(x) at every x.

Song et al. write the same number as E[-log prior(x_1)] + 1/2 E integral of (g² |score error|² - g² |z/sigma|² - 2 f D)
dt: the last two are -(log sigma²)' D, which cancels with the entropies of x_1 and x_0 given x.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..losses.denoising import noise_error
from ..losses.time_laws import TimeLaw
from ..losses.time_laws import log_snr as uniform_log_snr
from ..machine.devices import sent
from ..models.base import ScoreModel, check_finite
from ..models.pixel_levels import bits
from ..models.reverse import prior_divergence
from ..noise import example_generators
from ..sdes.linear import SDE, like
from .chain_bound import stratified_error

Decoder = Literal["state", "gaussian"]


class ContinuousBound(NamedTuple):
    """Terms of the bound in nats, (B,) each, and the standard error of the diffusion term.

    The times are spread evenly, and `std_error` comes from the differences of neighbours: on average it is at least
    the true one. It is NaN for a single draw.
    """

    prior: Tensor
    diffusion: Tensor
    reconstruction: Tensor
    std_error: Tensor
    dimensions: int

    @property
    def total(self) -> Tensor:
        """The bound on -log p in nats, (B,)."""
        return self.prior + self.diffusion + self.reconstruction

    def bits_per_dim(self, levels: int = 256, width: float = 2.0) -> Tensor:
        """Bits per dimension (B,) for dequantised x, as in `Likelihood.bits_per_dim`.

        For a decoder of discrete levels, which gives probabilities and not densities, pass levels=1, width=1.
        """
        return bits(self.total, self.dimensions, levels, width)


@torch.no_grad()
def variational_bound(
    model: ScoreModel, x: Tensor, *, decoder: Decoder | Tensor = "gaussian", t_min: float = 1e-5, draws: int = 64,
    law: TimeLaw = uniform_log_snr, seed: int = 0, first: int = 0,
) -> ContinuousBound:  # fmt: skip
    """The bound (ELBO, VDM's loss) on -log p(x), x (B, *shape), by Monte Carlo: unbiased for any number of draws.

    Args:
        decoder: p(x | x_0 at t_min), see `reconstruction`.
        t_min: where the integral begins.
        draws: number of times and noises for each example, each of which costs an evaluation of the batch.
        law: of the times. The default, uniform in log SNR, is importance sampling by the weight (g/sigma)².
        seed, first: example i's draws depend on (seed, first + i) alone.

    Raises ValueError for draws < 1, a t_min without noise, an unknown decoder, and an x that is not on the levels, and
    FloatingPointError, with the time, where a term is not finite.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    sde, d, end = model.sde, math.prod(x.shape[1:]), torch.tensor(t_min, dtype=torch.float64)
    if not bool(sde.sigma(end) > 0):
        raise ValueError(f"{sde} has no noise at t_min = {t_min:g}, where the bound is infinite; 1e-5 is usual")
    generators = example_generators(seed, first, len(x))

    def drawn(kind: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        rows = torch.empty(len(x), *shape, dtype=dtype)
        for row, generator in zip(rows, generators, strict=True):
            row.copy_(kind(shape, generator=generator, dtype=dtype))
        return rows

    wide = torch.promote_types(x.dtype, torch.float32)
    noise = lambda: sent(drawn(torch.randn, tuple(x.shape[1:]), wide), x.device, x.dtype)
    u = (drawn(torch.rand, (draws,), torch.float64) + torch.arange(draws)) / draws  # one in each of `draws` cells
    t, weight = law(replace(sde, t_min=t_min), u.flatten())
    # The law's weights make averages over uniform t in [t_min, 1]; the integral is that times 1 - t_min.
    rate = ((1 - t_min) * weight * (sde.g(t) / sde.sigma(t)) ** 2).reshape(u.shape).T
    t = t.reshape(u.shape).T
    if isinstance(decoder, Tensor):
        values, _, gap = _levels(x, decoder)
        if bool((gap > 1e-3 * values.diff().min()).any()):
            raise ValueError(
                f"x is up to {gap.max().item():.3g} away from the decoder's {len(values)} levels; leave out the "
                'dequantisation, or use decoder="gaussian"'
            )
    last = reconstruction(sde, x, end, noise(), decoder)
    rate = sent(rate, x.device, x.dtype)
    terms = torch.stack([d / 2 * rate[k] * noise_error(model, x, t[k], noise()) for k in range(draws)])
    check_finite(terms.T, t.T, "the bound")
    error = stratified_error(terms.T / draws)
    return ContinuousBound(prior_divergence(sde, x, torch.ones_like(end)), terms.mean(0), last, error, d)


def reconstruction(sde: SDE, x: Tensor, t: Tensor, z: Tensor, decoder: Decoder | Tensor) -> Tensor:
    """-log p(x | x_t) in nats, (B,), at the smallest time t and x_t = alpha x + sigma z.

    Args:
        sde, x, t, z: t is (), z of x's shape.
        decoder: "gaussian" is N(x; x_t/alpha, (sigma/alpha)² I), for densities, with its expectation over z in closed
            form. "state" takes x_t itself as the data, as likelihoods by the ODE do: then E_q[-log p_t(x_t)] is
            bounded. A tensor (levels,) of the values of x is Kingma et al. 2021's decoder of discrete data,
            p(x | x_t) proportional to q(x_t | x) in each dimension; then -log P of the levels is bounded.

    Raises ValueError for another decoder.
    """
    d, alpha, sigma = math.prod(x.shape[1:]), sde.alpha(t), sde.sigma(t)
    if isinstance(decoder, Tensor):
        values, nearest, _ = _levels(x, decoder)
        ratio = like(sigma / alpha, x)
        # In units of sigma/alpha: the level v is at distance (x - v)/ratio + z from x_t/alpha.
        logits = -((((x[..., None] - values) / ratio) + z[..., None]) ** 2) / 2
        chosen = torch.log_softmax(logits, -1).gather(-1, nearest[..., None])
        return -chosen.flatten(1).sum(1)
    if decoder not in ("state", "gaussian"):
        raise ValueError(f'unknown decoder {decoder!r}; use "gaussian", "state" or a tensor of levels')
    std = sigma if decoder == "state" else sigma / alpha
    return sent(d * torch.log(math.sqrt(2 * math.pi * math.e) * std), x.device, x.dtype).expand(len(x))


def _levels(x: Tensor, decoder: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(values in order, index of the one nearest to x, distance to it)."""
    values = sent(decoder, x.device, x.dtype).sort().values
    nearest = torch.bucketize(x.contiguous(), (values[1:] + values[:-1]) / 2)
    return values, nearest, (values[nearest] - x).abs()
