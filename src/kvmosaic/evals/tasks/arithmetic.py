"""Arithmetic written out step by step."""

import random

from kvmosaic.evals.example import Example, Question
from kvmosaic.evals.tasks._words import check_range


def arithmetic(rng: random.Random, *, steps: int = 8) -> Example:
    """Measures a long answer in which every line builds on the one before: additions and subtractions modulo 1000.

    steps: how many; about 18 tokens of answer each, so one wrong token early spoils all that follows.
    """
    check_range("steps", steps, 1, 1000, "a chain has a step")
    value = rng.randrange(100)
    operations = [(rng.choice("+-"), rng.randrange(1, 100)) for _ in range(steps)]
    context = f"Compute modulo 1000: {value} " + " ".join(f"{sign} {number}" for sign, number in operations) + "\n"
    written = ""
    for step, (sign, number) in enumerate(operations, start=1):
        result = (value + number if sign == "+" else value - number) % 1000
        written += f"step {step}: {value} {sign} {number} = {result}\n"
        value = result
    prompt = "step 1:"
    return Example(context, (Question(prompt, written.removeprefix(prompt) + f"result {value}\n"),))
