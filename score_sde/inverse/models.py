"""Models of x conditioned on y from a model of x: DPS, ΠGDM, moment matching and DDNM, which approximate y's score.

Bayes' rule says score(x_t | y) = score(x_t) + grad log p(y | x_t), where p(y | x_t) is the mean of N(y; A x_0, s² I)
over x_0 given x_t. Every method here replaces x_0's law by a simpler one with the model's mean m(x_t) = E[x_0 | x_t]:

    dps                a point, m               (Chung et al. 2023, arXiv:2209.14687)
    pigdm              N(m, r² I)               (Song et al. 2023, openreview.net/forum?id=9_gsMA8MRKQ)
    moment_matching    N(m, Cov[x_0 | x_t])     (Boys et al. 2023, arXiv:2310.06721; Rozet et al. 2024)

The covariance is the model's own by Tweedie's second formula, sigma²/alpha dm/dx_t. `ddnm` needs no gradient: it
corrects m itself (Wang et al. 2023, arXiv:2212.00490). For all of them x_t = alpha data + sigma noise remains true, so
every sampler and likelihood of the package takes the result.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from ..models.base import Estimate, ScoreModel, with_graph
from ..models.guidance import with_score
from ..sdes.linear import SDE, like
from .operators import Observation, Operator, Spectral, spectral


def spread(sde: SDE, t: Tensor, variance: float) -> Tensor:
    """r² = sigma² c/(alpha² c + sigma²): the variance of x_0 | x_t for independent Gaussian data of variance c.

    Song et al. 2023 have c = 1, there sigma²/(1 + sigma²) for VE and 1 - alpha² for VP.
    """
    return variance * sde.sigma(t) ** 2 / (variance * sde.alpha(t) ** 2 + sde.sigma(t) ** 2)


class Conditional(ScoreModel):
    """`model` of x conditioned on y, by a score of y that is a gradient through the model.

    `operator` and `noise` are those of y, `setting` is the method's own number: its rate, variance or iterations.
    """

    def __init__(self, model: ScoreModel, operator: Operator, noise: float, setting: Any) -> None:
        super().__init__(model.sde)
        self.model, self.operator, self.noise, self.setting = model, operator, noise, setting

    @abstractmethod
    def pull(self, e: Estimate, x: Tensor, t: Tensor, residual: Tensor, graph: bool) -> Tensor:
        """grad log p(y | x_t) at x, from the model's estimate e and residual = y - A data, which have a graph to x.

        With `graph` the result has one too.
        """

    def forward(self, x: Tensor, t: Tensor, *, y: Tensor, **condition: Any) -> Estimate:
        e, z, graph = with_graph(lambda z: self.model(z, t, **condition), x)
        with torch.enable_grad():
            score = self.pull(e, z, t, y.to(x) - self.operator.apply(e.data), graph)
            e = with_score(self.sde, e, score, t)
        if graph:
            return e
        fraction = None if e.fraction is None else e.fraction.detach()
        return Estimate(e.data.detach(), e.noise.detach(), e.sigma, fraction)


def _gradient(
    value: Tensor, x: Tensor, weights: Tensor | None = None, graph: bool = False, keep: bool = False
) -> Tensor:
    """d(value)/dx, transposed, times the weights, which are 1 for a scalar."""
    return torch.autograd.grad(value, x, weights, create_graph=graph, retain_graph=graph or keep)[0]


class PosteriorSampling(Conditional):
    def pull(self, e: Estimate, x: Tensor, t: Tensor, residual: Tensor, graph: bool) -> Tensor:
        rate: float | None = self.setting
        if rate is None:
            return _gradient(residual.square().sum() / (-2 * self.noise**2), x, graph=graph)
        norms = torch.linalg.vector_norm(residual.flatten(1), dim=1)
        return _gradient(norms.sum(), x, graph=graph) * like(-rate / self.sde.g(t) ** 2, x)


def dps(model: ScoreModel, observation: Observation, rate: float | None = None) -> ScoreModel:
    """Diffusion posterior sampling (DPS; Chung et al. 2023): its mean replaces x_0 given x_t. For any operator.

    Args:
        rate: None: the score of N(y; A m(x_t), s² I), as in their theorem 1; stiff where s is small, as the law of x_0
            is much wider at most times. A number: their algorithm 1, which moves x by -zeta grad|y - A m(x_t)| in each
            of n steps of any length, in its continuous limit, a drift of rate = zeta n (zeta = 0.3 to 1 in the paper,
            n = 1000). With Euler-Maruyama's n equal steps it is the algorithm itself; fewer steps need a smaller rate.

    Raises ValueError for an exact observation without a rate, and a rate that is not above 0.
    """
    if rate is None and observation.noise == 0:
        raise ValueError("dps with noise 0 has no likelihood to follow: give the observation noise, or dps a rate")
    if rate is not None and not rate > 0:
        raise ValueError(f"rate must be above 0, got {rate:g}")
    return PosteriorSampling(model, observation.operator, observation.noise, rate).given(y=observation.y)


class PseudoInverse(Conditional):
    operator: Spectral

    def pull(self, e: Estimate, x: Tensor, t: Tensor, residual: Tensor, graph: bool) -> Tensor:
        weights = self.operator.gain(residual, like(spread(self.sde, t, self.setting), x), self.noise)
        return _gradient(e.data, x, weights if graph else weights.detach(), graph)


def pigdm(model: ScoreModel, observation: Observation, variance: float = 1.0) -> ScoreModel:
    """Pseudo-inverse guidance (ΠGDM; Song et al. 2023, section 3): x_0 given x_t is N(m(x_t), r² I), r² by `spread`.

    grad log p(y | x_t) = (dm/dx_t)' A' (r² AA' + s² I)⁻¹ (y - A m), for a Spectral operator. It is exact for data
    N(mean, variance I), at every t and for every operator; for other data it is as good as r² I is as the covariance of
    x_0 given x_t.

    `variance` is c of r² = sigma² c/(alpha² c + sigma²); the paper's is 1. Correlated data vary more than c in some
    directions, images in smooth ones many times more: with too small a c the guidance overshoots there, and contrasts
    and colours become too strong. A larger c is safer. Raises ValueError for an operator that is not Spectral, and a
    variance that is not above 0.
    """
    operator = _operator(observation, variance, "pigdm")
    return PseudoInverse(model, operator, observation.noise, variance).given(y=observation.y)


class MomentMatching(Conditional):
    def pull(self, e: Estimate, x: Tensor, t: Tensor, residual: Tensor, graph: bool) -> Tensor:
        """dm/dx' A' v with (s² I + A Cov A') v = residual, by conjugate gradients: a gradient for each iteration."""
        ratio = like(self.sde.sigma(t) ** 2 / self.sde.alpha(t), x)
        through = lambda v: _gradient(e.data, x, self.operator.adjoint(v), graph, keep=True)
        dot = lambda a, b: (a * b).flatten(1).sum(1).reshape(-1, *(1,) * (a.ndim - 1))
        r = residual if graph else residual.detach()
        v, p, size = torch.zeros_like(r), r, dot(r, r)
        least = 1e-12 * size
        for _ in range(self.setting):
            image = self.noise**2 * p + self.operator.apply(ratio * through(p))
            curvature = dot(p, image)
            # A network's Jacobian may be neither symmetric nor positive: an example where this shows stops.
            go = (curvature > 0) & (size > least)
            step = torch.where(go, size / curvature.where(go, 1.0), 0.0)
            v, r = v + step * p, r - step * image
            new = dot(r, r)
            p, size = torch.where(go, r + new / size.where(go, 1.0) * p, p), torch.where(go, new, size)
        return through(v)


def moment_matching(model: ScoreModel, observation: Observation, iterations: int = 3) -> ScoreModel:
    """Moment matching posterior sampling: x_0 given x_t is N(m, C) with the model's C = sigma²/alpha dm/dx_t.

    Rozet et al. 2024 (arXiv:2405.13712); N(m, C) is Boys et al. 2023's:

    grad log p(y | x_t) = (dm/dx_t)' A' (A C A' + s² I)⁻¹ (y - A m), for any operator; the equation is solved by
    conjugate gradients, which cost one gradient through the model each, and one more. With as many iterations as
    numbers in y it is exact for Gaussian data of any covariance; few iterations regularise the rough C of a network.
    Raises ValueError for less than one iteration.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    return MomentMatching(model, observation.operator, observation.noise, iterations).given(y=observation.y)


class NullSpace(ScoreModel):
    def __init__(self, model: ScoreModel, operator: Spectral, noise: float, variance: float) -> None:
        super().__init__(model.sde)
        self.model, self.operator, self.noise, self.variance = model, operator, noise, variance

    def forward(self, x: Tensor, t: Tensor, *, y: Tensor, **condition: Any) -> Estimate:
        e = self.model(x, t, **condition)
        residual = y.to(x) - self.operator.apply(e.data)
        r2 = like(spread(self.sde, t, self.variance), x)
        change = r2 * self.operator.gain(residual, r2, self.noise)
        ratio = like(self.sde.alpha(t) / self.sde.sigma(t), x)
        return e._replace(data=e.data + change, noise=e.noise - ratio * change)


def ddnm(model: ScoreModel, observation: Observation, variance: float = 1.0) -> ScoreModel:
    """Null-space model (DDNM; Wang et al. 2023, section 3): the estimate of the data, made consistent with y.

    With an exact y it is data + A⁺ (y - A data); it takes no gradient, so it costs as much as the model. With noise in
    y it is the best weighted mean of both where x_0 given x_t is N(m, r² I), data + r² A' (r² AA' + s² I)⁻¹ (y - A
    data), instead of the paper's DDNM+. `variance` is as in `pigdm`, whose Jacobian it replaces by r² I. For a Spectral
    operator. Raises ValueError for an operator that is not Spectral, and a variance that is not above 0.
    """
    operator = _operator(observation, variance, "ddnm")
    return NullSpace(model, operator, observation.noise, variance).given(y=observation.y)


def _operator(observation: Observation, variance: float, who: str) -> Spectral:
    if not variance > 0:
        raise ValueError(f"variance must be above 0, got {variance:g}")
    return spectral(observation.operator, who)
