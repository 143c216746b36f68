"""Runs tasks through compressed caches: every answer is read from stored tokens, never from the prompt's exact ones.

A context is prefilled once through the cache; each question is a later turn on a deep copy of it. Questions of the same
length in tokens go through as the rows of one batch, which changes no answer (rows are independent) and saves time.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvmosaic.evals.example import Example, Question
from kvmosaic.evals.scores import Share, Z, symbols
from kvmosaic.evals.suite import Perplexity, Questions, Task
from kvmosaic.hooks import Cache
from kvmosaic.loading import Opened
from kvmosaic.recipe import Recipe
from kvmosaic.report import Report


@dataclass
class Memory:
    """What the caches of a task held, summed."""

    stored: int = 0
    learned: int = 0
    exact: int = 0
    tokens: int = 0

    def add(self, report: Report, rows: int = 1) -> None:
        self.stored += report.total
        self.learned += report.learned
        self.exact += report.exact_cache
        self.tokens += rows * report.tokens

    def columns(self) -> dict[str, Any]:
        return {
            "compression": self.exact / self.stored if self.stored else 1.0,
            "bytes_per_token": self.stored / max(self.tokens, 1),
            "learned_bytes_per_token": self.learned / max(self.tokens, 1),
            "exact_bytes_per_token": self.exact / max(self.tokens, 1),
        }


class Clock:
    """Time spent on single-token steps, and how many tokens came of them."""

    def __init__(self) -> None:
        self.seconds, self.tokens = 0.0, 0

    def columns(self) -> dict[str, Any]:
        return {"seconds_per_token": self.seconds / self.tokens if self.tokens else None}


@torch.inference_mode()
def prefill(opened: Opened, recipe: Recipe, example: Example, chat: bool = False) -> tuple[Cache, Tensor]:
    """A cache that holds the example's context, and the tokens [1, T] with which the next turn begins.

    A context without a question of its own keeps its last token back, so that the answer reads a stored prompt.
    """
    text = opened.chat(example.context, example.images) if chat else example.context
    inputs = opened.inputs(text, example.images)
    start = inputs["input_ids"][:, :0]
    if not all(question.prompt for question in example.questions):
        start = inputs["input_ids"][:, -1:]
        inputs = inputs | {key: inputs[key][:, :-1] for key in ("input_ids", "attention_mask") if key in inputs}
    cache = Cache(opened.model, recipe)
    if inputs["input_ids"].shape[1]:
        opened.model(**inputs, past_key_values=cache, logits_to_keep=1)
    return cache, start


@torch.inference_mode()
def answer(
    opened: Opened, cache: Cache, turns: Sequence[Tensor], lengths: Sequence[int], clock: Clock | None = None
) -> tuple[list[list[int]], Cache]:
    """Greedy answers to turns of one length [1, T], each on a copy of the cache, and the cache that they leave.

    An answer ends with the model's end-of-sequence token, which is left out, or after its `lengths`.
    """
    cache = copy.deepcopy(cache)
    if len(turns) > 1:
        cache.batch_repeat_interleave(len(turns))
    ends = opened.model.generation_config.eos_token_id
    stop = torch.tensor(ends if isinstance(ends, list) else [] if ends is None else [ends], device=turns[0].device)
    token = opened.model(input_ids=torch.cat(list(turns)), past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
    written, ended = [token], torch.isin(token, stop)
    limit = torch.tensor(lengths, device=token.device)[:, None]
    begin = time.perf_counter()
    while not bool((ended | (limit <= len(written))).all()):
        token = opened.model(input_ids=token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        written.append(token)
        ended = ended | torch.isin(token, stop)
    if clock is not None:
        clock.seconds += time.perf_counter() - begin
        clock.tokens += (len(written) - 1) * len(turns)
    stops = set(stop.tolist())
    rows = torch.cat(written, 1).tolist()
    cut = (itertools.takewhile(lambda each: each not in stops, row[:n]) for row, n in zip(rows, lengths, strict=True))
    return [list(row) for row in cut], cache


def ask(
    opened: Opened, cache: Cache, start: Tensor, questions: Sequence[Question], memory: Memory, clock: Clock
) -> list[str]:
    """What the model writes for each question."""
    turns = [torch.cat([start, opened.ids(each.prompt)], 1) if each.prompt else start for each in questions]
    lengths = [opened.ids(each.answer).shape[1] for each in questions]
    written = [""] * len(questions)
    by_length = sorted(range(len(questions)), key=lambda index: turns[index].shape[1])
    for _, group in itertools.groupby(by_length, key=lambda index: turns[index].shape[1]):
        rows = list(group)
        answers, full = answer(opened, cache, [turns[row] for row in rows], [lengths[row] for row in rows], clock)
        memory.add(full.report(), len(rows))
        for row, ids in zip(rows, answers, strict=True):
            written[row] = opened.tokenizer.decode(ids)
    return written


def score(
    opened: Opened,
    recipe: Recipe,
    task: Task,
    *,
    seeds: Sequence[int] = (0,),
    limit: int = 10,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """One row of the table: a recipe on a task. limit: examples (or texts) a seed. tick: called after each."""
    begin = time.perf_counter()
    if isinstance(task, Questions):
        columns = _questions(opened, recipe, task, seeds, limit, tick)
    else:
        columns = _perplexity(opened, recipe, task, limit, tick)
    return {"method": recipe.name, "task": task.label, **columns, "seconds": time.perf_counter() - begin}


def _examples(task: Questions, seeds: Sequence[int], limit: int) -> Iterator[Example]:
    return itertools.chain.from_iterable(itertools.islice(task.examples(seed), limit) for seed in seeds)


def _questions(
    opened: Opened, recipe: Recipe, task: Questions, seeds: Sequence[int], limit: int, tick: Callable[[], None]
) -> dict[str, Any]:
    right, places, memory, clock = Share(), Share(), Memory(), Clock()
    for example in _examples(task, seeds, limit):
        cache, start = prefill(opened, recipe, example, task.chat)
        written = ask(opened, cache, start, example.questions, memory, clock)
        for question, text in zip(example.questions, written, strict=True):
            right.add(text.strip() == question.answer.strip())
            for same in symbols(question.answer, text):
                places.add(same)
        tick()
    low, high = right.interval
    scores = {"score": right.value, "low": low, "high": high, "symbols": places.value, "n": right.n}
    return {"metric": "right", **scores, **memory.columns(), **clock.columns()}


@torch.inference_mode()
def _perplexity(
    opened: Opened, recipe: Recipe, task: Perplexity, limit: int, tick: Callable[[], None]
) -> dict[str, Any]:
    """A single forward over the text would never read the cache, so it enters a chunk at a time."""
    memory, clock, losses = Memory(), Clock(), []
    for text in task.texts[:limit]:
        ids = opened.inputs(text)["input_ids"][:, : task.tokens]
        cache = Cache(opened.model, recipe)
        begin = time.perf_counter()
        last: Tensor | None = None  # logits after the chunk before
        for chunk in ids.split(task.chunk, 1):
            logits = opened.model(input_ids=chunk, past_key_values=cache).logits[0].float()
            if last is not None:  # the first chunk reads nothing stored
                predicted = torch.cat([last, logits[:-1]]).log_softmax(-1)
                losses.append(-predicted.gather(1, chunk[0, :, None])[:, 0])
            last = logits[-1:]
        clock.seconds += time.perf_counter() - begin
        clock.tokens += ids.shape[1]
        memory.add(cache.report())
        tick()
    every = torch.cat(losses) if losses else torch.full((1,), torch.nan)
    mean, half = float(every.mean()), Z * float(every.std()) / math.sqrt(len(every))
    scores = {"score": math.exp(mean), "low": math.exp(mean - half), "high": math.exp(mean + half)}
    return {"metric": "perplexity", **scores, "symbols": None, "n": len(every), **memory.columns(), **clock.columns()}
