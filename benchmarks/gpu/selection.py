"""What selections cost and save on a GPU: python benchmarks/gpu/selection.py --parts h2o

h2o: decode steps with 20 % of 32k tokens, each of which takes another's slot, against our own captured exact steps; caches of
    random numbers, no prompt is read (Llama-3.1-8B's geometry, random weights).
"""

import gc
from typing import Any

import torch
from common import graphed, machine, microseconds, parser, random_store, write
from decode import CONFIG, cache_bytes, captured, random_model, recipe

import kvmosaic
from kvmosaic.hooks.layer import CacheLayer
from kvmosaic.hooks.pinned import Pinned
from kvmosaic.stores import EXACT, EvictingStore

CONTEXT, KEPT, BATCH, BUDGET, ROOM = 32768, "h2o keep=0.2", 8, 30, 400
"""Tokens; the recipe; sequences at equal batch; GB of cache; steps that there is room for."""


def fill(layer: CacheLayer, text: str, batch: int, context: int) -> None:
    """As if `context` tokens had come: random numbers, and of `KEPT` a fifth of them with columns, all slots taken."""
    heads, size = CONFIG.num_key_value_heads, CONFIG.head_dim
    empty = torch.empty(batch, heads, 0, size, dtype=torch.bfloat16, device="cuda")
    layer.lazy_initialization(empty, empty)
    layer.seen = context
    if text == "exact":
        layer.stores["tier 0"] = random_store(EXACT, batch, heads, context, size, ROOM)
        return
    kept = context // 5
    store = EvictingStore(random_store(EXACT, batch, heads, kept, size))
    store.position = torch.arange(0, 5 * kept, 5, device="cuda").to(torch.int32).expand(batch, heads, kept).contiguous()
    store.score = torch.rand(batch, heads, kept, device="cuda")
    store.capacity = torch.full((batch,), kept, device="cuda")
    store.placed.fill_(context)
    layer.stores["tier 0"] = store


def one_layer(text: str, batch: int, context: int) -> float:
    """Microseconds of a step's attention and what belongs to it (scores, the slot, the token's bytes) in one layer."""
    layer = CacheLayer(0, 1, recipe(text))
    fill(layer, text, batch, context)
    layer.pinned = Pinned(layer, ROOM, torch.ones(1, dtype=torch.int32, device="cuda"))
    query = torch.randn(batch, CONFIG.num_attention_heads, 1, CONFIG.head_dim, device="cuda").bfloat16()
    keys, values = torch.randn(2, batch, CONFIG.num_key_value_heads, 1, CONFIG.head_dim, device="cuda").bfloat16()
    step = layer.pinned
    return microseconds(graphed(lambda: step.attend(query, keys, values, CONFIG.head_dim**-0.5, None, None)))


def whole_step(model: Any, text: str, batch: int, context: int, compiled: bool) -> tuple[float, int]:
    """Microseconds of a replayed step, and bytes of the cache."""
    cache = kvmosaic.Cache(model, recipe(text))
    for layer in cache.layers:
        fill(layer, text, batch, context)
    held = cache_bytes(cache)
    steps = captured(model, cache, batch, ROOM, compiled)
    assert steps.graph is not None, "captured"
    each = microseconds(steps.graph.replay, 0.6, 60)
    cache.unpin()
    del steps, cache
    gc.collect()
    torch.cuda.empty_cache()
    return each, held


def h2o(compiled: bool, context: int = CONTEXT, batch: int = BATCH) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def add(what: str, text: str, batch: int, each: float, better: float, **more: Any) -> None:
        rows.append(
            {"what": what, "cache": text, "batch": batch, "microseconds": each, "against exact": better, **more}
        )
        print(f"{what:32} {text:14} batch {batch:3}  {each:9.1f} us  {better:5.2f}x", flush=True)

    layers = {text: one_layer(text, batch, context) for text in ("exact", KEPT)}
    for text, each in layers.items():
        add(f"attention, {context} tokens", text, batch, each, layers["exact"] / each)
    torch.cuda.empty_cache()
    model = random_model()
    steps = {text: whole_step(model, text, batch, context, compiled) for text in ("exact", KEPT)}
    for text, (each, held) in steps.items():
        add(f"step, {context} tokens", text, batch, each, steps["exact"][0] / each, bytes=held)
    rates: dict[str, float] = {}
    for text, (_, held) in steps.items():
        most = int(BUDGET * 1e9 // (held / batch))
        each, held = whole_step(model, text, most, context, compiled)
        rates[text] = most / each * 1e6
        better = rates[text] / rates["exact"]
        add(f"step, {BUDGET} GB", text, most, each, better, bytes=held, **{"tokens a second": rates[text]})
    return rows


PARTS = {"h2o": h2o}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    options.add_argument("--eager", action="store_true", help="the model's own part of a step as it is, not compiled")
    arguments = options.parse_args()
    torch.manual_seed(0)
    setting = machine(arguments.commit) | {"compiled": not arguments.eager}
    print(setting, flush=True)
    for part in arguments.parts:
        write(f"gpu_selection_{part}.json", setting, PARTS[part](not arguments.eager), arguments.out)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
