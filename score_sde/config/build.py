"""Builds SDE, network, model, sampler and times from a config: the tables of its names, and what each name makes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

from .. import samplers
from ..data.augmentation import TOLD
from ..data.captions import encoder_hash, widths
from ..losses import Uncertainty
from ..machine import own_code
from ..models import rules
from ..models.autoencoder import ConvolutionalAutoencoder
from ..models.base import ScoreModel
from ..models.classifier import NoisyClassifier
from ..models.rules import Preconditioned, TimeMap
from ..networks import EDM2, MLP, NCSN, CodeDecoder, CodeEncoder, DiT, Encoder, NCSNv2, UNet
from ..ode.integrators import ADAPTIVE, FIXED
from ..samplers import Sampler, fit_times, times
from ..samplers.exponential import fast
from ..sdes.chains import DDPM, SMLD
from ..sdes.learned import LearnedVPSDE, MonotoneSchedule
from ..sdes.linear import EDMSDE, SDE, VESDE, VPSDE, CosineSDE, LinearSDE, SubVPSDE, TrigonometricSDE

# What makes an SDE, called with the keys of the section model that have the names of its arguments.
SDES: dict[str, Callable[..., SDE]] = {
    **{"vpsde": VPSDE, "subvpsde": SubVPSDE, "vesde": VESDE, "cosine": CosineSDE, "edm": EDMSDE},
    **{"linear": LinearSDE, "trigonometric": TrigonometricSDE},
    "learned": lambda gamma_min, gamma_max, learn_ends, t_min: LearnedVPSDE(
        schedule=MonotoneSchedule(gamma_min, gamma_max, learn_ends=learn_ends), t_min=t_min
    ),
}
CHAINS: dict[str, Callable[[ConfigDict], DDPM | SMLD]] = {
    "vpsde": lambda m: DDPM.from_sde(VPSDE(beta_min=m.beta_min, beta_max=m.beta_max), m.num_scales),
    "vesde": lambda m: SMLD.from_sde(VESDE(sigma_min=m.sigma_min, sigma_max=m.sigma_max), m.num_scales),
    "cosine": lambda m: DDPM.cosine(m.num_scales),
}
RULES = (*rules.RULES, *rules.TIMED_RULES)
LABELS: dict[str, Callable[[ConfigDict], TimeMap]] = {
    "time": lambda m: rules.label_time,
    "sigma": lambda m: rules.label_sigma,
    "log_sigma": lambda m: rules.label_log_sigma,
    "edm": lambda m: rules.label_edm,
    "index": lambda m: partial(rules.label_index, steps=m.num_scales),
}
EMBEDDINGS: dict[str, Literal["sinusoidal", "fourier"]] = {"positional": "sinusoidal", "fourier": "fourier"}
PREDICTORS: dict[str, Callable[[ConfigDict], Sampler | None]] = {
    "euler_maruyama": lambda s: samplers.FixedODE("euler") if s.probability_flow else samplers.EulerMaruyama(),
    "reverse_diffusion": lambda s: samplers.ReverseDiffusion(flow=s.probability_flow),
    "ancestral_sampling": lambda s: samplers.Ancestral(s.variance),
    "none": lambda s: None,
}
CORRECTORS: dict[str, Callable[[ConfigDict], Sampler | None]] = {
    "langevin": lambda s: samplers.Langevin(snr=s.snr, steps=s.n_steps_each),
    "ald": lambda s: samplers.AnnealedLangevin(snr=s.snr, steps=s.n_steps_each),
    "none": lambda s: None,
}


class Method(NamedTuple):
    """What makes the sampler of a sampling.method, and the times that it takes."""

    make: Callable[[ConfigDict], Sampler]
    fitted: bool = False  # whether a grid can be fitted to it, as to solvers without noise
    grid: str = ""  # its grid in place of sampling.grid; "ends": it chooses its own steps between both ends


def _predictor_corrector(s: ConfigDict) -> Sampler:
    """Both samplers of sampling.method=pc, or the one that is not none."""
    both = [sampler for sampler in (PREDICTORS[s.predictor](s), CORRECTORS[s.corrector](s)) if sampler is not None]
    return samplers.PredictorCorrector(*both) if len(both) == 2 else both[0]


def _ode(s: ConfigDict) -> Sampler:
    if s.ode_method in FIXED:
        return samplers.FixedODE(s.ode_method)
    return samplers.AdaptiveODE(s.rtol, s.atol, method=s.ode_method)


METHODS = {
    "pc": Method(_predictor_corrector),
    "ode": Method(_ode),
    "ald": Method(lambda s: samplers.AnnealedLangevin(snr=s.snr, steps=s.n_steps_each)),
    "ddim": Method(lambda s: samplers.DDIM(eta=s.eta), fitted=True),
    "heun": Method(lambda s: samplers.Heun(), fitted=True),
    "edm": Method(lambda s: samplers.Churn(s.churn, s.churn_low, s.churn_high, s.churn_inflate)),
    "dpm_solver": Method(lambda s: samplers.DPMSolver(s.order, s.predict), fitted=True),
    "dpm_solver++": Method(lambda s: samplers.Multistep(s.order, eta=s.eta), fitted=True),
    "deis": Method(lambda s: samplers.Multistep(s.order, "noise"), fitted=True),
    "unipc": Method(lambda s: samplers.UniPC(s.order, s.unipc_variant, s.predict), fitted=True),
    "balanced": Method(lambda s: samplers.Balanced(s.order), fitted=True),
    "fast": Method(lambda s: fast(s.steps), grid="arcsinh"),
    "embedded": Method(lambda s: samplers.EmbeddedODE(s.rtol, s.atol), grid="ends"),
    "adaptive_sde": Method(lambda s: samplers.AdaptiveSDE(s.sde_rtol, s.sde_atol), grid="ends"),
}
_GRIDS = (times.uniform, times.quadratic, times.log_snr, times.karras, times.arcsinh, times.skewed)
GRIDS: dict[str, Callable[..., Tensor]] = {grid.__name__: grid for grid in _GRIDS}  # (sde, steps, start=...)
CLASSIFY = "cross_entropy"  # the objective of classifiers
AUTOENCODE = "autoencoder"  # the objective of autoencoders
FITTED = "fitted"  # the grid that is fitted to the model


def build_sde(config: ConfigDict) -> SDE:
    """The forward SDE; of a discrete model its chain's curves in continuous time."""
    t = config.training
    if not t.continuous:
        return build_chain(config).as_sde()
    if own_code.is_own(t.sde):
        own_code.check_unchanged(t.sde, "training.sde", t.sde_sha256)
        sde: SDE = own_code.make(t.sde, "training.sde", SDE, config.model)
        return sde
    return own_code.with_values(SDES[t.sde], config.model)


