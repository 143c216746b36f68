"""Scores of a decode step on an NVIDIA GPU: what it pays to each stored token, and the slot that its own token takes."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvmosaic.kernels import gpu

if TYPE_CHECKING:
    from kvmosaic.selection import Order
    from kvmosaic.stores import EvictingStore

MOST_PARTS = 32
TOKENS = 1024
"""Of a part, at least."""


class _Received(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                "logits", "lse", "asks", "score", "position", "length", "placed", "capacity", "slot", "live", "least", "least_at",
            )
        ),
        *((name, ctypes.c_int64) for name in ("stride", "columns")),
        *((name, ctypes.c_int32) for name in ("heads", "count", "parts", "first", "recent", "by_score")),
    ]  # fmt: skip


def replace(
    store: EvictingStore, order: Order, logits: Tensor, lse: Tensor, live: Tensor, asks: Tensor | None = None
) -> Tensor:
    """Add to the tokens' scores what a step pays them, and make room for the step's own token.

    logits: [B * H, M, slots + 1] float32 in base 2, of the tokens held and, after them, of the step's own; lse [B * H, M],
        natural, over all tokens everywhere. Each token receives the mean over the M queries of its KV head.
    live: [1] int32; 0 = the step is one too many, and nothing changes.
    asks: [slots] float32, 1 where the query counts when a row holds so many tokens, else 0; None = it always counts.
    Returns [B, H] int64, the slot that the step's own token is to be written to: after the others in a row below its capacity;
    in a full one that of the token that leaves first in this `order`; -1 where that is the step's own. Its columns are written,
    and lengths count it. The columns have a place more than the store has slots (`EvictingStore.pin`).
    """
    assert store.capacity is not None, "the first prompt sets the capacity"
    batch, heads = store.length.shape
    rows, count, stride = logits.shape
    parts = min(MOST_PARTS, -(-stride // TOKENS))
    slot = torch.empty_like(store.length)
    least = lse.new_empty(parts, rows)
    least_at = least.new_empty(parts, rows, dtype=torch.int32)
    received = _Received(
        **{
            name: tensor.data_ptr()
            for name, tensor in dict(
                logits=logits, lse=lse, score=store.score, position=store.position, length=store.length, placed=store.placed,
                capacity=store.capacity, slot=slot, live=live, least=least, least_at=least_at,
            ).items()
        },
        stride=stride, columns=store.score.shape[2], heads=heads, count=count, parts=parts, first=order.first, recent=order.recent,
        by_score=order.by_score,
    )  # fmt: skip
    if asks is not None:
        received.asks = asks.data_ptr()
    macros = {"HEAD": "32", "NUMBER": "0"}  # no kernel here looks at keys
    gpu.kernel("scores/cuda.cu", "receive", macros, logits.device)((rows, parts, 1), received)
    gpu.kernel("scores/cuda.cu", "replace", macros, logits.device)((batch, 1, 1), received)
    return slot
