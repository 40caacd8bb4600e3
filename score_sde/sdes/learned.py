"""A learned noise schedule: Variational Diffusion Models (VDM; Kingma et al. 2021, arXiv:2107.00630).

Their SDE is variance preserving with log SNR = -gamma(t), gamma a monotone network. The bound on -log p is

    1/2 E integral of gamma'(t) |noise error|² dt = 1/2 integral from gamma_0 to gamma_1 of E|noise error|² dgamma

besides its end terms. It does not depend on the shape of gamma between its ends (section 5.1), but the variance of the
one-sample estimate L = 1/2 gamma'(t) |noise error|² does. So the bound trains the ends, through the curves, and the
variance trains the shape, through `MonotoneSchedule.variance_loss`. The curves hold the shape constant: its gradient
through them would be noise of mean 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import SDE

SHARPNESS, MARGIN = 20.0, 0.25  # initial slope of the units in t, and how far beyond [0, 1] they are spread


class MonotoneSchedule(nn.Module):
    """gamma(t) = gamma_min + (gamma_max - gamma_min) s(t), with s increasing from 0 to 1 on [0, 1].

    Kingma et al. 2021, appendix H: s(t) = (n(t) - n(0)) / (n(1) - n(0)) for a network with positive weights,

        n(t) = a t + mean over k of h_k sigmoid(w_k t + b_k),    a, h, w > 0 (softplus of the parameters).

    It starts within 1e-4 of linear, with units spread evenly over [0, 1], which helps a short training; the published
    code starts from weights near 0. It is evaluated in float64 on the CPU for every dtype and device of the parameters;
    with a GPU each evaluation waits for it once.

    gamma_min and gamma_max are -log SNR at t = 0 and 1, the paper's -13.3 and 5, and parameters if `learn_ends`;
    `units` is the network's width. Raises ValueError unless gamma_min < gamma_max and units >= 1.
    """

    ends: Tensor

    def __init__(
        self, gamma_min: float = -13.3, gamma_max: float = 5.0, *, learn_ends: bool = False, units: int = 1024
    ) -> None:
        super().__init__()
        if not gamma_min < gamma_max:
            raise ValueError(f"gamma_min must be below gamma_max, got {gamma_min} and {gamma_max}")
        if units < 1:
            raise ValueError(f"units must be at least 1, got {units}")
        one = math.log(math.expm1(1.0))  # softplus(one) = 1
        centres = (torch.arange(units) + 0.5) / units * (1 + 2 * MARGIN) - MARGIN
        self.slope = nn.Parameter(torch.tensor(one))  # a
        self.units = nn.Parameter(  # h, w, b
            torch.stack([torch.full((units,), one), torch.full((units,), SHARPNESS), -SHARPNESS * centres])
        )
        if learn_ends:
            self.ends = nn.Parameter(torch.tensor([gamma_min, gamma_max]))
        else:
            self.register_buffer("ends", torch.tensor([gamma_min, gamma_max]))

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(gamma, gamma') at times of any shape, float64 on the CPU; of the parameters only the ends get a gradient."""
        value, rate = self._shape(t, self.slope.detach(), self.units.detach(), 1)
        low, high = self.ends.cpu().double()
        return low + (high - low) * value, (high - low) * rate

    def gamma(self, t: Tensor) -> Tensor:
        """gamma alone, as `forward` returns it, in half the time."""
        (value,) = self._shape(t, self.slope.detach(), self.units.detach(), 0)
        low, high = self.ends.cpu().double()
        return low + (high - low) * value

    def shape(self, t: Tensor) -> tuple[Tensor, ...]:
        """(s, s', s'') at times of any shape, float64 on the CPU."""
        return self._shape(t, self.slope, self.units, 2)

    @staticmethod
    def _shape(t: Tensor, slope: Tensor, units: Tensor, derivatives: int) -> tuple[Tensor, ...]:
        """s and its first `derivatives`, each a product of functions of all units with one vector."""
        a, (h, w, b) = _positive(slope.cpu().double()), units.cpu().double()
        h, w = _positive(h) / len(h), _positive(w)
        t = t.cpu().double()
        y = torch.sigmoid(torch.addcmul(b, w, t[..., None]))
        start, end = ((h * torch.sigmoid(w * u + b)).sum() for u in (0, 1))
        values = [a * t + y @ h - start]
        if derivatives > 0:
            bump = y * (1 - y)
            values.append(a + bump @ (h * w))
        if derivatives > 1:
            values.append((bump * (1 - 2 * y)) @ (h * w * w))
        return tuple(value / (a + end - start) for value in values)

    def variance_loss(self, t: Tensor, error: Tensor) -> Tensor:
        """Zeros (B,) whose gradient in the shape is that of E (s'(t) error)², and so of the loss's variance.

        `error` (B,) are squared errors of the noise at uniform times t (B,), of any scale and on any device.

        Kingma et al. 2021, appendix I.2. As the mean of L is fixed, its variance falls with E L². At a fixed noise
        level gamma the error does not depend on the shape, but t and its density 1/gamma' do:

            E L² = integral of E[L² | gamma] / gamma'(t(gamma)) dgamma, so its gradient is E[L² d log gamma'(t(gamma))],

        without the derivative of the network that the paper's estimate takes.
        """
        value, rate, bend = self.shape(t)
        # At fixed gamma a change ds of the shape moves t by -ds/s', and so log s' by ds'/s' - (s''/s'²) ds.
        log_rate = torch.log(rate) - (bend / rate**2).detach() * value
        square = (rate.detach().to(error) * error.detach()).square()
        return square * (log_rate - log_rate.detach()).to(error)


