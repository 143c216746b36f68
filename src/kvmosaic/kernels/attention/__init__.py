"""Attention of a step's queries over one coded store, and over the step's own exact tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kvmosaic.kernels.attention import cpu, cuda, reference
from kvmosaic.kernels.attention.dense import dense, dense_mass, dense_peaks
from kvmosaic.kernels.attention.partial import Partial, merge
from kvmosaic.kernels.attention.reference import Affine, mass

if TYPE_CHECKING:
    from kvmosaic.stores.lane import LaneBytes

__all__ = ["Affine", "Partial", "attend", "dense", "dense_mass", "dense_peaks", "mass", "merge"]


def attend(
    keys: LaneBytes,
    values: LaneBytes,
    length: Tensor,
    query: Tensor,
    scale: float,
    softcap: float | None = None,
    affine: Affine | None = None,
    fresh: tuple[Tensor, Tensor] | None = None,
) -> Partial:
    """As `reference.attend`, by the fastest kernel that serves these lanes on their device."""
    # no kernel reads keys that are narrower than the query
    kernels = {"cpu": cpu, "cuda": cuda}.get(query.device.type) if keys.basis is None else None
    part = kernels and kernels.attend(keys, values, length, query, scale, softcap, affine, fresh)
    return part or reference.attend(keys, values, length, query, scale, softcap, affine, fresh)
