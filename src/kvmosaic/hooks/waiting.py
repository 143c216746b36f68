"""Generated tokens that wait to be chosen among, where a captured step finds them, adds to their scores and puts its own."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from kvmosaic.hooks.pending import Pending
from kvmosaic.selection import WAIT, Gathering
from kvmosaic.stores import EXACT, EvictingStore


class Waiting:
    """As many tokens as are chosen among at a time, exact, with the attention that they receive meanwhile.

    store: of `gather` slots, the same number taken in all rows. It is emptied before a token would have to leave.
    asks: [gather + 1] float32, 1 where the query of the token in that slot counts.
    """

    def __init__(self, selection: Gathering, empty: Tensor) -> None:
        """empty: no keys, [B, H, 0, D]."""
        self.selection, size = selection, selection.gather
        self.store = EvictingStore(EXACT.open(0, empty, empty))
        self.store.capacity = torch.full((empty.shape[0],), size, device=empty.device)
        self.store.pin(size)
        self.asks = torch.zeros(size + 1, device=empty.device)
        self.begin = 0  # how many tokens had been seen before the first that waits

    def fill(self, pending: Pending | None, seen: int) -> None:
        """What waits from now on, of `seen` tokens that have come."""
        store, count = self.store.store, 0 if pending is None else len(pending)
        if pending is not None:
            assert pending.score is not None, "tokens that wait are scored"
            store.keys.buffers["numbers"][:, :, :count] = pending.keys
            store.values.buffers["numbers"][:, :, :count] = pending.values
            self.store.score[..., :count] = pending.score
        for counted in self._counts:
            counted.fill_(count)
        self._begin(seen - count)

    def _begin(self, seen: int) -> None:
        self.begin = seen
        self.asks[:-1] = torch.tensor(_asks(self.selection, seen), device=self.asks.device)

    @property
    def _counts(self) -> tuple[Tensor, ...]:
        store = self.store.store
        return store.length, store.keys.coded, store.values.coded

    @property
    def full(self) -> Tensor:
        """[B, H] bool, the same everywhere: whether as many wait as are chosen among."""
        return self.store.length == self.selection.gather

    def empty(self, full: Tensor) -> None:
        """All that waits has its tier, if it was `full`."""
        for counted in self._counts:
            counted.mul_(~full)
        self._begin(self.begin + self.selection.gather)

    def end(self, seen: int) -> None:
        """So many tokens have come: where the last of them ended, queued steps and what was to follow them changed nothing."""
        if self.begin != seen - len(self):
            self._begin(seen - len(self))

    def __len__(self) -> int:
        return int(self.store.length[0, 0])

    def held(self, count: int) -> Pending:
        """The first `count` that wait, as a layer's ordinary steps have them."""
        store = self.store.store
        score = self.store.score[..., :count]
        return Pending(
            store.keys.buffers["numbers"][:, :, :count],
            store.values.buffers["numbers"][:, :, :count],
            tier=torch.full_like(score, WAIT, dtype=torch.int8),
            score=score,
            asked=self.asks[:count].bool().expand(score.shape[0], -1),
        )


@lru_cache(maxsize=8)  # all layers ask alike
def _asks(selection: Gathering, begin: int) -> list[bool]:
    """Whose queries count of the tokens that wait, the first of them at place `begin`."""
    return [selection.asks(begin + each, each) for each in range(selection.gather)]
