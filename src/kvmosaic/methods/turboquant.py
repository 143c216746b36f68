"""TurboQuant: rotate each token at random, round its coordinates to the levels that are best for a sphere.

Zandieh et al., ICLR 2026, arXiv:2504.19874; no maintained code.
The mse variant is meant for use. Departures: signed Hadamard rotations where the head size allows (the paper: Haar); the
stored scale makes keys and values unbiased at no cost (EDEN, ICML 2022), which is worth up to half of the loss: errors
average out over the tokens of a sum, a shrunk length does not (docs/log.md); the newest tokens can stay exact.
Fractional bits follow the authors' supplement: the keys' channels of largest norm over the prompt get a bit more, in a
rotation of their own (levels scaled by its own size, where the supplement has the head's); values have none. The prod
variant spends a bit on a sign sketch, which makes logits noisier at equal bits.
"""

from typing import Literal

from kvmosaic.codecs import Codec, Rotated, Sketched, Sphere, Split
from kvmosaic.projection import LargestFirst
from kvmosaic.recipe import Recipe
from kvmosaic.stores import Coded, Lane


def turboquant(
    bits: float = 4,
    *,
    key_bits: float | None = None,
    value_bits: int | None = None,
    window: int = 0,
    outliers: int = 32,
    variant: Literal["mse", "prod"] = "mse",
    seed: int = 0,
) -> Recipe:
    """bits: of a code, for keys and values alike: 1, 2, 3 or 4; key_bits, value_bits if the sides differ.

    With a half in key_bits (1.5, 2.5 or 3.5), `outliers` channels of each key get a bit more than the others. A half in bits
    is for keys alone: 2.5 keeps values at 2.
    window: how many of the newest tokens stay exact (the paper: none). outliers: 32 as in the paper, of 128.
    variant: "mse", or "prod" for keys and values with a bit less and a sketch (reproduction only). seed: of the rotation.
    """
    if variant not in ("mse", "prod"):
        raise ValueError(f"variant must be 'mse' or 'prod', got {variant!r}")
    if key_bits is None:
        key_bits = bits
    if value_bits is None:
        value_bits = int(bits // 1)
    whole = int(key_bits // 1)
    if key_bits - whole not in (0, 0.5):
        raise ValueError(f"bits of keys are whole, or a half more for outlier channels, got {key_bits}")

    def sphere(bits: int) -> Codec:
        if variant == "prod":
            return Rotated(Sketched(codec=Sphere(bits=bits - 1, scale="norm"), seed=seed), seed)
        return Rotated(Sphere(bits=bits, scale="unbiased"), seed)

    keys, projection = sphere(whole), None
    if key_bits != whole:
        keys, projection = Split(first=sphere(whole + 1), rest=keys, channels=outliers), LargestFirst()
    return Recipe(projection=projection, tiers=(Coded(Lane(keys, window), Lane(sphere(value_bits), window)),))
