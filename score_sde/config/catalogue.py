"""Finds configs by name: those of the package, and those of the current folder."""

from __future__ import annotations

import ast
from pathlib import Path

from .keys import nearest


def folder() -> Path:
    """The folder of the package's configs: within the package where it is installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def known() -> dict[str, Path]:
    """Name -> file of the package's configs, and of those in the current folder's ``configs/``."""
    files = [*folder().glob("*.py"), *Path("configs").glob("*.py")]
    return {path.stem: path for path in sorted(files, key=lambda path: path.stem)}


def find(named: str | Path) -> Path:
    """The file of a config with this path or bare name.

    A bare name stands for NAME.py in the current folder, configs/NAME.py there, or a config of the package. Raises
    ValueError if two of these differ, and FileNotFoundError, with the nearest name, if there is none.
    """
    path = Path(named)
    if path.is_file():
        return path
    bare = str(named) == path.stem
    places = (Path(), Path("configs"), folder()) if bare else ()
    files = [file for place in places if (file := place / f"{named}.py").is_file()]
    for other in files[1:]:
        if other.read_bytes() != files[0].read_bytes():
            raise ValueError(f"the config {named} may be {files[0]} or {other}, which differ: give a path")
    if files:
        return files[0]
    local = [*Path("configs").glob("*.py"), *path.parent.glob("*.py")]
    names = {name: name for name in known()} | ({} if bare else {file.stem: str(file) for file in local})
    near = nearest(path.stem, list(names))
    hint = f"did you mean {names[near]}?" if near else "`score_sde configs` lists those that exist"
    raise FileNotFoundError(f"there is no config {'' if bare else 'file '}{named}; {hint}")


def summary(path: Path) -> str:
    """The first line of a config file's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    return (docstring or "").partition("\n")[0]
