"""Decode attention over coded stores on this CPU, against PyTorch's dense attention and llama.cpp's over its own cache
types, where its library is (ggml.py): python benchmarks/cpu/attention.py

One decode step: 4 query heads for each KV head, head size 128, the store as a method of the package leaves it, random
numbers. Everything of a shape is timed in turns and the least of many times counts, medians are in the JSON: on a busy
machine a median says when the scheduler came round. Before each call is a pause, in which the threads of the libraries
that have just worked stop waiting for more. `floor` is the time to read the store's bytes at the bandwidth
that reading an array far larger than the caches had, in the same turns.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from ggml import TYPES, FlashAttention, Ggml
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvmosaic import methods
from kvmosaic.codecs import Uniform
from kvmosaic.kernels import native
from kvmosaic.stores import Coded, CodedStore, Lane

QUERIES, CHANNELS = 4, 128
SHAPES = [(1, 8, 1024), (1, 8, 4096), (1, 8, 32768), (1, 8, 65536), (8, 8, 4096)]
"""Sequences, KV heads, tokens."""
PAUSE = 0.002
"""Seconds; OpenMP's threads spin for about one thousandth."""


def kivi(bits: int) -> Coded:
    keys = Lane(Uniform(bits=bits, axis="channel", group=32), flush=128)
    return Coded(keys, Lane(Uniform(bits=bits, axis="token", group=32), window=128))


def runs(bits: int) -> Coded:
    """One range a channel for the whole prompt, as CalibQuant has it (and the smallest scales there are)."""
    return Coded(Lane(Uniform(bits=bits, axis="channel")), Lane(Uniform(bits=bits, axis="channel")))


def turboquant(bits: int) -> Coded:
    """Rotated tokens on the sphere's levels, the newest 32 exact: `mosaic` with 4, 3 or 2 bits."""
    return methods.turboquant(bits=bits, window=32).tiers[0]


def filled(tier: Coded, batch: int, heads: int, tokens: int) -> CodedStore:
    keys, values = (torch.randn(batch, heads, tokens, CHANNELS, dtype=torch.bfloat16) for _ in range(2))
    store = tier.open(0, keys, values)
    store.put(keys, values, None)
    return store


def timed(work: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each, ascending, taken in turns."""
    for call in work.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in work}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 5:
        for name, call in work.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: sorted(each) for name, each in times.items()}


def row(batch: int, heads: int, tokens: int, seconds: float, ggml: Ggml | None) -> dict[str, object]:
    query = torch.randn(batch, heads, QUERIES, CHANNELS)
    keys, values = (torch.randn(batch, heads, tokens, CHANNELS) for _ in range(2))
    half, keys_half, values_half = query.bfloat16(), keys.bfloat16(), values.bfloat16()
    large = torch.ones(2**25)  # 128 MiB
    work: dict[str, Callable[[], object]] = {
        "read": large.sum,  # first: it empties the caches, and what follows it pays for that
        "sdpa fp32": lambda: sdpa(query, keys, values),
        "sdpa bf16": lambda: sdpa(half, keys_half, values_half),
        "products bf16": lambda: torch.softmax(half @ keys_half.mT * CHANNELS**-0.5, -1) @ values_half,
    }
    rivals = list(work)[1:]
    others = []
    for kind in TYPES if ggml else ():
        others.append(f"llama.cpp {kind}")
        flat = (x.flatten(0, 1) for x in (query, keys, values))
        work[others[-1]] = FlashAttention(ggml, kind, *flat, torch.get_num_threads())
    size = {}
    for tier, widths in ((runs, (8, 4, 2, 1)), (kivi, (8, 4, 2, 1)), (turboquant, (4, 3, 2, 1))):
        for bits in widths:
            store, name = filled(tier(bits), batch, heads, tokens), f"{tier.__name__} {bits}"
            work[name] = lambda store=store: store.attend(query, CHANNELS**-0.5, None)
            size[name] = sum(tensor.nbytes for _, _, tensor in store.tensors())
    times = timed(work, seconds)
    least, median = ({name: pick(each) for name, each in times.items()} for pick in (min, statistics.median))
    best, bandwidth = min(least[name] for name in rivals), large.nbytes / least["read"]  # bytes a millisecond
    result: dict[str, object] = {"batch": batch, "heads": heads, "tokens": tokens, "GB/s": bandwidth / 1e6}
    result |= {name: {"ms": least[name], "median ms": median[name]} for name in rivals + others}
    print(f"\n{batch} x {heads} KV heads x {tokens}, read bandwidth {bandwidth / 1e6:.1f} GB/s")
    print("  " + ", ".join(f"{name} {least[name]:.3f} ms" for name in rivals + others))
    for name, nbytes in size.items():
        ms, floor = least[name], nbytes / bandwidth
        print(
            f"  {name:8} {ms:8.3f} ms  {best / ms:5.1f}x  {nbytes / 1e6:7.2f} MB"
            f"  floor {floor:.3f} ms  share {floor / ms:4.0%}",
            flush=True,
        )
        result[name] = {"ms": ms, "median ms": median[name], "speedup": best / ms, "bytes": nbytes, "floor ms": floor}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each shape")
    parser.add_argument("--threads", type=int, default=0, help="0 = torch's own count")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only so many")
    parser.add_argument("--first", type=int, default=0, help="which of the shapes comes first")
    parser.add_argument("--ggml", type=Path, help="folder with llama.cpp's libggml-*.so; default: of llama-cpp-python")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu_attention.json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"{native.kernels().variant}, {torch.get_num_threads()} threads")
    folder = options.ggml or Ggml.folder()
    ggml = Ggml(folder) if folder else None
    rows = [row(*shape, options.seconds, ggml) for shape in SHAPES[options.first : options.first + options.shapes]]
    setting = {
        "machine": platform.machine(), "variant": native.kernels().variant, "threads": torch.get_num_threads(),
        "torch": torch.__version__, "query heads": QUERIES, "head size": CHANNELS,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
