"""Models of x given y, made of a model of x: they add the score of y to its score, each by an approximation of its own.

Bayes' rule says score(x_t | y) = score(x_t) + grad log p(y | x_t), where p(y | x_t) is the mean of N(y; A x_0, s²
I) over x_0 given x_t. Every method here replaces x_0's law by a simpler one with the model's mean m(x_t) = E[x_0 |
x_t]:

    dps                a point, m               (Chung et al. 2023, arXiv:2209.14687)
    pigdm              N(m, r² I)               (Song et al. 2023, openreview.net/forum?id=9_gsMA8MRKQ)
    moment_matching    N(m, Cov[x_0 | x_t])     (Boys et al. 2023, arXiv:2310.06721; Rozet et al. 2024)

The covariance is the model's own by Tweedie's second formula, sigma²/alpha dm/dx_t. `ddnm` does not use a gradient: it
corrects m itself (Wang et al. 2023, arXiv:2212.00490). In all, x_t = alpha data + sigma noise stays true, so that every
sampler and likelihood of the package takes the result.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from ..models.base import Estimate, ScoreModel, twice_differentiable
from ..sdes.linear import SDE, like
from .operators import Observation, Operator, spectral


def spread(sde: SDE, t: Tensor, variance: float) -> Tensor:
    """r² = sigma² c/(alpha² c + sigma²): the variance of x_0 | x_t for independent Gaussian data of variance c.

    Song et al. 2023 have c = 1, there sigma²/(1 + sigma²) for VE and 1 - alpha² for VP.
    """
    return variance * sde.sigma(t) ** 2 / (variance * sde.alpha(t) ** 2 + sde.sigma(t) ** 2)


class Conditional(ScoreModel):
    """`model` given y, a condition that `Observation`s bind. The score of y is a gradient through the model."""

    def __init__(self, model: ScoreModel, operator: Operator, noise: float) -> None:
        super().__init__(model.sde)
        self.model, self.operator, self.noise = model, operator, noise

    @abstractmethod
    def pull(self, e: Estimate, x: Tensor, t: Tensor, residual: Tensor, graph: bool) -> Tensor:
        """grad log p(y | x_t) at x, of the model's estimate there and residual = y - A data; both have a graph to x.
        With `graph` the result has one too."""

    def forward(self, x: Tensor, t: Tensor, *, y: Tensor, **condition: Any) -> Estimate:
        graph = torch.is_grad_enabled()
        with torch.enable_grad():
            z = x if graph and x.requires_grad else x.detach().requires_grad_()
            with twice_differentiable(graph):
                e = self.model(z, t, **condition)
            score = self.pull(e, z, t, y.to(x) - self.operator.apply(e.data), graph)
            alpha, sigma = like(self.sde.alpha(t), x), like(self.sde.sigma(t), x)
            data, noise = e.data + sigma**2 / alpha * score, e.noise - sigma * score
        fraction = e.fraction
        if not graph:
            data, noise, fraction = data.detach(), noise.detach(), None if fraction is None else fraction.detach()
        return Estimate(data, noise, e.sigma, fraction)


def _gradient(of: Tensor, x: Tensor, weights: Tensor | None = None, graph: bool = False, keep: bool = False) -> Tensor:
    """d(of)/dx, transposed, times the weights, which are 1 for a scalar."""
    (found,) = torch.autograd.grad(of, x, weights, create_graph=graph, retain_graph=graph or keep)
    return found


class PosteriorSampling(Conditional):
    def __init__(self, model: ScoreModel, operator: Operator, noise: float, rate: float | None) -> None:
        super().__init__(model, operator, noise)
        self.rate = rate

    def pull(self, e: Estimate, x: Tensor, t: Tensor, residual: Tensor, graph: bool) -> Tensor:
        if self.rate is None:
            return _gradient(residual.square().sum() / (-2 * self.noise**2), x, graph=graph)
        norms = torch.linalg.vector_norm(residual.flatten(1), dim=1)
        return _gradient(norms.sum(), x, graph=graph) * like(-self.rate / self.sde.g(t) ** 2, x)


def dps(model: ScoreModel, observation: Observation, rate: float | None = None) -> ScoreModel:
    """Diffusion posterior sampling (Chung et al. 2023): x_0 given x_t is taken for its mean. For any operator.

    Args:
        model: of x.
        observation: of the batch's examples.
        rate: None: the score of N(y; A m(x_t), s² I), as in their theorem 1; stiff where s is small, for the
            law of x_0 is much wider at most times. A number: their algorithm 1, which moves x by
            -zeta grad|y - A m(x_t)| in each of n steps whatever their length, as its continuous limit, a drift of
            rate = zeta n (zeta = 0.3 to 1 in the paper, n = 1000). With Euler-Maruyama's n equal steps it is
            the algorithm itself; with fewer steps a smaller rate is due.

    Raises ValueError for an exact observation without a rate, and a rate that is not above 0.
    """
    if rate is None and observation.noise == 0:
        raise ValueError("dps with noise 0 has no likelihood to follow: give the observation noise, or dps a rate")
    if rate is not None and not rate > 0:
        raise ValueError(f"rate must be above 0, got {rate:g}")
    return PosteriorSampling(model, observation.operator, observation.noise, rate).given(y=observation.y)


class PseudoInverse(Conditional):
    def __init__(self, model: ScoreModel, operator: Operator, noise: float, variance: float) -> None:
        super().__init__(model, operator, noise)
        self.linear, self.variance = spectral(operator, "pigdm"), variance

    def pull(self, e: Estimate, x: Tensor, t: Tensor, residual: Tensor, graph: bool) -> Tensor:
        r2 = like(spread(self.sde, t, self.variance), x)
        weights = self.linear.gain(residual, r2, self.noise)
        return _gradient(e.data, x, weights if graph else weights.detach(), graph)


def pigdm(model: ScoreModel, observation: Observation, variance: float = 1.0) -> ScoreModel:
    """Pseudo-inverse guidance (ΠGDM; Song et al. 2023, section 3): x_0 given x_t is N(m(x_t), r² I), r² by `spread`.

    grad log p(y | x_t) = (dm/dx_t)' A' (r² AA' + s² I)⁻¹ (y - A m). Exact for data N(mean, variance I), at every t
    and for every operator; for others as good as r² I is for the covariance of x_0 given x_t. For a Spectral
    operator.

    Args:
        variance: c of r² = sigma² c/(alpha² c + sigma²); the paper's is 1. Correlated data vary more than c in some
            directions, images in smooth ones many times more: with too small a c the guidance overshoots there, and
            contrasts and colours come out too strong. A larger c is the safer one.

    Raises ValueError for an operator that is not Spectral, and a variance that is not above 0.
    """
    _check(variance)
    return PseudoInverse(model, observation.operator, observation.noise, variance).given(y=observation.y)


class MomentMatching(Conditional):
    def __init__(self, model: ScoreModel, operator: Operator, noise: float, iterations: int) -> None:
        super().__init__(model, operator, noise)
        self.iterations = iterations

    def pull(self, e: Estimate, x: Tensor, t: Tensor, residual: Tensor, graph: bool) -> Tensor:
        """dm/dx' A' v with (s² I + A Cov A') v = residual, by conjugate gradients: a gradient each."""
        ratio = like(self.sde.sigma(t) ** 2 / self.sde.alpha(t), x)

        def through(v: Tensor) -> Tensor:
            return _gradient(e.data, x, self.operator.adjoint(v), graph, keep=True)

        def dot(a: Tensor, b: Tensor) -> Tensor:
            return (a * b).flatten(1).sum(1).reshape(-1, *(1,) * (a.ndim - 1))

        r = residual if graph else residual.detach()
        v, p, size = torch.zeros_like(r), r, dot(r, r)
        least = 1e-12 * size
        for _ in range(self.iterations):
            image = self.noise**2 * p + self.operator.apply(ratio * through(p))
            curvature = dot(p, image)
            # A network's Jacobian need be neither symmetric nor positive: an example whose search finds that stops.
            go = (curvature > 0) & (size > least)
            step = torch.where(go, size / curvature.where(go, 1.0), 0.0)
            v, r = v + step * p, r - step * image
            new = dot(r, r)
            p, size = torch.where(go, r + new / size.where(go, 1.0) * p, p), torch.where(go, new, size)
        return through(v)


def moment_matching(model: ScoreModel, observation: Observation, iterations: int = 3) -> ScoreModel:
    """x_0 given x_t is N(m, C) with the model's own covariance C = sigma²/alpha dm/dx_t.

    Rozet et al. 2024 (arXiv:2405.13712), "moment matching posterior sampling"; N(m, C) is Boys et al. 2023's.

    grad log p(y | x_t) = (dm/dx_t)' A' (A C A' + s² I)⁻¹ (y - A m), for any operator; the equation is solved by
    conjugate gradients, which cost one gradient through the model each, and one more. With as many iterations as
    numbers in y it is exact for every Gaussian, whatever its covariance; few regularise it where a network's C is
    rough.

    Raises ValueError for less than one iteration.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    return MomentMatching(model, observation.operator, observation.noise, iterations).given(y=observation.y)


class NullSpace(ScoreModel):
    def __init__(self, model: ScoreModel, operator: Operator, noise: float, variance: float) -> None:
        super().__init__(model.sde)
        self.model, self.operator, self.noise = model, spectral(operator, "ddnm"), noise
        self.variance = variance

    def forward(self, x: Tensor, t: Tensor, *, y: Tensor, **condition: Any) -> Estimate:
        e = self.model(x, t, **condition)
        residual = y.to(x) - self.operator.apply(e.data)
        r2 = like(spread(self.sde, t, self.variance), x)
        change = r2 * self.operator.gain(residual, r2, self.noise)
        ratio = like(self.sde.alpha(t) / self.sde.sigma(t), x)
        return e._replace(data=e.data + change, noise=e.noise - ratio * change)


def ddnm(model: ScoreModel, observation: Observation, variance: float = 1.0) -> ScoreModel:
    """The estimate of the data, with what A sees of it set to what y says (DDNM; Wang et al. 2023, section 3).

    Of an exact y, data + A⁺ (y - A data); no gradient is taken, so it costs what the model costs. Of one with noise the
    best weighted mean of both where x_0 given x_t is N(m, r² I), data + r² A' (r² AA' + s² I)⁻¹ (y - A data), which
    stands for the paper's DDNM+. `variance` is as in `pigdm`, whose Jacobian it takes for r² I. For a Spectral
    operator.

    Raises ValueError for an operator that is not Spectral, and a variance that is not above 0.
    """
    _check(variance)
    return NullSpace(model, observation.operator, observation.noise, variance).given(y=observation.y)


def _check(variance: float) -> None:
    if not variance > 0:
        raise ValueError(f"variance must be above 0, got {variance:g}")
