"""A pretend GPU: finds device mistakes, and waits for the device, on a machine that has none.

Its tensors say that they are on ``gpu:0`` and hold their numbers on the CPU. What CUDA refuses is refused (`Refused`):
operands on two devices, a CPU scalar where a kernel takes none, a generator of another device, a fused Adam whose
moments are laid out otherwise than their parameters. Each wait of the host for the device is noted, with the lines of
the package that made it. It shows logic: kernels, speed and memory are those of the CPU, and
second derivatives of GroupNorm and recomputed activations, which torch makes below what is pretended, are not there.

Importing this module changes torch for the whole process: only `on_pretend_gpu`, a process of its own, does so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("gpu")
torch.__future__.set_overwrite_module_params_on_conversion(True)
# The compiler, which optimizers import to be left alone by it, takes seconds to import.
torch._dynamo = ModuleType("torch._dynamo")  # type: ignore[assignment]
torch._dynamo.graph_break, torch._dynamo.disable = lambda: None, lambda f, *_, **__: f  # type: ignore[assignment]
sys.modules["torch._dynamo"] = torch._dynamo

GPU = torch.device("gpu:0")
CPU = torch.device("cpu")
PACKAGE = "/score_sde/"
aten = torch.ops.aten


class Refused(RuntimeError):
    """What CUDA would have refused."""


class Wait(NamedTuple):
    """A wait of the host for the device: why, and where in the package, innermost line first."""

    why: str
    where: str


class Pretending(TorchDispatchMode):
    """Within it the device ``gpu:0`` exists; `waits` are those of the host for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the compiler is not asked

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if Ghost in types or _is_gpu(kwargs.get("device")):
            return _handle(func, args, kwargs)
        if _facts(func).draws:
            _check_generators(func, args, kwargs, CPU)
        return func(*args, **kwargs)


_active: list[Pretending] = []


@contextmanager
def pretending() -> Iterator[Pretending]:
    """The mode, with torch's own generators, `tensor` and `autocast` made to know the device."""
    own = torch.Generator, torch.tensor, torch.autocast
    mode = Pretending()
    torch.Generator, torch.tensor, torch.autocast = Generator, _tensor(own[1]), _autocast(own[2])  # type: ignore[misc,assignment]
    _active.append(mode)
    try:
        with mode:
            yield mode
    finally:
        _active.pop()
        torch.Generator, torch.tensor, torch.autocast = own  # type: ignore[misc]


class Ghost(Tensor):
    """A tensor on the pretend GPU; its numbers are in `host`."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> Ghost:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=GPU,
        )
        made.host = host
        return made

    def tolist(self) -> Any:
        _note("a number is read")
        return self.host.tolist()

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"Ghost({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _handle(func, args, kwargs or {})


# What torch does below the mode: autograd in a thread of its own, and `new_tensor`.
_LIBRARY = torch.library.Library("aten", "IMPL")


def _empty(size: Any, *, device: Any = None, pin_memory: Any = None, **options: Any) -> Tensor:
    return Ghost(torch.empty(size, **options))


def _empty_strided(size: Any, stride: Any, *, device: Any = None, pin_memory: Any = None, **options: Any) -> Tensor:
    return Ghost(torch.empty_strided(size, stride, **options))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _note_copy(isinstance(source, Ghost), isinstance(target, Ghost), not non_blocking)
    _host(target).copy_(_host(source))
    return target


_LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")
_LIBRARY.impl("empty.memory_format", _empty, "PrivateUse1")
_LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")


# --- what an operation does there

_INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._unsafe_index.Tensor}
_SIZED_BY_VALUES = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.equal.default,
}


class _Facts(NamedTuple):
    """What is checked of an operation; the schema is read once, as there are 100,000 calls."""

    indexes: bool
    sized_by_values: bool
    fused_adam: bool
    draws: bool
    in_place: bool


@cache
def _facts(func: Any) -> _Facts:
    schema = func._schema
    draws = any("Generator" in str(argument.type) for argument in schema.arguments)
    return _Facts(
        func in _INDEXING, func in _SIZED_BY_VALUES, "_fused_adam" in schema.name, draws, schema.is_mutable
    )  # fmt: skip


def _handle(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the host's numbers, after what CUDA would check."""
    if func is torch.ops.prim.device.default:
        return GPU
    if func is aten._to_copy.default:
        return _copied(args[0], kwargs)
    if func is aten.copy_.default:
        target, source = args[0], args[1]
        blocking = not kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        _note_copy(isinstance(source, Ghost), isinstance(target, Ghost), blocking)
        func(_host(target), _host(source))
        return target
    if func is aten._local_scalar_dense.default:
        _note("a number is read")
        return func(_host(args[0]))
    facts = _facts(func)
    ghosts, others = list[Ghost](), list[Tensor]()
    hosts = _hosts(args, ghosts, others)
    options = dict(zip(kwargs, _hosts(kwargs.values(), ghosts, others), strict=True))
    if facts.sized_by_values:
        _note("a result's size or truth is read")
    if facts.indexes:
        _check_index(func, args)
    elif ghosts and others:
        _check_operands(func, args, ghosts, others)
    if facts.fused_adam:
        _check_fused_adam(args)
    there = bool(ghosts)
    if kwargs.get("device") is not None:
        there = _is_gpu(kwargs["device"])
        options["device"] = CPU
    if facts.draws:
        _check_generators(func, args, kwargs, GPU if there else CPU)
    if "pin_memory" in options:
        options["pin_memory"] = False
    found = func(*hosts, **options)
    if not there:
        return found
    # an operation in place gives back the tensor that it was given
    known = {id(t.host): t for t in ghosts} if facts.in_place else {}
    return _ghosts(found, known)


