"""A decode step in one layer, by kernels alone: the attention of one token over every store, and the token stored.

An operator of torch, so that a compiled model can hold it. Its stores are found by a number: an operator takes no objects.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from kvmosaic.kernels import gpu
from kvmosaic.kernels.attention import cuda
from kvmosaic.kernels.encode import cuda as encode
from kvmosaic.kernels.scores import cuda as scores

if TYPE_CHECKING:
    from kvmosaic.kernels.attention import Affine
    from kvmosaic.selection import Order
    from kvmosaic.stores import CodedStore, EvictingStore, Lane


class Scored(NamedTuple):
    """A store whose tokens carry scores: a step adds to them, and in a full row its token takes the place of another.

    asks: as in `scores.replace`.
    """

    store: EvictingStore
    order: Order
    asks: Tensor | None


class Step:
    """Stores of one layer, of which the first takes the new tokens; `live` [1] int32, 0 = nothing is stored.

    scored: set if the first store's tokens carry scores; it is the store within.
    """

    def __init__(self, stores: Sequence[CodedStore], live: Tensor, scored: Scored | None = None) -> None:
        self.stores, self.live, self.scored = list(stores), live, scored
        self.arrived = torch.zeros_like(self.stores[0].length, dtype=torch.int32)
        # the lowest that is free: a compiled model holds numbers, and the next cache shall not be compiled anew
        self.number = next(number for number in itertools.count() if number not in _steps)

    def __deepcopy__(self, memo: dict[int, Any]) -> Step:
        stores, live, scored = copy.deepcopy((self.stores, self.live, self.scored), memo)
        return register(stores, live, scored)


_steps: WeakValueDictionary[int, Step] = WeakValueDictionary()


def register(stores: Sequence[CodedStore], live: Tensor, scored: Scored | None = None) -> Step:
    """A step that `run` can take, for as long as it is kept."""
    step = Step(stores, live, scored)
    _steps[step.number] = step
    return step


def run(step: Step, query: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float | None) -> Tensor:
    """query [B, Hq, 1, D], keys and values [B, H, 1, D] -> [B, 1, Hq, D] over the stores and the token itself; then the
    token is stored."""
    return _run(query, keys, values, step.number, scale, softcap)


def why_not(
    stores: Sequence[tuple[tuple[Lane, Lane], Affine | None]],
    channels: int,
    dtype: torch.dtype,
    device: torch.device | None,
) -> str | None:
    """Why `run` cannot serve stores of these lanes (the first takes the new tokens); None if it can. device: None = any."""
    if device is not None and (reason := gpu.why_not(device)):
        return reason
    if dtype not in gpu.NUMBERS:
        return f"the model's numbers are {dtype}; served are bfloat16 and float16"
    if len(stores) > gpu.MOST_STORES:
        return f"{len(stores)} stores in a layer, at most {gpu.MOST_STORES} are served"
    for (keys, values), affine in stores:
        if reason := cuda.why_not(keys, values, channels, affine is not None):
            return reason
    keys, values = stores[0][0]
    return encode.why_not(keys.codec, "keys", channels) or encode.why_not(values.codec, "values", channels)


@torch.library.custom_op("kvmosaic::step", mutates_args=())
def _run(query: Tensor, keys: Tensor, values: Tensor, number: int, scale: float, softcap: float | None) -> Tensor:
    step = _steps[number]
    batch, heads, _, channels = query.shape
    out = query.new_empty(batch, 1, heads, channels)
    sources = [cuda.Source(store.keys, store.values, store.length, store.tier.affine) for store in step.stores]
    first = sources[0]
    logits = slot = None
    if step.scored is not None:
        rows = first.length.numel()
        logits = query.new_empty(
            rows, query.shape[1] * batch // rows, step.scored.store.score.shape[2], dtype=torch.float32
        )
    joined = cuda.parts(sources, query, scale, softcap, (keys, values), out, logits)
    if step.scored is not None and logits is not None:
        slot = scores.replace(*step.scored, logits, joined, step.live)
    encode.append(first.keys, first.values, first.length, step.arrived, step.live, (keys, values), joined, slot)
    return out


@_run.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor, number: int, scale: float, softcap: float | None) -> Tensor:
    batch, heads, _, channels = query.shape
    return query.new_empty(batch, 1, heads, channels)