def build_chain(config: ConfigDict) -> DDPM | SMLD:
    """The chain of a discrete model (training.continuous=False)."""
    return CHAINS[config.training.sde](config.model)


def build_network(config: ConfigDict, shape: tuple[int, ...]) -> nn.Module:
    """The network for examples of `shape`; its weights depend on seed alone.

    The shape is (D,) for the MLP, (C, L), (C, H, W) or (C, D, H, W) for U-Nets and (C, H, W) for the others. Raises
    ValueError for another shape.
    """
    m = config.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if own_code.is_own(m.name):
            return _own_network(config, shape)
        wanted, ranks = _RANKS.get(m.name, ("images, (C, H, W)", (3,)))
        if len(shape) not in ranks:
            raise ValueError(f"model.name={m.name} is for {wanted}, but the data have shape {tuple(shape)}: set "
                             "another model.name")
        return NETWORKS[m.name](config, shape)


def _own_network(config: ConfigDict, shape: tuple[int, ...]) -> nn.Module:
    """The network that model.name=FILE.py:NAME makes. Raises ValueError if its output has another shape than needed."""
    m = config.model
    own_code.check_unchanged(m.name, "model.name", m.name_sha256)
    network: nn.Module = own_code.make(m.name, "model.name", nn.Module, {**m, "shape": shape})
    wanted = (1, 2 * shape[0] if m.learned_variance else shape[0], *shape[1:])
    with torch.no_grad():
        output = network.eval()(torch.zeros(1, *shape), torch.full((1,), 0.5))
    got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if got != wanted:
        raise ValueError(f"model.name={m.name} must return shape {wanted} for one example x and its time, got {got}")
    return network.train()


