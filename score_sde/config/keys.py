"""The keys of a config: what each means, its default, and what it may be, in one table.

The table `SECTIONS` gives the locked `ConfigDict` of defaults, the check of a value, and the sentence that explains a
key. Rules between keys are in `rules.py`; `reading.py` reads files and command lines.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, get_args

from ml_collections import ConfigDict

from ..data.sets import DATASETS
from ..machine import own_code
from ..models.reverse import Variance
from ..models.traces import Law, Probe
from ..networks.blocks import BlockKind
from ..networks.dit import FeedForward, Norm, Positions
from ..networks.layers import Activation
from ..networks.pyramid import Combine
from ..networks.unet import Progressive, ProgressiveInput
from ..ode.integrators import ADAPTIVE, EACH, FIXED
from .build import CORRECTORS, EMBEDDINGS, FITTED, GRIDS, LABELS, METHODS, NETWORKS, PREDICTORS, RULES, SDES
from .objective import COUPLINGS, NAMES, TIME_LAWS

# The largest numbers: that of float32, for integers one above any size, and for some keys that of int64.
LARGEST: dict[type, float] = {float: 3e38, int: 2**31 - 1}
INT64 = 2**63 - 1
LETTERS = 1000
_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a name", tuple: "integers such as 1,2,2"}


class Limit(NamedTuple):
    """What a number may be: in words, and as a test."""

    words: str
    holds: Callable[[float], bool]


@dataclass(frozen=True)
class Key:
    """A key of the config: its default, what it means, and what it may be.

    `may` has the names that it may be, or the limit of its number; None: anything of the default's type. `most` is the
    largest size of its number, 0 for `LARGEST`. With `classes` it may also be names of classes, and with `own` also
    FILE.py:NAME, code of the user's own, whose file's sha256 is in the key of the same name with _sha256.
    """

    default: Any
    meaning: str = ""
    may: Sequence[str] | Limit | None = None
    most: int = 0
    classes: bool = False
    own: bool = False

    @property
    def kind(self) -> type:
        """The type of its values."""
        return type(self.default)

    @property
    def choices(self) -> tuple[str, ...]:
        """The names that it may be; () where it takes no names, or any."""
        return () if self.may is None or isinstance(self.may, Limit) else tuple(self.may)

    @property
    def allowed(self) -> str:
        """What values it may have, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}" + (", or FILE.py:NAME of your own" if self.own else "")
        return f"{self._kind}, {self.may.words}" if isinstance(self.may, Limit) else self._kind

    @property
    def explained(self) -> str:
        """Its meaning, and what values it may have."""
        return f"{self.meaning} ({self.allowed})"

    @property
    def _kind(self) -> str:
        return "numbers or names of classes, such as (1, 2) or ('cat', 'dog')" if self.classes else _KINDS[self.kind]

    def checked(self, value: Any) -> Any:
        """`value` as this key's type. Raises ValueError, which begins with what it must be."""
        if self.kind is float and type(value) is int and abs(value) <= LARGEST[float]:
            value = float(value)
        if self.kind is tuple and isinstance(value, list):
            value = tuple(value)
        elements = value if isinstance(value, tuple) else (value,)
        for text in elements:
            if isinstance(text, str) and (len(text) > LETTERS or not text.isprintable()):
                raise ValueError(f"must be at most {LETTERS} printable characters, got {brief(text)}")
        if self.classes and self.kind is int and type(value) is str:
            return value
        if not self._is_of_kind(value):
            raise ValueError(f"must be {self._kind}, got {brief(value)}")
        most = self.most or LARGEST[float if self.kind is float else int]
        if any(abs(number) > most for number in elements if not isinstance(number, str)):
            raise ValueError(f"must be at most {most} in size, got {brief(value)}")
        if self.choices and value not in self.choices and not (self.own and own_code.is_own(value)):
            near = nearest(value.lower(), self.choices)
            hint = f"; did you mean '{near}'?" if near else ""
            raise ValueError(f"must be {self.allowed}, got {brief(value)}{hint}")
        if isinstance(self.may, Limit) and not self.may.holds(value):
            raise ValueError(f"must be {self.may.words}, got {value!r}")
        return value

    def _is_of_kind(self, value: Any) -> bool:
        if isinstance(value, tuple) and self.kind is tuple:
            return all(type(v) is int or (self.classes and type(v) is str) for v in value)
        return type(value) is self.kind and (not isinstance(value, float) or math.isfinite(value))


