"""Rows of different lengths, none as long as the longest: for selections that let heads compete for tokens."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from kvmosaic.kernels import attention
from kvmosaic.stores.coded import CodedStore, answers_at_once
from kvmosaic.stores.lane import Lane


class RaggedStore:
    """A coded store for each sequence and KV head, so that its bytes are those of the tokens held and less than a block more.

    A kernel is called for each row, which costs a decode step some time; where one must read all rows at once, `padded`
    gives them a common store.
    """

    def __init__(self, empty: CodedStore) -> None:
        """empty: the store of all rows that this one stands for, with nothing in it."""
        self.tier = empty.tier
        batch, heads = empty.length.shape
        self.rows = [[_row(empty, row, head) for head in range(heads)] for row in range(batch)]

    @property
    def length(self) -> Tensor:
        return torch.cat([torch.cat([store.length for store in row], 1) for row in self.rows])

    def put(self, keys: Tensor, values: Tensor, keep: Tensor | None, position: Tensor | None = None) -> None:
        """As `CodedStore.put`."""
        if answers_at_once(keys.device):  # before any row is written
            self.rows[0][0].examine(*(x if keep is None else x.where(keep[..., None], 0) for x in (keys, values)))
        for row, head, store in self._stores():
            store.put(
                _one(keys, row, head),
                _one(values, row, head),
                None if keep is None else _one(keep, row, head),
                None if position is None else position[row : row + 1],
            )

    def attend(
        self, query: Tensor, scale: float, softcap: float | None, fresh: tuple[Tensor, Tensor] | None = None
    ) -> attention.Partial:
        """As `CodedStore.attend`."""
        parts = [
            store.attend(
                _one(query, row, head),
                scale,
                softcap,
                None if fresh is None else (_one(fresh[0], row, head), _one(fresh[1], row, head)),
            )
            for row, head, store in self._stores()
        ]
        out, lse = (torch.cat(each).view(*query.shape[:2], *each[0].shape[2:]) for each in zip(*parts, strict=True))
        return attention.Partial(out, lse)

    @property
    def unverified(self) -> list[tuple[str, Tensor]]:
        return [each for _, _, store in self._stores() for each in store.unverified]

    def verify(self, fine: bool = False) -> None:
        for _, _, store in self._stores():
            store.verify(fine)

    def padded(self) -> CodedStore:
        """The same tokens in one store, in which every row has the room of the longest; for lanes without a basis."""
        keys, values, shape = self.rows[0][0].keys, self.rows[0][0].values, (len(self.rows), len(self.rows[0]), -1, -1)
        store = CodedStore(
            self.tier, keys.ring[:, :, :0].expand(shape), values.ring[:, :, :0].expand(shape), None, keys.rotary
        )
        store.length = self.length
        store.keys.join([each.keys for _, _, each in self._stores()])
        store.values.join([each.values for _, _, each in self._stores()])
        return store

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        for row, head, store in self._stores():
            yield from ((f"row {row} head {head}.{name}", kind, tensor) for name, kind, tensor in store.tensors())

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        order = change(torch.arange(len(self.rows), device=self.rows[0][0].length.device)).tolist()
        # a row that is taken twice becomes two
        first = [row not in order[:at] for at, row in enumerate(order)]
        self.rows = [
            self.rows[row] if moves else [_copied(each) for each in self.rows[row]]
            for row, moves in zip(order, first, strict=True)
        ]

    def _stores(self) -> Iterator[tuple[int, int, CodedStore]]:
        for row, heads in enumerate(self.rows):
            for head, store in enumerate(heads):
                yield row, head, store


def _one(x: Tensor, row: int, head: int) -> Tensor:
    return x[row : row + 1, head : head + 1]


def _row(empty: CodedStore, row: int, head: int) -> CodedStore:
    """A store for one row of an empty one."""

    def own(lane: Lane) -> Lane:
        return replace(lane, codec=lane.codec.of_head(head))

    keys, values = empty.keys, empty.values  # whose codecs are on the device: what they learned is shared
    basis = None if keys.basis is None else keys.basis.map(lambda x: _one(x, row, head))
    tier = replace(empty.tier, keys=own(keys.lane), values=own(values.lane))
    return CodedStore(tier, _one(keys.ring, row, head), _one(values.ring, row, head), basis, keys.rotary)


def _copied(store: CodedStore) -> CodedStore:
    """With tensors of its own, but for what was learned."""
    new = copy.copy(store)
    new.keys, new.values = copy.copy(store.keys), copy.copy(store.values)
    new.map(torch.clone)
    return new
