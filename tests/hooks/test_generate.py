"""Every mode of generate: beside a dense cache that loses the same, and beside the stock cache with exact tiers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvmosaic import Cache, Recipe, methods
from kvmosaic.codecs import Uniform
from kvmosaic.errors import CannotRollBack
from kvmosaic.stores import Coded, Lane
from tests import models, reference
from tests.instances import EXACT
from tests.models import Row, generate, prompt

Make = Callable[[], Any]
EXACTLY = Recipe(tiers=(EXACT,))
SHORT = methods.kivi(bits=2, residual=32)


def more(count: int, seed: int = 5) -> Tensor:
    return torch.randint(2, 180, (1, count), generator=torch.Generator().manual_seed(seed))


def fresh(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: each.clone() for name, each in inputs.items()}


def second_turn(model: Any, inputs: dict[str, Any], cache: Any, full: bool) -> Tensor:
    said = torch.cat([inputs["input_ids"], generate(model, inputs, cache, 20)], 1)
    if full:
        return model.generate(
            input_ids=torch.cat([said, more(9)], 1), past_key_values=cache, max_new_tokens=20, do_sample=False
        )[:, -20:]
    # only the new ids: the last generated token was never fed, and the mask covers everything
    mask = torch.ones(1, said.shape[1] + 9, dtype=torch.int64)
    ids = torch.cat([said[:, -1:], more(9)], 1)
    return model.generate(
        input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=20, do_sample=False
    )[:, -20:]


def shared_prefix(model: Any, inputs: dict[str, Any], cache: Any) -> Tensor:
    model(**inputs, past_key_values=cache, use_cache=True)
    said = []
    for seed in (1, 2):
        ids = torch.cat([inputs["input_ids"], more(6, seed)], 1)
        own = copy.deepcopy(cache)
        said.append(model.generate(input_ids=ids, past_key_values=own, max_new_tokens=20, do_sample=False)[:, -20:])
        assert cache.get_seq_length() == inputs["input_ids"].shape[1]
    return torch.cat(said)


def by_hand(model: Any, inputs: dict[str, Any], cache: Any) -> Tensor:
    """`model(...)` in a loop, without position ids."""
    said, feed = [], fresh(inputs)
    for _ in range(30):
        said.append(model(**feed, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1))
        feed = {"input_ids": said[-1]}
    return torch.cat(said, 1)


def steady(inputs: dict[str, Any]) -> dict[str, Any]:
    """Prompt lookup finds little in random text: give it some that repeats."""
    ids = inputs["input_ids"].clone()
    ids[:, -24:] = ids[:, -12:].repeat(1, 2)
    return inputs | {"input_ids": ids}


MODES: dict[str, Callable[[Any, dict[str, Any], Any], Tensor]] = {
    "greedy": lambda m, x, c: generate(m, x, c, 40),
    "sampling": lambda m, x, c: generate(m, x, c, 40, do_sample=True, temperature=0.7),
    "several sequences": lambda m, x, c: generate(m, x, c, 30, do_sample=True, num_return_sequences=3),
    "beams": lambda m, x, c: generate(m, x, c, 30, num_beams=4),
    "several beams": lambda m, x, c: generate(m, x, c, 20, num_beams=3, num_return_sequences=2),
    "prompt lookup": lambda m, x, c: generate(m, steady(x), c, 40, prompt_lookup_num_tokens=4),
    "assistant": lambda m, x, c: generate(m, x, c, 40, assistant_model=models.stock("qwen2")),
    "second turn, all ids": lambda m, x, c: second_turn(m, x, c, True),
    "second turn, new ids": lambda m, x, c: second_turn(m, x, c, False),
    "shared prefix": shared_prefix,
    "by hand": by_hand,
    "a dict": lambda m, x, c: generate(m, x, c, 20, return_dict_in_generate=True, output_scores=True),
}
TEXT_ONLY = {
    "chunked prefill": lambda m, x, c: generate(m, x, c, 20, prefill_chunk_size=16),
    "chunks of one": lambda m, x, c: generate(m, x, c, 20, prefill_chunk_size=1),
}
CASES = [(kind, mode) for kind in ("llama", "gemma3_text") for mode in (*MODES, *TEXT_ONLY)]
CASES += [("internvl", mode) for mode in MODES if mode != "assistant"]


def run(kind: str, mode: str, model: Any, cache: Any) -> Tensor:
    inputs = prompt(kind, Row(75, 2, 3))
    return (MODES | TEXT_ONLY)[mode](model, inputs, cache)


def stock(kind: str) -> tuple[Any, DynamicCache]:
    model = models.stock(kind)
    return model, DynamicCache(config=model.config.get_text_config(decoder=True))


@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_exact_tiers_change_no_mode(kind: str, mode: str) -> None:
    mine = run(kind, mode, models.model(kind), Cache(models.model(kind), EXACTLY))
    assert torch.equal(mine, run(kind, mode, *stock(kind)))


@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_kivi_loses_what_the_dense_reference_loses(kind: str, mode: str) -> None:
    dense = reference.cache(models.stock(kind), reference.kivi(2, residual=32))
    mine = run(kind, mode, models.model(kind), Cache(models.model(kind), SHORT))
    assert torch.equal(mine, run(kind, mode, models.stock(kind), dense))
    if mode in ("greedy", "beams", "prompt lookup"):
        assert not torch.equal(mine, run(kind, mode, *stock(kind))), "2 bits must show"


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "assistant"])
def test_calibquant_loses_what_the_dense_reference_loses(mode: str) -> None:
    model, visual = models.model("internvl"), prompt("internvl", Row(75, 2, 3))["input_ids"][0] == models.IMAGE
    dense = reference.cache(models.stock("internvl"), reference.calibquant(1, visual))
    recipe = methods.calibquant(bits=1, key_clip=1.0, value_clip=1.0, calibrated=False)
    mine = run("internvl", mode, model, Cache(model, recipe))
    assert torch.equal(mine, run("internvl", mode, models.stock("internvl"), dense))


@pytest.mark.parametrize(
    "options", [{"prompt_lookup_num_tokens": 4}, {"assistant_model": None}], ids=["lookup", "assistant"]
)
def test_speculation_says_what_greedy_says_while_nothing_is_encoded_between(options: dict[str, Any]) -> None:
    """Both sides flush at the same multiple, which is not reached while decoding: then the codes are the same."""
    keys = Lane(Uniform(bits=2, axis="channel", group=32), 0, 128)
    recipe = Recipe(tiers=(Coded(keys, Lane(Uniform(bits=2, axis="token", group=32), 0, 128)),))
    model, inputs = models.model("llama"), steady(prompt("llama", Row(150, 0, 2)))
    if "assistant_model" in options:
        options = {"assistant_model": models.stock("qwen2")}
    cache = Cache(model, recipe)
    assert torch.equal(generate(model, inputs, cache, 60, **options), generate(model, inputs, Cache(model, recipe), 60))
    assert cache.report().codes > 0


def test_speculation_over_compressed_pictures_says_what_greedy_says() -> None:
    """Pictures are encoded once, at the prompt, and text stays exact: so rolling back changes nothing."""
    model, inputs = models.model("internvl"), steady(prompt("internvl", Row(60, 3, 2)))
    recipe = methods.calibquant(bits=1)
    mine = generate(model, inputs, Cache(model, recipe), 50, prompt_lookup_num_tokens=4)
    assert torch.equal(mine, generate(model, inputs, Cache(model, recipe), 50))


def test_what_was_taken_back_leaves_no_trace() -> None:
    """Tokens come, go, and others come: as if the first had never been."""
    model, recipe = models.model("llama"), SHORT
    ids, wrong, right = more(70), more(9, 6), more(40, 7)
    cache, plain = Cache(model, recipe), Cache(model, recipe)
    for each in (cache, plain):
        model(ids, past_key_values=each)
    cache.activate_past_recording()
    for start in range(0, 40, 5):
        model(torch.cat([right[:, start : start + 5], wrong], 1), past_key_values=cache)
        cache.crop(-9)
        plain.activate_past_recording()
        model(right[:, start : start + 5], past_key_values=plain)
        plain.crop(0)
        for (name, _, mine), (_, _, other) in zip(cache.tensors(), plain.tensors(), strict=True):
            assert torch.allclose(mine.float(), other.float(), atol=1e-5), name
    assert cache.get_seq_length() == plain.get_seq_length() == 110


def test_encoded_tokens_cannot_be_taken_back() -> None:
    model = models.model("llama")
    cache = Cache(model, SHORT)
    model(more(70), past_key_values=cache)
    before = [tensor.clone() for _, _, tensor in cache.tensors()]
    with pytest.raises(CannotRollBack, match=r"take back 3 tokens of layer 0, of which 0 .*activate_past_recording"):
        cache.crop(-3)
    with pytest.raises(CannotRollBack):
        cache.crop(3)
    assert all(torch.equal(a, b) for a, (_, _, b) in zip(before, cache.tensors(), strict=True))


def test_a_plain_turn_after_speculation_still_compresses() -> None:
    """Nothing tells a cache that speculation is over, so at most 128 tokens wait."""
    model, inputs = models.model("llama"), steady(prompt("llama", Row(75, 0, 3)))
    cache = Cache(model, SHORT)
    said = torch.cat([inputs["input_ids"], generate(model, inputs, cache, 20, prompt_lookup_num_tokens=4)], 1)
    generate(model, {"input_ids": torch.cat([said, more(200)], 1)}, cache, 30)
    layer = cache.layers[0]
    assert layer.pending is not None
    assert len(layer.pending) == 128
    assert int(layer.stores["tier 0"].length[0, 0]) == cache.get_seq_length() - 128


@pytest.mark.parametrize("recipe", [EXACTLY, SHORT], ids=["exact", "kivi"])
def test_a_cache_that_was_reset_is_a_new_one(recipe: Recipe) -> None:
    model, inputs = models.model("llama"), prompt("llama", Row(75, 0, 3))
    cache = Cache(model, recipe)
    first = generate(model, inputs, cache, 40)
    generate(model, {"input_ids": more(50)}, (cache.reset(), cache)[1], 5, prompt_lookup_num_tokens=4)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes() == 0
    assert torch.equal(generate(model, inputs, cache, 40), first)
    other = Cache(model, recipe)
    generate(model, inputs, other, 40)
    assert cache.nbytes() == other.nbytes()


def test_rows_can_be_repeated_and_chosen() -> None:
    """As contrastive search on the hub asks."""
    model = models.model("llama")
    cache, right = Cache(model, SHORT), Cache(model, SHORT)
    one, two = more(70, 1), more(70, 2)
    model(torch.cat([one, two]), past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    model(torch.cat([two, one]), past_key_values=right)
    step = torch.cat([more(1, 3), more(1, 4)])
    mine, other = model(step, past_key_values=cache).logits, model(step, past_key_values=right).logits
    assert torch.allclose(mine, other, rtol=0, atol=1e-4)
    cache.batch_select_indices(torch.tensor([True, False]))
    assert cache.layers[0].batch_size == 1
    model(more(1), past_key_values=cache)


@pytest.mark.parametrize("kind", models.VISUAL)
@pytest.mark.parametrize("mode", ["beams", "prompt lookup", "several sequences"])
def test_every_vision_model_in_the_harder_modes(kind: str, mode: str) -> None:
    recipe = methods.parse("calibquant bits=1 key_clip=1 value_clip=1 calibrated=false")
    visual = prompt(kind, Row(75, 2, 3))["input_ids"][0] == models.IMAGE
    dense = reference.cache(models.stock(kind), reference.calibquant(1, visual))
    mine = run(kind, mode, models.model(kind), Cache(models.model(kind), recipe))
    assert torch.equal(mine, run(kind, mode, models.stock(kind), dense))


def test_output_attentions_is_refused() -> None:
    """No weights over all tokens ever exist, and empty ones would be an answer."""
    model, inputs = models.model("llama"), prompt("llama", Row(40, 0, 3))
    with pytest.raises(ValueError, match=r"output_attentions.*exact"):
        generate(model, inputs, Cache(model, SHORT), 5, output_attentions=True, return_dict_in_generate=True)


@pytest.mark.parametrize(
    "text", ["kivi bits=1 residual=32", "mosaic bits=1", "h2o keep=0.3", "snapkv keep=0.3", "zipcache gather=8"]
)
def test_first_tokens_stay_exact_row_by_row(text: str) -> None:
    """Whatever the recipe, in a padded batch, and when they come in pieces."""
    model, inputs = models.model("llama"), prompt("llama", Row(75, 1, 0), Row(58, 3, 1))
    recipe = methods.parse(text) | Recipe(first=5)
    caches = Cache(model, recipe), Cache(model, Recipe(tiers=(EXACT,)))
    for cache in caches:
        model(**inputs, past_key_values=cache)
    for layer, exact in zip(*(cache.layers for cache in caches), strict=True):
        store, whole = layer.stores["first"], exact.stores["tier 0"]
        assert (store.length == 5).all()
        for mine, right in ((store.keys, whole.keys), (store.values, whole.values)):
            assert torch.equal(mine.ring, right.read(0, 5)["numbers"])
    inputs = prompt("llama", Row(30, 0, 0))
    pieces = Cache(model, recipe)
    for ids in inputs["input_ids"].split([2, 1, 1, 26], 1):
        model(ids, past_key_values=pieces)
    assert (pieces.layers[0].stores["first"].length == 5).all()
    stored = sum(int(store.length[0, 0]) for store in pieces.layers[0].stores.values())
    assert stored + len(pieces.layers[0].pending or ()) <= 30
