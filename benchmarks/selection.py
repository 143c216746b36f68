"""Measures every selection against its rivals at several budgets: `python -m benchmarks.selection [--again]`.

Rows go to docs/selection.json as they come (what is there is kept, unless --again), and from there, with the fronts of
quality against compression, to docs/selection.md and docs/selection.png. Some ten minutes on 2 cores.
"""

import argparse
import collections
import itertools
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import CALIBRATIONS, ROOT, measure, read
from benchmarks.tables import markdown, shown
from kvmosaic.cli.output import open_quietly
from kvmosaic.evals import profile, suite
from kvmosaic.loading import Opened

RESULTS, PAGE, PICTURE = (ROOT / "docs" / f"selection.{kind}" for kind in ("json", "md", "png"))

AT_PROMPT = ("snapkv", "pyramidkv", "adakv", "expected_attention", "h2o_prefill")
TEXT_ONLY = ("kvzip", "kvzip floor=1.0")
UNIFORM = "snapkv window=8 pooling=mean"  # xkv's scorer with equal layers


def budgets(*names: str) -> list[str]:
    return [f"{name} keep={keep}" for name, keep in itertools.product(names, (0.5, 0.2))]


def layers(model: str) -> list[str]:
    return budgets(UNIFORM, f"xkv profile=out/{model}-xkv.safetensors")


QUANTIZERS = [
    "exact",
    "kivi bits=4",
    "kivi bits=2",
    "mosaic bits=2",
    "mosaic bits=1",
    "zipcache",
    "zipcache salient=0.3",
    "zipcache salient=0.57 rotated=True",  # 5.0x by the paper's count
    "zipcache salient=0.3 rotated=True",
]
JOINED = ["expected_attention keep=0.5 | mosaic bits=2", "h2o keep=0.5 | turboquant bits=4"]
SUITE: list[tuple[str, dict[str, int], list[str]]] = [  # model, tasks with their examples, methods
    (
        "mosaic-lm",
        {
            "lines lines=100 questions=32": 1,
            "track assignments=60 questions=8": 4,
            "perplexity tokens=512 chunk=128 texts=2": 2,
        },
        [*QUANTIZERS, *budgets(*AT_PROMPT, *TEXT_ONLY, "h2o", "streaming_llm"), *layers("mosaic-lm"), *JOINED],
    ),
    (
        "mosaic-lm",
        {"lines lines=290 questions=32": 1, "arithmetic steps=4": 12},
        ["exact", *(each for each in QUANTIZERS if "zipcache" in each), "kivi bits=2 residual=32", *budgets("h2o")],
    ),
    (
        "mosaic-vlm",
        {"rows tiles=16 questions=32": 1},
        [
            *QUANTIZERS,
            "calibquant bits=2",
            "calibquant bits=1",
            *budgets(*AT_PROMPT, "h2o", "streaming_llm"),
            *layers("mosaic-vlm"),
            *JOINED,
            "zipvl",
            "zipvl sparse=False",
            "zipvl mass=0.9 sparse=False",
            "zipvl mass=0.9 evict=True sparse=False",
        ],
    ),
]
PROFILES = {"mosaic-lm": "lines lines=100", "mosaic-vlm": "rows tiles=16"}
"""What xkv's profiles are made on, with another seed than is measured."""


def make_profile(opened: Opened) -> None:
    CALIBRATIONS.mkdir(exist_ok=True)
    file = CALIBRATIONS / f"{opened.name}-xkv.safetensors"
    if not file.exists():
        (task,) = suite.parse(PROFILES[opened.name])
        assert isinstance(task, suite.Questions), "profiles are made on prompts"
        profile.profile(opened, "snapkv_mean", list(itertools.islice(task.examples(7), 4))).save(file)


