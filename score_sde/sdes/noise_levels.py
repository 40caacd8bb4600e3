"""NCSNv2's rules for noise levels and the Langevin step from the data's size (Song & Ermon 2020, arXiv:2006.09011).

Annealed Langevin dynamics walks levels sigma_1 > ... > sigma_L = sigma_min in geometric progression, T steps of size
eps (sigma_i/sigma_L)² on each (h in ``x += h score + sqrt(2h) z``). The paper's techniques:

1.  sigma_1 is the largest distance between two examples: at a level far below the distance of two modes, walks hardly
    ever go from one to the other.
2.  The ratio gamma = sigma_{i-1}/sigma_i is such that each level's states are likely at the next. In D dimensions
    N(0, sigma² I) is a shell, of radius N(sqrt(D) sigma, sigma²/2) for large D. Within three standard deviations of the
    larger shell lies the share

        Phi(sqrt(2D) (gamma - 1) + 3 gamma) - Phi(sqrt(2D) (gamma - 1) - 3 gamma)

    of the smaller one's mass, here called the overlap; the paper takes about 1/2.
4.  On one Gaussian level, T steps of relative size r = eps/sigma_L² bring the variance from gamma² sigma_i² to

        s² = sigma_i² ((1 - r)^{2T} (gamma² - b) + b),    b = 2 r/(1 - (1 - r)²) = 1/(1 - r/2)

    with b the bias of the unadjusted dynamics. r is chosen to bring s²/sigma_i² closest to 1 (it is always above 1).

(Technique 3 is in the network, a score divided by sigma: rule "noise". Technique 5 is averaging the weights.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def overlap(ratio: float, d: int) -> float:
    """Share of a level's states that lie in the shell of the next level, `ratio` times as large (technique 2)."""
    from scipy.special import ndtr

    gap = math.sqrt(2 * d) * (ratio - 1)
    return float(ndtr(gap + 3 * ratio) - ndtr(gap - 3 * ratio))


def ratio_of_overlap(share: float, d: int) -> float:
    """The ratio of neighbouring levels in d dimensions whose `overlap` is `share`.

    Raises ValueError for a share that is not between 0 and 0.997, and for d <= 4, where every ratio's overlap is above
    1/2 and the rule says nothing.
    """
    from scipy.optimize import brentq  # slow to import

    if d < 5:
        raise ValueError(f"the rule for the ratio of levels is for shells in many dimensions, 5 at least, got d={d}")
    if not 0 < share < (most := overlap(1.0, d)):
        raise ValueError(f"the overlap of neighbouring levels must lie between 0 and {most:.3f}, got {share}")
    high = 2.0
    while overlap(high, d) > share:
        high *= 2
    return float(brentq(lambda ratio: overlap(ratio, d) - share, 1.0, high, xtol=1e-14))


def variance_left(r: float, ratio: float, steps: int) -> float:
    """s²/sigma_i² after `steps` Langevin steps of size r sigma_i² from variance (ratio sigma_i)² (technique 4)."""
    b = 1 / (1 - r / 2)
    return (1 - r) ** (2 * steps) * (ratio**2 - b) + b


def relative_step(ratio: float, steps: int) -> float:
    """The step in units of sigma_i², r = eps/sigma_L² in (0, 1), that brings `variance_left` closest to 1.

    Raises ValueError for a ratio that is not above 1, or steps below 1.
    """
    from scipy.optimize import minimize_scalar

    if ratio <= 1 or steps < 1:
        raise ValueError(f"the Langevin step needs a ratio above 1 and at least 1 step, got {ratio} and {steps}")
    arguments, options = (ratio, steps), {"xatol": 1e-10}
    return float(minimize_scalar(variance_left, bounds=(0, 1), args=arguments, method="bounded", options=options).x)


@dataclass(frozen=True, kw_only=True)
class NoiseLevels:
    """`num_scales` levels in geometric progression for data of `d` dimensions, `steps` Langevin steps on each.

    It also says what any other levels lead to; `by_rule` chooses them by the rules.
    """

    d: int
    sigma_min: float
    sigma_max: float
    num_scales: int
    steps: int

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max or self.num_scales < 2:
            raise ValueError(
                f"levels need 0 < sigma_min < sigma_max and at least two of them, got {self.sigma_min:g}, "
                f"{self.sigma_max:g} and {self.num_scales}"
            )

    @classmethod
    def by_rule(
        cls, d: int, sigma_max: float, *, sigma_min: float = 0.01, steps: int = 5, share: float = 0.5
    ) -> NoiseLevels:
        """The fewest levels that overlap by `share` at least; `sigma_max` is the largest distance of two examples."""
        needed = math.log(sigma_max / sigma_min) / math.log(ratio_of_overlap(share, d)) if sigma_max > sigma_min else 0
        return cls(d=d, sigma_min=sigma_min, sigma_max=sigma_max, num_scales=max(2, 1 + math.ceil(needed)), steps=steps)

    @property
    def sigmas(self) -> Tensor:
        """(num_scales,) float64, increasing: for `SMLD(sigmas)`."""
        ends = math.log(self.sigma_min), math.log(self.sigma_max)
        return torch.linspace(*ends, self.num_scales, dtype=torch.float64).exp()

    @property
    def ratio(self) -> float:
        """gamma, the ratio of neighbouring levels."""
        return (self.sigma_max / self.sigma_min) ** (1 / (self.num_scales - 1))

    @property
    def overlap(self) -> float:
        """Overlap of neighbouring levels; technique 2 takes about 1/2."""
        return overlap(self.ratio, self.d)

    @property
    def eps(self) -> float:
        """Technique 4's step on the smallest level, `sampling.step_lr` in a config."""
        return relative_step(self.ratio, self.steps) * self.sigma_min**2

    @property
    def snr(self) -> float:
        """The same step in the form of `AnnealedLangevin`: h = 2 (snr sigma)²."""
        return math.sqrt(relative_step(self.ratio, self.steps) / 2)

    @property
    def variance(self) -> float:
        """s²/sigma_i² at the end of a level, which technique 4 brings near 1."""
        return variance_left(relative_step(self.ratio, self.steps), self.ratio, self.steps)
