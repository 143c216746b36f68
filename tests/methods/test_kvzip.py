"""KVzip: tokens are scored by what the prompt's repetition pays to them, and nothing else is left of it (arXiv:2505.23416)."""

import copy

import pytest
import torch

from kvmosaic import Cache, methods
from kvmosaic.errors import UnsupportedModel
from kvmosaic.selection import Budget, Pyramid, Reconstruction, TopTokens
from tests import models
from tests.models import Row, generate, logits, prompt


def scores(model, ids, text, **changes):
    """What a cache measures, layer by layer, before it settles."""
    held = []
    cache = Cache(model, methods.parse(text))
    for layer in cache.layers:
        if hasattr(layer, "settle"):
            layer.settle = lambda tier, layer=layer: held.append(layer.pending.score)
    model(ids, past_key_values=cache, **changes)
    return held


def repeated(ids, pieces):
    """The same by a stock model with attention weights: each piece after the prompt by itself, with the eight before it."""
    stock, length = models.make("llama"), ids.shape[1]
    stock.set_attn_implementation("eager")
    found = [torch.zeros(1, 2, length) for _ in range(2)]
    for start, stop in pieces:
        first = max(0, start - 8)
        place = torch.cat([torch.arange(length), length + torch.arange(stop - first)])[None]
        whole = torch.cat([ids, ids[:, first:stop]], 1)
        weights = stock(whole, position_ids=place, output_attentions=True).attentions
        for score, each in zip(found, weights, strict=True):
            paid = each.unflatten(1, (2, -1))[:, :, :, length:, start:stop]
            score[..., start:stop] = paid.amax((2, 3))
    return found


@pytest.mark.parametrize("size", [2000, 30])
def test_scores_are_the_greatest_shares_that_the_repetition_pays(size):
    ids = prompt("llama", Row(75, 0))["input_ids"]
    pieces = [(start, min(75, start + size)) for start in range(0, 75, size)]
    mine = scores(models.model("llama"), ids, f"kvzip replay={size}")
    for one, other in zip(mine, repeated(ids, pieces), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("floor", [0.0, 1.0])
def test_tokens_with_the_highest_scores_of_all_layers_stay_and_the_sinks(floor):
    """With a floor of 1 each head keeps its own best."""
    model, inputs = models.model("llama"), prompt("llama", Row(75, 0))
    score = torch.stack(scores(model, inputs["input_ids"], "kvzip"))  # [layers, B, H, T]
    score[..., :3] = torch.inf
    every = score.flatten() if floor == 0 else score
    least = every.topk(20 * (4 if floor == 0 else 1)).values[..., -1:]
    cache = Cache(model, methods.parse(f"kvzip tokens=20 sinks=3 floor={floor}"))
    exact = Cache(model, methods.parse("kvzip keep=1.0"))
    for each in (cache, exact):
        model(**inputs, past_key_values=each)
    for layer, whole, stays in zip(cache.layers, exact.layers, score >= least, strict=True):
        store, every = layer.stores["tier 0"], whole.stores["tier 0"]
        assert store.length.tolist() == stays.sum(-1).tolist()
        for own, other, mine in zip(store.rows[0], every.rows[0], stays[0], strict=True):
            (kept,) = own.keys.read(0, int(mine.sum())).values()
            (keys,) = other.keys.read(0, 75).values()
            assert torch.equal(kept[0, 0], keys[0, 0, mine])


def test_a_budget_is_not_shared_out_by_rule_where_layers_compete():
    with pytest.raises(ValueError, match="layers compete"):
        TopTokens(scorer=Reconstruction(), budget=Budget(keep=0.5), layers=Pyramid())


def test_all_of_the_budget_changes_nothing():
    model, inputs = models.model("llama"), prompt("llama", Row(75, 0, 0), Row(58, 0, 1))
    mine = logits(model, inputs, Cache(model, methods.parse("kvzip keep=1.0")), 12)
    assert torch.allclose(mine, logits(models.stock("llama"), inputs, None, 12), atol=1e-4)


def test_layers_of_other_kinds_are_as_if_nothing_had_been_fed_again():
    model, inputs = models.model("gemma3_text"), prompt("gemma3_text", Row(75, 0))
    cache, plain = Cache(model, methods.parse("kvzip keep=0.3")), Cache(model, methods.parse("snapkv keep=0.3"))
    for each in (cache, plain):
        model(**inputs, past_key_values=each)
    assert torch.equal(cache.layers[0].keys, plain.layers[0].keys)
    assert cache.get_seq_length() == 75 and all(layer.pending is None for layer in cache.layers[1:])


def test_a_padded_batch_is_two_single_runs_however_short_the_pieces():
    model, recipe = models.model("llama"), methods.parse("kvzip keep=0.3 replay=20")
    rows = Row(75, 0, 0), Row(58, 0, 1)
    both = logits(model, prompt("llama", *rows), Cache(model, recipe), 8)
    for index, row in enumerate(rows):
        alone = logits(model, prompt("llama", row), Cache(model, recipe), 8)
        assert torch.allclose(both[:, index], alone[:, 0], atol=1e-3)


def test_later_turns_stay_whole():
    model, inputs = models.model("llama"), prompt("llama", Row(75, 0))
    cache = Cache(model, methods.parse("kvzip tokens=20"))
    model(**inputs, past_key_values=cache)
    model(inputs["input_ids"][:, :30], past_key_values=copy.deepcopy(cache))
    model(inputs["input_ids"][:, :30], past_key_values=cache)
    assert sum(int(layer.stores["tier 0"].length.sum()) for layer in cache.layers) == 4 * (20 + 30)


def test_what_cannot_be_fed_again_is_refused():
    model, inputs = models.model("internvl"), prompt("internvl")
    with pytest.raises(UnsupportedModel, match="pictures cannot be fed again"):
        generate(model, inputs, Cache(model, methods.parse("kvzip")), 2)
    model, ids = models.model("llama"), prompt("llama", Row(75, 0))["input_ids"]
    with pytest.raises(ValueError, match="needs input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=Cache(model, methods.parse("kvzip")))
    short = models.make("llama", max_position_embeddings=80)
    with pytest.raises(ValueError, match="context of 80 leaves no room"):
        short(ids, past_key_values=Cache(short, methods.parse("kvzip")))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        methods.parse("kvzip replay=0")
