"""Scaling, dequantisation and rounding: every level comes back from every encoding, and bits/dim have their offset."""

import math

import pytest
import torch

from score_sde.data.codecs import PixelCodec, VectorCodec, codec_of, requantised
from score_sde.likelihood import Likelihood

LEVELS = (2, 17, 255, 256)
FINE = (512, 4096, 65536)


def all_levels(levels: int) -> torch.Tensor:
    return torch.arange(levels, dtype=torch.uint8 if levels <= 256 else torch.int32)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("levels", LEVELS)
def test_levels_span_the_interval_evenly(levels, centered):
    x = PixelCodec(levels, centered).encode(all_levels(levels))
    # float32's rounding of values in [-1, 1]
    torch.testing.assert_close(x, torch.linspace(-1 if centered else 0, 1, levels), atol=1.2e-7, rtol=0)
    assert x.dtype == torch.float32
    assert x[0] == (-1 if centered else 0)
    assert x[-1] == 1


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("levels", LEVELS)
def test_dequantised_levels_lie_at_k_plus_u_over_levels(levels, centered):
    k = all_levels(levels)
    u = torch.rand(levels, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = PixelCodec(levels, centered).encode(k, u)
    filled = 1 - 2.0**-14  # of a bin
    v = torch.tensor([(int(a) + filled * float(b)) / levels for a, b in zip(k, u)], dtype=torch.float64)
    torch.testing.assert_close(x, 2 * v - 1 if centered else v, atol=1e-15, rtol=0)


@pytest.mark.parametrize("levels", [*LEVELS, *FINE])
def test_no_mass_piles_up_at_the_upper_end_of_a_bin(levels):
    codec = PixelCodec(levels)
    u = 1 - torch.arange(1, 1000, dtype=torch.float64) * 2.0**-24
    x = codec.encode(torch.full(u.shape, levels - 2), u)
    wanted = torch.full((998,), codec.filled * 2.0**-23 / levels, dtype=torch.float64)
    torch.testing.assert_close(-x.diff(), wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("levels", FINE)
def test_many_levels_lie_in_the_middles_of_their_bins_and_u_spreads_them_over_these(levels, centered):
    codec, k = PixelCodec(levels, centered), all_levels(levels)
    low, high = codec.range

    def at(place: torch.Tensor) -> torch.Tensor:
        return low + codec.width * place.double() / levels

    # float32 holds values in [-1, 1] to 2^-25
    torch.testing.assert_close(codec.encode(k).double(), at(k + 0.5), atol=2.0**-25, rtol=0)
    u = torch.rand(levels, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(codec.encode(k, u), at(k + codec.filled * u), atol=1e-15, rtol=0)
    torch.testing.assert_close(codec.encode(k, u.float()).double(), at(k + codec.filled * u), atol=2.0**-24, rtol=0)
    assert 1 - 2.0**-7 <= codec.filled < 1


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("levels", LEVELS + FINE)
def test_decode_inverts_encode_for_every_level_and_noise(levels, centered):
    codec, k = PixelCodec(levels, centered), all_levels(levels)
    assert torch.equal(codec.decode(codec.encode(k)), k)
    # the ends of [0, 1) are where float32 rounds a value into the next bin
    ends = [0.0, 2.0**-24, 1e-5, 0.25, 0.5, 1 - 2.0**-14, 1 - 2.0**-15, 1 - 1e-5, 1 - 2.0**-24]
    random = torch.rand(500 if levels <= 256 else 20, generator=torch.Generator().manual_seed(0)).tolist()
    for u in ends + random:
        assert torch.equal(codec.decode(codec.encode(k, torch.full((levels,), u))), k), u
    for u in (0.0, 1 - 2.0**-53):
        assert torch.equal(codec.decode(codec.encode(k, torch.full((levels,), u, dtype=torch.float64))), k), u


def test_decode_clamps_what_lies_outside():
    x = torch.tensor([-7.0, -1.01, 1.01, 7.0, math.inf, -math.inf, math.nan])
    assert PixelCodec(256).decode(x).tolist() == [0, 0, 255, 255, 255, 0, 0]
    assert PixelCodec(17, centered=False).decode(x).tolist() == [0, 0, 16, 16, 16, 0, 0]


def test_decode_is_at_most_half_a_level_from_rounding_to_the_nearest_trained_value():
    codec, v = PixelCodec(256, centered=False), torch.linspace(0, 1, 100_001)
    moved = codec.decode(v).double() - 255 * v.double()  # nearest would be within 1/2
    assert moved.abs().max() < 1 + 1e-4
    middle = (v - 0.5).abs() < 1 / 256
    assert moved[middle].abs().max() < 0.51


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("levels", LEVELS + FINE)
def test_uniform_density_on_the_interval_has_log2_levels_bits(levels, centered):
    codec, d = PixelCodec(levels, centered), 12
    log_prob = torch.tensor([-d * math.log(codec.width)], dtype=torch.float64)
    known = Likelihood(log_prob, torch.zeros(1), torch.zeros(1, d), 0)
    assert known.bits_per_dim(codec.levels, codec.width).item() == pytest.approx(math.log2(levels), abs=1e-12)


def test_dequantised_pixels_fill_the_interval():
    k = torch.arange(256, dtype=torch.uint8).repeat(400)
    x = PixelCodec().encode(k, torch.rand(k.shape, generator=torch.Generator().manual_seed(0)))
    assert -1 <= x.min() < x.max() < 1
    # 102,400 uniform draws on [-1, 1] have standard errors 0.0018 and 0.0009; with 400 in each bin, 256 times less
    assert abs(x.mean()) < 1e-3
    assert abs(x.square().mean() - 1 / 3) < 1e-3


def test_display_spreads_levels_over_a_byte():
    assert PixelCodec(17).display(all_levels(17))[[0, 8, 16]].tolist() == [0, 128, 255]
    assert torch.equal(PixelCodec(256).display(all_levels(256)), all_levels(256))
    assert torch.equal(PixelCodec(65536).display(257 * all_levels(256).int()), all_levels(256))


def test_levels_become_those_of_another_number():
    deep = all_levels(65536)
    assert torch.equal(requantised(deep, 65536, PixelCodec(256)), (deep // 256).to(torch.uint8))
    assert torch.equal(requantised(all_levels(256), 256, PixelCodec(65536)), 257 * all_levels(256).int())
    assert torch.equal(requantised(all_levels(256), 256, PixelCodec(256)), all_levels(256))
    assert requantised(torch.tensor([0, 7, 8, 128, 255]), 256, PixelCodec(17)).tolist() == [0, 0, 1, 8, 16]


def test_vectors_pass_unchanged():
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    codec = codec_of(None)
    assert isinstance(codec, VectorCodec)
    assert codec.encode(x) is x
    assert codec.decode(x) is x
    assert codec_of(17, centered=False) == PixelCodec(17, centered=False)


def test_errors_name_the_value():
    for levels in (1, 257, 1000, 131072):
        with pytest.raises(ValueError, match=f"between 2 and 256, or 512, 1024, ... or 65536, got {levels}"):
            PixelCodec(levels)
    with pytest.raises(ValueError, match=r"shape of k, \(3, 2\), got \(3,\)"):
        PixelCodec().encode(torch.zeros(3, 2, dtype=torch.uint8), torch.zeros(3))
