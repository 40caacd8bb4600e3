"""``python -m benchmarks.networks [--steps 2500] [--seeds 3]``: which change of a network helps, at equal compute.

Variants of vp_digits' U-Net, and a transformer, are trained on the digits with one budget of floating-point operations:
that of the config's own network in `--steps` steps, counted by torch's FlopCounterMode in the forward and backward pass
of its loss. A network that costs twice as much has half of the steps. All have the config's optimizer and learning
rate, which were chosen for the first. Each is judged by its bits/dim and by its error of the noise on the held-out
digits (of the averaged weights, t uniform in log SNR), and compared with the first at the same seed. Finished runs are
kept in the workdir, and a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from score_sde import losses, time_laws
from score_sde.config import load
from score_sde.config.build import build_model
from score_sde.config.objective import Objective
from score_sde.data import Data, load_data
from score_sde.data.codecs import Codec, codec_of
from score_sde.machine.parallel import Processes
from score_sde.models.base import ScoreModel
from score_sde.tasks import checkpoint
from score_sde.tasks.evaluate import run_likelihood
from score_sde.tasks.train import train

CONFIG = Path(__file__).parents[1] / "configs" / "vp_digits.py"
VARIANTS: dict[str, dict[str, str]] = {
    "vp_digits": {},
    "two blocks per level": {"model.num_res_blocks": "2"},
    "half as wide again": {"model.nf": "24"},
    "attention in the middle alone": {"model.attn_resolutions": "()"},
    "attention at 8x8 too": {"model.attn_resolutions": "4,8"},
    "adaptive group norm": {"model.scale_shift": "true"},
    "transformer": {
        "model.name": "dit", "model.hidden": "64", "model.depth": "4", "model.num_heads": "4", "model.patch_size": "1",
    },
}  # fmt: skip


def operations(config: ConfigDict, data: Data, codec: Codec) -> int:
    """Floating-point operations of one example in a training step: the loss and its gradient."""
    model, n = build_model(config, data.shape), 2
    objective = Objective(model, config, codec)
    x0 = codec.encode(data.train[torch.arange(n)][0])
    t = torch.full((n,), 0.5, dtype=torch.float64)
    # the fused kernels of attention are no products that the counter knows
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        objective(x0, t, torch.randn_like(x0), x0[:, None][:, :0])[0].sum().backward()
    return counter.get_total_flops() // n


def noise_error(model: ScoreModel, data: Data, codec: Codec) -> float:
    """Mean square error of the noise on the held-out examples, eight times each, t evenly spread in log SNR."""
    g = torch.Generator().manual_seed(0)
    k = data.test[torch.arange(len(data.test))][0].repeat_interleave(8, 0)
    x0 = codec.encode(k, torch.rand(k.shape, generator=g))
    t = time_laws.log_snr(model.sde, time_laws.low_discrepancy(len(k), g)).t
    z = torch.randn(x0.shape, generator=g)
    with torch.no_grad():
        return losses.denoising(model, x0, t, z, losses.simple).mean().item()


def one(name: str, seed: int, budget: int, workdir: Path) -> dict[str, Any]:
    """A trained variant's figures, from the workdir if it was finished before."""
    done = workdir / "result.json"
    if done.is_file():
        return json.loads(done.read_text())
    config = load(CONFIG, {**VARIANTS[name], "seed": str(seed)})
    data = load_data("digits")
    codec = codec_of(data.levels, config.data.centered)
    each = operations(config, data, codec)
    steps = max(1, round(budget / (each * config.training.batch_size)))
    config.training.n_iters = steps
    config.training.eval_freq = config.training.snapshot_freq = steps
    processes = Processes(0, 1, torch.device("cpu"))
    for _ in train(config, workdir, data, codec, processes):
        pass
    path = checkpoint.find(workdir)
    model = checkpoint.load(path)
    config.eval.check_images = 0
    _, found = run_likelihood(model, config, data.test, codec, path, workdir / "likelihood", processes)
    result = {
        "name": name,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "operations": each,
        "steps": steps,
        "bits_per_dim": found["mean"],
        "noise_error": noise_error(model, data, codec),
    }
    done.write_text(json.dumps(result))
    return result


def table(results: list[dict[str, Any]]) -> str:
    """Markdown; differences from the first variant are means over the seeds that both have, with standard errors."""
    lines = [
        "| network | parameters | MFLOP per example | steps | bits/dim | difference | error of the noise |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    first = {r["seed"]: r for r in results if r["name"] == next(iter(VARIANTS))}
    for name in VARIANTS:
        rows = [r for r in results if r["name"] == name]
        if not rows:
            continue
        paired = [r["bits_per_dim"] - first[r["seed"]]["bits_per_dim"] for r in rows if r["seed"] in first]
        bits, noise = ([r[key] for r in rows] for key in ("bits_per_dim", "noise_error"))
        lines.append(
            f"| {name} | {rows[0]['parameters']:,} | {rows[0]['operations'] / 1e6:.2f} | {rows[0]['steps']:,} | "
            f"{_mean(bits)} | {'' if rows[0] in first.values() else _mean(paired, sign=True)} | {_mean(noise, 4)} |"
        )
    return "\n".join(lines)


def _mean(values: list[float], digits: int = 3, sign: bool = False) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):{'+' if sign else ''}.{digits}f} ± {error:.{digits}f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2500, help="of the first network; the others have its operations")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--workdir", type=Path, default=Path("runs/networks"))
    chosen = parser.parse_args(arguments)
    config, data = load(CONFIG), load_data("digits")
    codec = codec_of(data.levels, config.data.centered)
    budget = operations(config, data, codec) * config.training.batch_size * chosen.steps
    results = []
    for seed in range(chosen.seeds):
        for name in chosen.variants:
            folder = chosen.workdir / f"{chosen.steps}-{seed}-{name.replace(' ', '_')}"
            results.append(one(name, seed, budget, folder))
            print(json.dumps(results[-1]), flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
