"""The modes inpaint, colorize, superresolve and deblur: as a user meets them, on tiny models."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from score_sde import VPSDE
from score_sde.cli import run
from score_sde.config import load
from score_sde.config.build import build_times
from score_sde.data import load_data
from score_sde.inverse import Average, Blur, Grey, Mask, Observation
from score_sde.metrics import psnr
from score_sde.models.closed_form import Gaussian
from score_sde.tasks.inputs import read_mask
from score_sde.tasks.restore import METHODS, restore, shown
from tests import ROOT
from tests.oracles import numbers
from tests.runs import words

STEPS = {
    "sampling__steps": 2,
    "inverse__resamplings": 2,
    "inverse__particles": 2,
    "eval__batch_size": 2,
    "eval__num_images": 3,
    "sampling__predictor": "ancestral_sampling",
}


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, x=np.random.default_rng(0).integers(0, 256, (37, 8, 8, 3)).astype(np.uint8))
    return path


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory: pytest.TempPathFactory, colours: Path) -> dict[str, Path]:
    """Networks after two steps, of digits and of colourful images."""
    found = {}
    for name in ("vp_digits", "vp_cifar_small"):
        found[name] = tmp_path_factory.mktemp(name)
        assert run(words(name, "train", found[name], colours, training__n_iters=2)) == 0
    return found


def picture(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    """Known above, hidden below."""
    return picture(tmp_path / "mask.png", 255 * (np.arange(64).reshape(8, 8) < 32))


def result(workdir: Path) -> tuple[Path, dict[str, np.ndarray], dict]:
    newest = max((workdir / "restored").glob("0*"), key=lambda p: p.stat().st_mtime_ns)
    with np.load(newest / "restored.npz") as file:
        return newest, dict(file), json.loads((newest / "stamp.json").read_text())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_inpaints_and_leaves_what_is_known(
    method: str, workdirs: dict[str, Path], colours: Path, mask: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    workdir = workdirs["vp_digits"]
    arguments = words("vp_digits", "inpaint", workdir, colours, **STEPS, inverse__method=method)
    assert run([*arguments, "--mask", str(mask)]) == 0
    folder, arrays, stamp = result(workdir)
    truth = load_data("digits").test.x[:3].permute(0, 2, 3, 1).numpy()
    assert np.array_equal(arrays["truth"], truth)
    if method != "twisted":  # which supposes a little noise
        assert np.array_equal(arrays["restored"][:, :4], truth[:, :4])
    assert np.array_equal(arrays["observed"][:, :4], truth[:, :4])
    hidden = arrays["observed"][:, 4:]
    assert (hidden == hidden[:, :1, :1]).all()  # one grey
    assert not np.array_equal(arrays["restored"][:, 4:], truth[:, 4:])
    as_read = {name: torch.from_numpy(arrays[name]) / 16 for name in ("truth", "restored", "observed")}
    assert np.allclose(arrays["psnr"], psnr(as_read["truth"], as_read["restored"]))
    assert stamp["psnr"] == pytest.approx(arrays["psnr"].mean())
    assert stamp["psnr_observed"] == pytest.approx(psnr(as_read["truth"], as_read["observed"]).mean().item())
    assert (folder / "grid.png").is_file() and "3 images, inpaint by " + method in capfd.readouterr().err


@pytest.mark.parametrize("mode", ["inpaint", "colorize", "superresolve", "deblur"])
def test_the_user_s_pictures_come_back_restored(
    mode: str, workdirs: dict[str, Path], colours: Path, mask: Path, tmp_path: Path
) -> None:
    workdir, folder = workdirs["vp_cifar_small"], tmp_path / "mine"
    folder.mkdir()
    size = 4 if mode == "superresolve" else 8
    pixels = np.random.default_rng(1).integers(0, 256, (2, size, size, 3))
    for name, array in zip("ab", pixels, strict=True):
        picture(folder / f"{name}.png", array)
    arguments = words("vp_cifar_small", mode, workdir, colours, **STEPS, inverse__factor=2)
    arguments += ["--input", str(folder), *(["--mask", str(mask)] if mode == "inpaint" else [])]
    assert run(arguments) == 0
    where, arrays, stamp = result(workdir)
    assert "psnr" not in stamp and "truth" not in arrays and stamp["number"] == 2
    restored = [np.array(Image.open(where / f"{i:06d}.png")) for i in range(2)]
    assert np.array_equal(np.stack(restored), arrays["restored"])
    if mode == "inpaint":
        assert np.array_equal(arrays["restored"][:, :4], pixels[:, :4])
        picture(folder / "a.png", np.where(np.arange(8)[:, None, None] < 4, pixels[0], 0))  # other hidden pixels
        assert run(arguments) == 0
        again, other, _ = result(workdir)
        assert again != where and np.array_equal(other["restored"], arrays["restored"])
    if mode == "superresolve":
        assert np.array_equal(arrays["observed"], pixels.repeat(2, 1).repeat(2, 2))
        small = arrays["restored"].astype(float).reshape(2, 4, 2, 4, 2, 3).mean((2, 4))
        # Pixels beyond the range are cut off, which an untrained network has many of: where none are, means are kept.
        inside = ((arrays["restored"] > 0) & (arrays["restored"] < 255)).reshape(2, 4, 2, 4, 2, 3).all((2, 4))
        assert inside.any() and np.abs(small - pixels)[inside].max() <= 1
    if mode == "colorize":
        inside = ((arrays["restored"] > 0) & (arrays["restored"] < 255)).all(3)
        assert inside.any() and np.abs(arrays["restored"].mean(3) - pixels.mean(3))[inside].max() <= 1.5
        assert (arrays["observed"] == arrays["observed"][..., :1]).all()
    if mode == "deblur":
        assert np.abs(arrays["observed"].astype(int) - pixels).max() <= 1


def test_a_result_does_not_hang_on_the_size_of_batches_and_is_made_once(
    workdirs: dict[str, Path], colours: Path, mask: Path
) -> None:
    workdir, found = workdirs["vp_digits"], []
    for size in (3, 1):
        for old in (workdir / "restored").rglob("restored.npz"):
            old.unlink()
        changes = {**STEPS, "eval__batch_size": size, "inverse__noise": 0.1, "inverse__method": "twisted"}
        arguments = [*words("vp_digits", "inpaint", workdir, colours, **changes), "--mask", str(mask)]
        assert run(arguments) == 0
        folder, arrays, _ = result(workdir)
        found.append(arrays)
    for name in ("restored", "observed"):
        assert (found[0][name] == found[1][name]).mean() > 0.98  # to rounding
    truth, seen = (found[0][name][:, :4].astype(float) / 16 for name in ("truth", "observed"))
    grey = (truth > 0.3) & (truth < 0.7)  # where noise is not cut off
    assert float(np.std((seen - truth)[grey])) == pytest.approx(0.1, rel=0.35) and grey.sum() > 10
    before = (folder / "restored.npz").stat().st_mtime_ns
    assert run(arguments) == 0
    assert (folder / "restored.npz").stat().st_mtime_ns == before


def test_restored_pixels_are_draws_of_a_gaussian_s_posterior() -> None:
    """Through the config's sampler: independent pixels, of which an observation tells nothing of others."""
    config = load(ROOT / "configs" / "vp_digits.py", {"sampling.method": "heun", "inverse.variance": "0.2"})
    model = Gaussian(VPSDE(), torch.full((1, 4, 4), 0.3), 0.2)
    y = numbers(400, 1, 2, 2, dtype=torch.float32)
    x = restore(model, config, Observation(Average(2), y), (1, 4, 4), build_times(config, model.sde), 0)
    blocks = x.reshape(400, 2, 2, 2, 2).permute(0, 1, 3, 2, 4).flatten(3)
    torch.testing.assert_close(blocks.mean(3), y[:, 0], rtol=0, atol=1e-5)
    assert float(blocks.var(3).mean()) == pytest.approx(0.2, rel=0.06)  # of three degrees of freedom in a block


