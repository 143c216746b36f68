"""How a recipe is attached to a transformers model: the cache, its attention function, and where visual tokens are."""

from kvmosaic.hooks.attach import attach, compress, detach
from kvmosaic.hooks.cache import Cache

__all__ = ["Cache", "attach", "compress", "detach"]
