"""Attaching and detaching, and what a model is afterwards."""

import gc
import threading

import pytest
import torch
from transformers import DynamicCache

import kvmosaic
from kvmosaic import Cache, Recipe, methods
from kvmosaic.errors import CacheInUse, CacheMismatch, UnsupportedModel
from tests import models
from tests.instances import EXACT
from tests.models import Row, generate, prompt

SHORT = methods.kivi(bits=2, residual=32)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "internvl", "qwen2_5_vl"])
def test_detach_gives_the_model_back_as_it_was(kind: str) -> None:
    model, inputs = models.make(kind), prompt(kind, Row(75, 1, 3))
    before = generate(model, inputs)
    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    hooks = [(len(each._forward_pre_hooks), len(each._forward_hooks)) for each in model.modules()]
    kvmosaic.attach(model, SHORT)
    inside = generate(model, inputs)
    kvmosaic.detach(model)
    assert torch.equal(generate(model, inputs), before)
    assert not torch.equal(inside, before)
    assert model.config.get_text_config(decoder=True)._attn_implementation == implementation
    assert not any("kvmosaic" in name or name == "_prepare_cache_for_generation" for name in vars(model))
    assert [(len(each._forward_pre_hooks), len(each._forward_hooks)) for each in model.modules()] == hooks


def test_an_attached_recipe_makes_each_generate_its_own_cache() -> None:
    model, inputs = models.make("llama"), prompt("llama", Row(75))
    with kvmosaic.compress(model, SHORT):
        caches = [
            model.generate(**inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True).past_key_values
            for _ in range(2)
        ]
        assert isinstance(caches[0], Cache)
        assert caches[0] is not caches[1]
        assert caches[0].report().codes > 0
        mine = generate(model, inputs)
        dense = generate(model, inputs, DynamicCache(config=model.config))
        assert torch.equal(generate(model, inputs, use_cache=False), dense), (
            "a cache of one's own, or none, is respected"
        )
    assert torch.equal(mine, generate(models.model("llama"), inputs, Cache(models.model("llama"), SHORT)))
    assert torch.equal(dense, generate(models.stock("llama"), inputs))


def test_compress_detaches_after_an_error() -> None:
    model = models.make("llama")
    with pytest.raises(KeyError), kvmosaic.compress(model, SHORT):
        raise KeyError
    assert model.config._attn_implementation == "sdpa"


def test_two_recipes_cannot_be_attached() -> None:
    model = models.make("llama")
    kvmosaic.attach(model, SHORT)
    with pytest.raises(ValueError, match=r"attached to this model already. Call kvmosaic.detach"):
        kvmosaic.attach(model, SHORT)
    with pytest.raises(ValueError, match=r"cache_implementation='static' and an attached recipe exclude each other"):
        generate(model, prompt("llama"), cache_implementation="static")


def test_a_refused_model_is_left_alone() -> None:
    model = models.make("llama")
    with pytest.raises(
        UnsupportedModel, match=r"LlamaForCausalLM takes no pictures. For text use another method, e.g. kivi"
    ):
        kvmosaic.attach(model, methods.calibquant())
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(generate(model, prompt("llama")), generate(models.stock("llama"), prompt("llama")))


def test_an_attached_assistant_can_be_rolled_back() -> None:
    model, assistant, inputs = models.make("llama"), models.make("qwen2"), prompt("llama", Row(75))
    right = generate(models.stock("llama"), inputs)
    kvmosaic.attach(assistant, SHORT)
    assert torch.equal(generate(model, inputs, assistant_model=assistant), right)


def test_other_caches_are_served_as_before() -> None:
    model, inputs = models.model("gpt_oss"), prompt("gpt_oss", Row(45), Row(33, 1, 1))
    Cache(model, SHORT)
    mine = models.logits(model, inputs, DynamicCache(config=model.config))
    assert torch.allclose(mine, models.logits(models.stock("gpt_oss"), inputs), atol=1e-4)
    plain = model(inputs["input_ids"], use_cache=False).logits
    assert torch.allclose(plain, models.stock("gpt_oss")(inputs["input_ids"], use_cache=False).logits, atol=1e-4)


