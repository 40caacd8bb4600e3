"""Rules between the keys of a config: each is a condition, and the sentence that refuses values which meet it.

What a single key may be is in `keys.py`. Rules between keys and the command line's options are in
`tasks/options.py`, those between a config and a checkpoint in `tasks/job.py`, `conditions.py`, `codes.py` and
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
from .objective import DECODED, TWICE, WEIGHTED

Rules = Iterator[str]  # a sentence for each rule that the config breaks


def check(config: ConfigDict) -> None:
    """Raise ValueError, in one sentence, for the first values that cannot stand together."""
    if config.device != "auto":
        try:
            torch.device(config.device)
        except RuntimeError:
            raise ValueError(f"device must be auto, cpu, cuda, cuda:N or mps, got {config.device!r}") from None
    for rules in _RULES:
        for sentence in rules(config):
            raise ValueError(sentence)


# The usual ranges of numbers whose extremes make a loss infinite or NaN.
_USUAL: dict[str, tuple[float, float]] = {
    "optim.lr": (1e-8, 0.1), "optim.eps": (1e-16, 1e-2), "optim.weight_decay": (0, 1),
    "optim.grad_clip": (-math.inf, 1e4), "training.kl_weight": (0, 1e4), "training.difference_step": (1e-4, 1),
    "training.soft_truncation": (0, 10), "model.sigma_data": (1e-2, 1e3), "model.sigma_min": (1e-6, 10),
    "model.sigma_max": (0.1, 1e5), "model.beta_min": (1e-6, 10), "model.beta_max": (0.1, 200),
    "model.gamma_min": (-40, 5), "model.gamma_max": (-5, 40), "model.init_scale": (0, 10),
    "model.fourier_scale": (1e-3, 1e3), "model.fourier_features": (0, 16),
}


def suspects(config: ConfigDict) -> str:
    """Unusual values that may have made a loss infinite or NaN: "; the likely reason is optim.lr=1e+06 ...", or ""."""
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
    if d.dataset != "files" and max(d.file_bits, d.bits) > 0:
        yield f"data.file_bits and data.bits are for image files: leave them 0 for data.dataset={d.dataset}"


def _autoencoder(config: ConfigDict) -> Rules:
    """Training of autoencoders."""
    t, d, m = config.training, config.data, config.model
    if t.objective != AUTOENCODE:
        return
    if m.name != "ncsnpp" or d.dataset in TOYS:
        yield "training.objective=autoencoder needs images and ncsnpp's blocks: set model.name=ncsnpp and data.dataset"
    if len(m.ch_mult) < 2:
        yield ("training.objective=autoencoder halves the images at every level except the last: give model.ch_mult 2 "
               f"numbers or more, not {m.ch_mult}")
    if d.uniform_dequantization or m.class_conditional or m.super_resolution > 0 or m.text_encoder:
        yield ("training.objective=autoencoder decodes levels and takes no condition: set "
               "data.uniform_dequantization=False, model.class_conditional=False, model.super_resolution=0 and "
               "model.text_encoder=''")
    if not t.continuous or t.sde == "learned" or t.time != "uniform" or t.soft_truncation > 0:
        yield ("training.objective=autoencoder has no noise levels: leave training.sde, training.continuous, "
               "training.time and training.soft_truncation alone")


def _codes(config: ConfigDict) -> Rules:
    """Models of an autoencoder's codes."""
    s, e, d, m = config.sampling, config.eval, config.data, config.model
    if not d.autoencoder:
        return
    if config.training.objective == AUTOENCODE or d.dataset in TOYS or m.super_resolution > 0:
        yield ("data.autoencoder is for models of an image's codes, not for vectors, another autoencoder or "
               "model.super_resolution: leave it empty")
    if d.uniform_dequantization or not d.centered:
        yield ("data.autoencoder makes codes, which have no levels and lie around 0: set "
               "data.uniform_dequantization=False and data.centered=True")
    if s.clip_denoised or e.clip_denoised or s.threshold > 0:
        yield ("data.autoencoder makes codes, which have no range to be clipped to: set sampling.clip_denoised=False, "
               "eval.clip_denoised=False and sampling.threshold=0")
    if e.dequantization != "uniform" or e.importance_samples > 1 or e.heat_map > 0:
        yield ("data.autoencoder makes codes, whose bound does not split into pixels: leave eval.dequantization, "
               "eval.importance_samples and eval.heat_map alone")


