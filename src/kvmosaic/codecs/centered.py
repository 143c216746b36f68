"""A run's mean, channel by channel, kept apart: another codec writes what differs from it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvmosaic.codecs.base import Codec, Packed, Part


@dataclass(frozen=True)
class Centered(Codec):
    """`codec` over x minus its mean over the tokens that are encoded together, which is stored once a run in float16.

    The mean is one more constant of each query's logits and of each output: keys often share a large offset, and a
    code that has to write it has little left for what tells tokens apart. Adds 16 * D / (tokens of a run) bits per token.
    """

    codec: Codec

    @property
    def unit(self) -> int:
        return self.codec.unit

    def parts(self, channels: int) -> Mapping[str, Part]:
        mean = Part(every=None, width=channels, dtype=torch.float16, bits=16, kind="scales")
        return {**self.codec.parts(channels), "mean": mean}

    def encode(self, x: Tensor, valid: Tensor | None) -> Packed:
        x = x.float()
        if valid is None:
            mean = x.sum(2, keepdim=True) / max(x.shape[2], 1)
        else:
            kept = valid[..., None]
            mean = (x * kept).sum(2, keepdim=True) / kept.sum(2, keepdim=True).clamp_min(1)
        mean = mean.to(torch.float16)
        return self.codec.encode(x - mean.float(), valid) | {"mean": mean}

    def decode(self, packed: Packed) -> Tensor:
        return self.codec.decode(packed) + packed["mean"].float()

    def logits(self, query: Tensor, packed: Packed) -> Tensor:
        return self.codec.logits(query, packed) + query @ packed["mean"].float().mT

    def mix(self, weights: Tensor, packed: Packed) -> Tensor:
        return self.codec.mix(weights, packed) + weights.sum(-1, keepdim=True) * packed["mean"].float()