@pytest.mark.parametrize("recipe", [SHORT, Recipe(tiers=(EXACT,))], ids=["kivi", "exact"])
def test_the_prompt_is_freed(recipe: Recipe) -> None:
    """After the prompt no tensor of its size is alive, but what the report owns up to."""
    model = models.model("llama")
    cache, tokens = Cache(model, recipe), 611
    ids = torch.randint(2, 180, (1, tokens), generator=torch.Generator().manual_seed(0))
    gc.collect()
    known = {id(each) for each in gc.get_objects() if issubclass(type(each), torch.Tensor)}
    with torch.no_grad():
        model(ids, past_key_values=cache, logits_to_keep=1)
    gc.collect()
    told = {tensor.untyped_storage().data_ptr() for _, _, tensor in cache.tensors()}
    large = [
        each
        for each in gc.get_objects()
        if issubclass(type(each), torch.Tensor)
        and id(each) not in known
        and each.untyped_storage().nbytes() >= tokens * 32 * 4
    ]
    assert all(each.untyped_storage().data_ptr() in told for each in large)
    if recipe is SHORT:
        assert not large
        assert cache.report().compression > 6  # of float32


def test_two_threads_with_a_cache_each_do_not_disturb_one_another() -> None:
    model = models.model("llama")
    inputs = [prompt("llama", Row(75, 0, seed)) for seed in (1, 2)]
    right = [generate(model, each, Cache(model, SHORT)) for each in inputs]
    said: dict[int, torch.Tensor] = {}

    def work(index: int) -> None:
        torch.set_grad_enabled(False)
        for _ in range(2):
            out = model.generate(
                **inputs[index], past_key_values=Cache(model, SHORT), max_new_tokens=20, do_sample=False
            )
            said[index] = out[:, -20:]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert all(torch.equal(said[index], right[index]) for index in range(2))


def test_a_cache_that_two_threads_use_at_once_is_refused_to_the_second() -> None:
    """And the first goes on undisturbed."""
    model, inputs = models.make("llama"), prompt("llama", Row(75))
    right, cache = generate(models.model("llama"), inputs, Cache(models.model("llama"), SHORT)), Cache(model, SHORT)
    inside, tried, raised = threading.Event(), threading.Event(), []

    def intrude() -> None:
        inside.wait(60)
        try:
            model(prompt("llama", Row(5))["input_ids"], past_key_values=cache)
        except CacheInUse as error:
            raised.append(str(error))
        tried.set()

    def pause(*_: object) -> None:
        if cache.get_seq_length() > 80 and not inside.is_set():
            inside.set()
            tried.wait(60)

    hook = model.model.layers[1].register_forward_pre_hook(pause)
    other = threading.Thread(target=intrude)
    other.start()
    mine = generate(model, inputs, cache)
    other.join()
    hook.remove()
    assert len(raised) == 1
    assert "another thread generates with this cache" in raised[0]
    assert "copy.deepcopy" in raised[0]
    assert torch.equal(mine, right)


def test_a_cache_may_pass_from_thread_to_thread() -> None:
    model, inputs = models.model("llama"), prompt("llama", Row(75))
    cache, right = Cache(model, SHORT), generate(model, inputs, Cache(model, SHORT))
    model(inputs["input_ids"][:, :-1], past_key_values=cache)
    said = []
    other = threading.Thread(target=lambda: said.append(generate(model, inputs, cache)))
    other.start()
    other.join()
    assert said[0].shape == right.shape


def test_a_pass_that_ended_halfway_is_told() -> None:
    """Layers that have seen unlike numbers of tokens would answer nonsense; earlier copies and reset() still serve."""
    model = models.make("llama")
    cache = Cache(model, SHORT)

    def stop(*_: object) -> None:
        raise InterruptedError

    model(prompt("llama")["input_ids"], past_key_values=cache)
    hook = model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(InterruptedError):
        model(torch.tensor([[5]]), past_key_values=cache)
    hook.remove()
    with pytest.raises(CacheMismatch, match=r"ended halfway: layer 0 46 and layer 1 45 tokens .*cache.reset\(\)"):
        model(torch.tensor([[5]]), past_key_values=cache)
    cache.reset()
    assert torch.equal(generate(model, prompt("llama"), cache), generate(model, prompt("llama"), Cache(model, SHORT)))
