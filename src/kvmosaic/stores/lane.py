"""One side of a store, keys or values: packed codes behind, a ring of exact tokens in front.

Tokens have slots 0, 1, 2, ... in the order in which they came. Slots below `coded` are encoded; the newer ones wait in
the ring, slot s at index s modulo the ring's size. Keys and values share the slots but may differ in `coded`: KIVI
encodes its keys 128 tokens at a time and its values one by one.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvmosaic.codecs import Codec, Packed
from kvmosaic.kernels import encode
from kvmosaic.kernels.layout import BLOCK, Role, bytes_per_block, layout_of, pack, unpack
from kvmosaic.projection import Basis

if TYPE_CHECKING:
    from kvmosaic.hooks.rotary import Rotary

LARGEST = torch.finfo(torch.float16).max / 2
"""Of a number to encode: twice it, the widest range of a group, must fit float16."""


NEVER = 2**62
"""The first slot of a run that there is room for."""


@dataclass(frozen=True)
class Lane:
    """How one side is written: by which codec, and when.

    window: how many of the newest tokens always stay exact.
    flush: tokens older than the window are encoded when this many have gathered (all multiples of it at once).
    pre_rope: keys are encoded as they were before their rotary positions, and rotated when they are read.
    Raises ValueError if a flush would cut a group of the codec.
    """

    codec: Codec
    window: int = 0
    flush: int = 1
    pre_rope: bool = False

    def __post_init__(self) -> None:
        if self.window < 0 or self.flush < 1:
            raise ValueError(f"window must be at least 0 and flush at least 1, got {self.window} and {self.flush}")
        if self.flush % self.codec.unit:
            raise ValueError(
                f"flush must be a multiple of the codec's group of {self.codec.unit} tokens, got {self.flush}"
            )

    @property
    def ring(self) -> int:
        """Most tokens that wait exact between two steps."""
        return self.window + self.flush - 1

    def one_by_one(self, channels: int) -> bool:
        """Each token is written by itself and at once, so any token can give up its slot to another."""
        return not self.ring and all(part.every == 1 for part in self.codec.parts(channels).values())


class Even:
    """The one number that all rows of a tensor of counts have, as the host knows it without waiting for a device; of any
    other tensor, or of this one once it has been written to, it knows nothing."""

    def __init__(self, counts: Tensor, number: int) -> None:
        self.counts, self.number, self.version = weakref.ref(counts), number, self._version(counts)

    def of(self, counts: Tensor) -> int | None:
        return self.number if counts is self.counts() and self._version(counts) == self.version else None

    @staticmethod
    def _version(counts: Tensor) -> int:
        return 0 if counts.is_inference() else counts._version


class LaneBytes:
    """The tensors of one lane. Rows are [B, H]; buffers grow by whole blocks and are zero where nothing was written.

    buffers: by part: codes and bytes packed as [B, H, blocks, bytes] (`kernels/layout.py`) where the part is blocked,
        anything else as [B, H, entries, width].
    ring: [B, H, at most window + flush - 1, D] in the model's dtype; smaller while no row is that long.
    coded: [B, H] int64, how many slots are encoded.
    starts: [B, H, runs] int64, first slot of each run that was encoded together, if the codec has parts once a run.
    position: [B, 1 or H, slots, ids] int32, the rotary positions of each slot's token, for keys that are encoded without;
        one for all heads as long as they hold the same tokens. `rotary` turns them.
    basis: what is encoded of the D channels of each token; None = all. The ring holds whole tokens.
    """

    def __init__(
        self, lane: Lane, role: Role, like: Tensor, basis: Basis | None = None, rotary: Rotary | None = None
    ) -> None:
        batch, heads, _, self.channels = like.shape
        self.lane = replace(lane, codec=lane.codec.to(like.device))
        self.role, self.basis = role, basis
        self.parts = lane.codec.parts(self.channels if basis is None else basis.size)
        self.by_run = any(part.every is None for part in self.parts.values())
        self.layouts = {
            name: layout_of(like.device, part.looked_up) for name, part in self.parts.items() if part.blocked
        }
        self.buffers: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            if part.blocked:
                width, dtype = bytes_per_block(part.width, part.bits), torch.uint8
            else:
                width, dtype = part.width, part.dtype or like.dtype
            self.buffers[name] = like.new_zeros(batch, heads, 0, width, dtype=dtype)
        self.ring = like.new_zeros(batch, heads, 0, self.channels)
        self.coded = torch.zeros(batch, heads, dtype=torch.int64, device=like.device)
        self._even = Even(self.coded, 0)
        self.starts = self.coded.new_zeros(batch, heads, 0)
        assert rotary is not None or not lane.pre_rope, (
            "the cache of a recipe with pre-RoPE keys has its model's rotation"
        )
        self.rotary = rotary if lane.pre_rope else None
        ids = 0 if self.rotary is None else self.rotary.ids
        self.position = torch.zeros(batch, 1, 0, ids, dtype=torch.int32, device=like.device)
        self.free = 0  # tokens that can come before any row has some to encode
        self.runs = 0  # while pinned: how many of `starts` are runs; the others are room

    def finite(self, x: Tensor) -> Tensor | None:
        """[] bool, whether float16 ranges can be fitted to x; None if nothing is to be encoded."""
        coded = any(part.kind != "exact" for part in self.parts.values())
        return torch.linalg.vector_norm(x, torch.inf) <= LARGEST if coded and x.numel() else None  # false for NaN, too

    def put(
        self, x: Tensor, count: Tensor | None, length: Tensor, position: Tensor | None = None, even: int | None = None
    ) -> None:
        """Take the tokens that follow slot `length`: x [B, H, T, D], of which each row has its first `count` [B, H]
        (None = all). position: [B, 1 or H, T, ids], for keys that are encoded without. even: the length of every row, if the
        host knows that it is one."""
        tokens = x.shape[2]
        if self.rotary is not None:
            assert position is not None, "pre-RoPE keys come with their positions"
            self._place(position, count, length)
        if tokens > self.free:
            before = None if count is not None or even is None else self._even.of(self.coded)
            if before is not None and even is not None:
                ready = max(0, even - before + tokens - self.lane.window) // self.lane.flush * self.lane.flush
                if ready:
                    self._write(self._oldest_of_all(x, before, even - before, ready), None, before + ready)
                    self._even = Even(self.coded, before + ready)
                self.free = self.lane.ring - (even + tokens - before - ready) + tokens
            else:
                self._put_unevenly(x, tokens if count is None else count, length)
        self.free -= tokens
        if self.lane.ring:
            self._keep(x, count, length, even)

    def _put_unevenly(self, x: Tensor, coming: Tensor | int, length: Tensor) -> None:
        held = length - self.coded
        ready = (held + coming - self.lane.window).clamp_min(0) // self.lane.flush * self.lane.flush
        most = int(ready.max())
        if most:
            self._write(self._oldest(x, held, most), ready, int((self.coded + ready).max()))
        self.free = self.lane.ring - int((length + coming - self.coded).max()) + x.shape[2]

    def _keep(self, x: Tensor, count: Tensor | None, length: Tensor, even: int | None) -> None:
        """Put what is not encoded into the ring: the newest tokens, a ring's worth of slots at most."""
        tokens = x.shape[2]
        if self.ring.shape[2] < self.lane.ring:
            if count is None:
                longest = (int(length.max()) if even is None else even) + tokens
            else:
                longest = int((length + count).max())
            self._reserve_ring(min(self.lane.ring, longest))
        if tokens == 1 and count is None and even is not None:  # a decode step, of many layers
            self.ring.select(2, even % self.lane.ring).copy_(x[:, :, 0])
            return
        first = 0 if count is not None else max(0, tokens - self.lane.ring)
        slot = length[..., None] + torch.arange(first, tokens, device=x.device)
        stay = None  # of whole rows, what is encoded is written too: its place in the ring is free
        if count is not None:
            stay = (slot >= self.coded[..., None]) & (slot < (length + count)[..., None])
        self._scatter(self.ring, x[:, :, first:], slot % self.lane.ring, stay)

    def _place(self, position: Tensor, count: Tensor | None, length: Tensor) -> None:
        """Note the positions of the tokens that follow slot `length`."""
        heads = max(position.shape[1], self.position.shape[1])
        slots, tokens = self.position.shape[2], position.shape[2]
        grow = max(0, -(-(int(length.max()) + tokens) // 32) * 32 - slots)
        self.position = torch.nn.functional.pad(self.position, (0, 0, 0, grow)).expand(-1, heads, -1, -1).contiguous()
        order = torch.arange(tokens, device=position.device)
        valid = None if count is None else order < count[:, :heads, None]
        new = position.to(torch.int32).expand(-1, heads, -1, -1)
        self._scatter(self.position, new, length[:, :heads, None] + order, valid)

    def read(self, start: int, stop: int) -> Packed:
        """The parts of slots [start, stop), codes unpacked to [B, H, tokens, width]; `start` on a block's border."""
        packed = {}
        for name, part in self.parts.items():
            if part.blocked:
                blocks = self.buffers[name][:, :, start // BLOCK : -(-stop // BLOCK)]
                packed[name] = unpack(blocks, part.bits, self.role, self.layouts[name], part.width)[
                    :, :, : stop - start
                ]
            elif part.every is None:
                packed[name] = self.buffers[name]
            else:
                packed[name] = self.buffers[name][:, :, start // part.every : -(-stop // part.every)]
        return packed

    def pin(self, tokens: int, runs: int = 0) -> None:
        """Room for `tokens` slots, for the whole ring and for `runs` more runs, in tensors that a captured step reads and writes
        in place."""
        self._reserve(tokens - self.lane.window)
        self._reserve_ring(self.lane.ring)
        self.coded, self.free, self.runs = self.coded.clone(), 0, self.starts.shape[2]
        if self.by_run:
            self.starts = torch.nn.functional.pad(self.starts, (0, runs), value=NEVER)
            for name in self._run_parts:
                self.buffers[name] = torch.nn.functional.pad(self.buffers[name], (0, 0, 0, runs))

    def unpin(self) -> None:
        self.starts = self.starts[:, :, : self.runs].contiguous()
        for name in self._run_parts:
            self.buffers[name] = self.buffers[name][:, :, : self.runs].contiguous()

    def put_pinned(self, x: Tensor, count: Tensor) -> None:
        """Encode one more run while pinned: x [B, H, T, D], of which each row has its first `count` tokens."""
        assert not self.lane.ring, "asked before (`hooks.pinned.why_not`)"
        coded, starts, buffers = self.coded, self.starts, dict(self.buffers)
        parts = {name: buffers.pop(name) for name in self._run_parts}
        self.unpin()
        self._write(x, count, self.room)  # which makes new tensors of what is counted and of runs:
        # what they hold goes to where a captured step finds it
        assert all(self.buffers[name] is buffer for name, buffer in buffers.items()), (
            "pinned with room for all that comes"
        )
        self.runs = self.starts.shape[2]
        self.coded, self.starts = coded.copy_(self.coded), _into(starts, self.starts)
        for name, part in parts.items():
            self.buffers[name] = _into(part, self.buffers[name])

    @property
    def _run_parts(self) -> list[str]:
        return [name for name, part in self.parts.items() if part.every is None]

    @property
    def room(self) -> int:
        """Slots that there is room for."""
        each = [
            self.buffers[name].shape[2] * (BLOCK if part.blocked else part.every)
            for name, part in self.parts.items()
            if part.every is not None
        ]
        return min(each, default=0) + self.lane.window

    def load(self, other: LaneBytes) -> bool:
        """Take over the bytes of another lane into the tensors that are here; False if they have no room for them."""
        pairs = [(buffer, other.buffers[name]) for name, buffer in self.buffers.items()] + [(self.ring, other.ring)]
        pairs.append((self.starts, other.starts))
        if any(mine.shape[2] < theirs.shape[2] for mine, theirs in pairs):
            return False
        self.starts.fill_(NEVER)
        for mine, theirs in pairs:
            _into(mine, theirs)
        self.coded.copy_(other.coded)
        self.free, self.runs = 0, other.starts.shape[2]
        return True

    def join(self, rows: Sequence[LaneBytes]) -> None:
        """Take over the tokens of lanes of one row each, [B * H] of them; every row gets the room of the longest."""
        assert self.basis is None, "each row would know its keys by channels of its own"

        def joined(parts: list[Tensor]) -> Tensor:
            most = max(part.shape[2] for part in parts)
            padded = [torch.nn.functional.pad(part, (0, 0, 0, most - part.shape[2])) for part in parts]
            return torch.cat(padded).view(*self.coded.shape, most, parts[0].shape[3])

        self.buffers = {name: joined([lane.buffers[name] for lane in rows]) for name in self.buffers}
        self.ring, self.position = joined([lane.ring for lane in rows]), joined([lane.position for lane in rows])
        self.coded = torch.cat([lane.coded for lane in rows]).view_as(self.coded)
        runs = max(lane.starts.shape[2] for lane in rows)
        # a run in which a row took no tokens is empty, and begins where the next one does
        starts = [torch.cat([lane.starts, lane.coded[..., None].expand(-1, -1, runs)], 2) for lane in rows]
        self.starts = torch.cat([each[:, :, :runs] for each in starts]).view(*self.coded.shape, runs)
        self.free = 0

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy encoded tokens from slots `source` to slots `target`, [B, H, n] each; for lanes that write one by one."""
        assert self.lane.one_by_one(self.channels), "tokens that share parameters cannot be moved one by one"
        for name, part in self.parts.items():
            buffer = self.buffers[name]
            if part.blocked:
                codes = unpack(buffer, part.bits, self.role, self.layouts[name], part.width)
                self._copy(codes, source, target)
                self.buffers[name] = pack(codes, part.bits, self.role, self.layouts[name])
            else:
                self._copy(buffer, source, target)
        if self.rotary is not None:
            self.position = self.position.expand(-1, source.shape[1], -1, -1).contiguous()
            self._copy(self.position, source, target)

    @staticmethod
    def _copy(rows: Tensor, source: Tensor, target: Tensor) -> None:
        index = source[..., None].expand(*source.shape, rows.shape[3])
        rows.scatter_(2, target[..., None].expand_as(index), rows.gather(2, index))

    @property
    def step(self) -> int:
        """A stride over slots that cuts neither blocks nor groups, some thousands of tokens."""
        unit = math.lcm(BLOCK, *(part.every or 1 for part in self.parts.values()))
        return unit * max(1, 4096 // unit)

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """(name, kind, tensor) of everything that is held."""
        for name, part in self.parts.items():
            yield name, part.kind, self.buffers[name]
        for name, tensor in self.lane.codec.learned().items():
            yield f"learned {name}", "learned", tensor
        yield "ring", "exact", self.ring
        if self.basis is not None:
            for name, tensor in self.basis.tensors():
                yield name, "metadata", tensor
        yield "coded", "metadata", self.coded
        yield "starts", "metadata", self.starts
        yield "position", "metadata", self.position

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of rows (reordering, repeating) to every tensor."""
        self.buffers = {name: change(buffer) for name, buffer in self.buffers.items()}
        self.ring, self.coded, self.starts = change(self.ring), change(self.coded), change(self.starts)
        self.position = change(self.position)
        if self.basis is not None:
            self.basis = self.basis.map(change)

    def _oldest(self, x: Tensor, held: Tensor, most: int) -> Tensor:
        """[B, H, most, D]: the oldest exact tokens of each row, from the ring first and then from x."""
        if not self.lane.ring or not int(held.max()):
            return x[:, :, :most]
        order = torch.arange(most, device=x.device).expand(*held.shape, most)
        ring = (self.coded[..., None] + order) % self.lane.ring
        if most <= int(held.min()):
            return self.ring.gather(2, ring[..., None].expand(-1, -1, -1, self.channels))
        index = torch.where(order < held[..., None], ring, self.ring.shape[2] + order - held[..., None])
        both = torch.cat([self.ring, x], 2)
        index = index.clamp_max(both.shape[2] - 1)  # past a short row's tokens: anything, `count` leaves it out
        return both.gather(2, index[..., None].expand(-1, -1, -1, self.channels))

    def _oldest_of_all(self, x: Tensor, coded: int, held: int, most: int) -> Tensor:
        """As `_oldest`, where every row has `coded` tokens encoded and `held` in the ring."""
        if not held:
            return x[:, :, :most]
        first, count = coded % self.lane.ring, min(held, most)
        if first + count <= self.lane.ring:
            ring = self.ring[:, :, first : first + count]
        else:
            slot = torch.arange(first, first + count, device=x.device) % self.lane.ring
            ring = self.ring.index_select(2, slot)
        return ring if most <= held else torch.cat([ring, x[:, :, : most - held]], 2)

    def _write(self, x: Tensor, count: Tensor | None, last: int) -> None:
        """Encode x [B, H, T, D] into the slots after `coded`; each row has its first `count` tokens (None = all), and none
        of them comes to lie at slot `last` or beyond."""
        self._reserve(last)
        if self.rotary is not None:
            slot = self.coded[:, : self.position.shape[1], None] + torch.arange(x.shape[2], device=x.device)
            slot = slot.clamp_max(self.position.shape[2] - 1)  # past a short row's tokens: anything
            index = slot[..., None].expand(-1, -1, -1, self.rotary.ids)
            x = self.rotary.unrotate(x, self.position.gather(2, index))
        if self.basis is not None:  # no kernel writes fewer channels than come
            self._write_by_codec(self.basis.shrink(x), count, last)
        elif not encode.write(self, x, count):
            self._write_by_codec(x, count, last)
        if self.by_run:
            self.starts = torch.cat([self.starts, self.coded[..., None]], 2)
        self.coded = self.coded + (x.shape[2] if count is None else count)

    def _write_by_codec(self, x: Tensor, count: Tensor | None, last: int) -> None:
        """What `_write` does where no kernel does it; no slot in question is beyond `last`."""
        even, tokens = self._even.of(self.coded), x.shape[2]
        first = int(self.coded.min()) if even is None else even
        order = torch.arange(tokens, device=x.device)
        valid = None if count is None or bool((count == tokens).all()) else order < count[..., None]
        packed = self.lane.codec.encode(x, valid)
        slot = self.coded[..., None] + order  # [B, H, T]
        for name, part in self.parts.items():
            if part.every is None:
                self.buffers[name] = torch.cat([self.buffers[name], packed[name]], 2)
            elif part.blocked:
                self._write_codes(name, packed[name], slot, valid, first, last)
            else:
                # entries, not tokens: a group's slot is that of its first token
                entry = slot[..., :: part.every] // part.every
                self._scatter(
                    self.buffers[name], packed[name], entry, None if valid is None else valid[..., :: part.every]
                )

    def _write_codes(self, name: str, codes: Tensor, slot: Tensor, valid: Tensor | None, first: int, last: int) -> None:
        """Put codes into their blocks; a block that is partly filled already is unpacked and packed again."""
        part, start = self.parts[name], first // BLOCK
        span = slice(start, -(-last // BLOCK))
        blocks = self.buffers[name][:, :, span]
        old = unpack(blocks, part.bits, self.role, self.layouts[name], part.width)
        self._scatter(old, codes, slot - start * BLOCK, valid)
        self.buffers[name][:, :, span] = pack(old, part.bits, self.role, self.layouts[name])

    @staticmethod
    def _scatter(target: Tensor, source: Tensor, index: Tensor, valid: Tensor | None) -> None:
        """target[b, h, index[b, h, i]] = source[b, h, i] where valid."""
        if valid is None:
            target.scatter_(2, index[..., None].expand_as(source), source)
        else:
            row, head, token = valid.nonzero(as_tuple=True)
            target[row, head, index[row, head, token]] = source[row, head, token]

    def _reserve_ring(self, tokens: int) -> None:
        """A short prompt does not pay for the whole ring; until it is whole, a slot's index is the slot itself."""
        if tokens > self.ring.shape[2]:
            room = min(self.lane.ring, -(-tokens // 32) * 32)
            self.ring = torch.nn.functional.pad(self.ring, (0, 0, 0, room - self.ring.shape[2]))

    def _reserve(self, tokens: int) -> None:
        """Room for `tokens` slots in whole blocks, and a sixteenth more than before, so that growing stays rare."""
        for name, part in self.parts.items():
            if part.every is None:
                continue
            packed = part.blocked
            per_entry, unit = (BLOCK, BLOCK) if packed else (part.every, 32)  # unpacked parts waste less
            buffer = self.buffers[name]
            old = buffer.shape[2] * per_entry
            if tokens <= old:
                continue
            room = -(-max(tokens, old + old // 16) // unit) * unit
            grown = buffer.new_zeros(*buffer.shape[:2], -(-room // per_entry), buffer.shape[3])
            grown[:, :, : buffer.shape[2]] = buffer
            self.buffers[name] = grown


def _into(room: Tensor, x: Tensor) -> Tensor:
    """`room`, of which the first entries are now those of `x`."""
    room[:, :, : x.shape[2]] = x
    return room