AT_LEAST_0 = Limit("at least 0", lambda v: v >= 0)
AT_LEAST_1 = Limit("at least 1", lambda v: v >= 1)
ABOVE_0 = Limit("above 0", lambda v: v > 0)
UP_TO_1 = Limit("above 0 and at most 1", lambda v: 0 < v <= 1)
BELOW_1 = Limit("at least 0 and below 1", lambda v: 0 <= v < 1)
FRACTION = Limit("between 0 and 1", lambda v: 0 <= v <= 1)
BITS = Limit("between 0 and 16", lambda v: 0 <= v <= 16)
NONE_OR_2 = Limit("0 or at least 2", lambda v: v == 0 or v >= 2)
WIDTH = Limit("between 0 and 0.288, the width of the mean over the whole run", lambda v: 0 <= v <= 0.288)
WEIGHTS = ("ema", "raw")

SECTIONS: dict[str, dict[str, Key]] = {
    "": {
        "seed": Key(42, "seed of initial weights, data order, times and noise in training", AT_LEAST_0, INT64),
        "device": Key("auto", "auto: a GPU if there is one; or torch's name of a device: cpu, cuda, cuda:1, mps"),
    },
    "training": {
        "sde": Key("vpsde", "the SDE, by which noise is added to data", tuple(SDES), own=True),
        "sde_sha256": Key("", "sha256 of the file if sde is FILE.py:NAME; filled in when the config is read"),
        "continuous": Key(True, "False: train on the num_scales steps of DDPM (vpsde, cosine) or SMLD (vesde)"),
        "n_iters": Key(1_300_000, "training stops after this many steps", AT_LEAST_1, INT64),
        "batch_size": Key(128, "examples per step, in total over all processes and accumulated parts", AT_LEAST_1),
        "accumulate": Key(1, "parts in which a batch is computed, to save memory", AT_LEAST_1),
        "objective": Key("denoising", "estimator of the score's error, or flow_matching, of the velocity's; for chains "
            "also hybrid or vlb, their bound; cross_entropy trains a classifier of noisy examples instead, for "
            "sampling.classifier, and autoencoder an autoencoder of images, for data.autoencoder", NAMES),
        "kl_weight": Key(1.0, "autoencoder: weight of the codes' KL from N(0, I); 1: the evidence bound", AT_LEAST_0),
        "projections": Key(1, "random directions per example, for the sliced objectives", AT_LEAST_1),
        "projection": Key("rademacher", "distribution of these directions", get_args(Law)),
        "difference_step": Key(0.05, "finite_difference: step, in units of sigma(t)", ABOVE_0),
        "likelihood_weighting": Key(False, "weight the noise error by (g/sigma)² instead of 1"),
        "min_snr": Key(0.0, "gamma, usually 5: weight the noise error by min(SNR, gamma)/SNR, SNR = (alpha/sigma)²; "
            "0: not", AT_LEAST_0),
        "uncertainty": Key(False, "divide each noise level's loss by a learned mean of it: all levels count alike"),
        "reduce_mean": Key(True, "a loss is a mean over dimensions; False: half the sum"),
        "time": Key("uniform", "law of t: uniform, log_snr (unweighted), importance (of the weight; unbiased), edm "
            "(EDM's log-normal sigma with EDM's weight), log_normal (without that weight: logit-normal t on the linear "
            "path), mode (heavy in the middle), or for chains second_moment (of their losses; unbiased)",
            (*TIME_LAWS, "second_moment")),
        "coupling": Key("independent", "flow_matching: which noise goes with which example of a batch: with "
            "optimal_transport (exact) or sinkhorn paths are straighter, and sampling must draw no noise",
            tuple(COUPLINGS)),
        "time_mean": Key(-1.2, "edm, log_normal: mean of log(sigma/alpha) (P_mean)"),
        "time_std": Key(1.2, "edm, log_normal: standard deviation of log(sigma/alpha) (P_std)", ABOVE_0),
        "time_scale": Key(1.29, "mode: how heavy the middle is; 0 is uniform, below 0 the ends are heavier",
            Limit("a number from -1 to 1.75", lambda v: -1 <= v <= 1.75)),
        "condition_dropout": Key(0.1, "fraction of examples trained on without their label or caption", FRACTION),
        "augmentation": Key(0.0, "super_resolution: noise the small image up to this time, at random", FRACTION),
        "geometric": Key(0.0, "probability of each way to move training images (flip, size, turn, stretch, shift), of "
            "which the network is told, so that samples show none; EDM has 0.12 on CIFAR-10", FRACTION),
        "low_discrepancy": Key(False, "spread the times of a batch evenly"),
        "soft_truncation": Key(0.0, "k: a batch's smallest time has density tau^-k; 0: always model.t_min", AT_LEAST_0),
        "precision": Key("float32", "bfloat16: the network runs in autocast", ("float32", "bfloat16")),
        "compile": Key(False, "torch.compile the network"),
        "channels_last": Key(False, "memory format of images and weights"),
        "checkpoint_activations": Key(False, "recompute activations in the backward pass, to save memory"),
        "origin": Key("", "workdir or checkpoint with whose weights a new run begins (--checkpoint of --mode train)"),
        "origin_weights": Key("ema", "the weights of origin: their moving average, or raw", WEIGHTS),
        "origin_sha256": Key("", "sha256 of that checkpoint, filled in by training"),
        "log_freq": Key(50, "steps between lines of the log", AT_LEAST_1),
        "eval_freq": Key(100, "steps between losses on held-out data", AT_LEAST_1),
        "snapshot_freq": Key(10_000, "steps between checkpoints", AT_LEAST_1),
        "snapshot_sampling": Key(True, "a grid of samples with every checkpoint"),
        "keep_last": Key(3, "how many of the latest checkpoints stay", AT_LEAST_1),
        "keep_every": Key(5, "every n-th checkpoint stays for good; 0: none", AT_LEAST_0),
    },
    "sampling": {
        "method": Key("pc", "pc (predictor, corrector), ode (its ode_method), ald (annealed Langevin), ddim, heun, edm "
            "(Heun with churn), dpm_solver (singlestep), dpm_solver++ (multistep; with eta its SDE form), deis, unipc, "
            "balanced (between data and noise); fast (what samplers.recommended takes for as many evaluations as "
            "steps, on its own grid); or with step sizes per example embedded (Runge-Kutta) and adaptive_sde "
            "(Jolicoeur-Martineau et al. 2021)",
            tuple(METHODS)),
        "predictor": Key("euler_maruyama", "pc: the predictor", tuple(PREDICTORS)),
        "corrector": Key("none", "pc: the corrector", tuple(CORRECTORS)),
        "variance": Key("small", "variance of ancestral steps and of the bound on the likelihood: the posterior's "
            "(small), the forward step's (large), or between them (learned)", get_args(Variance)),
        "clip_denoised": Key(False, "clip the estimate of the clean data to the data's range"),
        "threshold": Key(0.0, "dynamic thresholding: by this quantile of sizes, such as 0.995; 0: none", FRACTION),
        "snr": Key(0.16, "signal-to-noise ratio of the corrector's step", ABOVE_0),
        "step_lr": Key(0.0, "ald: NCSN's eps in place of snr, the step is eps (sigma/sigma_min)²; 0: snr", AT_LEAST_0),
        "n_steps_each": Key(1, "corrector steps per predictor step, or per level of ald", AT_LEAST_1),
        "probability_flow": Key(False, "predict along the probability flow, without noise"),
        "noise_removal": Key(True, "end with the estimate of the clean data"),
        "temperature": Key(1.0, "scale of the start, for methods without noise: below 1 samples are more alike; also "
            "for decode and interpolate", AT_LEAST_0),
        "eta": Key(0.0, "ddim, dpm_solver++: 0 draws no noise, 1 is ancestral sampling, the reverse SDE", AT_LEAST_0),
        "order": Key(2, "order of dpm_solver, dpm_solver++, deis, unipc, balanced",
            Limit("1, 2 or 3", lambda v: v in (1, 2, 3))),
        "predict": Key("data", "what dpm_solver and unipc interpolate; unipc: also both", ("data", "noise", "both")),
        "unipc_variant": Key("b2", "unipc: its B(h): b1 is h, b2 is exp(h) - 1", ("b1", "b2")),
        "churn": Key(40.0, "edm: how much noise is put back over the walk (S_churn)", AT_LEAST_0),
        "churn_low": Key(0.05, "edm: noise is put back where sigma/alpha lies above this (S_tmin)", AT_LEAST_0),
        "churn_high": Key(50.0, "edm: and below this (S_tmax)", AT_LEAST_0),
        "churn_inflate": Key(1.003, "edm: standard deviation of that noise (S_noise)", AT_LEAST_0),
        "steps": Key(1000, "predictor steps; adaptive solvers choose their own", AT_LEAST_1),
        "start": Key(1.0, "time at which sampling begins; below 1 with the examples of --input, noised to that time "
            "(SDEdit): the smaller it is, the more of their coarse features the samples keep", UP_TO_1),
        "grid": Key("uniform", "where the steps lie: evenly in t, sqrt(t), log-SNR, (sigma/alpha)^(1/7), "
            "arcsinh(log-SNR/4) or a skewed arcsinh; or fitted to the model", (*GRIDS, FITTED)),
        "shift": Key(1.0, "factor of sigma/alpha at the grid's inner times; for images of m times as many pixels the "
            "square root of m", ABOVE_0),
        "t_min": Key(1e-3, "time at which sampling stops (a discrete model stops at its first step)", BELOW_1),
        "ode_method": Key("RK45", "ode: an adaptive or a fixed-step solver", ADAPTIVE + FIXED),
        "rtol": Key(1e-5, "relative tolerance of adaptive solvers", UP_TO_1),
        "atol": Key(1e-5, "absolute tolerance of adaptive solvers", ABOVE_0),
        "sde_rtol": Key(0.02, "adaptive_sde: its relative tolerance", UP_TO_1),
        "sde_atol": Key(2 / 256, "adaptive_sde: its absolute tolerance, a pixel level", ABOVE_0),
        "batch_size": Key(64, "examples sampled together; it changes no sample, unless method ode has one adaptive "
            "step for all", AT_LEAST_1),
        "num_samples": Key(64, "how many samples", AT_LEAST_1),
        "seed": Key(0, "sample i depends on (seed, i) alone", AT_LEAST_0, INT64),
        "single_png": Key(False, "also a PNG of every sample"),
        "weights": Key("ema", "weights of the network: their moving average, or raw", WEIGHTS),
        "ema": Key(0.0, "weights in every mode: the power average of this relative width, such as 0.05, about the last "
            "5 % of a run that had model.ema_power=True; 0: as weights says", WIDTH),
        "labels": Key((), "classes of the samples, in turn, by number or name; -1: none. (): all classes, or none "
            "where images are restored", classes=True),
        "negative_label": Key(-1, "class that guidance leads away from, in place of no label; -1: none",
            Limit("at least -1", lambda v: v >= -1), classes=True),
        "guidance": Key(1.0, "scale of guidance. Classifier-free: 0 ignores the label, 1 is the conditional model, "
            "above 1 strengthens it; by a classifier: 0 ignores it, 1 is the model given the label by Bayes' rule",
            AT_LEAST_0),
        "base": Key("", "super_resolution: workdir or checkpoint of the model whose samples are enlarged"),
        "augmentation": Key(0.0, "super_resolution: time up to which the small images are noised first", FRACTION),
        "guidance_low": Key(0.0, "guidance acts where sigma/alpha lies above this", AT_LEAST_0),
        "guidance_high": Key(0.0, "and below this; 0: no upper end", AT_LEAST_0),
        "guidance_rescale": Key(0.0, "classifier-free: how far, up to 1, the contrast is brought back", FRACTION),
        "guidance_checkpoint": Key("", "the weaker model of autoguidance, a workdir or checkpoint, in place of the "
            "model without label"),
        "classifier": Key("", "classifier guidance: workdir or checkpoint of a classifier of noisy examples"),
    },
    "eval": {
        "split": Key("test", "the split whose bits/dim or log-likelihood is computed", ("test", "train")),
        "num_images": Key(0, "the first n; 0: all", AT_LEAST_0),
        "batch_size": Key(64, "examples evaluated together", AT_LEAST_1),
        "estimate": Key("auto", "ode: exact, along the probability flow; sde_bound: variational, of the SDE, on the "
            "same scale and cheaper; bound: variational, of the chain; auto: ode for continuous models, bound for "
            "discrete ones", ("auto", "ode", "sde_bound", "bound")),
        "steps": Key(0, "bound: steps of the chain; 0: all of a discrete model, 1000 of a continuous one", NONE_OR_2),
        "terms": Key(0, "bound: steps evaluated per image, drawn at random; 0: all of them", AT_LEAST_0),
        "clip_denoised": Key(False, "bound: clip the estimate of the clean data to the data's range"),
        "dequantization": Key("uniform", "ode, sde_bound: noise within a pixel's level, uniform, truncated_normal "
            "(that of t_min; for models trained without dequantization) or variational (a flow that --mode dequantize "
            "has fitted)", ("uniform", "truncated_normal", "variational")),
        "dequantizations": Key(1, "estimates per image, each with noise and probes of its own, averaged", AT_LEAST_1),
        "importance_samples": Key(1, "ode: draws of noise in each estimate, which tighten its bound", AT_LEAST_1),
        "draws": Key(64, "sde_bound: draws of time and noise per image", AT_LEAST_1),
        "probe": Key("rademacher", "probes of the divergence; exact takes a pass per dimension", get_args(Probe)),
        "probes": Key(1, "probes per example, averaged", AT_LEAST_1),
        "check_images": Key(16, "ode: images computed again for the errors of solver and probes; 0: errors unknown",
            AT_LEAST_0),
        "heat_map": Key(0, "ode: draw a map of the bits for the first n images", AT_LEAST_0),
        "t_min": Key(1e-5, "time of the clean image (truncated_normal: the earliest that it may choose); the last "
            "time of a continuous model's bound", BELOW_1),
        "ode_method": Key("embedded", "embedded: step sizes for each example; the others: one for the batch",
            (EACH, *ADAPTIVE)),
        "rtol": Key(1e-5, "relative tolerance of the solver", UP_TO_1),
        "atol": Key(1e-5, "absolute tolerance of the solver", ABOVE_0),
        "seed": Key(0, "seed of dequantisation and probes, or of the bound's noise", AT_LEAST_0, INT64),
        "weights": Key("ema", "weights of the network: their moving average, or raw", WEIGHTS),
        "conditional": Key(True, "class-conditional models: condition on each example's label; False: on none"),
    },
    "dequantizer": {  # the flow of eval.dequantization=variational, which --mode dequantize fits
        "n_iters": Key(2000, "steps of its training", AT_LEAST_1),
        "batch_size": Key(128, "examples per step", AT_LEAST_1),
        "lr": Key(2e-3, "learning rate", ABOVE_0),
        "layers": Key(4, "affine couplings", AT_LEAST_1),
        "hidden": Key(32, "width of their networks", AT_LEAST_1),
    },
    "interpolation": {  # --mode interpolate, along the flow of the section eval
        "between": Key("images", "images: of eval.split, or of --input: the 1st and 2nd, the 3rd and 4th, ...; or "
            "seeds", ("images", "seeds")),
        "pairs": Key(8, "rows of images", AT_LEAST_1),
        "steps": Key(9, "images in a row, with both ends", Limit("at least 2", lambda v: v >= 2)),
    },
    "inverse": {  # --mode inpaint, colorize, superresolve and deblur, with the section sampling
        "method": Key("pigdm", "pigdm, ddnm; dps, moment_matching; projection, repaint (for samplers of single "
            "steps); or twisted, particles on sampling's grid",
            ("pigdm", "ddnm", "dps", "moment_matching", "projection", "repaint", "twisted")),
        "noise": Key(0.0, "standard deviation of noise in what is seen, where black to white is 1", AT_LEAST_0),
        "factor": Key(4, "superresolve: how many times larger", AT_LEAST_1),
        "blur": Key(1.0, "deblur: standard deviation of the Gaussian, in pixels",
            Limit("above 0 and at most 1000", lambda v: 0 < v <= 1000)),
        "variance": Key(1.0, "pigdm, twisted, and ddnm with noise: variance of the data, whose covariance they take "
            "as this times I. 1 is the paper's; pigdm overshoots in smooth directions, where images vary much more: "
            "10 is safer", ABOVE_0),
        "rate": Key(100.0, "dps: the paper's step size times the number of steps", ABOVE_0),
        "iterations": Key(3, "moment_matching: iterations of conjugate gradients", AT_LEAST_1),
        "resamplings": Key(5, "repaint: how often each step is repeated", AT_LEAST_1),
        "particles": Key(8, "twisted: particles for each image", AT_LEAST_1),
    },
    "data": {
        "dataset": Key("cifar10", "files: a folder or zip of images, a folder of .wav, a .npy or .npz at data.path",
            DATASETS, own=True),
        "dataset_sha256": Key("", "sha256 of the file if dataset is FILE.py:NAME; filled in when the config is read"),
        "path": Key("", "where the data lie; empty: the usual place, data/"),
        "image_size": Key(32, "files are cropped to a square of this size, other images shrunk to it; 0: left as they "
            "are", AT_LEAST_0),
        "num_channels": Key(3, "files are made grey (1) or RGB (3); 0: as they are", AT_LEAST_0),
        "length": Key(0, "the first samples of .wav files that are taken; 0: all, if all are as long", AT_LEAST_0),
        "file_bits": Key(0, "bits that image files use of each number, such as 12 in files of 16; 0: all", BITS),
        "bits": Key(0, "how many of the highest of these bits are kept, such as 8; 0: all", BITS),
        "background": Key("white", "colour that transparent files are laid over: a name or #rrggbb"),
        "random_flip": Key(True, "mirror training images with probability 1/2"),
        "centered": Key(True, "pixels in [-1, 1]; False: [0, 1]"),
        "leave_out": Key("", "captions, separated by commas, whose examples are left out of training"),
        "autoencoder": Key("", "model the codes of an autoencoder of these images: the workdir or checkpoint of one, a "
            "folder of diffusers' AutoencoderKL, or a Python file with get_autoencoder()"),
        "autoencoder_sha256": Key("", "sha256 of that autoencoder, filled in by training"),
        "uniform_dequantization": Key(False, "train on (k + u)/levels instead of k/(levels - 1)"),
    },
    "model": {
        "name": Key("ncsnpp", "the network; ncsnpp is DDPM++ and NCSN++, mlp for vectors", tuple(NETWORKS), own=True),
        "name_sha256": Key("", "sha256 of the file if name is FILE.py:NAME; filled in when the config is read"),
        "rule": Key("noise", "what the network's output means", RULES),
        "learned_variance": Key(False, "the network has twice the channels: the other half sets the reverse steps' "
            "variance"),
        "label": Key("time", "the label of t that the network takes: time: 999 t, sigma: sigma/alpha, log_sigma: 4 "
            "log(sigma/alpha), edm: log(sigma/alpha)/4, or index: the chain's", tuple(LABELS)),
        "sigma_data": Key(0.5, "root mean square of the data as the model sees them; for rule edm", ABOVE_0),
        "sigma_min": Key(0.01, "noise at t = 0 (vesde, edm)", ABOVE_0),
        "sigma_max": Key(50.0, "noise at t = 1 (vesde, edm)", ABOVE_0),
        "beta_min": Key(0.1, "noise rate at t = 0 (vpsde, subvpsde)", ABOVE_0),
        "beta_max": Key(20.0, "noise rate at t = 1 (vpsde, subvpsde)", ABOVE_0),
        "gamma_min": Key(-13.3, "minus log SNR at t = 0 (learned)"),
        "gamma_max": Key(5.0, "minus log SNR at t = 1 (learned)"),
        "learn_ends": Key(False, "learn gamma_min and gamma_max as well, by the bound"),
        "num_scales": Key(1000, "steps of the chain, where training.continuous is False", AT_LEAST_1),
        "t_min": Key(1e-5, "smallest time trained on", BELOW_1),
        "nf": Key(128, "channels of the finest level", AT_LEAST_1),
        "ch_mult": Key((1, 2, 2, 2), "channels of the levels (ncsn and ncsnv2: of the stages), in units of nf"),
        "num_res_blocks": Key(4, "residual blocks per level", AT_LEAST_1),
        "attn_resolutions": Key((16,), "image sizes of the levels with attention"),
        "dropout": Key(0.1, "fraction of features that are dropped in training", BELOW_1),
        "embedding_type": Key("positional", "of the label: sinusoidal waves, or Fourier features of its logarithm",
            tuple(EMBEDDINGS)),
        "fourier_scale": Key(16.0, "standard deviation of the random frequencies", ABOVE_0),
        "conditional": Key(True, "give the network the label of the time"),
        "resamp_with_conv": Key(True, "ddpm blocks: resample by convolution"),
        "fir": Key(False, "resample with the kernel fir_kernel; else nearest and average"),
        "fir_kernel": Key((1, 3, 3, 1), "taps of the resampling filter"),
        "skip_rescale": Key(True, "divide sums of two branches by sqrt(2)"),
        "resblock_type": Key("biggan", "blocks resample inside (biggan) or between (ddpm)", get_args(BlockKind)),
        "progressive": Key("none", "how the output is gathered from the levels", get_args(Progressive)),
        "progressive_input": Key("none", "how the input is fed to the levels", get_args(ProgressiveInput)),
        "progressive_combine": Key("sum", "how that input is combined with the features", get_args(Combine)),
        "class_conditional": Key(False, "condition the model on the example's class"),
        "num_classes": Key(0, "how many classes; 0: as many as the data have", AT_LEAST_0),
        "code_channels": Key(4, "channels of an autoencoder's codes", AT_LEAST_1),
        "super_resolution": Key(0, "condition the model on the image shrunk by this factor; 0: not", NONE_OR_2),
        "text_encoder": Key("", "condition the model on the caption, by the text encoder in this folder"),
        "text_length": Key(32, "tokens of a caption at most", AT_LEAST_1),
        "text_sha256": Key("", "sha256 of that encoder, filled in by training"),
        "image_channels": Key(0, "channels of an image that the model is conditioned on; 0: none", AT_LEAST_0),
        "text_width": Key(0, "width of the tokens of a text that the model is conditioned on; 0: none", AT_LEAST_0),
        "pooled_width": Key(0, "width of a summary of the text; 0: none", AT_LEAST_0),
        "scale_shift": Key(False, "the label scales the features of a block as well as shifting them"),
        "num_heads": Key(1, "heads of attention", AT_LEAST_1),
        "head_channels": Key(0, "channels of each head, in place of num_heads; 0: by num_heads", AT_LEAST_0),
        "attend_each": Key(False, "on the way up attention follows each block, not only the last of a level"),
        "init_scale": Key(0.0, "scale of each block's last layer; 0: blocks begin as the identity", AT_LEAST_0),
        "nonlinearity": Key("swish", "activation", get_args(Activation)),
        "fourier_features": Key((), "n: sin and cos of 2^n pi x join the image's channels"),
        "hidden": Key(128, "mlp, dit: width", AT_LEAST_1),
        "depth": Key(3, "mlp: hidden layers; dit: blocks", AT_LEAST_1),
        "patch_size": Key(2, "dit: pixels of a patch's side", AT_LEAST_1),
        "norm": Key("layer", "dit: normalisation of tokens, layer or rms", get_args(Norm)),
        "feed_forward": Key("gelu", "dit: what follows attention, gelu or the gated swiglu", get_args(FeedForward)),
        "positions": Key("absolute", "dit: where tokens are, absolute waves or rotary", get_args(Positions)),
        "qk_norm": Key(False, "dit: normalise queries and keys of attention"),
        "ema_rate": Key(0.9999, "decay of the moving average of the weights, per step", BELOW_1),
        "ema_halflife": Key(0, "its half-life in training examples instead; 0: use ema_rate", AT_LEAST_0, INT64),
        "ema_power": Key(False, "also keep power averages of the relative widths 0.05 and 0.1, of which sampling.ema "
            "makes those of any width afterwards (more kept checkpoints: nearer)"),
    },
    "optim": {
        "optimizer": Key("Adam", "optimizer of the weights", ("Adam", "AdamW")),
        "lr": Key(2e-4, "learning rate", ABOVE_0),
        "beta1": Key(0.9, "decay of the gradient's mean", BELOW_1),
        "beta2": Key(0.999, "decay of the gradient's square", BELOW_1),
        "eps": Key(1e-8, "added to the gradient's root mean square", UP_TO_1),
        "weight_decay": Key(0.0, "decay towards 0: Adam's a penalty, AdamW's decoupled", AT_LEAST_0),
        "warmup": Key(5000, "steps over which the learning rate rises from 0", AT_LEAST_0),
        "decay": Key(0.0, "last fraction of the run, over which the learning rate falls to 0", FRACTION),
        "grad_clip": Key(1.0, "largest norm of the gradient; negative: no clipping",
            Limit("above 0, or negative for no clipping (at 0 nothing is trained)", lambda v: v != 0)),
    },
}  # fmt: skip

