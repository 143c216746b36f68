"""Key-value line retrieval."""

import random

from kvmosaic.evals.example import Example, Question
from kvmosaic.evals.tasks._words import WORDS, check_range, digits


def lines(rng: random.Random, *, lines: int = 100, questions: int = 4, words: int = 2, within: bool = False) -> Example:
    """Measures whether one line among many can be found by its key and read exactly.

    lines: how many; about 15 tokens each with two words in a key, 12 with one.
    words: in a key, 1 or 2. The first word is unique; the second repeats and distracts.
    within: one question, which ends the context, so that a selection sees it: the easier contest, and that of most papers.
    """
    check_range("lines", lines, 1, len(WORDS), "the first word of a key is unique")
    check_range("words", words, 1, 2, "words in a key")
    keys = rng.sample(WORDS, lines)
    if words == 2:
        keys = [f"{key} {rng.choice(WORDS)}" for key in keys]
    values = {key: digits(rng, 5) for key in keys}
    context = "Records.\n" + "".join(f"line {key}: {value}\n" for key, value in values.items())
    if within:
        key = rng.choice(keys)
        return Example(f"{context}ask {key}:", (Question("", f" {values[key]}\n"),))
    asked = rng.sample(keys, min(questions, lines))
    return Example(context, tuple(Question(f"ask {key}:", f" {values[key]}\n") for key in asked))
