"""Configs: every file builds, and every slip is answered by one sentence that names it and the remedy."""

import ast
import math
import re
from pathlib import Path

import pytest
import torch
from ml_collections import ConfigDict

from score_sde import (
    DDIM,
    DDPM,
    EDMSDE,
    SMLD,
    VESDE,
    VPSDE,
    AdaptiveODE,
    AdaptiveSDE,
    Ancestral,
    AnnealedLangevin,
    Balanced,
    Churn,
    CosineSDE,
    DPMSolver,
    EmbeddedODE,
    EulerMaruyama,
    FixedODE,
    Heun,
    Langevin,
    Multistep,
    PredictorCorrector,
    ReverseDiffusion,
    UniPC,
    fit_times,
    sample,
    times,
)
from score_sde.config import build, default_config, differences, from_json, load, split_arguments, to_json, validate
from score_sde.config.build import build_chain, build_model, build_network, build_sampler, build_sde, build_times
from score_sde.config.keys import KEYS, check, explain
from score_sde.models import rules
from score_sde.models.base import Counted
from score_sde.models.closed_form import Gaussian
from score_sde.networks.blocks import ResidualBlock
from score_sde.ode import ADAPTIVE
from score_sde.tasks.stamps import about_grid
from tests import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.py"))
VP = CONFIGS[0].with_name("vp_cifar.py")
TINY = {"model.nf": "8", "model.num_res_blocks": "1", "model.ch_mult": "1,2", "model.attn_resolutions": "4"}
TINY |= {"model.head_channels": "0"}


def write(folder: Path, *lines: str) -> Path:
    """A config file whose get_config() runs these lines on the default config, the first of them in line 4."""
    path = folder / "mine.py"
    head = "from score_sde.config import default_config\ndef get_config():\n    config = default_config()\n"
    path.write_text(head + "".join(f"    {line}\n" for line in lines) + "    return config\n")
    return path


