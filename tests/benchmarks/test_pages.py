"""The blocks of a page that a command fills."""

from pathlib import Path

import pytest

from benchmarks.pages import cell, fill, table

TEXT = """# Title

<!-- words: first -->
old
<!-- /words -->
between
<!-- words: second -->
<!-- /words -->
"""


def test_fill_replaces_the_named_blocks_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(TEXT)
    fill(page, {"second": r"a \1 b" + "\n"})
    assert page.read_text() == TEXT.replace("second -->\n", "second -->\na \\1 b\n")
    fill(page, {"first": "1", "second": "2"})
    filled = page.read_text()
    assert filled == TEXT.replace("old", "1").replace("second -->\n", "second -->\n2\n")
    with pytest.raises(ValueError, match="page.md has no block for third"):
        fill(page, {"first": "0", "third": "3"})
    assert page.read_text() == filled


def test_tables_and_cells() -> None:
    assert table(("a", "b"), [("1", cell([1.0, 2.0], 2))]) == "| a | b |\n| --- | --- |\n| 1 | 1.50 ± 0.71 |\n"
    assert cell([0.25], 1) == "0.2"
