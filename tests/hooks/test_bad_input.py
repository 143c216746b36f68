"""What users get wrong. Each message says what was asked, what came, and what to do; and nothing is lost by it."""

import pytest
import torch
import transformers as hf
from torch import Tensor

import kvmosaic
from kvmosaic import Cache, Recipe, methods
from kvmosaic.errors import CacheMismatch, NotFinite, RecipeConflict, UnsupportedModel
from kvmosaic.stores import coded
from tests import models
from tests.instances import TIERS
from tests.models import generate, prompt

SHORT = methods.kivi(bits=2, residual=32)
SMALL = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)


def ids(count: int, batch: int = 1) -> Tensor:
    return torch.randint(2, 60, (batch, count), generator=torch.Generator().manual_seed(0))


def held(cache: Cache) -> list[tuple[str, Tensor]]:
    return [(name, tensor.clone()) for name, _, tensor in cache.tensors()]


def unchanged(cache: Cache, before: list[tuple[str, Tensor]]) -> bool:
    now = held(cache)
    return len(now) == len(before) and all(
        a == b and torch.equal(x, y) for (a, x), (b, y) in zip(now, before, strict=True)
    )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            hf.DeepseekV3Config(
                **SMALL, num_key_value_heads=4, n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1,
                q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=16, v_head_dim=16, qk_nope_head_dim=16,
                moe_intermediate_size=16, first_k_dense_replace=2,
            ),
            r"deepseek_v3: its cache holds latents .*\(MLA\).*Supported: Llama",
        ),
        (
            hf.FalconConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4),
            "falcon: its attention does not go through transformers' interface",
        ),
        (hf.BloomConfig(vocab_size=64, hidden_size=64, n_layer=1, n_head=4), "bloom: its attention does not go"),
        (
            hf.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=8),
            r"mistral: no layer attends to the whole context \(sliding_attention\).*Supported: models with full",
        ),
    ],
    ids=["MLA", "falcon", "bloom", "sliding"],
)  # fmt: skip
def test_models_that_cannot_work_are_refused_by_name(config: hf.PreTrainedConfig, words: str) -> None:
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    before = model.config._attn_implementation
    for make in (lambda: Cache(model, SHORT), lambda: kvmosaic.attach(model, SHORT)):
        with pytest.raises(UnsupportedModel, match=words):
            make()
    assert model.config._attn_implementation == before


def test_encoder_decoders_are_refused() -> None:
    sizes = dict(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    with pytest.raises(UnsupportedModel, match=r"t5: its attention adds a learned bias"):
        Cache(hf.T5ForConditionalGeneration(hf.T5Config(**sizes)), SHORT)
    bart = hf.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
    )  # fmt: skip
    with pytest.raises(UnsupportedModel, match=r"bart: encoder-decoder models keep two caches"):
        Cache(hf.BartForConditionalGeneration(bart), SHORT)


def test_pictures_asked_of_a_text_model_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"calibquant bits=1 sets how visual tokens .* kivi"):
        Cache(models.model("llama"), methods.calibquant(bits=1))


def test_a_cache_of_another_model_is_refused() -> None:
    """Prepared or not; and the cache is as it was."""
    llama, cache = models.model("llama"), Cache(models.model("llama"), SHORT)
    llama(ids(50), past_key_values=cache)
    before = held(cache)
    Cache(models.model("qwen3"), SHORT)
    with pytest.raises(CacheMismatch, match=r"made for llama 2 layers, 4/2 heads of 32.* used with qwen3"):
        models.model("qwen3")(ids(1), past_key_values=cache)
    with pytest.raises(
        CacheMismatch, match=r"attention function that reads dense keys.*use kvmosaic.Cache\(model, recipe\)"
    ):
        models.stock("qwen3")(ids(1), past_key_values=cache)
    assert unchanged(cache, before)


def test_a_cache_of_another_batch_is_refused() -> None:
    model = models.model("llama")
    cache = Cache(model, SHORT)
    model(ids(50, 2), past_key_values=cache)
    before = held(cache)
    with pytest.raises(CacheMismatch, match=r"holds 2 sequences with 2 KV heads on cpu, and 3 .* Make a new cache"):
        model(ids(1, 3), past_key_values=cache)
    assert unchanged(cache, before)
    model(ids(1, 2), past_key_values=cache)


