"""Every option of the command line is read by a mode, or refused: none is passed over."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from score_sde.cli import _parser, run
from score_sde.tasks.options import MODES, READ_BY

TINY = {
    "training.n_iters": 1, "training.batch_size": 2, "training.snapshot_sampling": "false", "model.nf": 4,
    "model.ch_mult": "1,1", "model.num_res_blocks": 1, "model.attn_resolutions": "()",
}  # fmt: skip
RESTORE = ("inpaint", "colorize", "superresolve", "deblur")
MODELS = ("sample", "likelihood", "encode", "decode", "interpolate", *RESTORE, "dequantize")
# Of a model of images, without classes or captions: what is read is looked at, and found to be no good.
READ = {
    *((mode, "--checkpoint") for mode in ("train", *MODELS)),
    *((mode, "--input") for mode in ("encode", "decode", "interpolate", *RESTORE)),
    ("inpaint", "--mask"),
    *((mode, option) for mode in ("sample", *RESTORE) for option in ("--prompt", "--negative")),
    ("sample", "--scales"),
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of coloured images after a step, and these."""
    folder = tmp_path_factory.mktemp("run")
    np.save(folder / "images.npy", np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3)).astype(np.uint8))
    Image.fromarray(np.tile(np.uint8([0, 255]), (8, 4))).save(folder / "mask.png")
    assert run(words("train", folder)) == 0
    return folder


def words(mode: str, workdir: Path, *more: str, **changes: object) -> list[str]:
    data = {"data.dataset": "files", "data.path": workdir / "images.npy", "data.num_channels": 3}
    settings = {**TINY, **data, **{key.replace("__", "."): value for key, value in changes.items()}}
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    return ["--config", "configs/vp_digits.py", "--mode", mode, "--workdir", str(workdir), *overrides, *more]


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_reads_an_option_or_refuses_it(mode: str, workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(READ_BY) == {a.option_strings[0] for a in _parser()._actions} - {"--config", "--mode", "--workdir"}
    needed = {"decode": ["--input", "latents"], "inpaint": ["--mask", str(workdir / "mask.png")]}.get(mode, [])
    for option in READ_BY:
        given = [] if option in needed else needed
        assert run(words(mode, workdir, *given, option, "nowhere")) == 2, option
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and option.strip("-") in error and "nowhere" in error, option
        assert ("reads no" in error) == ((mode, option) not in READ), option


@pytest.mark.parametrize("option", ["--config", "--workdir", "--checkpoint", "--input", "--mask"])
@pytest.mark.parametrize("mode", ["train", "encode"])
def test_an_empty_name_is_not_taken_for_none(
    mode: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a shell's variable that is not set: a run would begin anew in place of from a checkpoint."""
    assert run([*words(mode, tmp_path), option, ""]) == 2
    assert f"argument {option}: expected a name, got an empty one" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("mode", "more", "changes", "answer"),
    [
        ("sample", (), {"sampling__labels": "1,2,3", "sampling__num_samples": 2}, "sampling.labels asks for 3, and"),
        ("inpaint", (), {"sampling__labels": "1,2,3", "eval__num_images": 2}, "eval.num_images=2 is fewer"),
        ("demo", (), {}, "take --config vp_digits, or the modes train, sample and likelihood one by one"),
        ("demo", (), {"data__dataset": "digits", "model__super_resolution": 2}, "--mode demo judges digits that"),
        ("interpolate", ("--input=x",), {"interpolation__between": "seeds"}, "seeds reads no --input, got x"),
        ("sample", ("--input=x",), {"model__super_resolution": 2, "sampling__base": "y"}, "sampling.base=y both give"),
    ],
)
def test_what_would_be_left_out_is_refused(
    mode: str, more: tuple[str, ...], changes: dict[str, object], answer: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    conditional = {"model__class_conditional": "true"}
    assert run(words(mode, tmp_path, *more, **conditional, **changes)) == 2
    assert answer in capsys.readouterr().err
