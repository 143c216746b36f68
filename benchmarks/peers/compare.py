"""kvmosaic beside NVIDIA/kvpress: the same checkpoint, contexts, questions and share of kept tokens.

    benchmarks/peers/install.sh             once: kvpress in an environment of its own
    python -m benchmarks.peers.compare      writes benchmarks/results/peers.json and the tables of docs/peers.md

Each row is one method of either library at one share. Its bytes are those held after a context was read: keys and values
(ours with all their metadata), and for methods that only mask pairs, the lists of what is masked.
"""

import argparse
import json
import math
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import machine
from benchmarks.tables import markdown, replace_part
from kvmosaic import Cache, bundled, methods
from kvmosaic.cli.output import open_quietly, whole_file
from kvmosaic.evals import harness, suite
from kvmosaic.evals.scores import Share, Z
from kvmosaic.loading import Opened

ROOT = Path(__file__).parent.parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "peers.json", ROOT / "docs" / "peers.md"
KVPRESS = Path(__file__).parent / ".venv" / "bin" / "python"

WINDOW = "keep={keep} window=64 kernel=5 pooling=mean"  # as kvpress sets it
OURS = {
    "SnapKV": f"snapkv {WINDOW}",
    "ObservedAttention": "h2o_prefill keep={keep} recent=0 normalize=true",
    "StreamingLLM": "streaming_llm keep={keep}",
    "PyramidKV": f"pyramidkv {WINDOW}",
    "AdaKV(SnapKV)": f"adakv {WINDOW}",
    "ExpectedAttention": "expected_attention keep={keep} epsilon=0",
    "AdaKV(ExpectedAttention)": "adakv scorer=expected_attention keep={keep}",
    "KVzip": "kvzip keep={keep}",
    "ThinK": "think pruned={pruned}",
    "bits in place of tokens": "mosaic bits=2",
}
"""kvpress's names, and what we run beside each."""

TASKS = {  # label: examples, and whether each question is part of its context
    "lines lines=40 questions=8": (4, False),
    "lines lines=40 questions=4": (8, True),
    "needle sentences=40 needles=8 questions=8": (4, False),
    "text": (4, False),
}
LIBRARIES = ["kvpress", "kvmosaic"]
CONTEXT, CONTINUATION = 768, 128  # tokens of each text


def examples(opened: Opened, label: str, count: int, asked: bool) -> Iterator[dict[str, Any]]:
    """Tokens: {"context", "turns": [{"prompt", "answer"}], "continuation"}."""
    if label == "text":
        (task,) = suite.parse(f"perplexity texts={count}")
        assert isinstance(task, suite.Perplexity), "that is what perplexity parses to"
        for text in task.texts:
            ids = opened.ids(text)[0].tolist()
            stop = CONTEXT + CONTINUATION
            yield {"context": ids[:CONTEXT], "turns": [], "continuation": ids[CONTEXT:stop]}
        return
    (task,) = suite.parse(label)
    assert isinstance(task, suite.Questions), "all others are"
    generate = task.examples(0)
    for _ in range(count):
        example = next(generate)
        context = opened.inputs(example.context)["input_ids"][0].tolist()
        turns = [
            {"prompt": opened.ids(each.prompt)[0].tolist(), "answer": opened.ids(each.answer)[0].tolist()}
            for each in example.questions
        ]
        if asked:  # all of it but the last token, which the answer begins with
            for turn in turns:
                whole = context + turn["prompt"]
                yield {"context": whole[:-1], "turns": [turn | {"prompt": whole[-1:]}], "continuation": []}
        else:
            yield {"context": context, "turns": turns, "continuation": []}


@torch.inference_mode()
def score(opened: Opened, text: str, asked: list[dict[str, Any]]) -> dict[str, Any]:
    """One of our methods, as `rival.score`."""
    found: dict[str, Any] = {"written": [], "losses": [], "held": []}
    for example in asked:
        context = torch.tensor([example["context"]])
        cache = Cache(opened.model, methods.parse(text))
        opened.model(input_ids=context, past_key_values=cache, logits_to_keep=1)
        found["held"].append(cache.nbytes())
        written: dict[int, list[int]] = {}
        for size in {len(turn["prompt"]) for turn in example["turns"]}:  # turns of one length at a time
            some = {at: turn for at, turn in enumerate(example["turns"]) if len(turn["prompt"]) == size}
            prompts = [torch.tensor([turn["prompt"]]) for turn in some.values()]
            answers, _ = harness.answer(opened, cache, prompts, [len(turn["answer"]) for turn in some.values()])
            written |= zip(some, answers, strict=True)
        found["written"] += [answer for _, answer in sorted(written.items())]
        if example["continuation"]:
            more = torch.tensor([example["continuation"]])
            logits = opened.model(input_ids=more, past_key_values=cache).logits[0].float()
            found["losses"] += (-logits[:-1].log_softmax(-1).gather(1, more[0, 1:, None])[:, 0]).tolist()
    return found


