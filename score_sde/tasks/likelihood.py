"""The mode likelihood: bits/dim of held-out examples with its errors, by one of three estimators.

They are the probability-flow ODE, the variational bound of the SDE, and that of a chain, which for pixels and vectors
`bound` evaluates.
"""

from __future__ import annotations

import argparse
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor

from ..config.build import build_bound_times
from ..data.captions import Text
from ..data.codecs import AutoencoderCodec
from ..data.sets import Data, Split
from ..likelihood.chain_bound import chain_bound
from ..likelihood.code_bound import LatentBound, in_bits, latent_bound
from ..likelihood.dequantisation import Dequantiser, LogProbability, log_probability, uniform_numbers
from ..likelihood.exact import Likelihood, log_likelihood
from ..likelihood.sde_bound import variational_bound
from ..machine.log import log
from ..models.base import ScoreModel
from ..models.pixel_levels import bits
from .bound import ChainEvaluation
from .conditions import conditioned, given
from .dequantize import law_of
from .heat_map import write_heat_map
from .inputs import number_of, split_of
from .job import Job
from .results import Arrays, error_of_mean, mean_and_error, running_mean, write_arrays
from .stamps import StampedJob, about_examples, about_times, stamped
from .texts import embedded_captions

CODED = ("reconstruction", "latent", "entropy")  # parts of the bound of a model of codes


def command(options: argparse.Namespace, job: Job, images: Data) -> None:
    """--mode likelihood."""
    config = job.config
    text = embedded_captions(config, images, job.workdir, job.processes) if conditioned(config) else None
    folder, result = run_likelihood(job, split_of(images, config), text)
    what = (result[key] for key in ("images", "split", "estimate"))
    log.info("%s (%d %s examples; %s): %s", reported(result), *what, folder)
    if "diffusion" in result:
        parts = [result[key] for key in ("prior", "diffusion", "reconstruction")]
        log.info("of it prior %.4f + diffusion %.4f (the rate), reconstruction %.4f (the distortion)", *parts)
    if "entropy" in result:
        parts = [f"{result[key]:.4f} ± {result['errors_of_parts'][key]:.4f}" for key in CODED]
        log.info("at most so many: the reconstruction's %s + the latent's %s - the posterior's entropy %s", *parts)


def run_likelihood(job: Job, split: Split, text: Text | None = None) -> tuple[Path, dict[str, Any]]:
    """Bits/dim (nats for vectors) of a split as the section eval says, into a folder below likelihood/.

    eval.estimate chooses the estimator. `likelihood.npz` has `bits_per_dim` (images, dequantisations), `log_prob`, the
    same in nats, and `std_error`, in nats over probes or draws; the stamp has their mean and its errors (see
    `reported`). For a chain's bound of pixels or vectors it is the file of `ChainEvaluation`.

    For a model of codes, whose `split` has the images, it is the bound of `latent_bound`, in bits/dim of the pixels,
    with its three parts (images, dequantisations) beside it; a dequantisation then is a draw of the code, and a chain's
    bound takes the place of log p(y).
    """
    kind, config, codec, e = estimator_of(job.config), job.config, job.codec, job.config.eval
    coded, n, levels = isinstance(codec, AutoencoderCodec), number_of(split, config), (codec.pixels or codec).levels
    times = build_bound_times(config, job.model.sde) if kind == "bound" else None
    given_labels, grid = conditioned(config), {} if times is None else {"grid": about_times(times)}
    facts: dict[str, Any] = {"sde": repr(job.model.sde)}
    facts |= about_examples(split, e.split, n, text if given_labels else None)
    facts |= {"given_labels": given_labels, **grid, "levels": levels, "unit": "bits/dim" if levels else "nats"}
    device, words = job.processes.device, (e.split,)
    on_device = split.to(device), None if text is None else text.to(device)
    if times is not None and not coded:
        decoded = "pixels without dequantisation" if levels else "Gaussian decoder"
        facts["estimate"] = f"variational bound of {len(times) - 1} steps, {decoded}"
        limited = stamped(job, kind, facts)
        chain = ChainEvaluation(limited, *on_device, times, n)
        return limited.once("likelihood", (*words, "bound"), "likelihood.npz", chain.all)
    law, sentence, dequantised = law_of(job)
    repeats, pictures = e.dequantizations if law or coded else 1, min(e.heat_map, n)
    facts |= {"estimate": ESTIMATORS[kind].road + sentence, **dequantised, "dequantizations": repeats}
    limited = stamped(job, kind, {**facts, "t_min": law.t_min if law else e.t_min})
    estimator = ESTIMATORS[kind](limited.config, *([] if times is None else [times]))
    evaluation = _Evaluation(limited, *on_device, law, estimator, n, repeats)
    folder, result = limited.once("likelihood", words, "likelihood.npz", evaluation.all)
    if pictures:
        write_heat_map(limited, on_device[0], law, folder, pictures, on_device[1])
    return folder, result


