"""Coupled channels into their codes on an NVIDIA GPU by the kernels of lookup.cu."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvmosaic.codecs import Coupled
from kvmosaic.kernels import gpu

if TYPE_CHECKING:
    from kvmosaic.stores.lane import LaneBytes


class _Side(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "exact", "coded", "learned")),
        *((name, ctypes.c_int64) for name in ("code_stride", "exact_room")), ("ring", ctypes.c_int32),
    ]  # fmt: skip


class _Append(ctypes.Structure):
    _fields_ = [("keys", _Side), ("values", _Side), ("end", gpu.StepEnd)]


class _Writing(ctypes.Structure):
    _fields_ = [
        ("side", _Side), ("x", ctypes.c_void_p), ("count", ctypes.c_void_p), ("strides", ctypes.c_int64 * 3),
        ("heads", ctypes.c_int32), ("tokens", ctypes.c_int32),
    ]  # fmt: skip


TOKENS = 128
"""Of a block of threads, one each."""


def write(lane: LaneBytes, x: Tensor, count: Tensor | None) -> bool:
    """As `cuda.write`, for a lane of coupled channels."""
    codec = lane.lane.codec
    assert isinstance(codec, Coupled), "the caller asks"
    heads, groups, _, coupled = codec.centroids.shape
    if coupled % 2 or x.shape[1:] != (heads, x.shape[2], groups * coupled) or x.dtype not in gpu.NUMBERS:
        return False
    x = x if x.stride(3) == 1 else x.contiguous()
    counts = None if count is None else count.data_ptr()
    strides = (ctypes.c_int64 * 3)(*x.stride()[:3])
    arguments = _Writing(_side(lane), x.data_ptr(), counts, strides, heads, x.shape[2])
    macros = {"HEAD": str(x.shape[3]), "NUMBER": str(gpu.NUMBERS[x.dtype]), "APPENDS": "0", **_macros("KEY", codec)}
    grid = (x.shape[0] * heads, -(-x.shape[2] // TOKENS), 1)
    gpu.kernel("encode/lookup.cu", "encode", macros, x.device)(grid, arguments)
    return True


def append(
    keys: LaneBytes, values: LaneBytes, end: gpu.StepEnd, grid: tuple[int, int, int], device: torch.device
) -> None:
    """As `cuda.append`, for lanes of coupled channels."""
    macros = {"HEAD": str(keys.channels), "NUMBER": str(gpu.NUMBERS[keys.ring.dtype]), "APPENDS": "1"}
    macros |= _macros("KEY", keys.lane.codec) | _macros("VALUE", values.lane.codec)
    gpu.kernel("encode/lookup.cu", "append", macros, device)(grid, _Append(_side(keys), _side(values), end))


def _macros(side: str, codec: object) -> dict[str, str]:
    assert isinstance(codec, Coupled), "both sides are coupled (`why_not` of the attention)"
    return {f"{side}_BITS": str(codec.bits), f"{side}_COUPLED": str(codec.centroids.shape[3])}


def _side(lane: LaneBytes) -> _Side:
    described = gpu.describe(lane)
    return _Side(**{field[0]: getattr(described, field[0]) for field in _Side._fields_})
