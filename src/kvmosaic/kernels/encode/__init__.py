"""Encoding straight into a store's blocks. The reference is `LaneBytes._write` with the codec's own `encode`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kvmosaic.kernels.encode import cpu, cuda

if TYPE_CHECKING:
    from kvmosaic.stores.lane import LaneBytes

__all__ = ["write"]


def write(lane: LaneBytes, x: Tensor, count: Tensor | None) -> bool:
    """Encode x [B, H, T, D] into the slots after `lane.coded`, of each row its first `count` [B, H] tokens
    (None = all).

    By the kernel that serves the lane on its device; False, and nothing done, if there is none.
    """
    kernels = {"cpu": cpu, "cuda": cuda}.get(x.device.type)
    return kernels is not None and kernels.write(lane, x, count)
