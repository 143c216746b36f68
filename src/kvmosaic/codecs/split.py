"""Some channels by one codec, the others by another."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvmosaic.codecs.base import Codec, Packed, Part


@dataclass(frozen=True, kw_only=True)
class Split(Codec):
    """The first `channels` channels by `first`, the others by `rest`; which come first is a projection's business.

    Raises ValueError for heads that have no others.
    Source: TurboQuant's fractional bits, arXiv:2504.19874, section 4.3.
    """

    first: Codec
    rest: Codec
    channels: int

    @property
    def unit(self) -> int:
        return math.lcm(self.first.unit, self.rest.unit)

    def parts(self, channels: int) -> Mapping[str, Part]:
        if not 0 < self.channels < channels:
            raise ValueError(
                f"{self.channels} channels have a codec of their own, which must be fewer than the head's {channels}"
            )
        parts = {f"first {name}": part for name, part in self.first.parts(self.channels).items()}
        return parts | {f"rest {name}": part for name, part in self.rest.parts(channels - self.channels).items()}

    def of_head(self, head: int) -> Codec:
        return replace(self, first=self.first.of_head(head), rest=self.rest.of_head(head))

    def encode(self, x: Tensor, valid: Tensor | None) -> Packed:
        first = self.first.encode(x[..., : self.channels], valid)
        rest = self.rest.encode(x[..., self.channels :], valid)
        return {f"first {name}": part for name, part in first.items()} | {
            f"rest {name}": part for name, part in rest.items()
        }

    def decode(self, packed: Packed) -> Tensor:
        first, rest = self._halves(packed)
        return torch.cat([self.first.decode(first), self.rest.decode(rest)], -1)

    def logits(self, query: Tensor, packed: Packed) -> Tensor:
        first, rest = self._halves(packed)
        return self.first.logits(query[..., : self.channels], first) + self.rest.logits(
            query[..., self.channels :], rest
        )

    def mix(self, weights: Tensor, packed: Packed) -> Tensor:
        first, rest = self._halves(packed)
        return torch.cat([self.first.mix(weights, first), self.rest.mix(weights, rest)], -1)

    @staticmethod
    def _halves(packed: Packed) -> tuple[Packed, Packed]:
        first, rest = (
            {name.removeprefix(half): part for name, part in packed.items() if name.startswith(half)}
            for half in ("first ", "rest ")
        )
        return first, rest