def estimator_of(config: ConfigDict) -> str:
    """Which of `ESTIMATORS` eval.estimate names; "auto" is the chain's bound for models of a chain, else the ODE."""
    estimate = config.eval.estimate
    return str(estimate) if estimate != "auto" else "ode" if config.training.continuous else "bound"


def reported(result: dict[str, Any]) -> str:
    """A result in one line, ``bits/dim 3.4120 ± 0.0060 (images) ± 0.0010 (probes) ± 0.0001 (solver), NFE 91``.

    Images: the standard error of the mean over images; their spread contains that of probes and dequantisation.
    Probes: the part of it that other probes would change, from their spread in each image; for a single probe, from a
    pair for each of the first eval.check_images images. Solver: the mean absolute difference, in those images, from
    tolerances ten times tighter. Draws: the part of a bound's Monte Carlo over time, or over the chain's steps.
    """
    errors = result.get("errors", {"images": result["standard_error"]})
    parts = [
        f"± {error:.4f} ({name})" if error is not None and not math.isnan(error) else f"± unknown ({name})"
        for name, error in errors.items()
    ]
    failed = result.get("failed", [])
    without = f", without {len(failed)} images that failed: {', '.join(map(str, failed))}" if failed else ""
    return f"{result['unit']} {result['mean']:.4f} {' '.join(parts)}, NFE {result['nfe']:.0f}{without}"


@dataclass(frozen=True)
class Estimator(ABC):
    """It estimates log p, or a lower bound on it, for the examples first, first + 1, ..., by the section eval."""

    config: ConfigDict
    road: ClassVar[str]

    @abstractmethod
    def of_floats(self, model: ScoreModel, x: Tensor, first: int) -> Likelihood:
        """The estimate for x (B, *shape) as the model sees it."""

    def of_pixels(self, model: ScoreModel, k: Tensor, law: Dequantiser, first: int) -> LogProbability | Likelihood:
        """The estimate for stored levels k (B, *shape): that of their image under `law`, less its own log density."""
        u = uniform_numbers(tuple(k.shape), 1, self.config.eval.seed, first)[0].to(k.device)
        x, log_q = law(k, u)
        bound = self.of_floats(model, x, first)
        return bound._replace(log_prob=bound.log_prob - log_q.flatten(1).sum(1))


@dataclass(frozen=True)
class Flow(Estimator):
    """Log p by the probability-flow ODE."""

    tighter: float = 1.0  # divides the tolerances
    probes: int = 0  # in place of eval.probes
    road = "probability-flow ODE"

    def of_floats(self, model: ScoreModel, x: Tensor, first: int) -> Likelihood:
        return log_likelihood(model, x, t_min=self.config.eval.t_min, **self.options(first))

    def of_pixels(self, model: ScoreModel, k: Tensor, law: Dequantiser, first: int) -> LogProbability:
        return log_probability(model, k, law, samples=self.config.eval.importance_samples, **self.options(first))

    def options(self, first: int) -> dict[str, Any]:
        e = self.config.eval
        solver = {"rtol": e.rtol / self.tighter, "atol": e.atol / self.tighter, "method": e.ode_method}
        return {**solver, "probe": e.probe, "probes": self.probes or e.probes, "seed": e.seed, "first": first}


@dataclass(frozen=True)
class SdeBound(Estimator):
    """The variational bound of the SDE, with eval.draws of its times for each example."""

    road = "variational bound of the SDE"

    def of_floats(self, model: ScoreModel, x: Tensor, first: int) -> Likelihood:
        e = self.config.eval
        bound = variational_bound(model, x, t_min=e.t_min, draws=e.draws, seed=e.seed, first=first)
        return Likelihood(-bound.total, bound.std_error, x, e.draws)


@dataclass(frozen=True)
class ChainBound(Estimator):
    """The variational bound of a chain of `times`, here for floats."""

    times: Tensor
    road = "variational bound of the chain"

    def of_floats(self, model: ScoreModel, x: Tensor, first: int) -> Likelihood:
        e, variance = self.config.eval, self.config.sampling.variance
        bound = chain_bound(model, x, self.times, variance=variance, terms=e.terms or None, seed=e.seed, first=first)
        return Likelihood(-bound.total, bound.std_error, x, bound.times.shape[-1] + 1)


ESTIMATORS: dict[str, Any] = {"ode": Flow, "sde_bound": SdeBound, "bound": ChainBound}


