"""Checkpoints of score_sde_pytorch: equal outputs for recorded networks and for every option, strict and safe reading.

`tests/data/recorded/nets` holds what that project (commit cb1f359) computed; its README says how.
"""

import copy
import json
import pickle
from functools import cache
from pathlib import Path

import ml_collections
import numpy as np
import pytest
import torch
from torch import Tensor

import score_sde
from score_sde import VESDE, VPSDE, SubVPSDE
from score_sde.foreign import score_sde_pytorch as interop
from tests import RECORDED

NETS = RECORDED / "nets"
NAMES = ["ddpm_vp", "ddpmpp_vp", "ncsnpp_ve"]

# Largest error relative to an image's largest value. Random frequencies of scale 16 amplify the rounding of log sigma.
FLOAT32 = {"ddpm_vp": 2e-5, "ddpmpp_vp": 2e-5, "ncsnpp_ve": 5e-5}
FLOAT64 = 1e-10


@cache
def checkpoint(name: str) -> dict:
    return interop.read_checkpoint(NETS / f"{name}.ckpt.pth")


@cache
def arrays(name: str) -> dict[str, Tensor]:
    """The recorded arrays, their batches of two joined."""
    with np.load(NETS / f"{name}.io.npz") as file:
        return {key: torch.from_numpy(file[key]).flatten(0, 1) for key in file.files}


def config_of(name: str, **training) -> dict:
    config = interop.read_config(NETS / f"{name}.config.json")
    config["training"].update(training)
    return config


def error(out: Tensor, expected: Tensor) -> float:
    """Largest error of any image, relative to the image's largest value."""
    difference, size = (a.flatten(1).abs().amax(1) for a in (out - expected, expected))
    return (difference / size).max().item()


# ---------------------------------------------------------------------------------------------------------------------
# Recorded networks


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ema", [False, True], ids=["raw", "ema"])
def test_outputs_of_recorded_networks(name, ema):
    data = arrays(name)
    model = interop.load_score_sde(checkpoint(name), config_of(name), ema).eval()
    with torch.no_grad():
        out = model.network(data["x"], data["labels"])
    assert error(out, data["raw.out_ema" if ema else "raw.out"]) < FLOAT32[name]


@pytest.mark.parametrize("name", NAMES)
def test_input_gradients_of_recorded_networks(name):
    data = arrays(name)
    model = interop.load_score_sde(checkpoint(name), config_of(name), ema=False).eval()
    x = data["x"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.network(x, data["labels"]), x, data["v"])
    assert error(gradient, data["raw.grad_x"]) < FLOAT32[name]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_of_recorded_networks_in_float64(name):
    data = arrays(name)
    model = interop.load_score_sde(checkpoint(name), config_of(name), ema=False).double().eval()
    with torch.no_grad():
        out = model.network(data["x"].double(), data["labels"].double())
    assert error(out, data["raw.out64"]) < FLOAT64


SCORES = [
    ("ddpm_vp", "vpsde", True),
    ("ddpm_vp", "vpsde", False),
    ("ddpm_vp", "subvpsde", True),
    ("ddpmpp_vp", "vpsde", True),
    ("ddpmpp_vp", "vpsde", False),
    ("ddpmpp_vp", "subvpsde", True),
    ("ncsnpp_ve", "vesde", True),
    ("ncsnpp_ve", "vpsde", True),
]


@pytest.mark.parametrize(("name", "sde", "continuous"), SCORES)
def test_scores_of_recorded_networks(name, sde, continuous):
    data, key = arrays(name), f"score.{sde}_{'continuous' if continuous else 'discrete'}.out"
    model = interop.load_score_sde(checkpoint(name), config_of(name, sde=sde, continuous=continuous), ema=False).eval()
    with torch.no_grad():
        score = model.score(data["x"], data["t"])
        assert error(score.double(), data[key + "64"]) < FLOAT32[name]
        # The record itself is off near t = 0, where it computes 1 - exp(-b) in float32.
        late = data["t"] >= 0.01
        assert error(score[late], data[key][late]) < FLOAT32[name]
        assert error(score, data[key]) < 5e-4
        score = model.double().score(data["x"].double(), data["t"].double())
    assert error(score, data[key + "64"]) < FLOAT64


def test_the_models_have_the_project_s_curves():
    def sde(name, **training):
        return interop.load_score_sde(checkpoint(name), config_of(name, **training)).sde

    assert sde("ddpmpp_vp") == VPSDE(beta_min=0.1, beta_max=20.0)
    assert sde("ddpmpp_vp", continuous=False) == VPSDE(beta_min=0.1, beta_max=20.0)
    assert sde("ddpmpp_vp", sde="subvpsde", continuous=False) == SubVPSDE(beta_min=0.1, beta_max=20.0)
    assert sde("ncsnpp_ve") == VESDE(sigma_min=0.01, sigma_max=50.0)


# ---------------------------------------------------------------------------------------------------------------------
# Every option

