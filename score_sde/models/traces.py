"""Vector-Jacobian products with probes: Hutchinson's trace estimator, and every trace and divergence of the package.

For a function h of x, example by example, with the Jacobian J, a product e^T J is one backward pass. The trace of J is
the sum of e^T J e over the unit vectors e, and its expectation over random e with E e e^T = I (Hutchinson 1990);
likewise e_i (e^T J)_i estimates the entry J_ii of its diagonal.

A gradient of such a product differentiates h twice; so does a product where h itself holds a gradient, as models guided
by a classifier or an observation do. Attention is then computed in plain operations, as the fused kernels have no
second derivative. Several products share one backward pass by vmap only if each of its steps is known to be right there
(`ELEMENTARY`); through networks with norms or convolutions they are computed one by one. Under vmap torch's second
derivative of group normalisation raises for most shapes and is silently wrong for some, and its first derivative raises
in channels-last; through large networks single products are as fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ..noise import example_generators
from .base import with_graph

Law = Literal["rademacher", "gaussian", "sphere"]
Probe = Literal["rademacher", "gaussian", "sphere", "exact"]
BLOCK = 2048  # products held at a time, over all examples: each of the exact trace is D numbers

# The steps of a backward pass that are right under vmap, also for their own gradient, by autograd's names: "Add0" is
# AddBackward0. A test compares each with single products.
_STEPS = """
    Abs0 Add0 Add1 Addcmul0 Addmm0 Bmm0 Cat0 Clamp0 Clamp1 ClampMin0 ClampMin1 Clone0 ConstantPadNd0 Cos0 Div0 Div1 Elu0
    EluBackward0 Exp0 Expand0 Expm10 Flip0 Gelu0 GeluBackward0 Index0 IndexPutImpl0 LeakyRelu0 LeakyReluBackward0 Lerp0
    Lerp1 Log0 Log1P0 LogSoftmax0 LogSoftmaxBackwardData0 Logsumexp0 MaskedFill0 Maximum0 Mean0 Mean1 Minimum0 Mm0 Mul0
    Mul1 Neg0 Permute0 Pow0 Reciprocal0 Relu0 ReshapeAlias0 Rsqrt0 Rsub1 Select0 SelectBackward0 Sgn0 Sigmoid0
    SigmoidBackward0 Silu0 Sin0 Slice0 SliceBackward0 Softmax0 SoftmaxBackwardData0 Softplus0 SoftplusBackward0 Split0
    Sqrt0 Squeeze1 Stack0 Sub0 Sum0 Sum1 T0 Tanh0 TanhBackward0 ThresholdBackward0 ToCopy0 Transpose0 Unbind0
    UnsafeView0 Unsqueeze0 View0 Where0
