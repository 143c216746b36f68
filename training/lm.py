"""Trains mosaic-lm further, from a checkpoint, for a number of seconds: `python training/lm.py --seconds 3000`.

Documents are drawn from the generators of `kvmosaic.evals.tasks`, with many questions each, and from the Python sources
of installed packages with permissive licences.
"""

import functools
import random
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import CONTENT, Batch, Loss, Turns, asked, encode, stacked, train, weighted_loss
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from kvmosaic.evals.example import Example
from kvmosaic.evals.tasks import generator

SOURCES = ("numpy", "scipy", "sklearn", "torch", "transformers", "matplotlib")  # BSD-3, Apache-2.0, PSF-like
# weight of an answer's tokens: few tokens that must be right weigh more than many that follow from one another
WEIGHTS = {"lines": 3.0, "needle": 3.0, "track": 3.0, "frequent": 10.0, "copy": 1.0, "arithmetic": 1.0, "text": 0.15}
SHARES = {
    "lines": 0.14,
    "needle": 0.07,
    "track": 0.34,
    "frequent": 0.08,
    "copy": 0.03,
    "arithmetic": 0.26,
    "text": 0.08,
}
NUMBERS = {task: number for number, task in enumerate(SHARES, start=1)}
LENGTHS = {512: 0.35, 1024: 0.35, 2048: 0.18, 4608: 0.12}  # tokens in a row: the share of batches


def document(rng: random.Random, task: str, tokens: int) -> Example:
    """One example of at most about `tokens` tokens; questions take a quarter of it."""
    size = tokens * rng.uniform(0.4, 1.0)
    questions = max(1, int(size / 60))
    options: dict[str, Any]
    if task == "lines":
        options = {"lines": max(2, min(300, int(size / 19))), "questions": questions, "words": rng.choice((1, 2, 2))}
    elif task == "needle":
        options = {"sentences": max(2, int(size / 24)), "needles": min(questions, 40), "questions": min(questions, 40)}
    elif task == "track":
        # every answer teaches: most variables are asked for, and chains are often longer than in the tests
        assignments = max(3, min(200, int(size / 14)))
        options = {
            "assignments": assignments,
            "questions": max(1, assignments // 2),
            "copies": rng.choice((0.6, 0.6, 0.8)),
        }
    elif task == "frequent":
        options = {"words": rng.randint(12, 60), "distinct": rng.randint(2, 8), "lead": rng.randint(2, 4)}
    elif task == "copy":
        options = {"words": max(3, min(150, int(size / 6)))}
    else:
        options = {"steps": max(1, min(24, int(size / 24 * rng.uniform(0.2, 1.0))))}
    return generator(task)(rng, **options)


@functools.cache
def sources(held_out: bool = False, limit: int = 20_000_000) -> tuple[str, ...]:
    """Python files of installed packages, shuffled, about `limit` characters of them.

    A fiftieth is held out, by name, so that no other version of a file is trained on elsewhere.
    """
    roots = [Path(spec.origin).parent for name in SOURCES if (spec := find_spec(name)) and spec.origin]
    files = {f"{root.name}/{file.relative_to(root)}": file for root in roots for file in root.rglob("*.py")}
    names = [name for name in sorted(files) if (zlib.crc32(name.encode()) % 50 == 0) == held_out]
    random.Random(1).shuffle(names)
    texts: list[str] = []
    size = 0
    for name in names:
        text = files[name].read_text(encoding="utf8", errors="ignore")
        if 500 < len(text) < 200_000:
            texts.append(text)
            size += len(text)
        if size > limit:
            break
    return tuple(texts)


def row(rng: random.Random, tokenizer: PreTrainedTokenizerBase, length: int) -> Turns:
    """Documents one after another until `length` tokens are full."""
    made = Turns([], [], [])
    while len(made.ids) < length:
        task = rng.choices(list(SHARES), list(SHARES.values()))[0]
        if task == "text":
            text = rng.choice(sources())
            start = rng.randrange(max(1, len(text) - 4 * length))
            [ids] = encode(tokenizer, [text[start : start + 4 * length]])
            new = [tokenizer.bos_token_id, *ids][: max(64, length // 2)]
            made += Turns.of(new, WEIGHTS[task], NUMBERS[task])
        else:
            example = document(rng, task, max(128, length - len(made.ids)))
            made += asked(tokenizer, example, example.context, (CONTENT, WEIGHTS[task]), NUMBERS[task])
    return made.fit(length, tokenizer.pad_token_id)


def draw(tokenizer: PreTrainedTokenizerBase, batch_tokens: int, seed: int) -> Batch:
    rng = random.Random(seed)
    length = rng.choices(list(LENGTHS), list(LENGTHS.values()))[0]
    return stacked([row(rng, tokenizer, length) for _ in range(max(1, batch_tokens // length))])


def loss(model: Any, batch: Batch) -> Loss:
    return weighted_loss(model(input_ids=batch.ids, use_cache=False).logits, batch)


if __name__ == "__main__":
    sources()  # read once, before the workers start
    train(
        __doc__,
        "mosaic-lm",
        AutoModelForCausalLM,
        draw,
        loss,
        list(NUMBERS),
        batch_tokens={"cpu": 8192, "cuda": 98304},
    )
