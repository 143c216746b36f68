"""ZipVL: each layer keeps as many important tokens as its attention asks for, and attends to no others at the prompt.

He et al., 2024, arXiv:2410.08584; no released code. Version 1 keeps the other tokens at low bits, version 2 drops them.
Departures: one set of tokens for all heads of a layer, each row of a batch by itself; the newest token is always
important (the next one is read off it); values' channel factors per tier, as in our zipcache.
"""

from kvmosaic.methods.zipcache import tier
from kvmosaic.prefill import AmongImportant
from kvmosaic.recipe import Recipe
from kvmosaic.selection import Protect, Saliency


def zipvl(
    mass: float = 0.975,
    *,
    bits: int = 4,
    low_bits: int = 2,
    evict: bool = False,
    sparse: bool = True,
    probes: int = 64,
    gather: int = 100,
    seed: int = 0,
    protect: Protect | int | str | None = None,
) -> Recipe:
    """mass: the part of the attention that the important tokens of a layer receive; the paper's tau.

    bits: of important tokens; low_bits: of the others (1, 2, 4 or 8 each). evict: drop the others (version 2).
    sparse: attend among important tokens alone at the first prompt; False = to all of them.
    probes: queries that score: this many of the newest, and as many others. gather: how many generated tokens wait,
        exact, before they are chosen among. seed: of the random probes.
    protect: prompt tokens that are important in any case: a count of the first ones, visual, text, or both as 4+visual.
    """
    return Recipe(
        selection=Saliency(
            mass=mass,
            by_head=False,
            drop=evict,
            probes=(probes, probes),
            gather=gather,
            seed=seed,
            protect=Protect.read(protect),
        ),
        tiers=(tier(bits),) if evict else (tier(bits), tier(low_bits)),
        prefill=AmongImportant() if sparse else None,
    )
