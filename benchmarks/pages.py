"""Pages with results: texts in docs/ written by hand, in which a command replaces the marked blocks.

A block begins with a line ``<!-- PAGE: NAME -->`` and ends with ``<!-- /PAGE -->``, for any word PAGE.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

DOCS = Path(__file__).parents[1] / "docs"
_BLOCK = re.compile(r"(<!-- (\w+): (\w+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)


def fill(page: Path, blocks: dict[str, str]) -> None:
    """Replace what is in the page's blocks of these names, and leave the rest.

    Raises ValueError, and leaves the page as it is, where it has no block of a name.
    """
    text = page.read_text(encoding="utf-8")
    missing = blocks.keys() - {name for _, _, name, _ in _BLOCK.findall(text)}
    if missing:
        raise ValueError(
            f"{page} has no block for {', '.join(sorted(missing))}: add <!-- PAGE: NAME --> <!-- /PAGE -->"
        )

    def replaced(block: re.Match[str]) -> str:
        if block[3] not in blocks:
            return block[0]
        return f"{block[1]}{blocks[block[3]].rstrip()}\n{block[4]}"

    page.write_text(_BLOCK.sub(replaced, text), encoding="utf-8")


def page_for(given: Path | None, original: Path, folder: Path) -> Path:
    """The page to fill: `given`, or one in `folder`. It begins as a copy of the original, unless it is the original.

    So a command changes docs/ only on request.
    """
    page = given or folder / original.name
    if page.resolve() != original.resolve():
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(original.read_text(encoding="utf-8"), encoding="utf-8")
    return page


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *rows])


def cell(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation of repetitions; a single value stays as it is."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def save(figure: Figure, file: Path) -> None:
    """Save a figure as a PNG of 128 colours, a third of the usual size."""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=100)
    plt.close(figure)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)


def picture(figure: Figure, file: Path, caption: str) -> str:
    """Save the figure and return its Markdown for a page beside images/."""
    save(figure, file)
    return f"![{caption}](images/{file.name})\n"
