"""What a cache will hold, in bytes, from a model's config alone: no weights, no tensors.

The arithmetic is that of the stores (`stores/lane.py`) after one prefill: whole blocks, exact windows, scales and
lengths counted. Tokens that are generated afterwards make buffers grow by a sixteenth at a time, so a long-running cache
holds at most that much more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import torch

from kvmosaic import bundled
from kvmosaic.errors import UnsupportedModel
from kvmosaic.hooks import models
from kvmosaic.kernels.layout import BLOCK, bytes_per_block
from kvmosaic.loading import read_config
from kvmosaic.recipe import Recipe
from kvmosaic.selection import Evicting, Selection
from kvmosaic.stores import Lane, Tier

CONFIGS = resources.files(__package__) / "configs"
FLAG = 8
"""Bytes of a length or of the first slot of a run: int64."""


def names() -> list[str]:
    """The models whose configs come with the package."""
    return sorted([file.name.removesuffix(".json") for file in CONFIGS.iterdir()] + list(bundled.NAMES))


def load_config(name: str) -> Any:
    """The config of a shipped model, a config.json, a folder, or a name on the hub.

    Raises BadCheckpoint if there is none.
    """
    if name in bundled.NAMES:
        return read_config(str(bundled.path(name)), names())
    return read_config(str(CONFIGS / f"{name}.json") if name in names() else name, names())


def count_parameters(config: Any) -> int:
    """Of the whole model, vision tower included: it is built without memory."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForImageTextToText if models.visual_ids(config) else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class Shape:
    """A model's cache. itemsize: bytes of an exact number. kinds: (layer type, sliding window or 0) of each layer.
    ids: rotary positions of a token."""

    heads: int
    channels: int
    itemsize: int
    context: int | None
    takes_pictures: bool
    kinds: tuple[tuple[str, int], ...]
    ids: int = 1

    @staticmethod
    def of(config: Any, itemsize: int = 2) -> Shape:
        """Raises UnsupportedModel for a model whose cache is not keys and values of every token."""
        text = models.text_config(config)
        kinds = tuple((kind, options.get("sliding_window", 0)) for kind, options in models.layer_types(config))
        others = {kind for kind, _ in kinds} - {"full_attention", "sliding_attention", "chunked_attention"}
        if others:
            raise UnsupportedModel(
                f"plan counts keys and values, and this model has layers of {', '.join(sorted(others))}"
            )
        return Shape(
            heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            channels=models.head_size(config),
            itemsize=itemsize,
            context=getattr(text, "max_position_embeddings", None),
            takes_pictures=bool(models.visual_ids(config)),
            kinds=kinds,
            ids=3 if "mrope_section" in (getattr(text, "rope_parameters", None) or {}) else 1,
        )


def learned_bytes(shape: Shape, recipe: Recipe) -> int:
    """Of what calibration found and the codes are read with: once, however many sequences there are."""
    tiers = [tier for tier in (*(recipe.tiers or ()), recipe.visual) if tier is not None]
    layers = [layer for layer, (kind, _) in enumerate(shape.kinds) if kind == "full_attention"]
    lanes = (lane for tier in tiers for layer in layers for lane in tier.lanes(layer))
    tensors = {id(tensor): tensor for lane in lanes for tensor in lane.codec.learned().values()}
    return sum(tensor.nbytes for tensor in tensors.values())


