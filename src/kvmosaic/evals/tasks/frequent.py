"""The most frequent word."""

import random

from kvmosaic.evals.example import Example, Question
from kvmosaic.evals.tasks._words import WORDS, check_range


def frequent(rng: random.Random, *, words: int = 60, distinct: int = 8, lead: int = 4) -> Example:
    """Measures whether a property of the whole text is seen, not of one place: its most frequent word.

    words: how many in all; about 2.6 tokens each.
    distinct: how many different ones.
    lead: how many times more than any other the answer occurs.
    """
    check_range("distinct", distinct, 2, len(WORDS), "there are so many words")
    others = distinct - 1
    rest = (words - lead) // distinct  # occurrences of each other word; the answer takes what is left over
    check_range("words", words, lead + distinct, 100_000, "every word occurs, and the answer `lead` times more")
    answer, *other = rng.sample(WORDS, distinct)
    text = [answer] * (words - others * rest) + other * rest
    rng.shuffle(text)
    return Example("Words.\n" + " ".join(text) + "\n", (Question("most frequent:", f" {answer}\n"),))
