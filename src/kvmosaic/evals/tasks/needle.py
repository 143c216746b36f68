"""Needles in text."""

import random

from kvmosaic.evals.example import Example, Question
from kvmosaic.evals.tasks._words import WORDS, check_range, digits


def needle(rng: random.Random, *, sentences: int = 100, needles: int = 4, questions: int = 4) -> Example:
    """Measures whether a short fact is found that stands somewhere in text about other things.

    sentences: of filler, 4 to 8 made-up words each; about 17 tokens a sentence.
    needles: facts, each on a name of its own, at random places.
    """
    check_range("needles", needles, 1, len(WORDS), "each has a name of its own")
    text = [" ".join(rng.choice(WORDS) for _ in range(rng.randint(4, 8))) + ".\n" for _ in range(sentences)]
    codes = {name: digits(rng, 5) for name in rng.sample(WORDS, needles)}
    for name, code in codes.items():
        text.insert(rng.randint(0, len(text)), f"The code of {name} is {code}.\n")
    return Example(
        context="Text.\n" + "".join(text),
        questions=tuple(
            Question(f"code of {name}:", f" {codes[name]}\n")
            for name in rng.sample(list(codes), min(questions, needles))
        ),
    )
