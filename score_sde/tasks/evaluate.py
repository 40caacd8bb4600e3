"""Long evaluations: the modes sample and likelihood over many examples, in batches that `results` keeps.

Example i depends on (seed, i) alone, so batches may be any size and be shared by processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor

from ..config.build import build_bound_times, build_sampler, build_times, grid_name
from ..data.captions import Text
from ..data.codecs import AutoencoderCodec, Codec, PixelCodec
from ..data.sets import Split, digest
from ..likelihood.chain_bound import chain_bound
from ..likelihood.code_bound import LatentBound, in_bits, latent_bound
from ..likelihood.dequantisation import (
    Dequantiser,
    LogProbability,
    TruncatedNormal,
    Uniform,
    log_probability,
    truncation_time,
    uniform_numbers,
)
from ..likelihood.exact import Likelihood, log_likelihood
from ..likelihood.heat_maps import heat_map
from ..likelihood.sde_bound import variational_bound
from ..machine.parallel import Processes
from ..machine.progress import Progress
from ..models.base import Estimate, ScoreModel
from ..models.guidance import clip, threshold
from ..models.pixel_levels import bits
from ..ode.integrators import Solver
from ..samplers import sample
from .checkpoint import file_hash
from .class_names import class_name, class_names_of
from .conditions import Guides, Wanted, about, check_number, conditional, given, in_turn, sampled_labels, told
from .dequantize import dequantiser_path, load_dequantiser
from .pictures import heat, write_grid
from .results import (
    Arrays,
    channels_last,
    in_batches,
    kept,
    mean_and_error,
    once,
    read_arrays,
    write_arrays,
    write_pictures,
    write_single_pictures,
)
from .stamps import asked, keys_of, stamp

LATENT = ("reconstruction", "latent", "entropy")  # parts of the bound of a model of codes


class Counted(ScoreModel):
    """A model that counts its evaluations."""

    def __init__(self, model: ScoreModel) -> None:
        super().__init__(model.sde)
        self.model, self.nfe = model, 0

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Estimate:
        self.nfe += 1
        return self.model(x, t, **condition)


def about_grid(config: ConfigDict, times: Tensor) -> dict[str, Any]:
    """What a stamp says of the times that were sampled on."""
    ends = {"first": times[0].item(), "last": times[-1].item()}
    return {"name": grid_name(config), "steps": len(times) - 1, **ends}


def about_bound(times: Tensor) -> dict[str, Any]:
    """What a stamp says of the steps of a chain's bound."""
    return {"steps": len(times) - 1, "first": times[0].item(), "last": times[-1].item()}


def about_examples(split: Split, name: str, number: int, text: Text | None = None) -> dict[str, Any]:
    """What a stamp says of the examples, the first `number` of a split, and of their captions' embeddings."""
    found = {"split": name, "images": number, "examples_sha256": split.digest()}
    return found if text is None else {**found, "text_sha256": digest(*text)}


