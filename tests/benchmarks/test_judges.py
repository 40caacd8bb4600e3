"""Judges: their Fréchet distance is the closed form's, they tell real images from others, and train once."""

from pathlib import Path

import pytest
import torch

from benchmarks import judges
from benchmarks.judges import Judge, Training, convolutional, frechet, judge
from score_sde.data import Data, Split


def test_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=g, dtype=torch.float64)
    assert frechet(x, x) == pytest.approx(0, abs=1e-10)
    scale, shift = torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64), torch.tensor([1.0, 0.0, -2.0])
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T  # unit covariance
    assert frechet(x, x * scale) == pytest.approx(float((x.mean(0) * (1 - scale)).square().sum()) + 1 + 0.25, rel=1e-9)
    assert frechet(x, x + shift) == pytest.approx(5, rel=1e-9)


def test_the_judge_of_digits_knows_them_and_finds_others_far(digits_judge: Judge) -> None:
    known = digits_judge
    real, g = known.test[:100], torch.Generator().manual_seed(0)
    assert known.accuracy > 0.97 and known.features(real).shape == (100, 64)
    assert f"{100 * known.accuracy:.1f} % of 300 held-out images" in str(known)
    noise = torch.randint(17, (100, 1, 8, 8), generator=g).to(torch.uint8)
    half = torch.where(torch.rand(100, 1, 1, 1, generator=g) < 0.5, noise, real)
    near, middle, far = (known.distance(x) for x in (real, half, noise))
    assert near < middle < far and known.distance(known.train) == pytest.approx(0, abs=1e-8)
    assert known.log_prob(real).exp().sum(1).allclose(torch.ones(100, dtype=torch.float64))


def colours(n: int, seed: int) -> Split:
    """Noisy images of ten colours."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(10, (n,), generator=g)
    tint = 40 + 150 * torch.rand(10, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    x = tint[y] + 20 * torch.randn(n, 3, 32, 32, generator=g)
    return Split(x.clamp(0, 255).to(torch.uint8), y)


def test_a_network_is_trained_once_for_its_settings_and_the_seed_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, small = Data(colours(320, 1), colours(100, 2)), Training(epochs=4, batch=32, widths=(4, 8, 16))
    torch.manual_seed(1)
    first = convolutional(data, tmp_path / "kept", small)
    torch.manual_seed(2)
    again = convolutional(data, tmp_path / "other", small)
    assert torch.equal(again.real, first.real) and first.accuracy > 0.5  # by chance 0.1
    assert first.features(data.test.x).shape == (100, 16)  # type: ignore[arg-type]
    grey = torch.full((100, 3, 32, 32), 128).to(torch.uint8)
    assert first.distance(grey) > 5 * first.distance(first.test)
    monkeypatch.setattr(judges, "train", None)  # nothing is trained
    kept = convolutional(data, tmp_path / "kept", small)
    assert torch.equal(kept.real, first.real) and kept.accuracy == first.accuracy
    with pytest.raises(TypeError, match="not callable"):
        convolutional(data, tmp_path / "kept", Training(epochs=3, batch=32, widths=(4, 8, 16)))


def test_there_is_no_judge_of_other_data() -> None:
    with pytest.raises(ValueError, match="no judge of 'ring', only of digits, cifar10"):
        judge("ring")
