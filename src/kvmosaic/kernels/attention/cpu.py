"""Attention over a coded store by the compiled kernels of cpu.c: checks, pointers, one call."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvmosaic.codecs import Codec, Exact, Rotated, Sphere, Uniform, sphere_levels
from kvmosaic.codecs.rotated import rotation
from kvmosaic.kernels import native
from kvmosaic.kernels.attention.partial import Partial
from kvmosaic.kernels.attention.reference import Affine
from kvmosaic.kernels.layout import BLOCK, Role, bytes_per_block

if TYPE_CHECKING:
    from kvmosaic.stores.lane import LaneBytes


def why_not(codec: Codec, role: Role, channels: int) -> str | None:
    """Why the kernels cannot serve a lane; None if they can."""
    if channels > native.MOST_CHANNELS:
        return f"head size {channels} is above {native.MOST_CHANNELS}"
    if isinstance(codec, Exact):
        return None
    codec = unrotated(codec)
    if isinstance(codec, Sphere):
        return None
    if not isinstance(codec, Uniform):
        return f"no compiled form of {type(codec).__name__}"
    group = codec.group or channels
    least = max(16, 32 // codec.bits if role == "keys" else 0)
    if codec.axis == "token" and group != channels and group % least:
        return f"channel groups of {role} must be whole vectors of {least} channels, got {group}"
    return None


def unrotated(codec: Codec) -> Codec:
    """What a rotated codec does after its rotation."""
    return codec.codec if isinstance(codec, Rotated) else codec


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
    """As the reference; None if the kernels are not there or cannot serve these lanes.

    Raises ValueError for tensors that are not what the store says they are, before C sees them.
    """
    kernels = native.kernels()
    channels = keys.channels
    if kernels.library is None or values.channels != channels or keys.rotary is not None:
        return None
    batch, heads = length.shape
    key_lane, value_lane = lane(keys, batch, heads), lane(values, batch, heads)
    if key_lane is None or value_lane is None:
        return None
    query = query.contiguous()
    check("query", query, (batch, heads, query.shape[2], channels), torch.float32)
    check("length", length, (batch, heads), torch.int64)
    out = torch.empty_like(query)
    lse = query.new_empty(query.shape[:3])
    arguments = native.Attention(
        key_lane,
        value_lane,
        length=length.data_ptr(),
        query=query.data_ptr(),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        batch=batch,
        heads=heads,
        rows=query.shape[2],
        channels=channels,
        scale=scale,
        softcap=softcap or 0.0,
    )
    if affine is not None:
        arguments.affine, arguments.official = 1, affine.official
        arguments.affine_low, arguments.affine_high = affine.low, affine.high
    if fresh is not None:
        count = fresh[0].shape[2]
        new = [x if x.stride(3) == 1 else x.contiguous() for x in fresh]
        for name, x in zip(("fresh keys", "fresh values"), new, strict=True):
            check(name, x, (batch, heads, count, channels), None)
        arguments.fresh = count
        arguments.fresh_keys, arguments.fresh_values = (native.Exact.of(x) for x in new)
    result = kernels.attend(arguments)
    if result == native.BAD_LENGTHS:
        raise ValueError("the store's counts do not match its buffers: length, coded or the ring point outside")
    if result == native.NO_MEMORY:
        raise MemoryError("no memory for the partial results of attention")
    return Partial(out, lse)


_lanes: WeakKeyDictionary[LaneBytes, tuple[tuple[Tensor, ...], native.Lane | None, list[Tensor]]] = WeakKeyDictionary()


def lane(source: LaneBytes, batch: int, heads: int) -> native.Lane | None:
    """A lane's tensors as C sees them, checked; kept until one of them is replaced. None: no kernel serves it."""
    tensors = (*source.buffers.values(), source.ring)
    known = _lanes.get(source)
    if known is None or any(a is not b for a, b in zip(known[0], tensors, strict=True)):
        constants: list[Tensor] = []
        missing = why_not(source.lane.codec, source.role, source.channels)
        described = None if missing else _describe(source, batch, heads, constants)
        known = _lanes[source] = (tensors, described, constants)
    described = known[1]
    if described is None:
        return None
    check("coded", source.coded, (batch, heads), torch.int64)
    check("starts", source.starts, (batch, heads, source.starts.shape[2]), torch.int64)
    described.coded, described.starts = source.coded.data_ptr(), source.starts.data_ptr()
    described.runs = runs = source.starts.shape[2]
    if source.by_run and any(
        part.every is None and source.buffers[name].shape[2] < runs for name, part in source.parts.items()
    ):
        raise ValueError(f"the {source.role} have {runs} runs, more than their parameters are for")
    return described


def _describe(source: LaneBytes, batch: int, heads: int, constants: list[Tensor]) -> native.Lane:
    """constants: where to keep what the pointers need beside the lane's own tensors."""
    codec, buffers, ring = source.lane.codec, source.buffers, source.ring
    if ring.dtype not in native.NUMBERS:
        raise ValueError(f"the store's dtype must be float32, bfloat16 or float16, got {ring.dtype}")
    tokens = []
    for name, part in source.parts.items():
        packed = part.dtype is torch.uint8
        width = bytes_per_block(part.width, part.bits) if packed else part.width
        entries = buffers[name].shape[2]
        check(name, buffers[name], (batch, heads, entries, width), part.dtype or ring.dtype)
        if part.every is not None:
            tokens.append(entries * (BLOCK if packed else part.every))
    check("ring", ring, (batch, heads, ring.shape[2], source.channels), ring.dtype)
    described = native.Lane(
        ring=ring.data_ptr(), ring_room=ring.shape[2], ring_size=source.lane.ring, room=min(tokens, default=0)
    )
    described.number, described.role = native.NUMBERS[ring.dtype], native.ROLES[source.role]
    if isinstance(codec, Exact):
        described.numbers, described.blocks = buffers["numbers"].data_ptr(), described.room
        return described
    described.codes, described.blocks = buffers["codes"].data_ptr(), buffers["codes"].shape[2]
    described.scale, described.entries = buffers["scale"].data_ptr(), buffers["scale"].shape[2]
    if isinstance(codec, Rotated):
        constants.append(rotation(source.channels, codec.seed, ring.device))
        described.rotation, codec = constants[-1].data_ptr(), codec.codec
    if isinstance(codec, Sphere):
        constants.append(sphere_levels(source.channels, codec.bits)[1])
        described.levels, described.bits, described.axis = constants[-1].data_ptr(), codec.bits, native.AXES["token"]
        described.top = buffers["top"].data_ptr() if codec.bits == 3 else None
        described.group = source.channels
        return described
    assert isinstance(codec, Uniform), "why_not knows the codecs that have a compiled form"
    described.low = buffers["low"].data_ptr()
    described.channel = buffers["channel"].data_ptr() if codec.equalize else None
    described.bits, described.axis = codec.bits, native.AXES[codec.axis]
    described.group = codec.group or (0 if codec.axis == "channel" else source.channels)
    return described


def check(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    """dtype None: any that exact numbers have, and any strides but the last."""
    if x.is_cpu and x.dtype == dtype and x.shape == shape and x.is_contiguous():
        return
    if x.shape != shape:
        raise ValueError(f"{name} must have the shape {list(shape)} of the store, got {list(x.shape)}")
    if x.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU like the store, got {x.device}")
    if dtype is None:
        if x.dtype not in native.NUMBERS:
            raise ValueError(f"{name} must be float32, bfloat16 or float16, got {x.dtype}")
    elif x.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {x.dtype}")
    elif not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(x.stride())}")
