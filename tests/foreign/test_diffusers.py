"""Networks of diffusers' with random weights: read by the key map they give the same numbers, in float64."""

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from score_sde import load
from score_sde.cli import run
from score_sde.foreign import diffusers as interop_diffusers
from score_sde.foreign.diffusers import load_network, network_from
from score_sde.networks import DiT, UNet
from score_sde.networks.dit import positions
from tests.oracles import numbers
from tests.runs import line

diffusers = pytest.importorskip("diffusers")

UNETS: dict[str, dict[str, Any]] = {
    "adm": dict(
        sample_size=16,
        out_channels=6,
        block_out_channels=(16, 24, 40),
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        layers_per_block=2,
        downsample_type="resnet",
        upsample_type="resnet",
        attention_head_dim=8,
        norm_num_groups=8,
        attn_norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=5,
    ),
    "ddpm": dict(  # the options of google/ddpm-cifar10-32
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        attention_head_dim=None,
        norm_num_groups=8,
        norm_eps=1e-6,
    ),
}
DITS: dict[str, Any] = dict(
    num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=6, num_layers=2, sample_size=8,
    num_embeds_ada_norm=4, norm_eps=1e-6,
)  # fmt: skip


def awake(model: torch.nn.Module) -> torch.nn.Module:
    """Weights of order 1 everywhere, also where they start at zero."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g))
    return model.double().eval()


def unet(name: str = "adm", **changes: Any) -> torch.nn.Module:
    return awake(diffusers.UNet2DModel(**{**UNETS[name], **changes}))


def dit(**changes: Any) -> torch.nn.Module:
    """Theirs with one embedding of time and class for all blocks, as published models have it."""
    model = awake(diffusers.DiTTransformer2DModel(**{**DITS, **changes}))
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    side = 8 // model.config["patch_size"]
    exact = positions(side, side, torch.zeros(1, 16, dtype=torch.float64))[None]
    torch.testing.assert_close(exact, model.pos_embed.pos_embed, rtol=0, atol=1e-6)
    model.pos_embed.pos_embed = exact  # before they are rounded to float32
    return model


def config_of(model: Any, **changes: Any) -> dict[str, Any]:
    return {**model.config, "_class_name": type(model).__name__, **changes}


def read(model: Any, **changes: Any) -> UNet | DiT:
    return network_from(model.state_dict(), config_of(model, **changes)).double()


# Theirs embeds times in float32, whatever the network is: at 0 without error, and within 731 * 2^-24 at others.
TIMES = pytest.mark.parametrize(("time", "tolerance"), [([0.0, 0.0, 0.0], 1e-10), ([1.0, 30.0, 731.0], 1e-3)])


@TIMES
@pytest.mark.parametrize("name", UNETS)
def test_unets_are_theirs(name: str, time: list[float], tolerance: float) -> None:
    theirs, x, t = unet(name), numbers(3, 3, 16, 16), torch.tensor(time, dtype=torch.float64)
    told = {"class_labels": torch.tensor([4, 0, 2])} if name == "adm" else {}
    ours = read(theirs)(x, t, **({"label": told["class_labels"]} if told else {}))
    wanted = theirs(x, t, **told).sample
    assert wanted.std() > 0.1
    torch.testing.assert_close(ours, wanted, rtol=0, atol=tolerance)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in read(theirs).parameters())


@TIMES
@pytest.mark.parametrize("changes", [{}, {"patch_size": 4, "out_channels": None}], ids=str)
def test_transformers_are_theirs_with_and_without_a_class(
    changes: dict[str, Any], time: list[float], tolerance: float
) -> None:
    theirs, x, t = dit(**changes), numbers(3, 3, 8, 8), torch.tensor(time, dtype=torch.float64)
    label = torch.tensor([3, 4, 0])  # 4 is theirs for none
    wanted = theirs(x, timestep=t, class_labels=label).sample
    assert wanted.std() > 0.1
    ours = read(theirs)(x, t, label=torch.where(label == 4, -1, label))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=tolerance)


@TIMES
def test_a_transformer_whose_blocks_learned_embeddings_of_their_own_is_theirs(
    time: list[float], tolerance: float
) -> None:
    theirs, x, t = dit(num_layers=3), numbers(3, 3, 8, 8), torch.tensor(time, dtype=torch.float64)
    for i, block in enumerate(theirs.transformer_blocks):
        for p in block.norm1.emb.parameters():
            p.data += 0.3 * numbers(*p.shape) * i
    label = torch.tensor([3, 4, 0])
    wanted = theirs(x, timestep=t, class_labels=label).sample
    ours = read(theirs)
    torch.testing.assert_close(ours(x, t, label=torch.where(label == 4, -1, label)), wanted, rtol=0, atol=tolerance)
    torch.testing.assert_close(ours(x[1:2], t[1:2])[0], wanted[1], rtol=0, atol=tolerance)


@pytest.mark.parametrize("padding", [0, 1])
def test_downsampling_is_padded_as_theirs(padding: int) -> None:
    theirs, x, t = unet("ddpm", downsample_padding=padding), numbers(2, 3, 16, 24), torch.zeros(2).double()
    torch.testing.assert_close(read(theirs)(x, t), theirs(x, t).sample, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", interop_diffusers.DEFAULTS)
def test_a_key_left_out_means_what_it_means_to_diffusers(kind: str) -> None:
    parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters.values()
    theirs = {p.name: p.default for p in parameters if p.name != "self"}
    ours = interop_diffusers.DEFAULTS[kind]
    assert {name: ours[name] for name in theirs} == theirs


def test_a_scheduler_s_key_left_out_means_what_it_means_to_diffusers() -> None:
    for kind in interop_diffusers.SCHEDULERS:
        parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters
        for name, value in interop_diffusers.CHAIN_DEFAULTS.items():
            assert name not in parameters or parameters[name].default == value, (kind, name)


@pytest.mark.parametrize(
    "key",  # without its widths the network would be huge
    [key for key in UNETS["ddpm"] if key not in ("sample_size", "norm_num_groups", "block_out_channels")],
)
def test_without_any_one_key_the_outputs_are_theirs_or_it_is_refused(key: str) -> None:
    theirs, x, t = unet("ddpm"), numbers(1, 3, 16, 16), torch.tensor([2.0]).double()
    config = {name: value for name, value in config_of(theirs).items() if name != key}
    try:
        other = diffusers.UNet2DModel(**{name: v for name, v in config.items() if name[0] != "_"}).double().eval()
        other.load_state_dict(theirs.state_dict())
    except (RuntimeError, ValueError):
        with pytest.raises(ValueError, match=r"."):
            network_from(theirs.state_dict(), config)
        return
    ours = network_from(theirs.state_dict(), config)(x, t)
    torch.testing.assert_close(ours, other(x, t).sample, rtol=0, atol=1e-5)


def test_names_are_read_without_what_wrappers_put_before_them() -> None:
    theirs, x, t = unet("ddpm"), numbers(1, 3, 16, 16), torch.zeros(1).double()
    state = {f"module._orig_mod.module.{name}": value for name, value in theirs.state_dict().items()}
    torch.testing.assert_close(network_from(state, config_of(theirs))(x, t), read(theirs)(x, t))


SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 40, "prediction_type": "v_prediction"},
    "sigmoid": {"beta_schedule": "sigmoid", "num_train_timesteps": 30, "prediction_type": "sample"},
    "trained": {"trained_betas": [0.1, 0.2, 0.4]},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_pipeline_s_folder_is_a_model_of_its_chain(name: str, tmp_path: Path) -> None:
    """Estimates of the data are those of diffusers' own scheduler, and with the noise's they make the state again."""
    theirs, scheduler = unet("ddpm").float(), diffusers.DDPMScheduler(**SCHEDULES[name], clip_sample=False)
    diffusers.DDPMPipeline(theirs, scheduler).save_pretrained(tmp_path)
    model = load(tmp_path)
    n, x = len(scheduler.betas), numbers(2, 3, 16, 16).float()
    for i in (0, n // 2, n - 1):
        output = theirs(x, torch.tensor(i)).sample
        wanted = scheduler.step(output, i, x).pred_original_sample
        found = model(x, torch.tensor((i + 1) / n, dtype=torch.float64))
        scale = wanted.abs().max()
        torch.testing.assert_close(found.data / scale, wanted / scale, rtol=0, atol=1e-4)
        again = scheduler.alphas_cumprod[i].sqrt() * found.data + found.sigma * found.noise
        torch.testing.assert_close(again / scale, x / scale, rtol=0, atol=1e-4)


def test_a_network_s_folder_without_a_scheduler_says_what_does(tmp_path: Path) -> None:
    unet().float().save_pretrained(tmp_path / "unet")
    with pytest.raises(FileNotFoundError, match=r"no scheduler_config.json, which says on which chain"):
        load(tmp_path / "unet")
    diffusers.DDIMScheduler().save_pretrained(tmp_path / "unet")
    assert load(tmp_path / "unet").learned_variance  # of twice the channels
    for change, words in (
        ({"_class_name": "ScoreSdeVeScheduler"}, "the scheduler must be one of DDPMScheduler"),
        ({"prediction_type": "flow"}, "prediction_type must be one of epsilon"),
        ({"beta_schedule": "laplace"}, "the scheduler's beta_schedule must be one of linear"),
        ({"rescale_betas_zero_snr": True}, "makes the last beta 1"),
        ({"variance_type": "learned"}, "learned_range"),
    ):
        path = tmp_path / "unet" / "scheduler_config.json"
        path.write_text(json.dumps({"_class_name": "DDIMScheduler", **change}))
        with pytest.raises(ValueError, match=words):
            load(tmp_path / "unet")


def test_a_folder_is_read_without_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, x, t = dit().float().eval(), numbers(3, 3, 8, 8).float(), torch.tensor([0.0, 3.0, 40.0])
    theirs.save_pretrained(tmp_path)
    wanted = theirs(x, timestep=t, class_labels=torch.tensor([0, 1, 2])).sample
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    ours = load_network(tmp_path)(x, t, label=torch.tensor([0, 1, 2]))
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-4)
    with pytest.raises(FileNotFoundError, match="there is no .*config.json: give the folder"):
        load_network(tmp_path / "absent")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "must be one of UNet2DModel, DiTTransformer2DModel, got UNet2DCond"),
        ({"time_embedding_type": "fourier"}, "the network's time_embedding_type must be 'positional'"),
        ({"up_block_types": ("UpBlock2D",) * 3}, "the network's blocks must be .* no others can be read"),
        ({"attn_norm_num_groups": None}, "attn_norm_num_groups"),
        ({"attn_norm_num_groups": 4, "resnet_time_scale_shift": "default"}, "attn_norm_num_groups"),
        ({"num_class_embeds": None}, "1 tensors that the config's network lacks, such as class_embedding.weight"),
        ({"layers_per_block": 3}, "the weights lack down_blocks.0.resnets.2.norm1.weight"),
        ({"num_class_embeds": 9}, r"the weights give classes.table the shape \(5, 64\), the config \(9, 64\)"),
    ],
)
def test_what_has_no_counterpart_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read(unet(), **changes)


def test_a_folder_is_trained_further_and_the_keys_that_make_its_network_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network's and a pipeline's; read by its scheduler's chain it is the model that training begins with."""
    wide = {"block_out_channels": (32, 64), "norm_num_groups": 32, "sample_size": 8}
    theirs = diffusers.UNet2DModel(**{**UNETS["ddpm"], **wide})
    theirs.save_pretrained(tmp_path / "network")
    diffusers.DDPMPipeline(theirs, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3)).astype(np.uint8))
    change: dict[str, Any] = {"data__dataset": "files", "data__path": tmp_path / "images.npy", "data__image_size": 8}
    change |= {"optim__lr": 1e-38, "training__n_iters": 1, "model__nf": 32, "training__channels_last": "false"}
    change |= {"model__ch_mult": "1,2", "model__attn_resolutions": 4}

    def command(origin: str, **more: Any) -> list[str]:
        words = ("--checkpoint", str(tmp_path / origin))
        return line("ddpm_cifar", "train", tmp_path / f"of-{origin}", *words, **{**change, **more})

    assert run(command("pipeline", model__num_res_blocks=2)) == 2
    said = capsys.readouterr().err
    assert "set model.num_res_blocks=1, model.attend_each=True\n" in said
    for origin in ("network", "pipeline"):
        assert run(command(origin, model__attend_each="true")) == 0
        assert "read otherwise" not in capsys.readouterr().err
    model, before = load(tmp_path / "of-pipeline"), load(tmp_path / "pipeline")
    x, t = torch.randn(2, 3, 8, 8), torch.tensor(0.4, dtype=torch.float64)
    torch.testing.assert_close(model.score(x, t), before.score(x, t), rtol=1e-4, atol=1e-5)
    assert run(command("pipeline", model__attend_each="true", training__n_iters=2)) == 0, "it does not go on"
    turned = command("pipeline", model__attend_each="true", model__rule="v")
    assert run([*turned, "--workdir", str(tmp_path / "turned")]) == 0
    assert "the weights were trained to be read otherwise" in capsys.readouterr().err
    assert run(["--mode", "sample", "--checkpoint", str(tmp_path / "pipeline"), *turned[:2]]) == 2
    assert "is a folder of diffusers': --mode train --checkpoint" in capsys.readouterr().err
