"""Copying."""

import random

from kvmosaic.evals.example import Example, Question
from kvmosaic.evals.tasks._words import WORDS, check_range


def copy(rng: random.Random, *, words: int = 50) -> Example:
    """Measures whether a text is repeated word for word.

    words: how many; about 2.6 tokens each, and as many in the answer.
    """
    check_range("words", words, 1, 100_000, "something to copy")
    text = " ".join(rng.choice(WORDS) for _ in range(words))
    return Example(f"Copy.\n{text}\n", (Question("Again:", f" {text}\n"),))
