"""The benchmark of restored images: its distances, and a run of a network that has learned nothing."""

from pathlib import Path

import pytest
import torch

from score_sde import config as configs
from score_sde.config.build import build_model
from score_sde.data import load_data
from score_sde.inverse import Mask
from studies import inverse
from tests import ROOT


def test_relative_distance_is_zero_of_the_truth_and_one_of_another_image() -> None:
    truth = torch.randint(17, (6, 1, 8, 8), generator=torch.Generator().manual_seed(0))

    def features(k: torch.Tensor) -> torch.Tensor:
        return k.flatten(1).double()

    assert inverse.relative_distance(features, truth, truth) == 0
    assert inverse.relative_distance(features, truth.roll(1, 0), truth) == pytest.approx(1)


def test_every_row_is_measured_by_psnr_from_the_truth(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(inverse, "features_of", lambda dataset, path: None)
    overrides = {"sampling.steps": "3", "inverse.factor": "2", "data.uniform_dequantization": "false"}
    config = configs.load(ROOT / "configs" / "vp_digits.py", overrides)
    model = build_model(config, (1, 8, 8)).eval()
    first, of_mean = inverse.measure(model, config, ["ddnm", "projection"], 3, 2, tmp_path / "all.npz")
    assert first.head == ("", "inpaint", "superresolve 2", "deblur")
    rows = {row[0]: row[1:] for row in first.rows}
    assert list(rows) == ["what is seen", "bicubic", "another image", "no guidance", "ddnm", "projection"]
    truth = load_data("digits").test.x[:3].double() / 16
    (known,) = [o for o in inverse.tasks(config, (1, 8, 8)).values() if isinstance(o, Mask)]
    assert int(known.known.sum()) == 48
    mean = (truth * known.known).sum((1, 2, 3)) / 48
    seen = torch.where(known.known, truth, (17 * mean).floor().clamp_max(16).reshape(3, 1, 1, 1) / 16)
    psnr = -10 * torch.log10((seen - truth).square().mean((1, 2, 3))).mean()
    assert float(rows["what is seen"][0]) == pytest.approx(float(psnr), abs=0.05)
    other = -10 * torch.log10((truth.roll(1, 0) - truth).square().mean((1, 2, 3))).mean()
    assert float(rows["another image"][1]) == pytest.approx(float(other), abs=0.05)
    assert rows["bicubic"][0] == "" and "±" in rows["ddnm"][2]
    assert len(of_mean.rows) == 6 and (tmp_path / "all.npz").is_file()