def _ghosts(found: Any, known: dict[int, Ghost]) -> Any:
    """An operation's results as tensors on the GPU."""
    if isinstance(found, Tensor):
        return known[id(found)] if id(found) in known else Ghost(found)
    return type(found)(_ghosts(one, known) for one in found) if type(found) in (list, tuple) else found


def _copied(source: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """A copy to another device or dtype."""
    there = _is_gpu(kwargs["device"]) if kwargs.get("device") is not None else isinstance(source, Ghost)
    options = {name: value for name, value in kwargs.items() if name != "device"}
    _note_copy(isinstance(source, Ghost), there, not options.get("non_blocking"))
    found = aten._to_copy.default(_host(source), **options, device=CPU)
    found = found.clone() if found is _host(source) else found
    return Ghost(found) if there else found


def _note_copy(was_there: bool, there: bool, blocking: bool) -> None:
    if was_there and not there:
        _note("a tensor is copied back")
    elif there and not was_there and blocking:
        _note("a tensor is sent, and waited for")


def _check_index(func: Any, args: Any) -> None:
    whole, indices = args[0], [index for index in args[1] if index is not None]
    for index in indices:
        if index.dtype in (torch.bool, torch.uint8):
            _note("a mask's count is read")
        if isinstance(whole, Ghost) and not isinstance(index, Ghost):
            _note("an index is sent, and waited for")
        if not isinstance(whole, Ghost) and isinstance(index, Ghost):
            raise Refused(f"{func}: indices on the GPU of a tensor on the CPU, {_where()}")
    values = args[2] if len(args) > 2 else None
    if isinstance(values, Tensor) and values.ndim > 0 and isinstance(values, Ghost) != isinstance(whole, Ghost):
        raise Refused(f"{func}: values on another device, {_where()}")


def _check_operands(func: Any, args: Any, ghosts: list[Ghost], others: list[Tensor]) -> None:
    """Operands on two devices: only scalars from the CPU, only in pointwise operations, and not in every place."""
    shapes = [tuple(t.shape) for t in ghosts][:3], [tuple(t.shape) for t in others][:3]
    what = f"{func} of {shapes[0]} on the GPU and {shapes[1]} on the CPU, {_where()}"
    if any(t.ndim > 0 for t in others):
        raise Refused(f"all tensors must be on one device: {what}")
    name = str(func)
    if ("addcmul" in name or "addcdiv" in name) and not all(isinstance(t, Ghost) for t in args[:2]):
        raise Refused(f"a CPU scalar as self or tensor1: {what}")
    if torch.Tag.pointwise not in func.tags and "foreach" not in name:
        raise Refused(f"a CPU scalar in an operation that is not pointwise: {what}")
    if func._schema.name.endswith("_") and isinstance(args[0], Tensor) and not isinstance(args[0], Ghost):
        raise Refused(f"in place into a tensor on the CPU: {what}")
    if "where" in name:
        _note("a scalar is sent, and waited for")


def _check_generators(func: Any, args: Any, kwargs: dict[str, Any], device: torch.device) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, _Generator):
            own = _SEEDS.get(value.initial_seed(), device)
            if own != device:
                raise Refused(f"{func} on {device} with a generator of {own}, {_where()}")


