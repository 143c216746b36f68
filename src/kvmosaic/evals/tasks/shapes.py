"""Naming coloured shapes."""

import itertools
import random

from kvmosaic.evals.example import PICTURE, Example, Question
from kvmosaic.evals.tasks._tiles import CELLS, COLOURS, SHAPES, picture, shape_tile
from kvmosaic.evals.tasks._tiles import cells as cells_of
from kvmosaic.evals.tasks._words import check_range


def shapes(rng: random.Random, *, tiles: int = 16, questions: int = 4) -> Example:
    """Measures reading two properties of one visual token, colour and shape, at a place that the question names.

    tiles: of 4x4 coloured shapes, 16 visual tokens each.
    """
    check_range("tiles", tiles, 1, 1024, "tiles in the picture")
    shown = [[(rng.choice(list(COLOURS)), rng.choice(SHAPES)) for _ in range(CELLS * CELLS)] for _ in range(tiles)]
    drawn = [shape_tile(rng, cells) for cells in shown]
    places = list(itertools.product(range(tiles), range(CELLS), range(CELLS)))
    asked = rng.sample(places, min(questions, len(places)))
    return Example(
        context=PICTURE,
        questions=tuple(
            Question(f"\nshape {row} {column} of tile {number}:", " {} {}".format(*shown[number][CELLS * row + column]))
            for number, row, column in asked
        ),
        images=(picture(rng, drawn),),
        cells=cells_of(drawn),
    )
