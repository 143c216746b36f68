"""Neighbouring channels written together: one code for several numbers, which points to a learned vector."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvmosaic.codecs.base import Codec, Packed, Part
from kvmosaic.codecs.stream import from_stream, to_stream

ROWS = 16
"""Rows of a query (or of weights) up to which codes are looked up in tables; for more, decoding once is cheaper."""
AT_ONCE = 2**24
"""Distances held at a time (64 MiB in float32)."""


@dataclass(frozen=True, eq=False)
class Coupled(Codec):
    """`c` neighbouring channels are one code of b bits, the nearest of 2**b learned vectors; nothing else is stored.

    centroids: [H, D/c, 2**b, c] float16, a table for each KV head and channel group. Bits per number: b/c; the codes of a
        token lie one after another as a stream of bits, the first in the lowest. At most 16 bits a code.
    `logits` looks up products of the query with the centroids, computed once; `mix` sums weights by code, and multiplies
    the sums with the centroids once. Error: the distance to the nearest centroid. Codes of decoded vectors are the codes.
    Raises ValueError for tables of another shape, and at the first token for a head size that they are not made for.
    Source: CQ, arXiv:2405.03917; both products over codes are product quantization's.
    """

    centroids: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.centroids.shape)
        if len(shape) != 4 or shape[2] not in [2**bits for bits in range(1, 17)] or min(shape) < 1:
            raise ValueError(
                f"centroids are [heads, groups, a power of 2 up to 65536, channels of a group], got {shape}"
            )

    @property
    def bits(self) -> int:
        return self.centroids.shape[2].bit_length() - 1

    def learned(self) -> Mapping[str, Tensor]:
        return {"centroids": self.centroids}

    def to(self, device: torch.device) -> Codec:
        return self if self.centroids.device == device else replace(self, centroids=self.centroids.to(device))

    def of_head(self, head: int) -> Codec:
        return replace(self, centroids=self.centroids[head : head + 1])

    def parts(self, channels: int) -> Mapping[str, Part]:
        _, groups, _, coupled = self.centroids.shape
        if groups * coupled != channels:
            raise ValueError(
                f"the centroids are for a head size of {groups * coupled} ({groups} groups of {coupled}), and this is {channels}"
            )
        width = -(-groups * self.bits // 8)
        return {"codes": Part(every=1, width=width, dtype=torch.uint8, bits=8, kind="codes", rows=True)}

    def encode(self, x: Tensor, valid: Tensor | None) -> Packed:
        heads, groups, count, coupled = self.centroids.shape
        if x.shape[1] != heads:
            raise ValueError(f"the centroids are for {heads} KV heads, and {x.shape[1]} came")
        table = self.centroids.float()
        half = table.square().sum(-1) / 2  # |x - c|^2 is least where |c|^2 / 2 - x . c is
        step = max(1, AT_ONCE // (x.shape[0] * heads * groups * count))
        codes = []
        for part in x.float().unflatten(-1, (groups, coupled)).split(step, 2):
            products = torch.einsum("bhtgc,hgkc->bhtgk", part, table)
            codes.append((half[:, None] - products).argmin(-1))
        return {"codes": to_stream(torch.cat(codes, 2), self.bits)}

    def decode(self, packed: Packed) -> Tensor:
        codes = self._codes(packed)
        heads, groups = self.centroids.shape[:2]
        head = torch.arange(heads, device=codes.device)[:, None, None]
        return self.centroids.float()[head, torch.arange(groups, device=codes.device), codes].flatten(3)

    def logits(self, query: Tensor, packed: Packed) -> Tensor:
        if query.shape[2] > ROWS:
            return super().logits(query, packed)
        codes, table = self._codes(packed), self.centroids.float()
        groups = table.shape[1]
        products = torch.einsum("bhmgc,hgkc->bhmgk", query.unflatten(-1, (groups, -1)), table)
        total = query.new_zeros(*query.shape[:3], codes.shape[2])
        for group in range(groups):
            index = codes[:, :, None, :, group].expand_as(total)
            total += products[:, :, :, group].gather(-1, index)
        return total

    def mix(self, weights: Tensor, packed: Packed) -> Tensor:
        if weights.shape[2] > ROWS:
            return super().mix(weights, packed)
        codes, table = self._codes(packed), self.centroids.float()
        groups, count = table.shape[1:3]
        mass = weights.new_zeros(*weights.shape[:3], groups, count)
        for group in range(groups):
            mass[:, :, :, group].scatter_add_(-1, codes[:, :, None, :, group].expand_as(weights), weights)
        return torch.einsum("bhmgk,hgkc->bhmgc", mass, table).flatten(3)

    def _codes(self, packed: Packed) -> Tensor:
        return from_stream(packed["codes"], self.bits, self.centroids.shape[1])
