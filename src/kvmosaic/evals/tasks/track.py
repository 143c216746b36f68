"""Variable tracking."""

import random

from kvmosaic.evals.example import Example, Question
from kvmosaic.evals.tasks._words import WORDS, check_range, digits


def track(rng: random.Random, *, assignments: int = 60, questions: int = 4, copies: float = 0.6) -> Example:
    """Measures whether a value is followed through assignments of variables to one another.

    assignments: how many; about 9 tokens each.
    copies: the share of assignments that copy another variable instead of naming a number.
    """
    check_range("assignments", assignments, 1, 10_000, "at least one variable")
    text = ["Variables.\n"]
    values: dict[str, str] = {}
    for _ in range(assignments):
        name = rng.choice(WORDS)
        if values and rng.random() < copies:
            source = rng.choice(list(values))
            values[name] = values[source]
        else:
            source = values[name] = digits(rng, 3)
        text.append(f"set {name} = {source}\n")
    asked = rng.sample(list(values), min(questions, len(values)))
    return Example("".join(text), tuple(Question(f"get {name}:", f" {values[name]}\n") for name in asked))