@dataclass(frozen=True)
class _Evaluation:
    """The likelihood of a split's first n examples, each `repeats` times, by an estimator; all on the device.

    Row j of the work is example j % n in dequantisation j // n, so that a run that is stopped early has seen as many
    examples as possible once.
    """

    job: StampedJob
    split: Split
    text: Text | None
    law: Dequantiser | None
    estimator: Estimator
    n: int
    repeats: int

    def all(self, folder: Path) -> dict[str, Any]:
        """The values of all examples, their mean and its errors."""
        unit = "bits/dim" if self.job.codec.pixels else "nats"
        joined = self.batches(folder, self.n * self.repeats, self.batch, unit, running_mean(unit))
        by_image = {name: each.reshape(self.repeats, self.n).T for name, each in joined.items() if name != "nfe"}
        values = by_image["value"]
        failed = np.isnan(values.mean(1))  # where "embedded" gave up, which it does on single images
        if self.job.processes.main:
            stored = {name: by_image[name] for name in ("std_error", "log_prob", *CODED) if name in by_image}
            stored["bits_per_dim" if self.job.codec.pixels else "nats"] = values
            write_arrays(folder / "likelihood.npz", stored)
        mean, error = mean_and_error(values[~failed].mean(1))
        errors = {"images": error, **self.errors(folder, by_image, ~failed)}
        parts = {name: mean_and_error(by_image[name][~failed].mean(1)) for name in CODED if name in by_image}
        known = {name: None if value is None or math.isnan(value) else value for name, value in errors.items()}
        result = {"mean": mean, "standard_error": error, "errors": known}
        result |= {name: part[0] for name, part in parts.items()}
        if parts:
            result["errors_of_parts"] = {name: part[1] for name, part in parts.items()}
        return {**result, "nfe": float(joined["nfe"].mean()), "failed": np.flatnonzero(failed).tolist()}

    def batches(self, folder: Path, total: int, compute: Callable[[int, int], Arrays], *shown: Any) -> Arrays:
        return self.job.in_batches(folder, total, self.job.config.eval.batch_size, compute, *shown)

    def per_nat(self) -> float:
        """Bits per dimension of a nat; vectors stay in nats."""
        return bits(1.0, math.prod(self.split.shape)) if self.job.codec.pixels else 1.0

    def batch(self, first: int, count: int, estimator: Estimator | None = None) -> Arrays:
        """The rows first to first + count - 1."""
        codec, estimator = self.job.codec, estimator or self.estimator
        index = torch.arange(first, first + count) % self.n
        k = self.split[index][0]
        model = given(self.job.config, self.job.model, self.split, index, self.text, codec)
        estimate: LogProbability | Likelihood | LatentBound
        if isinstance(codec, AutoencoderCodec):
            density = partial(estimator.of_floats, model, first=first)
            estimate = latent_bound(codec, k, density, seed=self.job.config.eval.seed, first=first)
        elif self.law is not None:
            estimate = estimator.of_pixels(model, k, self.law, first)
        else:
            estimate = estimator.of_floats(model, k.to(torch.float32), first)
        arrays = {"value": -self.per_nat() * estimate.log_prob}
        arrays |= {"log_prob": estimate.log_prob, "std_error": estimate.std_error}
        if isinstance(estimate, LatentBound):
            arrays |= in_bits(estimate, math.prod(self.split.shape))
        return {**{name: v.double().cpu().numpy() for name, v in arrays.items()}, "nfe": np.array([estimate.nfe])}

    def errors(self, folder: Path, by_image: Arrays, kept: np.ndarray) -> dict[str, float | None]:
        """The parts of the images' error that other draws would change, by what is drawn, and the solver's error."""
        e, std_error = self.job.config.eval, by_image["std_error"]
        errors: dict[str, float | None] = {}
        if isinstance(self.job.codec, AutoencoderCodec) and self.repeats > 1:
            errors["codes"] = error_of_mean(by_image["value"][kept].std(1, ddof=1) / math.sqrt(self.repeats))
        spread = self.per_nat() * error_of_mean(std_error[kept])
        if isinstance(self.estimator, Flow):
            return errors | self.errors_of_flow(folder, by_image, kept, spread)
        return errors | ({"draws": spread} if isinstance(self.estimator, SdeBound) or e.terms else {})

    def errors_of_flow(
        self, folder: Path, by_image: Arrays, kept: np.ndarray, spread: float
    ) -> dict[str, float | None]:
        """The errors of probes and solver; the first eval.check_images images are evaluated again for the solver's."""
        e, config = self.job.config.eval, self.job.config
        checks = min(e.check_images, self.n)
        errors: dict[str, float | None] = {"probes": None}
        if e.probe == "exact" or e.probes > 1:
            errors["probes"] = spread
        elif checks:
            again = partial(self.batch, estimator=Flow(config, probes=2))
            pairs = self.batches(folder / "probes", checks, again, "probes")
            # the error of one probe is sqrt(2) times that of two
            squares = pairs["std_error"][kept[:checks]] ** 2
            errors["probes"] = self.per_nat() * math.sqrt(2 * squares.mean() / (self.n * self.repeats))
        if checks:
            again = partial(self.batch, estimator=Flow(config, tighter=10.0))
            finer = self.batches(folder / "solver", checks, again, "solver")["value"]
            off = np.abs(finer - by_image["value"][:checks, 0])
            errors["solver"] = float(off[kept[:checks]].mean())
        return errors
