"""mosaic: our own best so far, by total bits per number: rotated tokens on the sphere's levels, the newest exact.

No calibration, text and visual tokens alike. From TurboQuant (arXiv:2504.19874) it takes rotation and levels, from EDEN
(ICML 2022) scales that keep keys and values unbiased, from KIVI (arXiv:2402.02750) a window of exact tokens, from ThinK
(arXiv:2407.21018) at 1 bit the choice of half of the key channels, which are kept at 2 bits: that is far better than all of
them at 1. Where keys and values differ in bits, keys get more (docs/log.md).
"""

from dataclasses import replace

from kvmosaic.methods.turboquant import turboquant
from kvmosaic.projection import QueryDriven
from kvmosaic.recipe import Recipe

KEY_AND_VALUE_BITS = {4: (4, 4), 3: (3, 3), 2: (2, 2), 1.5: (2, 1), 1: (2, 1)}


def mosaic(bits: float = 2, *, window: int = 32, seed: int = 0) -> Recipe:
    """bits: per number, the mean over keys and values: 4, 3, 2, 1.5 or 1; each token's scale adds 16 bits.

    window: how many of the newest tokens stay exact. seed: of the rotation.
    """
    if bits not in KEY_AND_VALUE_BITS:
        raise ValueError(f"bits must be 4, 3, 2, 1.5 or 1, got {bits}")
    key_bits, value_bits = KEY_AND_VALUE_BITS[bits]
    recipe = turboquant(key_bits=key_bits, value_bits=value_bits, window=window, seed=seed)
    return replace(recipe, projection=QueryDriven(pruned=0.5)) if bits == 1 else recipe
