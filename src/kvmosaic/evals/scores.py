"""What is counted, and how sure it is."""

import math
from dataclasses import dataclass

Z = 1.96  # of a 95 % interval


@dataclass
class Share:
    """Right ones among all."""

    right: int = 0
    n: int = 0

    def add(self, right: bool) -> None:
        self.right += right
        self.n += 1

    @property
    def value(self) -> float:
        return self.right / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval, as if every one were independent."""
        if not self.n:
            return 0.0, 1.0
        centre = (self.value + Z**2 / (2 * self.n)) / (1 + Z**2 / self.n)
        half = Z / (1 + Z**2 / self.n) * math.sqrt(self.value * (1 - self.value) / self.n + Z**2 / (4 * self.n**2))
        return max(0.0, centre - half), min(1.0, centre + half)


def symbols(answer: str, written: str) -> list[bool]:
    """For each word (digit, for pictures) of the answer: does the same stand in its place?"""
    read = written.split()
    return [place < len(read) and read[place] == symbol for place, symbol in enumerate(answer.split())]
