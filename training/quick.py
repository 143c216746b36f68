"""Scores a checkpoint in batches, in seconds on a GPU: `python training/quick.py mosaic-lm --folder FOLDER --json FILE`.

Each question is a row of its own, with its context before it and its right answer after it. An answer is `exact` if the
model's first choice is right at every token: then, and only then, greedy generation writes it too. `tokens` is the share
of answer tokens that are right after right ones, blanks between digits left out. Weights as stored, computed in float32.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import score
import torch
from common import DEVICE, Turns, asked, stacked
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from kvmosaic import bundled
from kvmosaic.bundled import pictures
from kvmosaic.evals.example import Example
from kvmosaic.evals.tasks import generator

Row = tuple[Turns, Tensor | None]  # one question on its context, and the context's pixels


def rows(tokenizer: Any, task: str, options: dict[str, Any], examples: int, seed: int) -> Iterator[Row]:
    rng = random.Random(f"{task} {options} {seed}")
    for _ in range(examples):
        example = generator(task)(rng, **options)
        context = pictures.expand(example.context, example.images)
        pixels = pictures.prepare(example.images) if example.images else None
        for question in example.questions:
            alone = Example(example.context, (question,))
            yield asked(tokenizer, alone, context, (0.0, 1.0), 1), pixels


@torch.no_grad()
def right(model: Any, rows: list[Row], blank: int) -> tuple[list[bool], list[bool]]:
    """Whether each answer is right as a whole, and each of its tokens but blanks and the closing eos."""
    length = max(len(turns.ids) for turns, _ in rows)
    batch = stacked([turns.fit(length, 1) for turns, _ in rows]).to(DEVICE)
    seen = [pixels for _, pixels in rows if pixels is not None]
    logits = model(
        input_ids=batch.ids, use_cache=False, **({"pixel_values": torch.cat(seen).to(DEVICE)} if seen else {})
    ).logits
    is_right = logits[:, :-1].argmax(-1) == batch.ids[:, 1:]
    targets = batch.ids[:, 1:]
    is_answer = (batch.weights[:, 1:] > 0) & (targets != 1)
    whole = (is_right | ~is_answer).all(1).tolist()
    return whole, is_right[is_answer & (targets != blank)].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=bundled.NAMES)
    parser.add_argument("--folder", type=Path, help="another checkpoint than the bundled one")
    parser.add_argument("--share", type=float, default=1.0, help="of the examples of score.py")
    parser.add_argument("--batch-tokens", type=int, default=65536 if DEVICE == "cuda" else 8192)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = arguments.folder or bundled.path(arguments.model)
    auto = AutoModelForImageTextToText if arguments.model == "mosaic-vlm" else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32).to(DEVICE).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    [blank] = tokenizer(" 1", add_special_tokens=False).input_ids[:-1]
    table = []
    for task, options, examples in score.SUITES[arguments.model]:
        start, whole, tokens = time.monotonic(), [], []
        waiting = list(rows(tokenizer, task, options, max(1, round(arguments.share * examples)), arguments.seed))
        at_once = max(1, arguments.batch_tokens // max(len(turns.ids) for turns, _ in waiting))
        for first in range(0, len(waiting), at_once):
            some_whole, some_tokens = right(model, waiting[first : first + at_once], blank)
            whole += some_whole
            tokens += some_tokens
        table.append({
            "task": task, **options, "n": len(whole), "exact": round(sum(whole) / len(whole), 4),
            "tokens": round(sum(tokens) / len(tokens), 4), "seconds": round(time.monotonic() - start, 1),
        })  # fmt: skip
        print(table[-1], flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
