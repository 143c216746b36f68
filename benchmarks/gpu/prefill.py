"""What a prompt costs on a GPU, and how much memory an answer takes: python benchmarks/gpu/prefill.py

Encoding alone: the bytes that come in over the bandwidth of a device-to-device copy. A prompt of 8,192 tokens through an 8B model
(Llama-3.1-8B's geometry, random weights) with a compressed cache against the exact one. The peak of a whole generate against
weights, stored bytes and one layer's dense keys and values.
"""

import gc
import statistics
from typing import Any

import torch
from common import by_run, copy_bandwidth, cq, kivi, machine, microseconds, parser, tier_of, write
from decode import CONFIG, prompt_time, random_model, recipe

import kvmosaic
from kvmosaic import Cache, methods
from kvmosaic.kernels.encode import cuda as encode
from kvmosaic.stores import Coded, LaneBytes

RECIPES = ["exact", "kivi bits=4 group=128", "kivi bits=2", "mosaic bits=2"]


def encoding(bandwidth: float) -> list[dict[str, Any]]:
    batch, heads, tokens, size = 16, 8, 8192, CONFIG.head_dim
    x = torch.randn(batch, heads, tokens, size, device="cuda").bfloat16()
    rows = []
    tiers: dict[str, Coded] = {
        **{f"runs {bits}": by_run(bits) for bits in (4, 2, 1)},
        **{f"kivi {bits}, groups of 32": kivi(bits, 32) for bits in (4, 2)},
        "cq 8c8b": cq(heads, size, 8),
        **{f"turboquant {bits}": tier_of(methods.get("turboquant")(bits=bits, window=32)) for bits in (4, 2, 1)},
    }
    for name, tier in tiers.items():
        for role, settings in (("keys", tier.keys), ("values", tier.values)):
            lane = LaneBytes(settings, role, x[:, :, :0])  # type: ignore[arg-type]
            lane._reserve(tokens)

            def run() -> None:
                for part, each in lane.parts.items():  # noqa: B023 (called at once)
                    if each.every is None:  # each call is a run of its own
                        lane.buffers[part] = lane.buffers[part][:, :, :0]  # noqa: B023
                assert encode.write(lane, x, None)  # noqa: B023 (all rows alike, as without padding)

            each = microseconds(run)
            held = x.nbytes + sum(buffer.nbytes for buffer in lane.buffers.values())
            share = held / bandwidth * 1e6 / each
            rows.append(
                {"what": f"encode {name}, {role}", "microseconds": each, "bytes": held, "share of the floor": share}
            )
            print(f"{rows[-1]['what']:36} {each:8.0f} us  {100 * share:5.1f} %", flush=True)
    return rows


def prompts(model: Any) -> list[dict[str, Any]]:
    """In turns: a GPU that has been busy for seconds runs slower than before."""
    ids = torch.randint(CONFIG.vocab_size, (1, 8192), device="cuda")
    times: dict[str, list[float]] = {text: [] for text in RECIPES}
    for _ in range(6):
        for text in RECIPES:
            cache = Cache(model, recipe(text))
            times[text].append(prompt_time(model, cache, ids))
    medians = {text: statistics.median(each[1:]) for text, each in times.items()}  # the first ones compile
    rows: list[dict[str, Any]] = []
    for text, each in medians.items():
        against = each / medians["exact"]
        rows.append({"what": f"prompt of 8,192, {text}", "microseconds": each, "against exact": against})
        print(f"{rows[-1]['what']:36} {each:8.0f} us  {against:5.3f}x", flush=True)
    return rows


def peaks(model: Any) -> list[dict[str, Any]]:
    rows = []
    batch, tokens = 8, 8192
    weights = torch.cuda.memory_allocated()
    ids = torch.randint(CONFIG.vocab_size, (batch, tokens), device="cuda")
    layer = 2 * batch * tokens * CONFIG.num_key_value_heads * CONFIG.head_dim * 2
    for text in RECIPES:
        torch.cuda.reset_peak_memory_stats()
        out = kvmosaic.generate(
            model, method=recipe(text), input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False,
            compiled=False, return_dict_in_generate=True,
        )  # fmt: skip
        stored = out.past_key_values.nbytes()
        peak = torch.cuda.max_memory_allocated()
        beyond = peak - weights - stored - layer
        rows.append({"what": f"8 x 8k and 64 new, {text}", "peak": peak, "weights": weights, "stored": stored,
                     "one layer dense": layer, "beyond": beyond})  # fmt: skip
        print(
            f"{rows[-1]['what']:36} peak {peak / 2**30:6.2f} GiB, stored {stored / 2**30:5.2f}, beyond {beyond / 2**30:5.2f}",
            flush=True,
        )
        del out
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    setting = machine(arguments.commit) | {"copy bandwidth, bytes a second": bandwidth}
    print(setting, flush=True)
    rows = encoding(bandwidth)
    torch.cuda.empty_cache()
    model = random_model()
    rows += prompts(model) + peaks(model)
    write("gpu_prefill.json", setting, rows, arguments.out)


if __name__ == "__main__":
    main()
