"""Linear operators A and observations y = A x + noise · z: inpainting, colourisation, super-resolution, deblurring.

Every operator has `apply`, A, and `adjoint`, A'. A `Spectral` one can also apply a function to A'A, in the basis of its
singular vectors, at the cost of a few applications; it gives pseudo-inverses and the gains of Kalman filters:

    A⁺ y = f(A'A) A'y with f(v) = 1/v, 0 for v = 0,
    A' (r² AA' + s² I)⁻¹ y = f(A'A) A'y with f(v) = 1/(r² v + s²).

Examples are (B, *shape) of any rank; operators work for any B, and in the state's dtype and on its device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..machine.devices import sent

Weights = Callable[[Tensor], Tensor]  # squared singular values -> what to multiply with there


class Operator(ABC):
    """A linear map of examples."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """A x for each example."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """A' y for each observation."""

    def clean(self, y: Tensor) -> Tensor:
        """y with 0 where nothing was observed, as in a mask's hidden pixels; for other operators y itself."""
        return y

    def count(self, y: Tensor) -> int:
        """The number of observed values of an example."""
        return math.prod(y.shape[1:])


class Spectral(Operator):
    """An operator whose singular values are known."""

    @abstractmethod
    def filtered(self, x: Tensor, weights: Weights) -> Tensor:
        """weights(A'A) x.

        `weights` gets squared singular values that broadcast against x or its coordinates, numerically vanishing ones
        as 0; its result may have a value per example, (B, 1, ..., 1).
        """

    def largest(self, x: Tensor) -> float:
        """The largest squared singular value, for examples like those of x."""
        seen: list[float] = []

        def note(v: Tensor) -> Tensor:
            seen.append(v.max().item())
            return v

        self.filtered(x[:1], note)
        return max(seen)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """A⁺ y: the shortest of all x that best explain y."""
        return self.filtered(self.adjoint(y), reciprocal)

    def gain(self, y: Tensor, variance: Tensor | float, noise: float) -> Tensor:
        """A' (variance AA' + noise² I)⁺ y, with the variance a number or (B, 1, ..., 1)."""
        return self.filtered(self.adjoint(y), lambda v: reciprocal(variance * v + noise**2 * (v > 0).to(v)))


def reciprocal(v: Tensor) -> Tensor:
    """1/v, and 0 for v = 0."""
    return torch.where(v > 0, 1 / v.where(v > 0, 1.0), 0.0)


class Scaled(Spectral):
    """An operator with AA' = square I on its range, so that A'A/square is a projection."""

    square: float = 1.0

    def filtered(self, x: Tensor, weights: Weights) -> Tensor:
        lost, kept = (weights(x.new_full((), v)) for v in (0.0, self.square))
        return lost * x + (kept - lost) * (self.adjoint(self.apply(x)) / self.square)


@dataclass(frozen=True, eq=False)
class Mask(Scaled):
    """x where it is known, and 0 elsewhere: inpainting, forecasting, or any missing values.

    `known` is true or 1 where x is observed; it broadcasts against an example, as (H, W), and the batch shares it.
    Hidden values of x and y are never read: they may be NaN. Raises ValueError for a mask with values besides 0 and 1.
    """

    known: Tensor

    def __post_init__(self) -> None:
        if self.known.dtype != torch.bool:
            if not bool(((self.known == 0) | (self.known == 1)).all()):
                raise ValueError("a mask is true or 1 where x is known and false or 0 where not, got other values")
            object.__setattr__(self, "known", self.known.to(torch.bool))

    def apply(self, x: Tensor) -> Tensor:
        try:
            return torch.where(sent(self.known, x.device), x, 0.0)
        except RuntimeError:
            raise ValueError(
                f"the mask has shape {tuple(self.known.shape)}, which does not fit examples of shape "
                f"{tuple(x.shape[1:])}: make it of that shape, or (H, W) for images"
            ) from None

    def adjoint(self, y: Tensor) -> Tensor:
        return self.apply(y)

    def clean(self, y: Tensor) -> Tensor:
        return self.apply(y)

    def count(self, y: Tensor) -> int:
        return int(self.known.expand(y.shape[1:]).sum())