KEYS = {f"{section}.{name}".lstrip("."): key for section, keys in SECTIONS.items() for name, key in keys.items()}
DEFAULTS: dict[str, Any] = {key: known.default for key, known in KEYS.items()}

# Keys of score_sde_pytorch that have another name here.
MOVED = {
    "training.snapshot_freq_for_preemption": "set training.snapshot_freq (every checkpoint can be resumed)",
    "eval.enable_bpd": "use --mode likelihood",
    "eval.enable_loss": "training reports it every training.eval_freq steps",
    "eval.enable_sampling": "use --mode sample",
    "eval.bpd_dataset": "set eval.split",
    "eval.num_samples": "set sampling.num_samples",
    "model.scale_by_sigma": "set model.rule (noise: the score is the network's output over -sigma)",
}


def default_config() -> ConfigDict:
    """Every key with its default, locked: score_sde's common settings for CIFAR-10, and what this package adds."""
    return config_of(DEFAULTS)


def config_of(values: Mapping[str, Any]) -> ConfigDict:
    """The locked config of {"section.key": value} for all keys."""
    config = ConfigDict()
    for key in KEYS:  # item by item: ConfigDict(...) of them all takes six times as long
        section, _, name = key.rpartition(".")
        if section and section not in config:
            config[section] = ConfigDict()
        (config[section] if section else config)[name] = values[key]
    return config.lock()


