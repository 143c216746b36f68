"""KVQuant by section 8 of its specification, on a model's own keys and values."""

import pytest
import torch

from kvmosaic import Cache, calibration, methods
from kvmosaic.errors import BadCalibration, NeedsCalibration, RecipeConflict
from kvmosaic.evals import learn as learning
from kvmosaic.learning import Sample, Side
from kvmosaic.methods.kvquant import learn
from tests import learned, models
from tests.models import Row, generate, prompt

KVQUANT = "kvquant bits=2"


def sample(layer: int = 0) -> Sample:
    return learning.samples(learned.opened("llama"), learned.passages("llama", 6, 100))[layer]


def tier(text: str) -> tuple:
    recipe = methods.parse(learned.recipe("llama", text))
    return recipe.tiers[0].lanes(0)


def test_without_levels_it_says_how_to_learn_them() -> None:
    with pytest.raises(NeedsCalibration, match='kvmosaic calibrate --method "kvquant bits=3" --model NAME'):
        methods.kvquant(bits=3)


def test_about_the_share_that_was_asked_for_lies_outside_each_channels_range() -> None:
    one = sample().after(1)
    middle, half = learn(sample(), outliers=0.04)["key ranges"].float()[:, :, None]
    outside = ((one.unrotated.numbers - middle).abs() > half * 1.001).float().mean(1)
    assert float(outside.mean()) == pytest.approx(0.04, abs=0.01)
    assert float(outside.max()) < 0.06
    middle, half = learn(sample(), outliers=0.0)["key ranges"].float()[:, :, None]
    assert float(((one.unrotated.numbers - middle).abs() - half).max()) < 1e-2


def test_q_norm_keeps_mean_and_variance() -> None:
    one = sample()
    side = Side(one.unrotated.numbers, torch.ones_like(one.unrotated.numbers))
    found = learn(Sample(side, side, side, one.place), bits=2, outliers=0.0, first=0, fisher=False, normalize=True)
    middle, half = found["key ranges"].float()[:, :, None]
    unit = (side.numbers - middle) / half
    unit = unit[unit.abs() <= 1]  # the ends are rounded to float16
    levels, restored = found["key levels"], found["key restored"]
    read = restored[torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2)]
    assert float(read.mean()) == pytest.approx(float(unit.mean()), abs=1e-3)
    assert float(read.std()) == pytest.approx(float(unit.std()), abs=1e-3)
    plain = learn(Sample(side, side, side, one.place), bits=2, outliers=0.0, first=0, fisher=False, normalize=False)
    assert torch.equal(plain["key levels"], plain["key restored"])
    assert not torch.equal(levels, restored)


def test_fewer_bits_and_no_outliers_are_further_from_the_keys() -> None:
    """nuq4-1% < nuq4 < nuq3-1% < ... in error of unrotated keys weighted by what the loss feels."""
    one = sample()
    errors = []
    for bits in (4, 3, 2):
        for outliers in (0.01, 0.0):
            keys, _ = tier(f"kvquant bits={bits} outliers={outliers}")
            found = keys.codec.decode(keys.codec.encode(one.unrotated.numbers[None], None))[0]
            errors.append(float(((found - one.unrotated.numbers).square() * one.unrotated.weights).mean()))
    assert errors == sorted(errors)


