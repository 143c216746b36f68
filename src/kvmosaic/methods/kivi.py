"""KIVI: keys per channel over groups of tokens, values per token, the newest tokens exact.

Liu et al., ICML 2024, arXiv:2402.02750; code: jy-yuan/KIVI.
Departures: a group's codes are fitted to its float16 parameters as stored; groups of equal numbers do not divide by
zero; padding enters no group; later turns and chunks are quantized by the same rule (the authors' code stops).
"""

from kvmosaic.codecs import Uniform
from kvmosaic.recipe import Recipe
from kvmosaic.stores import Coded, Lane


def kivi(
    bits: int = 2, *, key_bits: int | None = None, value_bits: int | None = None, group: int = 32, residual: int = 128
) -> Recipe:
    """bits: of a code, for keys and values alike: 1, 2, 4 or 8 (the paper has 2 and 4).

    key_bits, value_bits: of one side, if the sides differ.
    group: tokens (of a key channel) or channels (of a value) that share a range; bits per number are bits + 32/group.
    residual: R, a multiple of group. Keys are encoded R at a time, values once R newer tokens have come.
    Raises ValueError for other bits, or if group does not divide residual (or, at the first token, the head size).
    """
    if residual < 1 or group < 1 or residual % group:
        raise ValueError(
            f"residual must be a positive multiple of group (keys leave the window in whole groups), got {residual} and {group}"
        )
    key_bits, value_bits = (bits if each is None else each for each in (key_bits, value_bits))
    return Recipe(
        tiers=(
            Coded(
                keys=Lane(Uniform(bits=key_bits, axis="channel", group=group), window=0, flush=residual),
                values=Lane(Uniform(bits=value_bits, axis="token", group=group), window=residual, flush=1),
            ),
        )
    )