def explain(key: str) -> str:
    """A line on a key: "seed=42: seed of initial weights ... (an integer, at least 0)". ValueError for no key."""
    if key not in KEYS:
        refuse_unknown(key)
    return f"{key}={KEYS[key].default}: {KEYS[key].explained}"


def check(key: str, value: Any, where: str = "") -> Any:
    """`value` as the type of `key`. Raises ValueError, which begins with `where`, for a value that it may not have."""
    if key not in KEYS:
        refuse_unknown(key, where)
    try:
        return KEYS[key].checked(value)
    except ValueError as error:
        raise ValueError(f"{where}{key} {error}") from None


def refuse_unknown(key: str, where: str = "") -> NoReturn:
    """Raise ValueError for an unknown key, with the nearest known one: another spelling, or another section."""
    sections = sorted(section for section in SECTIONS if section)
    section, _, name = key.rpartition(".")

    def likeness(other: str) -> float:
        whole = difflib.SequenceMatcher(None, key, other).ratio()
        return whole + difflib.SequenceMatcher(None, name, other.rpartition(".")[2]).ratio()

    best = max([*sorted(KEYS), *sections], key=likeness)
    if key in sections:
        raise ValueError(f"{where}'{key}' is a section; set a key of it: {', '.join(sorted(SECTIONS[key]))}")
    if key in MOVED:
        hint = f"{MOVED[key]} instead"
    elif section in sections and likeness(best) < 1.2:
        hint = f"the section {section} has {', '.join(sorted(SECTIONS[section]))}"
    elif likeness(best) < 1.2:
        hint = f"there are seed, device and the sections {', '.join(sections)}"
    else:
        hint = f"did you mean '{best}'?"
    raise ValueError(f"{where}unknown config key '{key}'; {hint}")


def nearest(word: str, words: Sequence[str]) -> str | None:
    """The most similar of the words; None where none is."""
    return next(iter(difflib.get_close_matches(word, words, n=1, cutoff=0.5)), None)


def brief(value: Any) -> str:
    """The repr of a value, cut after 80 characters where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write integers of thousands of digits
        text = "an integer of thousands of digits"
    return text if len(text) <= 100 else f"{text[:80]}..."
