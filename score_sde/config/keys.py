"""Configs: one locked `ConfigDict` with score_sde's sections and key names.

A config file is Python with ``get_config()`` and states differences only: from `default_config`, or from another file
by ``load(Path(__file__).with_name("vp_cifar.py"))``. `load` reads it, applies what the command line overrides, and
refuses unknown keys and impossible values in one sentence, with their path and the nearest right name. `build.py` turns
the names into values of the package; the mathematics above knows of no config.
"""

from __future__ import annotations

import ast
import csv
import difflib
import json
import math
import re
import runpy
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from ml_collections import ConfigDict

from ..data.toys import TOYS
from ..ode.integrators import ADAPTIVE, EACH, FIXED
from . import rules
from .build import CORRECTORS, FITTED, GRIDS, LABELS, METHODS, NAMED, NETWORKS, PREDICTORS, RULES, SDES
from .objective import NAMES, TIME_LAWS


def default_config() -> ConfigDict:
    """Every key with its default, locked: score_sde's common settings for CIFAR-10, and what this package adds."""
    return ConfigDict(
        {
            "seed": 42,  # of initial weights, data order, times and noise in training
            "device": "auto",  # "auto": a GPU where there is one; else a name of torch's: cpu, cuda, cuda:1, mps
            "training": {
                "sde": "vpsde",  # what noise does to data
                "continuous": True,  # False: on the num_scales steps of DDPM (vpsde, cosine) or SMLD (vesde)
                "n_iters": 1_300_000,  # training stops after this many steps
                "batch_size": 128,  # examples per step, in total over all processes and accumulated parts
                "accumulate": 1,  # parts in which a batch is computed, to save memory
                # estimator of the score's error; for chains also hybrid or vlb, their bound; cross_entropy trains a
                # classifier of noisy examples in the model's place, for sampling.classifier, and autoencoder one of
                # images, for data.autoencoder
                "objective": "denoising",
                "kl_weight": 1.0,  # autoencoder: of the codes' divergence from N(0, I); 1: the evidence's bound
                "projections": 1,  # random directions per example, for the sliced objectives
                "projection": "rademacher",  # their law
                "difference_step": 0.05,  # objective finite_difference: its step, in units of sigma(t)
                "likelihood_weighting": False,  # weight the noise error by (g/sigma)² instead of 1
                "reduce_mean": True,  # a loss is a mean over dimensions; False: half the sum
                # law of t: uniform, log_snr (unweighted), importance (of the weight; unbiased), edm (EDM's log-normal
                # sigma with EDM's weight), or for chains second_moment (of their losses; unbiased)
                "time": "uniform",
                "condition_dropout": 0.1,  # fraction of examples that are trained on without their label
                "augmentation": 0.0,  # super_resolution: noise that image up to this time, at random
                "low_discrepancy": False,  # spread the times of a batch evenly
                "soft_truncation": 0.0,  # k: a batch's smallest time has density tau^-k; 0: always model.t_min
                "precision": "float32",  # bfloat16: the network runs in autocast
                "compile": False,  # torch.compile the network
                "channels_last": False,  # memory format of images and weights
                "checkpoint_activations": False,  # recompute activations in the backward pass, to save memory
                # the workdir or checkpoint whose weights a new run begins from (--checkpoint of --mode train)
                "origin": "",
                "origin_weights": "ema",  # which: their moving average, or raw
                "origin_sha256": "",  # of that checkpoint, found by itself
                "log_freq": 50,  # steps between lines of the log
                "eval_freq": 100,  # steps between losses on held-out data
                "snapshot_freq": 10_000,  # steps between checkpoints
                "snapshot_sampling": True,  # a grid of samples with every checkpoint
                "keep_last": 3,  # how many of the latest checkpoints stay
                "keep_every": 5,  # every n-th checkpoint stays for good; 0: none
            },
            "sampling": {
                # pc (predictor, corrector), ode (its ode_method), ald (annealed Langevin), ddim, heun, edm (Heun with
                # churn), dpm_solver (singlestep), dpm_solver++ (multistep; with eta its SDE form), deis, unipc;
                # fast (what samplers.recommended takes for as many evaluations as steps, on its own grid); or with
                # step sizes per example embedded (Runge-Kutta) and adaptive_sde (Jolicoeur-Martineau et al. 2021)
                "method": "pc",
                "predictor": "euler_maruyama",
                "corrector": "none",
                # of ancestral sampling, and of the bound on the likelihood: the posterior's variance (small), the
                # forward step's (large), or between them (learned)
                "variance": "small",
                "clip_denoised": False,  # hold the estimate of the clean data to the data's range
                "threshold": 0.0,  # dynamic thresholding: by this quantile of its size, such as 0.995; 0: none
                "snr": 0.16,  # signal-to-noise ratio of the corrector's step
                "step_lr": 0.0,  # NCSN's eps in its place, for ald: the step is eps (sigma/sigma_min)²; 0: snr
                "n_steps_each": 1,  # corrector steps per predictor step, or per level of ald
                "probability_flow": False,  # predict along the probability flow, without noise
                "noise_removal": True,  # end with the estimate of the clean data
                # of the start, for methods without noise: below 1 samples are more alike; also of decode, interpolate
                "temperature": 1.0,
                "eta": 0.0,  # ddim, dpm_solver++: 0 draws no noise, 1 is ancestral sampling, the reverse SDE
                "order": 2,  # of dpm_solver, dpm_solver++, deis and unipc: 1, 2 or 3
                "predict": "data",  # what dpm_solver and unipc interpolate: data or noise; unipc also both in turn
                "unipc_variant": "b2",  # its B(h): b1 is h, b2 is exp(h) - 1
                "churn": 40.0,  # edm: how much noise is put back over the walk (S_churn)
                "churn_low": 0.05,  # where sigma/alpha lies between this (S_tmin)
                "churn_high": 50.0,  # and this (S_tmax)
                "churn_inflate": 1.003,  # deviation of that noise (S_noise)
                "steps": 1000,  # predictor steps; adaptive solvers choose their own
                # time at which sampling begins; below 1 with the examples of --input, noised to that time, whose
                # coarse features the samples keep: more of them the smaller it is (SDEdit)
                "start": 1.0,
                # where the steps lie: evenly in t, sqrt(t), log-SNR, (sigma/alpha)^(1/7) or arcsinh(log-SNR/4); or
                # fitted to the model
                "grid": "uniform",
                "t_min": 1e-3,  # time at which sampling stops (a discrete model stops at its first step)
                "ode_method": "RK45",  # adaptive or fixed-step solver of method "ode"
                "rtol": 1e-5,  # relative tolerance of adaptive solvers
                "atol": 1e-5,  # absolute tolerance of adaptive solvers
                "sde_rtol": 0.02,  # adaptive_sde: its relative tolerance
                "sde_atol": 2 / 256,  # adaptive_sde: its absolute tolerance, a pixel level
                # examples sampled together; changes no sample, but where method "ode" has one adaptive step for all
                "batch_size": 64,
                "num_samples": 64,
                "seed": 0,  # sample i depends on (seed, i) alone
                "single_png": False,  # also a PNG of every sample
                "weights": "ema",  # of the network: their moving average, or raw
                # classes of the samples, in turn, by number or name; -1: none. (): all that there are, or none where
                # images are restored
                "labels": (),
                "negative_label": -1,  # the class that guidance leads away from, in place of no label; -1: none
                # scale of guidance. Classifier-free: 0 ignores the label, 1 is the conditional model, above 1
                # strengthens it; by a classifier: 0 ignores it, 1 is the model given the label by Bayes' rule
                "guidance": 1.0,
                "base": "",  # super_resolution: workdir or checkpoint of the model whose samples are enlarged
                "augmentation": 0.0,  # and the time up to which these are noised first
                "guidance_low": 0.0,  # guided where sigma/alpha lies between this, elsewhere not
                "guidance_high": 0.0,  # and this; 0: no upper end
                "guidance_rescale": 0.0,  # classifier-free: how far, up to 1, the contrast is brought back
                # the weaker model of autoguidance, a workdir or checkpoint, in place of the model without label
                "guidance_checkpoint": "",
                "classifier": "",  # of noisy examples: the workdir or checkpoint of one, for classifier guidance
            },
            "eval": {
                "split": "test",  # whose bits/dim or log-likelihood
                "num_images": 0,  # the first n; 0: all
                "batch_size": 64,
                # ode: exact, along the probability flow; sde_bound: variational, of the SDE, on the same scale and
                # cheaper; bound: variational, of the chain; auto: ode for continuous models, bound for discrete ones
                "estimate": "auto",
                "steps": 0,  # bound: of the chain; 0: all of a discrete model's, 1000 of a continuous one's
                "terms": 0,  # bound: steps evaluated per image, drawn at random; 0: all of them
                "clip_denoised": False,  # bound: hold the estimate of the clean data to the data's range
                # ode, sde_bound: noise within a pixel's level, uniform, truncated_normal (that of t_min; for models
                # trained without dequantization) or variational (a flow that --mode dequantize has fitted)
                "dequantization": "uniform",
                "dequantizations": 1,  # estimates per image, each with noise and probes of its own, averaged
                "importance_samples": 1,  # ode: draws of noise in each estimate, which tighten its bound
                "draws": 64,  # sde_bound: of time and noise, per image
                "probe": "rademacher",  # of the divergence: rademacher, gaussian, sphere, exact (a pass per dimension)
                "probes": 1,  # per example, averaged
                "check_images": 16,  # ode: computed again for the errors of solver and single probes; 0: unknown
                "heat_map": 0,  # ode: draw where the bits are in the first n images
                # time at which the image stands (truncated_normal: the earliest that it may choose); of a continuous
                # model's bound, the last
                "t_min": 1e-5,
                "ode_method": "embedded",  # step sizes for each example; dopri5, dopri8, bosh3, RK45: one for the batch
                "rtol": 1e-5,
                "atol": 1e-5,
                "seed": 0,  # of dequantisation and probes, or of the bound's noise
                "weights": "ema",
                "conditional": True,  # of class-conditional models: given each example's label; False: given none
            },
            "dequantizer": {  # the flow of eval.dequantization=variational, which --mode dequantize fits
                "n_iters": 2000,
                "batch_size": 128,
                "lr": 2e-3,
                "layers": 4,  # affine couplings
                "hidden": 32,  # width of their networks
            },
            "interpolation": {  # --mode interpolate, along the flow of the section eval
                "between": "images",  # of eval.split, or of --input: the 1st and 2nd, the 3rd and 4th, ...; or seeds
                "pairs": 8,
                "steps": 9,  # images in a row, with both ends
            },
            "inverse": {  # --mode inpaint, colorize, superresolve and deblur, with the section sampling
                # pigdm, ddnm; dps, moment_matching; projection, repaint (for samplers of single steps); or twisted,
                # particles on sampling's grid
                "method": "pigdm",
                "noise": 0.0,  # standard deviation of noise in what is seen, where black to white is 1
                "factor": 4,  # superresolve: how many times larger
                "blur": 1.0,  # deblur: standard deviation of the Gaussian, in pixels
                # pigdm, twisted, and ddnm with noise: of the data, whose covariance they take for this times I. 1 is
                # the paper's; pigdm overshoots in smooth directions, where images vary much more: 10 is safer
                "variance": 1.0,
                "rate": 100.0,  # dps: the paper's step size times the number of steps
                "iterations": 3,  # moment_matching: of conjugate gradients
                "resamplings": 5,  # repaint: how often each step is walked
                "particles": 8,  # twisted: for each image
            },
            "data": {
                "dataset": "cifar10",  # files: a folder or zip of images, a folder of .wav, a .npy or .npz at data.path
                "path": "",  # where the data lie; "": the usual place, data/
                # files are cropped to a square of this size, other images shrunk to it; 0: left as they are
                "image_size": 32,
                "num_channels": 3,  # files are made grey (1) or RGB (3); 0: as they are
                "length": 0,  # the first samples of .wav files that are taken; 0: all, if all are as long
                # bits that image files use of each number, such as 12 in files of 16; 0: all. And how many of them, the
                # highest, are kept, such as 8; 0: all
                "file_bits": 0,
                "bits": 0,
                "background": "white",  # colour that transparent files are laid over: a name or #rrggbb
                "random_flip": True,  # mirror training images with probability 1/2
                "centered": True,  # pixels in [-1, 1]; False: [0, 1]
                "leave_out": "",  # captions, separated by commas, whose examples are not trained on
                # model the codes of an autoencoder of these images: the workdir or checkpoint of one, a folder of
                # diffusers' AutoencoderKL, or a Python file with get_autoencoder()
                "autoencoder": "",
                "autoencoder_sha256": "",  # of that one, found by itself
                "uniform_dequantization": False,  # train on (k + u)/levels instead of k/(levels - 1)
            },
            "model": {
                "name": "ncsnpp",  # network: ddpm, ncsnpp (DDPM++, NCSN++), adm, dit, ncsn, ncsnv2, mlp for vectors
                "rule": "noise",  # what the network's output means
                "learned_variance": False,  # it has twice the channels: the other half sets the reverse steps' variance
                # told of t: 999 t, sigma/alpha, 4 log(sigma/alpha), edm: log(sigma/alpha)/4, or the chain's index
                "label": "time",
                "sigma_data": 0.5,  # root mean square of the data as the model sees them; for rule edm
                "sigma_min": 0.01,  # noise at t = 0 (vesde, edm)
                "sigma_max": 50.0,  # noise at t = 1 (vesde, edm)
                "beta_min": 0.1,  # noise rate at t = 0 (vpsde, subvpsde)
                "beta_max": 20.0,  # noise rate at t = 1 (vpsde, subvpsde)
                "gamma_min": -13.3,  # minus log SNR at t = 0 (learned)
                "gamma_max": 5.0,  # minus log SNR at t = 1 (learned)
                "learn_ends": False,  # learn these two as well, by the bound
                "num_scales": 1000,  # steps of the chain, where training.continuous is False
                "t_min": 1e-5,  # smallest time trained on
                "nf": 128,  # channels of the finest level
                "ch_mult": (1, 2, 2, 2),  # channels of the levels (ncsn and ncsnv2: of the stages), in units of nf
                "num_res_blocks": 4,  # residual blocks per level
                "attn_resolutions": (16,),  # image sizes of the levels with attention
                "dropout": 0.1,
                "embedding_type": "positional",  # of the label: sinusoidal, or random Fourier features of its logarithm
                "fourier_scale": 16.0,  # standard deviation of the random frequencies
                "conditional": True,  # tell the network the label at all
                "resamp_with_conv": True,  # ddpm blocks: resample by convolution
                "fir": False,  # resample with the kernel fir_kernel; else nearest and average
                "fir_kernel": (1, 3, 3, 1),
                "skip_rescale": True,  # divide sums of two branches by sqrt(2)
                "resblock_type": "biggan",  # residual blocks resample inside (biggan) or between (ddpm)
                "progressive": "none",  # how the output is gathered from the levels
                "progressive_input": "none",  # how the input is fed to the levels
                "progressive_combine": "sum",  # how that input joins
                "class_conditional": False,  # tell the network the example's class, too
                "num_classes": 0,  # of them; 0: as many as the data have
                "code_channels": 4,  # of an autoencoder's codes
                "super_resolution": 0,  # give it the image at 1/2, 1/4, ... of its size: this factor; 0: not
                "text_encoder": "",  # give it the caption, by the text encoder in this folder
                "text_length": 32,  # tokens of a caption at most
                "text_sha256": "",  # of that encoder, found by itself
                "image_channels": 0,  # of an image that it is told beside (a lower resolution); 0: none
                "text_width": 0,  # of the tokens of a text that it is told; 0: none
                "pooled_width": 0,  # of a summary of the text; 0: none
                "scale_shift": False,  # the label scales the features of a block as well as shifting them
                "num_heads": 1,  # of attention
                "head_channels": 0,  # of each head, which then says how many there are; 0: num_heads says
                "attend_each": False,  # on the way up attention follows each block, not a level's last alone
                "init_scale": 0.0,  # of the last layer of each block; 0: blocks begin as the identity
                "nonlinearity": "swish",
                "fourier_features": (),  # n: sin and cos of 2^n pi x join the image's channels
                "hidden": 128,  # mlp, dit: width
                "depth": 3,  # mlp: hidden layers; dit: blocks
                "patch_size": 2,  # dit: pixels of a patch's side
                "ema_rate": 0.9999,  # decay of the moving average of the weights, per step
                "ema_halflife": 0,  # its half-life in training examples instead; 0: use ema_rate
            },
            "optim": {
                "optimizer": "Adam",
                "lr": 2e-4,
                "beta1": 0.9,
                "beta2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "warmup": 5000,  # steps over which the learning rate rises from 0
                "decay": 0.0,  # last fraction of the run, over which it falls to 0
                "grad_clip": 1.0,  # largest norm of the gradient; negative: no clipping
            },
        }
    ).lock()


