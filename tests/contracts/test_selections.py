"""What every selection promises, whichever method it comes from."""

import pytest
import torch

from kvmosaic import Cache, Recipe, methods
from kvmosaic.calibration import Calibration
from kvmosaic.kernels import native
from kvmosaic.selection import DROP, Evicting, Gathering, Recency, TopTokens
from tests import models
from tests.instances import BARE, EXACT
from tests.models import Row, logits, prompt
from tests.selection.test_layers import concave
from tests.selection.test_top import row, step

pytestmark = pytest.mark.usefixtures("references")

NAMES = [name for name in BARE if methods.get(name)().selection is not None]
BUDGETED = [name for name in NAMES if isinstance(methods.get(name)().selection, TopTokens)]
every_selection = pytest.mark.parametrize("text", [*NAMES, "adakv protect=5", "snapkv tokens=40", "zipvl evict=true"])


def assigned(selection, at):
    """As the first prompt is assigned; scores that a replay would bring are drawn from each token's own place."""
    if selection.replay is None:
        return selection.assign(at)
    place = at.place[:, None].expand(at.keys.shape[:3]).double()
    return selection.assign_scored(at, ((place * 12.9898).sin() * 43758.5453).frac().float())


@every_selection
def test_the_same_step_gives_the_same_tiers_and_is_left_as_it_was(text):
    selection, at = methods.parse(text).selection, step(150, batch=2, pad=11)
    before = [each.clone() for each in at if isinstance(each, torch.Tensor)]
    tiers = assigned(selection, at)
    assert tiers.dtype is torch.int8
    assert torch.equal(tiers, assigned(methods.parse(text).selection, at))
    now = [each for each in at if isinstance(each, torch.Tensor)]
    assert all(torch.equal(old, new) for old, new in zip(before, now, strict=True))


@every_selection
@pytest.mark.parametrize("tokens", [1, 63, 300])
def test_tiers_are_complete_and_as_large_as_said(text, tokens):
    """Each token has one tier or none, and `expected` counts them."""
    recipe, at = methods.parse(text), step(tokens, seed=3)
    tiers, expected = assigned(recipe.selection, at), recipe.selection.expected(tokens, 1, 4)
    assert set(tiers.unique().tolist()) <= {DROP, *range(len(expected))}
    if text.startswith("zipvl"):  # the prompt decides; what is said is a bound
        assert tiers.eq(0).sum(-1).le(expected[0]).all()
    else:
        counts = [tiers.eq(tier).sum(-1).float().mean().item() for tier in range(len(expected))]
        assert counts == pytest.approx(expected)


@every_selection
def test_a_batch_of_two_is_two_single_steps(text):
    selection, at = methods.parse(text).selection, step(150, batch=2, pad=11)
    both = assigned(selection, at)
    assert torch.equal(both[:1, :, 11:], assigned(selection, row(at, 0, 11)))
    assert torch.equal(both[1:], assigned(selection, row(at, 1)))


@every_selection
def test_where_a_prompt_may_be_pruned_as_it_comes_a_head_is_assigned_as_a_row(text):
    selection, at = methods.parse(text).selection, step(150, batch=2, pad=11)
    if not selection.prunes:
        pytest.skip("it may not")
    states = {name: getattr(at, name).unflatten(1, (2, -1)).flatten(0, 1) for name in ("query", "keys", "values")}
    columns = {name: getattr(at, name).repeat_interleave(2, 0) for name in ("place", "visual")}
    rows = selection.assign(at._replace(**states, **columns))
    assert torch.equal(rows.view(2, 2, 150), selection.assign(at))


@pytest.mark.parametrize("name", BUDGETED)
def test_of_equal_scores_the_older_token_stays(name):
    selection, at = methods.get(name)(tokens=60).selection, step(150)
    tiers = selection.assign_scored(at, torch.zeros(1, 2, 150))[0, 0]
    count = selection.expected(150, 1, 4)[0]
    want = [*range(count - selection.recent), *range(150 - selection.recent, 150)]
    assert (tiers == 0).nonzero()[:, 0].tolist() == want


@pytest.mark.parametrize("name", BUDGETED)
@pytest.mark.parametrize("budget", ["keep=1.0", "tokens=1000", "gigabytes=1"])
def test_a_budget_over_the_length_is_exact_bit_for_bit(name, budget, monkeypatch):
    monkeypatch.undo()  # with the compiled kernels: PyTorch's sums change with how many rows it is given at once
    if methods.get(name)().selection.uneven and native.kernels().library is None:
        pytest.skip("no compiled kernels")
    if budget == "keep=1.0" and isinstance(methods.get(name)().selection, Evicting):
        pytest.skip("as many as the first prompt has, so that generated tokens push others out")
    model, inputs = models.model("llama"), prompt("llama", Row(75, 0, 0), Row(58, 0, 1))
    mine = logits(model, inputs, Cache(model, methods.parse(f"{name} {budget}")), 15)
    assert torch.equal(mine, logits(model, inputs, Cache(model, Recipe(tiers=(EXACT,))), 15))


def test_all_salient_and_all_of_the_mass_are_one_tier():
    at = step(150)
    for text in ("zipcache salient=1.0", "zipvl mass=1.0 probes=200"):
        assert methods.parse(text).selection.assign(at).eq(0).all()
    assert methods.parse("zipcache salient=0.0").selection.assign(at).eq(1).all()


def test_every_kind_of_selection_is_among_the_instances():
    selections = [methods.get(name)().selection for name in NAMES]
    assert any(isinstance(each, Gathering) for each in selections)
    assert any(each.replay for each in selections)
    assert any(isinstance(each, TopTokens) and isinstance(each.scorer, Recency) for each in selections)


def test_xkv_promises_the_same(tmp_path):
    """It needs a profile, so it is no bare instance."""
    made = {"method": "xkv", "options": {"scorer": "snapkv_mean"}, "fingerprint": "any", "data": "none"}
    Calibration(**made, tensors={"gains": concave(4, 50)}).save(tmp_path / "p.safetensors")
    text = f"xkv keep=0.3 profile={tmp_path / 'p.safetensors'}"
    test_the_same_step_gives_the_same_tiers_and_is_left_as_it_was(text)
    test_tiers_are_complete_and_as_large_as_said(text, 300)
    test_a_batch_of_two_is_two_single_steps(text)
