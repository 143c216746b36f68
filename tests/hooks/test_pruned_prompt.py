"""A prompt in pieces that is brought back to one budget after each of them."""

import copy

import pytest
import torch

from kvmosaic import Cache, Recipe, methods
from kvmosaic.errors import CannotRollBack, RecipeConflict
from kvmosaic.selection import Budget, Recency, TopTokens
from tests import models
from tests.hooks.test_whole_prompt import feed
from tests.models import Row, logits, prompt

pytestmark = pytest.mark.usefixtures("references")

PRUNING = ["snapkv window=8", "pyramidkv window=1", "h2o_prefill recent=8", "expected_attention recent=8"]


@pytest.mark.parametrize("text", PRUNING)
def test_no_more_wait_than_the_budget_and_it_holds_for_the_whole_prompt(text):
    model, ids = models.model("llama"), prompt("llama", Row(97, 0))["input_ids"]
    cache = Cache(model, methods.parse(f"{text} tokens=20"), pruned_prompt=True)
    for piece in ids.split(25, 1):
        model(piece, past_key_values=cache)
        for name in ("keys", "query"):
            assert sum(getattr(layer.pending, name).shape[2] for layer in cache.layers) <= 40
        assert sum(layer.pending.place.ge(0).sum() for layer in cache.layers) <= 4 * 20
    cache.settle()
    assert sum(layer.stores["tier 0"].length.sum() for layer in cache.layers) == 4 * 20
    assert cache.get_seq_length() == 97


@pytest.mark.parametrize("text", [*PRUNING, "snapkv window=8 {} | kivi residual=32", "snapkv {} | think channels=16"])
def test_a_budget_that_holds_all_is_the_whole_prompt(text):
    model, inputs = models.model("llama"), prompt("llama", Row(75, 0, 0), Row(58, 0, 1))
    text = text if "{}" in text else text + " {}"
    for budget in ("tokens=100", "keep=1.0", "gigabytes=1"):
        recipe = methods.parse(text.format(budget))
        mine = logits(model, inputs, Cache(model, recipe, pruned_prompt=True), 8, prefill_chunk_size=32)
        whole = logits(model, inputs, Cache(model, recipe, whole_prompt=True), 8, prefill_chunk_size=32)
        assert torch.allclose(mine, whole, atol=1e-3)


@pytest.mark.parametrize("text", PRUNING)
def test_one_piece_is_selected_from_as_ever(text):
    model, ids = models.model("llama"), prompt("llama", Row(97, 0))["input_ids"]
    recipe = methods.parse(f"{text} keep=0.3")
    cache, plain = Cache(model, recipe, pruned_prompt=True), Cache(model, recipe)
    feed(model, cache, ids, 97)
    cache.settle()
    feed(model, plain, ids, 97)
    held = {name: tensor for name, _, tensor in plain.tensors()}
    assert all(torch.equal(tensor, held[name]) for name, _, tensor in cache.tensors())


@pytest.mark.parametrize("sizes", [(97,), (33, 31, 33), (1, 60, 36)])
def test_what_does_not_depend_on_attention_is_chosen_as_at_once(sizes):
    """The first tokens and the newest: keys of the first layer are those of the whole prompt, whatever was dropped."""
    model, inputs = models.model("llama"), prompt("llama", Row(97, 0, 0), Row(71, 0, 1))
    recipe = Recipe(selection=TopTokens(scorer=Recency(), budget=Budget(tokens=20), sinks=4))
    kept = []
    for pieces in (sizes, (97,)):
        cache, start = Cache(model, recipe, pruned_prompt=True), 0
        for size in pieces:
            stop = start + size
            mask, ids = inputs["attention_mask"][:, :stop], inputs["input_ids"][:, start:stop]
            place = (mask.cumsum(1) - 1).clamp_min(0)[:, start:]
            model(ids, attention_mask=mask, position_ids=place, past_key_values=cache)
            start = stop
        cache.settle()
        store = cache.layers[0].stores["tier 0"]
        assert store.length.eq(20).all()
        kept.append(store.keys.read(0, 20)["numbers"])
    assert torch.allclose(*kept, atol=1e-5)


def test_a_padded_batch_is_two_single_runs():
    model, recipe = models.model("llama"), methods.parse("snapkv keep=0.4 window=4")
    rows = Row(96, 0), Row(64, 0, 1)  # pieces of 32 begin alike in both

    def run(inputs):
        return logits(model, inputs, Cache(model, recipe, pruned_prompt=True), 6, prefill_chunk_size=32)

    both = run(prompt("llama", *rows))
    for index, row in enumerate(rows):
        assert torch.allclose(both[:, index], run(prompt("llama", row))[:, 0], atol=1e-3)


def test_copied_and_repeated_between_pieces_it_goes_on_alike():
    model, ids = models.model("llama"), prompt("llama", Row(97, 0))["input_ids"]
    cache = Cache(model, methods.parse("snapkv tokens=20 window=8"), pruned_prompt=True)
    feed(model, cache, ids[:, :64], 32, 32)
    other = copy.deepcopy(cache)
    other.batch_repeat_interleave(2)
    one = model(ids[:, 64:], past_key_values=cache).logits
    two = model(ids[:, 64:].expand(2, -1), past_key_values=other).logits
    assert torch.allclose(one.expand_as(two), two, atol=1e-4)
    with pytest.raises(CannotRollBack):
        cache.crop(-1)


def test_a_budget_of_memory_holds_for_the_whole_prompt():
    model, ids = models.model("llama"), prompt("llama", Row(900, 0))["input_ids"]
    cache = Cache(model, methods.parse("snapkv gigabytes=0.0003 window=8"), pruned_prompt=True)
    feed(model, cache, ids, *[100] * 9)
    cache.settle()
    assert 0.9 * 300_000 < cache.nbytes() <= 300_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adakv", "does not choose, head by head, as many tokens"),
        ("kvzip", "does not choose, head by head"),
        ("zipcache", "does not choose, head by head"),
        ("kivi", "does not choose, head by head"),
        ("h2o tokens=40", "evicts while decoding"),
    ],
)
def test_what_cannot_be_pruned_as_it_comes_is_refused(text, message):
    with pytest.raises(RecipeConflict, match=message):
        Cache(models.model("llama"), methods.parse(text), pruned_prompt=True)


def test_what_heads_would_have_to_share_is_refused():
    with pytest.raises(RecipeConflict, match="Give one of the two"):
        Cache(models.model("llama"), methods.parse("snapkv"), whole_prompt=True, pruned_prompt=True)
    with pytest.raises(RecipeConflict, match="visual tokens, first tokens or rotary positions of their own"):
        Cache(models.model("llama"), methods.parse("snapkv") | Recipe(first=4), pruned_prompt=True)
