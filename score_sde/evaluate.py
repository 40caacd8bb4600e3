"""Long evaluations: sampling and likelihood over many examples, in batches that are on disk as soon as they are done.

Example i depends on (seed, i) alone, so batches may be any size and be shared by processes. Every finished batch is a
file in the result's folder; a run that was stopped goes on where it was, and the last step joins the batches.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor
from tqdm import tqdm

import score_sde

from .bounds import chain_bound
from .build import build_bound_times, build_sampler, build_times
from .checkpoint import file_hash
from .codecs import Codec, PixelCodec
from .data import Split
from .guidance import clip, threshold
from .images import histogram, write_grid, write_png
from .likelihood import log_likelihood
from .model import Estimate, ScoreModel
from .parallel import Processes
from .samplers import sample

Arrays = dict[str, np.ndarray]
_VERSIONS = {"score_sde": score_sde.__version__, "torch": torch.__version__, "python": platform.python_version()}


class Counted(ScoreModel):
    """A model that counts its evaluations."""

    def __init__(self, model: ScoreModel) -> None:
        super().__init__(model.sde)
        self.model, self.nfe = model, 0

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Estimate:
        self.nfe += 1
        return self.model(x, t, **condition)


def stamp(checkpoint: Path, weights: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What a result was made from: checkpoint, weights, settings and versions; the same stamp means the same result."""
    return {
        "checkpoint": checkpoint.name,
        "checkpoint_sha256": file_hash(checkpoint),
        "weights": weights,
        **settings,
        "versions": {name: str(version) for name, version in _VERSIONS.items()},
    }


def folder_for(base: Path, label: str, made_from: dict[str, Any]) -> Path:
    """A folder of its own for each stamp, so that a stopped run finds its batches and another's are never mixed in."""
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:8]
    return base / f"{label}-{digest}"


def in_batches(
    folder: Path,
    total: int,
    batch_size: int,
    processes: Processes,
    compute: Callable[[int, int], Arrays],
    progress: Callable[[tqdm, list[Arrays]], None],
    description: str,
) -> Arrays:
    """compute(first, count) for all of 0..total-1, each batch kept in a file; return them joined, on every process."""
    parts = folder / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    starts = list(range(0, total, batch_size))
    mine = starts[processes.rank :: processes.world]
    done: list[Arrays] = []
    bar = tqdm(total=len(mine), desc=description, unit="batch", disable=not processes.main)
    for first in mine:
        path = parts / f"{first:08d}-{min(batch_size, total - first):06d}.npz"
        arrays = read_arrays(path)
        if arrays is None:
            arrays = compute(first, min(batch_size, total - first))
            write_arrays(path, arrays)
        done.append(arrays)
        bar.update()
        progress(bar, done)
    bar.close()
    processes.barrier()
    whole = [read_arrays(parts / f"{first:08d}-{min(batch_size, total - first):06d}.npz") for first in starts]
    processes.barrier()
    return {key: np.concatenate([part[key] for part in whole if part is not None]) for key in (whole[0] or {})}


def read_arrays(path: Path) -> Arrays | None:
    """The arrays of a finished batch, or None where there is none that can be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, KeyError):
        return None
    except Exception as error:  # zipfile.BadZipFile, which numpy lets through for a file that was cut short
        if type(error).__name__ == "BadZipFile":
            return None
        raise


def write_arrays(path: Path, arrays: Arrays) -> None:
    """An .npz that is whole or absent."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    partial.replace(path)


def write_stamp(folder: Path, content: dict[str, Any]) -> None:
    (folder / "stamp.json").write_text(json.dumps(content, indent=1) + "\n")


def remove_parts(folder: Path) -> None:
    for path in (folder / "parts").glob("*"):
        path.unlink()
    (folder / "parts").rmdir()


