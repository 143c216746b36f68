"""A fixed random rotation before another codec: no channel stands out, so one range per token serves all channels."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kvmosaic.codecs.base import Codec, Packed, Part


@lru_cache(maxsize=32)
def rotation(channels: int, seed: int, device: torch.device) -> Tensor:
    """[D, D] orthogonal, float32: a Hadamard matrix with random signs, or for sizes that have none a Haar-random one.

    The signs matter: without them a constant offset of all channels falls into one coordinate.
    """
    draw = torch.Generator().manual_seed(seed)
    if channels & (channels - 1):
        q, r = torch.linalg.qr(torch.randn(channels, channels, generator=draw, dtype=torch.float64))
        matrix = q * r.diagonal().sign()
    else:
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while len(matrix) < channels:
            matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
        signs = torch.randint(0, 2, (channels,), generator=draw) * 2 - 1
        matrix = signs[:, None] * matrix / math.sqrt(channels)
    return matrix.float().contiguous().to(device)


@dataclass(frozen=True)
class Rotated(Codec):
    """`codec` over rotated channels. The query and the output are rotated, the cache never is.

    The matrix is one constant of the process for each head size, shared by all caches, and not counted in their bytes.
    """

    codec: Codec
    seed: int = 0

    def rotate(self, x: Tensor) -> Tensor:
        """Of keys, values and queries alike, [..., D]; products of two rotated vectors are those of the originals."""
        return x @ rotation(x.shape[-1], self.seed, x.device)

    def unrotate(self, x: Tensor) -> Tensor:
        return x @ rotation(x.shape[-1], self.seed, x.device).mT

    @property
    def unit(self) -> int:
        return self.codec.unit

    def parts(self, channels: int) -> Mapping[str, Part]:
        return self.codec.parts(channels)

    def learned(self) -> Mapping[str, Tensor]:
        return self.codec.learned()

    def to(self, device: torch.device) -> Codec:
        return Rotated(self.codec.to(device), self.seed)

    def of_head(self, head: int) -> Codec:
        return Rotated(self.codec.of_head(head), self.seed)

    def encode(self, x: Tensor, valid: Tensor | None) -> Packed:
        return self.codec.encode(self.rotate(x.float()), valid)

    def decode(self, packed: Packed) -> Tensor:
        return self.unrotate(self.codec.decode(packed))

    def logits(self, query: Tensor, packed: Packed) -> Tensor:
        return self.codec.logits(self.rotate(query), packed)

    def mix(self, weights: Tensor, packed: Packed) -> Tensor:
        return self.unrotate(self.codec.mix(weights, packed))
