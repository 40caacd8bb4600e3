"""Odd values of every key of the config are refused in one sentence that names the key, or they work."""

import logging
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from score_sde.cli import run
from score_sde.config import default_config, from_text, load, reading
from score_sde.config.keys import KEYS, LARGEST, Limit
from score_sde.config.keys import check as check_key
from score_sde.config.rules import check, suspects
from tests import ROOT
from tests.runs import put

ODD: list[Any] = [
    0, -1, 1, 2**31, 2**63, -(2**63), 10**400, 0.0, -1.0, 0.5, 1e-300, 1e300, math.nan, math.inf, -math.inf, "", "nan",
    "inf", "zero", "1e400", "(1,", "(" * 9000, "a" * 9000, "\0", "猫", "None", None, True, (), [], (0,), (-1,), (1.5,),
    (10**400,), ("a",), {}, {"a": 1},
]  # fmt: skip


def text_of(value: Any) -> str:
    try:
        return value if isinstance(value, str) else str(value)
    except ValueError:  # more digits than Python writes
        return "9" * 5000


def sentence_or_none(attempt: Any, key: str) -> str | None:
    """What a ValueError says of `key`; every other error passes through."""
    try:
        attempt()
    except ValueError as error:
        said = str(error)
        assert key in said and "\n" not in said and len(said) < 600, said
        return said
    return None


@pytest.mark.parametrize("key", KEYS)
def test_odd_values_of_a_key_are_refused_in_a_sentence_or_pass(key: str) -> None:
    """In the words of the command line, in a config.json, and as a config file sets them."""
    kind, passed = KEYS[key].kind, []
    section, _, name = key.rpartition(".")
    config = default_config()
    of_key = config[section] if section else config
    for value in ODD:

        def on_the_command_line(value: Any = value) -> None:
            check_key(key, reading.parse(key, text_of(value)))

        def in_a_file(value: Any = value) -> None:
            put(config, key, value)
            check(config)
            passed.append(of_key[name])

        sentence_or_none(on_the_command_line, key)
        if not isinstance(value, dict):  # which is a section
            sentence_or_none(in_a_file, key)
        with of_key.ignore_type():
            of_key[name] = KEYS[key].default
    may, classes = KEYS[key].may, KEYS[key].classes
    assert all(type(value) is kind for value in passed) or classes
    if kind in (int, float) and not classes:
        most = KEYS[key].most or LARGEST[kind]
        assert all(math.isfinite(value) and abs(value) <= most for value in passed)
        assert not isinstance(may, Limit) or all(may.holds(value) for value in passed)
    if KEYS[key].choices:
        assert not passed


def test_json_of_any_kind_is_answered() -> None:
    for text in ("[" * 100_000, "{" * 5, "null", '{"optim": 3}', '{"optim": {"lr": {"a": 1}}}', '{"": 1}', "\0"):
        with pytest.raises(ValueError, match="config.json"):
            from_text(text, "config.json")


def test_a_config_that_is_no_text_is_answered(tmp_path: Path) -> None:
    for name in ("config.json", "config.py"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match=name):
            load(tmp_path / name)


@pytest.mark.parametrize(("line", "words"), [("nonsense()", "name 'nonsense'"), ("import nonsense", "No module named")])
def test_a_slip_in_a_config_file_has_its_line(line: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "slip.py").write_text(f"def get_config():\n    {line}\n")
    with pytest.raises(ValueError, match=rf"slip\.py, line 2: {words}"):
        load(tmp_path / "slip.py")


