"""What the package does on a device, walked once on the pretend GPU: ``python -m tests.machine.on_pretend_gpu``.

Prints one JSON object: for each case of `CASES` what was refused, or null, and what the host waited for in the parts
that must not wait. `test_devices` runs it in a process of its own, as `pretend_gpu` changes torch.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

from score_sde import (
    DDIM,
    AdaptiveODE,
    AdaptiveSDE,
    Ancestral,
    AnnealedLangevin,
    Balanced,
    Churn,
    DPMSolver,
    EmbeddedODE,
    FixedODE,
    Heun,
    Langevin,
    Multistep,
    PredictorCorrector,
    Sampler,
    ScoreModel,
    UniPC,
    chain_bound,
    classifier,
    fit_times,
    guide,
    heat_map,
    langevin_dynamics,
    latent_bound,
    log_likelihood,
    sample,
    times,
    variational_bound,
)
from score_sde.config import default_config, to_json
from score_sde.config.build import build_model
from score_sde.config.kinds import kind_of
from score_sde.data import Data, Split
from score_sde.data.captions import Text
from score_sde.data.codecs import AutoencoderCodec, Codec, PixelCodec, Statistics, VectorCodec
from score_sde.inverse import (
    Average,
    Blur,
    Dense,
    Grey,
    Linear,
    Mask,
    Observation,
    Operator,
    Projected,
    ddnm,
    dps,
    moment_matching,
    pigdm,
    twisted,
)
from score_sde.likelihood.dequantisation import (
    TruncatedNormal,
    Uniform,
    VariationalDequantiser,
    fit_dequantiser,
    log_probability,
)
from score_sde.likelihood.flows import score_flow
from score_sde.likelihood.latents import slerp
from score_sde.machine.parallel import Processes
from score_sde.models.classifier import NoisyClassifier
from score_sde.models.guidance import clip, threshold
from score_sde.ode import Solver
from score_sde.tasks.checkpoint import Trained
from score_sde.tasks.conditions import Wanted
from score_sde.tasks.dequantize import dequantiser_path, save_dequantiser
from score_sde.tasks.job import Job
from score_sde.tasks.latents import run_decoding, run_encoding, run_interpolation
from score_sde.tasks.likelihood import run_likelihood
from score_sde.tasks.restore import METHODS, run_restoring
from score_sde.tasks.sample import run_sampling
from score_sde.tasks.step import Batches, evaluate_loss, make_state, train_step
from score_sde.tasks.train import train
from tests.oracles import MAIN

LEVELS, CHANNELS, SIZE = 17, 3, 8
SHAPE = (CHANNELS, SIZE, SIZE)
T_MIN = 0.98  # of solvers that adapt: from there to 1 they take a step


def config_of(**changes: object) -> ConfigDict:
    """A tiny U-Net of tiny images."""
    config = default_config()
    small = dict(
        model__nf=8,
        model__ch_mult=(1, 2),
        model__num_res_blocks=1,
        model__attn_resolutions=(4,),
        model__hidden=16,
        model__depth=1,
        model__head_channels=8,
        data__dataset="digits",
        data__image_size=8,
        training__batch_size=4,
        training__n_iters=3,
        optim__warmup=0,
        sampling__steps=2,
        sampling__num_samples=3,
        sampling__batch_size=3,
        eval__num_images=2,
        eval__ode_method="bosh3",  # of the fewest evaluations; the default's step sizes are in cases of their own
        eval__rtol=0.9,
        eval__atol=0.9,
        eval__check_images=0,
        eval__draws=2,
        eval__t_min=T_MIN,
    )
    for key, value in {**small, **changes}.items():
        section, _, name = key.rpartition("__")
        (config[section] if section else config)[name] = value
    return config


def data_of(config: ConfigDict) -> Data:
    """Images, or points, with labels and captions, of which there are five."""
    g = torch.Generator().manual_seed(0)
    levels = LEVELS if config.model.name != "mlp" or config.data.dataset == "files" else None

    def split() -> Split:
        shape = (12, 3) if config.model.name == "mlp" else (12, *SHAPE)
        whole = torch.randint(LEVELS, shape, generator=g, dtype=torch.uint8)
        x = whole if levels else torch.randn(shape, generator=g)
        return Split(x, torch.arange(12) % 3, caption=torch.arange(12) % 5)

    return Data(split(), split(), levels, num_classes=3, captions=tuple("abcde"))


def text_of() -> Text:
    g = torch.Generator().manual_seed(0)
    return Text(torch.randn(5, 4, 6, generator=g), torch.arange(4) < torch.arange(5)[:, None], torch.ones(5, 6))


LABELLED = dict(model__class_conditional=True, model__num_classes=3)
CAPTIONED = dict(model__text_encoder="given", model__text_width=6, model__pooled_width=6)
CHAIN = dict(training__continuous=False, model__num_scales=4, model__label="index", sampling__grid="uniform")
IDDPM = dict(
    **CHAIN, training__sde="cosine", training__objective="hybrid", model__learned_variance=True,
    sampling__predictor="ancestral_sampling", sampling__variance="learned",
)  # fmt: skip
NCSN = dict(
    CHAIN, training__sde="vesde", model__name="ncsn", model__ch_mult=(1, 1, 1, 1), model__sigma_max=1.0,
    sampling__method="ald", sampling__n_steps_each=2, sampling__step_lr=2e-5, sampling__steps=4,
)  # fmt: skip
VDM = dict(
    training__sde="learned", training__likelihood_weighting=True, model__learn_ends=True, model__gamma_min=-8.0,
    model__t_min=0.0, model__fourier_features=(3, 4), model__rule="edm", model__label="log_sigma", eval__t_min=0.0,
    eval__estimate="bound", eval__steps=4, eval__terms=2, sampling__t_min=0.0, sampling__method="fast",
)  # fmt: skip
EDM = dict(training__sde="edm", training__time="edm", model__rule="edm", model__label="edm", model__sigma_max=10.0)
POINTS = dict(model__name="mlp", data__random_flip=False)
LEVELLED = {**POINTS, "data__dataset": "files"}  # points of whole numbers, as pixels
TRAININGS: dict[str, dict[str, object]] = {
    "vp": {},
    "subvp": dict(POINTS, training__sde="subvpsde", training__low_discrepancy=True),
    "ve, channels last": dict(
        training__sde="vesde",
        model__label="sigma",
        model__embedding_type="fourier",
        model__fir=True,
        model__dropout=0.1,
        training__channels_last=True,
    ),
    "importance": dict(POINTS, training__time="importance", training__likelihood_weighting=True),
    "soft truncation": dict(LEVELLED, training__soft_truncation=1.0, data__uniform_dequantization=True),
    "ncsn": NCSN,
    "ncsnv2": {**NCSN, "model__name": "ncsnv2"},
    "iddpm": {**IDDPM, **LEVELLED},
    "second moments": {**IDDPM, **LEVELLED, "training__objective": "vlb", "training__time": "second_moment"},
    "vdm": {**VDM, **LEVELLED, "model__fourier_features": ()},
    "edm": {**EDM, **POINTS},
    "moved images": dict(training__geometric=0.5, data__random_flip=False),
    "weights and power averages": dict(
        POINTS, training__min_snr=5.0, training__uncertainty=True, model__ema_power=True
    ),
    "sliced": dict(POINTS, training__objective="sliced_vr"),
    "implicit": dict(POINTS, training__objective="implicit"),
    "finite differences": dict(POINTS, training__objective="finite_difference"),
    "classifier": {**LABELLED, "training__objective": "cross_entropy"},
    "autoencoder": dict(training__objective="autoencoder", model__code_channels=1),
    "labels and text": {**LABELLED, **CAPTIONED},
    "smaller images": dict(model__super_resolution=2, model__image_channels=CHANNELS, training__augmentation=0.5),
    "dit": {**LABELLED, "model__name": "dit", "model__patch_size": 2},
    "edm2": {**LABELLED, "model__name": "edm2", "model__label": "edm"},
    "bfloat16, in parts": dict(
        model__name="adm",
        model__nf=32,
        model__attn_resolutions=(),
        training__precision="bfloat16",
        training__accumulate=2,
        optim__optimizer="AdamW",
    ),
}


class Bench:
    """What a case is given: the mode, and models, data and settings on the device."""

    def __init__(self, gpu: Pretending, folder: Path) -> None:
        self.gpu, self.folder, self.processes = gpu, folder, Processes(0, 1, GPU)
        self.trained = Trained(folder / "model.pth")
        self.trained.path.write_bytes(b"another project's weights")

    def job(self, model: ScoreModel, config: ConfigDict, codec: Codec, shape: tuple[int, ...] = SHAPE) -> Job:
        return Job(model, config, codec, self.trained, shape, self.folder, self.processes)

    @contextmanager
    def watched(self) -> Iterator[list[str]]:
        """The waits within it."""
        found: list[str] = []
        first = len(self.gpu.waits)
        yield found
        found += [f"{wait.why}: {wait.where}" for wait in self.gpu.waits[first:]]


Case = Callable[[Bench], list[str]]  # what was waited for where nothing should be
CASES: dict[str, Case] = {}


def case(name: str) -> Callable[[Case], Case]:
    def kept(work: Case) -> Case:
        assert name not in CASES
        CASES[name] = work
        return work

    return kept


class Smooth(nn.Module):
    """A network that is quick, and smooth so that solvers take few steps; it is told what `network` is told."""

    def __init__(self, network: Any, shape: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        self.network = network
        self.mix = nn.Parameter(0.3 * torch.randn(outputs, shape[0], generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor, time: Tensor, /, **condition: Any) -> Tensor:
        parts = []
        if hasattr(self.network, "conditions"):
            c = self.network.conditions(x, **condition)
            parts = [c.embedding, c.image, None if c.text is None else c.text.tokens]
        shift = sum((part.flatten(1).mean(1) for part in parts if part is not None), 0 * time)
        y = (self.mix @ x.sin().reshape(*x.shape[:2], -1)).reshape(len(x), -1, *x.shape[2:])
        return y + 0.1 * shift.sin().reshape(-1, *(1,) * (x.ndim - 1))


class Votes(Smooth):
    """Logits, as many as there are outputs."""

    def forward(self, x: Tensor, time: Tensor, /, **condition: Any) -> Tensor:
        return super().forward(x, time).flatten(2).mean(2)


def smooth_model(config: ConfigDict, shape: tuple[int, ...]) -> ScoreModel:
    """The config's model, with a quick network in the place of its own."""
    model = build_model(config, shape)
    model.network = Smooth(model.network, shape, (1 + config.model.learned_variance) * shape[0])
    return model.to(GPU).eval().requires_grad_(False)


