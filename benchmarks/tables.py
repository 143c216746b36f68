"""Writes docs/results.md, docs/gpu-results.md and the tables of README.md from docs/results.json, from
benchmarks/results/gpu_*.json and from the methods themselves.

Between a line `<!-- NAME -->` and a line `<!-- end -->` README.md is this script's.
"""

import json
import re
from pathlib import Path
from typing import Any

from kvmosaic import methods
from kvmosaic.cli.methods import row as method_row
from kvmosaic.cli.output import text

ROOT = Path(__file__).parent.parent
README, RESULTS, PAGE = ROOT / "README.md", ROOT / "docs" / "results.json", ROOT / "docs" / "results.md"

GPU_PAGE, GPU_RESULTS = ROOT / "docs" / "gpu-results.md", ROOT / "benchmarks" / "results"

GPU_HEAD = """# Results on a GPU

Written by `benchmarks/tables.py` from `benchmarks/results/gpu_*.json`, which the commands named below made (`--commit` and
`--out` left out). The floor is the bytes that have to be read over the bandwidth of a device-to-device copy in the same run.
How it works, and what falls short: [gpu.md](gpu.md).
"""

HEAD = """# Results

Made by `make tables` (`benchmarks/quality.py`, then `benchmarks/tables.py`); rows with all their columns are in
`docs/results.json`, and `kvmosaic eval` measures any other task and method the same way.

Each answer is generated freely, greedily, as a later turn on a copy of the context's cache, so it reads stored tokens.
`score` is the share of answers that are right as a whole, or perplexity; brackets hold the 95 % interval (Wilson's; over
tokens for perplexity) as if answers were independent, but those about one context are not quite. `digits` is the share of
right words or digits. Compression is that of the whole cache against a cache of the same dtype: scales, exact windows,
lengths and growth counted. Times are of answer steps that go through as batches, on a machine that did other work, too.
"""


def markdown(rows: list[dict[str, Any]]) -> str:
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(str(row[key]).replace("|", "\\|") for key in keys) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def methods_table() -> str:
    cells = [{key: text(key, value) for key, value in method_row(name).items()} for name in methods.names()]
    return markdown([each | {"name": f"`{each['name']}`"} for each in cells])


def shown(row: dict[str, Any]) -> dict[str, str]:
    return {
        "method": f"`{row['method']}`",
        "score": f"{row['score']:.3f} [{row['low']:.3f}, {row['high']:.3f}]",
        "digits": text("symbols", row["symbols"]),
        "n": text("n", row["n"]),
        "compression": text("compression", row["compression"]),
        "bytes per token": text("bytes_per_token", row["bytes_per_token"]),
    }


def results_table(rows: list[dict[str, Any]]) -> str:
    """All rows, a table for each model and task."""
    parts = []
    for model, task in dict.fromkeys((row["model"], row["task"]) for row in rows):
        own = [row for row in rows if (row["model"], row["task"]) == (model, task)]
        setting = f"{own[0]['dtype']}, seeds {', '.join(map(str, own[0]['seeds']))}, {own[0]['machine']}"
        parts.append(f"## {model}: {task}\n\n{setting}.\n\n" + markdown([shown(row) for row in own]))
    return "\n".join(parts)


def calibration_table(found: list[dict[str, Any]]) -> str:
    rows = [
        {
            "bits": each["bits"],
            "stage": each["stage"],
            "clip about": each["about"],
            "mean key clip, value clip, low, high": ", ".join(
                f"{sum(column) / len(column):.2f}" for column in zip(*each["settings"], strict=True)
            ),
            "divergence, searched": f"{each['divergence_searched']:.4f}",
            "divergence, held out": f"{each['divergence_held_out']:.4f}",
        }
        for each in found
    ]
    head = (
        "## What calibration found\n\nDivergence of the next token's distribution from the exact cache's, in nats.\n\n"
    )
    return head + markdown(rows)


