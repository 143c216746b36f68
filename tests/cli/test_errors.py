"""A user's mistake is one line on stderr, a status that is not 0, and no file left behind."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmosaic import bundled
from kvmosaic.cli import output

Run = Callable[..., Any]
LM, VLM = ("--model", "mosaic-lm"), ("--model", "mosaic-vlm")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("methods", "kivy"), "no method 'kivy'. Did you mean 'kivi'?"),
        (
            ("generate", *LM, "--prompt", "a", "--method", "kivi bit=2"),
            "kivi has no option 'bit'. Did you mean 'bits'?",
        ),
        (("generate", *LM, "--prompt", "a", "--method", "kivi bits=3"), "bits must be 1, 2, 4 or 8"),
        (("generate", *LM, "--prompt", "a", "--method", "kivi bits=2 | kivi bits=4"), "both set tiers"),
        (("generate", *LM, "--prompt", "a", "--method", "calibquant"), "takes no pictures"),
        (("generate", *LM, "--prompt", "a", "--image", "none.png"), "cannot read the picture none.png"),
        (("generate", *VLM, "--prompt", "<image>"), "1 <image> markers for 0 pictures"),
        (("generate", "--model", "mosaic-ml", "--prompt", "a"), "Did you mean 'mosaic-lm'?"),
        (("generate", *LM, "--prompt", "a", "--dtype", "int8"), "dtype must be one of"),
        (("generate", *LM, "--prompt", "a", "--device", "cuda:99"), "device 'cuda:99' cannot be used"),
        (("generate", *LM, "--method", "kivi", "--prompt", "word " * 9000), "more than the model's context"),
        (("eval", *LM, "--tasks", "line"), "no task 'line'. Did you mean 'lines'?"),
        (("eval", *LM, "--tasks", "lines line=3"), "lines has no option 'line'. Did you mean 'lines'?"),
        (("eval", *LM, "--tasks", "lines", "--seeds", "a"), "seeds are whole numbers"),
        (("eval", *LM, "--tasks", "none.jsonl"), "none.jsonl"),
        (("profile", *LM, "--data", "perplexity", "--out", "p.safetensors"), "one task with questions"),
        (("profile", *LM, "--data", "lines", "--scorer", "h20", "--out", "p.safetensors"), "no scorer 'h20'"),
        (("eval", *LM, "--tasks", "lines", "--methods", "xkv"), "kvmosaic profile --model NAME"),
        (("plan", "--model", "qwen3-8"), "Did you mean 'qwen3-8b'?"),
        (("plan", "--model", "qwen3-8b", "--memory", "lots"), "a size is a number and a unit"),
        (("calibrate", *LM, "--out", "c"), "mosaic-lm has no generated pictures"),
        (
            ("calibrate", *VLM, "--out", "c", "--method", "kivi"),
            "kivi learns nothing from data. These do: calibquant, cq",
        ),
        (("calibrate", *VLM, "--out", "c", "--method", "kivy"), "Did you mean 'kivi'?"),
        (("calibrate", *VLM, "--out", "c", "--data", "lines"), "calibquant is about the tokens of pictures"),
        (
            ("calibrate", *LM, "--out", "c", "--method", "cq"),
            "cq learns from --data (a text or a task) or from --images",
        ),
        (("calibrate", *LM, "--out", "c", "--method", "cq", "--images", str(Path(__file__).parent)), "has 0 pictures"),
        (("calibrate", *LM, "--out", "c", "--method", "cq bit=4", "--data", "lines"), "Did you mean 'bits'?"),
        (("calibrate", *LM, "--out", "c", "--method", "cq", "--data", "line"), "no task 'line'. Did you mean 'lines'?"),
        (("calibrate", *LM, "--out", "c", "--method", "cq", "--data", ";"), "nothing to learn from in ';'"),
        (("calibrate", *LM, "--out", "c", "--method", "cq", "--data", "none.txt"), "no task 'none.txt'"),
        (("calibrate", *LM, "--out", "c", "--method", "cq", "--data", "perplexity"), "tasks with questions, got"),
        (("eval", *LM, "--tasks", "lines", "--methods", "cq"), 'kvmosaic calibrate --method "cq coupled=4 bits=8"'),
        (("calibrate", *VLM, "--out", "c", "--images", "none"), "none is none"),
    ],
)
def test_mistakes_are_one_line(run: Run, arguments: tuple[str, ...], message: str) -> None:
    ran = run(*arguments)
    assert ran.status == 1
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert message in ran.err


def test_a_missing_option_is_a_usage_error(run: Run) -> None:
    ran = run("generate", "--model", "mosaic-lm")
    assert ran.status == 2
    assert "--prompt" in ran.err


def test_a_corrupt_picture_is_named(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "corrupt.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    ran = run("generate", *VLM, "--prompt", "a", "--image", file)
    assert ran.status == 1
    assert "cannot read the picture" in ran.err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of mosaic-lm's checkpoint, to be damaged."""
    return Path(shutil.copytree(bundled.path("mosaic-lm"), tmp_path / "model"))


def test_weights_cut_short_are_refused(run: Run, folder: Path) -> None:
    weights = folder / "model.safetensors"
    with weights.open("r+b") as stream:
        stream.truncate(weights.stat().st_size - 1000)
    ran = run("generate", "--model", folder, "--prompt", "a")
    assert ran.status == 1
    assert "cannot load the weights" in ran.err


def test_a_lacking_weight_is_never_made_up(run: Run, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.3.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ran = run("generate", "--model", folder, "--prompt", "a")
    assert ran.status == 1
    assert "lacks 1 weights, for example model.layers.3.mlp.up_proj.weight" in ran.err


def test_a_folder_without_a_model_is_refused(run: Run, tmp_path: Path) -> None:
    assert "folder without config.json" in run("generate", "--model", tmp_path, "--prompt", "a").err


def test_no_space_left_leaves_nothing_behind(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "plan.json"
    file.write_text("before")

    def full(self: Path, text: str) -> None:
        with self.open("w") as stream:
            stream.write(text[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(output.Path, "write_text", full)
    ran = run("plan", "--model", "qwen3-8b", "--json", file)
    assert ran.status == 1
    assert f"cannot write {file}: No space left on device" in ran.err
    assert [each.name for each in tmp_path.iterdir()] == ["plan.json"]
    assert file.read_text() == "before"


def test_a_folder_that_is_not_there_is_named(run: Run, tmp_path: Path) -> None:
    ran = run("plan", "--model", "qwen3-8b", "--json", tmp_path / "no" / "plan.json")
    assert ran.status == 1
    assert "No such file or directory" in ran.err