LITTLE = dict(model__ch_mult=(1,), model__attn_resolutions=())


def model_on_gpu(**changes: object) -> tuple[ScoreModel, ConfigDict]:
    """A smooth model, made once for each config, and its config; of the network that it has not, little is built."""
    config = config_of(**LITTLE | changes)
    known = to_json(config)
    if known not in _MODELS:
        _MODELS[known] = smooth_model(config, data_of(config).shape)
    return _MODELS[known], config


_MODELS: dict[str, ScoreModel] = {}


# --- training


def _training(name: str, changes: dict[str, object]) -> None:
    @case(f"training: {name}")
    def work(bench: Bench) -> list[str]:
        config = config_of(**changes)
        data, text = data_of(config), text_of().to(GPU)
        codec = PixelCodec(LEVELS) if data.levels else VectorCodec()
        state = make_state(config, data.shape, GPU)
        state.model.train()
        kind = type(state.optimizer)
        state.optimizer = kind(state.parameters, lr=1e-3, fused=True)  # as on CUDA
        objective, split = kind_of(config).objective(state.model, config, codec), data.train.to(GPU)
        sde = kind_of(config).sde(state.model, config)
        waits: list[str] = []
        for _ in range(2 if name == "vp" else 1):  # the second of the optimizer has moments
            flip = config.data.random_flip
            with bench.watched() as found:
                b = Batches(config, codec, sde, text=text).draw(split, state.step, flip=flip, law=state.law)
                record = train_step(state, objective, b, config)
            waits += found
            if state.law is not None:
                state.law.update(b.t, record.measure.cpu())
        if name in ("vp", "iddpm", "vdm", "autoencoder", "labels and text"):
            evaluate_loss(state, config, data.test.to(GPU), codec, text)
        return [] if name == "vdm" else waits  # a learned schedule says that it waits


