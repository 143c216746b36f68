"""The bundled checkpoints: small, plain, loadable, and able to read; damaged ones are refused with words."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from kvmosaic import bundled
from kvmosaic.bundled import pictures
from kvmosaic.errors import BadCheckpoint
from kvmosaic.evals import tasks


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A copy of a checkpoint, to damage."""
    return Path(shutil.copytree(bundled.path("mosaic-lm"), tmp_path / "copy"))


def right(name: str, task: str, seed: int = 0, **options: int) -> list[bool]:
    """Which answers the model gives word for word, by greedy generation."""
    model, tokenizer = bundled.load(name, torch.float32)
    example = tasks.generator(task)(random.Random(seed), **options)
    found = []
    for question in example.questions:
        inputs = pictures.inputs(tokenizer, example.context + question.prompt, example.images)
        length = len(tokenizer(question.answer, add_special_tokens=False).input_ids)
        output = model.generate(**inputs, max_new_tokens=length, do_sample=False)
        found.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]) == question.answer)
    return found


def test_together_at_most_48_mebibytes() -> None:
    files = [file for name in bundled.NAMES for file in bundled.path(name).iterdir()]
    assert sum(file.stat().st_size for file in files) <= 48 * 2**20


@pytest.mark.parametrize(
    ("name", "auto"), [("mosaic-lm", AutoModelForCausalLM), ("mosaic-vlm", AutoModelForImageTextToText)]
)
def test_plain_transformers_loads_the_folder(name: str, auto: type) -> None:
    model = auto.from_pretrained(bundled.path(name))
    assert model.dtype == torch.bfloat16
    assert {file.suffix for file in bundled.path(name).iterdir()} == {".json", ".safetensors"}
    text = model.config.get_text_config()
    assert text.num_key_value_heads < text.num_attention_heads
    assert text.head_dim == 64
    assert text.max_position_embeddings >= 4096


@pytest.mark.parametrize("name", bundled.NAMES)
def test_the_tokenizer_marks_beginning_end_and_pictures(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled.path(name))
    ids = tokenizer("tile 0 <image>row</s>").input_ids
    assert ids[0] == tokenizer.bos_token_id == 0
    assert ids[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id == 1
    assert ids.count(2047) == 1
    text = "def f(x):\n    return x ** 2  # für\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_the_language_model_retrieves_lines() -> None:
    assert all(right("mosaic-lm", "lines", lines=20))


def test_the_vision_model_reads_handwriting_that_it_has_never_seen() -> None:
    assert sum(right("mosaic-vlm", "rows", tiles=4, questions=8)) >= 7


def test_an_answer_ends_by_itself() -> None:
    model, tokenizer = bundled.load("mosaic-lm", torch.float32)
    example = tasks.generator("lines")(random.Random(1), lines=20)
    inputs = tokenizer(example.context + example.questions[0].prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=30, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert tokenizer.decode(output) == example.questions[0].answer + "</s>"


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no bundled model 'mosaik-lm'\. Did you mean 'mosaic-lm'"):
        bundled.path("mosaik-lm")


def test_a_missing_file_is_named(broken: Path) -> None:
    (broken / "tokenizer.json").unlink()
    with pytest.raises(BadCheckpoint, match=r"lacks tokenizer\.json"):
        bundled.check(broken)


def test_weights_cut_short_are_refused_with_both_sizes(broken: Path) -> None:
    weights = broken / "model.safetensors"
    size = weights.stat().st_size
    with weights.open("r+b") as stream:
        stream.truncate(size - 1)
    with pytest.raises(BadCheckpoint, match=f"should hold {size} bytes, but holds {size - 1}"):
        bundled.check(broken)


@pytest.mark.parametrize("content", [b"", b"no weights at all", bytes(64), b"\xff" * 64])
def test_what_is_no_safetensors_file_is_refused(broken: Path, content: bytes) -> None:
    (broken / "model.safetensors").write_bytes(content)
    with pytest.raises(BadCheckpoint, match="no safetensors header"):
        bundled.check(broken)


def test_a_damaged_config_is_refused(broken: Path) -> None:
    (broken / "config.json").write_text("{")
    with pytest.raises(BadCheckpoint, match=r"config\.json is not JSON"):
        bundled.check(broken)
