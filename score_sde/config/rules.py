"""What must hold between the keys of a config: each rule is what would be wrong, and the sentence that refuses it.

What a single key may be stands in `keys.py`. Rules between keys and the command line's options are in
`tasks/options.py`, those between a config and a checkpoint in `tasks/carried.py`, `conditions.py`, `codes.py` and
`origin.py`, and those between a config and its data where these have been read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from ml_collections import ConfigDict

from ..data.images import Pixels
from ..data.toys import TOYS
from ..machine import own_code
from ..samplers.stochastic import check_flow
from .build import AUTOENCODE, CHAINS, CLASSIFY, FITTED, METHODS, build_sde
from .objective import DECODED, TWICE

Rules = Iterator[tuple[bool, str]]  # whether it is broken, and what is to be said then


def check(config: ConfigDict) -> None:
    """Raise ValueError, in one sentence, for the first values that are impossible beside one another."""
    if config.device != "auto":
        try:
            torch.device(config.device)
        except RuntimeError:
            raise ValueError(f"device must be auto, cpu, cuda, cuda:N or mps, got {config.device!r}") from None
    for rules in _RULES:
        for wrong, sentence in rules(config):
            if wrong:
                raise ValueError(sentence)


# What numbers usually are whose extremes end in a loss that is not finite.
_USUAL: dict[str, tuple[float, float]] = {
    "optim.lr": (1e-8, 0.1),
    "optim.eps": (1e-16, 1e-2),
    "optim.weight_decay": (0, 1),
    "optim.grad_clip": (-math.inf, 1e4),
    "training.kl_weight": (0, 1e4),
    "training.difference_step": (1e-4, 1),
    "training.soft_truncation": (0, 10),
    "model.sigma_data": (1e-2, 1e3),
    "model.sigma_min": (1e-6, 10),
    "model.sigma_max": (0.1, 1e5),
    "model.beta_min": (1e-6, 10),
    "model.beta_max": (0.1, 200),
    "model.gamma_min": (-40, 5),
    "model.gamma_max": (-5, 40),
    "model.init_scale": (0, 10),
    "model.fourier_scale": (1e-3, 1e3),
    "model.fourier_features": (0, 16),
}


def suspects(config: ConfigDict) -> str:
    """What in a config may be why numbers were not finite: "; the likely reason is optim.lr=1e+06 ...", or ""."""
    culprits = []
    for path, (least, most) in _USUAL.items():
        section, name = path.split(".")
        value = config[section][name]
        if any(not least <= number <= most for number in (value if isinstance(value, tuple) else (value,))):
            usual = f"at most {most:g}" if least == -math.inf else f"between {least:g} and {most:g}"
            culprits.append(f"{path}={value if isinstance(value, tuple) else f'{value:g}'}, which usually is {usual}")
    return f"; the likely reason is {', and '.join(culprits)}" if culprits else ""


def _data(config: ConfigDict) -> Rules:
    """How files are read."""
    d = config.data
    Pixels.of(d)
    yield (
        d.dataset != "files" and max(d.file_bits, d.bits) > 0,
        f"data.file_bits and data.bits are for image files: leave them 0 for data.dataset={d.dataset}",
    )


def _autoencoder(config: ConfigDict) -> Rules:
    """Training of autoencoders."""
    t, d, m = config.training, config.data, config.model
    encodes = t.objective == AUTOENCODE
    yield (
        encodes and (m.name != "ncsnpp" or d.dataset in TOYS),
        "training.objective=autoencoder makes one of images, of ncsnpp's blocks: set model.name=ncsnpp and "
        "data.dataset to images",
    )
    yield (
        encodes and len(m.ch_mult) < 2,
        f"training.objective=autoencoder halves the images at every level but the last: give model.ch_mult two or "
        f"more, not {m.ch_mult}",
    )
    yield (
        encodes and (d.uniform_dequantization or m.class_conditional or m.super_resolution > 0 or bool(m.text_encoder)),
        "training.objective=autoencoder decodes levels, and is conditioned on nothing: set "
        "data.uniform_dequantization=False, model.class_conditional=False, model.super_resolution=0 and "
        "model.text_encoder=''",
    )
    yield (
        encodes and (not t.continuous or t.sde == "learned" or t.time != "uniform" or t.soft_truncation > 0),
        "training.objective=autoencoder knows no noise levels: leave training.sde, training.continuous, training.time "
        "and training.soft_truncation alone",
    )


def _codes(config: ConfigDict) -> Rules:
    """Models of an autoencoder's codes."""
    s, e, d, m = config.sampling, config.eval, config.data, config.model
    coded, encodes = bool(d.autoencoder), config.training.objective == AUTOENCODE
    yield (
        coded and (encodes or d.dataset in TOYS or m.super_resolution > 0),
        "data.autoencoder is for models of codes of images, not for vectors, another autoencoder or "
        "model.super_resolution: leave it empty",
    )
    yield (
        coded and (d.uniform_dequantization or not d.centered),
        "data.autoencoder gives the model codes, without levels and around 0: set data.uniform_dequantization=False "
        "and data.centered=True",
    )
    yield (
        coded and (s.clip_denoised or e.clip_denoised or s.threshold > 0),
        "data.autoencoder gives the model codes, which have no range to be held to: set sampling.clip_denoised=False, "
        "eval.clip_denoised=False and sampling.threshold=0",
    )
    yield (
        coded and (e.dequantization != "uniform" or e.importance_samples > 1 or e.heat_map > 0),
        "data.autoencoder gives the model codes, and the bits of their bound are not of pixels one by one: leave "
        "eval.dequantization, eval.importance_samples and eval.heat_map alone",
    )