def _classes(config: ConfigDict) -> Rules:
    """Models conditioned on classes, and classifiers."""
    t, s, m = config.training, config.sampling, config.model
    classifies = t.objective == CLASSIFY
    if classifies and (m.name not in ("ncsnpp", "mlp") or not m.conditional or m.class_conditional):
        yield ("training.objective=cross_entropy trains a classifier, which takes the time but no class: set "
               "model.name to ncsnpp (its way down) or mlp, model.conditional=True and model.class_conditional=False")
    if classifies and t.sde == "learned":
        yield ("training.objective=cross_entropy learns no noise schedule: set training.sde to that of the model that "
               "the classifier will guide")
    if m.class_conditional and (m.name in ("ncsn", "ncsnv2") or not m.conditional):
        yield ("model.class_conditional is for networks that take the time: set model.name to ddpm, ncsnpp, adm, "
               "edm2, dit or mlp, and model.conditional=True")
    if not (m.class_conditional or classifies) and m.num_classes > 0:
        yield "model.num_classes is for class-conditional models and classifiers: set model.class_conditional=True"
    if not m.class_conditional and not s.classifier and len(s.labels) > 0:
        yield ("sampling.labels need a class-conditional model or a classifier: set model.class_conditional=True, or "
               "sampling.classifier to the workdir of one")
    if t.condition_dropout == 1 and (m.class_conditional or m.text_encoder) and not classifies:
        yield "training.condition_dropout=1 drops every label and caption: set it to 0.1"


def _guidance(config: ConfigDict) -> Rules:
    """Guidance."""
    s, m = config.sampling, config.model
    if s.negative_label != -1 and (not m.class_conditional or s.classifier or s.guidance_checkpoint):
        yield (f"sampling.negative_label={s.negative_label} is for classifier-free guidance of a class-conditional "
               "model: set model.class_conditional=True, and leave sampling.classifier and "
               "sampling.guidance_checkpoint alone")
    if not (m.class_conditional or m.text_encoder or s.classifier or s.guidance_checkpoint) and s.guidance != 1:
        yield (f"sampling.guidance={s.guidance:g} has no effect without a condition: set model.class_conditional=True, "
               "sampling.classifier or sampling.guidance_checkpoint")
    if s.classifier and (s.guidance_checkpoint or s.guidance_rescale > 0):
        yield ("sampling.classifier excludes other guidance: leave sampling.guidance_checkpoint and "
               "sampling.guidance_rescale alone")
    if 0 < s.guidance_high <= s.guidance_low:
        yield f"sampling.guidance_low={s.guidance_low:g} must be below sampling.guidance_high={s.guidance_high:g}"


def _images_and_texts(config: ConfigDict) -> Rules:
    """Models conditioned on smaller images, or on texts."""
    t, s, m = config.training, config.sampling, config.model
    networks = ("ddpm", "ncsnpp", "adm", "dit")
    if (m.super_resolution > 0 or m.text_encoder) and m.name not in networks and not own_code.is_own(m.name):
        yield (f"model.super_resolution and model.text_encoder are for {', '.join(networks)}: set model.name to one of "
               f"these, not {m.name}")
    if m.super_resolution == 0 and (t.augmentation > 0 or s.augmentation > 0 or s.base):
        yield ("training.augmentation, sampling.augmentation and sampling.base are for super-resolution models: set "
               "model.super_resolution")
    told = m.name in ("ddpm", "ncsnpp", "adm") and m.conditional and t.objective not in (CLASSIFY, AUTOENCODE)
    pixels = config.data.dataset not in TOYS and not config.data.autoencoder and m.super_resolution == 0
    if t.geometric > 0 and not (told and pixels):
        yield (f"training.geometric={t.geometric:g} moves pixels, and tells a U-Net how: set model.name to ddpm, "
               "ncsnpp or adm and model.conditional=True, and leave data.autoencoder and model.super_resolution alone")
    if t.geometric > 0 and (t.objective in DECODED or m.learn_ends):
        yield (f"training.geometric={t.geometric:g} leaves no pixel at a level to decode: set it to 0, or "
               "training.objective=denoising and model.learn_ends=False")
    if max(m.image_channels, m.text_width, m.pooled_width) > 0 and m.name in ("edm2", "mlp", "ncsn", "ncsnv2"):
        yield ("model.image_channels, model.text_width and model.pooled_width are for networks with such conditions: "
               f"set model.name to ddpm, ncsnpp, adm or dit, not {m.name}")


