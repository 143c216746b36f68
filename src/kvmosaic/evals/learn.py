"""Runs a model over text and pictures, and lets a method learn from each layer's keys and values."""

from __future__ import annotations

import hashlib
import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvmosaic import methods
from kvmosaic.calibration import Calibration
from kvmosaic.errors import NotFinite, UnsupportedModel
from kvmosaic.evals import suite
from kvmosaic.evals.example import Example
from kvmosaic.hooks import models
from kvmosaic.hooks.rotary import Rotary, watch_positions
from kvmosaic.learning import Sample, Side
from kvmosaic.loading import Opened
from kvmosaic.options import option


def settings(method: str) -> tuple[str, dict[str, Any]]:
    """ "cq coupled=8" -> ("cq", all options that it learns with, those that are not given by their defaults).

    Raises ValueError for a method that does not learn layer by layer, or an option that it does not learn with.
    """
    name, *words = method.split() or [""]
    learner = methods.learner(name)
    if learner is None:
        known = [each for each in methods.names() if methods.learner(each)]
        raise ValueError(f"{name} learns nothing from data. These do: calibquant, {', '.join(known)}")
    parameters = inspect.signature(learner).parameters
    defaults = {key: each.default for key, each in parameters.items() if each.kind is each.KEYWORD_ONLY}
    return name, defaults | dict(option(f"calibrate --method {name}", defaults, word) for word in words)


@dataclass(frozen=True)
class Passage:
    """What the model reads in one pass. counted: [1, T] bool, the tokens whose prediction enters the loss."""

    inputs: dict[str, Tensor]
    counted: Tensor


def passages(opened: Opened, data: str, count: int, length: int, seed: int = 0) -> list[Passage]:
    """`count` passages of each part of `data`, which are divided by semicolons: `length` tokens from random places of a text
    file, or examples of a task or a JSONL file, each with its questions and answers one after another, and the loss over
    the answers.

    Raises ValueError for data that is missing, empty or too short, or for a task that has no questions.
    """
    found: list[Passage] = []
    for each in filter(None, map(str.strip, data.split(";"))):
        path = Path(each)
        if path.suffix != ".jsonl" and path.is_file():
            found += _of_text(opened, path, count, length, seed)
            continue
        (task,) = suite.parse(each)
        if not isinstance(task, suite.Questions):
            raise ValueError(f"--data takes text files, JSONL files and tasks with questions, got {each!r}")
        found += [passage(opened, example, task.chat) for example in islice(task.examples(seed), count)]
    if not found:
        raise ValueError(f"there is nothing to learn from in {data!r}. Give a text file or a task")
    return found


def _of_text(opened: Opened, path: Path, count: int, length: int, seed: int) -> list[Passage]:
    try:
        ids = opened.inputs(path.read_text())["input_ids"]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the text of {path} ({error}). Give a file in UTF-8, or a task") from error
    if ids.shape[1] < 2:
        raise ValueError(f"{path} has {ids.shape[1]} tokens, and nothing can be learned from fewer than 2")
    rng = random.Random(seed)
    starts = [rng.randrange(max(1, ids.shape[1] - length + 1)) for _ in range(count)]
    parts = [ids[:, start : start + length] for start in dict.fromkeys(starts)]
    return [Passage({"input_ids": part}, torch.ones_like(part, dtype=torch.bool)) for part in parts]


def passage(opened: Opened, example: Example, chat: bool = False) -> Passage:
    """The context, then every question with its answer."""
    text = opened.chat(example.context, example.images) if chat else example.context
    inputs = opened.inputs(text, example.images)
    pieces, counted = [inputs["input_ids"]], [torch.zeros_like(inputs["input_ids"])]
    for question in example.questions:
        for words, counts in ((question.prompt, 0), (question.answer, 1)):
            if words:
                pieces.append(opened.ids(words))
                counted.append(torch.full_like(pieces[-1], counts))
    ids = torch.cat(pieces, 1)
    rest = {name: each for name, each in inputs.items() if name not in ("input_ids", "attention_mask")}
    if "mm_token_type_ids" in rest:
        rest["mm_token_type_ids"] = torch.nn.functional.pad(
            rest["mm_token_type_ids"], (0, ids.shape[1] - pieces[0].shape[1])
        )
    return Passage(rest | {"input_ids": ids}, torch.cat(counted, 1).bool())


def digest(parts: Sequence[Passage]) -> str:
    """Of all that the model read, and of what counted."""
    found = hashlib.sha256()
    for part in parts:
        for name, tensor in sorted((part.inputs | {"counted": part.counted}).items()):
            found.update(f"{name} {tuple(tensor.shape)} ".encode() + tensor.float().cpu().numpy().tobytes())
    return found.hexdigest()


