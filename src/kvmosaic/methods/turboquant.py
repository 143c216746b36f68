"""TurboQuant: rotate each token at random, round its coordinates to the levels that are best for a sphere.

Zandieh et al., ICLR 2026, arXiv:2504.19874; no maintained code.
We build the mse variant for keys and values. Departures: signed Hadamard rotations where the head size allows (the paper:
Haar); the stored scale makes keys unbiased and values least-squares at no cost (EDEN, ICML 2022); the newest tokens can
stay exact. The paper's prod variant spends a bit on a sign sketch, which makes logits noisier at equal bits.
"""

from kvmosaic.codecs import Rotated, Sphere
from kvmosaic.recipe import Recipe
from kvmosaic.stores import Coded, Lane


def turboquant(
    bits: int = 4, *, key_bits: int | None = None, value_bits: int | None = None, window: int = 0, seed: int = 0
) -> Recipe:
    """bits: of a code, for keys and values alike: 1, 2, 3 or 4; key_bits, value_bits if the sides differ.

    window: how many of the newest tokens stay exact (the paper: none). seed: of the rotation.
    """
    key_bits, value_bits = (bits if each is None else each for each in (key_bits, value_bits))
    keys = Rotated(Sphere(bits=key_bits, scale="unbiased"), seed)
    values = Rotated(Sphere(bits=value_bits, scale="least"), seed)
    return Recipe(tiers=(Coded(Lane(keys, window), Lane(values, window)),))