def _training(config: ConfigDict) -> Rules:
    """Batches, training on the steps of a chain, and objectives that are bounds of it, which learn variances."""
    t, s, d, m = config.training, config.sampling, config.data, config.model
    discrete = not t.continuous
    if t.batch_size % t.accumulate != 0:
        yield f"training.batch_size={t.batch_size} is not divisible by training.accumulate={t.accumulate}: set others"
    if discrete and t.sde not in CHAINS:
        yield f"training.continuous=False needs training.sde to be one of {', '.join(CHAINS)}, got {t.sde!r}"
    if discrete and (t.time not in ("uniform", "second_moment") or t.likelihood_weighting):
        yield ("training.continuous=False draws the chain's steps uniformly or by second_moment: leave "
               "training.time=uniform and training.likelihood_weighting=False")
    if not discrete and (t.time == "second_moment" or t.objective in DECODED):
        yield (f"training.{'time=second_moment' if t.time == 'second_moment' else f'objective={t.objective}'} needs "
               "the steps of a chain: set training.continuous=False")
    if t.objective == "hybrid" and not m.learned_variance:
        yield "training.objective=hybrid trains the variances beside L_simple: set model.learned_variance=True"
    if m.learned_variance and t.objective not in DECODED:
        yield (f"training.objective={t.objective} trains no variances: set it to hybrid or vlb, or "
               "model.learned_variance=False")
    if t.objective in DECODED and m.num_scales < 2:
        yield f"training.objective={t.objective} needs a chain of at least 2 steps, not model.num_scales={m.num_scales}"
    if t.objective in DECODED and d.uniform_dequantization:
        yield f"training.objective={t.objective} decodes levels: set data.uniform_dequantization=False"
    if s.variance == "learned" and not m.learned_variance:
        yield "sampling.variance=learned needs a network that learned them: set model.learned_variance=True"


def _times(config: ConfigDict) -> Rules:
    """Laws of t, weights of the loss, and objectives that take derivatives of the network."""
    t, m = config.training, config.model
    if t.time == "importance" and not t.likelihood_weighting:
        yield "training.time=importance draws t by the likelihood weight: set training.likelihood_weighting=True"
    if t.time == "log_snr" and t.likelihood_weighting:
        yield "training.time=log_snr already weights by likelihood: set training.likelihood_weighting=False"
    other = t.likelihood_weighting or t.time == "edm"
    if t.min_snr > 0 and (other or t.objective in (*DECODED, *WEIGHTED, CLASSIFY, AUTOENCODE)):
        yield (f"training.min_snr={t.min_snr:g} is a weight of the noise error, in place of others: set "
               "training.likelihood_weighting=False, another training.time than edm and training.objective=denoising")
    if t.uncertainty and (t.objective not in ("denoising", *WEIGHTED) or t.sde == "learned"):
        yield ("training.uncertainty is the logarithm of a squared error at fixed noise levels: set "
               "training.objective=denoising, and training.sde to any but learned")
    if t.objective in WEIGHTED and (other or not t.continuous):
        yield (f"training.objective={t.objective} has the velocity's weight: set training.likelihood_weighting=False, "
               "training.continuous=True and another training.time than edm (log_normal draws the same times)")
    if t.coupling != "independent":
        yield from _coupled(config)
    if t.time == "edm" and (t.likelihood_weighting or m.rule != "edm"):
        yield ("training.time=edm has EDM's weight, of model.sigma_data: set training.likelihood_weighting=False and "
               "model.rule=edm")
    learned = t.sde == "learned"
    if learned and not (t.likelihood_weighting and t.time == "uniform" and m.label == "log_sigma"):
        yield ("training.sde=learned needs a loss whose mean is the same for every shape of the schedule: set "
               "training.likelihood_weighting=True, training.time=uniform and model.label=log_sigma")
    if t.soft_truncation > 0 and (not t.continuous or learned or t.time == "log_snr" or m.t_min == 0):
        yield ("training.soft_truncation needs continuous times and no learned SDE: set training.continuous=True, "
               "training.time=uniform or importance (which is log_snr with weights), model.t_min above 0 and "
               "training.sde")
    if t.objective in TWICE and t.compile:
        yield (f"training.objective={t.objective} needs second derivatives, which torch.compile does not compute: set "
               "training.compile=False, or training.objective=denoising or finite_difference")
    if t.objective == "finite_difference" and t.precision == "bfloat16":
        yield ("training.objective=finite_difference subtracts numbers too close for bfloat16: set "
               "training.precision=float32, or training.objective=sliced_vr")
    if t.objective == "finite_difference" and m.dropout > 0:
        yield ("training.objective=finite_difference would compare two dropout masks: set model.dropout=0, or "
               "training.objective=sliced_vr")


