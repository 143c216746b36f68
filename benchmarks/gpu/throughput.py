"""Tokens a second under a fixed budget for the cache: python benchmarks/gpu/throughput.py

InternVL2.5-8B's language model (its geometry, random weights): prompts of 3,328 and 8,192 visual and 71 text tokens, 300 new
ones, the largest batch whose cache fits the budget at its end. Ours: one replayed CUDA graph a step; CalibQuant at 1 bit for
pictures with KIVI at 2 bits for text against our own exact cache, and against transformers' DynamicCache.
"""

import gc
from typing import Any

import torch
from common import machine, parser, write
from decode import CONFIG, cache_bytes, filled, random_model, rival_step, step_time
from transformers import DynamicCache

TEXT, NEW = 71, 300
RECIPES = ["exact", "calibquant bits=1 | kivi bits=2", "mosaic bits=2"]


def bytes_a_sequence(model: Any, text: str, visual: int) -> float:
    """Of a cache at its end, by filling small ones."""
    own = visual if "calibquant" in text else 0
    held = []
    for batch in (1, 3):
        cache = filled(model, text, batch, TEXT + NEW + visual - own, own)
        held.append(cache_bytes(cache))
        del cache
    return (held[1] - held[0]) / 2


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--budgets", nargs="*", type=int, default=[5, 10, 20, 30], help="in GB, 10^9 bytes")
    options.add_argument("--visual", nargs="*", type=int, default=[3328, 8192])
    options.add_argument("--eager", action="store_true", help="the model's own part of a step as it is, not compiled")
    arguments = options.parse_args()
    torch.manual_seed(0)
    setting = machine(arguments.commit) | {"compiled": not arguments.eager}
    print(setting, flush=True)
    model = random_model()
    dense = 2 * CONFIG.num_hidden_layers * CONFIG.num_key_value_heads * CONFIG.head_dim * 2
    rows: list[dict[str, Any]] = []
    for visual in arguments.visual:
        sizes = {text: bytes_a_sequence(model, text, visual) for text in RECIPES}
        for budget in arguments.budgets:
            exact = None
            for text in [*RECIPES, "DynamicCache"]:
                size = sizes.get(text, dense * (visual + TEXT + NEW))
                batch = int(budget * 1e9 // size)
                if batch < 1:
                    continue
                if text == "DynamicCache":
                    each = rival_step(model, DynamicCache, batch, visual + TEXT + NEW // 2, 5)
                else:
                    own = visual if "calibquant" in text else 0
                    # half of the new tokens: the mean of a step's length
                    cache = filled(model, text, batch, TEXT + NEW // 2 + visual - own, own, room=NEW)
                    each = step_time(model, cache, batch, NEW, not arguments.eager)
                    del cache
                gc.collect()
                torch.cuda.empty_cache()
                rate = batch / each * 1e6
                exact = exact or rate
                rows.append(
                    {"visual": visual, "budget": budget * 10**9, "cache": text, "batch": batch, "microseconds": each,
                     "tokens a second": rate, "against exact": rate / exact}
                )  # fmt: skip
                print(f"{visual} visual, {budget:2} GB  {text:34} batch {batch:4}  {each:8.0f} us  {rate:8.0f} tokens/s  "
                      f"{rate / exact:5.2f}x", flush=True)  # fmt: skip
                write("gpu_throughput.json", setting, rows, arguments.out)


if __name__ == "__main__":
    main()
