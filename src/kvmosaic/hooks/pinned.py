"""Steps of one token a row that are kernels only, so that a CUDA graph can hold them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvmosaic.codecs import Exact
from kvmosaic.errors import UnsupportedModel
from kvmosaic.hooks.pending import Pending
from kvmosaic.hooks.waiting import Waiting
from kvmosaic.kernels import step
from kvmosaic.projection import NO_KERNEL
from kvmosaic.recipe import Recipe
from kvmosaic.selection import Evicting, Gathering, Order
from kvmosaic.stores import EXACT, CodedStore, EvictingStore, RaggedStore, Store

if TYPE_CHECKING:
    from kvmosaic.hooks.layer import CacheLayer


def why_not(recipe: Recipe, layer: int, channels: int, dtype: torch.dtype, device: torch.device | None) -> str | None:
    """Why steps of a layer, filled by a prompt, cannot be kernels only; None if they can.

    channels: the head size. device: None = any GPU.
    """
    if recipe.projection is not None:
        return NO_KERNEL
    tiers = [*recipe.stored_in, *([recipe.visual] if recipe.visual else [])]
    if any(isinstance(lane.codec, Exact) and lane.ring for tier in tiers for lane in tier.lanes(layer)):
        return "exact tokens behind a window"
    if recipe.first:
        tiers.append(recipe.first_in)
    stores = [(tier.lanes(layer), tier.affine_of(layer)) for tier in tiers]
    if isinstance(recipe.selection, Gathering):  # they come first, and tiers take what was chosen, many at a time
        if any(lane.ring for tier in recipe.stored_in for lane in tier.lanes(layer)):
            return "tokens are chosen among many at a time, and its tiers hold the newest back"
        stores = [(EXACT.lanes(layer), None), *stores]
    if isinstance(recipe.selection, Evicting) and stores[0][1] is not None:
        return "tokens are scored by their logits, and calibrated ones are others"
    if isinstance(recipe.selection, Evicting) and any(lane.codec.learned() for lane in stores[0][0]):
        return "tokens are scored by their logits, which the kernels of learned codecs do not leave"
    return step.why_not(stores, channels, dtype, device)


def is_ready(layer: CacheLayer) -> bool:
    """Whether the next tokens all go where a captured step puts them: the first tokens are all there, and none waits that is
    not one of those to be chosen among."""
    first, store = layer.recipe.first or 0, layer.stores.get("first")
    held = 0 if store is None else int(store.length.min())
    return held >= first and (layer.pending is None or _gathers(layer, layer.pending))


def _gathers(layer: CacheLayer, pending: Pending) -> bool:
    if layer.record_past or not isinstance(layer.recipe.selection, Gathering):
        return False
    # of a short turn that was padded, or had pictures, rows wait differently
    return pending.valid is None and pending.visual is None and len(pending) < layer.recipe.selection.gather


class Pinned:
    """What a layer has while every step is one token a row, `tokens` of them at most, by kernels that find all lengths on the
    device: its stores lie where they are, with room for what comes.

    live: [1] int32 on the device; while it is 0 a step stores nothing.
    waiting: set if generated tokens wait to be chosen among. When as many wait as are chosen among at a time, `gather` is to be
        called before the next step.
    """

    def __init__(self, layer: CacheLayer, tokens: int, live: Tensor) -> None:
        selection, self.waiting = layer.recipe.selection, None
        _open(layer)
        coming, runs = _coming(layer, tokens)
        stores: list[CodedStore] = []
        scored = None
        if isinstance(selection, Gathering):
            self.waiting = Waiting(selection, _empty(layer))
            scored = step.Scored(self.waiting.store, Order(0, 0, by_score=True), self.waiting.asks)
            stores.append(self.waiting.store.store)
        for name in sorted(layer.stores, key=lambda name: name != "tier 0"):  # the first takes the new tokens
            store = layer.stores[name]
            if isinstance(store, EvictingStore):
                assert isinstance(selection, Evicting), "its store is an evicting selection's"
                store.pin(store.needs(coming[name]))
                scored = step.Scored(store, selection.order, None)
                store = store.store
            else:
                assert isinstance(store, CodedStore), "there are no others"
                store.pin(store.needs(coming[name]), runs)
            stores.append(store)
        self.step = step.register(stores, live, scored)
        self._wait(layer, layer.pending)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """As `CacheLayer.attend`."""
        if sinks is not None:
            raise UnsupportedModel("a captured step knows no attention sinks; call model.generate instead")
        return step.run(self.step, query, keys, values, scale, softcap)

    def gather(self, layer: CacheLayer) -> None:
        """Give the tokens that wait their tiers, where there are as many as are chosen among: fewer if the steps that were queued
        last came after the end. Nothing waits for the device; what cannot be encoded is not found, as in a step."""
        assert self.waiting is not None, "only asked where tokens wait"
        selection, full = self.waiting.selection, self.waiting.full
        held = self.waiting.held(selection.gather)
        assert held.score is not None and held.asked is not None, "tokens that wait are scored"
        tiers = selection.assign_waiting(held.score, held.asked)
        for index in range(len(layer.recipe.stored_in)):
            store = layer.stores[f"tier {index}"]
            assert isinstance(store, CodedStore), "a layer that gathers has no others"
            store.put_pinned(held.keys, held.values, (tiers == index) & full[..., None])
        self.waiting.empty(full)

    def load(self, layer: CacheLayer, other: CacheLayer, tokens: int) -> bool:
        """Take over another layer's tokens into this pinned one, if there is room for them and for `tokens` more."""
        _open(other)
        if layer.stores.keys() != other.stores.keys() or layer.batch_size != other.batch_size:
            return False
        coming, runs = _coming(other, tokens)
        for name in layer.stores:
            store, new = _pinned(layer.stores[name]), _pinned(other.stores[name])
            if store.room < new.needs(coming[name]) or not store.load(new):  # type: ignore[arg-type]
                return False
            if isinstance(store, CodedStore) and store.runs_left < runs:
                return False
        layer.seen, layer.padding = other.seen, other.padding
        self._wait(layer, other.pending)
        return True

    def end(self, layer: CacheLayer, steps: int) -> None:
        """So many steps were made since the tokens were taken over (`__init__`, `load`)."""
        layer.seen += steps
        if self.waiting is not None:
            self.waiting.end(layer.seen)

    def release(self, layer: CacheLayer) -> None:
        """The layer goes on with steps of any size."""
        for store in self.step.stores:
            store.unpin()
        if self.waiting is not None and len(self.waiting):
            layer.pending = self.waiting.held(len(self.waiting))
        layer.pinned = None

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        if self.waiting is not None:
            yield from ((f"waiting.{name}", kind, tensor) for name, kind, tensor in self.waiting.store.tensors())
            yield "waiting.asks", "metadata", self.waiting.asks

    def _wait(self, layer: CacheLayer, pending: Pending | None) -> None:
        if self.waiting is not None:
            self.waiting.fill(pending, layer.seen)
            layer.pending = None


