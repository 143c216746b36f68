"""KV caches of language and vision-language models in 1 to 8 real bits per number.

Start at `recipe.py`; `methods/` holds the papers, one file each.
"""

from kvmosaic import methods
from kvmosaic.decoding import Decoder, generate
from kvmosaic.hooks import Cache, attach, compress, detach
from kvmosaic.recipe import Recipe
from kvmosaic.report import Report

__all__ = ["Cache", "Decoder", "Recipe", "Report", "attach", "compress", "detach", "generate", "methods"]
__version__ = "0.1.0"