@dataclass(frozen=True, kw_only=True, repr=False)
class LearnedVPSDE(SDE):
    """Variance preserving SDE with a learned schedule, also known as VDM's (variational diffusion models).

    With log SNR = -gamma(t): alpha² = sigmoid(-gamma), sigma² = sigmoid(gamma), f = -gamma' sigma²/2 and g² = gamma'
    sigma² (Kingma et al. 2021, section 3.2 and appendix E). A `ScoreModel` with this SDE registers the schedule, so
    that its parameters are trained, averaged, saved and copied with the model's.
    """

    schedule: MonotoneSchedule
    t_min: float = 0.0

    def __eq__(self, other: object) -> bool:
        """Also true for equal copies of a schedule, as from a checkpoint that was loaded twice."""
        if not isinstance(other, LearnedVPSDE):
            return NotImplemented
        own, their = self.schedule, other.schedule
        pairs = ((own.slope, their.slope), (own.units, their.units), (own.ends, their.ends))
        same = own is their or all(torch.equal(a.cpu().double(), b.cpu().double()) for a, b in pairs)
        return self.t_min == other.t_min and same

    def __hash__(self) -> int:
        return hash((LearnedVPSDE, self.t_min))

    def __repr__(self) -> str:
        low, high = self.schedule.ends.tolist()
        return f"LearnedVPSDE(gamma={low:g}..{high:g}, t_min={self.t_min})"

    @property
    def module(self) -> nn.Module:
        return self.schedule

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(F.logsigmoid(-self.schedule.gamma(t)) / 2).to(t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.exp(F.logsigmoid(self.schedule.gamma(t)) / 2).to(t)

    def f(self, t: Tensor) -> Tensor:
        gamma, rate = self.schedule(t)
        return (-rate * torch.sigmoid(gamma) / 2).to(t)

    def g(self, t: Tensor) -> Tensor:
        gamma, rate = self.schedule(t)
        return (rate * torch.sigmoid(gamma)).sqrt().to(t)

    def log_snr(self, t: Tensor) -> Tensor:
        return -self.schedule.gamma(t).to(t)

    @torch.no_grad()
    def time(self, log_snr: Tensor) -> Tensor:
        """Inverse of `log_snr` by Newton's method from a fine table, with a tenth of a bisection's evaluations."""
        gamma, grid = -log_snr.cpu().double(), torch.linspace(0, 1, 1025, dtype=torch.float64)
        table = self.schedule.gamma(grid)
        j = (torch.searchsorted(table, gamma) - 1).clamp(0, len(grid) - 2)
        t = grid[j] + (gamma - table[j]) / (table[j + 1] - table[j]) * (grid[j + 1] - grid[j])
        for _ in range(5):
            value, rate = self.schedule(t)
            t = torch.clamp(t - (value - gamma) / rate, grid[j], grid[j + 1])
        return t.to(log_snr)

    @property
    def prior_std(self) -> float:
        return 1.0


def _positive(y: Tensor) -> Tensor:
    """log(1 + exp(y)), without the jump of 2e-9 that torch's own makes at 20."""
    return F.softplus(y, threshold=40.0)