def _coupled(config: ConfigDict) -> Rules:
    """What holds where noise and data are coupled: the flow, but no score."""
    t, s, m, e = config.training, config.sampling, config.model, config.eval
    if t.objective not in WEIGHTED or m.class_conditional or m.text_encoder or m.super_resolution:
        yield (f"training.coupling={t.coupling} is for flow matching without conditions, which it would mix: set "
               "training.objective=flow_matching and no condition, or training.coupling=independent")
    if s.method in ("pc", "ald", "edm", "adaptive_sde") or (s.method in ("ddim", "dpm_solver++") and s.eta > 0):
        yield (f"training.coupling={t.coupling} trains a flow that is not that of a score, which sampling with noise "
               "needs: set sampling.method=fast, heun, ode or another without noise, and sampling.eta=0")
    if e.estimate in ("sde_bound", "bound"):
        yield (f"training.coupling={t.coupling} trains a flow that is not that of a score, which eval.estimate="
               f"{e.estimate} needs: set eval.estimate=ode")


def _noise(config: ConfigDict) -> Rules:
    """The noise of an SDE or a chain."""
    t, s, e, m = config.training, config.sampling, config.eval, config.model
    discrete = not t.continuous
    if m.sigma_min >= m.sigma_max:
        yield f"model.sigma_min={m.sigma_min:g} must be below model.sigma_max={m.sigma_max:g}"
    if m.beta_min > m.beta_max:
        yield f"model.beta_min={m.beta_min:g} must not exceed model.beta_max={m.beta_max:g}"
    if discrete and t.sde == "vpsde" and m.beta_max >= m.num_scales:
        yield (f"a chain of model.num_scales={m.num_scales} steps is too coarse for model.beta_max={m.beta_max:g}: set "
               "more steps, for beta_max/num_scales must be below 1")
    if m.gamma_min >= m.gamma_max:
        yield f"model.gamma_min={m.gamma_min:g} must be below model.gamma_max={m.gamma_max:g}"
    pure = ("linear", "trigonometric")
    if t.sde in pure and (m.rule in ("noise", "residual", "score") or m.label in ("sigma", "log_sigma", "edm")):
        yield (f"training.sde={t.sde} has no signal at t = 1, where model.rule={m.rule} or model.label={m.label} is "
               "infinite: set model.rule=velocity, v, data or edm, and model.label=time")
    vanishing = t.sde in ("vpsde", "subvpsde", "cosine", *pure)
    for name, t_min in (("model.t_min", m.t_min), ("sampling.t_min", s.t_min), ("eval.t_min", e.t_min)):
        if vanishing and not discrete and t_min == 0:
            yield f"{name} must be above 0 for training.sde={t.sde}: its score diverges at 0; 1e-5 is usual"


