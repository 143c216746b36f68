"""What a budget promises: protected tokens stay, a size of memory is kept, and what cannot be is refused."""

import pytest
import torch

from kvmosaic import Cache, methods
from kvmosaic.cli.methods import options
from kvmosaic.errors import UnsupportedModel
from kvmosaic.selection import AttentionSums, Budget, HeavyHitters, Protect, Pyramid, TopTokens
from tests import models
from tests.models import Row, generate, prompt
from tests.selection.test_eviction import Stream, layer_of
from tests.selection.test_top import SCORERS, kept, row, step

BUDGETED = ["adakv", "expected_attention", "h2o", "h2o_prefill", "pyramidkv", "snapkv", "streaming_llm"]


def with_pictures(at, *places):
    visual = at.visual.clone()
    for place in places:
        visual[:, place] = True
    return at._replace(visual=visual)


@pytest.mark.parametrize("name", [*BUDGETED, "xkv"])
def test_every_method_with_a_budget_takes_it_in_each_form(name):
    assert [row["option"] for row in options(name)][:4] == ["keep", "tokens", "gigabytes", "protect"]


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda scorer: type(scorer).__name__)
@pytest.mark.parametrize("protect", [Protect(first=9), Protect(visual=True), Protect(first=3, text=True)], ids=str)
def test_protected_tokens_stay_within_the_budget(scorer, protect):
    at = with_pictures(step(101, batch=2, pad=6), slice(40, 90)) if protect.text else step(101, batch=2, pad=6)
    at = with_pictures(at, slice(40, 60)) if protect.visual else at
    budget = Budget(tokens=70, protect=protect)
    whole = kept(TopTokens(scorer=scorer, budget=budget, recent=5), at)
    assert protect.among(at)[:, None].logical_and(~whole).sum() == 0
    assert whole.sum(-1).eq(70).all()
    assert torch.equal(whole[:1, :, 6:], kept(TopTokens(scorer=scorer, budget=budget, recent=5), row(at, 0, 6)))


def test_first_tokens_are_those_of_the_sequence_not_of_each_chunk():
    stream, layer = Stream(120), layer_of("h2o_prefill tokens=20 recent=4 protect=12")
    at = layer._step  # the steps that the layer makes
    stream.feed(layer, 0, 10)
    held = []
    layer._step = lambda *args: held.append(at(*args)) or held[-1]
    stream.feed(layer, 10, 60)
    assert held[0].place[0].tolist() == list(range(10, 60))
    assert Protect(first=12).among(held[0])[0].nonzero()[:, 0].tolist() == [0, 1]


def test_padding_is_left_out_of_places_in_later_turns():
    stream, layer = Stream(40, batch=2), layer_of("h2o_prefill tokens=10 recent=4")
    mask = torch.ones(20, 20, dtype=torch.bool).tril().expand(2, 1, 20, 20).clone()
    mask[0, :, :, :7] = False
    stream.feed(layer, 0, 20, mask)
    at = layer._step
    held = []
    layer._step = lambda *args: held.append(at(*args)) or held[-1]
    stream.feed(layer, 20, 40)
    assert held[0].place[:, 0].tolist() == [13, 20]


@pytest.mark.parametrize(
    "text", ["h2o tokens=30 recent=4 protect=5+visual", "streaming_llm tokens=30 protect=5+visual"]
)
def test_protected_tokens_never_leave_while_decoding(text):
    stream, layer = Stream(160), layer_of(text)
    layer.visual = torch.zeros(1, 50, dtype=torch.bool)
    layer.visual[:, 20:30] = True
    stream.feed(layer, 0, 50)
    for now in range(50, 90):
        stream.feed(layer, now, now + 1)
    layer.visual = torch.zeros(1, 30, dtype=torch.bool)
    layer.visual[:, 3:6] = True  # a later turn with a picture
    stream.feed(layer, 90, 120)
    for now in range(120, 160):
        stream.feed(layer, now, now + 1)
    store = layer.stores["tier 0"]
    assert store.length.eq(30).all()
    for head in range(2):
        left = set(store.position[0, head, :30].tolist())
        assert left >= {*range(5), *range(20, 30), 93, 94, 95}


def test_a_turn_with_more_protected_tokens_than_a_row_may_keep_is_refused_and_changes_nothing():
    stream, layer = Stream(100), layer_of("h2o tokens=20 recent=4 protect=visual")
    stream.feed(layer, 0, 50)
    before = [tensor.clone() for _, _, tensor in layer.tensors()]
    layer.visual = torch.ones(1, 30, dtype=torch.bool)
    with pytest.raises(ValueError, match="30 tokens are protected, and a row may keep 20"):
        stream.feed(layer, 50, 80)
    assert all(torch.equal(old, now) for old, (_, _, now) in zip(before, layer.tensors(), strict=True))


@pytest.mark.parametrize("make", [TopTokens, HeavyHitters])
def test_a_prompt_with_more_protected_tokens_than_its_budget_is_refused(make):
    at = with_pictures(step(100), slice(10, 60))
    selection = make(scorer=AttentionSums(), budget=Budget(keep=0.4, protect=Protect(visual=True)), recent=4)
    with pytest.raises(
        ValueError, match=r"40 tokens \(keep=0.4\) cannot hold the 50 protected tokens of a prompt of 100"
    ):
        selection.assign(at)
    later = at._replace(place=at.place + 200)  # a later turn stays whole instead
    assert kept(selection, later)[..., 10:60].all()