def _classes(config: ConfigDict) -> Rules:
    """Models conditioned on classes, and classifiers."""
    t, s, m = config.training, config.sampling, config.model
    classifies = t.objective == CLASSIFY
    yield (
        classifies and (m.name not in ("ncsnpp", "mlp") or not m.conditional or m.class_conditional),
        "training.objective=cross_entropy trains a classifier, which takes the time and not the class: set model.name "
        "to ncsnpp (its way down) or mlp, model.conditional=True and model.class_conditional=False",
    )
    yield (
        classifies and t.sde == "learned",
        "training.objective=cross_entropy learns no noise schedule: give training.sde the SDE of the model that it is "
        "to guide",
    )
    yield (
        m.class_conditional and (m.name in ("ncsn", "ncsnv2") or not m.conditional),
        "model.class_conditional is for networks that take the time: set model.name to ddpm, ncsnpp, adm, dit or "
        "mlp, and model.conditional=True",
    )
    yield (
        not (m.class_conditional or classifies) and m.num_classes > 0,
        "model.num_classes is for class-conditional models and classifiers: set model.class_conditional=True",
    )
    yield (
        not m.class_conditional and not s.classifier and len(s.labels) > 0,
        "sampling.labels are for class-conditional models, or for a classifier: set model.class_conditional=True, or "
        "sampling.classifier to the workdir of one",
    )
    yield (
        t.condition_dropout == 1 and (m.class_conditional or bool(m.text_encoder)) and not classifies,
        "training.condition_dropout=1 never gives the model its label or caption: set it to 0.1",
    )


def _guidance(config: ConfigDict) -> Rules:
    """What guides a model, and by what."""
    s, m = config.sampling, config.model
    yield (
        s.negative_label != -1 and (not m.class_conditional or bool(s.classifier) or bool(s.guidance_checkpoint)),
        f"sampling.negative_label={s.negative_label} is for a class-conditional model that guides by itself: set "
        "model.class_conditional=True, and leave sampling.classifier and sampling.guidance_checkpoint alone",
    )
    yield (
        not (m.class_conditional or m.text_encoder or s.classifier or s.guidance_checkpoint) and s.guidance != 1,
        f"sampling.guidance={s.guidance:g} has nothing to guide by: take a class-conditional model "
        "(model.class_conditional=True), or set sampling.classifier or sampling.guidance_checkpoint",
    )
    yield (
        bool(s.classifier) and (bool(s.guidance_checkpoint) or s.guidance_rescale > 0),
        "sampling.classifier guides by itself: leave sampling.guidance_checkpoint and sampling.guidance_rescale alone",
    )
    yield (
        0 < s.guidance_high <= s.guidance_low,
        f"sampling.guidance_low={s.guidance_low:g} must be below sampling.guidance_high={s.guidance_high:g}",
    )


