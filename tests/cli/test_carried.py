"""Models of codes, guided ones and cascades are sampled from their checkpoints alone: no data are read."""

from pathlib import Path

import numpy as np
import pytest

from score_sde.cli import run
from tests.runs import TINY, line, results

SMALL = {
    "training__n_iters": 1, "training__channels_last": "false", "data__dataset": "digits", "data__image_size": 8,
    "sampling__method": "heun", "sampling__grid": "karras", "model__ch_mult": "1,1",
}  # fmt: skip
CODES = {**SMALL, "model__code_channels": 2, "model__ch_mult": "1,2", "sampling__grid": "uniform"}


def stages(base: Path) -> dict[str, tuple[str, dict[str, object]]]:
    """Workdirs below `base`, of a model and what it builds on, and the config and settings of each."""
    return {
        "autoencoder": ("autoencoder_digits32", CODES),
        "codes": ("latent_digits32", {**CODES, "data__autoencoder": base / "autoencoder"}),
        "plain": ("vp_digits", SMALL),
        "weaker": ("vp_digits", {**SMALL, "seed": 1}),
        "classifier": ("classifier_digits", SMALL),
        "small": ("cascade_digits_4", {**SMALL, "data__image_size": 4, "model__ch_mult": "1"}),
        "large": ("cascade_digits_8", SMALL),
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdirs after a step."""
    base = tmp_path_factory.mktemp("runs")
    for name, (config, changes) in stages(base).items():
        assert run(line(config, "train", base / name, **changes)) == 0, name
    return base


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("codes", {}),
        ("plain", {"classifier": "classifier", "labels": "1,2", "guidance": 2}),
        ("plain", {"guidance_checkpoint": "weaker", "guidance": 2}),
        ("large", {"base": "small"}),
    ],
    ids=["codes", "classifier", "autoguidance", "cascade"],
)
def test_no_data_are_read(
    name: str, others: dict[str, object], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config and all that it builds on are carried: the same samples as with config and data at hand."""
    keys = {f"sampling.{k}": trained / str(v) if (trained / str(v)).is_dir() else v for k, v in others.items()}
    words, (config, changes) = ["--checkpoint", str(trained / name)], stages(trained)[name]
    assert run(line(config, "sample", tmp_path / "one", *words, **changes, **keys)) == 0
    monkeypatch.chdir(tmp_path)

    def nothing(*args: object, **named: object) -> None:
        raise AssertionError("data were read")

    monkeypatch.setattr("score_sde.tasks.inputs.load_data", nothing)
    words += [f"--config.{key}={value}" for key, value in keys.items()]
    small = [f"--config.{key}={value}" for key, value in TINY.items() if key.startswith("sampling.")]
    assert run(["--mode", "sample", "--workdir", str(tmp_path / "two"), *words, *small]) == 0
    found, wanted = (results(tmp_path / place, "samples")["arr_0"] for place in ("two", "one"))
    assert np.array_equal(found, wanted) and found.shape == (4, 8, 8, 1) and found.std() > 0
