"""Trains mosaic-lm further, from a checkpoint, for a number of seconds: `python training/lm.py --seconds 3000`.

Documents are drawn from the generators of `kvmosaic.evals.tasks`, with many questions each, and from the Python sources
of installed packages with permissive licences.
"""

import functools
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from common import CONTENT, Batch, train, turns, weighted_loss
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from kvmosaic.evals.example import Example
from kvmosaic.evals.tasks import generator

SOURCES = ("numpy", "scipy", "sklearn", "torch", "transformers", "matplotlib")  # BSD-3, Apache-2.0, PSF-like
TEXT_WEIGHT = 0.15
# weight of an answer's tokens: few tokens that must be right weigh more than many that follow from one another
WEIGHTS = {"lines": 3.0, "needle": 3.0, "track": 3.0, "frequent": 3.0, "copy": 1.0, "arithmetic": 1.0}
SHARES = {"lines": 0.2, "needle": 0.1, "track": 0.25, "frequent": 0.1, "copy": 0.05, "arithmetic": 0.2, "text": 0.1}
LENGTHS = {512: 0.5, 1024: 0.25, 2048: 0.15, 4096: 0.1}  # tokens in a row: the share of batches


def document(rng: random.Random, task: str, tokens: int) -> Example:
    """One example of at most about `tokens` tokens; questions take a quarter of it."""
    size = tokens * rng.uniform(0.4, 1.0)
    questions = max(1, int(size / 60))
    options: dict[str, int]
    if task == "lines":
        options = {"lines": max(2, min(280, int(size / 19))), "questions": questions, "words": rng.choice((1, 2, 2))}
    elif task == "needle":
        options = {"sentences": max(2, int(size / 24)), "needles": min(questions, 40), "questions": min(questions, 40)}
    elif task == "track":
        options = {"assignments": max(3, min(200, int(size / 12))), "questions": min(questions, 40)}
    elif task == "frequent":
        options = {"words": rng.randint(12, 60), "distinct": rng.randint(2, 8), "lead": rng.randint(2, 4)}
    elif task == "copy":
        options = {"words": max(3, min(150, int(size / 6)))}
    else:
        options = {"steps": max(1, min(24, int(size / 24 * rng.uniform(0.2, 1.0))))}
    return generator(task)(rng, **options)


@functools.cache
def sources(limit: int = 20_000_000) -> tuple[str, ...]:
    """Python files of installed packages, shuffled, about `limit` characters of them. The last 20 are held out."""
    roots = [Path(spec.origin).parent for name in SOURCES if (spec := find_spec(name)) and spec.origin]
    files = sorted(file for root in roots for file in root.rglob("*.py"))
    random.Random(1).shuffle(files)
    texts: list[str] = []
    size = 0
    for file in files:
        text = file.read_text(encoding="utf8", errors="ignore")
        if 500 < len(text) < 200_000:
            texts.append(text)
            size += len(text)
        if size > limit:
            break
    return tuple(texts)


def row(rng: random.Random, tokenizer: PreTrainedTokenizerBase, length: int) -> tuple[list[int], list[float]]:
    """Documents one after another until `length` tokens are full, and their weights."""
    ids: list[int] = []
    weights: list[float] = []
    while len(ids) < length:
        task = rng.choices(list(SHARES), list(SHARES.values()))[0]
        if task == "text":
            text = rng.choice(sources()[:-20])
            start = rng.randrange(max(1, len(text) - 4 * length))
            new = tokenizer(text[start : start + 4 * length]).input_ids[: max(64, length // 2)]
            ids += new
            weights += [TEXT_WEIGHT] * len(new)
            continue
        example = document(rng, task, length - len(ids) if length - len(ids) > 128 else 128)
        context = tokenizer(example.context).input_ids
        asked, asked_weights = turns(tokenizer, example.questions, WEIGHTS[task])
        ids += context + asked
        weights += [CONTENT] * len(context) + asked_weights
    return ids[:length], weights[:length]


def draw(tokenizer: PreTrainedTokenizerBase, batch_tokens: int, seed: int) -> Batch:
    rng = random.Random(seed)
    length = rng.choices(list(LENGTHS), list(LENGTHS.values()))[0]
    rows = [row(rng, tokenizer, length) for _ in range(max(1, batch_tokens // length))]
    return Batch(torch.tensor([ids for ids, _ in rows]), torch.tensor([weights for _, weights in rows]))


def loss(model: Any, batch: Batch) -> torch.Tensor:
    return weighted_loss(model(input_ids=batch.ids, use_cache=False).logits, batch)


if __name__ == "__main__":
    train(__doc__, "mosaic-lm", AutoModelForCausalLM, draw, loss, batch_tokens={"cpu": 8192, "cuda": 131072})