for name, changes in TRAININGS.items():
    _training(name, changes)


@case("training: the loop")
def _(bench: Bench) -> list[str]:
    config = config_of(**POINTS, **LABELLED, training__log_freq=1, training__snapshot_freq=2)
    data = data_of(config)
    workdir = bench.folder / "run"
    for n in (2, 3):  # and on from a checkpoint
        config.training.n_iters = n
        last = list(train(config, workdir, data, VectorCodec(), bench.processes))[-1]
    assert last.step == 3 and last.checkpoint is not None
    return []


# --- samplers

# those whose steps are the grid's; the others ask the device how large an error is
STEPPING: list[Sampler] = [
    *(s for s in MAIN if not isinstance(s, (AdaptiveODE, AdaptiveSDE, EmbeddedODE, FixedODE))),
    Langevin(norm="batch", steps=2), AnnealedLangevin(0.1, 2), Churn(low=0.1), DDIM(1.0), DPMSolver(1), Multistep(1),
    Multistep(3, "both"), UniPC(3, predict="both"),
]  # fmt: skip


def _sampling(name: str, sampler: Any) -> None:
    @case(f"sampling: {name}")
    def work(bench: Bench) -> list[str]:
        model, _ = vp()
        waits = []
        # these have a history from the third step on
        first = 2 if isinstance(sampler, (Balanced, Multistep, UniPC)) else 1
        for n in (first, first + 1):
            with bench.watched() as found:
                x = sample(model, sampler, (2, *SHAPE), times.log_snr(model.sde, n), denoise=True)
            assert x.device == GPU
            waits.append(found)
        if type(sampler).step is not Sampler.step:
            one = torch.ones((), dtype=torch.float64)
            sampler.step(model, x, one, one / 2, torch.randn_like)
            sampler.step(model, x, one.expand(2), one.expand(2) / 2, torch.randn_like)
        return waits[1][len(waits[0]) :]


