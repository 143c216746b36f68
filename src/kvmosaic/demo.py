"""The tour: two bundled models answer behind the exact cache and behind compressed ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmosaic import methods
from kvmosaic.evals import harness, tasks
from kvmosaic.evals.example import Example
from kvmosaic.evals.scores import symbols
from kvmosaic.loading import Opened

UNCALIBRATED = "calibquant bits=1 key_clip=1.0 value_clip=1.0 calibrated=False"
TEXT_RECIPES = ("exact", "kivi bits=4", "kivi bits=2", "mosaic bits=2")
PICTURE_RECIPES = (
    "exact",
    "calibquant bits=4",
    "calibquant bits=2",
    "calibquant bits=1",
    UNCALIBRATED,
    "kivi bits=4",
    "kivi bits=2",
    "calibquant bits=1 | kivi bits=2",
    "mosaic bits=2",
    "mosaic bits=1",
)


@dataclass(frozen=True)
class Scene:
    """One model before one context with one question."""

    model: str
    title: str
    example: Example
    recipes: tuple[str, ...]


def scenes(seed: int = 0) -> tuple[Scene, Scene]:
    """A picture of 256 handwritten digits that no model was trained on, and about 1,400 tokens of records."""
    picture = tasks.generator("transcribe")(random.Random(seed), tiles=16, questions=1)
    records = tasks.generator("lines")(random.Random(seed), lines=100, questions=1)
    return (
        Scene("mosaic-vlm", "256 handwritten digits", picture, PICTURE_RECIPES),
        Scene("mosaic-lm", "100 records", records, TEXT_RECIPES),
    )


def run(scene: Scene, opened: Opened, tick: Callable[[str], None] = lambda recipe: None) -> Iterator[dict[str, Any]]:
    """A row for each recipe: the answer and how many of its words are right, what the cache holds, a token's time."""
    (question,) = scene.example.questions
    for label in scene.recipes:
        tick(label)
        recipe = methods.parse(label)
        cache, _ = harness.prefill(opened, recipe, scene.example)
        clock = harness.Clock()
        length = opened.ids(question.answer).shape[1]
        (ids,), full = harness.answer(opened, cache, [opened.ids(question.prompt)], [length], clock)
        answer = opened.tokenizer.decode(ids)
        places = symbols(question.answer, answer)
        report = full.report()
        yield {
            "model": scene.model,
            "recipe": label,
            "answer": answer.strip(),
            "right": answer.strip() == question.answer.strip(),
            "places": f"{sum(places)} of {len(places)}",
            "tokens": report.tokens,
            "codes_bytes": report.codes,
            "scales_bytes": report.scales,
            "exact_bytes": report.exact,
            "metadata_bytes": report.metadata,
            "total_bytes": report.total,
            "compression": report.compression,
            "seconds_per_token": clock.columns()["seconds_per_token"],
        }


def draw(path: Path, scene: Scene, rows: list[dict[str, Any]], cells: Callable[[str, Any], str]) -> None:
    """A picture of the table: what was shown, and for each recipe a bar of what its bytes are. cells: value to text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = {"codes": "#2a6f97", "scales": "#61a5c2", "exact": "#e9c46a", "metadata": "#9a8c98"}
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(15, 0.62 * len(rows) + 1.8), width_ratios=(0.3, 1), layout="constrained"
    )
    left.imshow(scene.example.images[0], interpolation="nearest")
    (question,) = scene.example.questions
    left.set_title(f"asked: {question.prompt.strip()}\nright: {question.answer.strip()}", fontsize=9)
    left.axis("off")
    for place, row in enumerate(rows):
        share, begin = row["total_bytes"] * row["compression"], 0.0  # of the exact cache: 1
        for kind, colour in kinds.items():
            width = row[f"{kind}_bytes"] / share
            right.barh(place, width, left=begin, color=colour, label=kind if place == 0 else None)
            begin += width
        words = f"{cells('total_bytes', row['total_bytes'])}, {row['compression']:.1f}x, {cells('seconds_per_token', row['seconds_per_token'])}"
        mark = "right" if row["right"] else f"wrong, {row['places']} places right"
        right.text(begin + 0.01, place, f"{words} - {mark}: {row['answer']}", va="center", fontsize=8)
    names = [
        f"{row['model']}: {row['recipe']}".replace(UNCALIBRATED, "calibquant bits=1, uncalibrated") for row in rows
    ]
    right.set_yticks(range(len(rows)), names, fontsize=8)
    right.invert_yaxis()
    right.set_xlim(0, 2.1)
    right.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    right.set_xlabel("bytes resident, as a share of the exact cache", loc="left")
    right.legend(loc="lower right", fontsize=8)
    right.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
