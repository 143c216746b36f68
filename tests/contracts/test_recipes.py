"""What every method promises, through the whole machinery of generate."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kvmosaic import Cache, Recipe, methods
from kvmosaic.errors import RecipeConflict
from kvmosaic.report import KINDS
from tests import learned, models
from tests.instances import BARE, EXACT_METHODS, LEARNED, TEXT, VISUAL
from tests.models import Row, generate, logits, prompt

pytestmark = pytest.mark.usefixtures("references")

CASES = [("llama", text) for text in TEXT] + [("internvl", text) for text in [*TEXT[:3], *VISUAL]]
CASES += [("llama", learned.recipe("llama", text)) for text in LEARNED]
CASES += [("internvl", learned.recipe("internvl", text)) for text in LEARNED[:3:2]]
IDS = [f"{kind}-{text.partition(' calibration=')[0]}" for kind, text in CASES]  # files have other names in each process
every_case = pytest.mark.parametrize(("kind", "text"), CASES, ids=IDS)
PADDED = (Row(75, 1, 0), Row(58, 3, 1))


def walk(each: object, found: dict[int, Tensor]) -> dict[int, Tensor]:
    """Every tensor that can be reached from an object, by its storage."""
    if isinstance(each, Tensor):
        found[each.untyped_storage().data_ptr()] = each
    elif isinstance(each, dict):
        for value in each.values():
            walk(value, found)
    elif isinstance(each, list | tuple):
        for value in each:
            walk(value, found)
    elif hasattr(each, "__dict__"):
        walk(vars(each), found)
    for slot in getattr(type(each), "__slots__", ()):
        walk(getattr(each, slot, None), found)
    return found


@pytest.mark.parametrize("name", BARE)
def test_every_method_can_be_asked_for_by_name(name: str) -> None:
    recipe = methods.parse(name)
    assert isinstance(recipe, Recipe)
    assert recipe == getattr(methods, name)() == methods.get(name)()
    assert recipe.name == name
    assert hash(recipe) == hash(methods.parse(name))
    assert methods.get(name).__doc__


def test_importing_a_methods_file_leaves_its_function_in_place() -> None:
    import kvmosaic.methods.kivi

    assert callable(kvmosaic.methods.kivi)
    assert callable(kvmosaic.methods.calibquant)
    with pytest.raises(AttributeError, match=r"no attribute 'h20'; methods: adakv"):
        _ = methods.h20


@every_case
def test_nbytes_counts_every_stored_byte(kind: str, text: str) -> None:
    model = models.model(kind)
    cache = Cache(model, methods.parse(text))
    generate(model, prompt(kind, *PADDED), cache)
    found = walk(cache, {})
    report = cache.report()
    assert sum(each.untyped_storage().nbytes() for each in found.values()) == cache.nbytes() == report.total
    assert report.total == sum(getattr(report, kind) for kind in KINDS)
    config = model.config.get_text_config()
    columns = prompt(kind, *PADDED)["input_ids"].shape[1] + 19
    assert report.tokens == columns
    assert report.exact_cache == columns * 2 * 2 * config.num_key_value_heads * 32 * 4 * config.num_hidden_layers
    assert math.isclose(report.compression, report.exact_cache / report.total)


@every_case
def test_padding_is_never_attended_and_enters_no_range(kind: str, text: str) -> None:
    """And a batch of two is two single runs."""
    model, recipe = models.model(kind), methods.parse(text)
    both = logits(model, prompt(kind, *PADDED), Cache(model, recipe), 12)
    for index, row in enumerate(PADDED):
        alone = logits(model, prompt(kind, row), Cache(model, recipe), 12)
        assert torch.allclose(both[:, index], alone[:, 0], rtol=0, atol=1e-3), index


@every_case
def test_what_padding_holds_does_not_matter(kind: str, text: str) -> None:
    model, recipe, inputs = models.model(kind), methods.parse(text), prompt(kind, *PADDED)
    if "attention_mask" not in inputs:
        pytest.skip("these rows are of one length")
    other = inputs | {"input_ids": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 77)}
    assert torch.equal(generate(model, inputs, Cache(model, recipe)), generate(model, other, Cache(model, recipe)))


@every_case
def test_the_first_token_is_exact(kind: str, text: str) -> None:
    model, recipe = models.model(kind), methods.parse(text)
    if recipe.prefill is not None:
        pytest.skip("it changes the prompt's attention itself")
    mine = logits(model, prompt(kind, *PADDED), Cache(model, recipe), 1)
    assert torch.allclose(mine, logits(models.stock(kind), prompt(kind, *PADDED), None, 1), rtol=0, atol=1e-4)


@every_case
@pytest.mark.parametrize(
    "mode", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str
)
def test_every_method_runs_in_every_mode(kind: str, text: str, mode: dict[str, Any]) -> None:
    """And says the same twice; copies and a reset cache, too."""
    model, recipe, inputs = models.model(kind), methods.parse(text), prompt(kind, PADDED[0])
    cache = Cache(model, recipe)
    first = generate(model, inputs, cache, 12, **mode)
    cache.reset()
    assert torch.equal(generate(model, inputs, cache, 12, **mode), first)


@every_case
def test_a_copy_goes_on_as_the_original(kind: str, text: str) -> None:
    model, inputs = models.model(kind), prompt(kind, PADDED[0])
    cache = Cache(model, methods.parse(text))
    said = torch.cat([inputs["input_ids"], generate(model, inputs, cache, 5)], 1)
    if "pixel_values" in inputs:
        inputs = {"input_ids": said}
    other = copy.deepcopy(cache)
    mine = generate(model, {"input_ids": said}, other, 8)
    assert cache.get_seq_length() < other.get_seq_length()
    assert torch.equal(generate(model, {"input_ids": said}, cache, 8), mine)


@every_case
def test_a_token_is_encoded_once(kind: str, text: str) -> None:
    """Codes and scales of old slots do not change, bit for bit, while others come (where slots are not used again)."""
    model, recipe = models.model(kind), methods.parse(text)
    cache = Cache(model, recipe)
    generate(model, prompt(kind, PADDED[0]), cache, 5)
    lanes = [
        (store, lane, int(lane.coded.min()))
        for layer in cache.layers
        for store in getattr(layer, "stores", {}).values()
        if hasattr(store, "keys")
        for lane in (store.keys, store.values)
    ]
    if not lanes:
        pytest.skip("its slots are used again, or there are none")
    before = [lane.read(0, stop) for _, lane, stop in lanes]
    feed = torch.randint(2, 180, (1, 1), generator=torch.Generator().manual_seed(0))
    for _ in range(40):
        model(feed, past_key_values=cache)
    for (_, lane, stop), old in zip(lanes, before, strict=True):
        now = lane.read(0, stop)
        assert all(torch.equal(now[name][:, :, : part.shape[2]], part) for name, part in old.items())


@pytest.mark.parametrize("kind", ["llama", "internvl"])
@pytest.mark.parametrize("name", EXACT_METHODS)
def test_off_is_transformers_own_cache(kind: str, name: str) -> None:
    model, inputs = models.model(kind), prompt(kind, *PADDED)
    cache = Cache(model, EXACT_METHODS[name])
    assert torch.equal(generate(model, inputs, cache, 30), generate(models.stock(kind), inputs, None, 30))
    assert cache.report().codes == cache.report().scales == 0


def test_a_window_over_the_length_changes_nothing() -> None:
    model, inputs = models.model("llama"), prompt("llama", *PADDED)
    cache = Cache(model, methods.kivi(bits=1, residual=512))
    assert torch.equal(generate(model, inputs, cache, 30), generate(models.stock("llama"), inputs, None, 30))
    assert cache.report().codes == 0


@pytest.mark.parametrize("option", ["window=300", "first=300"])
@pytest.mark.parametrize("text", LEARNED)
def test_a_window_or_first_tokens_over_the_length_change_nothing(text: str, option: str) -> None:
    inputs = prompt("llama", *PADDED)
    cache = Cache(models.model("llama"), methods.parse(learned.recipe("llama", text, option)))
    mine = logits(models.model("llama"), inputs, cache, 20)
    assert torch.allclose(mine, logits(models.stock("llama"), inputs, None, 20), rtol=0, atol=1e-4)
    assert cache.report().codes == 0


@pytest.mark.parametrize(("kind", "text"), [("llama", "kivi bits=8 residual=32"), ("internvl", "calibquant bits=8")])
def test_eight_bits_are_close_and_fewer_are_further(kind: str, text: str) -> None:
    model, inputs = models.model(kind), prompt(kind, *PADDED)
    ids = inputs["input_ids"]

    def off(recipe: Recipe) -> float:
        """Of one forced token after the prompt, so that errors do not run away."""
        cache, stock = Cache(model, recipe), None
        feed = {name: each for name, each in inputs.items() if name != "input_ids"}
        model(ids, past_key_values=cache, **feed)
        mask = torch.nn.functional.pad(inputs.get("attention_mask", torch.ones_like(ids)), (0, 1), value=1)
        mine = model(ids[:, :1], past_key_values=cache, attention_mask=mask).logits
        stock = models.stock(kind)
        past = stock(ids, use_cache=True, **feed).past_key_values
        return float((mine - stock(ids[:, :1], past_key_values=past, attention_mask=mask).logits).abs().mean())

    errors = [off(methods.parse(text.replace("8", str(bits)))) for bits in (8, 4, 2)]
    assert errors == sorted(errors)
    assert errors[0] < 0.02


@pytest.mark.parametrize("left", ["calibquant bits=1", "calibquant bits=4 by_picture=true"])
@pytest.mark.parametrize("right", ["kivi bits=2", "kivi bits=4 residual=32", "exact"])
def test_order_of_recipes_does_not_matter(left: str, right: str) -> None:
    one, other = methods.parse(f"{left} | {right}"), methods.parse(f"{right} | {left}")
    assert one == other
    assert methods.parse(left) | methods.parse(left) == methods.parse(left)
    model, inputs = models.model("internvl"), prompt("internvl", *PADDED)
    assert torch.equal(generate(model, inputs, Cache(model, one), 10), generate(model, inputs, Cache(model, other), 10))


@pytest.mark.parametrize("left", BARE)
@pytest.mark.parametrize("right", BARE)
def test_any_two_methods_join_in_either_order_or_are_refused_in_both(left: str, right: str) -> None:
    one, other = methods.get(left)(), methods.get(right)()
    try:
        joined = one | other
    except RecipeConflict as error:
        with pytest.raises(RecipeConflict, match="both set"):
            _ = other | one
        assert left in str(error)
    else:
        assert joined == other | one


def test_a_nested_text_recipe_is_the_joined_one() -> None:
    text = methods.kivi(bits=2)
    assert methods.calibquant(bits=1, text=text) == methods.calibquant(bits=1) | text
    assert methods.parse("calibquant bits=1 | kivi bits=2").name == "calibquant bits=1 | kivi bits=2"
