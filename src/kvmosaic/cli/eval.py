"""kvmosaic eval"""

from typing import Annotated

import typer

from kvmosaic import methods as registry
from kvmosaic.cli.output import Device, Dtype, Json, open_quietly, progress, show
from kvmosaic.evals import harness, suite, tasks
from kvmosaic.evals.suite import Perplexity

NOTE = (
    "score: share of answers that are right as a whole, or perplexity; low, high: 95 % interval; symbols: share of right "
    "words (digits, in pictures); sizes: the whole cache; time: steps of the answers, questions of one length together"
)


def evaluate(
    model: Annotated[str, typer.Option(help="mosaic-lm, mosaic-vlm, a folder, or a name on the hub.")],
    tasks: Annotated[
        str,
        typer.Option(
            help=f'Divided by ";": a name and options ("lines lines=100"), "perplexity tokens=1024 chunk=16 texts=4", or '
            f"a .jsonl file of prompt, answer and perhaps image. Names: {', '.join(tasks.NAMES)}."
        ),
    ],
    methods: Annotated[str, typer.Option(help='Divided by ";", e.g. "exact; kivi bits=2".')] = "exact; kivi bits=2",
    seeds: Annotated[str, typer.Option(help="Divided by commas; each draws its own examples.")] = "0",
    limit: Annotated[int, typer.Option(min=1, help="Examples (or texts) a seed; each has some questions.")] = 10,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    json_file: Json = None,
) -> None:
    """Scores of methods on tasks, by free generation through the compressed cache, with what they save."""
    asked = suite.parse(tasks)
    recipes = [registry.parse(each) for each in methods.split(";") if each.strip()]
    numbers = _numbers(seeds)
    opened = open_quietly(model, dtype, device)
    rows = []
    steps = sum(len(task.texts[:limit]) if isinstance(task, Perplexity) else limit * len(numbers) for task in asked)
    with progress() as bar:
        total = bar.add_task(model, total=steps * len(recipes))
        for task in asked:
            for recipe in recipes:
                bar.update(total, description=f"{task.label}: {recipe.name}")
                row = harness.score(opened, recipe, task, seeds=numbers, limit=limit, tick=lambda: bar.advance(total))
                rows.append(row)
    show(
        rows, f"{model}, {opened.model.dtype}".replace("torch.", ""), json_file, NOTE, hide=["learned_bytes_per_token"]
    )


def _numbers(text: str) -> list[int]:
    try:
        return [int(each) for each in text.split(",")]
    except ValueError:
        raise ValueError(f"seeds are whole numbers divided by commas, got {text!r}") from None
