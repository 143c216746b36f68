"""Attention over learned levels on an NVIDIA GPU by levels.cu: what is served, and how it lies in shared memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmosaic.codecs import Codec, Levels
from kvmosaic.kernels import gpu
from kvmosaic.kernels.attention.plan import QUERIES, TOKENS, Plan, pitch

if TYPE_CHECKING:
    from kvmosaic.stores.lane import Lane, LaneBytes

DECLARED = 8 * 1024
"""Bytes of shared memory that the sources declare, at most: queries, maxima, sums."""

OVERHEAD = 1.0
"""Chunks that a warp could read while tables are made."""


def why_not(keys: Lane, values: Lane, channels: int, affine: bool = False) -> str | None:
    """Why the kernel cannot serve a store of these lanes, one of which has learned levels; None if it can."""
    if not (isinstance(keys.codec, Levels) and isinstance(values.codec, Levels)):
        return "learned levels on one side only"
    if keys.codec.ranges is None or values.codec.ranges is not None:
        return "learned levels: served are keys by channel and values by token"
    if (keys.window, keys.flush) != (values.window, values.flush) or keys.flush > 1:
        return "learned levels of keys and values that are not encoded one by one and at the same time"
    if channels > gpu.MOST_CHANNELS or channels % 16 or channels * keys.codec.bits % 32:
        return f"head size {channels}: served are multiples of 16 up to {gpu.MOST_CHANNELS}, of 32 for odd bits"
    return "calibrated logits of learned levels" if affine else None


def plan(keys: LaneBytes, values: LaneBytes, count: int, softcap: float | None) -> Plan:
    """count: queries of a KV head. Raises RuntimeError for a GPU whose shared memory is too small."""
    most = gpu.most_shared(keys.coded.device)
    pools = {warps: _pool(keys, values, warps) for warps in (16, 12, 8, 4)}
    warps = next((warps for warps, pool in pools.items() if pool + DECLARED <= most), None)
    if warps is None:
        raise RuntimeError(f"tables of learned levels do not fit the shared memory of {keys.coded.device}")
    macros = {
        "HEAD": keys.channels, "NUMBER": gpu.NUMBERS[keys.ring.dtype], "SOFTCAP": int(softcap is not None),
        "PRE_ROPE": int(keys.rotary is not None), "WARPS": warps, "POOL_BYTES": pools[warps],
    }  # fmt: skip
    for name, codec in (("KEY", _levels(keys.lane.codec)), ("VALUE", _levels(values.lane.codec))):
        macros |= {f"{name}_BITS": codec.bits, f"{name}_OUTLIERS": codec.outliers}
    return Plan(
        file="attention/levels.cu",
        macros={name: str(value) for name, value in macros.items()},
        chunks=-(-keys.buffers["codes"].shape[2] // TOKENS),
        overhead=OVERHEAD,
        queries=QUERIES,
        warps=warps,
        shared=pools[warps],
        apart=True,
    )


def _levels(codec: Codec) -> Levels:
    assert isinstance(codec, Levels), "asked before"
    return codec


def _pool(keys: LaneBytes, values: LaneBytes, warps: int) -> int:
    """Bytes, as levels.cu lays them out."""
    channels, key, value = keys.channels, _levels(keys.lane.codec), _levels(values.lane.codec)
    tables = (4**value.bits + 2**key.bits) * 128 + channels * 8
    if keys.rotary is not None:
        tables += channels // 2 * TOKENS * 8
    stages = 2 * TOKENS * (pitch(channels * key.bits // 8) + pitch(channels * value.bits // 8))
    a_warp = stages + channels * 16 + TOKENS * QUERIES * 2 + -(-TOKENS * value.outliers * 4 // 16) * 16
    return max(tables + warps * a_warp, 4 * warps * QUERIES * channels)