def test_a_prompt_beyond_the_context_is_refused() -> None:
    model = models.make("llama", max_position_embeddings=100)
    cache = Cache(model, SHORT)
    with pytest.raises(ValueError, match=r"101 tokens are more than the model's context of 100. Shorten the prompt"):
        model(ids(101), past_key_values=cache)
    model(ids(90), past_key_values=cache)
    with pytest.raises(ValueError, match=r"110 tokens are more"):
        model(ids(20), past_key_values=cache)
    assert cache.get_seq_length() == 90


def test_an_answer_that_passes_the_context_is_not_lost() -> None:
    model = models.make("llama", max_position_embeddings=100)
    assert generate(model, {"input_ids": ids(95)}, Cache(model, SHORT), 12).shape == (1, 12)


def test_a_rotary_scaling_widens_the_context() -> None:
    rope = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=100, rope_theta=10000.0)
    model = models.make("llama", max_position_embeddings=100, rope_parameters=rope)
    model(ids(399), past_key_values=(cache := Cache(model, SHORT)))
    with pytest.raises(ValueError, match="context of 400"):
        model(ids(5), past_key_values=cache)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("steps", [1, 40])
def test_numbers_that_are_not_finite_name_the_layer(bad: float, steps: int) -> None:
    """The layer is as it was, bit for bit."""
    model = models.make("llama")
    cache = Cache(model, Recipe(tiers=(TIERS["token4"],)))
    model(ids(50), past_key_values=cache)
    before = [(name, tensor.clone()) for name, _, tensor in cache.layers[1].tensors()]

    def spoil(module: object, args: object, out: Tensor) -> Tensor:
        out = out.clone()
        out[0, -1, 3] = bad
        return out

    hook = model.model.layers[1].self_attn.k_proj.register_forward_hook(spoil)
    with pytest.raises(
        NotFinite, match=r"layer 1: the keys to encode hold NaN, infinity .*Check the model's weights and dtype"
    ):
        model(ids(steps), past_key_values=cache)
    hook.remove()
    assert all(torch.equal(old, now) for (_, old), (_, _, now) in zip(before, cache.layers[1].tensors(), strict=True))
    assert cache.layers[1].get_seq_length() == 50
    with pytest.raises(CacheMismatch, match="ended halfway"):
        model(ids(1), past_key_values=cache)