def _network(config: ConfigDict) -> Rules:
    """The network, the label of the time that it takes, and the sizes of its levels and filters."""
    m, own = config.model, own_code.is_own(config.model.name)
    if (m.label == "index" or m.rule == "mean") and config.training.continuous:
        yield "model.label=index and model.rule=mean need the steps of a chain: set training.continuous=False"
    if m.name == "ncsn" and m.label != "index":
        yield f"model.name=ncsn has parameters for each noise level of a chain: set model.label=index, not {m.label!r}"
    if m.name == "edm2" and m.label != "edm":
        yield f"model.name=edm2 has waves for labels of order 1: set model.label=edm, not {m.label!r}"
    refinenet = m.name in ("ncsn", "ncsnv2")
    if refinenet and m.dropout > 0:
        yield f"model.name={m.name} has no dropout: set model.dropout=0, not {m.dropout:g}"
    if refinenet and len(m.ch_mult) < 3:
        yield (f"model.name={m.name} has at least 3 stages, the last two dilated: give model.ch_mult 3 numbers or "
               f"more, not {m.ch_mult}")
    if refinenet and m.nf < 2:
        yield f"model.name={m.name} normalises over channels: model.nf must be at least 2, got {m.nf}"
    fourier = m.embedding_type == "fourier" and m.name not in ("ddpm", "adm", "edm2", "dit", "ncsn", "ncsnv2")
    if fourier and not own and m.label != "sigma":
        yield f"model.embedding_type=fourier takes the logarithm of the label: set model.label=sigma, not {m.label!r}"
    if not fourier and not own and m.label == "sigma" and m.name != "ncsnv2":
        yield "model.embedding_type=positional needs labels as large as 999 t: set model.label=log_sigma, not 'sigma'"
    if min(m.attn_resolutions, default=1) < 1:
        yield f"model.attn_resolutions must be image sizes, or () for no attention, got {m.attn_resolutions}"
    if not all(0 <= n <= 30 for n in m.fourier_features):
        yield f"model.fourier_features must lie between 0 and 30, got {m.fourier_features}: float32 has no finer waves"
    if m.fir and (sum(m.fir_kernel, 0) <= 0 or len(m.fir_kernel) > 32):
        yield f"model.fir_kernel must have a sum above 0 and at most 32 numbers, got {m.fir_kernel}"
    if len(m.ch_mult) == 0 or min(m.ch_mult) < 1:
        yield f"model.ch_mult must hold positive integers, one per level, got {m.ch_mult}"


def _network_and_data(config: ConfigDict) -> Rules:
    """The data that a network takes, and clipping to their range."""
    s, e, d, m = config.sampling, config.eval, config.data, config.model
    own = own_code.is_own(m.name)
    if m.name == "mlp" and not (d.dataset in TOYS or d.dataset == "files" or own_code.is_own(d.dataset)):
        yield f"model.name=mlp is for vectors: for the images of data.dataset={d.dataset} set it to ncsnpp or ddpm"
    if m.name != "mlp" and not own and d.dataset in TOYS:
        yield f"model.name={m.name} is for images: for the vectors of data.dataset={d.dataset} set it to mlp"
    if d.random_flip and d.dataset in TOYS:
        yield f"data.random_flip mirrors images: for the vectors of data.dataset={d.dataset} set it to False"
    for name, clipped in (("sampling", s.clip_denoised), ("eval", e.clip_denoised)):
        if clipped and d.dataset in TOYS:
            yield f"{name}.clip_denoised clips pixels: for the vectors of data.dataset={d.dataset} set it to False"
    if s.threshold > 0 and (s.clip_denoised or d.dataset in TOYS):
        yield (f"sampling.threshold={s.threshold:g} scales pixels into their range, in place of clipping: set it to 0 "
               "for vectors, and sampling.clip_denoised=False for images")


def _sampler(config: ConfigDict) -> Rules:
    """The sampler, and where it begins."""
    t, s, m = config.training, config.sampling, config.model
    discrete = not t.continuous
    if s.churn_low > s.churn_high:
        yield f"sampling.churn_low={s.churn_low:g} must not exceed sampling.churn_high={s.churn_high:g}"
    if s.eta > 0 and s.method not in ("ddim", "dpm_solver++"):
        yield (f"sampling.eta={s.eta:g} is noise of ddim and dpm_solver++: set it to 0 for sampling.method={s.method}")
    if s.grid == FITTED and (not METHODS[s.method].fitted or s.eta > 0):
        yield ("sampling.grid=fitted is for solvers without noise: set sampling.method to one of "
               f"{', '.join(name for name, method in METHODS.items() if method.fitted)}, and sampling.eta=0")
    if s.ema > 0 and "raw" in (s.weights, config.eval.weights):
        yield f"sampling.ema={s.ema:g} is an average: set sampling.weights=ema and eval.weights=ema, or sampling.ema=0"
    if s.method == "pc" and s.predictor == s.corrector == "none":
        yield "sampling.predictor and sampling.corrector are both none: set one of them"
    if s.method == "pc" and s.probability_flow and s.predictor == "ancestral_sampling":
        yield "sampling.probability_flow excludes ancestral_sampling: set sampling.method=ddim, its steps without noise"
    if s.method == "pc" and s.probability_flow and s.predictor == "reverse_diffusion" and t.sde != "learned":
        check_flow(build_sde(config), s.start)
    if not discrete and s.start <= s.t_min:
        yield f"sampling.start={s.start:g} must be above sampling.t_min={s.t_min:g}, where sampling stops"
    if discrete and round(s.start * m.num_scales) < 2:
        yield (f"sampling.start={s.start:g} leaves fewer than 2 of the chain's model.num_scales={m.num_scales} steps: "
               f"set it to {2 / m.num_scales:g} or more")
    if s.start < 1 and s.grid == FITTED:
        yield (f"sampling.grid=fitted begins at t = 1: for sampling.start={s.start:g} set another grid, such as "
               "log_snr")
    if s.start < 1 and s.temperature != 1:
        yield (f"sampling.temperature={s.temperature:g} scales the draw from the prior, which "
               f"sampling.start={s.start:g} does not make: set one of them to 1")
    if s.start < 1 and m.super_resolution > 0:
        yield (f"sampling.start={s.start:g} begins with the images of --input, which "
               f"model.super_resolution={m.super_resolution} enlarges instead: set sampling.start=1")