def gpu_cell(key: str, value: Any) -> str:
    if key == "microseconds" or key == "floor":
        return f"{value:,.1f} us" if value < 1000 else f"{value / 1000:,.2f} ms"
    if isinstance(value, int) and key not in ("batch", "visual"):
        return text(f"{key}_bytes", value)
    if key.startswith("share"):
        return f"{100 * value:.0f} %"
    if isinstance(value, float):
        return f"{value:,.0f}" if "second" in key else f"{value:.2f}x"
    return str(value)


def gpu_rows(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    found = json.loads((GPU_RESULTS / f"{name}.json").read_text())
    return found["setting"], found["rows"]


def gpu_page() -> str:
    """Every file's rows; rows with the same columns share a table."""
    parts = [GPU_HEAD]
    for path in sorted(GPU_RESULTS.glob("gpu_*.json")):
        setting, rows = gpu_rows(path.stem)
        command = re.sub(r" --(commit|out) \S+", "", setting["command"])
        told = f"{setting['gpu']}, torch {setting['torch']}, transformers {setting['transformers']}, commit {setting['commit'][:7]}"
        if "copy bandwidth, bytes a second" in setting:
            told += f", copy {setting['copy bandwidth, bytes a second'] / 1e12:.2f} TB/s"
        parts.append(f"## {path.stem.removeprefix('gpu_').replace('_', ' ')}\n\n`{command}`: {told}.\n")
        for columns in dict.fromkeys(tuple(row) for row in rows):
            same = [row for row in rows if tuple(row) == columns]
            parts.append(markdown([{key: gpu_cell(key, row[key]) for key in columns} for row in same]))
    return "\n".join(parts)


def gpu_readme() -> str:
    setting, rows = gpu_rows("gpu_attention")
    shown = (
        "Triton split-KV",
        "exact",
        "runs 4",
        "runs 2",
        "runs 1",
        "kivi 4, groups of 128",
        "kivi 2, groups of 128",
        "turboquant 2, window 32",
    )
    own = {row["form"]: row for row in rows if row["shape"] == "64 x 32k"}
    table = markdown(
        [
            {
                "cache": name + (", bfloat16" if name == "Triton split-KV" else ""),
                "one step": gpu_cell("microseconds", own[name]["microseconds"]),
                "bytes": gpu_cell("bytes", own[name]["bytes"]),
                "share of the copy bandwidth": gpu_cell("share", own[name]["share of the floor"]),
                "against the best in bfloat16": gpu_cell("against", own[name]["against the best in bfloat16"]),
            }
            for name in shown
        ]
    )
    return f"**Decode attention, 64 sequences of 32k tokens, 32/8 heads of 128** ({setting['gpu']}; `runs`: one range a channel, CalibQuant's form)\n\n{table}"


def replace_part(page: str, name: str, part: str) -> str:
    """`page` with what lies between the two marks replaced. Raises ValueError if a mark is missing."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"README.md has no part {name!r}")
    return pattern.sub(lambda found: f"{found[1]}{part}{found[2]}", page)


def readme(page: str, rows: list[dict[str, Any]]) -> str:
    """With the table of methods, and the results of mosaic-vlm and of line retrieval."""
    page = replace_part(page, "methods", methods_table())
    vision = [row for row in rows if row["task"].startswith("rows")]
    language = [row for row in rows if row["task"].startswith("lines")]
    parts = []
    for title, own in (
        ("256 handwritten digits, rows of four read", vision),
        ("100 records of 1,400 tokens, one read", language),
    ):
        if own:
            note = f"**{own[0]['model']}: {title}** ({own[0]['dtype']}, {own[0]['machine']})\n\n"
            parts.append(note + markdown([shown(row) for row in own]))
    page = replace_part(page, "gpu", gpu_readme())
    return replace_part(page, "results", "\n".join(parts))


def main() -> None:
    found = json.loads(RESULTS.read_text())
    parts = [HEAD, results_table(found["rows"])]
    if found["calibration"]:
        parts.append(calibration_table(found["calibration"]))
    PAGE.write_text("\n".join(parts))
    GPU_PAGE.write_text(gpu_page())
    README.write_text(readme(README.read_text(), found["rows"]))


if __name__ == "__main__":
    main()
