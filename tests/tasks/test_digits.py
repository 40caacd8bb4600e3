"""The configs for digits reach what their docstrings and docs/results.md say: trained in full, by the command line."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from score_sde.cli import run
from score_sde.data import load_data
from score_sde.tasks.demo import confidence
from tests import ROOT


@dataclass(frozen=True)
class Reached:
    """One run's result: its kind and value of bits/dim, and the percentage of 100 samples that look like digits."""

    estimate: str  # how its stamp begins
    bits_per_dim: float
    sure: int


REACHED = {
    "vp_digits": Reached("probability-flow ODE", 1.793, 76),
    "flow_digits": Reached("probability-flow ODE", 1.889, 83),
    "vdm_digits": Reached("variational bound of 1000 steps", 1.846, 75),
    "scoreflow_digits": Reached("probability-flow ODE", 1.791, 70),
    "iddpm_digits": Reached("variational bound of 50 steps", 1.847, 80),
    "cond_digits": Reached("probability-flow ODE", 1.712, 97),
    "edm2_digits": Reached("probability-flow ODE", 1.826, 95),
    "ncsn_digits": Reached("probability-flow ODE", 2.174, 49),
    "ncsnv2_digits": Reached("probability-flow ODE", 2.259, 31),
}
# Another seed's run differs by about 0.01 bits/dim (the 300 images are the same), and 100 samples' percentage by 5.
MARGIN, SAMPLES_MARGIN = 0.03, 15


def check(name: str, workdir: Path) -> None:
    """Train, evaluate and sample by the command line, and hold the results against `REACHED`."""
    for mode in ("train", "likelihood", "sample"):
        assert run(["--config", f"configs/{name}.py", "--mode", mode, "--workdir", str(workdir)]) == 0
    reached = REACHED[name]
    (stamp,) = ((json.loads(path.read_text())) for path in workdir.glob("likelihood/*/stamp.json"))
    assert stamp["estimate"].startswith(reached.estimate) and stamp["images"] == 300
    assert stamp["mean"] < reached.bits_per_dim + MARGIN
    (samples,) = workdir.glob("samples/*/samples.npz")
    sure, _, classes = confidence(load_data("digits"), np.load(samples)["arr_0"])
    assert 100 * sure > reached.sure - min(SAMPLES_MARGIN, reached.sure / 2) and classes == 10


@pytest.mark.slow
@pytest.mark.parametrize("name", REACHED)
def test_a_digits_config_trained_in_full_reaches_what_is_stated(name: str, tmp_path: Path) -> None:
    check(name, tmp_path / name)


def test_every_digits_config_is_held_to_its_numbers() -> None:
    named = {path.stem for path in (ROOT / "configs").glob("*_digits.py")}
    assert sorted(REACHED) == sorted(named - {"classifier_digits"})  # of which docs/guidance.md tells


@pytest.mark.parametrize("name", REACHED)
def test_the_page_of_results_and_the_docstring_state_these_numbers(name: str) -> None:
    reached = REACHED[name]
    bits, sure = f"{reached.bits_per_dim:.3f}", f"{reached.sure} %"
    (row,) = re.findall(rf"^\| `{name}` \|.*$", (ROOT / "docs" / "results.md").read_text(), flags=re.MULTILINE)
    assert f"{bits} ±" in row and sure in row
    docstring = (ROOT / "configs" / f"{name}.py").read_text().split('"""')[1]
    assert name == "vp_digits" or (bits in docstring and sure in docstring)
