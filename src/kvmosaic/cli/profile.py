"""kvmosaic profile"""

import itertools
from pathlib import Path
from typing import Annotated

import typer

from kvmosaic.cli.output import Device, Dtype, Json, open_quietly, progress, show
from kvmosaic.evals import profile as profiles
from kvmosaic.evals import suite
from kvmosaic.selection import SCORERS, scorer_of
from kvmosaic.selection.layers import Profiled

NOTE = "share of its tokens that a layer keeps when the mean over layers is 5, 10, 20 and 50 %"


def profile(
    model: Annotated[str, typer.Option(help="mosaic-lm, mosaic-vlm, a folder, or a name on the hub.")],
    data: Annotated[str, typer.Option(help='A JSONL file of prompts, or a generated task as "lines lines=100".')],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The result, for xkv(profile=FILE).")],
    scorer: Annotated[str, typer.Option(help=f"What scores tokens: {', '.join(SCORERS)}.")] = "snapkv_mean",
    prompts: Annotated[int, typer.Option(min=1, help="At most this many.")] = 10,
    seed: Annotated[int, typer.Option(help="Of a generated task.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    json_file: Json = None,
) -> None:
    """Measures how much each layer loses with fewer tokens, for budgets that differ between layers (xkv)."""
    scorer_of(scorer)  # refuses an unknown one before a model is loaded
    tasks = suite.parse(data)
    if len(tasks) != 1 or not isinstance(tasks[0], suite.Questions):
        raise ValueError(f"--data takes one task with questions, or one JSONL file, got {data!r}")
    opened = open_quietly(model, dtype, device)
    examples = list(itertools.islice(tasks[0].examples(seed), prompts))
    with progress() as bar:
        task = bar.add_task("prompts", total=len(examples))
        made = profiles.profile(opened, scorer, examples, tick=lambda: bar.advance(task))
    made.save(out)
    budgets, layers = Profiled(made.tensors["gains"]), len(made.tensors["gains"])
    rows = [
        {"layer": layer} | {f"keep_{keep:.2f}": budgets.share(keep, layer, layers) for keep in (0.05, 0.1, 0.2, 0.5)}
        for layer in range(layers)
    ]
    show(rows, f"xkv for {model}, {out}", json_file, NOTE)
