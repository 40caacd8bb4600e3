"""Commands by name, in a folder that holds nothing: a mode and its config, and what lists, shows and begins configs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import score_sde
from score_sde.cli import run
from score_sde.config import default_config, differences, load
from score_sde.config.catalogue import known, summary
from score_sde.config.keys import KEYS
from score_sde.tasks.commands import as_options, complete


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_mode_and_its_config_are_options_said_in_short() -> None:
    assert as_options(["train", "vp_digits", "--workdir", "x"]) == (
        ["--mode", "train", "--config", "vp_digits", "--workdir", "x"]
    )
    assert as_options(["sample", "--workdir", "x"]) == ["--mode", "sample", "--workdir", "x"]
    assert as_options(["--mode", "sample", "--prompt", "train"]) == ["--mode", "sample", "--prompt", "train"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("trian vp_digits", "there is no command trian; did you mean train?"),
        ("confg vp_digits", "there is no command confg; did you mean config?"),
        ("qqqq", "there is no command qqqq; `score_sde --help` lists them"),
        ("train vp_digit", "there is no config vp_digit; did you mean vp_digits?"),
        ("train vp_digits vp_cifar", "`score_sde train` takes one config, got vp_digits vp_cifar"),
        ("train vp_digits --config=x.py", "`score_sde train vp_digits` has its config already: leave --config out"),
        ("train --mode sample", "`score_sde train` has its mode already: leave --mode out"),
        ("train --workdir x vp_digits", "unrecognized arguments: vp_digits; `score_sde --help` explains"),
        ("config", "the following arguments are required: name"),
        ("configs --dif", "unrecognized arguments: --dif"),
        ("new mine.py", "the following arguments are required: --from"),
        ("config vp_digits --config.training.n_iter=3", "did you mean 'training.n_iters'?"),
    ],
)
def test_slips_are_answered(words: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words.split()) == 2 and sentence in capsys.readouterr().err
    assert list(Path().iterdir()) == []


def test_an_empty_name_of_a_config_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", ""]) == 2 and "got an empty one" in capsys.readouterr().err


def test_version_says_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith(
        f"score_sde {score_sde.__version__}, torch {torch.__version__}, python 3."
    )


def test_configs_are_listed_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["configs"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines == {name: summary(path) for name, path in known().items()}


def test_a_config_is_shown_key_by_key_with_what_each_means(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "vp_cifar", "--config.training.batch_size=7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" = ")[0] for line in lines] == list(KEYS)
    assert f"training.batch_size = 7  # {KEYS['training.batch_size'].explained}" in lines


def test_what_differs_from_the_defaults_is_shown_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "vp_digits", "--diff"]) == 0
    assert capsys.readouterr().out.splitlines() == differences(default_config(), load("vp_digits"))
    assert run(["config", "vp_cifar", "--diff"]) == 0
    assert capsys.readouterr().out == "vp_cifar has the defaults throughout\n"


@pytest.mark.parametrize("name", sorted(known()))
def test_a_new_file_is_the_config_that_it_is_from(name: str) -> None:
    assert run(["new", "mine.py", "--from", name]) == 0
    assert load("mine") == load(name)


def test_a_new_file_has_what_the_command_line_sets_and_says_what_keys_mean(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["new", "folder/mine.py", "--from", "vp_digits", "--config.optim.lr=0.5"]) == 0
    assert "folder/mine.py: edit it" in capsys.readouterr().out
    text = Path("folder/mine.py").read_text()
    assert "    # learning rate\n    config.optim.lr = 0.5\n" in text and summary(known()["vp_digits"]) in text
    assert load("folder/mine.py").optim.lr == 0.5 and max(map(len, text.splitlines())) <= 120


def test_a_new_file_replaces_none_and_is_absent_where_it_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text("# years of work")
    Path("link.py").symlink_to("nowhere.py")
    for file, name, sentence in (
        ("mine.py", "vp_digits", "mine.py exists already"),
        ("link.py", "vp_digits", "link.py exists already"),
        ("other.py", "vp_digit", "did you mean vp_digits?"),
        ("other.txt", "vp_digits", "take a name such as other.py"),
    ):
        assert run(["new", file, "--from", name]) == 2
        assert sentence in capsys.readouterr().err
    assert Path("mine.py").read_text() == "# years of work"
    assert sorted(path.name for path in Path().iterdir()) == ["link.py", "mine.py"]


@pytest.mark.parametrize(
    ("typed", "completions"),
    [
        ("score_sde inp", {"inpaint"}),
        ("score_sde train vp_dig", {"vp_digits", "vp_digits32"}),
        ("score_sde train vp_digits --config.training.sde v", {"vpsde", "vesde"}),
        ("score_sde sample --config.optim.beta", {"--config.optim.beta1", "--config.optim.beta2"}),
        ("score_sde train --ma", set()),  # --mask is for inpaint
        ("score_sde inpaint --ma", {"--mask"}),
        ("score_sde sample --workdir some", {"somewhere"}),
        ("score_sde new --from vdm_d", {"vdm_digits"}),
    ],
)
def test_bash_completes_what_is_typed(typed: str, completions: set[str], script: Path) -> None:
    Path("somewhere").mkdir()
    Path("some_file").touch()
    program = f"source {script}; COMP_WORDS=({typed}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _shtab_score_sde; "
    program += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert {*done.stdout.split()} == completions


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `score_sde completion bash` prints, in a file."""
    path = tmp_path_factory.mktemp("completion") / "score_sde.bash"
    path.write_text(complete(["bash"]))
    return path


def test_completion_for_zsh_begins_as_zsh_wants_and_other_shells_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["completion", "zsh"]) == 0 and capsys.readouterr().out.startswith("#compdef score_sde")
    assert run(["completion", "fish"]) == 2 and "choose from" in capsys.readouterr().err


def test_completion_without_shtab_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert run(["completion", "bash"]) == 2 and "pip install shtab" in capsys.readouterr().err
