"""Numbers as they came."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from kvmosaic.codecs.base import Codec, Packed, Part


@dataclass(frozen=True)
class Exact(Codec):
    """Keys or values in the model's own dtype. Error: none."""

    def parts(self, channels: int) -> Mapping[str, Part]:
        return {"numbers": Part(every=1, width=channels, dtype=None, bits=16, kind="exact")}

    def encode(self, x: Tensor, valid: Tensor | None) -> Packed:
        return {"numbers": x}

    def decode(self, packed: Packed) -> Tensor:
        return packed["numbers"].float()
