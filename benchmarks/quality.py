"""Measures what compression does to the bundled models' answers: `python benchmarks/quality.py`, then `tables.py`.

Every row is a free generation through the compressed cache (`kvmosaic eval` does the same for any task and method).
Calibrations are searched first, on pictures of the training split. Rows are written to docs/results.json as they come;
what is there already is kept, unless --again.
"""

import argparse
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kvmosaic import methods
from kvmosaic.cli.output import open_quietly, progress, whole_file
from kvmosaic.evals import calibrate, harness, suite
from kvmosaic.loading import Opened

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results.json"
CALIBRATIONS = ROOT / "out"

PLAIN = "key_clip=1.0 value_clip=1.0"
CALIBRATED = {bits: f"calibquant bits={bits} calibration=out/mosaic-vlm-{bits}.safetensors" for bits in (1, 2)}
SUITE: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {  # tasks with their examples a seed, methods
    "mosaic-vlm": (
        {"rows tiles=16 questions=32": 8},
        (
            "exact",
            *(f"kivi bits={bits}" for bits in (8, 4, 2)),
            *(f"calibquant bits={bits}" for bits in (8, 4, 2, 1)),
            f"calibquant bits=1 {PLAIN} calibrated=False",
            f"calibquant bits=1 {PLAIN}",
            "calibquant bits=1 calibrated=False",
            "calibquant bits=1 clip_about=center calibrated=False",
            *CALIBRATED.values(),
            "calibquant bits=1 | kivi bits=2",
            *(f"mosaic bits={bits}" for bits in (2, 1.5, 1)),
        ),
    ),
    "mosaic-lm": (
        {"lines lines=100 questions=16": 4, "track assignments=60 questions=8": 8, "perplexity tokens=512 texts=4": 4},
        (
            "exact",
            *(f"kivi bits={bits}" for bits in (8, 4, 2)),
            *(f"mosaic bits={bits}" for bits in (4, 3, 2, 1.5, 1)),
            "think",
            "think channels=32 | kivi bits=2",
            "zipcache",
            *(f"{name} keep=0.5" for name in ("snapkv", "expected_attention", "h2o")),
        ),
    ),
}


def machine() -> str:
    """Its class, not its name."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} used, {gpu}"


def search_calibrations(opened: Opened, pictures: int) -> list[dict[str, Any]]:
    """The files that CALIBRATED names, and what the search found on the way."""
    CALIBRATIONS.mkdir(exist_ok=True)
    found = []
    for bits in CALIBRATED:
        file = CALIBRATIONS / f"mosaic-vlm-{bits}.safetensors"
        if file.exists():
            continue
        examples = calibrate.generated(pictures, seed=0)
        stages = list(calibrate.search(opened, calibrate.samples(opened, examples), bits, bits))
        calibrate.result(opened, stages[-1], examples).save(file)
        found += [
            {
                "bits": bits,
                "stage": each.stage,
                "about": each.bits.about,
                "settings": [list(one) for one in each.settings],
            }
            | {"divergence_searched": each.searched, "divergence_held_out": each.held_out, "pictures": pictures}
            for each in stages
        ]
    return found


def read(path: Path) -> dict[str, Any]:
    """What was measured earlier."""
    return json.loads(path.read_text()) if path.exists() else {"rows": [], "calibration": []}


def measure(
    opened: Opened,
    tasks: dict[str, int],
    recipes: Sequence[str],
    results: dict[str, Any],
    path: Path,
    *,
    seeds: Sequence[int] = (0,),
    limit: int | None = None,
) -> None:
    """Add the rows that `results` lack, and write them to `path` as they come. tasks: with their examples a seed, for which
    `limit` can stand."""
    with progress() as bar:
        total = bar.add_task(opened.name, total=len(tasks) * len(recipes))
        for label, examples in tasks.items():
            (task,) = suite.parse(label)
            for recipe in recipes:
                bar.update(total, description=f"{opened.name}: {label}: {recipe}")
                key = {"model": opened.name, "task": label, "method": recipe, "seeds": list(seeds)}
                key |= {"examples": limit or examples, "dtype": str(opened.model.dtype).removeprefix("torch.")}
                if not any(key.items() <= row.items() for row in results["rows"]):
                    # out/ is relative to the repository
                    parsed = methods.parse(recipe.replace("=out/", f"={CALIBRATIONS}/"))
                    row = harness.score(opened, parsed, task, seeds=seeds, limit=key["examples"])
                    results["rows"].append(row | key | {"machine": machine()})
                    with whole_file(path) as part:
                        part.write_text(json.dumps(results, indent=1) + "\n")
                bar.advance(total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", choices=list(SUITE), default=list(SUITE))
    parser.add_argument("--limit", type=int, help="examples a seed and task, instead of the suite's")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--pictures", type=int, default=6, help="that calibration searches and checks on")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, help="torch's default if left out")
    parser.add_argument("--again", action="store_true", help="forget earlier rows and calibrations")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.again:
        RESULTS.unlink(missing_ok=True)
        for file in CALIBRATIONS.glob("mosaic-vlm-*.safetensors"):
            file.unlink()
    results = read(RESULTS)
    for name in arguments.models:
        tasks, recipes = SUITE[name]
        opened = open_quietly(name, arguments.dtype)
        if name == "mosaic-vlm":
            results["calibration"] += search_calibrations(opened, arguments.pictures)
        measure(opened, tasks, recipes, results, RESULTS, seeds=arguments.seeds, limit=arguments.limit)


if __name__ == "__main__":
    main()
