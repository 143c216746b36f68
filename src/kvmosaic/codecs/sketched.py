"""A sign sketch of what another codec leaves: products without bias, at the cost of noise."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from kvmosaic.codecs.base import Codec, Packed, Part


@lru_cache(maxsize=32)
def sketch(channels: int, seed: int, device: torch.device) -> Tensor:
    """[D, D] independent normal numbers, float32."""
    return torch.randn(channels, channels, generator=torch.Generator().manual_seed(seed)).to(device)


@dataclass(frozen=True, kw_only=True)
class Sketched(Codec):
    """`codec`, and of its residual r the signs of A r and the length, one bit and 16/D bits a number more.

    decoded = codec's + sqrt(pi / 2) / D * |r| * A^T sign(A r), whose product with any query is right in the mean over A.
    The variance is that of |r|^2 pi / (2 D), more than a further bit of `codec` leaves (docs/log.md): for reproduction only.
    The matrix A is one constant of the process for each head size, not counted in a cache's bytes.
    Source: QJL, arXiv:2406.03482, as TurboQuant's prod variant has it (arXiv:2504.19874, Algorithm 2).
    """

    codec: Codec
    seed: int = 0

    @property
    def unit(self) -> int:
        return self.codec.unit

    def parts(self, channels: int) -> Mapping[str, Part]:
        signs = Part(every=1, width=channels, dtype=torch.uint8, bits=1, kind="codes")
        length = Part(every=1, width=1, dtype=torch.float16, bits=16, kind="scales")
        return {**self.codec.parts(channels), "signs": signs, "length": length}

    def of_head(self, head: int) -> Codec:
        return replace(self, codec=self.codec.of_head(head))

    def encode(self, x: Tensor, valid: Tensor | None) -> Packed:
        packed = self.codec.encode(x, valid)
        rest = x.float() - self.codec.decode(packed)
        signs = rest @ sketch(x.shape[-1], self.seed, x.device).mT > 0
        return packed | {"signs": signs.to(torch.uint8), "length": rest.norm(dim=-1, keepdim=True).to(torch.float16)}

    def decode(self, packed: Packed) -> Tensor:
        signs = 2 * packed["signs"].float() - 1
        channels = signs.shape[-1]
        rest = signs @ sketch(channels, self.seed, signs.device) * (math.sqrt(math.pi / 2) / channels)
        return self.codec.decode(packed) + rest * packed["length"].float()
