"""Where each code lies in the bytes: blocks of 128 tokens, packed in planes, in the order in which a kernel reads them.

A byte holds 8/bits codes, one per *plane*: plane p is `(byte >> bits * p) & (2**bits - 1)`. Masking a plane out of a
vector of packed bytes gives a vector of operands, so a layout only has to say which codes share a vector. Three layouts,
each one permutation for keys and one for values; everything else in the package sees [tokens, channels].

"dots": the CPU's dot products of four unsigned by four signed bytes (`vpdpbusd`, `sdot`). One form for both sides:
    keys    [vector][token 128][channel 4]   plane p of vector v = channels 4 * (v * planes + p) ...
    values  [vector][channel D][token 4]     plane p of vector v = tokens 4 * (v * planes + p) ...
"fragments": the A operands of the GPU's m16n8k32 product; a lane's 16 consecutive bytes are its fragment.
    keys    rows are 16 tokens, columns 32 channels; plane p = token group of 16; what a warp reads together lies together
    values  rows are 16 channels (0, 2, ... then 1, 3, ...), columns 32 tokens; plane p = channel group of 16, then token
            chunk of 32. A column's four bytes are tokens t, t + 8, t + 16, t + 24: those whose probabilities one lane holds
"selectors": of fragments of 4 bits that are looked up in a table: the four codes of a plane are the four nibbles of half a
    word, as the byte permutation (`prmt`) takes them.
"""

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

BLOCK = 128
"""Tokens in a block: 8 planes of 16 tokens, the least that fills whole fragments at 1 bit."""

Layout = Literal["dots", "fragments", "selectors"]
Role = Literal["keys", "values"]


def layout_of(device: torch.device, looked_up: bool = False) -> Layout:
    """The layout that the kernels of a device read. looked_up: codes of 4 bits that stand for numbers of a table."""
    if device.type != "cuda":
        return "dots"
    return "selectors" if looked_up else "fragments"


def padded(channels: int) -> int:
    """Channels as stored: the next multiple of 32, so that every plane of a vector is whole at every bit width."""
    return -(-channels // 32) * 32


def bytes_per_block(channels: int, bits: int) -> int:
    return BLOCK * padded(channels) * bits // 8


@lru_cache(maxsize=64)
def _order(layout: Layout, role: Role, channels: int, bits: int) -> Tensor:
    """[bytes of a block, planes]: which element (token * channels + channel) each plane of each byte holds."""
    planes = 8 // bits
    if layout == "selectors":  # of a word [byte, plane], there [plane, byte], two to a byte
        return _order("fragments", role, channels, bits).view(-1, 4, 2).mT.reshape(-1, 2).contiguous()
    index = torch.arange(BLOCK * channels).view(BLOCK, channels)
    if layout == "dots" and role == "keys":
        tiles = index.view(BLOCK, channels // 4 // planes, planes, 4).permute(1, 0, 3, 2)
    elif layout == "dots":
        tiles = index.view(BLOCK // 4 // planes, planes, 4, channels).permute(0, 3, 2, 1)
    else:
        # lane l holds of a fragment rows l/4 and l/4 + 8, columns 4 * (l % 4) ... and 16 further
        if role == "keys":  # [token set, plane, +8, row, column chunk, +16, quad, byte]
            split = index.view(8 // planes, planes, 2, 8, channels // 32, 2, 4, 4)
            lanes = split.permute(0, 4, 1, 3, 6, 5, 2, 7)
        else:  # [token chunk, byte, byte, +16, quad, channel group, row, +8]
            split = index.view(4, 2, 2, 2, 4, channels // 16, 8, 2)
            lanes = split.permute(0, 5, 6, 4, 3, 7, 1, 2)
        tiles = lanes.reshape(-1, planes, 512).permute(0, 2, 1)
    return tiles.reshape(-1, planes).contiguous()


def pack(codes: Tensor, bits: int, role: Role, layout: Layout) -> Tensor:
    """codes [..., tokens, channels] uint8 below 2**bits -> [..., blocks, bytes_per_block] uint8.

    `tokens` must be a multiple of BLOCK (pad with zeros); channels are padded here.
    """
    *lead, tokens, channels = codes.shape
    assert tokens % BLOCK == 0, f"pack takes whole blocks of {BLOCK} tokens, got {tokens}"
    codes = torch.nn.functional.pad(codes, (0, padded(channels) - channels))
    order = _order(layout, role, padded(channels), bits).to(codes.device)
    blocks = codes.reshape(*lead, tokens // BLOCK, BLOCK * padded(channels))
    packed = blocks[..., order[:, 0]]
    for plane in range(1, 8 // bits):
        packed |= blocks[..., order[:, plane]] << (bits * plane)
    return packed


def unpack(packed: Tensor, bits: int, role: Role, layout: Layout, channels: int) -> Tensor:
    """The inverse of `pack`: [..., blocks, bytes_per_block] uint8 -> [..., blocks * BLOCK, channels] uint8."""
    *lead, blocks, _ = packed.shape
    order = _order(layout, role, padded(channels), bits).to(packed.device)
    codes = torch.empty(*lead, blocks, BLOCK * padded(channels), dtype=torch.uint8, device=packed.device)
    for plane in range(8 // bits):
        codes[..., order[:, plane]] = (packed >> (bits * plane)) & (2**bits - 1)
    return codes.view(*lead, blocks * BLOCK, padded(channels))[..., :channels]
