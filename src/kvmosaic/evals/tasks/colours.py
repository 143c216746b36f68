"""Naming the colours of tiles."""

import random

from kvmosaic.evals.example import Example, Question
from kvmosaic.evals.tasks._digits import one_picture
from kvmosaic.evals.tasks._tiles import Split, Tile


def colours(rng: random.Random, *, tiles: int = 16, questions: int = 4, split: Split = "held_out") -> Example:
    """Measures a coarse property that many visual tokens agree on: the colour of a tile.

    tiles: of 4x4 digits in one of six colours, 16 visual tokens each.
    """

    def ask(tile: Tile, colour: str, place: tuple[int, ...]) -> Question:
        return Question(f"\ncolour of tile {place[0]}:", f" {colour}")

    return one_picture(rng, tiles, questions, split, [(number,) for number in range(tiles)], ask)