OPTIONS = NETS / "score_sde_options.npz"
with np.load(OPTIONS) as _file:
    CASES = [key.removesuffix("/config") for key in _file.files if key.endswith("/config")]


def option_case(name: str) -> tuple[dict, dict, dict[str, Tensor]]:
    """(config, checkpoint, arrays) of a case: names and shapes as recorded, weights drawn as when recording."""
    with np.load(OPTIONS) as file:
        data = {key.removeprefix(f"{name}/"): file[key] for key in file.files if key.startswith(f"{name}/")}
        data |= {key: file[key] for key in ["x", "v", "t"]}
    config = json.loads(str(data.pop("config")))
    random, model = np.random.RandomState(int(data.pop("seed"))), {}
    for line in str(data.pop("tensors")).splitlines():
        key, *shape = line.split()
        weight = 0.2 * random.standard_normal(tuple(map(int, shape)))
        scale_of_norm = len(shape) == 1 and key.endswith("weight")
        model[f"module.{key}"] = torch.from_numpy(weight + 1 if scale_of_norm else weight).float()
    trained = [tensor for key, tensor in model.items() if not key.endswith("all_modules.0.W")]
    m = config["model"]
    sigmas = np.exp(np.linspace(np.log(m["sigma_max"]), np.log(m["sigma_min"]), m["num_scales"]))
    state = {"model": model | {"module.sigmas": torch.from_numpy(sigmas)}, "ema": {"shadow_params": trained}}
    return config, state, {key: torch.from_numpy(value) for key, value in data.items() if value.ndim}


def raw_network(model: score_sde.Preconditioned, config: dict) -> torch.nn.Module:
    """What score_sde_pytorch calls the network: without the table by which its discrete VP score is divided."""
    discrete_vp = config["training"]["sde"] == "vpsde" and not config["training"]["continuous"]
    return model.network.network if discrete_vp else model.network


def another_of_its_kind(case: str) -> bool:
    """Whether block, filter and pyramids are combined as no step alone needs: each pair is in another case too."""
    block, fir, *pyramids = case.split("_")
    usual = pyramids in (["none", "none"], ["output-skip", "input-skip"], ["residual", "residual"])
    return len(pyramids) == 2 and (block, fir) != ("biggan", "fir") and not usual


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * another_of_its_kind(case)) for case in CASES]
)
def test_every_option_loads_strictly_and_gives_the_recorded_output(case):
    """With averages: their order must be the parameters', and the names of the others right. No case has two sets."""
    config, state, data = option_case(case)
    model = interop.load_score_sde(state, config).double().eval()
    x = data["x"].clone().requires_grad_()
    out = raw_network(model, config)(x, data["label"])
    assert error(out, data["out"]) < FLOAT64
    if "grad_x" in data:
        assert error(torch.autograd.grad(out, x, data["v"])[0], data["grad_x"]) < FLOAT64
    if "score" in data:
        assert error(model.score(x, data["t"]), data["score"]) < FLOAT64


# ---------------------------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize("name", ["ddpmpp_vp", "ncsnpp_ve"])
def test_names_come_in_the_order_of_their_parameters(name):
    config = config_of(name)
    keys = interop.key_map(interop.build_network(config), config)
    with np.load(NETS / f"{name}.train.npz") as file:
        assert [f"module.{key.theirs}" for key in keys] == file["param_names"].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_renaming_there_and_back_changes_nothing(name):
    config = config_of(name)
    network = interop.build_network(config)
    keys = interop.key_map(network, config)
    theirs = {key.removeprefix("module."): value for key, value in checkpoint(name)["model"].items()}
    del theirs["sigmas"]
    ours = interop.to_ours(theirs, keys)
    assert ours.keys() == network.state_dict().keys()
    back = interop.to_theirs(ours, keys)
    assert list(back) == [key.theirs for key in keys]
    assert all(torch.equal(back[key], theirs[key]) for key in theirs)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def changed(**model) -> dict:
    config = config_of("ddpmpp_vp")
    config["model"].update(model)
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(num_res_blocks=2), "network has .* tensors that the checkpoint lacks, such as all_modules"),
        (
            changed(attn_resolutions=[]),
            "has .* tensors that the (checkpoint|config's network) lacks, such as all_modules",
        ),
        (changed(nf=32), r"embed.hidden.weight of shape \(64, 16\), the config's network \(128, 32\)"),
        (changed(name="ncsnv2_32"), "must be one of ddpm, ncsnpp, ncsn, ncsnv2_64, .*, got 'ncsnv2_32'"),
        (config_of("ddpmpp_vp", sde="edm"), 'must be "vpsde", "subvpsde" or "vesde", got \'edm\''),
        (
            config_of("ddpmpp_vp", sde="vesde") | {"model": {**changed(sigma_max=348)["model"]}},
            "noise levels from 50 to 0.01, the config from",
        ),
        ({"model": {"name": "ncsnpp"}}, "the config lacks data.num_channels"),
    ],
    ids=["blocks", "attention", "width", "network", "sde", "sigmas", "incomplete"],
)
def test_a_config_that_does_not_fit_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        interop.load_score_sde(checkpoint("ddpmpp_vp"), config, ema=False)


