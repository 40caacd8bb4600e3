"""Reads and writes configs: Python files, JSON, and overrides of a command line, each checked when it is read.

A config file is Python with ``get_config()`` and states differences only: from `default_config`, or from another file
by ``load(Path(__file__).with_name("vp_cifar.py"))``. `load` reads it, applies what the command line overrides, and
refuses unknown keys and impossible values in one sentence, with their path and the nearest right name. `build.py` turns
the names into values of the package; the mathematics above knows of no config.
"""

from __future__ import annotations

import ast
import csv
import json
import re
import runpy
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from ml_collections import ConfigDict

from ..machine import own_code
from . import rules
from .catalogue import find
from .keys import DEFAULTS, KEYS, MOVED, check, config_of, default_config, explain, nearest, refuse_unknown

# Keys that may name code of the user's own, and those of its sha256.
OWN = {key: f"{key}_sha256" for key, known in KEYS.items() if known.own}


def load(path: str | Path, overrides: dict[str, str] | None = None) -> ConfigDict:
    """The validated, locked config of a file, with some keys overridden.

    Args:
        path: a Python file with ``get_config()``, a `config.json` as training leaves it in a workdir, or the bare name
            of a config of the package or of the current folder.
        overrides: dotted key to value, as the command line spells them: ``{"training.n_iters": "1000"}``.

    Raises FileNotFoundError for a missing file, and ValueError if two files of that name differ, and for anything wrong
    in the file or in the overrides.
    """
    path = find(path)
    if path.suffix == ".json":
        return overridden(from_json(path), overrides or {}, f"{path}: ")
    stated = {key: value for key, value in flat(_run(path)).items() if key not in OWN.values()}
    return overridden(stated, overrides or {}, f"{path}: ")


def overridden(stated: ConfigDict | dict[str, Any], overrides: dict[str, str], where: str = "") -> ConfigDict:
    """A validated, locked copy of a config, or of some of its values, with `overrides` as `load` takes them.

    Raises ValueError for anything wrong in them; errors in `stated` begin with `where`.
    """
    values = DEFAULTS | {key: check(key, value, where) for key, value in flat(stated).items()}
    for key, text in overrides.items():
        values[key] = check(key, parse(key, text))
        if key in OWN:  # the user names this file now, so it may have changed
            values[OWN[key]] = ""
    config = config_of(values | _seals(values))
    rules.check(config)
    return config


def _seals(values: dict[str, Any]) -> dict[str, str]:
    """The sha256 of each file of the user's own, as stated, or as it is now. Raises FileNotFoundError for no file."""
    return {
        sealed: (values[sealed] or own_code.file_hash(values[key], key)) if own_code.is_own(values[key]) else ""
        for key, sealed in OWN.items()
    }


