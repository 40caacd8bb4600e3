"""The benchmark of guidance: what it draws with, what it keeps, and that its scores are high for real images alone."""

from pathlib import Path

import pytest
import torch

from benchmarks.judges import Judge
from score_sde import classifier, guide
from score_sde.data import load_data
from score_sde.models.closed_form import Mixture
from studies.guidance import INTERVAL, KINDS, SCALES, TAUGHT, Parts, Results, curve, held_out, key_of, tables, taught
from tests.oracles import MIXTURE, T, points, posterior

WEAK = Mixture(MIXTURE.sde, [0.3, 0.3, 0.4], torch.tensor([[-1.0, 0.3], [0.5, 0.5], [0.5, -1.0]]), 0.4)


def test_every_kind_is_what_its_name_says() -> None:
    x, label = points(), torch.tensor([1, 0, 2, 1])
    parts = Parts(MIXTURE, WEAK, posterior)  # type: ignore[arg-type]
    told = MIXTURE.given(label=label)
    wanted = {
        "no label": MIXTURE,
        "unguided": told,
        "classifier-free": guide(told, MIXTURE, 3.0),
        "in an interval": guide(told, MIXTURE, 3.0, low=INTERVAL[0], high=INTERVAL[1]),
        "rescaled": guide(told, MIXTURE, 3.0, rescale=0.7),
        "autoguidance": guide(told, WEAK.given(label=label), 3.0),
        "classifier": classifier(MIXTURE, posterior, 3.0, label=label),
    }
    assert set(wanted) == set(KINDS)
    times = [T, torch.tensor(0.98, dtype=torch.float64)]  # within the interval, and above it
    for kind, model in wanted.items():
        for t in times:
            torch.testing.assert_close(parts.given(kind, 3.0, label).score(x, t), model.score(x, t))
    for t, same in zip(times, (False, True), strict=True):
        found = parts.given("in an interval", 3.0, label).score(x, t)
        assert torch.allclose(found, told.score(x, t)) == same


def test_a_pupil_of_real_digits_knows_them_and_one_of_wrong_labels_does_not() -> None:
    data = load_data("digits")
    k, y = held_out(data, 200, 0, "train")
    assert taught(data, k, y, 0) > 80
    assert taught(data, k, y.roll(1), 0) < 25


def test_results_are_kept_and_told(tmp_path: Path, digits_judge: Judge) -> None:
    file, data = tmp_path / "kept.json", load_data("digits")
    results = Results(file, {"count": 3})
    keys = [key_of(kind, scale) for kind, scales in SCALES["digits"].items() for scale in scales] + ["real"]
    for seed in range(2):
        for i, key in enumerate(keys):
            results.add(key, {"accuracy": 50.0 + i + seed, "distance": 1.0 + i})
        for key in ("real", *(key_of(kind, scale) for kind, scale in TAUGHT["digits"])):
            results.add(key, {"taught": 80.0})
    again = Results(file, {"count": 3})
    assert again.found == results.found and again.done("real", "taught") == 2
    assert Results(file, {"count": 4}).found == {}
    blocks = tables(again, data, digits_judge, "digits", 3, 7)
    assert "| no label | 0 | 50.5 ± 0.7 | 1.00 ± 0.00 |" in blocks["digits_scales"]
    assert (
        "| chance | 10.0 |" in blocks["digits_taught"]
        and "| as many real images | 80.0 ± 0.0 |" in blocks["digits_taught"]
    )
    lines = curve(again, "digits").axes[0].get_legend_handles_labels()[1]
    assert lines == [*KINDS[2:], "real, held out", "chance"]


@pytest.mark.parametrize("name", SCALES)
def test_every_pupil_s_samples_are_judged_too(name: str) -> None:
    assert set(SCALES[name]) == set(KINDS) and all(scale in SCALES[name][kind] for kind, scale in TAUGHT[name])