# What names may be. The dicts are build.py's.
CHOICES: dict[str, tuple[str, ...]] = {
    "training.sde": tuple(SDES),
    "training.objective": NAMES,
    "training.projection": ("rademacher", "gaussian", "sphere"),
    "training.time": (*TIME_LAWS, "second_moment"),
    "training.precision": ("float32", "bfloat16"),
    "training.origin_weights": ("ema", "raw"),
    "sampling.method": tuple(METHODS),
    "sampling.predictor": tuple(PREDICTORS),
    "sampling.corrector": tuple(CORRECTORS),
    "sampling.variance": ("small", "large", "learned"),
    "sampling.grid": (*GRIDS, FITTED),
    "sampling.predict": ("data", "noise", "both"),
    "sampling.unipc_variant": ("b1", "b2"),
    "sampling.ode_method": ADAPTIVE + FIXED,
    "sampling.weights": ("ema", "raw"),
    "eval.split": ("test", "train"),
    "eval.estimate": ("auto", "ode", "sde_bound", "bound"),
    "eval.dequantization": ("uniform", "truncated_normal", "variational"),
    "eval.probe": ("rademacher", "gaussian", "sphere", "exact"),
    "eval.ode_method": (EACH, *ADAPTIVE),
    "eval.weights": ("ema", "raw"),
    "interpolation.between": ("images", "seeds"),
    "inverse.method": ("pigdm", "ddnm", "dps", "moment_matching", "projection", "repaint", "twisted"),
    "data.dataset": ("cifar10", "digits", "digits32", "files", *TOYS),
    "model.name": tuple(NETWORKS),
    "model.rule": RULES,
    "model.label": tuple(LABELS),
    "model.embedding_type": ("positional", "fourier"),
    "model.resblock_type": ("biggan", "ddpm"),
    "model.progressive": ("none", "output_skip", "residual"),
    "model.progressive_input": ("none", "input_skip", "residual"),
    "model.progressive_combine": ("sum", "cat"),
    "model.nonlinearity": ("swish", "elu", "relu", "lrelu"),
    "optim.optimizer": ("Adam", "AdamW"),
}

