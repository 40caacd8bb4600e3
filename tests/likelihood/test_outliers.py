"""Scores of outliers: equal to their definitions, and a likelihood that misleads is put right by them."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from score_sde import VPSDE, log_likelihood
from score_sde.likelihood.outliers import auroc, png_bits_per_dim, typicality
from score_sde.models.closed_form import Gaussian


def test_auroc_is_the_chance_of_the_right_order() -> None:
    inside, outside = torch.tensor([0.1, 0.4, 0.4, 0.9]), torch.tensor([0.4, 0.8, 1.0])
    wins = [(o > i).item() + 0.5 * (o == i).item() for o in outside for i in inside]
    assert auroc(inside, outside) == pytest.approx(sum(wins) / 12, abs=1e-12)
    assert auroc(outside, inside) == pytest.approx(1 - sum(wins) / 12, abs=1e-12)
    with pytest.raises(ValueError, match="both sets need scores, got 4 inside and 0 outside"):
        auroc(inside, torch.tensor([]))
    with pytest.raises(ValueError, match="NaN"):
        auroc(inside, torch.tensor([math.nan]))


def test_a_png_s_length_in_bits() -> None:
    g = torch.Generator().manual_seed(0)
    flat, noise = torch.full((1, 3, 32, 32), 77, dtype=torch.uint8), torch.randint(256, (1, 3, 32, 32), generator=g)
    k = torch.cat([flat, noise.to(torch.uint8)])
    bits = png_bits_per_dim(k)
    assert bits[0] < 0.4 and 8 < bits[1] < 8.5
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(k[1].permute(1, 2, 0).numpy())).save(file, format="PNG", optimize=True)
    assert bits[1].item() == len(file.getvalue()) * 8 / 3072
    assert png_bits_per_dim(k[:, :1]).shape == (2,)
    with pytest.raises(ValueError, match=r"uint8 \(N, 1 or 3, H, W\), got torch.float32"):
        png_bits_per_dim(k.float())


def test_typicality_finds_what_is_too_likely() -> None:
    """Nalisnick's case: the mode of a Gaussian in many dimensions is the likeliest point, and never drawn."""
    model, g = Gaussian(VPSDE(), torch.zeros(50, dtype=torch.float64), 0.3), torch.Generator().manual_seed(0)
    reference, inside = (model.sample(60, g)[0] for _ in range(2))
    outside = 0.2 * model.sample(60, g)[0]
    # random signs are exact for independent dimensions
    bits = [log_likelihood(model, x).bits_per_dim() for x in (reference, inside, outside)]
    assert auroc(bits[1], bits[2]) < 0.01  # bits alone take them for the best of all
    assert auroc(typicality(bits[1], bits[0]), typicality(bits[2], bits[0])) > 0.99
    torch.testing.assert_close(typicality(bits[1], bits[0]), (bits[1] - bits[0].mean()).abs())
    with pytest.raises(ValueError, match="at least one example"):
        typicality(bits[1], bits[0][:0])
