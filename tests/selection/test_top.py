"""Selections: pure, exact in their counts, blind to padding, and the same for a row alone or in a batch."""

import itertools

import pytest
import torch

from kvmosaic import methods
from kvmosaic.kernels.scores import column_sums
from kvmosaic.selection import (
    DROP,
    AttentionSums,
    Budget,
    ExpectedAttention,
    Pyramid,
    Recency,
    Step,
    TopTokens,
    WindowAttention,
)

SCORERS = [Recency(), AttentionSums(), AttentionSums(normalize=True), WindowAttention(8, 5), ExpectedAttention(64)]


def step(tokens=63, batch=1, heads=2, groups=4, pad=0, seed=0):
    draw = torch.Generator().manual_seed(seed)
    place = torch.arange(tokens).repeat(batch, 1)
    place[0] = (place[0] - pad).clamp_min(-1)
    shape = (tokens, 32)
    return Step(
        layer=1,
        layers=4,
        query=torch.randn(batch, heads * groups, *shape, generator=draw),
        keys=torch.randn(batch, heads, *shape, generator=draw),
        values=torch.randn(batch, heads, *shape, generator=draw),
        scale=32**-0.5,
        place=place,
        visual=torch.zeros(batch, tokens, dtype=torch.bool),
        frequencies=10000 ** (-torch.arange(16) / 16),
    )


def row(whole, index, start=0):
    return whole._replace(
        **{name: getattr(whole, name)[index : index + 1, :, start:] for name in ("query", "keys", "values")},
        **{name: getattr(whole, name)[index : index + 1, start:] for name in ("place", "visual")},
    )


def kept(selection, at):
    return (selection.assign(at) != DROP) & at.valid[:, None]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("tokens", [1, 63, 300])
def test_column_sums_are_those_of_the_whole_matrix(tokens, normalize):
    at = step(tokens)
    logits = at.query.unflatten(1, (2, 4)) @ at.keys[:, :, None].mT * at.scale
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    whole = logits.masked_fill(~causal, -torch.inf).softmax(-1).sum(3).mean(2)
    if normalize:
        whole = whole / torch.arange(tokens, 0, -1)
    assert torch.allclose(AttentionSums(normalize).score(at), whole, atol=1e-5)


def test_every_query_gives_one_in_all():
    at = step(63, batch=2, pad=5)
    sums = column_sums(at.query, at.keys, at.scale, at.valid)
    assert torch.allclose(sums.sum(-1), at.valid.sum(1)[:, None].expand(-1, 2).float(), atol=1e-4)
    assert sums[0, :, :5].eq(0).all()


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda scorer: type(scorer).__name__)
def test_a_padded_row_is_selected_from_as_if_it_were_alone(scorer):
    at = step(63, batch=2, pad=9)
    selection = TopTokens(scorer=scorer, budget=Budget(keep=0.4), sinks=2, recent=4)
    both = kept(selection, at)
    assert torch.equal(both[:1, :, 9:], kept(selection, row(at, 0, 9)))
    assert torch.equal(both[1:], kept(selection, row(at, 1)))
    assert not both[0, :, :9].any()


@pytest.mark.parametrize(
    ("scorer", "budget"), list(itertools.product(SCORERS, [Budget(keep=0.3), Budget(tokens=20)])), ids=str
)
def test_as_many_stay_as_asked_and_the_protected_are_among_them(scorer, budget):
    at = step(101)
    keep = kept(TopTokens(scorer=scorer, budget=budget, sinks=3, recent=5), at)
    assert keep.sum(-1).eq(30 if budget.keep else 20).all()
    assert keep[..., :3].all() and keep[..., -5:].all()


def test_a_selection_is_pure_and_ties_go_to_the_older_token():
    at = step(63)
    selection = TopTokens(scorer=AttentionSums(), budget=Budget(tokens=10))
    assert torch.equal(selection.assign(at), selection.assign(at))
    equal = at._replace(keys=torch.zeros_like(at.keys), values=torch.ones_like(at.values))
    oldest = kept(TopTokens(scorer=ExpectedAttention(), budget=Budget(tokens=10)), equal)
    assert oldest[..., :10].all() and not oldest[..., 10:].any()


def test_heads_that_compete_keep_their_floor_and_the_sum():
    at = step(101, heads=4, groups=1)
    at.keys[:, 0] *= 8  # one head attends sharply
    uniform = TopTokens(scorer=AttentionSums(), budget=Budget(tokens=20), recent=4)
    ada = TopTokens(scorer=AttentionSums(), budget=Budget(tokens=20), recent=4, head_floor=0.2)
    counts = kept(ada, at).sum(-1)
    assert counts.sum() == kept(uniform, at).sum() == 80
    assert counts.min() >= 4 and counts.max() > 20
    all_floor = TopTokens(scorer=AttentionSums(), budget=Budget(tokens=20), recent=4, head_floor=1.0)
    assert torch.equal(all_floor.assign(at), uniform.assign(at))


def test_a_pyramid_spends_what_equal_budgets_spend():
    shares = [Pyramid(beta=20).share(0.1, layer, 8) for layer in range(8)]
    assert sum(shares) == pytest.approx(0.8) and shares[-1] == pytest.approx(0.1 / 20)
    assert shares == sorted(shares, reverse=True)
    assert Pyramid(beta=1).share(0.3, 3, 8) == Pyramid().share(0.3, 0, 1) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("snapkv keep=0.5 tokens=9", "got keep=0.5 and tokens=9"),
        ("snapkv keep=0", "above 0 and at most 1, got 0"),
        ("snapkv keep=1.5", "above 0 and at most 1, got 1.5"),
        ("snapkv tokens=0", "at least 1, got 0"),
        ("snapkv tokens=8", "cannot hold the 0 first and 32 recent tokens"),
        ("snapkv keep=0.5 kernel=4", "kernel odd"),
        ("snapkv keep=0.5 pooling=median", "'max' or 'mean', got 'median'"),
        ("adakv keep=0.5 floor=2", "between 0 and 1, got 2"),
        ("snapkv keep=0.5 | h2o_prefill keep=0.5", "both set selection"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        methods.parse(text)
