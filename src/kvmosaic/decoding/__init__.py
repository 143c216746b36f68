"""How tokens are produced."""

from kvmosaic.decoding.captured import Decoder, generate

__all__ = ["Decoder", "generate"]