def _options(config: ConfigDict, shape: tuple[int, ...], names: str) -> dict[str, Any]:
    """The options of a network's constructor that have these `names`, with the config's values.

    Where the constructor and the section model have one name, they mean the same.
    """
    m = config.model
    every = {**m, **{name: m[key] for name, key in _RENAMED.items()}}
    every |= {"dimensions": len(shape) - 1, "image_size": max(shape[1:], default=0), "centered": config.data.centered}
    every |= {"embedding": EMBEDDINGS[m.embedding_type], "fir": m.fir_kernel if m.fir else None}
    every["checkpoint_activations"] = config.training.checkpoint_activations
    every["movement"] = TOLD if config.training.geometric > 0 else 0
    every["out_channels"] = every["out_features"] = 2 * shape[0] if m.learned_variance else None
    return {name: every[name] for name in names.split()}


_RENAMED = {"width": "nf", "multipliers": "ch_mult", "blocks": "num_res_blocks", "attention": "attn_resolutions"}
_RENAMED |= {"activation": "nonlinearity", "block": "resblock_type", "resample_conv": "resamp_with_conv"}
_RENAMED |= {"heads": "num_heads", "combine": "progressive_combine", "patch": "patch_size", "classes": "num_classes"}
_STAGES = "width multipliers activation centered checkpoint_activations"
_LEVELS = "width multipliers activation centered blocks attention image_size dropout resample_conv heads"
_CONDITIONS = "classes image_channels text_width pooled_width"
_OUTER = "checkpoint_activations dimensions scale_shift head_channels attend_each fourier_features out_channels"
_UNET = f"{_LEVELS} {_CONDITIONS} {_OUTER} movement"
_SONG = "block fir skip_rescale"  # these and _PYRAMIDS are Song et al. 2021's
_PYRAMIDS = "progressive progressive_input combine"


def _ddpm(config: ConfigDict, shape: tuple[int, ...]) -> nn.Module:
    """Ho et al. 2020's U-Net, with GroupNorm of 32 groups."""
    return _unet(config, shape, "sinusoidal", block="ddpm", skip_rescale=False, groups=32)


def _ncsnpp(config: ConfigDict, shape: tuple[int, ...]) -> nn.Module:
    """DDPM++ and NCSN++ of Song et al. 2021, appendix H."""
    names = f"{_SONG} {_PYRAMIDS} fourier_scale init_scale"
    return _unet(config, shape, EMBEDDINGS[config.model.embedding_type], names)


def _adm(config: ConfigDict, shape: tuple[int, ...]) -> nn.Module:
    """ADM, the U-Net of Dhariwal & Nichol 2021, section 3, always with adaptive group normalisation."""
    fixed = dict(scale_shift=True, attend_each=True, skip_rescale=False, project=False, norm_eps=1e-5)
    return _unet(config, shape, "transformer", "init_scale", **fixed)


def _unet(config: ConfigDict, shape: tuple[int, ...], embedding: str, names: str = "", **fixed: Any) -> nn.Module:
    """The U-Net with these options more; it has the `embedding` of the label if it takes the label."""
    if config.training.geometric > 0 and len(shape) != 3:
        raise ValueError(f"training.geometric moves images, but the data have shape {tuple(shape)}: set it to 0")
    options = {**_options(config, shape, f"{_UNET} {names}"), **fixed}
    return UNet(shape[0], **options, embedding=embedding if config.model.conditional else None)


def _edm2(config: ConfigDict, shape: tuple[int, ...]) -> nn.Module:
    """EDM2's U-Net of Karras et al. 2024, configuration G, whose layers preserve magnitudes."""
    names = "width multipliers blocks attention image_size head_channels heads dropout centered"
    return EDM2(shape[0], **_options(config, shape, f"{names} checkpoint_activations dimensions out_channels classes"))


def _dit(config: ConfigDict, shape: tuple[int, ...]) -> nn.Module:
    """DiT, the transformer of Peebles & Xie 2023."""
    m = config.model
    heads = m.hidden // m.head_channels if m.head_channels else m.num_heads
    names = f"patch depth dropout norm feed_forward positions qk_norm {_CONDITIONS}"
    names += " centered checkpoint_activations out_channels"
    return DiT(shape[0], width=m.hidden, heads=heads, **_options(config, shape, names))


