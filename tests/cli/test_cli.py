"""The command line as a user meets it: every config in every mode, slips answered, runs that stop and go on."""

import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from score_sde.cli import run
from score_sde.config import build, load
from score_sde.config.reading import flat
from score_sde.data import load_data
from score_sde.machine.whole_files import temporary
from score_sde.models.base import ScoreModel
from score_sde.models.closed_form import Gaussian
from score_sde.sdes import VPSDE
from score_sde.tasks import results
from score_sde.tasks.checkpoint import find
from tests import ROOT
from tests.runs import two_nodes, words

CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "speech")  # in test_signals


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty-odd colourful images of 8x8 in an .npz."""
    path = tmp_path_factory.mktemp("data") / "images.npz"
    k = np.random.default_rng(0).integers(0, 256, (37, 8, 8, 3)).astype(np.uint8)
    np.savez(path, x=k, y=np.arange(37) % 3)
    return path


@pytest.fixture(scope="module", autouse=True)
def small_grids() -> Iterator[None]:
    """Grids of samples in training are of few, in few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("score_sde.tasks.show._PICTURES", 10)
        patch.setattr("score_sde.tasks.show._STEPS", 2)
        yield


# These ask for other things first, a stage before or an encoder: tests/tasks/test_cascades.py runs them.
LATER = ("cascade_digits_8", "cascade_cifar_16", "cascade_cifar_32", "text_cifar_16")
# and tests/tasks/test_codes.py these
CODES = tuple(f"{kind}_{data}" for kind in ("autoencoder", "latent") for data in ("cifar", "cifar_small", "digits32"))


HERE = [name for name in CONFIGS if name not in LATER + CODES]


def with_each_value(*keys: str) -> list[str]:
    """For each value of each key one config that has it."""
    configs = {name: flat(load(name)) for name in HERE}
    return sorted({*{(key, values[key]): name for name, values in configs.items() for key in keys}.values()})


SCANNED = with_each_value("data.dataset")
EVALUATED = with_each_value(  # what changes how a likelihood is computed
    "model.name", "model.class_conditional", "training.sde", "training.continuous", "training.objective",
    "eval.estimate", "eval.probe", "eval.dequantization",
)  # fmt: skip


@pytest.mark.parametrize("name", SCANNED)
def test_data_are_scanned(name: str, tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words(name, "scan", tmp_path, images)) == 0
    assert "Gaussian baseline" in capsys.readouterr().out


@pytest.mark.parametrize("name", HERE)
def test_each_config_trains_samples_and_is_evaluated(name: str, tmp_path: Path, images: Path) -> None:
    workdir = tmp_path / "run"
    few = {"sampling__num_samples": 2, "sampling__steps": 2, "eval__num_images": 2}
    shown = "true" if name in ("vp_toy", "cond_digits") else "false"
    assert run(words(name, "train", workdir, images, training__snapshot_sampling=shown)) == 0
    assert find(workdir).path.stem == "000000001"
    if name.startswith("classifier"):
        assert "accuracy/sigma" in (workdir / "log.txt").read_text()
        return
    assert run(words(name, "sample", workdir, images, **few)) == 0
    (folder,) = (workdir / "samples").glob("000000001-*")
    x = np.load(folder / "samples.npz")["arr_0"]
    pixels = "toy" not in name
    channels = 1 if "digits" in name else 3
    assert x.shape == ((2, 8, 8, channels) if pixels else (2, 2)) and x.dtype == (np.uint8 if pixels else np.float32)
    assert np.isfinite(x).all() and (folder / ("grid.png" if pixels else "histogram.png")).is_file()
    if name not in EVALUATED:
        return
    # by the solver of the fewest evaluations; the default's steps of each example's own are in the tests below
    assert run(words(name, "likelihood", workdir, images, eval__ode_method="bosh3", **few)) == 0
    (folder,) = (workdir / "likelihood").iterdir()
    stamp = json.loads((folder / "stamp.json").read_text())
    assert stamp["images"] == 2 and np.isfinite(stamp["mean"]) and stamp["standard_error"] > 0 and stamp["nfe"] >= 4
    values = np.load(folder / "likelihood.npz")["bits_per_dim" if pixels else "nats"]
    assert values.shape == (2, 1) and stamp["mean"] == pytest.approx(values.mean())


