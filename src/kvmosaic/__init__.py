"""KV caches of language and vision-language models in 1 to 8 real bits per number.

Start at `recipe.py`; `methods/` holds the papers, one file each.
"""

from kvmosaic import methods
from kvmosaic.hooks import Cache, attach, compress, detach
from kvmosaic.recipe import Recipe
from kvmosaic.report import Report

__all__ = ["Cache", "Recipe", "Report", "attach", "compress", "detach", "methods"]
__version__ = "0.1.0"
