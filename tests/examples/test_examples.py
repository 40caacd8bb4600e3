"""The commands of examples, studies and benchmarks: --help answers at once, and docs/ changes only on request."""

import runpy
import sys
from pathlib import Path

import pytest

from benchmarks import flows as memory
from benchmarks import pages
from examples import flows, nonlinear_sde, sliced_score_matching

ROOT = pages.DOCS.parent
COMMANDS = sorted(
    f"{folder}.{path.stem}"
    for folder in ("examples", "studies", "benchmarks")
    for path in (ROOT / folder).glob("[!_]*.py")
    if 'if __name__ == "__main__"' in path.read_text()
)


@pytest.mark.parametrize("name", [*COMMANDS, "examples.laboratory", "benchmarks"])
def test_help_answers_before_any_work(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    for loaded in [module for module in sys.modules if module == name]:
        monkeypatch.delitem(sys.modules, loaded)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(name, run_name="__main__")
    assert stopped.value.code == 0 and "usage: " in capsys.readouterr().out


@pytest.mark.parametrize("script", ["ddpm_is_vp.py", "flow_matching.py"])
def test_a_script_of_docs_answers_help_before_any_work_too(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(pages.DOCS / script), run_name="__main__")
    assert "--out" in capsys.readouterr().out


class Stopped(Exception):
    """The work would begin here."""


@pytest.mark.parametrize(
    ("module", "work", "page"),
    [
        (nonlinear_sde, "run", "score_matching.md"),
        (sliced_score_matching, "experiment", "score_matching.md"),
        (flows, "train_flow", "flows.md"),
        (memory, "memory", "flows.md"),
    ],
)
def test_a_command_fills_a_copy_unless_it_is_told_the_page(
    module: object, work: str, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object, **options: object) -> None:
        raise Stopped

    asked: list[Path | None] = []
    whole = pages.page_for

    def noted(given: Path | None, original: Path, folder: Path) -> Path:
        asked.append(given)
        return whole(given, original, folder)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, work, stop)
    monkeypatch.setattr(pages, "page_for", noted)
    with pytest.raises(Stopped):
        module.main([])  # type: ignore[attr-defined]
    (copy,) = tmp_path.rglob("*.md")
    assert copy.name == page and copy.read_text() == (pages.DOCS / page).read_text() and copy.is_relative_to(tmp_path)
    with pytest.raises(Stopped):
        module.main(["--page", str(tmp_path / "mine" / "page.md")])  # type: ignore[attr-defined]
    assert asked == [None, tmp_path / "mine" / "page.md"] and asked[1].is_file()


def test_a_copy_is_made_of_every_page_but_the_original_itself(tmp_path: Path) -> None:
    original = tmp_path / "page.md"
    original.write_text("<!-- A: one -->\nold\n<!-- /A -->\n")
    copy = pages.page_for(None, original, tmp_path / "runs" / "new")
    pages.fill(copy, {"one": "new"})
    assert "old" in original.read_text() and "new" in copy.read_text()
    pages.fill(pages.page_for(original, original, tmp_path / "runs"), {"one": "newer"})
    assert "newer" in original.read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_what_takes_long_shows_how_far_it_has_come(path: Path) -> None:
    text = path.read_text()
    assert ("def main" not in text) or "rogress(" in text
