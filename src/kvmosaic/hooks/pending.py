"""Tokens between their attention and their store."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pending:
    """Tokens that have been attended but not stored yet, with the columns that travel with them.

    keys, values: [B, H, T, D].
    query: [B, Hq, T, D], while a prompt comes in pieces and is selected from as a whole (of the newest tokens, if it is pruned as it
        comes); else None.
    place: int64, among all tokens that its row has seen, -1 for padding, while a prompt is pruned as it comes; then it, visual and
        valid are [B, H, T], as heads keep tokens of their own.
    visual, valid: [B, T] bool, False for padding in `valid`; None = no token is visual, all are valid.
    tier: [B, H, T] int8, what the recipe's selection said; None = the first tier.
    position: [B, ids, T], rotary positions, for keys that are encoded without; None = nobody asks.
    score: [B, H, T] float32, attention received, and asked: [B, T] bool, whether a token's own query counted in scores;
        only where the selection goes on while decoding.
    """

    keys: Tensor
    values: Tensor
    visual: Tensor | None = None
    valid: Tensor | None = None
    tier: Tensor | None = None
    score: Tensor | None = None
    asked: Tensor | None = None
    position: Tensor | None = None
    query: Tensor | None = None
    place: Tensor | None = None

    def __len__(self) -> int:
        return self.keys.shape[2]

    def __getitem__(self, tokens: slice) -> "Pending":
        return self._each(lambda states: states[:, :, tokens], lambda column: column[..., tokens])

    def __add__(self, other: "Pending") -> "Pending":
        def join(name: str, missing: int) -> Tensor | None:
            columns = getattr(self, name), getattr(other, name)
            some = next((each for each in columns if each is not None), None)
            if some is None:
                return None
            whole = (
                some.new_full((*some.shape[:-1], len(part)), missing) if each is None else each
                for each, part in zip(columns, (self, other), strict=True)
            )
            return torch.cat(list(whole), -1)

        keys, values = torch.cat([self.keys, other.keys], 2), torch.cat([self.values, other.values], 2)
        some = self.query is not None and other.query is not None
        query = torch.cat([self.query, other.query], 2) if some else None  # type: ignore[list-item]
        missing = {"visual": False, "valid": True, "tier": 0, "score": 0, "asked": False, "position": 0, "place": -1}
        return Pending(keys, values, **{name: join(name, value) for name, value in missing.items()}, query=query)

    def heads_as_rows(self, heads: int) -> "Pending":
        """[B, n * heads, T, ...] -> [B * heads, n, T, ...], [B, heads, T] -> [B * heads, T]."""
        return self._each(lambda x: x.unflatten(1, (heads, -1)).flatten(0, 1), lambda column: column.flatten(0, 1))

    def rows_as_heads(self, batch: int) -> "Pending":
        """Back again."""
        return self._each(
            lambda x: x.unflatten(0, (batch, -1)).flatten(1, 2), lambda column: column.unflatten(0, (batch, -1))
        )

    def gather(self, tokens: Tensor) -> "Pending":
        """tokens: [B, n] int64, those of each row."""
        index = tokens[:, None, :, None]
        return self._each(
            lambda x: x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])), lambda column: column.gather(1, tokens)
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> "Pending":
        return self._each(change, change)

    def _each(self, states: Callable[[Tensor], Tensor], columns: Callable[[Tensor], Tensor]) -> "Pending":
        """With keys, values and queries changed by one function, the columns by another."""
        change = {"keys": states, "values": states, "query": states}
        held = ((field.name, getattr(self, field.name)) for field in fields(self))
        return replace(self, **{name: change.get(name, columns)(each) for name, each in held if each is not None})
