"""One layer's cache: what a step's tokens go through from their attention to their store."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from kvmosaic.errors import CacheMismatch, CannotRollBack, NotFinite, UnsupportedModel
from kvmosaic.hooks.attention import Handle, by_kv_head, exact, to_output, with_sinks
from kvmosaic.hooks.pending import Pending
from kvmosaic.hooks.pinned import Pinned
from kvmosaic.hooks.rotary import Rotary
from kvmosaic.kernels.attention import Partial, dense, dense_mass, dense_peaks
from kvmosaic.projection import Basis
from kvmosaic.recipe import Recipe
from kvmosaic.selection import DROP, WAIT, Evicting, Gathering, Step
from kvmosaic.stores import CodedStore, EvictingStore, RaggedStore, Store, Tier

QUERIES = 64
"""While a prompt is pruned as it comes, so many of the newest tokens that are left go on to score others with the next piece."""

ROLLBACK = 128
"""While past is recorded (assisted decoding), this many of the newest tokens at least can be taken back."""


class CacheLayer(CacheLayerMixin):  # type: ignore[misc]
    """One full-attention layer. A step's tokens are attended exactly, then stored; what is stored is never dense again."""

    is_croppable = True
    is_sliding = False

    def __init__(
        self,
        index: int,
        layers: int,
        recipe: Recipe,
        rotary: Rotary | None = None,
        frequencies: tuple[float, ...] | None = None,
        whole_prompt: bool = False,
        pruned: bool = False,
    ) -> None:
        super().__init__()
        self.index, self.layers, self.recipe, self.rotary = index, layers, recipe, rotary
        self.frequencies = frequencies  # of the model's rotary embedding, radians a place
        self.whole_prompt = self.reading = whole_prompt  # reading: tokens wait until `settle` ends the first prompt
        self.pruned = pruned  # and what waits is brought back to the budget after each piece; its rows are single heads
        self.replayed: Tensor | None = None  # [B, T], the tokens of the prompt that are being fed again, to be scored
        self.scale = 0.0
        self.seen = 0
        self.padding: Tensor | None = None  # [B], how many of the tokens seen were padding; None = none
        self.stores: dict[str, Store] = {}
        self.pending: Pending | None = None
        self.basis: Basis | None = None  # what is stored of keys, if the recipe has a projection
        self.record_past = False
        self.capacity: Tensor | None = None  # [B], tokens that a row may keep, if the selection goes on while decoding
        self.visual: Tensor | None = None  # of the step that is under way, [B, T]
        self.pinned: Pinned | None = None  # set while steps are kernels only
        self.position: Tensor | None = None  # of the step that is under way, [B or 1, T, ids]; only with `rotary`

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
        self.seen, self.stores, self.pending, self.basis, self.is_initialized = 0, {}, None, None, False
        self.record_past, self.capacity, self.pinned = False, None, None
        self.padding, self.reading = None, self.whole_prompt

    def activate_past_recording(self) -> None:
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest -tokens_to_remove tokens (a number at most 0), then store what was waiting."""
        remove = -int(tokens_to_remove)  # transformers 5.17 counts in a tensor
        waiting = 0 if self.pending is None or (self.reading and self.pruned) else len(self.pending)
        if remove < 0 or remove > waiting:
            raise CannotRollBack(
                f"asked to take back {remove} tokens of layer {self.index}, of which {waiting} are not stored yet. Call "
                "cache.activate_past_recording() before the tokens that may have to go come in"
            )
        self.seen -= remove
        if self.pending is not None:
            left, self.pending = self.pending[: waiting - remove], None
            if self.reading:
                self.pending = left
            else:
                self._advance(left, hold=0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda tensor: tensor.repeat_interleave(repeats, 0))
        self.batch_size *= repeats

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda tensor: tensor[indices.to(tensor.device)])
        if self.is_initialized:
            self.batch_size = torch.arange(self.batch_size)[indices.cpu()].numel()

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
        if self.pinned is not None:
            return self.pinned.attend(query, handle.keys, handle.values, scale, softcap, sinks)
        new = Pending(
            handle.keys,
            handle.values,
            visual=self.visual,
            valid=self._valid(mask, query),
            position=self._position(query),
        )
        if self.reading:
            return self._read(module, new, query, mask, scale, softcap, sinks)
        if self.seen == 0:
            new = self._assigned(new, query, scale)
            self._project(new, query, scale)
            if self.recipe.prefill is not None and new.tier is not None:
                if softcap is not None or sinks is not None:
                    raise UnsupportedModel("a sparse prompt knows no caps on logits and no sinks; drop `prefill`")
                out = self.recipe.prefill.attend(self._step(new, query, scale), new.tier)
            else:
                out = exact(module, query, new.keys, new.values, mask, scale, softcap, sinks)
        else:
            merged, new = self._over_all(new, query, mask, scale, softcap, sinks)
            out = to_output(merged, query)
        self._settle(new)
        return out

    def _read(
        self,
        module: nn.Module,
        new: Pending,
        query: Tensor,
        mask: Tensor | None,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """A piece of a prompt that is settled as a whole: attended exactly, beside the pieces before; or, while tokens are
        replayed, what their repetition pays to each of them."""
        self.scale = scale
        if self.pruned:
            return self._read_and_prune(module, new, query, mask, scale, softcap, sinks)
        if self.pending is None:
            out = exact(module, query, new.keys, new.values, mask, scale, softcap, sinks)
        else:
            both, rows = self.pending + new, by_kv_head(query, self.num_heads)
            mask = self._beside(self.pending, None if mask is None else mask[..., -query.shape[2] :], query)
            merged = with_sinks([dense(rows, both.keys, both.values, scale, mask, softcap)], sinks)
            out = to_output(merged, query)
            if self.replayed is not None:
                asking = torch.ones_like(both.keys[:, 0, len(self.pending) :, 0], dtype=torch.bool)
                peaks = dense_peaks(
                    rows, both.keys, scale, mask, softcap, merged.lse, asking if new.valid is None else new.valid
                )
                self._raise(peaks)
                self.visual = None
                return out
        selects = self.recipe.selection is not None and self.recipe.selection.replay is None
        new = replace(new, query=query if selects or self.recipe.projection is not None else None)
        self.pending, self.visual = new if self.pending is None else self.pending + new, None
        self._count(new)
        return out

    def _read_and_prune(
        self,
        module: nn.Module,
        new: Pending,
        query: Tensor,
        mask: Tensor | None,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """`_read` of a piece after which the prompt so far is selected from. Each head goes on with its own tokens, as a row."""
        batch, heads = len(query), self.num_heads
        at = self._step(new, query, scale)
        columns = {"visual": at.visual, "valid": at.valid, "place": at.place}
        piece = Pending(new.keys, new.values, query=query, **{name: self._by_head(x) for name, x in columns.items()})
        piece = piece.heads_as_rows(heads)
        both = piece if self.pending is None else self.pending.heads_as_rows(heads) + piece
        assert both.query is not None and both.valid is not None and both.place is not None, "just set"
        if self.pending is None:
            out = exact(module, query, new.keys, new.values, mask, scale, softcap, sinks)
        else:
            rows, earlier = both.query[:, None, :, -len(new) :], both[: -len(new)]
            if mask is not None:
                mask = mask[..., -len(new) :].expand(batch, -1, -1, -1).repeat_interleave(heads, 0)
            part = dense(rows, both.keys, both.values, scale, self._beside(earlier, mask, rows[:, 0]), softcap)
            merged = with_sinks([Partial(*(x.view(batch, heads, *x.shape[2:]) for x in part))], sinks)
            out = to_output(merged, query)
        self.visual = None
        self._count(new)
        first = len(both) - both.query.shape[2]  # whose query is known
        step = at._replace(
            **{name: getattr(both, name) for name in ("keys", "values", "place", "visual")},
            query=torch.nn.functional.pad(both.query, (0, 0, first, 0)),
            known=(torch.arange(len(both), device=query.device) >= first).expand_as(both.place),
            whole=at.place.amax(1).add(1).repeat_interleave(heads, 0),
        )
        selection = self.recipe.selection
        assert selection is not None and selection.prunes, "asked before"
        tier = selection.assign(step)
        keep = (tier[:, 0] != DROP) & both.valid
        # in their order, on the right: rows that keep fewer are padded on the left, as prompts are
        stay = keep.to(torch.uint8).argsort(dim=1, stable=True)[:, -int(keep.sum(1).max()) :]
        kept = replace(both, valid=keep, place=both.place.masked_fill(~keep, -1), query=None).gather(stay)
        # a query is as large as a key times the heads that share it: only the newest are kept, for windows that reach back
        asks = stay[:, len(kept) - min(QUERIES, int((stay >= first).sum(1).min())) :] - first
        query = both.query.gather(2, asks[:, None, :, None].expand(-1, both.query.shape[1], -1, both.query.shape[3]))
        self.pending = replace(kept, query=query).rows_as_heads(batch)
        return out

    def _raise(self, peaks: Tensor) -> None:
        """Take the scores of the tokens that are replayed, where they are higher; the others keep theirs."""
        assert self.pending is not None and self.replayed is not None, "only what waits is replayed"
        score = peaks[..., : len(self.pending)] * self.replayed[:, None]
        if self.pending.score is not None:
            score = score.maximum(self.pending.score)
        self.pending = replace(self.pending, score=score)

    def replay_scores(self) -> tuple[Step, Tensor]:
        """The first prompt, which waits, and the scores [B, H, T] that its repetition gave. The step's query is not known."""
        assert self.pending is not None and self.pending.score is not None, "a prompt is replayed before it is settled"
        return self._step(self.pending, self.pending.keys, self.scale, before=0), self.pending.score

    def settle(self, tier: Tensor | None = None) -> None:
        """The first prompt is complete: select from it and store it, as if it had come in one piece.

        tier [B, H, T] int8: what was said of all layers together; None = the layer's selection says it now.
        """
        if not self.reading or self.pending is None:
            return
        held, self.pending, self.reading = self.pending, None, False
        query, waiting = held.query, replace(held, query=None)
        if self.pruned:  # the heads of a row keep as many
            assert waiting.valid is not None and query is not None, "what waits to be pruned has all columns"
            query = torch.nn.functional.pad(query, (0, 0, len(waiting) - query.shape[2], 0))
            waiting = replace(waiting, valid=waiting.valid[:, 0], visual=None, place=None)
        elif tier is not None:
            waiting = replace(waiting, tier=tier, score=None)
        elif query is not None:
            waiting = self._assigned(waiting, query, self.scale, before=0)
        if query is not None:
            self._project(waiting, query, self.scale, before=0)
        try:
            self.store(waiting)
        except NotFinite:  # the prompt goes on waiting
            self.pending, self.reading = held, True
            raise

    def _over_all(
        self,
        new: Pending,
        query: Tensor,
        mask: Tensor | None,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> tuple[Partial, Pending]:
        """The attention of a step that has a past; and the new tokens with what the selection says of them."""
        mask = None if mask is None else mask[..., -query.shape[2] :]
        step = new
        if self.pending is not None:
            step = self.pending + new
            mask = self._beside(self.pending, mask, query)
        rows = by_kv_head(query, self.num_heads)
        flat = rows.flatten(2, 3).float()
        stores = list(self.stores.values())
        if stores and len(step) == 1 and mask is None:  # a decode step: the new token in the same pass as a store
            partials = [stores[0].attend(flat, scale, softcap, fresh=(step.keys, step.values))]
            partials += [store.attend(flat, scale, softcap) for store in stores[1:]]
        else:
            partials = [store.attend(flat, scale, softcap) for store in stores]
            partials.append(dense(rows, step.keys, step.values, scale, mask, softcap))
        merged = with_sinks(partials, sinks)
        selection = self.recipe.selection
        waits = isinstance(selection, Gathering) and len(new) < selection.gather
        if not waits and not isinstance(selection, Evicting):
            return merged, self._assigned(new, query, scale)
        never = None
        if isinstance(selection, Evicting) and len(new) > 1:
            never = selection.protected(self._step(new, query, scale))
            self._check_room(never)
        # scores: what the queries that count pay to each token, stored, waiting or new
        asked = torch.ones(query.shape[0], len(new), dtype=torch.bool, device=query.device)
        if waits:
            asked = asked & torch.tensor(self._asks(len(new)), device=query.device)
        if new.valid is not None:
            asked = asked & new.valid
        weight = (asked / rows.shape[2])[:, None, None].expand(-1, 1, rows.shape[2], -1).flatten(2)
        for store in self.stores.values():
            if isinstance(store, EvictingStore):
                store.observe(flat, scale, softcap, merged.lse, weight)
        score = dense_mass(rows, step.keys, scale, mask, softcap, merged.lse, weight)
        if self.pending is not None:
            earlier = score[..., : len(self.pending)]
            self.pending = replace(
                self.pending, score=earlier if self.pending.score is None else earlier + self.pending.score
            )
        score = score[..., -len(new) :]
        if never is not None:
            score = score.masked_fill(never[:, None], torch.inf)
        tier = torch.full_like(score, WAIT, dtype=torch.int8) if waits else None
        return merged, replace(new, tier=tier, score=score, asked=asked)

    def _check_room(self, new: Tensor) -> None:
        """Raises ValueError if tokens that never leave, held or `new` [B, T] bool, are more than a row may keep."""
        store, never = self.stores.get("tier 0"), new.sum(-1, keepdim=True)
        capacity = store.capacity if isinstance(store, EvictingStore) else self.capacity
        assert capacity is not None, "the first prompt sets the capacity"
        for held in (store, self.pending):
            if isinstance(held, EvictingStore | Pending) and held.score is not None:
                never = never + held.score.isinf().sum(-1)
        if bool((never > capacity[:, None]).any()):
            raise ValueError(
                f"with this turn {int(never.max())} tokens are protected, and a row may keep {int(capacity.min())}. Raise the budget "
                "or protect fewer"
            )

    def _asks(self, new: int) -> list[bool]:
        assert isinstance(self.recipe.selection, Gathering), "only asked of tokens that wait"
        waiting = 0 if self.pending is None else len(self.pending)
        return [self.recipe.selection.asks(self.seen + token, waiting + token) for token in range(new)]

    def _assigned(self, new: Pending, query: Tensor, scale: float, before: int | None = None) -> Pending:
        """The new tokens with their tiers, and their scores where they go on counting."""
        selection = self.recipe.selection
        if selection is None or (len(new) == 1 and self.seen):
            return new
        step = self._step(new, query, scale, before)
        if not isinstance(selection, Evicting):
            return replace(new, tier=selection.assign(step))
        self.capacity, score = selection.capacity(step), selection.score(step)
        return replace(new, tier=selection.assign_scored(step, score), score=score)

    def _project(self, prompt: Pending, query: Tensor, scale: float, before: int | None = None) -> None:
        """Choose what is stored of keys, from the first prompt's tokens and their tiers."""
        if self.recipe.projection is None:
            return
        at = self._step(prompt, query, scale, before)
        keep = at.valid[:, None] if prompt.tier is None else at.valid[:, None] & (prompt.tier != DROP)
        self.basis = self.recipe.projection.basis(at, keep)

    def _step(self, new: Pending, query: Tensor, scale: float, before: int | None = None) -> Step:
        """before: how many tokens came before the new ones; None = all that have been seen."""
        valid = new.valid
        if valid is None:
            valid = torch.ones(query.shape[0], len(new), dtype=torch.bool, device=query.device)
        earlier: int | Tensor = self.seen if before is None else before
        if before is None and self.padding is not None:
            earlier = (self.seen - self.padding)[:, None]
        place = torch.where(valid, earlier + valid.cumsum(1) - 1, -1)
        visual = torch.zeros_like(valid) if new.visual is None else new.visual
        turns = None if self.frequencies is None else torch.tensor(self.frequencies, device=query.device)
        return Step(self.index, self.layers, query, new.keys, new.values, scale, place, visual, turns)

    def _settle(self, new: Pending) -> None:
        before, self.visual, self.position = self.pending, None, None
        waiting, self.pending = new if before is None else before + new, None
        try:
            # nothing ends recording, so a plain generate on the same cache must still store what grows old
            self._advance(waiting, hold=max(len(new), ROLLBACK) if self.record_past else 0)
        except NotFinite:  # the step is refused: the layer is as it was
            self.pending = before
            raise
        self._count(new)

    def _count(self, new: Pending) -> None:
        self.seen += len(new)
        if new.valid is not None:
            padding = (~new.valid).sum(1)
            self.padding = padding if self.padding is None else self.padding + padding

    def _advance(self, waiting: Pending, hold: int) -> None:
        """Store what is ready of the tokens that wait, all but the newest `hold` at most; the rest goes on waiting."""
        ready = max(0, len(waiting) - hold)
        selection = self.recipe.selection
        if isinstance(selection, Gathering) and waiting.tier is not None:
            chosen = (waiting.tier[0, 0] != WAIT).nonzero()[:, 0]  # rows and heads wait alike
            before = int(chosen[-1]) + 1 if len(chosen) else 0  # what waits before a prompt is chosen together with it
            ready = min(ready, max(before, len(waiting) // selection.gather * selection.gather))
        if ready:
            self.store(waiting if ready == len(waiting) else waiting[:ready])
        self.pending = waiting[ready:] if ready < len(waiting) else None

    def store(self, tokens: Pending) -> None:
        """Put each token into its tier's store: visual tokens into theirs; padding and dropped tokens into none."""
        tier, selection = tokens.tier, self.recipe.selection
        if isinstance(selection, Gathering) and tier is not None:
            waits = tier[0, 0] == WAIT
            if bool(waits.any()):
                assert tokens.score is not None and tokens.asked is not None, "tokens that wait are scored"
                tier = tier.clone()
                tier[..., waits] = selection.assign_waiting(tokens.score[..., waits], tokens.asked[:, waits])
        rest = None if tokens.valid is None else self._by_head(tokens.valid)
        if self.recipe.first:
            rest = self._put_first(tokens, self.recipe.first, rest)
        if isinstance(selection, Evicting):
            self._put_and_evict(selection, tokens, _both(rest, None if tier is None else tier != DROP))
            return
        if tokens.visual is not None and self.recipe.visual is not None:
            keep = _both(rest, None if tier is None else tier != DROP)
            for picture in _pictures(tokens.visual) if self.recipe.visual_by_picture else (tokens.visual,):
                self._put("visual", self.recipe.visual, tokens, _both(self._by_head(picture), keep))
            rest = _both(rest, self._by_head(~tokens.visual))
        for index, settings in enumerate(self.recipe.stored_in):
            mine = None if tier is None else tier == index
            if tier is not None or index == 0:
                self._put(f"tier {index}", settings, tokens, _both(rest, mine))

    def _put_first(self, tokens: Pending, first: int, valid: Tensor | None) -> Tensor | None:
        """Put those of a sequence's `first` tokens that are among these into their own store. Returns which are not."""
        store = self.stores.get("first")
        held = tokens.keys.new_zeros(tokens.keys.shape[:2], dtype=torch.int64) if store is None else store.length
        if bool((held >= first).all()):
            return valid
        come = torch.ones(tokens.keys.shape[:3], dtype=torch.int64, device=held.device) if valid is None else valid
        early = held[..., None] + come.cumsum(2) <= first
        self._put("first", self.recipe.first_in, tokens, _both(valid, early))
        return _both(valid, ~early)

    def _put(self, name: str, tier: Tier, tokens: Pending, keep: Tensor | None) -> None:
        if keep is not None and not bool(keep.any()):
            return
        store = self.stores.get(name)
        if store is None:
            store = tier.open(self.index, tokens.keys, tokens.values, self.basis, self.rotary)
            if self.recipe.selection is not None and self.recipe.selection.uneven:
                store = RaggedStore(store)
        assert isinstance(store, CodedStore | RaggedStore), "a layer that does not evict has coded stores"
        with self._naming_the_layer():
            store.put(tokens.keys, tokens.values, keep, None if tokens.position is None else tokens.position.mT)
        self.stores[name] = store  # after what may be refused: a first prompt that is tried again chooses a basis anew

    def _put_and_evict(self, selection: Evicting, tokens: Pending, keep: Tensor | None) -> None:
        assert tokens.score is not None, "a token of a layer that evicts has a score"
        store = self.stores.get("tier 0")
        if store is None:
            tier = self.recipe.stored_in[0]
            store = EvictingStore(tier.open(self.index, tokens.keys, tokens.values, self.basis, self.rotary))
            store.capacity = self.capacity
        assert isinstance(store, EvictingStore), "a layer that evicts has one kind of store"
        if keep is None:
            keep = torch.ones_like(tokens.score, dtype=torch.bool)
        valid = torch.ones_like(keep[:, 0]) if tokens.valid is None else tokens.valid
        with self._naming_the_layer():
            position = None if tokens.position is None else tokens.position.mT
            store.put(tokens.keys, tokens.values, valid, keep, tokens.score, position)
        self.stores["tier 0"] = store
        store.evict(selection.order.rank)

    def verify(self, fine: bool) -> None:
        """As `CodedStore.verify`, for all stores."""
        with self._naming_the_layer():
            for store in self.stores.values():
                store.verify(fine)

    @contextmanager
    def _naming_the_layer(self) -> Iterator[None]:
        try:
            yield
        except NotFinite as error:
            raise NotFinite(f"layer {self.index}: {error}") from None

    def _by_head(self, flag: Tensor) -> Tensor:
        return flag[:, None].expand(-1, self.num_heads, -1)

    def _position(self, query: Tensor) -> Tensor | None:
        """[B, ids, T]: of the step's tokens, if any lane asks."""
        if self.rotary is None:
            return None
        if self.position is None:
            raise CacheMismatch(
                "the text model was called by itself, and pre-RoPE keys need the positions that the whole model is told. Call that"
            )
        return self.position.mT.expand(query.shape[0], -1, -1)

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

    @staticmethod
    def _beside(waiting: Pending, mask: Tensor | None, query: Tensor) -> Tensor | None:
        """The step's mask with columns for the waiting tokens in front."""
        if mask is None and waiting.valid is None:
            return None
        batch, _, steps, _ = query.shape
        if mask is None:
            mask = torch.ones(steps, steps, dtype=torch.bool, device=query.device).tril()[None, None]
        elif mask.dtype is not torch.bool:
            mask = mask > torch.finfo(mask.dtype).min / 2
        past = torch.ones(batch, len(waiting), dtype=torch.bool, device=query.device)
        past = past if waiting.valid is None else waiting.valid
        return torch.cat([past[:, None, None].expand(-1, -1, steps, -1), mask.expand(batch, -1, -1, -1)], -1)

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        for store in self.stores.values():
            store.map(change)
        if self.pending is not None:
            self.pending = self.pending.map(change)
        if self.basis is not None:
            self.basis = self.basis.map(change)
        if self.padding is not None:
            self.padding = change(self.padding)

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """(name, kind, tensor) of everything held."""
        for name, store in self.stores.items():
            for part, kind, tensor in store.tensors():
                yield f"{name}.{part}", kind, tensor
        if self.basis is not None:
            yield from ((name, "metadata", tensor) for name, tensor in self.basis.tensors())
        if self.padding is not None:
            yield "padding", "metadata", self.padding
        if self.pinned is not None:
            yield from self.pinned.tensors()
        if self.pending is not None:
            for name in ("keys", "values", "query", "visual", "valid", "tier", "score", "asked", "position", "place"):
                tensor = getattr(self.pending, name)
                if tensor is not None:
                    yield f"pending.{name}", "exact" if name in ("keys", "values", "query") else "metadata", tensor


def _both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The tokens in both masks; None = all."""
    if one is None or other is None:
        return other if one is None else one
    return one & other


def _pictures(visual: Tensor) -> Iterator[Tensor]:
    """The unbroken runs of visual tokens: [B, T] masks, the i-th with the i-th run of every row."""
    start = visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]
    number = start.cumsum(1)
    for run in range(1, int(number.max()) + 1):
        yield visual & (number == run)
