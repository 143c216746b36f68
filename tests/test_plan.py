"""Planned bytes are the bytes that a cache then holds."""

from typing import Any

import pytest
import torch

import kvmosaic
from kvmosaic import methods, plan
from kvmosaic.errors import BadCheckpoint, UnsupportedModel
from kvmosaic.recipe import Recipe
from tests import learned, models
from tests.instances import LEARNED

RECIPES = [
    "exact",
    "kivi bits=2",
    "kivi key_bits=8 value_bits=1 group=16 residual=48",
    "turboquant",
    "mosaic bits=1.5",
    "turboquant bits=2.5 outliers=8",
    "turboquant bits=3 variant=prod",
    "snapkv keep=0.3",
    "pyramidkv tokens=40 | kivi residual=32",
    "h2o keep=0.3",
    "streaming_llm tokens=54 | turboquant bits=3",
    "zipcache",
    "think",
    "think channels=20 recent=8 | snapkv keep=0.3",
    "think channels=16 | zipcache",
    "think pruned=0.5 | kivi residual=32",
    "zipvl mass=1.0 probes=10000",
]
VISUAL_RECIPES = [
    "calibquant bits=1",
    "think | calibquant bits=1",
    "calibquant bits=2 by_picture=True | kivi bits=4 residual=32",
]


def held(model: Any, recipe: str, inputs: dict[str, torch.Tensor]) -> int:
    cache = kvmosaic.Cache(model, methods.parse(recipe))
    with torch.inference_mode():
        model(**inputs, past_key_values=cache)
    return cache.report().total


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("tokens", [1, 31, 63, 129, 300])
def test_planned_bytes_are_held(recipe: str, tokens: int) -> None:
    model = models.model("llama")
    shape = plan.Shape.of(model.config, itemsize=4)
    ids = torch.randint(3, 150, (1, tokens))
    assert plan.cache_bytes(shape, methods.parse(recipe), tokens) == held(model, recipe, {"input_ids": ids})


@pytest.mark.parametrize("tokens", [1, 3, 40, 300])
def test_first_tokens_and_what_was_learned_are_counted(tokens: int) -> None:
    model = models.model("llama")
    shape, ids = plan.Shape.of(model.config, itemsize=4), torch.randint(3, 150, (2, tokens))
    for text in ("kivi bits=2 residual=32", *(learned.recipe("llama", text, "first=4") for text in LEARNED)):
        recipe = methods.parse(text) | Recipe(first=4)
        cache = kvmosaic.Cache(model, recipe)
        with torch.inference_mode():
            model(ids, past_key_values=cache)
        learned_once = plan.learned_bytes(shape, recipe) if tokens > 4 else 0  # a tier that has no token has no store
        assert 2 * plan.cache_bytes(shape, recipe, tokens) + learned_once == cache.report().total
    assert learned_once == cache.report().learned


@pytest.mark.parametrize("tokens", [5, 17, 60])
def test_sliding_layers_are_counted_by_their_window(tokens: int) -> None:
    model = models.model("gemma3_text")
    cache = kvmosaic.Cache(model, methods.exact())
    ids = torch.randint(3, 150, (1, tokens))
    with torch.inference_mode():
        for part in (ids[:, :-1], ids[:, -1:]):
            model(input_ids=part, past_key_values=cache)
    counter = 8  # the sliding layer counts its tokens in a tensor
    planned = plan.cache_bytes(plan.Shape.of(model.config, itemsize=4), methods.exact(), tokens)
    assert planned + counter == cache.report().total


@pytest.mark.parametrize("recipe", VISUAL_RECIPES + RECIPES)
def test_planned_bytes_with_pictures_are_held(recipe: str) -> None:
    model = models.model("internvl")
    inputs = models.prompt("internvl", models.Row(text=70, pictures=2))
    visual = int((inputs["input_ids"] == models.IMAGE).sum())
    tokens = inputs["input_ids"].shape[1]
    shape = plan.Shape.of(model.config, itemsize=4)
    planned = plan.cache_bytes(shape, methods.parse(recipe), tokens, visual, pictures=2)
    assert planned == held(model, recipe, inputs)


