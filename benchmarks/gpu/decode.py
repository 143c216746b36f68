"""Whole decode steps of an 8B model on a GPU: python benchmarks/gpu/decode.py

Llama-3.1-8B's geometry with random weights, caches filled with random bytes. Ours is one replayed CUDA graph a step; the
floor is the bytes of weights and cache over the bandwidth of a device-to-device copy. Rivals: transformers' DynamicCache and
its 4-bit QuantizedCache (where optimum-quanto is installed), called as generate calls them.
"""

import gc
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch
from common import copy_bandwidth, elapsed, machine, microseconds, parser, random_store, write
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import QuantizedCache
from transformers.generation import LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

import kvmosaic
from kvmosaic import Recipe, methods
from kvmosaic.decoding.captured import WARM_UP, _Choice, _Steps
from kvmosaic.hooks.attach import unhooked
from kvmosaic.stores import EXACT

CONFIG = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    head_dim=128, vocab_size=128256, max_position_embeddings=131072, rope_theta=500000.0, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
CASES = {"1 x 4k": (1, 4096), "1 x 32k": (1, 32768), "32 x 8k": (32, 8192)}
RECIPES = ["exact", "kivi bits=4 group=128", "kivi bits=2 group=128", "kivi bits=2", "mosaic bits=2"]


def random_model(config: LlamaConfig = CONFIG) -> LlamaForCausalLM:
    """Numbers of a trained model's size, so that nothing overflows; in bfloat16 on the GPU."""
    with torch.device("cuda"):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
        torch.set_default_dtype(before)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


def recipe(text: str) -> Recipe:
    return Recipe(tiers=(EXACT,), name="exact") if text == "exact" else methods.parse(text)


def filled(
    model: LlamaForCausalLM, text: str, batch: int, tokens: int, visual: int = 0, room: int = 0
) -> kvmosaic.Cache:
    """A cache of `tokens` tokens that no model has seen, and of `visual` more in the recipe's store for them."""
    chosen = recipe(text)
    plain = Recipe(tiers=chosen.tiers or (EXACT,), name=chosen.name)  # a text model's cache knows no visual tokens
    cache = kvmosaic.Cache(model, plain)
    heads, size = CONFIG.num_key_value_heads, CONFIG.head_dim
    for layer in cache.layers:
        empty = torch.empty(batch, heads, 0, size, dtype=torch.bfloat16, device="cuda")
        layer.lazy_initialization(empty, empty)
        if visual:
            assert chosen.visual is not None, "asked for recipes with a store of visual tokens"
            layer.stores["visual"] = random_store(chosen.visual, batch, heads, visual, size)
        layer.stores["tier 0"] = random_store(plain.tiers[0], batch, heads, tokens, size, room)
        layer.seen = tokens + visual
    return cache


def captured(model: LlamaForCausalLM, cache: kvmosaic.Cache, batch: int, room: int, compiled: bool) -> _Steps:
    """Steps that have been warmed up and captured."""
    criteria = StoppingCriteriaList([MaxLengthCriteria(10**6)])
    config = model.generation_config
    config._pad_token_tensor = torch.tensor(0, device="cuda")
    choice = _Choice(LogitsProcessorList(), criteria, config)
    seen = cache.get_seq_length()
    tensors = {
        "input_ids": torch.randint(CONFIG.vocab_size, (batch, 1), device="cuda"),
        "position_ids": torch.full((batch, 1), seen, device="cuda"),
    }
    with torch.no_grad():
        steps = _Steps(model, cache, tensors, choice, room, compiled)
        with unhooked(model):
            for _ in range(WARM_UP + 1):
                steps._advance()
    return steps


def step_time(model: LlamaForCausalLM, cache: kvmosaic.Cache, batch: int, room: int, compiled: bool) -> float:
    """Microseconds of a replayed step; afterwards the cache is as any other."""
    steps = captured(model, cache, batch, room, compiled)
    assert steps.graph is not None, "captured"
    each = microseconds(steps.graph.replay, 0.6, 60)
    cache.unpin()
    return each