def _images_and_texts(config: ConfigDict) -> Rules:
    """Models conditioned on smaller images, or on texts."""
    t, s, m = config.training, config.sampling, config.model
    networks = ("ddpm", "ncsnpp", "adm", "dit")
    yield (
        (m.super_resolution > 0 or bool(m.text_encoder)) and m.name not in networks and not own_code.is_own(m.name),
        f"model.super_resolution and model.text_encoder are for {' and '.join(networks)}, not model.name={m.name}",
    )
    yield (
        m.super_resolution == 0 and (t.augmentation > 0 or s.augmentation > 0 or bool(s.base)),
        "training.augmentation, sampling.augmentation and sampling.base are for models that enlarge images: set "
        "model.super_resolution",
    )
    yield (
        max(m.image_channels, m.text_width, m.pooled_width) > 0 and m.name in ("mlp", "ncsn", "ncsnv2"),
        "model.image_channels, model.text_width and model.pooled_width are for networks conditioned on images or texts"
        f": set model.name to ddpm, ncsnpp, adm or dit, not {m.name}",
    )


def _training(config: ConfigDict) -> Rules:
    """Batches, and training on the steps of a chain."""
    t = config.training
    discrete = not t.continuous
    yield (
        t.batch_size % t.accumulate != 0,
        f"training.batch_size={t.batch_size} is not divisible by training.accumulate={t.accumulate}",
    )
    yield (
        discrete and t.sde not in CHAINS,
        f"training.continuous=False needs training.sde to be one of {', '.join(CHAINS)}, got {t.sde!r}",
    )
    yield (
        discrete and (t.time not in ("uniform", "second_moment") or t.likelihood_weighting),
        "training.continuous=False draws the chain's steps evenly or by second_moment: leave training.time=uniform and "
        "training.likelihood_weighting=False",
    )
    yield (
        not discrete and (t.time == "second_moment" or t.objective in DECODED),
        f"training.{'time=second_moment' if t.time == 'second_moment' else f'objective={t.objective}'} needs the steps "
        "of a chain: set training.continuous=False",
    )


def _bounds_of_chains(config: ConfigDict) -> Rules:
    """Objectives that are bounds of a chain, and variances that they learn."""
    t, s, d, m = config.training, config.sampling, config.data, config.model
    yield (
        t.objective == "hybrid" and not m.learned_variance,
        "training.objective=hybrid trains the variances beside L_simple: set model.learned_variance=True",
    )
    yield (
        m.learned_variance and t.objective not in DECODED,
        f"training.objective={t.objective} trains no variances: set it to hybrid or vlb, or "
        "model.learned_variance=False",
    )
    yield (
        t.objective in DECODED and m.num_scales < 2,
        f"training.objective={t.objective} needs a chain of at least 2 steps, got model.num_scales={m.num_scales}",
    )
    yield (
        t.objective in DECODED and d.uniform_dequantization,
        f"training.objective={t.objective} decodes levels: set data.uniform_dequantization=False",
    )
    yield (
        s.variance == "learned" and not m.learned_variance,
        "sampling.variance=learned needs a network that learned them: set model.learned_variance=True",
    )


def _times(config: ConfigDict) -> Rules:
    """Laws of t and weights of the loss."""
    t, m = config.training, config.model
    yield (
        t.time == "importance" and not t.likelihood_weighting,
        "training.time=importance samples t by the likelihood weight: set training.likelihood_weighting=True",
    )
    yield (
        t.time == "log_snr" and t.likelihood_weighting,
        "training.time=log_snr already weights by likelihood: set training.likelihood_weighting=False",
    )
    yield (
        t.time == "edm" and (t.likelihood_weighting or m.rule != "edm"),
        "training.time=edm has EDM's weight, by model.sigma_data: set training.likelihood_weighting=False and "
        "model.rule=edm",
    )
    learned = t.sde == "learned"
    yield (
        learned and not (t.likelihood_weighting and t.time == "uniform" and m.label == "log_sigma"),
        "training.sde=learned has a loss whose mean its shape must leave: set training.likelihood_weighting=True and "
        "training.time=uniform, and give the network the noise level by model.label=log_sigma",
    )
    yield (
        t.soft_truncation > 0 and (not t.continuous or learned or t.time == "log_snr" or m.t_min == 0),
        "training.soft_truncation weights continuous times above model.t_min > 0: set training.continuous=True, "
        "training.time=uniform or importance (which is log_snr with weights) and an SDE that is not learned",
    )


