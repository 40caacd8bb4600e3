"""Names of configs: whose they are, and what is said where a name is nobody's or two files'."""

from pathlib import Path

import pytest

from score_sde.config import load
from score_sde.config.catalogue import find, folder, known, summary

ROOT = Path(__file__).parents[2]


def test_the_package_s_configs_are_known_by_name_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert folder() == ROOT / "configs"
    assert sorted(known()) == sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
    assert find("vp_digits") == ROOT / "configs/vp_digits.py"
    assert load("cond_digits").model.class_conditional  # and what it is made from is found beside it


def test_every_config_of_the_package_says_in_a_line_what_it_is() -> None:
    assert all(20 < len(summary(path)) <= 117 for path in known().values())


def test_a_name_is_first_of_a_file_here_then_of_configs_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "configs/vp_digits.py").read_text()
    (tmp_path / "configs").mkdir()
    Path("configs/vp_digits.py").write_text(text)
    Path("configs/mine.py").write_text('"""Mine."""')
    assert find("vp_digits") == Path("configs/vp_digits.py") and find("mine") == Path("configs/mine.py")
    assert summary(known()["mine"]) == "Mine."
    Path("vp_digits.py").write_text(text)
    assert find("vp_digits") == Path("vp_digits.py")


def test_a_name_of_two_files_that_differ_is_refused_with_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("vp_digits.py").write_text("# my own")
    with pytest.raises(ValueError, match=rf"vp_digits may be vp_digits\.py or {ROOT}/configs/vp_digits\.py, which"):
        load("vp_digits")
    assert find("vp_digits.py") == Path("vp_digits.py")  # a path is never in doubt


@pytest.mark.parametrize(
    ("named", "sentence"),
    [
        ("vp_digit", r"there is no config vp_digit; did you mean vp_digits\?"),
        ("configs/vp_digits.py", r"there is no config file configs/vp_digits\.py; did you mean vp_digits\?"),
        ("my_fil.py", r"there is no config file my_fil\.py; did you mean my_file\.py\?"),
        ("qqqqqqqqqq", "there is no config qqqqqqqqqq; `score_sde configs` lists those that exist"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(
    named: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_file.py").touch()
    with pytest.raises(FileNotFoundError, match=sentence):
        load(named)
