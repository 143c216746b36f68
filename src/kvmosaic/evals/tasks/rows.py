"""Reading rows of handwritten digits."""

import itertools
import random

from kvmosaic.evals.example import Example, Question
from kvmosaic.evals.tasks._digits import one_picture
from kvmosaic.evals.tasks._tiles import CELLS, Split, Tile


def rows(rng: random.Random, *, tiles: int = 16, questions: int = 4, split: Split = "held_out") -> Example:
    """Measures reading four neighbouring digits out of a large picture, at a place that the question names.

    tiles: of 4x4 digits, 16 visual tokens each.
    """

    def ask(tile: Tile, colour: str, place: tuple[int, ...]) -> Question:
        number, row = place
        return Question(f"\nrow {row} of tile {number}:", tile.row(row))

    return one_picture(rng, tiles, questions, split, list(itertools.product(range(tiles), range(CELLS))), ask)
