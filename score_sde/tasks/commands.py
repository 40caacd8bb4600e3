"""Commands by name: a mode and its config; configs, config and new, which list, show and begin configs; completion."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from .. import config as configs
from ..config.catalogue import find, known, summary
from ..config.keys import KEYS, nearest
from ..config.reading import flat
from ..machine.whole_files import whole
from .options import MODES, READ_BY, Parser

NEW = '''\
"""{stem}, begun from {name}.

{summary}
"""

from ml_collections import ConfigDict

from score_sde.config import default_config


def get_config() -> ConfigDict:
    # Set here what differs from the defaults, as in config.training.batch_size = 64; the command
    # `score_sde config {file}` shows all keys with what they mean.
    config = default_config()

{lines}    return config
'''


def as_options(arguments: list[str]) -> list[str]:
    """``train vp_digits ...`` as ``--mode train --config vp_digits ...``; options alone stay as they are.

    Raises ValueError for a word that is no mode, for a second config, and for a mode or a config that is given twice.
    """
    mode, *names = [*takewhile(lambda word: not word.startswith("-"), arguments)] or [""]
    if not mode:
        return arguments
    if mode not in MODES:
        near = nearest(mode, [*MODES, *COMMANDS])
        hint = f"did you mean {near}?" if near else "`score_sde --help` lists them"
        raise ValueError(f"there is no command {mode}; {hint}")
    if len(names) > 1:
        raise ValueError(f"`score_sde {mode}` takes one config, got {' '.join(names)}: give one, then options")
    options = [word.partition("=")[0] for word in arguments]
    for option in ("--mode", "--config")[: 1 + len(names)]:
        if option in options:
            raise ValueError(f"`score_sde {' '.join((mode, *names))}` has its {option[2:]} already: leave {option} out")
    config = ["--config", *names] if names else []
    return ["--mode", mode, *config, *arguments[1 + len(names) :]]


def listed() -> str:
    """The configs of the package and of the current folder's ``configs/``, each with what it is."""
    return "\n".join(f"  {name:24} {summary(path)}" for name, path in known().items())


def list_configs(arguments: list[str]) -> str:
    """``score_sde configs``: `listed`."""
    Parser("score_sde configs").parse_args(arguments)
    return listed()


def show(arguments: list[str]) -> str:
    """``score_sde config NAME [--diff] [--config.key=value ...]``: every key, or what differs from the defaults."""
    rest, overrides = configs.split_arguments(arguments)
    parser = Parser("score_sde config")
    parser.add_argument("name")
    parser.add_argument("--diff", action="store_true")
    options = parser.parse_args(rest)
    config = configs.load(options.name, overrides)
    if options.diff:
        changed = configs.differences(configs.default_config(), config)
        return "\n".join(changed) or f"{options.name} has the defaults throughout"
    values = flat(config)
    return "\n".join(f"{key} = {values[key]!r}  # {KEYS[key].explained}" for key in KEYS)


def begin(arguments: list[str]) -> str:
    """``score_sde new FILE --from NAME``: write a config file with what NAME changes; it overwrites no file."""
    rest, overrides = configs.split_arguments(arguments)
    parser = Parser("score_sde new")
    parser.add_argument("file", type=Path)
    parser.add_argument("--from", dest="name", required=True)
    options = parser.parse_args(rest)
    file: Path = options.file
    if file.suffix != ".py":
        raise ValueError(f"a config is a Python file, got {file}: take a name such as {file.with_suffix('.py')}")
    if os.path.lexists(file):
        raise FileExistsError(f"{file} exists already, and is not overwritten: take another name")
    text = written(file, options.name, overrides)
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as out:
        out.write(text.encode())
    return f"{file}: edit it, then `score_sde train {file}`"


def written(file: Path, name: str, overrides: dict[str, str]) -> str:
    """The text of a config file with the values of the config NAME, key by key with what each means."""
    values = flat(configs.load(name, overrides))
    lines: list[str] = []
    for key, known_key in KEYS.items():
        if values[key] != known_key.default and not key.endswith("_sha256"):  # these are filled in
            lines += [f"# {line}" for line in textwrap.wrap(known_key.meaning, 112)]
            lines += [f"config.{key} = {values[key]!r}", ""]
    path = find(name)
    first_line = summary(path).replace('"""', "'''")
    body = textwrap.indent("\n".join(lines), "    ")
    return NEW.format(stem=file.stem, file=file, name=path.stem, summary=first_line, lines=body)


def complete(arguments: list[str]) -> str:
    """``score_sde completion SHELL``: a script for bash or zsh. Raises ValueError where shtab is not installed."""
    parser = Parser("score_sde completion")
    parser.add_argument("shell", choices=("bash", "zsh"))
    shell = parser.parse_args(arguments).shell
    try:
        import shtab
    except ImportError:
        raise ValueError("score_sde completion needs the package shtab: pip install shtab") from None
    names = " ".join(known())
    body = f'compgen -W "{names}" -- $1; compgen -f -- $1;' if shell == "bash" else f"compadd {names}; _files"
    return shtab.complete(words(), shell, preamble=f"_score_sde_names() {{ {body} }}")


def words() -> argparse.ArgumentParser:
    """The program as a shell sees it: its commands, and the options and values that may follow each."""
    program = argparse.ArgumentParser("score_sde", add_help=False)
    commands = program.add_subparsers()
    for name in (*MODES, *COMMANDS):
        command = commands.add_parser(name, add_help=False, help=name)  # shtab shows what has a help
        if name == "completion":
            command.add_argument("shell", choices=("bash", "zsh"))
        elif name != "configs":
            if name == "config":
                command.add_argument("--diff", action="store_true")
            _add(command, "--from" if name == "new" else "name", complete=NAMES)
            for key, known_key in KEYS.items():
                _add(command, f"--config.{key}", known_key.choices or None)
        if name in MODES:
            _add(command, "--workdir", complete=FOLDERS)
            for option in (option for option, modes in READ_BY.items() if name in modes):
                _add(command, option, complete=FILES if option in ("--checkpoint", "--input", "--mask") else None)
    return program


def _add(
    parser: argparse.ArgumentParser, name: str, choices: Sequence[str] | None = None,
    complete: dict[str, str] | None = None,
) -> None:
    argument = parser.add_argument(name, choices=choices)
    if complete is not None:
        argument.complete = complete  # type: ignore[attr-defined]  # where shtab looks for it


# The shells' functions that complete names of configs, files and folders.
NAMES = dict.fromkeys(("bash", "zsh"), "_score_sde_names")
FILES = {"bash": "_shtab_compgen_files", "zsh": "_files"}
FOLDERS = {"bash": "_shtab_compgen_dirs", "zsh": "_files -/"}
COMMANDS = {"configs": list_configs, "config": show, "new": begin, "completion": complete}