def vp(**changes: object) -> tuple[ScoreModel, ConfigDict]:
    return model_on_gpu(model__t_min=1e-3, **changes)


for sampler in STEPPING:
    _sampling(str(sampler), sampler)


for _name, _sampler in {
    "EmbeddedODE": EmbeddedODE(1e-1, 1e-1),
    "AdaptiveSDE": AdaptiveSDE(0.5, 0.5),
    "AdaptiveODE": AdaptiveODE(1e-1, 1e-1),
    "AdaptiveODE, scipy": AdaptiveODE(1e-1, 1e-1, "RK45"),
    "FixedODE": FixedODE("heun2"),
}.items():

    @case(f"sampling: {_name}")
    def _(bench: Bench, sampler: Sampler = _sampler) -> list[str]:
        model, _ = vp(**LABELLED)
        told = model.given(label=torch.arange(2))
        sample(told, sampler, (2, *SHAPE), times.uniform(model.sde, 2))
        return []


def _mode_sample(name: str, **changes: object) -> None:
    @case(f"--mode sample: {name}")
    def _(bench: Bench) -> list[str]:
        model, config = model_on_gpu(**changes)
        codec, text = PixelCodec(LEVELS), None
        images = None
        if config.model.text_encoder:
            text = text_of()
        if config.model.super_resolution:
            images = torch.randint(LEVELS, (3, CHANNELS, 4, 4), dtype=torch.uint8)
        wanted = Wanted([0, 2] if config.model.class_conditional else [], tuple("abc") if text else (), text, images)
        run_sampling(bench.job(model, config, codec), None, wanted)
        return []