def cache_bytes(shape: Shape, recipe: Recipe, tokens: int, visual: int = 0, pictures: int = 1) -> int:
    """Of one sequence of `tokens` tokens, `visual` of them visual in `pictures` runs, right after its prefill, without
    `learned_bytes`.

    A sliding layer is counted as it is a step later: until then it holds on to the whole prompt. Where heads compete for
    tokens, as many bytes as they can take at most, whatever each wins.
    """
    total = 0
    first = min(recipe.first or 0, tokens)
    for layer, (kind, window) in enumerate(shape.kinds):
        if kind != "full_attention" or recipe.is_exact:
            kept = tokens if kind == "full_attention" else min(tokens, window)
            total += 2 * kept * shape.heads * shape.channels * shape.itemsize
            continue
        counts: tuple[int, ...] = (tokens,)
        if recipe.selection is not None:
            counts = recipe.selection.expected(tokens, layer, len(shape.kinds))
        if first:  # taken to be kept by the selection, and not visual
            total += _store_bytes(shape, recipe.first_in, recipe, layer, first, first, 1)
            counts = (max(0, counts[0] - first), *counts[1:])
        # visual tokens are taken to be kept as often as others, and to go to no tier but theirs
        shown = visual if recipe.visual is not None else 0
        shown = round(shown * sum(counts) / tokens)
        if shown:
            assert recipe.visual is not None, "just checked"
            runs = pictures if recipe.visual_by_picture else 1
            total += _store_bytes(shape, recipe.visual, recipe, layer, shown, visual, runs)
        for tier, count in zip(recipe.stored_in, counts, strict=True):
            rest = round(count * (1 - shown / max(sum(counts), 1)))
            if rest:
                total += _store_bytes(shape, tier, recipe, layer, rest, tokens, 1)
        if recipe.projection is not None:
            total += shape.heads * recipe.projection.nbytes(shape.channels)
        if isinstance(recipe.selection, Evicting):  # a place and a score for each slot, two counts for each sequence
            total += shape.heads * -(-counts[0] // 32) * 32 * (4 + 4) + 2 * FLAG
    return total


def resolve(recipe: Recipe, shape: Shape, batch: int, tokens: int, visual: int = 0) -> Recipe:
    """The recipe with a count of tokens in place of a budget in bytes, for `batch` prompts of `tokens` tokens.

    Raises ValueError if what must stay is larger.
    """
    if recipe.selection is None or not recipe.selection.sized:
        return recipe

    def nbytes(selection: Selection, length: int) -> int:
        return batch * cache_bytes(shape, replace(recipe, selection=selection), length, visual)

    return replace(recipe, selection=recipe.selection.resolved(tokens, visual, nbytes))


def _store_bytes(shape: Shape, tier: Tier, recipe: Recipe, layer: int, tokens: int, most: int, runs: int) -> int:
    """tokens: in the mean over heads, of which none holds more than `most`."""
    keys, values = tier.lanes(layer)
    stored = shape.channels if recipe.projection is None else recipe.projection.size(shape.channels)
    bound = most if recipe.selection is not None and recipe.selection.uneven else None
    lanes = _lane_bytes(shape, keys, stored, tokens, runs, bound)
    lanes += _lane_bytes(shape, values, shape.channels, tokens, runs, bound)
    places = 0
    if keys.pre_rope:  # with a selection, heads hold tokens of their own
        slots = tokens if bound is None else min(bound, tokens + 31)
        places = -(-slots // 32) * 32 * 4 * shape.ids * (1 if recipe.selection is None else shape.heads)
    return shape.heads * (lanes + FLAG) + places


def _lane_bytes(shape: Shape, lane: Lane, stored: int, tokens: int, runs: int, most: int | None) -> int:
    """Of one head, `stored` channels of each token encoded: as `LaneBytes` allocates.

    most: if heads may differ, how many tokens the greediest may hold; then what they take at most in the mean.
    """

    def room(unit: int) -> int:
        """For the encoded tokens, in whole units."""
        # heads that differ may each have begun a unit
        slots = coded if most is None else min(most, coded + unit - 1)
        return -(-slots // unit) * unit

    coded = tokens if most is not None else max(0, tokens - lane.window) // lane.flush * lane.flush
    parts = lane.codec.parts(stored).values()
    total = FLAG + (FLAG * runs if any(part.every is None for part in parts) and coded else 0)
    for part in parts:
        if part.every is None:
            total += runs * part.width * part.bits // 8 if coded else 0
        elif part.blocked:
            total += room(BLOCK) // BLOCK * bytes_per_block(part.width, part.bits)
        else:
            width = part.width * (part.dtype.itemsize if part.dtype else shape.itemsize)
            total += -(-room(max(32, part.every)) // part.every) * width
    if lane.ring:
        waiting = min(lane.ring, tokens if most is None else most)
        total += min(lane.ring, -(-waiting // 32) * 32) * shape.channels * shape.itemsize
    return total


def row(
    shape: Shape, recipe: Recipe, *, context: int, batch: int, visual: int, memory: int | None, weights: int
) -> dict[str, Any]:
    """One row of the table. The share of visual tokens stays that of `visual` in `context` for longer contexts.

    Raises ValueError for counts that make no sense, UnsupportedModel for a recipe that the model cannot use.
    """
    if min(context, batch) < 1 or not 0 <= visual <= context:
        raise ValueError(
            f"context and batch are at least 1, and visual tokens at most the context; got {context}, {batch}, {visual}"
        )
    if visual and not shape.takes_pictures:
        raise UnsupportedModel(f"the model takes no pictures, so none of its tokens are visual; got {visual}")
    if recipe.visual is not None and not shape.takes_pictures:
        raise UnsupportedModel(f"{recipe.name} sets how visual tokens are kept, and the model takes no pictures")

    @functools.cache
    def sequence(tokens: int) -> int:
        shown = round(tokens * visual / context)
        return cache_bytes(shape, resolve(recipe, shape, batch, tokens, shown), tokens, shown)

    exact, learned = cache_bytes(shape, Recipe(), context), learned_bytes(shape, recipe)
    total = batch * sequence(context) + learned
    columns: dict[str, Any] = {
        "method": recipe.name or "exact",
        "exact_bytes_per_token": exact / context,
        "bytes_per_token": total / batch / context,
        "compression": batch * exact / total,
        "cache_bytes": total,
    }
    if memory is not None:
        room = memory - weights - learned
        columns["largest_batch"] = max(0, room // sequence(context))
        columns["longest_context"] = _most(lambda tokens: batch * sequence(tokens) <= room)
    return columns


def _most(fits: Callable[[int], bool]) -> int:
    """The greatest number of tokens that fits, 0 if none does. Whole blocks make the bytes a staircase, which rises."""
    if not fits(1):
        return 0
    low = 1
    while fits(2 * low):
        low *= 2
    high = 2 * low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
