"""Continuous normalizing flows (CNF, FFJORD): a density transported by an ODE, for any vector field.

A flow dx/dt = v(t, x) takes data at t0 to a base density at t1. Along a path d log p/dt = -div v (the instantaneous
change of variables; Chen et al. 2018, arXiv:1806.07366, theorem 1), so

    log p(x at t0) = log base(x at t1) + integral from t0 to t1 of div v dt,

with the state and the integral solved as one ODE. The divergence is exact, or Hutchinson's estimate e^T J e with random
e of unit covariance, drawn once per example and constant during the solve (Grathwohl et al. 2019, arXiv:1810.01367).
Each evaluation is one forward pass and a vector-Jacobian product for each probe. The product's squared length estimates
|J|², which regularises the flow without a further product (Finlay et al. 2020, arXiv:2002.02798).

The probability flow of a score model is such a flow (Song et al. 2021, eq. 39): `score_flow` returns it, with the
model's parameters, and `log_likelihood` is its `evaluate`. Without gradients, Solver("embedded") solves it on its
circle, with a step size for each example.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from ..machine.devices import widest
from ..models.base import ScoreModel, default_state, in_precision_of
from ..models.traces import Law, Probe, differentiable, draw_probes, of_rows, products, projections
from ..noise import Noise, noise_source
from ..ode.circle import NO_JACOBIAN, Circle, Slopes, carry
from ..ode.integrators import EACH, Solver, integrate
from ..sdes.linear import SDE, WrongShape, normal_log_prob

Velocity = Callable[[Tensor, Tensor], Tensor]  # (t, x) -> dx/dt of x's shape, with t () in x's dtype and on its device
DEFAULT = Solver()


class Evaluation(NamedTuple):
    """Results of a flow from data to base; see `Likelihood` for the first four.

    `kinetic` is the integral of |v|² and `jacobian` that of |J|², both (B,), or None if not computed.
    """

    log_prob: Tensor
    std_error: Tensor
    latent: Tensor
    nfe: float
    kinetic: Tensor | None
    jacobian: Tensor | None


class ProbabilityFlow(nn.Module):
    """`SDE.flow` with the model's estimates: the ODE with the marginals of the model's SDE (Song et al. 2021, eq. 13).

    Raises ValueError where x requires a gradient and the model has none in x.
    """

    def __init__(self, model: ScoreModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        e = self.model(x, t)
        if x.requires_grad and not e.noise.requires_grad:  # the velocity would have f's gradient alone
            raise ValueError(NO_JACOBIAN)
        return self.model.sde.flow(e.data.to(x.dtype), e.noise.to(x.dtype), t)


class NetworkVelocity(nn.Module):
    """A network F(x, label), like those of `networks`, as a velocity: its time label is `scale` t, of shape (1,).

    The batch shares one label, so that its embedding costs nothing. The fastest wave of a sinusoidal embedding is
    sin(scale t). With 999 t, as in score models, maximum likelihood trains a velocity that oscillates between the
    solver's steps, and the likelihood from fixed steps is not the flow's: keep `scale` small in training.
    """

    def __init__(self, network: nn.Module, scale: float = 10.0) -> None:
        super().__init__()
        self.network, self.scale = network, scale

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.network(in_precision_of(self.network, x), self.scale * t[None])


class Flow(nn.Module):
    """A continuous normalizing flow, also known as FFJORD: dx/dt = velocity(t, x) from data at t0 to a base at t1.

    Args:
        velocity: (t, x) -> tensor of x's shape; an nn.Module if its parameters are to be trained by the adjoint. t is
            () in x's dtype and on its device; for a `ProbabilityFlow` in float64 on the CPU, for its SDE.
        base: z -> (B,), the log density at t1; N(0, I) by default.
        draw: (shape, noise) -> z, a draw of the base, for `sample`; by default N(0, I)'s, with the default base only.
        t0, t1: the interval, t0 < t1.
        solver: of the ODE, in both directions.
        sde: a chain's, whose log SNR is then the solver's time; see `ode.integrate`.

    In grad mode all results except samples are differentiable, in the data and in the parameters of velocity and base,
    by the solver's `gradient`; under torch.no_grad() no graph is kept. Networks with dropout must be in eval mode: an
    ODE needs a velocity that does not change from one evaluation to the next.
    """

    def __init__(
        self, velocity: Velocity, base: Callable[[Tensor], Tensor] | None = None,
        draw: Callable[[Sequence[int], Noise], Tensor] | None = None, *,
        t0: float = 0.0, t1: float = 1.0, solver: Solver = DEFAULT, sde: SDE | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if not -math.inf < t0 < t1 < math.inf:
            raise ValueError(f"a flow goes from data at t0 to its base at a later t1, got t0 = {t0} and t1 = {t1}")
        self.velocity = velocity
        self.base = base or normal_log_prob
        self.draw = draw
        self.t0, self.t1, self.solver, self.sde = t0, t1, solver, sde

    def replace(self, **changes: Any) -> Flow:
        """The same flow with other arguments, as in ``flow.replace(solver=Solver("rk4", steps=8))``."""
        own = {name: getattr(self, name) for name in ("velocity", "base", "draw", "t0", "t1", "solver", "sde")}
        return Flow(**{**own, **changes})

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """The velocity at (t, x), of x's shape; t is () in float64 on the CPU. Raises ValueError for another shape."""
        velocity = self.velocity(t if isinstance(self.velocity, ProbabilityFlow) else t.to(x), x)
        if velocity.shape != x.shape:
            raise WrongShape(f"the velocity has shape {tuple(velocity.shape)} for a state of shape {tuple(x.shape)}")
        return velocity.to(x.dtype)

    def log_prob(self, x: Tensor, **options: Any) -> Tensor:
        """Log density of x in nats, (B,); options as for `evaluate`."""
        return self.evaluate(x, **options).log_prob

    def evaluate(
        self, x: Tensor, *, probe: Probe | Tensor = "exact", probes: int = 1, seed: int | torch.Generator = 0,
        first: int = 0, kinetic: bool = False, jacobian: bool = False,
    ) -> Evaluation:  # fmt: skip
        """Log density of x, the state at t0, and the regularisers of its path to the base.

        Args:
            x: (B, *shape); half precision is converted to float32.
            probe, probes, seed, first: as for `log_likelihood`. In training pass a torch.Generator as seed: it serves
                the whole batch, and each step draws other probes.
            kinetic: also integrate |v|², the kinetic energy (Finlay et al. 2020).
            jacobian: also integrate |J|², the squared Frobenius norm of the velocity's Jacobian: exact for "exact",
                else its unbiased estimate |e^T J|² with the same probe.

        Both integrals enter the solver's error norm. Raises ValueError for an unknown probe, a wrong shape, a velocity
        without gradient, or a gradient that torch has wrong (see `traces.differentiable`); RuntimeError where the
        solver gives up.
        """
        x = as_state(x)
        batch, d = x.shape[0], math.prod(x.shape[1:])
        e, exact = draw_probes(probe, probes, x, seed, first), isinstance(probe, str) and probe == "exact"
        k = 1 if exact else len(e)  # columns of traces
        if self.solver.method == EACH and (kinetic or jacobian):
            raise ValueError(f'kinetic and jacobian are integrals over t: use dopri5 for them, not "{EACH}"')

        slopes = partial(_slopes_and_rates, probes=e, exact=exact, kinetic=kinetic, jacobian=jacobian)
        latent, integrals, nfe = self.solve(x, slopes, k + kinetic + jacobian, d)
        integrals, costs = integrals[:, :k], integrals[:, k:]
        base = self.base(latent)
        if base.shape != (batch,):
            raise ValueError(f"the base log density must have shape ({batch},), one each, got {tuple(base.shape)}")
        # Over K probes sqrt(variance / K), which is 0/0 = NaN for K = 1.
        spread = (integrals - integrals.mean(1, keepdim=True)).detach().square().sum(1)
        std_error = spread if exact else torch.sqrt(spread / (k * (k - 1)))
        return Evaluation(
            base + integrals.mean(1), std_error, latent.to(x.dtype), nfe, costs[:, 0] if kinetic else None,
            costs[:, -1] if jacobian else None,
        )  # fmt: skip

    def solve(
        self, x: Tensor, slopes: Slopes, columns: int, dimensions: int = 1, *, back: bool = False
    ) -> tuple[Tensor, Tensor, float]:
        """(state at t1, integrals (B, columns) of the rates, evaluations per example), from x at t0; see `carry`.

        `back` goes from x at t1 to t0; the integrals then are from t1 to t0 too.
        """
        batch, d, wide = len(x), math.prod(x.shape[1:]), widest(x)
        t0, t1 = (self.t1, self.t0) if back else (self.t0, self.t1)
        if self.solver.method == EACH:
            latent, integrals, costs = self._carry(x, t0, t1, slopes, columns, dimensions)
            return latent, integrals, costs.double().mean().item() if batch else 0
        rows = torch.arange(batch)

        def field(t: Tensor, state: Tensor) -> Tensor:
            slope, rates = slopes(lambda y: self(t, y), state[:, :d].to(x.dtype).reshape(x.shape), rows)
            return torch.cat([slope.flatten(1).to(wide), rates.to(wide)], dim=1)

        start = torch.cat([x.flatten(1).to(wide), x.new_zeros(batch, columns, dtype=wide)], dim=1)
        end, nfe = self._integrate(field, start, t0, t1)
        return end[:, :d].reshape(x.shape), end[:, d:], nfe

    def path(self, x: Tensor, times: Sequence[float] | Tensor) -> Tensor:
        """The states (len(times), B, *shape) at `times`, forwards or backwards, from x at the first of them.

        The ODE is solved from each time to the next, with the solver's number of fixed steps between each two. Raises
        ValueError for times that are not a 1-D grid, rising or falling, within [t0, t1].
        """
        grid = torch.as_tensor(times, dtype=torch.float64).cpu()
        monotonic = grid.ndim == 1 and len(grid) and bool((grid.diff() > 0).all() or (grid.diff() < 0).all())
        if not monotonic or grid.min() < self.t0 or grid.max() > self.t1:
            raise ValueError(f"times must rise or fall within [{self.t0:g}, {self.t1:g}], got {grid.tolist()}")
        x = as_state(x)
        wide = widest(x)
        field = lambda t, y: self(t, y.to(x.dtype)).to(wide)
        states = [x.to(wide)]
        for t, s in zip(grid[:-1].tolist(), grid[1:].tolist()):
            each = self.solver.method == EACH
            y, *_ = self._carry(states[-1].to(x.dtype), t, s) if each else self._integrate(field, states[-1], t, s)
            states.append(y)
        return torch.stack(states).to(x.dtype)

    def encode(self, x: Tensor) -> Tensor:
        """The state at t1 of the path through x at t0."""
        return self.path(x, (self.t0, self.t1))[-1]

    def decode(self, z: Tensor) -> Tensor:
        """The state at t0 of the path through z at t1."""
        return self.path(z, (self.t1, self.t0))[-1]

    @torch.no_grad()
    def sample(
        self, shape: tuple[int, ...], *, log_prob: bool = False, probe: Probe | Tensor = "exact",
        seed: int | torch.Generator = 0, first: int = 0, dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Any:  # fmt: skip
        """Decode a draw (B, *shape) of the base; seed, first, dtype and device as for `samplers.sample`.

        With `log_prob` returns (x, log density in nats (B,)), both from one solution of the ODE: with the exact trace,
        or an unbiased estimate by `probe`, one random vector for each example, as for `evaluate`.

        Raises ValueError for a flow with a custom base and no `draw`.
        """
        if self.draw is None and self.base is not normal_log_prob:
            raise ValueError("this flow's base is a log density alone: give Flow a draw(shape, noise) of it too")
        dtype, device = default_state(self, dtype, device)
        noise = noise_source(tuple(shape), seed, first, dtype, device)
        z = self.draw(shape, noise) if self.draw else noise(torch.empty(tuple(shape)))
        if not log_prob:
            return self.decode(z)
        exact = isinstance(probe, str) and probe == "exact"
        if isinstance(probe, str) and probe in get_args(Law):  # from the examples' own streams, where z has ended
            probe = projections(noise(z)[None], cast(Law, probe))
        slopes = partial(
            _slopes_and_rates, probes=draw_probes(probe, 1, z, seed, first), exact=exact, kinetic=False, jacobian=False
        )
        x, divergence, _ = self.solve(z, slopes, 1, math.prod(z.shape[1:]), back=True)
        return x.to(z.dtype), self.base(z) - divergence[:, 0]

    def _carry(
        self, x: Tensor, t: float, s: float, slopes: Slopes | None = None, columns: int = 0, dimensions: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`circle.carry` for the model. Raises ValueError for other velocities, and where a gradient is wanted."""
        if not isinstance(self.velocity, ProbabilityFlow):
            raise ValueError(f'"{EACH}" solves the probability flow of a score model: use dopri5 for another velocity')
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.velocity.parameters())):
            raise ValueError(f'"{EACH}" has no gradient: use dopri5, or evaluate under torch.no_grad()')
        return carry(Circle(self.velocity.model), x, t, s, self.solver, slopes, columns, dimensions)

    def _integrate(self, field: Velocity, y: Tensor, t0: float, t1: float) -> tuple[Tensor, int]:
        parameters: tuple[Tensor, ...] = ()
        if isinstance(self.velocity, nn.Module):
            parameters = tuple(p for p in self.velocity.parameters() if p.requires_grad)
        elif torch.is_grad_enabled() and self.solver.gradient == "adjoint":
            raise ValueError(
                "the adjoint must know the velocity's parameters: make it an nn.Module instead of a function, "
                'or use Solver(gradient="backprop")'
            )
        return integrate(field, y, t0, t1, solver=self.solver, sde=self.sde, parameters=parameters)


def score_flow(
    model: ScoreModel, *, base: Callable[[Tensor], Tensor] | None = None, t_min: float = 1e-5, solver: Solver = DEFAULT,
) -> Flow:  # fmt: skip
    """A score model's probability flow from data at t_min to the SDE's prior at t = 1, with the model's parameters.

    ``-score_flow(model).log_prob(x).mean()`` is a loss that fine-tunes the model by likelihood; bind conditions first,
    as in ``score_flow(model.given(label=y))``. `base` is x -> (B,), the log density at t = 1, by default the prior's,
    which is not quite the true p_1. Raises ValueError for a t_min without noise.
    """
    sde = model.sde
    if not 0 <= t_min < 1 or not bool(sde.sigma(torch.tensor(t_min, dtype=torch.float64)) > 0):
        raise ValueError(f"t_min must lie between 0 and 1, where {sde} has noise, got {t_min:g}; 1e-5 is usual")
    return Flow(ProbabilityFlow(model), base or sde.prior_log_prob, sde.prior, t0=t_min, t1=1.0, solver=solver, sde=sde)


def straightness(flow: Flow, x: Tensor) -> Tensor:
    """How far the flow's paths from x (B, *shape) at t0 are from straight lines at constant speed, (B,); 0 if they are.

    The integral of |v - (x_1 - x_0)/(t1 - t0)|² over t (Liu et al. 2023, arXiv:2209.03003, section 2.2), which is that
    of |v|², the kinetic energy, less |x_1 - x_0|²/(t1 - t0). A straight path is solved in one step of Euler's method.
    """

    def slopes(velocity: Callable[[Tensor], Tensor], y: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            v = velocity(y)
        return v, v.square().flatten(1).sum(1, keepdim=True)

    end, energy, _ = flow.solve(x, slopes, 1, math.prod(x.shape[1:]))
    return energy[:, 0] - (end - x).square().flatten(1).sum(1) / (flow.t1 - flow.t0)


def as_state(x: Tensor) -> Tensor:
    """x in float32 or float64: rounding in half precision is far above tolerances. Raises ValueError unless a batch."""
    if not isinstance(x, Tensor):
        raise ValueError(f"x must be a tensor (B, *shape), got {type(x).__name__}; torch.as_tensor(x) makes it one")
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(f"x must be (B, *shape) in floating point, got {x.dtype} of shape {tuple(x.shape)}")
    return x.to(torch.promote_types(x.dtype, torch.float32))


def refuse_gradient(x: Tensor, name: str, instead: str) -> None:
    """Raise ValueError where x requires a gradient, which the function `name` would silently lose."""
    if torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad:
        raise ValueError(f"{name} has no gradient, and x asks for one: take score_flow(model).{instead}, or x.detach()")


def _slopes_and_rates(
    velocity: Callable[[Tensor], Tensor], x: Tensor, rows: Tensor, *, probes: Tensor, exact: bool, kinetic: bool,
    jacobian: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The velocity v at x, and e^T J e (B, K) for the probes e (K, *x.shape), then if wanted |v|² and mean |e^T J|².

    `rows` are the examples of x, of those that have probes. If `exact` the probes are the unit vectors, and both are
    sums over them, (B, 1).
    """
    e = probes if len(rows) == probes.shape[1] else of_rows(probes, rows, exact)
    value, y, graph = differentiable(velocity, x, "the velocity has no gradient in x, and a density needs its Jacobian")
    traces, norms = [], []
    for block, product in products(value, y, e, graph):
        traces.append((product * block).flatten(2).sum(2))
        if jacobian:
            norms.append(product.square().flatten(2).sum(2))
    trace = torch.cat(traces).T
    rates = [trace.sum(1, keepdim=True) if exact else trace]
    if kinetic:
        rates.append(value.square().flatten(1).sum(1, keepdim=True))
    if jacobian:
        squares = torch.cat(norms).T
        rates.append(squares.sum(1, keepdim=True) if exact else squares.mean(1, keepdim=True))
    return value, torch.cat(rates, dim=1)
