"""Encode, pack and write in one pass by the compiled kernels of cpu.c."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvmosaic.codecs import Exact, Sphere, Uniform, sphere_levels
from kvmosaic.kernels import native
from kvmosaic.kernels.attention import cpu

if TYPE_CHECKING:
    from kvmosaic.stores.lane import LaneBytes


def write(lane: LaneBytes, x: Tensor, count: Tensor | None) -> bool:
    """Encode x [B, H, T, D] into the slots after `lane.coded`, of each row its first `count` [B, H] tokens
    (None = all).

    The lane has room for them. False, and nothing done, if the kernels are not there or cannot serve the lane.
    Raises ValueError for tensors that are not what the store says they are, before C sees them.
    """
    codec, kernels = lane.lane.codec, native.kernels()
    if kernels.library is None or isinstance(codec, Exact):
        return False
    batch, heads = lane.coded.shape
    described = cpu.lane(lane, batch, heads)
    if described is None:
        return False
    codec = cpu.unrotated(codec)
    x = x if x.stride(3) == 1 else x.contiguous()
    cpu.check("the tokens to encode", x, (batch, heads, x.shape[2], lane.channels), None)
    if count is None:
        count = torch.full((batch, heads), x.shape[2])
    else:
        cpu.check("count", count, (batch, heads), torch.int64)
        if int(count.max()) > x.shape[2]:
            raise ValueError(f"count asks for {int(count.max())} tokens of a row, {x.shape[2]} came")
    if lane.by_run:
        for name, part in lane.parts.items():
            if part.every is None:  # one more run; of an empty row the range is 0 and the factors 1, as in the codec
                new = torch.full((batch, heads, 1, part.width), float(name == "channel"), dtype=part.dtype)
                lane.buffers[name] = torch.cat([lane.buffers[name], new], 2)
        described = cpu.lane(lane, batch, heads)
        assert described is not None, "one more run does not change who serves a lane"
    arguments = native.Encoding(described, native.Exact.of(x), count.data_ptr())
    arguments.lane.runs += lane.by_run
    arguments.batch, arguments.heads, arguments.channels = batch, heads, lane.channels
    if isinstance(codec, Sphere):
        arguments.unit = sphere_levels(lane.channels, codec.bits)[0] / math.sqrt(lane.channels)
        arguments.keep = native.KEEP[codec.scale]
    if isinstance(codec, Uniform) and codec.clip != 1.0:
        clip = torch.tensor(codec.clip).expand(heads).contiguous()
        arguments.clip, arguments.about_center = clip.data_ptr(), codec.clip_about == "center"
    if kernels.encode(arguments) == native.BAD_LENGTHS:
        raise ValueError(f"the counts of the {lane.role} do not match the store's buffers")
    return True