_mode_sample("ncsn", **NCSN)
_mode_sample("ncsnv2", **{**NCSN, "model__name": "ncsnv2"})
_mode_sample("iddpm", **IDDPM)
_mode_sample("vdm", **VDM)
_mode_sample("labels", **LABELLED, sampling__guidance=2.0)
_mode_sample("text", **CAPTIONED, sampling__guidance=2.0, sampling__method="heun")
_mode_sample("smaller images", **TRAININGS["smaller images"], sampling__augmentation=0.3)
_mode_sample("clipped, threshold", sampling__clip_denoised=True, sampling__method="edm", sampling__threshold=0.995)
_mode_sample("predictor and corrector", sampling__corrector="langevin", sampling__predictor="reverse_diffusion")


@case("sampling: a fitted grid, and the device's own generator")
def _(bench: Bench) -> list[str]:
    model, _ = vp()
    fit_times(model, DDIM(), 2, (2, *SHAPE), fine=4)
    for sampler in (Ancestral(), Langevin(), Churn()):
        sample(model, sampler, (2, *SHAPE), times.uniform(model.sde, 1), seed=torch.Generator(GPU).manual_seed(0))
    return []


@case("sampling: Langevin dynamics")
def _(bench: Bench) -> list[str]:
    model, _ = vp()
    for metropolis in (False, True):
        langevin_dynamics(model, torch.zeros(2, *SHAPE, device=GPU), 1e-3, 2, t=0.5, metropolis=metropolis)
    return []


# --- guidance

GUIDANCE: dict[str, Callable[[ScoreModel, NoisyClassifier], ScoreModel]] = {
    "classifier-free": lambda m, c: guide(m.given(label=torch.arange(2)), m.given(label=None), 2.0),
    "a scale each, rescaled": lambda m, c: guide(
        m.given(label=torch.arange(2)), m, torch.tensor([1.0, 3.0]), rescale=0.7
    ),
    "in an interval": lambda m, c: guide(m.given(label=torch.arange(2)), m, 2.0, low=0.3, high=3.0),
    "autoguidance": lambda m, c: guide(m.given(label=torch.arange(2)), vp(**LABELLED)[0], 2.0),
    "by a classifier": lambda m, c: classifier(m, c, 2.0, label=torch.arange(2)),
    "by a classifier, a scale each": lambda m, c: classifier(
        m, c, torch.tensor([1.0, 2.0]), low=0.1, high=4.0, label=torch.arange(2, device=GPU)
    ),
    "clip": lambda m, c: clip(m, -1.0, 1.0),
    "threshold": lambda m, c: threshold(m, 0.9),
}


def _guidance(name: str, made: Callable[[ScoreModel, NoisyClassifier], ScoreModel]) -> None:
    @case(f"guidance: {name}")
    def work(bench: Bench) -> list[str]:
        model, _ = vp(**LABELLED)
        guided = made(model, judge())
        x, (far, near) = torch.randn(2, *SHAPE, device=GPU), torch.tensor([1.0, 0.3], dtype=torch.float64)
        guided(x, near)
        with bench.watched() as waits:
            for t in (far, near):  # outside of an interval, and in it
                guided(x, t)
        guided(x, torch.stack([near, far]))
        if name in ("a scale each, rescaled", "threshold"):
            log_likelihood(guided, x, rtol=0.9, atol=0.9, t_min=T_MIN, method="bosh3")
        return waits


def judge() -> NoisyClassifier:
    """A classifier with a quick network; the package's own is trained above."""
    return NoisyClassifier(Votes(None, SHAPE, 3), vp(**LABELLED)[0].sde, 3).to(GPU).requires_grad_(False)


for name, made in GUIDANCE.items():
    _guidance(name, made)


# --- likelihoods


