"""Heat maps: which pixels of an image cost how many bits, beside a likelihood."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..data.captions import Text
from ..data.codecs import Codec, PixelCodec
from ..data.sets import Split
from ..likelihood.dequantisation import Dequantiser, uniform_numbers
from ..likelihood.heat_maps import heat_map
from ..models.pixel_levels import bits
from ..ode.integrators import Solver
from .conditions import given
from .pictures import grid, heat, write_png
from .results import Arrays, kept, write_arrays
from .stamps import StampedJob


def write_heat_map(
    job: StampedJob, split: Split, law: Dequantiser | None, folder: Path, count: int, text: Text | None = None
) -> None:
    """Write the first images beside the bits of their pixels: `heat_map.png` and, (count, C, H, W), `heat_map.npz`.

    The cheapest pixel of all is black, the dearest white; a pixel's channels are averaged. Dequantisation is its first
    draw, and probes are as in eval; the bits of an image average to its bits/dim, to the solver's error.
    """
    assert law is not None  # `law_of` refuses heat maps of vectors and codes

    def work(folder: Path) -> dict[str, Any]:
        batch = partial(_batch, job, split, law, text)
        joined = job.in_batches(folder / "heat", count, job.config.eval.batch_size, batch, "heat map")
        if job.processes.main:
            write_arrays(folder / "heat_map.npz", {"bits": joined["bits"]})
            _draw(joined, job.codec, folder)
        return {}

    # the folder's own stamp says the rest
    kept(folder, {"images": count}, "heat_map.npz", job.processes, work, "heat_map.json")


def _batch(job: StampedJob, split: Split, law: Dequantiser, text: Text | None, first: int, count: int) -> Arrays:
    e, index = job.config.eval, torch.arange(first, first + count)
    k, _ = split[index]
    u = uniform_numbers(tuple(k.shape), 1, e.seed, first)[0].to(k.device)
    with torch.no_grad():
        x, log_q = law(k, u)
    probes = None if e.probe == "exact" else e.probes
    solver = Solver(e.ode_method, e.rtol, e.atol)
    model = given(job.config, job.model, split, index, text, job.codec)
    costs = heat_map(model, x, probes=probes, t_min=law.t_min, solver=solver, seed=e.seed, first=first)
    return {"bits": bits(log_q - costs.log_prob, 1).cpu().numpy(), "k": k.cpu().numpy()}


def _draw(joined: Arrays, codec: Codec, folder: Path) -> None:
    assert isinstance(codec, PixelCodec)
    shown = codec.display(torch.from_numpy(joined["k"]))
    bits = torch.from_numpy(joined["bits"]).mean(1, keepdim=True)
    bits = bits.nan_to_num(bits.nanmean().item())  # where "embedded" gave up
    maps = heat((bits - bits.min()) / (bits.max() - bits.min()).clamp_min(1e-9))
    both = torch.stack([shown[:, :3].expand(-1, 3, -1, -1), maps], 1).flatten(0, 1)
    columns = 2 * math.ceil(math.sqrt(len(shown)))
    write_png(grid(both, columns), folder / "heat_map.png")
