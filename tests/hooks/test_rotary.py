"""Keys that are stored as they were before their rotary positions, in every family."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from kvmosaic import Cache, Recipe, methods
from kvmosaic.codecs import Codec, Exact, Packed, Part, Uniform
from kvmosaic.errors import CacheMismatch, UnsupportedModel
from kvmosaic.hooks.rotary import Rotary
from kvmosaic.stores import Coded, Lane
from tests import models
from tests.models import Row, generate, logits, prompt

NEAR = dict(rtol=0, atol=1e-3)
PADDED = (Row(75, 1, 0), Row(58, 2, 1))


@dataclass(frozen=True)
class Whole(Codec):
    """Float32 as it comes: the turning back and forth is all that is lost."""

    def parts(self, channels: int) -> Mapping[str, Part]:
        return {"numbers": Part(every=1, width=channels, dtype=torch.float32, bits=32, kind="exact")}

    def encode(self, x: Tensor, valid: Tensor | None) -> Packed:
        return {"numbers": x}

    def decode(self, packed: Packed) -> Tensor:
        return packed["numbers"]


def unrotated(window: int = 0, flush: int = 1) -> Recipe:
    return Recipe(tiers=(Coded(Lane(Whole(), window, flush, pre_rope=True), Lane(Exact())),))


def stock(kind: str) -> Any:
    if kind in models.STOCK_EAGER:
        return hf.DynamicCache(config=models.stock(kind).config.get_text_config(decoder=True))
    return None


@pytest.mark.parametrize("kind", models.KINDS)
@pytest.mark.parametrize("recipe", [unrotated(), unrotated(window=5, flush=8)], ids=["at once", "in flushes"])
def test_turning_keys_back_and_forth_changes_nothing(kind: str, recipe: Recipe) -> None:
    """In a padded batch, over generated tokens; three ids a token and two tables included."""
    model, inputs = models.model(kind), prompt(kind, *PADDED)
    cache = Cache(model, recipe)
    mine, right = logits(model, inputs, cache), logits(models.stock(kind), inputs, stock(kind))
    assert torch.allclose(mine, right, **NEAR)
    full = next(layer for layer in cache.layers if hasattr(layer, "stores"))
    assert bool((full.stores["tier 0"].keys.coded > 50).all())


def before_rotation(model: Any, inputs: dict[str, Any]) -> Tensor:
    """[2, T, 32]: the keys of the first layer as its projection made them."""
    found = []
    hook = model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda module, args, out: found.append(out))
    model(**inputs)
    hook.remove()
    return found[0][0].unflatten(-1, (2, 32)).transpose(0, 1)


def test_what_lies_in_the_store_are_the_keys_of_the_projection() -> None:
    model, inputs = models.model("llama"), prompt("llama", Row(40, 0, 0))
    cache = Cache(model, unrotated())
    model(**inputs, past_key_values=cache)
    store = cache.layers[0].stores["tier 0"]
    assert torch.allclose(store.keys.read(0, 40)["numbers"][0], before_rotation(model, inputs), atol=1e-5)
    assert store.keys.position[0, 0, :40, 0].tolist() == list(range(40))
    assert store.keys.position.shape[1] == 1


@pytest.mark.parametrize("text", ["h2o keep=0.3", "streaming_llm tokens=24", "snapkv keep=0.3", "h2o_prefill keep=0.3"])
def test_tokens_keep_their_own_positions_when_others_leave(text: str) -> None:
    """Heads that keep different tokens, in a padded batch, while slots are used again."""
    model, inputs = models.model("llama"), prompt("llama", Row(75, 1, 0), Row(58, 3, 1))
    mine = logits(model, inputs, Cache(model, methods.parse(text) | unrotated()), 30)
    assert torch.allclose(mine, logits(model, inputs, Cache(model, methods.parse(text)), 30), **NEAR)


def test_positions_that_the_user_gives_are_those_that_count() -> None:
    model, inputs = models.model("llama"), prompt("llama", Row(20, 0, 0))
    position = torch.arange(20)[None] * 3
    ids, later = inputs["input_ids"], torch.tensor([[70]])
    for recipe in (unrotated(), Recipe(tiers=(Coded(Lane(Exact()), Lane(Exact())),))):
        cache = Cache(model, recipe)
        model(ids, position_ids=position, past_key_values=cache)
        found = model(later, position_ids=later, past_key_values=cache).logits
        if recipe == unrotated():
            mine = found
    assert torch.allclose(mine, found, **NEAR)


def test_codes_of_unrotated_keys_are_read_as_decoded_and_rotated() -> None:
    model = models.model("llama")
    rotary, lane = Rotary(model), Lane(Uniform(bits=4, axis="channel", group=32), 0, 32, pre_rope=True)
    keys, values = torch.randn(2, 2, 2, 96, 32, generator=torch.Generator().manual_seed(0))
    position = torch.randint(0, 500, (2, 96, 1), generator=torch.Generator().manual_seed(1))
    store = Coded(lane, Lane(Exact())).open(0, keys, values, rotary=rotary)
    store.put(keys, values, None, position)
    turned = lane.codec.decode(lane.codec.encode(rotary.unrotate(keys, position[:, None]), None))
    dense = rotary.rotate(turned, position[:, None])
    query = torch.randn(2, 2, 3, 32, generator=torch.Generator().manual_seed(2))
    right = (query @ dense.mT * 0.2).softmax(-1) @ values
    assert torch.allclose(store.attend(query, 0.2, None).out, right, atol=1e-4)


def test_stretched_tables_are_undone_too() -> None:
    rope = dict(rope_type="yarn", factor=4.0, rope_theta=10000.0, original_max_position_embeddings=1024)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**models._TEXT | dict(rope_parameters=rope)))
    rotary, position = Rotary(model), torch.arange(9).view(1, 1, 9, 1)
    x = torch.randn(1, 2, 9, 32)
    turned = rotary.rotate(x, position)
    assert float((turned.norm(dim=-1) / x.norm(dim=-1)).min()) > 1.05
    assert torch.allclose(rotary.unrotate(turned, position), x, atol=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_change_with_the_length_are_refused(kind: str) -> None:
    rope = dict(rope_type=kind, factor=2.0, rope_theta=10000.0, original_max_position_embeddings=1024)
    rope |= dict(short_factor=[1.0] * 16, long_factor=[2.0] * 16) if kind == "longrope" else {}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**models._TEXT | dict(rope_parameters=rope)))
    with pytest.raises(UnsupportedModel, match=f"LlamaForCausalLM has {kind} rotary positions: frequencies change"):
        Cache(model, unrotated())
    Cache(model, methods.kivi())


def test_models_without_rotary_positions_are_refused() -> None:
    model = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=50, n_positions=64))
    with pytest.raises(UnsupportedModel, match="GPT2LMHeadModel has no rotary positions"):
        Cache(model, unrotated())


def test_the_text_model_by_itself_is_refused() -> None:
    model = models.make("internvl")
    with pytest.raises(CacheMismatch, match="pre-RoPE keys need the positions"):
        model.model.language_model(torch.ones(1, 9, dtype=torch.int64), past_key_values=Cache(model, unrotated()))


def test_values_have_no_positions() -> None:
    with pytest.raises(ValueError, match="values have no rotary positions"):
        Coded(Lane(Exact()), Lane(Whole(), pre_rope=True))


def test_sampling_and_beams_keep_positions_with_their_rows() -> None:
    model, inputs = models.model("qwen2_5_vl"), prompt("qwen2_5_vl", Row(45, 1, 0))
    for mode in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 3}):
        mine = generate(model, inputs, Cache(model, unrotated()), 12, **mode)
        assert torch.equal(mine, generate(models.stock("qwen2_5_vl"), inputs, None, 12, **mode)), mode