def _derivatives(config: ConfigDict) -> Rules:
    """Objectives that take derivatives of the network."""
    t, m = config.training, config.model
    yield (
        t.objective in TWICE and t.compile,
        f"training.objective={t.objective} takes second derivatives, which torch.compile does not: set "
        "training.compile=False, or take denoising or finite_difference",
    )
    yield (
        t.objective == "finite_difference" and t.precision == "bfloat16",
        "training.objective=finite_difference subtracts what bfloat16 cannot tell apart: set "
        "training.precision=float32, or take sliced_vr",
    )
    yield (
        t.objective == "finite_difference" and m.dropout > 0,
        "training.objective=finite_difference would take the difference of two dropout masks for a derivative: set "
        "model.dropout=0, or take sliced_vr",
    )


def _noise(config: ConfigDict) -> Rules:
    """The noise of an SDE or a chain."""
    t, s, e, m = config.training, config.sampling, config.eval, config.model
    discrete = not t.continuous
    yield (
        m.sigma_min >= m.sigma_max,
        f"model.sigma_min={m.sigma_min:g} must be below model.sigma_max={m.sigma_max:g}",
    )
    yield (m.beta_min > m.beta_max, f"model.beta_min={m.beta_min:g} must not exceed model.beta_max={m.beta_max:g}")
    yield (
        discrete and t.sde == "vpsde" and m.beta_max >= m.num_scales,
        f"a chain of model.num_scales={m.num_scales} steps is too coarse for model.beta_max={m.beta_max:g}: "
        f"beta_max/num_scales must be below 1",
    )
    yield (
        m.gamma_min >= m.gamma_max,
        f"model.gamma_min={m.gamma_min:g} must be below model.gamma_max={m.gamma_max:g}",
    )
    vanishing = t.sde in ("vpsde", "subvpsde", "cosine")
    for name, t_min in (("model.t_min", m.t_min), ("sampling.t_min", s.t_min), ("eval.t_min", e.t_min)):
        yield (
            vanishing and not discrete and t_min == 0,
            f"{name} must be above 0 for training.sde={t.sde}: its score diverges at 0; 1e-5 is usual",
        )


def _network(config: ConfigDict) -> Rules:
    """The network, and its label of the noise."""
    m, own = config.model, own_code.is_own(config.model.name)
    yield (
        (m.label == "index" or m.rule == "mean") and config.training.continuous,
        "model.label=index and model.rule=mean need the steps of a chain: set training.continuous=False",
    )
    yield (
        m.name == "ncsn" and m.label != "index",
        f"model.name=ncsn has parameters for each noise level of a chain: set model.label=index, not {m.label!r}",
    )
    refinenet = m.name in ("ncsn", "ncsnv2")
    yield (
        refinenet and m.dropout > 0,
        f"model.name={m.name} has no dropout: set model.dropout=0, not {m.dropout:g}",
    )
    yield (
        refinenet and len(m.ch_mult) < 3,
        f"model.name={m.name} has at least 3 stages, the last two dilated: give model.ch_mult that many numbers, "
        f"not {m.ch_mult}",
    )
    yield (
        refinenet and m.nf < 2,
        f"model.name={m.name} normalises over channels: model.nf must be at least 2, got {m.nf}",
    )
    fourier = m.embedding_type == "fourier" and m.name not in ("ddpm", "adm", "dit", "ncsn", "ncsnv2")
    yield (
        fourier and not own and m.label != "sigma",
        f"model.embedding_type=fourier takes the logarithm of the label: set model.label=sigma, not {m.label!r}",
    )
    yield (
        not fourier and not own and m.label == "sigma" and m.name != "ncsnv2",
        "model.embedding_type=positional expects labels of the size of 999 t: set model.label=log_sigma, not 'sigma'",
    )


