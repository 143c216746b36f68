"""What the GPU benchmarks share: stores of random bytes, times by device events, the machine, and the results' file."""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kvmosaic.codecs import Coupled, Levels, Uniform
from kvmosaic.hooks.rotary import Rotary
from kvmosaic.recipe import Recipe
from kvmosaic.stores import Coded, CodedStore, Lane

RESULTS = Path(__file__).parents[1] / "results"


def parser(description: str | None) -> argparse.ArgumentParser:
    """With the arguments that every benchmark has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--commit", default="", help="of this code, where it is no clone")
    made.add_argument("--out", type=Path, help="folder for the results (default: benchmarks/results)")
    return made


def machine(commit: str) -> dict[str, Any]:
    """commit: of this code; found by git where the benchmark runs in a clone."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "commit": commit or found,
        "command": f"python {shlex.join(sys.argv)}",
    }


def write(name: str, setting: dict[str, Any], rows: list[dict[str, Any]], out: Path | None) -> None:
    path = (out or RESULTS) / name
    path.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")
    print(f"written to {path}")


def elapsed(run: Callable[[], Any]) -> float:
    """Microseconds of one call on the device, by events around it."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    run()
    events[1].record()
    events[1].synchronize()
    return events[0].elapsed_time(events[1]) * 1e3


def microseconds(run: Callable[[], Any], seconds: float = 0.15, most: int = 300) -> float:
    """Median of `elapsed`."""
    for _ in range(3):
        run()
    times: list[float] = []
    total = 0.0
    while (total < seconds * 1e6 and len(times) < most) or len(times) < 7:
        times.append(elapsed(run))
        total += times[-1]
    return statistics.median(times)


def graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same work as one launch."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a device-to-device copy of 4 GiB."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / microseconds(lambda: target.copy_(source)) * 1e6


def random_store(tier: Coded, batch: int, heads: int, tokens: int, channels: int, room: int = 0) -> CodedStore:
    """A store of `tokens` tokens in bfloat16 that nobody encoded: random codes, scales and exact numbers."""
    empty = torch.empty(batch, heads, 0, channels, dtype=torch.bfloat16, device="cuda")
    store = CodedStore(tier, empty, empty, rotary=_rotary(channels) if tier.keys.pre_rope else None)
    if tier.keys.pre_rope:
        place = torch.arange(tokens + room, dtype=torch.int32, device="cuda")
        store.keys.position = place[None, None, :, None].expand(batch, 1, -1, 1).contiguous()
    for lane in (store.keys, store.values):
        lane._reserve(tokens + room)
        lane._reserve_ring(min(lane.lane.ring, tokens))
        for name, buffer in lane.buffers.items():
            if lane.parts[name].every is None:
                buffer = lane.buffers[name] = buffer.new_empty(batch, heads, 1, buffer.shape[3])
            _fill(buffer, name, channels)
        lane.ring.normal_()
        exact = max(0, tokens - lane.lane.window) // lane.lane.flush * lane.lane.flush
        lane.coded.fill_(exact)
        if lane.by_run:
            lane.starts = lane.coded.new_zeros(batch, heads, 1)
    store.length.fill_(tokens)
    return store


def _rotary(channels: int) -> Rotary:
    """Of a model with Llama-3.1's rotary positions, less their scaling."""
    config = LlamaConfig(
        hidden_size=channels, head_dim=channels, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8, vocab_size=8,
        rope_theta=500000.0,
    )  # fmt: skip
    return Rotary(LlamaForCausalLM(config).cuda())


def _fill(buffer: Tensor, name: str, channels: int) -> None:
    if name == "where":
        buffer.random_(channels)
    elif buffer.dtype is torch.uint8:
        buffer.random_()
    elif name == "low":
        buffer.uniform_(-1.5, -0.5)
    elif name == "range":
        buffer.uniform_(0.5, 1.5)
    elif name == "scale":
        buffer.uniform_(0.2, 0.6)
    else:
        buffer.normal_()


def nbytes(store: CodedStore) -> int:
    """Bytes that a step has to read: the tensors of the store."""
    return sum(tensor.nbytes for _, _, tensor in store.tensors())


def by_run(bits: int) -> Coded:
    """CalibQuant's form: one range a channel."""
    lane = Lane(Uniform(bits=bits, axis="channel"))
    return Coded(lane, lane)


def kivi(bits: int, group: int = 128) -> Coded:
    """Keys by channel over `group` tokens, values by token; the newest tokens exact."""
    keys = Lane(Uniform(bits=bits, axis="channel", group=group), flush=128)
    return Coded(keys, Lane(Uniform(bits=bits, axis="token", group=None if group == 128 else group), window=128))


def cq(heads: int, channels: int, coupled: int, bits: int = 8) -> Coded:
    """CQ's form, rotated keys, with centroids at random."""
    shape = (2, heads, channels // coupled, 2**bits, coupled)
    keys, values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
    return Coded(Lane(Coupled(keys)), Lane(Coupled(values)))


def kvquant(heads: int, channels: int, bits: int) -> Coded:
    """KVQuant's form with 1 % of outliers, ranges and levels as normal numbers have them; keys before their rotary positions."""
    table = torch.linspace(-1, 1, 2**bits)
    ranges = torch.stack([torch.zeros(heads, channels), torch.full((heads, channels), 2.5)]).half()
    keys, values = (
        Levels(levels=table, restored=table, ranges=own, outliers=-(-channels // 100)) for own in (ranges, None)
    )
    return Coded(Lane(keys, pre_rope=True), Lane(values))


def tier_of(recipe: Recipe) -> Coded:
    assert recipe.tiers is not None and isinstance(recipe.tiers[0], Coded), "these benchmarks are of one tier"
    return recipe.tiers[0]
