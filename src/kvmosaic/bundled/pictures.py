"""Pictures for mosaic-vlm: tiles of 64x64 pixels, 16 visual tokens each."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kvmosaic.errors import BadPicture
from kvmosaic.evals.example import PICTURE

TILE = 64
TOKENS_PER_TILE = 16


def grid(picture: Image.Image) -> tuple[int, int]:
    """Rows and columns of tiles that the picture is cut into: its size in tiles, rounded, at least one each way."""
    return max(1, round(picture.height / TILE)), max(1, round(picture.width / TILE))


def prepare(pictures: Sequence[Image.Image]) -> Tensor:
    """The pixels of all tiles of all pictures, each picture row by row.

    A picture whose sides are no multiples of 64 is resized to the nearest that are.

    Returns [tiles, 3, 64, 64] float32, -1 to 1: what the model takes as `pixel_values`.
    """
    tiles = []
    for picture in pictures:
        rows, columns = grid(picture)
        fitted = picture.convert("RGB")
        if fitted.size != (columns * TILE, rows * TILE):
            fitted = fitted.resize((columns * TILE, rows * TILE), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(fitted)).float().div(127.5).sub(1)  # [rows * 64, columns * 64, 3]
        pixels = pixels.view(rows, TILE, columns, TILE, 3).permute(0, 2, 4, 1, 3)
        tiles.append(pixels.reshape(rows * columns, 3, TILE, TILE))
    return torch.cat(tiles) if tiles else torch.empty(0, 3, TILE, TILE)


def expand(text: str, pictures: Sequence[Image.Image]) -> str:
    """`text` with each "<image>" written out: for each tile "tile t " and 16 placeholders.

    Tiles are numbered through all pictures: a number is a name that occurs once in the prompt.
    Raises BadPicture unless there are as many pictures as markers.
    """
    first, *rest = text.split(PICTURE)
    if len(rest) != len(pictures):
        raise BadPicture(
            f"the prompt has {len(rest)} {PICTURE} markers for {len(pictures)} pictures. Write one for each picture."
        )
    written, numbers = [first], itertools.count()
    for picture, following in zip(pictures, rest, strict=True):
        tiles = math.prod(grid(picture))
        written += [f"tile {number} " + PICTURE * TOKENS_PER_TILE for number in itertools.islice(numbers, tiles)]
        written.append(following)
    return "".join(written)


def inputs(tokenizer: Any, text: str, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
    """What `model.generate(**inputs)` takes: input_ids and attention_mask [1, T], and pixel_values if there are pictures."""
    encoded = tokenizer(expand(text, pictures), return_tensors="pt")
    made = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    return {**made, "pixel_values": prepare(pictures)} if pictures else made