@dataclass(frozen=True, eq=False)
class Grey(Scaled):
    """One channel from several, y = sum_c weights_c x_c: the grey values of a picture in colour.

    The weights (C,) are by default 1/sqrt(C) each for C `channels`, the first row of an orthogonal change of the
    channels and the first channel of score_sde's `couple`. Luma is (0.299, 0.587, 0.114), and 1/C gives the mean.
    """

    weights: Tensor | None = None
    channels: int = 3

    def _row(self, x: Tensor) -> Tensor:
        c = self.channels
        w = torch.full((c,), 1 / math.sqrt(c), dtype=torch.float64) if self.weights is None else self.weights
        return sent(w, x.device, x.dtype).reshape(1, -1, *(1,) * (x.ndim - 2))

    @property
    def square(self) -> float:  # type: ignore[override]
        return 1.0 if self.weights is None else float(self.weights.double().square().sum())

    def apply(self, x: Tensor) -> Tensor:
        row = self._row(x)
        if row.shape[1] != x.shape[1]:
            raise ValueError(f"{row.shape[1]} weights mix as many channels, and the examples have {x.shape[1]}")
        return (row * x).sum(1, keepdim=True)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._row(y) * y


@dataclass(frozen=True)
class Average(Scaled):
    """Means over blocks of `factor` in every dimension except the first, the channels: super-resolution by `factor`.

    The observation of (B, C, H, W) is (B, C, H/factor, W/factor). Raises ValueError for a factor below 1 or one that
    does not divide all sizes.
    """

    factor: int
    dimensions: int = 2  # of an example besides its channels: 1 for sound, 2 for images

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"factor must be a whole number of at least 1, got {self.factor}")

    @property
    def square(self) -> float:  # type: ignore[override]
        return self.factor**-self.dimensions

    def apply(self, x: Tensor) -> Tensor:
        sizes = x.shape[2:]
        if len(sizes) != self.dimensions or any(n % self.factor for n in sizes):
            raise ValueError(
                f"factor {self.factor} does not divide a size of examples of shape {tuple(x.shape[1:])}, (channels, "
                f"{self.dimensions} dimensions): take one that divides all"
            )
        blocks = x.unflatten(2, (sizes[0] // self.factor, self.factor))
        for d in range(1, self.dimensions):
            blocks = blocks.unflatten(2 + 2 * d, (sizes[d] // self.factor, self.factor))
        return blocks.mean([3 + 2 * d for d in range(self.dimensions)])

    def adjoint(self, y: Tensor) -> Tensor:
        for d in range(self.dimensions):
            y = y.repeat_interleave(self.factor, 2 + d)
        return y * self.square


@dataclass(frozen=True, eq=False)
class Blur(Spectral):
    """Blur: circular convolution with a kernel in the last dimensions of each channel, diagonal in Fourier space.

    The kernel has 1 or 2 dimensions, as many as are convolved, each of odd size; its middle is the origin. Frequencies
    at which the kernel's spectrum is below 1e-5 of its largest value count as lost.
    """

    kernel: Tensor

    @classmethod
    def gaussian(cls, std: float, dimensions: int = 2) -> Blur:
        """A Gaussian of `std` pixels, cut off at 3 std, of sum 1."""
        if not std > 0:
            raise ValueError(f"a blur's standard deviation, in pixels, must be above 0, got {std:g}")
        reach = math.ceil(3 * std)
        row = torch.exp(-torch.arange(-reach, reach + 1, dtype=torch.float64).square() / (2 * std**2))
        row = row / row.sum()
        return cls(row if dimensions == 1 else torch.outer(row, row))

    def _spectrum(self, sizes: tuple[int, ...], x: Tensor) -> Tensor:
        """The kernel's Fourier transform (by rfftn) on a circle or torus; longer kernels are wrapped around."""
        k = sent(self.kernel, x.device, torch.float64)
        if any(n % 2 == 0 for n in k.shape):
            raise ValueError(f"a kernel's sizes must be odd, so that it has a middle, got {tuple(k.shape)}")
        whole = torch.zeros(sizes, dtype=torch.float64, device=x.device)
        where = [(torch.arange(n, device=x.device) - n // 2) % size for n, size in zip(k.shape, sizes, strict=True)]
        whole.index_put_(torch.meshgrid(*where, indexing="ij"), k, accumulate=True)
        return torch.fft.rfftn(whole).to(torch.complex64 if x.dtype == torch.float32 else torch.complex128)

    def _times(self, x: Tensor, factor: Callable[[Tensor], Tensor]) -> Tensor:
        """x times factor(spectrum) in Fourier space."""
        dims = tuple(range(x.ndim - self.kernel.ndim, x.ndim))
        sizes = tuple(x.shape[d] for d in dims)
        return torch.fft.irfftn(torch.fft.rfftn(x, dim=dims) * factor(self._spectrum(sizes, x)), s=sizes, dim=dims)

    def apply(self, x: Tensor) -> Tensor:
        return self._times(x, lambda h: h)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._times(y, torch.conj)

    def filtered(self, x: Tensor, weights: Weights) -> Tensor:
        return self._times(x, lambda h: weights(_cut(h.abs().square())))


class Dense(Spectral):
    """Any matrix (M, D) on examples of `shape`, D its product, by its singular value decomposition."""

    def __init__(self, matrix: Tensor, shape: tuple[int, ...]) -> None:
        if matrix.ndim != 2 or matrix.shape[1] != math.prod(shape):
            raise ValueError(f"the matrix must be (M, {math.prod(shape)}) for {shape}, got {tuple(matrix.shape)}")
        self.matrix, self.shape = matrix, tuple(shape)
        _, s, self._basis = torch.linalg.svd(matrix.double(), full_matrices=False)
        self._squares = _cut(s.square())

    def apply(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ sent(self.matrix, x.device, x.dtype).T

    def adjoint(self, y: Tensor) -> Tensor:
        return (y @ sent(self.matrix, y.device, y.dtype)).reshape(-1, *self.shape)

    def filtered(self, x: Tensor, weights: Weights) -> Tensor:
        basis = sent(self._basis, x.device, x.dtype)
        # in a shape that broadcasts against weights per example, (B, 1, ...)
        v = sent(self._squares, x.device, x.dtype).reshape(-1, *(1,) * (x.ndim - 2))
        lost, kept = weights(x.new_zeros(())), weights(v)
        inside = x.flatten(1) @ basis.T
        moved = ((kept - lost).flatten(1) if kept.ndim == x.ndim else (kept - lost).flatten()) * inside
        return lost * x + (moved @ basis).reshape(x.shape)


class Linear(Operator):
    """Any linear function of a batch of examples of `shape`; its adjoint is autograd's.

    `dps` and `moment_matching` take it; other methods need a `Spectral` operator: give `Dense` the matrix.
    """

    def __init__(self, fn: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
        self.fn, self.shape = fn, tuple(shape)

    def apply(self, x: Tensor) -> Tensor:
        return self.fn(x)

    def adjoint(self, y: Tensor) -> Tensor:
        with torch.enable_grad():
            x = y.new_zeros((len(y), *self.shape)).requires_grad_()
            return torch.autograd.grad(self.fn(x), x, y, create_graph=torch.is_grad_enabled() and y.requires_grad)[0]


def _cut(squares: Tensor) -> Tensor:
    """Squared singular values, with 0 for those that are rounding errors."""
    return squares.where(squares > 1e-10 * squares.max(), 0.0)


@dataclass(frozen=True, eq=False)
class Observation:
    """Observations y = A x + noise · z of a batch of examples, z standard normal.

    y is (B, *observed), one for each example, and exact where `noise`, a standard deviation, is 0. Raises ValueError
    for negative noise.
    """

    operator: Operator
    y: Tensor
    noise: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise is a standard deviation of at least 0, got {self.noise}")
        object.__setattr__(self, "y", self.operator.clean(self.y))

    def residual(self, x: Tensor) -> Tensor:
        """y - A x."""
        return self.y.to(x) - self.operator.apply(x)

    def project(self, x: Tensor) -> Tensor:
        """x + A⁺ (y - A x): the example nearest to x that explains an exact y. It needs a Spectral operator."""
        operator = spectral(self.operator, "project")
        return operator.filtered(x, lambda v: (v == 0).to(x)) + operator.pseudo_inverse(self.y.to(x))


def observe(operator: Operator, x: Tensor, noise: float = 0.0, generator: torch.Generator | None = None) -> Observation:
    """An observation A x + noise · z of examples x; with noise, z comes from the generator."""
    y = operator.apply(x)
    if noise:
        if generator is None:
            raise ValueError("an observation with noise needs a torch.Generator to draw it from")
        z = torch.randn(y.shape, generator=generator, dtype=y.dtype, device=generator.device)
        y = y + noise * z.to(y.device)
    return Observation(operator, y, noise)


def spectral(operator: Operator, who: str) -> Spectral:
    """The operator. Raises ValueError if its singular values are not known."""
    if not isinstance(operator, Spectral):
        raise ValueError(
            f"{who} needs the singular values of the operator, and {type(operator).__name__} has none: give its matrix "
            "to Dense, or take dps or moment_matching"
        )
    return operator
