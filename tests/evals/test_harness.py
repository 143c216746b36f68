"""Answers are read through the compressed cache, and counted rightly."""

import copy
import json
import math
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

import kvmosaic
from kvmosaic import methods
from kvmosaic.errors import BadPicture
from kvmosaic.evals import calibrate, harness, suite, tasks
from kvmosaic.evals.example import Example, Question
from kvmosaic.evals.scores import Share, symbols
from kvmosaic.loading import Opened, open_model

PACKED = "kivi bits=2 residual=32"


@pytest.fixture(scope="module")
def language() -> Opened:
    return open_model("mosaic-lm", "float32")


@pytest.fixture(scope="module")
def vision() -> Opened:
    return open_model("mosaic-vlm", "float32")


def test_a_batch_of_questions_is_answered_as_each_alone(vision: Opened) -> None:
    example = tasks.generator("rows")(random.Random(0), tiles=4, questions=6)
    cache, start = harness.prefill(vision, methods.parse("calibquant bits=1"), example)
    together = harness.ask(vision, cache, start, example.questions, harness.Memory(), harness.Clock())
    for question, text in zip(example.questions, together, strict=True):
        assert harness.ask(vision, cache, start, [question], harness.Memory(), harness.Clock()) == [text]


def test_a_question_leaves_the_context_as_it_was(language: Opened) -> None:
    example = tasks.generator("lines")(random.Random(0), lines=20, questions=3)
    cache, start = harness.prefill(language, methods.parse(PACKED), example)
    before = cache.report()
    harness.ask(language, cache, start, example.questions, harness.Memory(), harness.Clock())
    assert cache.report() == before


def test_answers_are_those_of_generate(language: Opened) -> None:
    example = tasks.generator("lines")(random.Random(1), lines=20, questions=1)
    (question,) = example.questions
    recipe = methods.parse(PACKED)
    cache, start = harness.prefill(language, recipe, example)
    (text,) = harness.ask(language, cache, start, [question], harness.Memory(), harness.Clock())
    other = kvmosaic.Cache(language.model, recipe)
    context = language.inputs(example.context)
    with torch.inference_mode():
        language.model(**context, past_key_values=other)
    ids = torch.cat([context["input_ids"], language.ids(question.prompt)], 1)
    length = language.ids(question.answer).shape[1]
    with torch.inference_mode():
        out = language.model.generate(ids, past_key_values=other, max_new_tokens=length, do_sample=False)
    assert language.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == text


def test_a_plain_prompt_reads_stored_tokens(language: Opened) -> None:
    example = Example("Records.\nline red: 12345\nask red:", (Question("", " 12345"),))
    cache, start = harness.prefill(language, methods.parse(PACKED), example)
    assert start.shape == (1, 1)
    assert cache.get_seq_length() == language.inputs(example.context)["input_ids"].shape[1] - 1


def test_a_score_counts_every_question(language: Opened) -> None:
    (task,) = suite.parse("lines lines=6 questions=3")
    row = harness.score(language, methods.parse("exact"), task, seeds=(0, 1), limit=2)
    assert row["n"] == 12
    assert row["score"] > 0.9
    assert row["compression"] == 1
    assert row["bytes_per_token"] == row["exact_bytes_per_token"] == 8 * 2 * 2 * 64 * 4


def test_memory_is_that_of_the_whole_cache(language: Opened) -> None:
    (task,) = suite.parse("lines lines=30 questions=1")
    recipe = methods.parse(PACKED)
    row = harness.score(language, recipe, task, limit=1)
    (example,) = harness._examples(task, (0,), 1)
    cache, start = harness.prefill(language, recipe, example)
    (question,) = example.questions
    turn = torch.cat([start, language.ids(question.prompt)], 1)
    _, full = harness.answer(language, cache, [turn], [language.ids(question.answer).shape[1]])
    assert row["compression"] == pytest.approx(full.report().compression)


def test_perplexity_of_the_exact_cache_is_that_of_one_pass(language: Opened) -> None:
    (task,) = suite.parse("perplexity tokens=64 chunk=8 texts=1")
    row = harness.score(language, methods.parse("exact"), task)
    ids = language.inputs(task.texts[0])["input_ids"][:, :64]
    with torch.inference_mode():
        logits = language.model(input_ids=ids).logits[0].log_softmax(-1)
    losses = -logits[7:-1].gather(1, ids[0, 8:, None])
    assert row["score"] == pytest.approx(math.exp(losses.mean()), rel=1e-4)
    assert row["n"] == 56


