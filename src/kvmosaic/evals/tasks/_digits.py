"""What the tasks on one picture of digits share: the picture, and questions that are all different."""

import random
from collections.abc import Callable, Sequence

from kvmosaic.evals.example import PICTURE, Example, Question
from kvmosaic.evals.tasks._tiles import COLOURS, Split, Tile, cells, digit_tile, picture
from kvmosaic.evals.tasks._words import check_range


def one_picture(
    rng: random.Random,
    tiles: int,
    questions: int,
    split: Split,
    places: Sequence[tuple[int, ...]],
    ask: Callable[[Tile, str, tuple[int, ...]], Question],
) -> Example:
    """A picture of `tiles` digit tiles of random colours, and `questions` about different places of it.

    places: what can be asked about; the first number is the tile's.
    ask: makes the question about a place from its tile and the tile's colour.
    """
    check_range("tiles", tiles, 1, 1024, "tiles in the picture")
    colours = [rng.choice(list(COLOURS)) for _ in range(tiles)]
    drawn = [digit_tile(rng, colour, split) for colour in colours]
    asked = rng.sample(places, min(questions, len(places)))
    return Example(
        context=PICTURE,
        questions=tuple(ask(drawn[place[0]], colours[place[0]], place) for place in asked),
        images=(picture(rng, drawn),),
        cells=cells(drawn),
    )
