"""kvmosaic calibrate"""

from pathlib import Path
from typing import Annotated, Any

import typer

from kvmosaic import bundled
from kvmosaic.cli.output import Device, Dtype, Json, open_quietly, progress, show
from kvmosaic.evals import calibrate as search
from kvmosaic.loading import open_picture
from kvmosaic.options import option

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
NOTE = "divergence: of the next token's distribution from the exact cache's, in nats; clips and high: means over layers"


def calibrate(
    model: Annotated[str, typer.Option(help="mosaic-vlm, a folder, or a name on the hub.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The result, for calibquant(calibration=FILE).")],
    method: Annotated[str, typer.Option(help='"calibquant bits=1", or key_bits and value_bits.')] = "calibquant bits=1",
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Pictures; for mosaic-vlm generated ones if left out.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What is asked about each picture of DIR; a description if left out.")
    ] = None,
    pictures: Annotated[int, typer.Option(min=2, help="At most this many; two thirds are searched on.")] = 6,
    tokens: Annotated[int, typer.Option(min=2, help="Of the model's reply about each picture of DIR.")] = 64,
    per_layer: Annotated[
        bool, typer.Option("--per-layer/--whole-model", help="Move each layer's setting, too.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of generated pictures.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    json_file: Json = None,
) -> None:
    """Searches what a method can learn for a model, and writes it to a small file."""
    key_bits, value_bits = _bits(method)
    files = None if images is None else _files(images)[:pictures]
    if files is None and model != "mosaic-vlm":
        raise ValueError(f"{model} has no generated pictures: give a folder of its kind of pictures with --images")
    opened = open_quietly(model, dtype, device)
    if not opened.takes_pictures:
        raise ValueError(f"{model} takes no pictures, and calibquant is about their tokens. Use kivi for text")
    with progress() as bar:
        if files is None:
            examples = search.generated(pictures, seed)
        else:
            asked = prompt or ("\nall of tile 0:" if model in bundled.NAMES else "Describe the picture in detail.")
            opened_files = [open_picture(file) for file in files]
            described = search.described(opened, opened_files, asked, tokens)
            examples = list(bar.track(described, total=len(files), description="replies"))
        parts = search.samples(opened, examples)
        task = bar.add_task("search", total=None)
        found = list(
            search.search(
                opened,
                parts,
                key_bits,
                value_bits,
                per_layer=per_layer,
                tick=lambda stage: bar.update(task, advance=1, description=stage),
            )
        )
    search.result(opened, found[-1], examples).save(out)
    show([_row(each) for each in found], f"calibquant for {model}, {out}", json_file, NOTE)


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


def _bits(method: str) -> tuple[int, int]:
    name, *words = method.split() or [""]
    if name != "calibquant":
        raise ValueError(f"{name or 'no method'} learns nothing from data; calibquant does")
    options = dict(option(f"calibrate --method {name}", ("bits", "key_bits", "value_bits"), word) for word in words)
    bits = options.get("bits", 1)
    return options.get("key_bits", bits), options.get("value_bits", bits)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"--images takes a folder of pictures, and {folder} is none")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if len(files) < 2:
        raise ValueError(f"{folder} has {len(files)} pictures ({', '.join(SUFFIXES)}); calibration needs 2 at least")
    return files
