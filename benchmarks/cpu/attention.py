"""Decode attention over coded stores on this CPU, against PyTorch's dense attention: python benchmarks/cpu/attention.py

One decode step: 4 query heads for each KV head, head size 128, the store as a method of the package leaves it. Every
figure of a row is taken in turns with the others, on random numbers, and is a median; so ratios hold on a busy machine.
`floor` is the time to read the bytes of the store at the read bandwidth measured in the same run.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvmosaic.codecs import Uniform
from kvmosaic.kernels import native
from kvmosaic.stores import Coded, CodedStore, Lane

QUERIES, CHANNELS = 4, 128
SHAPES = [(8, 1024), (8, 4096), (8, 32768), (32, 32768)]


def kivi(bits: int) -> Coded:
    keys = Lane(Uniform(bits=bits, axis="channel", group=32), flush=128)
    return Coded(keys, Lane(Uniform(bits=bits, axis="token", group=32), window=128))


def runs(bits: int) -> Coded:
    """One range a channel for the whole prompt, as CalibQuant has it (and the smallest scales there are)."""
    return Coded(Lane(Uniform(bits=bits, axis="channel")), Lane(Uniform(bits=bits, axis="channel")))


def filled(tier: Coded, heads: int, tokens: int) -> CodedStore:
    keys, values = (torch.randn(1, heads, tokens, CHANNELS, dtype=torch.bfloat16) for _ in range(2))
    store = tier.open(0, keys, values)
    store.put(keys, values, None)
    return store


def read_bandwidth() -> float:
    """Bytes a second: the sum of an array far larger than the caches, on torch's threads."""
    x = torch.ones(2**26)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        x.sum()
        times.append(time.perf_counter() - start)
    return x.nbytes / min(times)


def medians(work: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Milliseconds of each, taken in turns."""
    for call in work.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in work}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 5:
        for name, call in work.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) * 1e3 for name, each in times.items()}


def row(heads: int, tokens: int, seconds: float, bandwidth: float) -> dict[str, object]:
    query = torch.randn(1, heads, QUERIES, CHANNELS)
    keys, values = (torch.randn(1, heads, tokens, CHANNELS) for _ in range(2))
    half, keys_half, values_half = query.bfloat16(), keys.bfloat16(), values.bfloat16()
    work: dict[str, Callable[[], object]] = {
        "sdpa fp32": lambda: sdpa(query, keys, values),
        "sdpa bf16": lambda: sdpa(half, keys_half, values_half),
        "products bf16": lambda: torch.softmax(half @ keys_half.mT * CHANNELS**-0.5, -1) @ values_half,
    }
    rivals = list(work)
    size = {}
    for tier in (runs, kivi):
        for bits in (8, 4, 2, 1):
            store, name = filled(tier(bits), heads, tokens), f"{tier.__name__} {bits}"
            work[name] = lambda store=store: store.attend(query, CHANNELS**-0.5, None)
            size[name] = sum(tensor.nbytes for _, _, tensor in store.tensors())
    times = medians(work, seconds)
    best = min(times[name] for name in rivals)
    result: dict[str, object] = {"heads": heads, "tokens": tokens, "rivals ms": {name: times[name] for name in rivals}}
    print(f"\n{heads} KV heads x {tokens}: " + ", ".join(f"{name} {times[name]:.3f} ms" for name in rivals))
    for name, nbytes in size.items():
        floor = nbytes / bandwidth * 1e3
        print(
            f"  {name:8} {times[name]:8.3f} ms  {best / times[name]:5.1f}x  {nbytes / 1e6:7.2f} MB"
            f"  floor {floor:.3f} ms  share {floor / times[name]:4.0%}",
            flush=True,
        )
        result[name] = {"ms": times[name], "speedup": best / times[name], "bytes": nbytes, "floor ms": floor}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each shape")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first so many")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu_attention.json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    bandwidth = read_bandwidth()
    print(f"{native.kernels().variant}, {torch.get_num_threads()} threads, read bandwidth {bandwidth / 1e9:.1f} GB/s")
    rows = [row(*shape, options.seconds, bandwidth) for shape in SHAPES[: options.shapes]]
    setting = {
        "machine": platform.machine(), "variant": native.kernels().variant, "threads": torch.get_num_threads(),
        "torch": torch.__version__, "read bandwidth": bandwidth, "query heads": QUERIES, "head size": CHANNELS,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