def _empty(layer: CacheLayer) -> Tensor:
    size = (layer.batch_size, layer.num_heads, 0, layer.head_sizes[0])
    return torch.empty(size, dtype=layer.dtype, device=layer.device)


def _open(layer: CacheLayer) -> None:
    """Stores for all tiers that tokens will come to, of all rows together, as kernels read them."""
    for name, store in layer.stores.items():
        if isinstance(store, RaggedStore):
            layer.stores[name] = store.padded()
    selection, tiers = layer.recipe.selection, layer.recipe.stored_in
    for index, tier in enumerate(tiers if isinstance(selection, Gathering) else tiers[:1]):
        if f"tier {index}" not in layer.stores:
            layer.stores[f"tier {index}"] = tier.open(layer.index, _empty(layer), _empty(layer))


def _pinned(store: Store) -> CodedStore | EvictingStore:
    assert isinstance(store, CodedStore | EvictingStore), "opened for pinned steps (`_open`)"
    return store


def _coming(layer: CacheLayer, tokens: int) -> tuple[dict[str, int], int]:
    """How many tokens may come to each store in `tokens` steps, and in how many runs."""
    gather = isinstance(layer.recipe.selection, Gathering) and layer.recipe.selection.gather
    most = tokens if layer.pending is None else tokens + len(layer.pending)
    grow = [name for name in layer.stores if name == "tier 0" or (gather and name.startswith("tier"))]
    return {name: most * (name in grow) for name in layer.stores}, most // gather if gather else 0
