"""The package as a whole: what may import what, and that its files agree with each other."""

import ast
import configparser
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import score_sde

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "score_sde"
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")

# Knowledge flows downward: a part imports from its own row and the rows above. Parts not named are in the row of train.
ROWS = [
    {"sdes", "chains", "learned", "noise_levels", "ode", "diffusions", "progress", "levels", "devices"},
    {"model"},
    {"closed_form", "networks", "circle"},
    {
        "losses",
        "score_matching",
        "time_laws",
        "samplers",
        "flows",
        "traces",
        "likelihood",
        "guidance",
        "noisy_classifier",
        "inverse",
        "metrics",
        "bounds",
        "continuous_bound",
        "classification",
        "heat_maps",
        "latents",
    },
    {"train"},
    {"cli"},
]
MATHEMATICS = ROWS[:4]


def row(part: str) -> int:
    return next((i for i, parts in enumerate(ROWS) if part in parts), len(MATHEMATICS))


def imports(path: Path) -> tuple[set[str], set[str]]:
    """(parts of this package, packages besides) that a file imports, wherever in it."""
    inside: set[str] = set()
    outside: set[str] = set()
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            outside.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.level == depth:
            inside |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return inside, outside


def parts() -> dict[str, tuple[set[str], set[str]]]:
    """Part of the package (a module or a folder) -> what it imports."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        inside, outside = imports(path)
        had = found.get(part, (set(), set()))
        found[part] = (had[0] | inside - {part}, had[1] | outside)
    return {part: found[part] for part in sorted(found) if part != "__init__"}


def test_knowledge_flows_downward_only() -> None:
    needs = {part: inside for part, (inside, _) in parts().items()}
    upward = [(part, other) for part, inside in needs.items() for other in inside if row(other) > row(part)]
    assert upward == []
    TopologicalSorter(needs).prepare()  # raises for a circle


def test_networks_know_nothing_of_the_package_and_mathematics_nothing_of_configs_or_files() -> None:
    found = parts()
    assert found["networks"][0] <= {"devices"}  # of torch alone: where tensors are
    worldly = {"absl", "argparse", "json", "ml_collections", "os", "pathlib", "score_sde"}
    assert {part: found[part][1] & worldly for part in set().union(*MATHEMATICS) if found[part][1] & worldly} == {}


def test_version_and_console_script_are_the_package_s() -> None:
    assert SETUP["metadata"]["version"] == score_sde.__version__
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
    imported = set().union(*(outside for _, outside in parts().values())) - sys.stdlib_module_names - {"score_sde"}
    extras = SETUP["options.extras_require"]
    asked = names(SETUP["options"]["install_requires"] + extras["text"] + extras["latents"])
    assert {called.get(name, name) for name in imported} <= asked


def readme_table() -> dict[str, str]:
    """Config -> text of its row in the README's table."""
    rows = re.findall(
        r"^\| \[`(\w+)`\]\(configs/(\w+)\.py\) \|(.*)\|$", (ROOT / "README.md").read_text(), flags=re.MULTILINE
    )
    assert all(name == file for name, file, _ in rows)
    return {name: text for name, _, text in rows}


def test_readme_lists_the_configs_that_exist() -> None:
    assert sorted(readme_table()) == sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def test_readme_names_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"(?<![\w/.])((?:configs|score_sde|benchmarks|docs|examples|tests)/[\w./-]+\.\w+)", text))
    assert named and [name for name in sorted(named) if not (ROOT / name).exists()] == []


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