def kinds(config: ConfigDict) -> list[type]:
    """The types of all values in the sections."""
    return [type(v) for section in config.values() if isinstance(section, ConfigDict) for v in section.values()]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_locked_and_survives_json(path: Path, tmp_path: Path) -> None:
    config = load(path)
    assert config.is_locked
    (tmp_path / "config.json").write_text(to_json(config))
    again = from_json(tmp_path / "config.json")
    assert again == config == load(tmp_path / "config.json")
    # `==` takes 1 for 1.0 and for True; the types must come back too.
    assert kinds(again) == kinds(config) and tuple in kinds(config)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_builds_a_model_that_samples(path: Path) -> None:
    tiny = TINY | {"model.ch_mult": "1,1,1"} if path.stem.startswith("ncsn") else TINY
    config = load(path, {"model.hidden": "8"} if "toy" in path.stem else tiny | {"model.hidden": "8"})
    shape = (2,) if config.model.name == "mlp" else (config.data.num_channels, 8, 8)
    config.sampling.n_steps_each = min(config.sampling.n_steps_each, 2)
    config.sampling.rtol = config.sampling.atol = 0.5
    if config.model.name == "ddpm":
        config.model.nf = 32  # its GroupNorm has 32 groups
    model = build_model(config, shape)
    grid = build_times(config, model.sde)
    adaptive = config.sampling.method == "ode" and config.sampling.ode_method in ADAPTIVE  # chooses its own steps
    assert grid[0] == 1 and (grid.diff() < 0).all()
    assert len(grid) == (2 if adaptive else config.sampling.steps + config.training.continuous)
    short = grid if adaptive else torch.stack([grid[0], grid[len(grid) // 2], grid[-1]])
    x = sample(model, build_sampler(config), (2, *shape), short, denoise=config.sampling.noise_removal)
    assert x.shape == (2, *shape) and x.isfinite().all()


# What docstrings say of their configs: the words, and the keys that must agree. New claims are new rows.
SAID = [
    (
        "vp_cifar",
        'steps of each image\'s own ("embedded")',
        {"eval.ode_method": "embedded", "sampling.noise_removal": True},
    ),
    ("adm_imagenet64", "a chain of 1000 steps, cosine schedule", {"model.num_scales": 1000, "training.sde": "cosine"}),
    ("autoencoder_cifar", "a tenth of the divergence's weight", {"training.kl_weight": 0.1}),
    ("ddpm_cifar", "in training, for 800,000 steps", {"training.n_iters": 800_000, "sampling.variance": "small"}),
    (
        "dit_cifar",
        "rate 0.9999, batches of 256",
        {"model.ema_rate": 0.9999, "training.batch_size": 256, "optim.lr": 1e-4},
    ),
    ("edm_vp_cifar", "Heun's method in 17 steps", {"sampling.method": "heun", "sampling.steps": 17}),
    ("edm_vp_cifar", "their augmentation", {"training.geometric": 0.12, "data.random_flip": False}),
    ("edm_adm_imagenet64", "unaugmented", {"training.geometric": 0.0, "data.random_flip": False}),
    ("edm_adm_imagenet64", "churn, 255 steps", {"sampling.method": "edm", "sampling.steps": 255}),
    ("edm_adm_imagenet64", "in batches of 4096", {"training.batch_size": 4096, "training.n_iters": 610_352}),
    ("iddpm_cifar", "a chain of 4000 steps", {"model.num_scales": 4000, "training.n_iters": 500_000}),
    ("iddpm_digits", "2,000 steps of 128 images", {"training.n_iters": 2000, "training.batch_size": 128}),
    (
        "ncsn_cifar",
        "100 Langevin steps per level with eps 2e-5",
        {"sampling.n_steps_each": 100, "sampling.step_lr": 2e-5},
    ),
    ("ncsn_cifar", "no denoising at the end", {"sampling.noise_removal": False, "model.ema_rate": 0.0}),
    ("ncsn_digits", "1,500 steps of 64 images, learning rate 6e-3", {"training.n_iters": 1500, "optim.lr": 6e-3}),
    ("ncsnv2_cifar", "232 noise levels", {"model.num_scales": 232, "sampling.steps": 232, "sampling.step_lr": 6.2e-6}),
    (
        "ncsnv2_digits",
        "22 noise levels",
        {"model.num_scales": 22, "sampling.n_steps_each": 30, "optim.grad_clip": 10.0},
    ),
    ("scoreflow_cifar", "smallest time 1e-2", {"model.t_min": 1e-2, "sampling.t_min": 1e-2, "eval.t_min": 1e-2}),
    ("scoreflow_cifar", "samples by the probability-flow ODE", {"sampling.method": "ode"}),
    (
        "scoreflow_digits",
        "ancestral on Karras's grid",
        {"sampling.predictor": "ancestral_sampling", "sampling.grid": "karras"},
    ),
    ("speech", "The first 8,192 samples", {"data.length": 8192}),
    ("vdm_cifar", "AdamW, t of low discrepancy", {"optim.optimizer": "AdamW", "training.low_discrepancy": True}),
    ("vdm_digits", "The lower end begins at -8", {"model.gamma_min": -8.0, "training.n_iters": 2500}),
    ("vp_digits32", "batches of 32", {"training.batch_size": 32}),
]


@pytest.mark.parametrize(("name", "words", "keys"), SAID, ids=lambda value: value if isinstance(value, str) else "")
def test_a_config_does_what_its_docstring_says(name: str, words: str, keys: dict[str, object]) -> None:
    path = VP.with_name(f"{name}.py")
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())
    assert words in text
    config = load(path)
    assert {key: config[key.split(".")[0]][key.split(".")[1]] for key in keys} == keys


@pytest.mark.parametrize(("name", "nfe"), [("edm_vp_cifar", 35), ("edm_adm_imagenet64", 511)])
def test_edm_samples_with_its_paper_s_evaluations(name: str, nfe: int) -> None:
    config = load(VP.with_name(f"{name}.py"))
    sde = build_sde(config)
    model = Counted(Gaussian(sde, torch.zeros(2), 0.25))
    grid = build_times(config, sde)
    sample(model, build_sampler(config), (1, 2), grid, denoise=config.sampling.noise_removal)
    assert model.nfe == nfe and (sde.sigma(grid[0]), sde.sigma(grid[-1])) == pytest.approx((80, 0.002))


# Counted in score_sde_pytorch's models with its own configs; its NCSN++ counts 128 fixed frequencies besides. NCSN and
# NCSNv2 were counted in their authors' models.
@pytest.mark.parametrize(
    "name, count",
    [
        ("vp_cifar", 61_804_419),
        ("ve_cifar", 62_758_787),
        ("ddpm_cifar", 35_218_947),
        ("ncsn_cifar", 30_117_635),
        ("ncsnv2_cifar", 29_694_083),
        ("church_256", 65_574_421),
    ],
)
def test_networks_have_the_reference_size(name: str, count: int) -> None:
    with torch.device("meta"):
        config = load(VP.with_name(f"{name}.py"))
        network = build_network(config, (3, config.data.image_size, config.data.image_size))
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == count


# What a user types after --config. (key, value), and what the answer must contain.
SLIPS = [
    ("training.n_iter", "5", "unknown config key 'training.n_iter'; did you mean 'training.n_iters'?"),
    ("trainig.n_iters", "5", "did you mean 'training.n_iters'?"),
    ("lr", "1e-3", "did you mean 'optim.lr'?"),
    ("training.lr", "1e-3", "did you mean 'optim.lr'?"),
    ("training.xyz", "5", "unknown config key 'training.xyz'; the section training has accumulate, augmentation, "),
    ("xyz", "5", "there are seed, device and the sections data, dequantizer, eval, interpolation, inverse, model, "
        "optim, sampling, training"),
    ("training", "5", "'training' is a section; set a key of it: accumulate, augmentation, "),
    ("eval.enable_bpd", "true", "use --mode likelihood instead"),
    ("training.n_iters", "many", "training.n_iters must be an integer, got 'many'"),
    ("training.n_iters", "1.5", "training.n_iters must be an integer, got 1.5"),
    ("training.n_iters", "0", "training.n_iters must be at least 1, got 0"),
    ("training.compile", "maybe", "training.compile must be true or false, got 'maybe'"),
    ("optim.lr", "fast", "optim.lr must be a number, got 'fast'"),
    ("optim.lr", "nan", "optim.lr must be a number, got nan"),
    ("optim.lr", "0", "optim.lr must be above 0, got 0.0"),
    ("optim.decay", "2", "optim.decay must be between 0 and 1, got 2.0"),
    ("model.dropout", "1", "model.dropout must be at least 0 and below 1, got 1.0"),
    ("model.ch_mult", "1,b", "model.ch_mult must be integers such as 1,2,2, got '1,b'"),
    ("model.ch_mult", "1.5,2", "model.ch_mult must be integers such as 1,2,2, got (1.5, 2)"),
    ("model.ch_mult", "", "one per level, got ()"),
    ("training.sde", "vpsd", "learned, or FILE.py:NAME of your own, got 'vpsd'; did you mean 'vpsde'?"),
    ("data.dataset", "CIFAR10", "got 'CIFAR10'; did you mean 'cifar10'?"),
    ("seed", "-1", "seed must be at least 0, got -1"),
    ("training.soft_truncation", "-1", "training.soft_truncation must be at least 0, got -1.0"),
    ("device", "gpu", "device must be auto, cpu, cuda, cuda:N or mps, got 'gpu'"),
]  # fmt: skip


@pytest.mark.parametrize("key, value, answer", SLIPS, ids=[f"{k}={v}" for k, v, _ in SLIPS])
def test_a_slip_on_the_command_line_is_answered(key: str, value: str, answer: str) -> None:
    with pytest.raises(ValueError, match=re.escape(answer)) as error:
        load(VP, {key: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line, answer",
    [
        (
            "config.training.n_iter = 5",
            "line 4: unknown config key 'training.n_iter'; did you mean 'training.n_iters'?",
        ),
        ("config.training.update(n_iter=5)", "line 4: unknown config key 'training.n_iter'; did you mean"),
        ("config.trianing.n_iters = 5", "line 4: unknown config key 'trianing'; did you mean 'training'?"),
        ("config.update({'training': {'n_itrs': 5}})", "line 4: unknown config key 'training.n_itrs'; did you mean"),
        (
            "(lambda section:\n     section.update(n_iter=5))(config.training)",
            "line 5: unknown config key 'training.n_iter'",
        ),
        ("config.lr = 5", "line 4: unknown config key 'lr'; did you mean 'optim.lr'?"),
        ("config.training.n_iters = 'many'", "line 4: training.n_iters must be an integer, got 'many'"),
        ("config.training.n_iters = True", "training.n_iters must be an integer, got True"),
        ("config.training.n_iters = None", "training.n_iters must be an integer, got None"),
        ("config.training.sde = 'vp'", "training.sde must be one of vpsde"),
        ("config.model.ch_mult = (1, '2')", "model.ch_mult must be integers such as 1,2,2, got (1, '2')"),
        ("config.training.accumulate = 3", "training.batch_size=128 is not divisible by training.accumulate=3"),
        ("return 3", "must return a ConfigDict, got int"),
        ("config.training.n_iters = = 5", "line 4: "),
    ],
)
def test_a_slip_in_a_file_is_answered_with_its_place(line: str, answer: str, tmp_path: Path) -> None:
    path = write(tmp_path, line)
    with pytest.raises(ValueError, match=re.escape(answer)) as error:
        load(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value) or "accumulate" in line  # a contradiction between keys has no one place


def test_a_bug_in_a_file_keeps_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match="'str' object has no attribute 'foo'"):
        load(write(tmp_path, "config.training.sde.foo"))


def test_a_config_may_come_from_scratch_and_lists_are_tuples(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    body = "    return ConfigDict({'training': {'n_iters': 7}, 'model': {'ch_mult': [1, 3], 'dropout': 0}})\n"
    path.write_text("from ml_collections import ConfigDict\ndef get_config():\n" + body)
    assert differences(default_config(), load(path)) == [
        "model.ch_mult: (1, 2, 2, 2) -> (1, 3)",
        "model.dropout: 0.1 -> 0.0",
        "training.n_iters: 1300000 -> 7",
    ]


def test_missing_files_and_foreign_json_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config file .*vp_cifr.py; did you mean .*vp_cifar.py\?"):
        load(VP.with_name("vp_cifr.py"))
    with pytest.raises(FileNotFoundError, match="no config file .*; `score_sde configs` lists those"):
        load(VP.with_name("zzz.py"))
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match="no config .*config.json"):
        from_json(path)
    for text, answer in [
        ("[1]", "holds no config"),
        ('{"a":\n}', "line 2: not JSON"),
        ('{"training": {"n_itrs": 5}}', "did you mean 'training.n_iters'?"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=re.escape(answer)):
            load(path)


def test_values_from_the_command_line_take_the_type_of_the_default() -> None:
    config = load(
        VP,
        {
            "training.n_iters": "1e5",
            "training.batch_size": "1_000",
            "training.compile": "True",
            "data.random_flip": "0",
            "optim.lr": "1e-4",
            "optim.weight_decay": "1",
            "model.ch_mult": "(1, 2)",
            "model.attn_resolutions": "8",
            "model.fir_kernel": "[1,2,1]",
            "data.path": "my data",
        },
    )
    values = [config.training.n_iters, config.training.batch_size, config.training.compile, config.data.random_flip]
    values += [config.optim.lr, config.optim.weight_decay, config.model.ch_mult, config.model.attn_resolutions]
    values += [config.model.fir_kernel, config.data.path]
    wanted = [100_000, 1000, True, False, 1e-4, 1.0, (1, 2), (8,), (1, 2, 1), "my data"]
    assert [(v, type(v)) for v in values] == [(v, type(v)) for v in wanted]
    assert load(VP, {"model.attn_resolutions": ""}).model.attn_resolutions == ()


def test_overrides_are_taken_out_of_the_arguments() -> None:
    line = "--config a.py --config.optim.lr=1e-3 --config.optim.eps 1e-6 --config.training.compile --mode train"
    rest, overrides = split_arguments([*line.split(), "--config.model.init_scale", "-1"])
    assert rest == ["--config", "a.py", "--mode", "train"]
    assert overrides == {
        "optim.lr": "1e-3",
        "optim.eps": "1e-6",
        "training.compile": "true",
        "model.init_scale": "-1",
    }
    with pytest.raises(ValueError, match="--config.optim.lr needs a value, as in --config.optim.lr=0.0002"):
        split_arguments(["--config.optim.lr", "--mode", "train"])


# Values that are sound alone and contradict each other: what is set on vp_cifar, and what the answer must contain.
CONTRADICTIONS = [
    ("training.accumulate=3", "not divisible"),
    ("training.sde=learned", "training.sde=learned needs a loss whose mean is the same for every shape"),
    ("training.sde=learned training.likelihood_weighting=1", "training.time=uniform and model.label=log_sigma"),
    ("training.sde=learned training.likelihood_weighting=1 model.label=log_sigma training.time=importance", "=uniform"),
    ("model.gamma_min=5", "model.gamma_min=5 must be below model.gamma_max=5"),
    ("training.soft_truncation=1 training.time=log_snr", "training.time=uniform or importance (which is log_snr with"),
    ("training.soft_truncation=1 training.continuous=0", "set training.continuous=True"),
    ("training.soft_truncation=1 training.sde=vesde model.t_min=0", "model.t_min above 0"),
    ("training.continuous=0 training.sde=subvpsde", "needs training.sde to be one of vpsde, vesde"),
    ("training.continuous=0 training.time=log_snr", "leave training.time=uniform"),
    ("training.time=second_moment", "training.time=second_moment needs the steps of a chain: set training.continuous"),
    ("training.objective=vlb", "training.objective=vlb needs the steps of a chain: set training.continuous=False"),
    ("training.continuous=0 training.objective=hybrid", "set model.learned_variance=True"),
    ("training.continuous=0 model.learned_variance=1", "training.objective=denoising trains no variances"),
    ("training.continuous=0 training.objective=vlb model.num_scales=1 training.sde=vesde", "at least 2 steps, not"),
    ("training.continuous=0 training.objective=vlb data.uniform_dequantization=1", "vlb decodes levels: set data.unif"),
    ("sampling.variance=learned", "set model.learned_variance=True"),
    ("data.dataset=ring model.name=mlp data.random_flip=0 eval.clip_denoised=1", "eval.clip_denoised clips pixels"),
    ("data.dataset=ring model.name=mlp data.random_flip=0 sampling.clip_denoised=1", "sampling.clip_denoised clips"),
    ("training.continuous=0 eval.steps=1001", "eval.steps must be at most the chain's model.num_scales=1000, got 1001"),
    ("training.continuous=0 eval.terms=1000", "eval.terms must be at most the bound's 999 diffusion terms, got 1000"),
    ("eval.steps=20 eval.terms=21", "eval.terms must be at most the bound's 20 diffusion terms, got 21"),
    ("eval.estimate=bound eval.importance_samples=2", "decodes levels without dequantization"),
    ("training.continuous=0 eval.dequantization=variational", "decodes levels without dequantization"),
    ("eval.estimate=bound eval.heat_map=2", "leave eval.dequantization, eval.importance_samples and eval.heat_map"),
    ("data.uniform_dequantization=1 eval.dequantization=truncated_normal", "data.uniform_dequantization=False and"),
    ("eval.estimate=sde_bound eval.dequantization=truncated_normal", "eval.estimate=ode"),
    ("training.continuous=0 eval.estimate=sde_bound", "eval.estimate=sde_bound is for continuous models"),
    ("eval.estimate=sde_bound eval.importance_samples=2", "without eval.importance_samples or eval.heat_map"),
    ("eval.dequantization=gaussian", "truncated_normal"),
    ("eval.importance_samples=0", "eval.importance_samples must be at least 1, got 0"),
    ("eval.steps=1", "eval.steps must be 0 or at least 2, got 1"),
    ("training.time=importance", "set training.likelihood_weighting=True"),
    ("training.time=log_snr training.likelihood_weighting=1", "already weights by likelihood"),
    (
        "model.name=ncsnv2 model.image_channels=3 model.dropout=0",
        "to ddpm, ncsnpp, adm or dit, not ncsnv2",
    ),
    ("training.time=edm", "set training.likelihood_weighting=False and model.rule=edm"),
    ("training.geometric=0.1 model.name=dit", "tells a U-Net how: set model.name to ddpm, ncsnpp or adm"),
    ("training.geometric=0.1 model.super_resolution=2", "leave data.autoencoder and model.super_resolution alone"),
    ("training.geometric=0.1 model.conditional=0", "model.conditional=True"),
    ("training.geometric=0.1 training.continuous=0 training.objective=vlb model.learned_variance=1", "level to decode"),
    ("training.objective=flow_matching training.likelihood_weighting=1", "has the velocity's weight"),
    ("training.objective=flow_matching training.min_snr=5", "training.objective=denoising"),
    ("training.coupling=sinkhorn", "is for flow matching without conditions, which it would mix"),
    (
        "training.coupling=optimal_transport training.objective=flow_matching model.class_conditional=1",
        "is for flow matching without conditions",
    ),
    (
        "training.coupling=optimal_transport training.objective=flow_matching sampling.method=ddim sampling.eta=1",
        "which sampling with noise needs: set sampling.method=fast, heun, ode",
    ),
    (
        "training.coupling=optimal_transport training.objective=flow_matching sampling.method=heun "
        "eval.estimate=sde_bound",
        "which eval.estimate=sde_bound needs: set eval.estimate=ode",
    ),
    ("training.sde=linear model.rule=noise", "training.sde=linear has no signal at t = 1, where model.rule=noise"),
    ("training.sde=trigonometric model.rule=v model.label=log_sigma", "or model.label=log_sigma is infinite: set"),
    ("sampling.shift=2 sampling.method=embedded", "sampling.shift=2 moves the times of an even grid: set it to 1"),
    ("sampling.shift=2 training.continuous=0", "set it to 1 for chains"),
    ("training.time=mode training.time_scale=2", "training.time_scale must be a number from -1 to 1.75"),
    ("training.min_snr=5 training.likelihood_weighting=1", "training.min_snr=5 is a weight of the noise error"),
    ("training.min_snr=5 training.time=edm model.rule=edm", "another training.time than edm"),
    ("training.uncertainty=1 training.objective=sliced", "a squared error at fixed noise levels"),
    ("training.time=edm model.rule=edm training.likelihood_weighting=1", "has EDM's weight, of model.sigma_data"),
    ("training.objective=sliced_vr training.compile=1", "second derivatives, which torch.compile does not compute"),
    ("training.objective=finite_difference training.precision=bfloat16", "set training.precision=float32"),
    ("training.objective=finite_difference", "would compare two dropout masks: set model.dropout=0"),
    ("model.sigma_min=50", "model.sigma_min=50 must be below model.sigma_max=50"),
    ("model.beta_min=21", "model.beta_min=21 must not exceed model.beta_max=20"),
    (
        "training.continuous=0 model.num_scales=20 sampling.steps=20",
        "a chain of model.num_scales=20 steps is too coarse",
    ),
    ("sampling.t_min=0", "sampling.t_min must be above 0 for training.sde=vpsde"),
    ("eval.t_min=0 training.sde=cosine", "eval.t_min must be above 0 for training.sde=cosine"),
    ("model.label=index", "set training.continuous=False"),
    ("model.rule=mean", "set training.continuous=False"),
    ("model.embedding_type=fourier", "set model.label=sigma, not 'time'"),
    ("model.label=sigma", "set model.label=log_sigma, not 'sigma'"),
    ("model.ch_mult=1,0", "positive integers"),
    ("model.name=mlp", "model.name=mlp is for vectors"),
    ("data.dataset=ring", "model.name=ncsnpp is for images"),
    ("data.dataset=ring model.name=mlp", "data.random_flip mirrors images"),
    ("sampling.predictor=none", "both none"),
    ("sampling.predictor=ancestral_sampling sampling.probability_flow=1", "excludes ancestral_sampling"),
    ("training.continuous=0 sampling.grid=karras", "sampling.grid must be uniform, got 'karras'"),
    ("training.continuous=0 sampling.steps=1001", "between 2 and the chain's model.num_scales=1000, got 1001"),
]


@pytest.mark.parametrize("settings, answer", CONTRADICTIONS)
def test_contradictions_are_refused(settings: str, answer: str) -> None:
    with pytest.raises(ValueError, match=re.escape(answer)):
        load(VP, dict(setting.split("=") for setting in settings.split()))


def test_each_key_explains_itself_and_its_default_is_one_of_its_values() -> None:
    for name, key in KEYS.items():
        assert key.meaning and check(name, key.default) == key.default, name
        assert explain(name).startswith(f"{name}={key.default}: {key.meaning} ("), name
    assert explain("optim.beta1") == "optim.beta1=0.9: decay of the gradient's mean (a number, at least 0 and below 1)"
    assert explain("eval.split").endswith("(one of test, train)")
    validate(default_config())


@pytest.mark.parametrize(
    "settings, sde",
    [
        ("training.sde=vpsde model.beta_max=10", VPSDE(beta_max=10.0, t_min=1e-5)),
        ("training.sde=vesde model.sigma_max=9", VESDE(sigma_max=9.0)),
        ("training.sde=cosine", CosineSDE(t_min=1e-5)),
        ("training.sde=edm model.sigma_min=.002 model.sigma_max=80 model.t_min=0", EDMSDE()),
        ("training.continuous=0", DDPM.linear(1000).as_sde()),
        ("training.continuous=0 training.sde=vesde", SMLD.from_sde(VESDE()).as_sde()),
        ("training.continuous=0 training.sde=cosine model.num_scales=400 sampling.steps=9", DDPM.cosine(400).as_sde()),
    ],
)
def test_sde_is_what_the_config_says(settings: str, sde: object) -> None:
    built = build_sde(load(VP, dict(setting.split("=") for setting in settings.split())))
    assert type(built) is type(sde)
    if hasattr(sde, "knots"):  # 0.1/1000 .. 20/1000 are the published betas to rounding
        torch.testing.assert_close(torch.tensor(built.knots), torch.tensor(sde.knots), rtol=1e-12, atol=0)  # type: ignore[attr-defined]
    else:
        assert built == sde


@pytest.mark.parametrize(
    "settings, sampler",
    [
        ("", EulerMaruyama()),
        ("probability_flow=1", FixedODE("euler")),
        ("predictor=reverse_diffusion probability_flow=1", ReverseDiffusion(flow=True)),
        ("predictor=ancestral_sampling", Ancestral()),
        ("predictor=ancestral_sampling variance=large", Ancestral("large")),
        ("predictor=none corrector=ald snr=0.2", AnnealedLangevin(snr=0.2)),
        ("predictor=reverse_diffusion corrector=langevin", PredictorCorrector(ReverseDiffusion(), Langevin())),
        ("predictor=none corrector=langevin n_steps_each=2", Langevin(steps=2)),
        ("method=ode rtol=1e-3", AdaptiveODE(rtol=1e-3, method="RK45")),
        ("method=ode ode_method=rk4", FixedODE("rk4")),
        ("method=ddim eta=0.5", DDIM(eta=0.5)),
        ("method=heun", Heun()),
        ("method=edm", Churn(40.0, 0.05, 50.0, 1.003)),
        ("method=edm churn=10 churn_low=0.1 churn_high=2 churn_inflate=1.01", Churn(10.0, 0.1, 2.0, 1.01)),
        ("method=dpm_solver order=3", DPMSolver(3, "data")),
        ("method=dpm_solver predict=noise", DPMSolver(2, "noise")),
        ("method=dpm_solver++ order=3", Multistep(3)),
        ("method=dpm_solver++ eta=1", Multistep(2, eta=1.0)),
        ("method=deis order=3", Multistep(3, "noise")),
        ("method=unipc order=3 unipc_variant=b1 predict=noise", UniPC(3, "b1", "noise")),
        ("method=balanced order=3", Balanced()),
        ("method=fast steps=6", Multistep(3, "both", start="lower")),
        ("method=fast steps=7", UniPC(2, predict="both", start="lower", short=25)),
        ("method=fast steps=14", UniPC(2, predict="both", start="lower", short=25)),
        ("method=fast steps=15", UniPC(3, predict="both", start="lower", short=25)),
        ("method=embedded rtol=1e-3", EmbeddedODE(1e-3, 1e-5)),
        ("method=adaptive_sde sde_rtol=0.05 sde_atol=0.01", AdaptiveSDE(0.05, 0.01)),
    ],
)  # fmt: skip
def test_sampler_is_what_the_config_says(settings: str, sampler: object) -> None:
    overrides = {f"sampling.{key}": value for key, value in (setting.split("=") for setting in settings.split())}
    assert build_sampler(load(VP, overrides)) == sampler


def test_times_end_at_sampling_t_min_and_adaptive_solvers_get_both_ends() -> None:
    for name in ("uniform", "quadratic", "log_snr", "karras", "arcsinh", "skewed"):
        config = load(VP, {"sampling.grid": name, "sampling.steps": "7"})
        wanted = getattr(times, name)(VPSDE(t_min=1e-3), 7)
        torch.testing.assert_close(build_times(config, build_sde(config)), wanted, rtol=0, atol=0)
    config = load(VP, {"sampling.method": "fast", "sampling.steps": "7"})
    assert torch.equal(build_times(config, build_sde(config)), times.arcsinh(VPSDE(t_min=1e-3), 7))
    config = load(VP, {"sampling.method": "ode"})
    torch.testing.assert_close(build_times(config, build_sde(config)).tolist(), [1.0, 1e-3], rtol=0, atol=1e-15)


def test_methods_with_step_sizes_of_their_own_get_both_ends_also_of_other_grids() -> None:
    for method in ("embedded", "adaptive_sde"):
        for grid in ("karras", "uniform"):
            config = load(VP, {"sampling.method": method, "sampling.grid": grid})
            assert build_times(config, build_sde(config)).tolist() == pytest.approx([1.0, 1e-3], abs=1e-15)


def test_the_grid_that_a_stamp_names_is_the_one_that_is_made() -> None:
    for method, named in (("ddim", "karras"), ("ode", "ends"), ("embedded", "ends"), ("fast", "arcsinh")):
        config = load(VP, {"sampling.method": method, "sampling.grid": "karras", "sampling.steps": "7"})
        grid, sde = build_times(config, build_sde(config)), VPSDE(t_min=1e-3)
        made = grid[[0, -1]] if named == "ends" else getattr(times, named)(sde, 7)
        assert about_grid(config, grid)["name"] == named and torch.equal(grid, made)
    chain = load("configs/ddpm_cifar.py", {"sampling.method": "fast", "sampling.steps": "7"})
    about = {"name": "uniform", "steps": 6, "first": 1.0, "last": 1e-3}
    assert about_grid(chain, build_times(chain, build_sde(chain))) == about


def test_a_fitted_grid_is_made_from_the_model_for_its_sampler() -> None:
    config = load(VP, {"sampling.method": "unipc", "sampling.grid": "fitted", "sampling.steps": "4"})
    model = Gaussian(build_sde(config), torch.zeros(2), 0.3)
    wanted = fit_times(model, UniPC(2), 4, (32, 2), sde=VPSDE(t_min=1e-3), seed=0)
    assert torch.equal(build_times(config, model.sde, model, (2,)), wanted)
    assert not torch.equal(wanted, times.uniform(VPSDE(t_min=1e-3), 4))
    with pytest.raises(ValueError, match="sampling.grid=fitted is fitted to a model: pass it to build_times"):
        build_times(config, model.sde)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"sampling.order": "4"}, "sampling.order must be 1, 2 or 3"),
        ({"sampling.threshold": "1.5"}, "sampling.threshold must be between 0 and 1"),
        (
            {"sampling.threshold": "0.99", "sampling.clip_denoised": "true"},
            "set it to 0 for vectors, and sampling.clip",
        ),
        ({"sampling.churn_low": "3", "sampling.churn_high": "2"}, "churn_low=3 must not exceed sampling.churn_high=2"),
        ({"sampling.grid": "fitted"}, "grid=fitted is for solvers without noise: set sampling.method"),
        ({"sampling.grid": "fitted", "sampling.method": "ddim", "sampling.eta": "1"}, "and sampling.eta=0"),
        (
            {"sampling.method": "unipc", "sampling.eta": "1"},
            r"eta=1 is noise of ddim and dpm_solver\+\+: set it to 0 for sampling.method=unipc",
        ),
        ({"sampling.method": "unipcc"}, "unipc"),
    ],
)
def test_impossible_settings_of_the_solvers_are_refused(overrides: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load(VP, overrides)


def test_grids_are_fitted_to_the_solvers_that_take_no_noise_and_choose_no_steps() -> None:
    config = load(VP, {"sampling.grid": "fitted", "sampling.method": "heun"})
    accepted = []
    for method in build.METHODS:
        config.sampling.method = method
        try:
            validate(config)
            accepted.append(method)
        except ValueError as error:
            named = "ddim, heun, dpm_solver, dpm_solver++, deis, unipc, balanced, and"
            assert f"set sampling.method to one of {named}" in str(error)
    assert accepted == ["ddim", "heun", "dpm_solver", "dpm_solver++", "deis", "unipc", "balanced"]


def test_a_discrete_model_is_labelled_by_the_chain_and_sampled_as_the_chain() -> None:
    tiny = {**TINY, "training.continuous": "false", "model.label": "index", "model.num_scales": "50"}
    config = load(
        VP, {**tiny, "model.beta_max": "5", "sampling.predictor": "ancestral_sampling", "sampling.steps": "50"}
    )
    chain = build_chain(config)
    model = build_model(config, (3, 8, 8)).double()
    assert model.label(chain.times, chain.times, chain.times[:-1]).tolist() == pytest.approx(
        range(49, -1, -1), abs=1e-12
    )
    # The chain's own walk to clean data; the config's ends one step earlier, with the estimate of the data. An
    # untrained network's estimate is as good as any; rounding only, in float64.
    wanted = sample(model, Ancestral(), (2, 3, 8, 8), chain.times, seed=3)
    got = sample(model, build_sampler(config), (2, 3, 8, 8), build_times(config, model.sde), seed=3, denoise=True)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    config.sampling.steps = 6
    assert (build_times(config, model.sde) * 50).tolist() == pytest.approx([50, 40, 30, 21, 11, 1], abs=1e-12)


def test_weights_depend_on_the_seed_alone() -> None:
    before = torch.get_rng_state()
    a, b, c = (build_network(load(VP, {**TINY, "seed": seed}), (3, 8, 8)).state_dict() for seed in ("1", "1", "2"))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_every_key_of_a_network_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[tuple[object, ...], dict[str, object]]] = []
    for name in ("UNet", "MLP", "DiT", "EDM2"):
        monkeypatch.setattr(build, name, lambda *sizes, **options: made.append((sizes, options)))
    # No value is a default's.
    keys = """nf=24 ch_mult=1,3 num_res_blocks=5 attn_resolutions=2 dropout=0.3 nonlinearity=elu resamp_with_conv=0
        embedding_type=fourier label=sigma fourier_scale=3 fir=1 fir_kernel=1,2,1 skip_rescale=0 resblock_type=ddpm
        progressive=output_skip progressive_input=input_skip progressive_combine=cat init_scale=0.4 hidden=5 depth=7
        learned_variance=1 fourier_features=3,4 scale_shift=1 num_heads=3
        class_conditional=1 num_classes=6 image_channels=3 text_width=7 pooled_width=8
        head_channels=4 attend_each=1 patch_size=3 norm=rms feed_forward=swiglu positions=rotary qk_norm=1"""
    overrides = {f"model.{key}": value for key, value in (setting.split("=") for setting in keys.split())}
    overrides |= {"data.centered": "0", "training.checkpoint_activations": "1"}
    overrides |= {"training.continuous": "0", "training.objective": "hybrid"}
    bare = {f"model.{key}": "0" for key in ("image_channels", "text_width", "pooled_width")}
    both: dict[str, object] = dict(width=24, multipliers=(1, 3), blocks=5, attention=(2,), image_size=6, dropout=0.3)
    both |= dict(activation="elu", resample_conv=False, centered=False, checkpoint_activations=True, out_channels=4)
    both |= dict(dimensions=2, scale_shift=True, heads=3, fourier_features=(3, 4), classes=6)
    both |= dict(image_channels=3, text_width=7, pooled_width=8, head_channels=4, attend_each=True)
    both |= dict(movement=9)

    def moving(changes: dict[str, str]) -> ConfigDict:
        config = load(VP, changes)
        config.training.geometric = 0.1  # which excludes the objective that learns variances
        return config

    build_network(moving(overrides), (2, 4, 6))
    ncsnpp = dict(block="ddpm", embedding="fourier", fourier_scale=3.0, fir=(1, 2, 1), skip_rescale=False)
    ncsnpp |= dict(progressive="output_skip", progressive_input="input_skip", combine="cat", init_scale=0.4)
    assert made.pop() == ((2,), both | ncsnpp)

    build_network(moving({**overrides, "model.name": "ddpm", "model.label": "time"}), (2, 4, 6))
    assert made.pop() == ((2,), both | dict(block="ddpm", embedding="sinusoidal", skip_rescale=False, groups=32))

    build_network(
        moving({**overrides, "model.name": "adm", "model.label": "time", "model.scale_shift": "0"}), (2, 4, 6)
    )
    fixed = dict(embedding="transformer", skip_rescale=False, project=False, norm_eps=1e-5, init_scale=0.4)
    assert made.pop() == ((2,), both | fixed)

    build_network(load(VP, {**overrides, "model.name": "dit", "model.label": "time", "model.hidden": "24"}), (2, 4, 6))
    told = {key: both[key] for key in ("classes", "image_channels", "text_width", "pooled_width", "out_channels")}
    told |= {key: both[key] for key in ("dropout", "centered", "checkpoint_activations")}
    told |= dict(norm="rms", feed_forward="swiglu", positions="rotary", qk_norm=True)
    assert made.pop() == ((2,), told | dict(patch=3, width=24, depth=7, heads=6))

    levels = ("width", "multipliers", "blocks", "attention", "image_size", "dropout", "centered")
    build_network(load(VP, {**overrides, "model.name": "edm2", "model.label": "edm", **bare}), (2, 4, 6))
    outer = ("heads", "head_channels", "checkpoint_activations", "dimensions", "out_channels", "classes")
    assert made.pop() == ((2,), {key: both[key] for key in (*levels, *outer)})

    for name in ("ddpm", "ncsnpp", "adm"):
        build_network(load(VP, {"model.name": name, "model.conditional": "0"}), (2, 4, 6))
        options = made.pop()[1]
        assert options["embedding"] is None and options["out_channels"] is None

    vectors = {"model.name": "mlp", "data.dataset": "ring", "data.random_flip": "0"}
    build_network(load(VP, {**overrides, **vectors, **bare}), (9,))
    mlp = dict(width=5, depth=7, embedding="fourier", fourier_scale=3.0, dropout=0.3, out_features=18, classes=6)
    assert made.pop() == ((9,), mlp)


