"""Settings over which the contract tests run: every codec in several forms, and every method of the folder."""

from typing import Any

import torch

from kvmosaic import methods
from kvmosaic.codecs import Codec, Coupled, Exact, Levels, Rotated, Sketched, Sphere, Split, Uniform
from kvmosaic.errors import NeedsCalibration
from kvmosaic.recipe import Recipe
from kvmosaic.stores import EXACT, Coded, Lane


def tables(coupled: int, bits: int, heads: int = 2, channels: int = 64) -> Coupled:
    """Random vectors, about as large as what the tests encode."""
    draw = torch.Generator().manual_seed(coupled * bits)
    return Coupled((torch.randn(heads, channels // coupled, 2**bits, coupled, generator=draw) * 3).half())


def levels(bits: int, outliers: int, by_channel: bool, heads: int = 2, channels: int = 64) -> Levels:
    """Uneven levels, read a little off from where they are chosen, and ranges too narrow for some numbers."""
    draw = torch.Generator().manual_seed(bits)
    chosen = (torch.rand(2**bits, generator=draw) * 2 - 1).sort().values
    ranges = torch.rand(2, heads, channels, generator=draw) * torch.tensor([3.0, 6.0])[:, None, None]
    return Levels(
        levels=chosen, restored=chosen * 1.1 + 0.01, ranges=ranges.half() if by_channel else None, outliers=outliers
    )


CODECS: dict[str, Codec] = {
    "exact": Exact(),
    **{f"channel{bits}": Uniform(bits=bits, axis="channel", group=32) for bits in (1, 2, 4, 8)},
    **{f"run{bits}": Uniform(bits=bits, axis="channel") for bits in (1, 2, 4, 8)},
    **{f"token{bits}": Uniform(bits=bits, axis="token", group=32) for bits in (1, 2, 4, 8)},
    "whole-token4": Uniform(bits=4, axis="token"),
    "equalized4": Uniform(bits=4, axis="token", equalize=True),
    "clipped1": Uniform(bits=1, axis="channel", clip=0.5),
    "centred1": Uniform(bits=1, axis="channel", clip=0.5, clip_about="center"),
    **{f"sphere{bits}": Sphere(bits=bits, scale="unbiased") for bits in (1, 2, 3, 4)},
    "rotated-sphere2": Rotated(Sphere(bits=2, scale="least")),
    "rotated-token4": Rotated(Uniform(bits=4, axis="token")),
    **{f"coupled{coupled}c{bits}": tables(coupled, bits) for coupled, bits in ((8, 8), (8, 10), (4, 3), (2, 8))},
    **{f"channel-levels{bits}": levels(bits, outliers, True) for bits, outliers in ((1, 2), (2, 0), (3, 1), (4, 3))},
    **{f"token-levels{bits}": levels(bits, outliers, False) for bits, outliers in ((1, 0), (2, 2), (3, 1), (4, 0))},
    "split": Split(first=Sphere(bits=3, scale="unbiased"), rest=Uniform(bits=2, axis="channel", group=32), channels=32),
    "sketched3": Sketched(codec=Sphere(bits=2, scale="norm")),
    "by-head2": Uniform(bits=2, axis="channel", clip=(0.5, 0.9)),
}
"""All are made for two KV heads and head sizes that are multiples of 32."""


def coded(codec: Codec, window: int = 0, groups: int = 1) -> Coded:
    """Both sides by one codec, flushed so that no group is cut."""
    lane = Lane(codec, window, groups * codec.unit)
    return Coded(lane, lane)


TIERS: dict[str, Coded] = {
    **{name: coded(codec) for name, codec in CODECS.items()},
    "kivi2": methods.get("kivi")(bits=2, residual=64).tiers[0],
    "kivi4-short": methods.get("kivi")(bits=4, residual=32).tiers[0],
    "windowed": coded(CODECS["token4"], window=7),
    "sliding-channel": coded(CODECS["channel2"], window=32, groups=2),
    "calibrated": methods.get("calibquant")(bits=1).visual,
    "uneven": Coded(Lane(CODECS["channel2"], 0, 96), Lane(CODECS["run4"], 5, 3)),
}

EXACT_METHODS = {"exact": methods.get("exact")(), "exact tier": Recipe(tiers=(EXACT,))}


def recipe(text: str) -> Any:
    return methods.parse(text)


def _bare(name: str) -> bool:
    """Whether a method serves without a calibration file."""
    try:
        return bool(methods.get(name)())
    except NeedsCalibration:
        return False


BARE = [name for name in methods.names() if _bare(name)]
TEXT = ["exact", *(name for name in BARE if name not in ("exact", "calibquant"))]
TEXT += ["kivi bits=4 residual=32", "kivi bits=8 residual=32", "think channels=16 | kivi residual=32"]
TEXT += ["turboquant bits=2.5 outliers=8", "turboquant variant=prod"]
"""Recipes for any model, as a user writes them."""

LEARNED = [
    "cq coupled=4 bits=4",
    "cq coupled=4 bits=4 pre_rope=True",
    "kvquant bits=2",
    "kvquant bits=3 pre_rope=False",
]
"""Methods that need a file, with the options that they learn with (`tests/learned.py` makes it)."""

VISUAL = [
    "calibquant",
    "calibquant bits=2",
    "calibquant bits=4 by_picture=true",
    "calibquant bits=1 | kivi bits=2 residual=32",
    "calibquant bits=2 | think channels=16 recent=8",
]
"""Recipes for vision models."""
