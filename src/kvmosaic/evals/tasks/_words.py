"""The made-up words that the text tasks are written with, and the checks that they share."""

import random

_SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnprstvz" for vowel in "aeiou"]


def _words() -> tuple[str, ...]:
    rng = random.Random(0)  # the bundled models were trained on these very words
    return tuple(sorted({"".join(rng.choice(_SYLLABLES) for _ in range(rng.choice((2, 3)))) for _ in range(600)}))


WORDS = _words()


def digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(count))


def check_range(name: str, value: int, low: int, high: int, why: str) -> None:
    """Raises ValueError unless low <= value <= high."""
    if not low <= value <= high:
        raise ValueError(f"{name} must be {low} to {high} ({why}), got {value}.")
