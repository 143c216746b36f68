"""Budgets by layer: greedy is optimal, sums are kept, and a profile of another model is refused (XKV, arXiv:2412.05896)."""

import itertools

import pytest
import torch

from kvmosaic import Cache, methods
from kvmosaic.calibration import Calibration
from kvmosaic.errors import BadCalibration, NeedsCalibration
from kvmosaic.hooks.models import fingerprint
from kvmosaic.selection import Budget, Profiled, Recency, TopTokens
from kvmosaic.selection.layers import retained
from tests import models
from tests.models import Row, generate, prompt
from tests.selection.test_top import kept, step


def concave(layers, points, seed=0):
    draw = torch.rand(layers, points, generator=torch.Generator().manual_seed(seed)) ** 4
    return (draw / draw.sum(1, keepdim=True)).sort(dim=1, descending=True).values


@pytest.mark.parametrize("seed", range(5))
def test_greedy_is_as_good_as_trying_everything(seed):
    gains, slots = concave(3, 8, seed), 10
    budgets = Profiled(gains)
    ours = [round(8 * budgets.share(slots / 24, layer, 3)) for layer in range(3)]
    total = torch.cat([torch.zeros(3, 1), gains.cumsum(1)], 1)

    def worth(counts):
        return sum(float(total[layer, count]) for layer, count in enumerate(counts))

    best = max(worth(each) for each in itertools.product(range(9), repeat=3) if sum(each) == slots)
    assert sum(ours) == slots and worth(ours) == pytest.approx(best)


def test_equal_layers_get_equal_shares_and_all_is_all():
    budgets = Profiled(concave(1, 50).expand(4, -1))
    shares = [budgets.share(0.3, layer, 4) for layer in range(4)]
    assert max(shares) - min(shares) <= 1 / 50 and sum(shares) / 4 == pytest.approx(0.3)
    assert all(budgets.share(1.0, layer, 4) == 1.0 for layer in range(4))


def test_a_peaked_layer_gets_its_slot_first_and_a_flat_one_the_rest():
    gains = torch.full((2, 10), 0.1)
    gains[0] = torch.tensor([1.0] + [0.0] * 9)
    budgets = Profiled(gains)
    assert budgets.share(0.05, 0, 2) == pytest.approx(0.1) and budgets.share(0.05, 1, 2) == 0
    assert budgets.share(0.5, 0, 2) == pytest.approx(0.1) and budgets.share(0.5, 1, 2) == pytest.approx(0.9)


@pytest.mark.parametrize("tokens", [7, 100, 333])
def test_retained_importance_sums_to_one_and_does_not_rise(tokens):
    scores = torch.rand(1, 3, tokens, generator=torch.Generator().manual_seed(1))
    gains = retained(scores, 50)
    assert gains.sum().item() == pytest.approx(1, abs=1e-5) and gains.diff().max() <= 1e-6
    assert torch.allclose(retained(7 * scores, 50), gains, atol=1e-6)


def test_a_selection_keeps_its_layers_share():
    at = step(100)  # layer 1 of 4
    budgets = Profiled(concave(4, 100, seed=3))
    keep = kept(TopTokens(scorer=Recency(), budget=Budget(keep=0.2), layers=budgets), at)
    assert keep.sum(-1).eq(round(100 * budgets.share(0.2, 1, 4))).all()


def saved(path, **changes):
    made = {"method": "xkv", "options": {"scorer": "snapkv_mean"}, "fingerprint": "this model", "data": "none"}
    Calibration(**(made | changes), tensors={"gains": concave(4, 50)}).save(path)
    return path


def test_xkv_reads_a_profile_and_refuses_what_is_none(tmp_path):
    recipe = methods.parse(f"xkv keep=0.3 profile={saved(tmp_path / 'p.safetensors')} | kivi")
    assert recipe.fingerprint == "this model" and recipe.tiers is not None
    with pytest.raises(BadCalibration, match="scorer=snapkv_mean, and scorer=h2o was asked for"):
        methods.parse(f"xkv keep=0.3 scorer=h2o profile={tmp_path / 'p.safetensors'}")
    with pytest.raises(BadCalibration, match="made for kvquant, and xkv was asked for"):
        methods.get("xkv")(0.3, profile=saved(tmp_path / "q.safetensors", method="kvquant"))
    with pytest.raises(BadCalibration, match="no readable calibration file"):
        methods.get("xkv")(0.3, profile=tmp_path / "none.safetensors")
    with pytest.raises(NeedsCalibration, match="kvmosaic profile --model NAME"):
        methods.parse("xkv keep=0.3")
    with pytest.raises(ValueError, match="no scorer 'snap'"):
        methods.get("xkv")(0.3, profile=tmp_path / "p.safetensors", scorer="snap")


def test_profiles_that_rise_or_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not increase"):
        Profiled(torch.tensor([[0.1, 0.9]]))
    with pytest.raises(ValueError, match="4 layers, and this one has 8"):
        Profiled(concave(4, 10)).share(0.5, 0, 8)


def test_a_profile_of_another_model_is_refused_and_one_of_this_model_serves(tmp_path):
    model = models.model("llama")
    with pytest.raises(BadCalibration, match=r"calibrated for this model, and this model is llama"):
        Cache(model, methods.parse(f"xkv profile={saved(tmp_path / 'other.safetensors')}"))
    own = Calibration("xkv", {"scorer": "snapkv_mean"}, fingerprint(model.config), "none", {"gains": concave(2, 50)})
    own.save(tmp_path / "own.safetensors")
    cache = Cache(model, methods.parse(f"xkv keep=0.3 profile={tmp_path / 'own.safetensors'}"))
    generate(model, prompt("llama", Row(300, 0)), cache, 2)
    counts = [int(layer.stores["tier 0"].length[0, 0]) - 1 for layer in cache.layers]
    assert sum(counts) == pytest.approx(180, abs=2) and counts[0] != counts[1]