# What numbers may be, in the words of the refusal; others may be any finite number.
LIMITS: dict[str, tuple[Callable[[float], bool], str]] = {
    "at least 1": (
        lambda v: v >= 1,
        """training.n_iters training.batch_size training.projections training.accumulate training.log_freq
        training.eval_freq training.snapshot_freq training.keep_last sampling.n_steps_each sampling.steps
        sampling.batch_size sampling.num_samples eval.batch_size model.text_length eval.dequantizations eval.probes
        eval.importance_samples eval.draws interpolation.pairs dequantizer.n_iters dequantizer.batch_size
        dequantizer.layers dequantizer.hidden inverse.factor inverse.iterations inverse.resamplings
        inverse.particles model.num_scales model.nf model.num_res_blocks model.num_heads
        model.hidden model.depth model.patch_size model.code_channels""",
    ),
    "at least 2": (lambda v: v >= 2, "interpolation.steps"),
    "at least 0": (
        lambda v: v >= 0,
        """seed sampling.seed eval.seed training.keep_every sampling.temperature sampling.eta sampling.step_lr
        sampling.churn sampling.churn_low sampling.churn_high sampling.churn_inflate eval.num_images eval.terms
        sampling.guidance sampling.guidance_low sampling.guidance_high model.num_classes model.image_channels
        model.text_width model.pooled_width model.head_channels
        eval.check_images eval.heat_map data.image_size data.num_channels data.length model.init_scale
        model.ema_halflife
        inverse.noise training.kl_weight optim.weight_decay optim.warmup training.soft_truncation""",
    ),
    "above 0": (
        lambda v: v > 0,
        """sampling.snr sampling.atol sampling.sde_atol eval.atol
        model.sigma_data model.sigma_min model.sigma_max model.beta_min model.beta_max model.fourier_scale
        optim.lr training.difference_step dequantizer.lr inverse.variance inverse.rate""",
    ),
    "above 0 and at most 1": (
        lambda v: 0 < v <= 1,
        "sampling.rtol sampling.sde_rtol eval.rtol optim.eps sampling.start",
    ),
    "above 0 and at most 1000": (lambda v: 0 < v <= 1000, "inverse.blur"),
    "at least -1": (lambda v: v >= -1, "sampling.negative_label"),
    "above 0, or negative for no clipping (at 0 nothing is trained)": (lambda v: v != 0, "optim.grad_clip"),
    "at least 0 and below 1": (
        lambda v: 0 <= v < 1,
        "sampling.t_min eval.t_min model.t_min model.dropout model.ema_rate optim.beta1 optim.beta2",
    ),
    "between 0 and 1": (
        lambda v: 0 <= v <= 1,
        """optim.decay sampling.threshold sampling.augmentation sampling.guidance_rescale training.condition_dropout
        training.augmentation""",
    ),
    "between 0 and 16": (lambda v: 0 <= v <= 16, "data.file_bits data.bits"),
    "1, 2 or 3": (lambda v: v in (1, 2, 3), "sampling.order"),
    "0 or at least 2": (lambda v: v == 0 or v >= 2, "eval.steps model.super_resolution"),
}

