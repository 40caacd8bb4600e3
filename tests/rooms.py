"""The rooms of the package and the arrows between them, read from the imports: ``python tests/rooms.py`` prints them.

With ``--page docs/architecture.md`` it draws the picture of that page anew.

A room is a folder or a file of `score_sde/`; an arrow goes from a room to one that it imports from, wherever in a file
the import stands.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1] / "score_sde"

# What may import what: a room imports from the rows above its own, and from nothing else.
ROWS = [
    {"machine", "noise", "metrics", "moved"},
    {"sdes", "networks"},
    {"models"},
    {"losses", "ode", "data", "foreign"},
    {"samplers", "likelihood"},
    {"inverse", "config"},
    {"tasks"},
    {"cli", "__init__"},
    {"__main__"},
]
BEGIN, END = "<!-- rooms: picture -->\n", "<!-- /rooms -->\n"  # around the picture
MATHEMATICS = {"noise", "metrics", "sdes", "networks", "models", "losses", "ode", "samplers", "likelihood", "inverse"}


class Import(NamedTuple):
    """What a file of the package imports: another of its modules, as parts of a path, or a package besides."""

    inside: tuple[str, ...] = ()
    outside: str = ""


@cache
def imports(path: Path) -> list[Import]:
    """All imports of a file, also those within functions."""
    folder = path.relative_to(PACKAGE).parts[:-1]
    found: list[Import] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [_absolute(alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append(_absolute(node.module or ""))
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] + tuple((node.module or "").split(".") if node.module else ())
            found += [Import(inside=base or (alias.name,)) for alias in node.names]
    return found


def _absolute(name: str) -> Import:
    parts = tuple(name.split("."))
    return Import(inside=parts[1:] or ("__init__",)) if parts[0] == PACKAGE.name else Import(outside=parts[0])


def room_of(path: Path) -> str:
    """The folder, or the file itself, right under the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def files() -> dict[str, list[Path]]:
    """Room -> its files."""
    rooms: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        rooms[room_of(path)].append(path)
    return dict(rooms)


def arrows() -> dict[str, set[str]]:
    """Room -> the rooms that it imports from."""
    return {
        room: {i.inside[0] for path in paths for i in imports(path) if i.inside} - {room}
        for room, paths in files().items()
    }


def floors(needs: dict[str, set[str]]) -> dict[str, int]:
    """Room -> 1 where it imports from no other, else one more than the highest of those. Raises CycleError."""
    floor: dict[str, int] = {}
    for room in TopologicalSorter(needs).static_order():
        floor[room] = 1 + max((floor[other] for other in needs.get(room, ())), default=0)
    return floor


def picture() -> str:
    """The rows, the highest first: the mathematics on the left, the rest on the right."""
    head = ("mathematics: tensors in, tensors out", "files, configs, commands")
    lines = [
        tuple("   ".join(sorted(side)) for side in (row & MATHEMATICS, row - MATHEMATICS)) for row in reversed(ROWS)
    ]
    drawn = [f"    {left:^40} | {right:^40}".rstrip() for left, right in [head, ("-" * 38, "-" * 38), *lines]]
    return "\n".join(["", *drawn, ""]) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["--page"]:
        page = Path(sys.argv[2])
        before, rest = page.read_text().split(BEGIN)
        page.write_text(before + BEGIN + picture() + END + rest.split(END, 1)[1])
        return
    needs = arrows()
    floor = floors(needs)
    for room in sorted(needs, key=lambda name: (-floor[name], name)):
        below = ", ".join(sorted(needs[room])) or "nothing"
        print(f"floor {floor[room]}  {room:<10} {len(files()[room]):>2} files, from {below}")
    print(f"{len(needs)} rooms, {max(floor.values())} floors, {sum(map(len, needs.values()))} arrows, no circle")


if __name__ == "__main__":
    main()
