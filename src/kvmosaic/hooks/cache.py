"""The cache object that generate carries: one layer per layer of the model, its tokens in the recipe's stores."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache as TransformersCache
from transformers import PreTrainedModel
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, CacheLayerMixin

from kvmosaic.codecs import Exact
from kvmosaic.errors import (
    BadCalibration,
    CacheInUse,
    CacheMismatch,
    CannotRollBack,
    NotFinite,
    RecipeConflict,
    UnsupportedModel,
)
from kvmosaic.hooks import models
from kvmosaic.hooks.attention import Handle, by_kv_head, exact, to_output, with_sinks
from kvmosaic.kernels.attention import dense, dense_mass
from kvmosaic.recipe import Recipe
from kvmosaic.report import Report
from kvmosaic.selection import DROP, Step
from kvmosaic.stores import Coded, CodedStore, EvictingStore, Lane, Store, Tier

Change = Callable[[Tensor], Tensor]
EXACT = Coded(Lane(Exact()), Lane(Exact()))
"""The tier of tokens that a recipe leaves as they are."""
ROLLBACK = 128
"""While past is recorded (assisted decoding), this many of the newest tokens at least can be taken back."""


@dataclass(frozen=True)
class Pending:
    """Tokens that have been attended but not stored yet, with the columns that travel with them.

    keys, values: [B, H, T, D]. visual, valid: [B, T] bool, False for padding in `valid`. keep: [B, H, T] bool, what the
    recipe's selection said. None = no token is visual, all are valid, all stay. score: [B, H, T] float32, if the selection
    goes on while decoding.
    """

    keys: Tensor
    values: Tensor
    visual: Tensor | None = None
    valid: Tensor | None = None
    keep: Tensor | None = None
    score: Tensor | None = None

    def __len__(self) -> int:
        return self.keys.shape[2]

    def __getitem__(self, tokens: slice) -> "Pending":
        columns = (None if each is None else each[..., tokens] for each in self._columns())
        return Pending(self.keys[:, :, tokens], self.values[:, :, tokens], *columns)

    def __add__(self, other: "Pending") -> "Pending":
        def join(name: str, missing: bool) -> Tensor | None:
            flags = getattr(self, name), getattr(other, name)
            if flags == (None, None):
                return None
            lead = next(each for each in flags if each is not None).shape[:-1]
            whole = (
                each if each is not None else torch.full((*lead, len(part)), missing, device=self.keys.device)
                for each, part in zip(flags, (self, other), strict=True)
            )
            return torch.cat(list(whole), -1)

        keys, values = torch.cat([self.keys, other.keys], 2), torch.cat([self.values, other.values], 2)
        return Pending(
            keys, values, join("visual", False), join("valid", True), join("keep", True), join("score", False)
        )

    def map(self, change: Change) -> "Pending":
        columns = (None if each is None else change(each) for each in self._columns())
        return Pending(change(self.keys), change(self.values), *columns)

    def _columns(self) -> tuple[Tensor | None, ...]:
        return self.visual, self.valid, self.keep, self.score


class CacheLayer(CacheLayerMixin):  # type: ignore[misc]
    """One full-attention layer. A step's tokens are attended exactly, then stored; what is stored is never dense again."""

    is_croppable = True
    is_sliding = False

    def __init__(self, index: int, layers: int, recipe: Recipe) -> None:
        super().__init__()
        self.index, self.layers, self.recipe = index, layers, recipe
        self.seen = 0
        self.stores: dict[str, Store] = {}
        self.pending: Pending | None = None
        self.record_past = False
        self.capacity: Tensor | None = None  # [B], tokens that a row may keep, if the selection goes on while decoding
        self.visual: Tensor | None = None  # of the step that is under way, [B, T]

    # what transformers asks of a layer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.head_sizes = (key_states.shape[3], value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Handle, Handle]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        want, got = (self.batch_size, self.num_heads), tuple(key_states.shape[:2])
        if want != got or self.device != key_states.device:
            raise CacheMismatch(
                f"layer {self.index} of this cache holds {want[0]} sequences with {want[1]} KV heads on {self.device}, and "
                f"{got[0]} with {got[1]} on {key_states.device} came. Make a new cache for another model or batch"
            )
        handle = Handle(self, key_states, value_states)
        return handle, handle

    def get_seq_length(self) -> int:
        return self.seen  # tokens seen, not stored: positions and masks depend on it

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # masks cover the step's own tokens only: whatever is stored is past and no padding, so every query sees it
        return query_length, self.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.seen, self.stores, self.pending, self.is_initialized = 0, {}, None, False

    def activate_past_recording(self) -> None:
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest -tokens_to_remove tokens (a number at most 0), then store what was waiting."""
        remove = -tokens_to_remove
        waiting = 0 if self.pending is None else len(self.pending)
        if remove < 0 or remove > waiting:
            raise CannotRollBack(
                f"asked to take back {remove} tokens of layer {self.index}, of which {waiting} are not stored yet. Call "
                "cache.activate_past_recording() before the tokens that may have to go come in"
            )
        self.seen -= remove
        if self.pending is not None:
            ready, self.pending = self.pending[: waiting - remove], None
            self._store(ready)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda tensor: tensor.repeat_interleave(repeats, 0))
        self.batch_size *= repeats

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda tensor: tensor[indices.to(tensor.device)])
        self.batch_size = next(self.tensors())[2].shape[0] if self.is_initialized else self.batch_size

    def offload(self) -> None:
        raise CacheMismatch("a compressed cache does not offload its layers; make it without offloading=True")

    # the step

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        handle: Handle,
        mask: Tensor | None,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """query [B, Hq, T, D] over everything stored and the step's own tokens; then the step's tokens are stored."""
        new = Pending(handle.keys, handle.values, self.visual, self._valid(mask, query))
        if self.seen == 0:
            out = exact(module, query, new.keys, new.values, mask, scale, softcap, sinks)
            new = self._select(new, query, scale)
        else:
            out, new = self._over_all(new, query, mask, scale, softcap, sinks)
        self._settle(new)
        return out

    def _over_all(
        self,
        new: Pending,
        query: Tensor,
        mask: Tensor | None,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> tuple[Tensor, Pending]:
        """The attention of a step that has a past; and the new tokens with what the selection says of them."""
        mask = None if mask is None else mask[..., -query.shape[2] :]
        step, valid = new, new.valid
        if self.pending is not None:
            step = self.pending + new
            mask = self._beside_pending(mask, query)
        rows = by_kv_head(query, self.num_heads)
        flat = rows.flatten(2, 3).float()
        partials = [store.attend(flat, scale, softcap) for store in self.stores.values()]
        partials.append(dense(rows, step.keys, step.values, scale, mask, softcap))
        merged = with_sinks(partials, sinks)
        if not self._evicts:
            return to_output(merged, query), self._select(new, query, scale)
        # scores: what these queries pay to each token, stored, waiting or new
        weight = torch.ones(query.shape[0], query.shape[2], device=query.device) if valid is None else valid.float()
        weight = (weight / rows.shape[2])[:, None, None].expand(-1, 1, rows.shape[2], -1).flatten(2)
        for store in self.stores.values():
            assert isinstance(store, EvictingStore), "a layer that evicts has one kind of store"
            store.observe(flat, scale, softcap, merged.lse, weight)
        score = dense_mass(rows, step.keys, scale, mask, softcap, merged.lse, weight)
        if self.pending is not None:
            waiting = len(self.pending)
            assert self.pending.score is not None, "every token of a layer that evicts has a score"
            self.pending = replace(self.pending, score=self.pending.score + score[..., :waiting])
            score = score[..., waiting:]
        return to_output(merged, query), replace(new, score=score)

    @property
    def _evicts(self) -> bool:
        return self.recipe.selection is not None and self.recipe.selection.while_decoding

    def _settle(self, new: Pending) -> None:
        self.seen += len(new)
        self.visual = None
        if not self.record_past:
            self._store(new)
            return
        waiting = new if self.pending is None else self.pending + new
        # nothing ends recording, so a plain generate on the same cache must still store what grows old
        old = len(waiting) - max(len(new), ROLLBACK)
        if old > 0:
            self._store(waiting[:old])
            waiting = waiting[old:]
        self.pending = waiting

    def _store(self, tokens: Pending) -> None:
        """Give each token its tier: visual tokens theirs, padding and what the selection drops none, the rest theirs."""
        if not len(tokens):
            return
        keep = tokens.keep
        if tokens.valid is not None:
            valid = self._by_head(tokens.valid)
            keep = valid if keep is None else keep & valid
        if self._evicts:
            self._put_and_evict(tokens, keep)
            return
        if tokens.visual is not None and self.recipe.visual is not None:
            for picture in _pictures(tokens.visual) if self.recipe.visual_by_picture else (tokens.visual,):
                shown = self._by_head(picture)
                self._put("visual", self.recipe.visual, tokens, shown if keep is None else shown & keep)
            rest = self._by_head(~tokens.visual)
            keep = rest if keep is None else rest & keep
        self._put("tokens", self.recipe.tier or EXACT, tokens, keep)

    def _put(self, name: str, tier: Tier, tokens: Pending, keep: Tensor | None) -> None:
        store = self.stores.get(name)
        if store is None:
            if keep is not None and not bool(keep.any()):
                return
            store = self.stores[name] = tier.open(self.index, tokens.keys, tokens.values)
        assert isinstance(store, CodedStore), "a layer that does not evict has coded stores"
        with self._naming_the_layer():
            store.put(tokens.keys, tokens.values, keep)

    def _put_and_evict(self, tokens: Pending, keep: Tensor | None) -> None:
        selection, store = self.recipe.selection, self.stores.get("tokens")
        assert selection is not None and tokens.score is not None, "a layer that evicts has a selection and scores"
        if store is None:
            tier = self.recipe.tier or EXACT
            store = EvictingStore(tier.open(self.index, tokens.keys, tokens.values))
            self.stores["tokens"], store.capacity = store, self.capacity
        assert isinstance(store, EvictingStore), "a layer that evicts has one kind of store"
        if keep is None:
            keep = torch.ones_like(tokens.score, dtype=torch.bool)
        valid = torch.ones_like(keep[:, 0]) if tokens.valid is None else tokens.valid
        with self._naming_the_layer():
            store.put(tokens.keys, tokens.values, valid, keep, tokens.score)
        store.evict(selection.rank)

    @contextmanager
    def _naming_the_layer(self) -> Iterator[None]:
        try:
            yield
        except NotFinite as error:
            raise NotFinite(f"layer {self.index}: {error}") from None

    def _select(self, new: Pending, query: Tensor, scale: float) -> Pending:
        """The new tokens with what the selection says of them. Tokens that come one at a time stay."""
        selection = self.recipe.selection
        if selection is None or (len(new) == 1 and not self._evicts):
            return new
        valid = new.valid
        if valid is None:
            valid = torch.ones(query.shape[0], len(new), dtype=torch.bool, device=query.device)
        step = Step(self.index, self.layers, query, new.keys, new.values, scale, valid)
        keep = selection.assign(step) != DROP
        if not self._evicts:
            return replace(new, keep=keep)
        self.capacity = selection.capacity(step)
        return replace(new, keep=keep, score=selection.score(step))

    def _by_head(self, flag: Tensor) -> Tensor:
        return flag[:, None].expand(-1, self.num_heads, -1)

    def _valid(self, mask: Tensor | None, query: Tensor) -> Tensor | None:
        """[B, T], False for padding: a token that may not attend to itself. None = all are tokens."""
        if mask is None:
            return None
        steps = query.shape[2]
        allowed = mask if mask.dtype is torch.bool else mask > torch.finfo(mask.dtype).min / 2
        if mask.shape[-1] > steps and self.seen and not bool(allowed[..., :-steps].all()):
            raise CacheMismatch(
                f"a mask of {mask.shape[-1]} columns hides tokens that layer {self.index} has stored. Stored tokens are "
                "always attended: hide them when they first come (attention_mask), or use the exact cache"
            )
        valid = allowed[..., -steps:].diagonal(dim1=-2, dim2=-1)[:, 0].expand(query.shape[0], -1)
        return None if bool(valid.all()) else valid

    def _beside_pending(self, mask: Tensor | None, query: Tensor) -> Tensor | None:
        """The step's mask with columns for the waiting tokens in front."""
        assert self.pending is not None, "only called while tokens wait"
        if mask is None and self.pending.valid is None:
            return None
        batch, _, steps, _ = query.shape
        if mask is None:
            mask = torch.ones(steps, steps, dtype=torch.bool, device=query.device).tril()[None, None]
        elif mask.dtype is not torch.bool:
            mask = mask > torch.finfo(mask.dtype).min / 2
        past = torch.ones(batch, len(self.pending), dtype=torch.bool, device=query.device)
        past = past if self.pending.valid is None else self.pending.valid
        return torch.cat([past[:, None, None].expand(-1, -1, steps, -1), mask.expand(batch, -1, -1, -1)], -1)

    def _map(self, change: Change) -> None:
        for store in self.stores.values():
            store.map(change)
        if self.pending is not None:
            self.pending = self.pending.map(change)

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """(name, kind, tensor) of everything held."""
        for name, store in self.stores.items():
            for part, kind, tensor in store.tensors():
                yield f"{name}.{part}", kind, tensor
        if self.pending is not None:
            for name in ("keys", "values", "visual", "valid", "keep", "score"):
                tensor = getattr(self.pending, name)
                if tensor is not None:
                    yield f"pending.{name}", "exact" if name in ("keys", "values") else "metadata", tensor


