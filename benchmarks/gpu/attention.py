"""Decode attention over coded stores on a GPU, beside bfloat16's best: python benchmarks/gpu/attention.py

One step of one layer. The floor is the bytes of the store over the bandwidth of a device-to-device copy; rivals (torch's
flash and cuDNN attention, a split-KV kernel in Triton with its best settings) read the same tokens in bfloat16 in the same run.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from common import (
    by_run,
    copy_bandwidth,
    cq,
    graphed,
    kivi,
    kvquant,
    machine,
    microseconds,
    nbytes,
    parser,
    random_store,
    tier_of,
    write,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvmosaic import methods
from kvmosaic.kernels.attention import Affine, cuda
from kvmosaic.kernels.attention.cuda import Source
from kvmosaic.stores import EXACT, Coded

SHAPES: dict[str, tuple[int, int, int, int, int]] = {  # batch, KV heads, queries a KV head, tokens, channels
    "64 x 32k": (64, 8, 4, 32768, 128),
    "16 x 8k": (16, 8, 4, 8192, 128),
    "1 x 128k": (1, 8, 4, 131072, 128),
    "32 x 32k, 28/4 heads": (32, 4, 7, 32768, 128),
    "32 x 32k, 64/8 heads": (32, 8, 8, 32768, 128),
}


def forms(heads: int = 8, channels: int = 128) -> dict[str, Coded]:
    return {
        "exact": EXACT,
        **{f"runs {bits}": by_run(bits) for bits in (8, 4, 2, 1)},
        **{f"kivi {bits}, groups of 128": kivi(bits) for bits in (4, 2)},
        **{f"kivi {bits}, groups of 32": kivi(bits, 32) for bits in (4, 2)},
        **{
            f"turboquant {bits}, window 32": tier_of(methods.get("turboquant")(bits=bits, window=32))
            for bits in (4, 2, 1)
        },
        **{f"cq {coupled}c{bits}b": cq(heads, channels, coupled, bits) for coupled, bits in ((8, 8), (4, 8), (8, 10))},
        **{f"kvquant {bits}": kvquant(heads, channels, bits) for bits in (4, 3, 2)},
        "runs 1, calibrated": Coded(by_run(1).keys, by_run(1).values, Affine()),
        "runs 2, calibrated": Coded(by_run(2).keys, by_run(2).values, Affine()),
    }


@triton.jit
def _split_kv(
    Q, K, V, Out, M, L, scale, tokens, splits, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, N: tl.constexpr
):
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g, d, n = tl.arange(0, GP), tl.arange(0, D), tl.arange(0, N)
    q = tl.load(Q + row * G * D + g[:, None] * D + d[None], mask=g[:, None] < G, other=0.0)
    per = tl.cdiv(tl.cdiv(tokens, splits), N) * N
    start = split * per
    most, total = tl.full([GP], -1e30, tl.float32), tl.zeros([GP], tl.float32)
    out = tl.zeros([GP, D], tl.float32)
    for t in range(start, tl.minimum(tokens, start + per), N):
        k = tl.load(K + row * tokens * D + (t + n)[None, :] * D + d[:, None])
        s = tl.dot(q, k) * scale
        now = tl.maximum(most, tl.max(s, 1))
        p, old = tl.exp2(s - now[:, None]), tl.exp2(most - now)
        total, most = total * old + tl.sum(p, 1), now
        v = tl.load(V + row * tokens * D + (t + n)[:, None] * D + d[None])
        out = out * old[:, None] + tl.dot(p.to(tl.bfloat16), v)
    at = (row * splits + split) * G
    tl.store(Out + (at + g[:, None]) * D + d[None], out, mask=g[:, None] < G)
    tl.store(M + at + g, most, mask=g < G)
    tl.store(L + at + g, total, mask=g < G)


def rivals(batch: int, heads: int, group: int, tokens: int, channels: int) -> dict[str, float]:
    rows = batch * heads
    query = torch.randn(rows, group, channels, dtype=torch.bfloat16, device="cuda")
    keys, values = torch.randn(2, rows, tokens, channels, dtype=torch.bfloat16, device="cuda")
    found: dict[str, float] = {}
    for name, backend in (("SDPA flash", SDPBackend.FLASH_ATTENTION), ("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION)):
        try:
            with sdpa_kernel(backend):
                found[name] = microseconds(
                    lambda: F.scaled_dot_product_attention(query[None], keys[None], values[None])
                )
        except RuntimeError as error:
            print(f"{name}: {str(error)[:100]}")
    times = []
    for splits in (1, 2, 4, 8, 16, 32, 64):
        if not 132 <= rows * splits <= 8192:
            continue
        out = torch.empty(rows, splits, group, channels, device="cuda")
        most, total = (torch.empty(rows, splits, group, device="cuda") for _ in range(2))
        for block, warps, stages in ((64, 4, 3), (128, 4, 2), (128, 8, 3)):
            grid = (rows, splits)
            options = dict(G=group, GP=16, D=channels, N=block, num_warps=warps, num_stages=stages)
            run = lambda: _split_kv[grid](query, keys, values, out, most, total, 0.1275, tokens, splits, **options)  # noqa: B023, E731
            times.append(microseconds(graphed(run), 0.03))
    found["Triton split-KV"] = min(times)
    return found


def ours(
    tier: Coded, batch: int, heads: int, group: int, tokens: int, channels: int
) -> tuple[float, int, Callable[[], Any]]:
    """(microseconds as one graph, bytes, the call) of a step as decoding makes it, merge and fresh token included."""
    store = random_store(tier, batch, heads, tokens, channels)
    query = torch.randn(batch, heads * group, 1, channels, device="cuda").bfloat16()
    new = tuple(torch.randn(2, batch, heads, 1, channels, device="cuda").bfloat16())
    out = torch.empty(batch, 1, heads * group, channels, dtype=torch.bfloat16, device="cuda")
    source = Source(store.keys, store.values, store.length, tier.affine)

    def run() -> Tensor:
        cuda.join(cuda.parts([source], query, channels**-0.5, None, (new[0], new[1]), out), source)
        return out

    return microseconds(graphed(run)), nbytes(store), run


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    options.add_argument("--forms", nargs="*", choices=forms(), default=list(forms()))
    arguments = options.parse_args()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    setting = machine(arguments.commit) | {"copy bandwidth, bytes a second": bandwidth}
    print(setting)
    rows = []
    for shape in arguments.shapes:
        batch, heads, _, tokens, channels = SHAPES[shape]
        tiers = forms(heads, channels)
        dense = 2 * batch * heads * tokens * channels * 2
        others = rivals(*SHAPES[shape])
        torch.cuda.empty_cache()
        best = min(others.values())
        for name, each in others.items():
            rows.append({"shape": shape, "form": name, "microseconds": each, "bytes": dense})
        for form in arguments.forms:
            each, held, _ = ours(tiers[form], *SHAPES[shape])
            rows.append({"shape": shape, "form": form, "microseconds": each, "bytes": held})
            torch.cuda.empty_cache()
        for row in rows:
            if row["shape"] == shape:
                row["floor"] = row["bytes"] / bandwidth * 1e6
                row["share of the floor"] = row["floor"] / row["microseconds"]
                row["against the best in bfloat16"] = best / row["microseconds"]
                print(
                    f"{shape:22} {row['form']:24} {row['microseconds']:9.1f} us {row['bytes'] / 2**20:9.0f} MiB "
                    f"{100 * row['share of the floor']:6.1f} % {row['against the best in bfloat16']:6.2f}x",
                    flush=True,
                )
        write("gpu_attention.json", setting, rows, arguments.out)


if __name__ == "__main__":
    main()