def test_protected_tokens_stay_in_a_layer_with_a_smaller_share():
    at = step(100)._replace(layer=3)
    budget = Budget(keep=0.2, protect=Protect(first=15))
    assert kept(TopTokens(scorer=AttentionSums(), budget=budget, layers=Pyramid()), at).sum(-1).eq(15).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("snapkv protect=pictures", "a count of first tokens, visual, text, .* got 'pictures'"),
        ("snapkv protect=4+4", "got '4\\+4'"),
        ("snapkv protect=visual+text", "leaves nothing that may be dropped"),
        ("snapkv protect=-3", "at least 0, got -3"),
        ("snapkv tokens=50 protect=60", "50 tokens cannot hold the 60 first tokens that are protected"),
        ("snapkv tokens=50 protect=20", "cannot hold the 20 first and 32 recent"),
        ("snapkv gigabytes=0", "above 0, got 0"),
        ("snapkv gigabytes=-1", "above 0, got -1"),
        ("snapkv gigabytes=1 keep=0.5", "got keep=0.5 and gigabytes=1"),
        ("snapkv gigabytes=1 tokens=5", "got tokens=5 and gigabytes=1"),
        ("snapkv keep=-0.5", "above 0 and at most 1, got -0.5"),
        ("h2o tokens=-5", "at least 1, got -5"),
    ],
)
def test_budgets_that_cannot_be_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        methods.parse(text)


def test_pictures_cannot_be_protected_in_a_model_that_takes_none():
    with pytest.raises(UnsupportedModel, match="takes no pictures"):
        Cache(models.model("llama"), methods.parse("snapkv protect=visual"))


@pytest.mark.parametrize("protect", ["visual", "text"])
def test_a_vision_model_keeps_what_is_protected(protect):
    model, inputs = models.model("internvl"), prompt("internvl", Row(text=60, pictures=3))
    visual = (inputs["input_ids"] == models.IMAGE).sum().item()
    tokens = inputs["input_ids"].shape[1]
    many = visual if protect == "visual" else tokens - visual
    held = {}
    for budget in (many, tokens):
        cache = Cache(model, methods.parse(f"h2o tokens={budget} recent=0 protect={protect}"))
        model(**inputs, past_key_values=cache)
        held[budget] = cache.layers[0].stores["tier 0"].position[0, 0, :budget].sort().values
    places = (inputs["input_ids"][0] == models.IMAGE).nonzero()[:, 0]
    want = places if protect == "visual" else torch.tensor([at for at in range(tokens) if at not in places])
    assert torch.equal(held[many], want.to(torch.int32))


SIZED = ["snapkv", "pyramidkv", "h2o", "expected_attention", "snapkv {} | kivi residual=32", "h2o {} | turboquant"]


@pytest.mark.parametrize("text", SIZED)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_budget_of_memory_is_used_up_and_not_exceeded(text, rows):
    model, inputs = models.model("llama"), prompt("llama", *[Row(300, 0, 0), Row(251, 0, 1)][:rows])
    text = text if "{}" in text else text + " {}"

    def held(budget, tokens=1):
        cache = Cache(model, methods.parse(text.format(budget)))
        generate(model, inputs, cache, tokens)
        return cache.nbytes()

    room = held("tokens=130") + 3000
    asked = f"gigabytes={room / 1e9}"
    now = held(asked)
    assert now <= room
    greater = held("tokens=300")
    assert now > room - 0.15 * greater  # blocks of 32 tokens in each of four heads
    if text.startswith("h2o"):
        assert held(asked, 60) <= now  # and it stays there


@pytest.mark.parametrize("text", ["adakv {} floor=0", "kvzip {} | kivi residual=32", "adakv {} | turboquant bits=2"])
def test_a_budget_of_memory_is_not_exceeded_where_heads_compete(text):
    """Nor is it used up on short prompts: each head may begin blocks of its own."""
    model, inputs = models.model("llama"), prompt("llama", Row(900, 0, 0), Row(751, 0, 1))

    def held(budget):
        cache = Cache(model, methods.parse(text.format(budget)))
        generate(model, inputs, cache, 1)
        return cache.nbytes()

    least, greatest = held("tokens=32"), held("tokens=900")
    for part in (0.4, 0.7):
        room = least + part * (greatest - least)
        assert least + 0.5 * part * (greatest - least) < held(f"gigabytes={room / 1e9}") <= room


def test_a_reset_cache_finds_its_count_anew_and_a_large_budget_keeps_all():
    model = models.model("llama")
    cache = Cache(model, methods.parse("snapkv gigabytes=0.0002 window=8"))
    first = models.logits(model, prompt("llama", Row(300, 0)), cache, 3)
    held = cache.nbytes()
    cache.reset()
    generate(model, prompt("llama", Row(60, 0)), cache, 3)
    cache.reset()
    assert torch.equal(models.logits(model, prompt("llama", Row(300, 0)), cache, 3), first)
    assert cache.nbytes() == held
    inputs = prompt("llama", Row(70, 0))
    whole = generate(model, inputs, Cache(model, methods.parse("snapkv gigabytes=1")), 10)
    assert torch.equal(whole, generate(models.stock("llama"), inputs, None, 10))


def test_memory_that_cannot_hold_what_must_stay_is_refused():
    model = models.model("llama")
    cache = Cache(model, methods.parse("snapkv gigabytes=0.00001 window=8 protect=50"))
    with pytest.raises(
        ValueError, match=r"gigabytes=1e-05 cannot hold the 58 tokens .*\(50 protected, 8 recent\).*they take"
    ):
        generate(model, prompt("llama", Row(300, 0)), cache, 1)
    assert cache.nbytes() == 0