def test_a_device_that_would_have_to_be_waited_for_is_asked_once_at_the_end_of_a_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Too late for the bytes of the layer, so the cache is refused from then on."""
    monkeypatch.setattr(coded, "answers_at_once", lambda device: False)
    model = models.make("llama")
    cache = Cache(model, Recipe(tiers=(TIERS["token4"],)))
    model(ids(50), past_key_values=cache)
    assert not any(store.unverified for layer in cache.layers for store in layer.stores.values())
    hook = model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda module, args, out: out * torch.nan)
    with pytest.raises(NotFinite, match="layer 0: the values to encode hold NaN"):
        model(ids(9), past_key_values=cache)
    hook.remove()
    assert {layer.get_seq_length() for layer in cache.layers} == {59}
    with pytest.raises(CacheMismatch, match="cannot be encoded"):
        model(ids(1), past_key_values=cache)
    cache.reset()
    model(ids(9), past_key_values=cache)


def test_a_mask_that_hides_stored_tokens_is_refused() -> None:
    model = models.model("llama")
    cache = Cache(model, SHORT)
    model(ids(50), past_key_values=cache)
    before, mask = held(cache), torch.ones(1, 1, 3, 53, dtype=torch.bool)
    mask[..., 50:] = torch.ones(3, 3).tril().bool()
    shown = model(ids(3), past_key_values=kept(cache), attention_mask=mask).logits
    assert torch.allclose(shown, model(ids(3), past_key_values=kept(cache)).logits, atol=1e-5)
    for hidden in (mask.clone(), torch.zeros(1, 1, 3, 53)):
        if hidden.dtype is torch.bool:
            hidden[..., 7] = False
        else:
            hidden[..., 7] = torch.finfo(torch.float32).min
        with pytest.raises(
            CacheMismatch, match=r"a mask of 53 columns hides tokens that layer 0 has stored.*exact cache"
        ):
            model(ids(3), past_key_values=cache, attention_mask=hidden)
    assert unchanged(cache, before)


def kept(cache: Cache) -> Cache:
    import copy

    return copy.deepcopy(cache)


def test_a_mask_that_forgets_the_past_is_refused() -> None:
    """transformers would take the new tokens for padding."""
    model = models.model("llama")
    cache = Cache(model, SHORT)
    model(ids(50), past_key_values=cache)
    with pytest.raises(
        CacheMismatch, match=r"attention_mask has 7 columns, and there are 50 tokens in the cache and 7 new"
    ):
        model(ids(7), past_key_values=cache, attention_mask=torch.ones(1, 7, dtype=torch.int64))
    assert cache.get_seq_length() == 50


def test_embeddings_alone_do_not_tell_what_is_visual() -> None:
    model, inputs = models.model("internvl"), prompt("internvl")
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match=r"needs input_ids: from inputs_embeds alone nobody can tell"):
        model(inputs_embeds=embeds, past_key_values=Cache(model, methods.calibquant()))
    with pytest.raises(CacheMismatch, match=r"text model was called by itself.*with input_ids"):
        model.get_decoder()(inputs_embeds=embeds, past_key_values=Cache(model, methods.calibquant()))
    model(inputs_embeds=embeds, past_key_values=Cache(model, SHORT))


def test_layers_beyond_the_caches_are_refused() -> None:
    cache = Cache(models.model("llama"), SHORT)
    with pytest.raises(CacheMismatch, match=r"this cache has 2 layers .* and layer 2 came"):
        cache.update(torch.zeros(1, 2, 1, 32), torch.zeros(1, 2, 1, 32), 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kivy", "no method 'kivy'. Did you mean 'kivi'?"),
        ("h20", "no method 'h20'. Did you mean 'h2o'?"),
        ("zzz", "no method 'zzz'. There are: adakv, calibquant"),
        ("kivi bit=2", "kivi has no option 'bit'. Did you mean 'bits'?"),
        ("kivi colour=2", "kivi has no option 'colour'. It has: bits, key_bits"),
        ("kivi bits", "an option of kivi is written option=value, got 'bits'"),
        ("kivi bits=3", "bits must be 1, 2, 4 or 8 (codes fill a byte), got 3"),
        ("kivi key_bits=0", "bits must be 1, 2, 4 or 8 (codes fill a byte), got 0"),
        ("kivi bits=two", "bits must be 1, 2, 4 or 8 (codes fill a byte), got two"),
        ("kivi group=wide", "'kivi group=wide': "),
        ("kivi residual=100", "residual must be a positive multiple of group (keys leave the window in whole groups), got 100 and 32"),
        ("calibquant bits=16", "bits must be 1, 2, 4 or 8 (codes fill a byte), got 16"),
        ("calibquant bits=two", "bits must be 1, 2, 4 or 8 (codes fill a byte), got two"),
        ("calibquant value_bits=0", "bits must be 1, 2, 4 or 8 (codes fill a byte), got 0"),
        ("kivi |", "a method is missing in 'kivi |'"),
        ("", "a method is missing in ''"),
    ],
)  # fmt: skip
def test_recipes_that_mean_nothing_are_refused(text: str, words: str) -> None:
    import re

    with pytest.raises(ValueError, match=re.escape(words)):
        methods.parse(text)


def test_contradictory_recipes_name_the_axis() -> None:
    with pytest.raises(
        RecipeConflict, match=r"kivi bits=2 and kivi bits=4 both set tiers. Keep one, or write Recipe\(tiers=...\)"
    ):
        methods.parse("kivi bits=2 | kivi bits=4")
    with pytest.raises(RecipeConflict, match=r"calibquant bits=1 and calibquant bits=2 both set visual"):
        methods.parse("calibquant bits=1 | calibquant bits=2")


def test_a_group_that_does_not_fit_the_head_is_refused_at_the_first_token() -> None:
    model = models.model("llama")
    with pytest.raises(ValueError, match="group must divide the head size 32, got 64"):
        generate(model, prompt("llama"), Cache(model, methods.kivi(group=64)))


def test_an_offloaded_cache_is_refused() -> None:
    cache = Cache(models.model("llama"), SHORT)
    with pytest.raises(CacheMismatch, match="does not offload"):
        cache.layers[0].offload()
