"""Decoding by a replayed CUDA graph: a prompt runs as always, and every token after it is one launch.

The step that is captured: the whole model over one token a row, the choice of the next token, and which rows have ended.
All that changes from step to step lies on the device, so the host only replays, and reads what was chosen some steps
later. A step after the last row has ended stores nothing. Where tokens wait to be chosen among many at a time, that is queued
between two steps. While a row has not had all of its first tokens, steps are generate's own.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvmosaic.hooks.attach import cache_in, unhooked
from kvmosaic.hooks.cache import Cache
from kvmosaic.hooks.models import CACHE_ARGUMENTS, cache_argument
from kvmosaic.recipe import Recipe
from kvmosaic.report import size
from kvmosaic.stores import EXACT

WARM_UP = 3
"""Steps that run as they are before one is captured: libraries set themselves up, and compilation happens."""

AHEAD = 4
"""Steps that the device may be ahead of what the host has read."""

BY_LOGITS_ALONE = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
"""Processors of logits that do not look at the tokens so far, so that a graph can hold them."""

FOR_ONE_ROW: dict[str, Any] = {"coordinate_descent_tuning": True, "realize_acc_reads_threshold": 1}
"""torch.compile's options for a batch of one: products of a vector with a matrix become reductions, which read weights faster
than a matrix product does, and what two of them are multiplied to is written before the next product reads it."""

log = logging.getLogger("kvmosaic")


def generate(
    model: PreTrainedModel, *, method: Recipe | None = None, compiled: bool | None = None, **arguments: Any
) -> Any:
    """`model.generate(**arguments)` with a cache of `method` (None: exact), its steps captured where that is possible.

    compiled: the model's own part of a step goes through torch.compile first; None = on a GPU it does.
    Where steps cannot be captured (no GPU, a recipe or a model that does not allow it) the log says why, once, and generate
    runs as it is. Takes what generate takes, `streamer`, `return_dict_in_generate` and `past_key_values` too.
    Raises ValueError for beams, assistants and scores, which a captured step does not have.
    """
    decoder = Decoder(model, method, compiled=compiled)
    try:
        return decoder.generate(**arguments)
    finally:
        decoder.release()


class Decoder:
    """A model with a recipe, that keeps its captured step: the next prompt of as many rows that fits in the same memory
    uses it again.

        decoder = kvmosaic.Decoder(model, kvmosaic.methods.kivi(bits=2), capacity=8192)
        decoder.generate(**inputs, max_new_tokens=200)

    capacity: tokens of prompt and answer together that memory is reserved for; more make it grow, and the step is
        captured anew. 0 = what the first call needs.
    compiled: as in `generate`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: Recipe | None = None,
        *,
        capacity: int = 0,
        compiled: bool | None = None,
    ) -> None:
        self.method = method or Recipe()
        # captured, the exact cache is one of ours too: transformers' own grows by copying
        self.recipe = Recipe(tiers=(EXACT,), name="exact") if self.method.is_exact else self.method
        self.model, self.capacity = model, capacity
        self.compiled = model.device.type == "cuda" if compiled is None else compiled
        self._steps: _Steps | None = None

    def release(self) -> None:
        """Give up the captured step and its memory."""
        if self._steps is not None:
            self._steps.cache.unpin()
        self._steps = None

    def generate(self, *, streamer: Any = None, **arguments: Any) -> Any:
        """As transformers' `generate`."""
        given = cache_in(arguments)
        if given is not None and not isinstance(given, Cache):
            raise ValueError(f"the cache must be a kvmosaic.Cache, got {type(given).__name__}")
        cache = Cache(self.model, self.recipe) if given is None else given
        reason = cache.why_not_pinned(self.model.dtype, self.model.device)
        if reason is not None and given is None and self.method.is_exact:
            cache = Cache(self.model, self.method)
        if given is None:
            arguments[cache_argument(self.model)] = cache
        if reason is not None:
            _tell(f"decoding is not captured, and generate runs as it is: {reason}", self.model.device.type)
            return self.model.generate(streamer=streamer, **arguments)

        def decode(
            model: PreTrainedModel,
            input_ids: Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: StoppingCriteriaList,
            generation_config: GenerationConfig,
            **inputs: Any,
        ) -> Any:
            choice = _Choice(logits_processor, stopping_criteria, generation_config)
            return self._decode(input_ids, choice, inputs, streamer, reusable=given is None)

        return self.model.generate(custom_generate=decode, **arguments)

    def _decode(self, ids: Tensor, choice: _Choice, inputs: dict[str, Any], streamer: Any, reusable: bool) -> Any:
        """reusable: the cache is nobody else's, so that a later call may have its memory."""
        model, cache, config = self.model, cache_in(inputs), choice.config
        if streamer is not None:
            streamer.put(ids.cpu())
        most, columns, so_far = choice.most - ids.shape[1], [], ids
        ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        outputs = model._prefill(ids, config, inputs)
        while True:  # steps as generate makes them, until none of the cache's tokens is on its way
            chosen = choice.padded(choice(so_far, outputs.logits[:, -1].float()), ended)
            so_far = torch.cat([so_far, chosen[:, None]], 1)
            ended = ended | choice.ends(chosen) | choice.others(so_far, None)
            columns.append(chosen.cpu())
            if streamer is not None:
                streamer.put(columns[-1])
            left = most - len(columns)
            if left <= 0 or bool(ended.all()):
                break
            inputs = model._update_model_kwargs_for_generation(outputs, inputs)
            del outputs
            following = model.prepare_inputs_for_generation(so_far, next_sequence_length=1, **inputs)
            if not cache.is_ready:
                outputs = model(**following, return_dict=True)
                continue
            steps = self._prepared(cache, following, choice, left)
            cache, before = steps.cache, len(columns)
            try:
                for column in steps.run(so_far, ended, left):
                    columns.append(column)
                    if streamer is not None:
                        streamer.put(column)
            finally:
                cache.count(len(columns) - before)
                if not reusable:
                    cache.unpin()
            self._steps = steps if reusable else None
            break
        if streamer is not None:
            streamer.end()
        sequences = torch.cat([ids, torch.stack(columns, 1).to(ids.device)], 1)
        if not config.return_dict_in_generate:
            return sequences
        field = next(name for name in CACHE_ARGUMENTS if name in GenerateDecoderOnlyOutput.__dataclass_fields__)
        return GenerateDecoderOnlyOutput(sequences=sequences, **{field: cache})

    def _prepared(self, cache: Cache, first: dict[str, Any], choice: _Choice, most: int) -> _Steps:
        """The kept step with this cache's tokens in it, if it serves; or a new one around this cache."""
        tensors = {
            name: value.clone()
            for name, value in first.items()
            if isinstance(value, Tensor) and name != "attention_mask"  # padding is not stored, so nothing is masked
        }
        if self._steps is not None and self._steps.take(cache, tensors, choice, most):
            return self._steps
        self.release()  # before new memory is taken
        room = max(most, self.capacity - cache.get_seq_length())
        try:
            return _Steps(self.model, cache, tensors, choice, room, self.compiled)
        except torch.OutOfMemoryError as error:
            free, _ = torch.cuda.mem_get_info(self.model.device)
            raise MemoryError(
                f"no room on the GPU for {room} more tokens: the cache holds {size(cache.nbytes())} and {size(free)} are free. "
                "Take fewer new tokens or rows, or fewer bits; `kvmosaic plan` says what fits"
            ) from error


