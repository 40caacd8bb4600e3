"""Which score separates digits from other images? After `make demo`: ``python -m examples.outliers [--workdir DIR]``.

Held-out digits against the same images changed, by AUROC: 0.5 is chance, below it the changed ones look *more* like
digits. Typicality takes its mean from other held-out digits than those that it is tried on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from score_sde import load
from score_sde.data import load_data
from score_sde.data.codecs import PixelCodec
from score_sde.likelihood.dequantisation import Uniform, log_probability
from score_sde.likelihood.outliers import auroc, png_bits_per_dim, typicality
from score_sde.machine.progress import with_progress
from score_sde.models.base import ScoreModel


def changes(codec: PixelCodec) -> dict[str, Callable[[Tensor], Tensor]]:
    """What is done to digits (N, 1, 8, 8), uint8."""
    g, top = torch.Generator().manual_seed(0), codec.levels - 1

    def blurred(k: Tensor) -> Tensor:
        return avg_pool2d(pad(k.float(), (1, 1, 1, 1), mode="replicate"), 3, stride=1).round().to(torch.uint8)

    return {
        "upside down": lambda k: k.flip(2),
        "turned by 90 degrees": lambda k: k.rot90(1, (2, 3)),
        "inverted": lambda k: top - k,
        "blurred": blurred,
        "half as bright": lambda k: k // 2,
        "pixels shuffled": lambda k: k.flatten(1)[:, torch.randperm(64, generator=g)].reshape(k.shape),
        "uniform noise": lambda k: torch.randint(codec.levels, k.shape, generator=g).to(torch.uint8),
        "blank": torch.zeros_like,
    }


def bits(model: ScoreModel, k: Tensor, codec: PixelCodec, first: int) -> Tensor:
    """Bits/dim by the probability flow, of uniformly dequantised levels."""
    return log_probability(model, k, Uniform(codec), first=first, rtol=1e-4, atol=1e-4).bits_per_dim()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/vp_digits")
    parser.add_argument("--images", type=int, default=100, help="of each kind")
    options = parser.parse_args()
    data, model, n = load_data("digits"), load(options.workdir), options.images
    assert isinstance(data.train.x, Tensor) and isinstance(data.test.x, Tensor) and data.levels is not None
    codec = PixelCodec(data.levels)

    def scores(k: Tensor, reference: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        found = bits(model, k, codec, n).double()
        return found, {
            "bits": found,
            "typicality": typicality(found, reference),
            "- PNG": found - png_bits_per_dim(codec.display(k)),
        }

    reference, k = bits(model, data.test.x[:n], codec, 0), data.test.x[n : 2 * n]
    found, inside = scores(k, reference)
    print(f"AUROC, {n} held-out digits ({found.mean():.3f} bits/dim) against as many changed ones")
    print(f"{'':24}{'bits/dim':>10}" + "".join(f"{name:>12}" for name in inside))
    changed = changes(codec)
    for name, change in with_progress(changed.items(), "changed digits", len(changed), "kind"):
        found, outside = scores(change(k), reference)
        row = "".join(f"{auroc(inside[score], outside[score]):12.3f}" for score in inside)
        print(f"{name:24}{found.mean():10.3f}{row}", flush=True)


if __name__ == "__main__":
    main()
