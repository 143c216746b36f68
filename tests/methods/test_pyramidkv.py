"""PyramidKV: SnapKV's choice, in budgets that fall from layer to layer (arXiv:2406.02069)."""

import itertools

import pytest
import torch

from kvmosaic import Cache, methods
from tests import models
from tests.models import Row, generate, prompt
from tests.selection.test_top import kept, step


def test_budgets_fall_in_even_steps_and_their_mean_is_the_budget():
    at = step(800)._replace(layers=8)
    selection = methods.pyramidkv(keep=0.1).selection
    counts = [int(kept(selection, at._replace(layer=layer)).sum(-1)[0, 0]) for layer in range(8)]
    assert counts[0] == 156 and sum(counts) / 8 == pytest.approx(80, abs=1)
    steps = [a - b for a, b in itertools.pairwise(counts)]
    assert max(steps) - min(steps) <= 5  # the last layer keeps its window of 8 instead of 4


def test_equal_layers_are_snapkv():
    at = step(300)
    flat = methods.pyramidkv(keep=0.2, beta=1.0).selection.assign(at)
    assert torch.equal(flat, methods.snapkv(keep=0.2, window=8).selection.assign(at))


def test_lower_layers_hold_more_bytes():
    model = models.model("llama")
    cache = Cache(model, methods.pyramidkv(keep=0.3))
    generate(model, prompt("llama", Row(300, 0)), cache, 2)
    lower, upper = (int(layer.stores["tier 0"].length[0, 0]) for layer in cache.layers)
    assert lower == 177 and upper == 9  # 0.585 of 300, and the window of 8; one generated token each
