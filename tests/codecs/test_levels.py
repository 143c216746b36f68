"""Learned levels by section 8 of KVQuant's specification."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvmosaic.codecs import Levels
from kvmosaic.codecs.levels import narrowest
from tests.instances import levels


def grid(bits: int, ranges: torch.Tensor | None = None, outliers: int = 0) -> Levels:
    even = torch.linspace(-1, 1, 2**bits)
    return Levels(levels=even, restored=even, ranges=ranges, outliers=outliers)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_an_even_grid_is_min_max_rounding(bits: int) -> None:
    x = torch.randn(2, 2, 33, 64, generator=torch.Generator().manual_seed(0)) * 3 + 1
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    right = low + step * ((x - low) / step).round()
    found = grid(bits).decode(grid(bits).encode(x, None))
    # a rounding of the range to float16 moves a number at an edge to the next level
    close = (found - right).abs() <= 2e-3 * (high - low)
    assert float(close.float().mean()) > 0.999
    assert float(((found - right).abs() / step).max()) < 1.01


@given(
    bits=st.integers(1, 4),
    outliers=st.integers(0, 5),
    by_channel=st.booleans(),
    channels=st.sampled_from([8, 64, 80, 264]),
    tokens=st.integers(1, 20),
    heads=st.integers(1, 3),
    seed=st.integers(0, 50),
)
def test_the_worst_are_exact_and_the_others_within_the_widest_gap(
    bits: int, outliers: int, by_channel: bool, channels: int, tokens: int, heads: int, seed: int
) -> None:
    codec = levels(bits, outliers, by_channel, heads, channels)
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(2, heads, tokens, channels, generator=draw) * 4
    packed = codec.encode(x, None)
    error = (codec.decode(packed) - x).abs()
    plain = levels(bits, 0, by_channel, heads, channels)
    if by_channel:  # the same codes without outliers: the largest errors are gone, no other has changed
        before = (plain.decode(plain.encode(x, None)) - x).abs()
        kept = torch.zeros_like(x, dtype=torch.bool)
        if outliers:
            kept.scatter_(-1, packed["where"].long(), True)
            assert bool((error[kept] <= before[kept] * 2**-10 + 1e-3).all())
        assert int(kept.sum()) == outliers * x[..., 0].numel()
        assert torch.equal(error[~kept], before[~kept])
    else:
        middle, half = packed["range"].float().split(1, -1)
        gap = torch.cat([codec.levels[:1] + 1, codec.levels.diff() / 2, 1 - codec.levels[-1:]]).max()
        off = (codec.levels - codec.restored).abs().max()
        inside = (x - middle).abs() <= half
        bound = half * (gap + off) + 2**-10 * (x.abs() + half)
        assert bool((error <= bound)[inside].all())
        assert int((~inside).sum(-1).max()) <= outliers + 2  # both ends, by a rounding of the range to float16


@given(outliers=st.integers(0, 6), seed=st.integers(0, 99))
def test_the_narrowest_range_is_the_best_of_all_choices(outliers: int, seed: int) -> None:
    x = torch.randn(17, generator=torch.Generator().manual_seed(seed)).exp()
    ordered = x.sort().values
    widths = [float(ordered[16 - (outliers - low)] - ordered[low]) for low in range(outliers + 1)]
    middle, half = narrowest(x, outliers)
    assert float(2 * half) == pytest.approx(min(widths), rel=1e-5)
    assert int(((x - middle).abs() > half * (1 + 1e-5)).sum()) <= outliers


@pytest.mark.parametrize("by_channel", [True, False])
def test_what_does_not_vary_is_exact(by_channel: bool) -> None:
    x = torch.full((1, 2, 9, 64), 1.5)
    ranges = torch.tensor([1.5, 0.0]).half()[:, None, None].expand(2, 2, 64).contiguous()
    codec = grid(2, ranges if by_channel else None, outliers=1)
    assert torch.equal(codec.decode(codec.encode(x, None)), x)
    x[0, 0, 3, 7] = -40.0  # and a number out of line is an outlier
    assert torch.equal(codec.decode(codec.encode(x, None)), x)


@pytest.mark.parametrize(("bits", "outliers"), [(2, 0), (3, 1), (4, 2)])
def test_bits_per_number_are_the_formula(bits: int, outliers: int) -> None:
    keys, values = (
        sum(part.width * part.bits for part in levels(bits, outliers, by_channel, channels=128).parts(128).values())
        / 128
        for by_channel in (True, False)
    )
    assert keys == bits + 24 * outliers / 128
    assert values == keys + 32 / 128


def test_tables_that_do_not_belong_together_are_refused() -> None:
    four, eight = torch.zeros(4), torch.zeros(8)
    for options, words in (
        ({"levels": four, "restored": eight, "ranges": None, "outliers": 0}, "2, 4, 8 or 16 numbers each"),
        (
            {"levels": torch.zeros(5), "restored": torch.zeros(5), "ranges": None, "outliers": 0},
            "2, 4, 8 or 16 numbers each",
        ),
        (
            {"levels": four, "restored": four, "ranges": torch.zeros(2, 64), "outliers": 0},
            r"ranges are \[2, heads, channels\]",
        ),
        ({"levels": four, "restored": four, "ranges": None, "outliers": -1}, "at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=words):
            Levels(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="for a head size of 64, and this is 128"):
        levels(2, 0, True).parts(128)
    with pytest.raises(ValueError, match="fewer than the 8 channels, got 8"):
        levels(2, 8, False).parts(8)
    with pytest.raises(ValueError, match="whole bytes at 8 channels and multiples, and the head size is 44"):
        levels(2, 0, False).parts(44)
    with pytest.raises(ValueError, match="for 2 KV heads, and 3 came"):
        levels(2, 0, True).encode(torch.zeros(1, 3, 4, 64), None)


def test_more_bits_and_outliers_lose_less() -> None:
    x = torch.randn(1, 2, 256, 64, generator=torch.Generator().manual_seed(0))
    x = x * (1 + 9 * (torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.02))
    errors = {
        (bits, outliers): float((codec.decode(codec.encode(x, None)) - x).square().mean())
        for bits in (2, 3, 4)
        for outliers in (0, 2)
        for codec in (grid(bits, outliers=outliers),)
    }
    for bits in (2, 3, 4):
        assert errors[bits, 2] < errors[bits, 0]
    assert errors[4, 2] < errors[3, 2] < errors[2, 2]
    assert math.isfinite(errors[2, 0])
