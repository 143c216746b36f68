"""kvmosaic demo"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape

from kvmosaic import demo as tour
from kvmosaic.cli.output import Dtype, Json, console, open_quietly, progress, show, text, whole_file

NOTE = (
    "bytes are resident ones of the whole cache; time is of one token, one sequence, one thread. mosaic-vlm reads handwriting that it "
    "was never shown. calibquant with clips of 1 and calibrated=False is plain 1-bit quantization"
)


def demo(
    picture: Annotated[Path, typer.Option(metavar="FILE", help="Where the table is drawn (PNG).")] = Path("demo.png"),
    seed: Annotated[int, typer.Option(help="Of the picture and the records.")] = 0,
    dtype: Dtype = "auto",
    json_file: Json = None,
) -> None:
    """Two bundled models answer behind exact and compressed caches; prints what each costs and draws it."""
    torch.set_num_threads(1)  # the models are small, and threads that wait for one another on a busy machine are slow
    scenes = tour.scenes(seed)
    rows = []
    with progress() as bar:
        task = bar.add_task("demo", total=sum(len(scene.recipes) for scene in scenes))
        for scene in scenes:
            opened = open_quietly(scene.model, dtype)
            for row in tour.run(scene, opened, lambda recipe: bar.update(task, description=recipe)):
                rows.append(row)
                bar.advance(task)
    with whole_file(picture) as part:
        tour.draw(part, scenes[0], rows, text)
    if json_file is not None:
        show(rows, "", json_file)
    if json_file == "-":
        return
    for scene in scenes:
        (question,) = scene.example.questions
        asked, right = question.prompt.strip(), question.answer.strip()
        title = f"{scene.model} before {scene.title}: asked {asked!r}, right is {right!r}"
        own = [row for row in rows if row["model"] == scene.model]
        show(own, title, None, hide=("model", "tokens"))
    console.print(f"[dim]{NOTE}. Drawn: {escape(str(picture))}[/]", highlight=False)
