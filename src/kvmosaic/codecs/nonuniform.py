"""Levels where the numbers are: the best fixed levels for a known distribution, and one scale per token."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from scipy.special import beta, betainc, ndtri
from torch import Tensor

from kvmosaic.codecs.base import Codec, Packed, Part


@lru_cache(maxsize=64)
def sphere_levels(channels: int, bits: int) -> Tensor:
    """[2**bits] ascending, float32: Lloyd-Max levels for one coordinate of a random unit vector, times sqrt(channels).

    The coordinate's density is (1 - t^2)^((channels - 3) / 2), up to a factor (arXiv:2504.19874, section 3.1).
    """
    half = (channels - 1) / 2
    norm = beta(half, 0.5)  # the integral of the density over [-1, 1]
    levels = ndtri((np.arange(2**bits) + 0.5) / 2**bits) / math.sqrt(channels)
    for _ in range(20_000):
        edges = np.concatenate([[-1.0], (levels[1:] + levels[:-1]) / 2, [1.0]])
        mass = np.diff(betainc(half, half, (1 + edges) / 2))
        moment = -np.diff((1 - edges**2) ** half) / (2 * half * norm)
        moved = moment / mass
        done = np.abs(moved - levels).max() < 1e-10
        levels = moved
        if done:
            break
    return torch.tensor((levels - levels[::-1]) / 2 * math.sqrt(channels), dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class Sphere(Codec):
    """x is about scale * levels[code], one float16 scale per token, levels fixed by the head size: no calibration.

    Meant for rotated channels (`Rotated`), whose coordinates follow the law that the levels are made for.
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
            name: Part(every=1, width=channels, dtype=torch.uint8, bits=bits, kind="codes")
            for name, bits in planes.items()
        }
        return parts | {"scale": Part(every=1, width=1, dtype=torch.float16, bits=16, kind="scales")}

    def encode(self, x: Tensor, valid: Tensor | None) -> Packed:
        x = x.float()
        levels = sphere_levels(x.shape[-1], self.bits).to(x.device)
        length = x.norm(dim=-1, keepdim=True)
        unit = x / torch.where(length > 0, length, 1.0) * math.sqrt(x.shape[-1])
        codes = torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2)
        coarse = levels[codes]
        along = (coarse * x).sum(-1, keepdim=True)
        scale = {
            "norm": length / math.sqrt(x.shape[-1]),
            "matched": length / coarse.norm(dim=-1, keepdim=True),
            "unbiased": length.square() / along.clamp_min(1e-30),
            "least": along / coarse.square().sum(-1, keepdim=True),
        }[self.scale]
        codes = codes.to(torch.uint8)
        planes = {"codes": codes & 3, "top": codes >> 2} if self.bits == 3 else {"codes": codes}
        return planes | {"scale": scale.to(torch.float16)}

    def decode(self, packed: Packed) -> Tensor:
        return self._levels(packed) * packed["scale"].float()

    def logits(self, query: Tensor, packed: Packed) -> Tensor:
        return (query @ self._levels(packed).mT) * packed["scale"].float().mT

    def mix(self, weights: Tensor, packed: Packed) -> Tensor:
        return (weights * packed["scale"].float().mT) @ self._levels(packed)

    def _levels(self, packed: Packed) -> Tensor:
        codes = packed["codes"].int()
        if self.bits == 3:
            codes = codes + 4 * packed["top"].int()
        return sphere_levels(codes.shape[-1], self.bits).to(codes.device)[codes]
