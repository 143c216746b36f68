"""Scores a checkpoint with the exact cache by free generation: `python training/score.py mosaic-lm --json scores.json`.

Each question is a turn of its own on a copy of the context's cache (DynamicCache); greedy, as many tokens as the answer
has. `exact` is the share of answers that are right as a whole, `symbols` the share of right words (digits, for pictures).
"""

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, DynamicCache

from kvmosaic import bundled
from kvmosaic.bundled import pictures
from kvmosaic.evals.example import Example
from kvmosaic.evals.tasks import generator

SUITES: dict[str, list[tuple[str, dict[str, Any], int]]] = {  # task, options, examples
    "mosaic-lm": [
        ("lines", {"lines": 20}, 25), ("lines", {"lines": 100}, 25), ("lines", {"lines": 140}, 25),
        ("lines", {"lines": 290}, 25),
        ("needle", {"sentences": 50}, 25), ("needle", {"sentences": 100}, 25), ("needle", {"sentences": 200}, 15),
        ("track", {"assignments": 20}, 50), ("track", {"assignments": 60}, 50), ("track", {"assignments": 150}, 25),
        ("arithmetic", {"steps": 4}, 100), ("arithmetic", {"steps": 8}, 100), ("arithmetic", {"steps": 16}, 50),
        ("copy", {"words": 50}, 25), ("copy", {"words": 100}, 25),
        ("frequent", {"words": 30, "distinct": 4}, 100), ("frequent", {"words": 60, "distinct": 8}, 100),
    ],
    "mosaic-vlm": [
        *(("rows", {"tiles": tiles}, 50) for tiles in (1, 4, 16)),
        *(("cells", {"tiles": tiles}, 50) for tiles in (1, 4, 16)),
        *(("transcribe", {"tiles": tiles}, 25) for tiles in (1, 4, 16)),
        *(("colours", {"tiles": tiles}, 25) for tiles in (4, 16)),
        *(("shapes", {"tiles": tiles}, 50) for tiles in (1, 4, 16)),
        *(("count", {"tiles": tiles}, 50) for tiles in (1, 4)),
        ("pictures", {"pictures": 2, "tiles": 1}, 50), ("pictures", {"pictures": 4, "tiles": 4}, 50),
        ("pictures", {"pictures": 4, "tiles": 4, "ask": "which"}, 50),
        *(("frames", {"frames": frames}, 50) for frames in (4, 16)), ("frames", {"frames": 16, "ask": "which"}, 50),
    ],
}  # fmt: skip


Change = Callable[[DynamicCache, Tensor], None]  # of a context's cache, given the ids of the context: [T]


@torch.no_grad()
def answers(model: Any, tokenizer: Any, example: Example, change: Change | None = None) -> tuple[list[str], int]:
    """What the model writes for each question, and the context's length in tokens.

    change: what is done to the cache between the context and the questions.
    """
    context = pictures.inputs(tokenizer, example.context, example.images)
    cache = DynamicCache(config=model.config.get_text_config())
    model(**context, past_key_values=cache)
    if change:
        change(cache, context["input_ids"][0])
    written = []
    for question in example.questions:
        prompt, answer = (
            tokenizer(text, add_special_tokens=False).input_ids for text in (question.prompt, question.answer)
        )
        written.append(tokenizer.decode(generate(model, copy.deepcopy(cache), prompt, answer)))
    return written, context["input_ids"].shape[1]


def generate(model: Any, cache: DynamicCache, prompt: list[int], guess: list[int]) -> list[int]:
    """Greedy generation of len(guess) tokens after `prompt`: the tokens of generating one by one, but faster.

    The guess (the right answer) is verified in one forward, as in assisted decoding; where it leaves the model's own
    choice, generation goes on token by token.
    """
    logits = model(input_ids=torch.tensor([prompt + guess[:-1]]), past_key_values=cache).logits[0, len(prompt) - 1 :]
    chosen: list[int] = logits.argmax(-1).tolist()
    agreed = next((place for place, token in enumerate(guess) if chosen[place] != token), len(guess))
    tokens = chosen[: agreed + 1]
    if agreed < len(guess) - 1:
        cache.crop(agreed + 1 - len(guess))  # below zero: so many tokens are taken off
    while len(tokens) < len(guess):
        logits = model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=cache).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens


def score(
    model: Any,
    tokenizer: Any,
    task: str,
    options: dict[str, Any],
    examples: int,
    seed: int,
    change: Change | None = None,
) -> dict[str, Any]:
    """One row of the table."""
    rng = random.Random(f"{task} {options} {seed}")
    start, exact, symbols, lengths = time.monotonic(), [], [], []
    for _ in range(examples):
        example = generator(task)(rng, **options)
        written, length = answers(model, tokenizer, example, change)
        lengths.append(length)
        for question, answer in zip(example.questions, written, strict=True):
            exact.append(answer == question.answer)
            right, read = question.answer.split(), answer.split()
            symbols += [place < len(read) and read[place] == symbol for place, symbol in enumerate(right)]
    return {
        "task": task, **options, "context_tokens": round(sum(lengths) / len(lengths)), "n": len(exact),
        "exact": round(sum(exact) / len(exact), 4), "symbols": round(sum(symbols) / len(symbols), 4),
        "seed": seed, "seconds": round(time.monotonic() - start, 1),
    }  # fmt: skip


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, length: int = 1024) -> dict[str, Any]:
    """Of the first `length` tokens of each held-out Python source."""
    losses = []
    for text in lm.sources(held_out=True)[:20]:
        ids = tokenizer(text[: 4 * length], return_tensors="pt").input_ids[:, :length]
        losses.append(float(model(input_ids=ids, labels=ids).loss))
    return {
        "task": "text",
        "context_tokens": length,
        "n": len(losses),
        "perplexity": round(math.exp(sum(losses) / len(losses)), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=bundled.NAMES)
    parser.add_argument("--folder", type=Path, help="another checkpoint than the bundled one")
    parser.add_argument("--tasks", nargs="*", help="only these")
    parser.add_argument("--share", type=float, default=1.0, help="of the examples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = arguments.folder or bundled.path(arguments.model)
    auto = AutoModelForImageTextToText if arguments.model == "mosaic-vlm" else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    table = []
    for task, options, examples in SUITES[arguments.model]:
        if not arguments.tasks or task in arguments.tasks:
            examples = max(1, round(arguments.share * examples))
            table.append(score(model, tokenizer, task, options, examples, arguments.seed))
            print(table[-1], flush=True)
    if arguments.model == "mosaic-lm" and (not arguments.tasks or "text" in arguments.tasks):
        table.append(perplexity(model, tokenizer))
        print(table[-1], flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