def _sizes(config: ConfigDict) -> Rules:
    """Sizes of the network's levels and filters."""
    m = config.model
    yield (
        min(m.attn_resolutions, default=1) < 1,
        f"model.attn_resolutions must be sizes of images, got {m.attn_resolutions}; () is for no attention",
    )
    yield (
        not all(0 <= n <= 30 for n in m.fourier_features),
        f"model.fourier_features must lie between 0 and 30, got {m.fourier_features}: float32 has no finer waves",
    )
    yield (
        m.fir and (sum(m.fir_kernel, 0) <= 0 or len(m.fir_kernel) > 32),
        f"model.fir_kernel must have a sum above 0 and at most 32 numbers, got {m.fir_kernel}",
    )
    yield (
        len(m.ch_mult) == 0 or min(m.ch_mult) < 1,
        f"model.ch_mult must hold positive integers, one per level, got {m.ch_mult}",
    )


def _network_and_data(config: ConfigDict) -> Rules:
    """The data that a network is for."""
    d, m = config.data, config.model
    own = own_code.is_own(m.name)
    yield (
        m.name == "mlp" and not (d.dataset in TOYS or d.dataset == "files" or own_code.is_own(d.dataset)),
        f"model.name=mlp is for vectors; for the images of data.dataset={d.dataset} use ncsnpp or ddpm",
    )
    yield (
        m.name != "mlp" and not own and d.dataset in TOYS,
        f"model.name={m.name} is for images; for the vectors of data.dataset={d.dataset} use mlp",
    )
    yield (
        d.random_flip and d.dataset in TOYS,
        f"data.random_flip mirrors images; for the vectors of data.dataset={d.dataset} set it to False",
    )


def _clipping(config: ConfigDict) -> Rules:
    """What estimates are held to."""
    s, e, d = config.sampling, config.eval, config.data
    for name, clipped in (("sampling", s.clip_denoised), ("eval", e.clip_denoised)):
        yield (
            clipped and d.dataset in TOYS,
            f"{name}.clip_denoised holds pixels to their range; for the vectors of data.dataset={d.dataset} set it to "
            "False",
        )
    yield (
        s.threshold > 0 and (s.clip_denoised or d.dataset in TOYS),
        f"sampling.threshold={s.threshold:g} draws pixels into their range: set it to 0 for vectors, and "
        "sampling.clip_denoised=False, which would hold them there first",
    )


def _sampler(config: ConfigDict) -> Rules:
    """The sampler."""
    t, s = config.training, config.sampling
    yield (
        s.churn_low > s.churn_high,
        f"sampling.churn_low={s.churn_low:g} must not exceed sampling.churn_high={s.churn_high:g}",
    )
    yield (
        s.eta > 0 and s.method not in ("ddim", "dpm_solver++"),
        f"sampling.eta={s.eta:g} is the noise of ddim and dpm_solver++: sampling.method={s.method} takes none, so set "
        "it to 0",
    )
    yield (
        s.grid == FITTED and (not METHODS[s.method].fitted or s.eta > 0),
        f"sampling.grid=fitted places the steps of a solver without noise: set sampling.method to one of "
        f"{', '.join(name for name, method in METHODS.items() if method.fitted)}, and sampling.eta=0",
    )
    yield (
        s.method == "pc" and s.predictor == s.corrector == "none",
        "sampling.predictor and sampling.corrector are both none: nothing would move; choose one",
    )
    yield (
        s.method == "pc" and s.probability_flow and s.predictor == "ancestral_sampling",
        "sampling.probability_flow has no ancestral_sampling: set sampling.method=ddim, the same steps without noise",
    )
    if s.method == "pc" and s.probability_flow and s.predictor == "reverse_diffusion" and t.sde != "learned":
        check_flow(build_sde(config), s.start)