def test_the_shape_of_the_data_says_of_how_many_dimensions_a_network_is() -> None:
    for shape in [(2, 16), (3, 8, 8), (1, 4, 8, 4)]:
        network = build_network(load(VP, TINY), shape)
        assert network.first.weight.ndim == len(shape) + 1  # type: ignore[union-attr]
        assert network(torch.zeros(2, *shape), torch.zeros(2)).shape == (2, *shape)


def test_edm_s_rule_and_scale_take_sigma_data_and_other_rules_do_not_scale() -> None:
    alpha, sigma = torch.tensor([0.8]), torch.tensor([0.5])
    config = load(VP, {**TINY, "model.rule": "edm", "model.sigma_data": "0.7", "model.label": "log_sigma"})
    edm = build_model(config, (3, 8, 8))
    assert edm.rule(alpha, sigma) == rules.predict_edm(alpha, sigma, 0.7)
    assert edm.scale(alpha, sigma, alpha) == rules.unit_variance(alpha, sigma, alpha, 0.7)
    assert edm.label(alpha, sigma, alpha) == rules.label_log_sigma(alpha, sigma, alpha)
    theirs = build_model(load(VP, {**TINY, "model.label": "edm"}), (3, 8, 8))
    assert theirs.label(alpha, sigma, alpha).item() == pytest.approx(math.log(0.5 / 0.8) / 4)
    plain = build_model(load(VP, {**TINY, "model.rule": "v"}), (3, 8, 8))
    assert (plain.rule, plain.scale, plain.label) == (rules.predict_v, rules.unscaled, rules.label_time)


def test_a_network_that_does_not_fit_the_data_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"model.name=ncsnpp is for images, \(C, H, W\), signals, .*, but the data have shape \(2,\)"
    ):
        build_network(load(VP), (2,))
    with pytest.raises(
        ValueError, match=r"model.name=dit is for images, \(C, H, W\), but the data have shape \(1, 64\)"
    ):
        build_network(load(VP, {"model.name": "dit"}), (1, 64))
    with pytest.raises(ValueError, match="model.name=mlp is for vectors"):
        build_network(load(VP.with_name("vp_toy.py")), (3, 8, 8))


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_recomputed_where_the_config_says_so(recompute: bool) -> None:
    config = load(VP, {**TINY, "training.checkpoint_activations": str(recompute)})
    config.model.num_classes = 3
    trained = (build.build_model, build.build_classifier, build.build_autoencoder)
    blocks = [[m for m in make(config, (3, 8, 8)).modules() if isinstance(m, ResidualBlock)] for make in trained]
    assert all(blocks) and {block.style.checkpoint_activations for each in blocks for block in each} == {recompute}