def split_arguments(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """(other arguments, overrides): separates ``--config.section.key=value`` and ``--config.section.key value``.

    A bare ``--config.section.key`` means true for a switch. Raises ValueError for another key without a value.
    """
    rest: list[str] = []
    overrides: dict[str, str] = {}
    queue = list(arguments)
    while queue:
        word = queue.pop(0)
        if not word.startswith(("--config.", "-config.")):
            rest.append(word)
            continue
        key, equals, value = word.split("config.", 1)[1].partition("=")
        if not equals:
            if queue and not queue[0].startswith("--"):
                value = queue.pop(0)
            elif key in KEYS and KEYS[key].kind is bool:
                value = "true"
            elif key in KEYS:
                raise ValueError(f"--config.{key} needs a value, as in --config.{explain(key)}")
        overrides[key] = value
    return rest, overrides


def validate(config: ConfigDict) -> None:
    """Raise ValueError, in one sentence, for the first value that its key or a rule between keys does not allow."""
    for key, value in flat(config).items():
        check(key, value)
    rules.check(config)


def to_json(config: ConfigDict) -> str:
    """The config as JSON text, with the sha256 of files of the user's own; `from_json` gives back an equal config."""
    nested = config.to_dict()
    for key, sha256 in _seals(flat(config)).items():
        section, _, name = key.rpartition(".")
        nested[section][name] = sha256
    return json.dumps(nested, indent=2) + "\n"


def from_json(path: str | Path) -> ConfigDict:
    """The config in a workdir's config.json; keys that a file of an older version lacks have their defaults.

    Raises FileNotFoundError, and ValueError for text that is no config of this package.
    """
    try:
        return from_text(Path(path).read_text(), str(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no config {path}; training writes it into its workdir") from None
    except ValueError as error:
        problem = f"{path} is not text ({error})" if isinstance(error, UnicodeDecodeError) else error
        raise ValueError(f"{problem} (the checkpoints of a workdir carry its config: leave --config out and give "
                         f"--workdir {Path(path).parent})") from None


def from_text(text: str, where: str) -> ConfigDict:
    """The config in JSON text, such as a checkpoint carries; `where` names it in errors, which are `from_json`'s."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}, line {error.lineno}: not JSON ({error.msg})") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply to be a config") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where} holds no config: a JSON object with training, model, ... is expected")
    whole = dict(DEFAULTS)
    for key, value in flat(values).items():
        if key not in KEYS and key not in MOVED:
            near = nearest(key, list(KEYS))
            raise ValueError(
                f"{where}: unknown config key '{key}', perhaps of a newer score_sde: read it with that version"
                + (f"; or did you mean '{near}'?" if near else "")
            )
        whole[key] = check(key, value, f"{where}: ")
    for key, sealed in OWN.items():
        if own_code.is_own(whole[key]) and not whole[sealed]:
            raise ValueError(f"{where}: {key}={whole[key]} has no {sealed}: give a file of a workdir")
    return config_of(whole)


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Lines "section.key: old -> new" for all keys that differ."""
    a, b = flat(old), flat(new)
    return [f"{key}: {a.get(key)!r} -> {b.get(key)!r}" for key in sorted(a | b) if a.get(key) != b.get(key)]


def flat(config: ConfigDict | dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"section.key": value} for all keys."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        inside = isinstance(value, (ConfigDict, dict))
        values |= flat(value, f"{prefix}{name}.") if inside else {prefix + name: value}
    return values


def parse(key: str, text: str) -> Any:
    """A command line's text as the type of `key`; text of another type is returned as it is, and `check` refuses it."""
    kind = KEYS[key].kind if key in KEYS else str
    if key in KEYS and KEYS[key].classes:
        names = _names(text)
        return names if kind is tuple else names[0] if len(names) == 1 else text
    try:
        return _PARSERS[kind](text) if kind in _PARSERS else text
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # thousands of brackets raise the last two
        return text


def _integer(text: str) -> int | float:
    """ "1000", "1_000" and "1e3" are 1000; another number stays a float."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
        return int(value) if value.is_integer() else value


def _tuple(text: str) -> tuple[Any, ...]:
    """ "(1, 2)", "[1, 2]" and "1,2" are (1, 2); "1" is (1,); "" is ()."""
    value = ast.literal_eval(text.strip() or "()")
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _names(text: str) -> tuple[int | str, ...]:
    """ "1,2" are numbers; "cat,dog" are names, as are "07", "1e3" and "None"; a quoted name may have commas."""
    try:
        values = _tuple(text)
        if all(type(v) in (int, str) for v in values) or set("()[]{}") & set(text):
            return values
    except (ValueError, SyntaxError):
        pass
    words = [word.strip() for word in next(csv.reader([text.strip().strip("()[]")], skipinitialspace=True))]
    number = re.compile(r"-?(0|[1-9]\d*)")
    return tuple(int(word) if number.fullmatch(word) else word.strip("'") for word in words if word)


_SWITCH = {"true": True, "1": True, "false": False, "0": False}
_PARSERS: dict[type, Callable[[str], Any]] = {int: _integer, float: float, tuple: _tuple}
_PARSERS[bool] = lambda text: _SWITCH.get(text.lower(), text)


def _run(path: Path) -> ConfigDict:
    """What get_config() of a Python file returns. Raises ValueError, with the line, for mistakes in the file."""
    try:
        with own_code.slips(path):
            module = runpy.run_path(str(path))
            if not callable(module.get("get_config")):
                raise ValueError(f"{path} defines no get_config(); a config file is Python with get_config() -> "
                                 "ConfigDict")
            config = module["get_config"]()
    except (AttributeError, KeyError, TypeError) as error:
        _explain(error.__traceback__, path)
        raise
    if not isinstance(config, ConfigDict):
        raise ValueError(f"get_config() of {path} must return a ConfigDict, got {type(config).__name__}")
    return config


def _explain(trace: TracebackType | None, path: Path) -> None:
    """Raise ValueError with file and line where `trace` ends in a ConfigDict refusing a key or a value of that file."""
    lines = [frame.lineno for frame in traceback.extract_tb(trace) if frame.filename == str(path)]
    refusals = [
        frame.f_locals
        for frame, _ in traceback.walk_tb(trace)
        if isinstance(frame.f_locals.get("self"), ConfigDict) and {"key", "attribute"} & {*frame.f_locals}
    ]
    if not lines or not refusals:
        return
    refused = refusals[-1]
    name = str(refused.get("key", refused.get("attribute")))
    keys = refused["self"].keys()
    sections = [f"{k}." for k, v in default_config().items() if isinstance(v, ConfigDict) and v.keys() == keys]
    where = f"{path}, line {lines[-1]}: "
    key = "".join(sections) + name
    if key not in KEYS:
        refuse_unknown(key, where)
    if "value" in refused:
        check(key, refused["value"], where)
