"""Tasks as they are written on the command line: `"lines lines=100; rows tiles=16; perplexity; mine.jsonl"`."""

import functools
import importlib.util
import inspect
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmosaic.errors import BadPicture
from kvmosaic.evals import tasks
from kvmosaic.evals.example import PICTURE, Example, Question
from kvmosaic.options import option

SOURCES = ("textwrap", "shlex", "heapq", "calendar", "string", "sched", "bisect", "queue")
"""Modules of the standard library (PSF licence) that perplexity is measured on; no bundled model was trained on them."""


@dataclass(frozen=True)
class Questions:
    """A task that is scored by its answers.

    examples: from a seed. chat: contexts are a user's words, for the model's chat template.
    """

    label: str
    examples: Callable[[int], Iterator[Example]]
    chat: bool = False


@dataclass(frozen=True)
class Perplexity:
    """A task that is scored by how well text is predicted through the compressed cache.

    tokens: of each text. chunk: how many enter at a time; what stands before the chunk is read from the cache.
    """

    label: str
    texts: tuple[str, ...]
    tokens: int
    chunk: int


Task = Questions | Perplexity


def parse(text: str) -> list[Task]:
    """Tasks divided by semicolons, each a name and options, or a JSONL file.

    Raises ValueError for an unknown task or option (with the nearest name), a bad option, or a bad JSONL file.
    """
    parts = [part.strip() for part in text.split(";") if part.strip()]
    if not parts:
        raise ValueError(f"no task in {text!r}. Write for example 'lines lines=100; perplexity'")
    return [_task(part) for part in parts]


def _task(label: str) -> Task:
    name, *words = label.split()
    if name.endswith(".jsonl"):
        if words:
            raise ValueError(f"a JSONL task has no options, got {' '.join(words)!r}")
        examples = read_jsonl(Path(name))
        return Questions(label, lambda seed: iter(examples), chat=True)
    if name == "perplexity":
        return perplexity(label, **dict(option(name, ("tokens", "chunk", "texts", "file"), word) for word in words))
    if name not in tasks.NAMES:
        tasks.generator(name)  # raises with the nearest name
    generate = tasks.generator(name)
    known = [key for key in inspect.signature(generate).parameters if key != "rng"]
    options = dict(option(name, known, word) for word in words)
    generate(random.Random(0), **options)  # refuses impossible options now
    return Questions(label, functools.partial(_endless, generate, options))


def _endless(generate: Callable[..., Example], options: dict[str, Any], seed: int) -> Iterator[Example]:
    rng = random.Random(seed)
    while True:
        yield generate(rng, **options)


def perplexity(
    label: str, *, tokens: int = 1024, chunk: int = 16, texts: int = 4, file: str | None = None
) -> Perplexity:
    """texts: how many modules of the standard library; file: a text of one's own instead."""
    if tokens < 2 or chunk < 1 or texts < 1:
        raise ValueError(
            f"perplexity needs tokens of 2 and chunk and texts of 1 at least, got {tokens}, {chunk}, {texts}"
        )
    if file is not None:
        return Perplexity(label, (Path(file).read_text(),), tokens, chunk)
    origins = (importlib.util.find_spec(name) for name in SOURCES[:texts])
    return Perplexity(label, tuple(Path(str(spec.origin)).read_text() for spec in origins if spec), tokens, chunk)


def read_jsonl(path: Path) -> tuple[Example, ...]:
    """One example a line: {"prompt": ..., "answer": ..., "image": FILE or [FILE, ...]}; image is optional, and a file's
    name is relative to the JSONL's folder. The prompt may say where pictures go with "<image>"; else they come first.

    Raises ValueError or BadPicture, with the line, for what is not that.
    """
    from kvmosaic.loading import open_picture  # loading a model needs examples, too

    examples = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, answer, image = str(row["prompt"]), str(row["answer"]), row.get("image", [])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{path}, line {number}: each line is an object with "prompt" and "answer", and perhaps "image" ({error})'
            ) from error
        if not answer.strip():
            raise ValueError(f"{path}, line {number}: the answer is empty")
        files = [image] if isinstance(image, str) else image
        pictures = tuple(open_picture(path.parent / file) for file in files)
        if prompt.count(PICTURE) not in (0, len(pictures)):
            raise BadPicture(
                f"{path}, line {number}: {prompt.count(PICTURE)} {PICTURE} markers for {len(pictures)} pictures"
            )
        examples.append(Example(prompt, (Question("", answer),), pictures))
    if not examples:
        raise ValueError(f"{path} has no lines")
    return tuple(examples)