def _images() -> Tensor:
    return torch.randint(LEVELS, (2, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(GPU)


@case("likelihood: every probe and solver")
def _(bench: Bench) -> list[str]:
    model, _ = vp()
    x = PixelCodec(LEVELS).encode(_images())
    for options in (
        dict(probes=2, method="embedded"),
        dict(probe="gaussian"),
        dict(probe="sphere", method="dopri5"),
        dict(probe=torch.ones(1, *x.shape)),
        dict(method="RK45"),
        dict(seed=torch.Generator().manual_seed(0)),
    ):
        given = {"method": "bosh3", **options}
        found = log_likelihood(model, x, rtol=0.9, atol=0.9, t_min=T_MIN, **given)  # type: ignore[arg-type]
        assert found.log_prob.device == GPU and bool(found.log_prob.isfinite().all())
    points, _ = model_on_gpu(model__name="mlp")
    y = torch.randn(2, 3, device=GPU)
    log_likelihood(points, y, probe="exact", rtol=0.9, atol=0.9, t_min=T_MIN, method="bosh3")
    flow = score_flow(points.requires_grad_(True), solver=Solver("rk4", steps=1))
    flow.log_prob(y, probe="rademacher").mean().backward()
    flow.sample((2, 3))
    points.requires_grad_(False)
    return []


@case("likelihood: the SDE's bound and the chain's")
def _(bench: Bench) -> list[str]:
    model, _ = vp()
    codec, k = PixelCodec(LEVELS), _images()
    waits = []
    for draws in (2, 4):
        with bench.watched() as found:
            variational_bound(model, codec.encode(k), draws=draws)
        waits.append([wait for wait in found if "finite" not in wait])
    variational_bound(model, codec.encode(k), draws=1, decoder=codec.encode(torch.arange(LEVELS)), t_min=1e-2)
    variational_bound(model, codec.encode(k), draws=1, decoder="state")
    for levels in (LEVELS, None):
        for terms in (None, 2):
            grid = times.log_snr(model.sde, 4)
            chain_bound(model, codec.encode(k), grid, levels=levels, terms=terms)
            chain_bound(model, codec.encode(k), grid, levels=levels, terms=terms, seed=torch.Generator().manual_seed(0))
    chain, _ = model_on_gpu(**IDDPM)
    for variance in ("small", "large", "learned"):
        chain_bound(chain, codec.encode(k), levels=LEVELS, variance=variance)  # type: ignore[arg-type]
    return []


def _mode_likelihood(name: str, **changes: object) -> None:
    @case(f"--mode likelihood: {name}")
    def work(bench: Bench) -> list[str]:
        model, config = model_on_gpu(**changes)
        data, text = data_of(config), text_of() if config.model.text_encoder else None
        codec: Codec = PixelCodec(LEVELS) if data.levels else VectorCodec()
        job = bench.job(model, config, codec, data.shape)
        if config.eval.dequantization == "variational":
            split = data.train.to(GPU)
            fit = dict(steps=2, batch_size=2, hidden=4, layers=1, t_min=config.eval.t_min)
            flow = fit_dequantiser(model, split, codec, **fit)  # type: ignore[arg-type]
            path = dequantiser_path(job)
            save_dequantiser(path, flow, checkpoint_sha256=job.trained.sha256)
        _, result = run_likelihood(job, data.test, text)
        assert math.isfinite(result["mean"])
        return []


_mode_likelihood("ode", eval__heat_map=1, eval__dequantizations=2, eval__check_images=1)
_mode_likelihood("embedded", eval__ode_method="embedded", eval__num_images=1)
_mode_likelihood("two probes", eval__probes=2, eval__num_images=1)
_mode_likelihood("truncated normal", eval__dequantization="truncated_normal")
_mode_likelihood("variational", eval__dequantization="variational")
_mode_likelihood("sde_bound", eval__estimate="sde_bound")
_mode_likelihood("bound of a continuous model", eval__estimate="bound", eval__steps=4)
_mode_likelihood("vdm", **VDM)
_mode_likelihood("iddpm", **IDDPM)
_mode_likelihood("ncsn", **NCSN, eval__estimate="ode")
_mode_likelihood("text", **CAPTIONED, eval__heat_map=1)
_mode_likelihood("text, bound", **CAPTIONED, eval__estimate="bound", eval__steps=3)
_mode_likelihood("smaller images", **TRAININGS["smaller images"])
_mode_likelihood("points", model__name="mlp", eval__estimate="bound", eval__steps=3)
_mode_likelihood("points by ode", model__name="mlp")


@case("latents: codes, their bound, and decoding")
def _(bench: Bench) -> list[str]:
    config = config_of(training__objective="autoencoder", model__code_channels=1)
    autoencoder = kind_of(config).build(config, SHAPE).to(GPU).eval().requires_grad_(False)
    codec = AutoencoderCodec(autoencoder, Statistics((0.1,), (0.5,), 0.3), PixelCodec(LEVELS))  # type: ignore[arg-type]
    mean, std = codec.posterior(_images())
    model, config = model_on_gpu(model__attn_resolutions=(), data__autoencoder="given", sampling__method="heun")
    code = smooth_model(config, tuple(mean.shape[1:]))
    latent_bound(codec, _images(), lambda y: log_likelihood(code, y, rtol=0.9, atol=0.9, t_min=T_MIN, method="bosh3"))
    decoded = codec.decode(sample(code, Heun(), tuple(mean.shape), times.log_snr(code.sde, 2)))
    assert decoded.device == GPU and decoded.shape == (2, *SHAPE)
    data = data_of(config)
    for estimate in ("ode", "bound"):
        config.eval.estimate, config.eval.steps = estimate, 3
        run_likelihood(bench.job(code, config, codec, tuple(mean.shape[1:])), data.test)
    run_sampling(bench.job(code, config, codec, tuple(mean.shape[1:])))
    law = Split(mean, std=std).to(GPU)
    config.training.batch_size, config.data.random_flip = 2, False
    state = make_state(config, tuple(mean.shape[1:]), GPU)
    b = Batches(config, codec, state.model.sde).draw(law, 0)  # type: ignore[union-attr]
    train_step(state, kind_of(config).objective(state.model, config, codec), b, config)
    return []


@case("latents: encode, decode, interpolate")
def _(bench: Bench) -> list[str]:
    model, config = vp(**LABELLED, interpolation__pairs=1, interpolation__steps=3)
    codec, data = PixelCodec(LEVELS), data_of(config)
    job = bench.job(model, config, codec)
    config.data.uniform_dequantization = True
    folder, _ = run_encoding(job, data.test)
    run_decoding(job, folder / "latents.npz")
    run_interpolation(job, data.test)
    config.interpolation.between = "seeds"
    run_interpolation(job, None)
    a, b = torch.randn(2, 2, 3, device=GPU)
    slerp(a, b, torch.linspace(0, 1, 3))
    return []


@case("likelihood: heat maps and dequantisers")
def _(bench: Bench) -> list[str]:
    model, _ = vp()
    codec, k = PixelCodec(LEVELS), _images()
    for solver in (Solver("embedded", 0.9, 0.9), Solver("bosh3", 0.9, 0.9)):
        heat_map(model, codec.encode(k), probes=2, solver=solver, t_min=T_MIN)
    flow = VariationalDequantiser(codec, SHAPE, hidden=4, layers=2, t_min=T_MIN).to(GPU).requires_grad_(False)
    for law in (Uniform(codec, 0.8), TruncatedNormal(codec, model.sde, 0.8), flow):
        log_probability(model, k, law, samples=1, rtol=0.9, atol=0.9, method="bosh3")
    return []


# --- inverse problems

OPERATORS: dict[str, Operator] = {
    "mask": Mask(torch.arange(SIZE).remainder(2).bool().expand(SIZE, SIZE)),
    "grey": Grey(torch.full((CHANNELS,), 0.5)),
    "average": Average(2),
    "blur": Blur.gaussian(0.7),
    "dense": Dense(torch.randn(5, CHANNELS * SIZE**2, generator=torch.Generator().manual_seed(0)), SHAPE),
    "linear": Linear(lambda x: x[:, :, ::2, 1:], SHAPE),
}
RESTORING = {
    "dps": lambda m, o: dps(m, o),
    "dps, rate": lambda m, o: dps(m, o, 10.0),
    "pigdm": lambda m, o: pigdm(m, o),
    "ddnm": lambda m, o: ddnm(m, o),
    "moment matching": lambda m, o: moment_matching(m, o, 2),
}


def _restoring(name: str, operator: Operator) -> None:
    @case(f"inverse: {name}")
    def work(bench: Bench) -> list[str]:
        model, _ = vp()
        x, t = torch.randn(2, *SHAPE, device=GPU), torch.tensor(0.5, dtype=torch.float64)
        o = Observation(operator, operator.apply(x), 0.1)
        extra: list[str] = []
        for kind, made in RESTORING.items():
            if name == "linear" and kind in ("pigdm", "ddnm"):
                continue
            restored = made(model, o)
            restored(x, t)
            with bench.watched() as found:
                restored(x, t)
            extra += [f"{kind}: {wait}" for wait in found]
        if name != "linear":
            for sampler in (Ancestral(), PredictorCorrector(), DDIM()) if name == "mask" else (Ancestral(),):
                sample(model, Projected(sampler, o, 2), (2, *SHAPE), times.log_snr(model.sde, 1))
            if name == "mask":
                found = twisted(model, o, (2, *SHAPE), times.log_snr(model.sde, 2), particles=3)
                assert found.mean.device == GPU
                found.draw(torch.Generator().manual_seed(0))
            o.project(x)
        return extra


for name, operator in OPERATORS.items():
    _restoring(name, operator)


@case("--mode inpaint and its like")
def _(bench: Bench) -> list[str]:
    for method in METHODS:
        sampler = dict(sampling__predictor="ancestral_sampling")
        model, config = vp(inverse__method=method, inverse__particles=2, inverse__noise=0.1, **sampler)
        config.inverse.factor, config.inverse.resamplings = 2, 2
        for task in ("superresolve", "colorize") if method == "pigdm" else ("superresolve",):
            run_restoring(bench.job(model, config, PixelCodec(LEVELS)), task, data_of(config))
    return []


def pretended(gpu: Pretending) -> None:
    """The device itself: CUDA's refusals, and its waits."""
    there, here = torch.ones(3, device=GPU), torch.ones(3)
    half = torch.tensor(0.5)
    refused: list[Callable[[], object]] = [
        lambda: there + here,
        lambda: torch.addcmul(there, half, there),
        lambda: torch.cat([there, half[None]]),
        lambda: here[torch.zeros(1, dtype=torch.int64, device=GPU)],
        lambda: torch.randn(3, generator=torch.Generator(GPU).manual_seed(0)),
        lambda: torch.randn(3, generator=torch.Generator().manual_seed(1), device=GPU),
        lambda: here.add_(there),
    ]
    for work in refused:
        try:
            work()
        except Refused:
            continue
        raise AssertionError(f"not refused: {work}")
    assert not gpu.waits
    assert torch.equal((there + half).cpu(), here + half) and len(gpu.waits) == 1
    for wait in (there.sum().item, lambda: bool(there.any()), lambda: there[there > 0], lambda: half.to(GPU)):
        before = len(gpu.waits)
        wait()  # type: ignore[operator]
        assert len(gpu.waits) > before
    before = len(gpu.waits)
    there += half.to(GPU, non_blocking=True) * there.mean()
    assert len(gpu.waits) == before and torch.equal(there.cpu(), torch.full((3,), 1.5))


def main() -> None:
    found: dict[str, dict[str, Any]] = {}
    wanted = sys.argv[1:]
    with pretending() as gpu:
        pretended(gpu)
        found["pretend"] = {"refused": None, "waits": []}
    for name, work in CASES.items():
        if wanted and not any(word in name for word in wanted):
            continue
        with pretending() as gpu, tempfile.TemporaryDirectory() as folder:
            try:
                found[name] = {"refused": None, "waits": work(Bench(gpu, Path(folder)))}
            except Exception:
                found[name] = {"refused": traceback.format_exc(), "waits": []}
    print(json.dumps(found), flush=True)
    os._exit(0)  # autograd's thread for the device does not end with the interpreter


if __name__ == "__main__":
    torch.set_num_threads(1)
    from tests.machine.pretend_gpu import GPU, Pretending, Refused, pretending

    main()
