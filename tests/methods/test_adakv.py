"""AdaKV: what its contest between heads comes to at its ends (arXiv:2407.11550)."""

import pytest
import torch

from kvmosaic import methods
from tests.selection.test_top import kept, step


def uneven():
    at = step(101, heads=4, groups=1)
    at.keys[:, 0] *= 8  # one head attends sharply
    return at


@pytest.mark.parametrize("scorer", ["snapkv", "snapkv_mean", "h2o", "expected_attention"])
@pytest.mark.parametrize("floor", [0.0, 0.2, 0.7])
def test_heads_spend_the_budget_together_and_none_falls_below_its_floor(scorer, floor):
    counts = kept(methods.adakv(tokens=20, floor=floor, scorer=scorer, window=4).selection, uneven()).sum(-1)
    assert counts.sum() == 80
    assert counts.min() >= max(4, int(20 * floor))


def test_without_a_contest_it_is_snapkv():
    ada, plain = methods.adakv(tokens=40, floor=1.0), methods.snapkv(tokens=40)
    assert torch.equal(ada.selection.assign(uneven()), plain.selection.assign(uneven()))


def test_equal_heads_keep_as_many():
    at = step(101, heads=4, groups=1)
    at = at._replace(**{name: getattr(at, name)[:, :1].expand(-1, 4, -1, -1) for name in ("query", "keys", "values")})
    assert kept(methods.adakv(tokens=20, floor=0.0, window=4).selection, at).sum(-1).tolist() == [[20] * 4]


def test_without_a_floor_the_best_of_all_heads_stay():
    at = uneven()
    selection = methods.adakv(tokens=20, floor=0.0, scorer="h2o", window=0).selection
    score = selection.scorer.score(at)
    assert torch.equal(kept(selection, at).flatten(1), score.flatten(1) >= score.flatten().topk(80).values[-1])