def run_sampling(
    model: ScoreModel,
    config: ConfigDict,
    shape: tuple[int, ...],
    codec: Codec,
    checkpoint: Path,
    base: Path,
    processes: Processes,
    guides: Guides | None = None,
    wanted: Wanted | None = None,
    scales: Sequence[float] = (),
) -> tuple[Path, dict[str, Any]]:
    """Samples as the section sampling says, into a folder below `base`: `samples.npz` (`arr_0`), a grid, a stamp.

    Images are uint8 (N, H, W, C), rounded as `PixelCodec.decode` says; vectors are float32 (N, D). Where classes are
    sampled `arr_1` has the labels, (N,). With `scales` of guidance, in place of sampling.guidance, there are as many
    times N, the same noise with each scale in turn. A guided evaluation is counted as one, whatever guides by it.

    Where samples begin with examples (`Wanted.changed`) `given` has each sample's, and the grid shows it before it.
    """
    s, guides = config.sampling, guides or Guides()
    wanted = wanted or Wanted(sampled_labels(config, guides))
    labels, strengths = wanted.labels, list(scales) or [s.guidance]
    counted = Counted(model)
    sampler, times = build_sampler(config), build_times(config, model.sde, counted, shape)
    check_number(s.labels, wanted.prompts, s.num_samples, "sampling.num_samples")
    built = {"sampler": repr(sampler), "grid": about_grid(config, times), "shape": list(shape)}
    told_of = {"sde": repr(model.sde), **built, **about(wanted, strengths, guides)}
    keys = keys_of("sample" if wanted.changed is None else "sample from examples", config)
    made_from = stamp(checkpoint, s.weights, codec, config, keys, told_of)
    label, single_png = f"{checkpoint.stem}-{s.weights}-{s.method}", s.single_png
    config = asked(config, keys)
    s = config.sampling

    def compute(first: int, count: int, scale: float) -> Arrays:
        counted.nfe = 0
        chosen = in_turn(labels, first, count)
        conditions = wanted.of(first, count, config, codec, model.sde)
        x = sample(
            held(conditional(counted, conditions, chosen, config, guides, scale), config, codec),
            sampler,
            (count, *shape),
            times,
            start=wanted.start(first, count, config, codec, model.sde, times[0]),
            seed=s.seed,
            first=first,
            device=processes.device,
            denoise=s.noise_removal,
            temperature=s.temperature,
            progress=processes.main,
        )
        found = {"arr_0": channels_last(codec.decode(x)), "nfe": np.array([counted.nfe])}
        if wanted.changed is not None:
            k = wanted.changed[torch.arange(first, first + count) % len(wanted.changed)][0]
            found["given"] = channels_last(k if codec.levels or codec.pixels is None else codec.decode(k))
        return {**found, "arr_1": chosen.numpy()} if labels else found

    def work(folder: Path) -> dict[str, Any]:
        parts = []
        for i, scale in enumerate(strengths):
            of_scale = partial(compute, scale=scale)
            where = folder / f"scale-{i}" if len(strengths) > 1 else folder
            parts.append(in_batches(where, s.num_samples, s.batch_size, processes, of_scale, "batches"))
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if processes.main:
            stored = ("arr_0", "arr_1", "given")
            write_arrays(folder / "samples.npz", {name: joined[name] for name in stored if name in joined})
            groups, names = _groups(wanted, strengths, s.num_samples, class_names_of(checkpoint))
            shown, columns = joined["arr_0"], None
            if "given" in joined and codec.pixels is not None:
                shown = np.stack([joined["given"], shown], 1).reshape(-1, *shown.shape[1:])
                groups = None if groups is None else [group for group in groups for _ in range(2)]
                columns = None if groups else 2 * max(1, min(4, s.num_samples // 2))
            write_pictures(shown, codec, folder, columns, groups, names)
        return {"nfe": float(joined["nfe"].mean())}

    folder, result = once(base, label, made_from, "samples.npz", processes, work)
    if single_png and codec.pixels is not None and processes.main:
        write_single_pictures(read_arrays(folder / "samples.npz"), codec.pixels, folder)
    return folder, result


def _groups(
    wanted: Wanted, scales: Sequence[float], number: int, classes: Sequence[str]
) -> tuple[list[int] | None, list[str]]:
    """(group of each sample, groups' names): rows of a grid are of a scale, or else of a prompt or a class."""
    if len(scales) > 1:
        return [i for i in range(len(scales)) for _ in range(number)], [f"guidance {scale:g}" for scale in scales]
    names = list(wanted.prompts) or [class_name(label, classes) for label in wanted.labels]
    if not 1 < len(names) <= number:
        return None, []
    return [i % len(names) for i in range(number)], names


def held(model: ScoreModel, config: ConfigDict, codec: Codec) -> ScoreModel:
    """The model with its estimates of pixels held or drawn into their range, as the section sampling says."""
    s = config.sampling
    if not isinstance(codec, PixelCodec):
        return model
    model = clip(model, *codec.range) if s.clip_denoised else model
    return threshold(model, s.threshold, *codec.range) if s.threshold > 0 else model


def run_likelihood(
    model: ScoreModel,
    config: ConfigDict,
    split: Split,
    codec: Codec,
    checkpoint: Path,
    base: Path,
    processes: Processes,
    text: Text | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Bits/dim (nats for vectors) of a split as the section eval says, into a folder below `base`.

    eval.estimate says by which road: the probability-flow ODE or the SDE's variational bound, here, or a chain's
    variational bound, `run_bound`. `likelihood.npz` has `bits_per_dim` (images, dequantisations), `log_prob`, the same
    in nats, and `std_error`, in nats over probes or draws; the stamp has their mean, and its errors apart (see
    `reported`). Row j of the work is image j % n in dequantisation j // n, so that a run that was stopped early has
    gone once over as many images as it could.

    Of a model of codes, whose `split` are the images, it is the bound of `latent_bound`, in bits/dim of the pixels,
    with its three parts (images, dequantisations) beside it; a dequantisation then is a draw of the code, and a chain's
    bound takes the place of log p(y).
    """
    e = config.eval
    latent, chain = isinstance(codec, AutoencoderCodec), e.estimate == "bound"
    chain = chain or (e.estimate == "auto" and not config.training.continuous)
    if chain and not latent:
        return run_bound(model, config, split, codec, checkpoint, base, processes, text)
    n = min(e.num_images, len(split)) if e.num_images else len(split)
    law, dequantised = _dequantiser(model, config, codec, checkpoint, base.parent)
    repeats = e.dequantizations if law or latent else 1
    levels = None if codec.pixels is None else codec.pixels.levels
    ode = e.estimate != "sde_bound" and not chain
    keys = keys_of("ode" if ode else "bound" if chain else "sde_bound", config)
    road = "probability-flow ODE" if ode else "variational bound of the " + ("chain" if chain else "SDE")
    times = build_bound_times(config, model.sde) if chain else None
    made_from = stamp(
        checkpoint,
        e.weights,
        codec,
        config,
        keys,
        {
            "sde": repr(model.sde),
            "estimate": road + dequantised.pop("sentence"),
            **dequantised,
            **about_examples(split, e.split, n, text if told(config) else None),
            "t_min": law.t_min if law else e.t_min,
            **({} if times is None else {"grid": about_bound(times)}),
            "dequantizations": repeats,
            "given_labels": told(config),
            "levels": levels,
            "unit": "bits/dim" if levels else "nats",
        },
    )
    label, heat_map = f"{checkpoint.stem}-{e.weights}-{e.split}", min(e.heat_map, n)
    config = asked(config, keys)
    e, split, whole = config.eval, split.to(processes.device), model
    text = None if text is None else text.to(processes.device)
    unit = bits(1.0, math.prod(split.shape)) if levels else 1.0  # of a nat; vectors stay in nats

    def compute(first: int, count: int, tighter: float = 1.0, probes: int = 0) -> Arrays:
        index = torch.arange(first, first + count) % n
        k, model = split[index][0], given(config, whole, split, index, text, codec)
        where, options = {"seed": e.seed, "first": first}, dict[str, Any]()
        if ode:
            solver = {"rtol": e.rtol / tighter, "atol": e.atol / tighter, "method": e.ode_method}
            options = {**where, **solver, "probe": e.probe, "probes": probes or e.probes}

        def log_density(y: Tensor) -> Likelihood:
            """The model's, or a lower bound on it, of floats."""
            if ode:
                return log_likelihood(model, y, t_min=e.t_min, **options)
            if times is not None:
                variance = config.sampling.variance
                of_chain = chain_bound(model, y, times, variance=variance, terms=e.terms or None, **where)
                return Likelihood(-of_chain.total, of_chain.std_error, y, of_chain.times.shape[-1] + 1)
            bound = variational_bound(model, y, t_min=e.t_min, draws=e.draws, **where)
            return Likelihood(-bound.total, bound.std_error, y, e.draws)

        found: LogProbability | Likelihood | LatentBound
        if isinstance(codec, AutoencoderCodec):
            found = latent_bound(codec, k, log_density, **where)
        elif ode and law:
            found = log_probability(model, k, law, samples=e.importance_samples, **options)
        elif ode:
            found = log_density(k.to(torch.float32))
        else:
            u = uniform_numbers(tuple(k.shape), 1, e.seed, first)[0].to(k.device)
            x, log_q = law(k, u) if law else (k.to(torch.float32), torch.zeros(()))
            found = log_density(x)
            found = found._replace(log_prob=found.log_prob - (log_q.flatten(1).sum(1) if law else 0))
        arrays = {"value": -unit * found.log_prob, "log_prob": found.log_prob, "std_error": found.std_error}
        if isinstance(found, LatentBound):
            arrays |= in_bits(found, math.prod(split.shape))
        return {**{name: v.double().cpu().numpy() for name, v in arrays.items()}, "nfe": np.array([found.nfe])}

    def progress(bar: Progress, done: list[Arrays]) -> None:
        mean, error = mean_and_error(np.concatenate([arrays["value"] for arrays in done]))
        bar.note(f"{made_from['unit']} {mean:.3f} ± {error:.3f}")

    def work(folder: Path) -> dict[str, Any]:
        batches = partial(in_batches, batch_size=e.batch_size, processes=processes)
        joined = batches(folder, n * repeats, compute=compute, description=made_from["unit"], progress=progress)
        values = joined["value"].reshape(repeats, n).T
        failed = np.isnan(values.mean(1))  # where "embedded" gave up, which it does on single images
        mean, error = mean_and_error(values[~failed].mean(1))
        std_error = joined["std_error"].reshape(repeats, n).T
        errors: dict[str, float | None] = {"images": error}
        if latent and repeats > 1:  # the part of it that other draws of the codes would change
            errors["codes"] = _error_of_mean(values[~failed].std(1, ddof=1) / math.sqrt(repeats))
        checks = min(e.check_images, n) if ode else 0
        if not ode:
            if not chain or e.terms:
                errors["draws"] = unit * _error_of_mean(std_error[~failed])
        elif e.probe == "exact" or e.probes > 1:
            errors["probes"] = unit * _error_of_mean(std_error[~failed])
        elif checks:
            again = partial(compute, probes=2)
            pairs = batches(folder / "probes", checks, compute=again, description="probes")
            # sqrt(2) times the error of two is that of one.
            squares = pairs["std_error"][~failed[:checks]] ** 2
            errors["probes"] = unit * math.sqrt(2 * squares.mean() / (n * repeats))
        else:
            errors["probes"] = None
        if checks:
            again = partial(compute, tighter=10.0)
            finer = batches(folder / "solver", checks, compute=again, description="solver")["value"]
            errors["solver"] = float(np.abs(finer - joined["value"][:checks])[~failed[:checks]].mean())
        if processes.main:
            kept = {"bits_per_dim" if levels else "nats": values, "std_error": std_error}
            more = {name: joined[name].reshape(repeats, n).T for name in ("log_prob", *LATENT) if name in joined}
            write_arrays(folder / "likelihood.npz", {**kept, **more})
        parts = {name: joined[name].reshape(repeats, n)[:, ~failed].mean(0) for name in LATENT if name in joined}
        each = {name: mean_and_error(part) for name, part in parts.items()}
        return {
            "mean": mean,
            "standard_error": error,
            "errors": {name: None if value is None or math.isnan(value) else value for name, value in errors.items()},
            **{name: found[0] for name, found in each.items()},
            **({"errors_of_parts": {name: found[1] for name, found in each.items()}} if each else {}),
            "nfe": float(joined["nfe"].mean()),
            "failed": np.flatnonzero(failed).tolist(),
        }

    folder, result = once(base, label, made_from, "likelihood.npz", processes, work)
    if heat_map:
        write_heat_map(model, config, split, codec, law, folder, heat_map, processes, text)
    return folder, result


def _error_of_mean(each: np.ndarray) -> float:
    """Standard error of the mean of values with independent standard errors."""
    return math.sqrt((each**2).sum()) / each.size


def reported(result: dict[str, Any]) -> str:
    """A result in one line, ``bits/dim 3.4120 ± 0.0060 (images) ± 0.0010 (probes) ± 0.0001 (solver), NFE 91``.

    Images: the standard error of the mean over images, in whose spread that of probes and dequantisation is contained.
    Probes: the part of it that other probes would change, from their spread in each image; of a single probe, from a
    pair for each of the first eval.check_images images. Solver: the mean absolute difference, in those images, from
    tolerances ten times tighter. Draws: of a bound, the part of its Monte Carlo over time, or over the chain's steps.
    """
    errors = result.get("errors", {"images": result["standard_error"]})
    parts = [
        f"± {error:.4f} ({name})" if error is not None and not math.isnan(error) else f"± unknown ({name})"
        for name, error in errors.items()
    ]
    failed = result.get("failed", [])
    without = f", without {len(failed)} images that failed: {', '.join(map(str, failed))}" if failed else ""
    return f"{result['unit']} {result['mean']:.4f} {' '.join(parts)}, NFE {result['nfe']:.0f}{without}"


def _dequantiser(
    model: ScoreModel, config: ConfigDict, codec: Codec, checkpoint: Path, workdir: Path
) -> tuple[Dequantiser | None, dict[str, Any]]:
    """How the pixels are dequantised, and what the stamp says of it; None for vectors."""
    e = config.eval
    if not isinstance(codec, PixelCodec):
        for key, usual in (("dequantization", "uniform"), ("importance_samples", 1), ("heat_map", 0)):
            if e[key] != usual:
                raise ValueError(f"eval.{key}={e[key]} is for pixels, and these data are floats: set it to {usual}")
        coded = isinstance(codec, AutoencoderCodec)
        return None, {"sentence": ", a bound with the autoencoder's reconstruction and entropy" if coded else ""}
    law: Dequantiser
    about: dict[str, Any] = {}
    if e.dequantization == "uniform":
        law = Uniform(codec, e.t_min)
    elif e.dequantization == "truncated_normal":
        law = TruncatedNormal(codec, model.sde, truncation_time(codec, model.sde, least=e.t_min))
    else:
        path = dequantiser_path(workdir, checkpoint, e.weights)
        law, header = load_dequantiser(path)
        if header.get("checkpoint_sha256") != file_hash(checkpoint) or law.t_min != e.t_min or law.codec != codec:
            raise ValueError(f"{path} was fitted to another checkpoint or t_min; run --mode dequantize again")
        law, about["dequantizer_sha256"] = law.to(next(model.parameters()).device), file_hash(path)
    sentence = f", {e.dequantization.replace('_', ' ')} dequantisation"
    if e.importance_samples > 1:
        sentence += f", {e.importance_samples} importance samples"
    return law, {"sentence": sentence, **about}


def write_heat_map(
    model: ScoreModel,
    config: ConfigDict,
    split: Split,
    codec: Codec,
    law: Dequantiser | None,
    folder: Path,
    count: int,
    processes: Processes,
    text: Text | None = None,
) -> None:
    """The first images beside the bits of their pixels, `heat_map.png` and, (count, C, H, W), `heat_map.npz`.

    From black for the cheapest pixel of all to white for the dearest; a pixel's channels are averaged. The first draw
    of dequantisation, and probes as in eval; all bits of an image average to its bits/dim, to the solver's error.
    """
    assert law is not None and isinstance(codec, PixelCodec)  # _dequantiser has refused vectors
    e = config.eval

    def compute(first: int, number: int) -> Arrays:
        index = torch.arange(first, first + number)
        k, _ = split[index]
        u = uniform_numbers(tuple(k.shape), 1, e.seed, first)[0].to(k.device)
        with torch.no_grad():
            x, log_q = law(k, u)
        probes = None if e.probe == "exact" else e.probes
        solver = Solver(e.ode_method, e.rtol, e.atol)
        told_model = given(config, model, split, index, text, codec)
        where = {"seed": e.seed, "first": first}
        found = heat_map(told_model, x, probes=probes, t_min=law.t_min, solver=solver, **where)
        return {"bits": bits(log_q - found.log_prob, 1).cpu().numpy(), "k": k.cpu().numpy()}

    def work(folder: Path) -> dict[str, Any]:
        joined = in_batches(folder / "heat", count, e.batch_size, processes, compute, "heat map")
        if processes.main:
            write_arrays(folder / "heat_map.npz", {"bits": joined["bits"]})
            draw(joined)
        return {}

    def draw(joined: Arrays) -> None:
        shown = codec.display(torch.from_numpy(joined["k"]))
        bits = torch.from_numpy(joined["bits"]).mean(1, keepdim=True)
        bits = bits.nan_to_num(bits.nanmean().item())  # where "embedded" gave up
        maps = heat((bits - bits.min()) / (bits.max() - bits.min()).clamp_min(1e-9))
        both = torch.stack([shown[:, :3].expand(-1, 3, -1, -1), maps], 1).flatten(0, 1)
        columns = 2 * math.ceil(math.sqrt(count))
        write_grid(both, folder / "heat_map.png", columns, zoom=max(1, 32 // both.shape[-1]))

    kept(
        folder, {"images": count}, "heat_map.npz", processes, work, "heat_map.json"
    )  # and what the folder's stamp says


def run_bound(
    model: ScoreModel,
    config: ConfigDict,
    split: Split,
    codec: Codec,
    checkpoint: Path,
    base: Path,
    processes: Processes,
    text: Text | None = None,
) -> tuple[Path, dict[str, Any]]:
    """The variational bound of a split, bits/dim of its levels (nats for vectors), into a folder below `base`.

    `likelihood.npz` has `bits_per_dim` (images, 1), its parts `prior`, `diffusion` and `reconstruction` (images,), and
    by steps of the chain `times` and the mean over images of the `terms` (NaN for a step that no image drew), whose sum
    is the diffusion's mean: `plt.plot(times, terms)` shows where the bits go. Where eval.terms of the steps were drawn,
    it has `std_error` (images,), in nats over them, too. The stamp has the means of all.
    """
    e = config.eval
    n = min(e.num_images, len(split)) if e.num_images else len(split)
    times = build_bound_times(config, model.sde)
    steps = len(times) - (1 if bool(model.sde.sigma(times[-1]) > 0) else 2)  # a last one into clean data decodes
    made_from = stamp(
        checkpoint,
        e.weights,
        codec,
        config,
        keys_of("bound", config),
        {
            "sde": repr(model.sde),
            "estimate": f"variational bound of {len(times) - 1} steps, "
            + ("pixels without dequantisation" if codec.levels else "Gaussian decoder"),
            **about_examples(split, e.split, n, text if told(config) else None),
            "given_labels": told(config),
            "grid": about_bound(times),
            "levels": codec.levels,
            "unit": "bits/dim" if codec.levels else "nats",
        },
    )
    label = f"{checkpoint.stem}-{e.weights}-{e.split}-bound"
    config = asked(config, keys_of("bound", config))
    e, split = config.eval, split.to(processes.device)
    text = None if text is None else text.to(processes.device)
    counted = Counted(clip(model, *codec.range) if e.clip_denoised and isinstance(codec, PixelCodec) else model)

    def compute(first: int, count: int) -> Arrays:
        counted.nfe = 0
        k, _ = split[torch.arange(first, first + count)]
        found = chain_bound(
            given(config, counted, split, torch.arange(first, first + count), text, codec),
            codec.encode(k).to(torch.float32),
            times,
            variance=config.sampling.variance,
            levels=codec.levels,
            width=codec.width,
            terms=e.terms or None,
            seed=e.seed,
            first=first,
        )
        parts = {
            "value": found.total,
            "prior": found.prior,
            "diffusion": found.rate - found.prior,
            "reconstruction": found.reconstruction,
            "terms": found.diffusion,
        }
        if codec.levels:
            parts = {name: found.bits_per_dim(part) for name, part in parts.items()}
        arrays = {name: part.double().cpu().numpy() for name, part in parts.items()}
        # Which term is whose: its step's place in the grid, to sum by step over the images of the batch.
        place = np.searchsorted(-times.numpy(), -found.times.expand_as(found.diffusion).numpy()).ravel()
        for name, weights in (("sum", arrays.pop("terms").ravel()), ("drawn", None)):
            arrays[name] = np.bincount(place, weights, minlength=steps)[None]
        arrays["std_error"] = found.std_error.double().cpu().numpy()
        return {**arrays, "nfe": np.array([counted.nfe])}

    def progress(bar: Progress, done: list[Arrays]) -> None:
        mean, error = mean_and_error(np.concatenate([arrays["value"] for arrays in done]))
        bar.note(f"{made_from['unit']} at most {mean:.3f} ± {error:.3f}")

    def work(folder: Path) -> dict[str, Any]:
        joined = in_batches(folder, n, e.batch_size, processes, compute, made_from["unit"], progress)
        mean, error = mean_and_error(joined["value"])
        parts = ("prior", "diffusion", "reconstruction")
        if processes.main:
            drawn = joined["drawn"].sum(0)
            terms = np.divide(joined["sum"].sum(0), drawn, out=np.full(steps, np.nan), where=drawn > 0)
            write_arrays(
                folder / "likelihood.npz",
                {
                    "bits_per_dim" if codec.levels else "nats": joined["value"][:, None],
                    **{name: joined[name] for name in parts},
                    **({"std_error": joined["std_error"]} if e.terms else {}),
                    "times": times.numpy()[:steps],
                    "terms": terms,
                },
            )
        means = {name: float(joined[name].mean()) for name in (*parts, "nfe")}
        errors: dict[str, float | None] = {"images": error}
        if e.terms:
            draws = _error_of_mean(joined["std_error"]) * (bits(1.0, math.prod(split.shape)) if codec.levels else 1.0)
            errors["draws"] = None if math.isnan(draws) else draws
        return {"mean": mean, "standard_error": error, "errors": errors, **means}

    return once(base, label, made_from, "likelihood.npz", processes, work)