class _Choice:
    """How the next tokens are chosen from logits, and when a row has ended, as transformers' arguments say."""

    def __init__(
        self, processors: LogitsProcessorList, criteria: StoppingCriteriaList, config: GenerationConfig
    ) -> None:
        wanted = [
            name
            for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
            if getattr(config, name)
        ]
        if wanted or (config.num_beams or 1) > 1:
            raise ValueError(
                f"captured decoding has no {', '.join(wanted) or 'beams'}. Call model.generate with a kvmosaic.Cache instead"
            )
        self.processors, self.config, self.most = processors, config, criteria.max_length
        self.eos = next((each.eos_token_id for each in criteria if isinstance(each, EosTokenCriteria)), None)
        self.pad = config._pad_token_tensor
        # criteria that look at text or at the clock; asked on the host after every step
        others = [each for each in criteria if not isinstance(each, EosTokenCriteria | MaxLengthCriteria)]
        self.others = StoppingCriteriaList(others)
        self.by_logits_alone = all(isinstance(each, BY_LOGITS_ALONE) for each in processors)

    def __call__(self, ids: Tensor | None, logits: Tensor) -> Tensor:
        """logits [B, vocabulary] float32 -> [B] int64. ids: all tokens so far; None where processors do not ask."""
        scores = self.processors(ids, logits)
        if not self.config.do_sample:
            return scores.argmax(-1)
        # the largest of p / e, with e exponential, is a draw from p: one pass, and nothing waits for the host
        return (scores.softmax(-1) / torch.empty_like(scores).exponential_()).argmax(-1)

    def padded(self, chosen: Tensor, ended: Tensor) -> Tensor:
        """`chosen` with padding in the rows that have ended."""
        return chosen if self.pad is None else torch.where(ended, self.pad, chosen)

    def ends(self, chosen: Tensor) -> Tensor:
        if self.eos is None:
            return torch.zeros_like(chosen, dtype=torch.bool)
        return torch.isin(chosen, self.eos.to(chosen.device))

    def is_like(self, other: _Choice) -> bool:
        """Whether a graph that holds the one serves the other."""

        def told(choice: _Choice) -> list[Any]:
            return [choice.config.do_sample, *((type(each), vars(each)) for each in choice.processors)]

        def ends(choice: _Choice) -> list[Any]:
            return [None if each is None else each.tolist() for each in (choice.eos, choice.pad)]

        alone = self.by_logits_alone
        return alone == other.by_logits_alone and ends(self) == ends(other) and (not alone or told(self) == told(other))


