"""Attention over coupled channels on an NVIDIA GPU by lookup.cu: what is served, and how it lies in shared memory."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

from kvmosaic.codecs import Codec, Coupled
from kvmosaic.kernels import gpu
from kvmosaic.kernels.attention.plan import QUERIES, TOKENS, Plan, pitch

if TYPE_CHECKING:
    from kvmosaic.stores.lane import Lane, LaneBytes

MOST_COPIES = 4
DECLARED = 9 * 1024
"""Bytes of shared memory that lookup.cu declares, at most: queries, maxima, what tables are made from."""

OVERHEAD = 40 * 1024
"""Bytes of tables that are made in the time that a warp takes for its 32 tokens."""


def why_not(keys: Lane, values: Lane, channels: int, affine: bool = False) -> str | None:
    """Why the kernel cannot serve a store of these lanes, one of which couples channels; None if it can."""
    for lane in (keys, values):
        if not isinstance(lane.codec, Coupled):
            return f"coupled channels on one side and {type(lane.codec).__name__} on the other"
        coupled, bits = lane.codec.centroids.shape[3], lane.codec.bits
        if coupled % 2 or channels % coupled:
            return f"{coupled} coupled channels of {channels}: served are even numbers that divide the head size"
        if bits > 12:
            return f"codes of {bits} bits: served are 12 at most"
    if (keys.window, keys.flush) != (values.window, values.flush) or keys.flush > 1:
        return "coupled channels whose keys and values are not encoded one by one and at the same time"
    if channels > gpu.MOST_CHANNELS or channels % 16:
        return f"head size {channels}: served are multiples of 16 up to {gpu.MOST_CHANNELS}"
    if affine:
        return "calibrated logits of coupled channels"
    if _layout(keys.codec, values.codec, channels, gpu.H100_SHARED) is None:
        return f"codes of {bits} bits for {coupled} channels: products with so many centroids do not fit shared memory"
    return None


def plan(keys: LaneBytes, values: LaneBytes, count: int, softcap: float | None) -> Plan:
    """count: queries of a KV head. Raises RuntimeError for a GPU whose shared memory is too small."""
    device, codecs = keys.coded.device, (keys.lane.codec, values.lane.codec)
    found = _layout(*codecs, keys.channels, gpu.most_shared(device))
    if found is None:
        raise RuntimeError(f"the products of queries with all centroids do not fit the shared memory of {device}")
    warps, copies, tables, pool = found
    macros = {
        "HEAD": keys.channels, "NUMBER": gpu.NUMBERS[keys.ring.dtype], "SOFTCAP": int(softcap is not None),
        "WARPS": warps, "COPIES": copies, "POOL_BYTES": pool,
    }  # fmt: skip
    for name, codec in zip(("KEY", "VALUE"), codecs, strict=True):
        assert isinstance(codec, Coupled), "asked before"
        macros |= {f"{name}_BITS": codec.bits, f"{name}_COUPLED": codec.centroids.shape[3]}
    return Plan(
        file="attention/lookup.cu",
        macros={name: str(value) for name, value in macros.items()},
        chunks=-(-keys.buffers["codes"].shape[2] // TOKENS),
        overhead=tables / OVERHEAD,
        queries=QUERIES,
        warps=warps,
        shared=pool,
        apart=True,
    )


def _layout(keys: Codec, values: Codec, channels: int, most: int) -> tuple[int, int, int, int] | None:
    """(warps, copies of the values' centroids, bytes of all tables, bytes of the pool): the fastest that fits; None if
    nothing does."""
    assert isinstance(keys, Coupled) and isinstance(values, Coupled), "asked before"
    scores = keys.centroids.shape[1] * 2**keys.bits * 8
    codes = sum(pitch(-(-codec.centroids.shape[1] * codec.bits // 8)) for codec in (keys, values))
    a_warp = TOKENS * (2 * codes + 2 * QUERIES)
    for copies, warps in product(_copies(channels, values.centroids.shape[3]), (16, 12, 8, 4)):
        tables = scores + copies * 2**values.bits * channels * 2
        pool = max(tables + warps * a_warp, 4 * warps * QUERIES * channels)
        if pool + DECLARED <= most:
            return warps, copies, tables, pool
    return None


def _copies(channels: int, coupled: int) -> list[int]:
    """As many as keep lanes that read one group apart, or fewer."""
    groups_of_a_lane = channels // 8 // coupled if channels % 64 == 0 and coupled in (2, 4, 8) else MOST_COPIES
    return [copies for copies in (4, 2, 1, 0) if copies <= max(1, MOST_COPIES // max(1, groups_of_a_lane))]