def test_what_was_seen_is_shown_as_a_picture() -> None:
    x = numbers(2, 3, 4, 4)
    known = torch.arange(16).reshape(4, 4) < 8
    seen = shown(Observation(Mask(known), x), x)
    assert torch.equal(seen[:, :, :2], x[:, :, :2])
    torch.testing.assert_close(seen[:, :, 2:], x[:, :, :2].mean((2, 3), keepdim=True).expand(2, 3, 2, 4))
    grey = Grey(torch.full((3,), 1 / 3, dtype=torch.float64))
    torch.testing.assert_close(shown(Observation(grey, grey.apply(x)), x), x.mean(1, keepdim=True).expand(2, 3, 4, 4))
    small = Average(2).apply(x)
    torch.testing.assert_close(
        shown(Observation(Average(2), small), x), small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    )
    blurred = Blur.gaussian(1.0).apply(x)
    assert shown(Observation(Blur.gaussian(1.0), blurred), x) is blurred


def test_slips_are_answered_with_the_remedy(
    workdirs: dict[str, Path], colours: Path, mask: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grey, wide = tmp_path / "grey.png", tmp_path / "wide.png"
    picture(grey, np.full((8, 8), 128))
    picture(wide, np.zeros((4, 8)))
    picture(white := tmp_path / "white.png", np.full((8, 8), 255))
    (text := tmp_path / "text.png").write_text("no image")
    np.savez(small := tmp_path / "small.npz", arr_0=np.zeros((2, 4, 4, 1), np.uint8))
    for name, mode, extra, changes, sentence in (
        ("vp_digits", "inpaint", [], {}, "needs --mask FILE, an image of 8 x 8, white where"),
        ("vp_digits", "inpaint", ["--mask", tmp_path / "no.png"], {}, "there is no mask"),
        ("vp_digits", "inpaint", ["--mask", colours], {}, "cannot be read as an image"),
        ("vp_digits", "inpaint", ["--mask", wide], {}, "is 4 x 8, and the model's images are 8 x 8"),
        ("vp_digits", "inpaint", ["--mask", grey], {}, "has the grey level 128: it must be black (fill) and white"),
        ("vp_digits", "inpaint", ["--mask", white], {}, "is all white: nothing is to be filled"),
        ("vp_digits", "sample", ["--mask", mask], {}, "--mode sample reads no --mask"),
        ("vp_digits", "colorize", [], {}, "needs a model of colour images, and this one's have 1 channel"),
        ("vp_digits", "superresolve", [], {"inverse__factor": 3}, "inverse.factor=3 does not divide the"),
        ("vp_digits", "superresolve", [], {"inverse__factor": 0}, "inverse.factor must be at least 1"),
        ("vp_digits", "deblur", [], {"inverse__method": "pgdm"}, "did you mean 'pigdm'?"),
        ("vp_digits", "deblur", ["--input", tmp_path / "no"], {}, "name what is to be read, --input FILE_OR_FOLDER"),
        (
            "vp_digits",
            "superresolve",
            [],
            {"inverse__factor": 2, "inverse__method": "repaint", "sampling__method": "unipc"},
            "projection follows single steps, and UniPC has none",
        ),
        (
            "vp_digits",
            "deblur",
            [],
            {"inverse__method": "twisted", "sampling__method": "embedded"},
            "inverse.method=twisted walks on sampling's grid, and sampling.method=embedded chooses its own steps",
        ),
        ("vp_digits", "deblur", ["--prompt", "a cat"], {}, "--prompt 'a cat' is for a model of text"),
        ("vp_digits", "deblur", ["--scales", "1,2"], {}, "--mode deblur reads no --scales, got 1,2; leave it out"),
        ("vp_digits", "deblur", ["--input", text], {}, "text.png in"),
        ("vp_digits", "deblur", ["--input", small], {}, "holds uint8 of shape (2, 1, 4, 4), and uint8 images of shape"),
    ):  # fmt: skip
        arguments = words(name, mode, workdirs[name], colours, **{**STEPS, **changes})
        assert run([*arguments, *map(str, extra)]) == 2, sentence
        error = capsys.readouterr().err
        assert sentence in error and "BytesIO" not in error
    assert read_mask(mask, (1, 8, 8)).sum() == 32
    vectors = words("vp_toy", "inpaint", tmp_path / "toy", colours)
    assert run([*vectors[:2], "--mode", "train", *vectors[4:]]) == 0
    assert run([*vectors, "--mask", str(mask)]) == 2
    assert "--mode inpaint is for images, and data.dataset=" in capsys.readouterr().err


def test_a_mask_drawn_in_transparency_is_known_where_it_is_opaque(tmp_path: Path) -> None:
    hole = np.zeros((8, 8), bool)
    hole[2:5, 3:6] = True
    photo = np.random.default_rng(0).integers(1, 255, (8, 8, 3), dtype=np.uint8)
    alpha = np.where(hole, 0, 255).astype(np.uint8)[..., None]
    for colours in (photo, np.full_like(photo, 255)):
        Image.fromarray(np.concatenate([colours, alpha], -1)).save(tmp_path / "mask.png")
        assert torch.equal(read_mask(tmp_path / "mask.png", (3, 8, 8)), torch.from_numpy(~hole))
    Image.fromarray(np.concatenate([np.zeros_like(photo), alpha], -1)).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match="is drawn in black and in transparency, and either could be what is to be"):
        read_mask(tmp_path / "mask.png", (3, 8, 8))
    Image.fromarray(np.concatenate([photo, alpha // 2], -1)).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match="has the grey level 127"):
        read_mask(tmp_path / "mask.png", (3, 8, 8))
    black = np.where(hole, 0, 255).astype(np.uint8)
    Image.fromarray(np.stack([black, np.full_like(black, 255)], -1)).save(tmp_path / "mask.png")  # opaque all over
    assert torch.equal(read_mask(tmp_path / "mask.png", (3, 8, 8)), torch.from_numpy(~hole))
