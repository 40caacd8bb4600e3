"""The user's own code, which a config names as ``FILE.py:NAME``: a network, an SDE or a data set.

The file is run when it is needed, and NAME is called with the values that its arguments name. A checkpoint stores the
name and the file's sha256, never the code, and can only be used with that same file.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import inspect
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")
_NAMED = re.compile(r"(.+\.py):([A-Za-z_]\w*)")

log = logging.getLogger("score_sde")


def is_own(name: str) -> bool:
    """Whether a name has the form FILE.py:NAME."""
    return _NAMED.fullmatch(name) is not None


def file_hash(name: str, key: str) -> str:
    """sha256 of the file in FILE.py:NAME, the value of config key `key`. Raises FileNotFoundError if it is missing."""
    return hashlib.sha256(_file(name, key).read_bytes()).hexdigest()


def check_unchanged(name: str, key: str, sha256: str) -> None:
    """Raise ValueError if the file in FILE.py:NAME does not have this hash, FileNotFoundError if it is missing.

    A hash of "" allows any file: the user has just named it.
    """
    now = file_hash(name, key)
    if sha256 not in ("", now):
        raise ValueError(f"{key}={name}: the file is not the one that was trained with (sha256 {sha256[:12]}... then, "
                         f"{now[:12]}... now): restore it, or continue training with the new one by --mode train "
                         f"--config.{key}={name}")


def make(name: str, key: str, kind: type, values: Mapping[str, Any]) -> Any:
    """Call NAME of FILE.py with those of the `values` that it has arguments for, and return its result.

    Args:
        key: the config key with this name, for errors.
        kind: type of the result.

    Raises FileNotFoundError for a missing file, and ValueError for a missing name, an argument without a value, a
    result of another type, and a slip such as a wrong import.
    """
    path, (_, attribute) = _file(name, key), _parts(name)
    with slips(path):
        target = getattr(_module(path.resolve(), file_hash(name, key)), attribute, None)
        if not callable(target):
            raise ValueError(f"{key}={name}: {path} defines no function or class {attribute}")
        made = target(**_arguments(target, f"{key}={name}", values))
    if not isinstance(made, kind):
        raise ValueError(f"{key}={name} must return an instance of {kind.__name__}, got {type(made).__name__}")
    return made


def with_values(target: Callable[..., T], values: Mapping[str, Any]) -> T:
    """Call `target` with those of the values that it has arguments for."""
    return target(**_arguments(target, str(target), values))


@contextmanager
def slips(path: Path) -> Iterator[None]:
    """Turn a slip in the file at `path`, in syntax, names or imports, into a ValueError with its line."""
    try:
        yield
    except SyntaxError as error:
        where = f"{error.filename}, line {error.lineno}" if error.filename else str(path)
        raise ValueError(f"{where}: {error.msg}") from None
    except (NameError, ImportError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename in (str(path), str(path.resolve()))]
        if not lines:
            raise
        raise ValueError(f"{path}, line {lines[-1]}: {error}") from None


def _parts(name: str) -> tuple[str, str]:
    match = _NAMED.fullmatch(name)
    if match is None:
        raise ValueError(f"code of your own is named FILE.py:NAME, got {name!r}")
    return match[1], match[2]


def _file(name: str, key: str) -> Path:
    path = Path(_parts(name)[0]).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{key}={name}: there is no file {path} with your code: give its path from this "
                                "folder, or change to the folder where the path holds")
    return path


@cache  # run once, so that classes stay the same
def _module(path: Path, sha256: str) -> ModuleType:
    """Run the file at `path` as a module. Its hash is an argument so that a changed file is run again."""
    log.info("code of your own: %s, sha256 %s...", path, sha256[:12])
    name = f"own_code_{sha256[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up names of annotations there
    spec.loader.exec_module(module)
    return module


def _arguments(target: Callable[..., Any], what: str, values: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(target).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for p in named:
        if p.name not in values and p.default is p.empty:
            near = difflib.get_close_matches(p.name, values, 3)
            raise ValueError(f"{what} has an argument {p.name}, for which there is no value: give it a default, or the "
                             f"name of a value, such as {', '.join(near or sorted(values)[:3])}")
    return {p.name: values[p.name] for p in named if p.name in values}
