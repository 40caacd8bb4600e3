"""Samples that begin with examples, noised to a time (SDEdit): their law, and --mode sample --input FILES."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

from score_sde import (
    DDIM,
    SDE,
    VESDE,
    VPSDE,
    Ancestral,
    EmbeddedODE,
    EulerMaruyama,
    Heun,
    Multistep,
    Sampler,
    SubVPSDE,
    sample,
    times,
    twisted,
)
from score_sde.cli import run
from score_sde.config import build, load
from score_sde.data import Split
from score_sde.data.codecs import PixelCodec
from score_sde.inverse import Mask, Observation
from score_sde.models.closed_form import Gaussian
from score_sde.noise import noise_source
from score_sde.tasks.conditions import Wanted
from tests import ROOT
from tests.oracles import name, numbers

M, V, X0 = 0.3, torch.tensor([0.01, 0.25, 4.0], dtype=torch.float64), torch.tensor([0.2, -0.5, 3.0]).double()


def law(sde: SDE, t: Tensor, s: Tensor, noisy: bool) -> tuple[Tensor, Tensor]:
    """Mean and variance of the states at s, walked there by an exact model of N(M, V) from x_t = alpha X0 + sigma z.

    The reverse SDE draws from the posterior of x_s given x_t; the flow scales x_t's distance from its mean to the
    deviation that there is at s.
    """
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    there, here = (sde.alpha(u) ** 2 * V + sde.sigma(u) ** 2 for u in (t, s))
    slope = sde.transition(s, t)[0] * here / there if noisy else (here / there).sqrt()
    left = here - (slope**2 * there if noisy else here)
    return sde.alpha(s) * M + slope * alpha * (X0 - M), slope**2 * sigma**2 + left


@pytest.mark.parametrize(
    ("sampler", "steps"),
    [
        (Multistep(2, eta=1.0), 60), (EulerMaruyama(), 150), (Ancestral(), 150), (Heun(), 20), (EmbeddedODE(), 1),
        (DDIM(), 150),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("sde", [VPSDE(), VESDE(t_min=0.01), SubVPSDE()], ids=name)
def test_changed_gaussian_data_have_the_closed_form_s_law(sde: SDE, sampler: Sampler, steps: int) -> None:
    n, t = 2000, torch.tensor(0.4, dtype=torch.float64)
    grid = times.log_snr(sde, steps, start=0.4)
    start = sde.perturb(X0.expand(n, 3), t, numbers(n, 3, seed=1))
    before = start.clone()
    x = sample(Gaussian(sde, torch.full((3,), M), V), sampler, (n, 3), grid, start=start, seed=5)
    assert torch.equal(start, before) and x.dtype == torch.float64
    mean, variance = law(sde, t, grid[-1], noisy=not isinstance(sampler, (Heun, DDIM, EmbeddedODE)))
    error = (variance / n).sqrt()  # four of them, and what is left of the steps' errors
    assert bool(((x.mean(0) - mean).abs() < 4 * error + 0.01 * mean.abs()).all())
    assert bool(((x.std(0) / variance.sqrt() - 1).abs() < 4 / math.sqrt(2 * n) + 0.02).all())


def test_a_grid_below_one_asks_for_its_state_and_a_state_must_fit() -> None:
    sde = VPSDE()
    model, grid, x = Gaussian(sde, torch.zeros(2), 0.5), times.uniform(sde, 4, start=0.4), numbers(3, 2)
    of_particles = Observation(Mask(torch.tensor([True, False])), x, 0.1)
    for walk, remedy in (
        (lambda: sample(model, DDIM(), (3, 2), grid), "begin it there, or give .*start=x"),
        (lambda: twisted(model, of_particles, (3, 2), grid, particles=2), "begin it there$"),
    ):
        with pytest.raises(ValueError, match=f"begins at t = 0.4, and the prior is the law at t = 1: {remedy}"):
            walk()
    for wrong, words in (
        (x[:2], r"of the samples' shape \(3, 2\), got torch.float64 of shape \(2, 2\)"),
        (x.long(), "got torch.int64 of shape"),
        (x.numpy(), "got ndarray"),
        (x * math.nan, "start holds values that are not finite"),
    ):
        with pytest.raises(ValueError, match=words):
            sample(model, DDIM(), (3, 2), grid, start=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature=0.5 scales the draw from the prior, which start replaces"):
        sample(model, DDIM(), (3, 2), grid, start=x, temperature=0.5)
    assert sample(model, DDIM(), (3, 2), grid, start=x.float()).dtype == torch.float32
    assert sample(model, DDIM(), (3, 2), grid, start=x.half()).dtype == torch.float32
    # from t = 1 too; and the noise of a walk is that of (seed, example), whatever the batch
    whole = sample(model, Ancestral(), (3, 2), times.uniform(sde, 4), start=x, seed=2)
    part = sample(model, Ancestral(), (1, 2), times.uniform(sde, 4), start=x[1:2], seed=2, first=1)
    torch.testing.assert_close(part, whole[1:2])
    near = sample(model, DDIM(), (3, 2), torch.tensor([1 - 1e-7, 0.5, 0.1], dtype=torch.float64))  # 1 to float32
    torch.testing.assert_close(near, sample(model, DDIM(), (3, 2), [1, 0.5, 0.1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", build.METHODS)
@pytest.mark.parametrize("config", ["vp_digits", "iddpm_digits"])
def test_every_method_begins_at_the_time_that_a_config_says(config: str, method: str) -> None:
    chain = config == "iddpm_digits"
    c = load(
        ROOT / f"configs/{config}.py",
        {"sampling.method": method, "sampling.start": "0.415", "sampling.variance": "small"},
    )
    c.sampling.steps = 15
    sde = build.build_sde(c)
    grid, sampler = build.build_times(c, sde), build.build_sampler(c)
    assert grid[0] == (0.42 if chain else 0.415)
    ends = method in ("embedded", "adaptive_sde") or method == "ode"
    assert len(grid) == (2 if ends else 15 if chain else 16)
    start = sde.perturb(torch.zeros(50, 2), grid[0], numbers(50, 2, dtype=torch.float32))
    x = sample(Gaussian(sde, torch.zeros(2), 0.25), sampler, (50, 2), grid, start=start)
    assert x.shape == (50, 2) and 0.1 < float(x.std()) < 1.2
    c.sampling.steps = 50
    if chain and not ends:  # of whose steps 21 are left
        assert len(build.build_times(c, sde)) == 21


def test_what_is_changed_is_noised_by_numbers_of_its_own() -> None:
    config = load(ROOT / "configs/vp_digits.py", {"sampling.start": "0.4", "sampling.seed": "3"})
    sde, codec, t = build.build_sde(config), PixelCodec(17), torch.tensor(0.001, dtype=torch.float64)
    k = torch.randint(17, (2, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wanted = Wanted([], changed=Split(k))
    start = wanted.start(1, 3, config, codec, sde, t)
    assert start is not None
    middle = (2 * (k[[1, 0, 1]].double() + 0.5) / 17 - 1).float()  # of each level, as the model was trained
    z = (start - sde.alpha(t).float() * middle) / sde.sigma(t).float()
    assert kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    noise = noise_source((3, 1, 8, 8), 3, 1, torch.float32, torch.device("cpu"))
    for _ in range(4):  # the sampler's
        assert float(torch.corrcoef(torch.stack([z.flatten(), noise(z).flatten()]))[0, 1].abs()) < 0.3
    alone = wanted.start(2, 1, config, codec, sde, t)
    assert alone is not None and torch.equal(alone, start[1:2])
    assert Wanted([]).start(1, 3, config, codec, sde, t) is None


# --- the command line


def words(workdir: Path, mode: str, *more: str, **changes: object) -> list[str]:
    settings = {
        "training.n_iters": 1, "training.batch_size": 2, "training.snapshot_sampling": "false", "model.nf": 4,
        "model.ch_mult": "1,1", "model.num_res_blocks": 1, "model.attn_resolutions": "()", "sampling.steps": 4,
        "sampling.num_samples": 5, "sampling.batch_size": 3, "model.class_conditional": "true",
        "sampling.labels": "1,2",
    } | {key.replace("__", "."): value for key, value in changes.items()}  # fmt: skip
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    return ["--config", "configs/vp_digits.py", "--mode", mode, "--workdir", str(workdir), *more, *overrides]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of digits after a step, and three of them."""
    folder = tmp_path_factory.mktemp("digits")
    np.save(folder / "own.npy", np.random.default_rng(0).integers(0, 17, (3, 8, 8, 1)).astype(np.uint8))
    assert run(words(folder, "train")) == 0
    return folder


