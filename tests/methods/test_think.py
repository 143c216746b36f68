"""ThinK by section 8 of its specification: what goes is really gone, and the rest is attended as if it were zero."""

import copy
import itertools

import pytest
import torch

from kvmosaic import Cache, methods
from kvmosaic.errors import NotFinite
from kvmosaic.hooks.layer import CacheLayer
from kvmosaic.projection import QueryDriven
from kvmosaic.selection.base import Step
from tests import models
from tests.selection.test_eviction import GROUPS, HEADS, SCALE, SIZE, Stream, layer_of


def step(stream: Stream, tokens: int) -> Step:
    query, keys, values = (each[:, :, :tokens] for each in (stream.query, stream.keys, stream.values))
    place = torch.arange(tokens).expand(len(query), -1)
    return Step(0, 1, query, keys, values, SCALE, place, torch.zeros_like(place, dtype=torch.bool), None)


def chosen(stream: Stream, tokens: int = 60, **settings: int | float) -> torch.Tensor:
    """[B, H, R], the channels that stay."""
    seen = step(stream, tokens)
    return QueryDriven(**settings).basis(seen, seen.valid[:, None]).index.long()


def simulate(stream: Stream, kept: torch.Tensor, pruned: torch.Tensor, now: int) -> torch.Tensor:
    """[Hq, D], of the query at `now` over all tokens up to it; of those in `pruned` [tokens] the other channels are zero."""
    zeroed = torch.zeros_like(stream.keys).scatter_(3, kept[:, :, None].expand(-1, -1, stream.keys.shape[2], -1), 1)
    keys = torch.where(pruned[:, None], stream.keys * zeroed, stream.keys)[0, :, : now + 1].double()
    query = stream.query[0, :, now].double().unflatten(0, (HEADS, GROUPS))
    weights = (query @ keys.mT / SIZE**0.5).softmax(-1)
    return (weights @ stream.values[0, :, : now + 1].double()).flatten(0, 1)


@pytest.mark.parametrize("recent", [0, 1, 32])
@pytest.mark.parametrize("prompt", [5, 41, 60])
def test_what_was_pruned_is_attended_as_zeros(prompt: int, recent: int) -> None:
    """At every step, the newest `recent` keys whole; prompts below the window, too."""
    stream, layer = Stream(prompt + 40), layer_of(f"think recent={recent}")
    stream.feed(layer, 0, prompt)
    kept = chosen(stream, prompt, pruned=0.4)
    assert kept.shape == (1, HEADS, SIZE - int(SIZE * 0.4))
    for now in range(prompt, prompt + 40):
        got = stream.feed(layer, now, now + 1)[0, 0]
        pruned = torch.arange(prompt + 40) < now - recent
        assert torch.allclose(got.double(), simulate(stream, kept, pruned, now), atol=1e-5), now


def test_over_kivi_the_residual_is_pruned_when_it_is_encoded() -> None:
    """The step that fills the residual still reads it whole; at 8 bits codes are as good as exact."""
    stream, layer = Stream(100), layer_of("think channels=16 | kivi bits=8 residual=32")
    stream.feed(layer, 0, 40)
    kept = chosen(stream, 40, channels=16)
    for now in range(40, 100):
        got = stream.feed(layer, now, now + 1)[0, 0]
        pruned = torch.arange(100) < now // 32 * 32
        assert torch.allclose(got.double(), simulate(stream, kept, pruned, now), atol=0.02), now
    assert layer.stores["tier 0"].keys.parts["codes"].width == 16


def test_the_smallest_norms_of_the_outer_products_go() -> None:
    """And that is the greedy way to the best channels: near the best of all choices."""
    stream = Stream(48, seed=3)
    query = stream.query[0].unflatten(0, (HEADS, GROUPS))[..., -32:, :8].double()
    keys = stream.keys[0, ..., :8].double()
    small = Stream(48)
    small.query, small.keys, small.values = (
        each[..., :8].contiguous() for each in (stream.query, stream.keys, stream.values)
    )
    kept = chosen(small, 48, channels=5)[0]
    for head in range(HEADS):
        outer = torch.stack([query[head, :, :, [j]] @ keys[head, :, [j]].mT for j in range(8)])  # [8, G, 32, tokens]
        norms = outer.flatten(1).norm(dim=1)
        apart = query[head].flatten(0, 1).norm(dim=0) * keys[head].norm(dim=0)
        assert torch.allclose(norms, apart, rtol=1e-12)
        assert kept[head].tolist() == sorted(norms.argsort(descending=True)[:5].tolist())
        lost = {
            every: outer[[j for j in range(8) if j not in every]].sum(0).norm()
            for every in itertools.combinations(range(8), 5)
        }
        assert lost[tuple(kept[head].tolist())] <= 1.05 * min(lost.values())


def test_a_channel_that_only_queries_care_for_stays() -> None:
    stream = Stream(60)
    stream.keys[..., 7] *= 0.1
    assert not (chosen(stream, channels=16) == 7).any()
    stream.query[..., 7] *= 1000
    assert (chosen(stream, channels=16) == 7).any(2).all()