# --- values that would train nothing, or do nothing, in silence


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("optim.grad_clip=0", "optim.grad_clip must be above 0, or negative for no clipping (at 0 nothing is trained)"),
        ("optim.lr=0", "optim.lr must be above 0"),
        ("optim.eps=10", "optim.eps must be above 0 and at most 1"),
        ("optim.beta1=1", "optim.beta1 must be at least 0 and below 1"),
        ("optim.beta2=1", "optim.beta2 must be at least 0 and below 1"),
        ("model.ema_rate=1", "model.ema_rate must be at least 0 and below 1"),
        ("model.dropout=1", "model.dropout must be at least 0 and below 1"),
        ("training.keep_last=0", "training.keep_last must be at least 1"),
        ("training.log_freq=0", "training.log_freq must be at least 1"),
        ("sampling.batch_size=0", "sampling.batch_size must be at least 1"),
        ("eval.batch_size=0", "eval.batch_size must be at least 1"),
        ("model.class_conditional=1 training.condition_dropout=1", "drops every label and caption"),
        ("sampling.negative_label=-2", "sampling.negative_label must be at least -1, got -2"),
        ("sampling.rtol=1e30", "sampling.rtol must be above 0 and at most 1"),
        ("eval.rtol=1e30", "eval.rtol must be above 0 and at most 1"),
        ("model.text_length=0", "model.text_length must be at least 1"),
        ("model.attn_resolutions=-1", "model.attn_resolutions must be image sizes, or () for no attention, got (-1,)"),
        ("model.fourier_features=-1", "model.fourier_features must lie between 0 and 30"),
        ("model.fourier_features=2147483647", "model.fourier_features must lie between 0 and 30"),
        ("model.fir=1 model.fir_kernel=1,-1", "model.fir_kernel must have a sum above 0"),
        ("model.fir=1 model.fir_kernel=()", "model.fir_kernel must have a sum above 0"),
        ("inverse.blur=1e30", "inverse.blur must be above 0 and at most 1000"),
        ("model.nf=4611686018427387904", "model.nf must be at most 2147483647 in size"),
        ("optim.lr=1e300", "optim.lr must be at most 3e+38 in size"),
    ],
)
def test_what_would_have_no_effect_is_refused(settings: str, words: str) -> None:
    overrides = dict(setting.split("=") for setting in settings.split())
    with pytest.raises(ValueError, match=re.escape(words)):
        load(ROOT / "configs" / "vp_cifar.py", overrides)


# --- values that end in numbers that are not finite


@pytest.fixture
def points(tmp_path: Path) -> Path:
    np.save(tmp_path / "points.npy", np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32))
    return tmp_path / "points.npy"


def train(points: Path, *settings: str) -> int:
    keys = [
        "training.n_iters=6",
        "training.batch_size=8",
        "training.log_freq=1",
        "data.dataset=files",
        "optim.warmup=0",
    ]
    keys += [f"data.path={points}", "training.snapshot_sampling=false", *settings]
    command = [
        "--config",
        str(ROOT / "configs" / "vp_toy.py"),
        "--mode",
        "train",
        "--workdir",
        str(points.parent / "run"),
    ]
    return run([*command, *(f"--config.{key}" for key in keys)])


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [
        ("optim.lr=3e38", "optim.lr=3e+38, which usually is between 1e-08 and 0.1"),
        ("optim.weight_decay=1e30 optim.optimizer=AdamW", "optim.weight_decay=1e+30"),
        ("training.sde=vesde model.rule=score model.sigma_max=3e38", "model.sigma_max=3e+38"),
        (
            "training.sde=learned training.likelihood_weighting=1 training.time=uniform model.gamma_max=1e30",
            "model.gamma_max=1e+30",
        ),
    ],
)
def test_a_loss_that_is_not_finite_names_the_absurd_key(
    settings: str, culprit: str, points: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(points, *settings.split()) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and "not finite" in line and f"the likely reason is {culprit}" in line


def test_nothing_is_suspected_of_the_configs_there_are() -> None:
    for path in [*(ROOT / "configs").glob("*.py")]:
        assert suspects(load(path)) == "", path
    config = default_config()
    config.model.init_scale, config.model.fourier_features = 1e30, (3, 29)
    assert suspects(config) == (
        "; the likely reason is model.init_scale=1e+30, which usually is between 0 and 10, and "
        "model.fourier_features=(3, 29), which usually is between 0 and 16"
    )


def test_a_warmup_longer_than_the_run_is_told(points: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert train(points, "optim.warmup=60", "optim.lr=0.01") == 0
    assert "the learning rate rises only to 0.001, and not to optim.lr=0.01" in caplog.text