def samples(opened: Opened, parts: Sequence[Passage], tick: Callable[[], None] = lambda: None) -> dict[int, Sample]:
    """By layer, of those that attend to the whole context; on the CPU. One pass forward and one back for each passage."""
    found: dict[int, list[Sample]] = {}
    for part in parts:
        for layer, sample in _one(opened, part).items():
            found.setdefault(layer, []).append(sample)
        tick()
    return {layer: Sample.join(found.pop(layer)) for layer in list(found)}


class _Watched(DynamicCache):  # type: ignore[misc]
    """transformers' own cache, which notes what each layer puts into it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=models.text_config(config))
        self.noted: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.noted[layer_idx] = (key_states, value_states)
        key_states.retain_grad()
        value_states.retain_grad()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def _one(opened: Opened, part: Passage) -> dict[int, Sample]:
    model, cache = opened.model, _Watched(opened.model.config)
    try:
        rotary = Rotary(model)
    except UnsupportedModel:  # its keys cannot be turned back: there is only one form of them
        rotary = None
    positions: list[Tensor] = []
    with _differentiable(model), torch.enable_grad():
        watch = watch_positions(model, positions.append)
        try:
            logits = model(**part.inputs, past_key_values=cache, use_cache=True).logits
        finally:
            if watch is not None:
                watch.remove()
        losses = torch.nn.functional.cross_entropy(
            logits[0, :-1].float(), part.inputs["input_ids"][0, 1:], reduction="none"
        )
        counted = part.counted[0, 1:]
        if not bool(counted.any()):
            raise ValueError("nothing of a passage counts: it has no answer, and not even two tokens")
        loss = losses[counted].sum()  # a mean would weigh the tokens of a passage by how few of them count
        if not bool(loss.isfinite()):
            raise NotFinite(
                f"the loss on the data is {float(loss)}. Check the model's weights, and try --dtype float32"
            )
        loss.backward()
    found = {}
    for layer, (kind, _) in enumerate(models.layer_types(model.config)):
        if kind != "full_attention":
            continue
        keys, values = cache.noted[layer]
        assert keys.grad is not None and values.grad is not None, "every layer has a part in the loss"
        place = torch.arange(keys.shape[2])
        try:
            sides = _side(keys.detach(), keys.grad), _side(values.detach(), values.grad)
            unrotated = None
            if rotary is not None:
                position = positions[0][:, None]
                unrotated = _side(rotary.unrotate(keys.detach(), position), rotary.transpose(keys.grad, position))
        except NotFinite as error:
            raise NotFinite(f"layer {layer}: {error}") from None
        found[layer] = Sample(*sides, unrotated, place)
    return found


def _side(numbers: Tensor, gradient: Tensor) -> Side:
    return Side(numbers[0].float().cpu(), gradient[0].float().square().cpu())


@contextmanager
def _differentiable(model: Any) -> Iterator[None]:
    """Gradients flow from the embeddings on, and none are kept for weights."""
    wanted = [weight for weight in model.parameters() if weight.requires_grad]
    model.requires_grad_(False)
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_(True))
    try:
        yield
    finally:
        hook.remove()
        for weight in wanted:
            weight.requires_grad_(True)


def learn(
    opened: Opened,
    name: str,
    options: dict[str, Any],
    parts: Sequence[Passage],
    out: Path,
    tick: Callable[[str, int], None] = lambda stage, total: None,
) -> tuple[Calibration, set[int]]:
    """What method `name` learns from the passages, written to `out`; and the layers that an earlier run had done.

    Each layer that is done is kept in a file beside `out` until the last is, so that a run that was broken off goes on
    from there. tick: called after each passage and each layer, with how many there are.
    Raises ValueError for options that the method cannot learn with, or too few tokens.
    """
    learner = methods.learner(name)
    assert learner is not None, "the caller asks for methods that learn"
    started = Calibration(name, options, models.fingerprint(opened.model.config), digest(parts), {})
    beside = out.with_name(out.name + ".layers")
    tensors = started.done_before(beside)
    known = {int(key.partition(".")[0]) for key in tensors}
    found = samples(opened, parts, lambda: tick("passages", len(parts)))
    for layer, sample in found.items():
        if layer not in known:
            made = learner(sample.to(opened.model.device), **options)
            tensors |= {f"{layer}.{key}": tensor.cpu().contiguous() for key, tensor in made.items()}
            started.holding(tensors).save(beside)
        tick("layers", len(found))
    whole = started.holding(tensors)
    whole.save(out)
    beside.unlink(missing_ok=True)
    return whole, known
