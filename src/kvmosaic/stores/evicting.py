"""A store that gives up tokens: each carries its position and its score, and a freed slot takes the newest token."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kvmosaic.kernels import attention
from kvmosaic.stores.coded import CodedStore


class EvictingStore:
    """A coded store with two columns, [B, H, slots]: `position` int32, the token's place among its row's tokens, and
    `score` float32. Only over lanes that write one by one (`Lane.one_by_one`): attention does not depend on the order of
    tokens once keys are rotated, so slots are reused at once.

    capacity: [B] int64, tokens that a row may keep; set by the first prompt.
    """

    def __init__(self, store: CodedStore) -> None:
        self.store = store
        self.position = torch.zeros(*store.length.shape, 0, dtype=torch.int32, device=store.length.device)
        self.score = self.position.float()
        self.capacity: Tensor | None = None
        self.placed = store.length.new_zeros(store.length.shape[0])  # [B], tokens that have come so far

    @property
    def length(self) -> Tensor:
        return self.store.length

    def put(
        self,
        keys: Tensor,
        values: Tensor,
        valid: Tensor,
        keep: Tensor,
        score: Tensor,
        position: Tensor | None = None,
    ) -> None:
        """keys, values [B, H, T, D]; valid [B, T] bool; keep [B, H, T] bool; score [B, H, T] float32; position as in
        `CodedStore.put`."""
        most = int((self.length + keep.sum(2)).max())
        grow = max(0, -(-most // 32) * 32 - self.position.shape[2])
        self.position = torch.nn.functional.pad(self.position, (0, grow))
        self.score = torch.nn.functional.pad(self.score, (0, grow))
        place = (self.placed[:, None] + valid.cumsum(1) - 1)[:, None].expand_as(keep)
        slot = self.length[..., None] + keep.cumsum(2) - 1
        row, head, token = keep.nonzero(as_tuple=True)
        self.position[row, head, slot[keep]] = place[row, head, token].to(torch.int32)
        self.score[row, head, slot[keep]] = score[row, head, token]
        self.placed = self.placed + valid.sum(1)
        self.store.put(keys, values, keep, position)

    def needs(self, tokens: int) -> int:
        """Slots for `tokens` more: no row grows beyond its capacity."""
        assert self.capacity is not None, "the first prompt sets the capacity"
        return min(int(self.capacity.max()), self.store.needs(tokens))

    def pin(self, slots: int) -> None:
        """Room for `slots`, in tensors that a captured step writes in place; and in the columns for the step's own token
        beside them, which is ranked before it is known whether another leaves."""
        assert self.capacity is not None, "the first prompt sets the capacity"
        self.store.pin(slots)
        grow = max(0, slots + 1 - self.position.shape[2])
        self.position = torch.nn.functional.pad(self.position, (0, grow))
        self.score = torch.nn.functional.pad(self.score, (0, grow))
        self.placed, self.capacity = self.placed.clone(), self.capacity.clone()

    @property
    def room(self) -> int:
        return min(self.store.room, self.position.shape[2] - 1)

    def load(self, other: "EvictingStore") -> bool:
        """As `CodedStore.load`."""
        assert self.capacity is not None and other.capacity is not None, "the first prompt sets the capacity"
        if not self.store.load(other.store):
            return False
        held = min(self.position.shape[2], other.position.shape[2])  # beyond the longest row they say nothing
        self.position[..., :held] = other.position[..., :held]
        self.score[..., :held] = other.score[..., :held]
        self.placed.copy_(other.placed)
        self.capacity.copy_(other.capacity)
        return True

    def attend(
        self, query: Tensor, scale: float, softcap: float | None, fresh: tuple[Tensor, Tensor] | None = None
    ) -> attention.Partial:
        return self.store.attend(query, scale, softcap, fresh)

    def observe(self, query: Tensor, scale: float, softcap: float | None, lse: Tensor, weight: Tensor) -> None:
        """Add to each token's score what it received from these queries: query [B, H, M, D], lse [B, H, M] over all
        tokens everywhere, weight [B, 1, M] (0 for padding; 1 over the query heads that share a KV head)."""
        mass = attention.mass(self.store.keys, self.length, query, scale, softcap, lse, weight)
        self.score[..., : mass.shape[2]] += mass

    def evict(self, worst: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        """Bring every row back to its capacity.

        worst(position, score, present) -> rank [B, H, slots], smallest leaves first.
        """
        assert self.capacity is not None, "the first prompt sets the capacity"
        leaving = (self.length - self.capacity[:, None]).clamp_min(0)
        most = int(leaving.max())
        if not most:
            return
        slots = self.position.shape[2]
        slot = torch.arange(slots, device=leaving.device)
        present = slot < self.length[..., None]
        order = worst(self.position, self.score, present).masked_fill(~present, torch.inf).argsort(dim=2, stable=True)
        place = torch.empty_like(order).scatter_(2, order, slot.expand_as(order))
        leaves = present & (place < leaving[..., None])
        left = self.length - leaving
        # the tokens beyond the new length that stay move into the holes before it, as many as there are
        holes = (leaves & (slot < left[..., None])).to(torch.int8).argsort(dim=2, descending=True, stable=True)
        tail = (present & ~leaves & (slot >= left[..., None])).to(torch.int8)
        tail = tail.argsort(dim=2, descending=True, stable=True)
        moves = (leaves & (slot < left[..., None])).sum(2)
        real = torch.arange(most, device=leaving.device) < moves[..., None]
        source = torch.where(real, tail[..., :most], holes[..., :most])  # a row with fewer moves copies in place
        target = holes[..., :most]
        self.store.keys.move(source, target)
        self.store.values.move(source, target)
        for column in (self.position, self.score):
            column.scatter_(2, target, column.gather(2, source))
        self.store.shorten(left)

    @property
    def unverified(self) -> list[tuple[str, Tensor]]:
        return self.store.unverified

    def verify(self, fine: bool = False) -> None:
        self.store.verify(fine)

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        yield from self.store.tensors()
        yield "position", "metadata", self.position
        yield "score", "metadata", self.score
        yield "placed", "metadata", self.placed
        if self.capacity is not None:
            yield "capacity", "metadata", self.capacity

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.store.map(change)
        self.position, self.score, self.placed = change(self.position), change(self.score), change(self.placed)
        if self.capacity is not None:
            self.capacity = change(self.capacity)