def prompt_time(model: Any, cache: kvmosaic.Cache, ids: torch.Tensor) -> float:
    """Microseconds of a prompt, ids [B, T]."""
    with torch.no_grad():
        return elapsed(lambda: model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1))


def cache_bytes(cache: kvmosaic.Cache) -> int:
    return sum(tensor.nbytes for _, _, tensor in cache.tensors())


def rival_step(model: LlamaForCausalLM, make: Callable[[], Any], batch: int, tokens: int, steps: int) -> float:
    """Microseconds of a step as generate makes it: the model called with the cache, the greatest logit taken."""
    kvmosaic.detach(model)
    cache = make()
    for index in range(CONFIG.num_hidden_layers):
        keys, values = torch.randn(
            2, batch, CONFIG.num_key_value_heads, tokens, CONFIG.head_dim, device="cuda"
        ).bfloat16()
        cache.update(keys, values, index)
        del keys, values
    ids = torch.randint(CONFIG.vocab_size, (batch, 1), device="cuda")
    times = []
    with torch.no_grad():
        for step in range(steps + 2):
            torch.cuda.synchronize()
            start = time.perf_counter()
            position = torch.full((batch, 1), tokens + step, device="cuda")
            out = model(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True)
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            ids.cpu()
            times.append((time.perf_counter() - start) * 1e6)
    return sorted(times[2:])[len(times[2:]) // 2]


def rivals() -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {"DynamicCache": DynamicCache}
    if importlib.util.find_spec("optimum") and importlib.util.find_spec("optimum.quanto"):
        found["QuantizedCache, quanto 4"] = lambda: QuantizedCache("quanto", CONFIG, nbits=4)
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    options.add_argument("--recipes", nargs="*", default=RECIPES)
    options.add_argument("--eager", action="store_true", help="the model's own part of a step as it is, not compiled")
    options.add_argument("--no-rivals", action="store_true")
    arguments = options.parse_args()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    setting = machine(arguments.commit) | {"copy bandwidth, bytes a second": bandwidth, "compiled": not arguments.eager}
    print(setting, flush=True)
    model = random_model()
    weights = sum(parameter.nbytes for parameter in model.parameters()) - model.model.embed_tokens.weight.nbytes
    rows: list[dict[str, Any]] = []

    def add(case: str, name: str, each: float, held: int) -> None:
        floor = (weights + held) / bandwidth * 1e6
        row = {"case": case, "cache": name, "microseconds": each, "cache bytes": held, "weight bytes": weights}
        rows.append(row | {"floor": floor, "times the floor": each / floor})
        print(
            f"{case:8} {name:28} {each:10.0f} us  {held / 2**30:6.2f} GiB  {each / floor:5.2f} x the floor", flush=True
        )
        write("gpu_decode.json", setting, rows, arguments.out)

    for case in arguments.cases:
        batch, tokens = CASES[case]
        for text in arguments.recipes:
            start = time.perf_counter()
            cache = filled(model, text, batch, tokens, room=400)
            held = cache_bytes(cache)
            steps = captured(model, cache, batch, 400, not arguments.eager)
            assert steps.graph is not None, "captured"
            ready = time.perf_counter() - start
            add(case, text, microseconds(steps.graph.replay, 1.0, 200), held)
            print(f"    ready after {ready:.1f} s", flush=True)
            cache.unpin()
            del steps, cache
            gc.collect()
            torch.cuda.empty_cache()
        if not arguments.no_rivals:
            dense = 2 * batch * tokens * CONFIG.num_hidden_layers * CONFIG.num_key_value_heads * CONFIG.head_dim * 2
            for name, make in rivals().items():
                add(case, name, rival_step(model, make, batch, tokens, 5), dense)
                gc.collect()
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
