"""Methods that learn beside those that do not, by the bytes that they hold: `python benchmarks/learned.py`.

Learns what each method needs (out/*.safetensors; 16 s to some minutes each on 2 cores), scores it, and writes
docs/learned.json and docs/learned.md. What is there already is kept, unless --again. `kvmosaic calibrate` and
`kvmosaic eval` do the same for one method.
"""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import machine
from benchmarks.tables import markdown
from kvmosaic import methods, plan
from kvmosaic.cli.output import open_quietly, progress, text, whole_file
from kvmosaic.evals import harness, suite
from kvmosaic.evals import learn as learning
from kvmosaic.loading import Opened

ROOT = Path(__file__).parent.parent
RESULTS, PAGE, FILES = ROOT / "docs" / "learned.json", ROOT / "docs" / "learned.md", ROOT / "out"
BOOKS = ("argparse", "difflib", "inspect", "pprint")
"""Modules of the standard library that methods learn from; perplexity is measured on others."""

DATA = {
    "mosaic-lm": (f"{FILES}/learned.txt; lines lines=60", 5, 1024),
    "mosaic-vlm": ("rows tiles=16 split=train", 10, 0),
}
"""By model: what is learned from, passages of each part, tokens of a passage."""

TASKS: dict[str, dict[str, int]] = {
    "mosaic-lm": {"perplexity tokens=512 texts=4": 4, "lines lines=100 questions=16": 2},
    "mosaic-vlm": {"rows tiles=16 questions=32": 4},
}
RIVALS = [
    *(f"kivi bits={bits}" for bits in (4, 2, 1)),
    *(f"turboquant bits={bits}" for bits in (4, 3, 2, 1)),
    *(f"mosaic bits={bits}" for bits in (4, 3, 2, 1.5, 1)),
]
SUITE = {
    "mosaic-lm": [
        "exact",
        "cq coupled=8 bits=8",
        "cq coupled=8 bits=8 | window=32 first=4",
        *(f"kvquant bits={bits}" for bits in (4, 3, 2, 1)),
        "kvquant bits=2 | window=32 first=4",
        "cq coupled=4 bits=8",
        "cq coupled=4 bits=8 | window=32 first=4",
        *RIVALS,
        "kvquant bits=3 outliers=0.0",
        "kvquant bits=2 pre_rope=False",
        "cq coupled=8 bits=8 pre_rope=True",
        "cq coupled=8 bits=8 fisher=False",
        "cq coupled=2 bits=8",
    ],
    "mosaic-vlm": [
        "exact",
        "cq coupled=8 bits=8",
        "cq coupled=8 bits=8 | window=32 first=4",
        "kivi bits=2",
        "kvquant bits=2",
        "cq coupled=4 bits=8",
        *(f"turboquant bits={bits}" for bits in (2, 1)),
        *(f"mosaic bits={bits}" for bits in (2, 1.5, 1)),
    ],
}
"""What a method learns with, and after a bar the options that only its use has."""

HEAD = """# Methods that learn, and others, by their bytes

Made by `python benchmarks/learned.py` ({machine}); `kvmosaic calibrate` and `kvmosaic eval` do the same for one method.
Text enters sixteen tokens at a time, and what stands before is read from the cache; questions are later turns on a copy of
it. `bytes per token` counts all that the cache holds of these short contexts but what was learned, which is the same for
every sequence of a model and is a column of its own. `kvquant` and `cq` keep no window unless it says so, `turboquant`
neither; `kivi` keeps 128 tokens and `mosaic` 32. {learned}
"""


def file_of(model: str, method: str) -> Path:
    return FILES / f"{model} {method}.safetensors".replace(" ", "-")


def make(opened: Opened, method: str) -> None:
    """The file that the method reads, if there is none."""
    file = file_of(opened.name, method)
    if not file.exists():
        data, count, length = DATA[opened.name]
        parts = learning.passages(opened, data, count, length)
        learning.learn(opened, *learning.settings(method), parts, file)


def used(model: str, row: str) -> str:
    """The row's method as `kvmosaic eval` takes it."""
    method, _, more = (part.strip() for part in row.partition("|"))
    name = method.split()[0]
    if methods.learner(name) is None:
        return row
    own = " ".join(word for word in method.split() if not word.startswith(("fisher", "normalize")))
    return f"{own} {more} calibration={file_of(model, method)}"


def page(rows: list[dict[str, Any]]) -> str:
    data = {
        name: each.replace(f"{FILES}/learned.txt", f"modules {', '.join(BOOKS)}") for name, (each, _, _) in DATA.items()
    }
    learned = "; ".join(
        f"{name} learns from {count} passages each of: {data[name]}" for name, (_, count, _) in DATA.items()
    )
    parts = [HEAD.format(machine=rows[0]["machine"], learned=f"{learned}.")]
    for model, task in dict.fromkeys((row["model"], row["task"]) for row in rows):
        own = [row for row in rows if (row["model"], row["task"]) == (model, task)]
        parts.append(f"## {model}: {task}\n\n{own[0]['dtype']}.\n\n" + markdown([shown(row) for row in own]))
    return "\n".join(parts)


def held(row: dict[str, Any]) -> float:
    """Bytes per token without what was learned."""
    return float(row["bytes_per_token"] - row["learned_bytes_per_token"])


def shown(row: dict[str, Any]) -> dict[str, str]:
    return {
        "method": f"`{row['method']}`",
        "score": f"{row['score']:.3f} [{row['low']:.3f}, {row['high']:.3f}]",
        "digits": text("symbols", row["symbols"]),
        "bytes per token": text("bytes_per_token", held(row)),
        "bits per number": f"{16 * held(row) / row['exact_bytes_per_token']:.2f}",
        "learned": text("bytes", row["learned_bytes"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", choices=list(SUITE), default=list(SUITE))
    parser.add_argument("--threads", type=int, help="torch's default if left out")
    parser.add_argument("--again", action="store_true", help="forget earlier rows and what was learned")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.again:
        for file in (RESULTS, *FILES.glob("mosaic-*-*bits=*.safetensors")):
            file.unlink(missing_ok=True)
    FILES.mkdir(exist_ok=True)
    origins = (importlib.util.find_spec(name) for name in BOOKS)
    (FILES / "learned.txt").write_text("".join(Path(str(each.origin)).read_text() for each in origins if each))
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    with progress() as bar:
        for model in arguments.models:
            opened = open_quietly(model)
            total = bar.add_task(model, total=len(SUITE[model]) * len(TASKS[model]))
            for method in SUITE[model]:
                for label, limit in TASKS[model].items():
                    bar.update(total, description=f"{label}: {method}")
                    key = {"model": model, "task": label, "method": method}
                    if not any(key.items() <= row.items() for row in rows):
                        if methods.learner(method.split()[0]):
                            make(opened, method.partition("|")[0].strip())
                        (task,) = suite.parse(label)
                        recipe = methods.parse(used(model, method))
                        row = harness.score(opened, recipe, task, limit=limit)
                        row["learned_bytes"] = plan.learned_bytes(plan.Shape.of(opened.model.config), recipe)
                        dtype = str(opened.model.dtype).removeprefix("torch.")
                        rows.append(row | key | {"dtype": dtype, "machine": machine()})
                        order = [(name, label) for name in SUITE for label in TASKS[name]]
                        rows.sort(key=lambda each: (order.index((each["model"], each["task"])), -held(each)))
                        for file, words in ((RESULTS, json.dumps(rows, indent=1) + "\n"), (PAGE, page(rows))):
                            with whole_file(file) as part:
                                part.write_text(words)
                    bar.advance(total)


if __name__ == "__main__":
    main()
