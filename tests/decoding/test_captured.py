"""Captured decoding says what eager generate says with the same cache. On the emulated GPU nothing is captured, but all that a
graph would hold runs: the same kernels, lengths on the device, one token a step."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import kvmosaic
from kvmosaic import Cache, Decoder, Recipe, methods
from kvmosaic.decoding import captured
from tests import learned, models
from tests.instances import EXACT
from tests.models import Row, prompt

TEXT = ["exact", "kivi bits=2 residual=32", "mosaic bits=2", "snapkv keep=0.5 | kivi bits=4 residual=32"]
TEXT += ["h2o tokens=40 recent=8", "zipcache gather=8", "zipvl mass=0.7 gather=8 evict=true"]
TEXT += ["adakv keep=0.5 window=8 floor=0 | kivi bits=4 residual=32"]
VISUAL = ["calibquant", "calibquant bits=2 | kivi bits=2 residual=32"]
PADDED = (Row(), Row(text=31, seed=1))


def bfloat16(kind: str, device: torch.device) -> Any:
    return copy.deepcopy(models.model(kind)).to(device, torch.bfloat16)


def inputs_for(kind: str, device: torch.device, *rows: Row) -> dict[str, Any]:
    inputs = prompt(kind, *rows)
    return {name: x.to(device, torch.bfloat16 if x.is_floating_point() else x.dtype) for name, x in inputs.items()}


def recipe(text: str) -> Recipe:
    return Recipe(tiers=(EXACT,)) if text == "exact" else methods.parse(text)


def eager(model: Any, inputs: dict[str, Any], text: str, **options: Any) -> Tensor:
    return model.generate(**inputs, past_key_values=Cache(model, recipe(text)), do_sample=False, **options)


def ours(model: Any, inputs: dict[str, Any], text: str, **options: Any) -> Any:
    return kvmosaic.generate(model, method=recipe(text), compiled=False, do_sample=False, **inputs, **options)


@pytest.mark.parametrize("text", TEXT)
def test_captured_is_eager_on_padded_batches_and_across_flushes(text: str, gpu_device: torch.device) -> None:
    model, inputs = bfloat16("llama", gpu_device), inputs_for("llama", gpu_device, *PADDED)
    tokens = 40 if "kivi" in text else 10
    assert torch.equal(
        ours(model, inputs, text, max_new_tokens=tokens), eager(model, inputs, text, max_new_tokens=tokens)
    )


@pytest.mark.parametrize("window", ["", "window=20"])
def test_captured_is_eager_with_coupled_channels(window: str, gpu_device: torch.device) -> None:
    model, inputs = bfloat16("llama", gpu_device), inputs_for("llama", gpu_device, *PADDED)
    text = learned.recipe("llama", "cq coupled=4 bits=4", window)
    assert torch.equal(ours(model, inputs, text, max_new_tokens=10), eager(model, inputs, text, max_new_tokens=10))


@pytest.mark.parametrize("text", VISUAL)
@pytest.mark.parametrize("kind", ["internvl", "llava_onevision", "qwen2_5_vl"])
def test_captured_is_eager_on_pictures(kind: str, text: str, gpu_device: torch.device) -> None:
    model, inputs = bfloat16(kind, gpu_device), inputs_for(kind, gpu_device)
    assert torch.equal(ours(model, inputs, text, max_new_tokens=8), eager(model, inputs, text, max_new_tokens=8))


@pytest.mark.parametrize("text", ["mosaic", "adakv keep=0.9 window=8", "h2o keep=0.6", "zipcache"])
def test_the_next_prompt_uses_the_same_step_if_it_fits(text: str, gpu_device: torch.device) -> None:
    model = bfloat16("llama", gpu_device)
    decoder = Decoder(model, recipe(text), capacity=80, compiled=False)
    steps = []
    for row in (Row(text=45), Row(text=31, seed=1), Row(text=150, seed=2)):
        inputs = inputs_for("llama", gpu_device, row)
        said = decoder.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert torch.equal(said, eager(model, inputs, text, max_new_tokens=8))
        steps.append(decoder._steps)
    assert steps[0] is steps[1], "a shorter prompt fits"
    assert steps[2] is not steps[1], "more than the capacity makes it grow"


@pytest.mark.parametrize("text", ["kivi residual=32", "h2o tokens=40 recent=8", "zipcache gather=3"])
def test_a_row_that_has_ended_is_padded_and_the_cache_goes_on_from_the_end(text: str, gpu_device: torch.device) -> None:
    model, inputs = bfloat16("llama", gpu_device), inputs_for("llama", gpu_device, *PADDED)
    free = eager(model, inputs, text, max_new_tokens=12)[:, inputs["input_ids"].shape[1] :]
    stops = [int(free[0, 3]), int(free[1, 6])]
    answers = []
    for captured_too in (True, False):
        cache = Cache(model, recipe(text))
        options = dict(eos_token_id=stops, max_new_tokens=12, do_sample=False)
        if captured_too:
            said = kvmosaic.generate(model, compiled=False, past_key_values=cache, **inputs, **options)
        else:
            said = model.generate(**inputs, past_key_values=cache, **options)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(said[:, inputs["input_ids"].shape[1] :])], 1)
        more = model.generate(
            input_ids=said, attention_mask=mask, past_key_values=cache, max_new_tokens=6, do_sample=False
        )
        answers.append((said, cache.get_seq_length(), more))
    assert answers[0][1] == answers[1][1]
    assert torch.equal(answers[0][0], answers[1][0]) and torch.equal(answers[0][2], answers[1][2])


def test_steps_are_generates_own_until_the_first_tokens_are_there(gpu_device: torch.device) -> None:
    model, inputs = bfloat16("llama", gpu_device), inputs_for("llama", gpu_device, *PADDED)
    method = Recipe(first=50) | methods.parse("h2o tokens=40 recent=8")  # more than the prompts have
    options = dict(max_new_tokens=30, do_sample=False, **inputs)
    decoder = Decoder(model, method, compiled=False)
    said = decoder.generate(**options)
    assert decoder._steps is not None and decoder._steps.done == 29 - (50 - 31), "the others were captured"
    assert torch.equal(said, model.generate(past_key_values=Cache(model, method), **options))


class Tenth(StoppingCriteria):
    """Every row stops when there are ten more tokens than `before`."""

    def __init__(self, before: int) -> None:
        self.before = before

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full(input_ids.shape[:1], input_ids.shape[1] >= self.before + 10, device=input_ids.device)


def test_processors_and_criteria_that_look_at_tokens_are_asked(gpu_device: torch.device) -> None:
    model, inputs = bfloat16("llama", gpu_device), inputs_for("llama", gpu_device)
    before = inputs["input_ids"].shape[1]
    options = dict(max_new_tokens=20, repetition_penalty=1.7, stopping_criteria=StoppingCriteriaList([Tenth(before)]))
    said = ours(model, inputs, "mosaic", **options)
    assert said.shape[1] == before + 10
    assert torch.equal(said, eager(model, inputs, "mosaic", **options))


def test_sampling_among_the_best_one_is_greedy(gpu_device: torch.device) -> None:
    model, inputs = bfloat16("llama", gpu_device), inputs_for("llama", gpu_device)
    said = kvmosaic.generate(
        model, method=recipe("mosaic"), compiled=False, do_sample=True, top_k=1, max_new_tokens=6, **inputs
    )
    assert torch.equal(said, eager(model, inputs, "mosaic", max_new_tokens=6))


class Kept(BaseStreamer):
    def __init__(self) -> None:
        self.pieces: list[Tensor] = []
        self.over = False

    def put(self, value: Tensor) -> None:
        self.pieces.append(value.flatten())

    def end(self) -> None:
        self.over = True


def test_a_streamer_gets_prompt_and_tokens_in_order(gpu_device: torch.device) -> None:
    model, inputs = bfloat16("llama", gpu_device), inputs_for("llama", gpu_device)
    streamer = Kept()
    said = ours(model, inputs, "mosaic", max_new_tokens=9, streamer=streamer, return_dict_in_generate=True)
    assert streamer.over and torch.equal(torch.cat(streamer.pieces), said.sequences[0].cpu())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["llama", "internvl", "qwen2_5_vl"])
def test_a_step_compiles_to_one_graph_without_breaks(
    kind: str, gpu_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = bfloat16(kind, gpu_device), inputs_for(kind, gpu_device)
    compile, graphs = torch.compile, []

    def counting(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend=counting, fullgraph=True, **options))
    for _ in range(2):
        said = kvmosaic.generate(
            model, method=recipe("mosaic"), compiled=True, max_new_tokens=5, do_sample=False, **inputs
        )
    assert torch.equal(said, eager(model, inputs, "mosaic", max_new_tokens=5))
    if kind != "qwen2_5_vl":  # whose model keeps the offset of its positions, another tensor for every prompt
        assert len(graphs) == 1, "the second cache is served by the same graph"


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("llama", "turboquant bits=3", "two planes"),
        ("gemma3_text", "mosaic", "layer 0 does not attend to the whole context"),
    ],
)
def test_what_cannot_be_captured_runs_as_it_is_and_says_so_once(
    kind: str, text: str, reason: str, gpu_device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    captured._tell.cache_clear()
    model, inputs = bfloat16(kind, gpu_device), inputs_for(kind, gpu_device)
    with caplog.at_level(logging.INFO, "kvmosaic"):
        for _ in range(2):
            said = ours(model, inputs, text, max_new_tokens=4)
    assert torch.equal(said, eager(model, inputs, text, max_new_tokens=4))
    assert [reason in each.message for each in caplog.records] == [True]


def test_without_a_gpu_generate_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    captured._tell.cache_clear()
    model, inputs = models.model("llama"), prompt("llama")
    with caplog.at_level(logging.INFO, "kvmosaic"):
        said = ours(model, inputs, "mosaic", max_new_tokens=4)
    assert torch.equal(said, eager(model, inputs, "mosaic", max_new_tokens=4))
    assert "not an NVIDIA GPU" in caplog.text


def test_what_a_captured_step_does_not_have_is_refused(gpu_device: torch.device) -> None:
    model, inputs = bfloat16("llama", gpu_device), inputs_for("llama", gpu_device)
    with pytest.raises(ValueError, match="captured decoding has no beams"):
        ours(model, inputs, "mosaic", max_new_tokens=4, num_beams=2)
    with pytest.raises(ValueError, match="no output_scores"):
        ours(model, inputs, "mosaic", max_new_tokens=4, output_scores=True, return_dict_in_generate=True)
