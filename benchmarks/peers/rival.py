"""Runs kvpress in an environment of its own: questions as JSON in, what was written as JSON out. Called by compare.py.

Contexts and questions come as tokens. A context is read under the press; each question is a later turn on a copy of what is
left, at its true positions, as in kvpress's own pipeline. That pipeline raises for PyramidKV (one mask does not fit layers of
different lengths) and may find no masking key for many queries at once, so there turns go in token by token.
"""

import contextlib
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kvpress
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

PRESSES: dict[str, Callable[[float], Any]] = {
    "SnapKV": lambda pruned: kvpress.SnapKVPress(pruned),
    "ObservedAttention": lambda pruned: kvpress.ObservedAttentionPress(pruned),
    "StreamingLLM": lambda pruned: kvpress.StreamingLLMPress(pruned),
    "PyramidKV": lambda pruned: kvpress.PyramidKVPress(pruned),
    "AdaKV(SnapKV)": lambda pruned: kvpress.AdaKVPress(kvpress.SnapKVPress(pruned)),
    "ExpectedAttention": lambda pruned: kvpress.ExpectedAttentionPress(pruned),
    "AdaKV(ExpectedAttention)": lambda pruned: kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(pruned)),
    "KVzip": lambda pruned: kvpress.KVzipPress(pruned),
    "ThinK": lambda pruned: kvpress.ThinKPress(pruned),
}


def held(model: Any, cache: DynamicCache) -> int:
    """Bytes of keys and values, and of the lists of pairs that are masked where none is freed."""
    masks = (getattr(layer.self_attn, "masked_key_indices", None) or () for layer in model.model.layers)
    tensors = [each for layer in cache.layers for each in (layer.keys, layer.values)]
    tensors += [each for mask in masks for each in mask]
    return sum(each.nbytes for each in tensors)


def run(model: Any, cache: DynamicCache, tokens: list[int], position: int) -> Tensor:
    """Logits [T, vocabulary] after each of the turn's tokens, the first of them at `position`."""
    even = len({layer.keys.shape[2] for layer in cache.layers}) == 1
    masked = any(getattr(layer.self_attn, "masked_key_indices", None) for layer in model.model.layers)
    positions = torch.arange(position, position + len(tokens))[None]
    pieces = len(tokens) if even and not masked else 1
    steps = zip(torch.tensor([tokens]).split(pieces, 1), positions.split(pieces, 1), strict=True)
    logits = [model(input_ids=ids, past_key_values=cache, position_ids=places).logits[0] for ids, places in steps]
    return torch.cat(logits).float()


def answer(model: Any, cache: DynamicCache, start: int, prompt: list[int], length: int) -> list[int]:
    """Greedy, up to the end of a sequence, which is left out."""
    cache, stop, turn = copy.deepcopy(cache), model.generation_config.eos_token_id, prompt
    stops = stop if isinstance(stop, list) else [stop]
    written: list[int] = []
    while len(written) < length:
        token = int(run(model, cache, turn, start)[-1].argmax())
        if token in stops:
            break
        written.append(token)
        start, turn = start + len(turn), [token]
    return written


@torch.inference_mode()
def score(reader: Any, writer: Any, press: Any | None, examples: list[dict[str, Any]]) -> dict[str, Any]:
    """What was written for each question, or the loss of each token of a continuation, and the bytes after each context."""
    found: dict[str, Any] = {"written": [], "losses": [], "held": []}
    for example in examples:
        for layer in writer.model.layers:
            layer.self_attn.masked_key_indices = None  # of the press before
        cache = DynamicCache()
        with press(reader) if press else contextlib.nullcontext():
            reader.model(input_ids=torch.tensor([example["context"]]), past_key_values=cache)
        found["held"].append(held(writer, cache))
        start = len(example["context"])
        for turn in example["turns"]:
            found["written"].append(answer(writer, cache, start, turn["prompt"], len(turn["answer"])))
        if example["continuation"]:
            logits = run(writer, copy.deepcopy(cache), example["continuation"], start)
            told = torch.tensor(example["continuation"][1:])
            found["losses"] += (-logits[:-1].log_softmax(-1).gather(1, told[:, None])[:, 0]).tolist()
    return found


def main() -> None:
    """rival.py CHECKPOINT QUESTIONS.json ROWS.json"""
    checkpoint, questions, rows = sys.argv[1:]
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    asked = json.loads(Path(questions).read_text())
    model, eager = (
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", attn_implementation=kind).eval()
        for kind in ("sdpa", "eager")
    )
    found = []
    for task, examples in asked["tasks"].items():
        found.append({"task": task, "method": "all", "keep": 1.0} | score(model, model, None, examples))
        for name, press in PRESSES.items():
            reader = eager if name == "ObservedAttention" else model  # it needs the prompt's whole matrix
            for keep in asked["keeps"]:
                found.append(
                    {"task": task, "method": name, "keep": keep} | score(reader, model, press(1 - keep), examples)
                )
                print(f"{task}: {name}, keep {keep}", file=sys.stderr, flush=True)
    Path(rows).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