# The largest numbers: float32's, and of integers more than any size can be, or for these keys int64's.
LARGEST: dict[type, float] = {float: 3e38, int: 2**31 - 1}
LARGEST_LONG = 2**63 - 1
_LETTERS = 1000
LONG = ("seed", "sampling.seed", "eval.seed", "training.n_iters", "model.ema_halflife")

# score_sde's keys that are something else here.
MOVED = {
    "training.snapshot_freq_for_preemption": "set training.snapshot_freq (every checkpoint can be resumed)",
    "eval.enable_bpd": "use --mode likelihood",
    "eval.enable_loss": "training reports it every training.eval_freq steps",
    "eval.enable_sampling": "use --mode sample",
    "eval.bpd_dataset": "set eval.split",
    "eval.num_samples": "set sampling.num_samples",
    "model.scale_by_sigma": "set model.rule (noise: the score is the network's output over -sigma)",
}


def load(path: str | Path, overrides: dict[str, str] | None = None) -> ConfigDict:
    """The validated, locked config of a file, with some keys overridden.

    Args:
        path: a Python file with ``get_config()``, or a `config.json` as training leaves it in a workdir.
        overrides: dotted key to value, as the command line spells them: ``{"training.n_iters": "1000"}``.

    Raises FileNotFoundError for a missing file and ValueError for whatever is wrong in it or in the overrides.
    """
    path = Path(path)
    if not path.is_file():
        there = {p.stem: p for p in sorted([*Path("configs").glob("*.py"), *path.parent.glob("*.py")])}
        near = _nearest(path.stem, list(there))
        others = ", ".join(map(str, there.values()))
        hint = f"did you mean {there[near]}?" if near else f"there are {others}" if others else "give the path of one"
        raise FileNotFoundError(f"there is no config file {path}; {hint}")
    given = from_json(path) if path.suffix == ".json" else _run(path)
    return overridden(given, overrides or {}, f"{path}: ")


