"""ZipCache's two tiers: who is salient, what waits, and that stored bytes stay as they are (arXiv:2405.14256)."""

import pytest
import torch

from kvmosaic import methods
from kvmosaic.kernels.scores import column_sums
from kvmosaic.selection import AttentionSums, Saliency
from tests.selection.test_eviction import HEADS, Stream, layer_of
from tests.selection.test_top import row, step


def test_all_queries_as_probes_give_the_normalized_scores():
    at = step(63)
    everyone = Saliency(share=0.4, probes=(0.5, 0.5)).assign(at) == 0
    score = AttentionSums(normalize=True).score(at)
    best = score.topk(25, -1).indices
    assert torch.equal(everyone.nonzero(), torch.zeros_like(everyone).scatter_(2, best, True).nonzero())


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tokens", [1, 19, 200])
def test_the_tiers_are_disjoint_complete_and_as_large_as_asked(share, tokens):
    tiers = Saliency(share=share).assign(step(tokens))
    assert tiers.eq(0).sum(-1).eq(round(share * tokens)).all()
    assert (tiers.eq(0) | tiers.eq(1)).all()


def test_probes_are_the_newest_and_some_others():
    asking = Saliency(share=0.5)._probes(torch.ones(1, 200, dtype=torch.bool))
    assert asking.sum() == 20 and asking[0, -10:].all()


def test_a_padded_row_is_treated_as_if_it_were_alone():
    at = step(63, batch=2, pad=9)
    both = Saliency(share=0.4).assign(at)
    assert torch.equal(both[:1, :, 9:], Saliency(share=0.4).assign(row(at, 0, 9)))
    assert torch.equal(both[1:], Saliency(share=0.4).assign(row(at, 1)))


def test_the_released_divisor_favours_new_tokens():
    at = step(200)
    uniform = at._replace(query=torch.zeros_like(at.query))
    ours, theirs = (Saliency(share=0.3, released=released).assign(uniform) == 0 for released in (False, True))
    place = torch.arange(200.0)
    assert (theirs * place).sum() > (ours * place).sum()


def test_generated_tokens_wait_exact_and_are_stored_a_hundred_at_a_time():
    stream, layer = Stream(360), layer_of("zipcache salient=0.6")
    stream.feed(layer, 0, 150)
    assert [store.length.tolist() for store in layer.stores.values()] == [[[90, 90]], [[60, 60]]]
    before = {name: tensor.clone() for name, kind, tensor in layer.tensors() if kind == "codes"}
    for now in range(150, 249):
        stream.feed(layer, now, now + 1)
    assert len(layer.pending) == 99
    assert layer.stores["tier 0"].length.eq(90).all()
    stream.feed(layer, 249, 250)
    assert layer.pending is None
    assert [store.length.tolist() for store in layer.stores.values()] == [[[150, 150]], [[100, 100]]]
    for name, kind, tensor in layer.tensors():
        if kind == "codes":  # whole blocks of the first prompt, before the one that was filled up
            assert torch.equal(tensor[:, :, : before[name].shape[2] - 1], before[name][:, :, :-1])
    for now in range(250, 360):
        stream.feed(layer, now, now + 1)
    assert sum(int(store.length.sum()) for store in layer.stores.values()) + 10 * HEADS == 360 * HEADS


def test_at_eight_bits_it_is_nearly_exact():
    stream = Stream(260)
    layer, exact = layer_of("zipcache bits=8 low_bits=8"), layer_of("kivi residual=512")
    worst = 0.0
    for start, stop in ((0, 130), *((now, now + 1) for now in range(130, 260))):
        worst = max(worst, (stream.feed(layer, start, stop) - stream.feed(exact, start, stop)).abs().max().item())
    assert worst < 0.05


def test_rotated_the_other_tokens_lose_less_than_by_range():
    errors = []
    for text in ("zipcache salient=0.0", "zipcache salient=0.0 rotated=true"):
        stream, layer, exact = Stream(301), layer_of(text), layer_of("exact")
        for each in (layer, exact):
            stream.feed(each, 0, 300)
        assert [store.length.tolist() for store in layer.stores.values()] == [[[300, 300]]]
        errors.append((stream.feed(layer, 300, 301) - stream.feed(exact, 300, 301)).norm())
    assert errors[1] < 0.85 * errors[0]


def test_scores_of_waiting_tokens_come_from_their_probes():
    stream, layer = Stream(140), layer_of("zipcache probes=1.0 gather=60")
    stream.feed(layer, 0, 100)
    for now in range(100, 140):
        stream.feed(layer, now, now + 1)
    assert layer.pending.asked.all()
    keys, query = stream.keys[:, :, :140], stream.query[:, :, :140]
    asking = torch.zeros(1, 140, dtype=torch.bool)
    asking[:, 100:] = True
    exact = column_sums(query, keys, 32**-0.5, torch.ones(1, 140, dtype=torch.bool), asking)
    # the stored part is at 4 and 2 bits, so its share of the attention is not quite that of the exact keys
    assert torch.allclose(layer.pending.score, exact[..., 100:], rtol=0.2, atol=0.05)


def test_a_prompt_after_waiting_tokens_stores_them_too():
    stream, layer = Stream(400), layer_of("zipcache salient=0.5")
    for start, stop in ((0, 120), (120, 121), (121, 122), (122, 400)):
        stream.feed(layer, start, stop)
    assert layer.pending is None
    assert sum(int(store.length.sum()) for store in layer.stores.values()) == 400 * HEADS


@pytest.mark.parametrize("text", ["zipcache salient=0.1", "zipvl mass=0.3", "zipvl mass=0.3 evict=true"])
def test_protected_tokens_are_salient_whatever_they_receive(text):
    at = step(101, batch=2, pad=6)
    at.visual[:, 40:60] = True
    selection = methods.parse(f"{text} protect=3+visual").selection
    tiers, protected = selection.assign(at), selection.protect.among(at)
    assert tiers.masked_select(protected[:, None]).eq(0).all()
    assert protected.sum(1).tolist() == [23, 23] and tiers.ne(0).any()
    assert torch.equal(tiers[:1, :, 6:], selection.assign(row(at, 0, 6)))


def test_shares_that_make_no_sense_are_refused():
    for text, message in (
        ("zipcache salient=1.2", "between 0 and 1, got 1.2"),
        ("zipcache probes=0", "some at least, got 0.0 and 0.0"),
        ("zipcache gather=0", "at least 1, got 0"),
        ("zipcache bits=3", "bits must be 1, 2, 4 or 8"),
        ("zipcache | kivi", "both set tiers"),
    ):
        with pytest.raises(ValueError, match=message):
            methods.parse(text)
