"""Levels where the numbers are: fixed levels for a known distribution, and one scale per token."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import beta, betainc, ndtri
from torch import Tensor

from kvmosaic.codecs.base import Codec, Packed, Part

LARGEST = 63
"""Greatest magnitude of a level: moved up by 64 a level still fits 7 bits, so it is an operand of every instruction that
multiplies bytes, signed or unsigned, and two products of it add up within 16 bits."""


@lru_cache(maxsize=64)
def sphere_levels(channels: int, bits: int) -> tuple[float, Tensor]:
    """(unit, integers): levels for one coordinate of a random unit vector times sqrt(channels) are unit * integers.

    integers: [2**bits] int8, ascending, so that products with codes are sums of integers. One and two bits have the
    odd numbers (affine in the code; at two bits 1.1 % more error than the best levels); three and four bits have
    the Lloyd-Max levels, rounded (0.03 and 0.25 % more at most).
    The coordinate's density is (1 - t^2)^((channels - 3) / 2), up to a factor (arXiv:2504.19874, section 3.1).
    """
    best = _lloyd_max(channels, bits)
    tops = {1: [1], 2: [3]}.get(bits, range(LARGEST // 2, LARGEST + 1))
    fits = [_fit(channels, np.round(best / best[-1] * top)) for top in tops]
    _, unit, integers = min(fits, key=lambda fit: fit[0])
    return unit, torch.tensor(integers, dtype=torch.int8)


def _lloyd_max(channels: int, bits: int) -> NDArray[np.float64]:
    levels = ndtri((np.arange(2**bits) + 0.5) / 2**bits)
    for _ in range(20_000):
        mass, moment = _cells(channels, levels)
        moved = moment / mass
        done = np.abs(moved - levels).max() < 1e-9
        levels = moved
        if done:
            break
    return (levels - levels[::-1]) / 2


def _fit(channels: int, integers: NDArray[np.float64]) -> tuple[float, float, NDArray[np.float64]]:
    """(error, unit, integers): the unit with the least squared error of a coordinate, whose mean square is 1."""
    unit = 2.0 / integers[-1]
    for _ in range(1000):  # as Lloyd-Max, with one number to move
        mass, moment = _cells(channels, unit * integers)
        before, unit = unit, float(integers @ moment / (integers**2 @ mass))
        if abs(before - unit) < 1e-12:
            break
    return 1 - unit * float(integers @ moment), unit, integers


def _cells(channels: int, levels: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Probability and first moment of the numbers that are nearest to each level."""
    half = (channels - 1) / 2
    edges = np.concatenate([[-1.0], (levels[1:] + levels[:-1]) / 2 / math.sqrt(channels), [1.0]])
    mass = np.diff(betainc(half, half, (1 + edges) / 2))
    moment = -np.diff((1 - edges**2) ** half) / (2 * half * beta(half, 0.5))
    return mass, moment * math.sqrt(channels)


@dataclass(frozen=True, kw_only=True)
class Sphere(Codec):
    """x is about scale * integers[code], one float16 scale per token, the integers (`sphere_levels`) fixed by the head
    size: no calibration. Meant for rotated channels (`Rotated`), whose coordinates follow the law that they are made for.

    bits: 1 to 4. Three bits are stored as a plane of two and a plane of one. Bits per number: bits + 16/D.
    scale: what the stored scale keeps. "norm": the token's length; "matched": the length of the decoded token;
        "unbiased": <x, decoded> = |x|^2, so that logits are not shrunk (for keys); "least": least squared error (for
        values). A zero token decodes to zeros.
    Source: TurboQuant, arXiv:2504.19874 (mse variant); the scale variants are EDEN's (ICML 2022).
    """

    bits: int
    scale: Literal["norm", "matched", "unbiased", "least"]

    def __post_init__(self) -> None:
        if self.bits not in (1, 2, 3, 4):
            raise ValueError(f"bits must be 1, 2, 3 or 4, got {self.bits}")
        if self.scale not in ("norm", "matched", "unbiased", "least"):
            raise ValueError(f"scale must be 'norm', 'matched', 'unbiased' or 'least', got {self.scale!r}")

    def parts(self, channels: int) -> Mapping[str, Part]:
        planes = {"codes": 2, "top": 1} if self.bits == 3 else {"codes": self.bits}
        parts = {
            name: Part(every=1, width=channels, dtype=torch.uint8, bits=bits, kind="codes", looked_up=bits == 4)
            for name, bits in planes.items()
        }
        return parts | {"scale": Part(every=1, width=1, dtype=torch.float16, bits=16, kind="scales")}

    def encode(self, x: Tensor, valid: Tensor | None) -> Packed:
        x = x.float()
        unit, integers = sphere_levels(x.shape[-1], self.bits)
        levels = integers.to(x.device).float()
        length = x.norm(dim=-1, keepdim=True)
        norm = length * (unit / math.sqrt(x.shape[-1]))
        codes = torch.bucketize(x / torch.where(norm > 0, norm, 1.0), (levels[1:] + levels[:-1]) / 2)
        coarse = levels[codes]
        along = (coarse * x).sum(-1, keepdim=True)
        scale = {
            "norm": norm,
            "matched": length / coarse.norm(dim=-1, keepdim=True),
            "unbiased": length.square() / along.clamp_min(1e-30),
            "least": along / coarse.square().sum(-1, keepdim=True),
        }[self.scale]
        codes = codes.to(torch.uint8)
        planes = {"codes": codes & 3, "top": codes >> 2} if self.bits == 3 else {"codes": codes}
        return planes | {"scale": scale.to(torch.float16)}

    def decode(self, packed: Packed) -> Tensor:
        return self._integers(packed) * packed["scale"].float()

    def logits(self, query: Tensor, packed: Packed) -> Tensor:
        return (query @ self._integers(packed).mT) * packed["scale"].float().mT

    def mix(self, weights: Tensor, packed: Packed) -> Tensor:
        return (weights * packed["scale"].float().mT) @ self._integers(packed)

    def _integers(self, packed: Packed) -> Tensor:
        codes = packed["codes"].int()
        if self.bits == 3:
            codes = codes + 4 * packed["top"].int()
        _, integers = sphere_levels(codes.shape[-1], self.bits)
        return integers.to(codes.device).float()[codes]