"""
# The ends of a graph; the second is torchdiffeq's, for its times, through which no product goes.
_ENDS = {"torch::autograd::AccumulateGrad", "_StitchGradientBackward"}
ELEMENTARY = frozenset(f"{step[:-1]}Backward{step[-1]}" for step in _STEPS.split()) | _ENDS


def draw_probes(probe: Probe | Tensor, count: int, x: Tensor, seed: int | torch.Generator, first: int) -> Tensor:
    """Probes of Hutchinson's trace estimator (Skilling-Hutchinson), (K, B, *shape); for "exact" the D unit vectors.

    Those of example i depend on (seed, first + i) alone; a torch.Generator serves the whole batch. Raises ValueError
    for an unknown probe, a tensor of another shape, or a count below 1.
    """
    if isinstance(probe, Tensor):
        if probe.shape[1:] != x.shape or not len(probe):
            raise ValueError(f"a probe for x of shape {tuple(x.shape)} must be (K, *x.shape), got {tuple(probe.shape)}")
        return probe.to(x)
    if probe == "exact":
        d = math.prod(x.shape[1:])
        return torch.eye(d, dtype=x.dtype, device=x.device).reshape(d, 1, *x.shape[1:]).expand(d, *x.shape)
    if probe not in ("rademacher", "gaussian", "sphere"):
        names = '"rademacher", "gaussian", "sphere", "exact"'
        raise ValueError(f"unknown probe {probe!r}; use {names} or a tensor (K, B, *shape)")
    if count < 1:
        raise ValueError(f"probes must be at least 1, got {count}")
    if isinstance(seed, torch.Generator):
        z = torch.randn(count, *x.shape, generator=seed, device=seed.device).to(x)
    else:
        generators = example_generators(seed, first, len(x))
        rows = [torch.randn(count, *x.shape[1:], generator=g) for g in generators]
        z = torch.stack(rows, dim=1).to(x) if rows else x.new_zeros(count, *x.shape)
    return projections(z, probe)


def projections(z: Tensor, law: Law = "rademacher") -> Tensor:
    """Random projections v with E v v^T = I from standard normal numbers z, both (M, B, *shape).

    "rademacher": signs; "gaussian": z itself; "sphere": uniform on the sphere of radius sqrt(D).
    Raises ValueError for another law.
    """
    if law == "rademacher":
        return torch.where(z < 0, -1.0, 1.0).to(z)
    if law == "gaussian":
        return z
    if law == "sphere":
        d = math.prod(z.shape[2:])
        lengths = z.flatten(2).norm(dim=2).reshape(*z.shape[:2], *(1,) * (z.ndim - 2))
        return z * (math.sqrt(d) / lengths)
    raise ValueError(f'unknown law of projections {law!r}; use "rademacher", "gaussian" or "sphere"')


def of_rows(e: Tensor, rows: Tensor, exact: bool) -> Tensor:
    """The probes (K, n, *shape) of the examples `rows`. All examples share the unit vectors: a view, not D² numbers."""
    return e[:, :1].expand(-1, len(rows), *e.shape[2:]) if exact else e[:, rows.to(e.device)]


def differentiable(h: Callable[[Tensor], Tensor], x: Tensor, needed: str) -> tuple[Tensor, Tensor, bool]:
    """`with_graph`, for products with the Jacobian of h.

    Raises ValueError, with the sentence `needed`, if h has no gradient in x, and where torch's third derivative is
    wrong.
    """
    value, y, graph = with_graph(h, x)
    if not value.requires_grad:
        raise ValueError(needed)
    if graph and any("NormBackwardBackward" in step for step in _steps(value, y)):
        raise ValueError(
            "the model holds a gradient, by guidance or as an energy, so a gradient of its divergence takes third "
            "derivatives, and those of torch's layer, batch and instance normalisation are wrong: write the norm in "
            "plain operations, or use GroupNorm"
        )
    return value, y, graph


def products(value: Tensor, y: Tensor, e: Tensor, graph: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of the probes e, (K, B, *shape), and their e^T J, with J = d value/dy from `differentiable`.

    A product is differentiable if `graph`, and zero where the value does not depend on y.
    """
    together = len(e) > 1 and all(step in ELEMENTARY for step in _steps(value, y))
    for block in e.split(max(BLOCK // max(len(y), 1), 1)):
        yield block, _products(value, y, block, graph, together)


def quadratic_forms(value: Tensor, y: Tensor, e: Tensor, graph: bool) -> Tensor:
    """e^T J e for each of the K probes, (K, B)."""
    return torch.cat([(product * block).flatten(2).sum(2) for block, product in products(value, y, e, graph)])


def _steps(value: Tensor, y: Tensor) -> Iterator[str]:
    """Autograd's names of the steps of the value's backward pass, without those that come before y."""
    seen, left = {None, y.grad_fn}, [value.grad_fn]
    while left:
        step = left.pop()
        if step is not None and step not in seen:
            yield step.name()
            seen.add(step)
            left += [previous for previous, _ in step.next_functions]


def _products(value: Tensor, y: Tensor, e: Tensor, graph: bool, together: bool) -> Tensor:
    """e^T J for each of the probes e, (K, B, *shape)."""
    take = partial(torch.autograd.grad, value, y, retain_graph=True, create_graph=graph, materialize_grads=True)
    if together and len(e) > 1:
        try:
            return take(e, is_grads_batched=True)[0]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # vmap refuses random numbers and changes in place, as in checkpointed layers
            pass
    return torch.stack([take(probe)[0] for probe in e])
