"""Reading single handwritten digits."""

import itertools
import random

from kvmosaic.evals.example import Example, Question
from kvmosaic.evals.tasks._digits import one_picture
from kvmosaic.evals.tasks._tiles import CELLS, Split, Tile


def cells(rng: random.Random, *, tiles: int = 16, questions: int = 4, split: Split = "held_out") -> Example:
    """Measures reading one digit out of a large picture: the hardest place to find, the shortest answer.

    tiles: of 4x4 digits, 16 visual tokens each.
    """

    def ask(tile: Tile, colour: str, place: tuple[int, ...]) -> Question:
        number, row, column = place
        return Question(f"\ncell {row} {column} of tile {number}:", f" {tile.cells[CELLS * row + column]}")

    places = list(itertools.product(range(tiles), range(CELLS), range(CELLS)))
    return one_picture(rng, tiles, questions, split, places, ask)
