"""Stamps: every key of the config changes a result and its stamp, or neither; and a result is of what was asked."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from PIL import Image
from torch import Tensor

from score_sde import DDPM, VPSDE, cli
from score_sde.config import default_config
from score_sde.config import keys as config_keys
from score_sde.config.reading import flat
from score_sde.data import Data, Split
from score_sde.data.codecs import PixelCodec, VectorCodec
from score_sde.machine.lock import Busy
from score_sde.machine.parallel import Processes
from score_sde.models.base import Estimate, ScoreModel
from score_sde.sdes import SDE
from score_sde.tasks import dequantize, latents, likelihood, restore, results, sample, stamps
from score_sde.tasks.checkpoint import Trained
from score_sde.tasks.conditions import Guides, Wanted, sampled_labels
from score_sde.tasks.job import Job
from score_sde.tasks.stamps import KEYS, asked
from tests.runs import put

ALONE = Processes(0, 1, torch.device("cpu"))
IMAGE = (1, 4, 4)

# What a kind of result is made with: all its branches, so that every key that it reads is read.
SAMPLERS: tuple[dict[str, Any], ...] = (
    {"sampling.predictor": "reverse_diffusion", "sampling.corrector": "langevin"},
    {"sampling.predictor": "ancestral_sampling"},
    {"sampling.method": "ode"},
    {"sampling.method": "ddim", "sampling.grid": "log_snr"},
    {"sampling.method": "edm"},
    {"sampling.method": "unipc"},
    {"sampling.method": "dpm_solver++"},
    {"sampling.method": "adaptive_sde"},
    {"training.sde": "vesde", "sampling.method": "ald", "sampling.step_lr": 1e-5, "model.sigma_min": 0.01},
    {"training.continuous": False, "sampling.predictor": "ancestral_sampling"},
    {"sampling.guidance": 2.0, "sampling.negative_label": 1, "sampling.labels": (0, 2)},
    {"sampling.threshold": 0.9},
    {"model.super_resolution": 2, "sampling.augmentation": 0.1},
)
UNIFORM = {"data.uniform_dequantization": True}
BASES: dict[str, tuple[dict[str, Any], ...]] = {
    "sample": SAMPLERS,
    "sample from examples": ({"sampling.start": 0.4},),
    "ode": (
        {},
        {"eval.importance_samples": 2},
        {"eval.dequantization": "truncated_normal"},
        {"data.dataset": "ring", "data.random_flip": False, "model.name": "mlp"},
    ),
    "sde_bound": ({"eval.estimate": "sde_bound"},),
    "bound": ({"eval.estimate": "bound"}, {"training.continuous": False}, {"eval.estimate": "bound", "eval.steps": 5}),
    "encode": ({}, UNIFORM),
    "decode": ({},),
    "interpolate": ({}, UNIFORM),
    "interpolate seeds": ({"interpolation.between": "seeds"},),
    "restore inpaint": (
        *({"inverse.method": method, **UNIFORM} for method in restore.METHODS),
        {"sampling.guidance": 2.0, "sampling.negative_label": 1, "sampling.labels": (0, 2), "inverse.noise": 0.1},
    ),
    "restore superresolve": ({},),
    "restore deblur": ({},),
    "dequantize": ({},),
}
SAMPLER = """training.continuous model.num_scales model.sigma_min sampling.method sampling.predictor
    sampling.corrector sampling.variance sampling.snr sampling.step_lr sampling.n_steps_each sampling.probability_flow
    sampling.eta sampling.order sampling.predict sampling.unipc_variant sampling.churn sampling.churn_low
    sampling.churn_high sampling.churn_inflate sampling.steps sampling.grid sampling.t_min sampling.ode_method
    sampling.rtol sampling.atol sampling.sde_rtol sampling.sde_atol sampling.start"""
DRAWN = """sampling.seed sampling.noise_removal sampling.temperature sampling.clip_denoised sampling.threshold
    sampling.labels sampling.negative_label sampling.guidance sampling.guidance_low sampling.guidance_high
    sampling.guidance_rescale sampling.ema model.class_conditional"""
EVALUATED = "sampling.ema eval.weights eval.conditional data.centered model.class_conditional"
OF_SPLIT = f"eval.num_images eval.split {EVALUATED}"
FLOW = "eval.ode_method eval.rtol eval.atol eval.t_min"
TRAINED = "eval.seed data.uniform_dequantization"
ROWS = "interpolation.between interpolation.pairs interpolation.steps sampling.temperature"
# The keys that change a kind of result, beside those of paths, whose contents do.
CHANGES = {
    "sample": f"""{SAMPLER} {DRAWN} sampling.num_samples sampling.batch_size sampling.weights sampling.augmentation
        model.num_classes model.super_resolution data.centered""",
    "sample from examples": """sampling.start data.uniform_dequantization""",
    "ode": f"""{OF_SPLIT} {FLOW} model.super_resolution eval.estimate eval.seed eval.probe eval.probes
        eval.check_images eval.dequantization eval.dequantizations eval.importance_samples
        training.continuous""",
    "sde_bound": f"""{OF_SPLIT} model.super_resolution eval.estimate eval.seed eval.draws eval.t_min
        eval.dequantization eval.dequantizations eval.importance_samples""",
    "bound": f"""{OF_SPLIT} model.super_resolution eval.estimate eval.seed eval.terms eval.clip_denoised eval.steps
        eval.t_min sampling.variance training.continuous model.num_scales""",
    "encode": f"{OF_SPLIT} {FLOW} {TRAINED}",
    "decode": f"{EVALUATED} {FLOW} sampling.temperature",
    "interpolate": f"{EVALUATED} {FLOW} {TRAINED} {ROWS} eval.split",
    "interpolate seeds": f"{EVALUATED} {FLOW} {ROWS} sampling.seed sampling.labels model.num_classes",
    "restore inpaint": f"""{SAMPLER} {DRAWN} {TRAINED} eval.num_images eval.split eval.weights data.centered
        inverse.method inverse.noise inverse.variance inverse.rate inverse.iterations inverse.resamplings
        inverse.particles""",
    "restore superresolve": "inverse.method inverse.noise inverse.variance inverse.factor",
    "restore deblur": "inverse.method inverse.noise inverse.variance inverse.blur",
    "dequantize": """seed eval.t_min eval.weights sampling.ema data.centered dequantizer.n_iters dequantizer.batch_size
        dequantizer.lr dequantizer.layers dequantizer.hidden""",
}


class Normal(ScoreModel):
    """The exact model of N(0, I), whatever it is told."""

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Estimate:
        alpha, sigma = (v.to(x).reshape(-1, *[1] * (x.ndim - 1)) for v in (self.sde.alpha(t), self.sde.sigma(t)))
        variance = alpha**2 + sigma**2
        return Estimate(alpha * x / variance, sigma * x / variance, sigma)


def config_of(base: dict[str, Any]) -> ConfigDict:
    config = default_config()
    small = {
        "sampling.steps": 2, "sampling.num_samples": 3, "sampling.batch_size": 2, "eval.batch_size": 2,
        "eval.num_images": 2, "eval.rtol": 0.5, "eval.atol": 0.5, "model.class_conditional": True,
        "model.num_classes": 3, "model.num_scales": 10, "interpolation.pairs": 1, "interpolation.steps": 2,
        "dequantizer.n_iters": 1, "dequantizer.batch_size": 2, "eval.check_images": 1, "inverse.factor": 2,
    }  # fmt: skip
    for key, value in {**small, **base}.items():
        put(config, key, value)
    return config


def examples(shape: tuple[int, ...], seed: int = 0) -> Split:
    random = np.random.default_rng(seed)
    floats = torch.from_numpy(random.normal(size=(4, *shape)).astype(np.float32))
    return Split((floats * 64 + 128).clamp(0, 255).to(torch.uint8) if len(shape) == 3 else floats, torch.arange(4) % 3)


def make(kind: str, config: Any, base: dict[str, Any], folder: Path, given: int = 0) -> None:
    """The result of a kind, by the function that makes it, with the model and the data of a base.

    `given` is a seed of all examples, latents and masks.
    """
    sde: SDE = VPSDE() if base.get("training.continuous", True) else DDPM.linear(10).as_sde()
    shape = (2,) if base.get("data.dataset") == "ring" else IMAGE
    split, path = examples(shape, given), folder / "000000001.safetensors"
    codec = PixelCodec(256, config.data.centered) if len(shape) == 3 else VectorCodec()
    path.write_bytes(b"a model")
    job = Job(Normal(sde), config, codec, Trained(path), shape, folder / "results", ALONE)
    if kind == "sample":
        small = torch.zeros(3, 1, 2, 2, dtype=torch.uint8) if config.model.super_resolution else None
        sample.run_sampling(job, Guides(), Wanted(sampled_labels(config), images=small))
    elif kind == "sample from examples":
        wanted = Wanted(sampled_labels(config), changed=split)
        sample.run_sampling(job, Guides(), wanted)
    elif kind in ("ode", "sde_bound", "bound"):
        likelihood.run_likelihood(job, split)
    elif kind == "encode":
        latents.run_encoding(job, split)
    elif kind == "decode":
        np.savez(folder / "latents.npz", latents=np.full((2, *shape), 1 + given, np.float32), labels=np.arange(2))
        latents.run_decoding(job, folder / "latents.npz")
    elif kind.startswith("interpolate"):
        between = None if config.interpolation.between == "seeds" else split
        latents.run_interpolation(job, between)
    elif kind == "dequantize":
        dequantize.run_dequantizing(job, split)
    else:
        task, mask, wanted = kind.split()[1], folder / "mask.png", Wanted([*config.sampling.labels])
        Image.fromarray(np.roll(np.tile(np.uint8([0, 255]), (4, 2)), given)).save(mask)
        mask = mask if task == "inpaint" else None
        restore.run_restoring(job, task, Data(split, split), None, mask, Guides(), wanted)


class Watched:
    """A config that notes which keys are read, and once it is `closed` lets none be."""

    def __init__(self, config: ConfigDict, prefix: str = "", notes: set[str] | None = None) -> None:
        self.config, self.prefix, self.read = config, prefix, set[str]() if notes is None else notes

    def __getattr__(self, name: str) -> Any:
        return self[name]

    def __getitem__(self, name: str) -> Any:
        value, key = self.config[name], self.prefix + name
        if isinstance(value, ConfigDict):
            return Watched(value, f"{key}.", self.read)
        assert "closed" not in self.read, f"{key} is read, and may not be in the stamp"
        self.read.add(key)
        return value

    def keys(self) -> Iterator[str]:
        return iter(self.config.keys())


class Stamped(Exception):
    """In a result's place: what its stamp holds."""