def _steps(config: ConfigDict) -> Rules:
    """The steps of samplers."""
    t, s, m = config.training, config.sampling, config.model
    discrete = not t.continuous
    if s.step_lr > 0 and "ald" not in (s.method, s.corrector if s.method == "pc" else ""):
        yield "sampling.step_lr is for annealed Langevin dynamics: set sampling.method=ald, or sampling.step_lr=0"
    if s.step_lr > 0 and t.sde not in ("vesde", "edm"):
        yield f"sampling.step_lr is for vesde and edm: for training.sde={t.sde} set sampling.snr and step_lr=0"
    if s.step_lr >= 2 * m.sigma_min**2:
        yield (f"sampling.step_lr={s.step_lr:g} must be below 2 model.sigma_min²={2 * m.sigma_min**2:g}: Langevin "
               "dynamics would diverge")
    if s.shift != 1 and (discrete or s.grid == FITTED or METHODS[s.method].grid == "ends"):
        yield (f"sampling.shift={s.shift:g} moves the times of an even grid: set it to 1 for chains, for fitted grids "
               "and for methods that choose their own steps")
    if discrete and s.grid != "uniform":
        yield f"training.continuous=False samples on the chain's steps: sampling.grid must be uniform, got {s.grid!r}"
    if discrete and not 2 <= s.steps <= m.num_scales:
        yield f"sampling.steps must be between 2 and the chain's model.num_scales={m.num_scales}, got {s.steps}"


def _likelihood(config: ConfigDict) -> Rules:
    """Likelihoods and bounds."""
    t, e, d, m = config.training, config.eval, config.data, config.model
    discrete = not t.continuous
    if discrete and e.steps > m.num_scales:
        yield f"eval.steps must be at most the chain's model.num_scales={m.num_scales}, got {e.steps}"
    decoded = e.estimate == "bound" or (e.estimate == "auto" and discrete)
    noise = e.dequantization != "uniform" or e.importance_samples > 1 or e.heat_map > 0
    if decoded and noise:
        yield ("eval.estimate=bound decodes levels without dequantization: set eval.estimate=ode, or leave "
               "eval.dequantization, eval.importance_samples and eval.heat_map alone")
    if e.dequantization == "truncated_normal" and (d.uniform_dequantization or e.estimate == "sde_bound"):
        yield ("eval.dequantization=truncated_normal is for the ODE of a model trained without dequantization: set "
               "data.uniform_dequantization=False and eval.estimate=ode, or eval.dequantization=uniform")
    if e.estimate == "sde_bound" and (discrete or e.importance_samples > 1 or e.heat_map > 0):
        yield ("eval.estimate=sde_bound is for continuous models, without eval.importance_samples or eval.heat_map: "
               "set eval.estimate=ode (or bound) for these")
    terms = (e.steps or m.num_scales) - 1 if discrete else e.steps or 1000
    if e.terms > terms:
        yield f"eval.terms must be at most the bound's {terms} diffusion terms, got {e.terms}"


_RULES = (
    *(_data, _autoencoder, _codes, _classes, _guidance, _images_and_texts, _training, _times, _noise, _network),
    *(_network_and_data, _sampler, _steps, _likelihood),
)