def _check_fused_adam(args: Any) -> None:
    for parameter, *rest in zip(*args[:4], strict=False):
        for other in rest:
            strides = zip(parameter.stride(), other.stride(), parameter.shape, strict=True)
            if not isinstance(other, Ghost) or any(a != b for a, b, size in strides if size != 1):
                raise Refused(f"fused Adam: {parameter.stride()} and {other.stride()} for {tuple(parameter.shape)}")
    if not all(isinstance(step, Ghost) for step in args[5]):
        raise Refused("fused Adam: a step on the CPU")


def _note(why: str) -> None:
    if _active:
        _active[-1].waits.append(Wait(why, _where()))


def _where() -> str:
    """The innermost lines of the package that are being run."""
    frame, found = sys._getframe(1), list[str]()
    while frame is not None and len(found) < 3:
        name = frame.f_code.co_filename
        if PACKAGE in name:
            found.append(f"{name.split(PACKAGE)[-1]}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(found) or "outside of the package"


def _host(value: Any) -> Any:
    return value.host if isinstance(value, Ghost) else value


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "gpu"


_PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}


def _hosts(values: Iterable[Any], ghosts: list[Ghost], others: list[Tensor]) -> list[Any]:
    """Arguments with the host's tensors; those on the GPU go to `ghosts`, those on the CPU to `others`."""
    hosts: list[Any] = []
    for value in values:
        kind = type(value)
        if kind in _PLAIN:  # most are, and to ask whether they are tensors is slow
            hosts.append(value)
        elif kind is Ghost:
            ghosts.append(value)
            hosts.append(value.host)
        elif kind is list or kind is tuple:
            hosts.append(kind(_hosts(value, ghosts, others)))
        else:
            hosts.append(value)
            if isinstance(value, Tensor):
                others.append(value)
    return hosts


# --- what of torch must know the device

_Generator = torch.Generator
_SEEDS: dict[int, torch.device] = {}  # by its first seed, the only thing that the dispatcher leaves of a generator


class Generator(_Generator):
    """A generator that says on which device it is; its numbers are the CPU's."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = _Generator.__new__(cls)
        made.there = _is_gpu(device)
        return made

    def __init__(self, device: Any = "cpu") -> None:
        pass

    def manual_seed(self, seed: int) -> Generator:
        super().manual_seed(seed)
        _SEEDS[self.initial_seed()] = self.device
        return self

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU if self.there else CPU


def _tensor(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        if not _is_gpu(device):
            return own(data, device=device, **options)
        with _disable_current_modes():
            made = own(data, **options)
        return made.to(GPU)  # which waits, as CUDA does

    return tensor


# CUDA's lists of what autocast computes in bfloat16 and in float32, as far as the package has it.
_HALF = {
    *(F.conv1d, F.conv2d, F.conv3d, F.linear, F.scaled_dot_product_attention),
    *(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.addmm),
}
_SINGLE = {
    *(F.group_norm, F.layer_norm, F.softmax, F.log_softmax, F.softplus, F.cross_entropy, F.mse_loss),
    *(torch.softmax, torch.log_softmax, torch.Tensor.softmax, torch.Tensor.log_softmax, torch.linalg.vector_norm),
    *(torch.exp, torch.Tensor.exp, torch.log, torch.Tensor.log, torch.expm1, torch.log1p, torch.rsqrt),
    *(torch.pow, torch.Tensor.pow, torch.Tensor.__pow__, torch.sum, torch.Tensor.sum, torch.logsumexp),
}


class Autocast(TorchFunctionMode):
    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self.enabled = enabled

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        wanted = torch.bfloat16 if func in _HALF else torch.float32 if func in _SINGLE else None
        if not self.enabled or wanted is None:
            return func(*args, **kwargs)

        def cast(value: Any) -> Any:
            floats = isinstance(value, Ghost) and value.dtype in (torch.float32, torch.bfloat16)
            return value.to(wanted) if floats else value

        return func(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})


def _autocast(own: Callable[..., Any]) -> Callable[..., AbstractContextManager[Any]]:
    def autocast(kind: str, dtype: torch.dtype | None = None, enabled: bool = True, **options: Any) -> Any:
        return Autocast(enabled) if kind == "gpu" else own(kind, dtype, enabled=enabled, **options)

    return autocast