@pytest.fixture
def unmade(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(folder: Path, made_from: dict[str, Any], *args: object) -> None:
        raise Stamped(repr(made_from))

    def of_file(path: Path, made_from: str) -> bool:
        raise Stamped(made_from)

    monkeypatch.setattr(results, "kept", asked)
    monkeypatch.setattr(dequantize, "was_made_from", of_file)


def stamp_of(kind: str, config: Any, base: dict[str, Any], folder: Path, given: int = 0) -> str | None:
    """The stamp, without making the result; None for values that are refused."""
    try:
        make(kind, config, base, folder, given)
    except Stamped as found:
        return str(found)
    except (ValueError, KeyError, FileNotFoundError):
        return None
    raise AssertionError("no stamp was asked for")


def others(key: str, value: Any) -> Iterator[Any]:
    """Other values that a key may have."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    tries: list[Any] = [v for v in config_keys.KEYS[key].choices if v != value]
    tries += [not value] if isinstance(value, bool) else []
    tries += [value + 1, value + 2, 0.5 * value, value / 4 + 0.01, 0.3, 0, 1, 2, 3] if number else []
    tries += [value + "x"] if isinstance(value, str) and not config_keys.KEYS[key].choices else []
    tries += [(1, 0), (1, 2, 0)] if isinstance(value, tuple) else []
    for other in tries:
        try:
            other = config_keys.check(key, type(value)(other) if number and type(value)(other) == other else other)
        except ValueError:
            continue
        if other != value:
            yield other


@pytest.mark.parametrize("kind", BASES)
def test_a_key_changes_the_stamp_if_and_only_if_it_changes_the_result(kind: str, unmade: None, tmp_path: Path) -> None:
    changed = set[str]()
    for base in BASES[kind]:
        config = config_of(base)
        watched, before = Watched(config), stamp_of(kind, config, base, tmp_path)
        assert before is not None and stamp_of(kind, watched, base, tmp_path) == before
        for key in watched.read - changed:  # none that is not read can change it
            value = flat(config)[key]
            for other in others(key, value):
                put(config, key, other)
                if stamp_of(kind, config, base, tmp_path) not in (None, before):
                    changed.add(key)
                    break
            put(config, key, value)
    if kind in ("restore superresolve", "restore deblur"):
        changed = {key for key in changed if key.startswith("inverse.")}
    if kind == "restore inpaint":
        changed |= set(SAMPLER.split())  # which is made as for samples
    if kind == "sample from examples":  # all else is as for samples from the prior
        changed -= set(CHANGES["sample"].split()) - {"sampling.start"}
    assert sorted(changed) == sorted({*CHANGES[kind].split()})


@pytest.mark.parametrize("kind", BASES)
def test_a_computation_reads_what_its_stamp_holds_and_nothing_else(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The config is closed as soon as the computation has its own, and of that every key is read."""
    read = set[str]()

    def limited(config: Watched, keys: Sequence[str]) -> Watched:
        found = asked(config, keys)  # type: ignore[arg-type]
        config.read.add("closed")
        return Watched(found, "", read)

    monkeypatch.setattr(stamps, "asked", limited)
    for i, base in enumerate(BASES[kind]):
        (tmp_path / str(i)).mkdir()
        make(kind, Watched(config_of(base)), base, tmp_path / str(i))
    own = {name for of in restore.METHODS for name in restore.OWN.get(of, ())}
    holds = {
        "restore inpaint": {*KEYS["restore"], *(f"inverse.{name}" for name in own)},
        "sample from examples": {"data.uniform_dequantization"},  # and what samples from the prior read
    }
    assert {*holds.get(kind, KEYS.get(kind, ()))} <= read


@pytest.mark.parametrize("kind", sorted(BASES.keys() - {"sample", "interpolate seeds"}))
def test_other_examples_latents_and_masks_are_another_result(kind: str, unmade: None, tmp_path: Path) -> None:
    config, base = config_of(BASES[kind][0]), BASES[kind][0]
    first, again, other = (stamp_of(kind, config, base, tmp_path, given) for given in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(
    ("kind", "base", "together"),
    [
        ("sample", {"sampling.method": "ode"}, True),
        ("sample", {"sampling.method": "ode", "sampling.ode_method": "rk4"}, False),
        ("sample", {"sampling.method": "embedded", "eval.ode_method": "RK45"}, False),
        ("sample from examples", {"sampling.start": 0.4, "sampling.method": "ode"}, True),
        ("restore inpaint", {"sampling.method": "ode"}, True),
        ("restore inpaint", {"eval.ode_method": "RK45"}, False),
        *((kind, {"eval.ode_method": "RK45"}, True) for kind in ("ode", "encode", "decode", "interpolate")),
        *((kind, {"sampling.method": "ode"}, False) for kind in ("ode", "encode", "decode", "interpolate")),
        ("sde_bound", {"eval.estimate": "sde_bound", "eval.ode_method": "RK45"}, False),
    ],
)
def test_where_a_batch_shares_its_steps_its_size_is_in_the_stamp(
    kind: str, base: dict[str, Any], together: bool, unmade: None, tmp_path: Path
) -> None:
    """Then an example depends on its neighbours, to within the tolerance."""
    key = "sampling.batch_size" if kind.startswith("sample") else "eval.batch_size"
    two, three = (stamp_of(kind, config_of({**base, key: size}), base, tmp_path) for size in (2, 3))
    assert two is not None and three is not None and (two != three) == together


@pytest.mark.parametrize(("own", "remedy"), [(False, "eval.split=test has no more"), (True, "add another to --input")])
def test_an_interpolation_of_one_example_is_refused(own: bool, remedy: str, tmp_path: Path) -> None:
    one, trained = examples(IMAGE), Trained(tmp_path / "x.safetensors")
    job = Job(Normal(VPSDE()), config_of({}), PixelCodec(256), trained, IMAGE, tmp_path, ALONE)
    one = Split(one.x[:1], one.y[:1])  # type: ignore[index]
    with pytest.raises(ValueError, match=remedy):
        latents.run_interpolation(job, one, own)


def test_a_mask_alone_is_another_result(unmade: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of({})
    first = stamp_of("restore inpaint", config, {}, tmp_path)
    same = examples(IMAGE)
    monkeypatch.setitem(globals(), "examples", lambda shape, seed=0: same)
    assert stamp_of("restore inpaint", config, {}, tmp_path) == first
    assert stamp_of("restore inpaint", config, {}, tmp_path, given=1) != first


def test_the_same_command_on_other_data_is_another_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other data by their name, and a file that was overwritten between two runs."""

    def run(mode: str, dataset: str) -> str:
        settings = {
            "data.dataset": dataset, "data.path": tmp_path / "points.npy", "model.hidden": 8, "model.depth": 1,
            "training.n_iters": 1, "training.batch_size": 4, "training.snapshot_sampling": "false",
            "eval.num_images": 4, "eval.rtol": 0.5, "eval.atol": 0.5, "interpolation.pairs": 1,
        }  # fmt: skip
        words = ["--config", "configs/vp_toy.py", "--mode", mode, "--workdir", str(tmp_path / "run")]
        assert cli.run([*words, *(f"--config.{key}={value}" for key, value in settings.items())]) == 0
        return capsys.readouterr().err.splitlines()[-1].split(" ", 1)[1]  # without the time

    run("train", "ring")
    told = []
    for i in (0, 1, 1):
        np.save(tmp_path / "points.npy", np.random.default_rng(i).normal(size=(20, 2)).astype(np.float32))
        told.append(run("likelihood", "files"))
    told += [run("likelihood", dataset) for dataset in ("ring", "moons", "ring")]
    assert told[1] == told[2] and told[3] == told[5] and len(set(told)) == 4
    for mode in ("encode", "interpolate"):
        assert run(mode, "ring") != run(mode, "moons")


# -- finished results


def sampled(folder: Path, **changes: Any) -> Path:
    """Samples of images, and the folder that they are in."""
    make("sample", config_of({key.replace("__", "."): value for key, value in changes.items()}), {}, folder)
    (found,) = (folder / "results" / "samples").iterdir()
    return found


def test_a_finished_result_gets_the_pictures_that_are_asked_for_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sampled(tmp_path)
    assert not list(folder.glob("0*.png"))
    monkeypatch.setattr(Normal, "forward", lambda *args, **kwargs: pytest.fail("it is computed again"))
    sampled(tmp_path, sampling__single_png=True)
    written, samples = sorted(folder.glob("0*.png")), np.load(folder / "samples.npz")["arr_0"]
    assert [path.name for path in written] == ["000000.png", "000001.png", "000002.png"]
    for path, image in zip(written, samples, strict=True):
        assert np.array_equal(np.array(Image.open(path)), image[..., 0])
    monkeypatch.setattr(sample, "write_arrays", lambda *args: pytest.fail("it is written again"))
    sampled(tmp_path, sampling__single_png=True, sampling__batch_size=1)


def test_a_finished_likelihood_gets_its_heat_map_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("ode", config_of({}), {}, tmp_path)
    monkeypatch.setattr(likelihood, "log_probability", lambda *args, **kwargs: pytest.fail("it is computed again"))
    (folder,), maps = (tmp_path / "results" / "likelihood").iterdir(), []
    for count in (1, 2, 2):
        make("ode", config_of({"eval.heat_map": count}), {}, tmp_path)
        maps.append(np.load(folder / "heat_map.npz")["bits"])
    assert [len(bits) for bits in maps] == [1, 2, 2] and (folder / "heat_map.png").is_file()
    np.testing.assert_allclose(maps[1][:1], maps[0], rtol=0.05)
    assert not list(folder.rglob("parts"))


@pytest.mark.parametrize("harm", ["cut", "other", "gone", "stamp"])
def test_a_result_that_is_not_what_its_stamp_says_is_made_again(
    harm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = sampled(tmp_path)
    file, stamp = folder / "samples.npz", folder / "stamp.json"
    whole, told = file.read_bytes(), stamp.read_text()
    caplog.clear()
    if harm == "cut":
        file.write_bytes(whole[:-100])
    elif harm == "other":
        results.write_arrays(file, {"arr_0": np.zeros((3, 4, 4, 1), np.uint8), "arr_1": np.arange(3)})
    elif harm == "gone":
        file.unlink()
    else:
        stamp.write_text(told[:-30])
    assert sampled(tmp_path) == folder
    assert file.read_bytes() == whole and stamp.read_text() == told
    assert caplog.text.count("computed again") == 1 and str(stamp if harm == "stamp" else file) in caplog.text
    caplog.clear()
    sampled(tmp_path)
    assert "again" not in caplog.text


def once(
    base: Path, label: str, made_from: dict[str, Any], file: str, p: Processes, work: results.Work
) -> tuple[Path, dict[str, Any]]:
    """A result's folder and stamp."""
    folder = results.folder_for(base, label, made_from)
    return folder, results.kept(folder, made_from, file, p, work)


def test_a_result_is_made_by_one_at_a_time(tmp_path: Path) -> None:
    def work(folder: Path) -> dict[str, Any]:
        with pytest.raises(Busy, match=rf"process {os.getpid()} on .*making samples.npz since"):
            once(tmp_path, "it", {"a": 1}, "samples.npz", ALONE, work)
        results.write_arrays(folder / "samples.npz", {"x": np.ones(2)})
        return {"found": 3}

    folder, stamp = once(tmp_path, "it", {"a": 1}, "samples.npz", ALONE, work)
    again = once(tmp_path, "it", {"a": 1}, "samples.npz", ALONE, lambda folder: pytest.fail("made again"))
    assert again[0] == folder and again[1]["found"] == stamp["found"] == 3


# -- several processes


@dataclass(frozen=True)
class Threads(Processes):
    """A process of two that are threads here."""

    meeting: threading.Barrier = field(default_factory=lambda: threading.Barrier(2))
    said: dict[int, str] = field(default_factory=dict)

    def barrier(self) -> None:
        self.meeting.wait(timeout=30)

    def texts(self, own: str) -> list[str]:
        self.said[self.rank] = own
        self.barrier()
        heard = [self.said[rank] for rank in range(self.world)]
        self.barrier()
        return heard


def both(work: Callable[[Threads], Any]) -> list[Any]:
    """What work() returns, or the error that it raises, in each of two processes."""
    meeting, said = threading.Barrier(2), dict[int, str]()

    def one(rank: int) -> Any:
        try:
            return work(Threads(rank, 2, torch.device("cpu"), meeting=meeting, said=said))
        except Exception as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, range(2)))


def numbers(first: int, count: int) -> dict[str, np.ndarray]:
    return {"x": np.arange(first, first + count)}


def test_processes_that_do_not_share_a_folder_are_refused_before_work(tmp_path: Path) -> None:
    def work(p: Threads) -> Any:
        base = tmp_path / str(p.rank)
        return once(base, "it", {"a": 1}, "x.npz", p, lambda folder: pytest.fail("work is done"))

    (tmp_path / "1").mkdir()
    for error in both(work):
        assert isinstance(error, ValueError) and "give --workdir a folder that all hosts share" in str(error)


def test_processes_that_are_asked_for_different_results_are_refused(tmp_path: Path) -> None:
    def work(p: Threads) -> Any:
        made_from = {"data": p.rank}
        return once(tmp_path, "my best", made_from, "x.npz", p, lambda folder: pytest.fail("work is done"))

    for error in both(work):
        assert isinstance(error, ValueError) and "would make different results" in str(error)


def test_a_part_that_is_missing_in_the_end_is_an_error_in_all(tmp_path: Path) -> None:
    """11 examples in batches of 2: those of the second process lie elsewhere, and are made by the next command."""

    def apart(p: Threads) -> Any:
        return results.in_batches(tmp_path / str(p.rank), 11, 2, p, numbers, "")

    for error in both(apart):
        assert isinstance(error, ValueError) and "parts lacks batch 2 of 6 of process 1" in str(error)
    there = results.in_batches(tmp_path / "0", 11, 2, ALONE, numbers, "")
    assert np.array_equal(there["x"], np.arange(11))


def test_two_processes_that_share_a_folder_make_one_result(tmp_path: Path) -> None:
    def work(p: Threads) -> Any:
        def made(folder: Path) -> dict[str, Any]:
            joined = results.in_batches(folder, 11, 2, p, numbers, "")
            if p.main:
                results.write_arrays(folder / "x.npz", joined)
            return {"sum": int(joined["x"].sum())}

        return [once(tmp_path, "it", {"a": 1}, "x.npz", p, made) for _ in range(2)]

    first, second = both(work)
    assert [stamp["sum"] for _, stamp in (*first, *second)] == [55] * 4
    assert sorted(path.name for path in first[0][0].iterdir()) == ["stamp.json", "x.npz"]
