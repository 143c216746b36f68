"""A prompt in pieces that is settled as a whole is the prompt in one piece."""

import pytest
import torch

from kvmosaic import Cache, methods
from kvmosaic.errors import RecipeConflict
from tests import models
from tests.instances import TEXT
from tests.models import Row, generate, logits, prompt

pytestmark = pytest.mark.usefixtures("references")

WHOLE = [text for text in TEXT if methods.parse(text).prefill is None]


def feed(model, cache, ids, *sizes):
    for piece in ids.split(list(sizes), 1):
        model(piece, past_key_values=cache)


@pytest.mark.parametrize("text", [*WHOLE, "snapkv gigabytes=0.00006 window=8", "h2o tokens=48 protect=9"])
def test_pieces_are_settled_as_one_prompt(text):
    model, ids = models.model("llama"), prompt("llama", Row(97, 0))["input_ids"]
    pieces, one = Cache(model, methods.parse(text), whole_prompt=True), Cache(model, methods.parse(text))
    feed(model, pieces, ids, 33, 31, 33)
    assert text == "exact" or pieces.nbytes() > one.nbytes()
    feed(model, one, ids, 97)
    for token in ids[:, :5].split(1, 1):
        mine, other = (model(token, past_key_values=each).logits for each in (pieces, one))
        assert (mine - other).abs().mean() < 2e-3  # sums in another order can flip a code
    held = {name: tensor for name, _, tensor in one.tensors()}
    assert {name: tensor.shape for name, _, tensor in pieces.tensors()} == {
        name: each.shape for name, each in held.items()
    }


def test_generate_in_chunks_with_padding_settles_at_the_first_token():
    model, inputs = models.model("llama"), prompt("llama", Row(75, 0, 0), Row(58, 0, 1))
    recipe = methods.parse("snapkv keep=0.4 window=8")
    mine = logits(model, inputs, Cache(model, recipe, whole_prompt=True), 8, prefill_chunk_size=32)
    assert torch.allclose(mine, logits(model, inputs, Cache(model, recipe), 8), atol=1e-3)


def test_settling_twice_is_settling_once_and_a_turn_after_it_is_its_own():
    model, ids = models.model("llama"), prompt("llama", Row(97, 0))["input_ids"]
    cache = Cache(model, methods.parse("h2o_prefill tokens=20 recent=4"), whole_prompt=True)
    cache.settle()
    feed(model, cache, ids, 50, 47)
    cache.settle()
    cache.settle()
    assert cache.layers[0].stores["tier 0"].length.eq(20).all()
    feed(model, cache, ids[:, :40], 40)
    assert cache.layers[0].stores["tier 0"].length.eq(40).all()


def test_a_reset_cache_waits_again_and_speculation_settles_first():
    model, inputs = models.model("llama"), prompt("llama", Row(75, 0))
    recipe = methods.parse("turboquant")
    cache = Cache(model, recipe, whole_prompt=True)
    first = generate(model, inputs, cache, 8, prompt_lookup_num_tokens=3)
    cache.reset()
    assert torch.equal(generate(model, inputs, cache, 8, prompt_lookup_num_tokens=3), first)
    assert torch.equal(generate(model, inputs, Cache(model, recipe), 8, prompt_lookup_num_tokens=3), first)


def test_a_prompt_whose_attention_is_changed_cannot_wait():
    with pytest.raises(RecipeConflict, match=r"its pieces cannot wait.*zipvl sparse=false"):
        Cache(models.model("llama"), methods.parse("zipvl"), whole_prompt=True)
