"""Whole decode steps of a 0.5B-class model on this CPU, cache against cache: python benchmarks/cpu/decode.py

The model has the geometry of Qwen2.5-0.5B (24 layers, 14 query heads on 2 KV heads of 64) and random weights. Each
cache is filled with the same random keys and values, then the model takes one token at a time, the caches in turns;
figures are medians. QuantizedCache runs where its backend (optimum-quanto, hqq) is installed.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import QuantizedCache

import kvmosaic
from kvmosaic import methods
from kvmosaic.hooks.pending import Pending
from kvmosaic.kernels import native

CONFIG = LlamaConfig(
    hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
    head_dim=64, vocab_size=32000, max_position_embeddings=131072,
)  # fmt: skip
BACKENDS = {"quanto": ("optimum.quanto", (4, 2)), "hqq": ("hqq", (4,))}


def caches(model: LlamaForCausalLM) -> dict[str, Callable[[], Any]]:
    """A maker for each cache; the first is what the others are compared with."""
    makers: dict[str, Callable[[], Any]] = {"DynamicCache": DynamicCache}
    for method in (methods.kivi, methods.mosaic):
        for bits in (4, 2):
            name = f"kvmosaic {method.__name__} {bits}"
            makers[name] = lambda method=method, bits=bits: kvmosaic.Cache(model, method(bits=bits))
    for backend, (module, widths) in BACKENDS.items():
        if importlib.util.find_spec(module.split(".")[0]) and importlib.util.find_spec(module):
            for bits in widths:
                makers[f"QuantizedCache {backend} {bits}"] = lambda backend=backend, bits=bits: QuantizedCache(
                    backend, model.config, nbits=bits, **({"axis_key": 1, "axis_value": 1} if backend == "hqq" else {})
                )
    return makers


def filled(make: Callable[[], Any], batch: int, tokens: int, dtype: torch.dtype) -> Any:
    """Without a prompt: 32k tokens through the model would take longer than all the rest."""
    torch.manual_seed(0)
    cache = make()
    for index in range(CONFIG.num_hidden_layers):
        keys, values = torch.randn(2, batch, CONFIG.num_key_value_heads, tokens, CONFIG.head_dim, dtype=dtype)
        cache.update(keys, values, index)
        if isinstance(cache, kvmosaic.Cache):  # tokens are stored after their attention, which nobody asked for here
            cache.layers[index]._settle(Pending(keys, values))
    return cache


def rows(model: LlamaForCausalLM, batch: int, tokens: int, seconds: float, only: list[str]) -> dict[str, Any]:
    makers = {name: make for name, make in caches(model).items() if not only or any(each in name for each in only)}
    held = {name: filled(make, batch, tokens, model.dtype) for name, make in makers.items()}
    token, times = torch.tensor([[7]] * batch), {name: [] for name in held}
    for cache in held.values():
        model(token, past_key_values=cache, use_cache=True)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 3:
        for name, cache in held.items():
            start = time.perf_counter()
            model(token, past_key_values=cache, use_cache=True)
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(each) * 1e3 for name, each in times.items()}
    first = next(iter(medians.values()))
    print(f"\n{model.dtype}, {batch} x {tokens} tokens")
    for name, median in medians.items():
        print(f"  {name:28} {median:9.1f} ms a step  {first / median:6.2f}x", flush=True)
    return {"dtype": str(model.dtype), "batch": batch, "tokens": tokens, "ms": medians}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 8192, 32768])
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="sequences")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each length")
    parser.add_argument("--only", nargs="*", default=[], help="caches whose names contain one of these")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu_decode.json"))
    options = parser.parse_args()
    results = []
    for dtype in options.dtypes:
        torch.manual_seed(0)
        model = LlamaForCausalLM(CONFIG).to(getattr(torch, dtype)).eval()
        results += [
            rows(model, batch, tokens, options.seconds, options.only)
            for batch in options.batch
            for tokens in options.tokens
        ]
    setting = {
        "machine": platform.machine(), "variant": native.kernels().variant, "threads": torch.get_num_threads(),
        "torch": torch.__version__, "model": "Qwen2.5-0.5B's geometry, random weights",
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"setting": setting, "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
