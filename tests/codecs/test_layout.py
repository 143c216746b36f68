"""Packing: every code comes back, from where the layout says it lies, and no byte is wasted."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvmosaic.kernels.layout import BLOCK, bytes_per_block, pack, padded, unpack

BITS = [1, 2, 4, 8]
LAYOUTS, ROLES = ["dots", "fragments"], ["keys", "values"]


def codes(bits: int, blocks: int, channels: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (2, blocks * BLOCK, channels), generator=generator, dtype=torch.uint8)


@given(
    bits=st.sampled_from(BITS),
    role=st.sampled_from(ROLES),
    layout=st.sampled_from(LAYOUTS),
    channels=st.sampled_from([1, 32, 64, 80, 96, 127, 128, 256]),
    blocks=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_unpack_inverts_pack(bits: int, role: str, layout: str, channels: int, blocks: int, seed: int) -> None:
    x = codes(bits, blocks, channels, seed)
    packed = pack(x, bits, role, layout)  # type: ignore[arg-type]
    assert packed.shape == (2, blocks, bytes_per_block(channels, bits))
    assert packed.dtype is torch.uint8
    assert bytes_per_block(channels, bits) == BLOCK * padded(channels) * bits // 8
    assert torch.equal(unpack(packed, bits, role, layout, channels), x)  # type: ignore[arg-type]


@pytest.mark.parametrize("role", ROLES)
def test_selectors_are_fragments_with_the_codes_of_a_plane_in_half_a_word(role: str) -> None:
    x = codes(4, 1, 64)
    fragments, selectors = (
        pack(x, 4, role, layout).view(torch.int32)  # type: ignore[arg-type]
        for layout in ("fragments", "selectors")
    )
    for plane in range(2):
        for byte in range(4):
            assert torch.equal(selectors >> (16 * plane + 4 * byte) & 15, fragments >> (8 * byte + 4 * plane) & 15)
    assert torch.equal(unpack(selectors.view(torch.uint8), 4, role, "selectors", 64), x)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", BITS)
def test_dots_lie_where_the_page_says(bits: int) -> None:
    """Keys [vector][token 128][channel 4], values [vector][channel][token 4]; planes in between."""
    planes, channels = 8 // bits, 64
    x = codes(bits, 1, channels)[:1]
    keys, values = pack(x, bits, "keys", "dots")[0, 0], pack(x, bits, "values", "dots")[0, 0]
    for token, channel in [(0, 0), (17, 5), (63, 31), (127, 63), (96, 40), (5, 33)]:
        vector, plane = divmod(channel // 4, planes)
        at = (vector * BLOCK + token) * 4 + channel % 4
        assert int(keys[at]) >> (bits * plane) & (2**bits - 1) == int(x[0, token, channel])
        vector, plane = divmod(token // 4, planes)
        at = (vector * channels + channel) * 4 + token % 4
        assert int(values[at]) >> (bits * plane) & (2**bits - 1) == int(x[0, token, channel])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("role", ROLES)
def test_fragments_are_operands_of_m16n8k32(bits: int, role: str) -> None:
    """A lane's 16 bytes are its operand: rows l/4 and l/4 + 8, columns 4 (l mod 4) ... + 3 and 16 further. Of values the
    rows are channels 0, 2, ..., 1, 3, ... and a column's bytes tokens 8 apart."""
    channels, planes = 64, 8 // bits
    x = codes(bits, 1, channels)[:1]
    lanes = pack(x, bits, role, "fragments")[0, 0].view(-1, 32, 4, 4)  # type: ignore[arg-type]  # [fragment, lane, register, byte]
    token_groups, found = BLOCK // 16, 0
    for tile in range(lanes.shape[0]):
        for plane in range(planes):
            mine = lanes[tile] >> (bits * plane) & (2**bits - 1)
            for lane, register, byte in [(0, 0, 0), (7, 1, 3), (31, 2, 1), (18, 3, 2)]:
                row, column = lane // 4 + 8 * (register % 2), 4 * (lane % 4) + 16 * (register // 2) + byte
                if role == "keys":
                    token_set, chunk = divmod(tile, channels // 32)
                    token, channel = 16 * (token_set * planes + plane) + row, 32 * chunk + column
                    assert token // 16 < token_groups
                else:
                    chunk, group = divmod(tile * planes + plane, channels // 16)
                    channel = 16 * group + 2 * (row % 8) + row // 8
                    token = 32 * chunk + 16 * (byte // 2) + 8 * (byte % 2) + lane % 4 + 4 * (register // 2)
                assert int(mine[lane, register, byte]) == int(x[0, token, channel])
                found += 1
    assert found == channels * BLOCK // 512 * 4


def test_pack_takes_whole_blocks() -> None:
    with pytest.raises(AssertionError, match="whole blocks of 128 tokens, got 127"):
        pack(codes(2, 1, 32)[:, :127], 2, "keys", "dots")
