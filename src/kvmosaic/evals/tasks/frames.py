"""Short sequences of frames."""

import itertools
import random

from kvmosaic.evals.example import PICTURE, Example, Question
from kvmosaic.evals.tasks._ask import Ask, check_ask
from kvmosaic.evals.tasks._tiles import CELLS, COLOURS, Split, cells, picture, single_digit_tile
from kvmosaic.evals.tasks._words import check_range


def frames(
    rng: random.Random, *, frames: int = 16, questions: int = 4, ask: Ask = "read", split: Split = "held_out"
) -> Example:
    """Measures whether moments are kept apart: which digit a frame showed, or in which frame a digit was seen.

    frames: of one tile, 16 visual tokens each. One digit walks over the 4x4 cells, a step a frame, and changes its
        value or colour on the way, so that no two frames show the same one.
    ask: "read" for the digit by the frame's number, "which" for the frame by colour and digit.
    """
    looks = list(itertools.product(COLOURS, range(10)))
    check_range("frames", frames, 1, len(looks), "each frame shows a digit and a colour of its own")
    shown = rng.sample(looks, frames)
    places = [(rng.randrange(CELLS), rng.randrange(CELLS))]
    for _ in range(frames - 1):
        row, column = places[-1]
        steps = [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
        places.append(rng.choice([step for step in steps if min(step) >= 0 and max(step) < CELLS]))
    drawn = [
        single_digit_tile(rng, colour, digit, CELLS * row + column, split)
        for (colour, digit), (row, column) in zip(shown, places, strict=True)
    ]
    if check_ask(ask) == "which":
        possible = [Question(f"\nframe with {look[0]} {look[1]}:", f" {frame}") for frame, look in enumerate(shown)]
    else:
        possible = [Question(f"\ndigit in frame {frame}:", f" {digit}") for frame, (_, digit) in enumerate(shown)]
    return Example(
        context="".join(f"frame {number} {PICTURE}" for number in range(frames)),
        questions=tuple(rng.sample(possible, min(questions, frames))),
        images=tuple(picture(rng, [tile]) for tile in drawn),
        cells=cells(drawn),
    )