def columns(opened: Opened, asked: list[dict[str, Any]], found: dict[str, Any]) -> dict[str, Any]:
    """Score and bytes; answers are compared as text, as `kvmosaic eval` does."""
    answers = [turn["answer"] for example in asked for turn in example["turns"]]
    config = opened.model.config
    pair = 2 * config.num_key_value_heads * config.head_dim * opened.model.dtype.itemsize * config.num_hidden_layers
    exact = sum(len(example["context"]) for example in asked) * pair
    sizes = {"bytes": sum(found["held"]), "exact_bytes": exact}
    if found["losses"]:
        losses = torch.tensor(found["losses"])
        mean, half = float(losses.mean()), Z * float(losses.std()) / math.sqrt(len(losses))
        scores = {"metric": "perplexity", "score": math.exp(mean), "n": len(losses)}
        return scores | {"low": math.exp(mean - half), "high": math.exp(mean + half)} | sizes
    right = Share()
    for answer, written in zip(answers, found["written"], strict=True):
        right.add(opened.tokenizer.decode(written).strip() == opened.tokenizer.decode(answer).strip())
    low, high = right.interval
    return {"metric": "right", "score": right.value, "n": right.n, "low": low, "high": high} | sizes


def kvpress(model: str, tasks: dict[str, Any], keeps: list[float]) -> list[dict[str, Any]]:
    if not KVPRESS.exists():
        raise SystemExit("kvpress is not installed. Run benchmarks/peers/install.sh first")
    with tempfile.TemporaryDirectory() as folder:
        asked, written = Path(folder) / "asked.json", Path(folder) / "written.json"
        asked.write_text(json.dumps({"tasks": tasks, "keeps": keeps}))
        command = [KVPRESS, Path(__file__).parent / "rival.py", bundled.path(model), asked, written]
        subprocess.run(command, check=True)
        found: list[dict[str, Any]] = json.loads(written.read_text())
    return found


def place(row: dict[str, Any]) -> tuple[Any, ...]:
    """Where a row stands, however they came."""
    task, methods = row["task"].removesuffix(", asked in the context"), ["all", *OURS]
    library, method = LIBRARIES.index(row["library"]), methods.index(row["method"])
    return row["model"], list(TASKS).index(task), library, method, -row["keep"]


def table(rows: list[dict[str, Any]]) -> str:
    """Of one task: kvpress's score and bytes, and ours beside them."""
    by = {(each["library"], each["method"], each["keep"]): each for each in rows}
    lines = []
    for method, keep in dict.fromkeys((each["method"], each["keep"]) for each in rows):
        line = {"method": method, "kept": f"{keep:g}"}
        for library in ("kvpress", "kvmosaic"):
            each = by.get((library, method, keep))
            scores = (
                ("-", "-") if each is None else (f"{each['score']:.3f}", f"{each['bytes'] / each['exact_bytes']:.2f}")
            )
            line |= dict(zip((library, f"{library}: bytes"), scores, strict=True))
        ours = by.get(("kvmosaic", method, keep))
        lines.append(line | {"as we run it": f"`{ours['recipe']}`" if ours else "-"})
    first = rows[0]
    metric = "Perplexity (lower is better)" if first["metric"] == "perplexity" else "Share of right answers"
    exact = f"{first['score']:.3f} [{first['low']:.3f}, {first['high']:.3f}] with all tokens"
    return f"### {first['model']}: {first['task']}\n\n{metric}, n = {first['n']:,}; {exact}.\n\n{markdown(lines)}"


def measure(name: str, labels: list[str], keeps: list[float], libraries: list[str]) -> list[dict[str, Any]]:
    opened = open_quietly(name)
    tasks = {}
    for label in labels:
        count, asked = TASKS[label]
        tasks[label + ", asked in the context" * asked] = list(examples(opened, label, count, asked))
    setting = {"model": name, "machine": machine(), "dtype": str(opened.model.dtype).removeprefix("torch.")}
    rows = []

    def add(library: str, task: str, method: str, keep: float, found: dict[str, Any], recipe: str | None) -> None:
        row = {"task": task, "method": method, "keep": keep, "library": library, "recipe": recipe}
        rows.append(row | columns(opened, tasks[task], found) | setting)

    for each in kvpress(name, tasks, keeps) if "kvpress" in libraries else ():
        add("kvpress", each["task"], each["method"], each["keep"], each, None)
    for task, asked in tasks.items() if "kvmosaic" in libraries else ():
        add("kvmosaic", task, "all", 1.0, score(opened, "exact", asked), "exact")
        for method, text in OURS.items():
            for keep in keeps if "{" in text else [1.0]:
                recipe = text.replace("{keep}", f"{keep:g}").replace("{pruned}", f"{1 - keep:g}")
                add("kvmosaic", task, method, keep, score(opened, recipe, asked), recipe)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mosaic-lm")
    parser.add_argument("--keeps", type=float, nargs="*", default=[0.5, 0.25])
    parser.add_argument("--tasks", nargs="*", choices=list(TASKS), default=list(TASKS), help="rows of others are kept")
    parser.add_argument(
        "--libraries", nargs="*", choices=LIBRARIES, default=LIBRARIES, help="rows of the other are kept"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    found = measure(arguments.model, arguments.tasks, arguments.keeps, arguments.libraries)
    again = {place(row) for row in found}
    rows = sorted([row for row in rows if place(row) not in again] + found, key=place)
    with whole_file(RESULTS) as part:
        part.write_text(json.dumps(rows, indent=1) + "\n")
    groups = dict.fromkeys((row["model"], row["task"]) for row in rows)
    parts = [table([row for row in rows if (row["model"], row["task"]) == group]) for group in groups]
    PAGE.write_text(replace_part(PAGE.read_text(), "peers", "\n" + "\n".join(parts)))


if __name__ == "__main__":
    main()
