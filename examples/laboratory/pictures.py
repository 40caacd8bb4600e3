"""The laboratory's pictures: fields of scores, paths, samples, and the loss by noise level beside its floor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor

from benchmarks.pages import save
from score_sde import Ancestral, Heun, Sampler, ScoreModel, times
from score_sde.data.toys import EXACT, TOYS
from score_sde.tasks import checkpoint

from .experiment import LEVELS, VP, Result, exact_samples, time_of
from .subjects import DATA, OBJECTIVES

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure

REACH = 1.5  # pictures of the plane show [-REACH, REACH]²
FIELD = 0.15  # the noise level sigma/alpha of the fields
FIELDS_OF = ("log_snr", "simple", "likelihood", "implicit", "sliced")  # the objectives whose fields are shown


def fields(results: Sequence[Result], base: Path, path: Path) -> None:
    """For each data set the exact field of E[z | y] over the density, and the learned ones over their error."""
    shown = _first_of_each(results, "excess")
    names = list(shown)
    run = list(dict.fromkeys(o for row in shown.values() for o in row))
    objectives = [o for o in FIELDS_OF if o in run] or run[:5]
    figure, axes = _grid(len(names), 1 + len(objectives), 1.65)
    grid = torch.linspace(-REACH, REACH, 121, dtype=torch.float64)
    plane = torch.cartesian_prod(grid, grid)
    for row, name in zip(axes, names):
        exact = EXACT[name](VP)
        truth = noise_at(exact, plane, FIELD)
        density = exact.log_prob(*_state(exact, plane, FIELD)).exp().reshape(121, 121).T
        row[0].imshow(density, origin="lower", extent=_EXTENT, cmap=_steps("Blues"))
        _arrows(row[0], truth)
        row[0].set_ylabel(DATA[name].label)
        for axis, objective in zip(row[1:], objectives):
            if objective not in shown[name]:
                axis.set_visible(False)
                continue
            learned = noise_at(checkpoint.load(shown[name][objective].job.folder(base)), plane, FIELD)
            error = (learned - truth).norm(dim=1).reshape(121, 121).T
            error[density < 0.02 * density.max()] = math.nan  # where no data come: nothing is learned there
            picture = axis.imshow(error, origin="lower", extent=_EXTENT, cmap=_steps("Reds"), vmin=0, vmax=1)
            _arrows(axis, learned)
    for axis, title in zip(axes[0], ["exact", *(OBJECTIVES[o].label for o in objectives)]):
        axis.set_title(_wrapped(title), fontsize=8)
    figure.colorbar(picture, ax=axes[:, -1], label="length of the error, in units of the noise", shrink=0.5)
    save(figure, path)


def noise_at(model: ScoreModel, y: Tensor, level: float) -> Tensor:
    """E[z | y], which is -sigma times the score, at the noise level sigma/alpha."""
    learned = any(True for _ in model.parameters())
    x, t = _state(model, y.float() if learned else y, level)
    with torch.no_grad():
        return model(x, t).noise.double()


def _state(model: ScoreModel, y: Tensor, level: float) -> tuple[Tensor, Tensor]:
    t = time_of(model.sde, level)
    return model.sde.alpha(t).to(y) * y, t


def _arrows(axis: Axes, noise: Tensor) -> None:
    """Arrows along the score, to where the data lie, at every eighth point of the grid; long ones are cut to 2."""
    field = -noise * (2 / noise.norm(dim=1, keepdim=True)).clamp(max=1)
    field = field.reshape(121, 121, 2)[::8, ::8]
    at = np.linspace(-REACH, REACH, 121)[::8]
    axis.quiver(*np.meshgrid(at, at), field[..., 0].T, field[..., 1].T, angles="xy", scale=28, width=0.006)


def paths(results: Sequence[Result], base: Path, path: Path, objective: str) -> None:
    """The reverse SDE and the probability-flow ODE from the same prior draws, with the exact and a learned score.

    The first coordinate over sqrt(t), falling, on its density at each t.
    """
    shown = {name: row[objective] for name, row in _first_of_each(results, "excess").items() if objective in row}
    figure, axes = plt.subplots(
        len(shown), 4, figsize=(11.5, 1.8 * len(shown) + 0.4), layout="constrained", squeeze=False, sharey=True
    )
    for row, (name, result) in zip(axes, shown.items()):
        learned = checkpoint.load(result.job.folder(base))
        density = _marginals(name)
        for axis, sampler, model in zip(row, SAMPLERS, (EXACT[name](VP), learned) * 2):
            axis.imshow(density, extent=(1, 0, -_TALL, _TALL), aspect="auto", cmap=_steps("Greys"), vmin=0, vmax=1.2)
            t, walked = _paths(model, sampler, STEPS, _WALKERS)
            for j, colour in enumerate(plt.colormaps["turbo"](np.linspace(0.05, 0.95, _WALKERS))):
                axis.plot(t.sqrt(), walked[:, j, 0], color=colour, linewidth=0.7)
            axis.set(xlim=(1, 0), ylim=(-_TALL, _TALL), xticks=[], yticks=[-1, 0, 1])
        row[0].set_ylabel(f"{DATA[name].label}, $x_1$", fontsize=8)
    titles = ["reverse SDE, exact score", "reverse SDE, learned", "ODE, exact score", "ODE, learned"]
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=9)
    for axis in axes[-1]:
        at = (1, 0.25, 0.04, 0)
        axis.set(xticks=[math.sqrt(t) for t in at], xticklabels=at, xlabel="t")
    save(figure, path)


SAMPLERS: tuple[Sampler, ...] = (Ancestral(), Ancestral(), Heun(), Heun())
STEPS = 500  # of a path
_WALKERS = 7  # paths in each panel
_TALL = 2.4  # the paths' first coordinate is shown in [-_TALL, _TALL]


def _marginals(name: str) -> np.ndarray:
    """Density of the first coordinate of x_t as an image, columns from t = 1 to 0, even in sqrt(t)."""
    x0 = TOYS[name](20_000, 0)[:, :1].double()
    z = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    columns = []
    for t in torch.linspace(1, 0, 200, dtype=torch.float64).square().clamp(min=1e-3):
        counts, _ = np.histogram(VP.perturb(x0, t, z), bins=120, range=(-_TALL, _TALL), density=True)
        columns.append(counts)
    return np.stack(columns, axis=1)[::-1]


def _paths(model: ScoreModel, sampler: Sampler, steps: int, count: int) -> tuple[Tensor, Tensor]:
    """Times (steps + 1,), and states (steps + 1, count, 2) from draws that are the same for every model."""
    generator = torch.Generator().manual_seed(3)
    noise = lambda like: torch.randn(count, 2, generator=generator)
    end = time_of(model.sde, LEVELS[0].item())
    grid = times.quadratic(replace(model.sde, t_min=end.item()), steps)
    x = model.sde.prior((count, 2), noise)
    with torch.no_grad():
        return grid, torch.stack([x, *sampler.walk(model, x, grid, noise)])


def samples(results: Sequence[Result], path: Path) -> None:
    """The data and what each objective's model draws by the ODE, a row each, in two halves side by side."""
    shown = _first_of_each(results, "samples_ode")
    run = {o for row in shown.values() for o in row}
    rows = ["data", *(o for o in OBJECTIVES if o in run)]
    half = math.ceil(len(rows) / 2)
    figure, axes = _grid(half, 2 * len(shown), 1.15)
    for axis in axes.flat:
        axis.set_visible(False)
    for i, objective in enumerate(rows):
        label = "data" if objective == "data" else OBJECTIVES[objective].label
        for j, (name, row) in enumerate(shown.items()):
            axis = axes[i % half, i // half * len(shown) + j]
            axis.set_visible(objective == "data" or objective in row)
            if objective == "data":
                x = exact_samples(name, 2000, 0) if name in TOYS else _held_out_digits()
            elif objective in row:
                x = torch.from_numpy(row[objective].arrays["samples_ode"])
            else:
                continue
            (_show_points if name in TOYS else _show_digits)(axis, x)
            if j == 0:
                axis.set_ylabel(_wrapped(label), fontsize=7)
            if i % half == 0:
                axis.set_title(DATA[name].label, fontsize=8)
    save(figure, path)


def _show_points(axis: Axes, x: Tensor) -> None:
    axis.imshow(_histogram(x), extent=_EXTENT, cmap="magma", vmax=4)


def _show_digits(axis: Axes, k: Tensor) -> None:
    tiles = k[:16].reshape(4, 4, 8, 8).permute(0, 2, 1, 3).reshape(32, 32)
    axis.imshow(tiles, cmap="gray", vmin=0, vmax=16)


def _held_out_digits() -> Tensor:
    from score_sde.data import load_data

    return load_data("digits").test.x[torch.arange(16)]


def levels(results: Sequence[Result], path: Path) -> None:
    """Above, the loss at each noise level beside its floor; below, what it has over the floor: the score's error."""
    shown = _first_of_each(results, "loss")
    size = (max(2.4 * len(shown), 7.2), 6.2)
    figure, axes = plt.subplots(2, len(shown), figsize=size, layout="constrained", squeeze=False)
    handles: dict[str, Any] = {}
    for column, (name, row) in enumerate(shown.items()):
        upper, lower = axes[:, column]
        for objective, result in row.items():
            o = OBJECTIVES[objective]
            style = {"color": o.colour, "linestyle": o.dashes, "linewidth": 1}
            (handles[o.label],) = upper.semilogx(LEVELS, result.arrays["loss"], **style)
            if "excess" in result.arrays:
                lower.loglog(LEVELS, result.arrays["excess"], **style)
        floors = [r.arrays["floor"] for r in row.values() if "floor" in r.arrays]
        if floors:
            (handles["floor: the exact model"],) = upper.semilogx(LEVELS, floors[0], color="black", linewidth=2)
            upper.set_zorder(1)
        else:
            lower.set_visible(False)
        upper.set(title=DATA[name].label, ylim=(0, 1.3))
        lower.set(xlabel="noise level σ/α")
    axes[0, 0].set_ylabel("mean squared error of the noise")
    axes[1, 0].set_ylabel("over the floor: σ² |s − s*|² / D")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    save(figure, path)


_EXTENT = (-REACH, REACH, -REACH, REACH)


def _first_of_each(results: Sequence[Result], array: str) -> dict[str, dict[str, Result]]:
    """Data set -> objective -> the result of the first seed that has the array."""
    found: dict[str, dict[str, Result]] = {}
    for result in results:
        if array in result.arrays:
            found.setdefault(result.job.data, {}).setdefault(result.job.objective, result)
    order = list(OBJECTIVES)
    return {
        name: dict(sorted(found[name].items(), key=lambda item: order.index(item[0]))) for name in DATA if name in found
    }


def _histogram(x: Tensor, bins: int = 64) -> np.ndarray:
    """Counts in cells, relative to their mean, as an image with the second coordinate upwards."""
    first, second = x.double().numpy().T
    counts, *_ = np.histogram2d(first, second, bins=bins, range=[(-REACH, REACH)] * 2)
    return counts.T[::-1] * bins**2 / len(x) / 4


def _grid(rows: int, columns: int, size: float) -> tuple[Figure, np.ndarray]:
    """Square panels without ticks."""
    figure, axes = plt.subplots(
        rows, columns, figsize=(size * columns, size * rows + 0.4), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    return figure, axes


def _wrapped(title: str) -> str:
    return title.replace(", ", ",\n").replace("likelihood weighting", "likelihood\nweighting")


def _steps(name: str) -> Colormap:
    """A colour map in ten steps: their edges are contours, and the file is small."""
    return plt.get_cmap(name, 10)
