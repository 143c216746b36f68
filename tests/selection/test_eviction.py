"""Eviction while decoding: the same tokens stay as in a full cache with masks, and what left is really gone."""

import copy

import pytest
import torch
from torch import nn

from kvmosaic import methods
from kvmosaic.hooks.attention import Handle
from kvmosaic.hooks.layer import CacheLayer

HEADS, GROUPS, SIZE = 2, 4, 32
SCALE = SIZE**-0.5


class Stream:
    """Random queries, keys and values, fed to a layer in steps."""

    def __init__(self, tokens, batch=1, seed=0):
        draw = torch.Generator().manual_seed(seed)
        self.query = 2 * torch.randn(batch, HEADS * GROUPS, tokens, SIZE, generator=draw)
        self.keys, self.values = (torch.randn(batch, HEADS, tokens, SIZE, generator=draw) for _ in range(2))

    def feed(self, layer, start, stop, mask=None):
        keys, values = self.keys[:, :, start:stop], self.values[:, :, start:stop]
        handle, _ = layer.update(keys, values)
        assert isinstance(handle, Handle)
        module = nn.Module()
        module.num_key_value_groups = GROUPS
        return layer.attend(module, self.query[:, :, start:stop], handle, mask, SCALE, None, None)


def layer_of(text):
    return CacheLayer(0, 1, methods.parse(text))


def simulate(stream, prompt, steps, capacity, recent, sinks=0, by_attention=True):
    """A full cache in which evicted tokens are masked: outputs of each step, and who is left at the end, [H, tokens]."""
    query = stream.query[0].unflatten(0, (HEADS, GROUPS))
    keys, values = stream.keys[0], stream.values[0]
    causal = torch.ones(prompt, prompt, dtype=torch.bool).tril()
    weights = (query[:, :, :prompt] @ keys[:, None, :prompt].mT * SCALE).masked_fill(~causal, -torch.inf).softmax(-1)
    score = torch.zeros(HEADS, prompt + steps)
    score[:, :prompt] = weights.sum(2).mean(1)
    alive = torch.zeros(HEADS, prompt + steps, dtype=torch.bool)
    alive[:, :prompt] = True
    outs = []

    def evict(now):
        for head in range(HEADS):
            while alive[head].sum() > capacity:
                rank = score[head].clone() if by_attention else torch.arange(prompt + steps).float()
                rank[~alive[head]] = torch.inf
                rank[now - recent : now] = torch.inf
                rank[:sinks] = torch.inf
                alive[head, rank.argmin()] = False

    evict(prompt)
    for now in range(prompt, prompt + steps):
        alive[:, now] = True
        logits = query[:, :, now] @ keys.mT * SCALE
        weights = logits.masked_fill(~alive[:, None], -torch.inf).softmax(-1)
        outs.append((weights @ values).flatten(0, 1))
        score += weights.mean(1)
        evict(now + 1)
    return torch.stack(outs), alive


@pytest.mark.parametrize(("prompt", "capacity", "recent"), [(63, 20, 5), (41, 40, 1), (63, 8, 8)])
def test_h2o_keeps_what_a_masked_full_cache_keeps(prompt, capacity, recent):
    stream, layer = Stream(prompt + 24), layer_of(f"h2o tokens={capacity} recent={recent}")
    stream.feed(layer, 0, prompt)
    got = [stream.feed(layer, now, now + 1)[0, 0] for now in range(prompt, prompt + 24)]
    want, alive = simulate(stream, prompt, 24, capacity, recent)
    assert torch.allclose(torch.stack(got), want, atol=1e-5)
    store = layer.stores["tier 0"]
    assert store.length.eq(capacity).all()
    for head in range(HEADS):
        left = store.position[0, head, :capacity].sort().values
        assert left.tolist() == alive[head].nonzero()[:, 0].tolist()


def test_streaming_llm_keeps_the_first_and_the_newest():
    stream, layer = Stream(90), layer_of("streaming_llm tokens=19 sinks=3")
    stream.feed(layer, 0, 50)
    got = [stream.feed(layer, now, now + 1)[0, 0] for now in range(50, 90)]
    want, _ = simulate(stream, 50, 40, capacity=19, recent=16, sinks=3, by_attention=False)
    assert torch.allclose(torch.stack(got), want, atol=1e-5)
    assert layer.stores["tier 0"].position[0, 0, :19].sort().values.tolist() == [0, 1, 2, *range(74, 90)]


def test_scores_add_up_to_the_number_of_queries_while_nothing_has_left():
    stream, layer = Stream(60), layer_of("h2o tokens=100 recent=4")
    for start, stop in ((0, 40), (40, 41), (41, 60)):
        stream.feed(layer, start, stop)
    assert layer.stores["tier 0"].score.sum(-1) == pytest.approx(torch.full((1, HEADS), 60.0), abs=1e-3)


def test_a_budget_over_the_length_changes_nothing():
    stream = Stream(60)
    evicting, exact = layer_of("h2o tokens=100"), layer_of("kivi residual=256")
    for start, stop in ((0, 40), (40, 41), (41, 60)):
        assert torch.allclose(stream.feed(evicting, start, stop), stream.feed(exact, start, stop), atol=1e-5)


@pytest.mark.parametrize("recipe", ["h2o keep=0.3 recent=4", "h2o keep=0.3 recent=4 | turboquant bits=4"])
def test_a_padded_batch_is_two_single_runs(recipe):
    both, pad = Stream(60, batch=2), 7
    mask = torch.ones(40, 40, dtype=torch.bool).tril().expand(2, 1, 40, 40).clone()
    mask[0, :, :, :pad] = False
    batch = layer_of(recipe)
    both.feed(batch, 0, 40, mask)
    for row, start in ((0, pad), (1, 0)):
        alone = copy.deepcopy(both)
        for name in ("query", "keys", "values"):
            setattr(alone, name, getattr(both, name)[row : row + 1, :, start:])
        layer, together = layer_of(recipe), copy.deepcopy(batch)
        alone.feed(layer, 0, 40 - start)
        for now in range(40, 60):
            got = both.feed(together, now, now + 1)[row]
            assert torch.allclose(got, alone.feed(layer, now - start, now - start + 1)[0], atol=1e-4)


def test_bytes_do_not_grow_once_the_budget_is_full():
    stream, layer = Stream(200), layer_of("h2o tokens=32 recent=8")
    stream.feed(layer, 0, 64)
    stream.feed(layer, 64, 65)
    before = sum(tensor.nbytes for _, _, tensor in layer.tensors())
    for now in range(65, 200):
        stream.feed(layer, now, now + 1)
    assert sum(tensor.nbytes for _, _, tensor in layer.tensors()) == before


def test_tokens_taken_back_leave_no_trace_in_who_stays():
    stream, layer = Stream(80), layer_of("h2o tokens=20 recent=4")
    stream.feed(layer, 0, 40)
    layer.activate_past_recording()
    stream.feed(layer, 40, 46)
    layer.crop(-6)
    assert layer.get_seq_length() == 40
    assert layer.stores["tier 0"].position.max() == 39
    stream.feed(layer, 40, 41)
    layer.crop(0)
    assert layer.stores["tier 0"].length.eq(20).all() and layer.stores["tier 0"].position.max() == 40