class _Steps:
    """Steps over one pinned cache: the tensors that they go on from, and on a GPU the graph that replays them."""

    def __init__(
        self,
        model: PreTrainedModel,
        cache: Cache,
        tensors: dict[str, Tensor],
        choice: _Choice,
        room: int,
        compiled: bool,
    ) -> None:
        self.model, self.cache, self.tensors, self.choice = model, cache, tensors, choice
        self.ids, device = tensors["input_ids"], tensors["input_ids"].device
        self.ended = torch.zeros(len(self.ids), dtype=torch.bool, device=device)
        self.live = torch.ones(1, dtype=torch.int32, device=device)
        self.logits: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.done = 0
        cache.pin(room, self.live)
        self.arguments = {cache_argument(model): cache, "use_cache": True, "return_dict": True}
        options = FOR_ONE_ROW if len(self.ids) == 1 else None
        self.forward = torch.compile(model.forward, options=options) if compiled else model.forward

    def take(self, cache: Cache, tensors: dict[str, Tensor], choice: _Choice, most: int) -> bool:
        """Go on from another prompt's tokens; False if these tensors, or the graph, are not made for that."""
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        if shapes != {name: tensor.shape for name, tensor in tensors.items()} or not choice.is_like(self.choice):
            return False
        if not self.cache.load(cache, most):
            return False
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)
        self.choice = choice
        return True

    def run(self, so_far: Tensor, ended: Tensor, most: int) -> Iterator[Tensor]:
        """At most `most` steps: the tokens [B] of each, on the host. so_far: all tokens [B, T] before.

        After the tokens with which the last row ends no more come.
        """
        self.ended.copy_(ended)
        self.live.fill_(1)
        alone = self.choice.by_logits_alone and not self.choice.others
        waiting: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        over = ended.cpu()
        with unhooked(self.model), torch.no_grad():
            for step in range(most):
                self._advance()
                if not alone:
                    if not self.choice.by_logits_alone:
                        assert self.logits is not None, "the step leaves its logits"
                        self._choose(self.choice(so_far, self.logits))
                    so_far = torch.cat([so_far, self.ids], 1)
                    if self.choice.others:
                        self.ended |= self.choice.others(so_far, None)
                        self.live.copy_(~self.ended.all())
                waiting.append(self._sent())
                if self.cache.stepped():
                    self.cache.gather()
                while waiting and (len(waiting) > AHEAD or step == most - 1 or not alone):
                    column, event = waiting.popleft()
                    if event is not None:
                        event.synchronize()
                    yield column
                    over = over | (self.choice.ends(column) if alone else self.ended.cpu())
                    if bool(over.all()):
                        return

    def _sent(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """The tokens just chosen, on their way to the host."""
        if self.ids.device.type != "cuda":
            return self.ids[:, 0].clone(), None
        column = torch.empty(len(self.ids), dtype=self.ids.dtype, pin_memory=True)
        column.copy_(self.ids[:, 0], non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return column, event

    def _advance(self) -> None:
        if self.graph is None and self.ids.device.type == "cuda" and self.done >= WARM_UP:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step()
            self.graph = graph
        if self.graph is not None:
            self.graph.replay()
        else:
            self._step()
        self.done += 1

    def _step(self) -> None:
        logits = self.forward(**self.tensors, **self.arguments).logits[:, -1].float()
        if self.choice.by_logits_alone:
            self._choose(self.choice(None, logits))
        elif self.logits is None:
            self.logits = logits
        else:
            self.logits.copy_(logits)

    def _choose(self, chosen: Tensor) -> None:
        chosen = self.choice.padded(chosen, self.ended)
        self.ids.copy_(chosen[:, None])
        self.tensors["position_ids"] += self.live
        self.ended |= self.choice.ends(chosen)
        self.live.copy_(~self.ended.all())


@lru_cache(maxsize=64)
def _tell(text: str, device: str) -> None:
    """Once; a warning where there is a GPU that could do better."""
    log.log(logging.WARNING if device == "cuda" else logging.INFO, text)
