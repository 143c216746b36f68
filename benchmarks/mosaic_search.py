"""What `mosaic` could be made of, each thing varied alone: `python -m benchmarks.mosaic_search --only bits scales`.

Writes benchmarks/results/mosaic_search.json as rows come; what is there already for the same model and task is kept, unless
--again. Run it anew when the bundled models change, and read bytes and scores together.
"""

import argparse
import json
from pathlib import Path
from typing import Literal

import torch

from benchmarks.quality import machine
from kvmosaic import Recipe
from kvmosaic.cli.output import open_quietly, whole_file
from kvmosaic.codecs import Codec, Rotated, Sphere
from kvmosaic.evals import harness, suite
from kvmosaic.projection import QueryDriven
from kvmosaic.stores import Coded, Lane, PerLayer

RESULTS = Path(__file__).parent / "results" / "mosaic_search.json"
TASKS = {  # with examples
    "mosaic-lm": {"perplexity tokens=1024 texts=4 chunk=128": 4, "lines lines=100 questions=16": 4},
    "mosaic-vlm": {"rows tiles=16 questions=32": 3},
}
Scale = Literal["norm", "matched", "unbiased", "least"]


def tier(
    key_bits: int,
    value_bits: int,
    keys: Scale = "unbiased",
    values: Scale = "unbiased",
    window: int = 32,
    seed: int = 0,
) -> Coded:
    sides = (Rotated(Sphere(bits=key_bits, scale=keys), seed), Rotated(Sphere(bits=value_bits, scale=values), seed))
    return Coded(*(Lane(codec, window) for codec in sides))


def recipe(each: Coded | PerLayer, channels: int | None = None) -> Recipe:
    projection = None if channels is None else QueryDriven(channels=channels)
    return Recipe(projection=projection, tiers=(each,))


def as_they_come(side: str) -> Coded:
    """One side not rotated."""

    def codec(name: str) -> Codec:
        plain = Sphere(bits=2, scale="unbiased")
        return plain if name == side else Rotated(plain)

    return Coded(Lane(codec("keys"), 32), Lane(codec("values"), 32))


def groups(layers: int) -> dict[str, dict[str, Recipe]]:
    """By what varies; keys and values at "2, 1" bits and so on."""
    bits = [(4, 4), (3, 4), (4, 3), (3, 3), (4, 2), (3, 2), (2, 3), (2, 2), (3, 1), (2, 1), (1, 2), (1, 1)]
    scales: list[tuple[Scale, Scale]] = [("unbiased", "least"), ("matched", "unbiased"), ("least", "least")]
    return {
        "exact": {"exact": Recipe()},
        "bits": {f"{k}, {v}": recipe(tier(k, v)) for k, v in bits},
        "scales": {
            f"{bits}, {bits}: keys {k}, values {v}": recipe(tier(bits, bits, k, v))
            for bits in (2, 1)
            for k, v in scales
        },
        "rotation": {f"2, 2: {side} as they come": recipe(as_they_come(side)) for side in ("keys", "values")}
        | {f"2, 2: seed {seed}": recipe(tier(2, 2, seed=seed)) for seed in (1, 2)},
        "window": {f"2, 2: window {size}": recipe(tier(2, 2, window=size)) for size in (0, 16, 64)},
        "channels": {
            f"{k}, {v}: {channels} key channels": recipe(tier(k, v), channels)
            for k, v, channels in [(2, 1, 32), (3, 1, 32), (4, 2, 32), (2, 1, 48)]
        },
        "layers": {
            f"2, 1: layer {layer} at {k}, {v}": recipe(
                PerLayer(tuple(tier(k, v) if each == layer else tier(2, 1) for each in range(layers)))
            )
            for layer in range(layers)
            for k, v in [(3, 1), (2, 2)]
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mosaic-lm", choices=list(TASKS))
    parser.add_argument("--tasks", nargs="*", help="of the model's; all if left out")
    parser.add_argument(
        "--only", nargs="*", help="groups of variants: exact, bits, scales, rotation, window, channels, layers"
    )
    parser.add_argument("--again", action="store_true", help="forget earlier rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    opened = open_quietly(arguments.model)
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() and not arguments.again else []
    offered = groups(opened.model.config.get_text_config().num_hidden_layers)
    for label, limit in TASKS[arguments.model].items():
        if arguments.tasks and label.split()[0] not in arguments.tasks:
            continue
        (task,) = suite.parse(label)
        for group in arguments.only or offered:
            for name, made in offered[group].items():
                key = {"model": arguments.model, "task": label, "variant": name}
                if any(key.items() <= row.items() for row in rows):
                    continue
                row = harness.score(opened, made, task, limit=limit)
                kept = {column: row[column] for column in ("score", "low", "high", "symbols", "n", "bytes_per_token")}
                rows.append(key | {"group": group} | kept | {"machine": machine()})
                print(f"{label}: {name}: {row['score']:.3f}, {row['bytes_per_token']:.0f} bytes a token", flush=True)
                with whole_file(RESULTS) as part:
                    part.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
