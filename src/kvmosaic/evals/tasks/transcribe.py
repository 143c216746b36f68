"""Transcribing whole tiles of handwritten digits."""

import random

from kvmosaic.evals.example import Example, Question
from kvmosaic.evals.tasks._digits import one_picture
from kvmosaic.evals.tasks._tiles import CELLS, Split, Tile


def transcribe(rng: random.Random, *, tiles: int = 16, questions: int = 4, split: Split = "held_out") -> Example:
    """Measures reading all sixteen digits of a tile in order: a longer answer, in which a place can be lost.

    tiles: of 4x4 digits, 16 visual tokens each.
    """

    def ask(tile: Tile, colour: str, place: tuple[int, ...]) -> Question:
        return Question(f"\nall of tile {place[0]}:", "".join(tile.row(row) for row in range(CELLS)))

    return one_picture(rng, tiles, questions, split, [(number,) for number in range(tiles)], ask)
