"""Steps of one token a row that are kernels only, so that a CUDA graph can hold them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvmosaic.codecs import Exact
from kvmosaic.errors import UnsupportedModel
from kvmosaic.kernels import step
from kvmosaic.projection import NO_KERNEL
from kvmosaic.recipe import Recipe
from kvmosaic.selection import Evicting, Gathering
from kvmosaic.stores import CodedStore, EvictingStore

if TYPE_CHECKING:
    from kvmosaic.hooks.layer import CacheLayer


def why_not(recipe: Recipe, layer: int, channels: int, dtype: torch.dtype, device: torch.device | None) -> str | None:
    """Why steps of a layer, filled by a prompt, cannot be kernels only; None if they can.

    channels: the head size. device: None = any GPU.
    """
    if isinstance(recipe.selection, Gathering):
        return "its selection goes on while decoding"
    if recipe.projection is not None:
        return NO_KERNEL
    tiers = [*recipe.stored_in, *([recipe.visual] if recipe.visual else [])]
    if any(isinstance(lane.codec, Exact) and lane.ring for tier in tiers for lane in tier.lanes(layer)):
        return "exact tokens behind a window"
    if recipe.first:
        tiers.append(recipe.first_in)
    stores = [(tier.lanes(layer), tier.affine_of(layer)) for tier in tiers]
    if isinstance(recipe.selection, Evicting) and stores[0][1] is not None:
        return "tokens are scored by their logits, and calibrated ones are others"
    return step.why_not(stores, channels, dtype, device)


def is_ready(layer: CacheLayer) -> bool:
    """Whether the next tokens all go where a captured step puts them: none waits, and the first tokens are all there."""
    first, store = layer.recipe.first or 0, layer.stores.get("first")
    held = 0 if store is None else int(store.length.min())
    return layer.pending is None and held >= first


class Pinned:
    """What a layer has while every step is one token a row, `tokens` of them at most, by kernels that find all lengths on the
    device: its stores lie where they are, with room for what comes.

    live: [1] int32 on the device; while it is 0 a step stores nothing.
    """

    def __init__(self, layer: CacheLayer, tokens: int, live: Tensor) -> None:
        empty = torch.empty(
            layer.batch_size, layer.num_heads, 0, layer.head_sizes[0], dtype=layer.dtype, device=layer.device
        )
        if "tier 0" not in layer.stores:
            layer.stores["tier 0"] = layer.recipe.stored_in[0].open(layer.index, empty, empty)
        stores: list[CodedStore] = []
        scored = None
        for name in sorted(layer.stores, key=lambda name: name != "tier 0"):  # the first takes the new tokens
            store = layer.stores[name]
            store.pin(store.needs(0 if stores else tokens))
            if isinstance(store, EvictingStore):
                assert isinstance(layer.recipe.selection, Evicting), "its store is an evicting selection's"
                scored = step.Scored(store, layer.recipe.selection.order)
                store = store.store
            assert isinstance(store, CodedStore), "there are no others"
            stores.append(store)
        self.step = step.register(stores, live, scored)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """As `CacheLayer.attend`."""
        if sinks is not None:
            raise UnsupportedModel("a captured step knows no attention sinks; call model.generate instead")
        return step.run(self.step, query, keys, values, scale, softcap)

    def load(self, layer: CacheLayer, other: CacheLayer, tokens: int) -> bool:
        """Take over another layer's tokens into this pinned one, if there is room for them and for `tokens` more."""
        if layer.stores.keys() != other.stores.keys() or layer.batch_size != other.batch_size:
            return False
        for name, store in layer.stores.items():
            new = other.stores[name]
            if (name == "tier 0" and store.room < new.needs(tokens)) or not store.load(new):
                return False
        layer.seen, layer.padding = other.seen, other.padding
        return True