def front(rows: list[dict[str, Any]], sign: int) -> list[dict[str, Any]]:
    """The rows that no other beats in both compression and score (sign 1: more is better, -1: less)."""
    best: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda each: (-each["compression"], -sign * each["score"])):
        if not best or sign * row["score"] > sign * best[-1]["score"]:
            best.append(row)
    return best[::-1]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    counts = collections.Counter((row["model"], row["task"]) for row in rows)
    tasks = [task for task, count in counts.items() if count > 10]  # the others compare a few methods
    figure, all_axes = pyplot.subplots(1, len(tasks), figsize=(5 * len(tasks), 5), layout="constrained")
    names = list(dict.fromkeys(label(row["method"]) for row in rows))
    for axes, (model, task) in zip(all_axes, tasks, strict=True):
        own = [row for row in rows if (row["model"], row["task"]) == (model, task)]
        perplexity = own[0]["metric"] == "perplexity"
        for name in names:
            points = [row for row in own if label(row["method"]) == name]
            colour, mark = f"C{names.index(name) % 10}", "os^Dv"[names.index(name) // 10 % 5]
            axes.plot(
                [row["compression"] for row in points],
                [row["score"] for row in points],
                mark,
                color=colour,
                label=name,
                markersize=6,
            )
        ends = front(own, -1 if perplexity else 1)
        axes.plot([row["compression"] for row in ends], [row["score"] for row in ends], "-", color="0.7", zorder=0)
        axes.set(title=f"{model}: {task}", xlabel="compression, whole cache", xscale="log")
        axes.set_ylabel("perplexity" if perplexity else "share right")
        axes.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        axes.minorticks_off()
        axes.title.set_fontsize(9)
        if perplexity:
            axes.invert_yaxis()
    entries: dict[str, Any] = {}
    for axes in all_axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=8, fontsize=8)
    figure.savefig(path, dpi=70)


def label(method: str) -> str:
    """The method without its budget, so that its budgets share a colour."""
    drop = ("keep=", "bits=", "salient=", "mass=", "profile=")
    words = [word for word in method.split() if not word.startswith(drop)]
    return " ".join(words).replace(UNIFORM, "xkv, equal layers")


HEAD = """# Selections

Made by `python -m benchmarks.selection`; rows with all their columns are in `docs/selection.json`. Scores and bytes are as
in [results.md](results.md): every answer is a later turn that reads stored tokens. Few examples, so intervals are wide; what
they say for each claim is in [log.md](log.md).

![Quality against compression; the grey line joins what no other method beats in both](selection.png)
"""


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As the suite has them, whenever they were measured; without those that it no longer has."""
    suite = [(model, task, method) for model, tasks, methods in SUITE for task in tasks for method in methods]
    places = {key: place for place, key in enumerate(suite)}
    found = [(places.get((row["model"], row["task"], row["method"])), row) for row in rows]
    return [row for _, row in sorted(((at, row) for at, row in found if at is not None), key=lambda each: each[0])]


def page(rows: list[dict[str, Any]]) -> str:
    parts = [HEAD]
    for model, task in dict.fromkeys((row["model"], row["task"]) for row in rows):
        own = [row for row in rows if (row["model"], row["task"]) == (model, task)]
        parts.append(
            f"## {model}: {task}\n\n{own[0]['dtype']}, {own[0]['machine']}.\n\n" + markdown([shown(row) for row in own])
        )
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, help="torch's default if left out")
    parser.add_argument("--again", action="store_true", help="forget earlier rows and profiles")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.again:
        for file in (RESULTS, *CALIBRATIONS.glob("*-xkv.safetensors")):
            file.unlink(missing_ok=True)
    results = read(RESULTS)
    for name, tasks, recipes in SUITE:
        opened = open_quietly(name)
        make_profile(opened)
        measure(opened, tasks, recipes, results, RESULTS)
    rows = in_order(results["rows"])
    PAGE.write_text(page(rows))
    draw(rows, PICTURE)


if __name__ == "__main__":
    main()