class Cache(TransformersCache):  # type: ignore[misc]
    """A KV cache for `model` that keeps its tokens as `recipe` says. Pass it as `past_key_values`.

        cache = kvmosaic.Cache(model, kvmosaic.methods.kivi(bits=2))
        model.generate(**inputs, past_key_values=cache)
        print(cache.report())

    Works in every mode of generate, over several turns, copied with `copy.deepcopy` for a shared prefix. Layers that
    do not attend to the whole context (sliding windows, linear attention) keep transformers' own cache. Making a cache
    sets the model's attention to kvmosaic's, which serves other caches as SDPA does.
    Raises UnsupportedModel, with the reason, for a model that it cannot serve.
    """

    def __init__(self, model: PreTrainedModel, recipe: Recipe) -> None:
        from kvmosaic.hooks.attach import prepare  # attach makes caches, and a cache attaches

        self.recipe = recipe
        self.fingerprint = models.fingerprint(model.config)
        if recipe.fingerprint not in (None, self.fingerprint):
            raise BadCalibration(
                f"the recipe was calibrated for {recipe.fingerprint}, and this model is {self.fingerprint}"
            )
        if not recipe.is_exact:
            models.check(model.config)
            if recipe.visual is not None and not models.visual_ids(model.config):
                raise UnsupportedModel(
                    f"{recipe.name or 'the recipe'} sets how visual tokens are kept, and {type(model).__name__} takes no "
                    "pictures. For text use another method, e.g. kivi"
                )
            prepare(model)
        types = models.layer_types(model.config)
        if recipe.selection is not None and recipe.selection.while_decoding:
            _check_eviction(recipe, len(types))
        layers = []
        for index, (kind, arguments) in enumerate(types):
            if kind == "full_attention" and not recipe.is_exact:
                layers.append(CacheLayer(index, len(types), recipe))
            else:
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**arguments))
        super().__init__(layers=layers)
        self._context = getattr(models.text_config(model.config), "max_position_embeddings", None)
        self._thread: int | None = None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx >= len(self.layers):
            raise CacheMismatch(
                f"this cache has {len(self.layers)} layers ({self.fingerprint}), and layer {layer_idx} came"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def begin(self, fingerprint: str, visual: Tensor | None, tokens: int) -> None:
        """A forward pass over `tokens` new tokens starts; called by the hook on the model (`hooks/attach.py`).

        visual [B, T] bool: which of them are visual; None = none.
        """
        if fingerprint != self.fingerprint:
            raise CacheMismatch(f"this cache was made for {self.fingerprint}, and is used with {fingerprint}")
        seen = self.get_seq_length()
        if self._context is not None and seen + tokens > self._context:
            raise ValueError(
                f"{seen + tokens} tokens are more than the model's context of {self._context}. Shorten the prompt, or load "
                "the model with a larger max_position_embeddings (and a rotary scaling that suits it)"
            )
        thread = threading.get_ident()
        if seen and tokens == 1 and self._thread not in (None, thread):
            raise CacheInUse(
                "two threads generate with one cache at the same time, so its tokens are mixed up. Give each its own "
                "(copy.deepcopy keeps a shared prefix), and reset this one"
            )
        self._thread = thread
        for layer in self.layers:
            if isinstance(layer, CacheLayer):
                layer.visual = visual

    def reset(self) -> None:
        super().reset()
        self._thread = None

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """(name, kind, tensor) of everything that the cache holds."""
        for index, layer in enumerate(self.layers):
            if isinstance(layer, CacheLayer):
                yield from ((f"layer {index}.{name}", kind, tensor) for name, kind, tensor in layer.tensors())
            else:
                for name, value in vars(layer).items():
                    if isinstance(value, Tensor):
                        yield f"layer {index}.{name}", "exact", value

    def nbytes(self) -> int:
        """Bytes resident for this cache: codes, scales, exact tokens, metadata, and the slack of grown buffers."""
        return self.report().total

    def report(self) -> Report:
        return Report.of(self)


def _check_eviction(recipe: Recipe, layers: int) -> None:
    name = recipe.name or "the recipe"
    if recipe.visual is not None:
        raise RecipeConflict(f"{name}: tokens are evicted while decoding, from one tier. Leave `visual` unset")
    lanes = [lane for layer in range(layers) for lane in (recipe.tier or EXACT).lanes(layer)]
    if not all(lane.one_by_one for lane in lanes):
        raise RecipeConflict(
            f"{name}: tokens are evicted one by one while decoding, and this tier shares ranges between tokens or holds some "
            "back. Evict at the prompt only (h2o_prefill, snapkv), or keep tokens with ranges of their own (turboquant)"
        )


def _pictures(visual: Tensor) -> Iterator[Tensor]:
    """The unbroken runs of visual tokens: [B, T] masks, the i-th with the i-th run of every row."""
    start = visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]
    number = start.cumsum(1)
    for run in range(1, int(number.max()) + 1):
        yield visual & (number == run)