def _ncsn(config: ConfigDict, shape: tuple[int, ...]) -> nn.Module:
    """NCSN, the RefineNet of Song & Ermon 2019, whose norms have parameters for each step of the chain."""
    return NCSN(shape[0], levels=config.model.num_scales, **_options(config, shape, _STAGES))


def _ncsnv2(config: ConfigDict, shape: tuple[int, ...]) -> nn.Module:
    """NCSNv2, the RefineNet of Song & Ermon 2020."""
    return NCSNv2(shape[0], **_options(config, shape, _STAGES))


def _mlp(config: ConfigDict, shape: tuple[int, ...]) -> nn.Module:
    """The MLP, for vectors."""
    options = _options(config, shape, "depth embedding fourier_scale dropout classes out_features")
    return MLP(shape[0], width=config.model.hidden, **options)


NETWORKS: dict[str, Callable[[ConfigDict, tuple[int, ...]], nn.Module]] = {
    each.__name__[1:]: each for each in (_ddpm, _ncsnpp, _adm, _edm2, _dit, _ncsn, _ncsnv2, _mlp)
}
_UNETS = ("ddpm", "ncsnpp", "adm", "edm2")
_ANY = ("images, (C, H, W), signals, (C, L), and volumes, (C, D, H, W)", (2, 3, 4))
# What a network takes, in words, and the ranks of these shapes; the others take images.
_RANKS: dict[str, tuple[str, tuple[int, ...]]] = {"mlp": ("vectors, (D,)", (1,)), **dict.fromkeys(_UNETS, _ANY)}


def resolve_classes(config: ConfigDict, classes: int, name: str) -> None:
    """Put the data's number of classes into the config of a class-conditional model, or of a classifier."""
    m = config.model
    if not takes_labels(config):
        return
    if classes == 0:
        whose = "model.class_conditional=False" if m.class_conditional else "training.objective=denoising"
        raise ValueError(f"{name} has no classes, which are whole numbers from 0 or folders: set {whose}, or give data "
                         "with classes")
    if m.num_classes not in (0, classes):
        raise ValueError(f"the config has model.num_classes={m.num_classes}, {name} has {classes} classes: leave it 0")
    m.num_classes = classes


def resolve_conditions(config: ConfigDict, channels: int) -> None:
    """Put the text encoder's widths and the small image's channels into the config. Raises FileNotFoundError."""
    m = config.model
    if m.super_resolution:
        m.image_channels = channels
    if m.text_encoder:
        m.text_width, m.pooled_width = widths(m.text_encoder)
        m.text_sha256 = encoder_hash(Path(m.text_encoder))


def takes_labels(config: ConfigDict) -> bool:
    """Whether training takes the examples' labels."""
    return bool(config.model.class_conditional or config.training.objective == CLASSIFY)


def build_classifier(config: ConfigDict, shape: tuple[int, ...]) -> NoisyClassifier:
    """The classifier of noisy examples of `shape`: the MLP, or the way down of `_ncsnpp`'s U-Net without pyramids."""
    m = config.model
    if (m.name == "mlp") != (len(shape) != 3):
        raise ValueError(f"model.name={m.name} does not classify shape {tuple(shape)}: set model.name=mlp for vectors")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if m.name == "mlp":
            options = _options(config, shape, "depth embedding fourier_scale dropout")
            network: nn.Module = MLP(shape[0], width=m.hidden, out_features=m.num_classes, **options)
        else:
            names = f"{_LEVELS} {_SONG} embedding fourier_scale init_scale scale_shift checkpoint_activations"
            network = Encoder(shape[0], m.num_classes, **_options(config, shape, names))
    return NoisyClassifier(network, build_sde(config), m.num_classes, LABELS[m.label](m), _scale(m))


