"""kvmosaic plan"""

import re
from typing import Annotated

import typer

from kvmosaic import methods as registry
from kvmosaic import plan as planning
from kvmosaic.cli.output import Json, show
from kvmosaic.report import size

UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def plan(
    model: Annotated[
        str, typer.Option(help=f"A shipped config ({', '.join(planning.names())}), a config.json or a folder.")
    ],
    method: Annotated[
        str, typer.Option(help='One or more, divided by ";"; the exact cache is always shown.')
    ] = "kivi bits=4; kivi bits=2",
    context: Annotated[int, typer.Option(min=1, help="Tokens of a sequence, visual ones included.")] = 32768,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    visual_tokens: Annotated[int, typer.Option(min=0, help="How many of the context's tokens are visual.")] = 0,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Of the device, e.g. 80GB or 24GiB.")] = None,
    weights_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of the model's weights; else its parameters in bfloat16.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Bytes per token, the largest batch and the longest context, from a config alone: nothing is loaded."""
    recipes = [registry.parse(each) for each in ("exact", *method.split(";")) if each.strip()]
    config = planning.load_config(model)
    shape = planning.Shape.of(config)
    room = None if memory is None else read_size(memory)
    weights = read_size(weights_bytes) if weights_bytes else 2 * planning.count_parameters(config)
    rows = [
        planning.row(shape, each, context=context, batch=batch, visual=visual_tokens, memory=room, weights=weights)
        for each in dict.fromkeys(recipes)
    ]
    note = (
        f"exact numbers in 16 bits; weights {size(weights)}; activations and the buffers' growth (at most a sixteenth) not "
        "counted"
    )
    if any(each.visual is not None for each in recipes) and not visual_tokens:
        note += "; no token is visual: give --visual-tokens"
    if shape.context:
        note += f"; the model was trained for {shape.context:,} tokens"
    title = f"{model}: {batch} x {context:,} tokens, {visual_tokens:,} of them visual"
    show(rows, title, json_file, note)


def read_size(text: str) -> int:
    """'80GB' -> 80 * 10**9, '24GiB' -> 24 * 2**30. Raises ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].lower() not in UNITS:
        raise ValueError(f"a size is a number and a unit (80GB = 80 * 10^9, 24GiB = 24 * 2^30 bytes), got {text!r}")
    return int(float(found[1]) * UNITS[found[2].lower()])