def test_older_queries_do_not_choose() -> None:
    stream = Stream(60)
    before = chosen(stream, channels=16, queries=8)
    stream.query[:, :, :52] *= 100 * torch.rand(SIZE)
    assert torch.equal(chosen(stream, channels=16, queries=8), before)


def test_queries_that_share_a_head_choose_together() -> None:
    """A group of equal queries chooses as one of them would."""
    stream = Stream(60)
    stream.query = stream.query[:, ::GROUPS].repeat_interleave(GROUPS, 1)
    alone = copy.copy(stream)
    alone.query = stream.query[:, ::GROUPS]
    assert torch.equal(chosen(stream, channels=12), chosen(alone, channels=12))


def test_tokens_that_a_selection_drops_do_not_choose() -> None:
    stream, layer = Stream(60), layer_of("snapkv tokens=20 window=8 | think channels=12 recent=0")
    stream.feed(layer, 0, 60)
    held = layer.stores["tier 0"]
    assert held.length.eq(20).all()
    kept = held.keys.basis.index.long()
    seen = step(stream, 60)
    stays = methods.parse("snapkv tokens=20 window=8").selection.assign(seen) == 0
    assert torch.equal(kept, QueryDriven(channels=12).basis(seen, stays).index.long())
    whole = stream.keys.gather(3, kept[:, :, None].expand(-1, -1, 60, -1))
    for head in range(HEADS):
        assert torch.equal(held.keys.buffers["numbers"][0, head, :20], whole[0, head, stays[0, head]])


def test_a_later_prompt_follows_the_first_choice() -> None:
    stream, layer = Stream(120), layer_of("think channels=16 recent=0")
    stream.feed(layer, 0, 40)
    first = layer.basis.index.clone()
    stream.query[:, :, 40:] *= 100 * torch.rand(SIZE)
    stream.feed(layer, 40, 100)
    assert torch.equal(layer.basis.index, first) and torch.equal(layer.stores["tier 0"].keys.basis.index, first)


def test_a_refused_prompt_leaves_no_choice_behind() -> None:
    bad, good, layer = Stream(64, seed=1), Stream(64), layer_of("think channels=16 | kivi residual=32")
    bad.values[0, 1, 3, 3] = torch.nan
    with pytest.raises(NotFinite):
        bad.feed(layer, 0, 64)
    good.feed(layer, 0, 64)
    assert torch.equal(layer.stores["tier 0"].keys.basis.index.long(), chosen(good, 64, channels=16))


@pytest.mark.parametrize("text", ["think channels=32", "think pruned=0", "think pruned=0.4 recent=200"])
def test_nothing_pruned_changes_nothing(text: str) -> None:
    model, inputs = models.model("llama"), models.prompt("llama", models.Row(75, 1, 0), models.Row(58, 3, 1))
    mine = models.logits(model, inputs, Cache(model, methods.parse(text)), 30)
    assert torch.allclose(mine, models.logits(models.stock("llama"), inputs, None, 30), atol=1e-4)


@pytest.mark.parametrize("quantizer", ["", " | kivi bits=2 residual=32 group=32"])
def test_bytes_drop_by_the_arithmetic(quantizer: str) -> None:
    """Alone: 2 (D - R) bytes in float16 for each key outside the window. Over 2 bits: a quarter of a byte for each channel of
    each encoded key, and 4 bytes for its ranges in each group; less 2 for each channel that is named."""
    tokens, heads, channels, kept, dtype = 32 * 9, 2, 128, 64, torch.float16
    held = {}
    for text in (f"think channels={kept}{quantizer}", quantizer[3:] or "kivi residual=512"):
        layer = CacheLayer(0, 1, methods.parse(text))
        stream = Stream(tokens)
        stream.query = torch.randn(1, heads, tokens, channels, dtype=dtype)
        stream.keys, stream.values = torch.randn(2, 1, heads, tokens, channels, dtype=dtype)
        handle, _ = layer.update(stream.keys, stream.values)
        module = torch.nn.Module()
        module.num_key_value_groups = 1
        layer.attend(module, stream.query, handle, None, SCALE, None, None)
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for _, _, tensor in layer.tensors()
        }
        held[text] = sum(storages.values())
    pruned, whole = held.values()
    gone = channels - kept
    if quantizer:
        blocks = -(-tokens // 128) * 128
        assert whole - pruned == heads * (blocks * gone * 2 // 8 + tokens // 32 * gone * 4 - kept * 2)
    else:
        assert whole - pruned == heads * ((tokens - 32) * gone * 2 - kept * 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("think pruned=1", r"pruned is the share .* got 1"),
        ("think pruned=-0.1", "at least 0 and below 1"),
        ("think channels=0", "at least 1, got 0"),
        ("think pruned=0.5 channels=16", "got 0.5 and 16"),
        ("think queries=0", "queries must be at least 1"),
        ("think recent=-1", "recent at least 0, got 32 and -1"),
    ],
)
def test_impossible_counts_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        methods.parse(text)


def test_more_channels_than_a_head_has_are_refused_at_the_prompt() -> None:
    with pytest.raises(ValueError, match="how many of the head's 32 stay, got 33"):
        Stream(5).feed(layer_of("think channels=33"), 0, 5)