def test_bytes_are_the_formula() -> None:
    """A token and head: 2 bits a number and one outlier of 24 bits on each side; a value's range of 32 bits."""
    model, cache = models.model("llama"), Cache(models.model("llama"), methods.parse(learned.recipe("llama", KVQUANT)))
    model(torch.randint(3, 150, (1, 65)), past_key_values=cache)
    report = cache.report()
    heads = 2 * 2
    assert report.codes == 64 * heads * 2 * (32 * 2 // 8 + 1)
    assert report.scales == 64 * heads * 4
    outliers = 64 * heads * 2 * 2
    assert report.exact == outliers + heads * 2 * 32 * 4  # and the first token
    assert report.learned == 2 * (2 * 2 * 32 * 2 + 4 * 4 * 4)


@pytest.mark.parametrize("other", ["h2o keep=0.5", "snapkv keep=0.5"])
def test_a_selection_drops_codes_outliers_ranges_and_positions_together(other: str) -> None:
    """What is kept of a token is what the whole cache has of it, whichever slot it lies in."""
    model, inputs = models.model("llama"), prompt("llama", Row(75, 1, 0))
    text = learned.recipe("llama", "kvquant bits=4", "first=0")
    whole, some = Cache(model, methods.parse(text)), Cache(model, methods.parse(f"{text} | {other}"))
    for cache in (whole, some):
        generate(model, inputs, cache, 2)  # the second token is the first that reads codes
    for layer, full in zip(some.layers, whole.layers, strict=True):
        store = getattr(layer.stores["tier 0"], "store", layer.stores["tier 0"])
        right = full.stores["tier 0"]
        assert int(store.length.max()) < int(right.length.min())
        if layer.index:  # later layers see other hidden states
            continue
        for lane, other_lane in ((store.keys, right.keys), (store.values, right.values)):
            mine, theirs = lane.read(0, int(store.length.min())), other_lane.read(0, int(right.length.min()))
            for head in range(2):
                place = store.keys.position[
                    0, head if store.keys.position.shape[1] > 1 else 0, : mine["codes"].shape[2], 0
                ]
                for name, part in mine.items():
                    assert torch.equal(part[0, head], theirs[name][0, head, place.long()]), name


def test_channels_that_never_vary_are_exact_and_need_no_levels() -> None:
    one = sample()
    numbers = one.unrotated.numbers.clone()
    numbers[:, :, 3] = 0.75
    side = Side(numbers, one.unrotated.weights)
    found = learn(Sample(side, side, side, one.place), bits=2)
    assert bool((found["key ranges"][1, :, 3] == 0).all())
    assert all(bool(each.isfinite().all()) for each in found.values())
    with pytest.raises(ValueError, match="4 levels need as many numbers that vary, and there are 0"):
        side = Side(torch.ones(2, 9, 32), torch.ones(2, 9, 32))
        learn(Sample(side, side, side, torch.arange(9)), bits=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 5}, "bits must be 1, 2, 3 or 4, got 5"),
        ({"outliers": 1.0}, "at least 0 and below 1, got 1.0"),
        ({"first": 97}, "4 levels need 4 tokens|16 levels need 16 tokens"),
    ],
)
def test_what_cannot_be_learned_is_refused(options: dict[str, float], words: str) -> None:
    side = Side(torch.ones(2, 99, 32), torch.ones(2, 99, 32))
    with pytest.raises(ValueError, match=words):
        learn(Sample(side, side, side, torch.arange(99)), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no form before their rotary positions"):
        learn(Sample(side, side, None, torch.arange(99)))


def test_levels_of_other_settings_are_refused() -> None:
    file = learned.file("llama", KVQUANT)
    for options, words in (
        ({"bits": 3}, "made with bits=2, and bits=3 was asked for"),
        ({"bits": 2, "outliers": 0.02}, "made with outliers=0.01, and outliers=0.02"),
        ({"bits": 2, "pre_rope": False}, "made with pre_rope=True, and pre_rope=False"),
    ):
        with pytest.raises(BadCalibration, match=words):
            methods.kvquant(**options, calibration=file)
    with pytest.raises(BadCalibration, match="made for kvquant, and cq was asked for"):
        calibration.load(file, method="cq", options={})


@pytest.mark.parametrize("text", ["think pruned=0.5", "think channels=16"])
def test_a_part_of_the_channels_does_not_fit_what_was_learned_of_all(text: str) -> None:
    for own in (KVQUANT, "cq coupled=4 bits=4"):
        with pytest.raises(RecipeConflict, match="these tiers learned what they know of all channels"):
            Cache(models.model("llama"), methods.parse(f"{learned.recipe('llama', own)} | {text}"))
