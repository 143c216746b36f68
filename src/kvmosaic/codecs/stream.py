"""Codes of any width as a stream of bits, token by token: for widths that do not fill a byte."""

import torch
from torch import Tensor


def to_stream(codes: Tensor, bits: int) -> Tensor:
    """[..., n] integers below 2**bits -> [..., ceil(n * bits / 8)] uint8, little-endian: the first in the lowest bits."""
    if bits == 8:
        return codes.to(torch.uint8)
    ones = (codes[..., None].long() >> _places(bits, codes) & 1).flatten(-2)
    ones = torch.nn.functional.pad(ones, (0, -ones.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (ones << _places(8, codes)).sum(-1).to(torch.uint8)


def from_stream(stream: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `to_stream`: [..., count] int64."""
    if 8 % bits == 0:  # no code straddles two bytes
        codes = stream[..., None] >> _places(8, stream)[::bits] & (2**bits - 1)
        return codes.flatten(-2)[..., :count].long()
    ones = (stream[..., None].long() >> _places(8, stream) & 1).flatten(-2)[..., : count * bits]
    return (ones.unflatten(-1, (count, bits)) << _places(bits, stream)).sum(-1)


def _places(bits: int, like: Tensor) -> Tensor:
    return torch.arange(bits, device=like.device)
