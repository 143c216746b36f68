"""Coupled codes by section 8 of CQ's specification."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvmosaic.codecs import Coupled
from kvmosaic.codecs.coupled import ROWS
from kvmosaic.codecs.stream import from_stream, to_stream
from tests.instances import tables


@given(bits=st.integers(1, 16), count=st.integers(1, 40), tokens=st.integers(0, 5), seed=st.integers(0, 99))
def test_a_stream_of_codes_is_read_as_it_was_written(bits: int, count: int, tokens: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (2, tokens, count), generator=torch.Generator().manual_seed(seed))
    stream = to_stream(codes, bits)
    assert stream.dtype is torch.uint8
    assert stream.shape == (2, tokens, -(-count * bits // 8))
    assert torch.equal(from_stream(stream, bits, count), codes)


def test_four_codes_of_ten_bits_are_five_bytes_the_first_in_the_lowest() -> None:
    assert to_stream(torch.tensor([0x3FF, 0, 0x201, 1]), 10).tolist() == [0xFF, 0x03, 0x10, 0x60, 0x00]


@pytest.mark.parametrize(("coupled", "bits", "numbers"), [(2, 8, 4), (4, 8, 2), (8, 8, 1), (8, 10, 1.25), (1, 3, 3)])
def test_bits_per_number_are_the_papers(coupled: int, bits: int, numbers: float) -> None:
    codec = tables(coupled, bits, channels=128)
    (part,) = codec.parts(128).values()
    assert part.width * 8 / 128 == numbers
    assert codec.learned()["centroids"].nbytes == 2 * 2 * 128 * 2**bits


@given(
    coupled=st.sampled_from([1, 2, 4, 8]),
    bits=st.integers(1, 9),
    channels=st.sampled_from([32, 64, 80, 128]),
    heads=st.integers(1, 3),
    tokens=st.integers(1, 40),
    rows=st.sampled_from([1, 4, ROWS, ROWS + 1]),
)
def test_a_code_is_the_nearest_vector_and_both_products_are_those_over_it(
    coupled: int, bits: int, channels: int, heads: int, tokens: int, rows: int
) -> None:
    codec = tables(coupled, bits, heads, channels)
    draw = torch.Generator().manual_seed(tokens)
    x = torch.randn(2, heads, tokens, channels, generator=draw) * 3
    packed = codec.encode(x, None)
    dense = codec.decode(packed)
    pieces, table = x.unflatten(-1, (-1, 1, coupled)), codec.centroids.float()[None, :, None]
    least = (pieces - table).square().sum(-1).amin(-1)
    assert torch.allclose((x - dense).unflatten(-1, (-1, coupled)).square().sum(-1), least, rtol=1e-4, atol=1e-4)
    query, weights = (
        torch.randn(2, heads, rows, channels, generator=draw),
        torch.rand(2, heads, rows, tokens, generator=draw),
    )
    right, mixed = query @ dense.mT, weights @ dense
    assert torch.allclose(codec.logits(query, packed), right, rtol=1e-5, atol=1e-5 * float(right.abs().max()))
    assert torch.allclose(codec.mix(weights, packed), mixed, rtol=1e-5, atol=1e-5 * float(mixed.abs().max()))


@pytest.mark.parametrize(("coupled", "bits"), [(8, 8), (4, 3), (8, 10)])
def test_codes_of_decoded_vectors_are_the_codes(coupled: int, bits: int) -> None:
    codec = tables(coupled, bits)
    codes = torch.randint(0, 2**bits, (1, 2, 300, 64 // coupled), generator=torch.Generator().manual_seed(0))
    packed = {"codes": to_stream(codes, bits)}
    assert torch.equal(codec.encode(codec.decode(packed), None)["codes"], packed["codes"])


def test_vectors_that_are_in_the_tables_are_exact() -> None:
    x = torch.randn(1, 2, 16, 64, generator=torch.Generator().manual_seed(0)).half()
    codec = Coupled(x[0].unflatten(-1, (8, 8)).transpose(1, 2).contiguous())
    assert torch.equal(codec.decode(codec.encode(x, None)), x.float())


@pytest.mark.parametrize("shape", [(2, 8, 256), (2, 8, 100, 8), (2, 0, 4, 8), (2, 8, 1, 8)])
def test_tables_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"centroids are \[heads, groups, a power of 2 up to 65536"):
        Coupled(torch.zeros(shape))


def test_another_head_size_or_number_of_heads_is_refused() -> None:
    with pytest.raises(ValueError, match=r"for a head size of 64 \(8 groups of 8\), and this is 128"):
        tables(8, 4).parts(128)
    with pytest.raises(ValueError, match="for 2 KV heads, and 4 came"):
        tables(8, 4).encode(torch.zeros(1, 4, 3, 64), None)
