"""Counting a digit in a tile."""

import itertools
import random

from kvmosaic.evals.example import Example, Question
from kvmosaic.evals.tasks._digits import one_picture
from kvmosaic.evals.tasks._tiles import Split, Tile


def count(rng: random.Random, *, tiles: int = 4, questions: int = 4, split: Split = "held_out") -> Example:
    """Measures an answer that no single visual token holds: how often a digit occurs in a tile.

    tiles: of 4x4 digits, 16 visual tokens each.
    """

    def ask(tile: Tile, colour: str, place: tuple[int, ...]) -> Question:
        number, digit = place
        return Question(f"\ncount of {digit} in tile {number}:", f" {tile.cells.count(str(digit))}")

    return one_picture(rng, tiles, questions, split, list(itertools.product(range(tiles), range(10))), ask)