def overridden(given: ConfigDict, overrides: dict[str, str], where: str = "") -> ConfigDict:
    """The validated, locked config that has the values of another, and of `overrides` as `load` takes them.

    Raises ValueError for whatever is wrong in them; `where` is said before what is wrong in `given`.
    """
    config = default_config()
    for key, value in _flat(given).items():
        _set(config, key, value, where)
    for key, text in overrides.items():
        _set(config, key, _parse(key, text))
    validate(config)
    return config


def split_arguments(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """(other arguments, overrides): takes ``--config.section.key=value`` and ``--config.section.key value`` out.

    A bare ``--config.section.key`` means true for a switch. Raises ValueError where another key has no value.
    """
    defaults = _defaults()
    rest: list[str] = []
    overrides: dict[str, str] = {}
    queue = list(arguments)
    while queue:
        word = queue.pop(0)
        if not word.startswith(("--config.", "-config.")):
            rest.append(word)
            continue
        key, equals, value = word.split("config.", 1)[1].partition("=")
        if not equals:
            if queue and not queue[0].startswith("--"):
                value = queue.pop(0)
            elif isinstance(defaults.get(key), bool):
                value = "true"
            elif key in defaults:
                raise ValueError(f"--config.{key} needs a value, as in --config.{key}={defaults[key]}")
        overrides[key] = value
    return rest, overrides


def validate(config: ConfigDict) -> None:
    """Raise ValueError, in one sentence, for the first value that is impossible by itself or beside the others."""
    for key, value in _flat(config).items():
        _check(key, value)
    rules.check(config)


def to_json(config: ConfigDict) -> str:
    """The config as JSON text; `from_json` gives back an equal config."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(path: str | Path) -> ConfigDict:
    """The config that a workdir's config.json holds; keys that a file of an older version lacks have their defaults.

    Raises FileNotFoundError, or ValueError for text that is no config of this package.
    """
    try:
        return from_text(Path(path).read_text(), str(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no config {path}; training writes it into its workdir") from None
    except ValueError as error:
        said = f"{path} is not text ({error})" if isinstance(error, UnicodeDecodeError) else error
        raise ValueError(
            f"{said} (the checkpoints of a workdir carry its config: leave --config out and give --workdir "
            f"{Path(path).parent})"
        ) from None


def from_text(text: str, where: str) -> ConfigDict:
    """The config in JSON text, such as a checkpoint carries; `where` names it in errors, which are `from_json`'s."""
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}, line {error.lineno}: not JSON ({error.msg})") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply to be a config") from None
    if not isinstance(given, dict):
        raise ValueError(f"{where} holds no config: a JSON object with training, model, ... is expected")
    config = default_config()
    for key, value in _flat(given).items():
        if key not in _defaults() and key not in MOVED:
            near = _nearest(key, list(_defaults()))
            raise ValueError(
                f"{where}: unknown config key '{key}', perhaps of a newer version of score_sde, which reads this file"
                + (f"; or did you mean '{near}'?" if near else "")
            )
        _set(config, key, value, f"{where}: ")
    return config


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Lines "section.key: old -> new" for all keys that differ."""
    a, b = _flat(old), _flat(new)
    return [f"{key}: {a.get(key)!r} -> {b.get(key)!r}" for key in sorted(a | b) if a.get(key) != b.get(key)]


# Reading: flat dotted keys, and sentences about what is wrong with them.


def _flat(config: ConfigDict | dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"section.key": value} of all that is no section."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        inside = isinstance(value, (ConfigDict, dict))
        flat |= _flat(value, f"{prefix}{name}.") if inside else {prefix + name: value}
    return flat


@cache
def _defaults() -> dict[str, Any]:
    return _flat(default_config())


def _nearest(word: str, words: list[str] | tuple[str, ...]) -> str | None:
    return next(iter(difflib.get_close_matches(word, words, n=1, cutoff=0.5)), None)


def _unknown(key: str, where: str = "") -> NoReturn:
    """Refuse a key that does not exist, with the nearest that does: the right spelling, or the right section."""
    sections = [name for name, value in default_config().items() if isinstance(value, ConfigDict)]
    section, _, name = key.rpartition(".")

    def likeness(other: str) -> float:
        whole = difflib.SequenceMatcher(None, key, other).ratio()
        return whole + difflib.SequenceMatcher(None, name, other.rpartition(".")[2]).ratio()

    best = max([*_defaults(), *sections], key=likeness)
    if key in sections:
        raise ValueError(f"{where}'{key}' is a section; set a key of it: {', '.join(default_config()[key])}")
    if key in MOVED:
        hint = f"{MOVED[key]} instead"
    elif section in sections and likeness(best) < 1.2:
        hint = f"the section {section} has {', '.join(default_config()[section])}"
    elif likeness(best) < 1.2:
        hint = f"there are seed, device and the sections {', '.join(sections)}"
    else:
        hint = f"did you mean '{best}'?"
    raise ValueError(f"{where}unknown config key '{key}'; {hint}")


def _check(key: str, value: Any, where: str = "") -> Any:
    """`value` as the type that `key` has, or a ValueError that says what it may be."""
    if key not in _defaults():
        _unknown(key, where)
    kind = type(_defaults()[key])
    if kind is float and type(value) is int and abs(value) <= LARGEST[float]:
        value = float(value)
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str) and (len(text) > _LETTERS or not text.isprintable()):
            raise ValueError(f"{where}{key} must be at most {_LETTERS} printable characters, got {_brief(text)}")
    if key in NAMED and kind is int and type(value) is str:
        return value
    kinds = (int, str) if key in NAMED else (int,)
    sound = type(value) is kind and (kind is not tuple or all(type(v) in kinds for v in value))
    if not sound or (kind is float and not math.isfinite(value)):
        wanted = "numbers or names of classes, such as (1, 2) or ('cat', 'dog')" if str in kinds else _KINDS[kind]
        raise ValueError(f"{where}{key} must be {wanted}, got {_brief(value)}")
    most = LARGEST_LONG if key in LONG else LARGEST[float if kind is float else int]
    for number in value if kind is tuple else (value,):
        if not isinstance(number, str) and abs(number) > most:
            raise ValueError(f"{where}{key} must be at most {most} in size, got {_brief(value)}")
    if key in CHOICES and value not in CHOICES[key]:
        near = _nearest(value.lower(), CHOICES[key])
        hint = f"; did you mean '{near}'?" if near else ""
        raise ValueError(f"{where}{key} must be one of {', '.join(CHOICES[key])}, got {_brief(value)}{hint}")
    for words, holds in _limits(key):
        if not holds(value):
            raise ValueError(f"{where}{key} must be {words}, got {value!r}")
    return value


@cache
def _limits(key: str) -> list[tuple[str, Callable[[Any], bool]]]:
    return [(words, holds) for words, (holds, keys) in LIMITS.items() if key in keys.split()]


def _brief(value: Any) -> str:
    """A value as it is written, cut where nobody would read on."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = "an integer of thousands of digits"
    return text if len(text) <= 100 else f"{text[:80]}..."