def test_church_takes_a_step_on_a_folder_of_photographs(tmp_path: Path) -> None:
    """All seven levels and both pyramids, at a quarter of the size and a sixteenth of the width."""
    from PIL import Image

    random = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(random.integers(0, 256, (70 + i, 90, 3), dtype=np.uint8)).save(tmp_path / f"{i}.jpg")
    settings = {
        "data.path": tmp_path, "data.image_size": 64, "model.nf": 4, "model.attn_resolutions": "4",
        "training.n_iters": 1, "training.batch_size": 2, "training.snapshot_sampling": "false", "sampling.steps": 2,
        "sampling.num_samples": 1,
    }  # fmt: skip
    command = ["--config", "configs/church_256.py", "--workdir", str(tmp_path / "run")]
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    assert run([*command, "--mode", "train"]) == 0
    assert run([*command, "--mode", "sample"]) == 0
    (path,) = (tmp_path / "run" / "samples").glob("*/samples.npz")
    assert np.load(path)["arr_0"].shape == (1, 64, 64, 3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A tiny model of digits after 20 steps."""
    workdir = tmp_path_factory.mktemp("digits")
    assert run(words("vp_digits", "train", workdir, images, training__n_iters=20)) == 0
    return workdir


def samples(workdir: Path) -> np.ndarray:
    newest = max((workdir / "samples").glob("0*"), key=lambda p: p.stat().st_mtime_ns)
    return np.load(newest / "samples.npz")["arr_0"]


def clear(workdir: Path, name: str) -> None:
    for path in sorted((workdir / name).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_sample_depends_on_seed_and_index_alone(trained: Path, images: Path) -> None:
    found = []
    for size, count in ((3, 7), (7, 7), (2, 5)):
        clear(trained, "samples")
        changes = {"sampling__batch_size": size, "sampling__num_samples": count, "sampling__noise_removal": "false"}
        assert run(words("vp_digits", "sample", trained, images, **changes)) == 0
        found.append(samples(trained))
    assert (found[0] == found[1]).mean() > 0.99 and (found[0][:5] == found[2]).mean() > 0.99  # to rounding
    assert len({image.tobytes() for image in found[0]}) == 7
    clear(trained, "samples")
    assert run(words("vp_digits", "sample", trained, images, sampling__seed=1, sampling__num_samples=7)) == 0
    assert (samples(trained) != found[0]).mean() > 0.3


def test_sampling_goes_on_after_a_stop(trained: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from score_sde.tasks import sample as evaluate

    command = words("vp_digits", "sample", trained, images, sampling__num_samples=8, sampling__batch_size=2)
    clear(trained, "samples")
    assert run(command) == 0
    whole = samples(trained)
    clear(trained, "samples")
    real, calls = evaluate.sample, []

    def stops_at_the_third(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append(kwargs["first"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluate, "sample", stops_at_the_third)
    assert run(command) == 130
    assert run(command) == 0
    assert calls == [0, 2, 4, 4, 6], "finished batches were drawn again"
    assert np.array_equal(samples(trained), whole)


def test_the_stamp_says_what_was_done(trained: Path, images: Path) -> None:
    clear(trained, "samples")
    assert run(words("vp_digits", "sample", trained, images, sampling__single_png="true")) == 0
    (folder,) = (trained / "samples").glob("0*")
    stamp = json.loads((folder / "stamp.json").read_text())
    import hashlib

    assert stamp["checkpoint_sha256"] == hashlib.sha256(find(trained).path.read_bytes()).hexdigest()
    assert stamp["weights"] == "ema"
    assert stamp["config"]["sampling.seed"] == 0 and stamp["config"]["sampling.num_samples"] == 5
    assert "Ancestral" in stamp["sampler"] and stamp["grid"]["steps"] == 3 and stamp["nfe"] == 4  # 3 and the denoising
    assert {"torch", "score_sde", "python"} <= stamp["versions"].keys()
    singles = sorted(folder.glob("[0-9]*.png"))
    x = np.load(folder / "samples.npz")["arr_0"]
    assert len(singles) == 5
    assert np.array_equal(np.asarray(Image.open(singles[2])), np.round(x[2, :, :, 0] * (255 / 16)).astype(np.uint8))


def test_samples_by_a_fast_solver_on_a_fitted_grid_with_thresholding(
    trained: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "fit_times", partial(build.fit_times, fine=10))
    change = {"sampling__method": "unipc", "sampling__steps": 3, "sampling__num_samples": 3}
    found = []
    for more in ({"sampling__grid": "fitted"}, {"sampling__grid": "fitted", "sampling__threshold": 0.9}):
        clear(trained, "samples")
        assert run(words("vp_digits", "sample", trained, images, **change, **more)) == 0
        (folder,) = (trained / "samples").iterdir()
        stamp = json.loads((folder / "stamp.json").read_text())
        assert stamp["sampler"].startswith("UniPC(order=2") and stamp["grid"]["name"] == "fitted"
        assert stamp["grid"]["steps"] == 3 and stamp["nfe"] == 4  # the last is the estimate of the clean data
        assert stamp["config"]["sampling.threshold"] == more.get("sampling__threshold", 0.0)
        found.append(np.load(folder / "samples.npz")["arr_0"])
    assert not np.array_equal(*found)


def test_likelihood_covers_every_image_and_goes_on(
    trained: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from score_sde.tasks import likelihood as evaluate

    change = {"eval__num_images": 0, "eval__batch_size": 250, "eval__dequantizations": 2, "eval__check_images": 16}
    command = words("vp_digits", "likelihood", trained, images, **change)
    clear(trained, "likelihood")
    real, firsts = evaluate.log_probability, []

    def stops_once(model: ScoreModel, k: torch.Tensor, law: object, **kwargs: object) -> object:
        firsts.append((kwargs["first"], len(k)))
        if len(firsts) == 2:
            raise KeyboardInterrupt
        quick = Gaussian(model.sde, torch.zeros(1, 8, 8), 0.25)
        return real(quick, k, law, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluate, "log_probability", stops_once)
    assert run(command) == 130
    assert run(command) == 0
    checks = [(0, 16), (0, 16)]  # of the probes' error and of the solver's
    assert firsts == [(0, 250), (250, 250), (250, 250), (500, 100), *checks]
    (folder,) = (trained / "likelihood").iterdir()
    stamp = json.loads((folder / "stamp.json").read_text())
    values = np.load(folder / "likelihood.npz")["bits_per_dim"]
    assert values.shape == (300, 2) and stamp["images"] == 300
    assert stamp["mean"] == pytest.approx(values.mean())
    assert stamp["standard_error"] == pytest.approx(values.mean(1).std(ddof=1) / np.sqrt(300))
    assert np.abs(values[:, 0] - values[:, 1]).max() > 1e-3, "both dequantisations were the same"


def result_of(workdir: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    (folder,) = (workdir / "likelihood").iterdir()
    return json.loads((folder / "stamp.json").read_text()), dict(np.load(folder / "likelihood.npz"))


def test_a_discrete_model_is_evaluated_by_its_bound_and_either_by_both(
    tmp_path: Path, trained: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = {"training__sde": "cosine", "model__num_scales": 10, "eval__steps": 0, "model__ch_mult": 1}
    chain = [words("ddpm_cifar", mode, tmp_path, images, **change) for mode in ("train", "likelihood")]
    assert run(chain[0]) == 0 and run(chain[1]) == 0
    said = capsys.readouterr().err
    assert "(images), NFE 10 (3 test examples; variational bound of 10 steps, pixels without dequan" in said
    assert "of it prior" in said
    stamp, arrays = result_of(tmp_path)
    assert stamp["config"]["sampling.variance"] == "small" and stamp["unit"] == "bits/dim"
    assert arrays["bits_per_dim"].shape == (3, 1)
    np.testing.assert_allclose(arrays["times"], np.arange(10, 1, -1) / 10, rtol=1e-12)
    parts = [arrays[name] for name in ("prior", "diffusion", "reconstruction")]
    np.testing.assert_allclose(sum(parts), arrays["bits_per_dim"][:, 0], rtol=1e-5)
    assert arrays["terms"].sum() == pytest.approx(stamp["diffusion"], rel=1e-5)
    assert stamp["mean"] == pytest.approx(sum(stamp[name] for name in ("prior", "diffusion", "reconstruction")))

    def again(line: list[str], workdir: Path, **settings: object) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        clear(workdir, "likelihood")
        assert run([*line, *(f"--config.{key.replace('__', '.')}={value}" for key, value in settings.items())]) == 0
        return result_of(workdir)

    _, whole = again(chain[1], tmp_path, eval__batch_size=5)
    np.testing.assert_allclose(whole["bits_per_dim"], arrays["bits_per_dim"], rtol=1e-4)
    np.testing.assert_allclose(whole["terms"], arrays["terms"], rtol=1e-4)
    assert "draws" not in numbers_in(capsys.readouterr().err)
    stamp, some = again(chain[1], tmp_path, eval__terms=4)
    draws = np.sqrt((some["std_error"] ** 2).sum()) / 3 / (192 * np.log(2))
    assert stamp["errors"]["draws"] == pytest.approx(draws) and "(draws), NFE 5" in capsys.readouterr().err
    assert abs(some["bits_per_dim"].mean() - whole["bits_per_dim"].mean()) < 5 * draws
    assert stamp["nfe"] == 5 and some["terms"].shape == (9,) and (some["bits_per_dim"] != whole["bits_per_dim"]).all()
    stamp, _ = again(chain[1], tmp_path, eval__terms=1)
    assert stamp["errors"]["draws"] is None and "± unknown (draws)" in capsys.readouterr().err
    stamp, respaced = again(chain[1], tmp_path, eval__steps=4, sampling__variance="large", eval__clip_denoised="true")
    assert stamp["grid"] == {"steps": 4, "first": 1.0, "last": 0.0} and respaced["times"].tolist() == [1.0, 0.7, 0.4]
    stamp, _ = again(chain[1], tmp_path, eval__estimate="ode")
    assert stamp["estimate"] == "probability-flow ODE, uniform dequantisation"

    continuous = words("vp_digits", "likelihood", trained, images)
    stamp, arrays = again(continuous, trained, eval__estimate="bound", eval__steps=7, eval__t_min=0.01)
    assert stamp["estimate"] == "variational bound of 7 steps, pixels without dequantisation" and stamp["nfe"] == 8
    assert arrays["terms"].shape == (7,) and arrays["times"][0] == 1 and stamp["grid"]["last"] == 0.01
    assert again(continuous, trained)[0]["estimate"] == "probability-flow ODE, uniform dequantisation"


def test_a_toy_chain_s_bound_is_in_nats(tmp_path: Path, images: Path) -> None:
    """An untrained chain of vectors: the Gaussian decoder's density, and no levels."""
    change = {"training__continuous": "false", "sampling__grid": "uniform", "training__time": "uniform"}
    for mode in ("train", "likelihood"):
        assert run(words("vp_toy", mode, tmp_path, images, **change)) == 0
    stamp, arrays = result_of(tmp_path)
    assert stamp["unit"] == "nats" and stamp["estimate"] == "variational bound of 5 steps, Gaussian decoder"
    assert arrays["nats"].shape == (3, 1) and np.isfinite(arrays["nats"]).all()


def numbers_in(line: str) -> dict[str, float]:
    """{"": mean, "images": error, ...} of a result's line."""
    mean = re.findall(r"(?:bits/dim|nats) (-?[0-9.]+) ", line)[-1]
    return {"": float(mean), **{name: float(value) for value, name in re.findall(r"± ([0-9.]+) \((\w+)\)", line)}}


def test_the_errors_of_a_likelihood_are_told_apart(
    trained: Path, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a Gaussian whose dimensions are correlated, in the checkpoint's place."""
    exact_model = Gaussian(VPSDE(), torch.zeros(1, 8, 8), 0.2 * torch.eye(64) + 0.02)
    monkeypatch.setattr("score_sde.tasks.job._model", lambda *args: exact_model)

    def told(**settings: object) -> tuple[dict[str, float], dict[str, Any], dict[str, np.ndarray]]:
        clear(trained, "likelihood")
        tight = {"eval__num_images": 12, "eval__batch_size": 7, "eval__check_images": 16}
        tight |= {"eval__rtol": 1e-2, "eval__atol": 1e-2}
        assert run(words("vp_digits", "likelihood", trained, images, **{**tight, **settings})) == 0
        line = capsys.readouterr().err.splitlines()[-1]
        stamp, arrays = result_of(trained)
        assert f"NFE {stamp['nfe']:.0f} ({stamp['images']} test examples; {stamp['estimate']})" in line
        assert not [path for path in (trained / "likelihood").rglob("*") if path.is_dir() and path.name.startswith("p")]
        assert stamp["errors"]["images"] == stamp["standard_error"]
        return numbers_in(line), stamp, arrays

    unit = 1 / (64 * np.log(2))
    several, stamp, arrays = told(eval__probes=8, eval__dequantizations=2)
    expected = unit * np.sqrt((arrays["std_error"] ** 2).sum()) / 24
    assert stamp["errors"]["probes"] == pytest.approx(expected) and several["probes"] == round(expected, 4)
    assert several["probes"] < several["images"] and several["solver"] > 0
    np.testing.assert_allclose(arrays["bits_per_dim"], -unit * arrays["log_prob"])

    single, stamp, coarse = told()
    solver = stamp["errors"]["solver"]
    # From pairs on all 12 images: an error of sqrt(variance / 2) is told of two probes, sqrt(variance / 12) of 12.
    _, _, arrays = told(eval__probes=2, eval__check_images=0)
    expected = unit * np.sqrt(2 * (arrays["std_error"] ** 2).mean() / 12)
    assert stamp["errors"]["probes"] == pytest.approx(expected, rel=1e-3)
    assert single["solver"] > 0 and set(single) == {"", "images", "probes", "solver"}
    _, _, fine = told(eval__rtol=1e-3, eval__atol=1e-3, eval__check_images=0)
    difference = np.abs(fine["bits_per_dim"] - coarse["bits_per_dim"]).mean()
    assert solver == pytest.approx(difference, rel=1e-3) and difference > 1e-4
    exact, stamp, _ = told(eval__probe="exact", eval__check_images=0, eval__num_images=2)
    assert set(exact) == {"", "images", "probes"} and stamp["errors"]["probes"] == 0
    none, stamp, _ = told(eval__check_images=0)
    assert stamp["errors"]["probes"] is None and set(none) == {"", "images"}
    bound, stamp, _ = told(eval__estimate="sde_bound", eval__draws=100)
    assert stamp["nfe"] == 100 and bound["draws"] > 0 and set(bound) == {"", "images", "draws"}
    assert stamp["estimate"] == "variational bound of the SDE, uniform dequantisation"
    # of an exact model the bound is tight
    assert bound[""] == pytest.approx(single[""], abs=4 * (bound["draws"] + single["probes"] + single["solver"]))


def test_pixels_are_dequantised_in_three_ways_and_by_several_draws(
    trained: Path, tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(workdir: Path, **settings: object) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        clear(workdir, "likelihood")
        common = {"eval__num_images": 4, "eval__batch_size": 4, "eval__check_images": 0, "eval__ode_method": "bosh3"}
        assert run(words("vp_digits", "likelihood", workdir, images, **{**common, **settings})) == 0
        return result_of(workdir)

    one, _ = told(trained)
    three, arrays = told(trained, eval__importance_samples=3)
    assert three["estimate"] == "probability-flow ODE, uniform dequantisation, 3 importance samples"
    assert arrays["bits_per_dim"].shape == (4, 1) and three["nfe"] > 2 * one["nfe"]
    assert three["mean"] < one["mean"]

    variational = {"eval__dequantization": "variational"}
    assert run(words("vp_digits", "likelihood", trained, images, **variational)) == 2
    assert "fit one with --mode dequantize" in capsys.readouterr().err
    fit = {"dequantizer__n_iters": 2, "dequantizer__batch_size": 8, "dequantizer__hidden": 8}
    assert run(words("vp_digits", "dequantize", trained, images, **fit)) == 0
    flow, _ = told(trained, **variational)
    assert flow["estimate"] == "probability-flow ODE, variational dequantisation" and "dequantizer_sha256" in flow
    assert flow["mean"] == pytest.approx(one["mean"], abs=0.1)  # after two steps it is nearly uniform
    assert run(words("vp_digits", "likelihood", trained, images, **variational, eval__t_min=0.01)) == 2
    assert "fitted to another checkpoint or t_min" in capsys.readouterr().err

    plain = {"data__uniform_dequantization": "false"}
    assert run(words("vp_digits", "train", tmp_path, images, **plain)) == 0
    noised, _ = told(tmp_path, **plain, eval__dequantization="truncated_normal")
    assert noised["estimate"] == "probability-flow ODE, truncated normal dequantisation"
    assert 1e-3 < noised["t_min"] < 1e-2  # half of one of 17 levels is three standard deviations


def test_a_heat_map_has_the_bits_of_its_images(trained: Path, images: Path) -> None:
    clear(trained, "likelihood")
    tight = {"eval__probes": 2, "eval__heat_map": 4, "eval__num_images": 5}
    assert run(words("vp_digits", "likelihood", trained, images, **tight)) == 0
    _, arrays = result_of(trained)
    (folder,) = (trained / "likelihood").iterdir()
    bits = np.load(folder / "heat_map.npz")["bits"]
    assert bits.shape == (4, 1, 8, 8) and bits.std() > 0.1
    # other probes: a fraction of a bit
    np.testing.assert_allclose(bits.mean((1, 2, 3)), arrays["bits_per_dim"][:4, 0], atol=0.3)
    picture = np.asarray(Image.open(folder / "heat_map.png"))
    assert picture.shape == (2 + 2 * 34, 2 + 4 * 34, 3)
    assert (picture[..., 0] == picture[..., 2]).mean() < 1, "no colours"


def test_a_dequantizer_of_vectors_is_refused(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words("vp_toy", "train", tmp_path, images)) == 0
    for mode, settings, answer in (
        ("dequantize", {}, "--mode dequantize is for pixels; data.dataset=ring holds floats"),
        ("likelihood", {"eval__heat_map": 2}, "eval.heat_map=2 is for pixels, and these data are floats: set it to 0"),
        ("likelihood", {"eval__importance_samples": 2}, "eval.importance_samples=2 is for pixels"),
    ):
        assert run(words("vp_toy", mode, tmp_path, images, **settings)) == 2
        assert answer in capsys.readouterr().err
    assert run(words("vp_toy", "likelihood", tmp_path, images, eval__estimate="sde_bound")) == 0
    assert result_of(tmp_path)[0]["unit"] == "nats"


def test_two_processes_share_an_evaluation(trained: Path, images: Path, tmp_path: Path) -> None:
    """Two processes as torchrun starts them write the same samples and the same bits/dim as one."""
    change = {f"{part}__batch_size": 2 for part in ("sampling", "eval")}
    commands = [words("vp_digits", mode, trained, images, **change) for mode in ("sample", "likelihood")]

    def evaluated(rank: int = 0, folder: Path = tmp_path) -> list[int]:
        return [run(line) for line in commands]

    results = []
    for both in (False, True):
        for name in ("samples", "likelihood"):
            clear(trained, name)
        assert two_nodes(tmp_path, evaluated) == [[0, 0]] * 2 if both else evaluated() == [0, 0]
        results.append((samples(trained), result_of(trained)[1]["bits_per_dim"]))
    assert np.array_equal(results[0][0], results[1][0])
    assert np.array_equal(results[0][1], results[1][1])


# -- latents


def folder_of(workdir: Path, name: str) -> tuple[Path, dict[str, Any]]:
    (folder,) = (workdir / name).iterdir()
    return folder, json.loads((folder / "stamp.json").read_text())


def test_images_are_encoded_and_decoded_to_themselves(
    trained: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tight = {"eval__rtol": 1e-3, "eval__atol": 1e-3, "eval__num_images": 5, "eval__batch_size": 5}
    for name in ("latents", "decoded"):
        clear(trained, name)
    assert run(words("vp_digits", "encode", trained, images, **tight)) == 0
    line = capsys.readouterr().err.splitlines()[-1]
    assert "5 latents" in line and "levels of a pixel (RMS)" in line and "NFE" in line
    folder, stamp = folder_of(trained, "latents")
    arrays = dict(np.load(folder / "latents.npz"))
    assert arrays["latents"].shape == (5, 1, 8, 8) and arrays["latents"].dtype == np.float32
    assert stamp["largest_error"] == arrays["largest_error"].max() < 0.05
    assert stamp["rms_error"] == pytest.approx(np.sqrt((arrays["rms_error"] ** 2).mean())) and stamp["rms_error"] > 0
    assert min(stamp["nfe"]) > 20 and stamp["same_level"] > 0.98
    assert np.asarray(Image.open(folder / "grid.png")).shape == (2 + 2 * 34, 2 + 8 * 34)

    line = words("vp_digits", "decode", trained, images, **tight)
    assert run([*line, "--input", str(folder / "latents.npz")]) == 0
    folder, _ = folder_of(trained, "decoded")
    x = np.load(folder / "samples.npz")["arr_0"]
    k = load_data("digits").test.x[:5].permute(0, 2, 3, 1).numpy()  # type: ignore[index]
    assert x.dtype == np.uint8 and (x == k).mean() == pytest.approx(stamp["same_level"], abs=0.02)
    assert (folder / "grid.png").is_file()
    np.save(trained / "shuffled.npy", arrays["latents"][::-1])
    clear(trained, "decoded")
    assert run([*line, "--input", str(trained / "shuffled.npy"), "--config.sampling.temperature=0.0"]) == 0
    cold = np.load(folder_of(trained, "decoded")[0] / "samples.npz")["arr_0"]
    assert (cold == cold[0]).all(), "at temperature 0 there is one image"


def test_your_own_images_are_encoded(trained: Path, images: Path, tmp_path: Path) -> None:
    """A folder of images, one of them alone, and an array of levels: the same latents. One of another size: any."""
    k = load_data("digits").test.x[:2, 0].numpy()  # type: ignore[index]
    (tmp_path / "mine").mkdir()
    for i, image in enumerate(k):
        Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)).save(tmp_path / "mine" / f"{i}.png")
    np.save(tmp_path / "levels.npy", k)
    Image.new("RGB", (30, 20), (250, 20, 30)).save(tmp_path / "red.jpg")
    found = []
    for source in ("mine", "mine/0.png", "levels.npy", "red.jpg"):
        clear(trained, "latents")
        assert run([*words("vp_digits", "encode", trained, images), "--input", str(tmp_path / source)]) == 0
        found.append(np.load(folder_of(trained, "latents")[0] / "latents.npz")["latents"])
    assert [len(latents) for latents in found] == [2, 1, 2, 1]
    np.testing.assert_allclose(found[1], found[0][:1], atol=1e-3)  # to rounding: each has steps of its own
    np.testing.assert_array_equal(found[2], found[0])
    clear(trained, "latents")


@pytest.mark.parametrize("between", ["images", "seeds"])
def test_rows_go_from_one_image_to_another(between: str, trained: Path, images: Path) -> None:
    clear(trained, "interpolations")
    change = {"interpolation__between": between, "interpolation__pairs": 2, "interpolation__steps": 3}
    tight = {f"{part}__{key}": 1e-3 for part in ("eval", "sampling") for key in ("rtol", "atol")}
    assert run(words("vp_digits", "interpolate", trained, images, **change, **tight)) == 0
    folder, stamp = folder_of(trained, "interpolations")
    rows = np.load(folder / "interpolations.npz")["arr_0"]
    assert rows.shape == (2, 3, 8, 8, 1) and np.asarray(Image.open(folder / "grid.png")).shape == (70, 104)
    assert (rows[:, 1] != rows[:, 0]).any() and (rows[:, 1] != rows[:, 2]).any()
    if between == "images":
        k = load_data("digits").test.x[:4].permute(0, 2, 3, 1).numpy().reshape(2, 2, 8, 8, 1)  # type: ignore[index]
        assert 0 < stamp["ends_rms_error"] < 0.1
        assert (rows[:, [0, -1]] == k).mean() > 0.95
    else:
        clear(trained, "samples")
        drawn = {"sampling__method": "ode", "sampling__noise_removal": "false", "sampling__t_min": 1e-5}
        assert run(words("vp_digits", "sample", trained, images, sampling__num_samples=4, **drawn, **tight)) == 0
        assert (rows[:, [0, -1]] == samples(trained).reshape(2, 2, 8, 8, 1)).mean() > 0.95, "ends are not the samples"
        clear(trained, "interpolations")
        change["sampling__temperature"] = 0.0
        assert run(words("vp_digits", "interpolate", trained, images, **change, **tight)) == 0
        cold = np.load(folder_of(trained, "interpolations")[0] / "interpolations.npz")["arr_0"]
        assert (cold == cold[0, 0]).all() and (rows != rows[0, 0]).any(), "at temperature 0 there is one image"


@pytest.mark.parametrize("name", ["ve_toy", "iddpm_digits"])
def test_points_of_the_plane_and_chains_have_latents_too(name: str, tmp_path: Path, images: Path) -> None:
    few = {"interpolation__pairs": 1, "interpolation__steps": 3, "training__snapshot_sampling": "false"}
    few |= {"model__ch_mult": 1, "model__attn_resolutions": "()", "eval__ode_method": "bosh3"}
    for mode in ("train", "encode", "interpolate"):
        assert run(words(name, mode, tmp_path, images, **few)) == 0
    folder, stamp = folder_of(tmp_path, "latents")
    assert run([*words(name, "decode", tmp_path, images, **few), "--input", str(folder / "latents.npz")]) == 0
    assert np.isfinite(np.load(folder_of(tmp_path, "decoded")[0] / "samples.npz")["arr_0"]).all()
    assert stamp["unit"] == ("data" if name == "ve_toy" else "levels") and np.isfinite(stamp["rms_error"])
    picture = "histogram.png" if name == "ve_toy" else "grid.png"
    assert (folder_of(tmp_path, "interpolations")[0] / picture).is_file()


def test_slips_with_latents_are_answered(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "other.npz", latents=np.zeros((2, 3), np.float32))
    np.save(tmp_path / "deep.npy", np.full((2, 8, 8), 17, np.uint8))
    for mode, rest, answer in (
        ("decode", [], "--mode decode needs latents: --input FILE"),
        ("decode", ["--input", str(tmp_path / "none.npz")], "there is no file"),
        ("decode", ["--input", str(images)], "holds no array latents"),
        (
            "decode",
            ["--input", str(tmp_path / "other.npz")],
            "float32 of shape (2, 3), and latents are floats",
        ),
        ("encode", ["--input", str(tmp_path / "deep.npy")], "holds the value 17, and the data have levels 0..16"),
        ("sample", ["--input", str(images)], "--mode sample reads no --input"),
        ("interpolate", ["--input", str(images), "--config.interpolation.between=seeds"], "reads no --input"),
        ("sample", ["--config.sampling.temperature=0.5"], "temperature=0.5 is for samplers that draw no noise"),
        ("sample", ["--config.sampling.temperature=-1"], "sampling.temperature must be at least 0"),
        ("interpolate", ["--config.interpolation.steps=1"], "interpolation.steps must be at least 2"),
    ):
        assert run([*words("vp_digits", mode, trained, images), *rest]) == 2
        assert answer in capsys.readouterr().err.splitlines()[-1], answer


def test_a_solver_that_gives_up_says_so_in_a_sentence(
    trained: Path, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("score_sde.ode.integrators.MAX_EVALUATIONS", 20)
    monkeypatch.setattr("score_sde.ode.integrators.MAX_STEPS", 2)
    clear(trained, "likelihood")
    fine = {"eval__rtol": 1e-6, "eval__atol": 1e-6}
    assert run(words("vp_digits", "likelihood", trained, images, **fine, eval__ode_method="embedded")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: embedded gave up on 3 of 3 examples, at t = ") and "raise rtol and atol" in error
    assert run(words("vp_digits", "likelihood", trained, images, **fine, eval__ode_method="dopri5")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: dopri5 gave up after 21 evaluations") and "raise rtol and atol" in error


def test_an_image_on_which_the_solver_gives_up_is_named_and_costs_the_others_nothing(
    trained: Path, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from score_sde.tasks import likelihood as evaluate

    real = evaluate.log_probability

    def failing(*args: Any, first: int, **options: Any) -> Any:
        found = real(*args, first=first, **options)
        if first == 2:
            found.log_prob[1] = torch.nan
        return found

    change = {"eval__num_images": 4, "eval__batch_size": 2, "eval__probes": 2, "eval__check_images": 4}
    change["eval__ode_method"] = "bosh3"
    values = []
    for patched in (False, True):
        clear(trained, "likelihood")
        monkeypatch.setattr(evaluate, "log_probability", failing if patched else real)
        assert run(words("vp_digits", "likelihood", trained, images, **change)) == 0
        (folder,) = (trained / "likelihood").iterdir()
        values.append(np.load(folder / "likelihood.npz")["bits_per_dim"][:, 0])
    stamp = json.loads((folder / "stamp.json").read_text())
    kept = [0, 1, 2]
    assert stamp["failed"] == [3] and np.isnan(values[1][3])
    np.testing.assert_array_equal(values[1][kept], values[0][kept])
    assert stamp["mean"] == pytest.approx(values[0][kept].mean(), rel=1e-12)
    assert all(np.isfinite(error) for error in stamp["errors"].values())
    assert "without 1 images that failed: 3" in capsys.readouterr().err


# -- Ctrl-C


PLACES = {
    "sample": "samples", "likelihood": "likelihood", "encode": "latents", "decode": "decoded",
    "interpolate": "interpolations",
}  # fmt: skip


def main_of(command: list[str], errors: Path) -> None:
    """What main.py does, in a process of its own, with what it says written to a file."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background may ignore it
    torch.set_num_threads(1)
    with errors.open("w") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.exit(run(command))


@pytest.fixture
def command_of(trained: Path, images: Path, tmp_path: Path) -> Callable[[str], list[str]]:
    """The command of a mode that has no result yet: six batches of samples or images of latents, three of others."""
    change = {"sampling__num_samples": 6, "sampling__batch_size": 1, "sampling__steps": 20}
    change |= {"eval__num_images": 3, "eval__batch_size": 1, "eval__ode_method": "bosh3"}
    change |= {"interpolation__between": "seeds", "interpolation__pairs": 3, "interpolation__steps": 2}

    def command(mode: str) -> list[str]:
        clear(trained, PLACES[mode])
        np.savez(tmp_path / "latents.npz", latents=np.random.default_rng(0).normal(size=(6, 1, 8, 8)))
        own = ["--input", str(tmp_path / "latents.npz")] if mode == "decode" else []
        return [*words("vp_digits", mode, trained, images, **change), *own]

    return command


def finish(command: list[str], folder: Path) -> tuple[int, dict[str, np.ndarray]]:
    """(batches computed, result) of a command whose result lies in `folder`."""
    written, real = [], results.write_arrays
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "write_arrays", lambda path, arrays: (written.append(path), real(path, arrays)))
        assert run(command) == 0
    (result,) = folder.iterdir()
    assert (result / "stamp.json").is_file() and not (result / "parts").exists()
    assert not list(result.glob(".*"))
    return sum(path.parent.name == "parts" for path in written), dict(np.load(next(result.glob("*.npz"))))


def assert_goes_on(command: list[str], folder: Path, kept: int, batches: int) -> None:
    """The same command computes only what is missing, and its result is that of a command that was never stopped."""
    computed, resumed = finish(command, folder)
    assert computed == batches - kept
    clear(folder.parent, folder.name)
    computed, whole = finish(command, folder)
    assert computed == batches
    for key, value in whole.items():
        np.testing.assert_array_equal(resumed[key], value, err_msg=key)


@pytest.mark.parametrize(("mode", "number"), [("sample", signal.SIGINT), ("decode", signal.SIGKILL)])
def test_a_process_that_is_stopped_loses_nothing(
    mode: str, number: int, trained: Path, tmp_path: Path, command_of: Callable[[str], list[str]]
) -> None:
    """SIGINT to a real process: one sentence, code 130, and the same command computes only what is missing.

    After kill -9 too, and a batch whose file a full disk has cut short is computed again.
    """
    command, place = command_of(mode), trained / PLACES[mode]
    process = multiprocessing.get_context("fork").Process(target=main_of, args=(command, tmp_path / "errors"))
    process.start()
    assert process.pid is not None
    deadline = time.monotonic() + 120
    while len(list(place.glob("*/parts/0*.npz"))) < 2 and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, number)
    process.join(timeout=60)
    errors = (tmp_path / "errors").read_text()
    parts = sorted(place.glob("*/parts/0*.npz"))
    kept = len(parts)
    assert 2 <= kept < 6
    if number == signal.SIGINT:
        assert process.exitcode == 130 and "Traceback" not in errors
        assert errors.splitlines()[-1] == "interrupted; what was finished is on disk, and the same command goes on"
    else:
        assert process.exitcode == -number
        parts[1].write_bytes(parts[1].read_bytes()[:100])
        half = temporary(parts[0].parents[1] / "samples.npz")
        half.with_name(half.name.replace(f".{os.getpid()}.", f".{process.pid}.")).write_bytes(b"half")
        kept -= 1
    assert_goes_on(command, place, kept, batches=6)


@pytest.mark.parametrize("mode", ["likelihood", "encode", "interpolate"])
def test_an_interrupted_evaluation_loses_nothing(
    mode: str, trained: Path, command_of: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    command, real, parts = command_of(mode), results.write_arrays, list[Path]()

    def stops_at_the_third(path: Path, arrays: Any) -> None:
        parts.append(path)
        if len(parts) == 3:
            raise KeyboardInterrupt
        real(path, arrays)

    with monkeypatch.context() as patch:
        patch.setattr(results, "write_arrays", stops_at_the_third)
        assert run(command) == 130
    assert_goes_on(command, trained / PLACES[mode], kept=2, batches=3)


def test_a_result_without_its_stamp_is_finished(trained: Path, images: Path) -> None:
    """Stopped after the samples were joined but before their pictures: the same command makes these."""
    clear(trained, "samples")
    command = words("vp_digits", "sample", trained, images)
    assert run(command) == 0
    (folder,) = (trained / "samples").glob("0*")
    for name in ("stamp.json", "grid.png"):
        (folder / name).unlink()
    assert run(command) == 0
    assert (folder / "stamp.json").is_file() and (folder / "grid.png").is_file()


# -- slips


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        (["--config", "configs/vp_digit.py", "--mode", "train"], "did you mean configs/vp_digits.py"),
        (["--config", "configs/vp_digits.py"], "--mode"),
        (["--config", "configs/vp_digits.py", "--mode", "trian"], "invalid choice: 'trian'"),
        (["--config", "configs/vp_digits.py", "--mode", "train", "--config.training.n_iter=3"], "training.n_iters"),
        (["--config", "configs/vp_digits.py", "--mode", "train", "--wordkir", "x"], "unrecognized arguments: --wordk"),
        (["--config", "configs/vp_digits.py", "--mode", "train", "--config.device=cuda:77"], "cuda:77"),
        (["--config", "configs/vp_digits.py", "--mode", "sample"], "train it first with --mode train"),
    ],
)
def test_a_slip_is_answered_in_one_sentence(
    line: list[str], answer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*line, "--workdir", str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and answer in error


def test_a_checkpoint_of_other_data_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--config", "configs/vp_toy.py", "--mode", "sample", "--workdir", str(tmp_path)]
    assert run([*line, "--checkpoint", str(find(trained).path)]) == 2
    assert "has model.name=ncsnpp, and the config mlp: take the config that it was trained" in capsys.readouterr().err


def test_a_checkpoint_of_score_sde_pytorch_is_sampled(tmp_path: Path) -> None:
    """vp_cifar and ve_cifar, shrunk to the size of the recorded networks, read their files as they are."""
    np.save(tmp_path / "images.npy", np.zeros((20, 16, 16, 3), np.uint8))
    for name, net, multipliers in (("vp_cifar", "ddpmpp_vp", "1,2"), ("ve_cifar", "ncsnpp_ve", "1,2,2")):
        settings = {
            "data.dataset": "files", "data.path": tmp_path / "images.npy", "data.image_size": 16, "model.nf": 16,
            "model.ch_mult": multipliers, "model.num_res_blocks": 1, "model.attn_resolutions": 8,
            "sampling.steps": 2, "sampling.num_samples": 2,
        }  # fmt: skip
        line = ["--config", f"configs/{name}.py", "--mode", "sample", "--workdir", str(tmp_path / name)]
        line += ["--checkpoint", f"tests/data/recorded/nets/{net}.ckpt.pth"]
        assert run([*line, *(f"--config.{key}={value}" for key, value in settings.items())]) == 0
        (folder,) = (tmp_path / name / "samples").iterdir()
        assert np.load(folder / "samples.npz")["arr_0"].shape == (2, 16, 16, 3)


def test_a_changed_config_is_told(trained: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words("vp_digits", "train", trained, images, training__n_iters=20, optim__lr=0.1)) == 0
    assert "optim.lr: 0.004 -> 0.1" in capsys.readouterr().err


def test_running_without_arguments_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    text = capsys.readouterr().out
    assert "score_sde MODE NAME" in text and all(f"  {name} " in text for name in CONFIGS)
    assert "no configs" not in text and "DDPM++ with the VP SDE" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vp_toy", "ve_toy"])
def test_the_toy_recipes_come_near_the_entropy(name: str, tmp_path: Path) -> None:
    """0.35 nats were measured; the mixture's entropy is log 8 + log(2 pi e 0.01) = 0.312, a standard error 0.033."""
    line = ["--config", f"configs/{name}.py", "--workdir", str(tmp_path), "--config.training.snapshot_sampling=false"]
    assert run([*line, "--mode", "train"]) == 0
    assert run([*line, "--mode", "likelihood"]) == 0
    (folder,) = (tmp_path / "likelihood").iterdir()
    assert 0.2 < json.loads((folder / "stamp.json").read_text())["mean"] < 0.45


@pytest.mark.slow
def test_the_demo_reaches_what_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bits/dim below 1.90, and a classifier sure of at least 65 % of the samples, all ten digits among them."""
    assert run(["--config", "configs/vp_digits.py", "--mode", "demo", "--workdir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    sure = float(text.split("more than 90 % sure of ")[1].split(" %")[0])
    bits = float(text.split("being better:\n")[1].split()[0])
    assert bits < 1.90 and sure >= 65 and "10 of the 10 digits occur" in text
