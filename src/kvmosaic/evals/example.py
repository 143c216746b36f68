"""What a task generator returns: a context, its pictures, and questions that can each be asked as a later turn."""

from dataclasses import dataclass

from PIL import Image

PICTURE = "<image>"
"""Stands in a context where one picture goes."""


@dataclass(frozen=True)
class Question:
    """`answer` is the exact text that follows `prompt`, up to the end-of-sequence token that closes a turn."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Example:
    """A context and what can be asked about it.

    The questions are meant to be asked one at a time, each on a copy of the cache that the context left: asked together
    with the context, the prefill would still see the exact keys and values.

    images: one picture for each "<image>" in `context`, in order.
    cells: what each 16x16-pixel cell of the pictures shows (a digit, a shape, or "" for nothing), picture after picture,
        tile after tile, row by row: one entry for each visual token of the bundled model. Never shown to a model.
    """

    context: str
    questions: tuple[Question, ...]
    images: tuple[Image.Image, ...] = ()
    cells: tuple[str, ...] = ()