def _set(config: ConfigDict, key: str, value: Any, where: str = "") -> None:
    value = _check(key, value, where)
    section, _, name = key.rpartition(".")
    where_to = config[section] if section else config
    with where_to.ignore_type() if key in NAMED else nullcontext():
        where_to[name] = value


def _parse(key: str, text: str) -> Any:
    """A command line's text as the type of `key`'s default, or as it is, for `_check` to refuse."""
    kind = type(_defaults().get(key))
    if key in NAMED:
        names = _names(text)
        return names if kind is tuple else names[0] if len(names) == 1 else text
    try:
        return _PARSERS[kind](text) if kind in _PARSERS else text
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last two of thousands of brackets
        return text


def _integer(text: str) -> int | float:
    """ "1000", "1_000" and "1e3" are 1000; what is no integer stays a float."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
        return int(value) if value.is_integer() else value


def _tuple(text: str) -> tuple[Any, ...]:
    """ "(1, 2)", "[1, 2]" and "1,2" are (1, 2); "1" is (1,); "" is ()."""
    value = ast.literal_eval(text.strip() or "()")
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _names(text: str) -> tuple[int | str, ...]:
    """ "1,2" are numbers, and "cat,dog" names, as are "07", "1e3" and "None"; one in quotes may have commas."""
    try:
        found = _tuple(text)
        if all(type(v) in (int, str) for v in found) or set("()[]{}") & set(text):
            return found
    except (ValueError, SyntaxError):
        pass
    words = [word.strip() for word in next(csv.reader([text.strip().strip("()[]")], skipinitialspace=True))]
    number = re.compile(r"-?(0|[1-9]\d*)")
    return tuple(int(word) if number.fullmatch(word) else word.strip("'") for word in words if word)


_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a name", tuple: "integers such as 1,2,2"}
_PARSERS: dict[type, Callable[[str], Any]] = {
    bool: lambda text: {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text),
    int: _integer,
    float: float,
    tuple: _tuple,
}


def _run(path: Path) -> ConfigDict:
    """What get_config() of a Python file returns; slips in it are reported with their line."""
    try:
        module = runpy.run_path(str(path))
        if not callable(module.get("get_config")):
            raise ValueError(f"{path} defines no get_config(); a config file is Python with get_config() -> ConfigDict")
        config = module["get_config"]()
    except SyntaxError as error:
        where = f"{error.filename}, line {error.lineno}" if error.filename else str(path)
        raise ValueError(f"{where}: {error.msg}") from None
    except (NameError, ImportError) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        if not lines:
            raise
        raise ValueError(f"{path}, line {lines[-1]}: {error}") from None
    except (AttributeError, KeyError, TypeError) as error:
        _explain(error.__traceback__, path)
        raise
    if not isinstance(config, ConfigDict):
        raise ValueError(f"get_config() of {path} must return a ConfigDict, got {type(config).__name__}")
    return config


def _explain(trace: TracebackType | None, path: Path) -> None:
    """Raise ValueError with file and line where `trace` ends in a ConfigDict refusing a key or a value of that file."""
    lines = [frame.lineno for frame in traceback.extract_tb(trace) if frame.filename == str(path)]
    refusals = [
        frame.f_locals
        for frame, _ in traceback.walk_tb(trace)
        if isinstance(frame.f_locals.get("self"), ConfigDict) and frame.f_locals.keys() & {"key", "attribute"}
    ]
    if not lines or not refusals:
        return
    found = refusals[-1]
    name = str(found.get("key", found.get("attribute")))
    keys = found["self"].keys()
    sections = [f"{k}." for k, v in default_config().items() if isinstance(v, ConfigDict) and v.keys() == keys]
    where = f"{path}, line {lines[-1]}: "
    key = "".join(sections) + name
    if key not in _defaults():
        _unknown(key, where)
    if "value" in found:
        _check(key, found["value"], where)
