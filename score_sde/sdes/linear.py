"""Forward SDEs: the noise that turns data into a Gaussian.

Every SDE here is linear, ``dx = f(t) x dt + g(t) dw`` for t in [0, 1] from data to noise, so that

    x_t | x_0 ~ N(alpha(t) x_0, sigma(t)² I),    f = (log alpha)',    g² = (sigma²)' - 2 f sigma²

(Song et al. 2021, arXiv:2011.13456, section 3 and appendix B; Särkkä & Solin 2019, eq. 5.50-51). An SDE is defined by
these four curves; all else follows from them, in the base class. Nothing here assumes images: states have shape
(B, *shape), times have shape () or (B,), and both keep their dtype and device.

Near t = 0 a form like ``1 - exp(-b)`` loses the digits that matter in float32; all curves are written with expm1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..machine.devices import sent
from ..noise import Noise


class WrongShape(ValueError):
    """A model's estimate, or a slope, does not have the shape of its state."""


def like(a: Tensor, x: Tensor) -> Tensor:
    """Pad `a` of shape () or (B,) with trailing ones to the rank of `x`, in the dtype and on the device of `x`.

    All times are combined with states by it: without padding a (B,) tensor against (B, *shape) would silently broadcast
    along the wrong axis. A scalar on the CPU stays there, where it combines with tensors of any device at no cost.
    Raises ValueError for another shape of `a`, and for integer states, in whose dtype the curves would be 0 or 1.
    """
    if not x.is_floating_point():
        raise ValueError(f"states must be floating point, got {x.dtype}; scale the data first")
    if a.ndim == 0:
        return a.to(x.dtype)
    if a.ndim != 1 or a.shape[0] != x.shape[0]:
        raise ValueError(
            f"t must have shape () or ({x.shape[0]},) for a state of shape {tuple(x.shape)}, got {tuple(a.shape)}"
        )
    return sent(a, x.device, x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


def scaled(x: Tensor, weight: Tensor | float) -> Tensor:
    """weight · x for a weight that is a number, or a tensor of shape () on the CPU or (B,)."""
    return x * (like(weight, x) if isinstance(weight, Tensor) else weight)


def add_(y: Tensor, weight: Tensor | float, z: Tensor) -> Tensor:
    """y += weight · z in place, for the weights of `scaled`; in one pass over memory unless one has a gradient."""
    weight = _as_number(weight)
    if not isinstance(weight, Tensor):
        return y.add_(z, alpha=weight)
    return y.addcmul_(like(weight, y), z) if weight.ndim else y.add_(like(weight, y) * z)


def add(y: Tensor, weight: Tensor | float, z: Tensor) -> Tensor:
    """y + weight · z, like `add_`."""
    weight = _as_number(weight)
    if not isinstance(weight, Tensor):
        return torch.add(y, z, alpha=weight)
    return torch.addcmul(y, like(weight, y), z) if weight.ndim else y + like(weight, y) * z


def _as_number(weight: Tensor | float) -> Tensor | float:
    """A single weight as a number, as CUDA's addcmul takes no scalar from the CPU.

    A weight with a gradient, as of a learned schedule, or of a time mapped by torch.func.vmap is not changed.
    """
    if not isinstance(weight, Tensor) or weight.ndim > 0 or weight.requires_grad:
        return weight
    try:
        return weight.item()
    except RuntimeError:
        return weight


def normal_log_prob(x: Tensor, std: float = 1.0) -> Tensor:
    """log N(x; 0, std² I) in nats, (B,), of states (B, *shape)."""
    d = math.prod(x.shape[1:])
    return -(x / std).square().reshape(len(x), d).sum(1) / 2 - d * math.log(math.sqrt(2 * math.pi) * std)


def some(mask: Tensor) -> bool:
    """Whether any is true; also True where that cannot be read, as of times mapped by torch.func.vmap."""
    try:
        return bool(mask.any())
    except RuntimeError:
        return True


class Reversible:
    """``dx = drift(x, t) dt + diffusion(t) dw``, and its reversals with a score: the flow and the reverse SDE."""

    drift: Callable[[Tensor, Tensor], Tensor]
    diffusion: Callable[[Tensor], Tensor]

    def velocity(self, x: Tensor, t: Tensor, score: Tensor) -> Tensor:
        """Probability flow, f - g² score / 2: the ODE with the SDE's marginals (Song et al. 2021, eq. 13 and 37)."""
        return self.drift(x, t) - like(self.diffusion(t) ** 2 / 2, x) * score

    def reverse_drift(self, x: Tensor, t: Tensor, score: Tensor) -> Tensor:
        """Drift of the time-reversed SDE, f - g² score (Anderson 1982; Song et al. 2021, eq. 6)."""
        return self.drift(x, t) - like(self.diffusion(t) ** 2, x) * score


@dataclass(frozen=True, kw_only=True)
class SDE(Reversible, ABC):
    """``dx = f(t) x dt + g(t) dw``, given by its curves `alpha`, `sigma`, `f` and `g`, all elementwise in t.

    `t_min` is where sampling and training stop: the score diverges at t = 0, where there is no noise.
    """

    t_min: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 <= self.t_min < 1:
            raise ValueError(f"t_min must lie in [0, 1), got {self.t_min}")

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the data at time t; alpha(0) = 1."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise at time t; increasing."""

    @abstractmethod
    def f(self, t: Tensor) -> Tensor:
        """Drift coefficient, (log alpha)'."""

    @abstractmethod
    def g(self, t: Tensor) -> Tensor:
        """Diffusion coefficient, sqrt((sigma²)' - 2 f sigma²)."""

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha', sigma'), the rates of the curves; SDEs whose f or g is infinite at t = 1 override this."""
        f, sigma = self.f(t), self.sigma(t)
        return f * self.alpha(t), f * sigma + self.g(t) ** 2 / (2 * sigma)

    def flow(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Probability flow alpha' data + sigma' noise of the estimates at t: `velocity`, finite wherever its rates are.

        It is also the velocity of flow matching, E[alpha' x_0 + sigma' z | x_t] (Lipman et al. 2023, arXiv:2210.02747).
        """
        alpha_rate, sigma_rate = self.rates(t)
        return add_(like(alpha_rate, data) * data, sigma_rate, noise)

    @property
    def module(self) -> nn.Module | None:
        """The module with the parameters of the curves, for a learned SDE; else None."""
        return None

    @property
    def prior_std(self) -> float:
        """Standard deviation of the prior N(0, prior_std² I) from which sampling starts."""
        return self.sigma(torch.ones((), dtype=torch.float64)).item()

    @property
    def steps(self) -> int | None:
        """Number of steps of a chain's SDE, whose f and g jump at each; None for an SDE that is smooth in t."""
        return None

    def log_snr(self, t: Tensor) -> Tensor:
        """Log signal-to-noise ratio 2 log(alpha/sigma), decreasing in t (half of it is DPM-Solver's lambda)."""
        return 2 * torch.log(self.alpha(t) / self.sigma(t))

    def time(self, log_snr: Tensor) -> Tensor:
        """Inverse of `log_snr` on [0, 1], by bisection; SDEs that know it in closed form override this."""
        low, high = torch.zeros_like(log_snr), torch.ones_like(log_snr)
        for _ in range(64 if log_snr.dtype == torch.float64 else 32):
            middle = (low + high) / 2
            early = self.log_snr(middle) > log_snr
            low, high = torch.where(early, middle, low), torch.where(early, high, middle)
        return (low + high) / 2

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """f(t) x."""
        return like(self.f(t), x) * x

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t)."""
        return self.g(t)

    def perturb(self, x0: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """A draw alpha(t) x0 + sigma(t) z of x_t given x_0, for standard normal z of x0's shape."""
        return like(self.alpha(t), x0) * x0 + like(self.sigma(t), x0) * z

    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, std) of x_t | x_s ~ N(scale x_s, std² I) for s < t, exact: std² = sigma(t)² - scale² sigma(s)²."""
        scale, sigma_t = self.alpha(t) / self.alpha(s), self.sigma(t)
        kept = scale * self.sigma(s)
        return scale, torch.sqrt((sigma_t - kept) * (sigma_t + kept))

    def posterior(self, x_t: Tensor, x0: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, variance) of x_s | x_t, x_0 for s < t: mean of x_t's shape, variance of the times' shape."""
        keep, weight, std = self.posterior_weights(s, t)
        return add_(like(keep, x_t) * x_t, weight, x0), std**2

    def posterior_weights(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(keep, weight, std) of x_s | x_t, x_0 ~ N(keep x_t + weight x_0, std² I) for s < t.

        Ho et al. 2020 (arXiv:2006.11239), eq. 6-7, for any two times of any SDE of this form.
        """
        (scale, std), sigma_s, sigma_t = self.transition(s, t), self.sigma(s), self.sigma(t)
        return scale * (sigma_s / sigma_t) ** 2, self.alpha(s) * (std / sigma_t) ** 2, sigma_s * std / sigma_t

    def prior(self, shape: Sequence[int], noise: Noise) -> Tensor:
        """A draw of shape `shape` from the prior, with numbers from `noise`."""
        return self.prior_std * noise(torch.empty(tuple(shape)))

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """Log density of the prior N(0, prior_std² I) in nats, shape (B,)."""
        return normal_log_prob(x, self.prior_std)


@dataclass(frozen=True, kw_only=True)
class VariancePreserving(SDE):
    """``dx = -beta(t)/2 x dt + sqrt(beta(t)) dw``, so that alpha² + sigma² = 1, for a beta with a known integral."""

    @abstractmethod
    def beta(self, t: Tensor) -> Tensor:
        """Rate at which noise is added."""

    @abstractmethod
    def _integral(self, t: Tensor) -> Tensor:
        """Integral of beta from 0 to t, which is -2 log alpha."""

    @abstractmethod
    def _time(self, value: Tensor) -> Tensor:
        """Inverse of `_integral`."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-self._integral(t) / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-self._integral(t)))

    def f(self, t: Tensor) -> Tensor:
        return -self.beta(t) / 2

    def g(self, t: Tensor) -> Tensor:
        return self.beta(t).sqrt()

    def time(self, log_snr: Tensor) -> Tensor:
        return self._time(torch.nn.functional.softplus(-log_snr))  # alpha² = sigmoid(log_snr)

    @property
    def prior_std(self) -> float:
        """1: what VP converges to, and what the papers sample from (sigma(1) of `VPSDE` is 2e-5 less)."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class VarianceExploding(SDE):
    """``dx = g(t) dw``, so that alpha = 1: noise is added, and the data keep their scale."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def f(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)


@dataclass(frozen=True, kw_only=True)
class VPSDE(VariancePreserving):
    """Variance preserving: ``dx = -beta(t)/2 x dt + sqrt(beta(t)) dw``, beta linear in t; the limit of DDPM.

    log alpha = -t² (beta_max - beta_min)/4 - t beta_min/2, sigma² = 1 - alpha² (Song et al. 2021, eq. 11, 29, 32-33).
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.beta_min > 0 and self.beta_max > 0):
            raise ValueError(f"beta_min and beta_max must be positive, got {self.beta_min} and {self.beta_max}")

    def beta(self, t: Tensor) -> Tensor:
        """Rate at which noise is added, beta_min at t = 0 and beta_max at t = 1."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def _integral(self, t: Tensor) -> Tensor:
        return t * (self.beta_min + t * (self.beta_max - self.beta_min) / 2)

    def _time(self, value: Tensor) -> Tensor:
        # the root of a quadratic, in the form without cancellation
        slope = self.beta_max - self.beta_min
        return 2 * value / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * slope * value))