def test_every_tensor_must_be_there_and_be_known():
    state = copy.deepcopy(checkpoint("ddpmpp_vp"))
    removed = state["model"].pop("module.all_modules.3.Conv_0.bias")
    with pytest.raises(ValueError, match="has 1 tensors that the checkpoint lacks, such as all_modules.3.Conv_0.bias"):
        interop.load_score_sde(state, config_of("ddpmpp_vp"), ema=False)
    state["model"].update({"module.all_modules.3.Conv_0.bias": removed, "module.extra": removed})
    with pytest.raises(ValueError, match="1 tensors that the config's network lacks, such as extra"):
        interop.load_score_sde(state, config_of("ddpmpp_vp"), ema=False)
    state["ema"]["shadow_params"].pop()
    with pytest.raises(ValueError, match="the checkpoint's EMA has 153 tensors, the config's network 154"):
        interop.load_score_sde(state, config_of("ddpmpp_vp"))


@pytest.mark.parametrize("before", ["", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module."])
def test_names_are_read_without_what_wrappers_put_before_them(before):
    state = dict(checkpoint("ddpmpp_vp"))
    bare = {name.removeprefix("module."): value for name, value in state["model"].items()}
    state["model"] = {before + name: value for name, value in bare.items()}
    found = interop.load_score_sde(state, config_of("ddpmpp_vp"), ema=False).state_dict()
    wanted = interop.load_score_sde(checkpoint("ddpmpp_vp"), config_of("ddpmpp_vp"), ema=False).state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert interop.bare("network._orig_mod.module.conv") == "network.module.conv"  # a part that is called so stays


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("kind", ["dict", "ConfigDict", "JSON file"])
def test_load_takes_a_file_and_a_config_of_any_kind(kind):
    path, data = NETS / "ddpmpp_vp.ckpt.pth", arrays("ddpmpp_vp")
    config = {
        "dict": config_of("ddpmpp_vp"),
        "ConfigDict": ml_collections.ConfigDict(config_of("ddpmpp_vp")),
        "JSON file": NETS / "ddpmpp_vp.config.json",
    }[kind]
    model = score_sde.load(path, config)
    assert not model.training
    out = model.network(data["x"], data["labels"])
    assert error(out, data["raw.out_ema"]) < FLOAT32["ddpmpp_vp"]
    assert error(score_sde.load(path, config, ema=False).network(data["x"], data["labels"]), data["raw.out"]) < 2e-5


def test_a_file_without_its_config_is_refused():
    with pytest.raises(ValueError, match="carries no config; pass the one it was trained with"):
        interop.load_score_sde_file(NETS / "ddpmpp_vp.ckpt.pth", None)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint file .*absent.pth"):
        interop.read_checkpoint(tmp_path / "absent.pth")


@pytest.mark.parametrize("keep", [0, 10, 2000, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path, keep):
    whole = (NETS / "ddpmpp_vp.ckpt.pth").read_bytes()
    path = tmp_path / "checkpoint_1.pth"
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    with pytest.raises(ValueError, match="checkpoint_1.pth is truncated, no checkpoint, or"):
        interop.read_checkpoint(path)


@pytest.mark.parametrize("content", [{"model": {}}, [1, 2], {"model": {}, "ema": {}}], ids=str)
def test_a_foreign_file_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "foreign.pth")
    with pytest.raises(ValueError, match="foreign.pth is no checkpoint of score_sde_pytorch"):
        interop.read_checkpoint(tmp_path / "foreign.pth")


class Payload:
    """Unpickled by an ordinary loader, this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize(
    "write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))], ids=["zip", "pickle"]
)
def test_code_in_a_file_is_never_run(tmp_path, write):
    state = {"model": {}, "ema": {"shadow_params": []}, "step": Payload(tmp_path / "written")}
    write(state, tmp_path / "payload.pth")
    with pytest.raises(ValueError, match="payload.pth is truncated, no checkpoint, or holds more than"):
        interop.read_checkpoint(tmp_path / "payload.pth")
    assert not (tmp_path / "written").exists()


def test_numpy_scalars_are_read_and_no_other_numpy_objects(tmp_path):
    state = {"model": {}, "ema": {"shadow_params": []}}
    torch.save({**state, "optimizer": {"lr": np.float64(2e-4)}, "step": np.int64(7)}, tmp_path / "scalars.pth")
    read = interop.read_checkpoint(tmp_path / "scalars.pth")
    assert (read["optimizer"]["lr"], read["step"]) == (2e-4, 7)
    torch.save({**state, "step": np.zeros(3)}, tmp_path / "array.pth")
    with pytest.raises(
        ValueError, match="array.pth is truncated, no checkpoint, or holds more than tensors and numbers"
    ):
        interop.read_checkpoint(tmp_path / "array.pth")
