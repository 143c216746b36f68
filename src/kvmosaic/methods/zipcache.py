"""ZipCache: salient tokens at 4 bits, the others at 2, saliency from a few probe queries.

He et al., NeurIPS 2024, arXiv:2405.14256; code: ThisisBillhe/ZipCache.
We follow the paper where the code differs: saliency is divided by the probes that see a token (released=True: by the full
matrix's queries, as in the code), and generated tokens are chosen among the newest `gather` by their own probes, without
re-quantizing what is stored (the code re-quantizes everything).
Departures: statistics per sequence and KV head (the code: over the batch, values over all heads), the values' channel
factors per tier and run; random probes without replacement.
One range a channel over hundreds of tokens is too wide for 2 bits where any token may be asked for; rotated=True, which is
not the paper's, writes the less salient tokens as turboquant does (docs/log.md).
"""

from kvmosaic.codecs import Rotated, Sphere, Uniform
from kvmosaic.recipe import Recipe
from kvmosaic.selection import Protect, Saliency
from kvmosaic.stores import Coded, Lane


def tier(bits: int) -> Coded:
    """Keys with ranges by channel, values with ranges by token after their channels are evened out."""
    return Coded(Lane(Uniform(bits=bits, axis="channel")), Lane(Uniform(bits=bits, axis="token", equalize=True)))


def zipcache(
    salient: float = 0.6,
    *,
    bits: int = 4,
    low_bits: int = 2,
    rotated: bool = False,
    probes: float = 0.1,
    gather: int = 100,
    released: bool = False,
    seed: int = 0,
    protect: Protect | int | str | None = None,
) -> Recipe:
    """salient: share of the tokens that is kept at `bits`; the others at `low_bits` (1, 2, 4 or 8 each).

    rotated: the others are coded in a random rotation, one scale a token, at 1 to 4 bits.
    probes: share of the queries that score. gather: how many generated tokens wait, exact, before they are chosen among.
    released: the released code's divisor. seed: of the random probes, and of the rotation.
    protect: prompt tokens that are salient in any case: a count of the first ones, visual, text, or both as 4+visual.
    """
    selection = Saliency(
        share=salient,
        probes=(probes / 2, probes / 2),
        gather=gather,
        released=released,
        seed=seed,
        protect=Protect.read(protect),
    )
    rest = tier(low_bits)
    if rotated:
        lane = Lane(Rotated(Sphere(bits=low_bits, scale="unbiased"), seed))
        rest = Coded(lane, lane)
    return Recipe(selection=selection, tiers=(tier(bits), rest))
