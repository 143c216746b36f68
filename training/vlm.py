"""Trains mosaic-vlm further, from a checkpoint, for a number of seconds: `python training/vlm.py --seconds 3000`.

Examples are drawn from the picture generators of `kvmosaic.evals.tasks`, with digits of the training split. No question
is asked twice in a prompt: its second answer would be copied from the text.
"""

import random
from typing import Any

import torch
import torch.nn.functional as F
from common import IGNORED, Batch, train, turns, weighted_loss
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerBase

from kvmosaic.bundled import pictures
from kvmosaic.evals.example import Example
from kvmosaic.evals.tasks import generator

SHARES = {
    "rows": 0.12, "cells": 0.08, "transcribe": 0.12, "colours": 0.05,
    "shapes": 0.05, "count": 0.03, "pictures": 0.28, "frames": 0.27,
}  # fmt: skip
TILES = (1, 2, 4, 4, 8, 16)
NAMING = 1.0  # weight of the term that makes every visual token name what its cell shows


def document(rng: random.Random, task: str, tiles: int) -> Example:
    """One example over at most `tiles` tiles, with as many questions as fit well."""
    questions = 4 + tiles
    options: dict[str, Any] = {"tiles": tiles, "split": "train"}
    if task == "shapes":
        options = {"tiles": tiles}
    elif task == "frames":
        options = {"frames": tiles, "ask": rng.choice(("read", "which")), "split": "train"}
    elif task == "pictures":
        number = min(tiles, rng.choice((2, 3, 4, 6)))
        options |= {"pictures": number, "tiles": tiles // number, "ask": rng.choice(("read", "which"))}
    elif task == "transcribe":
        questions = max(1, questions // 3)
    return generator(task)(rng, questions=questions, **options)


def named(tokenizer: PreTrainedTokenizerBase, cells: tuple[str, ...]) -> list[int]:
    """The token that stands for each cell: the digit, or the first one of the shape's name; -100 for an empty cell."""

    def name(cell: str) -> int:
        if not cell:
            return -100
        return int(tokenizer(cell if cell.isdigit() else f" {cell}", add_special_tokens=False).input_ids[0])

    ids = {cell: name(cell) for cell in set(cells)}
    return [ids[cell] for cell in cells]


def draw(tokenizer: PreTrainedTokenizerBase, batch_tokens: int, seed: int) -> Batch:
    """Examples over equally many tiles, padded on the right to one length."""
    rng = random.Random(seed)
    tiles = rng.choice(TILES)
    rows: list[tuple[list[int], list[float]]] = []
    examples: list[Example] = []
    while not rows or (len(rows) + 1) * max(len(ids) for ids, _ in rows) <= batch_tokens:
        example = document(rng, rng.choices(list(SHARES), list(SHARES.values()))[0], tiles)
        context = tokenizer(pictures.expand(example.context, example.images)).input_ids
        asked, weights = turns(tokenizer, example.questions, 1.0)
        rows.append((context + asked, [IGNORED] * len(context) + [w if w == 1.0 else IGNORED for w in weights]))
        examples.append(example)
    length = max(len(ids) for ids, _ in rows)
    return Batch(
        ids=torch.tensor([ids + [tokenizer.pad_token_id] * (length - len(ids)) for ids, _ in rows]),
        weights=torch.tensor([weights + [IGNORED] * (length - len(weights)) for _, weights in rows]),
        pixels=pictures.prepare([image for example in examples for image in example.images]),
        named=torch.tensor([token for example in examples for token in named(tokenizer, example.cells)]),
    )


def loss(model: Any, batch: Batch) -> Tensor:
    logits = model(input_ids=batch.ids, pixel_values=batch.pixels, use_cache=False).logits
    # without this term the first training learned nothing (chance after 1,600 steps)
    shown = logits[batch.ids == model.config.image_token_id]
    naming = F.cross_entropy(shown.float(), batch.named, ignore_index=-100)
    return weighted_loss(logits, batch) + NAMING * naming


if __name__ == "__main__":
    train(__doc__, "mosaic-vlm", AutoModelForImageTextToText, draw, loss, batch_tokens={"cpu": 6144, "cuda": 65536})
