"""What each command prints and writes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kvmosaic import demo, methods
from kvmosaic.calibration import load
from kvmosaic.cli.methods import meaning
from kvmosaic.cli.plan import read_size
from kvmosaic.evals import calibrate

Run = Callable[..., Any]
RECORDS = "Records.\nline red: 12345\nline blue: 67890\nask red:"


def test_help_names_every_command(run: Run) -> None:
    out = run("--help").out
    for command in ("demo", "generate", "methods", "eval", "plan", "calibrate", "profile", "doctor"):
        assert f" {command} " in out


def test_methods_are_listed_from_their_files(run: Run) -> None:
    rows = {row["name"]: row for row in run("methods", "--json", "-").rows}
    assert list(rows) == methods.names()
    assert rows["kivi"]["paper"] == "arXiv:2402.02750"
    assert rows["calibquant"]["needs"] == "pictures"
    assert rows["calibquant"]["calibration"] == "optional"
    assert rows["kivi"]["default"] == 2


@pytest.mark.parametrize("name", methods.names())
def test_every_option_of_a_method_is_explained(run: Run, name: str) -> None:
    rows = run("methods", name, "--json", "-").rows
    assert [row["option"] for row in rows if not row["meaning"]] == []


def test_meanings_are_read_off_a_docstring() -> None:
    document = (
        "bits: of a code at `scale`; key_bits and other_bits if they differ; or wide: how.\n\n"
        "low, high: two ends,\n    of a range.\nReturns: no."
    )
    assert meaning(document, ["bits", "scale", "key_bits", "other_bits", "wide", "low", "high", "unsaid"]) == {
        "bits": "of a code at `scale`",
        "scale": "bits: of a code at `scale`; key_bits and other_bits if they differ; or wide: how.",
        "key_bits": "if they differ",
        "other_bits": "if they differ",
        "wide": "how",
        "low": "two ends, of a range",
        "high": "two ends, of a range",
        "unsaid": "",
    }


def test_generate_streams_the_answer_and_says_what_it_cost(run: Run) -> None:
    options = ("--model", "mosaic-lm", "--prompt", RECORDS, "--max-new-tokens", 8)
    exact = run("generate", *options).out
    packed = run("generate", *options, "--method", "kivi bits=8 residual=32").out
    assert exact.startswith(" 12345\n")
    assert packed.startswith(" 12345\n")
    assert "codes" in packed
    assert "tokens/s" in packed


def test_generate_reads_a_picture(run: Run, tmp_path: Path) -> None:
    scene, _ = demo.scenes(0)
    scene.example.images[0].save(tmp_path / "digits.png")
    (question,) = scene.example.questions
    options = ("--image", tmp_path / "digits.png", "--prompt", question.prompt, "--max-new-tokens", 32)
    out = run("generate", "--model", "mosaic-vlm", "--method", "calibquant bits=8", *options).out
    got, right = out.splitlines()[0].split(), question.answer.split()
    assert sum(a == b for a, b in zip(got, right, strict=False)) >= 14


def test_eval_gives_a_row_for_each_method_and_task(run: Run) -> None:
    tasks = "lines lines=8 questions=2; perplexity tokens=48 chunk=16 texts=1"
    rows = run("eval", "--model", "mosaic-lm", "--tasks", tasks, "--limit", 2, "--seeds", "0,1", "--json", "-").rows
    assert [(row["method"], row["metric"]) for row in rows] == [
        ("exact", "right"),
        ("kivi bits=2", "right"),
        ("exact", "perplexity"),
        ("kivi bits=2", "perplexity"),
    ]
    assert rows[0]["n"] == 8
    assert rows[0]["compression"] == 1
    assert rows[0]["low"] <= rows[0]["score"] <= rows[0]["high"]
    assert rows[2]["n"] == 32


def test_eval_prints_the_table_and_writes_the_same(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    ran = run(
        "eval", "--model", "mosaic-lm", "--tasks", "lines lines=4", "--methods", "exact", "--limit", 1, "--json", file
    )
    assert ran.status == 0
    assert "lines lines=4" in ran.out
    assert '"method": "exact"' in file.read_text()


def test_plan_shows_the_exact_cache_beside_the_methods(run: Run) -> None:
    options = ("--context", 4096, "--visual-tokens", 3328, "--memory", "80GB", "--method", "calibquant bits=1; exact")
    rows = run("plan", "--model", "internvl2.5-8b", *options, "--json", "-").rows
    assert [row["method"] for row in rows] == ["exact", "calibquant bits=1"]
    assert rows[0]["exact_bytes_per_token"] == rows[0]["bytes_per_token"] == 131072
    # 768 exact tokens and 3,328 of 16 times fewer bytes, scales of 4 numbers a channel on top
    assert rows[1]["compression"] == pytest.approx(4096 / (768 + 3328 / 15.85), rel=0.001)
    assert rows[1]["largest_batch"] > 4 * rows[0]["largest_batch"]


@pytest.mark.parametrize(
    ("text", "nbytes"), [("80GB", 80 * 10**9), ("24GiB", 24 * 2**30), ("1.5 kb", 1500), ("7", 7), ("2 TiB", 2**41)]
)
def test_sizes_are_read_with_their_units(text: str, nbytes: int) -> None:
    assert read_size(text) == nbytes


def test_profile_shares_a_budget_out_and_xkv_reads_it(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "profile.safetensors"
    options = ("--model", "mosaic-lm", "--data", "lines lines=20", "--prompts", 2, "--out", file)
    rows = run("profile", *options, "--json", "-").rows
    assert len(rows) == 8
    assert sum(row["keep_0.20"] for row in rows) / 8 == pytest.approx(0.2, abs=0.01)
    task = ("--tasks", "lines lines=20", "--limit", 1, "--json", "-")
    methods = f"xkv keep=1.0 profile={file}; xkv keep=0.3 profile={file}"
    whole, part = run("eval", "--model", "mosaic-lm", "--methods", methods, *task).rows
    assert whole["score"] == 1
    assert part["compression"] > 1.5 > whole["compression"]


def test_doctor_says_which_kernel_serves(run: Run) -> None:
    rows = {row["what"]: row["state"] for row in run("doctor", "--json", "-").rows}
    assert rows["torch"]
    assert rows["kernels on cpu"]
    assert rows["method cq"].endswith("captured on a GPU: yes"), "as it is once it has learned"


def test_demo_tells_and_draws(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PICTURE_RECIPES", ("exact", "calibquant bits=1"))
    monkeypatch.setattr(demo, "TEXT_RECIPES", ("exact",))
    ran = run("demo", "--picture", tmp_path / "demo.png", "--json", tmp_path / "demo.json")
    assert ran.status == 0
    assert "mosaic-vlm before 256 handwritten digits" in ran.out
    assert Image.open(tmp_path / "demo.png").width > 1000
    assert '"model": "mosaic-lm"' in (tmp_path / "demo.json").read_text()


def test_calibrate_writes_what_calibquant_reads(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "CLIPS", (0.4, 0.5))
    monkeypatch.setattr(calibrate, "OFFSETS", (0.0,))
    monkeypatch.setattr(calibrate, "NEIGHBOURS", {"high": (0.5,)})
    file = tmp_path / "calibration.safetensors"
    rows = run("calibrate", "--model", "mosaic-vlm", "--out", file, "--pictures", 2, "--json", "-").rows
    assert rows[0]["stage"] == "released"
    assert rows[-1]["divergence_held_out"] == min(row["divergence_held_out"] for row in rows)
    found = load(file, method="calibquant", options={"key_bits": 1, "value_bits": 1})
    assert {name: len(tensor) for name, tensor in found.tensors.items()} == dict.fromkeys(calibrate.Setting._fields, 8)
    recipe = methods.parse(f"calibquant bits=1 calibration={file}")
    assert recipe.fingerprint == found.fingerprint


def test_calibrate_writes_what_cq_reads(run: Run, tmp_path: Path) -> None:
    file, method = tmp_path / "cq.safetensors", "cq coupled=8 bits=4"
    options = ("--data", "lines lines=10", "--sequences", 2, "--out", file, "--method", method)
    rows = run("calibrate", "--model", "mosaic-lm", *options, "--json", "-").rows
    assert [(row["layer"], row["from"]) for row in rows] == [(layer, "this run") for layer in range(8)]
    found = load(file, method="cq", options={"coupled": 8, "bits": 4, "fisher": True})
    assert sum(row["learned_bytes"] for row in rows) == sum(each.nbytes for each in found.tensors.values())
    method = f"exact; {method} calibration={file}"
    rows = run("eval", "--model", "mosaic-lm", "--tasks", "lines lines=4", "--methods", method, "--json", "-").rows
    assert 1 < rows[1]["compression"] < 32


def test_calibrate_takes_a_folder_of_pictures(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "CLIPS", (0.5,))
    monkeypatch.setattr(calibrate, "OFFSETS", (0.0,))
    for name, grey in (("a.png", 0), ("b.jpg", 200)):
        Image.new("RGB", (64, 64), (grey, grey, grey)).save(tmp_path / name)
    options = ("--images", tmp_path, "--tokens", 4, "--whole-model", "--json", "-")
    rows = run("calibrate", "--model", "mosaic-vlm", "--out", tmp_path / "c.safetensors", *options).rows
    assert [row["stage"].split(":")[0] for row in rows][-1] == "kept"
