"""The cache object that generate carries: one layer per layer of the model."""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache as TransformersCache
from transformers import PreTrainedModel
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING

from kvmosaic.errors import BadCalibration, CacheInUse, CacheMismatch, RecipeConflict, UnsupportedModel
from kvmosaic.hooks import models, pinned
from kvmosaic.hooks.layer import CacheLayer
from kvmosaic.hooks.replay import replay
from kvmosaic.hooks.rotary import Rotary
from kvmosaic.recipe import Recipe
from kvmosaic.report import Report
from kvmosaic.selection import Evicting, Gathering
from kvmosaic.stores import Lane


class Cache(TransformersCache):  # type: ignore[misc]
    """A KV cache for `model` that keeps its tokens as `recipe` says. Pass it as `past_key_values`.

        cache = kvmosaic.Cache(model, kvmosaic.methods.kivi(bits=2))
        model.generate(**inputs, past_key_values=cache)
        print(cache.report())

    Works in every mode of generate, over several turns, copied with `copy.deepcopy` for a shared prefix. Layers that
    do not attend to the whole context (sliding windows, linear attention) keep transformers' own cache. Making a cache
    sets the model's attention to kvmosaic's, which serves other caches as SDPA does.
    whole_prompt: the first prompt may come in several forward passes and is selected from and stored as a whole, when the
        first single token comes or `settle` is called; until then its tokens wait, exact, with their queries. Otherwise each
        forward pass of several tokens is a prompt of its own, so that long prompts in chunks never lie in memory whole.
    pruned_prompt: the first prompt may come in several forward passes, and its budget is one for all: after each pass what is left
        of those before and the new tokens are selected from together, so that no more of them wait, exact, than the budget and
        a pass. It ends as with `whole_prompt`. For selections that keep tokens in one tier and as many in each head; those that
        evict while decoding (h2o, streaming_llm) hold a budget in tokens= without it.
    Raises UnsupportedModel, with the reason, for a model that it cannot serve.
    """

    def __init__(
        self, model: PreTrainedModel, recipe: Recipe, *, whole_prompt: bool = False, pruned_prompt: bool = False
    ) -> None:
        from kvmosaic.hooks.attach import prepare  # attach makes caches, and a cache attaches

        self.recipe = recipe
        self.fingerprint = models.fingerprint(model.config)
        if recipe.fingerprint not in (None, self.fingerprint):
            raise BadCalibration(
                f"the recipe was calibrated for {recipe.fingerprint}, and this model is {self.fingerprint}"
            )
        if not recipe.is_exact:
            models.check(model.config)
            if recipe.sees_visual and not models.visual_ids(model.config):
                raise UnsupportedModel(
                    f"{recipe.name or 'the recipe'} sets how visual tokens are kept, and {type(model).__name__} takes no "
                    "pictures. For text use another method, e.g. kivi, and protect a count of first tokens"
                )
            prepare(model)
        self._types = models.layer_types(model.config)
        full = [index for index, (kind, _) in enumerate(self._types) if kind == "full_attention"]
        _check_selection(recipe, full, len(self._types), models.head_size(model.config))
        self._rotary = Rotary(model) if _lanes(recipe, full, lambda lane: lane.pre_rope) else None
        if recipe.projection is not None and _lanes(recipe, full, _by_channel):
            raise RecipeConflict(
                f"{recipe.name or 'the recipe'}: only a part of the rotated key channels is to be stored, and these tiers learned what "
                "they know of all channels, or code them unrotated. Leave one of the two out"
            )
        self._in_pieces, self._pruned = whole_prompt or pruned_prompt, pruned_prompt
        if pruned_prompt:
            _check_pruning(recipe, full, whole_prompt)
        self._replay = None if recipe.selection is None else recipe.selection.replay
        self._whole = self._in_pieces or self._replay is not None
        if self._whole and recipe.prefill is not None:
            raise RecipeConflict(
                f"{recipe.name or 'the recipe'} changes how a prompt's attention is computed, so its pieces cannot wait for the "
                "whole. Leave whole_prompt out, or drop `prefill` (zipvl sparse=false)"
            )
        self._model = weakref.ref(model)  # which replays a prompt to score its tokens
        self._replaying = self._recording = False
        self._prompt: list[Tensor] = []  # the ids of the first prompt, until it is settled; only for that
        self._shape = _shape(model) if recipe.selection is not None and recipe.selection.sized else None
        self._frequencies = {
            kind: models.frequencies(model, kind) for kind, _ in self._types if recipe.selection is not None
        }
        super().__init__(layers=self._empty_layers())
        self._context = models.context(model.config)
        self.head_size = models.head_size(model.config)
        self.pinned = False  # steps are kernels only (`decoding/captured.py`)
        self._waiting = 0  # tokens that wait to be chosen among when the steps that were queued are done; while pinned
        self._refused = False  # a GPU has told too late that something cannot be encoded
        self._running: dict[str, int] = {}  # during a forward pass: its thread, and how many hooked modules it is in

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx >= len(self.layers):
            raise CacheMismatch(
                f"this cache has {len(self.layers)} layers ({self.fingerprint}), and layer {layer_idx} came"
            )
        if (self.recipe.sees_visual or self._shape is not None) and not self._running and not self.pinned:
            raise CacheMismatch(
                "the text model was called by itself, and only the whole model is told which tokens are visual and how much "
                "memory they may take. Call that, with input_ids"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def begin(
        self, fingerprint: str, batch: int, tokens: int, ids: Tensor | None = None, visual: Tensor | None = None
    ) -> None:
        """A forward pass over `tokens` new tokens of `batch` rows starts; called by the hook on the model (`hooks/attach.py`).

        ids [B, T]: of the tokens; None = they came as embeddings. visual [B, T] bool: which of them are visual; None = none.
        `end` follows, whatever is raised.
        """
        thread = threading.get_ident()
        if self._running.setdefault("thread", thread) != thread:
            raise CacheInUse(
                "another thread generates with this cache at this moment, and their tokens would be mixed up. Give each "
                "thread its own (copy.deepcopy keeps a shared prefix)"
            )
        self._running["depth"] = self._running.get("depth", 0) + 1
        if fingerprint != self.fingerprint:
            raise CacheMismatch(f"this cache was made for {self.fingerprint}, and is used with {fingerprint}")
        if self._refused:
            raise CacheMismatch(
                "an earlier forward pass held numbers that cannot be encoded. Call cache.reset() and start again"
            )
        counts = {layer.seen: layer.index for layer in self.layers if isinstance(layer, CacheLayer)}
        if len(counts) > 1:
            told = " and ".join(f"layer {index} {seen}" for seen, index in counts.items())
            raise CacheMismatch(
                f"an earlier forward pass with this cache ended halfway: {told} tokens have been seen. Call cache.reset() and "
                "start again, or go on from a copy made before"
            )
        seen = self.get_seq_length()
        # a single token past the context only warns, as in generate: what has been generated would be lost
        if self._context is not None and tokens > 1 and seen + tokens > self._context:
            raise ValueError(
                f"{seen + tokens} tokens are more than the model's context of {self._context}. Shorten the prompt, or load "
                "the model with a larger max_position_embeddings (and a rotary scaling that suits it)"
            )
        if tokens == 1 and seen:
            self.settle()
        if self._replay is not None and self._running["depth"] == 1 and not self._replaying:
            self._note(ids)
        if self._shape is not None and not seen and (self._pruned or not self._whole):
            # a prompt that is pruned as it comes may be of any length
            most = max(tokens, self._context or 2**20) if self._pruned else tokens
            self._resolve(self._shape, batch, most, 0 if visual is None else int(visual.sum(1).max()))
        for layer in self.layers:
            if isinstance(layer, CacheLayer):
                layer.visual = visual

    def place(self, position: Tensor) -> None:
        """The positions [B or 1, T, ids] of the forward pass that is under way; called by a hook on the text model."""
        for layer in self.layers:
            if isinstance(layer, CacheLayer):
                layer.position = position

    def _resolve(self, shape: Any, batch: int, tokens: int, visual: int) -> None:
        """The count of tokens for a budget of memory, now that the first prompt is there."""
        from kvmosaic.plan import resolve  # the plan knows caches

        recipe = resolve(self.recipe, shape, batch, tokens, visual)
        for layer in self.layers:
            if isinstance(layer, CacheLayer):
                layer.recipe = recipe

    def end(self, failed: bool = False) -> None:
        """The forward pass that this thread began is over, or an exception ended it."""
        if self._running.get("thread") == threading.get_ident():
            self._running["depth"] -= 1
            if self._running["depth"] <= 0:
                self._running.clear()
                if not self._in_pieces and not failed and not self._recording:
                    self.settle()
                if not failed:
                    self._verify()

    def _verify(self) -> None:
        """Raises NotFinite if what came in this forward pass cannot be encoded: a GPU is waited for once, not in each layer."""
        layers = [layer for layer in self.layers if isinstance(layer, CacheLayer)]
        unverified = [each for layer in layers for store in layer.stores.values() for _, each in store.unverified]
        if unverified:
            self._refused = not bool(torch.stack([each.to(unverified[0].device) for each in unverified]).all())
            for layer in layers:
                layer.verify(fine=not self._refused)

    def _note(self, ids: Tensor | None) -> None:
        """Remember the ids of a prompt that will be fed again."""
        if not any(isinstance(layer, CacheLayer) and layer.reading for layer in self.layers):
            return
        if ids is None:
            raise ValueError("this method feeds the prompt again to score its tokens, and needs input_ids to do so")
        self._prompt.append(ids)

    def settle(self) -> None:
        """The first prompt is complete: select from it and store it. Does nothing if that is done already.

        With `whole_prompt`, for callers that go on with a turn of several tokens; a single token settles by itself.
        """
        waiting = [layer for layer in self.layers if isinstance(layer, CacheLayer) and layer.reading and layer.pending]
        if not waiting or self._replaying:
            return
        if self._replay is not None:
            self._replaying = True
            try:
                replay(
                    self._model(), self, torch.cat(self._prompt, 1)[:, : self.get_seq_length()], self._replay, waiting
                )
            finally:
                self._replaying = False
            self._prompt = []
        held = waiting[0].pending
        if self._shape is not None and held is not None and not self._pruned:
            visual = 0 if held.visual is None else int(held.visual.sum(1).max())
            self._resolve(self._shape, held.keys.shape[0], len(held), visual)
        tiers: Sequence[Tensor | None] = [None] * len(waiting)
        if self._replay is not None:
            selection = waiting[0].recipe.selection
            assert selection is not None, "it asked for the replay"
            tiers = selection.assign_replayed(*zip(*(layer.replay_scores() for layer in waiting), strict=True))
        for layer, tier in zip(waiting, tiers, strict=True):
            layer.settle(tier)

    def activate_past_recording(self) -> None:
        self.settle()
        self._recording = True
        super().activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.settle()  # the prompt came together with tokens that were guessed

    def reset(self) -> None:
        """Empty, as when it was made."""
        self._prompt, self._recording = [], False
        self.layers = self._empty_layers()  # transformers 5.17 only zeroes its own layers' numbers
        self._running.clear()
        self.pinned = self._refused = False

    def why_not_pinned(self, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why decode steps over this cache cannot be kernels only; None if they can."""
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, CacheLayer):
                return f"layer {index} does not attend to the whole context"
            reason = pinned.why_not(layer.recipe, index, self.head_size, dtype, device)
            if reason:
                return reason
        return None

    @property
    def is_ready(self) -> bool:
        """Whether it can be pinned now. If not it can be some steps later, unless past tokens are recorded."""
        self.settle()
        return all(pinned.is_ready(layer) for layer in self.layers)

    def pin(self, tokens: int, live: Tensor) -> None:
        """Every step from now on is one token a row, `tokens` at most; see `hooks/pinned.py`."""
        for layer in self.layers:
            layer.pinned = pinned.Pinned(layer, tokens, live)
        self.pinned, self._waiting = True, self._wait()

    def load(self, other: "Cache", tokens: int) -> bool:
        """Take over another cache's tokens into this one, that was pinned; False (and broken) if they have no room."""
        self.pinned = all(
            mine.pinned.load(mine, new, tokens) for mine, new in zip(self.layers, other.layers, strict=True)
        )
        self._waiting = self._wait() if self.pinned else 0
        return self.pinned

    def stepped(self) -> bool:
        """One more step of kernels only is on its way to the device. True if with its token so many wait as are chosen among at a
        time: then `gather` is to be called before the next."""
        self._waiting += 1
        return isinstance(self.recipe.selection, Gathering) and self._waiting == self.recipe.selection.gather

    def gather(self) -> None:
        """Give the tokens that wait their tiers."""
        for layer in self.layers:
            layer.pinned.gather(layer)
        self._waiting = 0

    def count(self, steps: int) -> None:
        """So many steps were kernels only, which the device alone has counted."""
        for layer in self.layers:
            layer.pinned.end(layer, steps)

    def _wait(self) -> int:
        """How many tokens wait to be chosen among, in every layer alike."""
        waiting = self.layers[0].pinned.waiting
        return 0 if waiting is None else len(waiting)

    def unpin(self) -> None:
        """Back to steps of any size, as any other cache."""
        for layer in self.layers:
            if layer.pinned is not None:
                layer.pinned.release(layer)
        self.pinned = False

    def _empty_layers(self) -> list[Any]:
        return [
            CacheLayer(
                index,
                len(self._types),
                self.recipe,
                self._rotary,
                self._frequencies.get(kind),
                self._whole,
                self._pruned,
            )
            if kind == "full_attention" and not self.recipe.is_exact
            else DYNAMIC_LAYER_TYPE_MAPPING[kind](**arguments)
            for index, (kind, arguments) in enumerate(self._types)
        ]

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


def _shape(model: PreTrainedModel) -> Any:
    from kvmosaic.plan import Shape

    return Shape.of(model.config, itemsize=model.dtype.itemsize)


def _lanes(recipe: Recipe, layers: Sequence[int], asked: Callable[[Lane], bool]) -> list[Lane]:
    """The lanes of these layers, visual tokens' included, that are as asked."""
    tiers = [tier for tier in (*(recipe.tiers or ()), recipe.visual) if tier is not None]
    return [lane for tier in tiers for layer in layers for lane in tier.lanes(layer) if asked(lane)]


def _by_channel(lane: Lane) -> bool:
    """What it writes depends on which channel a number is of."""
    return lane.pre_rope or bool(lane.codec.learned())


def _check_pruning(recipe: Recipe, full: Sequence[int], whole_prompt: bool) -> None:
    """Raises RecipeConflict if a prompt cannot be pruned as it comes."""
    name = recipe.name or "the recipe"
    if whole_prompt:
        raise RecipeConflict(
            "whole_prompt lets all of the prompt wait, and pruned_prompt its budget. Give one of the two"
        )
    if isinstance(recipe.selection, Evicting):
        raise RecipeConflict(
            f"{name} evicts while decoding, and while a prompt comes in pieces, too: a budget in tokens= or gigabytes= holds for all "
            "of it. Leave pruned_prompt out"
        )
    if recipe.selection is None or not recipe.selection.prunes:
        raise RecipeConflict(
            f"{name} does not choose, head by head, as many tokens of a prompt for one tier, so it cannot be pruned as it comes. "
            "Use for example snapkv, h2o_prefill or expected_attention, or whole_prompt=True"
        )
    if recipe.visual is not None or recipe.first or _lanes(recipe, full, lambda lane: lane.pre_rope):
        raise RecipeConflict(
            f"{name}: heads would keep visual tokens, first tokens or rotary positions of their own before these are stored. Use "
            "whole_prompt=True, or leave out `visual`, `first` and pre_rope"
        )


def _check_selection(recipe: Recipe, full: Sequence[int], layers: int, channels: int) -> None:
    """full: the layers that attend to the whole context, of `layers`. channels: of a head.

    Raises RecipeConflict if the tiers are not such that the selection can use them.
    """
    if recipe.selection is None:
        return
    name, tiers = recipe.name or "the recipe", recipe.stored_in
    needed = len(recipe.selection.expected(1, 0, layers))
    if needed != len(tiers):
        raise RecipeConflict(f"{name}: the selection gives tokens to {needed} tiers, and there are {len(tiers)}")
    if not isinstance(recipe.selection, Evicting):
        return
    if recipe.visual is not None:
        raise RecipeConflict(f"{name}: tokens are evicted while decoding, from one tier. Leave `visual` unset")
    if _lanes(recipe, full, lambda lane: not lane.one_by_one(channels)):
        raise RecipeConflict(
            f"{name}: tokens are evicted one by one while decoding, and this tier shares ranges between tokens or holds some "
            "back. Evict at the prompt only (h2o_prefill, snapkv), or keep tokens with ranges of their own (turboquant)"
        )
