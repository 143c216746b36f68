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
    """A lane's 16 bytes are its operand: rows l/4 and l/4 + 8, columns 4 (l mod 4) ... + 3 and 16 further."""
    channels, planes = 64, 8 // bits
    x = codes(bits, 1, channels)[:1]
    lanes = pack(x, bits, role, "fragments")[0, 0].view(-1, 32, 4, 4)  # type: ignore[arg-type]  # [fragment, lane, register, byte]
    table = x[0] if role == "keys" else x[0].T  # rows x columns
    found = 0
    for fragment in range(lanes.shape[0]):
        for plane in range(planes):
            index = fragment * planes + plane
            if role == "keys":
                chunk, group = divmod(index, BLOCK // 16)
            else:
                chunk, group = divmod(index, channels // 16)
            tile = table[16 * group : 16 * group + 16, 32 * chunk : 32 * chunk + 32]
            mine = lanes[fragment] >> (bits * plane) & (2**bits - 1)
            for lane in (0, 7, 31):
                row, column = lane // 4, 4 * (lane % 4)
                for register in range(4):
                    r, c = row + 8 * (register % 2), column + 16 * (register // 2)
                    assert torch.equal(mine[lane, register], tile[r, c : c + 4])
                    found += 1
    assert found == channels * BLOCK // 512 * 3 * 4


def test_pack_takes_whole_blocks() -> None:
    with pytest.raises(AssertionError, match="whole blocks of 128 tokens, got 127"):
        pack(codes(2, 1, 32)[:, :127], 2, "keys", "dots")
