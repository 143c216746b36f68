"""Attention over coded stores on an NVIDIA GPU: cuda.cu, or lookup.cu or levels.cu for what is learned, leaves a part for each split
of each store; combine.cu joins them."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kvmosaic.codecs import Coupled, Levels
from kvmosaic.codecs.rotated import rotation
from kvmosaic.kernels import gpu
from kvmosaic.kernels.attention import levels, lookup
from kvmosaic.kernels.attention.partial import Partial
from kvmosaic.kernels.attention.plan import Plan
from kvmosaic.kernels.attention.reference import Affine
from kvmosaic.kernels.layout import BLOCK, padded

if TYPE_CHECKING:
    from kvmosaic.stores.lane import Lane, LaneBytes

WARPS = 4
LOG2_E = math.log2(math.e)

OVERHEAD = 8192
"""Bytes that a warp could read in the time that beginning and ending a part takes (some 4 us of an H100)."""


class Source(NamedTuple):
    """A coded store as attention reads it."""

    keys: LaneBytes
    values: LaneBytes
    length: Tensor
    affine: Affine | None


class _Query(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("rows", "numbers", "rotated", "rotate")),
        *((name, ctypes.c_int64) for name in ("batch_stride", "head_stride")),
        ("count", ctypes.c_int32),
    ]


class _Work(ctypes.Structure):
    _fields_ = [
        ("store", gpu.Store), ("query", _Query), ("fresh", gpu.Fresh),
        *((name, ctypes.c_void_p) for name in ("out", "most", "sum", "least", "greatest", "logits")),
        ("logit_stride", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("scale", "softcap", "affine_low", "affine_high")),
        *((name, ctypes.c_int32) for name in ("heads", "splits", "official", "unit")),
    ]  # fmt: skip


def why_not(keys: Lane, values: Lane, channels: int, affine: bool = False) -> str | None:
    """Why the kernels cannot serve a store of these lanes; None if they can."""
    if isinstance(keys.codec, Levels) or isinstance(values.codec, Levels):
        return levels.why_not(keys, values, channels, affine)
    if keys.pre_rope:
        return "keys that are rotated as they are read"
    if isinstance(keys.codec, Coupled) or isinstance(values.codec, Coupled):
        return lookup.why_not(keys, values, channels, affine)
    forms = gpu.form(keys.codec, "keys", channels), gpu.form(values.codec, "values", channels)
    for each in forms:
        if isinstance(each, str):
            return each
    key_form, value_form = forms
    assert isinstance(key_form, gpu.Form) and isinstance(value_form, gpu.Form), "reasons were returned above"
    alike = (keys.window, keys.flush) == (values.window, values.flush)
    if (key_form.form == 0) != (value_form.form == 0):
        return "one side is exact and the other is codes"
    if key_form.rotation != value_form.rotation:
        return "keys and values are rotated differently"
    if alike:
        return "calibrated logits beside exact tokens" if affine and keys.ring else None
    if affine or key_form.rotation is not None or (key_form.by_run and value_form.by_run):
        return "keys and values with windows of different sizes"
    if keys.ring > values.window:
        return "values that are encoded before their keys"
    return None


def attend(
    keys: LaneBytes,
    values: LaneBytes,
    length: Tensor,
    query: Tensor,
    scale: float,
    softcap: float | None,
    affine: Affine | None,
    fresh: tuple[Tensor, Tensor] | None,
) -> Partial | None:
    """As the reference; None if the kernels do not run here or cannot serve these lanes."""
    source = Source(keys, values, length, affine)
    if gpu.why_not(query.device) or not serves(source):
        return None
    query = query.contiguous()
    part = Partial(torch.empty_like(query), query.new_empty(query.shape[:3]))
    join(parts([source], query, scale, softcap, fresh, part), source)
    return part


def serves(source: Source) -> bool:
    keys, values = source.keys, source.values
    behind = [
        lane.lane.ring and "numbers" in lane.buffers and lane.buffers["numbers"].shape[2] for lane in (keys, values)
    ]
    return (
        not any(behind)  # exact tokens in a window and others behind it
        and keys.channels == values.channels
        and (keys.rotary is None or keys.rotary.plain(keys.channels, keys.coded.device) is not None)
        and keys.ring.dtype in gpu.NUMBERS
        and why_not(keys.lane, values.lane, keys.channels, source.affine is not None) is None
    )


def join(joined: gpu.Joined, source: Source) -> None:
    """Join `parts` now; source: any of theirs."""
    keys, length = source.keys, source.length
    macros = {"HEAD": str(keys.channels), "NUMBER": str(gpu.NUMBERS[keys.ring.dtype])}
    gpu.kernel("attention/combine.cu", "combine_parts", macros, length.device)(
        (length.numel(), joined.count, 1), joined
    )


def parts(
    sources: Sequence[Source],
    query: Tensor,
    scale: float,
    softcap: float | None,
    fresh: tuple[Tensor, Tensor] | None,
    into: Partial | Tensor,
    logits: Tensor | None = None,
) -> gpu.Joined:
    """Attention over all the sources and the fresh tokens, in parts that are yet to be joined into `into`, by what is queued next.

    query: [B, H, M, D] float32 for a Partial of that shape; or [B, Hq, 1, D] in the model's type for a Tensor
        [B, 1, Hq, D] of it.
    fresh: exact keys and values [B, H, E, D] of the step itself.
    logits: [B * H, M, slots + E] float32 for the logits of the first source, in base 2: of its tokens and, after them, of the
        fresh ones.
    """
    first = sources[0]
    batch, heads = first.length.shape
    channels, device = first.keys.channels, query.device
    rows = query if isinstance(into, Partial) else None
    count = query.shape[2] if rows is not None else query.shape[1] // heads
    plans = [_plan(source, count, softcap, logits is not None and source is first) for source in sources]
    kernels = [gpu.kernel(plan.file, "attend", plan.macros, device, 32 * plan.warps, plan.shared) for plan in plans]
    blocks = [batch * heads * -(-count // plan.queries) for plan in plans]
    tails = [  # parts of what is exact
        int(plan.apart and bool((index == 0 and fresh is not None) or source.keys.lane.ring))
        for index, (source, plan) in enumerate(zip(sources, plans, strict=True))
    ]
    splits, units = zip(*map(_splits, plans, blocks, tails, kernels), strict=True)
    starts = [0]
    for split, tail in zip(splits, tails, strict=True):
        starts.append(starts[-1] + split + tail)
    out = query.new_empty(starts[-1], batch * heads, count, channels, dtype=torch.float32)
    numbers = out.new_empty(4, starts[-1], batch * heads, count)  # most, sum, least, greatest

    joined = gpu.Joined(stores=len(sources), count=count, out=out.data_ptr(), most=numbers[0].data_ptr())
    joined.sum, joined.tails, joined.first = (
        numbers[1].data_ptr(),
        _ints(tails, gpu.MOST_STORES),
        _ints(starts, gpu.MOST_STORES + 1),
    )
    held = []
    for index, (source, plan, kernel) in enumerate(zip(sources, plans, kernels, strict=True)):
        work = _Work(
            heads=heads,
            splits=splits[index],
            unit=units[index],
            scale=scale * LOG2_E,
            softcap=(softcap or 0.0) * LOG2_E,
        )
        work.store = gpu.Store(gpu.describe(source.keys), gpu.describe(source.values), source.length.data_ptr())
        work.query.count = count
        if rows is not None:
            work.query.rows = rows.data_ptr()
        else:
            work.query.numbers = query.data_ptr()
            work.query.batch_stride, work.query.head_stride = query.stride()[:2]
        if plan.rotation is not None:
            held.append(matrix := rotation(channels, plan.rotation, device))
            work.query.rotate = joined.unrotate[index] = matrix.data_ptr()
            if channels & (channels - 1):  # no Hadamard matrix, whose product the kernel does by itself
                plain = query.float().view(batch, heads, count, channels) if rows is None else rows
                held.append(turned := plain @ matrix)
                work.query.rotated = turned.data_ptr()
        if index == 0 and fresh is not None:
            work.fresh = gpu.fresh(*fresh)
        if index == 0 and logits is not None:
            work.logits, work.logit_stride = logits.data_ptr(), logits.shape[2]
        work.out, work.most, work.sum = (x[starts[index]].data_ptr() for x in (out, numbers[0], numbers[1]))
        grid = (splits[index], batch * heads, blocks[index] // (batch * heads))
        if source.affine is not None:
            work.official = source.affine.official
            work.affine_low, work.affine_high = source.affine.low * LOG2_E, source.affine.high * LOG2_E
            work.least, work.greatest = (x[starts[index]].data_ptr() for x in (numbers[2], numbers[3]))
            gpu.kernel(plan.file, "ranges", plan.macros, device)(grid, work)
        kernel((grid[0] + tails[index], *grid[1:]), work)
    if isinstance(into, Partial):
        joined.rows, joined.lse = into.out.data_ptr(), into.lse.data_ptr()
    else:
        joined.numbers = into.data_ptr()
    joined.held = (out, numbers, *held)
    return joined


def _ints(values: list[int], size: int) -> ctypes.Array[ctypes.c_int32]:
    return (ctypes.c_int32 * size)(*values)


def _plan(source: Source, count: int, softcap: float | None, scored: bool) -> Plan:
    keys, values = source.keys, source.values
    if isinstance(keys.lane.codec, Coupled):
        return lookup.plan(keys, values, count, softcap)
    if isinstance(keys.lane.codec, Levels):
        return levels.plan(keys, values, count, softcap)
    forms = gpu.form(keys.lane.codec, "keys", keys.channels), gpu.form(values.lane.codec, "values", keys.channels)
    assert isinstance(forms[0], gpu.Form) and isinstance(forms[1], gpu.Form), "only asked of lanes that are served"
    tiles = 1 if count <= 4 else 2
    macros = {
        "HEAD": str(keys.channels),
        "NUMBER": str(gpu.NUMBERS[keys.ring.dtype]),
        "TILES": str(tiles),
        "BLOCKS": str(5 - tiles),  # of threads, resident in a multiprocessor
        "SOFTCAP": str(int(softcap is not None)),
        "AFFINE": str(int(source.affine is not None)),
        "LOGITS": str(int(scored)),
        "ROTATED": str(int(forms[0].rotation is not None)),
        "RUNS": str(int(max(keys.starts.shape[2], values.starts.shape[2]) > 1)),
        **forms[0].macros("keys"),
        **forms[1].macros("values"),
    }
    if forms[0].form == 0:
        tokens, room, bits = 16, keys.buffers["numbers"].shape[2], 32
    else:
        planes = 8 // forms[1].bits
        tokens = max(32, 16 * (8 // forms[0].bits), 32 * (planes // math.gcd(planes, padded(keys.channels) // 16)))
        room, bits = keys.buffers["codes"].shape[2] * BLOCK, forms[0].bits + forms[1].bits
    overhead = OVERHEAD / (tokens * keys.channels * bits / 8)
    grouped = forms[0].form == 1 and forms[0].group
    seed = forms[0].rotation
    return Plan(
        file="attention/cuda.cu",
        macros=macros,
        chunks=-(-room // tokens),
        units=(1, BLOCK // tokens) if grouped else (1,),
        overhead=overhead,
        queries=4 * tiles,
        warps=WARPS,
        rotation=seed,
        apart=seed is not None,
    )


def _splits(plan: Plan, blocks: int, tail: int, kernel: gpu.Kernel) -> tuple[int, int]:
    """In how many parts to read, and how many chunks in a row: the fewest rounds of resident blocks of threads times what each
    warp has to do."""

    def cost(choice: tuple[int, int]) -> float:
        splits, unit = choice
        rounds = -(-blocks * (splits + tail) // kernel.resident)
        scaling = len(plan.units) > 1  # of the query, once a unit: about as much as a chunk
        return rounds * (-(-plan.chunks // (plan.warps * splits * unit)) * (unit + scaling) + plan.overhead)

    return min(
        (
            (splits, unit)
            for unit in plan.units
            for splits in range(1, max(1, min(128, -(-plan.chunks // (plan.warps * unit)))) + 1)
        ),
        key=cost,
    )
