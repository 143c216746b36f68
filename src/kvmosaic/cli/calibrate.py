"""kvmosaic calibrate"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from kvmosaic import bundled
from kvmosaic.cli.output import Device, Dtype, Json, open_quietly, progress, show
from kvmosaic.evals import calibrate as search
from kvmosaic.evals import learn as learning
from kvmosaic.evals.example import Example
from kvmosaic.loading import Opened, open_picture
from kvmosaic.options import option

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SEARCH_NOTE = (
    "divergence: of the next token's distribution from the exact cache's, in nats; clips and high: means over layers"
)


def calibrate(
    model: Annotated[str, typer.Option(help="mosaic-lm, mosaic-vlm, a folder, or a name on the hub.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The result, for METHOD(calibration=FILE).")],
    method: Annotated[
        str, typer.Option(help='With the options to learn for, e.g. "cq coupled=8 bits=8" or "calibquant bits=1".')
    ] = "calibquant bits=1",
    data: Annotated[
        str | None,
        typer.Option(
            help="Divided by \";\": text files, JSONL files of prompts and answers, generated tasks as 'lines lines=100'."
        ),
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Passages of each text, examples of each task.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a passage of a text.")] = 2048,
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Pictures; for calibquant and mosaic-vlm generated if left out.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What is asked about each picture of DIR; a description if left out.")
    ] = None,
    pictures: Annotated[int, typer.Option(min=2, help="At most this many; calibquant searches on two thirds.")] = 6,
    tokens: Annotated[int, typer.Option(min=2, help="Of the model's reply about each picture of DIR.")] = 64,
    per_layer: Annotated[
        bool, typer.Option("--per-layer/--whole-model", help="calibquant: move each layer's setting, too.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of places in a text, and of generated examples and pictures.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    json_file: Json = None,
) -> None:
    """Learns from text or pictures what a method needs for a model, and writes it to one file."""
    name, *words = method.split() or [""]
    searched = name == "calibquant"
    options = _bits(words) if searched else learning.settings(method)[1]
    if searched and data is not None:
        raise ValueError("calibquant is about the tokens of pictures: give --images instead of --data")
    if not searched and (data is None) == (images is None):
        raise ValueError(f"{name} learns from --data (a text or a task) or from --images: give one of the two")
    if searched and images is None and model != "mosaic-vlm":
        raise ValueError(f"{model} has no generated pictures: give a folder of its kind of pictures with --images")
    files = None if images is None else _files(images)[:pictures]
    opened = open_quietly(model, dtype, device)
    if data is None and not opened.takes_pictures:
        raise ValueError(
            f"{model} takes no pictures, and {name} is to learn from them. Give text with --data or use kivi"
        )
    parts = [] if data is None else learning.passages(opened, data, sequences, length, seed)
    with progress() as bar:
        examples: list[Example] = []
        if files is not None:
            asked = prompt or ("\nall of tile 0:" if model in bundled.NAMES else "Describe the picture in detail.")
            described = search.described(opened, [open_picture(file) for file in files], asked, tokens)
            examples = list(bar.track(described, total=len(files), description="replies"))
        if searched:
            rows = _search(bar, opened, examples or search.generated(pictures, seed), options, per_layer, out)
        else:
            parts = parts or [learning.passage(opened, each) for each in examples]
            rows = _learn(bar, opened, name, options, parts, out)
    show(rows, f"{name} for {model}, {out}", json_file, SEARCH_NOTE if searched else "")


def _learn(
    bar: Progress, opened: Opened, name: str, options: dict[str, Any], parts: Sequence[learning.Passage], out: Path
) -> list[dict[str, Any]]:
    tasks = {stage: bar.add_task(stage, total=None) for stage in ("passages", "layers")}
    found, before = learning.learn(
        opened, name, options, parts, out, lambda stage, total: bar.update(tasks[stage], total=total, advance=1)
    )
    tokens = sum(part.counted.shape[1] for part in parts)
    return [
        {
            "layer": layer,
            "tokens": tokens,
            "learned_bytes": sum(tensor.nbytes for tensor in tensors.values()),
            "from": "an earlier run" if layer in before else "this run",
        }
        for layer, tensors in sorted(found.by_layer().items())
    ]


def _search(
    bar: Progress,
    opened: Opened,
    examples: Sequence[Example],
    options: dict[str, Any],
    per_layer: bool,
    out: Path,
) -> list[dict[str, Any]]:
    task = bar.add_task("search", total=None)
    found = list(
        search.search(
            opened,
            search.samples(opened, examples),
            **options,
            per_layer=per_layer,
            tick=lambda stage: bar.update(task, advance=1, description=stage),
        )
    )
    search.result(opened, found[-1], examples).save(out)
    return [_row(each) for each in found]


def _row(found: search.Found) -> dict[str, Any]:
    means = {
        name: sum(getattr(each, name) for each in found.settings) / len(found.settings)
        for name in search.Setting._fields
    }
    return {
        "stage": found.stage,
        "key_bits": found.bits.keys,
        "value_bits": found.bits.values,
        "clip_about": found.bits.about,
        **means,
        "divergence_searched": found.searched,
        "divergence_held_out": found.held_out,
    }


def _bits(words: Sequence[str]) -> dict[str, Any]:
    options = dict(option("calibrate --method calibquant", ("bits", "key_bits", "value_bits"), word) for word in words)
    bits = options.get("bits", 1)
    return {"key_bits": options.get("key_bits", bits), "value_bits": options.get("value_bits", bits)}


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"--images takes a folder of pictures, and {folder} is none")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if len(files) < 2:
        raise ValueError(f"{folder} has {len(files)} pictures ({', '.join(SUFFIXES)}); calibration needs 2 at least")
    return files