def found(workdir: Path) -> tuple[dict[str, np.ndarray], dict[str, object], Path]:
    newest = max((workdir / "samples").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    with np.load(newest / "samples.npz") as arrays:
        return dict(arrays), json.loads((newest / "stamp.json").read_text()), newest


def test_your_own_images_are_changed_in_turn(trained: Path) -> None:
    own = ("--input", str(trained / "own.npy"))
    assert run(words(trained, "sample", *own, sampling__start=0.002)) == 0
    arrays, stamp, folder = found(trained)
    images = np.load(trained / "own.npy")
    assert np.array_equal(arrays["given"], images[[0, 1, 2, 0, 1]]) and arrays["arr_1"].tolist() == [1, 2, 1, 2, 1]
    off = np.abs(arrays["arr_0"].astype(int) - arrays["given"])
    assert off.mean() < 1 and off.max() <= 4  # noise of 0.015 against levels 0.12 apart
    assert stamp["grid"]["first"] == 0.002 and len(str(stamp["input_sha256"])) == 64  # type: ignore[index]
    assert (folder / "grid.png").is_file()
    assert run(words(trained, "sample", *own, sampling__start=0.4, sampling__batch_size=5)) == 0
    more, _, other = found(trained)
    assert other != folder and np.abs(more["arr_0"].astype(int) - more["given"]).mean() > 2
    assert (
        run(words(trained, "sample", *own, sampling__start=0.4, sampling__batch_size=2, sampling__num_samples=4)) == 0
    )
    assert (found(trained)[0]["arr_0"] == more["arr_0"][:4]).mean() > 0.99  # to rounding
    np.save(trained / "other.npy", images[::-1])
    assert run(words(trained, "sample", "--input", str(trained / "other.npy"), sampling__start=0.4)) == 0
    assert found(trained)[2] != other and np.array_equal(found(trained)[0]["given"][0], images[2])
    assert run(words(trained, "sample", *own, "--scales", "1,2", sampling__start=0.4)) == 0
    assert len(found(trained)[0]["given"]) == len(found(trained)[0]["arr_0"]) == 10


EARLY = {"sampling__start": 0.4, "sampling__method": "heun"}


@pytest.mark.parametrize(
    ("mode", "own", "changes", "answer"),
    [
        ("sample", True, {}, "own.npy; leave it out, or begin with it: --config.sampling.start=0.4"),
        ("sample", False, {"sampling__start": 0.4}, "sampling.start=0.4 begins with examples that are noised"),
        ("sample", True, {"sampling__start": 0.4, "sampling__num_samples": 2}, "own.npy holds 3 examples, and"),
        ("sample", True, {"sampling__start": 0}, "sampling.start must be above 0 and at most 1, got 0"),
        ("sample", True, {"sampling__start": 0.001}, "sampling.start=0.001 must be above sampling.t_min=0.001"),
        ("sample", True, {**EARLY, "sampling__temperature": 0.5}, "does not make: set one of them to 1"),
        ("sample", True, {**EARLY, "sampling__grid": "fitted"}, "sampling.grid=fitted begins at t = 1"),
        ("sample", True, {"sampling__start": 0.4, "model__super_resolution": 2}, "super_resolution=2 enlarges"),
        ("colorize", True, {"sampling__start": 0.4}, "is of --mode sample, and this is --mode color"),
        ("demo", False, {"sampling__start": 0.4}, "sampling.start=0.4 is of --mode sample, and this is --mode demo"),
    ],
)  # fmt: skip
def test_what_cannot_begin_there_is_said(
    mode: str, own: bool, changes: dict[str, object], answer: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--input", str(trained / "own.npy")) if own else ()
    assert run(words(trained, mode, *given, **changes)) == 2
    assert answer in capsys.readouterr().err


def test_a_chain_too_short_for_the_start_is_refused() -> None:
    with pytest.raises(ValueError, match="sampling.start=0.02 leaves fewer than 2 of the chain's .*=50 steps"):
        load(ROOT / "configs/iddpm_digits.py", {"sampling.start": "0.02"})
    # where little is lost in a step, the flow's reverse diffusion is right on a cosine schedule too
    flow = {"sampling.predictor": "reverse_diffusion", "sampling.probability_flow": "1", "sampling.variance": "small"}
    load(ROOT / "configs/iddpm_digits.py", {**flow, "sampling.start": "0.8"})