def run_sampling(
    model: ScoreModel,
    config: ConfigDict,
    shape: tuple[int, ...],
    codec: Codec,
    checkpoint: Path,
    base: Path,
    processes: Processes,
) -> tuple[Path, Arrays]:
    """Samples as the section sampling says, into a folder below `base`: `samples.npz` (`arr_0`), a grid, a stamp.

    Images are uint8 (N, H, W, C), rounded as `PixelCodec.decode` says; vectors are float32 (N, D).
    """
    s = config.sampling
    if isinstance(codec, PixelCodec):
        model = clip(model, *codec.range) if s.clip_denoised else model
        model = threshold(model, s.threshold, *codec.range) if s.threshold > 0 else model
    counted = Counted(model)
    sampler, times = build_sampler(config), build_times(config, model.sde, counted, shape)
    made_from = stamp(
        checkpoint,
        s.weights,
        {
            "sde": repr(model.sde),
            "sampler": repr(sampler),
            "grid": {"name": s.grid, "steps": len(times) - 1, "first": times[0].item(), "last": times[-1].item()},
            "denoise": bool(s.noise_removal),
            "clip_denoised": s.clip_denoised,
            "threshold": s.threshold,
            "seed": s.seed,
            "num_samples": s.num_samples,
            "rounding": "floor(levels * v), v in [0, 1]" if isinstance(codec, PixelCodec) else "none",
        },
    )
    folder = folder_for(base, f"{checkpoint.stem}-{s.weights}-{s.method}", made_from)
    finished = read_arrays(folder / "samples.npz")
    if finished is not None:
        return folder, finished

    def compute(first: int, count: int) -> Arrays:
        counted.nfe = 0
        x = sample(
            counted,
            sampler,
            (count, *shape),
            times,
            seed=s.seed,
            first=first,
            device=processes.device,
            denoise=s.noise_removal,
            progress=processes.main,
        )
        y = codec.decode(x).cpu().numpy()
        return {"arr_0": y.transpose(0, 2, 3, 1) if y.ndim == 4 else y, "nfe": np.array([counted.nfe])}

    joined = in_batches(folder, s.num_samples, s.batch_size, processes, compute, lambda bar, done: None, "batches")
    if processes.main:
        write_arrays(folder / "samples.npz", {"arr_0": joined["arr_0"]})
        write_stamp(folder, {**made_from, "nfe": float(joined["nfe"].mean())})
        remove_parts(folder)
        if isinstance(codec, PixelCodec):
            images = codec.display(torch.from_numpy(joined["arr_0"]).permute(0, 3, 1, 2))
            write_grid(images[:256], folder / "grid.png", zoom=max(1, 32 // images.shape[-1]))
            if s.single_png:
                for i, image in enumerate(images):
                    write_png(image, folder / f"{i:06d}.png")
        elif joined["arr_0"].shape[1:] == (2,):
            write_png(histogram(torch.from_numpy(joined["arr_0"])), folder / "histogram.png")
    processes.barrier()
    return folder, {"arr_0": joined["arr_0"]}


def run_likelihood(
    model: ScoreModel,
    config: ConfigDict,
    split: Split,
    codec: Codec,
    checkpoint: Path,
    base: Path,
    processes: Processes,
) -> tuple[Path, dict[str, Any]]:
    """Bits/dim (nats for vectors) of a split as the section eval says, into a folder below `base`.

    eval.estimate says by which road: the probability-flow ODE, here, or a chain's variational bound, `run_bound`.
    `likelihood.npz` has `bits_per_dim` (images, dequantisations) and `log_prob` in nats; the stamp has their mean and
    its standard error over images. Row j of the work is image j % n in dequantisation j // n, so that a run that was
    stopped early has gone once over as many images as it could.
    """
    e = config.eval
    if e.estimate == "bound" or (e.estimate == "auto" and not config.training.continuous):
        return run_bound(model, config, split, codec, checkpoint, base, processes)
    n = min(e.num_images, len(split)) if e.num_images else len(split)
    repeats = e.dequantizations if isinstance(codec, PixelCodec) else 1
    keys = ("split", "t_min", "ode_method", "rtol", "atol", "probe", "probes", "seed")
    made_from = stamp(
        checkpoint,
        e.weights,
        {
            "sde": repr(model.sde),
            "estimate": "probability-flow ODE, uniform dequantisation" if codec.levels else "probability-flow ODE",
            **{key: e[key] for key in keys},
            "images": n,
            "dequantizations": repeats,
            "levels": codec.levels,
            "unit": "bits/dim" if codec.levels else "nats",
        },
    )
    folder = folder_for(base, f"{checkpoint.stem}-{e.weights}-{e.split}", made_from)
    if (folder / "stamp.json").is_file():
        return folder, json.loads((folder / "stamp.json").read_text())
    split = split.to(processes.device)

    def compute(first: int, count: int) -> Arrays:
        rows = torch.arange(first, first + count)
        k, _ = split[rows % n]
        u = [np.random.default_rng([e.seed, row]).random(split.shape, dtype=np.float32) for row in rows.tolist()]
        x = codec.encode(k, torch.from_numpy(np.stack(u)).to(k.device)).to(torch.float32)
        result = log_likelihood(
            model,
            x,
            probe=e.probe,
            probes=e.probes,
            rtol=e.rtol,
            atol=e.atol,
            t_min=e.t_min,
            method=e.ode_method,
            seed=e.seed,
            first=first,
        )
        value = result.bits_per_dim(codec.levels, codec.width) if codec.levels else -result.log_prob
        arrays = {"value": value, "log_prob": result.log_prob, "std_error": result.std_error}
        return {**{name: v.double().cpu().numpy() for name, v in arrays.items()}, "nfe": np.array([result.nfe])}

    def progress(bar: tqdm, done: list[Arrays]) -> None:
        mean, error = mean_and_error(np.concatenate([arrays["value"] for arrays in done]))
        bar.set_postfix_str(f"{made_from['unit']} {mean:.3f} ± {error:.3f}")

    joined = in_batches(folder, n * repeats, e.batch_size, processes, compute, progress, made_from["unit"])
    values = joined["value"].reshape(repeats, n).T
    mean, error = mean_and_error(values.mean(1))
    result = {**made_from, "mean": mean, "standard_error": error, "nfe": float(joined["nfe"].mean())}
    if processes.main:
        log_prob = joined["log_prob"].reshape(repeats, n).T
        write_arrays(
            folder / "likelihood.npz",
            {
                "bits_per_dim" if codec.levels else "nats": values,
                "log_prob": log_prob,
                "std_error": joined["std_error"].reshape(repeats, n).T,
            },
        )
        write_stamp(folder, result)
        remove_parts(folder)
    processes.barrier()
    return folder, result


def run_bound(
    model: ScoreModel,
    config: ConfigDict,
    split: Split,
    codec: Codec,
    checkpoint: Path,
    base: Path,
    processes: Processes,
) -> tuple[Path, dict[str, Any]]:
    """The variational bound of a split, bits/dim of its levels (nats for vectors), into a folder below `base`.

    `likelihood.npz` has `bits_per_dim` (images, 1), its parts `prior`, `diffusion` and `reconstruction` (images,), and
    by steps of the chain `times` and the mean over images of the `terms` (NaN for a step that no image drew), whose sum
    is the diffusion's mean: `plt.plot(times, terms)` shows where the bits go. The stamp has the means of all.
    """
    e = config.eval
    n = min(e.num_images, len(split)) if e.num_images else len(split)
    times = build_bound_times(config, model.sde)
    steps = len(times) - (1 if bool(model.sde.sigma(times[-1]) > 0) else 2)  # a last one into clean data decodes
    made_from = stamp(
        checkpoint,
        e.weights,
        {
            "sde": repr(model.sde),
            "estimate": f"variational bound of {len(times) - 1} steps, "
            + ("pixels without dequantisation" if codec.levels else "Gaussian decoder"),
            "variance": config.sampling.variance,
            "clip_denoised": e.clip_denoised,
            "grid": {"steps": len(times) - 1, "first": times[0].item(), "last": times[-1].item()},
            "terms": e.terms,
            "split": e.split,
            "seed": e.seed,
            "images": n,
            "levels": codec.levels,
            "unit": "bits/dim" if codec.levels else "nats",
        },
    )
    folder = folder_for(base, f"{checkpoint.stem}-{e.weights}-{e.split}-bound", made_from)
    if (folder / "stamp.json").is_file():
        return folder, json.loads((folder / "stamp.json").read_text())
    split = split.to(processes.device)
    counted = Counted(clip(model, *codec.range) if e.clip_denoised and isinstance(codec, PixelCodec) else model)

    def compute(first: int, count: int) -> Arrays:
        counted.nfe = 0
        k, _ = split[torch.arange(first, first + count)]
        found = chain_bound(
            counted,
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
        return {**arrays, "nfe": np.array([counted.nfe])}

    def progress(bar: tqdm, done: list[Arrays]) -> None:
        mean, error = mean_and_error(np.concatenate([arrays["value"] for arrays in done]))
        bar.set_postfix_str(f"{made_from['unit']} at most {mean:.3f} ± {error:.3f}")

    joined = in_batches(folder, n, e.batch_size, processes, compute, progress, made_from["unit"])
    mean, error = mean_and_error(joined["value"])
    parts = {name: float(joined[name].mean()) for name in ("prior", "diffusion", "reconstruction")}
    result = {**made_from, "mean": mean, "standard_error": error, **parts, "nfe": float(joined["nfe"].mean())}
    if processes.main:
        drawn = joined["drawn"].sum(0)
        terms = np.divide(joined["sum"].sum(0), drawn, out=np.full(steps, np.nan), where=drawn > 0)
        write_arrays(
            folder / "likelihood.npz",
            {
                "bits_per_dim" if codec.levels else "nats": joined["value"][:, None],
                **{name: joined[name] for name in parts},
                "times": times.numpy()[:steps],
                "terms": terms,
            },
        )
        write_stamp(folder, result)
        remove_parts(folder)
    processes.barrier()
    return folder, result


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean of independent values and its standard error, NaN for a single one."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)
