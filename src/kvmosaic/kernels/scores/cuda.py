"""Scores on an NVIDIA GPU: of a prompt's tokens, and of a store's in a decode step, with the slot that the step's own takes."""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvmosaic.kernels import gpu

if TYPE_CHECKING:
    from kvmosaic.selection import Order
    from kvmosaic.stores import EvictingStore

LOG2_E = math.log2(math.e)
TILE, KEYS_A_WARP, WARPS = 64, 16, 4
"""Queries that a block of threads of `columns` has in shared memory, and keys that each of its warps keeps, or twice as many."""

MOST_QUERIES = 128
MOST_PARTS = 32
TOKENS = 1024
"""Of a part, at least."""


class _Received(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                "logits", "most", "sum", "asks", "score", "position", "length", "placed", "capacity", "slot", "live", "least", "least_at",
            )
        ),
        *((name, ctypes.c_int64) for name in ("stride", "columns")),
        *((name, ctypes.c_int32) for name in ("heads", "count", "joined", "parts", "first", "recent", "by_score")),
    ]  # fmt: skip


class _Columns(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "keys")),
        *((name, ctypes.c_int64 * 3) for name in ("query_strides", "key_strides")),
        *((name, ctypes.c_void_p) for name in ("rows", "valid", "asking", "most", "sum", "out")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("tokens", "heads", "groups", "asked", "splits")),
    ]  # fmt: skip


def column_sums(
    query: Tensor, keys: Tensor, scale: float, valid: Tensor, asking: Tensor | None = None
) -> Tensor | None:
    """As the reference; None if the kernels do not run here or cannot serve such heads."""
    channels, device = keys.shape[3], query.device
    if gpu.why_not(device) or keys.dtype not in gpu.NUMBERS or channels % 16 or channels > gpu.MOST_CHANNELS:
        return None
    query, keys = (x if _aligned(x) else x.contiguous() for x in (query, keys))
    batch, heads, tokens, _ = keys.shape
    valid = valid.contiguous()
    asking = valid if asking is None else asking & valid
    rows = asking.any(0).nonzero()[:, 0].to(torch.int32)
    out = torch.zeros(batch, heads, tokens, device=device)
    groups, asked = query.shape[1] // heads, len(rows)
    macros = {"HEAD": str(channels), "NUMBER": str(gpu.NUMBERS[keys.dtype])}
    kernels = [gpu.kernel("scores/columns.cu", name, macros, device) for name in ("normalize", "columns")]
    tiles = groups * -(-asked // TILE)
    splits = max(1, min(-(-tokens // TILE), -(-2 * kernels[0].resident // (tiles * batch * heads))))
    parts = out.new_empty(2, splits, batch, query.shape[1], asked)
    columns = _Columns(
        **{
            name: tensor.data_ptr()
            for name, tensor in dict(
                query=query, keys=keys, rows=rows, valid=valid, asking=asking, most=parts[0], sum=parts[1], out=out
            ).items()
        },
        query_strides=(ctypes.c_int64 * 3)(*query.stride()[:3]), key_strides=(ctypes.c_int64 * 3)(*keys.stride()[:3]),
        scale=scale * LOG2_E, tokens=tokens, heads=heads, groups=groups, asked=asked, splits=splits,
    )  # fmt: skip
    kernels[0]((tiles, splits, batch * heads), columns)
    a_block = KEYS_A_WARP * WARPS * (1 if channels > 128 else 2)
    kernels[1]((-(-tokens // a_block), batch * heads, 1), columns)
    return out


def _aligned(x: Tensor) -> bool:
    """Whether every token's numbers can be read 16 bytes at a time."""
    return x.stride(3) == 1 and not x.data_ptr() % 16 and not any(stride % 8 for stride in x.stride()[:3])


def replace(
    store: EvictingStore, order: Order, asks: Tensor | None, logits: Tensor, joined: gpu.Joined, live: Tensor
) -> Tensor:
    """Add to the tokens' scores what a step pays them, and make room for the step's own token.

    asks: [slots + 1] float32, 1 where the query counts when a row holds so many tokens, else 0; None = it always counts.
    logits: [B * H, M, slots + 1] float32 in base 2, of the tokens held and, after them, of the step's own; joined: the parts of
        attention over all tokens everywhere. Each token receives the mean over the M queries of its KV head.
    live: [1] int32; 0 = the step is one too many, and nothing changes.
    Returns [B, H] int64, the slot that the step's own token is to be written to: after the others in a row below its capacity;
    in a full one that of the token that leaves first in this `order`; -1 where that is the step's own. Its columns are written,
    and lengths count it. The columns have a place more than the store has slots (`EvictingStore.pin`).
    """
    assert store.capacity is not None, "the first prompt sets the capacity"
    batch, heads = store.length.shape
    rows, count, stride = logits.shape
    assert count <= MOST_QUERIES, f"{count} query heads share a KV head"
    parts = min(MOST_PARTS, -(-stride // TOKENS))
    slot = torch.empty_like(store.length)
    least = logits.new_empty(parts, rows)
    least_at = least.new_empty(parts, rows, dtype=torch.int32)
    received = _Received(
        **{
            name: tensor.data_ptr()
            for name, tensor in dict(
                logits=logits, score=store.score, position=store.position, length=store.length, placed=store.placed,
                capacity=store.capacity, slot=slot, live=live, least=least, least_at=least_at,
            ).items()
        },
        stride=stride, columns=store.score.shape[2], heads=heads, count=count, parts=parts, joined=joined.first[joined.stores],
        most=joined.most, sum=joined.sum, first=order.first, recent=order.recent,
        by_score=order.by_score,
    )  # fmt: skip
    if asks is not None:
        received.asks = asks.data_ptr()
    macros = {"HEAD": "32", "NUMBER": "0"}  # no kernel here looks at keys
    gpu.kernel("scores/cuda.cu", "receive", macros, logits.device)((rows, parts, 1), received)
    gpu.kernel("scores/cuda.cu", "replace", macros, logits.device)((batch, 1, 1), received)
    return slot
