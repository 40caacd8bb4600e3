"""What is installed: the files of a wheel and of an sdist, and what an empty folder can do with them."""

import faulthandler
import importlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from configparser import ConfigParser
from email import message_from_string
from email.message import Message
from multiprocessing import get_context
from pathlib import Path
from runpy import run_path

import pytest
import yaml
from absl.logging import get_absl_handler

import score_sde
from score_sde.__main__ import main

ROOT = Path(__file__).parents[1]
SETUP = ConfigParser()
SETUP.read(ROOT / "setup.cfg")
portable = run_path(str(ROOT / "setup.py"))["portable"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it, by a Python that cannot import PyTorch."""
    source = tmp_path_factory.mktemp("source")
    for name in ("score_sde", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    sdist = build("sdist", source, source.parent)
    with tarfile.open(sdist) as archive:
        archive.extractall(source.parent, filter="data")
    return sdist, build("wheel", source.parent / sdist.name.removesuffix(".tar.gz"), source.parent)


def build(kind: str, source: Path, target: Path) -> Path:
    """What the build backend makes of a source tree, as pip calls it."""
    program = "import sys; sys.modules['torch'] = None; from setuptools import build_meta as backend; "
    program += f"print(backend.build_{kind}({str(target)!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, text=True, check=True)
    return target / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def metadata(built: tuple[Path, Path]) -> Message:
    with zipfile.ZipFile(built[1]) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_string(wheel.read(name).decode())


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a fresh environment with the wheel in it, without what it depends on."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    pip = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "install", "--quiet", "--no-compile"]
    subprocess.run([*pip, "--no-deps", "--no-index", "--ignore-installed", str(built[1])], check=True)
    return programs


PLACE = "import sysconfig; print(sysconfig.get_path('purelib'))"
# What the digits' network is in a test: ten steps, and samples and likelihoods in a few evaluations.
SMALL = (
    "--config.model.nf=8 --config.model.ch_mult=1,1 --config.model.num_res_blocks=1 --config.training.n_iters=10 "
    "--config.training.batch_size=8 --config.training.snapshot_sampling=false --config.sampling.num_samples=2 "
    "--config.sampling.steps=3 --config.sampling.method=heun --config.eval.num_images=2 --config.eval.rtol=1 "
    "--config.eval.atol=1 --config.eval.check_images=0"
)


def use(programs: Path, folder: Path, commands: list[str]) -> None:
    """Run commands of the installed program in a folder, all in one process, with what it logs in a file.

    The process is a fork of this one, which has imported PyTorch already, with the installed package before all else.
    """
    place = subprocess.check_output([programs / "python", "-c", PLACE], text=True).strip()
    sys.path[:] = [place, *(path for path in sys.path if "site-packages" in path or path.startswith(sys.base_prefix))]
    for name in [name for name in sys.modules if name.partition(".")[0] == "score_sde"]:
        del sys.modules[name]
    os.chdir(folder)
    faulthandler.disable()
    with open("errors", "w") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    for command in commands:
        sys.argv = [str(programs / "score_sde"), *command.split()]
        try:
            run_path(sys.argv[0], run_name="__main__")
        except SystemExit as ended:
            assert ended.code == 0, command
    assert Path(place) in Path(importlib.import_module("score_sde").__file__ or "").parents
    assert faulthandler.is_enabled()


def test_an_installed_package_trains_samples_and_evaluates_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    commands = [
        "--version",
        "new mine.py --from vp_digits",
        f"train mine --workdir runs/vp_digits {SMALL}",
        "sample --workdir runs/vp_digits",
        "likelihood --workdir runs/vp_digits",
    ]
    process = get_context("fork").Process(target=use, args=(installed, tmp_path, commands))
    process.start()
    process.join()
    errors = (tmp_path / "errors").read_text()
    assert process.exitcode == 0 and errors.count("workdir: runs/vp_digits") == 3, errors
    run = tmp_path / "runs" / "vp_digits"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["000000010.safetensors"]
    assert list(run.glob("samples/*/samples.npz")) and list(run.glob("likelihood/*/*.json"))


def test_a_wheel_holds_the_package_and_its_configs_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        held = {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}
    source = [path for path in (ROOT / "score_sde").rglob("*") if path.suffix in (".py", ".typed")]
    expected = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in source}
    expected |= {f"score_sde/configs/{path.name}": path.read_bytes() for path in (ROOT / "configs").glob("*.py")}
    assert held == expected


def test_an_sdist_holds_what_makes_a_wheel_and_what_tells_of_it(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert held >= {"setup.py", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "configs/vp_cifar.py"}
    assert not [name for name in held if name.startswith(("tests", "docs"))]


def test_metadata_say_what_a_registry_shows(metadata: Message) -> None:
    assert metadata["Name"] == "score_sde" and metadata["Version"] == score_sde.__version__
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Requires-Python"] == ">=3.10"
    assert metadata["Author"] and metadata["Keywords"] and metadata.get_all("Project-URL")
    assert set(metadata.get_all("Provides-Extra", [])) == set(SETUP["options.extras_require"])
    text = metadata.get_payload()
    assert isinstance(text, str) and text.lstrip().startswith("# score_sde")
    assert [link for link in re.findall(r"\]\(([^)]*)\)", text) if not link.startswith(("https://", "#"))] == []


def test_links_of_the_readme_are_addresses_elsewhere_or_plain_words() -> None:
    text = "![Digits](docs/a.png)\n\nSee [the page](docs/b.md#top), [`x`](x.py), [here](#here), [P](https://p.org/c)."
    home = "https://h.org/s"
    assert portable(text, home) == (
        f"![Digits]({home}/raw/HEAD/docs/a.png)\n\nSee [the page]({home}/blob/HEAD/docs/b.md#top), "
        f"[`x`]({home}/blob/HEAD/x.py), [here](#here), [P](https://p.org/c)."
    )
    assert portable(text, "") == "See the page, `x`, [here](#here), [P](https://p.org/c)."


def test_version_and_date_are_the_same_everywhere() -> None:
    version, date = re.findall(r"^## ([\d.]+) \((.*)\)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[0]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (version, date) == (cited["version"], str(cited["date-released"])) and version == score_sde.__version__
    ours = SETUP["metadata"]
    assert (cited["license"], cited["authors"][0]["name"]) == (ours["license_expression"], ours["author"])


def test_continuous_integration_tries_the_versions_that_the_metadata_promise() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]
    matrix = jobs["versions"]["strategy"]["matrix"]
    assert matrix["python"] == re.findall(r"Python :: (3\.\d+)$", SETUP["metadata"]["classifiers"], flags=re.MULTILINE)
    lowest = re.findall(r"^torch>=([\d.]+)$", SETUP["options"]["install_requires"], flags=re.MULTILINE)
    assert SETUP["options"]["python_requires"] == f">={matrix['python'][0]}"
    assert matrix["torch"] == [f"torch=={lowest[0]}.*", "torch"]
    assert {"pinned", "wheel", "docs"} <= jobs.keys()
    assert all("run" in step or "uses" in step for job in jobs.values() for step in job["steps"])


@pytest.mark.parametrize("path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem)
def test_issue_forms_are_whole(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    if path.stem == "config":
        assert form == {"blank_issues_enabled": True}
        return
    assert {"name", "description", "body"} <= form.keys()
    assert len({field["id"] for field in form["body"]}) == len(form["body"])
    assert all(field["type"] == "textarea" and field["attributes"]["label"] for field in form["body"])


def test_the_program_keeps_its_own_options_and_its_own_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["score_sde", "--mode", "scan", "--verbosity=1"])  # absl has such a flag
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "error: unrecognized arguments: --verbosity=1" in capsys.readouterr().err
    assert get_absl_handler() not in logging.getLogger().handlers  # else each line of the log would be there twice
