"""Fixed levels for rotated tokens: TurboQuant's table, and what its scales promise (arXiv:2504.19874)."""

import math

import pytest
import torch

from kvmosaic.codecs import Rotated, Sphere, sphere_levels
from kvmosaic.codecs.rotated import rotation

# positive levels times sqrt(D), and the squared error of a unit vector, of the best levels
TABLE = {
    (64, 1): ([0.80101], 0.3584),
    (64, 2): ([0.45212, 1.49997], 0.1145),
    (64, 3): ([0.24375, 0.75066, 1.32934, 2.11131], 0.03339),
    (64, 4): ([0.12735, 0.38472, 0.65049, 0.93189, 1.23940, 1.59085, 2.02331, 2.64637], 0.00913),
    (128, 2): ([0.45245, 1.50519], 0.1160),
    (128, 4): ([0.12787, 0.38638, 0.65362, 0.93710, 1.24777, 1.60434, 2.04593, 2.68886], 0.00932),
    (256, 3): ([0.24476, 0.75467, 1.34025, 2.14167], 0.03426),
}
# what integer levels add to that error: two bits have evenly spaced levels
MORE = {1: 0, 2: 0.011, 3: 0.0003, 4: 0.0025}


def encoded(codec, x):
    return codec.decode(codec.encode(x, None))


@pytest.mark.parametrize(("channels", "bits"), TABLE)
def test_distortion_is_the_papers_and_what_integer_levels_add(channels, bits):
    distortion = TABLE[channels, bits][1] * (1 + MORE[bits])
    x = torch.randn(1, 2, 8001, channels, generator=torch.Generator().manual_seed(1))
    error = (x - encoded(Rotated(Sphere(bits=bits, scale="norm")), x)).square().sum() / x.square().sum()
    assert error.item() == pytest.approx(distortion, rel=0.005)


@pytest.mark.parametrize(("channels", "bits"), [each for each in TABLE if each[1] != 2])
def test_levels_are_the_papers_to_half_a_unit(channels, bits):
    unit, integers = sphere_levels(channels, bits)
    assert integers.dtype == torch.int8 and integers.abs().max() <= 63
    assert torch.equal(integers, -integers.flip(0))
    assert (unit * integers[2 ** (bits - 1) :]).tolist() == pytest.approx(TABLE[channels, bits][0], abs=0.5 * unit)


@pytest.mark.parametrize("bits", [1, 2])
def test_levels_of_one_and_two_bits_are_affine_in_the_code(bits):
    _, integers = sphere_levels(128, bits)
    assert integers.tolist() == [2 * code - (2**bits - 1) for code in range(2**bits)]


@pytest.mark.parametrize("channels", [64, 80, 96, 128, 256])
def test_rotation_is_orthogonal_at_every_head_size(channels):
    matrix = rotation(channels, 0, torch.device("cpu"))
    assert torch.allclose(matrix @ matrix.mT, torch.eye(channels), atol=1e-5)


def test_a_constant_offset_of_all_channels_costs_nothing():
    x = 3 + torch.randn(1, 1, 999, 128, generator=torch.Generator().manual_seed(2))
    error = (x - encoded(Rotated(Sphere(bits=4, scale="norm")), x)).square().sum() / x.square().sum()
    assert error < 0.02  # a Hadamard matrix without signs puts the offset into one coordinate: 0.51


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_each_scale_keeps_what_it_says(bits):
    x = torch.randn(2, 3, 63, 64, generator=torch.Generator().manual_seed(3))
    decoded = {scale: encoded(Sphere(bits=bits, scale=scale), x) for scale in ("matched", "unbiased", "least")}
    square = x.square().sum(-1)
    assert torch.allclose((decoded["unbiased"] * x).sum(-1), square, rtol=2e-3)
    assert torch.allclose(decoded["matched"].square().sum(-1), square, rtol=3e-3)
    residual = ((x - decoded["least"]) * decoded["least"]).sum(-1)
    assert (residual.abs() < 2e-3 * square).all()


def test_zero_tokens_decode_to_zeros_and_scaling_changes_no_code():
    codec = Sphere(bits=3, scale="least")
    assert encoded(codec, torch.zeros(1, 1, 5, 64)).eq(0).all()
    x = torch.randn(1, 1, 63, 64, generator=torch.Generator().manual_seed(4))
    ours, scaled = codec.encode(x, None), codec.encode(8 * x, None)
    assert torch.equal(ours["codes"], scaled["codes"]) and torch.equal(ours["top"], scaled["top"])


def test_three_bits_take_three_bits():
    parts = Sphere(bits=3, scale="norm").parts(128)
    bits = sum(part.width * part.bits for part in parts.values())
    assert bits == 3 * 128 + 16


def test_bits_and_scales_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"bits must be 1, 2, 3 or 4, got 5"):
        Sphere(bits=5, scale="norm")
    with pytest.raises(ValueError, match="scale must be"):
        Sphere(bits=4, scale="best")
    assert math.isfinite(encoded(Sphere(bits=1, scale="unbiased"), torch.zeros(1, 1, 1, 64)).sum().item())
