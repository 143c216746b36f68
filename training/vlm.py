"""Trains mosaic-vlm further, from a checkpoint, for a number of seconds: `python training/vlm.py --seconds 3000`.

Examples are drawn from the picture generators of `kvmosaic.evals.tasks`, with digits of the training split. No question
is asked twice in a prompt: its second answer would be copied from the text.
"""

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import IGNORED, Batch, Loss, Turns, asked, stacked, train, weighted_loss
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerBase

from kvmosaic.bundled import pictures
from kvmosaic.evals.example import Example
from kvmosaic.evals.tasks import generator

SHARES = {
    "rows": 0.14, "cells": 0.08, "transcribe": 0.08, "colours": 0.04,
    "shapes": 0.08, "count": 0.06, "pictures": 0.24, "frames": 0.28,
}  # fmt: skip
# weight of an answer's tokens: where an answer is short, or hard to find, it would else drown in the long ones
WEIGHTS = {
    "rows": 1.0, "cells": 2.0, "transcribe": 1.0, "colours": 1.0,
    "shapes": 2.0, "count": 3.0, "pictures": 2.0, "frames": 4.0,
}  # fmt: skip
NUMBERS = {task: number for number, task in enumerate(SHARES, start=1)}
TILES = (1, 2, 4, 4, 8, 16, 16)
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
    rows: list[Turns] = []
    examples: list[Example] = []
    while not rows or (len(rows) + 1) * max(len(row.ids) for row in rows) <= batch_tokens:
        task = rng.choices(list(SHARES), list(SHARES.values()))[0]
        example = document(rng, task, tiles)
        context = pictures.expand(example.context, example.images)
        rows.append(asked(tokenizer, example, context, (IGNORED, WEIGHTS[task]), NUMBERS[task]))
        examples.append(example)
    length = max(len(row.ids) for row in rows)
    pixels = pictures.prepare([image for example in examples for image in example.images])
    return stacked(
        [row.fit(length, tokenizer.pad_token_id) for row in rows],
        pixels=pixels.add(1).mul(127.5).round().byte().numpy(),  # a quarter of the bytes on the way to the device
        named=np.array([token for example in examples for token in named(tokenizer, example.cells)]),
    )


def distorted(pixels: Tensor) -> Tensor:
    """Every 16x16 cell turned, sheared, scaled and moved a little: 1,497 digits are few, and would be learned by heart.

    pixels: [tiles, 3, 64, 64], -1 to 1.
    """
    cells = pixels.unflatten(3, (4, 16)).unflatten(2, (4, 16)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    places = torch.eye(2, 3, device=pixels.device).repeat(len(cells), 1, 1)
    places += torch.empty_like(places).uniform_(-0.16, 0.16)  # of a cell's half side, so at most 1.3 pixels
    grid = F.affine_grid(places, list(cells.shape), align_corners=False)
    cells = F.grid_sample(cells, grid, padding_mode="border", align_corners=False)
    return cells.unflatten(0, (-1, 4, 4)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def loss(model: Any, batch: Batch) -> Loss:
    pixels = batch.pixels.float().div(127.5).sub(1)
    with torch.autocast(pixels.device.type, enabled=False):
        as_drawn = torch.rand(len(pixels), 1, 1, 1, device=pixels.device) < 0.3
        pixels = torch.where(as_drawn, pixels, distorted(pixels))
    logits = model(input_ids=batch.ids, pixel_values=pixels, use_cache=False).logits
    # without this term the first training learned nothing (chance after 1,600 steps)
    shown = logits[batch.ids == model.config.image_token_id]
    naming = F.cross_entropy(shown.float(), batch.named, ignore_index=-100)
    answers = weighted_loss(logits, batch)
    return answers._replace(value=answers.value + NAMING * naming)


if __name__ == "__main__":
    document(random.Random(0), "cells", 1)  # the digits are read once, before the workers start
    train(
        __doc__, "mosaic-vlm", AutoModelForImageTextToText, draw, loss, list(NUMBERS),
        batch_tokens={"cpu": 6144, "cuda": 65536},
    )  # fmt: skip
