"""The package as a whole: what may import what, and that its files agree with each other."""

import configparser
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.metadata import EntryPoint
from typing import Any

import pytest

import score_sde
from score_sde.moved import MOVED
from tests import ROOT
from tests.rooms import MATHEMATICS, PACKAGE, ROWS, arrows, files, floors, imports

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")

# The mathematics may ask where tensors are, show a bar, and turn stored values into a model's; no more of the world.
OF_THE_WORLD = {("machine", "devices"), ("machine", "progress"), ("data", "codecs")}


def test_knowledge_flows_downward_only() -> None:
    row = {room: i for i, rooms in enumerate(ROWS) for room in rooms}
    needs = arrows()
    assert sorted(row) == sorted(needs)  # every file is in a room, and every room in one row
    assert [(room, other) for room, found in needs.items() for other in found if row[other] >= row[room]] == []


def test_files_within_a_room_do_not_go_in_circles() -> None:
    for room, paths in files().items():
        needs = {
            path.stem: {i.inside[1] for i in imports(path) if len(i.inside) > 1 and i.inside[0] == room}
            for path in paths
        }
        TopologicalSorter(needs).prepare()  # raises for a circle


def test_the_house_is_as_small_as_it_is_meant_to_be() -> None:
    needs = arrows()
    assert len(needs) <= 19 and max(floors(needs).values()) <= 9 and sum(map(len, needs.values())) <= 79


def test_networks_know_nothing_of_the_package_and_mathematics_nothing_of_configs_or_files() -> None:
    found = {room: [i for path in paths for i in imports(path)] for room, paths in files().items()}
    assert {i.inside for i in found["networks"] if i.inside and i.inside[0] != "networks"} == {("machine", "devices")}
    worldly = {"absl", "argparse", "json", "ml_collections", "os", "pathlib"}
    for room in MATHEMATICS:
        assert not {i.outside for i in found[room]} & worldly
        assert {i.inside for i in found[room] if i.inside and i.inside[0] not in MATHEMATICS} <= OF_THE_WORLD


def test_version_and_console_script_are_the_package_s() -> None:
    assert SETUP["metadata"]["version"] == "attr: score_sde.machine.version.__version__"
    name, target = SETUP["options.entry_points"]["console_scripts"].strip().split(" = ")
    assert name == "score_sde" and callable(EntryPoint(name, target, "console_scripts").load())


def test_everything_exported_exists_once() -> None:
    assert len(set(score_sde.__all__)) == len(score_sde.__all__)
    assert [name for name in score_sde.__all__ if not hasattr(score_sde, name)] == []


def names(requirements: str) -> set[str]:
    """The packages that lines of requirements name."""
    return set(re.findall(r"^([\w-]+)", requirements, flags=re.MULTILINE))


def test_constraints_pin_every_dependency() -> None:
    text = (ROOT / "constraints.txt").read_text()
    pins = re.findall(r'^([a-z0-9_-]+)==([\w.]+)(?: ; python_version (?:<|>=) "3.11")?$', text, flags=re.MULTILINE)
    assert len(pins) == sum(not line.startswith("#") for line in text.splitlines())
    assert names(SETUP["options"]["install_requires"] + SETUP["options.extras_require"]["dev"]) <= dict(pins).keys()
    assert ("torch", "2.13.0") in pins  # without +cpu, so that each machine takes the build that fits it


def test_packages_that_are_imported_are_dependencies() -> None:
    called = {"absl": "absl-py", "PIL": "pillow", "sklearn": "scikit-learn", "ml_collections": "ml-collections"}
    imported = {i.outside for path in PACKAGE.rglob("*.py") for i in imports(path)} - sys.stdlib_module_names - {""}
    extras = SETUP["options.extras_require"]
    asked = names(SETUP["options"]["install_requires"] + extras["text"] + extras["latents"] + extras["completion"])
    assert {called.get(name, name) for name in imported} <= asked


def test_readme_s_library_example_runs_and_says_the_truth(capsys: pytest.CaptureFixture[str]) -> None:
    example = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)[0]
    scope: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), scope)
    assert "mean of the samples" in capsys.readouterr().out
    # Four standard errors of 1000 samples with standard deviations 0.93 and 0.29; the density at t_min is 2e-4 off.
    mean, exact = scope["x"].double().mean(0), scope["model"].log_prob(scope["x"]).mean()
    assert abs(mean[0] - 0.4) < 0.12 and abs(mean[1] - 0.35) < 0.04
    assert abs(scope["result"].log_prob.mean() - exact) < 1e-3


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_alone_explains_itself() -> None:
    out = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(f"make {target}" in out for target in ("demo", "test", "lint", "bench"))


def test_names_that_pages_of_version_0_1_imported_still_work_and_say_where_they_are() -> None:
    with pytest.warns(DeprecationWarning, match="score_sde.model is score_sde.models.base and score_sde.models.rules"):
        from score_sde.model import Preconditioned, ScoreModel
    assert ScoreModel is score_sde.ScoreModel and Preconditioned is score_sde.Preconditioned
    for old, places in MOVED.items():
        assert not (PACKAGE / old).exists() and not (PACKAGE / f"{old}.py").exists()
        assert all((PACKAGE / f"{place.replace('.', '/')}.py").is_file() for place in places)


def test_no_test_file_imports_another() -> None:
    """What tests share lies in `oracles`, `runs`, `files` and `conftest`: no file's tests change with another's."""
    another = re.compile(r"^\s*(?:from|import) (?:tests|\.)\S*(?: import)?.*\btest_\w+", flags=re.MULTILINE)
    for path in (ROOT / "tests").rglob("test_*.py"):
        taken = another.findall(path.read_text())
        assert not taken, f"{path.relative_to(ROOT)}: {taken[0]}"