def code_shape(config: ConfigDict, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the codes of images: all levels but the last halve them. Raises ValueError for other sizes."""
    factor = 2 ** (len(config.model.ch_mult) - 1)
    if len(shape) != 3 or any(size % factor for size in shape[1:]):
        raise ValueError(f"an autoencoder of {len(config.model.ch_mult)} levels (model.ch_mult) is for images whose "
                         f"height and width are multiples of {factor}, but the data have shape {tuple(shape)}")
    return config.model.code_channels, *(size // factor for size in shape[1:])


def build_autoencoder(config: ConfigDict, shape: tuple[int, ...]) -> ConvolutionalAutoencoder:
    """The autoencoder of images of `shape`, with fresh networks of `_ncsnpp`'s blocks."""
    codes, options = code_shape(config, shape), _options(config, shape, f"{_LEVELS} {_SONG} checkpoint_activations")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = CodeEncoder(shape[0], 2 * codes[0], **options)
        decoder = CodeDecoder(shape[0], codes[0], **options)
    return ConvolutionalAutoencoder(encoder, decoder, centered=config.data.centered)


Trainable = Preconditioned | NoisyClassifier | ConvolutionalAutoencoder


def build_model(config: ConfigDict, shape: tuple[int, ...]) -> Preconditioned:
    """The score model with a fresh network for examples of `shape`."""
    m = config.model
    rule = partial(rules.predict_edm, sigma_data=m.sigma_data) if m.rule == "edm" else m.rule
    options = {"label": LABELS[m.label](m), "scale": _scale(m), "learned_variance": m.learned_variance}
    model = Preconditioned(build_network(config, shape), build_sde(config), rule=rule, **options)
    if config.training.uncertainty:  # it is trained, averaged and saved with the model, which does not use it
        model.uncertainty = Uncertainty()
    return model


def _scale(m: ConfigDict) -> TimeMap:
    """The factor of the network's input."""
    return partial(rules.unit_variance, sigma_data=m.sigma_data) if m.rule == "edm" else rules.unscaled


def build_sampler(config: ConfigDict) -> Sampler:
    """The sampler that the section sampling describes."""
    s = config.sampling
    if s.step_lr > 0:  # NCSN's h = step_lr (sigma/sigma_min)² is h = 2 (snr sigma)²
        s = ConfigDict({**s, "snr": math.sqrt(s.step_lr / 2) / config.model.sigma_min})
    return METHODS[s.method].make(s)


def steps_together(config: ConfigDict) -> bool:
    """Whether the sampler has one step size for a batch, so that a sample depends on the others in its batch."""
    return config.sampling.method == "ode" and config.sampling.ode_method in ADAPTIVE


def grid_name(config: ConfigDict) -> str:
    """Which grid `build_times` makes: "ends" for adaptive solvers, whose steps are their own."""
    s = config.sampling
    own = "ends" if steps_together(config) else METHODS[s.method].grid
    return own if own == "ends" or (own and config.training.continuous) else s.grid


def build_times(config: ConfigDict, sde: SDE, model: ScoreModel | None = None, shape: tuple[int, ...] = ()) -> Tensor:
    """The times to sample on, decreasing from sampling.start; for `sample(..., denoise=config.sampling.noise_removal)`.

    A continuous model stops at sampling.t_min. A discrete one begins at the step of its chain nearest to
    sampling.start, takes at most sampling.steps of the remaining steps, and stops at the first, where the estimate of
    the clean data is the chain's own last step. Adaptive solvers get both ends. sampling.grid=fitted solves 32
    trajectories of the `model`, of examples of `shape`.
    """
    s, grid = config.sampling, grid_name(config)
    if grid == FITTED:
        if model is None:
            raise ValueError("sampling.grid=fitted is fitted to a model: pass it to build_times, with the data's shape")
        until = replace(sde, t_min=s.t_min)
        return fit_times(model, build_sampler(config), s.steps, (32, *shape), sde=until, seed=s.seed)
    if not config.training.continuous:
        n = config.model.num_scales
        return times.spaced(n, 2 if grid == "ends" else min(s.steps, round(s.start * n)), start=s.start)
    until = replace(sde, t_min=s.t_min)
    if grid == "ends":
        return times.uniform(until, 1, start=s.start)
    even = GRIDS[grid](until, s.steps, start=s.start)
    return even if s.shift == 1 else times.shifted(until, even, s.shift)


def build_bound_times(config: ConfigDict, sde: SDE) -> Tensor:
    """The times of the chain whose variational bound is evaluated, in eval.steps steps (0: all, or 1000).

    A discrete model has all or some of its own steps, down to clean data; a continuous one a grid that is uniform in
    log SNR, down to eval.t_min.
    """
    e, n = config.eval, config.model.num_scales
    if config.training.continuous:
        return times.log_snr(replace(sde, t_min=e.t_min), e.steps or 1000)
    return torch.cat([times.spaced(n, e.steps or n), torch.zeros(1, dtype=torch.float64)])
