"""Levels that were learned, for numbers whose range is brought to [-1, 1]; those that fit worst stay beside the codes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvmosaic.codecs.base import Codec, Packed, Part
from kvmosaic.codecs.stream import from_stream, to_stream


@dataclass(frozen=True, eq=False, kw_only=True)
class Levels(Codec):
    """x is about middle + half * restored[code], where `levels[code]` is nearest to (x - middle) / half.

    levels: [2**bits] float32, ascending, 1 to 4 bits. restored: [2**bits] float32, what the codes are read as (the levels,
        or Q-Norm's, which keep mean and variance).
    ranges: [2, H, D] float16, middle and half width of each channel, learned; None = of each token, from its own numbers
        without the `outliers` that widen its range most, stored in float16.
    outliers: so many numbers of each token and head, those with the largest error, are kept: index and what is missing,
        in float16. Their error is that of float16; the others' at most half times the widest gap between levels inside the
        range. A channel or a token that does not vary is exact (to float16).
    Bits per number: bits + 24 * outliers/D (32 above 256 channels), + 32/D for ranges of tokens.
    Raises ValueError for other bits, or tables that do not belong together.
    Source: KVQuant, arXiv:2401.18079 (nuq, per-vector outliers, Q-Norm). It keeps what lies outside the range, up to a
    number; we fill that number up with the numbers that fit worst, at the same bytes.
    """

    levels: Tensor
    restored: Tensor
    ranges: Tensor | None
    outliers: int

    def __post_init__(self) -> None:
        if self.levels.shape not in [(2**bits,) for bits in (1, 2, 3, 4)] or self.levels.shape != self.restored.shape:
            raise ValueError(
                f"levels and restored are 2, 4, 8 or 16 numbers each, got {list(self.levels.shape)}, {list(self.restored.shape)}"
            )
        if self.ranges is not None and (self.ranges.dim() != 3 or len(self.ranges) != 2):
            raise ValueError(f"ranges are [2, heads, channels], got {list(self.ranges.shape)}")
        if self.outliers < 0:
            raise ValueError(f"outliers are a number of each token, at least 0, got {self.outliers}")

    @property
    def bits(self) -> int:
        return len(self.levels).bit_length() - 1

    def learned(self) -> Mapping[str, Tensor]:
        tables = {"levels": self.levels, "restored": self.restored}
        return tables if self.ranges is None else tables | {"ranges": self.ranges}

    def to(self, device: torch.device) -> Codec:
        if self.levels.device == device:
            return self
        ranges = None if self.ranges is None else self.ranges.to(device)
        return replace(self, levels=self.levels.to(device), restored=self.restored.to(device), ranges=ranges)

    def of_head(self, head: int) -> Codec:
        return self if self.ranges is None else replace(self, ranges=self.ranges[:, head : head + 1])

    def parts(self, channels: int) -> Mapping[str, Part]:
        if self.ranges is not None and self.ranges.shape[2] != channels:
            raise ValueError(f"the ranges are for a head size of {self.ranges.shape[2]}, and this is {channels}")
        if channels % 8:
            raise ValueError(
                f"codes of a token are whole bytes at 8 channels and multiples, and the head size is {channels}"
            )
        if self.outliers >= channels:
            raise ValueError(f"outliers are fewer than the {channels} channels, got {self.outliers}")
        width = -(-channels * self.bits // 8)
        parts = {"codes": Part(every=1, width=width, dtype=torch.uint8, bits=8, kind="codes", rows=True)}
        if self.ranges is None:
            parts["range"] = Part(every=1, width=2, dtype=torch.float16, bits=16, kind="scales")
        if self.outliers:
            dtype, bits = (torch.uint8, 8) if channels <= 256 else (torch.int16, 16)
            parts["where"] = Part(every=1, width=self.outliers, dtype=dtype, bits=bits, kind="codes", rows=True)
            parts["missing"] = Part(every=1, width=self.outliers, dtype=torch.float16, bits=16, kind="exact")
        return parts

    def encode(self, x: Tensor, valid: Tensor | None) -> Packed:
        x, packed = x.float(), {}
        if self.ranges is None:
            ends = torch.cat(narrowest(x, self.outliers), -1).to(torch.float16)
            packed["range"] = ends
            middle, half = ends.float().split(1, -1)
        else:
            if x.shape[1] != self.ranges.shape[1]:
                raise ValueError(f"the ranges are for {self.ranges.shape[1]} KV heads, and {x.shape[1]} came")
            middle, half = self.ranges.float()[:, None, :, None]
        unit = (x - middle) / torch.where(half > 0, half, 1.0)
        codes = torch.bucketize(unit.contiguous(), (self.levels[1:] + self.levels[:-1]) / 2)
        packed["codes"] = to_stream(codes, self.bits)
        if self.outliers:
            missing = x - (middle + half * self.restored[codes])
            where = missing.abs().topk(self.outliers, -1).indices
            packed["where"] = where.to(self.parts(x.shape[3])["where"].dtype)
            packed["missing"] = missing.gather(-1, where).to(torch.float16)
        return packed

    def decode(self, packed: Packed) -> Tensor:
        if self.ranges is None:
            middle, half = packed["range"].float().split(1, -1)
            channels = packed["codes"].shape[-1] * 8 // self.bits
        else:
            middle, half = self.ranges.float()[:, None, :, None]
            channels = self.ranges.shape[2]
        x = middle + half * self.restored[from_stream(packed["codes"], self.bits, channels)]
        if self.outliers:
            x = x.scatter_add(-1, packed["where"].long(), packed["missing"].float())
        return x


def narrowest(x: Tensor, outliers: int) -> tuple[Tensor, Tensor]:
    """Middle and half width, [..., 1] each, of the shortest range that holds all but `outliers` of the numbers [..., D]."""
    ordered = x.sort(-1).values
    low, high = ordered[..., : outliers + 1], ordered[..., x.shape[-1] - outliers - 1 :]
    best = (high - low).argmin(-1, keepdim=True)
    low, high = low.gather(-1, best), high.gather(-1, best)
    return (low + high) / 2, (high - low) / 2