def _start(config: ConfigDict) -> Rules:
    """Where sampling begins."""
    s, m = config.sampling, config.model
    discrete = not config.training.continuous
    yield (
        not discrete and s.start <= s.t_min,
        f"sampling.start={s.start:g} must be above sampling.t_min={s.t_min:g}, where sampling stops",
    )
    yield (
        discrete and round(s.start * m.num_scales) < 2,
        f"sampling.start={s.start:g} leaves less than 2 of the chain's model.num_scales={m.num_scales} steps: set it "
        f"to {2 / m.num_scales:g} or more",
    )
    yield (
        s.start < 1 and s.grid == FITTED,
        f"sampling.grid=fitted is fitted to paths from t = 1: for sampling.start={s.start:g} take another, such as "
        "log_snr",
    )
    yield (
        s.start < 1 and s.temperature != 1,
        f"sampling.temperature={s.temperature:g} scales the draw from the prior, and with sampling.start={s.start:g} "
        "there is none: set one of them to 1",
    )
    yield (
        s.start < 1 and m.super_resolution > 0,
        f"sampling.start={s.start:g} is for models of whole images, and model.super_resolution={m.super_resolution} "
        "makes this one of smaller ones, which are its --input: set it to 1",
    )


def _steps(config: ConfigDict) -> Rules:
    """The steps of samplers."""
    t, s, m = config.training, config.sampling, config.model
    discrete = not t.continuous
    yield (
        s.step_lr > 0 and "ald" not in (s.method, s.corrector if s.method == "pc" else ""),
        "sampling.step_lr is the step of annealed Langevin dynamics: set sampling.method=ald, or step_lr=0",
    )
    yield (
        s.step_lr > 0 and t.sde not in ("vesde", "edm"),
        f"sampling.step_lr supposes alpha = 1, as of vesde: for training.sde={t.sde} set sampling.snr, and step_lr=0",
    )
    yield (
        s.step_lr >= 2 * m.sigma_min**2,
        f"sampling.step_lr={s.step_lr:g} is not below 2 model.sigma_min²={2 * m.sigma_min**2:g}: "
        f"Langevin dynamics would diverge",
    )
    yield (
        discrete and s.grid != "uniform",
        f"training.continuous=False samples on the chain's steps: sampling.grid must be uniform, got {s.grid!r}",
    )
    yield (
        discrete and not 2 <= s.steps <= m.num_scales,
        f"sampling.steps must be between 2 and the chain's model.num_scales={m.num_scales}, got {s.steps}",
    )


def _likelihood(config: ConfigDict) -> Rules:
    """Likelihoods and bounds."""
    t, e, d, m = config.training, config.eval, config.data, config.model
    discrete = not t.continuous
    yield (
        discrete and e.steps > m.num_scales,
        f"eval.steps must be at most the chain's model.num_scales={m.num_scales}, got {e.steps}",
    )
    decoded = e.estimate == "bound" or (e.estimate == "auto" and discrete)
    noise = e.dequantization != "uniform" or e.importance_samples > 1 or e.heat_map > 0
    yield (
        decoded and noise,
        "the bound of a chain decodes levels without dequantization: set eval.estimate=ode, or leave "
        "eval.dequantization, eval.importance_samples and eval.heat_map alone",
    )
    yield (
        e.dequantization == "truncated_normal" and (d.uniform_dequantization or e.estimate == "sde_bound"),
        "eval.dequantization=truncated_normal is the noised law of levels, for the ODE of a model that was trained on "
        "them: take one trained with data.uniform_dequantization=False, and eval.estimate=ode, or set "
        "eval.dequantization=uniform",
    )
    yield (
        e.estimate == "sde_bound" and (discrete or e.importance_samples > 1 or e.heat_map > 0),
        "eval.estimate=sde_bound is for a continuous model and bounds log p alone: set eval.estimate=ode (or bound) "
        "for training.continuous=False, eval.importance_samples or eval.heat_map",
    )
    terms = (e.steps or m.num_scales) - 1 if discrete else e.steps or 1000
    yield (e.terms > terms, f"eval.terms must be at most the bound's {terms} diffusion terms, got {e.terms}")


_RULES = (
    _data,
    _autoencoder,
    _codes,
    _classes,
    _guidance,
    _images_and_texts,
    _training,
    _bounds_of_chains,
    _times,
    _derivatives,
    _noise,
    _network,
    _sizes,
    _network_and_data,
    _clipping,
    _sampler,
    _start,
    _steps,
    _likelihood,
)