@pytest.mark.parametrize(
    ("name", "billions"),  # as the models' makers publish them
    [
        ("llama-3.1-8b", 8.03),
        ("llama-3.1-70b", 70.55),
        ("qwen3-8b", 8.19),
        ("mistral-7b-v0.3", 7.25),
        ("internvl2.5-8b", 8.08),
        ("internvl2.5-26b", 25.51),
        ("llava-onevision-7b", 8.03),
        ("qwen2.5-vl-7b", 8.29),
    ],
)
def test_shipped_configs_have_the_published_size(name: str, billions: float) -> None:
    assert plan.count_parameters(plan.load_config(name)) / 1e9 == pytest.approx(billions, abs=0.006)


@pytest.mark.parametrize(
    ("name", "nbytes"),
    [("llama-3.1-8b", 131072), ("internvl2.5-8b", 131072), ("internvl2.5-26b", 196608), ("qwen2.5-vl-7b", 57344)],
)
def test_exact_bytes_per_token_are_the_known_ones(name: str, nbytes: int) -> None:
    shape = plan.Shape.of(plan.load_config(name))
    assert plan.cache_bytes(shape, methods.exact(), 1) == nbytes


def test_what_is_planned_to_fit_fits_and_no_more() -> None:
    shape = plan.Shape.of(plan.load_config("internvl2.5-8b"))
    recipe = methods.parse("calibquant bits=1 | kivi bits=2")
    memory, weights = 24 * 10**9, 16 * 10**9
    row = plan.row(shape, recipe, context=4096, batch=3, visual=3328, memory=memory, weights=weights)

    def size(tokens: int) -> int:
        return 3 * plan.cache_bytes(shape, recipe, tokens, round(tokens * 3328 / 4096))

    room = memory - weights
    assert size(row["longest_context"]) <= room < size(row["longest_context"] + 1)
    one = plan.cache_bytes(shape, recipe, 4096, 3328)
    assert row["largest_batch"] * one <= room < (row["largest_batch"] + 1) * one


def test_a_budget_of_memory_is_planned_to_its_size() -> None:
    shape = plan.Shape.of(plan.load_config("llama-3.1-8b"))
    row = plan.row(shape, methods.parse("snapkv gigabytes=2"), context=32768, batch=4, visual=0, memory=None, weights=0)
    assert 1.99e9 < row["cache_bytes"] <= 2e9


def test_nothing_fits_beside_weights_that_are_too_large() -> None:
    shape = plan.Shape.of(plan.load_config("llama-3.1-70b"))
    row = plan.row(shape, methods.exact(), context=10, batch=1, visual=0, memory=10**9, weights=10**11)
    assert (row["largest_batch"], row["longest_context"]) == (0, 0)


@pytest.mark.parametrize(
    ("recipe", "numbers", "error", "message"),
    [
        ("exact", {"context": 0}, ValueError, "context and batch are at least 1"),
        ("exact", {"visual": 200}, ValueError, "at most the context"),
        ("exact", {"visual": 5}, UnsupportedModel, "takes no pictures"),
        ("calibquant bits=1", {}, UnsupportedModel, "takes no pictures"),
    ],
)
def test_impossible_plans_are_refused(recipe: str, numbers: dict[str, int], error: type, message: str) -> None:
    shape = plan.Shape.of(plan.load_config("llama-3.1-8b"))
    numbers = {"context": 100, "batch": 1, "visual": 0, **numbers}
    with pytest.raises(error, match=message):
        plan.row(shape, methods.parse(recipe), **numbers, memory=None, weights=0)


def test_an_unknown_model_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(BadCheckpoint, match=r"no model 'qwen3-8'\. Did you mean 'qwen3-8b'"):
        plan.load_config("qwen3-8")
