"""Several pictures in one prompt."""

import itertools
import random

from kvmosaic.evals.example import PICTURE, Example, Question
from kvmosaic.evals.tasks._ask import Ask, check_ask
from kvmosaic.evals.tasks._tiles import CELLS, COLOURS, Split, cells, digit_tile, picture
from kvmosaic.evals.tasks._words import check_range


def pictures(
    rng: random.Random,
    *,
    pictures: int = 4,
    tiles: int = 4,
    questions: int = 4,
    ask: Ask = "read",
    split: Split = "held_out",
) -> Example:
    """Measures whether several pictures are kept apart: a row of one of them, or which one has a colour.

    pictures: each in one colour of its own. tiles: of 4x4 digits in each picture, 16 visual tokens each. They are
        numbered through all pictures: tile 5 is the second one of picture 1, if each has four.
    ask: "read" for rows by the tile's number, "which" for the picture of a colour.
    """
    check_range("pictures", pictures, 1, len(COLOURS), "each has a colour of its own")
    check_range("tiles", tiles, 1, 1024, "tiles in a picture")
    colours = rng.sample(list(COLOURS), pictures)
    drawn = [[digit_tile(rng, colour, split) for _ in range(tiles)] for colour in colours]
    if check_ask(ask) == "which":
        possible = [Question(f"\npicture in {colour}:", f" {number}") for number, colour in enumerate(colours)]
    else:
        possible = [
            Question(f"\nrow {row} of tile {number}:", drawn[number // tiles][number % tiles].row(row))
            for number, row in itertools.product(range(pictures * tiles), range(CELLS))
        ]
    return Example(
        context="".join(f"picture {number} {PICTURE}" for number in range(pictures)),
        questions=tuple(rng.sample(possible, min(questions, len(possible)))),
        images=tuple(picture(rng, tiles_) for tiles_ in drawn),
        cells=tuple(cell for tiles_ in drawn for cell in cells(tiles_)),
    )