@dataclass(frozen=True, kw_only=True)
class SubVPSDE(VPSDE):
    """Sub-VP: VP's drift with less noise, sigma = 1 - alpha², g² = beta (1 - alpha⁴) (Song et al. 2021, eq. 12, 29).

    Its variance is at most VP's at every t; the paper has its best likelihoods with it.
    """

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self._integral(t))

    def g(self, t: Tensor) -> Tensor:
        return torch.sqrt(self.beta(t) * -torch.expm1(-2 * self._integral(t)))

    def time(self, log_snr: Tensor) -> Tensor:
        # r = alpha/sigma with sigma = 1 - alpha² gives sigma = 2/(1 + sqrt(1 + 4 r²)), here for q = 1/r.
        q = torch.exp(-log_snr / 2)
        sigma = 2 * q / (q + torch.sqrt(q**2 + 4))
        # Near t = 1 alpha is small and sigma near 1: there take log alpha² = log(r sigma)² instead of log(1 - sigma).
        return self._time(torch.where(sigma < 0.5, -torch.log1p(-sigma), -log_snr - 2 * torch.log(sigma)))


@dataclass(frozen=True, kw_only=True)
class VESDE(VarianceExploding):
    """Variance exploding: ``dx = sqrt(d sigma²/dt) dw``, sigma = sigma_min (sigma_max/sigma_min)^t; the limit of NCSN.

    Song et al. 2021, eq. 9, 30-31. As in the paper, the marginal keeps sigma(0) = sigma_min: the data at t = 0 already
    carry that little noise. The exact transition from s has variance sigma(t)² - sigma(s)², also for s = 0.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_increasing(self.sigma_min, self.sigma_max)

    @property
    def _rate(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * torch.exp(self._rate * t)

    def g(self, t: Tensor) -> Tensor:
        return self.sigma(t) * math.sqrt(2 * self._rate)

    def time(self, log_snr: Tensor) -> Tensor:
        return (-log_snr / 2 - math.log(self.sigma_min)) / self._rate


@dataclass(frozen=True, kw_only=True)
class CosineSDE(SDE):
    """Variance preserving with Improved DDPM's schedule: alpha² = c(t)/c(0), c = cos² of an angle linear in t.

    The angle is pi/2 (0.999 t + 0.008)/1.008. Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 17, in continuous time;
    the factor 0.999 keeps beta finite at t = 1, where they clip it.
    """

    # The angle runs from _start at t = 0 at the constant _rate to _left short of a right angle at t = 1.
    _start = math.pi / 2 * 0.008 / 1.008
    _rate = math.pi / 2 * 0.999 / 1.008
    _left = math.pi / 2 * 0.001 / 1.008

    def _cos(self, t: Tensor) -> Tensor:
        """Cosine of the angle, as the sine of its complement, which keeps its digits near t = 1."""
        return torch.sin(self._left + self._rate * (1 - t))

    def _tan(self, t: Tensor) -> Tensor:
        return torch.sin(self._start + self._rate * t) / self._cos(t)

    def alpha(self, t: Tensor) -> Tensor:
        return self._cos(t) / math.cos(self._start)

    def sigma(self, t: Tensor) -> Tensor:
        # cos² a - cos² b = sin(b - a) sin(b + a), which keeps its digits near t = 0.
        turned = self._rate * t
        return torch.sqrt(torch.sin(turned) * torch.sin(turned + 2 * self._start)) / math.cos(self._start)

    def f(self, t: Tensor) -> Tensor:
        return -self._rate * self._tan(t)

    def g(self, t: Tensor) -> Tensor:
        return torch.sqrt(2 * self._rate * self._tan(t))

    def time(self, log_snr: Tensor) -> Tensor:
        # With b the angle, a = _start and sigma² = (sin² b - sin² a)/cos² a:
        # sin(b - a) = (sin² b - sin² a)/sin(b + a), which does not subtract angles that are nearly equal.
        sin_a, cos_a = math.sin(self._start), math.cos(self._start)
        rise = torch.sigmoid(-log_snr) * cos_a**2
        sin_b, cos_b = torch.sqrt(sin_a**2 + rise), torch.sqrt(torch.sigmoid(log_snr)) * cos_a
        return torch.atan2(rise / (sin_b * cos_a + cos_b * sin_a), cos_b * cos_a + sin_b * sin_a) / self._rate

    @property
    def prior_std(self) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class LinearSDE(SDE):
    """The straight path alpha = 1 - t, sigma = t of flow matching, also known as rectified flow and the linear path.

    Each x_t = (1 - t) x_0 + t z moves at the velocity z - x_0, whose mean given x_t is the probability flow's (Liu et
    al. 2023, arXiv:2209.03003; Lipman et al. 2023, arXiv:2210.02747, eq. 20-23 with sigma_min = 0 and time reversed).
    At t = 1 no data are left: f, g and log SNR are infinite there, and the flow is finite.
    """

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def f(self, t: Tensor) -> Tensor:
        return -1 / (1 - t)

    def g(self, t: Tensor) -> Tensor:
        return torch.sqrt(2 * t / (1 - t))

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr / 2)


@dataclass(frozen=True, kw_only=True)
class TrigonometricSDE(SDE):
    """Variance preserving with alpha = cos(pi t/2) and sigma = sin(pi t/2), also known as GVP and TrigFlow.

    Albergo & Vanden-Eijnden 2023 (arXiv:2209.15571); GVP of Ma et al. 2024 (SiT, arXiv:2401.08740); Lu & Song 2025
    (sCM, arXiv:2410.11081), whose time is the angle pi t/2. Its flow is pi/2 times what rule "v" predicts. At t = 1 no
    data are left: f, g and log SNR are infinite there, and the flow is finite.
    """

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * (1 - t))  # 0 at t = 1, and with all digits near it

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t)

    def f(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * self.sigma(t) / self.alpha(t)

    def g(self, t: Tensor) -> Tensor:
        return torch.sqrt(math.pi * self.sigma(t) / self.alpha(t))

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -math.pi / 2 * self.sigma(t), math.pi / 2 * self.alpha(t)

    def time(self, log_snr: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan(torch.exp(-log_snr / 2))


@dataclass(frozen=True, kw_only=True)
class EDMSDE(VarianceExploding):
    """EDM's curve: alpha = 1 and sigma^(1/rho) linear in t from sigma_min to sigma_max (so a uniform grid is Karras's).

    Karras et al. 2022 (arXiv:2206.00364), eq. 5, with the index reversed; in the paper sigma itself is the time.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    t_min: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_increasing(self.sigma_min, self.sigma_max)

    def _root(self, t: Tensor) -> Tensor:
        return self.sigma_min ** (1 / self.rho) + t * self._slope

    @property
    def _slope(self) -> float:
        return self.sigma_max ** (1 / self.rho) - self.sigma_min ** (1 / self.rho)

    def sigma(self, t: Tensor) -> Tensor:
        return self._root(t) ** self.rho

    def g(self, t: Tensor) -> Tensor:
        return torch.sqrt(2 * self.rho * self._slope * self._root(t) ** (2 * self.rho - 1))

    def time(self, log_snr: Tensor) -> Tensor:
        return (torch.exp(-log_snr / (2 * self.rho)) - self.sigma_min ** (1 / self.rho)) / self._slope


def _check_increasing(sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"sigmas must satisfy 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")


def as_grid(times: Tensor | np.ndarray | Sequence[float], least: int = 2) -> Tensor:
    """At least `least` times as a decreasing 1-D float64 tensor on the CPU, within [0, 1]. Raises ValueError else."""
    try:
        values = times.detach().cpu() if isinstance(times, Tensor) else torch.from_numpy(np.array(times, np.float64))
        grid = values.to(torch.float64)
        if grid.ndim == 1 and len(grid) >= least and bool((grid.diff() < 0).all() and grid[0] <= 1 and grid[-1] >= 0):
            return grid
    except (TypeError, ValueError):
        pass
    raise ValueError(f"times must be a 1-D grid that falls from 1 to 0 or above, got {times}; see score_sde.times")


def check_first(grid: Tensor, otherwise: str = "") -> None:
    """Raise ValueError for a grid that begins below t = 1, where the prior holds; `otherwise` is another remedy."""
    if grid[0] < 1 - 1e-6:  # 1 may have been rounded, as in float32
        raise ValueError(
            f"the grid begins at t = {grid[0].item():.6g}, and the prior is the law at t = 1: begin it there{otherwise}"
        )
