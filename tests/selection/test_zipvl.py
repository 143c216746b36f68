"""ZipVL: how many tokens are important, who they are, and attention among them alone (arXiv:2410.08584)."""

import pytest
import torch

from kvmosaic import methods
from kvmosaic.kernels.scores import column_sums
from kvmosaic.prefill import AmongImportant
from kvmosaic.selection import DROP, Saliency
from tests.selection.test_eviction import Stream, layer_of
from tests.selection.test_top import row, step

EVERY = (10_000, 0)  # all queries are probes


@pytest.mark.parametrize("mass", [0.3, 0.9, 0.975])
def test_the_count_is_the_least_whose_attention_reaches_the_mass(mass):
    at = step(101)
    salient = (Saliency(mass=mass, by_head=False, probes=EVERY).assign(at) == 0).sum(-1)
    sums = column_sums(at.query, at.keys, at.scale, at.valid).mean(1)[0].sort(descending=True).values
    assert sums[: salient[0, 0]].sum() >= mass * 101 > sums[: salient[0, 0] - 1].sum()


def test_one_set_serves_all_heads_and_holds_the_newest_token():
    tiers = Saliency(mass=0.5, by_head=False).assign(step(101, heads=4, groups=2))
    assert tiers.eq(tiers[:, :1]).all() and tiers[..., -1].eq(0).all()


def test_all_of_the_mass_is_all_of_the_tokens():
    at = step(63, batch=2, pad=5)
    tiers = Saliency(mass=1.0, by_head=False, probes=EVERY).assign(at)
    assert tiers[0, :, 5:].eq(0).all() and tiers[1].eq(0).all()


def test_attention_among_all_tokens_is_attention():
    at = step(63)
    out = AmongImportant().attend(at, torch.zeros(1, 2, 63, dtype=torch.int8))
    whole = torch.nn.functional.scaled_dot_product_attention(
        at.query, at.keys, at.values, is_causal=True, scale=at.scale, enable_gqa=True
    )
    assert torch.allclose(out, whole.transpose(1, 2), atol=1e-6)


def test_unimportant_tokens_get_zeros_and_are_seen_by_nobody():
    at = step(63, batch=2, pad=5)
    tiers = Saliency(mass=0.5, by_head=False).assign(at)
    out = AmongImportant().attend(at, tiers)
    others = tiers[:, 0] != 0
    assert out[others].eq(0).all()
    at.values[:, :, :][others[:, None].expand(-1, 2, -1)] = 1e6
    assert torch.equal(AmongImportant().attend(at, tiers), out)
    alone = row(at, 0, 5)
    assert torch.allclose(AmongImportant().attend(alone, tiers[:1, :, 5:]), out[:1, 5:], atol=1e-6)


def test_version_two_drops_what_version_one_keeps_at_low_bits():
    stream = Stream(120)
    first, second = layer_of("zipvl mass=0.8"), layer_of("zipvl mass=0.8 evict=true")
    assert torch.equal(stream.feed(first, 0, 120), stream.feed(second, 0, 120))
    important = int(first.stores["tier 0"].length[0, 0])
    assert 0 < important < 120
    assert int(first.stores["tier 1"].length[0, 0]) == 120 - important
    assert list(second.stores) == ["tier 0"] and second.stores["tier 0"].length.eq(important).all()


def test_generated_tokens_are_chosen_among_by_the_same_rule():
    stream, layer = Stream(170), layer_of("zipvl mass=0.6 gather=50 evict=true")
    stream.feed(layer, 0, 100)
    before = int(layer.stores["tier 0"].length[0, 0])
    for now in range(100, 150):
        stream.feed(layer, now, now + 1)
    assert layer.pending is None
    assert before < int(layer.stores["tier 0"].length[0, 0]) < before + 50


def test_dropping_and_tiers_go_together():
    assert DROP not in methods.parse("zipvl").selection.assign(step(63)).unique().tolist()
    for text, message in (
        ("zipvl mass=0", "above 0 and at most 1, got 0"),
        ("zipvl mass=1.1", "got 1.1"),
        ("zipvl probes=0", "some at least"),
    ):
        with pytest.raises(ValueError, match=message):
            methods.parse(text)