def test_perplexity_reads_the_compressed_cache(language: Opened) -> None:
    (task,) = suite.parse("perplexity tokens=128 chunk=8 texts=1")
    exact = harness.score(language, methods.parse("exact"), task)["score"]
    assert harness.score(language, methods.parse("kivi bits=1 residual=32"), task)["score"] > 1.01 * exact


def test_intervals_are_wilsons() -> None:
    share = Share()
    for index in range(10):
        share.add(index < 9)
    assert share.interval == pytest.approx((0.5958, 0.9821), abs=1e-4)  # statsmodels' proportion_confint
    assert Share().interval == (0, 1)


def test_symbols_are_compared_in_their_places() -> None:
    assert symbols(" 1 2 3", " 1 9 3 4") == [True, False, True]
    assert symbols(" 1 2 3", "") == [False] * 3


def test_tasks_are_divided_by_semicolons() -> None:
    labels = [task.label for task in suite.parse("lines lines=5; rows tiles=2 questions=1 ;perplexity")]
    assert labels == ["lines lines=5", "rows tiles=2 questions=1", "perplexity"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" ; ", "no task in"),
        ("lines lines", "written option=value"),
        ("lines rng=1", "lines has no option 'rng'"),
        ("lines lines=0", "lines must be 1 to"),
        ("perplexity chunk=0", "perplexity needs"),
    ],
)
def test_bad_tasks_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        suite.parse(text)


def test_a_users_file_is_a_task(vision: Opened, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    rows = [{"prompt": "a b a", "answer": "b"}, {"prompt": "<image> what?", "answer": "x y", "image": "black.png"}]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (task,) = suite.parse(str(file))
    row = harness.score(vision, methods.parse("calibquant bits=2"), task)
    assert row["n"] == 2


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("{", ValueError, "line 1"),
        ('{"prompt": "a"}', ValueError, "line 1"),
        ('["a", "b"]', ValueError, "line 1"),
        ('{"prompt": "a", "answer": " "}', ValueError, "the answer is empty"),
        ('{"prompt": "<image>", "answer": "b"}', BadPicture, "1 <image> markers for 0 pictures"),
        ('{"prompt": "a", "answer": "b", "image": "none.png"}', BadPicture, "cannot read the picture"),
        ("", ValueError, "has no lines"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, error: type, message: str) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(line)
    with pytest.raises(error, match=message):
        suite.parse(str(file))


def test_a_picture_for_a_text_model_is_refused(language: Opened) -> None:
    with pytest.raises(BadPicture, match="reads text only"):
        language.inputs("<image>", [Image.new("RGB", (64, 64))])


def test_samples_encoded_anew_are_those_of_a_real_prefill(vision: Opened) -> None:
    """Calibration encodes the exact cache again; a prefill through the recipe gives the same logits."""
    (example,) = calibrate.generated(1, seed=0, questions=3)
    (sample,) = calibrate.samples(vision, [example])
    bits = calibrate.Bits(1, 1)
    setting = calibrate.Setting(0.6, 0.4, 0.0, 1.0)
    again = calibrate.divergence(vision, [sample], bits, [setting] * 8)
    cache, _ = harness.prefill(vision, bits.recipe(setting), example)
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(len(sample.turns))
    with torch.inference_mode():
        got = calibrate._logits(vision, cache, sample.turns, sample.predicted)
    each = (sample.exact.exp() * (sample.exact - got)).sum(-1)
    assert again == pytest.approx(float(each.mean()), rel=1e-4)
    assert again > 0


def test_the_search_finds_what_is_better_on_other_pictures(vision: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "CLIPS", (0.3, 0.6, 1.0))
    monkeypatch.setattr(calibrate, "OFFSETS", (0.0,))
    parts = calibrate.samples(vision, calibrate.generated(2, seed=0, questions=4))
    found = list(calibrate.search(vision, parts, 1, 1, per_layer=False))
    assert found[-1].held_out == min(each.held_out for each in found)
    plain = calibrate.divergence(vision, parts[1:], calibrate.Bits(1, 1), [calibrate.Setting(1.0, 1.0)] * 8)
    assert found[-1].held_out < plain
