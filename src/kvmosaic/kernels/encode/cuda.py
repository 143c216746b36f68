"""Encode, pack and write on an NVIDIA GPU by the kernels of cuda.cu: many tokens at once, or the one of a decode step."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvmosaic.codecs import Codec, Coupled, Levels, Rotated, Uniform
from kvmosaic.codecs.rotated import rotation
from kvmosaic.kernels import gpu
from kvmosaic.kernels.encode import lookup
from kvmosaic.kernels.layout import BLOCK

if TYPE_CHECKING:
    from kvmosaic.stores.lane import LaneBytes


class _Side(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "low", "channel", "exact", "coded", "rotate", "clip")),
        *((name, ctypes.c_int64) for name in ("code_stride", "entry_stride", "exact_room")),
        *((name, ctypes.c_int32) for name in ("ring", "window", "flush", "runs", "about_center")),
    ]


class _Append(ctypes.Structure):
    _fields_ = [("keys", _Side), ("values", _Side), ("end", gpu.StepEnd)]


class _Writing(ctypes.Structure):
    _fields_ = [
        ("side", _Side), ("x", ctypes.c_void_p), ("count", ctypes.c_void_p), ("strides", ctypes.c_int64 * 3),
        *((name, ctypes.c_int32) for name in ("heads", "run", "tokens")),
    ]  # fmt: skip


def write(lane: LaneBytes, x: Tensor, count: Tensor | None) -> bool:
    """Encode x [B, H, T, D] into the slots after `lane.coded`, of each row its first `count` [B, H] tokens
    (None = all).

    The lane has room for them. False, and nothing done, if the kernels do not run here or cannot serve the lane.
    """
    if gpu.why_not(x.device):
        return False
    if isinstance(lane.lane.codec, Coupled):
        return lookup.write(lane, x, count)
    form = gpu.form(lane.lane.codec, lane.role, lane.channels)
    if isinstance(form, str) or form.form == 0 or x.dtype not in gpu.NUMBERS:
        return False
    if form.group and BLOCK % form.group:
        return False  # a range would lie in two blocks of threads
    batch, heads, tokens, _ = x.shape
    if x.stride(3) != 1 or any(stride % 4 for stride in x.stride()[:3]) or x.data_ptr() % 8:  # read 8 bytes at a time
        x = x.contiguous()
    if lane.by_run:
        _write_run(lane, x, count)
    side, held = _side(lane)
    # a run's parameters have just been added: the run itself is counted later
    side.runs = max((lane.buffers[name].shape[2] for name, part in lane.parts.items() if part.every is None), default=0)
    arguments = _Writing(
        side,
        x.data_ptr(),
        None if count is None else count.data_ptr(),
        (ctypes.c_int64 * 3)(*x.stride()[:3]),
        heads,
        side.runs - 1,
        tokens,
    )
    macros = _macros(lane, form, form) | {"APPENDS": "0", "WRITES": lane.role.capitalize()}
    blocks = -(-tokens // BLOCK) + 1  # the first may be begun already
    gpu.kernel("encode/cuda.cu", "encode", macros, x.device)((batch * heads, blocks, 1), arguments)
    del held
    return True


def _write_run(lane: LaneBytes, x: Tensor, count: Tensor | None) -> None:
    """The parameters that the whole run shares, as the codec has them."""
    codec = lane.lane.codec
    assert isinstance(codec, Uniform), "only uniform codecs have parameters of runs"
    outside = None  # what is not a row's
    if count is not None:
        outside = (torch.arange(x.shape[2], device=x.device) >= count[..., None])[..., None]
    if codec.equalize:
        channel = (x if outside is None else x.masked_fill(outside, 0)).abs().amax(2, keepdim=True).float().sqrt()
        new = {"channel": torch.where(channel > 0, channel, 1.0).to(torch.float16)}
    else:
        low, high = (x if outside is None else x.masked_fill(outside, end) for end in (torch.inf, -torch.inf))
        low, high = low.amin(2, keepdim=True), high.amax(2, keepdim=True)
        if count is not None:
            empty = (count == 0)[..., None, None]
            low, high = low.masked_fill(empty, 0), high.masked_fill(empty, 0)
        low, scale = codec.fit(low.float(), high.float())
        new = {"low": low, "scale": scale}
    for name, entry in new.items():
        lane.buffers[name] = torch.cat([lane.buffers[name], entry], 2)


def append(
    keys: LaneBytes,
    values: LaneBytes,
    length: Tensor,
    arrived: Tensor,
    live: Tensor,
    new: tuple[Tensor, Tensor],
    joined: gpu.Joined | None = None,
    slot: Tensor | None = None,
) -> None:
    """The token of a decode step, [B, H, 1, D] each side, into a store of `length` [B, H], which is one more afterwards.

    arrived: [B, H] int32, zeros. live: [1] int32; 0 = the step is one too many, and nothing is written. joined: the parts of
    the step's attention, to be joined meanwhile. Nothing is allocated, and all lengths are read and written on the device:
    the store has room (`CodedStore.pin`).
    slot: [B, H] int64, where the token goes if not after the others, -1 = nowhere; for lanes that write one by one, and the
        length stays as it is.
    """
    batch, heads = length.shape
    joined, device = joined or gpu.Joined(), length.device
    end = gpu.StepEnd(
        arrived=arrived.data_ptr(), live=live.data_ptr(), fresh=gpu.fresh(*new), joined=joined, heads=heads
    )
    if slot is None:
        end.length = length.data_ptr()
    else:
        end.slot = slot.data_ptr()
    grid = (batch * heads, joined.count + 2, 1)
    if isinstance(keys.lane.codec, Coupled):
        return lookup.append(keys, values, end, grid, device)
    forms = [gpu.form(lane.lane.codec, lane.role, lane.channels) for lane in (keys, values)]
    key_form, value_form = forms
    assert isinstance(key_form, gpu.Form) and isinstance(value_form, gpu.Form), "asked before (`why_not`)"
    key_side, held_keys = _side(keys)
    value_side, held_values = _side(values)
    macros = _macros(keys, key_form, value_form) | {"APPENDS": "1"}
    gpu.kernel("encode/cuda.cu", "append", macros, device)(grid, _Append(key_side, value_side, end))
    del held_keys, held_values


def why_not(codec: Codec, role: str, channels: int) -> str | None:
    """Why `append` cannot write a lane, beyond what attention says of it; None if it can."""
    if isinstance(codec, Coupled):
        return None
    if isinstance(codec, Levels):
        return "a token's learned levels and outliers are found by PyTorch"
    form = gpu.form(codec, "keys" if role == "keys" else "values", channels)
    if isinstance(form, str):
        return form
    if form.by_run:
        return "ranges over a run of tokens, of which a decode step has only one"
    if form.group and BLOCK % form.group:
        return f"groups of {form.group} tokens do not fill blocks of {BLOCK}"
    return None


def _macros(lane: LaneBytes, keys: gpu.Form, values: gpu.Form) -> dict[str, str]:
    head = {"HEAD": str(lane.channels), "NUMBER": str(gpu.NUMBERS[lane.ring.dtype])}
    return head | keys.macros("keys") | values.macros("values")


def _side(lane: LaneBytes) -> tuple[_Side, list[Tensor]]:
    """The lane's tensors as the kernels write them, and what must outlive the launch."""
    described, device = gpu.describe(lane), lane.coded.device
    shared = {field[0] for field in _Side._fields_} & {field[0] for field in gpu.Lane._fields_}
    side = _Side(**{name: getattr(described, name) for name in shared})
    side.window, side.flush = lane.lane.window, lane.lane.flush
    held = []
    codec = lane.lane.codec
    if isinstance(codec, Rotated):
        held.append(matrix := rotation(lane.channels, codec.seed, device))
        side.rotate, codec = matrix.data_ptr(), codec.codec
    if isinstance(codec, Uniform) and codec.clip != 1.0:
        held.append(clip := _clips(codec.clip, lane.coded.shape[1], device))
        side.clip, side.about_center = clip.data_ptr(), codec.clip_about == "center"
    return side, held


@lru_cache(maxsize=64)
def _clips(clip: float | tuple[float, ...], heads: int, device: torch.device) -> Tensor:
    return torch.tensor(clip, device=device).expand(heads).contiguous()
