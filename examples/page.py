"""Pages written by hand whose marked blocks are the results of a run.

A block begins with ``<!-- LABEL: NAME -->`` and ends with ``<!-- /LABEL -->``; what is between is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence


def fill(text: str, label: str, blocks: Mapping[str, str], absent: str | None = None) -> str:
    """`text` with the blocks of this label filled; one that is not given becomes `absent`, or stays as it is for None.

    Raises ValueError where `blocks` names one that the text does not have.
    """
    block = re.compile(rf"(<!-- {label}: (\w+) -->\n).*?(<!-- /{label} -->)", re.DOTALL)
    missing = set(blocks) - {name for _, name, _ in block.findall(text)}
    if missing:
        raise ValueError(f"the page has no block {', '.join(sorted(missing))}: add <!-- {label}: NAME --> to it")

    def replaced(found: re.Match[str]) -> str:
        content = blocks.get(found[2], absent)
        return found[0] if content is None else f"{found[1]}{content}{found[3]}"

    return block.sub(replaced, text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *rows))
